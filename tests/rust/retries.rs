//! Another attempt: when there is one, at which worker, and what the client and the trace see of it.
//!
//! A pause that must not end is a thousand seconds long here, one that must be is a millisecond.

use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::support::{
    Exchange, Message, Router, STREAM_HEAD, ScriptedWorker, Wire, answer, chunked, ok, request,
    until,
};

const AT_ONCE: &str = "--retry-initial-backoff-ms=1";
const NEVER: [&str; 2] = ["--retry-initial-backoff-ms=1000000", "--retry-max-backoff-ms=1000000"];

async fn post(router: &Router, id: &str, body: impl AsRef<[u8]>) -> Wire {
    let mut client = router.connect().await;
    client.send(request("POST /generate", &[("x-request-id", id)], body)).await;
    client
}

fn attempts(trace: &Value) -> Vec<Value> {
    trace["attempts"].as_array().expect("a list").clone()
}

/// The trace of a request that has ended, with what must hold of every such trace.
async fn ended(router: &Router, id: &str, status: &str) -> Value {
    let trace = router.trace_when(id, status).await;
    let attempts = attempts(&trace);
    let last = attempts.last().expect("an attempt");
    assert_eq!((&last["worker_url"], &last["node_id"]), (&trace["worker_url"], &trace["node_id"]));
    for attempt in &attempts {
        assert!(attempt["latency_ms"].is_f64(), "{attempt}");
    }
    for attempt in &attempts[..attempts.len() - 1] {
        assert!(attempt["error"].is_string(), "it is why there was another: {attempt}");
    }
    trace
}

