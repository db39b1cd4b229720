//! `manual`: a session stays at the worker it was first given, by its routing key.
//!
//! Source: the policy of that name of SGLang's router. A new key gets a worker by
//! `assignment_mode`, and keeps it whatever the load and whoever joins. While that worker cannot be
//! picked the key has a stand-in, and comes home when it can be again. A worker that left, or came
//! back with an empty cache, has lost its keys: those that have a stand-in stay there.
//!
//! A request without a key is given a worker in the same way, which is not remembered. One that
//! names its worker changes nothing about its key.
//!
//! Picks hold the table of keys alone, for less than a microsecond; forgetting a worker does for one
//! walk over it.

use std::sync::Arc;

use clap::ValueEnum;
use parking_lot::Mutex;

use super::candidates::Weighed;
use super::sticky_keys::{Key, StickyKeys};
use super::{
    Options, Pick, PickError, Policy, Request, Target, WorkerId, least_by, least_in_flight,
};

const STICKY: &str = "sticky";
const NEW_KEY: &str = "new_key";
const MOVED_KEY: &str = "moved_key";
const NO_KEY: &str = "no_key";

/// Every reason this policy gives: the key's worker or its stand-in; the first worker of a key; a
/// stand-in, because the worker could not be picked; a worker for want of a key.
pub const REASONS: &[&str] = &[STICKY, NEW_KEY, MOVED_KEY, NO_KEY];

/// See [`super::PolicyKind::score`].
pub const SCORE: &str = "With the reason `sticky`, and under `assignment_mode` `random`, null: nothing is \
    compared. Else requests in flight, or the keys that the worker has under `min_group`; the lowest wins.";

/// How a key gets its worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum AssignmentMode {
    /// Any, all equally likely.
    Random,
    /// The fewest requests in flight, ties at random.
    MinLoad,
    /// The fewest keys, ties at random.
    MinGroup,
}

/// Keys remembered, about 100 bytes each; beyond it the one that was not used for longest is
/// forgotten.
const MAX_KEYS: usize = 1 << 20;

/// See the module.
pub struct Manual {
    assignment_mode: AssignmentMode,
    keys: Mutex<StickyKeys>,
}

impl Manual {
    pub fn new(options: &Options) -> Self {
        let keys = StickyKeys::new(MAX_KEYS, options.max_idle_secs as f64);
        Self { assignment_mode: options.assignment_mode, keys: Mutex::new(keys) }
    }

    /// A worker for a key that has none among these.
    fn assign(
        &self,
        keys: &StickyKeys,
        targets: &[Arc<Target>],
        rng: &mut fastrand::Rng,
        weighed: Option<&mut Weighed>,
    ) -> usize {
        match self.assignment_mode {
            AssignmentMode::Random => rng.usize(..targets.len()),
            AssignmentMode::MinLoad => {
                if let Some(weighed) = weighed {
                    weighed.fewest_in_flight_wins();
                }
                least_in_flight(targets, rng)
            }
            AssignmentMode::MinGroup => {
                let held = |index: usize| keys.held_by(targets[index].id);
                if let Some(weighed) = weighed {
                    weighed.lowest_wins(|candidate| Some(f64::from(held(candidate.index))));
                }
                least_by((0..targets.len()).map(|index| Some(held(index))), rng)
            }
        }
    }
}

impl Policy for Manual {
    fn pick(
        &self,
        request: &Request,
        targets: &[Arc<Target>],
        rng: &mut fastrand::Rng,
        weighed: Option<&mut Weighed>,
    ) -> Result<Pick, PickError> {
        let mut keys = self.keys.lock();
        let Some(key) = request.routing_key.map(Key::of) else {
            let index = self.assign(&keys, targets, rng, weighed);
            return Ok(Pick { index, reason: NO_KEY, matched_tokens: None });
        };
        let known = keys.workers_of(key, request.at_secs);
        let place =
            |worker: &WorkerId| targets.binary_search_by_key(worker, |target| target.id).ok();
        if let Some(index) = known.iter().flatten().find_map(place) {
            return Ok(Pick { index, reason: STICKY, matched_tokens: None });
        }
        let index = self.assign(&keys, targets, rng, weighed);
        keys.give(key, targets[index].id, request.at_secs);
        let reason = if known == [None, None] { NEW_KEY } else { MOVED_KEY };
        Ok(Pick { index, reason, matched_tokens: None })
    }

