//! Every route of the router, declared once.

use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::middleware::from_fn_with_state;
use axum::routing::{MethodFilter, MethodRouter, get, on};
use hashbrown::HashMap;
use hyper::Method;

use super::doors::{self, Door};
use super::front::Front;
use super::{App, cors, endpoints, fan_out, membership, proxy, traces};
use crate::error::{Error, Kind, shown};
use crate::telemetry::metrics::Route;

/// What answers a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Routed to a worker and traced.
    Routed,
    /// Asked of one worker and passed on.
    FromWorker,
    EngineMetrics,
    Alive,
    Readiness,
    Metrics,
    FlushCache,
    Loads,
    Abort,
    Workers,
    Worker,
    Join,
    Leave,
    AddWorker,
    RemoveWorker,
    ListWorkers,
    Trace,
    TraceBatch,
    Traces,
    TraceStats,
}

impl Purpose {
    /// A few words for the documentation.
    pub const fn meaning(self) -> &'static str {
        match self {
            Purpose::Routed => "routed to a worker and traced",
            Purpose::FromWorker => "passed on to one healthy worker",
            Purpose::EngineMetrics => "the metrics of all healthy workers as one Prometheus text",
            Purpose::Alive => "200 while the router runs",
            Purpose::Readiness => "200 with a healthy worker, else 503",
            Purpose::Metrics => "the router's metrics, Prometheus text",
            Purpose::FlushCache => "empties the caches of all workers",
            Purpose::Loads => "tokens in hand at each worker",
            Purpose::Abort => "ends requests in flight, by id or body `rid`",
            Purpose::Workers => "all workers",
            Purpose::Worker => "one worker, by id or URL-encoded URL",
            Purpose::Join => "a worker joins; 202 at once",
            Purpose::Leave => "a worker leaves, by id or URL-encoded URL; 202 at once",
            Purpose::AddWorker => "the worker `?url=` joins; 200 once it may be picked",
            Purpose::RemoveWorker => "the worker `?url=` leaves; 200, not picked any more",
            Purpose::ListWorkers => "the URLs of the workers that do not leave",
            Purpose::Trace => "one trace, by request id",
            Purpose::TraceBatch => "traces of many request ids",
            Purpose::Traces => "a listing or an export of traces",
            Purpose::TraceStats => "statistics of traces",
        }
    }

    /// What it asks of who uses it.
    pub const fn door(self) -> Door {
        match self {
            Purpose::Alive | Purpose::Readiness | Purpose::Metrics => Door::Open,
            Purpose::Routed | Purpose::FromWorker | Purpose::EngineMetrics => Door::Api,
            Purpose::FlushCache
            | Purpose::Loads
            | Purpose::Abort
            | Purpose::Workers
            | Purpose::Worker
            | Purpose::Join
            | Purpose::Leave
            | Purpose::AddWorker
            | Purpose::RemoveWorker
            | Purpose::ListWorkers
            | Purpose::Trace
            | Purpose::TraceBatch
            | Purpose::Traces
            | Purpose::TraceStats => Door::Admin,
        }
    }
}

