//! The HTTP side. `proxy.rs` is the life of a routed request; `routes.rs` declares every route; `listen.rs` accepts
//! connections and ends in an orderly way.

mod admission;
mod ask;
mod body;
mod client_stream;
mod cors;
mod doors;
mod endpoints;
mod engine_metrics;
mod error_response;
mod exchange;
mod fan_out;
mod flight;
mod front;
mod headers;
mod in_flight;
mod listen;
mod membership;
mod options;
mod pick;
mod proxy;
mod relay;
mod request_id;
mod retry;
pub mod routes;
mod scrape;
mod secret;
mod traces;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use hyper::HeaderMap;
use hyper::header::HeaderValue;
use tokio::sync::Semaphore;

use crate::error::{Error, Kind};
use crate::routing::{self, Draws, Policy};
use crate::telemetry::metrics::Metrics;
use crate::tracking::{PromptBlocks, Tracker};
use crate::workers::breaker::Fitness;
use crate::workers::{Worker, Workers};
use admission::Admission;
use body::Budget;
pub use doors::Door;
use doors::Doors;
use in_flight::InFlight;
pub(crate) use listen::{Order, listen, serve};
pub use options::{Options, WorkerHeaders};
use request_id::RequestIds;
pub use secret::Secret;
#[cfg(test)]
pub(crate) use {front::Front, listen::serve_connection};

/// The moment by the clock of the runtime, which tests may pause.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

/// Why a request ends that `POST /abort_request` named.
fn aborted() -> Error {
    Error::new(Kind::Aborted, "ended by POST /abort_request")
}

/// Picks of a policy that may block which are under way at once. Each keeps a thread, also when its request is over.
const SLOW_PICKS_MAX: usize = 64;

/// Bytes that the bodies of requests to the router's own routes may take together.
const OWN_BYTES_MAX: u64 = 64 << 20;

/// One router: what its handlers share.
pub(crate) struct App {
    options: Options,
    workers: Arc<Workers>,
    policy: Arc<dyn Policy>,
    policy_name: &'static str,
    draws: Draws,
    slow_picks: Arc<Semaphore>,
    /// None when request tracking is off.
    tracker: Option<Arc<Tracker>>,
    metrics: Arc<Metrics>,
    request_ids: RequestIds,
    admission: Admission,
    budget: Arc<Budget>,
    /// For the small bodies of the router's own routes, so that those who manage it are let in when it is full.
    own_budget: Arc<Budget>,
    in_flight: Arc<InFlight>,
    doors: Doors,
    is_draining: AtomicBool,
    is_stopped: AtomicBool,
    /// The zero of the clock that policies are told.
    began: Instant,
}

impl App {
    pub(crate) fn new(
        options: Options,
        workers: Arc<Workers>,
        policy: Arc<dyn Policy>,
        routing: &routing::Options,
        tracker: Option<Arc<Tracker>>,
    ) -> Self {
        Self {
            request_ids: RequestIds::new(&options.request_id_headers),
            admission: Admission::new(&options.admission),
            budget: Budget::new(options.max_buffered_bytes),
            own_budget: Budget::new(OWN_BYTES_MAX),
            in_flight: Arc::default(),
            doors: Doors::new(&options),
            metrics: Arc::new(Metrics::new(&options.metrics)),
            options,
            workers,
            policy,
            policy_name: routing.policy.name(),
            draws: Draws::new(routing.seed),
            slow_picks: Arc::new(Semaphore::new(SLOW_PICKS_MAX)),
            tracker,
            is_draining: AtomicBool::new(false),
            is_stopped: AtomicBool::new(false),
            began: now(),
        }
    }

    /// A moment as policies are told it: in seconds.
    fn secs(&self, at: Instant) -> f64 {
        at.saturating_duration_since(self.began).as_secs_f64()
    }

    pub(crate) fn options(&self) -> &Options {
        &self.options
    }

