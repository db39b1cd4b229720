//! What `least_ttft` learns on the way of a request, as its traces tell.

use serde_json::{Value, json};

use crate::support::{Exchange, Router, STREAM_HEAD, ScriptedWorker, Wire, chunked, ok, request};

const FLAGS: [&str; 2] = ["--policy=least_ttft", "--trace-candidates=-1"];

/// A request with a prompt of 640 tokens that begins like no other of another letter.
fn body(letter: &str, is_stream: bool) -> String {
    json!({"text": letter.repeat(2560), "stream": is_stream}).to_string()
}

/// Sends a request; its client, what the worker got, and the worker's place.
async fn ask(
    router: &Router,
    workers: &mut [ScriptedWorker],
    id: &str,
    body: &str,
) -> (Wire, Exchange, usize) {
    let mut client = router.connect().await;
    client.send(request("POST /generate", &[("x-request-id", id)], body)).await;
    let (exchange, place) = ScriptedWorker::request_at_any(workers).await;
    (client, exchange, place)
}

/// The candidate of the worker at a place.
async fn candidate(router: &Router, worker: &ScriptedWorker, id: &str) -> Value {
    let trace = router.trace_now(id).await;
    let all = trace["candidates"].as_array().expect("a list");
    let found = all.iter().find(|candidate| candidate["worker_url"] == worker.url);
    found.expect("each worker").clone()
}

fn event(prompt_tokens: u32, cached_tokens: u32) -> Vec<u8> {
    let told = json!({"text": "x", "meta_info": {
        "prompt_tokens": prompt_tokens, "cached_tokens": cached_tokens, "completion_tokens": 1,
    }});
    chunked(format!("data: {told}\n\n"))
}

#[tokio::test]
async fn prefill_is_pending_until_the_first_token() {
    let mut workers = ScriptedWorker::several::<2>().await;
    let router = Router::before(&workers, &FLAGS).await;
    let (mut client, mut exchange, busy) =
        ask(&router, &mut workers, "first", &body("a", true)).await;
    let first = router.trace_now("first").await;
    assert_eq!((&first["reason"], &first["input_tokens"]), (&json!("no_match"), &json!(640)));
    let told = candidate(&router, &workers[busy], "first").await;
    let told = ["matched_tokens", "pending_tokens", "speed", "same_prefix", "score"]
        .map(|name| told[name].clone());
    assert_eq!(told, [json!(0), json!(0), Value::Null, json!(0), json!(5.0 * 640.0)]);

    let (_other, _exchange, idle) = ask(&router, &mut workers, "second", &body("b", true)).await;
    assert_eq!(idle, 1 - busy);
    assert_eq!(candidate(&router, &workers[busy], "second").await["pending_tokens"], 640);
    assert_eq!(candidate(&router, &workers[idle], "second").await["pending_tokens"], 0);

    exchange.send([STREAM_HEAD.as_ref(), &event(640, 0)[..]].concat()).await;
    client.head().await.expect("a head");
    client.chunk().await.expect("the first token");
    exchange.answer(b"0\r\n\r\n").await;
    router.trace_when("first", "completed").await;
    let _third = ask(&router, &mut workers, "third", &body("c", true)).await;
    let told = candidate(&router, &workers[busy], "third").await;
    assert_eq!(told["pending_tokens"], 0);
    assert!(told["speed"].as_f64().is_some_and(|speed| speed > 0.0), "{told}");
}

#[tokio::test]
async fn a_prompt_goes_where_it_was_computed_and_not_where_it_failed() {
    let mut workers = ScriptedWorker::several::<3>().await;
    let router = Router::before(&workers, &FLAGS).await;
    let (mut client, exchange, failed_at) =
        ask(&router, &mut workers, "first", &body("a", false)).await;
    drop(exchange);
    let (exchange, computed_at) = ScriptedWorker::request_at_any(&mut workers).await;
    let told = json!({"text": "x", "meta_info": {"prompt_tokens": 1280, "cached_tokens": 0}});
    exchange.answer(ok(told.to_string())).await;
    assert_eq!(client.answer().await.status(), 200);
    router.until_idle().await;

    let (_client, _exchange, place) = ask(&router, &mut workers, "second", &body("a", false)).await;
    assert_eq!(place, computed_at);
    let trace = router.trace_now("second").await;
    assert_eq!(
        (&trace["reason"], &trace["matched_tokens"]),
        (&json!("prefix_match"), &json!(1279))
    );
    // A byte is half a token, the worker says.
    assert_eq!(trace["input_tokens"], 1280);
    assert_eq!(candidate(&router, &workers[failed_at], "second").await["matched_tokens"], 0);
}

#[tokio::test]
async fn a_body_without_a_prompt_is_picked_for() {
    let mut workers = ScriptedWorker::several::<2>().await;
    let router = Router::before(&workers, &FLAGS).await;
    let (mut client, exchange, _) = ask(&router, &mut workers, "x", "{}").await;
    exchange.answer(ok("{}")).await;
    assert_eq!(client.answer().await.status(), 200);
    let trace = router.trace_when("x", "completed").await;
    assert_eq!((&trace["input_tokens"], &trace["matched_tokens"]), (&Value::Null, &json!(0)));
}
