//! The routes that are not routed: health, metrics, the list of workers, and what a worker says of itself.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, Request, State};
use axum::http::header;
use axum::http::uri::PathAndQuery;
use axum::response::{IntoResponse, Response};
use hyper::{HeaderMap, StatusCode};
use serde_json::{Value, json};

use super::ask::{Question, ask, ask_each};
use super::engine_metrics::Merge;
use super::{App, headers, now, scrape};
use crate::error::{Error, Kind, shown};
use crate::telemetry::metrics::CONTENT_TYPE;
use crate::workers::breaker::Fitness;
use crate::workers::{CHECKED_BY, State as Health, Worker};

/// How long one worker after another is asked for a single answer.
const ONE_ANSWER_WITHIN: Duration = Duration::from_secs(30);

/// Well, but for whoever takes this router for one of its own workers: itself.
pub(super) async fn alive(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
) -> Result<&'static str, Error> {
    if headers.get(CHECKED_BY).is_some_and(|id| id == app.workers.id()) {
        let message = "this is the router that asks: it cannot be its own worker";
        return Err(Error::new(Kind::LoopDetected, message));
    }
    Ok("OK")
}

pub(super) async fn readiness(State(app): State<Arc<App>>) -> Response {
    let Some(reason) = app.not_ready() else {
        let snapshot = app.workers.snapshot();
        let ready = json!({
            "status": "ready",
            "healthy_workers": snapshot.routable.len(),
            "total_workers": snapshot.all.len(),
        });
        return Json(ready).into_response();
    };
    let not_ready = json!({"status": "not ready", "reason": reason});
    (StatusCode::SERVICE_UNAVAILABLE, Json(not_ready)).into_response()
}

pub(super) async fn metrics(State(app): State<Arc<App>>) -> Response {
    let text = app.metrics.render(&scrape::read(&app).await);
    ([(header::CONTENT_TYPE, CONTENT_TYPE)], text).into_response()
}

pub(super) async fn workers(State(app): State<Arc<App>>) -> Json<Value> {
    let all = &app.workers.snapshot().all;
    let workers: Vec<Value> = all.iter().map(|worker| describe(worker)).collect();
    Json(json!({
        "total": workers.len(),
        "stats": {"prefill_count": 0, "decode_count": 0, "regular_count": workers.len()},
        "workers": workers,
    }))
}

pub(super) async fn worker(
    State(app): State<Arc<App>>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<Value>, Error> {
    let Path(id) = id?;
    let snapshot = app.workers.snapshot();
    snapshot.find_by_id(&id).map(|worker| Json(describe(worker))).ok_or_else(|| no_worker(&id))
}

/// No worker has this id or URL.
pub(super) fn no_worker(id: &str) -> Error {
    let message = format!("no worker has the id or URL {}; GET /workers lists them", shown(id));
    Error::new(Kind::NotFound, message)
}

fn describe(worker: &Worker) -> Value {
    let info = worker.info();
    let state = worker.state();
    json!({
        "id": worker.index.to_string(),
        "url": worker.url.as_str(),
        "model_id": info.as_ref().and_then(|info| info.model_id.as_deref()),
        "worker_type": "regular",
        "connection_mode": "HTTP",
        "is_healthy": state == Health::Healthy,
        "load": worker.target.in_flight(),
        "node_id": worker.node_id(),
        "state": state.name(),
        "breaker": worker.gate.state().name(),
        "last_error": worker.last_error(),
        "served": worker.served.load(Ordering::Relaxed),
        "failed": worker.failed.load(Ordering::Relaxed),
        "kv_tokens": info.as_ref().and_then(|info| info.kv_tokens),
    })
}

/// Passes a GET on to the first worker that answers, of those that may be picked.
pub(super) async fn from_worker(
    State(app): State<Arc<App>>,
    request: Request,
) -> Result<Response, Error> {
    let (head, _) = request.into_parts();
    let root = PathAndQuery::from_static("/");
    let path = head.uri.path_and_query().cloned().unwrap_or(root);
    let question = Question::get(path, headers::towards_worker(head.headers));
    let mut workers = app.workers.snapshot().routable.clone();
    workers.retain(|worker| worker.gate.fitness(now()) != Fitness::Barred);
    let mut failure = None;
    let asking = async {
        for worker in &workers {
            match ask(&app, worker, &question).await {
                Ok(answer) => return Some((worker, answer)),
                Err(why) => failure = Some(format!("{}: {why}", worker.url)),
            }
        }
        None
    };
    let answered = tokio::time::timeout(ONE_ANSWER_WITHIN, asking).await.unwrap_or_default();
    let Some((worker, answer)) = answered else {
        return Err(match failure {
            Some(failure) => Error::new(Kind::WorkerUnreachable, failure),
            None => app.no_available_workers(),
        });
    };
    let mut answer = answer.map(Body::from);
    headers::towards_client(answer.headers_mut());
    app.name_worker(answer.headers_mut(), worker);
    Ok(answer)
}

/// The Prometheus texts of all healthy workers as one, each sample labelled with its worker.
pub(super) async fn engine_metrics(State(app): State<Arc<App>>) -> Result<Response, Error> {
    let workers = app.workers.snapshot().routable.clone();
    if workers.is_empty() {
        return Err(app.no_available_workers());
    }
    let question = Question::get(PathAndQuery::from_static("/metrics"), HeaderMap::new());
    let texts = ask_each(&app, &workers, &question, |_, text| text).await;
    let mut merge = Merge::default();
    let mut failures = Vec::new();
    for (worker, text) in workers.iter().zip(texts) {
        match text {
            Ok(text) => merge.add(worker.url.as_str(), &String::from_utf8_lossy(&text)),
            Err(why) => failures.push(format!("{}: {why}", worker.url)),
        }
    }
    if failures.len() == workers.len() {
        let message = format!(
            "no worker gave its metrics (SGLang needs --enable-metrics): {}",
            failures.join("; ")
        );
        return Err(Error::new(Kind::WorkerUnreachable, message));
    }
    let content_type = [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
    Ok((content_type, merge.render()).into_response())
}
