//! Everything that has to be closed when a request ends, on one value.
//!
//! A [`Flight`] is one routed request from its arrival to its end, whichever that is. It holds the count of requests
//! in flight at the picked worker and the open trace record. Completed, refused, broken, or dropped because the
//! client left: exactly one end is written, and the count is given back by `Drop`.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use hyper::{HeaderMap, StatusCode};
use smallvec::SmallVec;

use super::admission::Slot;
use super::exchange::Exchange;
use super::in_flight::{Abort, Listed};
use super::pick::{PINNED, Picked};
use super::relay::Patience;
use super::{App, now, request_id, retry};
use crate::error::{Error, Kind, Origin};
use crate::request::Scan;
use crate::routing::{InFlight, Told};
use crate::telemetry::metrics::labels::{
    BackoffLabels, CauseLabels, Http, ReasonLabels, Regular, ResultLabels, WorkerErrorLabels,
};
use crate::telemetry::metrics::{Route, Series};
use crate::tracking::{AnswerFacts, Arrived, OpenTrace, PromptBlocks, RequestFacts};
use crate::upstream::SendError;
use crate::upstream::answer::Facts;
use crate::workers::breaker::Outcome;
use crate::workers::{Pass, Worker};

pub(super) struct Flight {
    app: Arc<App>,
    route: Arc<Route>,
    /// What is counted of its model; None until the body was read.
    series: Option<Arc<Series>>,
    arrived: Arrived,
    /// When it has to be over.
    deadline: Instant,
    /// None until the headers or the body gave one.
    id: Option<Arc<str>>,
    trace: Option<OpenTrace>,
    /// Its place among the requests let in, from its admission on.
    slot: Option<Slot>,
    /// How it is ended from outside.
    abort: Arc<Abort>,
    listed: SmallVec<[Listed; 2]>,
    /// The newest picked worker.
    worker: Option<Arc<Worker>>,
    /// Since when a policy that may take long is being asked.
    asking_since: Option<Instant>,
    /// None before the first pick and when the newest attempt came to nothing.
    attempt: Option<Attempt>,
    /// Why that was, until the log has been told.
    untold: Option<String>,
    /// The worker's status, once its headers came.
    status: Option<StatusCode>,
    /// Those headers went on to the client.
    is_relayed: bool,
    first_content_at: Option<Instant>,
    /// As the worker told.
    completion_tokens: Option<u32>,
    has_ended: bool,
}

/// A request at a worker.
struct Attempt {
    in_flight: InFlight,
    pass: Pass,
    sent_at: Instant,
    /// When the first byte of the answer came.
    answered_at: Option<Instant>,
}

impl Flight {
    /// A request has arrived. `header_id` is the id its headers gave it, if any.
    pub(super) fn begin(
        app: Arc<App>,
        route: Arc<Route>,
        exchange: Exchange,
        header_id: Option<Arc<str>>,
    ) -> Self {
        route.arrived();
        let Exchange { arrived, deadline, abort } = exchange;
        let mut flight = Self {
            app,
            route,
            series: None,
            arrived,
            id: None,
            trace: None,
            slot: None,
            deadline,
            abort,
            listed: SmallVec::new(),
            worker: None,
            asking_since: None,
            attempt: None,
            untold: None,
            status: None,
            is_relayed: false,
            first_content_at: None,
            completion_tokens: None,
            has_ended: false,
        };
        if let Some(id) = header_id {
            flight.open(id);
        }
        flight
    }

    pub(super) fn route(&self) -> &str {
        &self.route.path
    }

    /// When the request has to be over.
    pub(super) fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Whether the worker it is at had its share of the request's time, and gave no answer.
    pub(super) fn is_kept_waiting(&self) -> bool {
        let Patience { whole, stall } = self.app.options.patience();
        let is_long = |attempt: &Attempt| now() >= attempt.sent_at + stall.min(whole / 2);
        self.attempt.as_ref().is_some_and(is_long)
    }

    /// The request's id. A request that nobody named gets a fresh one.
    pub(super) fn id(&mut self) -> &str {
        if self.id.is_none() {
            self.open(request_id::generate());
        }
        self.id.as_deref().unwrap_or_default()
    }

