//! `shortest_queue`: the worker with the fewest requests in flight, ties at random. Holds nothing.

use std::sync::Arc;

use super::candidates::Weighed;
use super::{Options, Pick, PickError, Policy, Request, Target, least_in_flight};

const SHORTEST_QUEUE: &str = "shortest_queue";

/// Every reason this policy gives.
pub const REASONS: &[&str] = &[SHORTEST_QUEUE];

/// See [`super::PolicyKind::score`].
pub const SCORE: &str = "Requests in flight; the lowest wins.";

/// See the module.
pub struct ShortestQueue;

impl ShortestQueue {
    pub fn new(_: &Options) -> Self {
        Self
    }
}

impl Policy for ShortestQueue {
    fn pick(
        &self,
        _: &Request,
        targets: &[Arc<Target>],
        rng: &mut fastrand::Rng,
        weighed: Option<&mut Weighed>,
    ) -> Result<Pick, PickError> {
        let index = least_in_flight(targets, rng);
        if let Some(weighed) = weighed {
            weighed.fewest_in_flight_wins();
        }
        Ok(Pick { index, reason: SHORTEST_QUEUE, matched_tokens: None })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routing::tests::{close_to, loaded, scores, tally};

    #[test]
    fn the_fewest_in_flight_win() {
        let (targets, _held) = loaded(&[3, 1, 2]);
        assert_eq!(tally(&ShortestQueue, &targets, 50), [0, 50, 0]);
    }

    #[test]
    fn the_score_is_the_number_in_flight() {
        let (targets, _held) = loaded(&[3, 1, 2]);
        assert_eq!(scores(&ShortestQueue, b"", &targets).1, [Some(3.0), Some(1.0), Some(2.0)]);
    }

    #[test]
    fn ties_are_broken_at_random() {
        let (targets, _held) = loaded(&[1, 2, 1, 1]);
        let counts = tally(&ShortestQueue, &targets, 3000);
        assert!(close_to(&counts, &[1000.0, 0.0, 1000.0, 1000.0]), "{counts:?}");
    }
}
