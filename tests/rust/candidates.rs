//! What a policy chose among, in the trace of the request it chose for.

use std::fs;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{Exchange, Router, ScriptedWorker, Wire, ok, request};

const ALL: &str = "--trace-candidates=-1";

/// Sends a request to this worker, which keeps its client waiting.
async fn hold(
    router: &Router,
    worker: &mut ScriptedWorker,
    id: &str,
    body: &str,
) -> (Wire, Exchange) {
    let mut client = router.connect().await;
    let headers = [("x-request-id", id), ("x-sglang-target-worker", worker.url.as_str())];
    client.send(request("POST /generate", &headers, body)).await;
    (client, worker.request().await)
}

/// Sends a request wherever the policy wants it; its trace once it has ended.
async fn ask(router: &Router, workers: &mut [ScriptedWorker], id: &str, body: &str) -> Value {
    let mut client = router.connect().await;
    client.send(request("POST /generate", &[("x-request-id", id)], body)).await;
    let (exchange, _) = ScriptedWorker::request_at_any(workers).await;
    exchange.answer(ok("{}")).await;
    assert_eq!(client.answer().await.status(), 200);
    router.trace_when(id, "completed").await
}

/// Of each candidate the place of its worker, what is in flight there, matched tokens, score, and whether it was
/// chosen.
fn told(trace: &Value, workers: &[ScriptedWorker]) -> Vec<Value> {
    let candidates = trace["candidates"].as_array().expect("a list");
    let row = |candidate: &Value| {
        let place = workers.iter().position(|worker| candidate["worker_url"] == worker.url);
        let place = place.expect("one of the workers");
        assert_eq!(candidate["node_id"], format!("gpu_{place}"));
        assert_eq!(candidate.as_object().map(serde_json::Map::len), Some(9), "{candidate}");
        let names = ["in_flight", "matched_tokens", "score", "chosen"];
        let rest = names.map(|name| candidate[name].clone());
        json!([place, rest[0], rest[1], rest[2], rest[3]])
    };
    candidates.iter().map(row).collect()
}

#[tokio::test]
async fn the_loads_are_those_that_the_policy_saw() {
    let mut workers = ScriptedWorker::several::<3>().await;
    let router = Router::before(&workers, &["--policy=shortest_queue", ALL]).await;
    let mut held = Vec::new();
    for (id, at) in [("a", 0), ("b", 0), ("c", 1)] {
        held.push(hold(&router, &mut workers[at], id, "{}").await);
    }
    let trace = ask(&router, &mut workers, "x", "{}").await;
    let expected = [
        json!([2, 0, null, 0.0, true]),
        json!([1, 1, null, 1.0, false]),
        json!([0, 2, null, 2.0, false]),
    ];
    assert_eq!(told(&trace, &workers), expected);
    assert!(router.trace_now("a").await["candidates"].is_null(), "it named its worker itself");
}

#[tokio::test]
async fn what_each_worker_has_of_the_prompt_is_told() {
    let mut workers = ScriptedWorker::several::<2>().await;
    let router = Router::before(&workers, &["--policy=cache_aware", ALL]).await;
    let (whole, half) = (r#"{"text":"aaaabbbbccccdddd"}"#, r#"{"text":"aaaabbbb"}"#);
    let _held = [
        hold(&router, &mut workers[0], "half", half).await,
        hold(&router, &mut workers[1], "whole", whole).await,
    ];
    let trace = ask(&router, &mut workers, "x", whole).await;
    assert_eq!((&trace["reason"], &trace["matched_tokens"]), (&json!("prefix_match"), &json!(4)));
    let expected = [json!([1, 1, 4, 1.0, true]), json!([0, 1, 2, 0.5, false])];
    assert_eq!(told(&trace, &workers), expected);
}

#[tokio::test]
async fn of_a_rule_that_compares_nothing_the_chosen_one_comes_first() {
    let mut workers = ScriptedWorker::several::<3>().await;
    let router = Router::before(&workers, &["--trace-candidates=2"]).await;
    for (id, first, second) in [("a", 0, 1), ("b", 1, 0), ("c", 2, 0)] {
        let trace = ask(&router, &mut workers, id, "{}").await;
        let expected = [json!([first, 0, null, null, true]), json!([second, 0, null, null, false])];
        assert_eq!(told(&trace, &workers), expected);
    }
}

#[tokio::test]
async fn after_another_attempt_they_are_those_of_the_last_pick() {
    let mut workers = ScriptedWorker::several::<3>().await;
    let router = Router::before(&workers, &[ALL]).await;
    let mut client = router.connect().await;
    client.send(request("POST /generate", &[("x-request-id", "x")], "{}")).await;
    drop(workers[0].request().await);
    workers[1].request().await.answer(ok("{}")).await;
    assert_eq!(client.answer().await.status(), 200);
    let trace = router.trace_when("x", "completed").await;
    let expected = [json!([1, 0, null, null, true]), json!([2, 0, null, null, false])];
    assert_eq!(told(&trace, &workers), expected);
}

#[tokio::test]
async fn a_request_without_a_pick_has_none() {
    let router = Router::start(&[], &[ALL, "--queue-timeout-secs=0"]);
    let headers = [("x-request-id", "x")];
    router.ask(request("POST /generate", &headers, "{}")).await;
    let trace = router.trace_when("x", "failed").await;
    assert!(trace["worker_url"].is_null() && trace["candidates"].is_null(), "{trace}");
}

#[tokio::test]
async fn export_and_log_have_them_too() {
    let folder = TempDir::new().expect("a temporary folder");
    let path = folder.path().join("traces.jsonl");
    let log = format!("--trace-log={}", path.display());
    let mut workers = ScriptedWorker::several::<2>().await;
    let router = Router::before(&workers, &[ALL, &log]).await;
    let trace = ask(&router, &mut workers, "x", "{}").await;

    let answer = router.get("/v1/traces?format=csv").await;
    let mut reader = csv::Reader::from_reader(answer.body.as_slice());
    let columns = reader.headers().expect("a line of names").clone();
    let row = reader.records().next().expect("a line").expect("a row");
    let column = columns.iter().position(|name| name == "candidates").expect("a column");
    let cell: Value = serde_json::from_str(&row[column]).expect("JSON");
    assert_eq!(cell, trace["candidates"]);

    drop(router);
    let line = fs::read_to_string(&path).expect("a file of text");
    assert_eq!(serde_json::from_str::<Value>(&line).expect("JSON"), trace);
}