    /// What the body says: the id, where no header gave one, and the facts of the record.
    pub(super) fn describe(
        &mut self,
        scan: &Scan<'_>,
        trace_id: Option<&str>,
        prompt_blocks: Option<&PromptBlocks>,
    ) {
        let rid = scan.rid.as_deref();
        if self.id.is_none() {
            let id = rid.and_then(|rid| self.app.request_ids.in_rid(rid));
            self.open(id.unwrap_or_else(request_id::generate));
        }
        let is_other =
            |rid: &&str| rid.len() <= request_id::LENGTH_MAX && self.id.as_deref() != Some(*rid);
        if let Some(rid) = rid.filter(is_other) {
            self.listed.push(self.app.in_flight.list(&rid.into(), &self.abort));
        }
        let series = self.route.series(scan.model.as_deref());
        series.asked(scan.stream == Some(true));
        self.series = Some(series);
        if let Some(trace) = &mut self.trace {
            trace.request(RequestFacts {
                model: scan.model.as_deref(),
                stream: scan.stream,
                input_tokens: scan.input_tokens,
                trace_id,
                prompt_blocks,
            });
        }
    }

    /// A policy that may take long is asked from now on.
    pub(super) fn asking(&mut self) {
        self.asking_since = Some(now());
    }

    /// It has answered.
    pub(super) fn asked(&mut self) {
        self.asking_since = None;
    }

    /// Since when a policy has not answered, if it is being asked.
    pub(super) fn asking_since(&self) -> Option<Instant> {
        self.asking_since
    }

    /// The newest picked worker.
    pub(super) fn worker(&self) -> Option<&Arc<Worker>> {
        self.worker.as_ref()
    }

    /// The request may be routed now, having waited since `since`.
    pub(super) fn admitted(&mut self, slot: Slot, since: Instant) {
        self.slot = Some(slot);
        let now = now();
        self.route.allowed();
        self.app.metrics.queue_wait.observe((now - since).as_secs_f64());
        if let Some(trace) = &mut self.trace {
            trace.admitted(now);
        }
    }

    /// There was no room for the request, or not in time.
    pub(super) fn rejected(&self) {
        let labels = ResultLabels { result: "rejected" };
        self.app.metrics.rate_limit.get_or_create(&labels).inc();
    }

    /// A worker was picked, after the body was scanned for as long.
    pub(super) fn picked(&mut self, picked: Picked, scan_took: Duration) {
        let Picked {
            worker,
            in_flight,
            pass,
            reason,
            input_tokens,
            matched_tokens,
            candidates,
            took,
        } = picked;
        let decision = scan_took + took;
        let sent_at = now();
        if let (Some(trace), Some(name)) = (&mut self.trace, worker.name()) {
            trace.routed(name, reason, matched_tokens, decision, candidates);
            trace.estimated(input_tokens);
            trace.sent(sent_at);
        }
        if let (Some(error), Some(failed)) = (self.untold.take(), &self.worker) {
            tracing::warn!(
                request_id = self.id.as_deref(), worker = %failed.url, next = %worker.url, "attempt failed: {error}"
            );
        }
        self.count_pick(&worker, reason, decision);
        tracing::debug!(
            request_id = self.id.as_deref(), worker = %worker.url, reason, matched_tokens,
            decision_us = decision.as_nanos() as f64 / 1e3, "picked"
        );
        self.abort.move_to(Some(&worker));
        self.attempt = Some(Attempt { in_flight, pass, sent_at, answered_at: None });
        self.status = None;
        self.worker = Some(worker);
    }

    fn count_pick(&self, worker: &Worker, reason: &'static str, decision: Duration) {
        worker.picked.fetch_add(1, Ordering::Relaxed);
        let metrics = &self.app.metrics;
        let policy = self.app.policy_name;
        metrics.selections.get_or_create(&ReasonLabels { policy, reason }).inc();
        metrics.decision.observe(decision.as_secs_f64());
        if let Some(series) = &self.series {
            if reason == PINNED { series.pinned() } else { series.picked(policy) }
        }
        if self.worker.is_some() {
            self.route.retried();
        }
    }

    /// The picked worker gave no answer; `says` is what that means for its breaker.
    pub(super) fn unanswered(&mut self, error: &SendError, says: Outcome) {
        if !error.is_ours() {
            let is_unconnected = error.is_unconnected();
            self.worker_failed(if is_unconnected { "connection" } else { "no_answer" });
        }
        self.attempt_failed(now(), None, &error.to_string(), says);
    }

