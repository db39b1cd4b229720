//! A set of workers, small for the few that are there at any time.
//!
//! The one idea: ids are given in the order of joining, so those that are there are close to one another. A word of
//! bits tells of 64 ids in a row, and a set keeps the words that are not empty, sorted. One such word needs no
//! memory beside the set itself. Where workers come and go a set takes more of them, at worst 16 bytes for each worker.

use std::iter;
use std::mem::size_of;

use smallvec::{SmallVec, smallvec};

use super::WorkerId;

#[derive(Debug, Clone, Default)]
pub struct WorkerSet(SmallVec<[Word; 1]>);

/// Ids from `of` × 64 on. Never empty.
#[derive(Debug, Clone)]
struct Word {
    of: u32,
    bits: u64,
}

impl WorkerSet {
    pub fn of(worker: WorkerId) -> Self {
        Self(smallvec![Word::with(worker)])
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn contains(&self, worker: WorkerId) -> bool {
        self.place(worker).is_ok_and(|at| self.0[at].bits & bit_of(worker) != 0)
    }

    pub fn insert(&mut self, worker: WorkerId) {
        match self.place(worker) {
            Ok(at) => self.0[at].bits |= bit_of(worker),
            Err(at) => self.0.insert(at, Word::with(worker)),
        }
    }

    pub fn remove(&mut self, worker: WorkerId) {
        let Ok(at) = self.place(worker) else { return };
        self.0[at].bits &= !bit_of(worker);
        if self.0[at].bits == 0 {
            self.0.remove(at);
            self.0.shrink_to_fit();
        }
    }

    /// Sorted.
    pub fn iter(&self) -> impl Iterator<Item = WorkerId> {
        self.0.iter().flat_map(|word| {
            let without_lowest = |bits: &u64| Some(bits & (bits - 1)).filter(|rest| *rest != 0);
            iter::successors(Some(word.bits), without_lowest)
                .map(|bits| word.of * u64::BITS + bits.trailing_zeros())
        })
    }

    /// Bytes held outside of the set itself.
    pub fn heap_bytes(&self) -> usize {
        if self.0.spilled() { self.0.capacity() * size_of::<Word>() } else { 0 }
    }

    /// Where the word of this worker is, or would be.
    fn place(&self, worker: WorkerId) -> Result<usize, usize> {
        self.0.binary_search_by_key(&word_of(worker), |word| word.of)
    }
}

impl Word {
    fn with(worker: WorkerId) -> Self {
        Self { of: word_of(worker), bits: bit_of(worker) }
    }
}

fn word_of(worker: WorkerId) -> u32 {
    worker / u64::BITS
}

fn bit_of(worker: WorkerId) -> u64 {
    1 << (worker % u64::BITS)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use proptest::prelude::*;

    fn worker() -> impl Strategy<Value = WorkerId> {
        prop_oneof![0..200_u32, WorkerId::MAX - 100..=WorkerId::MAX]
    }

    #[test]
    fn the_first_64_workers_need_no_memory() {
        let mut set = WorkerSet::of(63);
        (0..63).for_each(|worker| set.insert(worker));
        assert_eq!(set.heap_bytes(), 0);
        set.insert(64);
        assert!(set.heap_bytes() > 0);
        set.remove(64);
        assert_eq!((set.heap_bytes(), set.iter().count()), (0, 64));
    }

    proptest! {
        #[test]
        fn it_is_a_sorted_set(
            first in worker(),
            changes in prop::collection::vec((any::<bool>(), worker()), 0..300),
        ) {
            let (mut set, mut model) = (WorkerSet::of(first), BTreeSet::from([first]));
            for (joins, worker) in changes {
                match joins {
                    true => {
                        set.insert(worker);
                        model.insert(worker);
                    }
                    false => {
                        set.remove(worker);
                        model.remove(&worker);
                    }
                }
                prop_assert_eq!(set.contains(worker), joins);
                prop_assert_eq!(set.is_empty(), model.is_empty());
            }
            prop_assert!(set.iter().eq(model.iter().copied()));
        }
    }
}
