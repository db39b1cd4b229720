//! Connections to workers: kept, used again, and what each way of losing one means.

use serde_json::Value;

use crate::support::{Exchange, Message, Router, ScriptedWorker, Wire, ok, request, until};

async fn post(client: &mut Wire, id: &str) {
    client.send(request("POST /generate", &[("x-request-id", id)], r#"{"text":"x"}"#)).await;
}

fn attempts(trace: &Value) -> Vec<Value> {
    trace["attempts"].as_array().expect("a list").clone()
}

/// The request that arrives at either worker, and which of them it was.
async fn at_either(workers: &mut [ScriptedWorker; 2]) -> (Exchange, usize) {
    let [first, second] = workers;
    tokio::select! {
        exchange = first.request() => (exchange, 0),
        exchange = second.request() => (exchange, 1),
    }
}

async fn two(flags: &[&str]) -> ([ScriptedWorker; 2], Router) {
    let workers = [ScriptedWorker::start().await, ScriptedWorker::start().await];
    let router = Router::ready(&[&workers[0].url, &workers[1].url], flags).await;
    (workers, router)
}

/// A worker that has answered one request, so that the next one finds its connection; nothing is retried.
async fn warm() -> (ScriptedWorker, Router, Wire) {
    let mut worker = ScriptedWorker::start().await;
    let router = Router::ready(&[&worker.url], &["--disable-retries"]).await;
    let mut client = router.connect().await;
    post(&mut client, "first").await;
    worker.request().await.answer(ok("{}")).await;
    client.answer().await;
    (worker, router, client)
}

#[tokio::test]
async fn a_connection_is_used_again() {
    let mut worker = ScriptedWorker::start().await;
    let router = Router::ready(&[&worker.url], &[]).await;
    for number in 0..5 {
        let mut client = router.connect().await;
        post(&mut client, "x").await;
        let exchange = worker.request().await;
        assert_eq!(exchange.connection, 0, "request {number}");
        exchange.answer(ok("{}")).await;
        assert_eq!(client.answer().await.status(), 200);
    }
    assert_eq!(worker.connections(), 1);
}

#[tokio::test]
async fn a_connection_that_the_worker_gives_up_is_not() {
    let mut worker = ScriptedWorker::start().await;
    let router = Router::ready(&[&worker.url], &[]).await;
    let mut client = router.connect().await;
    for number in 0..3 {
        post(&mut client, "x").await;
        let exchange = worker.request().await;
        assert_eq!(exchange.connection, number);
        let answer = "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\n{}";
        exchange.answer(answer).await;
        assert_eq!(client.answer().await.body, b"{}");
    }
}

#[tokio::test]
async fn a_connection_that_ends_with_its_answer_costs_nothing() {
    let mut worker = ScriptedWorker::start().await;
    let router = Router::ready(&[&worker.url], &["--disable-retries"]).await;
    let mut client = router.connect().await;
    for _ in 0..20 {
        post(&mut client, "x").await;
        let mut exchange = worker.request().await;
        exchange.send(ok("{}")).await;
        // The router may or may not have seen the end when the next request comes.
        drop(exchange);
        assert_eq!(client.answer().await.status(), 200);
        assert_eq!(attempts(&router.trace_now("x").await).len(), 1);
    }
}

#[tokio::test]
async fn a_reused_connection_that_ends_silently_is_replaced_once_and_is_no_attempt() {
    let (mut worker, router, mut client) = warm().await;
    post(&mut client, "again").await;
    let lost = worker.request().await;
    let (sent, reused) = (lost.request.clone(), lost.connection);
    drop(lost);
    let exchange = worker.request().await;
    assert!(exchange.connection > reused, "a new connection");
    assert_eq!((&exchange.request.head, &exchange.request.body), (&sent.head, &sent.body));
    exchange.answer(ok("{}")).await;
    assert_eq!(client.answer().await.status(), 200);

    let trace = router.trace_now("again").await;
    assert_eq!((trace["status"].as_str(), attempts(&trace).len()), (Some("completed"), 1));
    assert!(trace["attempts"][0]["error"].is_null());
    let worker = router.worker(&worker.url).await;
    assert_eq!((&worker["served"], &worker["failed"]), (&2.into(), &0.into()));
    assert_eq!(worker["state"], "healthy");
}

#[tokio::test]
async fn a_reused_connection_is_replaced_only_once() {
    let (mut worker, router, mut client) = warm().await;
    post(&mut client, "lost").await;
    drop(worker.request().await);
    drop(worker.request().await);
    let answer = client.answer().await;
    assert_eq!((answer.status(), answer.error_code().as_str()), (502, "worker_unreachable"));
    assert_eq!(attempts(&router.trace_now("lost").await).len(), 1);
    assert!(worker.request_now().is_none());
    assert_eq!(router.worker(&worker.url).await["failed"], 1);
}

#[tokio::test]
async fn a_reused_connection_that_breaks_within_an_answer_is_a_failed_attempt() {
    let (mut workers, router) = two(&[]).await;
    let mut client = router.connect().await;
    for _ in 0..2 {
        post(&mut client, "warm").await;
        at_either(&mut workers).await.0.answer(ok("{}")).await;
        client.answer().await;
    }
    post(&mut client, "broken").await;
    let (mut exchange, failing) = at_either(&mut workers).await;
    assert_eq!(exchange.connection, 0, "reused");
    exchange.send("HTTP/1.1 20").await;
    drop(exchange);
    let (exchange, serving) = at_either(&mut workers).await;
    assert_ne!(serving, failing, "it may have been acted on: not sent there again");
    exchange.answer(ok("{}")).await;
    assert_eq!(client.answer().await.status(), 200);
    assert!(workers[failing].request_now().is_none());

    let trace = router.trace_now("broken").await;
    let attempts = attempts(&trace);
    assert_eq!(attempts.len(), 2);
    assert_eq!(attempts[0]["worker_url"], workers[failing].url);
    assert!(attempts[0]["error"].as_str().is_some_and(|error| error.contains("ended before")));
    assert!(attempts[0]["http_status"].is_null());
    assert_eq!((&attempts[1]["error"], &attempts[1]["http_status"]), (&Value::Null, &200.into()));
    assert_eq!(
        (&trace["status"], &trace["worker_url"]),
        (&"completed".into(), &workers[serving].url.clone().into())
    );
}

#[tokio::test]
async fn a_new_connection_that_dies_before_an_answer_sends_the_request_elsewhere() {
    let (mut workers, router) = two(&[]).await;
    let mut client = router.connect().await;
    post(&mut client, "x").await;
    let (exchange, dying) = at_either(&mut workers).await;
    drop(exchange);
    let (exchange, serving) = at_either(&mut workers).await;
    assert_ne!(serving, dying);
    exchange.answer(ok("{}")).await;
    let answer = client.answer().await;
    assert_eq!(answer.header("x-sglang-worker").as_deref(), Some(workers[serving].url.as_str()));
    let trace = router.trace_now("x").await;
    assert_eq!(attempts(&trace).len(), 2);
    assert!(trace["attempts"][0]["error"].is_string());
    assert_eq!(trace["error_message"], Value::Null);
    // It accepted the connection: not a worker that is away.
    assert_eq!(router.worker(&workers[dying].url).await["state"], "healthy");
}

#[tokio::test]
async fn a_refused_request_goes_elsewhere_and_the_worker_is_out_until_a_check_succeeds() {
    let (mut workers, router) = two(&["--health-check-interval-secs=3600"]).await;
    workers[0].go_down().await;
    let mut client = router.connect().await;
    let mut refused = Vec::new();
    for id in ["1", "2", "3", "4"] {
        post(&mut client, id).await;
        workers[1].request().await.answer(ok("{}")).await;
        let answer = client.answer().await;
        assert_eq!(answer.header("x-sglang-worker").as_deref(), Some(workers[1].url.as_str()));
        let attempts = attempts(&router.trace_now(id).await);
        if attempts.len() == 2 {
            refused.push(attempts);
        }
    }
    assert_eq!(refused.len(), 1, "only one request found out");
    assert_eq!(refused[0][0]["worker_url"], workers[0].url);
    let error = refused[0][0]["error"].as_str().expect("an error");
    assert!(error.contains("cannot connect"), "{error}");
    assert_eq!(refused[0][1]["worker_url"], workers[1].url);
    let worker = router.worker(&workers[0].url).await;
    assert_eq!((&worker["state"], &worker["is_healthy"]), (&"unreachable".into(), &false.into()));
    assert_eq!((&worker["failed"], &worker["load"]), (&1.into(), &0.into()));

    workers[0].up();
    router.until_healthy(2).await;
    for _ in 0..2 {
        post(&mut client, "back").await;
        at_either(&mut workers).await.0.answer(ok("{}")).await;
        assert_eq!(client.answer().await.status(), 200);
    }
    assert_eq!(workers[0].connections(), 1, "in turn again");
}

async fn refusal(router: &Router, id: &str) -> (Message, Value) {
    let request = request("POST /generate", &[("x-request-id", id)], "{}");
    (router.ask(request).await, router.trace_when(id, "failed").await)
}

#[tokio::test]
async fn when_all_workers_are_dead_the_last_one_is_named() {
    let (mut workers, router) = two(&["--health-check-interval-secs=3600"]).await;
    for worker in &mut workers {
        worker.go_down().await;
    }
    let (answer, trace) = refusal(&router, "x").await;
    assert_eq!((answer.status(), answer.error_code().as_str()), (502, "worker_unreachable"));
    let attempts = attempts(&trace);
    assert_eq!(attempts.len(), 2);
    assert_ne!(attempts[0]["worker_url"], attempts[1]["worker_url"]);
    let last = attempts[1]["worker_url"].as_str();
    assert_eq!(answer.header("x-sglang-worker").as_deref(), last);
    assert_eq!(answer.header("x-sglang-node").as_deref(), attempts[1]["node_id"].as_str());
    assert_eq!((trace["worker_url"].as_str(), &trace["http_status"]), (last, &502.into()));
    assert_eq!(trace["error_message"].as_str(), Some(answer.error_message().as_str()));

    let (answer, trace) = refusal(&router, "y").await;
    assert_eq!((answer.status(), answer.error_code().as_str()), (503, "no_available_workers"));
    assert!(answer.error_message().contains(&workers[0].url), "{}", answer.error_message());
    assert_eq!(answer.header("x-sglang-worker"), None);
    for field in ["worker_url", "node_id", "reason", "decision_us"] {
        assert!(trace[field].is_null(), "{field}");
    }
    assert_eq!(trace["attempts"], serde_json::json!([]));
    router.until_idle().await;
}

#[tokio::test]
async fn without_workers_every_request_is_refused_at_once() {
    let router = Router::start(&[], &[]);
    let (answer, trace) = refusal(&router, "x").await;
    assert_eq!((answer.status(), answer.error_code().as_str()), (503, "no_available_workers"));
    assert_eq!(answer.header("x-request-id").as_deref(), Some("x"));
    assert_eq!((&trace["http_status"], &trace["worker_url"]), (&503.into(), &Value::Null));
    assert_eq!(router.get("/readiness").await.status(), 503);
    assert_eq!(router.json("/workers").await["total"], 0);
}

#[tokio::test]
async fn a_request_is_tried_no_more_often_than_allowed() {
    for (flag, allowed) in
        [("--disable-retries", 1), ("--retry-max-retries=1", 1), ("--retry-max-retries=2", 2)]
    {
        let mut workers = [
            ScriptedWorker::start().await,
            ScriptedWorker::start().await,
            ScriptedWorker::start().await,
        ];
        let urls: Vec<String> = workers.iter().map(|worker| worker.url.clone()).collect();
        let urls: Vec<&str> = urls.iter().map(String::as_str).collect();
        let router = Router::ready(&urls, &[flag]).await;
        for worker in &mut workers {
            worker.go_down().await;
        }
        let (answer, trace) = refusal(&router, "x").await;
        assert_eq!(answer.status(), 502, "{flag}");
        assert_eq!(attempts(&trace).len(), allowed, "{flag}");
    }
}

#[tokio::test]
async fn something_else_than_http_is_a_failed_attempt() {
    let mut worker = ScriptedWorker::start().await;
    let router = Router::ready(&[&worker.url], &["--disable-retries"]).await;
    let mut client = router.connect().await;
    post(&mut client, "x").await;
    worker.request().await.answer("220 smtp ready\r\n\r\n").await;
    let answer = client.answer().await;
    assert_eq!((answer.status(), answer.error_code().as_str()), (502, "worker_unreachable"));
    router.until_idle().await;
}

#[tokio::test]
async fn idle_connections_are_closed() {
    let mut worker = ScriptedWorker::start().await;
    let router = Router::ready(&[&worker.url], &[]).await;
    let mut client = router.connect().await;
    post(&mut client, "x").await;
    worker.request().await.answer(ok("{}")).await;
    client.answer().await;
    assert_eq!(worker.open_connections(), 1);
    until("the idle connection's end", async || (worker.open_connections() == 0).then_some(()))
        .await;
    post(&mut client, "y").await;
    let exchange = worker.request().await;
    assert_eq!(exchange.connection, 1);
    exchange.answer(ok("{}")).await;
    assert_eq!(client.answer().await.status(), 200);
}
