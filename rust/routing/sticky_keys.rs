//! Which workers the keys of sessions were given to.
//!
//! A key has a home and, if that could not be picked once, a stand-in. What is kept of a key is a
//! hash of 128 bits: keys may be long, and it is enough that two of them are not mistaken for one
//! another by chance.
//!
//! Bounded: of more than the bound's keys the one not used for longest is forgotten, and so is one
//! that was not used for a given time. Knows no clock: time is an argument that never goes back.

use std::collections::BTreeMap;

use hashbrown::HashMap;
use xxhash_rust::xxh3::xxh3_128;

use super::WorkerId;

/// Idle keys removed at a time, so that no request has to wait for the removal of many. More than
/// are added at a time, so that they go faster than they come.
const MAX_REMOVED: usize = 8;

/// A routing key, as it is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key(u128);

impl Key {
    pub(super) fn of(routing_key: &str) -> Key {
        Key(xxh3_128(routing_key.as_bytes()))
    }
}

#[derive(Debug)]
struct Entry {
    home: WorkerId,
    stand_in: Option<WorkerId>,
    /// Its place in the order of use.
    use_number: u64,
    used_at_secs: f64,
}

/// See the module.
#[derive(Debug)]
pub(super) struct StickyKeys {
    max_keys: usize,
    max_idle_secs: f64,
    entries: HashMap<Key, Entry>,
    /// Every key, the least recently used first.
    by_use: BTreeMap<u64, Key>,
    uses: u64,
    /// Keys of each worker, as home or stand-in; only those that have any.
    held: HashMap<WorkerId, u32>,
}

impl StickyKeys {
    /// No keys yet; at most `max_keys` ≥ 1, each for `max_idle_secs` after its last use.
    pub(super) fn new(max_keys: usize, max_idle_secs: f64) -> StickyKeys {
        StickyKeys {
            max_keys,
            max_idle_secs,
            entries: HashMap::new(),
            by_use: BTreeMap::new(),
            uses: 0,
            held: HashMap::new(),
        }
    }

    /// The key's home and its stand-in, as far as it has them. To ask is to use the key.
    pub(super) fn workers_of(&mut self, key: Key, at_secs: f64) -> [Option<WorkerId>; 2] {
        self.remove_idle(at_secs);
        let uses = self.uses;
        let Some(entry) = self.entries.get_mut(&key) else { return [None; 2] };
        if at_secs - entry.used_at_secs > self.max_idle_secs {
            self.remove(key);
            return [None; 2];
        }
        self.by_use.remove(&entry.use_number);
        self.by_use.insert(uses, key);
        (entry.use_number, entry.used_at_secs) = (uses, at_secs);
        self.uses += 1;
        [Some(entry.home), entry.stand_in]
    }

    /// Gives a new key its home, and one that is known a stand-in, in place of an earlier one.
    pub(super) fn give(&mut self, key: Key, worker: WorkerId, at_secs: f64) {
        *self.held.entry(worker).or_default() += 1;
        if let Some(entry) = self.entries.get_mut(&key) {
            if let Some(before) = entry.stand_in.replace(worker) {
                self.release(before);
            }
            return;
        }
        if self.entries.len() >= self.max_keys
            && let Some((_, &oldest)) = self.by_use.first_key_value()
        {
            self.remove(oldest);
        }
        let use_number = self.uses;
        self.uses += 1;
        let entry = Entry { home: worker, stand_in: None, use_number, used_at_secs: at_secs };
        self.entries.insert(key, entry);
        self.by_use.insert(use_number, key);
    }

    /// How many keys a worker has.
    pub(super) fn held_by(&self, worker: WorkerId) -> u32 {
        self.held.get(&worker).copied().unwrap_or_default()
    }

    /// Takes all its keys from a worker; a stand-in becomes the home.
    pub(super) fn forget(&mut self, worker: WorkerId) {
        let by_use = &mut self.by_use;
        self.entries.retain(|_, entry| {
            if entry.stand_in == Some(worker) {
                entry.stand_in = None;
            }
            if entry.home != worker {
                return true;
            }
            match entry.stand_in.take() {
                Some(stand_in) => {
                    entry.home = stand_in;
                    true
                }
                None => {
                    by_use.remove(&entry.use_number);
                    false
                }
            }
        });
        self.held.remove(&worker);
    }

    fn remove_idle(&mut self, at_secs: f64) {
        for _ in 0..MAX_REMOVED {
            let Some((_, &key)) = self.by_use.first_key_value() else { break };
            let idle_secs = self.entries.get(&key).map(|entry| at_secs - entry.used_at_secs);
            if idle_secs.is_some_and(|idle_secs| idle_secs <= self.max_idle_secs) {
                break;
            }
            self.remove(key);
        }
    }