/// Method, path and purpose of every route; `extra_routes` adds routed ones.
pub const ROUTES: &[(Method, &str, Purpose)] = &[
    (Method::POST, "/generate", Purpose::Routed),
    (Method::POST, "/v1/chat/completions", Purpose::Routed),
    (Method::POST, "/v1/completions", Purpose::Routed),
    (Method::POST, "/v1/embeddings", Purpose::Routed),
    (Method::POST, "/v1/rerank", Purpose::Routed),
    (Method::POST, "/rerank", Purpose::Routed),
    (Method::POST, "/v1/score", Purpose::Routed),
    (Method::POST, "/v1/classify", Purpose::Routed),
    (Method::POST, "/classify", Purpose::Routed),
    (Method::POST, "/encode", Purpose::Routed),
    (Method::POST, "/v1/responses", Purpose::Routed),
    (Method::POST, "/v1/messages", Purpose::Routed),
    (Method::POST, "/tokenize", Purpose::Routed),
    (Method::POST, "/v1/tokenize", Purpose::Routed),
    (Method::POST, "/detokenize", Purpose::Routed),
    (Method::POST, "/v1/detokenize", Purpose::Routed),
    (Method::GET, "/health", Purpose::Alive),
    (Method::GET, "/liveness", Purpose::Alive),
    (Method::GET, "/readiness", Purpose::Readiness),
    (Method::GET, "/health_generate", Purpose::FromWorker),
    (Method::GET, "/v1/models", Purpose::FromWorker),
    (Method::GET, "/get_model_info", Purpose::FromWorker),
    (Method::GET, "/model_info", Purpose::FromWorker),
    (Method::GET, "/get_server_info", Purpose::FromWorker),
    (Method::GET, "/server_info", Purpose::FromWorker),
    (Method::GET, "/engine_metrics", Purpose::EngineMetrics),
    (Method::GET, "/metrics", Purpose::Metrics),
    (Method::POST, "/flush_cache", Purpose::FlushCache),
    (Method::GET, "/get_loads", Purpose::Loads),
    (Method::POST, "/abort_request", Purpose::Abort),
    (Method::GET, "/workers", Purpose::Workers),
    (Method::GET, "/workers/{id}", Purpose::Worker),
    (Method::POST, "/workers", Purpose::Join),
    (Method::DELETE, "/workers/{id}", Purpose::Leave),
    (Method::POST, "/add_worker", Purpose::AddWorker),
    (Method::POST, "/remove_worker", Purpose::RemoveWorker),
    (Method::GET, "/list_workers", Purpose::ListWorkers),
    (Method::GET, "/v1/traces", Purpose::Traces),
    (Method::GET, "/v1/traces/stats", Purpose::TraceStats),
    (Method::POST, "/v1/traces/batch", Purpose::TraceBatch),
    // An id may hold slashes. One named like a route above is found by `?request_id=`.
    (Method::GET, "/v1/traces/{*id}", Purpose::Trace),
];

/// All routes.
pub(crate) fn front(app: &Arc<App>) -> Front {
    let mut router = Router::new();
    let mut routed = HashMap::new();
    let extra =
        app.options.extra_routes.iter().map(|path| (&Method::POST, &**path, Purpose::Routed));
    for (method, path, purpose) in
        ROUTES.iter().map(|(method, path, purpose)| (method, *path, *purpose)).chain(extra)
    {
        router = router.route(path, handler(app, method, path, purpose, &mut routed));
    }
    router = router.fallback(not_found).method_not_allowed_fallback(not_allowed);
    router = router.layer(from_fn_with_state(app.clone(), doors::ask_for_key));
    // Outermost: a preflight has no key, and a page may read why it was refused.
    if let Some(cors) = cors::layer(&app.options.cors_allowed_origins) {
        return router.layer(cors).with_state(app.clone()).into();
    }
    Front::new(app, router.with_state(app.clone()), routed)
}

/// The door before a route's path. All methods of a path have the same; other paths are as `extra_routes`.
pub(super) fn door(path: Option<&str>) -> Door {
    let route = ROUTES.iter().find(|(_, declared, _)| Some(*declared) == path);
    route.map_or(Door::Api, |(_, _, purpose)| purpose.door())
}

/// What the second listener serves.
pub(crate) fn metrics_only(app: &Arc<App>) -> Front {
    let router = Router::new().route("/metrics", get(endpoints::metrics)).fallback(not_found);
    router.with_state(app.clone()).into()
}

