//! What is counted of the requests of one route.
//!
//! The idea: a request finds its counters through two small maps, once. [`Route`] is made when the routes are,
//! [`Series`] when a model is first asked for there; both keep what they have looked up in the families.

use std::hash::Hash;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use hashbrown::HashMap;
use parking_lot::RwLock;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::{Family, MetricConstructor};
use prometheus_client::metrics::histogram::Histogram;

use super::Metrics;
use super::labels::{
    GenerationLabels, Http, PickLabels, Regular, RequestDurationLabels, RequestErrorLabels,
    RequestLabels, ResultLabels, RetryLabels, RouteLabels, StatusLabels, Text, TokenLabels,
    UpstreamLabels,
};

/// Models with a name of their own in metrics, first come; clients choose names freely.
pub const MODELS_MAX: usize = 64;
/// A longer name is one of the others.
const MODEL_BYTES_MAX: usize = 128;
/// The model of a request that names none.
pub const NO_MODEL: &str = "default";
const OTHER_MODELS: &str = "other";

/// The names that models have in metrics. Holds at most [`MODELS_MAX`] and two more.
#[derive(Debug)]
pub(super) struct Models(RwLock<HashMap<Box<str>, Arc<str>>>);

impl Default for Models {
    fn default() -> Self {
        let known = [NO_MODEL, OTHER_MODELS].map(|name| (name.into(), name.into()));
        Self(RwLock::new(known.into()))
    }
}

impl Models {
    fn name(&self, model: &str) -> Arc<str> {
        if let Some(name) = known(&self.0.read(), model) {
            return name;
        }
        let mut names = self.0.write();
        // Others may have taken the last place in between.
        known(&names, model).unwrap_or_else(|| {
            let name: Arc<str> = model.into();
            names.insert(model.into(), name.clone());
            name
        })
    }
}

/// The name of a model that needs no new one.
fn known(names: &HashMap<Box<str>, Arc<str>>, model: &str) -> Option<Arc<str>> {
    let is_among_others = model.len() > MODEL_BYTES_MAX || names.len() >= MODELS_MAX + 2;
    let others = || names.get(OTHER_MODELS).filter(|_| is_among_others);
    names.get(model).or_else(others).cloned()
}

/// One metric of a family, looked up when it is first counted.
#[derive(Debug)]
struct Lazy<M>(OnceLock<M>);

impl<M> Default for Lazy<M> {
    fn default() -> Self {
        Self(OnceLock::new())
    }
}

impl<M: Clone> Lazy<M> {
    fn of<L, C>(&self, family: &Family<L, M, C>, labels: impl FnOnce() -> L) -> &M
    where
        L: Clone + Hash + Eq,
        C: MetricConstructor<M>,
    {
        self.0.get_or_init(|| family.get_or_create_owned(&labels()))
    }
}

/// Counts one of a family, by way of the one that is kept if it is that.
fn count<L>(family: &Family<L, Counter>, kept: Option<&Lazy<Counter>>, labels: impl FnOnce() -> L)
where
    L: Clone + Hash + Eq,
{
    match kept {
        Some(kept) => kept.of(family, labels).inc(),
        None => family.get_or_create(&labels()).inc(),
    };
}

/// One routed route.
#[derive(Debug)]
pub struct Route {
    pub path: Arc<str>,
    endpoint: &'static str,
    metrics: Arc<Metrics>,
    requests: Lazy<Counter>,
    allowed: Lazy<Counter>,
    answered_200: Lazy<Counter>,
    ended_200: Lazy<Counter>,
    duration: Lazy<Histogram>,
    retries: Lazy<Counter>,
    /// By the model's name in metrics, so as many at most as there are of those.
    series: RwLock<HashMap<Arc<str>, Arc<Series>>>,
}

impl Route {
    pub fn new(metrics: &Arc<Metrics>, path: &str) -> Arc<Self> {
        Arc::new(Self {
            path: path.into(),
            endpoint: endpoint(path),
            metrics: metrics.clone(),
            requests: Lazy::default(),
            allowed: Lazy::default(),
            answered_200: Lazy::default(),
            ended_200: Lazy::default(),
            duration: Lazy::default(),
            retries: Lazy::default(),
            series: RwLock::default(),
        })
    }

    /// A request has arrived.
    pub fn arrived(&self) {
        self.requests.of(&self.metrics.requests, || self.labels()).inc();
        self.metrics.in_flight.inc();
    }

    /// It was let in.
    pub fn allowed(&self) {
        let labels = || ResultLabels { result: "allowed" };
        self.allowed.of(&self.metrics.rate_limit, labels).inc();
    }

