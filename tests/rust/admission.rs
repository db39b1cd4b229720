//! How many requests are let in, what becomes of the others, and that every ending gives its place back.

use std::time::Instant;

use serde_json::{Value, json};

use crate::support::{
    Exchange, Message, Router, STREAM_HEAD, ScriptedWorker, Wire, answer, chunked, ok, request,
    until,
};

async fn send(router: &Router, id: &str) -> Wire {
    let mut client = router.connect().await;
    let headers = [("x-request-id", id)];
    client.send(request("POST /generate", &headers, r#"{"stream":true}"#)).await;
    client
}

/// A request that waits to be let in.
async fn queued(router: &Router, id: &str) -> Wire {
    let client = send(router, id).await;
    router.trace_when(id, "queued").await;
    client
}

fn id(exchange: &Exchange) -> String {
    exchange.request.header("x-request-id").expect("an id")
}

/// A request that was refused before a worker was picked.
async fn assert_refused(router: &Router, id: &str, refusal: &Message, status: u16, code: &str) {
    assert_eq!((refusal.status(), refusal.error_code().as_str()), (status, code));
    assert_eq!(refusal.header("x-request-id").as_deref(), Some(id));
    assert_eq!(refusal.header("x-sglang-worker"), None);
    let trace = router.trace_when(id, "failed").await;
    for field in ["worker_url", "node_id", "reason", "decision_us"] {
        assert!(trace[field].is_null(), "{field}");
    }
    assert_eq!((&trace["attempts"], &trace["http_status"]), (&json!([]), &status.into()));
    assert_eq!(trace["error_message"].as_str(), Some(refusal.error_message().as_str()));
    assert!(trace["latency_ms"].is_f64());
}

#[tokio::test]
async fn the_cap_holds_the_queue_is_in_order_and_the_next_is_refused() {
    let mut worker = ScriptedWorker::start().await;
    let flags = ["--max-concurrent-requests=2", "--queue-size=2"];
    let router = Router::ready(&[&worker.url], &flags).await;
    let mut clients = vec![send(&router, "1").await, send(&router, "2").await];
    let mut inside = vec![worker.request().await, worker.request().await];
    clients.push(queued(&router, "3").await);
    clients.push(queued(&router, "4").await);
    let refusal = send(&router, "5").await.answer().await;
    assert_refused(&router, "5", &refusal, 429, "queue_full").await;
    assert!(refusal.header("retry-after").is_some_and(|secs| secs.parse::<u32>().is_ok()));
    assert!(refusal.error_message().contains("queue_size"), "{}", refusal.error_message());

    for next in ["3", "4"] {
        assert!(worker.request_now().is_none(), "more than the cap");
        assert_eq!(router.loads().await, [2]);
        inside.remove(0).answer(ok("{}")).await;
        let exchange = worker.request().await;
        assert_eq!(id(&exchange), next, "in order of arrival");
        inside.push(exchange);
    }
    for exchange in inside {
        exchange.answer(ok("{}")).await;
    }
    for client in &mut clients {
        assert_eq!(client.answer().await.status(), 200);
    }
    let queue_ms = async |id: &str| {
        let trace = router.trace_when(id, "completed").await;
        trace["queue_ms"].as_f64().expect("milliseconds")
    };
    let first = queue_ms("1").await;
    assert!(queue_ms("3").await > first, "it waited longer than one that did not");
    let trace = router.trace_now("4").await;
    assert!(trace["queue_ms"].as_f64() <= trace["first_byte_ms"].as_f64(), "{trace}");
    router.until_idle().await;
}

#[tokio::test]
async fn without_a_queue_nobody_waits() {
    let mut worker = ScriptedWorker::start().await;
    let flags = ["--max-concurrent-requests=1", "--queue-size=0"];
    let router = Router::ready(&[&worker.url], &flags).await;
    let mut client = send(&router, "1").await;
    let exchange = worker.request().await;
    let refusal = send(&router, "2").await.answer().await;
    assert_refused(&router, "2", &refusal, 429, "queue_full").await;
    exchange.answer(ok("{}")).await;
    assert_eq!(client.answer().await.status(), 200);
    let mut client = send(&router, "3").await;
    worker.request().await.answer(ok("{}")).await;
    assert_eq!(client.answer().await.status(), 200);
}

#[tokio::test]
async fn a_client_that_leaves_the_queue_gives_its_place_back() {
    let mut worker = ScriptedWorker::start().await;
    let flags = ["--max-concurrent-requests=1", "--queue-size=2"];
    let router = Router::ready(&[&worker.url], &flags).await;
    let mut inside = send(&router, "inside").await;
    let exchange = worker.request().await;
    let first = queued(&router, "first").await;
    let mut second = queued(&router, "second").await;
    // One has the turn, the other stands behind it; one leaves by closing, the other by half of it.
    drop(first);
    second.finish_sending().await;
    for id in ["first", "second"] {
        let trace = router.trace_when(id, "failed").await;
        assert_eq!(trace["error_message"], "client disconnected");
        assert_eq!((&trace["worker_url"], &trace["attempts"]), (&Value::Null, &json!([])));
    }
    let mut third = queued(&router, "third").await;
    let fourth = queued(&router, "fourth").await;
    assert_eq!(send(&router, "fifth").await.answer().await.status(), 429, "full again");
    exchange.answer(ok("{}")).await;
    assert_eq!(inside.answer().await.status(), 200);
    let exchange = worker.request().await;
    assert_eq!(id(&exchange), "third");
    drop(fourth);
    exchange.answer(ok("{}")).await;
    assert_eq!(third.answer().await.status(), 200);
    router.trace_when("fourth", "failed").await;
    router.until_idle().await;
    assert!(worker.request_now().is_none(), "nobody who left was sent on");
}

#[tokio::test]
async fn who_waits_too_long_is_told_so() {
    let mut worker = ScriptedWorker::start().await;
    let flags = ["--max-concurrent-requests=1", "--queue-timeout-secs=1"];
    let router = Router::ready(&[&worker.url], &flags).await;
    let mut inside = send(&router, "inside").await;
    let exchange = worker.request().await;
    let refusal = send(&router, "late").await.answer().await;
    assert_refused(&router, "late", &refusal, 408, "queue_timeout").await;
    assert!(refusal.error_message().contains("queue_timeout_secs"), "{}", refusal.error_message());
    exchange.answer(ok("{}")).await;
    assert_eq!(inside.answer().await.status(), 200);
    assert!(worker.request_now().is_none());
}

#[tokio::test]
async fn the_time_a_body_takes_is_no_waiting() {
    let mut worker = ScriptedWorker::start().await;
    let flags = ["--max-concurrent-requests=1", "--queue-timeout-secs=1"];
    let router = Router::ready(&[&worker.url], &flags).await;
    let mut slow = router.connect().await;
    slow.send("POST /generate HTTP/1.1\r\nhost: x\r\nx-request-id: slow\r\n").await;
    slow.send("content-length: 2\r\n\r\n{").await;
    router.trace_when("slow", "queued").await;
    let began = Instant::now();
    until("a queue's time", async || (began.elapsed().as_millis() > 1100).then_some(())).await;
    let mut inside = send(&router, "inside").await;
    let exchange = worker.request().await;
    slow.send("}").await;
    assert_eq!(router.trace_now("slow").await["status"], "queued");
    exchange.answer(ok("{}")).await;
    assert_eq!(inside.answer().await.status(), 200);
    worker.request().await.answer(ok("{}")).await;
    assert_eq!(slow.answer().await.status(), 200);
}

/// Ends the only request there is room for in this way, and sees that the next one is let in.
async fn gives_back(way: &str, flag: &str, end: impl AsyncFnOnce(Wire, &mut ScriptedWorker)) {
    let mut worker = ScriptedWorker::start().await;
    let flags = ["--max-concurrent-requests=1", "--disable-retries", flag];
    let router = Router::ready(&[&worker.url], &flags).await;
    let client = send(&router, "first").await;
    end(client, &mut worker).await;
    until("an end", async || {
        let trace = router.trace_now("first").await;
        trace["latency_ms"].is_f64().then_some(())
    })
    .await;
    let mut next = send(&router, "next").await;
    let exchange = worker.request().await;
    assert_eq!(id(&exchange), "next", "{way}");
    exchange.answer(ok("{}")).await;
    assert_eq!(next.answer().await.status(), 200, "{way}");
}

#[tokio::test]
async fn every_ending_lets_the_next_one_in() {
    let none = "--queue-size=100";
    gives_back("refused", none, async |mut client, worker| {
        worker.request().await.answer(answer("400 No", &[], "no")).await;
        client.answer().await;
    })
    .await;
    gives_back("closed", none, async |mut client, worker| {
        drop(worker.request().await);
        assert_eq!(client.answer().await.status(), 502);
    })
    .await;
    gives_back("left before the answer", none, async |client, worker| {
        let mut exchange = worker.request().await;
        drop(client);
        exchange.closed().await;
    })
    .await;
    gives_back("left within the answer", none, async |mut client, worker| {
        let mut exchange = worker.request().await;
        exchange.send([STREAM_HEAD.as_bytes(), &chunked("data: {}\n\n")].concat()).await;
        client.head().await;
        drop(client);
        exchange.closed().await;
    })
    .await;
    gives_back("a worker that dies", none, async |mut client, worker| {
        let mut exchange = worker.request().await;
        exchange.send([STREAM_HEAD.as_bytes(), &chunked("data: {}\n\n")].concat()).await;
        client.head().await;
        drop(exchange);
    })
    .await;
    gives_back("a timeout", "--request-timeout-secs=1", async |mut client, worker| {
        let mut exchange = worker.request().await;
        assert_eq!(client.answer().await.status(), 504);
        exchange.closed().await;
    })
    .await;
    gives_back("a stall", "--stream-stall-timeout-secs=1", async |_client, worker| {
        let mut exchange = worker.request().await;
        exchange.send([STREAM_HEAD.as_bytes(), &chunked("data: {}\n\n")].concat()).await;
        exchange.closed().await;
    })
    .await;
}

#[tokio::test]
async fn a_stream_keeps_its_place_to_its_last_byte() {
    let mut worker = ScriptedWorker::start().await;
    let router = Router::ready(&[&worker.url], &["--max-concurrent-requests=1"]).await;
    let mut client = send(&router, "stream").await;
    let mut exchange = worker.request().await;
    exchange.send(STREAM_HEAD).await;
    let mut next = queued(&router, "next").await;
    for _ in 0..3 {
        exchange.send(chunked("data: {}\n\n")).await;
    }
    let head = client.head().await.expect("a head");
    for _ in 0..3 {
        client.chunk().await.expect("a chunk");
        assert_eq!(router.trace_now("next").await["status"], "queued");
        assert!(worker.request_now().is_none());
    }
    exchange.answer(chunked("")).await;
    assert!(client.body_of(head).await.is_whole);
    worker.request().await.answer(ok("{}")).await;
    assert_eq!(next.answer().await.status(), 200);
}

#[tokio::test]
async fn a_place_is_kept_through_all_attempts() {
    let mut worker = ScriptedWorker::start().await;
    let flags = ["--max-concurrent-requests=1", "--retry-initial-backoff-ms=1"];
    let router = Router::ready(&[&worker.url], &flags).await;
    let mut client = send(&router, "tried").await;
    let exchange = worker.request().await;
    let mut next = queued(&router, "next").await;
    exchange.answer(answer("500 Oops", &[], "")).await;
    for _ in 0..2 {
        let exchange = worker.request().await;
        assert_eq!(id(&exchange), "tried");
        exchange.answer(answer("500 Oops", &[], "")).await;
    }
    worker.request().await.answer(ok("{}")).await;
    assert_eq!(client.answer().await.status(), 200);
    let exchange = worker.request().await;
    assert_eq!(id(&exchange), "next");
    exchange.answer(ok("{}")).await;
    assert_eq!(next.answer().await.status(), 200);
}

#[tokio::test]
async fn a_rate_makes_wait_and_refuses() {
    let mut worker = ScriptedWorker::start().await;
    let flags = ["--rate-limit-tokens-per-second=1", "--queue-size=1"];
    let router = Router::ready(&[&worker.url], &flags).await;
    let mut first = send(&router, "first").await;
    worker.request().await.answer(ok("{}")).await;
    assert_eq!(first.answer().await.status(), 200);
    let mut second = queued(&router, "second").await;
    let refusal = send(&router, "third").await.answer().await;
    assert_refused(&router, "third", &refusal, 429, "queue_full").await;
    assert!(refusal.error_message().contains("rate_limit_tokens_per_second"));
    worker.request().await.answer(ok("{}")).await;
    assert_eq!(second.answer().await.status(), 200);
    router.until_idle().await;
}

#[tokio::test]
async fn what_is_not_routed_is_let_in_always() {
    let mut worker = ScriptedWorker::start().await;
    let flags =
        ["--max-concurrent-requests=1", "--queue-size=0", "--rate-limit-tokens-per-second=1"];
    let router = Router::ready(&[&worker.url], &flags).await;
    let mut client = send(&router, "inside").await;
    let exchange = worker.request().await;
    for path in ["/health", "/readiness", "/workers", "/metrics", "/v1/traces", "/v1/traces/stats"]
    {
        assert_eq!(router.get(path).await.status(), 200, "{path}");
    }
    exchange.answer(ok("{}")).await;
    assert_eq!(client.answer().await.status(), 200);
}

#[tokio::test]
async fn bodies_together_have_a_bound() {
    let mut worker = ScriptedWorker::start().await;
    let router = Router::ready(&[&worker.url], &["--max-buffered-bytes=1000000"]).await;
    let large = vec![b'x'; 700_000];
    let ask = |id: &str| request("POST /generate", &[("x-request-id", id)], &large);
    let mut first = router.connect().await;
    first.send(ask("first")).await;
    let exchange = worker.request().await;
    let refusal = router.ask(ask("second")).await;
    assert_refused(&router, "second", &refusal, 503, "overloaded").await;
    assert!(refusal.header("retry-after").is_some());
    assert!(refusal.error_message().contains("max_buffered_bytes"), "{}", refusal.error_message());
    // A small one has room.
    let mut small = send(&router, "small").await;
    worker.request().await.answer(ok("{}")).await;
    assert_eq!(small.answer().await.status(), 200);
    exchange.answer(ok("{}")).await;
    assert_eq!(first.answer().await.status(), 200);
    // One that could never have room is told so, and holds nothing.
    let answer = router.ask(request("POST /generate", &[], vec![b'x'; 1_000_001])).await;
    assert_eq!((answer.status(), answer.error_code().as_str()), (413, "payload_too_large"));
    // hyper lets go of a sent body a moment after its answer.
    let third = until("room again", async || {
        let mut client = router.connect().await;
        client.send(ask("third")).await;
        tokio::select! {
            exchange = worker.request() => Some((client, exchange)),
            refusal = client.answer() => {
                assert_eq!(refusal.error_code(), "overloaded");
                None
            }
        }
    });
    let (mut client, exchange) = third.await;
    exchange.answer(ok("{}")).await;
    assert_eq!(client.answer().await.status(), 200);
}