    fn forget(&self, worker: WorkerId) {
        self.keys.lock().forget(worker);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routing::tests::{close_to, keyed, loaded, options, scores_of, tally};

    fn policy(flags: &[&str]) -> Manual {
        Manual::new(&options(flags).expect("flags parse"))
    }

    fn pick(policy: &Manual, key: &str, targets: &[Arc<Target>]) -> (WorkerId, &'static str) {
        let (pick, _) = scores_of(policy, &keyed(key), targets);
        (targets[pick.index].id, pick.reason)
    }

    #[test]
    fn a_key_stays_whatever_the_load_and_whoever_joins() {
        let policy = policy(&[]);
        let (targets, _held) = loaded(&[1, 0, 1, 0]);
        assert_eq!(pick(&policy, "a", &targets[..3]), (1, NEW_KEY));
        let _busy: Vec<_> = (0..50).map(|_| targets[1].begin()).collect();
        assert_eq!(pick(&policy, "a", &targets), (1, STICKY));
        assert_eq!(pick(&policy, "b", &targets), (3, NEW_KEY));
    }

    #[test]
    fn a_key_comes_home_from_its_stand_in() {
        let policy = policy(&[]);
        let (targets, _held) = loaded(&[0, 1, 2, 3]);
        assert_eq!(pick(&policy, "a", &targets), (0, NEW_KEY));
        assert_eq!(pick(&policy, "a", &targets[1..]), (1, MOVED_KEY));
        assert_eq!(pick(&policy, "a", &targets[1..]), (1, STICKY));
        assert_eq!(pick(&policy, "a", &targets), (0, STICKY));
        assert_eq!(pick(&policy, "a", &targets[2..]), (2, MOVED_KEY));
        assert_eq!(pick(&policy, "a", &targets[1..]), (2, STICKY));
    }

    #[test]
    fn who_came_back_empty_has_lost_its_keys() {
        let policy = policy(&[]);
        let (targets, _held) = loaded(&[0, 1, 2]);
        assert_eq!(pick(&policy, "moved", &targets), (0, NEW_KEY));
        assert_eq!(pick(&policy, "alone", &targets), (0, NEW_KEY));
        assert_eq!(pick(&policy, "moved", &targets[1..]), (1, MOVED_KEY));
        policy.forget(0);
        assert_eq!(pick(&policy, "moved", &targets), (1, STICKY));
        let _busy = [targets[0].begin(), targets[0].begin()];
        assert_eq!(pick(&policy, "alone", &targets), (1, NEW_KEY));
    }

    #[test]
    fn a_key_that_nobody_uses_is_forgotten() {
        let policy = policy(&["--max-idle-secs=10"]);
        let (targets, _held) = loaded(&[0, 1]);
        let at = |at_secs| {
            let request = Request { at_secs, ..keyed("a") };
            policy
                .pick(&request, &targets, &mut fastrand::Rng::with_seed(1), None)
                .expect("never fails")
                .reason
        };
        assert_eq!(
            [0.0, 9.0, 19.0, 29.5, 30.0].map(at),
            [NEW_KEY, STICKY, STICKY, NEW_KEY, STICKY]
        );
    }

    #[test]
    fn keys_are_assigned_as_asked() {
        for (mode, scores) in [
            ("random", [None, None, None]),
            ("min_load", [Some(2.0), Some(0.0), Some(1.0)]),
            ("min_group", [Some(0.0), Some(1.0), Some(1.0)]),
        ] {
            let policy = policy(&[&format!("--assignment-mode={mode}")]);
            let (targets, _held) = loaded(&[2, 0, 1]);
            for worker in [1, 2] {
                let key = format!("of {worker}");
                pick(&policy, &key, &targets[worker..=worker]);
            }
            let (picked, found) = scores_of(&policy, &keyed("new"), &targets);
            assert_eq!(found, scores, "{mode}");
            let lowest = scores.iter().flatten().copied().fold(f64::INFINITY, f64::min);
            assert!(scores[picked.index].is_none_or(|score| score == lowest), "{mode}");
        }
        let (targets, _held) = loaded(&[0, 9, 0]);
        let random = tally(&policy(&["--assignment-mode=random"]), &targets, 3000);
        assert!(close_to(&random, &[1000.0; 3]), "{random:?}");
    }

    #[test]
    fn a_request_without_a_key_is_not_remembered() {
        let policy = policy(&["--assignment-mode=min_group"]);
        let (targets, _held) = loaded(&[0, 0]);
        let counts = tally(&policy, &targets, 2000);
        assert!(close_to(&counts, &[1000.0; 2]), "{counts:?}");
    }
}
