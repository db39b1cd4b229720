//! What `/metrics` counts, that its text is what the format says, and that the dashboard asks for nothing else.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use sglang_router_rs::telemetry::metrics::described;

use crate::support::{Router, ScriptedWorker, Simulated, ok, request, until};

const OVERLOADED: &str = "HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n";

/// A scraped text, checked against the format and the declarations.
struct Scrape {
    samples: BTreeMap<Sample, f64>,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Sample {
    name: String,
    labels: BTreeMap<String, String>,
}

impl Sample {
    /// Reads `name{label="value",…}`.
    fn parse(text: &str) -> Sample {
        let Some((name, labels)) = text.split_once('{') else {
            return Sample { name: text.to_owned(), labels: BTreeMap::new() };
        };
        let labels = labels.strip_suffix('}').expect("a closing brace");
        let mut read = BTreeMap::new();
        let mut rest = labels;
        while !rest.is_empty() {
            let (label, after) = rest.split_once("=\"").expect("a value in quotes");
            let end = (0..after.len()).find(|at| {
                let escapes = after[..*at].bytes().rev().take_while(|byte| *byte == b'\\').count();
                after.as_bytes()[*at] == b'"' && escapes % 2 == 0
            });
            let (value, after) = after.split_at(end.expect("a closing quote"));
            let is_new = read.insert(label.to_owned(), value.to_owned()).is_none();
            assert!(is_new, "{label} twice in {text}");
            rest = after[1..].strip_prefix(',').unwrap_or(&after[1..]);
        }
        Sample { name: name.to_owned(), labels: read }
    }

    fn without(&self, label: &str) -> Sample {
        let mut sample = self.clone();
        sample.labels.remove(label);
        sample
    }
}

impl Scrape {
    async fn of(router: &Router) -> Scrape {
        let answer = router.get("/metrics").await;
        assert!(answer.header("content-type").is_some_and(|it| it.contains("openmetrics")));
        Scrape::parse(&answer.text())
    }

    fn parse(text: &str) -> Scrape {
        let body = text.strip_suffix("# EOF\n").expect("an end");
        let mut samples = BTreeMap::new();
        let mut families = BTreeSet::new();
        let mut family = ("", "");
        for line in body.lines() {
            if let Some(help) = line.strip_prefix("# HELP ") {
                let (name, meaning) = help.split_once(' ').expect("a meaning");
                assert!(!meaning.is_empty() && families.insert(name), "{line}");
                family = (name, "");
            } else if let Some(kind) = line.strip_prefix("# TYPE ") {
                let (name, kind) = kind.split_once(' ').expect("a type");
                assert_eq!((family, name), ((name, ""), family.0), "one TYPE after its HELP");
                family = (name, kind);
            } else {
                let (sample, value) = line.rsplit_once(' ').expect("a value");
                let sample = Sample::parse(sample);
                check_sample(family, &sample);
                let value = value.parse().expect("a number");
                assert!(samples.insert(sample, value).is_none(), "twice: {line}");
            }
        }
        check_histograms(&samples);
        Scrape { samples }
    }

    /// The sum over all samples of this name that have these labels; None if there is none.
    fn sum(&self, sample: &str) -> Option<f64> {
        let wanted = Sample::parse(sample);
        let is_meant = |found: &Sample| {
            found.name == wanted.name
                && wanted.labels.iter().all(|(label, value)| found.labels.get(label) == Some(value))
        };
        let values: Vec<f64> = self
            .samples
            .iter()
            .filter(|(sample, _)| is_meant(sample))
            .map(|(_, value)| *value)
            .collect();
        (!values.is_empty()).then(|| values.iter().sum())
    }

