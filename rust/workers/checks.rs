//! The tasks that look after the workers: one per worker that checks it, and one that closes idle connections.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::http::uri::PathAndQuery;
use hyper::{Request, StatusCode, header};

use super::health::State;
use super::node_id::NodeIdFrom;
use super::{ServerInfo, Worker, Workers};

/// A check's answer is read up to here and thrown away.
const ANSWER_BYTES_MAX: usize = 4 << 20;
const CLOSE_IDLE_EVERY: Duration = Duration::from_millis(500);

/// Checks one worker at once and then forever: often until it is first healthy or while it is unreachable, then at the interval.
pub(super) async fn check_forever(workers: Arc<Workers>, worker: Arc<Worker>) {
    let options = &workers.options;
    let began = Instant::now();
    let mut is_first = true;
    let mut reported = false;
    loop {
        let outcome = get(&worker, &options.health_check_endpoint, options.check_timeout()).await;
        let is_unknown = outcome.is_ok() && worker.info.get().is_none();
        let is_named_by_itself = options.node_id_from == NodeIdFrom::Gpu;
        if is_unknown && is_named_by_itself {
            learn(&worker, options.check_timeout()).await;
        }
        let waited = began.elapsed().as_secs();
        if let (Err(why), State::Starting) = (&outcome, worker.state())
            && waited >= options.worker_startup_timeout_secs
            && !std::mem::replace(&mut reported, true)
        {
            tracing::error!(worker = %worker.url, "not healthy within {waited} s: {why}");
        }
        workers.checked(&worker, outcome.map(|_| ()));
        if std::mem::take(&mut is_first) {
            workers.first_check_ended();
        }
        if is_unknown && !is_named_by_itself {
            learn(&worker, options.check_timeout()).await;
        }
        let pause = worker.health.lock().pause(options);
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = worker.check_now.notified() => {}
        }
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

/// Asks the worker about itself. Nothing but a name by GPU waits for it.
async fn learn(worker: &Worker, timeout: Duration) {
    for path in ["/get_server_info", "/server_info"] {
        match get(worker, path, timeout).await {
            Ok(body) => {
                if let Some(info) = ServerInfo::parse(&body) {
                    tracing::info!(
                        worker = %worker.url, model = info.model_id, gpu = info.base_gpu_id,
                        kv_tokens = info.kv_tokens, "worker reports"
                    );
                    // Only this task sets it.
                    let _ = worker.info.set(info);
                    return;
                }
            }
            Err(why) => tracing::debug!(worker = %worker.url, "{path}: {why}"),
        }
    }
}

/// The body of a 2xx answer, or in words why there is none.
async fn get(worker: &Worker, path: &str, timeout: Duration) -> Result<Bytes, String> {
    let path_and_query: PathAndQuery = path.parse().map_err(|error| format!("{path}: {error}"))?;
    let mut request = Request::get(worker.uri(&path_and_query))
        .header(header::HOST, worker.url.authority())
        .body(Full::default())
        .map_err(|error| error.to_string())?;
    worker.authorize(request.headers_mut());
    let exchange = async {
        let answer = worker.connections.send(request).await.map_err(|error| error.to_string())?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), ANSWER_BYTES_MAX).collect().await;
        let body = body.map_err(|error| format!("the answer broke off: {error}"))?.to_bytes();
        if status.is_success() { Ok(body) } else { Err(refused(path, status)) }
    };
    tokio::time::timeout(timeout, exchange)
        .await
        .unwrap_or_else(|_| Err(format!("{path} not answered within {} s", timeout.as_secs())))
}

fn refused(path: &str, status: StatusCode) -> String {
    format!("{path} answered {status}")
}