    fn remove(&mut self, key: Key) {
        let Some(entry) = self.entries.remove(&key) else { return };
        self.by_use.remove(&entry.use_number);
        self.release(entry.home);
        if let Some(stand_in) = entry.stand_in {
            self.release(stand_in);
        }
    }

    /// A worker has a key less.
    fn release(&mut self, worker: WorkerId) {
        if let Some(held) = self.held.get_mut(&worker) {
            *held -= 1;
            if *held == 0 {
                self.held.remove(&worker);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Step {
        Ask { key: u8, after_secs: u8 },
        Give { key: u8, worker: WorkerId },
        Forget(WorkerId),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0..12_u8, 0..3_u8).prop_map(|(key, after_secs)| Step::Ask { key, after_secs }),
            4 => (0..12_u8, 0..4_u32).prop_map(|(key, worker)| Step::Give { key, worker }),
            1 => (0..4_u32).prop_map(Step::Forget),
        ]
    }

    /// The same, slow and plain: keys in the order of use, each with its workers.
    #[derive(Default)]
    struct Model {
        keys: Vec<(u8, Vec<WorkerId>, f64)>,
    }

    const MAX_KEYS: usize = 6;
    const MAX_IDLE_SECS: f64 = 12.0;

    impl Model {
        fn ask(&mut self, key: u8, at_secs: f64) -> Vec<WorkerId> {
            self.keys.retain(|(_, _, used)| at_secs - used <= MAX_IDLE_SECS);
            let Some(place) = self.keys.iter().position(|(known, ..)| *known == key) else {
                return vec![];
            };
            let (_, workers, _) = self.keys.remove(place);
            self.keys.push((key, workers.clone(), at_secs));
            workers
        }

        fn give(&mut self, key: u8, worker: WorkerId, at_secs: f64) {
            match self.keys.iter_mut().find(|(known, ..)| *known == key) {
                Some((_, workers, _)) => {
                    workers.truncate(1);
                    workers.push(worker);
                }
                None => {
                    if self.keys.len() == MAX_KEYS {
                        self.keys.remove(0);
                    }
                    self.keys.push((key, vec![worker], at_secs));
                }
            }
        }

        fn forget(&mut self, worker: WorkerId) {
            for (_, workers, _) in &mut self.keys {
                workers.retain(|known| *known != worker);
            }
            self.keys.retain(|(_, workers, _)| !workers.is_empty());
        }

        fn held_by(&self, worker: WorkerId) -> usize {
            self.keys.iter().flat_map(|(_, workers, _)| workers).filter(|w| **w == worker).count()
        }
    }

    proptest! {
        #[test]
        fn it_does_as_the_plain_model(steps in prop::collection::vec(step(), 1..120)) {
            let mut keys = StickyKeys::new(MAX_KEYS, MAX_IDLE_SECS);
            let mut model = Model::default();
            let mut at_secs = 0.0;
            let key_of = |key: u8| Key::of(&key.to_string());
            for step in steps {
                match step {
                    Step::Ask { key, after_secs } => {
                        at_secs += f64::from(after_secs);
                        let found = keys.workers_of(key_of(key), at_secs);
                        let found: Vec<_> = found.into_iter().flatten().collect();
                        prop_assert_eq!(found, model.ask(key, at_secs));
                    }
                    Step::Give { key, worker } => {
                        // As a pick does: asked first, and only given what it does not have.
                        let known = model.ask(key, at_secs);
                        keys.workers_of(key_of(key), at_secs);
                        if !known.contains(&worker) {
                            keys.give(key_of(key), worker, at_secs);
                            model.give(key, worker, at_secs);
                        }
                    }
                    Step::Forget(worker) => {
                        keys.forget(worker);
                        model.forget(worker);
                    }
                }
                prop_assert_eq!(keys.entries.len(), model.keys.len());
                prop_assert_eq!(keys.by_use.len(), model.keys.len());
                for worker in 0..4 {
                    prop_assert_eq!(keys.held_by(worker) as usize, model.held_by(worker));
                }
            }
        }
    }

    #[test]
    fn idle_keys_go_a_few_at_a_time_and_are_unknown_at_once() {
        let mut keys = StickyKeys::new(1000, 1.0);
        let key = |number: u32| Key::of(&number.to_string());
        for number in 0..100 {
            keys.give(key(number), 0, 0.0);
        }
        assert_eq!(keys.workers_of(key(99), 5.0), [None; 2]);
        assert_eq!(keys.entries.len(), 100 - MAX_REMOVED - 1);
        for number in 0..100 {
            assert_eq!(keys.workers_of(key(number), 5.0), [None; 2]);
        }
        assert_eq!((keys.entries.len(), keys.by_use.len(), keys.held_by(0)), (0, 0, 0));
    }
}
