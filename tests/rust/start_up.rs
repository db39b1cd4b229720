//! From the moment the port opens: requests wait for the first round of checks, workers come and go.

use serde_json::Value;

use crate::support::{Health, Router, ScriptedWorker, ok, request, until};

#[tokio::test]
async fn a_request_that_comes_at_once_waits_for_the_first_round() {
    let mut worker = ScriptedWorker::start_with(Health::Withheld).await;
    let router = Router::start(&[&worker.url], &[]);
    let mut client = router.connect().await;
    client.send(request("POST /generate", &[("x-request-id", "early")], "{}")).await;
    let trace = router.trace_when("early", "queued").await;
    assert_eq!((&trace["worker_url"], &trace["queue_ms"]), (&Value::Null, &Value::Null));
    let readiness = router.get("/readiness").await;
    assert_eq!((readiness.status(), readiness.json()["status"].as_str()), (503, Some("not ready")));
    assert_eq!(router.get("/health").await.status(), 200);
    assert_eq!(router.get("/liveness").await.status(), 200);
    assert!(worker.request_now().is_none(), "sent before the check ended");

    worker.set_health(Health::Good);
    worker.request().await.answer(ok("{}")).await;
    assert_eq!(client.answer().await.status(), 200);
    assert_eq!(router.get("/readiness").await.status(), 200);
    assert!(router.trace_now("early").await["queue_ms"].is_f64());
}

#[tokio::test]
async fn a_request_does_not_wait_for_the_rest_once_a_worker_is_healthy() {
    let mut good = ScriptedWorker::start().await;
    let hung = ScriptedWorker::start_with(Health::Withheld).await;
    let router = Router::start(&[&hung.url, &good.url], &[]);
    router.until_healthy(1).await;
    let mut client = router.connect().await;
    client.send(request("POST /generate", &[], "{}")).await;
    good.request().await.answer(ok("{}")).await;
    assert_eq!(client.answer().await.status(), 200);
}

#[tokio::test]
async fn a_request_waits_no_longer_than_the_queue_timeout() {
    let worker = ScriptedWorker::start_with(Health::Withheld).await;
    let router = Router::start(&[&worker.url], &["--queue-timeout-secs=0"]);
    let answer = router.ask(request("POST /generate", &[("x-request-id", "x")], "{}")).await;
    assert_eq!((answer.status(), answer.error_code().as_str()), (408, "queue_timeout"));
    assert!(answer.error_message().contains("queue_timeout_secs"));
    let trace = router.trace_now("x").await;
    assert_eq!((trace["status"].as_str(), &trace["http_status"]), (Some("failed"), &408.into()));
    assert_eq!(trace["attempts"], serde_json::json!([]));
}

#[tokio::test]
async fn a_bad_first_round_ends_the_waiting() {
    let worker = ScriptedWorker::start_with(Health::Bad).await;
    let router = Router::start(&[&worker.url], &[]);
    let answer = router.post("/generate", "{}").await;
    assert_eq!((answer.status(), answer.error_code().as_str()), (503, "no_available_workers"));
    assert!(answer.error_message().contains(&format!("{} is starting", worker.url)));
    worker.set_health(Health::Good);
    router.until_healthy(1).await;
}

#[tokio::test]
async fn a_worker_that_is_down_at_the_start_joins_later() {
    let good = ScriptedWorker::start().await;
    let mut late = ScriptedWorker::down().await;
    let router = Router::start(&[&good.url, &late.url], &[]);
    router.until_healthy(1).await;
    assert_eq!(router.worker(&late.url).await["state"], "starting");
    late.up();
    router.until_healthy(2).await;
    let readiness = router.json("/readiness").await;
    assert_eq!((&readiness["status"], &readiness["total_workers"]), (&"ready".into(), &2.into()));
}

#[tokio::test]
async fn checks_take_a_worker_out_and_bring_it_back() {
    let worker = ScriptedWorker::start().await;
    let flags = [
        "--health-check-interval-secs=1",
        "--health-failure-threshold=1",
        "--health-success-threshold=1",
    ];
    let router = Router::ready(&[&worker.url], &flags).await;
    worker.set_health(Health::Bad);
    until("the worker to be out", async || {
        (router.worker(&worker.url).await["state"] == "unhealthy").then_some(())
    })
    .await;
    assert_eq!(router.post("/generate", "{}").await.error_code(), "no_available_workers");
    worker.set_health(Health::Good);
    router.until_healthy(1).await;
}

#[tokio::test]
async fn without_checks_a_worker_is_there_from_the_start() {
    let mut worker = ScriptedWorker::start_with(Health::Bad).await;
    let router = Router::start(&[&worker.url], &["--disable-health-check"]);
    assert_eq!(router.get("/readiness").await.status(), 200);
    let mut client = router.connect().await;
    client.send(request("POST /generate", &[], "{}")).await;
    worker.request().await.answer(ok("{}")).await;
    assert_eq!(client.answer().await.status(), 200);
    worker.go_down().await;
    let answer = router.post("/generate", "{}").await;
    assert_eq!(answer.error_code(), "worker_unreachable");
    assert_eq!(router.worker(&worker.url).await["is_healthy"], true);
}

#[tokio::test]
async fn a_stopping_router_takes_nothing_new_and_ends_what_it_has() {
    let mut worker = ScriptedWorker::start().await;
    let router = Router::ready(&[&worker.url], &[]).await;
    let mut client = router.connect().await;
    let mut idle = router.connect().await;
    assert_eq!(idle.ask(request("GET /health", &[], "")).await.status(), 200);
    client.send(request("POST /generate", &[], "{}")).await;
    let exchange = worker.request().await;
    router.drain();
    assert!(idle.rest().await.is_empty(), "idle connections are closed");
    until("the port's end", async || {
        tokio::net::TcpStream::connect(router.address).await.is_err().then_some(())
    })
    .await;
    exchange.answer(ok("{}")).await;
    assert_eq!(client.answer().await.status(), 200);
    assert!(client.rest().await.is_empty());
    until("the router's end", async || router.has_ended().then_some(())).await;
}