    /// The answer the picked worker gave is not taken, because another attempt is to follow.
    pub(super) fn passed_over(&mut self, error: &str) {
        let answered_at = self.attempt.as_ref().and_then(|attempt| attempt.answered_at);
        let status = self.status.map(|status| status.as_u16());
        if status.is_some_and(|status| status >= 500) {
            self.worker_failed("status");
        }
        // Its breaker has heard of the status already.
        self.attempt_failed(answered_at.unwrap_or_else(now), status, error, Outcome::Neutral);
    }

    fn attempt_failed(&mut self, at: Instant, status: Option<u16>, error: &str, says: Outcome) {
        if let Some(mut attempt) = self.attempt.take() {
            attempt.pass.ended(says, at);
        }
        self.abort.move_to(None);
        self.status = None;
        // If no other attempt follows, the request's own end says it.
        self.untold = Some(error.to_owned());
        if let Some(trace) = &mut self.trace {
            trace.attempt_failed(at, status, error);
        }
    }

    /// The newest picked worker was to blame for a failed attempt.
    fn worker_failed(&self, error_type: &'static str) {
        if let Some(worker) = &self.worker {
            worker.failed.fetch_add(1, Ordering::Relaxed);
        }
        let labels = WorkerErrorLabels { worker_type: Regular, connection_mode: Http, error_type };
        self.app.metrics.worker_errors.get_or_create(&labels).inc();
    }

    /// So long a pause is made before this attempt.
    pub(super) fn pausing(&self, pause: Duration, attempt: u32) {
        let pauses = self.app.metrics.backoff.get_or_create(&BackoffLabels { attempt });
        pauses.observe(pause.as_secs_f64());
    }

    /// No further attempt is allowed, and the last one has failed.
    pub(super) fn exhausted(&self) {
        self.route.exhausted();
    }

    /// The head of the worker's answer came.
    pub(super) fn answered(&mut self, status: StatusCode) {
        self.status = Some(status);
        self.route.answered(status.as_u16());
        if let Some(trace) = &mut self.trace {
            trace.headers(status.as_u16());
        }
    }

    /// The answer has begun, with this head.
    pub(super) fn begun(&mut self, status: StatusCode, headers: &HeaderMap) {
        let Some(attempt) = &mut self.attempt else { return };
        let at = now();
        attempt.answered_at = Some(at);
        match retry::verdict(status, headers) {
            Some(outcome) => attempt.pass.ended(outcome, at),
            None => attempt.pass.answered(),
        }
    }

    /// How the request is ended from outside.
    pub(super) fn abort(&self) -> Arc<Abort> {
        self.abort.clone()
    }

    /// Ready when the request is ended from outside.
    pub(super) fn poll_aborted(&self, cx: &Context<'_>) -> Poll<()> {
        self.abort.poll(cx)
    }

    /// Whether the router is being stopped, which ends connections in any order and blames nobody.
    pub(super) fn is_cut(&self) -> bool {
        self.app.is_stopped.load(Ordering::Relaxed)
    }

    /// The answer goes on to the client from here.
    pub(super) fn relaying(&mut self) -> StatusCode {
        self.is_relayed = true;
        self.status.unwrap_or_default()
    }

    /// The first byte of the answer's body came.
    pub(super) fn first_byte(&mut self, at: Instant) {
        if let Some(trace) = &mut self.trace {
            trace.first_byte(at);
        }
    }

    /// The first frame with content came.
    pub(super) fn first_content(&mut self, at: Instant) {
        self.first_content_at = Some(at);
        if let Some(attempt) = &mut self.attempt {
            attempt.in_flight.begun(self.app.secs(at));
        }
        if let Some(series) = &self.series {
            series.first_content(at - self.arrived.at);
        }
        if let Some(trace) = &mut self.trace {
            trace.ttft(at);
        }
    }

