//! The simulated worker's routes: SGLang's, and `/sim/…` for what a real worker does not have.
//!
//! The one idea: endpoints that run the model come from one table ([`ENDPOINTS`]), inside the
//! envelopes of faults and of the request log; the others answer at once from the worker's state. Every
//! answer carries `x-sim-port`.
//!
//! Not here: connections (the parent module).

use std::fmt::Write;
use std::sync::Arc;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::rejection::BytesRejection;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::{HeaderName, HeaderValue, StatusCode};
use axum::middleware::{from_fn_with_state, map_response_with_state};
use axum::response::Response;
use axum::routing::{get, post};
use serde_json::{Value, json};

use super::answer::{answer, parse};
use super::ask;
use super::faults;
use super::refusal::{Refusal, json_response};
use super::request_log::{self, RequestLog};
use super::shapes::ENDPOINTS;
use super::tokens;
use super::worker::Worker;

/// The largest request body, in bytes.
const MAX_BODY_BYTES: usize = 1 << 30;

/// Names the simulated worker on each of its answers.
const PORT_HEADER: HeaderName = HeaderName::from_static("x-sim-port");

type Shared = State<Arc<Worker>>;

/// All routes of one worker; what it is sent is logged if there is a log.
pub fn routes(worker: Arc<Worker>, log: Option<Arc<RequestLog>>) -> Router {
    let routes = model_routes(&worker)
        .merge(info_routes())
        .fallback(async || Response::from(Refusal::detail(StatusCode::NOT_FOUND)))
        .method_not_allowed_fallback(async || {
            Response::from(Refusal::detail(StatusCode::METHOD_NOT_ALLOWED))
        })
        .layer(from_fn_with_state(Arc::clone(&worker), faults::hang));
    let routes = match log {
        Some(log) => routes.layer(from_fn_with_state((log, worker.port), request_log::log)),
        None => routes,
    };
    routes
        .merge(sim_routes())
        .layer(map_response_with_state(Arc::clone(&worker), name_port))
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .with_state(worker)
}

async fn name_port(State(worker): Shared, mut response: Response) -> Response {
    response.headers_mut().insert(PORT_HEADER, HeaderValue::from(worker.port));
    response
}

/// What the router routes.
fn model_routes(worker: &Arc<Worker>) -> Router<Arc<Worker>> {
    let mut routes = Router::new();
    for endpoint in ENDPOINTS {
        for path in endpoint.paths {
            let handler =
                async move |State(worker): Shared, body: Result<Bytes, BytesRejection>| match body {
                    Ok(body) => answer(worker, endpoint, body).await,
                    Err(rejection) => refuse_body(&rejection).into(),
                };
            routes = routes.route(path, post(handler));
        }
    }
    for path in ["/tokenize", "/v1/tokenize"] {
        routes = routes.route(path, post(tokenize));
    }
    for path in ["/detokenize", "/v1/detokenize"] {
        routes = routes.route(path, post(detokenize));
    }
    routes.route_layer(from_fn_with_state(Arc::clone(worker), faults::fail))
}

/// What a worker tells about itself, and what an operator tells it.
fn info_routes() -> Router<Arc<Worker>> {
    Router::new()
        .route("/health", get(async || StatusCode::OK))
        .route("/health_generate", get(async || StatusCode::OK))
        .route("/v1/models", get(models))
        .route("/get_model_info", get(model_info))
        .route("/model_info", get(model_info))
        .route("/get_server_info", get(server_info))
        .route("/server_info", get(server_info))
        .route("/get_load", get(load))
        .route("/metrics", get(metrics))
        .route("/flush_cache", post(flush_cache).get(flush_cache))
        .route("/abort_request", post(abort_request))
}

/// What only a simulated worker has. It works while the worker hangs.
fn sim_routes() -> Router<Arc<Worker>> {
    Router::new()
        .route("/sim/stats", get(stats))
        .route("/sim/faults", post(change_faults).get(show_faults))
}

fn ok(json: &Value) -> Response {
    json_response(StatusCode::OK, json.to_string())
}

/// The answer to a body that could not be read.
pub fn refuse_body(rejection: &BytesRejection) -> Refusal {
    Refusal::openai(rejection.status(), rejection.body_text())
}

/// Counts an answer as served unless it refuses.
fn served(worker: &Worker, response: Response) -> Response {
    if response.status().is_success() {
        worker.count_served();
    }
    response
}

/// A reply without the model, or why there is none.
fn reply_to(
    body: Result<Bytes, BytesRejection>,
    reply: impl FnOnce(&Value) -> Result<Value, ask::BadAsk>,
) -> Response {
    let body = body.map_err(|rejection| refuse_body(&rejection)).and_then(|body| parse(&body));
    let reply = body.and_then(|body| {
        reply(&body).map_err(|message| Refusal::openai(StatusCode::BAD_REQUEST, message))
    });
    reply.map_or_else(Response::from, |json| ok(&json))
}

