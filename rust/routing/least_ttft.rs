//! `least_ttft`: where the first token is expected soonest, as far as that is no waste.
//!
//! For each worker: (tokens of prefill that wait there + tokens of this prompt that it has not cached) / its speed is the time
//! to the first token. To that comes `cache_weight` × those uncached tokens / the mean speed: what is computed twice costs the
//! requests to come, also where nobody waits now. The lowest sum wins, ties by requests in flight, then at random.
//! Everything it goes by is believed: see [`Outlook`].
//!
//! Prefill is not all that a worker does. A worker with far more requests in flight than its share of them, by speed, is
//! passed over, so that one prompt asked for again and again does not end up at one worker while the others are idle.

use std::sync::Arc;

use super::candidates::Weighed;
use super::outlook::{Outlook, View, Views};
use super::{Options, Pick, Policy, Request, Target, Underway, WorkerId};

const PREFIX_MATCH: &str = "prefix_match";
const SHORTER_WAIT: &str = "shorter_wait";
const NO_MATCH: &str = "no_match";

/// Every reason this policy gives: nobody has more of the prompt, somebody has and would take longer all the same,
/// nobody has any of it.
pub const REASONS: &[&str] = &[PREFIX_MATCH, SHORTER_WAIT, NO_MATCH];

/// See [`super::PolicyKind::score`].
pub const SCORE: &str = "(`pending_tokens` + uncached) / `speed` + `cache_weight` × uncached / the mean of the speeds, in \
    seconds, where uncached = `input_tokens` − `matched_tokens`; in tokens while no speed is known; none for a worker that \
    has far more than its share of the requests in flight. The lowest wins, ties by requests in flight.";

/// Requests in flight are more than a worker's share only if they are so many times the mean,
const CROWDED_RATIO: f64 = 1.5;
/// and so many more than that.
const CROWDED_MORE: f64 = 8.0;

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

    /// The score of each worker; `None` for those with more than their share of the requests in flight.
    fn scores(&self, views: &Views, targets: &[Arc<Target>]) -> Vec<Option<f64>> {
        let speed = |view: &View| view.speed.unwrap_or(1.0);
        let count = targets.len() as f64;
        let mean_speed = views.workers.iter().map(speed).sum::<f64>() / count;
        let in_flight: u64 = targets.iter().map(|target| u64::from(target.in_flight())).sum();
        let most = CROWDED_RATIO * in_flight as f64 / count + CROWDED_MORE;
        let score = |(view, target): (&View, &Arc<Target>)| {
            let share = speed(view) / mean_speed;
            let uncached = f64::from(views.input_tokens - view.matched_tokens);
            let wait = (view.pending_tokens as f64 + uncached) / speed(view);
            (f64::from(target.in_flight()) <= most * share)
                .then(|| wait + self.cache_weight * uncached / mean_speed)
        };
        views.workers.iter().zip(targets).map(score).collect()
    }
}

impl Policy for LeastTtft {
    fn pick(
        &self,
        request: &Request,
        targets: &[Arc<Target>],
        rng: &mut fastrand::Rng,
        weighed: Option<&mut Weighed>,
    ) -> Pick {
        let views = self.outlook.see(request, targets);
        let scores = self.scores(&views, targets);
        let index = lowest(&scores, targets, rng);
        if let Some(weighed) = weighed {
            weighed.matched(|index| views.workers[index].matched_tokens);
            weighed.lowest_wins(|candidate| scores[candidate.index]);
        }
        let matched_tokens = views.workers[index].matched_tokens;
        let most = views.workers.iter().map(|view| view.matched_tokens).max();
        let reason = match most {
            None | Some(0) => NO_MATCH,
            Some(most) if matched_tokens < most => SHORTER_WAIT,
            Some(_) => PREFIX_MATCH,
        };
        Pick { index, reason, matched_tokens: Some(matched_tokens) }
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