    /// The head of a worker's answer came.
    pub fn answered(&self, status_code: u16) {
        let labels = || UpstreamLabels { router_type: Http, status_code };
        let kept = (status_code == 200).then_some(&self.answered_200);
        count(&self.metrics.upstream_responses, kept, labels);
    }

    /// It has ended; called once for each that arrived.
    pub fn ended(&self, status_code: u16, error_code: &'static str, took: Duration) {
        let labels = || StatusLabels { status_code, error_code };
        let kept = ((status_code, error_code) == (200, "")).then_some(&self.ended_200);
        count(&self.metrics.responses, kept, labels);
        let duration = self.duration.of(&self.metrics.request_duration, || self.labels());
        duration.observe(took.as_secs_f64());
        self.metrics.in_flight.dec();
    }

    /// An attempt follows another one.
    pub fn retried(&self) {
        self.retries.of(&self.metrics.retries, || self.retry_labels()).inc();
    }

    /// The last attempt that is allowed has failed.
    pub fn exhausted(&self) {
        self.metrics.retries_exhausted.get_or_create(&self.retry_labels()).inc();
    }

    /// What is counted of requests that ask for this model.
    pub fn series(&self, model: Option<&str>) -> Arc<Series> {
        let model = model.unwrap_or(NO_MODEL);
        let known = |name: &str| self.series.read().get(name).cloned();
        if let Some(series) = known(model) {
            return series;
        }
        let model = self.metrics.models.name(model);
        if let Some(series) = known(&model) {
            return series;
        }
        let mut all = self.series.write();
        let new = || Series::new(self.metrics.clone(), self.endpoint, model.clone());
        all.entry(model.clone()).or_insert_with(|| Arc::new(new())).clone()
    }

    fn labels(&self) -> RouteLabels {
        RouteLabels { method: "POST", path: Text(self.path.clone()) }
    }

    fn retry_labels(&self) -> RetryLabels {
        RetryLabels { worker_type: Regular, endpoint: self.endpoint }
    }
}

/// The route as `sglang-router` calls it in its metrics.
fn endpoint(path: &str) -> &'static str {
    match path {
        "/generate" => "generate",
        "/v1/chat/completions" => "chat",
        "/v1/completions" => "completions",
        "/v1/responses" => "responses",
        "/v1/embeddings" => "embeddings",
        "/rerank" | "/v1/rerank" => "rerank",
        "/classify" | "/v1/classify" => "classify",
        _ => "other",
    }
}

/// One route and model.
#[derive(Debug)]
pub struct Series {
    metrics: Arc<Metrics>,
    endpoint: &'static str,
    model: Text,
    streamed: Lazy<Counter>,
    unstreamed: Lazy<Counter>,
    duration: Lazy<Histogram>,
    ttft: Lazy<Histogram>,
    tpot: Lazy<Histogram>,
    generation: Lazy<Histogram>,
    input_tokens: Lazy<Counter>,
    output_tokens: Lazy<Counter>,
    picks: Lazy<Counter>,
}

impl Series {
    fn new(metrics: Arc<Metrics>, endpoint: &'static str, model: Arc<str>) -> Self {
        Self {
            metrics,
            endpoint,
            model: Text(model),
            streamed: Lazy::default(),
            unstreamed: Lazy::default(),
            duration: Lazy::default(),
            ttft: Lazy::default(),
            tpot: Lazy::default(),
            generation: Lazy::default(),
            input_tokens: Lazy::default(),
            output_tokens: Lazy::default(),
            picks: Lazy::default(),
        }
    }

    /// A request has been read.
    pub fn asked(&self, streaming: bool) {
        let counter = if streaming { &self.streamed } else { &self.unstreamed };
        let labels = || RequestLabels {
            router_type: Http,
            backend_type: Regular,
            connection_mode: Http,
            model: self.model.clone(),
            endpoint: self.endpoint,
            streaming,
        };
        counter.of(&self.metrics.routed, labels).inc();
    }

    /// It has ended.
    pub fn ended(&self, error_type: Option<&'static str>, took: Duration) {
        let labels = || RequestDurationLabels {
            router_type: Http,
            backend_type: Regular,
            connection_mode: Http,
            model: self.model.clone(),
            endpoint: self.endpoint,
        };
        self.duration.of(&self.metrics.duration, labels).observe(took.as_secs_f64());
        if let Some(error_type) = error_type {
            let labels = RequestErrorLabels {
                router_type: Http,
                backend_type: Regular,
                connection_mode: Http,
                model: self.model.clone(),
                endpoint: self.endpoint,
                error_type,
            };
            self.metrics.errors.get_or_create(&labels).inc();
        }
    }

