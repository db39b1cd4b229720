//! Streams pass chunk by chunk: what the worker has sent reaches the client before it sends any more.

use serde_json::Value;

use crate::support::{Router, ScriptedWorker, chunked, request};

const STREAM_HEAD: &str =
    "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";

#[tokio::test]
async fn each_chunk_arrives_before_the_next_is_sent() {
    let mut worker = ScriptedWorker::start().await;
    let router = Router::ready(&[&worker.url], &[]).await;
    let mut client = router.connect().await;
    let headers = [("x-request-id", "s")];
    client.send(request("POST /generate", &headers, r#"{"text":"x","stream":true}"#)).await;
    let mut exchange = worker.request().await;
    assert_eq!(router.trace_when("s", "routed").await["http_status"], Value::Null);

    exchange.send(STREAM_HEAD).await;
    let trace = router.trace_when("s", "processing").await;
    // The client has seen nothing yet: another worker could still be tried.
    assert!(trace["http_status"].is_null() && trace["first_byte_ms"].is_null());
    assert_eq!(trace["attempts"][0]["http_status"], 200);
    exchange.send(chunked(": ping\n\n")).await;
    let head = client.head().await.expect("a head");
    assert_eq!(head.status(), 200);
    assert_eq!(head.header("content-type").as_deref(), Some("text/event-stream"));
    assert_eq!(client.chunk().await.expect("a chunk"), b": ping\n\n");
    let trace = router.trace_now("s").await;
    assert_eq!((trace["http_status"].as_u64(), &trace["ttft_ms"]), (Some(200), &Value::Null));
    assert_eq!(router.worker(&worker.url).await["load"], 1);

    for number in 1..=5 {
        // An event that a chunk's end cuts in two.
        for part in [format!("data: {{\"text\":\"{number}"), "\",\"meta_info\":{}}\n\n".to_owned()]
        {
            exchange.send(chunked(&part)).await;
            assert_eq!(client.chunk().await.expect("a chunk"), part.as_bytes());
        }
    }
    let trace = router.trace_now("s").await;
    assert!(trace["first_byte_ms"].is_f64() && trace["ttft_ms"].is_f64(), "{trace}");
    assert!(trace["latency_ms"].is_null());

    exchange.answer([chunked("data: [DONE]\n\n"), chunked("")].concat()).await;
    assert_eq!(client.chunk().await.expect("a chunk"), b"data: [DONE]\n\n");
    assert_eq!(client.chunk().await.expect("the end"), b"");
    assert_eq!(router.trace_now("s").await["status"], "completed");
    assert_eq!(router.worker(&worker.url).await["load"], 0);
}

#[tokio::test]
async fn the_first_bytes_of_an_answer_of_known_length_do_not_wait_for_the_rest() {
    let mut worker = ScriptedWorker::start().await;
    let router = Router::ready(&[&worker.url], &[]).await;
    let mut client = router.connect().await;
    client.send(request("POST /generate", &[], "{}")).await;
    let mut exchange = worker.request().await;
    exchange.send("HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nabc").await;
    client.head().await.expect("a head");
    assert_eq!(client.exactly(3).await.expect("the first half"), b"abc");
    exchange.answer("def").await;
    assert_eq!(client.exactly(3).await.expect("the second half"), b"def");
}

#[tokio::test]
async fn streams_of_two_clients_do_not_wait_for_each_other() {
    let mut worker = ScriptedWorker::start().await;
    let router = Router::ready(&[&worker.url], &["--worker-threads=1"]).await;
    let mut first = router.connect().await;
    first.send(request("POST /generate", &[], "1")).await;
    let mut slow = worker.request().await;
    slow.send(STREAM_HEAD).await;
    slow.send(chunked("w")).await;
    first.head().await.expect("a head");
    assert_eq!(first.chunk().await.expect("a chunk"), b"w");
    let mut second = router.connect().await;
    second.send(request("POST /generate", &[], "2")).await;
    let mut quick = worker.request().await;
    quick.send(STREAM_HEAD).await;
    quick.answer([chunked("x"), chunked("")].concat()).await;
    let head = second.head().await.expect("a head");
    assert_eq!(second.body_of(head).await.body, b"x");
    slow.answer([chunked("y"), chunked("")].concat()).await;
    assert_eq!(first.chunk().await.expect("a chunk"), b"y");
}