fn handler(
    app: &App,
    method: &Method,
    path: &str,
    purpose: Purpose,
    routed: &mut HashMap<String, Arc<Route>>,
) -> MethodRouter<Arc<App>> {
    let method = MethodFilter::try_from(method.clone()).expect("axum knows GET, POST and DELETE");
    match purpose {
        Purpose::Routed => {
            let route = Route::new(&app.metrics, path);
            routed.insert(path.to_owned(), route.clone());
            on(method, move |State(app): State<Arc<App>>, request: Request| {
                proxy::proxy(app, route.clone(), request)
            })
        }
        Purpose::FromWorker => on(method, endpoints::from_worker),
        Purpose::EngineMetrics => on(method, endpoints::engine_metrics),
        Purpose::Alive => on(method, endpoints::alive),
        Purpose::Readiness => on(method, endpoints::readiness),
        Purpose::Metrics => on(method, endpoints::metrics),
        Purpose::FlushCache => on(method, fan_out::flush_cache),
        Purpose::Loads => on(method, fan_out::loads),
        Purpose::Abort => on(method, fan_out::abort),
        Purpose::Workers => on(method, endpoints::workers),
        Purpose::Worker => on(method, endpoints::worker),
        Purpose::Join => on(method, membership::join),
        Purpose::Leave => on(method, membership::leave),
        Purpose::AddWorker => on(method, membership::add),
        Purpose::RemoveWorker => on(method, membership::remove),
        Purpose::ListWorkers => on(method, membership::list),
        Purpose::Trace => on(method, traces::one),
        Purpose::TraceBatch => on(method, traces::batch),
        Purpose::Traces => on(method, traces::list),
        Purpose::TraceStats => on(method, traces::stats),
    }
}

/// A path of `extra_routes`.
pub(super) fn parse_extra(path: &str) -> Result<String, String> {
    let is_path = path.starts_with('/')
        && path.len() > 1
        && path.bytes().all(|byte| byte.is_ascii_graphic() && !b"{}*?#:\"\\<>".contains(&byte));
    if !is_path {
        return Err(format!("{path:?} is not a plain path like /v1/audio/transcriptions"));
    }
    let is_ours = path.starts_with("/v1/traces/")
        || path.starts_with("/workers/")
        || ROUTES.iter().any(|(_, declared, _)| *declared == path);
    if is_ours {
        return Err(format!("{path} is a route of the router already"));
    }
    Ok(path.to_owned())
}

async fn not_found(request: Request) -> Error {
    let message = format!(
        "{} {} is no route of sglang_router_rs; a further route to pass on to the workers is named by the \
         option extra_routes",
        request.method(),
        shown(request.uri().path())
    );
    Error::new(Kind::NotFound, message)
}

async fn not_allowed(request: Request) -> Error {
    let path = request.uri().path();
    let methods: Vec<&str> = ROUTES
        .iter()
        .filter(|(_, declared, _)| *declared == path)
        .map(|(method, _, _)| method.as_str())
        .collect();
    let allowed = if methods.is_empty() {
        "what the header allow says".to_owned()
    } else {
        methods.join(", ")
    };
    let message = format!("{} is not for {}; use {allowed}", request.method(), shown(path));
    Error::new(Kind::MethodNotAllowed, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_methods_of_a_path_stand_behind_one_door() {
        for (_, path, purpose) in ROUTES {
            assert_eq!(door(Some(path)), purpose.door(), "{path}");
        }
        assert_eq!(door(Some("/an/extra/route")), Door::Api);
        assert_eq!(door(None), Door::Api);
    }

    #[test]
    fn an_extra_route_is_a_plain_path_of_its_own() {
        assert!(parse_extra("/v1/audio/transcriptions").is_ok());
        for path in ["", "x", "/", "/generate", "/v1/traces/x"] {
            assert!(parse_extra(path).is_err(), "{path}");
        }
        // What means something to routes, in a URL or in the text of metrics.
        for part in "{}*?#: \"\\<>\n\t\0\u{7f}ä".chars() {
            assert!(parse_extra(&format!("/a{part}b")).is_err(), "{part:?}");
        }
    }
}
