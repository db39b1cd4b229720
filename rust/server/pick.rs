//! Picks the worker for an attempt: asks the policy among those that may be picked now.
//!
//! Which those are, in this order: healthy, with a breaker that lets the request through; not tried before; not
//! asking to be left alone. A worker that this request has failed on is picked again only when there is no other, the
//! one it failed on last only when there is none at all.
//!
//! A policy from outside may take long, or for ever. It is asked on a thread of its own with all that it needs, so that
//! the request can end meanwhile; an answer that comes later changes nothing.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::http::uri::PathAndQuery;
use bytes::Bytes;
use hyper::header::HeaderValue;

use super::{App, SLOW_PICKS_MAX, headers, now};
use crate::error::{Error, Kind, shown};
use crate::routing::candidates::explained;
use crate::routing::{self, InFlight, Pick, PickError, Target};
use crate::tracking::Candidate;
use crate::workers::breaker::Fitness;
use crate::workers::{Pass, Snapshot, Worker};

/// The `reason` of a request that named its worker itself.
pub(super) const PINNED: &str = "pinned";

/// A worker picked for a request, which is in flight there from the pick on.
pub(super) struct Picked {
    pub(super) worker: Arc<Worker>,
    pub(super) in_flight: InFlight,
    pub(super) pass: Pass,
    pub(super) reason: &'static str,
    /// Of the prompt, where the policy estimates them.
    pub(super) input_tokens: Option<u32>,
    pub(super) matched_tokens: Option<u32>,
    /// What the policy chose among, if that is traced and the policy was asked.
    pub(super) candidates: Option<Arc<Vec<Candidate>>>,
    /// How long the pick took.
    pub(super) took: Duration,
}

/// What a policy is shown of a request.
#[derive(Clone)]
pub(super) struct Asked {
    pub(super) prompt: Bytes,
    pub(super) is_ids: bool,
    pub(super) stream: bool,
    pub(super) path: PathAndQuery,
    pub(super) model: Option<String>,
    pub(super) routing_key: Option<HeaderValue>,
    pub(super) request_id: Option<HeaderValue>,
    /// When it was last routed.
    pub(super) at_secs: f64,
    pub(super) block_names: routing::BlockNames,
}

impl Asked {
    fn request(&self) -> routing::Request<'_> {
        routing::Request {
            prompt: &self.prompt,
            is_ids: self.is_ids,
            stream: self.stream,
            route: self.path.path(),
            model: self.model.as_deref(),
            routing_key: self.routing_key.as_ref().and_then(text),
            request_id: self.request_id.as_ref().and_then(text),
            at_secs: self.at_secs,
            block_names: Some(&self.block_names),
        }
    }
}

/// What a header says, if it says anything; not only in ASCII, as `HeaderValue::to_str` would have it.
fn text(value: &HeaderValue) -> Option<&str> {
    std::str::from_utf8(value.as_bytes()).ok().filter(|text| !text.is_empty())
}

/// What an attempt's pick depends on, beside the workers. It owns all of it, as a policy that takes long may outlast the
/// request.
#[derive(Clone)]
pub(super) struct Wish {
    pub(super) asked: Asked,
    /// The worker the request names itself.
    pub(super) pin: Option<HeaderValue>,
    /// Workers that the request has failed on, the last one last.
    pub(super) failed_on: Vec<u32>,
    pub(super) draw: fastrand::Rng,
}

impl Wish {
    /// Whether an attempt would go to a worker that was not tried.
    pub(super) fn has_untried(&self, app: &App) -> bool {
        let is_untried = |worker: &Arc<Worker>| {
            !self.failed_on.contains(&worker.index) && worker.gate.fitness(now()) != Fitness::Barred
        };
        self.pin.is_none() && app.workers.snapshot().routable.iter().any(is_untried)
    }
}

/// A worker that was chosen, with nothing counted yet.
pub(super) struct Chosen {
    worker: Arc<Worker>,
    pick: Pick,
    candidates: Option<Arc<Vec<Candidate>>>,
    took: Duration,
}

