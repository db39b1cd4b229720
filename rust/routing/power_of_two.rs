//! `power_of_two`: of two distinct workers drawn at random, the one with fewer requests in flight.
//!
//! Source: M. Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing" (2001). Two
//! looks are nearly as even as looking at all, and many routers doing so do not all run to the
//! same worker. Holds nothing.

use std::sync::Arc;

use super::candidates::Weighed;
use super::{Options, Pick, PickError, Policy, Request, Target};

const FEWER_IN_FLIGHT: &str = "fewer_in_flight";
const ONLY_WORKER: &str = "only_worker";

/// Every reason this policy gives; `only_worker` when there was nothing to compare with.
pub const REASONS: &[&str] = &[FEWER_IN_FLIGHT, ONLY_WORKER];

/// See [`super::PolicyKind::score`].
pub const SCORE: &str =
    "Requests in flight of the two that were drawn; the lower wins. Null for the others.";

/// See the module.
pub struct PowerOfTwo;

impl PowerOfTwo {
    pub fn new(_: &Options) -> Self {
        Self
    }
}

impl Policy for PowerOfTwo {
    fn pick(
        &self,
        _: &Request,
        targets: &[Arc<Target>],
        rng: &mut fastrand::Rng,
        weighed: Option<&mut Weighed>,
    ) -> Result<Pick, PickError> {
        if targets.len() == 1 {
            return Ok(Pick { index: 0, reason: ONLY_WORKER, matched_tokens: None });
        }
        let first = rng.usize(..targets.len());
        // Drawn from all but the first: those from its place on move up by one.
        let other = rng.usize(..targets.len() - 1);
        let second = if other >= first { other + 1 } else { other };
        if let Some(weighed) = weighed {
            let is_drawn = |index| index == first || index == second;
            weighed.lowest_wins(|candidate| {
                is_drawn(candidate.index).then_some(candidate.in_flight.into())
            });
        }
        // On a tie the first wins, which is random as the first was drawn at random.
        let fewer = targets[second].in_flight() < targets[first].in_flight();
        let index = if fewer { second } else { first };
        Ok(Pick { index, reason: FEWER_IN_FLIGHT, matched_tokens: None })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routing::tests::{close_to, loaded, scores, tally};

    #[test]
    fn of_two_workers_the_one_with_fewer_in_flight() {
        let (targets, _held) = loaded(&[3, 2]);
        assert_eq!(tally(&PowerOfTwo, &targets, 100), [0, 100]);
    }

    #[test]
    fn the_worst_of_three_is_never_picked_and_the_best_in_two_of_three_pairs() {
        let (targets, _held) = loaded(&[1, 2, 0]);
        let counts = tally(&PowerOfTwo, &targets, 3000);
        assert_eq!(counts[1], 0);
        assert!(close_to(&counts, &[1000.0, 0.0, 2000.0]), "{counts:?}");
    }

    #[test]
    fn the_two_that_were_drawn_have_a_score() {
        let (targets, _held) = loaded(&[1, 2, 3, 4]);
        let (pick, scores) = scores(&PowerOfTwo, b"", &targets);
        let drawn: Vec<f64> = scores.iter().copied().flatten().collect();
        assert_eq!(drawn.len(), 2);
        assert_eq!(scores[pick.index], Some(drawn[0].min(drawn[1])));
    }

    #[test]
    fn ties_are_broken_at_random() {
        let (targets, _held) = loaded(&[1, 1, 1]);
        let counts = tally(&PowerOfTwo, &targets, 3000);
        assert!(close_to(&counts, &[1000.0; 3]), "{counts:?}");
    }

    #[test]
    fn a_single_worker_is_the_only_one() {
        let (targets, _held) = loaded(&[5]);
        let mut rng = fastrand::Rng::with_seed(0);
        let pick =
            PowerOfTwo.pick(&Request::of(b""), &targets, &mut rng, None).expect("never fails");
        assert_eq!((pick.index, pick.reason), (0, ONLY_WORKER));
    }
}
