//! Prometheus metrics: two typed structs, one registry of each per router.
//!
//! [`Metrics`] is counted as things happen. [`Reading`] is filled anew for each scrape with what exists anyway, so
//! that nothing is kept twice and what is gone, above all a worker that left, is gone from the text too. A metric is
//! one row of the tables below; field, registration and documentation follow from it. Names and labels that
//! `sglang-router` 0.3.2 has too (`smg_*`) mean the same here.

use std::fmt;
use std::hash::Hash;
use std::sync::{Arc, OnceLock};

use prometheus_client::encoding::text::{encode_eof, encode_registry};
use prometheus_client::encoding::{EncodeMetric, MetricEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::{Family, MetricConstructor};
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::{MetricType, TypedMetric};
use prometheus_client::registry::Registry;

pub mod labels;
mod route;

use labels::{
    BackoffLabels, BuildLabels, CauseLabels, CheckLabels, GenerationLabels, Labels, OutcomeLabels,
    PickLabels, PoolLabels, ReasonLabels, RequestDurationLabels, RequestErrorLabels, RequestLabels,
    ResultLabels, RetryLabels, RouteLabels, StatusLabels, TokenLabels, TransitionLabels,
    UpstreamLabels, WorkerErrorLabels, WorkerLabels, WorkerStateLabels,
};
use route::Models;
pub use route::{MODELS_MAX, NO_MODEL, Route, Series};

/// What `/metrics` is answered with.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

#[derive(clap::Args, Clone, Debug, Default)]
#[group(skip)]
pub struct Options {
    /// Upper bounds in seconds, ascending, of the buckets of request durations in /metrics [default: 0.001 to 240]
    #[arg(long, num_args = 0.., value_name = "SECONDS", value_parser = parse_bound)]
    pub prometheus_duration_buckets: Vec<f64>,
}

/// More buckets make a text that nobody scrapes gladly.
const BUCKETS_MAX: usize = 100;

impl Options {
    /// What no single value shows.
    pub fn check(&self) -> Result<(), (&'static str, String)> {
        let bounds = &self.prometheus_duration_buckets;
        let wrong = if bounds.len() > BUCKETS_MAX {
            format!("{} bounds are more than the {BUCKETS_MAX} there may be", bounds.len())
        } else if let Some(pair) = bounds.windows(2).find(|pair| pair[0] >= pair[1]) {
            format!("{} does not ascend from {}", pair[1], pair[0])
        } else {
            return Ok(());
        };
        Err(("prometheus_duration_buckets", wrong))
    }
}

fn parse_bound(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(bound) if bound > 0.0 && f64::is_finite(bound) => Ok(bound),
        _ => Err("not a number of seconds above 0".to_owned()),
    }
}

/// Upper bounds of a histogram's buckets, in seconds.
#[derive(Clone, Debug)]
pub struct Bounds(Arc<[f64]>);

/// Those of `sglang-router`.
const DURATIONS: [f64; 20] = [
    0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 15.0, 30.0, 45.0, 60.0,
    90.0, 120.0, 180.0, 240.0,
];

/// From a fast model on a fast GPU to one that swaps.
const PER_TOKEN: [f64; 14] =
    [0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0];

/// From a small prompt and few workers to a prompt of many megabytes.
const DECISIONS: [f64; 14] =
    [1e-6, 2.5e-6, 5e-6, 1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 5e-3, 1e-2, 1e-1, 1.0];

impl Bounds {
    fn durations(options: &Options) -> Self {
        let chosen = &options.prometheus_duration_buckets;
        if chosen.is_empty() { Self::of(&DURATIONS) } else { Self::of(chosen) }
    }

    fn of(bounds: &[f64]) -> Self {
        Self(bounds.into())
    }

    fn histogram(&self) -> Histogram {
        Histogram::new(self.0.iter().copied())
    }

    fn family<L: Clone + Hash + Eq>(&self) -> Histograms<L> {
        Family::new_with_constructor(self.clone())
    }
}

impl MetricConstructor<Histogram> for Bounds {
    fn new_metric(&self) -> Histogram {
        self.histogram()
    }
}

type Counters<L> = Family<L, Counter>;
type Gauges<L> = Family<L, Gauge>;
type Histograms<L> = Family<L, Histogram, Bounds>;

/// A metric that is in the text once it has a value.
#[derive(Clone, Debug, Default)]
pub struct Known<M>(Arc<OnceLock<M>>);

impl<M: Default> Known<M> {
    /// The metric, which is in the text from now on.
    pub fn now(&self) -> &M {
        self.0.get_or_init(M::default)
    }
}

impl<M: EncodeMetric + TypedMetric> EncodeMetric for Known<M> {
    fn encode(&self, encoder: MetricEncoder<'_>) -> fmt::Result {
        self.0.get().map_or(Ok(()), |metric| metric.encode(encoder))
    }

