//! `least_ttft`: where the first token is expected soonest, as far as that is no waste.
//!
//! For each worker: (tokens of prefill that wait there + tokens of this prompt that it has not cached) / its speed is the time
//! to the first token. To that comes `cache_weight` × those uncached tokens / the mean speed: what is computed twice costs the
//! requests to come, also where nobody waits now. The lowest sum wins, ties by requests in flight, then at random.
//! Everything it goes by is believed: see [`Outlook`].
//!
//! That sum does not see requests that are nearly all cached: they bring hardly any prefill, so it would send them all to one
//! worker, where they would wait for a place instead. So if a quarter of the prompt is cached somewhere, the requests
//! in flight for that same part of it are kept apart: a worker that has it and has more of them than its share, by speed, and
//! [`SLACK`] is passed over. While it still computes that part itself and somebody is idle, there is no slack: to wait
//! for it takes as long as to compute it there, and all copies are made at once. Hence one prompt that is asked for
//! again and again spreads over the workers.

use std::cmp::Ordering;
use std::sync::Arc;

use super::candidates::Weighed;
use super::outlook::{Outlook, View, Views};
use super::{Options, Pick, PickError, Policy, Request, Target, Underway, WorkerId, least_by};

const PREFIX_MATCH: &str = "prefix_match";
const SHORTER_WAIT: &str = "shorter_wait";
const CROWDED: &str = "crowded";
const NO_MATCH: &str = "no_match";

/// Every reason this policy gives: nobody has more of the prompt; somebody has and would take longer all the same; somebody
/// has and was passed over, as too many are there for the same; nobody has any of it.
pub const REASONS: &[&str] = &[PREFIX_MATCH, SHORTER_WAIT, CROWDED, NO_MATCH];

/// See [`super::PolicyKind::score`].
pub const SCORE: &str = "(`pending_tokens` + uncached) / `speed` + `cache_weight` × uncached / the mean of all speeds, in \
    seconds, where uncached = `input_tokens` − `matched_tokens`; while no speed is known, as if each were 1. None for a \
    worker that is passed over: one with a match, if the best match is more than a quarter of `input_tokens` and \
    `same_prefix` × the mean speed / `speed` is more than the mean of this over all workers and 8, or, if its \
    `pending_tokens` are more than a tenth of its `matched_tokens` and another worker has none, more than that mean. The \
    lowest wins, ties by requests in flight.";

/// A best match of no more than this share of the prompt does not draw requests to one place.
const DRAWING: f64 = 0.25;

/// Requests for the same prefix beyond a worker's share of them that are no crowd.
const SLACK: f64 = 8.0;

/// Above the rounding errors of a mean: somebody is always within it.
const ROUNDING: f64 = 1e-6;

/// A worker with more pending than this share of a match is still computing.
const COMPUTING: f64 = 0.1;

/// See the module.
pub struct LeastTtft {
    cache_weight: f64,
    outlook: Arc<Outlook>,
}

impl LeastTtft {
    pub fn new(options: &Options) -> Self {
        Self {
            cache_weight: options.cache_weight,
            outlook: Arc::new(Outlook::new(options.worker_kv_tokens)),
        }
    }

    /// What is compared of all workers.
    fn weigh<'a>(&self, views: &'a Views) -> Weighing<'a> {
        let (mut best, mut is_anybody_idle) = (0, false);
        for (index, view) in views.workers.iter().enumerate() {
            is_anybody_idle |= view.pending_tokens == 0;
            if view.matched_tokens >= views.workers[best].matched_tokens {
                best = index;
            }
        }
        let best_match = f64::from(views.workers[best].matched_tokens);
        let is_drawing = best_match > DRAWING * f64::from(views.input_tokens);
        let mut weighing = Weighing {
            views,
            cache_weight: self.cache_weight,
            most_waste: 0.0,
            best,
            share: None,
            is_anybody_idle,
        };
        weighing.most_waste = weighing.waste(f64::from(views.input_tokens));
        weighing.share = is_drawing.then(|| {
            let crowds = views.workers.iter().map(|view| weighing.crowd(view));
            crowds.sum::<f64>() / views.workers.len() as f64
        });
        weighing
    }
}

/// See [`LeastTtft::weigh`].
struct Weighing<'a> {
    views: &'a Views,
    cache_weight: f64,
    /// Of a worker that has none of the prompt, as most have.
    most_waste: f64,
    /// The last one of those who have most of the prompt.
    best: usize,
    /// The mean of all crowds, if the best match draws requests to one place.
    share: Option<f64>,
    is_anybody_idle: bool,
}

