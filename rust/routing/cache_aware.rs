//! `cache_aware`: sends a prompt where its beginning was sent before, as that worker has the KV
//! cache of it.
//!
//! Source: the rule of SGLang's router. If the load is uneven, that is, max − min in flight is over
//! `balance_abs_threshold` and max over `balance_rel_threshold` × min, the worker with the fewest
//! requests in flight; else the one with the longest matching prefix, if that is more than
//! `cache_threshold` of the prompt; else the one with the fewest in flight. Ties at random in each
//! case. Loads and matches are taken over the routable workers only.
//!
//! The one idea: what workers have cached is guessed from what they were sent, in a [`PrefixTree`].
//! It does not know what a worker has dropped, only that it was gone and is back
//! ([`Policy::forget`]).
//!
//! The tree has a mutex, held to go along a prompt's path or to add to it. The blocks are named before, so that is
//! less than a microsecond for a prompt of 16 KB. Forgetting a worker holds it for one walk over the nodes.

use std::sync::Arc;

use parking_lot::Mutex;

use super::candidates::Weighed;
use super::prefix_tree::{Match, PrefixTree};
use super::{
    BYTES_PER_TOKEN, Options, Pick, PickError, Policy, Request, Target, Underway, WorkerId,
    least_in_flight,
};

const IMBALANCE: &str = "imbalance";
const PREFIX_MATCH: &str = "prefix_match";
const NO_MATCH: &str = "no_match";

/// Every reason this policy gives: fewest in flight because the load was uneven, longest matching
/// prefix, fewest in flight because no prefix was over the threshold.
pub const REASONS: &[&str] = &[IMBALANCE, PREFIX_MATCH, NO_MATCH];

/// See [`super::PolicyKind::score`].
pub const SCORE: &str = "With the reason `prefix_match` the share of the prompt that the worker was sent before, 0 \
    to 1; the highest wins. Else requests in flight; the lowest wins.";

/// See the module.
pub struct CacheAware {
    cache_threshold: f64,
    balance_abs_threshold: usize,
    balance_rel_threshold: f64,
    tree: Mutex<PrefixTree>,
}

impl CacheAware {
    pub fn new(options: &Options) -> Self {
        Self {
            cache_threshold: options.cache_threshold,
            balance_abs_threshold: options.balance_abs_threshold,
            balance_rel_threshold: options.balance_rel_threshold,
            tree: Mutex::new(PrefixTree::new(options.max_tree_size)),
        }
    }

    fn choose(
        &self,
        prompt: &[u8],
        matched: &Match,
        is_uneven: bool,
        targets: &[Arc<Target>],
        rng: &mut fastrand::Rng,
    ) -> (usize, &'static str) {
        if is_uneven {
            return (least_in_flight(targets, rng), IMBALANCE);
        }
        match longest_match(matched, targets, rng) {
            Some((index, bytes)) if share(bytes, prompt) > self.cache_threshold => {
                (index, PREFIX_MATCH)
            }
            _ => (least_in_flight(targets, rng), NO_MATCH),
        }
    }

    fn is_uneven(&self, targets: &[Arc<Target>]) -> bool {
        let (mut fewest, mut most) = (u32::MAX, 0);
        for load in targets.iter().map(|target| target.in_flight()) {
            fewest = fewest.min(load);
            most = most.max(load);
        }
        (most - fewest) as usize > self.balance_abs_threshold
            && f64::from(most) > self.balance_rel_threshold * f64::from(fewest)
    }
}

impl Policy for CacheAware {
    fn pick(
        &self,
        request: &Request,
        targets: &[Arc<Target>],
        rng: &mut fastrand::Rng,
        weighed: Option<&mut Weighed>,
    ) -> Result<Pick, PickError> {
        let names = request.tree_names();
        let is_uneven = self.is_uneven(targets);
        let tree = self.tree.lock();
        let matched = tree.matched(&names);
        let (index, reason) = self.choose(request.prompt, &matched, is_uneven, targets, rng);
        if let Some(weighed) = weighed {
            weighed.matched(|index| tokens(&matched, targets[index].id));
            if reason == PREFIX_MATCH {
                let share =
                    |index: usize| share(matched.bytes_for(targets[index].id), request.prompt);
                weighed.highest_wins(|candidate| Some(share(candidate.index)));
            } else {
                weighed.fewest_in_flight_wins();
            }
        }
        Ok(Pick { index, reason, matched_tokens: Some(tokens(&matched, targets[index].id)) })
    }

    fn matched_tokens(&self, request: &Request, worker: WorkerId) -> Option<u32> {
        let names = request.tree_names();
        Some(tokens(&self.tree.lock().matched(&names), worker))
    }

    fn sent(&self, request: &Request, target: &Arc<Target>) -> Option<Box<dyn Underway>> {
        let names = request.tree_names();
        self.tree.lock().insert(&names, target.id);
        None
    }