async fn tokenize(State(worker): Shared, body: Result<Bytes, BytesRejection>) -> Response {
    let response = reply_to(body, |body| {
        let (lists, is_list) = ask::prompts(body, "prompt")?;
        let counts: Vec<_> = lists.iter().map(Vec::len).collect();
        let max_model_len = worker.options.hardware.kv_tokens;
        Ok(match is_list {
            true => json!({"tokens": lists, "count": counts, "max_model_len": max_model_len}),
            false => {
                json!({"tokens": lists[0], "count": counts[0], "max_model_len": max_model_len})
            }
        })
    });
    served(&worker, response)
}

async fn detokenize(State(worker): Shared, body: Result<Bytes, BytesRejection>) -> Response {
    let response = reply_to(body, |body| {
        let (lists, is_list) = ask::token_lists(body)?;
        let texts: Vec<_> = lists.iter().map(|ids| tokens::decode(ids)).collect();
        Ok(if is_list { json!({"text": texts}) } else { json!({"text": texts[0]}) })
    });
    served(&worker, response)
}

async fn models(State(worker): Shared) -> Response {
    let options = &worker.options;
    ok(&json!({
        "object": "list",
        "data": [{
            "id": options.model,
            "object": "model",
            "created": 0,
            "owned_by": "sglang",
            "root": options.model,
            "max_model_len": options.hardware.kv_tokens,
        }],
    }))
}

async fn model_info(State(worker): Shared) -> Response {
    ok(&json!({
        "model_path": worker.options.model,
        "tokenizer_path": worker.options.model,
        "is_generation": true,
        "preferred_sampling_params": null,
        "weight_version": "default",
    }))
}

async fn server_info(State(worker): Shared) -> Response {
    let options = &worker.options;
    let mut info = json!({
        "model_path": options.model,
        "served_model_name": options.model,
        "host": options.host,
        "port": worker.port,
        "base_gpu_id": worker.base_gpu_id,
        "max_running_requests": options.hardware.max_running,
        "page_size": options.hardware.page_tokens,
        "tp_size": 1,
        "dp_size": 1,
        "random_seed": worker.random_seed,
        "enable_cache_report": true,
        "version": concat!("sim-", env!("CARGO_PKG_VERSION")),
    });
    if !options.hardware.hide_kv {
        info["max_total_num_tokens"] = json!(options.hardware.kv_tokens);
    }
    ok(&info)
}

async fn load(State(worker): Shared) -> Response {
    let (load, ..) = worker.load();
    ok(&json!([{
        "dp_rank": 0,
        "num_reqs": load.running + load.waiting,
        "num_waiting_reqs": load.waiting,
        "num_tokens": load.tokens,
    }]))
}

async fn metrics(State(worker): Shared) -> Response {
    let (load, ..) = worker.load();
    let gauges = [
        ("num_running_reqs", "The number of running requests.", load.running as f64),
        ("num_queue_reqs", "The number of requests in the waiting queue.", load.waiting as f64),
        (
            "token_usage",
            "The token usage.",
            (load.tokens as f64 / f64::from(worker.options.hardware.kv_tokens)).min(1.0),
        ),
    ];
    let mut text = String::new();
    for (name, help, value) in gauges {
        let labels = format_args!("{{model_name={:?}}}", worker.options.model);
        // Writing to a string cannot fail.
        let _ = write!(text, "# HELP sglang:{name} {help}\n# TYPE sglang:{name} gauge\n");
        let _ = writeln!(text, "sglang:{name}{labels} {value}");
    }
    Response::new(Body::from(text))
}

async fn flush_cache(State(worker): Shared) -> &'static str {
    worker.flush_cache();
    "Cache flushed.\n"
}

async fn abort_request(State(worker): Shared, body: Result<Bytes, BytesRejection>) -> Response {
    let body = body.map_err(|rejection| refuse_body(&rejection)).and_then(|body| parse(&body));
    let body = match body {
        Ok(body) => body,
        Err(refusal) => return refusal.into(),
    };
    match (body["abort_all"] == true, body["rid"].as_str()) {
        (true, _) => worker.abort(None),
        (false, Some(rid)) if !rid.is_empty() => worker.abort(Some(rid)),
        (false, _) => {
            let message = "rid or abort_all is required";
            return Refusal::native(StatusCode::BAD_REQUEST, message).into();
        }
    }
    Response::default()
}

async fn stats(State(worker): Shared) -> Response {
    let (load, max_running_seen, totals) = worker.load();
    ok(&json!({
        "port": worker.port,
        "served": worker.served(),
        "running": load.running,
        "waiting": load.waiting,
        "max_running_seen": max_running_seen,
        "prompt_tokens": totals.prompt_tokens,
        "cached_tokens": totals.cached_tokens,
    }))
}

async fn show_faults(State(worker): Shared) -> Response {
    ok(&json!(worker.faults()))
}

async fn change_faults(State(worker): Shared, body: Result<Bytes, BytesRejection>) -> Response {
    let changed = match body {
        Ok(body) => worker.change_faults(&body),
        Err(rejection) => Err(rejection.body_text()),
    };
    match changed {
        Ok(faults) => ok(&json!(faults)),
        Err(message) => Refusal::native(StatusCode::BAD_REQUEST, message).into(),
    }
}
