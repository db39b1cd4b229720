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
use super::in_flight::{Abort, Listed};
use super::pick::Picked;
use super::{App, now, request_id, retry};
use crate::error::{Error, Kind, Origin};
use crate::request::Scan;
use crate::routing::InFlight;
use crate::telemetry::metrics::{RouteLabels, SelectionLabels, StatusLabels, WorkerLabels};
use crate::tracking::{AnswerFacts, Arrived, OpenTrace, RequestFacts};
use crate::upstream::answer::Facts;
use crate::workers::breaker::Outcome;
use crate::workers::{Pass, Worker};

pub(super) struct Flight {
    app: Arc<App>,
    route: Arc<str>,
    arrived: Arrived,
    /// None until the headers or the body gave one.
    id: Option<String>,
    trace: Option<OpenTrace>,
    /// Its place among the requests let in, from its admission on.
    slot: Option<Slot>,
    /// How it is ended from outside.
    abort: Arc<Abort>,
    listed: SmallVec<[Listed; 2]>,
    /// The newest picked worker.
    worker: Option<Arc<Worker>>,
    /// None before the first pick and when the newest attempt came to nothing.
    attempt: Option<Attempt>,
    /// Why that was, until the log has been told.
    untold: Option<String>,
    /// The worker's status, once its headers came.
    status: Option<StatusCode>,
    /// Those headers went on to the client.
    is_relayed: bool,
    has_ended: bool,
}

/// A request at a worker.
struct Attempt {
    /// Held for its drop.
    _in_flight: InFlight,
    pass: Pass,
    /// When the first byte of the answer came.
    answered_at: Option<Instant>,
}

impl Flight {
    /// A request has arrived. `header_id` is the id its headers gave it, if any.
    pub(super) fn begin(app: Arc<App>, route: Arc<str>, header_id: Option<String>) -> Self {
        app.metrics.requests.get_or_create(&labels(&route)).inc();
        let arrived = Arrived { at: now(), ..Arrived::now() };
        let mut flight = Self {
            app,
            route,
            arrived,
            id: None,
            trace: None,
            slot: None,
            abort: Arc::default(),
            listed: SmallVec::new(),
            worker: None,
            attempt: None,
            untold: None,
            status: None,
            is_relayed: false,
            has_ended: false,
        };
        if let Some(id) = header_id {
            flight.open(id);
        }
        flight
    }

    pub(super) fn route(&self) -> &str {
        &self.route
    }

    pub(super) fn arrived_at(&self) -> Instant {
        self.arrived.at
    }

    pub(super) fn is_traced(&self) -> bool {
        self.app.tracker.is_some()
    }

    /// The request's id. A request that nobody named gets a fresh one.
    pub(super) fn id(&mut self) -> &str {
        if self.id.is_none() {
            self.open(request_id::generate());
        }
        self.id.as_deref().unwrap_or_default()
    }

    /// What the body says: the id, where no header gave one, and the facts of the record.
    pub(super) fn describe(&mut self, scan: &Scan<'_>, trace_id: Option<&str>) {
        let rid = scan.rid.as_deref();
        if self.id.is_none() {
            let id = rid.and_then(|rid| self.app.request_ids.in_rid(rid));
            self.open(id.unwrap_or_else(request_id::generate));
        }
        if let Some(rid) = rid.filter(|rid| self.id.as_deref() != Some(*rid)) {
            self.listed.push(self.app.in_flight.list(rid, &self.abort));
        }
        if let Some(trace) = &mut self.trace {
            trace.request(RequestFacts {
                model: scan.model.as_deref(),
                stream: scan.stream,
                input_tokens: scan.input_tokens,
                trace_id,
            });
        }
    }

    /// The newest picked worker.
    pub(super) fn worker(&self) -> Option<&Arc<Worker>> {
        self.worker.as_ref()
    }

    /// The request may be routed now.
    pub(super) fn admitted(&mut self, slot: Slot) {
        self.slot = Some(slot);
        if let Some(trace) = &mut self.trace {
            trace.admitted(now());
        }
    }

    /// A worker was picked, after the body was scanned for as long.
    pub(super) fn picked(&mut self, picked: Picked, scan_took: Duration) {
        let Picked { worker, in_flight, pass, reason, matched_tokens, took } = picked;
        let decision = scan_took + took;
        if let (Some(trace), Some(name)) = (&mut self.trace, worker.name()) {
            trace.routed(name, reason, matched_tokens, decision);
            trace.sent(now());
        }
        if let (Some(error), Some(failed)) = (self.untold.take(), &self.worker) {
            tracing::warn!(
                request_id = self.id, worker = %failed.url, next = %worker.url, "attempt failed: {error}"
            );
        }
        let selection = SelectionLabels { policy: self.app.policy_name, reason };
        self.app.metrics.selections.get_or_create(&selection).inc();
        tracing::debug!(
            request_id = self.id, worker = %worker.url, reason, matched_tokens,
            decision_us = decision.as_nanos() as f64 / 1e3, "picked"
        );
        self.abort.is_at(Some(&worker));
        self.attempt = Some(Attempt { _in_flight: in_flight, pass, answered_at: None });
        self.status = None;
        self.worker = Some(worker);
    }

    /// The picked worker gave no answer; `says` is what that means for its breaker.
    pub(super) fn unanswered(&mut self, error: &str, says: Outcome) {
        self.attempt_failed(now(), None, error, says);
    }

    /// The answer the picked worker gave is not taken, because another attempt is to follow.
    pub(super) fn passed_over(&mut self, error: &str) {
        let answered_at = self.attempt.as_ref().and_then(|attempt| attempt.answered_at);
        let status = self.status.map(|status| status.as_u16());
        // Its breaker has heard of the status already.
        self.attempt_failed(answered_at.unwrap_or_else(now), status, error, Outcome::Neutral);
    }