    fn metric_type(&self) -> MetricType {
        M::TYPE
    }

    fn is_empty(&self) -> bool {
        self.0.get().is_none()
    }
}

/// What the documentation tells of a metric, by its type.
trait Documented {
    const KIND: &'static str;
    const SUFFIX: &'static str = "";
    const LABELS: &'static [&'static str] = &[];
}

impl Documented for Counter {
    const KIND: &'static str = "counter";
    const SUFFIX: &'static str = "_total";
}

impl<N, A> Documented for Gauge<N, A> {
    const KIND: &'static str = "gauge";
}

impl Documented for Histogram {
    const KIND: &'static str = "histogram";
}

impl<M: Documented> Documented for Known<M> {
    const KIND: &'static str = M::KIND;
    const SUFFIX: &'static str = M::SUFFIX;
}

impl<L: Labels, M: Documented, C> Documented for Family<L, M, C> {
    const KIND: &'static str = M::KIND;
    const SUFFIX: &'static str = M::SUFFIX;
    const LABELS: &'static [&'static str] = L::NAMES;
}

/// A metric as the documentation shows it.
#[derive(Clone, Copy, Debug)]
pub struct Described {
    base_name: &'static str,
    suffix: &'static str,
    pub kind: &'static str,
    pub labels: &'static [&'static str],
    pub meaning: &'static str,
}

impl Described {
    /// The name in queries; a histogram's with `_bucket`, `_sum` and `_count` behind it.
    pub fn name(&self) -> String {
        format!("{}{}", self.base_name, self.suffix)
    }
}

/// Every metric, in the order of the documentation.
pub fn described() -> impl Iterator<Item = &'static Described> {
    Metrics::ALL.iter().chain(Reading::ALL)
}

