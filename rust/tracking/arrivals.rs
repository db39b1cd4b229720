//! The records of a shard in the order of their arrival.
//!
//! Arrival numbers only grow, and those that leave are nearly always the oldest, so the order is a queue: a record
//! joins at its end, and one that leaves from the middle leaves a gap. Gaps are closed when there are more of them than
//! records; so joining and leaving are O(1) on average, finding a number O(log n).
//!
//! Invariant: the first and the last are no gaps.

use std::collections::VecDeque;
use std::mem::size_of;

/// Room there is from the start, and which is not given back.
const SMALL: usize = 128;

/// An arrival number, and the slot of its record; `None` in a gap.
type Arrival = (u64, Option<u32>);

#[derive(Debug)]
pub(super) struct Arrivals {
    // At most one more than twice the records of the shard.
    queue: VecDeque<Arrival>,
    gaps: usize,
}

impl Arrivals {
    pub(super) fn new() -> Arrivals {
        Arrivals { queue: VecDeque::with_capacity(SMALL), gaps: 0 }
    }

    /// The newest record; its number is larger than all before.
    pub(super) fn push(&mut self, seq: u64, slot: u32) {
        self.queue.push_back((seq, Some(slot)));
    }

    /// The record of this number leaves.
    pub(super) fn remove(&mut self, seq: u64) {
        let place = match self.queue.front() {
            Some((first, _)) if *first == seq => Ok(0),
            _ => self.queue.binary_search_by_key(&seq, |(number, _)| *number),
        };
        let Some((_, slot)) = place.ok().and_then(|place| self.queue.get_mut(place)) else {
            return;
        };
        self.gaps += usize::from(slot.take().is_some());
        while let Some((_, None)) = self.queue.front() {
            self.queue.pop_front();
            self.gaps -= 1;
        }
        while let Some((_, None)) = self.queue.back() {
            self.queue.pop_back();
            self.gaps -= 1;
        }
        if self.gaps > self.queue.len() / 2 {
            self.queue.retain(|(_, slot)| slot.is_some());
            self.gaps = 0;
        }
        let kept = SMALL.max(2 * self.queue.len());
        if self.queue.capacity() > 2 * kept {
            self.queue.shrink_to(kept);
        }
    }

    /// What arrived before the record of this number, newest first.
    pub(super) fn before(&self, seq: u64) -> impl Iterator<Item = Arrival> {
        let end = self.queue.partition_point(|(number, _)| *number < seq);
        self.queue.range(..end).rev().copied()
    }

    /// The oldest record and the newest.
    pub(super) fn ends(&self) -> Option<[(u64, u32); 2]> {
        let (first, last) = (self.queue.front()?, self.queue.back()?);
        Some([(first.0, first.1?), (last.0, last.1?)])
    }

    /// Heap memory of the queue.
    pub(super) fn memory_bytes(&self) -> usize {
        self.queue.capacity() * size_of::<Arrival>()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        // A number below 100 is an arrival; a larger one picks who leaves, mostly of the oldest.
        #[test]
        fn it_is_a_map_of_numbers_that_grow(steps in prop::collection::vec(0u32..300, 0..400)) {
            let mut arrivals = Arrivals::new();
            let mut model = BTreeMap::new();
            for (seq, step) in (0..).step_by(3).zip(steps) {
                if step < 100 {
                    arrivals.push(seq, step);
                    model.insert(seq, step);
                } else if !model.is_empty() {
                    let nth = if step < 200 { 0 } else { step as usize % model.len() };
                    let gone = *model.keys().nth(nth).expect("one of them");
                    arrivals.remove(gone);
                    arrivals.remove(gone);
                    model.remove(&gone);
                }
                let before = u64::from(step) * 2;
                let found: Vec<_> = arrivals
                    .before(before)
                    .filter_map(|(seq, slot)| Some((seq, slot?)))
                    .collect();
                let expected: Vec<_> =
                    model.range(..before).rev().map(|(seq, slot)| (*seq, *slot)).collect();
                prop_assert_eq!(found, expected);
                let pair = |(seq, slot): (&u64, &u32)| (*seq, *slot);
                let ends = model.first_key_value().map(pair).zip(model.last_key_value().map(pair));
                prop_assert_eq!(arrivals.ends(), ends.map(|(first, last)| [first, last]));
                prop_assert!(arrivals.queue.len() <= 2 * model.len() + 1);
            }
        }
    }

    #[test]
    fn its_memory_is_given_back() {
        let mut arrivals = Arrivals::new();
        (0..10_000).for_each(|seq| arrivals.push(seq, 0));
        (0..9_990).for_each(|seq| arrivals.remove(seq));
        assert!(arrivals.memory_bytes() <= 2 * SMALL * size_of::<Arrival>());
    }
}