/// The next worker to try; None when there is none.
///
/// # Errors
/// The request names a worker that does not exist, or that may not be picked; a policy from outside failed.
pub(super) fn choose(app: &App, wish: &mut Wish) -> Result<Option<Chosen>, Error> {
    let began = Instant::now();
    wish.asked.at_secs = app.secs(began);
    let snapshot = app.workers.snapshot();
    let choice = match &wish.pin {
        Some(pin) => {
            let index = pinned(&snapshot, pin)?;
            let worker = snapshot.routable[index].index;
            let matched_tokens = app.policy.matched_tokens(&wish.asked.request(), worker);
            Some((index, Pick { index, reason: PINNED, matched_tokens }, None))
        }
        None => choose_among(app, &snapshot, wish).map_err(failed)?,
    };
    Ok(choice.map(|(index, pick, candidates)| Chosen {
        worker: snapshot.routable[index].clone(),
        pick,
        candidates,
        took: began.elapsed(),
    }))
}

/// The same of a policy that may take long, which holds up nothing but this request, unless many of them do.
/// May be dropped at any time.
///
/// # Errors
/// As [`choose`].
pub(super) async fn choose_elsewhere(
    app: &Arc<App>,
    wish: &mut Wish,
) -> Result<Option<Chosen>, Error> {
    // Never closed. It is given back when the policy has answered, also if nobody waits for that any more.
    let turn = app.slow_picks.clone().acquire_owned().await;
    let (to_ask, mut asked) = (app.clone(), wish.clone());
    let asking = tokio::task::spawn_blocking(move || {
        let _turn = turn;
        let chosen = choose(&to_ask, &mut asked);
        (chosen, asked)
    });
    match asking.await {
        Ok((chosen, asked)) => {
            *wish = asked;
            chosen
        }
        Err(error) => Err(Error::new(
            Kind::PolicyFailed,
            format!("the policy {} was not asked to the end: {error}", app.policy_name),
        )),
    }
}

/// Counts the request as in flight at the worker that was chosen. None when another request was faster to take the
/// probe of its breaker: then the worker is no choice now.
pub(super) fn take(app: &App, wish: &Wish, chosen: Chosen) -> Option<Picked> {
    let Chosen { worker, pick, candidates, took } = chosen;
    let request = wish.asked.request();
    let input_tokens = app.policy.input_tokens(&request);
    let pass = worker.gate.begin(now())?;
    // Counted before the prompt is remembered, which takes longer than the next request's pick.
    let mut in_flight = worker.target.begin();
    in_flight.heard_by(app.policy.sent(&request, &worker.target));
    let Pick { reason, matched_tokens, .. } = pick;
    Some(Picked { worker, in_flight, pass, reason, input_tokens, matched_tokens, candidates, took })
}

/// The request's time is over, and a policy that was asked for so long has not answered.
pub(super) fn unanswered(app: &App, asked_for: Duration) -> Error {
    let waiting = if app.slow_picks.available_permits() == 0 {
        format!("; {SLOW_PICKS_MAX} calls of it have not ended, and no more are made at a time")
    } else {
        String::new()
    };
    let message = format!(
        "the policy {} has not answered for {:.1} s, and the request may take {} s (request_timeout_secs){waiting}",
        app.policy_name,
        asked_for.as_secs_f64(),
        app.options.request_timeout_secs
    );
    Error::new(Kind::PolicyFailed, message)
}

/// The place of a worker among all routable ones, why it was picked, and, if that is traced, among which.
type Choice = (usize, Pick, Option<Arc<Vec<Candidate>>>);

fn failed(error: PickError) -> Error {
    let PickError { message, detail } = error;
    Error::new(Kind::PolicyFailed, message).with_detail(detail)
}

