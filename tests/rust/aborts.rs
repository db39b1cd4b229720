//! `POST /abort_request`: a request is ended wherever it is, and its worker told; nobody else.

use serde_json::{Value, json};

use crate::support::{
    Message, Router, STREAM_HEAD, ScriptedWorker, Wire, answer, chunked, ok, request, until,
};

async fn begin(router: &Router, id: &str, body: &str) -> Wire {
    let mut client = router.connect().await;
    client.send(request("POST /generate", &[("x-request-id", id)], body)).await;
    client
}

/// Asks for the end of a request, and answers for the workers that are told.
async fn abort(router: &Router, body: &Value, told: &mut [&mut ScriptedWorker]) -> Message {
    let body = body.to_string();
    let mut client = router.connect().await;
    client.send(request("POST /abort_request", &[], &body)).await;
    for worker in told {
        let exchange = worker.request().await;
        assert_eq!(exchange.request.first_line(), "POST /abort_request HTTP/1.1");
        assert_eq!(exchange.request.text(), body);
        exchange.answer(ok("")).await;
    }
    client.answer().await
}

fn assert_report(report: &Message, aborted: usize, told: &[&str]) {
    assert_eq!(report.status(), 200, "{}", report.text());
    let expected =
        json!({"status": "success", "aborted": aborted, "successful": told, "failed": []});
    assert_eq!(report.json(), expected);
}

fn assert_aborted(answer: &Message) {
    assert_eq!((answer.status(), answer.error_code().as_str()), (499, "aborted"));
    assert!(answer.error_message().contains("/abort_request"), "{}", answer.error_message());
}

async fn failed(router: &Router, id: &str) -> Value {
    let trace = router.trace_when(id, "failed").await;
    let message = trace["error_message"].as_str().expect("a message");
    assert!(message.contains("/abort_request"), "{message}");
    trace
}

