//! The tasks that look after the workers: one per worker from its joining to its end, and one that closes idle
//! connections.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Limited};
use hyper::http::uri::PathAndQuery;
use hyper::{HeaderMap, Method, StatusCode};
use tokio::time::Instant;

use super::health::State;
use super::node_id::NodeIdFrom;
use super::{CHECKED_BY, FirstRound, ServerInfo, Worker, Workers};

/// A check's answer is read up to here and thrown away.
const ANSWER_BYTES_MAX: usize = 4 << 20;
const CLOSE_IDLE_EVERY: Duration = Duration::from_millis(500);
/// How often a worker that leaves is looked at.
const DRAINED_EVERY: Duration = Duration::from_millis(50);
/// Where a worker says what it is, newest first: SGLang warns in its log of the older path.
const INFO_PATHS: [&str; 2] = ["/server_info", "/get_server_info"];

/// One worker's life: checked until it is told to leave, drained, gone.
pub(super) async fn live(
    workers: Arc<Workers>,
    worker: Arc<Worker>,
    round: Option<Arc<FirstRound>>,
) {
    tokio::select! {
        () = worker.told_to_leave.notified() => {}
        () = check_forever(&workers, &worker, round) => {}
    }
    loop {
        tokio::time::sleep(DRAINED_EVERY).await;
        if !worker.is_held() {
            return workers.gone(&worker);
        }
    }
}

/// Checks one worker at once and then forever: often until it is first healthy or while it is unreachable, then at the
/// interval. The first round of checks waits for the first one.
async fn check_forever(workers: &Workers, worker: &Worker, mut round: Option<Arc<FirstRound>>) {
    let options = &workers.options;
    if options.disable_health_check {
        drop(round);
        return std::future::pending().await;
    }
    let began = Instant::now();
    let mut is_reported = false;
    loop {
        let turn_began = Instant::now();
        let turn = async {
            let outcome = get(workers, worker, &options.health_check_endpoint).await;
            let is_good = outcome.is_ok();
            let is_asked_first = is_good && must_tell_first(worker, options.node_id_from);
            if is_asked_first {
                learn(workers, worker).await;
            }
            let waited = began.elapsed().as_secs();
            if let (Err(CheckError { why, .. }), State::Starting) = (&outcome, worker.state())
                && waited >= options.worker_startup_timeout_secs
                && !std::mem::replace(&mut is_reported, true)
            {
                tracing::error!(worker = %worker.url, "not healthy within {waited} s: {why}");
            }
            match outcome {
                Err(CheckError { why, is_ours: true }) => {
                    tracing::debug!(worker = %worker.url, "not checked: {why}");
                }
                outcome => workers.checked(worker, outcome.map(drop).map_err(|error| error.why)),
            }
            round = None;
            if is_good && !is_asked_first {
                learn(workers, worker).await;
            }
            let pause = worker.health.lock().pause(options);
            tokio::time::sleep_until(turn_began + pause).await;
        };
        tokio::select! {
            () = turn => {}
            // What is said by a check that began before then is out of date.
            () = worker.check_now.notified() => {}
        }
    }
}

/// Whether a worker whose check was good has to say what it is before it can be picked: its name may be its own word,
/// and after a time of trouble it may be another process than the one whose cache is remembered.
fn must_tell_first(worker: &Worker, node_id_from: NodeIdFrom) -> bool {
    match worker.state() {
        State::Starting => node_id_from == NodeIdFrom::Gpu,
        State::Unhealthy | State::Unreachable => true,
        State::Healthy | State::Draining => false,
    }
}

/// Closes connections that were idle too long, of all workers, forever.
pub(super) async fn close_idle_forever(workers: Arc<Workers>) {
    let mut ticks = tokio::time::interval(CLOSE_IDLE_EVERY);
    loop {
        ticks.tick().await;
        for worker in &workers.snapshot().all {
            worker.connections.close_idle();
        }
    }
}

/// Asks the worker about itself. One that does not answer, or not in a way that is understood, stays what it was.
async fn learn(workers: &Workers, worker: &Worker) {
    for path in INFO_PATHS {
        match get(workers, worker, path).await {
            Ok(body) => {
                if let Some(info) = ServerInfo::parse(&body) {
                    return workers.told(worker, info);
                }
                tracing::debug!(worker = %worker.url, "{path}: the answer is no JSON object");
            }
            Err(error) => tracing::debug!(worker = %worker.url, "{path}: {}", error.why),
        }
    }
}

/// Why a question was not answered well.
struct CheckError {
    why: String,
    /// For want of file descriptors, for instance: it says nothing of the worker.
    is_ours: bool,
}

impl From<String> for CheckError {
    fn from(why: String) -> Self {
        Self { why, is_ours: false }
    }
}

/// The body of a 2xx answer.
async fn get(workers: &Workers, worker: &Worker, path: &str) -> Result<Bytes, CheckError> {
    let timeout = workers.options.check_timeout();
    let path_and_query: PathAndQuery = path.parse().map_err(|error| format!("{path}: {error}"))?;
    let headers = HeaderMap::from_iter([(CHECKED_BY, workers.id().clone())]);
    let request = || worker.request(Method::GET, &path_and_query, headers.clone(), Bytes::new());
    let exchange = async {
        let answer = worker
            .connections
            .send(request)
            .await
            .map_err(|error| CheckError { why: error.to_string(), is_ours: error.is_ours() })?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), ANSWER_BYTES_MAX).collect().await;
        let body = body.map_err(|error| format!("the answer broke off: {error}"))?.to_bytes();
        if status.is_success() { Ok(body) } else { Err(refused(path, status).into()) }
    };
    tokio::time::timeout(timeout, exchange).await.unwrap_or_else(|_| {
        Err(format!("{path} not answered within {} s", timeout.as_secs()).into())
    })
}

fn refused(path: &str, status: StatusCode) -> String {
    format!("{path} answered {status}")
}
