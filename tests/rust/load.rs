//! Many requests at once, through each policy: the trace says what the worker says, of every one.

use std::collections::{BTreeMap, HashMap, HashSet};

use serde_json::{Value, json};
use sglang_router_rs::routing::PolicyKind;
use sglang_router_rs::sim::{Faults, Options};
use tokio::task::JoinSet;

use crate::support::{Message, Router, Simulated, Wire, request, until};

const REQUESTS: usize = 2_000;
/// Two ends of each client's and each worker's connection.
const FILES: u64 = 4 * REQUESTS as u64 + 500;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_trace_names_the_worker_that_served() {
    let files_allowed = rlimit::increase_nofile_limit(u64::MAX).expect("a limit");
    assert!(files_allowed >= FILES, "this test needs {FILES} open files: ulimit -n {FILES}");
    for policy in PolicyKind::ALL {
        one_policy(policy.name()).await;
    }
}

async fn one_policy(policy: &str) {
    let sims = Simulated::start(3).await;
    let router = Router::ready(&sims.urls(), &[&format!("--policy={policy}"), "--seed=1"]).await;
    let address = router.address;
    let mut clients = JoinSet::new();
    for number in 0..REQUESTS {
        clients.spawn(async move {
            let mut wire = Wire::connect(address).await;
            let answer = wire.ask(ask(number)).await;
            (number, told_port(number, &answer), answer)
        });
    }
    let answers = clients.join_all().await;

    let mut told: BTreeMap<String, u64> = BTreeMap::new();
    let mut of_request: HashMap<String, String> = HashMap::new();
    for (number, port, answer) in &answers {
        assert!(answer.is_whole, "{policy} {number}");
        let url = format!("http://127.0.0.1:{port}");
        assert_eq!(answer.header("x-sglang-worker").as_deref(), Some(url.as_str()), "{policy}");
        assert_eq!(answer.header("x-sim-port"), Some(port.to_string()), "{policy}");
        assert_eq!(answer.header("x-request-id"), Some(id(*number)));
        *told.entry(url.clone()).or_default() += 1;
        of_request.insert(id(*number), url);
    }
    assert_eq!(of_request.len(), REQUESTS);

    let served = router.until_idle().await;
    for (url, served, failed) in &served {
        assert_eq!((*served, *failed), (told.get(url).copied().unwrap_or(0), 0), "{policy} {url}");
    }
    check_traces(&router, policy, &of_request).await;
    check_stats(&router, policy, &told).await;
}

async fn check_traces(router: &Router, policy: &str, of_request: &HashMap<String, String>) {
    let export = router.get("/v1/traces?format=jsonl").await;
    let mut seen = HashSet::new();
    for line in export.text().lines() {
        let trace: Value = serde_json::from_str(line).expect("a trace");
        let id = trace["request_id"].as_str().expect("an id");
        assert!(seen.insert(id.to_owned()), "{policy}: {id} twice");
        assert_eq!(trace["worker_url"], of_request[id], "{policy}");
        assert_eq!(
            (trace["status"].as_str(), trace["routing_policy"].as_str()),
            (Some("completed"), Some(policy))
        );
        assert_eq!(trace["attempts"].as_array().map(Vec::len), Some(1));
        assert_eq!(trace["completion_tokens"], 3, "{trace}");
        assert!(trace["reason"].is_string() && trace["latency_ms"].is_f64());
        assert_eq!(trace["ttft_ms"].is_f64(), trace["stream"] == true, "{trace}");
    }
    assert_eq!(seen.len(), REQUESTS, "{policy}");
}

