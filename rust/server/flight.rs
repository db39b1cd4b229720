//! Everything that has to be closed when a request ends, on one value.
//!
//! A [`Flight`] is one routed request from its arrival to its end, whichever that is. It holds the count of requests
//! in flight at the picked worker and the open trace record. Completed, refused, broken, or dropped because the
//! client left: exactly one end is written, and the count is given back by `Drop`.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use hyper::StatusCode;

use super::{App, request_id};
use crate::error::{Error, Kind, Origin};
use crate::request::Scan;
use crate::routing::InFlight;
use crate::telemetry::metrics::{RouteLabels, SelectionLabels, StatusLabels, WorkerLabels};
use crate::tracking::{AnswerFacts, Arrived, OpenTrace, RequestFacts};
use crate::upstream::answer::Facts;
use crate::workers::Worker;

pub(super) struct Flight {
    app: Arc<App>,
    route: Arc<str>,
    arrived: Arrived,
    /// None until the headers or the body gave one.
    id: Option<String>,
    trace: Option<OpenTrace>,
    /// The newest picked worker, and its count while the request is with it.
    worker: Option<Arc<Worker>>,
    in_flight: Option<InFlight>,
    /// The worker's status, once its headers came.
    status: Option<StatusCode>,
    /// Those headers went on to the client.
    is_relayed: bool,
    has_ended: bool,
}

/// A worker picked for a request, which is in flight there from the pick on.
pub(super) struct Picked {
    pub(super) worker: Arc<Worker>,
    pub(super) in_flight: InFlight,
    pub(super) reason: &'static str,
    pub(super) matched_tokens: Option<u32>,
    /// How long the pick took.
    pub(super) took: Duration,
}

impl Flight {
    /// A request has arrived. `header_id` is the id its headers gave it, if any.
    pub(super) fn begin(app: Arc<App>, route: Arc<str>, header_id: Option<String>) -> Self {
        app.metrics.requests.get_or_create(&labels(&route)).inc();
        let arrived = Arrived::now();
        let mut flight = Self {
            app,
            route,
            arrived,
            id: None,
            trace: None,
            worker: None,
            in_flight: None,
            status: None,
            is_relayed: false,
            has_ended: false,
        };
        if let Some(id) = header_id {
            flight.open(id);
        }
        flight
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
        if self.id.is_none() {
            let rid = scan.rid.as_deref().and_then(|rid| self.app.request_ids.in_rid(rid));
            self.open(rid.unwrap_or_else(request_id::generate));
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
    pub(super) fn admitted(&mut self) {
        if let Some(trace) = &mut self.trace {
            trace.admitted(Instant::now());
        }
    }

    /// A worker was picked, after the body was scanned for as long.
    pub(super) fn picked(&mut self, picked: Picked, scan_took: Duration) {
        let Picked { worker, in_flight, reason, matched_tokens, took } = picked;
        let decision = scan_took + took;
        if let (Some(trace), Some(name)) = (&mut self.trace, worker.name()) {
            trace.routed(name, reason, matched_tokens, decision);
            trace.sent(Instant::now());
        }
        let selection = SelectionLabels { policy: self.app.policy_name, reason };
        self.app.metrics.selections.get_or_create(&selection).inc();
        tracing::debug!(
            request_id = self.id, worker = %worker.url, reason, matched_tokens,
            decision_us = decision.as_nanos() as f64 / 1e3, "picked"
        );
        self.in_flight = Some(in_flight);
        self.worker = Some(worker);
    }

    /// The picked worker gave no answer.
    pub(super) fn attempt_failed(&mut self, error: &str) {
        self.in_flight = None;
        self.status = None;
        if let Some(worker) = &self.worker {
            worker.failed.fetch_add(1, Ordering::Relaxed);
            tracing::warn!(request_id = self.id, worker = %worker.url, "attempt failed: {error}");
        }
        if let Some(trace) = &mut self.trace {
            trace.attempt_failed(Instant::now(), None, error);
        }
    }

    /// The head of the worker's answer came.
    pub(super) fn answered(&mut self, status: StatusCode) {
        self.status = Some(status);
        if let Some(trace) = &mut self.trace {
            trace.headers(status.as_u16());
        }
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

    /// The answer ended before it was whole, for this reason.
    pub(super) fn broke(&mut self, message: &str) {
        let counted_as = self.status.map_or(Kind::WorkerUnreachable.status(), |it| it.as_u16());
        self.fail(self.status, counted_as, Origin::Worker, message, "");
    }

    /// The router answers with an error of its own.
    pub(super) fn refuse(mut self, error: &Error) {
        self.id();
        let kind = error.kind;
        // Who has left is answered nothing.
        let status = (kind != Kind::Aborted).then(|| kind.http_status());
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
        self.id = Some(id);
    }

    fn end(&mut self, ending: Ending<'_>) {
        if std::mem::replace(&mut self.has_ended, true) {
            return;
        }
        let now = Instant::now();
        // After a failed attempt the request is with no worker any more.
        let worker = self.in_flight.take().and(self.worker.as_ref());
        let Ending { status, counted_as: status_code, error } = ending;
        let error_code = error.as_ref().map_or("", |error| error.code);
        self.app.metrics.responses.get_or_create(&StatusLabels { status_code, error_code }).inc();
        let seconds = (now - self.arrived.at).as_secs_f64();
        self.app.metrics.request_duration.get_or_create(&labels(&self.route)).observe(seconds);
        let status = status.map(|status| status.as_u16());
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
        } else if self.arrived.at.elapsed() >= timeout {
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
