//! Prometheus metrics: one typed struct, one registry per router.
//!
//! A metric is one row of the table at the end; field, registration and documentation follow from it. Names and
//! labels that `sglang-router` 0.3.2 has too (`smg_*`) mean the same here. Label values are bounded: routes are
//! those declared, workers those known.

use parking_lot::Mutex;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

/// What `/metrics` is answered with.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct RouteLabels {
    pub method: &'static str,
    pub path: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct StatusLabels {
    pub status_code: u16,
    /// The router's own error code, empty for a worker's answer.
    pub error_code: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct WorkerLabels {
    pub worker: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct SelectionLabels {
    pub policy: &'static str,
    pub reason: &'static str,
}

/// Bounds in seconds, those of `sglang-router`.
const DURATION_BUCKETS: [f64; 20] = [
    0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 15.0, 30.0, 45.0, 60.0,
    90.0, 120.0, 180.0, 240.0,
];

type Histograms<Labels> = Family<Labels, Histogram, fn() -> Histogram>;

fn durations<Labels: Clone + std::hash::Hash + Eq>() -> Histograms<Labels> {
    Family::new_with_constructor(|| Histogram::new(DURATION_BUCKETS))
}

macro_rules! metrics {
    ($($field:ident: $type:ty = $new:expr, $name:literal, $help:literal;)*) => {
        /// The metrics of one router.
        #[derive(Debug)]
        pub struct Metrics {
            registry: Registry,
            /// Held while the gauges are set and read.
            reading: Mutex<()>,
            $(#[doc = $help] pub $field: $type,)*
        }

        impl Default for Metrics {
            fn default() -> Self {
                let mut registry = Registry::default();
                $(
                    let $field: $type = $new;
                    registry.register($name, $help, $field.clone());
                )*
                Self { registry, reading: Mutex::default(), $($field,)* }
            }
        }

        /// Name (a counter's without its `_total`) and meaning of every metric.
        pub const ALL: &[(&str, &str)] = &[$(($name, $help)),*];
    };
}

metrics! {
    requests: Family<RouteLabels, Counter> = Family::default(),
        "smg_http_requests", "Requests that arrived on a routed route";
    responses: Family<StatusLabels, Counter> = Family::default(),
        "smg_http_responses", "Ended routed requests by status (499: the client left) and the router's own error code";
    request_duration: Histograms<RouteLabels> = durations(),
        "smg_http_request_duration_seconds", "From a routed request's arrival to the last byte of its answer";
    unauthorized: Counter = Counter::default(),
        "sgl_router_unauthorized", "Requests refused because they did not have the key that their route asks for";
    active: Family<WorkerLabels, Gauge> = Family::default(),
        "smg_worker_requests_active", "Requests in flight at a worker";
    health: Family<WorkerLabels, Gauge> = Family::default(),
        "smg_worker_health", "1 while a worker may be picked, else 0";
    processed: Family<WorkerLabels, Counter> = Family::default(),
        "sgl_router_processed_requests", "Requests a worker answered to the end with a 2xx status";
    running: Family<WorkerLabels, Gauge> = Family::default(),
        "sgl_router_running_requests", "Requests in flight at a worker";
    selections: Family<SelectionLabels, Counter> = Family::default(),
        "sgl_router_selections", "Picks of a worker by policy and reason";
    traces_held: Gauge = Gauge::default(),
        "sgl_router_traces_held", "Records the request tracker holds";
}

impl Metrics {
    /// The text of `/metrics`, after `set` has brought the gauges up to date; one reader at a time, so that each sees
    /// what it set.
    pub fn render(&self, set: impl FnOnce(&Self)) -> String {
        let _alone = self.reading.lock();
        set(self);
        let mut text = String::new();
        // Writing into a String does not fail.
        let _ = encode(&mut text, &self.registry);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_metric_is_rendered_with_its_help_and_labels() {
        let metrics = Metrics::default();
        let worker = WorkerLabels { worker: "http://a:1".into() };
        metrics.processed.get_or_create(&worker).inc();
        let text = metrics.render(|_| {});
        assert!(text.contains("# HELP sgl_router_processed_requests Requests a worker answered"));
        assert!(text.contains(r#"sgl_router_processed_requests_total{worker="http://a:1"} 1"#));
    }
}