async fn check_stats(router: &Router, policy: &str, told: &BTreeMap<String, u64>) {
    let stats = router.json("/v1/traces/stats").await;
    assert_eq!(
        (&stats["total_requests"], &stats["in_flight"]),
        (&REQUESTS.into(), &0.into()),
        "{policy}"
    );
    let statuses = stats["requests_per_status"].as_object().expect("an object");
    assert_eq!(statuses["completed"], REQUESTS, "{policy}");
    assert_eq!(statuses.values().filter_map(Value::as_u64).sum::<u64>(), REQUESTS as u64);
    let nodes = stats["requests_per_node"].as_object().expect("an object");
    let mut counts: Vec<u64> =
        nodes.values().filter_map(Value::as_u64).filter(|count| *count > 0).collect();
    let mut expected: Vec<u64> = told.values().copied().collect();
    counts.sort_unstable();
    expected.sort_unstable();
    assert_eq!(counts, expected, "{policy}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn endings_of_all_kinds_leave_nothing_open() {
    let none = Options::default().faults;
    let sound = Simulated::start(1).await;
    let failing = Simulated::start_with(1, Faults { fail_rate: 0.5, ..none.clone() }).await;
    let dying = Simulated::start_with(1, Faults { die_after_chunks: 2, ..none }).await;
    let urls = [&*sound.urls[0], &*failing.urls[0], &*dying.urls[0]];
    let router = Router::ready(&urls, &["--policy=power_of_two", "--seed=1"]).await;
    let address = router.address;
    let mut clients = JoinSet::new();
    for number in 0..400 {
        clients.spawn(async move {
            let mut wire = Wire::connect(address).await;
            wire.send(ask(number)).await;
            // One in five leaves at once, one in five as soon as an answer begins.
            match number % 5 {
                0 => None,
                1 => wire.head().await.and(None),
                _ => Some((number, wire.answer().await)),
            }
        });
    }
    let answers = clients.join_all().await;

    // A client that left may not have been noticed yet; then the counts do not add up yet.
    let traces = until("all counts to add up", async || {
        let stats = router.json("/v1/traces/stats").await;
        let served: u64 = router.until_idle().await.iter().map(|(_, served, _)| served).sum();
        let traces = exported(&router).await;
        let completed = traces.values().filter(|trace| trace["status"] == "completed").count();
        let adds_up = stats["in_flight"] == 0
            && stats["total_requests"] == traces.len()
            && served == completed as u64;
        adds_up.then_some(traces)
    })
    .await;
    for (number, answer) in answers.into_iter().flatten() {
        let trace = &traces[&id(number)];
        let is_good =
            answer.status() == 200 && answer.is_whole && !answer.text().contains(r#"{"error":"#);
        assert_eq!(trace["status"], if is_good { "completed" } else { "failed" }, "{trace}");
        assert_eq!(trace["http_status"], answer.status());
        assert_eq!(trace["worker_url"].as_str(), answer.header("x-sglang-worker").as_deref());
    }
    assert!(traces.values().all(|trace| trace["completion_time"].is_string()));
}

/// All traces, by id.
async fn exported(router: &Router) -> HashMap<String, Value> {
    let export = router.get("/v1/traces?format=jsonl").await.text();
    let traces = export.lines().map(|line| serde_json::from_str::<Value>(line).expect("a trace"));
    traces.map(|trace| (trace["request_id"].as_str().expect("an id").to_owned(), trace)).collect()
}

fn id(number: usize) -> String {
    format!("load-{number}")
}

/// Half of the requests ask for a stream, half of each kind for a chat.
fn ask(number: usize) -> Vec<u8> {
    let stream = number.is_multiple_of(2);
    let text = format!("group {} and question {number}", number % 7);
    let (path, body) = if is_chat(number) {
        let body = json!({
            "model": "m", "messages": [{"role": "user", "content": text}], "max_tokens": 3, "stream": stream,
            "stream_options": {"include_usage": true},
        });
        ("/v1/chat/completions", body)
    } else {
        (
            "/generate",
            json!({"text": text, "sampling_params": {"max_new_tokens": 3}, "stream": stream}),
        )
    };
    let headers = [("x-request-id", &*id(number)), ("content-type", "application/json")];
    request(&format!("POST {path}"), &headers, body.to_string())
}

fn is_chat(number: usize) -> bool {
    number % 4 >= 2
}

/// The port that the answer's body names.
fn told_port(number: usize, answer: &Message) -> u64 {
    assert_eq!(answer.status(), 200, "{}", answer.text());
    let text = answer.text();
    let json: Value = if number.is_multiple_of(2) {
        let mut frames = text.lines().filter_map(|line| line.strip_prefix("data: ")).rev();
        assert_eq!(frames.next(), Some("[DONE]"));
        serde_json::from_str(frames.next().expect("a frame")).expect("a frame of JSON")
    } else {
        answer.json()
    };
    let port =
        if is_chat(number) { &json["worker_port"] } else { &json["meta_info"]["worker_port"] };
    port.as_u64().expect("a port")
}