    /// The policy picked a worker.
    pub fn picked(&self, policy: &'static str) {
        self.picks.of(&self.metrics.picks, || self.pick_labels(policy)).inc();
    }

    /// The request had named its worker itself.
    pub fn pinned(&self) {
        self.metrics.picks.get_or_create(&self.pick_labels("pinned")).inc();
    }

    /// The first frame with content came, so long after the request.
    pub fn first_content(&self, after: Duration) {
        self.ttft.of(&self.metrics.ttft, || self.labels()).observe(after.as_secs_f64());
    }

    /// A stream has come to its end, so long after the request and after its first content.
    pub fn streamed(
        &self,
        took: Duration,
        generated_for: Duration,
        completion_tokens: Option<u32>,
    ) {
        self.generation.of(&self.metrics.generation, || self.labels()).observe(took.as_secs_f64());
        if let Some(further @ 1..) = completion_tokens.map(|tokens| tokens.saturating_sub(1)) {
            let tpot = generated_for.as_secs_f64() / f64::from(further);
            self.tpot.of(&self.metrics.tpot, || self.labels()).observe(tpot);
        }
    }

    /// The tokens that the worker told of.
    pub fn tokens(&self, input: Option<u32>, output: Option<u32>) {
        let counted =
            [(&self.input_tokens, "input", input), (&self.output_tokens, "output", output)];
        for (counter, token_type, tokens) in counted {
            let Some(tokens) = tokens else { continue };
            let labels = || TokenLabels {
                router_type: Http,
                backend_type: Regular,
                model: self.model.clone(),
                endpoint: self.endpoint,
                token_type,
            };
            counter.of(&self.metrics.tokens, labels).inc_by(u64::from(tokens));
        }
    }

    fn labels(&self) -> GenerationLabels {
        GenerationLabels {
            router_type: Http,
            backend_type: Regular,
            model: self.model.clone(),
            endpoint: self.endpoint,
        }
    }

    fn pick_labels(&self, policy: &'static str) -> PickLabels {
        PickLabels {
            worker_type: Regular,
            connection_mode: Http,
            model: self.model.clone(),
            policy,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::metrics::tests::rendered;

    fn metrics() -> Arc<Metrics> {
        Arc::default()
    }

    #[test]
    fn models_beyond_the_bound_are_counted_together() {
        let metrics = metrics();
        let route = Route::new(&metrics, "/generate");
        for model in 0..200 {
            route.series(Some(&format!("m{model}"))).asked(false);
            route.series(Some(&"long".repeat(100))).asked(true);
        }
        route.series(None).asked(false);
        assert_eq!(metrics.models.0.read().len(), MODELS_MAX + 2);
        assert_eq!(route.series.read().len(), MODELS_MAX + 2);
        let text = rendered(&metrics);
        let line = |model: &str, streaming: bool, count: u32| {
            let line = format!(
                "smg_router_requests_total{{router_type=\"http\",backend_type=\"regular\",\
                 connection_mode=\"http\",model=\"{model}\",endpoint=\"generate\",\
                 streaming=\"{streaming}\"}} {count}\n"
            );
            assert!(text.contains(&line), "{line} is not in\n{text}");
        };
        line("m0", false, 1);
        line("m63", false, 1);
        line("other", false, 136);
        line("other", true, 200);
        line("default", false, 1);
    }

    #[test]
    fn a_model_cannot_break_the_text() {
        let metrics = metrics();
        Route::new(&metrics, "/x").series(Some("a\"b\\c\nd\u{1}")).asked(false);
        assert!(rendered(&metrics).contains("model=\"a\\\"b\\\\c\\nd\u{1}\""));
    }

    #[test]
    fn time_per_token_needs_two_tokens() {
        let metrics = metrics();
        let series = Route::new(&metrics, "/generate").series(None);
        let second = Duration::from_secs(1);
        for tokens in [None, Some(0), Some(1), Some(5)] {
            series.streamed(2 * second, second, tokens);
        }
        let text = rendered(&metrics);
        let labels =
            r#"{router_type="http",backend_type="regular",model="default",endpoint="generate"}"#;
        for line in [
            format!("smg_router_generation_duration_seconds_count{labels} 4"),
            format!("smg_router_tpot_seconds_count{labels} 1"),
            format!("smg_router_tpot_seconds_sum{labels} 0.25"),
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
    }
}
