//! Workers join and leave while the router runs.
//!
//! POST and DELETE on `/workers` answer 202 as soon as the router knows; `/add_worker` and `/remove_worker`, which came
//! before them, answer 200 when it is done. All of them may be repeated: who is there stays as it is, and who leaves
//! goes on leaving.

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{Path, Query, Request, State};
use axum::response::{IntoResponse, Response};
use hyper::StatusCode;
use hyper::header::{HeaderValue, LOCATION};
use serde_json::{Map, Value, json};

use super::{App, Secret, body, endpoints};
use crate::error::{Error, Kind, shown};
use crate::routing::check_weight;
use crate::workers::node_id::check_name;
use crate::workers::{Joined, Joining, Snapshot, Worker, WorkerUrl};

const BODY_BYTES_MAX: u64 = 64 << 10;

/// What acts.
const KNOWN: [&str; 5] = ["url", "weight", "node_id", "api_key", "worker_type"];

/// What `sglang-router` takes beside those, and has no meaning here.
const WITHOUT_EFFECT: &[&str] = &[
    "bootstrap_port",
    "chat_template",
    "cost",
    "disable_health_check",
    "dp_aware",
    "health_check_interval_secs",
    "health_check_timeout_secs",
    "health_failure_threshold",
    "health_success_threshold",
    "labels",
    "max_connection_attempts",
    "model_id",
    "priority",
    "reasoning_parser",
    "runtime",
    "tokenizer_path",
    "tool_parser",
];

type Pairs = Result<Query<Vec<(String, String)>>, QueryRejection>;

/// POST /workers
pub(super) async fn join(State(app): State<Arc<App>>, request: Request) -> Result<Response, Error> {
    let (head, body) = request.into_parts();
    let body = body::read(&head.headers, body, BODY_BYTES_MAX, &app.own_budget).await?;
    let Asked { joining, without_effect } = Asked::parse(&body).map_err(invalid)?;
    let joined = app.take_in(joining)?;
    let mut message = joining_message(&joined);
    if !without_effect.is_empty() {
        message = format!("{message}; without effect here: {}", without_effect.join(", "));
    }
    Ok(answer(StatusCode::ACCEPTED, "accepted", &joined.worker, &message))
}