#[tokio::test]
async fn a_status_that_another_worker_may_not_give_is_passed_over() {
    let mut workers = ScriptedWorker::several::<2>().await;
    let router = Router::before(&workers, &[AT_ONCE]).await;
    for status in [408, 429, 500, 502, 503, 504] {
        let id = format!("of-{status}");
        let mut client = post(&router, &id, r#"{"text":"x"}"#).await;
        let (exchange, failing) = ScriptedWorker::request_at_any(&mut workers).await;
        let first = exchange.request.clone();
        let refusal = format!("not now, {status}");
        exchange.answer(answer(&format!("{status} Odd"), &[("x-a", "1")], &refusal)).await;
        let (exchange, serving) = ScriptedWorker::request_at_any(&mut workers).await;
        assert_ne!(serving, failing, "{status}");
        assert_eq!(exchange.request.first_line(), first.first_line());
        assert_eq!(exchange.request.body, first.body);
        assert_eq!(exchange.request.header("x-request-id"), Some(id.clone()));
        let mut loads = [0, 0];
        loads[serving] = 1;
        assert_eq!(router.loads().await, loads, "{status}: in flight where it is now");
        exchange.answer(ok(r#"{"meta_info":{"id":"w"}}"#)).await;

        let answer = client.answer().await;
        assert_eq!((answer.status(), answer.header("x-a")), (200, None));
        let url = workers[serving].url.as_str();
        assert_eq!(answer.header("x-sglang-worker").as_deref(), Some(url));
        let trace = ended(&router, &id, "completed").await;
        assert_eq!((trace["worker_url"].as_str(), &trace["http_status"]), (Some(url), &200.into()));
        assert_eq!(trace["worker_request_id"], "w");
        assert!(trace["error_message"].is_null());
        let attempts = attempts(&trace);
        assert_eq!(attempts.len(), 2, "{trace}");
        assert_eq!(attempts[0]["worker_url"], workers[failing].url);
        assert_eq!(attempts[0]["http_status"], status);
        let error = attempts[0]["error"].as_str().expect("an error");
        assert!(error.contains(&status.to_string()) && error.contains(&refusal), "{error}");
        assert_eq!(
            (&attempts[1]["http_status"], &attempts[1]["error"]),
            (&200.into(), &Value::Null)
        );
    }
    let counted = router.until_idle().await;
    assert_eq!(counted.iter().map(|(_, served, _)| served).sum::<u64>(), 6);
    // What is about the request (4xx) is no failure of the worker's.
    assert_eq!(counted.iter().map(|(_, _, failed)| failed).sum::<u64>(), 4);
}

#[tokio::test]
async fn an_answer_that_is_passed_over_is_closed_before_another_worker_is_asked() {
    let mut workers = ScriptedWorker::several::<2>().await;
    let router = Router::before(&workers, &[AT_ONCE]).await;
    let mut client = post(&router, "x", "{}").await;
    let (mut endless, _) = ScriptedWorker::request_at_any(&mut workers).await;
    endless.send("HTTP/1.1 503 Busy\r\ntransfer-encoding: chunked\r\n\r\n").await;
    endless.send(chunked("and more to come")).await;
    let (exchange, _) = ScriptedWorker::request_at_any(&mut workers).await;
    endless.closed().await;
    exchange.answer(ok("{}")).await;
    assert_eq!(client.answer().await.status(), 200);
}

#[tokio::test]
async fn any_other_status_is_the_answer() {
    let mut workers = ScriptedWorker::several::<2>().await;
    let router = Router::before(&workers, &[AT_ONCE]).await;
    for status in [302, 400, 401, 404, 409, 413, 422, 501, 505] {
        let id = format!("of-{status}");
        let mut client = post(&router, &id, "{}").await;
        let (exchange, which) = ScriptedWorker::request_at_any(&mut workers).await;
        exchange.answer(answer(&format!("{status} Odd"), &[], "why")).await;
        let answer = client.answer().await;
        assert_eq!((answer.status(), answer.text().as_str()), (status, "why"));
        let trace = ended(&router, &id, "failed").await;
        assert_eq!(attempts(&trace).len(), 1, "{status}");
        assert_eq!(trace["worker_url"], workers[which].url);
    }
    assert!(workers.iter_mut().all(|worker| worker.request_now().is_none()));
}

/// Sends a request to two workers of which the first fails in this way, and sees that the other one answers, at once.
async fn goes_elsewhere(way: &str, fail: impl AsyncFnOnce(Exchange)) {
    let mut workers = ScriptedWorker::several::<2>().await;
    let router = Router::before(&workers, &NEVER).await;
    let mut client = post(&router, "x", r#"{"stream":true}"#).await;
    let (exchange, failing) = ScriptedWorker::request_at_any(&mut workers).await;
    fail(exchange).await;
    let (exchange, serving) = ScriptedWorker::request_at_any(&mut workers).await;
    assert_ne!(serving, failing, "{way}");
    let mut loads = [0, 0];
    loads[serving] = 1;
    assert_eq!(router.loads().await, loads, "{way}");
    exchange.answer(ok("{}")).await;
    let answer = client.answer().await;
    assert_eq!((answer.status(), answer.text().as_str()), (200, "{}"), "{way}");
    let trace = ended(&router, "x", "completed").await;
    let attempts = attempts(&trace);
    assert_eq!(attempts.len(), 2, "{way}");
    assert_eq!(attempts[0]["worker_url"], workers[failing].url, "{way}");
    let worker = router.worker(&workers[failing].url).await;
    assert_eq!((&worker["failed"], &worker["load"]), (&1.into(), &0.into()), "{way}");
    router.until_idle().await;
}

#[tokio::test]
async fn a_worker_that_fails_before_its_first_byte_is_followed_by_another_at_once() {
    goes_elsewhere("closed", async |exchange| drop(exchange)).await;
    goes_elsewhere("reset", async |mut exchange| exchange.wire().reset_at_end()).await;
    for (way, bytes) in [
        ("garbage", "220 smtp ready\r\n\r\n"),
        ("a line", "HTTP/1.1 200 O"),
        ("half a head", "HTTP/1.1 200 OK\r\ncontent-le"),
        ("a head", "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n"),
        ("a stream's head", STREAM_HEAD),
        ("a chunk's size", "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\n"),
        ("a bad chunk", "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n"),
        ("an interim answer", "HTTP/1.1 100 Continue\r\n\r\n"),
        ("another protocol", "HTTP/1.1 101 Switching Protocols\r\nupgrade: h2c\r\n\r\n"),
    ] {
        goes_elsewhere(way, async |mut exchange| exchange.send(bytes).await).await;
    }
}

#[tokio::test]
async fn a_worker_that_accepts_and_closes_or_refuses_is_followed_by_another_at_once() {
    let closing = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let closing_url = format!("http://{}", closing.local_addr().expect("an address"));
    let accepting = tokio::spawn(async move {
        loop {
            drop(closing.accept().await);
        }
    });
    let refusing = ScriptedWorker::down().await;
    let mut serving = ScriptedWorker::start().await;
    let flags = [&NEVER[..], &["--disable-health-check"]].concat();
    let urls = [closing_url.as_str(), &refusing.url, &serving.url];
    let router = Router::start(&urls, &flags);
    let mut most = 0;
    for number in 0..6 {
        let id = number.to_string();
        let mut client = post(&router, &id, "{}").await;
        serving.request().await.answer(ok("{}")).await;
        assert_eq!(client.answer().await.status(), 200);
        let trace = ended(&router, &id, "completed").await;
        let attempts = attempts(&trace);
        let tried: Vec<&str> =
            attempts.iter().filter_map(|attempt| attempt["worker_url"].as_str()).collect();
        assert_eq!(tried.last(), Some(&serving.url.as_str()));
        assert!((1..tried.len()).all(|index| !tried[..index].contains(&tried[index])), "{tried:?}");
        most = most.max(tried.len());
    }
    assert_eq!(most, 3);
    router.until_idle().await;
    accepting.abort();
}

#[tokio::test]
async fn when_the_attempts_are_used_up_the_last_answer_is_the_clients_unchanged() {
    let mut workers = ScriptedWorker::several::<2>().await;
    let router = Router::before(&workers, &[AT_ONCE, "--retry-max-retries=2"]).await;
    let large: Vec<u8> = (0..300_000_u32).map(|byte| (byte % 251) as u8).collect();
    for (round, is_chunked) in [false, true].into_iter().enumerate() {
        let id = format!("round-{round}");
        let mut client = post(&router, &id, "{}").await;
        let (exchange, first) = ScriptedWorker::request_at_any(&mut workers).await;
        exchange.answer(answer("503 Busy", &[("x-which", "first")], "first")).await;
        let (mut exchange, last) = ScriptedWorker::request_at_any(&mut workers).await;
        assert_ne!(first, last);
        let headers = [("x-which", "last"), ("retry-after", "1"), ("content-type", "text/odd")];
        if is_chunked {
            exchange
                .send("HTTP/1.1 503 Busy\r\nx-which: last\r\nretry-after: 1\r\ncontent-type: text/odd\r\n")
                .await;
            exchange.send("transfer-encoding: chunked\r\n\r\n").await;
            for piece in large.chunks(100_000) {
                exchange.send(chunked(piece)).await;
            }
            exchange.answer(chunked("")).await;
        } else {
            exchange.answer(answer("503 Busy", &headers, &large)).await;
        }
        let answer = client.answer().await;
        assert!(answer.is_whole && answer.body == large, "{} bytes", answer.body.len());
        assert_eq!(answer.status(), 503);
        for (name, value) in headers {
            assert_eq!(answer.header(name).as_deref(), Some(value));
        }
        assert_eq!(answer.header("x-router-error-code"), None);
        let url = workers[last].url.as_str();
        assert_eq!(answer.header("x-sglang-worker").as_deref(), Some(url));
        let trace = ended(&router, &id, "failed").await;
        assert_eq!((trace["worker_url"].as_str(), &trace["http_status"]), (Some(url), &503.into()));
        assert_eq!(answer.header("x-sglang-node").as_deref(), trace["node_id"].as_str());
        let statuses: Vec<Value> =
            attempts(&trace).iter().map(|attempt| attempt["http_status"].clone()).collect();
        assert_eq!(json!(statuses), json!([503, 503]));
    }
    router.until_idle().await;
}

#[tokio::test]
async fn a_worker_is_asked_again_only_when_all_were_and_never_twice_running() {
    let mut workers = ScriptedWorker::several::<3>().await;
    let router = Router::before(&workers, &[AT_ONCE, "--retry-max-retries=7"]).await;
    let mut client = post(&router, "x", "{}").await;
    let mut asked = Vec::new();
    for _ in 0..7 {
        let (exchange, which) = ScriptedWorker::request_at_any(&mut workers).await;
        exchange.answer(answer("500 Oops", &[], "")).await;
        asked.push(which);
    }
    assert_eq!(client.answer().await.status(), 500);
    let mut first: Vec<usize> = asked[..3].to_vec();
    first.sort_unstable();
    assert_eq!(first, [0, 1, 2], "{asked:?}");
    assert!(asked.windows(2).all(|pair| pair[0] != pair[1]), "{asked:?}");
    let trace = ended(&router, "x", "failed").await;
    let urls: Vec<Value> =
        attempts(&trace).iter().map(|attempt| attempt["worker_url"].clone()).collect();
    let expected: Vec<Value> =
        asked.iter().map(|which| workers[*which].url.clone().into()).collect();
    assert_eq!(urls, expected);
}

#[tokio::test]
async fn the_only_worker_is_asked_again_after_a_pause() {
    let mut workers = ScriptedWorker::several::<1>().await;
    let router = Router::before(&workers, &[AT_ONCE]).await;
    let mut client = post(&router, "x", "{}").await;
    drop(workers[0].request().await);
    workers[0].request().await.answer(answer("503 Busy", &[("retry-after", "9")], "")).await;
    workers[0].request().await.answer(ok("{}")).await;
    assert_eq!(client.answer().await.status(), 200);
    let trace = ended(&router, "x", "completed").await;
    let statuses: Vec<Value> =
        attempts(&trace).iter().map(|attempt| attempt["http_status"].clone()).collect();
    assert_eq!(json!(statuses), json!([null, 503, 200]));
    router.until_idle().await;
}

#[tokio::test]
async fn without_retries_the_first_answer_is_the_clients() {
    for flag in ["--disable-retries", "--retry-max-retries=1"] {
        let mut workers = ScriptedWorker::several::<2>().await;
        let router = Router::before(&workers, &[flag]).await;
        for status in [429, 500, 503] {
            let mut client = post(&router, "x", "{}").await;
            let (exchange, _) = ScriptedWorker::request_at_any(&mut workers).await;
            exchange.answer(answer(&format!("{status} Odd"), &[], "why")).await;
            let answer = client.answer().await;
            assert_eq!((answer.status(), answer.text().as_str()), (status, "why"));
            assert_eq!(attempts(&ended(&router, "x", "failed").await).len(), 1);
        }
        assert!(workers.iter_mut().all(|worker| worker.request_now().is_none()));
    }
}

#[tokio::test]
async fn a_pinned_request_is_tried_again_at_its_worker_only() {
    let mut workers = ScriptedWorker::several::<2>().await;
    let router = Router::before(&workers, &[AT_ONCE, "--retry-max-retries=3"]).await;
    let pin = workers[1].url.clone();
    let headers = [("x-sglang-target-worker", pin.as_str()), ("x-request-id", "x")];
    let mut client = router.connect().await;
    client.send(request("POST /generate", &headers, "{}")).await;
    for _ in 0..2 {
        workers[1].request().await.answer(answer("500 Oops", &[], "")).await;
    }
    workers[1].request().await.answer(ok("{}")).await;
    assert_eq!(client.answer().await.status(), 200);
    let trace = ended(&router, "x", "completed").await;
    assert_eq!((trace["reason"].as_str(), attempts(&trace).len()), (Some("pinned"), 3));
    assert!(attempts(&trace).iter().all(|attempt| attempt["worker_url"] == pin));
    assert!(workers[0].request_now().is_none());
}

#[tokio::test]
async fn each_attempt_sends_the_same_bytes() {
    let mut workers = ScriptedWorker::several::<3>().await;
    let router = Router::before(&workers, &[AT_ONCE]).await;
    let body: Vec<u8> =
        (0..3_u32 << 20).map(|byte| (byte.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let mut client = post(&router, "x", &body).await;
    let same = |request: &Message| {
        assert!(request.is_whole && request.body == body, "{} bytes", request.body.len());
        assert_eq!(request.header("content-length"), Some(body.len().to_string()));
    };
    let (exchange, _) = ScriptedWorker::request_at_any(&mut workers).await;
    same(&exchange.request);
    exchange.answer(answer("500 Oops", &[], "")).await;
    let (exchange, _) = ScriptedWorker::request_at_any(&mut workers).await;
    same(&exchange.request);
    drop(exchange);
    let (exchange, _) = ScriptedWorker::request_at_any(&mut workers).await;
    same(&exchange.request);
    exchange.answer(ok("{}")).await;
    assert_eq!(client.answer().await.status(), 200);
    assert_eq!(attempts(&ended(&router, "x", "completed").await).len(), 3);
}

#[tokio::test]
async fn after_the_first_byte_there_is_no_other_attempt() {
    let mut workers = ScriptedWorker::several::<2>().await;
    let router = Router::before(&workers, &[AT_ONCE]).await;
    for (id, head) in [
        ("stream", STREAM_HEAD),
        ("known length", "HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n"),
        ("an error", "HTTP/1.1 400 Bad Request\r\ntransfer-encoding: chunked\r\n\r\n"),
    ] {
        let id = id.replace(' ', "-");
        let mut client = post(&router, &id, "{}").await;
        let (mut exchange, _) = ScriptedWorker::request_at_any(&mut workers).await;
        exchange.send(head).await;
        exchange.send(chunked("data: {}\n\n")).await;
        let head = client.head().await.expect("a head");
        drop(exchange);
        client.body_of(head).await;
        let trace = ended(&router, &id, "failed").await;
        assert_eq!(attempts(&trace).len(), 1, "{id}");
        router.until_idle().await;
    }
    assert!(workers.iter_mut().all(|worker| worker.request_now().is_none()));
}

#[tokio::test]
async fn a_client_that_leaves_in_the_pause_ends_its_request() {
    let mut workers = ScriptedWorker::several::<1>().await;
    let router = Router::before(&workers, &NEVER).await;

    let client = post(&router, "dropped", "{}").await;
    drop(workers[0].request().await);
    until("the end of the attempt", async || {
        let trace = router.trace_now("dropped").await;
        trace["attempts"][0]["error"].is_string().then_some(())
    })
    .await;
    assert_eq!(router.loads().await, [0], "in the pause it is nowhere");
    drop(client);
    let trace = router.trace_when("dropped", "failed").await;
    assert_eq!(trace["error_message"], "client disconnected");

    let mut client = post(&router, "refused", "{}").await;
    workers[0].request().await.answer(answer("500 Oops", &[], "no")).await;
    until("the answer", async || {
        let trace = router.trace_now("refused").await;
        (trace["attempts"][0]["http_status"] == 500).then_some(())
    })
    .await;
    client.finish_sending().await;
    let trace = ended(&router, "refused", "failed").await;
    assert_eq!(trace["error_message"], "client disconnected");
    assert!(client.rest().await.is_empty());
    router.until_idle().await;
    assert!(workers[0].request_now().is_none());
}

#[tokio::test]
async fn a_pause_beyond_the_end_of_the_requests_time_is_not_made() {
    let mut workers = ScriptedWorker::several::<1>().await;
    let flags = [&NEVER[..], &["--request-timeout-secs=500"]].concat();
    let router = Router::before(&workers, &flags).await;
    let mut client = post(&router, "dropped", "{}").await;
    drop(workers[0].request().await);
    let refusal = client.answer().await;
    assert_eq!((refusal.status(), refusal.error_code().as_str()), (502, "worker_unreachable"));
    let mut client = post(&router, "refused", "{}").await;
    workers[0].request().await.answer(answer("500 Oops", &[], "no")).await;
    let refusal = client.answer().await;
    assert_eq!((refusal.status(), refusal.text().as_str()), (500, "no"));
    router.until_idle().await;
}