    pub(crate) fn workers(&self) -> &Arc<Workers> {
        &self.workers
    }

    /// None when request tracking is off.
    pub(crate) fn tracker(&self) -> Option<&Arc<Tracker>> {
        self.tracker.as_ref()
    }

    /// Hashes of a prompt's blocks, if traces keep them.
    fn traced_blocks(&self, prompt: &[u8]) -> Option<PromptBlocks> {
        let tracker = self.tracker.as_ref()?;
        tracker.options().trace_prompt_blocks.then(|| PromptBlocks::of(prompt)).flatten()
    }

    pub(crate) fn policy(&self) -> &dyn Policy {
        &*self.policy
    }

    pub(crate) fn policy_name(&self) -> &'static str {
        self.policy_name
    }

    /// Whether a request would find a worker now.
    pub(crate) fn is_ready(&self) -> bool {
        self.not_ready().is_none()
    }

    /// Why a request would find no worker now.
    fn not_ready(&self) -> Option<&'static str> {
        let snapshot = self.workers.snapshot();
        let may_be_picked = |worker: &Arc<Worker>| worker.gate.fitness(now()) != Fitness::Barred;
        if self.is_draining.load(Ordering::Relaxed) {
            Some("draining")
        } else if snapshot.routable.is_empty() {
            Some("insufficient healthy workers")
        } else if !snapshot.routable.iter().any(may_be_picked) {
            Some("the circuit breakers of all healthy workers are open")
        } else {
            None
        }
    }

    /// No new requests are wanted.
    pub(crate) fn drain(&self) {
        self.is_draining.store(true, Ordering::Relaxed);
    }

    /// What is still in flight is being cut.
    pub(crate) fn stop(&self) {
        self.is_stopped.store(true, Ordering::Relaxed);
    }

    fn no_available_workers(&self) -> Error {
        let all = &self.workers.snapshot().all;
        let message = if all.is_empty() {
            "the router has no workers; name them with worker_urls, or join them with POST /workers"
                .to_owned()
        } else {
            let states: Vec<String> = all
                .iter()
                .take(8)
                .map(|worker| format!("{} {}", worker.url, worker.why_not()))
                .collect();
            format!("none of the {} workers may be picked: {}", all.len(), states.join(", "))
        };
        Error::new(Kind::NoAvailableWorkers, message)
    }

    /// Says in an answer's headers who gave it.
    fn name_worker(&self, headers: &mut HeaderMap, worker: &Worker) {
        let shown = self.options.worker_headers;
        // A URL and a name are visible ASCII.
        if shown == WorkerHeaders::Url
            && let Ok(url) = HeaderValue::from_str(worker.url.as_str())
        {
            headers.insert(headers::X_WORKER, url);
        }
        if shown != WorkerHeaders::Off
            && let Some(node) = worker.node_id().and_then(|node| HeaderValue::from_str(node).ok())
        {
            headers.insert(headers::X_NODE, node);
        }
    }
}

#[cfg(test)]
impl App {
    /// Ends the requests in flight with this id, as `POST /abort_request` does.
    pub(crate) fn abort(&self, id: &str) {
        self.in_flight.abort(id);
    }

    /// Requests that have ended, by the metrics.
    pub(crate) fn answered(&self) -> u64 {
        let text = self.metrics.render(&crate::telemetry::metrics::Reading::default());
        let lines = text.lines().filter(|line| line.starts_with("smg_http_responses_total{"));
        let count =
            |line: &str| line.rsplit(' ').next().and_then(|count| count.parse::<u64>().ok());
        lines.filter_map(count).sum()
    }

    /// Nothing is held that belongs to a request.
    pub(crate) fn assert_idle(&self) {
        self.admission.assert_idle();
        assert_eq!(self.budget.taken(), 0, "bytes of bodies");
        assert!(self.in_flight.is_empty(), "listed requests");
    }
}