impl Weighing<'_> {
    /// The score of a worker; `None` if it is passed over.
    fn score(&self, view: &View) -> Option<f64> {
        if self.is_passed_over(view) {
            return None;
        }
        let uncached = f64::from(self.views.input_tokens - view.matched_tokens);
        let wait = (f64::from(view.pending_tokens) + uncached) / view.tokens_per_sec();
        let waste = if view.matched_tokens == 0 { self.most_waste } else { self.waste(uncached) };
        Some(wait + waste)
    }

    /// What it costs later requests that so many tokens are computed, in seconds.
    fn waste(&self, uncached_tokens: f64) -> f64 {
        self.cache_weight * uncached_tokens / self.views.mean_speed
    }

    fn is_passed_over(&self, view: &View) -> bool {
        let Some(share) = self.share.filter(|_| view.matched_tokens > 0) else { return false };
        let matched = f64::from(view.matched_tokens);
        let is_computing = f64::from(view.pending_tokens) > COMPUTING * matched;
        let slack = if is_computing && self.is_anybody_idle { ROUNDING } else { SLACK };
        self.crowd(view) > share + slack
    }

    /// Requests for the same prefix, as many as there would be at a worker of the mean speed.
    fn crowd(&self, view: &View) -> f64 {
        match view.same_prefix {
            0 => 0.0,
            requests => f64::from(requests) * self.views.mean_speed / view.tokens_per_sec(),
        }
    }
}

impl Policy for LeastTtft {
    fn pick(
        &self,
        request: &Request,
        targets: &[Arc<Target>],
        rng: &mut fastrand::Rng,
        weighed: Option<&mut Weighed>,
    ) -> Result<Pick, PickError> {
        let views = self.outlook.see(request, targets);
        let weighing = self.weigh(&views);
        let compared = views.workers.iter().zip(targets).map(|(view, target)| {
            let score = weighing.score(view)?;
            Some(Compared { score, target })
        });
        let index = least_by(compared, rng);
        if let Some(weighed) = weighed {
            weighed.outlook(|index| views.workers[index]);
            weighed.lowest_wins(|candidate| weighing.score(&views.workers[candidate.index]));
        }
        let matched_tokens = views.workers[index].matched_tokens;
        let best = &views.workers[weighing.best];
        let reason = match best.matched_tokens {
            0 => NO_MATCH,
            best if best == matched_tokens => PREFIX_MATCH,
            _ if weighing.is_passed_over(best) => CROWDED,
            _ => SHORTER_WAIT,
        };
        Ok(Pick { index, reason, matched_tokens: Some(matched_tokens) })
    }

    fn input_tokens(&self, request: &Request) -> Option<u32> {
        self.outlook.input_tokens(request)
    }

    fn matched_tokens(&self, request: &Request, worker: WorkerId) -> Option<u32> {
        Some(self.outlook.matched_tokens(request, worker))
    }

    fn sent(&self, request: &Request, target: &Arc<Target>) -> Option<Box<dyn Underway>> {
        Some(self.outlook.sent(request, target))
    }

    fn forget(&self, worker: WorkerId) {
        self.outlook.forget(worker);
    }
}

/// A worker in comparison: by score, ties by requests in flight, which are looked at only then.
struct Compared<'a> {
    score: f64,
    target: &'a Target,
}

impl PartialOrd for Compared<'_> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        match self.score.partial_cmp(&other.score) {
            Some(Ordering::Equal) => self.target.in_flight().partial_cmp(&other.target.in_flight()),
            order => order,
        }
    }
}