macro_rules! metrics {
    (
        $(#[$doc:meta])* $table:ident($options:ident) { $($extra:ident: $extra_type:ty,)* }
        $($field:ident: $type:ty = $new:expr, $name:literal, $meaning:literal;)*
    ) => {
        $(#[$doc])*
        #[derive(Debug)]
        pub struct $table {
            registry: Registry,
            $($extra: $extra_type,)*
            $(#[doc = $meaning] pub $field: $type,)*
        }

        impl $table {
            const ALL: &[Described] = &[$(Described {
                base_name: $name,
                suffix: <$type as Documented>::SUFFIX,
                kind: <$type as Documented>::KIND,
                labels: <$type as Documented>::LABELS,
                meaning: $meaning,
            }),*];

            pub fn new($options: &Options) -> Self {
                let mut registry = Registry::default();
                $(
                    let $field: $type = $new;
                    registry.register($name, $meaning, $field.clone());
                )*
                Self { registry, $($extra: Default::default(),)* $($field,)* }
            }
        }

        impl Default for $table {
            fn default() -> Self {
                Self::new(&Options::default())
            }
        }
    };
}

metrics! {
    /// What is counted as it happens.
    Metrics(options) { models: Models, }

    requests: Counters<RouteLabels> = Family::default(), "smg_http_requests",
        "Requests that arrived on a routed route";
    responses: Counters<StatusLabels> = Family::default(), "smg_http_responses",
        "Ended routed requests by status (499: the client left) and the router's own error code, empty for a worker's answer";
    request_duration: Histograms<RouteLabels> = Bounds::durations(options).family(), "smg_http_request_duration_seconds",
        "From a routed request's arrival to the last byte of its answer";
    in_flight: Gauge = Gauge::default(), "smg_http_connections_active",
        "Routed requests that have arrived and not ended, waiting and streaming ones included";
    unauthorized: Counter = Counter::default(), "sgl_router_unauthorized",
        "Requests refused because they did not have the key that their route asks for";
    rate_limit: Counters<ResultLabels> = Family::default(), "smg_http_rate_limit",
        "Requests let in (`allowed`), and refused because the queue was full or took too long (`rejected`)";

    routed: Counters<RequestLabels> = Family::default(), "smg_router_requests",
        "Requests whose body was read. Of the models asked for, 64 have a name here; further ones are `other`, none is `default`";
    errors: Counters<RequestErrorLabels> = Family::default(), "smg_router_request_errors",
        "Those of them that failed: `validation_error` (4xx), `no_workers`, `timeout`, `backend_error` (5xx, or a broken answer), `rejected` (no room in the router), `aborted` (the client left, or `POST /abort_request`)";
    duration: Histograms<RequestDurationLabels> = Bounds::durations(options).family(), "smg_router_request_duration_seconds",
        "From their arrival to the last byte of their answer";
    upstream_responses: Counters<UpstreamLabels> = Family::default(), "smg_router_upstream_responses",
        "Heads of answers that came from workers, passed over ones included";
    ttft: Histograms<GenerationLabels> = Bounds::durations(options).family(), "smg_router_ttft_seconds",
        "From a request's arrival to the first frame with content, of streams";
    tpot: Histograms<GenerationLabels> = Bounds::of(&PER_TOKEN).family(), "smg_router_tpot_seconds",
        "Time per token after the first, of whole streams that told their tokens";
    generation: Histograms<GenerationLabels> = Bounds::durations(options).family(), "smg_router_generation_duration_seconds",
        "From a request's arrival to the last byte, of whole streams with content";
    tokens: Counters<TokenLabels> = Family::default(), "smg_router_tokens",
        "Prompt (`input`) and generated (`output`) tokens, as the workers told";

    picks: Counters<PickLabels> = Family::default(), "smg_worker_selection",
        "Picks of a worker, one per attempt; policy `pinned` where the request named its worker";
    worker_errors: Counters<WorkerErrorLabels> = Family::default(), "smg_worker_errors",
        "Attempts that failed by the worker's fault: `connection`, `no_answer`, `status` (5xx, or one that was tried again), `broken_answer`, `timeout`";
    retries: Counters<RetryLabels> = Family::default(), "smg_worker_retries",
        "Attempts that followed another one";
    retries_exhausted: Counters<RetryLabels> = Family::default(), "smg_worker_retries_exhausted",
        "Requests whose last allowed attempt failed";
    backoff: Histograms<BackoffLabels> = Bounds::durations(options).family(), "smg_worker_retry_backoff_seconds",
        "Pauses between attempts, by the attempt that followed";

    selections: Counters<ReasonLabels> = Family::default(), "sgl_router_selections",
        "Picks of a worker by policy and reason";
    decision: Histogram = Bounds::of(&DECISIONS).histogram(), "sgl_router_decision_seconds",
        "Time to read a prompt and pick a worker";
    queue_wait: Histogram = Bounds::durations(options).histogram(), "sgl_router_queue_wait_seconds",
        "Time requests waited to be let in, of those that were";
    aborted: Counters<CauseLabels> = Family::default(), "sgl_router_aborted_requests",
        "Requests that were given up: the `client` left, an `abort_request` named them, or the router `stopped`";
}

metrics! {
    /// What is read for one scrape.
    Reading(_options) {}

    pool_size: Gauges<PoolLabels> = Family::default(), "smg_worker_pool_size",
        "Workers by the model they serve, `default` until they have told";
    requests_active: Gauges<WorkerLabels> = Family::default(), "smg_worker_requests_active",
        "Requests in flight at a worker";
    health: Gauges<WorkerLabels> = Family::default(), "smg_worker_health",
        "1 while a worker may be picked, else 0";
    checks: Counters<CheckLabels> = Family::default(), "smg_worker_health_checks",
        "Checks of all workers: `success`, `failure`";
    breaker_state: Gauges<WorkerLabels> = Family::default(), "smg_worker_cb_state",
        "A worker's circuit breaker: 0 closed, 1 open, 2 half-open";
    breaker_transitions: Counters<TransitionLabels> = Family::default(), "smg_worker_cb_transitions",
        "Changes of a worker's circuit breaker";
    breaker_outcomes: Counters<OutcomeLabels> = Family::default(), "smg_worker_cb_outcomes",
        "Attempts as a worker's circuit breaker saw them: `success`, `failure`; what says nothing of the worker is not counted";
    breaker_failures: Gauges<WorkerLabels> = Family::default(), "smg_worker_cb_consecutive_failures",
        "Failures of a worker in a row";
    breaker_successes: Gauges<WorkerLabels> = Family::default(), "smg_worker_cb_consecutive_successes",
        "Answered probes in a row of a worker whose circuit breaker is half-open";

    processed: Counters<WorkerLabels> = Family::default(), "sgl_router_processed_requests",
        "Requests a worker answered to the end with a 2xx status";
    failed: Counters<WorkerLabels> = Family::default(), "sgl_router_failed_attempts",
        "Attempts at a worker that failed, those aside that the client gave up or was at fault for";
    attempts: Counters<WorkerLabels> = Family::default(), "sgl_router_attempts",
        "Times a worker was picked, by a policy or by name";
    running: Gauges<WorkerLabels> = Family::default(), "sgl_router_running_requests",
        "Requests in flight at a worker";
    prompt_tokens: Counters<WorkerLabels> = Family::default(), "sgl_router_prompt_tokens",
        "Prompt tokens of requests whose worker told how many of them were cached";
    cached_tokens: Counters<WorkerLabels> = Family::default(), "sgl_router_cached_tokens",
        "Those of them that were cached";
    worker_state: Gauges<WorkerStateLabels> = Family::default(), "sgl_router_worker_state",
        "1 for the state a worker is in; `node_id` is empty until it has a name";
    queue_depth: Gauge = Gauge::default(), "sgl_router_queue_depth",
        "Requests that wait to be let in";
    buffered_bytes: Gauge = Gauge::default(), "sgl_router_buffered_bytes",
        "Memory that the bodies of the requests in flight take";
    traces_held: Known<Gauge> = Known::default(), "sgl_router_traces_held",
        "Records the request tracker holds";
    traces_evicted: Known<Counter> = Known::default(), "sgl_router_traces_evicted",
        "Records that made room for others";
    traces_expired: Known<Counter> = Known::default(), "sgl_router_traces_expired",
        "Records that outlived `trace_ttl_seconds`";
    traces_bytes: Known<Gauge> = Known::default(), "sgl_router_traces_bytes",
        "Memory that the records take, an estimate";
    trace_log_written: Known<Counter> = Known::default(), "sgl_router_trace_log_written",
        "Records written to `trace_log`";
    trace_log_lost: Known<Counter> = Known::default(), "sgl_router_trace_log_lost",
        "Records that could not be, or not as fast as they came";
    build_info: Gauges<BuildLabels> = Family::default(), "sgl_router_build_info",
        "1, with the router's version and policy";
    open_fds: Known<Gauge> = Known::default(), "process_open_fds",
        "File descriptors the process has open";
    max_fds: Known<Gauge> = Known::default(), "process_max_fds",
        "File descriptors it may have open";
}

impl Metrics {
    /// The text of `/metrics`.
    pub fn render(&self, reading: &Reading) -> String {
        let mut text = String::new();
        // Writing into a String does not fail.
        let _ = encode_registry(&mut text, &self.registry)
            .and_then(|()| encode_registry(&mut text, &reading.registry))
            .and_then(|()| encode_eof(&mut text));
        text
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::collections::HashSet;

    pub(super) fn rendered(metrics: &Metrics) -> String {
        metrics.render(&Reading::default())
    }

    #[test]
    fn a_metric_is_rendered_with_its_help_and_labels() {
        let reading = Reading::default();
        let worker = WorkerLabels { worker: "http://a:1".into() };
        reading.processed.get_or_create(&worker).inc();
        let text = Metrics::default().render(&reading);
        assert!(text.contains("# HELP sgl_router_processed_requests Requests a worker answered"));
        assert!(text.contains(r#"sgl_router_processed_requests_total{worker="http://a:1"} 1"#));
        assert!(text.ends_with("# EOF\n"));
    }

    #[test]
    fn what_has_no_value_is_not_there() {
        assert!(!rendered(&Metrics::default()).contains("traces"));
        let reading = Reading::default();
        reading.traces_held.now().set(7);
        assert!(Metrics::default().render(&reading).contains("\nsgl_router_traces_held 7\n"));
    }

    #[test]
    fn names_are_of_a_family_and_nobody_elses() {
        let mut names = HashSet::new();
        for metric in described() {
            let name = metric.name();
            let is_known =
                ["smg_", "sgl_router_", "process_"].iter().any(|it| name.starts_with(it));
            assert!(is_known && names.insert(name), "{metric:?}");
            assert!(!metric.base_name.ends_with("_total") && !metric.meaning.ends_with('.'));
            assert!(!metric.meaning.contains(['|', '\n', '"', '\\']), "{metric:?}");
        }
    }

    #[test]
    fn bounds_are_positive_and_ascend() {
        for bad in ["0", "-1", "nan", "inf", "x", ""] {
            assert!(parse_bound(bad).is_err(), "{bad}");
        }
        let check = |bounds: &[f64]| {
            Options { prometheus_duration_buckets: bounds.to_vec() }.check().map_err(|it| it.1)
        };
        assert_eq!(check(&[]), Ok(()));
        assert_eq!(check(&[0.1, 2.0]), Ok(()));
        assert_eq!(check(&[2.0, 2.0]).expect_err("equal"), "2 does not ascend from 2");
        assert!(check(&[1.0; 101]).is_err());
    }

    #[test]
    fn chosen_bounds_are_those_of_durations_only() {
        let options = Options { prometheus_duration_buckets: vec![0.5, 7.0] };
        let metrics = Metrics::new(&options);
        metrics.queue_wait.observe(1.0);
        metrics.decision.observe(0.5);
        let text = rendered(&metrics);
        assert!(text.contains("sgl_router_queue_wait_seconds_bucket{le=\"7.0\"} 1"));
        assert!(!text.contains("sgl_router_decision_seconds_bucket{le=\"7.0\"}"));
    }
}
