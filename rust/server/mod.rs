//! The HTTP side: listens, routes requests to their handlers, and ends in an orderly way.
//!
//! [`Running`] is a router at work on threads of its own. It is stopped in two steps: no new connections and what
//! is in flight drains; then, at the end of the grace period, what is left is cut.

mod body;
mod endpoints;
mod engine_metrics;
mod error_response;
mod flight;
mod headers;
mod options;
mod proxy;
mod relay;
mod request_id;
pub mod routes;
mod running;
mod traces;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use hyper::HeaderMap;
use hyper::header::HeaderValue;

use crate::error::{Error, Kind};
use crate::routing::{Draws, Policy};
use crate::telemetry::metrics::Metrics;
use crate::tracking::Tracker;
use crate::workers::{Worker, Workers};
pub use options::{Options, WorkerHeaders};
use request_id::RequestIds;
pub use running::Running;

/// One router: what its handlers share.
pub(crate) struct App {
    options: Options,
    workers: Arc<Workers>,
    policy: Arc<dyn Policy>,
    policy_name: &'static str,
    draws: Draws,
    /// None when request tracking is off.
    tracker: Option<Arc<Tracker>>,
    metrics: Metrics,
    request_ids: RequestIds,
    /// No new requests are wanted.
    is_draining: AtomicBool,
    /// What is still in flight is being cut.
    is_stopped: AtomicBool,
}

impl App {
    fn no_available_workers(&self) -> Error {
        let all = &self.workers.snapshot().all;
        let message = if all.is_empty() {
            "the router has no workers; name them with worker_urls".to_owned()
        } else {
            let states: Vec<String> = all
                .iter()
                .take(8)
                .map(|worker| format!("{} is {}", worker.url, worker.state().name()))
                .collect();
            format!("none of the {} workers is healthy: {}", all.len(), states.join(", "))
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

    /// The output of `future`, if it is there within the time a request may take.
    async fn within_timeout<T>(&self, future: impl Future<Output = T>) -> Result<T, Error> {
        tokio::time::timeout(self.options.request_timeout(), future).await.map_err(|_| {
            let message = format!("no answer within {} s", self.options.request_timeout_secs);
            Error::new(Kind::Timeout, message)
        })
    }
}
