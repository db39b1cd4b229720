//! What a policy saw and compared when it picked, for those who want to know why.
//!
//! The one idea: a pick is explained while it is made, not afterwards, when other requests have
//! already changed what it saw. The policy is given workers whose counts stand still, and notes what
//! it compares as it compares it ([`Weighed`]); so the choice can be made again from the candidates.
//!
//! Invariant: the policy draws the same random numbers, and so picks the same, whether it is asked
//! to explain itself or not.

use std::sync::Arc;

use super::outlook::View;
use super::{Pick, PickError, Policy, Request, Target};

/// A worker as the policy saw it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// Into the targets the policy was given.
    pub index: usize,
    /// Requests in flight, without the one that was picked for.
    pub in_flight: u32,
    /// Tokens of the prompt the policy believes to be in its cache; `None` from a policy without a
    /// prefix tree.
    pub matched_tokens: Option<u32>,
    /// Tokens of prompts sent before that the policy believes to be still computed first, with what they are overdue;
    /// `None` from a policy that does not count them.
    pub pending_tokens: Option<u32>,
    /// Tokens of prompts that the policy believes to be computed in a second there; `None` if it does not
    /// know.
    pub speed: Option<f64>,
    /// Requests in flight there for the part of the prompt that is cached anywhere; `None` from a policy that does not
    /// count them.
    pub same_prefix: Option<u32>,
    /// What the rule compared, a finite number: see [`super::PolicyKind::score`]. `None` if the rule
    /// did not look at this worker, or compares nothing.
    pub score: Option<f64>,
}

/// What a policy notes of the targets while it picks. Holds one candidate per target.
#[derive(Debug)]
pub struct Weighed {
    /// In the order of the targets.
    candidates: Vec<Candidate>,
    is_highest_best: bool,
}

impl Weighed {
    fn new(targets: &[Arc<Target>]) -> Self {
        let candidate = |(index, target): (usize, &Arc<Target>)| Candidate {
            index,
            in_flight: target.in_flight(),
            matched_tokens: None,
            pending_tokens: None,
            speed: None,
            same_prefix: None,
            score: None,
        };
        let candidates = targets.iter().enumerate().map(candidate).collect();
        Self { candidates, is_highest_best: false }
    }

    /// Notes the tokens that the policy believes to be in the cache of the target at an index.
    pub fn matched(&mut self, tokens: impl Fn(usize) -> u32) {
        for candidate in &mut self.candidates {
            candidate.matched_tokens = Some(tokens(candidate.index));
        }
    }

    /// Notes what the policy believes of the target at an index.
    pub fn outlook(&mut self, known: impl Fn(usize) -> View) {
        for candidate in &mut self.candidates {
            let View { pending_tokens, matched_tokens, speed, same_prefix } =
                known(candidate.index);
            candidate.matched_tokens = Some(matched_tokens);
            candidate.pending_tokens = Some(pending_tokens);
            candidate.speed = speed;
            candidate.same_prefix = Some(same_prefix);
        }
    }

    /// Notes that the rule looked for the fewest requests in flight.
    pub fn fewest_in_flight_wins(&mut self) {
        self.lowest_wins(|candidate| Some(f64::from(candidate.in_flight)));
    }

    /// Notes what the rule compared, of which the lowest is best.
    pub fn lowest_wins(&mut self, score: impl Fn(&Candidate) -> Option<f64>) {
        for candidate in &mut self.candidates {
            candidate.score = score(candidate);
        }
    }

    /// Notes what the rule compared, of which the highest is best.
    pub fn highest_wins(&mut self, score: impl Fn(&Candidate) -> Option<f64>) {
        self.is_highest_best = true;
        self.lowest_wins(score);
    }

    /// The `keep` ≥ 1 best, best first: by score, those without one last. Among equals the chosen one
    /// comes first, the rest in the order of the targets. The chosen one is always among them, if
    /// need be as the last.
    fn best(mut self, chosen: usize, keep: usize) -> Vec<Candidate> {
        let sign = if self.is_highest_best { -1.0 } else { 1.0 };
        let rank = |candidate: &Candidate| {
            (candidate.score.map_or(f64::INFINITY, |score| sign * score), candidate.index != chosen)
        };
        self.candidates.sort_by(|a, b| {
            let ((a, a_is_other), (b, b_is_other)) = (rank(a), rank(b));
            a.total_cmp(&b).then(a_is_other.cmp(&b_is_other))
        });
        if let Some(kept) = self.candidates.get(..keep) {
            if kept.iter().all(|candidate| candidate.index != chosen) {
                let place = self.candidates.iter().position(|c| c.index == chosen);
                self.candidates.swap(keep - 1, place.expect("the chosen one was given"));
            }
            self.candidates.truncate(keep);
            self.candidates.shrink_to_fit();
        }
        self.candidates
    }
}

/// Picks as [`Policy::pick`] does, and tells what the rule saw: the `keep` ≥ 1 best candidates, best
/// first by the rule's own order, the chosen one always among them.
pub fn explained(
    policy: &dyn Policy,
    request: &Request,
    targets: &[Arc<Target>],
    rng: &mut fastrand::Rng,
    keep: usize,
) -> Result<(Pick, Vec<Candidate>), PickError> {
    let still: Vec<_> = targets.iter().map(|target| Arc::new(target.still())).collect();
    let mut weighed = Weighed::new(&still);
    let pick = policy.pick(request, &still, rng, Some(&mut weighed))?;
    Ok((pick, weighed.best(pick.index, keep)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routing::tests::loaded;

    fn weighed(loads: &[u32]) -> Weighed {
        let (targets, _held) = loaded(loads);
        Weighed::new(&targets)
    }

    fn order(candidates: &[Candidate]) -> Vec<usize> {
        candidates.iter().map(|candidate| candidate.index).collect()
    }

    #[test]
    fn the_best_come_first_and_the_chosen_one_before_its_equals() {
        let by_load = |chosen, keep| {
            let mut weighed = weighed(&[2, 1, 0, 1]);
            weighed.fewest_in_flight_wins();
            order(&weighed.best(chosen, keep))
        };
        assert_eq!(by_load(2, usize::MAX), [2, 1, 3, 0]);
        assert_eq!(by_load(3, usize::MAX), [2, 3, 1, 0]);
        assert_eq!(by_load(2, 2), [2, 1]);

        let mut highest = weighed(&[2, 1, 0, 1]);
        highest.highest_wins(|candidate| Some(f64::from(candidate.in_flight)));
        assert_eq!(order(&highest.best(0, 4)), [0, 1, 3, 2]);
    }

    #[test]
    fn the_chosen_one_is_kept_also_if_it_is_not_among_the_best() {
        let mut by_load = weighed(&[0, 1, 2, 3]);
        by_load.fewest_in_flight_wins();
        assert_eq!(order(&by_load.best(3, 2)), [0, 3]);
        assert_eq!(order(&weighed(&[0, 0, 0]).best(2, 1)), [2]);
    }

    #[test]
    fn those_the_rule_did_not_look_at_come_last() {
        let mut weighed = weighed(&[0, 9, 8]);
        weighed
            .lowest_wins(|candidate| (candidate.index > 0).then_some(candidate.in_flight.into()));
        assert_eq!(order(&weighed.best(2, 3)), [2, 1, 0]);
    }
}