#[tokio::test]
async fn a_request_at_its_worker_is_ended_there_by_either_of_its_ids() {
    for rid in ["by-header", "by-body"] {
        let [mut worker, mut other] = ScriptedWorker::several::<2>().await;
        let router = Router::ready(&[&worker.url, &other.url], &[]).await;
        let mut client = router.connect().await;
        let headers =
            [("x-request-id", "by-header"), ("x-sglang-target-worker", worker.url.as_str())];
        client.send(request("POST /generate", &headers, r#"{"rid":"by-body"}"#)).await;
        let mut exchange = worker.request().await;
        let report = abort(&router, &json!({"rid": rid}), &mut [&mut worker]).await;
        exchange.closed().await;
        assert_report(&report, 1, &[&worker.url]);
        let refusal = client.answer().await;
        assert_aborted(&refusal);
        assert_eq!(refusal.header("x-sglang-worker").as_deref(), Some(worker.url.as_str()));
        let trace = failed(&router, "by-header").await;
        assert_eq!(
            (&trace["http_status"], trace["attempts"].as_array().map(Vec::len)),
            (&499.into(), Some(1))
        );
        assert!(other.request_now().is_none() && worker.request_now().is_none());
        router.until_idle().await;
        assert_eq!(router.worker(&worker.url).await["failed"], 0, "not the worker's fault");
    }
}

#[tokio::test]
async fn a_stream_is_ended_so_that_its_client_knows() {
    let mut worker = ScriptedWorker::start().await;
    let router = Router::ready(&[&worker.url], &[]).await;
    for (id, head) in [
        ("events", STREAM_HEAD),
        ("other", "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"),
    ] {
        let mut client = begin(&router, id, "{}").await;
        let mut exchange = worker.request().await;
        exchange.send([head.as_bytes(), &chunked("data: 1\n\n")].concat()).await;
        let head = client.head().await.expect("a head");
        let report = abort(&router, &json!({"rid": id}), &mut [&mut worker]).await;
        assert_report(&report, 1, &[&worker.url]);
        exchange.closed().await;
        let answer = client.body_of(head).await;
        assert_eq!(answer.is_whole, id == "events");
        let text = answer.text();
        let rest = text.strip_prefix("data: 1\n\n").expect("what was sent");
        assert_eq!(rest.contains(r#""code":"aborted""#), id == "events", "{rest}");
        assert_eq!(failed(&router, id).await["http_status"], 200);
    }
    router.until_idle().await;
}

#[tokio::test]
async fn a_request_that_is_at_no_worker_is_ended_without_telling_any() {
    let mut worker = ScriptedWorker::start().await;
    let flags = [
        "--max-concurrent-requests=1",
        "--retry-initial-backoff-ms=1000000",
        "--retry-max-backoff-ms=1000000",
    ];
    let router = Router::ready(&[&worker.url], &flags).await;
    let mut pausing = begin(&router, "pausing", "{}").await;
    drop(worker.request().await);
    until("the pause", async || {
        router.trace_now("pausing").await["attempts"][0]["error"].is_string().then_some(())
    })
    .await;
    let mut queued = begin(&router, "queued", "{}").await;
    router.trace_when("queued", "queued").await;
    assert_report(&abort(&router, &json!({"rid": "queued"}), &mut []).await, 1, &[]);
    assert_aborted(&queued.answer().await);
    let trace = failed(&router, "queued").await;
    assert_eq!((&trace["worker_url"], &trace["attempts"]), (&Value::Null, &json!([])));
    // Its place is free again, and after the other's end its slot is too.
    let mut next = begin(&router, "next", "{}").await;
    router.trace_when("next", "queued").await;
    assert_report(&abort(&router, &json!({"rid": "pausing"}), &mut []).await, 1, &[]);
    assert_aborted(&pausing.answer().await);
    worker.request().await.answer(ok("{}")).await;
    assert_eq!(next.answer().await.status(), 200);
    router.until_idle().await;
}

#[tokio::test]
async fn all_requests_of_an_id_are_ended_and_none_of_another() {
    let mut worker = ScriptedWorker::start().await;
    let router = Router::ready(&[&worker.url], &[]).await;
    let mut ended = Vec::new();
    for _ in 0..3 {
        ended.push((begin(&router, "x", "{}").await, worker.request().await));
    }
    let mut kept = begin(&router, "xx", "{}").await;
    let kept_exchange = worker.request().await;
    let report = abort(&router, &json!({"rid": "x"}), &mut [&mut worker]).await;
    assert_report(&report, 3, &[&worker.url]);
    for (mut client, mut exchange) in ended {
        exchange.closed().await;
        assert_aborted(&client.answer().await);
    }
    kept_exchange.answer(ok("{}")).await;
    assert_eq!(kept.answer().await.status(), 200);
}

#[tokio::test]
async fn of_what_is_not_in_flight_here_all_workers_are_told() {
    let [mut one, mut other] = ScriptedWorker::several::<2>().await;
    let router = Router::ready(&[&one.url, &other.url], &[]).await;
    let mut client = begin(&router, "x", "{}").await;
    let exchange = one.request().await;
    for body in [
        json!({"rid": "elsewhere"}),
        json!({"abort_all": true}),
        json!({"rid": "", "abort_all": true}),
    ] {
        let report = abort(&router, &body, &mut [&mut one, &mut other]).await;
        assert_report(&report, 0, &[&one.url, &other.url]);
    }
    // What the workers do of it is theirs.
    exchange.answer(ok("{}")).await;
    assert_eq!(client.answer().await.status(), 200);
}

#[tokio::test]
async fn a_worker_that_does_not_take_it_is_named() {
    let [mut one, mut other] = ScriptedWorker::several::<2>().await;
    let router = Router::ready(&[&one.url, &other.url], &[]).await;
    let mut client = router.connect().await;
    client.send(request("POST /abort_request", &[], r#"{"rid":"elsewhere"}"#)).await;
    one.request().await.answer(answer("500 Oops", &[], "no")).await;
    other.request().await.answer(ok("")).await;
    let report = client.answer().await;
    assert_eq!(report.status(), 206);
    let json = report.json();
    assert_eq!(
        (&json["status"], &json["successful"]),
        (&"partial_success".into(), &json!([other.url]))
    );
    assert_eq!(json["failed"][0]["worker"], one.url);
    for body in ["", "{}", "[]", r#"{"rid":5}"#, r#"{"abort_all":false}"#] {
        let refusal = router.post("/abort_request", body).await;
        assert_eq!(
            (refusal.status(), refusal.error_code().as_str()),
            (400, "invalid_request"),
            "{body}"
        );
    }
    assert!(one.request_now().is_none() && other.request_now().is_none());
}
