//! `fixed_probability`: drawn by the workers' weights, for workers of different speed.
//!
//! The weights are relative to those of the workers that are routable now, so the shares of a lost
//! worker pass to the others in proportion. A worker of weight 0 gets nothing unless every routable
//! one has weight 0: then all are equally likely, as an answer is better than none. Holds nothing.

use std::sync::Arc;

use super::candidates::Weighed;
use super::{Options, Pick, PickError, Policy, Request, Target};

const WEIGHTED: &str = "weighted";
const ALL_WEIGHTS_ZERO: &str = "all_weights_zero";

/// Every reason this policy gives; `all_weights_zero` when all routable workers were equally
/// likely for want of a weight.
pub const REASONS: &[&str] = &[WEIGHTED, ALL_WEIGHTS_ZERO];

/// See [`super::PolicyKind::score`].
pub const SCORE: &str = "The weight; the higher, the likelier to be drawn.";

/// See the module.
pub struct FixedProbability;

impl FixedProbability {
    pub fn new(_: &Options) -> Self {
        Self
    }
}

impl Policy for FixedProbability {
    fn pick(
        &self,
        _: &Request,
        targets: &[Arc<Target>],
        rng: &mut fastrand::Rng,
        weighed: Option<&mut Weighed>,
    ) -> Result<Pick, PickError> {
        if let Some(weighed) = weighed {
            weighed.highest_wins(|candidate| Some(targets[candidate.index].weight));
        }
        Ok(match draw(targets, rng) {
            Some(index) => Pick { index, reason: WEIGHTED, matched_tokens: None },
            None => Pick {
                index: rng.usize(..targets.len()),
                reason: ALL_WEIGHTS_ZERO,
                matched_tokens: None,
            },
        })
    }
}

/// An index drawn by weight, or `None` if no target has one.
fn draw(targets: &[Arc<Target>], rng: &mut fastrand::Rng) -> Option<usize> {
    // Relative to the heaviest, because a sum of huge weights would be infinite.
    let heaviest = targets.iter().map(|target| target.weight).fold(0.0, f64::max);
    if heaviest == 0.0 {
        return None;
    }
    let total: f64 = targets.iter().map(|target| target.weight / heaviest).sum();
    let mut left = rng.f64() * total;
    let mut drawn = None;
    for (index, target) in targets.iter().enumerate().filter(|(_, t)| t.weight > 0.0) {
        // Kept even if rounding leaves a rest after the last one.
        drawn = Some(index);
        left -= target.weight / heaviest;
        if left < 0.0 {
            break;
        }
    }
    drawn
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routing::tests::{close_to, scores, tally};

    fn weighted(weights: &[f64]) -> Vec<Arc<Target>> {
        (0..).zip(weights).map(|(id, &weight)| Arc::new(Target::new(id, weight))).collect()
    }

    fn reason(targets: &[Arc<Target>]) -> &'static str {
        let mut rng = fastrand::Rng::with_seed(0);
        FixedProbability
            .pick(&Request::of(b""), targets, &mut rng, None)
            .expect("never fails")
            .reason
    }

    #[test]
    fn shares_follow_the_weights() {
        let targets = weighted(&[1.0, 0.0, 3.0, 0.5]);
        let counts = tally(&FixedProbability, &targets, 9000);
        assert!(close_to(&counts, &[2000.0, 0.0, 6000.0, 1000.0]), "{counts:?}");
        assert_eq!(reason(&targets), WEIGHTED);
    }

    #[test]
    fn the_score_is_the_weight() {
        let targets = weighted(&[1.5, 0.0]);
        assert_eq!(scores(&FixedProbability, b"", &targets).1, [Some(1.5), Some(0.0)]);
    }

    #[test]
    fn without_any_weight_all_are_equally_likely_and_the_reason_says_so() {
        let targets = weighted(&[0.0, 0.0]);
        let counts = tally(&FixedProbability, &targets, 2000);
        assert!(close_to(&counts, &[1000.0; 2]), "{counts:?}");
        assert_eq!(reason(&targets), ALL_WEIGHTS_ZERO);
    }

    #[test]
    fn huge_and_tiny_weights_keep_their_ratio() {
        for scale in [f64::MAX, f64::MIN_POSITIVE * 4.0] {
            let targets = weighted(&[scale, scale / 2.0]);
            let counts = tally(&FixedProbability, &targets, 3000);
            assert!(close_to(&counts, &[2000.0, 1000.0]), "{counts:?}");
        }
    }
}
