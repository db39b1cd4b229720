//! `round_robin`: the routable workers in turn.
//!
//! The one idea: the place in the turn is a worker id, not a count of requests. So the turn goes on
//! where it was when workers join, leave or become unhealthy, without a skip or a repeat.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::candidates::Weighed;
use super::{Options, Pick, PickError, Policy, Request, Target};

const ROUND_ROBIN: &str = "round_robin";

/// Every reason this policy gives.
pub const REASONS: &[&str] = &[ROUND_ROBIN];

/// See [`super::PolicyKind::score`].
pub const SCORE: &str = "Null: nothing is compared.";

/// See the module.
pub struct RoundRobin {
    /// The next pick is the first routable worker with at least this id, else the first of all.
    next: AtomicU32,
}

impl RoundRobin {
    pub fn new(_: &Options) -> Self {
        Self { next: AtomicU32::new(0) }
    }
}

impl Policy for RoundRobin {
    fn pick(
        &self,
        _: &Request,
        targets: &[Arc<Target>],
        _: &mut fastrand::Rng,
        _: Option<&mut Weighed>,
    ) -> Result<Pick, PickError> {
        let mut next = self.next.load(Ordering::Relaxed);
        loop {
            let at = targets.partition_point(|target| target.id < next);
            let index = if at == targets.len() { 0 } else { at };
            // After the largest id there is, the turn begins again, which is what 0 means.
            let after = targets[index].id.wrapping_add(1);
            // Only the one pick that moves the turn on may take its worker; the others look again.
            match self.next.compare_exchange_weak(next, after, Ordering::Relaxed, Ordering::Relaxed)
            {
                Ok(_) => {
                    return Ok(Pick { index, reason: ROUND_ROBIN, matched_tokens: None });
                }
                Err(moved) => next = moved,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routing::tests::{options, scores};

    fn policy() -> RoundRobin {
        RoundRobin::new(&options(&[]).expect("defaults parse"))
    }

    fn targets(ids: &[u32]) -> Vec<Arc<Target>> {
        ids.iter().map(|&id| Arc::new(Target::new(id, 1.0))).collect()
    }

    fn turn(policy: &RoundRobin, ids: &[u32]) -> u32 {
        let mut rng = fastrand::Rng::with_seed(0);
        let pick = policy.pick(&Request::of(b""), &targets(ids), &mut rng, None);
        ids[pick.expect("never fails").index]
    }

    #[test]
    fn workers_come_in_turn() {
        let policy = policy();
        let picked: Vec<_> = (0..7).map(|_| turn(&policy, &[2, 5, 9])).collect();
        assert_eq!(picked, [2, 5, 9, 2, 5, 9, 2]);
    }

    #[test]
    fn the_turn_goes_on_when_the_set_changes() {
        let policy = policy();
        assert_eq!(turn(&policy, &[0, 1, 2, 3]), 0);
        assert_eq!(turn(&policy, &[0, 1, 2, 3]), 1);
        assert_eq!(turn(&policy, &[0, 2, 3]), 2, "the one picked last has left");
        assert_eq!(turn(&policy, &[0, 2]), 0, "the next one has left, and it was the last");
        assert_eq!(turn(&policy, &[0, 1, 2]), 1, "one is back");
        assert_eq!(turn(&policy, &[7]), 7);
        assert_eq!(turn(&policy, &[7]), 7, "the only one repeats");
    }

    #[test]
    fn nothing_is_compared() {
        assert_eq!(scores(&policy(), b"", &targets(&[2, 5])).1, [None, None]);
    }

    #[test]
    fn the_largest_id_wraps() {
        let policy = policy();
        let picked: Vec<_> = (0..4).map(|_| turn(&policy, &[1, u32::MAX])).collect();
        assert_eq!(picked, [1, u32::MAX, 1, u32::MAX]);
    }

    #[test]
    fn concurrent_picks_share_the_turn_exactly() {
        let (policy, targets) = (policy(), targets(&[0, 1, 2, 3, 4]));
        let counts: [AtomicU32; 5] = Default::default();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let mut rng = fastrand::Rng::with_seed(0);
                    for _ in 0..5000 {
                        let pick = policy
                            .pick(&Request::of(b""), &targets, &mut rng, None)
                            .expect("never fails");
                        counts[pick.index].fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
        });
        assert_eq!(counts.map(AtomicU32::into_inner), [4000; 5]);
    }
}