impl PartialEq for Compared<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.partial_cmp(other) == Some(Ordering::Equal)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routing::candidates::explained;
    use crate::routing::mirror::BLOCK_BYTES;
    use crate::routing::tests::{close_to, loaded, options, scores, tally};
    use crate::routing::{InFlight, Told};
    use proptest::prelude::*;

    fn policy(flags: &[&str]) -> LeastTtft {
        LeastTtft::new(&options(flags).expect("flags parse"))
    }

    fn text(kind: u8, blocks: usize) -> Vec<u8> {
        vec![kind; blocks * BLOCK_BYTES]
    }

    fn stream(prompt: &[u8], at_secs: f64) -> Request<'_> {
        Request { stream: true, at_secs, ..Request::of(prompt) }
    }

    fn send(policy: &LeastTtft, request: &Request, target: &Arc<Target>) -> InFlight {
        let mut in_flight = target.begin();
        in_flight.heard_by(policy.sent(request, target));
        in_flight
    }

    fn served(policy: &LeastTtft, prompt: &[u8], target: &Arc<Target>) {
        send(policy, &stream(prompt, 0.0), target).begun(0.0);
    }

    fn pick(policy: &LeastTtft, prompt: &[u8], targets: &[Arc<Target>]) -> Pick {
        let mut draw = fastrand::Rng::with_seed(3);
        policy.pick(&stream(prompt, 0.0), targets, &mut draw, None).expect("never fails")
    }

    #[test]
    fn a_prompt_goes_where_it_is_cached() {
        let (policy, (targets, _held)) = (policy(&[]), loaded(&[0, 2, 0]));
        served(&policy, &text(1, 10), &targets[1]);
        let expected = Pick { index: 1, reason: PREFIX_MATCH, matched_tokens: Some(160) };
        assert_eq!(pick(&policy, &text(1, 12), &targets), expected);
        assert_eq!(pick(&policy, &text(2, 12), &targets).reason, NO_MATCH);
        policy.forget(1);
        assert_eq!(pick(&policy, &text(1, 12), &targets).reason, NO_MATCH);
    }

    #[test]
    fn it_goes_elsewhere_when_the_wait_is_longer_than_five_times_what_is_saved() {
        let (policy, (targets, _none)) = (policy(&[]), loaded(&[0, 0]));
        served(&policy, &text(1, 10), &targets[0]);
        // Saved are 160 tokens.
        let _long = send(&policy, &stream(&text(2, 48), 0.0), &targets[0]);
        assert_eq!(pick(&policy, &text(1, 12), &targets).index, 0);
        let _more = send(&policy, &stream(&text(3, 8), 0.0), &targets[0]);
        let elsewhere = Pick { index: 1, reason: SHORTER_WAIT, matched_tokens: Some(0) };
        assert_eq!(pick(&policy, &text(1, 12), &targets), elsewhere);
        let only_waits = self::policy(&["--cache-weight=0"]);
        served(&only_waits, &text(1, 10), &targets[0]);
        let _short = send(&only_waits, &stream(&text(2, 12), 0.0), &targets[0]);
        assert_eq!(pick(&only_waits, &text(1, 12), &targets).index, 1);
    }

    #[test]
    fn ties_go_by_requests_in_flight_and_then_at_random() {
        let policy = policy(&[]);
        let (targets, _held) = loaded(&[1, 2, 1, 1]);
        let counts = tally(&policy, &targets, 3000);
        assert!(close_to(&counts, &[1000.0, 0.0, 1000.0, 1000.0]), "{counts:?}");
    }

    #[test]
    fn one_prompt_again_and_again_spreads_over_the_workers() {
        let (policy, (targets, _none)) = (policy(&[]), loaded(&[0; 8]));
        let prompt = text(1, 128);
        let mut draw = fastrand::Rng::with_seed(3);
        let mut held = Vec::new();
        for sent in 1..=400 {
            let request = stream(&prompt, 0.0);
            let pick = policy.pick(&request, &targets, &mut draw, None).expect("never fails");
            held.push(send(&policy, &request, &targets[pick.index]));
            let most = targets.iter().map(|target| target.in_flight()).max();
            // One each while somebody is idle, then the share, the slack and itself.
            assert!(most <= Some(if sent <= 8 { 1 } else { sent / 8 + 9 }), "{most:?} of {sent}");
        }
    }

    #[test]
    fn a_prompt_that_is_cached_is_asked_for_there_until_it_is_a_crowd() {
        let (policy, (targets, _none)) = (policy(&[]), loaded(&[0; 4]));
        served(&policy, &text(1, 128), &targets[0]);
        let mut held = Vec::new();
        let reasons = loop {
            let pick = pick(&policy, &text(1, 128), &targets);
            if pick.index != 0 {
                break pick.reason;
            }
            let mut one = send(&policy, &stream(&text(1, 128), 0.0), &targets[0]);
            one.begun(0.0);
            held.push(one);
        };
        // 11 are more than 8 over the share of four workers.
        assert_eq!((reasons, held.len()), (CROWDED, 11));
        let (_, scored) = scores(&policy, &text(1, 128), &targets);
        assert!(scored[0].is_none() && scored[1..].iter().all(Option::is_some), "{scored:?}");
        // Those that came for something else are no crowd, and neither is who needs most of it computed.
        let other = [text(1, 128), text(2, 500)].concat();
        assert_eq!(pick(&policy, &other, &targets).index, 0);
        held.pop();
        assert_eq!(pick(&policy, &text(1, 128), &targets).index, 0);
    }

    #[test]
    fn an_empty_prompt_and_a_huge_one_are_picked_for() {
        let (policy, (targets, _none)) = (policy(&["--worker-kv-tokens=1"]), loaded(&[0, 0]));
        let huge = text(1, 100_000);
        for prompt in [&b""[..], &huge] {
            let pick = pick(&policy, prompt, &targets);
            assert_eq!((pick.reason, pick.matched_tokens), (NO_MATCH, Some(0)));
            served(&policy, prompt, &targets[pick.index]);
        }
        assert_eq!(policy.input_tokens(&Request::of(b"")), None);
    }

    #[test]
    fn bad_numbers_are_refused_by_name_and_range() {
        for (flag, range) in [
            ("--cache-weight=-1", "at least 0"),
            ("--cache-weight=NaN", "at least 0"),
            ("--cache-weight=inf", "finite"),
            ("--worker-kv-tokens=0", "1..="),
            ("--worker-kv-tokens=-1", "invalid"),
            ("--worker-kv-tokens=2e6", "invalid"),
        ] {
            let error = options(&[flag]).expect_err(flag);
            assert!(error.contains(range), "{error}");
        }
        let options = options(&[]).expect("no flag is needed");
        assert_eq!((options.cache_weight, options.worker_kv_tokens), (4.0, None));
    }

    #[derive(Clone, Debug)]
    enum Step {
        Ask { kind: u8, blocks: usize, stream: bool },
        Begin(usize),
        Tell(usize, u32, u32),
        End(usize),
        Forget(WorkerId),
    }

    fn step() -> impl Strategy<Value = Step> {
        let asked = (0..4_u8, 0..60_usize, any::<bool>());
        prop_oneof![
            6 => asked.prop_map(|(kind, blocks, stream)| Step::Ask { kind, blocks, stream }),
            3 => any::<usize>().prop_map(Step::Begin),
            2 => (any::<usize>(), 0..2000_u32, 0..2000_u32).prop_map(|(at, p, c)| Step::Tell(at, p, c)),
            3 => any::<usize>().prop_map(Step::End),
            1 => (0..4_u32).prop_map(Step::Forget),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            failure_persistence: None,
            ..ProptestConfig::with_cases(100)
        })]

        #[test]
        fn the_choice_can_be_made_again_from_what_is_told(
            steps in prop::collection::vec(step(), 1..80),
        ) {
            let policy = policy(&["--worker-kv-tokens=2000"]);
            let (targets, _none) = loaded(&[0; 4]);
            let mut draw = fastrand::Rng::with_seed(1);
            let mut held: Vec<InFlight> = Vec::new();
            for (at, step) in steps.into_iter().enumerate() {
                let at_secs = at as f64;
                match step {
                    Step::Ask { kind, blocks, stream } => {
                        let prompt = text(kind, blocks);
                        let request = Request { stream, at_secs, ..Request::of(&prompt) };
                        let tokens = policy.input_tokens(&request).unwrap_or(0);
                        let (pick, told) =
                            explained(&policy, &request, &targets, &mut draw, 4).expect("never fails");
                        let speeds = told.iter().map(|one| one.speed.unwrap_or(1.0));
                        let mean = speeds.sum::<f64>() / told.len() as f64;
                        for one in &told {
                            let uncached = f64::from(tokens - one.matched_tokens.unwrap_or(0));
                            let pending = f64::from(one.pending_tokens.expect("it is counted"));
                            let wait = (pending + uncached) / one.speed.unwrap_or(1.0);
                            let score = wait + 4.0 * uncached / mean;
                            let is_it = |told: f64| (told - score).abs() <= 1e-9 * score;
                            prop_assert!(one.score.is_none_or(is_it), "{one:?} {score}");
                        }
                        prop_assert_eq!(told[0].index, pick.index);
                        prop_assert!(told[0].score.is_some());
                        held.push(send(&policy, &request, &targets[pick.index]));
                    }
                    Step::Begin(which) if !held.is_empty() => {
                        let which = which % held.len();
                        held[which].begun(at_secs);
                    }
                    Step::Tell(which, prompt, cached) if !held.is_empty() => {
                        let which = which % held.len();
                        held[which].told(&Told {
                            prompt_tokens: Some(prompt),
                            cached_tokens: Some(cached),
                            completion_tokens: Some(cached),
                        });
                    }
                    Step::End(which) if !held.is_empty() => {
                        drop(held.swap_remove(which % held.len()));
                    }
                    Step::Forget(worker) => policy.forget(worker),
                    _ => {}
                }
            }
            drop(held);
            let views = policy.outlook.see(&Request::of(b""), &targets);
            prop_assert!(views.workers.iter().all(|view| view.pending_tokens == 0));
        }
    }
}
