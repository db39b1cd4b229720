//! A worker that keeps failing is left alone until a probe succeeds; one that is full is only avoided.

use serde_json::json;

use crate::support::{
    Exchange, Message, Router, STREAM_HEAD, ScriptedWorker, Wire, answer, chunked, ok, request,
    soon,
};

const PIN: &str = "x-sglang-target-worker";
/// Opens with the second failure, and does not probe as long as a test lasts.
const OPENS: [&str; 3] =
    ["--cb-failure-threshold=2", "--cb-timeout-duration-secs=3600", "--disable-retries"];

async fn send(router: &Router, pin: Option<&str>) -> Wire {
    let mut client = router.connect().await;
    let headers: Vec<(&str, &str)> = pin.map(|pin| (PIN, pin)).into_iter().collect();
    client.send(request("POST /generate", &headers, r#"{"stream":true}"#)).await;
    client
}

/// One request to this worker, answered so.
async fn answered(
    router: &Router,
    worker: &mut ScriptedWorker,
    bytes: impl AsRef<[u8]>,
) -> Message {
    let url = worker.url.clone();
    let mut client = send(router, Some(&url)).await;
    worker.request().await.answer(bytes).await;
    client.answer().await
}

async fn breaker(router: &Router, worker: &ScriptedWorker) -> String {
    let worker = router.worker(&worker.url).await;
    worker["breaker"].as_str().expect("a state").to_owned()
}

/// A refusal that names the breaker.
fn assert_barred(refusal: &Message, worker: &ScriptedWorker, state: &str) {
    assert_eq!((refusal.status(), refusal.error_code().as_str()), (503, "no_available_workers"));
    let message = refusal.error_message();
    assert!(message.contains(&worker.url) && message.contains("circuit breaker"), "{message}");
    assert!(message.contains(state), "{message}");
}

/// Lets a worker fail twice in this way, beside a sound one.
async fn opens(way: &str, fail: impl AsyncFn(Exchange, &mut Wire)) {
    let [mut failing, mut sound] = ScriptedWorker::several::<2>().await;
    let router = Router::ready(&[&failing.url, &sound.url], &OPENS).await;
    for round in 0..2 {
        assert_eq!(breaker(&router, &failing).await, "closed", "{way} {round}");
        let url = failing.url.clone();
        let mut client = send(&router, Some(&url)).await;
        let exchange = failing.request().await;
        fail(exchange, &mut client).await;
        router.until_idle().await;
    }
    assert_eq!(breaker(&router, &failing).await, "open", "{way}");
    // A worker with an open breaker is as healthy as it was.
    assert_eq!(router.worker(&failing.url).await["is_healthy"], true);
    for _ in 0..5 {
        let mut client = send(&router, None).await;
        sound.request().await.answer(ok("{}")).await;
        assert_eq!(client.answer().await.status(), 200, "{way}");
    }
    let pinned = send(&router, Some(&failing.url)).await.answer().await;
    assert_barred(&pinned, &failing, "open");
    assert!(failing.request_now().is_none(), "{way}");
}

#[tokio::test]
async fn failures_open_it_and_requests_go_elsewhere() {
    let closing = [("connection", "close")];
    for status in ["500 Oops", "502 Bad Gateway", "504 Gateway Timeout", "599 Odd"] {
        opens(status, async |mut exchange, _| {
            exchange.send(answer(status, &closing, "no")).await;
        })
        .await;
    }
    opens("closed", async |exchange, _| drop(exchange)).await;
    opens("garbage", async |mut exchange, _| exchange.send("garbage\r\n\r\n").await).await;
    opens("a broken stream", async |mut exchange, client| {
        exchange.send(STREAM_HEAD).await;
        exchange.send(chunked("data: {}\n\n")).await;
        client.head().await.expect("a head");
    })
    .await;
}

#[tokio::test]
async fn the_only_worker_with_an_open_breaker_is_no_worker() {
    let mut worker = ScriptedWorker::start().await;
    let router = Router::ready(&[&worker.url], &OPENS).await;
    for _ in 0..2 {
        answered(&router, &mut worker, answer("500 Oops", &[], "")).await;
    }
    let ask = request("POST /generate", &[("x-request-id", "x")], "{}");
    let refusal = router.ask(ask).await;
    assert_barred(&refusal, &worker, "open");
    assert_eq!(refusal.header("x-sglang-worker"), None);
    let trace = router.trace_when("x", "failed").await;
    assert_eq!(trace["attempts"], json!([]));
    for field in ["worker_url", "node_id", "reason"] {
        assert!(trace[field].is_null(), "{field}");
    }
    assert_eq!(trace["http_status"], 503);
    assert_eq!(trace["error_message"].as_str(), Some(refusal.error_message().as_str()));
    assert_barred(&router.get("/v1/models").await, &worker, "open");
    assert!(worker.request_now().is_none());
}

#[tokio::test]
async fn a_success_between_failures_begins_the_count_anew() {
    let mut worker = ScriptedWorker::start().await;
    let router = Router::ready(&[&worker.url], &OPENS).await;
    for _ in 0..4 {
        answered(&router, &mut worker, answer("500 Oops", &[], "")).await;
        answered(&router, &mut worker, ok("{}")).await;
    }
    assert_eq!(breaker(&router, &worker).await, "closed");
}

#[tokio::test]
async fn what_clients_do_wrong_never_opens_it() {
    let mut worker = ScriptedWorker::start().await;
    let flags = ["--cb-failure-threshold=1", "--disable-retries"];
    let router = Router::ready(&[&worker.url], &flags).await;
    for status in [400, 401, 403, 404, 408, 413, 422, 501, 302] {
        let refusal =
            answered(&router, &mut worker, answer(&format!("{status} No"), &[], "")).await;
        assert_eq!(refusal.status(), status);
        assert_eq!(breaker(&router, &worker).await, "closed", "{status}");
    }
    // Nor does leaving, before the answer and within it.
    for is_begun in [false, true] {
        let mut client = send(&router, None).await;
        let mut exchange = worker.request().await;
        if is_begun {
            exchange.send(STREAM_HEAD).await;
            exchange.send(chunked("data: {}\n\n")).await;
            client.head().await.expect("a head");
        }
        drop(client);
        exchange.closed().await;
        router.until_idle().await;
        assert_eq!(breaker(&router, &worker).await, "closed");
    }
    assert_eq!(answered(&router, &mut worker, ok("{}")).await.status(), 200);
}

#[tokio::test]
async fn a_full_worker_is_avoided_while_there_is_another() {
    let [mut full, mut free] = ScriptedWorker::several::<2>().await;
    let flags = ["--cb-failure-threshold=1", "--disable-retries"];
    let router = Router::ready(&[&full.url, &free.url], &flags).await;
    let later = [("retry-after", "10")];
    for status in ["429 Too Many Requests", "503 Service Unavailable"] {
        answered(&router, &mut full, answer(status, &later, "")).await;
        assert_eq!(breaker(&router, &full).await, "closed", "{status}");
        for _ in 0..4 {
            let mut client = send(&router, None).await;
            free.request().await.answer(ok("{}")).await;
            assert_eq!(client.answer().await.status(), 200);
        }
    }
    // Who insists gets it.
    assert_eq!(answered(&router, &mut full, ok("{}")).await.status(), 200);
    // When both are full, both are used.
    answered(&router, &mut free, answer("503 Service Unavailable", &later, "")).await;
    let mut workers = [full, free];
    let mut seen = [0, 0];
    for _ in 0..4 {
        let mut client = send(&router, None).await;
        let (exchange, which) = ScriptedWorker::request_at_any(&mut workers).await;
        exchange.answer(ok("{}")).await;
        assert_eq!(client.answer().await.status(), 200);
        seen[which] += 1;
    }
    assert_eq!(seen, [2, 2], "in turn");
}

#[tokio::test]
async fn the_only_worker_is_used_however_full_it_is() {
    let mut worker = ScriptedWorker::start().await;
    let flags = ["--cb-failure-threshold=1", "--disable-retries"];
    let router = Router::ready(&[&worker.url], &flags).await;
    for status in ["429 Too Many Requests", "503 Service Unavailable"] {
        for _ in 0..3 {
            let refusal =
                answered(&router, &mut worker, answer(status, &[("retry-after", "10")], "")).await;
            assert!(status.starts_with(&refusal.status().to_string()));
            assert_eq!(refusal.header("x-router-error-code"), None, "the worker's own");
        }
    }
    assert_eq!(answered(&router, &mut worker, ok("{}")).await.status(), 200);
}

#[tokio::test]
async fn disabled_it_never_opens() {
    let mut worker = ScriptedWorker::start().await;
    let flags = ["--cb-failure-threshold=1", "--disable-circuit-breaker", "--disable-retries"];
    let router = Router::ready(&[&worker.url], &flags).await;
    for _ in 0..5 {
        answered(&router, &mut worker, answer("500 Oops", &[], "")).await;
    }
    assert_eq!(answered(&router, &mut worker, ok("{}")).await.status(), 200);
}

/// A worker whose breaker has opened with one failure and probes a second later.
async fn probed() -> (ScriptedWorker, Router) {
    let mut worker = ScriptedWorker::start().await;
    let flags = [
        "--cb-failure-threshold=1",
        "--cb-success-threshold=2",
        "--cb-timeout-duration-secs=1",
        "--disable-retries",
    ];
    let router = Router::ready(&[&worker.url], &flags).await;
    answered(&router, &mut worker, answer("500 Oops", &[], "")).await;
    (worker, router)
}

/// Asks until one request is let through to the worker.
async fn probe(router: &Router, worker: &mut ScriptedWorker) -> (Wire, Exchange) {
    soon("a probe", async {
        loop {
            let mut client = send(router, None).await;
            let refusal = tokio::select! {
                exchange = worker.request() => return (client, exchange),
                refusal = client.answer() => refusal,
            };
            assert_barred(&refusal, worker, "open");
        }
    })
    .await
}

#[tokio::test]
async fn half_open_lets_one_probe_through_at_a_time_and_closes_after_successes() {
    let (mut worker, router) = probed().await;
    let (mut first, exchange) = probe(&router, &mut worker).await;
    assert_eq!(breaker(&router, &worker).await, "half_open");
    for _ in 0..3 {
        let refusal = send(&router, None).await.answer().await;
        assert_barred(&refusal, &worker, "half_open");
    }
    assert!(worker.request_now().is_none());
    exchange.answer(ok("{}")).await;
    assert_eq!(first.answer().await.status(), 200);

    // The beginning of a stream is a success; its end may be far.
    let (mut second, mut exchange) = probe(&router, &mut worker).await;
    assert_eq!(breaker(&router, &worker).await, "half_open");
    exchange.send(STREAM_HEAD).await;
    exchange.send(chunked("data: {}\n\n")).await;
    let head = second.head().await.expect("a head");
    assert_eq!(breaker(&router, &worker).await, "closed");
    let mut others = Vec::new();
    for _ in 0..3 {
        others.push((send(&router, None).await, worker.request().await));
    }
    for (mut client, exchange) in others {
        exchange.answer(ok("{}")).await;
        assert_eq!(client.answer().await.status(), 200);
    }
    exchange.answer(chunked("")).await;
    assert!(second.body_of(head).await.is_whole);
    router.until_idle().await;
}

#[tokio::test]
async fn a_failed_probe_opens_it_again_and_a_left_one_does_not() {
    let (mut worker, router) = probed().await;
    let (client, mut exchange) = probe(&router, &mut worker).await;
    drop(client);
    exchange.closed().await;
    router.until_idle().await;
    assert_eq!(breaker(&router, &worker).await, "half_open");

    let (mut client, exchange) = probe(&router, &mut worker).await;
    exchange.answer(answer("500 Oops", &[], "")).await;
    assert_eq!(client.answer().await.status(), 500);
    assert_eq!(breaker(&router, &worker).await, "open");
    for _ in 0..2 {
        let (mut client, exchange) = probe(&router, &mut worker).await;
        exchange.answer(ok("{}")).await;
        assert_eq!(client.answer().await.status(), 200);
    }
    assert_eq!(breaker(&router, &worker).await, "closed");
}

#[tokio::test]
async fn a_probe_that_fails_is_tried_elsewhere_like_any_other_request() {
    let mut workers = ScriptedWorker::several::<2>().await;
    let flags = [
        "--cb-failure-threshold=1",
        "--cb-timeout-duration-secs=1",
        "--retry-initial-backoff-ms=1",
    ];
    let router = Router::before(&workers, &flags).await;
    let mut failed = 0;
    // Once at the first attempt, once as a probe.
    while failed < 2 {
        let mut client = send(&router, None).await;
        let [failing, sound] = &mut workers;
        tokio::select! {
            exchange = failing.request() => {
                exchange.answer(answer("500 Oops", &[], "")).await;
                sound.request().await.answer(ok("{}")).await;
                failed += 1;
            }
            exchange = sound.request() => exchange.answer(ok("{}")).await,
        }
        assert_eq!(client.answer().await.status(), 200);
    }
    assert_eq!(breaker(&router, &workers[0]).await, "open");
}