    fn forget(&self, worker: WorkerId) {
        self.tree.lock().remove_worker(worker);
    }
}

fn share(bytes: usize, prompt: &[u8]) -> f64 {
    bytes as f64 / prompt.len() as f64
}

fn tokens(matched: &Match, worker: WorkerId) -> u32 {
    u32::try_from(matched.bytes_for(worker) / BYTES_PER_TOKEN).unwrap_or(u32::MAX)
}

/// Index of the target with the longest match and its bytes, ties at random; `None` if none of the
/// targets was sent as much as the first byte.
fn longest_match(
    matched: &Match,
    targets: &[Arc<Target>],
    rng: &mut fastrand::Rng,
) -> Option<(usize, usize)> {
    matched.deepest_first().find_map(|(bytes, workers)| {
        let mut tied = 0;
        let mut chosen = None;
        let mut workers = workers.iter().peekable();
        for (index, target) in targets.iter().enumerate() {
            // Both are sorted by id.
            while workers.next_if(|worker| *worker < target.id).is_some() {}
            if workers.next_if_eq(&target.id).is_some() {
                tied += 1;
                if rng.usize(..tied) == 0 {
                    chosen = Some((index, bytes));
                }
            }
        }
        chosen
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routing::candidates::explained;
    use crate::routing::tests::{close_to, loaded, options, scores, tally};

    fn policy(flags: &[&str]) -> CacheAware {
        CacheAware::new(&options(flags).expect("flags parse"))
    }

    fn at(worker: WorkerId) -> Arc<Target> {
        Arc::new(Target::new(worker, 1.0))
    }

    fn pick(policy: &CacheAware, prompt: &[u8], targets: &[Arc<Target>]) -> Pick {
        let mut rng = fastrand::Rng::with_seed(3);
        policy.pick(&Request::of(prompt), targets, &mut rng, None).expect("never fails")
    }

    fn expect(index: usize, reason: &'static str, tokens: u32) -> Pick {
        Pick { index, reason, matched_tokens: Some(tokens) }
    }

    #[test]
    fn a_prompt_follows_its_prefix() {
        let policy = policy(&[]);
        let (targets, _held) = loaded(&[0, 5, 0]);
        policy.sent(&Request::of(b"You are helpful. What is Rust?"), &at(1));
        let found = pick(&policy, b"You are helpful. Who?", &targets);
        assert_eq!(found, expect(1, PREFIX_MATCH, 18 / 4));
    }

    #[test]
    fn the_longest_prefix_among_the_routable_wins() {
        let policy = policy(&[]);
        let (targets, _held) = loaded(&[0, 0, 0]);
        policy.sent(&Request::of(b"aaaabbbbcccc"), &at(2));
        policy.sent(&Request::of(b"aaaabbbb"), &at(1));
        assert_eq!(pick(&policy, b"aaaabbbbcccc", &targets), expect(2, PREFIX_MATCH, 3));
        assert_eq!(pick(&policy, b"aaaabbbbcccc", &targets[..2]), expect(1, PREFIX_MATCH, 2));
        assert_eq!(pick(&policy, b"aaaabbbbcccc", &targets[..1]), expect(0, NO_MATCH, 0));
    }

    #[test]
    fn a_share_at_the_threshold_is_not_enough() {
        let policy = policy(&["--cache-threshold=0.5"]);
        let (targets, _held) = loaded(&[1, 2]);
        policy.sent(&Request::of(b"aaaa"), &at(1));
        assert_eq!(pick(&policy, b"aaaabbbb", &targets), expect(0, NO_MATCH, 0));
        assert_eq!(pick(&policy, b"aaaabbb", &targets), expect(1, PREFIX_MATCH, 1));
    }

    #[test]
    fn what_the_least_loaded_has_is_reported_also_when_that_was_not_the_reason() {
        let policy = policy(&["--cache-threshold=0.9", "--balance-abs-threshold=2"]);
        policy.sent(&Request::of(b"aaaabbbb"), &at(0));
        let (targets, _held) = loaded(&[0, 1]);
        assert_eq!(pick(&policy, b"aaaabbbbcccc", &targets), expect(0, NO_MATCH, 2));
        let (targets, _held) = loaded(&[0, 3]);
        assert_eq!(pick(&policy, b"aaaabbbbcccc", &targets), expect(0, IMBALANCE, 2));
    }

    #[test]
    fn uneven_load_goes_before_the_cache_only_over_both_thresholds() {
        let policy = policy(&["--balance-abs-threshold=2", "--balance-rel-threshold=1.5"]);
        policy.sent(&Request::of(b"aaaa"), &at(1));
        for (loads, reason) in [
            ([0, 2], PREFIX_MATCH),
            ([0, 3], IMBALANCE),
            ([6, 9], PREFIX_MATCH),
            ([5, 8], IMBALANCE),
        ] {
            let (targets, _held) = loaded(&loads);
            assert_eq!(pick(&policy, b"aaaa", &targets).reason, reason, "{loads:?}");
        }
    }

    #[test]
    fn the_score_is_what_decided() {
        let policy = policy(&["--cache-threshold=0.5", "--balance-abs-threshold=2"]);
        policy.sent(&Request::of(b"aaaabbbb"), &at(2));
        policy.sent(&Request::of(b"aaaa"), &at(1));
        let scores = |prompt: &[u8], loads: &[u32]| {
            let (targets, _held) = loaded(loads);
            let (pick, scores) = scores(&policy, prompt, &targets);
            (pick.reason, scores.into_iter().map(Option::unwrap_or_default).collect::<Vec<_>>())
        };
        assert_eq!(scores(b"aaaabbbb", &[0, 1, 2]), (PREFIX_MATCH, vec![0.0, 0.5, 1.0]));
        assert_eq!(scores(b"aaaacccc", &[0, 1, 2]), (NO_MATCH, vec![0.0, 1.0, 2.0]));
        assert_eq!(scores(b"aaaabbbb", &[0, 1, 3]), (IMBALANCE, vec![0.0, 1.0, 3.0]));
    }

    #[test]
    fn what_each_worker_has_is_told_whatever_decided() {
        let policy = policy(&["--balance-abs-threshold=2"]);
        policy.sent(&Request::of(b"aaaabbbb"), &at(2));
        policy.sent(&Request::of(b"aaaa"), &at(1));
        let (targets, _held) = loaded(&[0, 1, 9]);
        let (request, mut rng) = (Request::of(b"aaaabbbb"), fastrand::Rng::with_seed(0));
        let (pick, candidates) =
            explained(&policy, &request, &targets, &mut rng, usize::MAX).expect("never fails");
        assert_eq!(pick, expect(0, IMBALANCE, 0));
        let matched: Vec<_> = candidates.iter().map(|c| (c.index, c.matched_tokens)).collect();
        assert_eq!(matched, [(0, Some(0)), (1, Some(1)), (2, Some(2))]);
    }

    #[test]
    fn an_empty_prompt_goes_to_the_least_loaded() {
        let policy = policy(&["--cache-threshold=0"]);
        policy.sent(&Request::of(b""), &at(1));
        let (targets, _held) = loaded(&[2, 3, 1]);
        assert_eq!(pick(&policy, b"", &targets), expect(2, NO_MATCH, 0));
    }

    #[test]
    fn a_forgotten_worker_has_nothing_cached() {
        let policy = policy(&[]);
        let (targets, _held) = loaded(&[0, 5]);
        policy.sent(&Request::of(b"aaaa"), &at(1));
        policy.forget(1);
        assert_eq!(pick(&policy, b"aaaa", &targets), expect(0, NO_MATCH, 0));
    }

    #[test]
    fn ties_are_broken_at_random_in_every_branch() {
        let policy = policy(&["--balance-abs-threshold=3"]);
        for worker in [0, 1, 3] {
            policy.sent(&Request::of(b"aaaa"), &at(worker));
        }
        let (targets, _held) = loaded(&[0, 1, 0, 2]);
        let mut rng = fastrand::Rng::with_seed(5);
        let mut counts = [0; 4];
        for _ in 0..3000 {
            let pick = policy.pick(&Request::of(b"aaaa"), &targets, &mut rng, None);
            counts[pick.expect("never fails").index] += 1;
        }
        assert!(close_to(&counts, &[1000.0, 1000.0, 0.0, 1000.0]), "{counts:?}");

        let counts = tally(&policy, &targets, 2000);
        assert!(close_to(&counts, &[1000.0, 0.0, 1000.0, 0.0]), "no match: {counts:?}");
        let (targets, _held) = loaded(&[0, 9, 0, 0]);
        let counts = tally(&policy, &targets, 3000);
        assert!(close_to(&counts, &[1000.0, 0.0, 1000.0, 1000.0]), "uneven: {counts:?}");
    }

    #[test]
    fn threads_leave_a_sound_tree() {
        let policy = policy(&["--max-tree-size=4096"]);
        let (targets, _held) = loaded(&[0; 8]);
        std::thread::scope(|scope| {
            for seed in 0..4 {
                let (policy, targets) = (&policy, &targets);
                scope.spawn(move || {
                    let mut rng = fastrand::Rng::with_seed(seed);
                    for round in 0..1000 {
                        let len = rng.usize(..200);
                        let prompt: Vec<u8> = (0..len).map(|_| rng.u8(..2)).collect();
                        let request = Request::of(&prompt);
                        let pick =
                            policy.pick(&request, targets, &mut rng, None).expect("never fails");
                        let _in_flight = targets[pick.index].begin();
                        policy.sent(&request, &targets[pick.index]);
                        if round % 100 == 0 {
                            policy.forget(rng.u32(..8));
                        }
                    }
                });
            }
        });
        policy.tree.lock().check_invariants();
        assert!(targets.iter().all(|target| target.in_flight() == 0));
    }
}