    fn assert(&self, expected: &[(&str, f64)]) {
        for (sample, value) in expected {
            assert_eq!(self.sum(sample), Some(*value), "{sample} in {:#?}", self.samples);
        }
    }
}

/// A sample stands under its family, and has the name and the labels that are declared for it.
fn check_sample((family, kind): (&str, &str), sample: &Sample) {
    let suffix = sample.name.strip_prefix(family).expect("a sample of its family");
    let suffixes: &[&str] = match kind {
        "counter" => &["_total"],
        "gauge" => &[""],
        "histogram" => &["_bucket", "_sum", "_count"],
        _ => panic!("{family} is a {kind}"),
    };
    assert!(suffixes.contains(&suffix), "{sample:?} of the {kind} {family}");
    let name = if kind == "counter" { &sample.name } else { family };
    let declared = described().find(|declared| declared.name() == name);
    let declared = declared.unwrap_or_else(|| panic!("{name} is not declared"));
    assert_eq!(declared.kind, kind);
    let mut labels: BTreeSet<&str> = declared.labels.iter().copied().collect();
    if suffix == "_bucket" {
        labels.insert("le");
    }
    let found: BTreeSet<&str> = sample.labels.keys().map(String::as_str).collect();
    assert_eq!(found, labels, "{sample:?}");
}

fn check_histograms(samples: &BTreeMap<Sample, f64>) {
    let mut last: BTreeMap<Sample, Vec<(f64, f64)>> = BTreeMap::new();
    for (sample, value) in samples.iter().filter(|(sample, _)| sample.name.ends_with("_bucket")) {
        let bound = sample.labels["le"].replace("+Inf", "inf").parse().expect("a bound");
        last.entry(sample.without("le")).or_default().push((bound, *value));
    }
    for (mut sample, mut buckets) in last {
        buckets.sort_by(|one, other| one.0.total_cmp(&other.0));
        assert!(buckets.is_sorted_by_key(|(_, count)| *count), "{sample:?}: {buckets:?}");
        sample.name = sample.name.replace("_bucket", "_count");
        let whole = samples.get(&sample).expect("a count");
        assert_eq!(buckets.last(), Some(&(f64::INFINITY, *whole)), "{sample:?}");
    }
}

#[tokio::test]
async fn the_format_is_read_with_care() {
    let text = "# HELP x_y z\n# TYPE x_y gauge\n";
    assert!(Scrape::parse(&format!("{text}# EOF\n")).samples.is_empty());
    let odd = Sample::parse(r#"a{b="c\"},d=\\",e=""}"#);
    assert_eq!(odd.labels["b"], r#"c\"},d=\\"#);
    assert_eq!(odd.labels["e"], "");
}

#[tokio::test]
async fn answers_are_counted_with_their_tokens_and_times() {
    let sims = Simulated::start(1).await;
    let router = Router::ready(&sims.urls(), &["--policy=cache_aware"]).await;
    let text = "the same words every time ".repeat(20);
    for stream in [false, true, true] {
        let body =
            json!({"text": text, "sampling_params": {"max_new_tokens": 4}, "stream": stream});
        assert_eq!(router.post("/generate", body.to_string()).await.status(), 200);
    }
    let body = json!({"model": "a\"b\\c", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2});
    assert_eq!(router.post("/v1/chat/completions", body.to_string()).await.status(), 200);
    let headers = [("x-sglang-target-worker", sims.urls[0].as_str())];
    let pinned = router.ask(request("POST /generate", &headers, r#"{"text":"hi"}"#)).await;
    assert_eq!(pinned.status(), 200);
    assert_eq!(router.post("/generate", "{").await.status(), 400);
    router.until_idle().await;

    let scrape = Scrape::of(&router).await;
    let worker = format!("worker=\"{}\"", sims.urls[0]);
    let named = |name: &str| format!("{name}{{{worker}}}");
    scrape.assert(&[
        ("smg_http_requests_total{path=\"/generate\"}", 5.0),
        ("smg_http_responses_total{status_code=\"200\",error_code=\"\"}", 5.0),
        ("smg_http_request_duration_seconds_count{path=\"/generate\"}", 5.0),
        ("smg_http_connections_active", 0.0),
        ("smg_http_rate_limit_total{result=\"allowed\"}", 6.0),
        ("smg_router_requests_total{endpoint=\"generate\",streaming=\"true\"}", 2.0),
        ("smg_router_requests_total{endpoint=\"generate\",streaming=\"false\"}", 3.0),
        (r#"smg_router_requests_total{endpoint="chat",model="a\"b\\c"}"#, 1.0),
        ("smg_router_request_errors_total{error_type=\"validation_error\"}", 1.0),
        ("smg_router_request_duration_seconds_count{model=\"default\"}", 5.0),
        ("smg_router_upstream_responses_total{status_code=\"200\"}", 5.0),
        ("smg_router_ttft_seconds_count{endpoint=\"generate\"}", 2.0),
        ("smg_router_tpot_seconds_count{endpoint=\"generate\"}", 2.0),
        ("smg_router_generation_duration_seconds_count", 2.0),
        ("smg_router_tokens_total{token_type=\"output\",endpoint=\"chat\"}", 2.0),
        ("smg_worker_selection_total{policy=\"cache_aware\"}", 5.0),
        ("smg_worker_selection_total{policy=\"pinned\"}", 1.0),
        ("sgl_router_selections_total", 6.0),
        ("sgl_router_selections_total{reason=\"prefix_match\"}", 2.0),
        ("sgl_router_decision_seconds_count", 6.0),
        ("sgl_router_queue_wait_seconds_count", 6.0),
        ("smg_worker_pool_size{worker_type=\"regular\"}", 1.0),
        (&named("smg_worker_health"), 1.0),
        (&named("smg_worker_requests_active"), 0.0),
        (&named("smg_worker_cb_state"), 0.0),
        (&named("smg_worker_cb_outcomes_total"), 5.0),
        (&named("smg_worker_cb_transitions_total"), 0.0),
        (&named("sgl_router_processed_requests_total"), 5.0),
        (&named("sgl_router_attempts_total"), 6.0),
        (&named("sgl_router_failed_attempts_total"), 0.0),
        (&format!("sgl_router_worker_state{{{worker},state=\"healthy\"}}"), 1.0),
        ("sgl_router_traces_held", 6.0),
        ("sgl_router_traces_evicted_total", 0.0),
        ("sgl_router_queue_depth", 0.0),
        ("sgl_router_buffered_bytes", 0.0),
        (&format!("sgl_router_build_info{{version=\"{}\"}}", env!("CARGO_PKG_VERSION")), 1.0),
    ]);
    assert!(scrape.sum("smg_worker_health_checks_total{result=\"success\"}") >= Some(1.0));
    assert!(scrape.sum("smg_router_tokens_total{token_type=\"input\"}") > Some(100.0));
    let prompt = scrape.sum(&named("sgl_router_prompt_tokens_total"));
    let cached = scrape.sum(&named("sgl_router_cached_tokens_total"));
    assert!(cached > Some(0.0) && prompt > cached, "{cached:?} of {prompt:?}");
    assert!(scrape.sum("process_open_fds") < scrape.sum("process_max_fds"));
}

#[tokio::test]
async fn failures_are_counted_where_they_happen() {
    let mut down = ScriptedWorker::start().await;
    let mut busy = ScriptedWorker::start().await;
    let flags = ["--retry-max-retries=3", "--retry-initial-backoff-ms=1"];
    let router = Router::ready(&[&down.url, &busy.url], &flags).await;
    down.go_down().await;
    let mut client = router.connect().await;
    client.send(request("POST /generate", &[], "{}")).await;
    // The other one is tried first or second, and is then the only one.
    for _ in 0..2 {
        busy.request().await.answer(OVERLOADED).await;
    }
    if let Some(third) = until_answer_or_request(&router, &mut busy).await {
        third.answer(OVERLOADED).await;
    }
    assert_eq!(client.answer().await.status(), 503);
    router.until_idle().await;

    let scrape = Scrape::of(&router).await;
    let refused = scrape.sum("smg_worker_errors_total{error_type=\"connection\"}").unwrap_or(0.0);
    let statuses = 3.0 - refused;
    scrape.assert(&[
        ("smg_http_responses_total{status_code=\"503\",error_code=\"\"}", 1.0),
        ("smg_router_request_errors_total{error_type=\"backend_error\"}", 1.0),
        ("smg_router_upstream_responses_total{status_code=\"503\"}", statuses),
        ("smg_worker_errors_total{error_type=\"status\"}", statuses),
        ("smg_worker_retries_total{endpoint=\"generate\"}", 2.0),
        ("smg_worker_retries_exhausted_total{endpoint=\"generate\"}", 1.0),
        ("sgl_router_attempts_total", 3.0),
        ("sgl_router_failed_attempts_total", 3.0),
    ]);
    assert!(scrape.sum("smg_worker_retry_backoff_seconds_count{attempt=\"3\"}") >= Some(1.0));
}

/// The worker's next request, or None once the router's one request has ended.
async fn until_answer_or_request(
    router: &Router,
    worker: &mut ScriptedWorker,
) -> Option<crate::support::Exchange> {
    until("an attempt or an end", async || {
        if let Some(exchange) = worker.request_now() {
            return Some(Some(exchange));
        }
        let scrape = Scrape::of(router).await;
        (scrape.sum("smg_http_connections_active") == Some(0.0)).then_some(None)
    })
    .await
}

#[tokio::test]
async fn a_breaker_is_seen_to_open() {
    let mut worker = ScriptedWorker::start().await;
    let flags = ["--disable-retries", "--cb-failure-threshold=2"];
    let router = Router::ready(&[&worker.url], &flags).await;
    for _ in 0..2 {
        let mut client = router.connect().await;
        client.send(request("POST /generate", &[], "{}")).await;
        let failure = "HTTP/1.1 500 Internal Server Error\r\ncontent-length: 0\r\n\r\n";
        worker.request().await.answer(failure).await;
        assert_eq!(client.answer().await.status(), 500);
    }
    assert_eq!(router.post("/generate", "{}").await.status(), 503);
    router.until_idle().await;
    Scrape::of(&router).await.assert(&[
        ("smg_worker_cb_state", 1.0),
        ("smg_worker_cb_transitions_total{from=\"closed\",to=\"open\"}", 1.0),
        ("smg_worker_cb_transitions_total", 1.0),
        ("smg_worker_cb_outcomes_total{outcome=\"failure\"}", 2.0),
        ("smg_worker_cb_consecutive_failures", 2.0),
        ("smg_worker_health", 1.0),
        ("smg_worker_errors_total{error_type=\"status\"}", 2.0),
        ("smg_worker_retries_exhausted_total", 2.0),
        ("smg_http_responses_total{error_code=\"no_available_workers\"}", 1.0),
        ("smg_router_request_errors_total{error_type=\"no_workers\"}", 1.0),
        ("smg_router_request_errors_total{error_type=\"backend_error\"}", 2.0),
    ]);
}

#[tokio::test]
async fn waiting_refused_and_leaving_requests_are_counted() {
    let mut worker = ScriptedWorker::start().await;
    let flags = ["--max-concurrent-requests=1", "--queue-size=1"];
    let router = Router::ready(&[&worker.url], &flags).await;
    let mut first = router.connect().await;
    first.send(request("POST /generate", &[], "{}")).await;
    let exchange = worker.request().await;
    let mut second = router.connect().await;
    second.send(request("POST /generate", &[], "{}")).await;
    until("a waiting request", async || {
        (Scrape::of(&router).await.sum("sgl_router_queue_depth") == Some(1.0)).then_some(())
    })
    .await;
    assert_eq!(router.post("/generate", "{}").await.status(), 429);
    let scrape = Scrape::of(&router).await;
    scrape.assert(&[
        ("smg_http_connections_active", 2.0),
        ("smg_http_rate_limit_total{result=\"allowed\"}", 1.0),
        ("smg_http_rate_limit_total{result=\"rejected\"}", 1.0),
        ("smg_router_request_errors_total{error_type=\"rejected\"}", 1.0),
        ("smg_worker_requests_active", 1.0),
        ("sgl_router_running_requests", 1.0),
    ]);
    assert!(scrape.sum("sgl_router_buffered_bytes") >= Some(4.0));
    drop(first);
    drop(exchange);
    worker.request().await.answer(ok("{}")).await;
    assert_eq!(second.answer().await.status(), 200);
    router.until_idle().await;
    Scrape::of(&router).await.assert(&[
        ("sgl_router_aborted_requests_total{cause=\"client\"}", 1.0),
        ("smg_http_responses_total{status_code=\"499\"}", 1.0),
        ("smg_router_request_errors_total{error_type=\"aborted\"}", 1.0),
        ("smg_http_connections_active", 0.0),
        ("sgl_router_queue_depth", 0.0),
        ("sgl_router_buffered_bytes", 0.0),
    ]);
}

#[tokio::test]
async fn a_worker_that_left_is_not_in_the_text() {
    let [stays, leaves] = [ScriptedWorker::start().await, ScriptedWorker::start().await];
    let router = Router::ready(&[&stays.url, &leaves.url], &[]).await;
    let names = async || -> BTreeSet<String> {
        let scrape = Scrape::of(&router).await;
        scrape.samples.keys().filter_map(|sample| sample.labels.get("worker").cloned()).collect()
    };
    assert_eq!(names().await, BTreeSet::from([stays.url.clone(), leaves.url.clone()]));
    assert_eq!(router.post(&format!("/remove_worker?url={}", leaves.url), "").await.status(), 200);
    until("the worker to be gone", async || {
        (names().await == BTreeSet::from([stays.url.clone()])).then_some(())
    })
    .await;
    Scrape::of(&router).await.assert(&[("smg_worker_pool_size", 1.0)]);
}

#[tokio::test]
async fn without_tracking_tokens_and_times_are_counted_all_the_same() {
    let sims = Simulated::start(1).await;
    let router = Router::ready(&sims.urls(), &["--enable-request-tracking=false"]).await;
    let body = r#"{"text":"hi","sampling_params":{"max_new_tokens":3},"stream":true}"#;
    assert_eq!(router.post("/generate", body).await.status(), 200);
    router.until_idle().await;
    let scrape = Scrape::of(&router).await;
    scrape.assert(&[
        ("smg_router_ttft_seconds_count", 1.0),
        ("smg_router_tokens_total{token_type=\"output\"}", 3.0),
    ]);
    assert_eq!(scrape.sum("sgl_router_traces_held"), None);
}

#[tokio::test]
async fn chosen_buckets_are_used() {
    let sims = Simulated::start(1).await;
    let flags = ["--prometheus-duration-buckets", "0.25", "1000"];
    let router = Router::ready(&sims.urls(), &flags).await;
    assert_eq!(router.post("/generate", r#"{"text":"hi"}"#).await.status(), 200);
    router.until_idle().await;
    let scrape = Scrape::of(&router).await;
    let bounds: BTreeSet<&str> = scrape
        .samples
        .keys()
        .filter(|sample| sample.name == "smg_router_request_duration_seconds_bucket")
        .map(|sample| sample.labels["le"].as_str())
        .collect();
    assert_eq!(bounds, BTreeSet::from(["0.25", "1000.0", "+Inf"]));
}

/// Every `expr` of a dashboard's panels and every query of its variables.
fn expressions(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                match value {
                    Value::String(text) if name == "expr" || name == "query" => {
                        found.push(text.clone());
                    }
                    value => expressions(value, found),
                }
            }
        }
        Value::Array(items) => items.iter().for_each(|item| expressions(item, found)),
        _ => {}
    }
}

#[test]
fn the_dashboard_asks_for_metrics_and_labels_that_there_are() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let path = root.join("deploy/grafana/sglang_router_rs.json");
    let dashboard: Value =
        serde_json::from_str(&fs::read_to_string(path).expect("a file")).expect("JSON");
    let alerts = fs::read_to_string(root.join("docs/monitoring.md")).expect("a page");
    let mut asked = Vec::new();
    expressions(&dashboard, &mut asked);
    assert!(asked.len() > 15, "the dashboard was not understood");
    asked.extend(alerts.split('`').skip(1).step_by(2).map(str::to_owned));
    let is_part = |letter: char| letter.is_ascii_alphanumeric() || letter == '_';
    let mut names = BTreeSet::new();
    for expression in &asked {
        let is_metric = |word: &&str| {
            ["smg_", "sgl_router_", "process_"].iter().any(|prefix| word.starts_with(prefix))
                && !word.ends_with('_')
        };
        for word in expression.split(|letter| !is_part(letter)).filter(is_metric) {
            let metric = described().find(|metric| {
                let suffixes: &[&str] = match metric.kind {
                    "histogram" => &["_bucket", "_sum", "_count"],
                    _ => &[""],
                };
                suffixes.iter().any(|suffix| format!("{}{suffix}", metric.name()) == word)
            });
            let metric = metric.unwrap_or_else(|| panic!("{word} is no metric: {expression}"));
            names.insert(metric.name());
        }
        let labels: BTreeSet<&str> = described()
            .flat_map(|metric| metric.labels)
            .copied()
            .chain(["le", "instance", "job"])
            .collect();
        for by in expression.split("by (").skip(1) {
            let by = by.split(')').next().unwrap_or_default();
            for label in by.split(',').map(str::trim) {
                assert!(labels.contains(label), "{label} is no label: {expression}");
            }
        }
    }
    assert!(names.len() > 20, "{names:?}");
}