    /// What the answer said of itself, as far as it came.
    pub(super) fn said(&mut self, facts: &Facts) {
        self.completion_tokens = facts.completion_tokens;
        if let Some(series) = &self.series {
            series.tokens(facts.prompt_tokens, facts.completion_tokens);
        }
        if let Some(worker) = &self.worker
            && worker.cache.told(facts.prompt_tokens, facts.cached_tokens)
        {
            tracing::warn!(
                worker = %worker.url,
                "an answer had {} cached of {} prompt tokens: such answers teach nothing",
                facts.cached_tokens.unwrap_or(0), facts.prompt_tokens.unwrap_or(0)
            );
        }
        if let Some(attempt) = &mut self.attempt {
            attempt.in_flight.told(&Told {
                prompt_tokens: facts.prompt_tokens,
                cached_tokens: facts.cached_tokens,
                completion_tokens: facts.completion_tokens,
            });
        }
        if let Some(trace) = &mut self.trace {
            trace.answer(AnswerFacts {
                prompt_tokens: facts.prompt_tokens,
                cached_tokens: facts.cached_tokens,
                completion_tokens: facts.completion_tokens,
                finish_reason: facts.finish_reason.as_deref(),
                worker_request_id: facts.worker_request_id.as_deref(),
            });
        }
    }

    /// The last byte of the answer was relayed. `excerpt` is the head of an answer that is an error.
    pub(super) fn relayed(&mut self, excerpt: &str) {
        let status = self.status.unwrap_or_default();
        if status.is_success() {
            self.count_stream();
            self.end(Ending { status: Some(status), counted_as: status.as_u16(), error: None });
        } else {
            let message = answered_with(status, excerpt);
            let origin = if status.is_server_error() { Origin::Worker } else { Origin::Client };
            self.fail(Some(status), status.as_u16(), origin, &message, None);
        }
    }

    fn count_stream(&self) {
        if let (Some(series), Some(first_content_at)) = (&self.series, self.first_content_at) {
            let now = now();
            let (took, generated_for) = (now - self.arrived.at, now - first_content_at);
            series.streamed(took, generated_for, self.completion_tokens);
        }
    }

    /// The answer ended before it was whole.
    pub(super) fn broke(&mut self, error: &Error) {
        let Error { kind, origin, message, .. } = error;
        if *kind == Kind::Aborted {
            self.count_abort("abort_request");
        }
        let counted_as = self.status.map_or(kind.status(), |status| status.as_u16());
        self.fail(self.status, counted_as, *origin, message, Some(*kind));
    }

    /// The router answers with an error of its own.
    pub(super) fn refuse(mut self, error: &Error) {
        self.id();
        let kind = error.kind;
        // Who has left is answered nothing.
        let is_answered = kind != Kind::Aborted || self.abort.is_said();
        if kind == Kind::Aborted {
            self.count_abort(if is_answered { "abort_request" } else { "client" });
        }
        let status = is_answered.then(|| kind.http_status());
        let told = error.detail.as_ref().unwrap_or(&error.message);
        self.fail(status, kind.status(), error.origin, told, Some(kind));
    }

    fn fail(
        &mut self,
        status: Option<StatusCode>,
        counted_as: u16,
        origin: Origin,
        message: &str,
        kind: Option<Kind>,
    ) {
        let error = Some(Failure { origin, message, kind });
        self.end(Ending { status, counted_as, error });
    }

    fn count_abort(&self, cause: &'static str) {
        self.app.metrics.aborted.get_or_create(&CauseLabels { cause }).inc();
    }

    fn open(&mut self, id: Arc<str>) {
        if let Some(tracker) = &self.app.tracker {
            self.trace = Some(tracker.open(self.arrived, &id, &self.route.path));
        }
        self.listed.push(self.app.in_flight.list(&id, &self.abort));
        self.id = Some(id);
    }

    fn end(&mut self, ending: Ending<'_>) {
        if std::mem::replace(&mut self.has_ended, true) {
            return;
        }
        let now = now();
        self.slot = None;
        self.abort.move_to(None);
        // After a failed attempt the request is with no worker any more.
        let attempt = self.attempt.take();
        let worker = attempt.as_ref().and(self.worker.as_ref());
        let Ending { status, counted_as, error } = ending;
        let took = now - self.arrived.at;
        self.route.ended(counted_as, error.as_ref().map_or("", Failure::code), took);
        if let Some(series) = &self.series {
            series.ended(error.as_ref().map(|error| error.error_type(counted_as)), took);
        }
        let status = status.map(|status| status.as_u16());
        if let Some(Attempt { mut pass, mut in_flight, .. }) = attempt {
            if error.is_none() {
                in_flight.answered(self.app.secs(now));
            }
            pass.ended(outcome(error.as_ref().map(|failure| failure.origin)), now);
        }
        match error {
            None => {
                if let Some(worker) = worker {
                    worker.served.fetch_add(1, Ordering::Relaxed);
                }
                if let Some(trace) = self.trace.take() {
                    trace.complete(now);
                }
            }
            Some(Failure { origin, message, kind }) => {
                if worker.is_some() && origin == Origin::Worker {
                    self.worker_failed(match kind {
                        None => "status",
                        Some(Kind::Timeout) => "timeout",
                        Some(_) => "broken_answer",
                    });
                }
                log_failure(self.id.as_deref(), self.worker.as_deref(), origin, message);
                if let Some(trace) = self.trace.take() {
                    // The end of a traceback says what happened.
                    let is_traceback = kind == Some(Kind::PolicyFailed);
                    let message = if is_traceback { end_of(message) } else { message };
                    trace.fail(now, status, message);
                }
            }
        }
    }
}

