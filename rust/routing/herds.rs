//! Which requests in flight are at a worker for the same text.
//!
//! The one idea: what draws requests to one worker is the last block of their prompts that somebody has cached, so they
//! are counted by its name, and also by the last block of their own prompts, which the same prompt that comes next
//! will find cached.
//!
//! Bound: two entries for each request in flight.

use hashbrown::HashMap;
use smallvec::SmallVec;

use super::WorkerId;

/// See the module.
#[derive(Debug, Default)]
pub struct Herds {
    /// By the block's name, requests by worker; none of them 0.
    by_block: HashMap<u64, SmallVec<[(WorkerId, u32); 2]>>,
}

/// The last block of a prompt that somebody had when it was sent, and the last one of the prompt itself.
pub type DrawnBy = [Option<u64>; 2];

impl Herds {
    /// A request is sent to a worker.
    pub fn join(&mut self, drawn_by: DrawnBy, worker: WorkerId) {
        for block in distinct(drawn_by) {
            let herd = self.by_block.entry(block).or_default();
            match herd.iter_mut().find(|(at, _)| *at == worker) {
                Some((_, requests)) => *requests += 1,
                None => herd.push((worker, 1)),
            }
        }
    }

    /// A request that had joined is over.
    pub fn leave(&mut self, drawn_by: DrawnBy, worker: WorkerId) {
        for block in distinct(drawn_by) {
            let Some(herd) = self.by_block.get_mut(&block) else { continue };
            if let Some(at) = herd.iter().position(|(at, _)| *at == worker) {
                herd[at].1 -= 1;
                if herd[at].1 == 0 {
                    herd.swap_remove(at);
                }
            }
            if herd.is_empty() {
                self.by_block.remove(&block);
            }
        }
    }

    /// Requests in flight that are counted by this block, by worker.
    pub fn of(&self, block: u64) -> &[(WorkerId, u32)] {
        self.by_block.get(&block).map_or(&[], |herd| herd)
    }
}

fn distinct([held, own]: DrawnBy) -> impl Iterator<Item = u64> {
    held.into_iter().chain(own.filter(|own| held != Some(*own)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn requests_for_the_same_text_are_counted_where_they_are() {
        let mut herds = Herds::default();
        herds.join([None, Some(1)], 7);
        herds.join([Some(1), Some(1)], 7);
        herds.join([Some(1), Some(2)], 8);
        assert_eq!(herds.of(1), [(7, 2), (8, 1)]);
        assert_eq!(herds.of(2), [(8, 1)]);
        herds.leave([Some(1), Some(1)], 7);
        herds.leave([None, Some(1)], 7);
        assert_eq!(herds.of(1), [(8, 1)]);
        assert_eq!(herds.of(3), []);
    }

    proptest! {
        #[test]
        fn nothing_is_left_when_all_have_left(
            requests in prop::collection::vec((any::<bool>(), 0..3_u64, 0..3_u64, 0..3_u32), 0..40),
        ) {
            let mut herds = Herds::default();
            let drawn_by = |(is_held, held, own, _): &(bool, u64, u64, u32)| [is_held.then_some(*held), Some(*own)];
            for request in &requests {
                herds.join(drawn_by(request), request.3);
            }
            for request in &requests {
                herds.leave(drawn_by(request), request.3);
            }
            prop_assert!(herds.by_block.is_empty());
        }
    }
}
