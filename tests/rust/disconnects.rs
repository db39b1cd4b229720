//! Endings that nobody wanted: clients that leave, workers that die, requests that take too long, refusals.

use serde_json::Value;

use crate::support::{Message, Router, ScriptedWorker, Wire, chunked, request};

const STREAM_HEAD: &str =
    "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";

async fn pair(flags: &[&str]) -> (ScriptedWorker, Router) {
    let worker = ScriptedWorker::start().await;
    let router = Router::ready(&[&worker.url], flags).await;
    (worker, router)
}

async fn begin(router: &Router, id: &str) -> Wire {
    let mut client = router.connect().await;
    let headers = [("x-request-id", id)];
    client.send(request("POST /generate", &headers, r#"{"text":"x","stream":true}"#)).await;
    client
}

/// The error in the last event of a stream that began with these bytes and was ended by the router.
fn error_event(answer: &Message, begun: &str) -> Value {
    assert!(answer.is_whole, "the stream has an end: {}", answer.text());
    let text = answer.text();
    let event = text.strip_prefix(begun).expect("what the worker sent, first");
    let data = event.strip_prefix("data: ").and_then(|data| data.strip_suffix("\n\n"));
    let json: Value = serde_json::from_str(data.expect("one event")).expect("JSON");
    json["error"].clone()
}

/// The trace of a request that failed with these words, after which nothing is in flight.
async fn failed(router: &Router, id: &str, words: &str) -> Value {
    let trace = router.trace_when(id, "failed").await;
    let message = trace["error_message"].as_str().expect("a message");
    assert!(message.contains(words), "{message}");
    assert!(trace["latency_ms"].is_f64() && trace["completion_time"].is_string());
    router.until_idle().await;
    router.assert_alive().await;
    trace
}

#[tokio::test]
async fn a_client_that_leaves_before_the_answer() {
    let (mut worker, router) = pair(&[]).await;
    let client = begin(&router, "x").await;
    let mut exchange = worker.request().await;
    drop(client);
    exchange.closed().await;
    let trace = failed(&router, "x", "client disconnected").await;
    assert_eq!(
        (&trace["worker_url"], &trace["http_status"]),
        (&worker.url.clone().into(), &Value::Null)
    );
    assert_eq!(trace["attempts"][0]["error"], "client disconnected");
    assert_eq!(router.worker(&worker.url).await["failed"], 0, "not the worker's fault");
}

#[tokio::test]
async fn a_client_that_leaves_within_a_stream() {
    let (mut worker, router) = pair(&[]).await;
    let mut client = begin(&router, "x").await;
    let mut exchange = worker.request().await;
    exchange.send(STREAM_HEAD).await;
    exchange.send(chunked("data: {\"text\":\"a\",\"meta_info\":{\"id\":\"w\"}}\n\n")).await;
    client.head().await.expect("a head");
    client.chunk().await.expect("a chunk");
    drop(client);
    exchange.closed().await;
    let trace = failed(&router, "x", "client disconnected").await;
    assert_eq!(trace["http_status"], 200);
    assert_eq!(trace["worker_request_id"], "w", "what was said before it left");
    assert!(trace["ttft_ms"].is_f64());
    assert_eq!(router.worker(&worker.url).await["failed"], 0);
}

#[tokio::test]
async fn a_client_that_leaves_while_its_request_is_read() {
    let (mut worker, router) = pair(&[]).await;
    let mut client = router.connect().await;
    let head =
        "POST /generate HTTP/1.1\r\nhost: x\r\nx-request-id: x\r\ncontent-length: 100\r\n\r\n{";
    client.send(head).await;
    router.trace_when("x", "queued").await;
    drop(client);
    let trace = router.trace_when("x", "failed").await;
    assert_eq!(trace["error_message"], "client disconnected before its request was complete");
    assert!(trace["http_status"].is_null() && trace["worker_url"].is_null());
    assert!(worker.request_now().is_none());
    router.until_idle().await;
}

#[tokio::test]
async fn a_worker_that_dies_within_a_stream() {
    let (mut worker, router) = pair(&[]).await;
    let mut client = begin(&router, "x").await;
    let mut exchange = worker.request().await;
    exchange.send(STREAM_HEAD).await;
    exchange.send(chunked("data: {}\n\n")).await;
    let head = client.head().await.expect("a head");
    drop(exchange);
    let error = error_event(&client.body_of(head).await, "data: {}\n\n");
    assert_eq!(error["code"], "worker_unreachable");
    let trace = failed(&router, "x", "broke off").await;
    assert_eq!(trace["error_message"], error["message"]);
    assert_eq!(trace["http_status"], 200);
    assert!(trace["attempts"][0]["error"].is_string());
    assert_eq!(router.worker(&worker.url).await["failed"], 1);
}

#[tokio::test]
async fn a_worker_that_dies_within_an_answer_of_known_length() {
    let (mut worker, router) = pair(&[]).await;
    let mut client = begin(&router, "x").await;
    let mut exchange = worker.request().await;
    exchange.send("HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf").await;
    let head = client.head().await.expect("a head");
    drop(exchange);
    let answer = client.body_of(head).await;
    assert!(!answer.is_whole && b"half".starts_with(&answer.body));
    failed(&router, "x", "broke off").await;
}

#[tokio::test]
async fn a_request_without_an_answer_in_time() {
    let (mut worker, router) = pair(&["--request-timeout-secs=1"]).await;
    let mut client = begin(&router, "x").await;
    let mut exchange = worker.request().await;
    let answer = client.answer().await;
    assert_eq!((answer.status(), answer.error_code().as_str()), (504, "timeout"));
    assert!(answer.error_message().contains("request_timeout_secs"));
    assert_eq!(answer.header("x-sglang-worker").as_deref(), Some(worker.url.as_str()));
    exchange.closed().await;
    let trace = failed(&router, "x", "no answer within 1 s").await;
    assert_eq!(trace["http_status"], 504);
    assert_eq!(router.worker(&worker.url).await["failed"], 1);
}

#[tokio::test]
async fn a_stream_that_does_not_end_in_time_is_cut() {
    let (mut worker, router) = pair(&["--request-timeout-secs=1"]).await;
    let mut client = begin(&router, "x").await;
    let mut exchange = worker.request().await;
    exchange.send(STREAM_HEAD).await;
    exchange.send(chunked("data: {}\n\n")).await;
    let head = client.head().await.expect("a head");
    let error = error_event(&client.body_of(head).await, "data: {}\n\n");
    assert_eq!(error["code"], "timeout");
    exchange.closed().await;
    failed(&router, "x", "had not ended after 1 s").await;
}

#[tokio::test]
async fn a_stopped_router_cuts_what_it_has() {
    let (mut worker, router) = pair(&[]).await;
    let mut client = begin(&router, "x").await;
    let mut exchange = worker.request().await;
    exchange.send(STREAM_HEAD).await;
    exchange.send(chunked("data: {}\n\n")).await;
    let head = client.head().await.expect("a head");
    drop(router);
    assert!(!client.body_of(head).await.is_whole);
    exchange.closed().await;
}

#[tokio::test]
async fn what_a_worker_refuses_is_failed_with_its_words() {
    let (mut worker, router) = pair(&["--disable-retries"]).await;
    for (line, is_workers_fault) in [
        ("400 Bad Request", false),
        ("429 Too Many Requests", false),
        ("500 Internal Server Error", true),
    ] {
        let mut client = begin(&router, line).await;
        // A space is no part of an id: the router made one up.
        let before = router.worker(&worker.url).await["failed"].as_u64().expect("a count");
        let body = r#"{"error":{"message":"the prompt is too long"}}"#;
        let head = format!(
            "HTTP/1.1 {line}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        worker.request().await.answer(head + body).await;
        let answer = client.answer().await;
        assert_eq!(answer.text(), body);
        let id = answer.header("x-request-id").expect("an id");
        assert!(id.starts_with("req_"), "{id}");
        let trace = failed(&router, &id, "the prompt is too long").await;
        assert!(
            trace["error_message"].as_str().is_some_and(|message| message.contains(&line[..3]))
        );
        assert_eq!(trace["http_status"], answer.status());
        assert_eq!(trace["attempts"][0]["http_status"], answer.status());
        let after = router.worker(&worker.url).await["failed"].as_u64().expect("a count");
        assert_eq!(after - before, u64::from(is_workers_fault), "{line}");
    }
    assert_eq!(router.worker(&worker.url).await["served"], 0);
}

#[tokio::test]
async fn the_words_of_a_failure_have_a_bound() {
    let (mut worker, router) = pair(&["--disable-retries"]).await;
    let mut client = begin(&router, "x").await;
    let body = "é".repeat(5_000);
    let head = format!("HTTP/1.1 500 Oops\r\ncontent-length: {}\r\n\r\n", body.len());
    worker.request().await.answer(head + &body).await;
    assert_eq!(client.answer().await.text(), body);
    let trace = failed(&router, "x", "worker answered 500").await;
    assert!(trace["error_message"].as_str().is_some_and(|message| message.len() <= 512));
}