/// The last 512 bytes at most, as a trace keeps no more.
fn end_of(text: &str) -> &str {
    let mut start = text.len().saturating_sub(512);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    &text[start..]
}

/// An answer that is an error, in words; `excerpt` is the head of its body, on one line.
pub(super) fn answered_with(status: StatusCode, excerpt: &str) -> String {
    let colon = if excerpt.is_empty() { "" } else { ": " };
    format!("worker answered {status}{colon}{excerpt}")
}

/// How a request ended.
struct Ending<'a> {
    /// What the client was answered, if it was.
    status: Option<StatusCode>,
    /// The same for the metric, which has a number for every ending.
    counted_as: u16,
    /// None when the answer was relayed to its end and is no error.
    error: Option<Failure<'a>>,
}

/// What a request's end says of the worker it was at.
fn outcome(failure: Option<Origin>) -> Outcome {
    match failure {
        None => Outcome::Success,
        Some(Origin::Worker) => Outcome::Failure,
        Some(Origin::Client | Origin::Router) => Outcome::Neutral,
    }
}

struct Failure<'a> {
    origin: Origin,
    message: &'a str,
    /// None for a worker's own error and a client that left.
    kind: Option<Kind>,
}

impl Failure<'_> {
    /// The router's own error code, or empty.
    fn code(&self) -> &'static str {
        self.kind.map_or("", Kind::code)
    }

    /// The same as `sglang-router` tells failures apart in its metrics.
    fn error_type(&self, status: u16) -> &'static str {
        match (self.kind, status) {
            (Some(Kind::NoAvailableWorkers), _) => "no_workers",
            (Some(Kind::QueueFull | Kind::Overloaded), _) => "rejected",
            (Some(Kind::Timeout), _) | (_, 408 | 504) => "timeout",
            (Some(Kind::Aborted), _) | (None, 499) => "aborted",
            (_, 400..=498) => "validation_error",
            _ => "backend_error",
        }
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        if self.has_ended {
            return;
        }
        self.id();
        let is_stopped = self.is_cut();
        self.count_abort(match (is_stopped, self.abort.is_said()) {
            (true, _) => "stopped",
            (false, true) => "abort_request",
            (false, false) => "client",
        });
        let (origin, message) = if is_stopped {
            (Origin::Router, "the router was stopped before the answer had ended".to_owned())
        } else if self.abort.is_said() {
            // Its client did not read, and so could not be told.
            let Error { origin, message, .. } = super::aborted();
            (origin, message)
        } else if now() >= self.deadline {
            (Origin::Client, unread(self.app.options.request_timeout()))
        } else {
            (Origin::Client, "client disconnected".to_owned())
        };
        let status = self.status.filter(|_| self.is_relayed);
        self.fail(status, Kind::Aborted.status(), origin, &message, None);
    }
}

/// What is said of a client that left its answer unread until the request had to be over.
pub(super) fn unread(timeout: Duration) -> String {
    format!(
        "the client had not read the answer after {} s (request_timeout_secs)",
        timeout.as_secs()
    )
}

fn log_failure(id: Option<&str>, worker: Option<&Worker>, origin: Origin, message: &str) {
    let worker = worker.map(|worker| worker.url.as_str());
    if origin == Origin::Client {
        tracing::info!(request_id = id, worker, "request failed: {message}");
    } else {
        tracing::warn!(request_id = id, worker, "request failed: {message}");
    }
}
