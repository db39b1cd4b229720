//! `random`: any routable worker, all equally likely. Holds nothing.

use std::sync::Arc;

use super::candidates::Weighed;
use super::{Options, Pick, PickError, Policy, Request, Target};

const RANDOM: &str = "random";

/// Every reason this policy gives.
pub const REASONS: &[&str] = &[RANDOM];

/// See [`super::PolicyKind::score`].
pub const SCORE: &str = "Null: nothing is compared.";

/// See the module.
pub struct Random;

impl Random {
    pub fn new(_: &Options) -> Self {
        Self
    }
}

impl Policy for Random {
    fn pick(
        &self,
        _: &Request,
        targets: &[Arc<Target>],
        rng: &mut fastrand::Rng,
        _: Option<&mut Weighed>,
    ) -> Result<Pick, PickError> {
        Ok(Pick { index: rng.usize(..targets.len()), reason: RANDOM, matched_tokens: None })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routing::tests::{close_to, loaded, scores, tally};

    #[test]
    fn all_workers_are_equally_likely_whatever_their_load() {
        let (targets, _held) = loaded(&[0, 9, 1, 0]);
        let counts = tally(&Random, &targets, 4000);
        assert!(close_to(&counts, &[1000.0; 4]), "{counts:?}");
    }

    #[test]
    fn nothing_is_compared() {
        let (targets, _held) = loaded(&[0, 9]);
        assert_eq!(scores(&Random, b"", &targets).1, [None, None]);
    }
}
