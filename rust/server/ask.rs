//! What the router asks workers on its own account: one question to one worker, or to many.
//!
//! An answer is read whole, up to a bound, and within a time. Not for requests that are routed (`proxy.rs`), nor for
//! checks (`workers`).

use std::sync::Arc;
use std::time::Duration;

use axum::http::uri::PathAndQuery;
use bytes::Bytes;
use futures_util::stream::{self, StreamExt};
use http_body_util::{BodyExt, Full, Limited};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{HeaderMap, Method};

use super::App;
use crate::error::shown;
use crate::workers::Worker;

/// The largest answer taken.
const ANSWER_BYTES_MAX: usize = 16 << 20;
/// How long an answer may take; `/health_generate` generates a token.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Workers asked at the same time.
const AT_ONCE: usize = 32;

/// A request of the router's own.
#[derive(Clone, Debug)]
pub(super) struct Question {
    method: Method,
    path: PathAndQuery,
    headers: HeaderMap,
    body: Bytes,
    timeout: Duration,
}

impl Question {
    pub(super) fn get(path: PathAndQuery, headers: HeaderMap) -> Self {
        Self { method: Method::GET, path, headers, body: Bytes::new(), timeout: TIMEOUT }
    }

    /// A POST of this JSON text, or of nothing.
    pub(super) fn post(path: PathAndQuery, json: Option<Bytes>) -> Self {
        let mut headers = HeaderMap::new();
        if json.is_some() {
            headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        }
        let body = json.unwrap_or_default();
        Self { method: Method::POST, path, headers, body, timeout: TIMEOUT }
    }

    pub(super) fn within(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }

    fn towards(&self, worker: &Worker) -> hyper::Request<Full<Bytes>> {
        worker.request(self.method.clone(), &self.path, self.headers.clone(), self.body.clone())
    }
}

/// One worker's whole answer, whatever its status, or why there is none.
pub(super) async fn ask(
    app: &App,
    worker: &Worker,
    question: &Question,
) -> Result<hyper::Response<Bytes>, String> {
    let exchange = async {
        let answer =
            worker.connections.send(|| question.towards(worker)).await.map_err(|error| {
                if error.is_unconnected() {
                    app.workers.unreachable(worker);
                }
                error.to_string()
            })?;
        let (head, body) = answer.into_parts();
        let body = Limited::new(body, ANSWER_BYTES_MAX).collect().await;
        let body = body.map_err(|error| format!("the answer broke off: {error}"))?;
        Ok(hyper::Response::from_parts(head, body.to_bytes()))
    };
    tokio::time::timeout(question.timeout, exchange)
        .await
        .unwrap_or_else(|_| Err(format!("no answer within {} s", question.timeout.as_secs())))
}

/// Asks each of these workers and answers with what `told` makes of it, in the order of the workers. `told` gets the
/// body of a 2xx answer or why there is none, as soon as it is known.
pub(super) async fn ask_each<T>(
    app: &App,
    workers: &[Arc<Worker>],
    question: &Question,
    told: impl Fn(&Worker, Result<Bytes, String>) -> T,
) -> Vec<T> {
    let told = &told;
    let asking = workers.iter().cloned().map(|worker| async move {
        let answer = ask(app, &worker, question).await;
        told(&worker, answer.and_then(success))
    });
    stream::iter(asking).buffered(AT_ONCE).collect().await
}

fn success(answer: hyper::Response<Bytes>) -> Result<Bytes, String> {
    let status = answer.status();
    let body = answer.into_body();
    if status.is_success() {
        return Ok(body);
    }
    let text = String::from_utf8_lossy(&body);
    match text.trim() {
        "" => Err(format!("answered {status}")),
        text => Err(format!("answered {status}: {}", shown(text))),
    }
}