/// DELETE /workers/{id}
pub(super) async fn leave(
    State(app): State<Arc<App>>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Response, Error> {
    let Path(id) = id?;
    let snapshot = app.workers.snapshot();
    let worker = snapshot.find_by_id(&id).ok_or_else(|| endpoints::no_worker(&id))?;
    app.workers.leave(worker);
    Ok(answer(StatusCode::ACCEPTED, "accepted", worker, &leaving_message(worker)))
}

/// POST /add_worker
pub(super) async fn add(State(app): State<Arc<App>>, pairs: Pairs) -> Result<Response, Error> {
    let url = url_in(pairs).map_err(invalid)?;
    let joined = app.take_in(Joining::at(url))?;
    app.until_routable(&joined.worker).await?;
    let message = format!("{} may be picked now", joined.worker.url);
    Ok(answer(StatusCode::OK, "success", &joined.worker, &message))
}

/// POST /remove_worker
pub(super) async fn remove(State(app): State<Arc<App>>, pairs: Pairs) -> Result<Response, Error> {
    let url = url_in(pairs).map_err(invalid)?;
    let snapshot = app.workers.snapshot();
    let worker = snapshot.find(url.as_str()).ok_or_else(|| endpoints::no_worker(url.as_str()))?;
    app.workers.leave(worker);
    Ok(answer(StatusCode::OK, "success", worker, &leaving_message(worker)))
}

/// GET /list_workers
pub(super) async fn list(State(app): State<Arc<App>>) -> Json<Value> {
    let snapshot = app.workers.snapshot();
    let stay = snapshot.all.iter().filter(|worker| !worker.is_draining());
    let urls: Vec<&str> = stay.map(|worker| worker.url.as_str()).collect();
    Json(json!({"urls": urls}))
}

impl App {
    fn take_in(&self, joining: Joining) -> Result<Joined, Error> {
        let joined = self.workers.join(joining);
        joined.map_err(|refused| Error::new(Kind::TooManyWorkers, refused.to_string()))
    }

    /// Waits until the worker may be picked, as long as a worker may take to start.
    async fn until_routable(&self, worker: &Worker) -> Result<(), Error> {
        let is_routable = |snapshot: &Snapshot| {
            snapshot.routable.iter().any(|routable| routable.index == worker.index)
        };
        let limit = self.workers.startup_timeout();
        let deciding = self.workers.until(|snapshot| is_routable(snapshot) || worker.is_draining());
        let is_decided = tokio::time::timeout(limit, deciding).await.is_ok();
        if is_routable(&self.workers.snapshot()) {
            return Ok(());
        }
        let message = if is_decided {
            format!("{} was removed before it was healthy", worker.url)
        } else {
            let why = worker.last_error().unwrap_or_else(|| "no check has ended yet".to_owned());
            format!(
                "{} is {} after {} s (worker_startup_timeout_secs): {why}; it stays a worker, to be picked once a \
                 check succeeds",
                worker.url,
                worker.state().name(),
                limit.as_secs()
            )
        };
        Err(Error::new(Kind::NoAvailableWorkers, message))
    }
}

fn invalid(message: String) -> Error {
    Error::new(Kind::InvalidRequest, message)
}

fn joining_message(joined: &Joined) -> String {
    let url = &joined.worker.url;
    if joined.is_new {
        format!("{url} joined; it may be picked after its first good check")
    } else {
        format!("{url} is a worker already and stays as it is")
    }
}

fn leaving_message(worker: &Worker) -> String {
    let in_flight = worker.target.in_flight();
    format!("{} is not picked any more; requests in flight there: {in_flight}", worker.url)
}

fn answer(status: StatusCode, word: &str, worker: &Worker, message: &str) -> Response {
    let location = format!("/workers/{}", worker.index);
    let about = json!({
        "status": word,
        "worker_id": worker.index.to_string(),
        "url": worker.url.as_str(),
        "location": location,
        "message": message,
    });
    let mut response = (status, Json(about)).into_response();
    if let Ok(location) = HeaderValue::try_from(location) {
        response.headers_mut().insert(LOCATION, location);
    }
    response
}

/// What POST /workers was asked.
#[derive(Debug)]
struct Asked {
    joining: Joining,
    /// Names of fields that were given.
    without_effect: Vec<String>,
}

impl Asked {
    fn parse(body: &[u8]) -> Result<Self, String> {
        let fields: Map<String, Value> = serde_json::from_slice(body).map_err(|error| {
            format!(r#"the body is not {{"url": "http://HOST:PORT", ...}}: {error}"#)
        })?;
        let unknown: Vec<String> =
            fields.keys().filter(|name| !is_known(name)).map(|name| shown(name)).collect();
        if !unknown.is_empty() {
            return Err(format!(
                "unknown fields: {}; known are {} and, without effect, {}",
                unknown.join(", "),
                KNOWN.join(", "),
                WITHOUT_EFFECT.join(", ")
            ));
        }
        let given = |name: &str| fields.get(name).filter(|value| !value.is_null());
        let url =
            given("url").ok_or(r#"the field url is missing; write {"url": "http://HOST:PORT"}"#)?;
        if let Some(kind) = given("worker_type").filter(|kind| *kind != "regular") {
            return Err(format!(
                "worker_type: {} is not supported; use \"regular\"",
                shown_value(kind)
            ));
        }
        let joining = Joining {
            url: text("url", url)?.parse()?,
            weight: given("weight").map(weight).transpose()?,
            node_id: given("node_id")
                .map(|name| check_name(text("node_id", name)?))
                .transpose()
                .map_err(|why| format!("node_id: {why}"))?,
            // The key is not repeated.
            authorization: given("api_key")
                .map(|key| Secret::new(key.as_str().unwrap_or_default()))
                .transpose()
                .map_err(|why| format!("api_key: {why}"))?
                .map(|key| key.authorization()),
        };
        let without_effect = WITHOUT_EFFECT.iter().filter(|name| given(name).is_some());
        Ok(Self {
            joining,
            without_effect: without_effect.map(|name| (*name).to_owned()).collect(),
        })
    }
}

fn is_known(name: &str) -> bool {
    KNOWN.contains(&name) || WITHOUT_EFFECT.contains(&name)
}

fn text<'a>(name: &str, value: &'a Value) -> Result<&'a str, String> {
    value.as_str().ok_or_else(|| format!("{name}: {} is not a string", shown_value(value)))
}

fn weight(value: &Value) -> Result<f64, String> {
    let number = value.as_f64();
    let number = number.ok_or_else(|| format!("weight: {} is not a number", shown_value(value)))?;
    check_weight(number)
}

fn shown_value(value: &Value) -> String {
    shown(&value.to_string())
}

/// The `url` of a query, which has nothing else.
fn url_in(pairs: Pairs) -> Result<WorkerUrl, String> {
    let Query(pairs) = pairs.map_err(|error| error.body_text())?;
    match &pairs[..] {
        [(name, url)] if name == "url" => url.parse(),
        _ => Err("the query is not one url: write ?url=http://HOST:PORT".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_acts_is_read_and_what_does_not_is_named() {
        let body = br#"{"url":"http://a:1/","weight":2,"node_id":"left","worker_type":"regular",
                        "api_key":"k","priority":5,"labels":{"a":"b"},"model_id":null}"#;
        let asked = Asked::parse(body).expect("good");
        assert_eq!(asked.joining.url.as_str(), "http://a:1");
        assert_eq!(
            (asked.joining.weight, asked.joining.node_id.as_deref()),
            (Some(2.0), Some("left"))
        );
        assert_eq!(asked.joining.authorization.expect("a key"), "Bearer k");
        assert_eq!(asked.without_effect, ["labels", "priority"]);
    }

    #[test]
    fn a_bad_body_is_refused_by_field_and_value() {
        for (body, why) in [
            ("", "not {\"url\""),
            ("[]", "not {\"url\""),
            ("\"http://a:1\"", "not {\"url\""),
            ("{\"url\":", "not {\"url\""),
            ("{}", "url is missing"),
            (r#"{"url":null}"#, "url is missing"),
            (r#"{"url":5}"#, "url: \"5\" is not a string"),
            (r#"{"url":"a:1"}"#, "no scheme"),
            (r#"{"url":"dns+http://a:1"}"#, "scheme is not http"),
            (r#"{"url":"http://a:1","weight":-1}"#, "weight -1"),
            (r#"{"url":"http://a:1","weight":"2"}"#, "weight: "),
            (r#"{"url":"http://a:1","node_id":"a b"}"#, "node_id: "),
            (r#"{"url":"http://a:1","node_id":""}"#, "node_id: "),
            (r#"{"url":"http://a:1","node_id":7}"#, "node_id: "),
            (r#"{"url":"http://a:1","api_key":""}"#, "api_key: a key is"),
            (r#"{"url":"http://a:1","api_key":7}"#, "api_key: a key is"),
            (r#"{"url":"http://a:1","worker_type":"prefill"}"#, "prefill"),
            (r#"{"url":"http://a:1","worker_type":1}"#, "worker_type: "),
            (r#"{"urls":"http://a:1","x\ny":null}"#, "unknown fields: \"urls\", \"x\\ny\""),
        ] {
            let error = Asked::parse(body.as_bytes()).expect_err(body);
            assert!(error.contains(why), "{body}: {error}");
        }
    }
}
