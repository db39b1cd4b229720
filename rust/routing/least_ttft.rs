//! `least_ttft`: where the first token is expected soonest, as far as that is no waste.
//!
//! For each worker: (tokens of prefill that wait there + tokens of this prompt that it has not cached) / its speed is the time
//! to the first token. To that comes `cache_weight` × those uncached tokens / the mean speed: what is computed twice costs the
//! requests to come, also where nobody waits now. The lowest sum wins, ties by requests in flight, then at random.
//! Everything it goes by is believed: see [`Outlook`].
//!
//! Prefill is not all that a worker does, and it does not run everything at once. So a cached prefix draws requests to a
//! worker only up to a limit of requests in flight, its share of them, by speed, and a slack of [`SLACK`] and the share's
//! square root. Above it a worker is passed over, unless another one below it holds as much of the prompt: then the
//! score decides between them up to twice the slack, so that requests need not wait for the second copy while it is
//! being computed. Hence one prompt that is asked for again and again spreads over the workers.

use std::sync::Arc;

use super::candidates::Weighed;
use super::outlook::{Outlook, View, Views};
use super::{Options, Pick, PickError, Policy, Request, Target, Underway, WorkerId, least_by};

const PREFIX_MATCH: &str = "prefix_match";
const SHORTER_WAIT: &str = "shorter_wait";
const NO_MATCH: &str = "no_match";

/// Every reason this policy gives: nobody has more of the prompt, somebody has and would take longer all the same,
/// nobody has any of it.
pub const REASONS: &[&str] = &[PREFIX_MATCH, SHORTER_WAIT, NO_MATCH];

/// See [`super::PolicyKind::score`].
pub const SCORE: &str = "(`pending_tokens` + uncached) / `speed` + `cache_weight` × uncached / the mean of all speeds, in \
    seconds, where uncached = `input_tokens` − `matched_tokens`; while no speed is known, as if each were 1. None for a \
    worker that is passed over because its cache has drawn far more than its share of the requests in flight. The \
    lowest wins, ties by requests in flight.";

/// Requests in flight beyond a worker's share that are no crowd.
const SLACK: f64 = 4.0;

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

    /// The score of each worker; `None` for those that are passed over.
    fn scores(&self, views: &Views, targets: &[Arc<Target>]) -> Vec<Option<f64>> {
        let count = targets.len() as f64;
        let mean_speed = views.workers.iter().map(speed).sum::<f64>() / count;
        let score = |view: &View| {
            let uncached = f64::from(views.input_tokens - view.matched_tokens);
            let wait = (f64::from(view.pending_tokens) + uncached) / speed(view);
            wait + self.cache_weight * uncached / mean_speed
        };
        // As many requests in flight as a worker of the mean speed would have.
        let load = |(view, target): (&View, &Arc<Target>)| {
            f64::from(target.in_flight()) * mean_speed / speed(view)
        };
        let in_flight: u64 = targets.iter().map(|target| u64::from(target.in_flight())).sum();
        let share = in_flight as f64 / count;
        let slack = SLACK + share.sqrt();
        let workers = || views.workers.iter().zip(targets);
        let free = workers().filter(|worker| load(*worker) <= share + slack);
        let held_by_free = free.map(|(view, _)| view.matched_tokens).max().unwrap_or(0);
        let is_passed_over = |view: &View, load: f64| {
            let is_best = view.matched_tokens > held_by_free;
            view.matched_tokens > 0 && load > share + if is_best { slack } else { 2.0 * slack }
        };
        workers()
            .map(|worker| (!is_passed_over(worker.0, load(worker))).then(|| score(worker.0)))
            .collect()
    }
}

/// Tokens a second; as long as nobody's are known, those of all workers are the same.
fn speed(view: &View) -> f64 {
    view.speed.unwrap_or(1.0)
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
        let scores = self.scores(&views, targets);
        let index = lowest(&scores, targets, rng);
        if let Some(weighed) = weighed {
            weighed.matched(|index| views.workers[index].matched_tokens);
            weighed.prefill(|index| {
                let View { pending_tokens, speed, .. } = views.workers[index];
                (pending_tokens, speed)
            });
            weighed.lowest_wins(|candidate| scores[candidate.index]);
        }
        let matched_tokens = views.workers[index].matched_tokens;
        let most = views.workers.iter().map(|view| view.matched_tokens).max();
        let reason = match most {
            None | Some(0) => NO_MATCH,
            Some(most) if matched_tokens < most => SHORTER_WAIT,
            Some(_) => PREFIX_MATCH,
        };
        Ok(Pick { index, reason, matched_tokens: Some(matched_tokens) })
    }

    fn input_tokens(&self, request: &Request) -> Option<u32> {
        (!request.prompt.is_empty()).then(|| self.outlook.input_tokens(request))
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

/// Index of the lowest score, ties by requests in flight, then at random.
fn lowest(scores: &[Option<f64>], targets: &[Arc<Target>], rng: &mut fastrand::Rng) -> usize {
    let load =
        |(score, target): (&Option<f64>, &Arc<Target>)| Some(((*score)?, target.in_flight()));
    least_by(scores.iter().zip(targets).map(load), rng)
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
        for _ in 0..400 {
            let request = stream(&prompt, 0.0);
            let pick = policy.pick(&request, &targets, &mut draw, None).expect("never fails");
            held.push(send(&policy, &request, &targets[pick.index]));
        }
        let loads: Vec<_> = targets.iter().map(|target| target.in_flight()).collect();
        // Its share is 50, and the slack 4 + √50.
        assert!(loads.iter().all(|load| *load <= 62), "{loads:?}");
    }

    #[test]
    fn a_crowded_worker_waits_until_another_holds_as_much() {
        let (policy, (targets, _held)) = (policy(&[]), loaded(&[14, 0, 0, 0]));
        served(&policy, &text(1, 128), &targets[0]);
        let (first, scored) = scores(&policy, &text(1, 128), &targets);
        assert!(first.index != 0 && scored[0].is_none(), "{scored:?}");
        // The second copy is being computed; meanwhile the first one serves.
        let _copied = send(&policy, &stream(&text(1, 128), 0.0), &targets[first.index]);
        assert_eq!(pick(&policy, &text(1, 128), &targets).index, 0);
        let _more: Vec<_> = (0..14).map(|_| targets[0].begin()).collect();
        assert_eq!(pick(&policy, &text(1, 128), &targets).index, first.index);
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
