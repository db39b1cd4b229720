//! Endings in the middle: clients that leave in every way there is, clients that do not read, workers that break off
//! or fall silent, and the router's own.

use std::time::Instant;

use futures_util::future::join_all;
use serde_json::Value;

use crate::support::{
    Exchange, Message, Router, STREAM_HEAD, ScriptedWorker, Wire, answer, chunked, ok, request,
    until,
};

async fn pair(flags: &[&str]) -> (ScriptedWorker, Router) {
    let worker = ScriptedWorker::start().await;
    let router = Router::ready(&[&worker.url], flags).await;
    (worker, router)
}

async fn begin_at(router: &Router, path: &str, id: &str) -> Wire {
    let mut client = router.connect().await;
    let headers = [("x-request-id", id)];
    client.send(request(&format!("POST {path}"), &headers, r#"{"text":"x","stream":true}"#)).await;
    client
}

async fn begin(router: &Router, id: &str) -> Wire {
    begin_at(router, "/generate", id).await
}

/// The trace of a request whose client left.
async fn left(router: &Router, id: &str) -> Value {
    let trace = router.trace_when(id, "failed").await;
    assert_eq!(trace["error_message"], "client disconnected", "{id}");
    router.until_idle().await;
    trace
}

/// The ways to leave, each with its name.
const WAYS: [&str; 5] = ["closes", "closes one half", "resets", "pipelines", "stray bytes"];

/// Leaves in this way.
async fn leave(way: &str, mut client: Wire) {
    match way {
        "closes" => {}
        "resets" => client.reset_at_end(),
        "closes one half" => {
            client.finish_sending().await;
            client.rest().await;
        }
        "pipelines" => {
            client.send(request("POST /generate", &[("x-request-id", "after")], "{}")).await;
        }
        _ => client.send("\r\n").await,
    }
}

#[tokio::test]
async fn a_client_that_leaves_before_the_answer_ends_it_at_its_worker() {
    for way in WAYS {
        let (mut worker, router) = pair(&[]).await;
        let client = begin(&router, "x").await;
        let mut exchange = worker.request().await;
        leave(way, client).await;
        exchange.closed().await;
        let trace = left(&router, "x").await;
        assert!(trace["http_status"].is_null(), "{way}");
        assert_eq!(trace["attempts"][0]["worker_url"], worker.url, "{way}");
        assert!(worker.request_now().is_none(), "{way}: the pipelined one went with it");
        assert_eq!(router.worker(&worker.url).await["failed"], 0, "{way}");
    }
}

#[tokio::test]
async fn a_client_that_leaves_between_two_chunks_ends_it_at_its_worker() {
    for way in WAYS {
        for head in [STREAM_HEAD, "HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n"] {
            let (mut worker, router) = pair(&[]).await;
            let mut client = begin(&router, "x").await;
            let mut exchange = worker.request().await;
            exchange.send([head.as_bytes(), &chunked("data: {}\n\n")].concat()).await;
            client.head().await.expect("a head");
            leave(way, client).await;
            exchange.closed().await;
            assert_eq!(left(&router, "x").await["http_status"], 200, "{way}");
        }
    }
}

#[tokio::test]
async fn what_a_client_sends_ahead_does_not_end_what_it_waits_for() {
    let (mut worker, router) = pair(&[]).await;
    let mut client = begin(&router, "first").await;
    let mut exchange = worker.request().await;
    // More than is read ahead.
    let next = request("POST /generate", &[("x-request-id", "next")], vec![b'x'; 300_000]);
    client.send(&next[..200_000]).await;
    exchange.send(stream("data: {}\n\n")).await;
    let head = client.head().await.expect("a head");
    exchange.answer(chunked("")).await;
    assert_eq!(client.body_of(head).await.text(), "data: {}\n\n");
    client.send(&next[200_000..]).await;
    let exchange = worker.request().await;
    assert_eq!(exchange.request.body.len(), 300_000);
    exchange.answer(ok("{}")).await;
    assert_eq!(client.answer().await.status(), 200);
}

#[tokio::test]
async fn a_client_that_does_not_read_slows_its_worker_down_and_is_cut_in_time() {
    let (mut worker, router) = pair(&["--request-timeout-secs=3"]).await;
    let client = begin(&router, "x").await;
    let mut exchange = worker.request().await;
    let taken = exchange.wire().send_while_taken(&large_answer()).await;
    // Only the buffers of two connections lie between them.
    assert!(taken < 32 << 20, "{taken} bytes were taken for a client that reads nothing");
    until("the cut", async || (router.loads().await == [0]).then_some(())).await;
    let trace = router.trace_when("x", "failed").await;
    let message = trace["error_message"].as_str().expect("a message");
    assert!(message.contains("client had not read"), "{message}");
    assert_eq!(router.worker(&worker.url).await["failed"], 0, "not the worker's fault");
    drop(client);
}

#[tokio::test]
async fn a_slow_client_is_no_stall_of_its_worker() {
    let (mut worker, router) = pair(&["--stream-stall-timeout-secs=1"]).await;
    let mut client = begin(&router, "x").await;
    let mut exchange = worker.request().await;
    let bytes = large_answer();
    // It stands still for longer than a stall, because of the client alone; then all goes on.
    let taken = exchange.wire().send_while_taken(&bytes).await;
    assert!(taken < bytes.len());
    let began = Instant::now();
    until("a stall's time", async || (began.elapsed().as_millis() > 1200).then_some(())).await;
    let ((), answer) = tokio::join!(exchange.answer(&bytes[taken..]), client.answer());
    assert!(answer.is_whole && answer.body.len() == LARGE);
    assert_eq!(router.trace_when("x", "completed").await["http_status"], 200);
}

/// More than all buffers between a worker and a client hold.
const LARGE: usize = 64 << 20;

fn large_answer() -> Vec<u8> {
    answer("200 OK", &[("content-type", "application/octet-stream")], vec![b'x'; LARGE])
}

/// Begins a stream with this head and these bytes, lets the worker end it so, and returns what the client got.
async fn broken(
    flags: &[&str],
    path: &str,
    begun: &[u8],
    end: impl AsyncFnOnce(Exchange),
) -> (Message, Value) {
    let (mut worker, router) = pair(flags).await;
    let mut client = begin_at(&router, path, "x").await;
    let mut exchange = worker.request().await;
    exchange.send(begun).await;
    let head = client.head().await.expect("a head");
    end(exchange).await;
    let answer = client.body_of(head).await;
    let trace = router.trace_when("x", "failed").await;
    assert_eq!(
        (&trace["http_status"], trace["attempts"].as_array().map(Vec::len)),
        (&200.into(), Some(1))
    );
    router.until_idle().await;
    assert_eq!(router.worker(&worker.url).await["failed"], 1);
    (answer, trace)
}

fn stream(data: &str) -> Vec<u8> {
    [STREAM_HEAD.as_bytes(), &chunked(data)].concat()
}

/// The one error event that follows what the worker sent, whose name is `name`.
fn assert_error_event(answer: &Message, trace: &Value, begun: &str, name: &str, code: &str) {
    assert!(answer.is_whole, "the stream has an end");
    let text = answer.text();
    let rest = text.strip_prefix(begun).unwrap_or_else(|| panic!("{text:?} begins not as sent"));
    let event = rest.strip_prefix(name).unwrap_or_else(|| panic!("{rest:?} has not {name:?}"));
    let data = event.strip_prefix("data: ").and_then(|data| data.strip_suffix("\n\n"));
    let data = data.unwrap_or_else(|| panic!("{event:?} is no event"));
    assert!(!data.contains('\n') && !text.contains("[DONE]"), "{text:?}");
    let json: Value = serde_json::from_str(data).expect("JSON");
    assert_eq!(json["error"]["code"], code);
    assert_eq!(json["error"]["message"], trace["error_message"]);
    assert!(json["error"]["type"].is_string());
    assert_eq!(json.get("type").is_some(), !name.is_empty());
}

#[tokio::test]
async fn a_stream_that_breaks_off_ends_with_one_error_event() {
    let gone = "worker_unreachable";
    for (path, name) in [
        ("/generate", ""),
        ("/v1/chat/completions", ""),
        ("/v1/messages", "event: error\n"),
        ("/v1/responses", "event: error\n"),
    ] {
        for sent in ["data: {\"a\":1}\n\n", ": ping\n\n", "data: 1\r\n\r\n", "id: 1\ndata: 1\n\n"] {
            let (answer, trace) =
                broken(&[], path, &stream(sent), async |exchange| drop(exchange)).await;
            assert_error_event(&answer, &trace, sent, name, gone);
        }
        // Within an event: what came of it is ended first.
        for sent in ["data: {\"a\":", "data: 1\n\ndata", "data: 1\n", "event: x\r\n"] {
            let (answer, trace) =
                broken(&[], path, &stream(sent), async |exchange| drop(exchange)).await;
            assert_error_event(&answer, &trace, &format!("{sent}\n\n"), name, gone);
        }
    }
}

#[tokio::test]
async fn every_way_to_break_off_ends_with_an_error_event() {
    let sent = "data: {}\n\n";
    let ends: [(&str, &[u8]); 4] = [
        ("a chunk that is no chunk", b"zz\r\nx\r\n"),
        ("half a chunk", b"ff\r\nhalf"),
        ("a chunk that is too long", b"3\r\nlonger\r\n"),
        ("a size beyond all", b"fffffffffffffffff\r\n"),
    ];
    for (way, bytes) in ends {
        let (answer, trace) = broken(&[], "/generate", &stream(sent), async |mut exchange| {
            exchange.send(bytes).await;
        })
        .await;
        let begun = answer.text();
        let begun = begun.split("data: {\"error\"").next().expect("a beginning");
        assert!(begun.starts_with(sent), "{way}: {begun:?}");
        assert_error_event(&answer, &trace, begun, "", "worker_unreachable");
    }
    let (answer, trace) = broken(&[], "/generate", &stream(sent), async |mut exchange| {
        exchange.wire().reset_at_end();
    })
    .await;
    assert_error_event(&answer, &trace, sent, "", "worker_unreachable");
}

#[tokio::test]
async fn what_is_no_open_stream_of_events_is_cut() {
    let sent = "data: {}\n\n";
    let open = [
        "content-type: application/json\r\ntransfer-encoding: chunked\r\n",
        "transfer-encoding: chunked\r\n",
        "content-type: text/event-stream\r\ncontent-encoding: gzip\r\ntransfer-encoding: chunked\r\n",
        "content-type: text/event-stream\r\ncontent-length: 1000\r\n",
        "content-type: application/json\r\ncontent-length: 1000\r\n",
    ];
    for headers in open {
        for flags in [&[][..], &["--stream-stall-timeout-secs=1"]] {
            let is_stalled = !flags.is_empty();
            let mut begun = format!("HTTP/1.1 200 OK\r\n{headers}\r\n").into_bytes();
            if headers.contains("chunked") {
                begun.extend(chunked(sent));
            } else {
                begun.extend(sent.as_bytes());
            }
            let (answer, trace) = broken(flags, "/generate", &begun, async |mut exchange| {
                if is_stalled {
                    exchange.closed().await;
                }
            })
            .await;
            assert!(!answer.is_whole, "{headers:?} {flags:?}");
            assert!(sent.starts_with(&answer.text()), "{headers:?}: {}", answer.text());
            let why = if is_stalled { "stream_stall_timeout_secs" } else { "broke off" };
            let message = trace["error_message"].as_str().expect("a message");
            assert!(message.contains(why), "{message}");
        }
    }
}

#[tokio::test]
async fn a_stream_that_falls_silent_is_ended_with_an_error_event() {
    let flags = ["--stream-stall-timeout-secs=1"];
    for sent in ["data: {}\n\n", "data: {}\n\ndata: {"] {
        let (answer, trace) = broken(&flags, "/generate", &stream(sent), async |mut exchange| {
            exchange.closed().await;
        })
        .await;
        let begun = if sent.ends_with("\n\n") { sent.to_owned() } else { format!("{sent}\n\n") };
        assert_error_event(&answer, &trace, &begun, "", "timeout");
        let message = trace["error_message"].as_str().expect("a message");
        assert!(message.contains("stream_stall_timeout_secs"), "{message}");
    }
}

#[tokio::test]
async fn silence_before_the_first_byte_is_no_stall() {
    let flags = ["--stream-stall-timeout-secs=1", "--request-timeout-secs=2"];
    let (mut worker, router) = pair(&flags).await;
    let mut client = begin(&router, "x").await;
    let mut exchange = worker.request().await;
    exchange.send(STREAM_HEAD).await;
    let answer = client.answer().await;
    assert_eq!((answer.status(), answer.error_code().as_str()), (504, "timeout"));
    assert!(answer.error_message().contains("request_timeout_secs"), "{}", answer.error_message());
    exchange.closed().await;
    assert_eq!(router.trace_when("x", "failed").await["http_status"], 504);
    router.until_idle().await;
}

#[tokio::test]
async fn a_draining_router_is_not_ready_and_takes_requests_until_its_delay_is_over() {
    let (mut worker, router) = pair(&["--shutdown-delay-secs=1"]).await;
    let mut open = begin(&router, "open").await;
    let mut exchange = worker.request().await;
    exchange.send(stream("data: 1\n\n")).await;
    let head = open.head().await.expect("a head");
    router.drain();
    let ready = router.get("/readiness").await;
    assert_eq!((ready.status(), ready.json()["reason"].as_str()), (503, Some("draining")));
    assert_eq!(router.get("/health").await.status(), 200);
    let mut late = begin(&router, "late").await;
    worker.request().await.answer(ok("{}")).await;
    assert_eq!(late.answer().await.status(), 200);

    until("the port to be closed", async || {
        tokio::net::TcpStream::connect(router.address).await.is_err().then_some(())
    })
    .await;
    assert!(!router.has_ended(), "a stream is open");
    exchange.answer([chunked("data: [DONE]\n\n"), chunked("")].concat()).await;
    assert_eq!(open.body_of(head).await.text(), "data: 1\n\ndata: [DONE]\n\n");
    until("the end", async || router.has_ended().then_some(())).await;
}

#[tokio::test]
async fn a_hundred_open_streams_all_finish() {
    let (mut worker, router) = pair(&[]).await;
    let mut clients = Vec::new();
    let mut exchanges = Vec::new();
    for number in 0..100 {
        let mut client = begin(&router, &format!("s-{number}")).await;
        let mut exchange = worker.request().await;
        exchange.send(stream("data: 1\n\n")).await;
        let head = client.head().await.expect("a head");
        clients.push((client, head));
        exchanges.push(exchange);
    }
    router.drain();
    until("the port to be closed", async || {
        tokio::net::TcpStream::connect(router.address).await.is_err().then_some(())
    })
    .await;
    let end = [chunked("data: 2\n\n"), chunked("data: [DONE]\n\n"), chunked("")].concat();
    join_all(exchanges.into_iter().map(|exchange| exchange.answer(&end))).await;
    for (client, head) in &mut clients {
        let answer = client.body_of(head.clone()).await;
        assert!(answer.is_whole);
        assert_eq!(answer.text(), "data: 1\n\ndata: 2\n\ndata: [DONE]\n\n");
    }
    until("the end", async || router.has_ended().then_some(())).await;
}

#[tokio::test]
async fn what_waits_for_its_answer_while_the_router_drains_is_answered() {
    let (mut worker, router) = pair(&["--max-concurrent-requests=1"]).await;
    let mut first = begin(&router, "first").await;
    let exchange = worker.request().await;
    let mut second = begin(&router, "second").await;
    router.trace_when("second", "queued").await;
    let mut idle = router.connect().await;
    assert_eq!(idle.ask(request("GET /health", &[], "")).await.status(), 200);
    router.drain();
    assert!(idle.rest().await.is_empty(), "an idle connection is closed");
    exchange.answer(answer("200 OK", &[], "1")).await;
    assert_eq!(first.answer().await.text(), "1");
    worker.request().await.answer(answer("200 OK", &[], "2")).await;
    assert_eq!(second.answer().await.text(), "2");
    until("the end", async || router.has_ended().then_some(())).await;
}

#[tokio::test]
async fn a_router_told_to_stop_cuts_what_is_open_at_once() {
    let (mut worker, router) = pair(&[]).await;
    let mut streaming = begin(&router, "streaming").await;
    let mut begun = worker.request().await;
    begun.send(stream("data: 1\n\n")).await;
    let head = streaming.head().await.expect("a head");
    let mut waiting = begin(&router, "waiting").await;
    let mut asked = worker.request().await;
    let mut idle = router.connect().await;
    assert_eq!(idle.ask(request("GET /health", &[], "")).await.status(), 200);
    router.drain();
    // Nobody waits for its end.
    router.stop();
    assert!(!streaming.body_of(head).await.is_whole);
    for client in [&mut waiting, &mut idle] {
        assert!(client.rest().await.is_empty());
    }
    for exchange in [&mut begun, &mut asked] {
        exchange.closed().await;
    }
    until("the end", async || router.has_ended().then_some(())).await;
}

#[tokio::test]
async fn a_client_that_leaves_right_behind_its_request_has_a_trace() {
    let (_worker, router) = pair(&[]).await;
    for number in 0..100 {
        let id = format!("gone-{number}");
        let mut client = router.connect().await;
        client.send(request("POST /generate", &[("x-request-id", &id)], "{}")).await;
        drop(client);
        let trace = router.trace_when(&id, "failed").await;
        let message = trace["error_message"].as_str().expect("a message");
        assert!(message.contains("client disconnected"), "{message}");
    }
    router.until_idle().await;
}
