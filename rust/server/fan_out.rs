//! The routes that ask all workers and answer with what each of them said.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::{Request, State};
use axum::http::uri::PathAndQuery;
use axum::response::{IntoResponse, Response};
use hyper::{HeaderMap, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};

use super::ask::{Question, ask_each};
use super::{App, body};
use crate::error::{Error, Kind};
use crate::workers::Worker;

/// How long a worker may take to empty its cache.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(30);

/// The workers that such a route asks.
fn to_ask(app: &App) -> Vec<Arc<Worker>> {
    let snapshot = app.workers.snapshot();
    snapshot.all.iter().filter(|worker| !worker.is_draining()).cloned().collect()
}

/// The largest body of `/abort_request`.
const ABORT_BYTES_MAX: u64 = 64 << 10;

/// What `/abort_request` is asked; the worker may know more fields.
#[derive(Deserialize)]
struct Aborted {
    #[serde(default)]
    rid: Option<String>,
    #[serde(default)]
    abort_all: Option<bool>,
}

/// Ends the requests in flight with this id or body `rid`, and tells their workers. Of an id that is not in flight here,
/// and with `abort_all`, all workers are told.
pub(super) async fn abort(
    State(app): State<Arc<App>>,
    request: Request,
) -> Result<Response, Error> {
    let (head, body) = request.into_parts();
    let body = body::read(&head.headers, body, ABORT_BYTES_MAX, &app.own_budget).await?;
    let asked: Aborted = serde_json::from_slice(&body).map_err(|error| {
        let message =
            format!(r#"the body is not {{"rid": "..."}} nor {{"abort_all": true}}: {error}"#);
        Error::new(Kind::InvalidRequest, message)
    })?;
    let is_all = asked.abort_all == Some(true);
    if asked.rid.as_deref().unwrap_or_default().is_empty() && !is_all {
        let message = r#"the body names no request: write {"rid": "..."}, or {"abort_all": true}"#;
        return Err(Error::new(Kind::InvalidRequest, message));
    }
    let (aborted, at) = asked.rid.map(|rid| app.in_flight.abort(&rid)).unwrap_or_default();
    let workers = if is_all || aborted == 0 { to_ask(&app) } else { at };
    let question = Question::post(PathAndQuery::from_static("/abort_request"), Some(body));
    let told = ask_each(&app, &workers, &question, |worker, answer| {
        (worker.url.to_string(), answer.err())
    })
    .await;
    let (told, failed) = sorted(told);
    let (status, word) = if failed.is_empty() {
        (StatusCode::OK, "success")
    } else {
        (StatusCode::PARTIAL_CONTENT, "partial_success")
    };
    let report = json!({"status": word, "aborted": aborted, "successful": told, "failed": failed});
    Ok((status, Json(report)).into_response())
}

/// Who did as asked, and who did not, and why.
fn sorted(outcomes: Vec<(String, Option<String>)>) -> (Vec<String>, Vec<Value>) {
    let (successful, failed): (Vec<_>, Vec<_>) =
        outcomes.into_iter().partition(|(_, error)| error.is_none());
    let failed = failed.into_iter().map(|(url, error)| json!({"worker": url, "error": error}));
    (successful.into_iter().map(|(url, _)| url).collect(), failed.collect())
}

/// Empties the caches of all workers. What the policy believed of them is void then.
pub(super) async fn flush_cache(
    State(app): State<Arc<App>>,
    request: Request,
) -> Result<Response, Error> {
    let workers = to_ask(&app);
    if workers.is_empty() {
        return Err(app.no_available_workers());
    }
    let path = request.uri().path_and_query().cloned();
    let path = path.unwrap_or_else(|| PathAndQuery::from_static("/flush_cache"));
    let question = Question::post(path, None).within(FLUSH_TIMEOUT);
    let outcomes = ask_each(&app, &workers, &question, |worker, answer| {
        if answer.is_ok() {
            app.policy.forget(worker.index);
        }
        (worker.url.to_string(), answer.err())
    })
    .await;
    let (successful, failed) = sorted(outcomes);
    let mut report = json!({
        "status": "success",
        "message": format!("flushed the caches of {} of {} workers", successful.len(), workers.len()),
        "workers_flushed": successful.len(),
        "total_http_workers": workers.len(),
        "total_workers": workers.len(),
    });
    if failed.is_empty() {
        return Ok(Json(report).into_response());
    }
    report["status"] = "partial_success".into();
    report["successful"] = successful.into();
    report["failed"] = failed.into();
    Ok((StatusCode::PARTIAL_CONTENT, Json(report)).into_response())
}

/// How many tokens each worker has in hand, by its own account.
pub(super) async fn loads(State(app): State<Arc<App>>) -> Json<Value> {
    let workers = to_ask(&app);
    let question = Question::get(PathAndQuery::from_static("/get_load"), HeaderMap::new());
    let loads = ask_each(&app, &workers, &question, |worker, answer| {
        match answer.and_then(|body| tokens(&body)) {
            Ok(load) => json!({"worker": worker.url.as_str(), "load": load}),
            Err(error) => json!({"worker": worker.url.as_str(), "load": null, "error": error}),
        }
    })
    .await;
    Json(json!({"workers": loads}))
}

/// The sum of `num_tokens` over the ranks of a worker: an array with an object for each, or the only one's object.
fn tokens(body: &[u8]) -> Result<u64, String> {
    let load: Value = serde_json::from_slice(body)
        .map_err(|error| format!("/get_load answered no JSON: {error}"))?;
    let ranks = match &load {
        Value::Array(ranks) => ranks.as_slice(),
        rank => std::slice::from_ref(rank),
    };
    let tokens = |rank: &Value| rank.get("num_tokens").and_then(Value::as_u64);
    let sum = ranks.iter().try_fold(0_u64, |sum, rank| sum.checked_add(tokens(rank)?));
    sum.filter(|_| !ranks.is_empty())
        .ok_or_else(|| "/get_load answered without num_tokens of each rank".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_summed_over_ranks() {
        assert_eq!(tokens(br#"[{"dp_rank":0,"num_tokens":3},{"num_tokens":4}]"#), Ok(7));
        assert_eq!(tokens(br#"{"num_tokens":5}"#), Ok(5));
        for bad in [
            "",
            "[]",
            "{}",
            "5",
            "null",
            "[{}]",
            "[1]",
            r#"[{"num_tokens":3},{"num_tokens":-1}]"#,
            r#"[{"num_tokens":18446744073709551615},{"num_tokens":1}]"#,
        ] {
            assert!(tokens(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