/// What the policy picks among the best there are.
fn choose_among(
    app: &App,
    snapshot: &Snapshot,
    wish: &mut Wish,
) -> Result<Option<Choice>, PickError> {
    let failed_on = &wish.failed_on;
    if failed_on.is_empty() && !app.workers.is_any_limited(snapshot) {
        if snapshot.targets.is_empty() {
            return Ok(None);
        }
        return ask(app, wish, &snapshot.targets, |index| (index, &snapshot.routable[index]))
            .map(Some);
    }
    let now = now();
    let mut best = (u8::MAX, Vec::new());
    for (index, worker) in snapshot.routable.iter().enumerate() {
        let Some(demerits) = demerits(worker, failed_on, now) else { continue };
        if demerits < best.0 {
            best = (demerits, Vec::new());
        }
        if demerits == best.0 {
            best.1.push(index);
        }
    }
    let (_, left) = best;
    let targets: Vec<_> = left.iter().map(|index| snapshot.targets[*index].clone()).collect();
    if targets.is_empty() {
        return Ok(None);
    }
    ask(app, wish, &targets, |index| (left[index], &snapshot.routable[left[index]])).map(Some)
}

/// What the policy picks among these; `at` tells a target's place among all routable workers, and which it is.
fn ask<'a>(
    app: &App,
    wish: &mut Wish,
    targets: &[Arc<Target>],
    at: impl Fn(usize) -> (usize, &'a Arc<Worker>),
) -> Result<Choice, PickError> {
    let Wish { asked, draw, .. } = wish;
    let request = &asked.request();
    let traced = app.tracker.as_ref().and_then(|tracker| tracker.options().candidates_max());
    let Some(keep) = traced else {
        let pick = app.policy.pick(request, targets, draw, None)?;
        return Ok((at(pick.index).0, pick, None));
    };
    let (pick, candidates) = explained(&*app.policy, request, targets, draw, keep)?;
    let named = |candidate: &routing::candidates::Candidate| {
        // Each that may be picked has a name.
        let worker = at(candidate.index).1.name()?.clone();
        let routing::candidates::Candidate {
            in_flight,
            matched_tokens,
            pending_tokens,
            speed,
            same_prefix,
            score,
            ..
        } = *candidate;
        Some(Candidate {
            worker,
            in_flight,
            matched_tokens,
            pending_tokens,
            speed,
            same_prefix,
            score,
        })
    };
    let mut kept = Vec::with_capacity(candidates.len());
    kept.extend(candidates.iter().filter_map(named));
    Ok((at(pick.index).0, pick, Some(Arc::new(kept))))
}

/// What speaks against a worker, the less the better; None if it may not be picked at all.
fn demerits(worker: &Worker, failed_on: &[u32], now: Instant) -> Option<u8> {
    let is_avoided = match worker.gate.fitness(now) {
        Fitness::Fit => false,
        Fitness::Avoided => true,
        Fitness::Barred => return None,
    };
    let is_tried = failed_on.contains(&worker.index);
    let is_last = failed_on.last() == Some(&worker.index);
    Some(4 * u8::from(is_last) + 2 * u8::from(is_tried) + u8::from(is_avoided))
}

/// Where the worker that a request names stands among those that may be picked.
pub(super) fn pinned(snapshot: &Snapshot, pin: &HeaderValue) -> Result<usize, Error> {
    let name = String::from_utf8_lossy(pin.as_bytes());
    let Some(worker) = snapshot.find(&name) else {
        let message = format!(
            "{} names {}, which is neither the node_id nor the URL of a worker; GET /workers lists them",
            headers::X_TARGET_WORKER,
            shown(&name)
        );
        return Err(Error::new(Kind::UnknownTargetWorker, message));
    };
    let place = snapshot.routable.iter().position(|routable| routable.index == worker.index);
    let place = place.filter(|_| worker.gate.fitness(now()) != Fitness::Barred);
    place.ok_or_else(|| {
        let message = format!("the worker asked for, {}, {}", worker.url, worker.why_not());
        Error::new(Kind::NoAvailableWorkers, message)
    })
}