    fn attempt_failed(&mut self, at: Instant, status: Option<u16>, error: &str, says: Outcome) {
        if let Some(mut attempt) = self.attempt.take() {
            attempt.pass.ended(says, at);
        }
        self.status = None;
        if let Some(worker) = &self.worker {
            worker.failed.fetch_add(1, Ordering::Relaxed);
        }
        // If no other attempt follows, the request's own end says it.
        self.untold = Some(error.to_owned());
        if let Some(trace) = &mut self.trace {
            trace.attempt_failed(at, status, error);
        }
    }

    /// The head of the worker's answer came.
    pub(super) fn answered(&mut self, status: StatusCode) {
        self.status = Some(status);
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

    /// The answer goes on to the client from here.
    pub(super) fn relaying(&mut self) -> StatusCode {
        self.is_relayed = true;
        if let Some(trace) = &mut self.trace {
            trace.relaying();
        }
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
        if let Some(trace) = &mut self.trace {
            trace.ttft(at);
        }
    }

    /// What the answer said of itself, as far as it came.
    pub(super) fn said(&mut self, facts: &Facts) {
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
            self.end(Ending { status: Some(status), counted_as: status.as_u16(), error: None });
        } else {
            let colon = if excerpt.is_empty() { "" } else { ": " };
            let message = format!("worker answered {status}{colon}{excerpt}");
            let origin = if status.is_client_error() { Origin::Client } else { Origin::Worker };
            self.fail(Some(status), status.as_u16(), origin, &message, "");
        }
    }

    /// The answer ended before it was whole.
    pub(super) fn broke(&mut self, error: &Error) {
        let Error { kind, message } = error;
        let counted_as = self.status.map_or(kind.status(), |status| status.as_u16());
        self.fail(self.status, counted_as, kind.origin(), message, kind.code());
    }

    /// The router answers with an error of its own.
    pub(super) fn refuse(mut self, error: &Error) {
        self.id();
        let kind = error.kind;
        // Who has left is answered nothing.
        let is_answered = kind != Kind::Aborted || self.abort.is_said();
        let status = is_answered.then(|| kind.http_status());
        self.fail(status, kind.status(), kind.origin(), &error.message, kind.code());
    }

    fn fail(
        &mut self,
        status: Option<StatusCode>,
        counted_as: u16,
        origin: Origin,
        message: &str,
        code: &'static str,
    ) {
        let error = Some(Failure { origin, message, code });
        self.end(Ending { status, counted_as, error });
    }

    fn open(&mut self, id: String) {
        if let Some(tracker) = &self.app.tracker {
            self.trace = Some(tracker.open(self.arrived, &id, &self.route));
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
        self.abort.is_at(None);
        // After a failed attempt the request is with no worker any more.
        let attempt = self.attempt.take();
        let worker = attempt.as_ref().and(self.worker.as_ref());
        let Ending { status, counted_as: status_code, error } = ending;
        let error_code = error.as_ref().map_or("", |error| error.code);
        self.app.metrics.responses.get_or_create(&StatusLabels { status_code, error_code }).inc();
        let seconds = (now - self.arrived.at).as_secs_f64();
        self.app.metrics.request_duration.get_or_create(&labels(&self.route)).observe(seconds);
        let status = status.map(|status| status.as_u16());
        if let Some(Attempt { mut pass, .. }) = attempt {
            pass.ended(outcome(error.as_ref().map(|failure| failure.origin)), now);
        }
        match error {
            None => {
                if let Some(worker) = worker {
                    worker.served.fetch_add(1, Ordering::Relaxed);
                    let labels = WorkerLabels { worker: worker.url.to_string() };
                    self.app.metrics.processed.get_or_create(&labels).inc();
                }
                if let Some(trace) = self.trace.take() {
                    trace.complete(now);
                }
            }
            Some(Failure { origin, message, .. }) => {
                if let (Some(worker), Origin::Worker) = (worker, origin) {
                    worker.failed.fetch_add(1, Ordering::Relaxed);
                }
                log_failure(self.id.as_deref(), self.worker.as_deref(), origin, message);
                if let Some(trace) = self.trace.take() {
                    trace.fail(now, status, message);
                }
            }
        }
    }
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
    /// The router's own error code, or empty.
    code: &'static str,
}

impl Drop for Flight {
    fn drop(&mut self) {
        if self.has_ended {
            return;
        }
        self.id();
        let timeout = self.app.options.request_timeout();
        let (origin, message) = if self.app.is_stopped.load(Ordering::Relaxed) {
            (Origin::Router, "the router was stopped before the answer had ended".to_owned())
        } else if now().saturating_duration_since(self.arrived.at) >= timeout {
            let message =
                format!("the client had not read the answer after {} s", timeout.as_secs());
            (Origin::Client, message)
        } else {
            (Origin::Client, "client disconnected".to_owned())
        };
        let status = self.status.filter(|_| self.is_relayed);
        self.fail(status, Kind::Aborted.status(), origin, &message, "");
    }
}

fn labels(route: &str) -> RouteLabels {
    RouteLabels { method: "POST", path: route.to_owned() }
}

fn log_failure(id: Option<&str>, worker: Option<&Worker>, origin: Origin, message: &str) {
    let worker = worker.map(|worker| worker.url.as_str());
    if origin == Origin::Client {
        tracing::info!(request_id = id, worker, "request failed: {message}");
    } else {
        tracing::warn!(request_id = id, worker, "request failed: {message}");
    }
}
