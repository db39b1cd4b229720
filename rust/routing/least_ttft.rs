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
use super::{Options, Pick, PickError, Policy, Request, Target, Underway, WorkerId};

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
        Some(self.outlook.input_tokens(request))
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
    let (mut index, mut best, mut tied) = (0, (f64::INFINITY, u32::MAX), 0);
    for (i, (score, target)) in scores.iter().zip(targets).enumerate() {
        let Some(score) = *score else { continue };
        let this = (score, target.in_flight());
        if this < best {
            (index, best, tied) = (i, this, 1);
        } else if this == best {
            tied += 1;
            if rng.usize(..tied) == 0 {
                index = i;
            }
        }
    }
    index
}
