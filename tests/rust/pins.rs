//! Requests that name their worker get that one or none.

use crate::support::{Health, Router, ScriptedWorker, ok, request};

const PIN: &str = "x-sglang-target-worker";

async fn two() -> (ScriptedWorker, ScriptedWorker, Router) {
    let workers = (ScriptedWorker::start().await, ScriptedWorker::start().await);
    let names = [
        format!("--node-ids={}=left", workers.0.url),
        format!("--node-ids={}=right", workers.1.url),
        "--health-check-interval-secs=3600".to_owned(),
    ];
    let flags: Vec<&str> = names.iter().map(String::as_str).collect();
    let router = Router::ready(&[&workers.0.url, &workers.1.url], &flags).await;
    (workers.0, workers.1, router)
}

#[tokio::test]
async fn by_name_and_by_url_and_always_there() {
    let (mut left, mut right, router) = two().await;
    let mut client = router.connect().await;
    let spellings =
        [right.url.clone(), format!("{}/", right.url), right.url.replace("http", "HTTP")];
    for pin in ["right", "right", &spellings[0], &spellings[1], &spellings[2], "right"] {
        client.send(request("POST /generate", &[(PIN, pin), ("x-request-id", pin)], "{}")).await;
        let exchange = right.request().await;
        assert_eq!(exchange.request.header(PIN), None);
        exchange.answer(ok("{}")).await;
        let answer = client.answer().await;
        assert_eq!(answer.header("x-sglang-node").as_deref(), Some("right"));
        let trace = router.trace_now(pin).await;
        assert_eq!((&trace["reason"], &trace["node_id"]), (&"pinned".into(), &"right".into()));
    }
    assert!(left.request_now().is_none());
}

#[tokio::test]
async fn an_unknown_one_is_an_error_of_the_client() {
    let (mut left, mut right, router) = two().await;
    for pin in ["middle", "http://127.0.0.1:1", "", "gpu_0"] {
        let headers = [(PIN, pin), ("x-request-id", "x")];
        let answer = router.ask(request("POST /generate", &headers, "{}")).await;
        assert_eq!((answer.status(), answer.error_code().as_str()), (400, "unknown_target_worker"));
        assert!(answer.error_message().contains(&format!("{pin:?}")), "{}", answer.error_message());
        assert!(answer.error_message().contains(PIN));
        let trace = router.trace_now("x").await;
        assert_eq!(
            (trace["status"].as_str(), trace["worker_url"].as_str()),
            (Some("failed"), None)
        );
    }
    assert!(left.request_now().is_none() && right.request_now().is_none());
}

#[tokio::test]
async fn one_that_is_not_healthy_is_not_replaced() {
    let (mut left, mut right, router) = two().await;
    right.go_down().await;
    let pinned = request("POST /generate", &[(PIN, "right"), ("x-request-id", "x")], "{}");
    let answer = router.ask(&pinned).await;
    assert_eq!((answer.status(), answer.error_code().as_str()), (502, "worker_unreachable"));
    assert_eq!(answer.header("x-sglang-node").as_deref(), Some("right"));
    assert_eq!(router.trace_now("x").await["attempts"].as_array().map(Vec::len), Some(1));
    let answer = router.ask(&pinned).await;
    assert_eq!((answer.status(), answer.error_code().as_str()), (503, "no_available_workers"));
    assert!(answer.error_message().contains(&right.url), "{}", answer.error_message());
    assert!(left.request_now().is_none());
}

#[tokio::test]
async fn a_pinned_request_waits_for_its_worker_in_the_first_round() {
    let mut slow = ScriptedWorker::start_with(Health::Withheld).await;
    let mut good = ScriptedWorker::start().await;
    let router = Router::start(&[&slow.url, &good.url], &[]);
    router.until_healthy(1).await;
    let mut client = router.connect().await;
    let headers = [(PIN, slow.url.as_str()), ("x-request-id", "x")];
    client.send(request("POST /generate", &headers, "{}")).await;
    router.trace_when("x", "queued").await;
    slow.set_health(Health::Good);
    slow.request().await.answer(ok("{}")).await;
    assert_eq!(client.answer().await.status(), 200);
    assert!(good.request_now().is_none());
}
