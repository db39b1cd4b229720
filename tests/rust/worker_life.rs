//! Workers join and leave while the router runs, and restart behind its back.

use serde_json::{Value, json};

use crate::support::{
    Health, Message, Router, ScriptedWorker, Simulated, encoded, ok, request, until,
};

const PIN: &str = "x-sglang-target-worker";

async fn delete(router: &Router, id: &str) -> Message {
    router.ask(request(&format!("DELETE /workers/{}", encoded(id)), &[], "")).await
}

async fn join(router: &Router, url: &str) -> Message {
    router.post("/workers", json!({"url": url}).to_string()).await
}

async fn until_gone(router: &Router, id: &str) {
    until("the worker to be gone", async || {
        (router.get(&format!("/workers/{id}")).await.status() == 404).then_some(())
    })
    .await;
}

/// One routed request, answered by this worker.
async fn served_by(router: &Router, worker: &mut ScriptedWorker) {
    let mut client = router.connect().await;
    client.send(request("POST /generate", &[], "{}")).await;
    worker.request().await.answer(ok("{}")).await;
    let answer = client.answer().await;
    assert_eq!(
        (answer.status(), answer.header("x-sglang-worker")),
        (200, Some(worker.url.clone()))
    );
}

#[tokio::test]
async fn a_router_without_workers_gets_one_and_loses_it() {
    let mut worker = ScriptedWorker::start().await;
    let router = Router::start(&[], &[]);
    let answer = router.post("/generate", "{}").await;
    assert_eq!((answer.status(), answer.error_code().as_str()), (503, "no_available_workers"));
    assert!(answer.error_message().contains("POST /workers"));

    let answer = join(&router, &format!("{}/", worker.url)).await;
    assert_eq!(answer.status(), 202);
    assert_eq!(answer.header("location").as_deref(), Some("/workers/0"));
    let told = answer.json();
    let expected = json!({
        "status": "accepted", "worker_id": "0", "url": worker.url, "location": "/workers/0",
        "message": told["message"],
    });
    assert_eq!(told, expected);
    assert!(told["message"].as_str().expect("a message").contains("joined"));
    router.until_healthy(1).await;
    served_by(&router, &mut worker).await;
    assert_eq!(router.json("/list_workers").await, json!({"urls": [worker.url]}));

    let answer = delete(&router, "0").await;
    assert_eq!(answer.status(), 202);
    assert_eq!(answer.header("location").as_deref(), Some("/workers/0"));
    assert_eq!(
        (&answer.json()["worker_id"], &answer.json()["url"]),
        (&"0".into(), &worker.url.as_str().into())
    );
    assert_eq!(router.post("/generate", "{}").await.error_code(), "no_available_workers");
    until_gone(&router, "0").await;
    assert_eq!(router.json("/workers").await["total"], 0);
    assert_eq!(router.json("/list_workers").await, json!({"urls": []}));
    until("the connections' end", async || (worker.open_connections() == 0).then_some(())).await;
    assert!(!router.get("/metrics").await.text().contains("smg_worker_health{"));
}

#[tokio::test]
async fn a_request_in_flight_ends_and_then_the_worker_is_gone() {
    let mut leaving = ScriptedWorker::start().await;
    let mut staying = ScriptedWorker::start().await;
    let router = Router::ready(&[&leaving.url], &[]).await;
    let mut client = router.connect().await;
    client.send(request("POST /generate", &[("x-request-id", "last")], "{}")).await;
    let mut exchange = leaving.request().await;
    exchange.send("HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nab").await;
    let head = client.head().await.expect("a head");

    assert_eq!(join(&router, &staying.url).await.status(), 202);
    router.until_healthy(2).await;
    assert_eq!(delete(&router, &leaving.url).await.status(), 202);
    let shown = router.worker(&leaving.url).await;
    assert_eq!((&shown["state"], &shown["is_healthy"]), (&"draining".into(), &false.into()));
    assert_eq!(shown["load"], 1);
    assert_eq!(router.json("/list_workers").await["urls"], json!([staying.url]));
    for _ in 0..3 {
        served_by(&router, &mut staying).await;
    }
    // Nothing new goes there, not even by name.
    for pin in [leaving.url.as_str(), shown["node_id"].as_str().expect("a name")] {
        let answer = router.ask(request("POST /generate", &[(PIN, pin)], "{}")).await;
        assert_eq!((answer.status(), answer.error_code().as_str()), (503, "no_available_workers"));
        assert!(answer.error_message().contains("draining"), "{}", answer.error_message());
    }
    // Asked again it goes on leaving.
    assert_eq!(delete(&router, "0").await.status(), 202);

    exchange.answer("cd").await;
    let answer = client.body_of(head).await;
    assert_eq!((answer.is_whole, answer.text().as_str()), (true, "abcd"));
    until_gone(&router, "0").await;
    let trace = router.trace_when("last", "completed").await;
    assert_eq!(trace["worker_url"], leaving.url.as_str());
    assert_eq!(delete(&router, "0").await.status(), 404);
    let unknown = router.ask(request("POST /generate", &[(PIN, &leaving.url)], "{}")).await;
    assert_eq!(unknown.error_code(), "unknown_target_worker");
}

#[tokio::test]
async fn who_is_there_already_stays_as_it_is() {
    let worker = ScriptedWorker::start().await;
    let router = Router::ready(&[&worker.url], &[]).await;
    let before = router.worker(&worker.url).await;
    let body = json!({"url": worker.url.replace("http", "HTTP"), "weight": 5, "node_id": "other"});
    let answer = router.post("/workers", body.to_string()).await;
    assert_eq!((answer.status(), &answer.json()["worker_id"]), (202, &"0".into()));
    assert!(answer.json()["message"].as_str().expect("a message").contains("already"));
    assert_eq!(router.worker(&worker.url).await, before);
    assert_eq!(router.json("/workers").await["total"], 1);
    let answer = router.post(&format!("/add_worker?url={}", worker.url), "").await;
    assert_eq!((answer.status(), &answer.json()["worker_id"]), (200, &"0".into()));
}

#[tokio::test]
async fn a_worker_that_comes_back_while_it_leaves_is_a_new_one() {
    let mut worker = ScriptedWorker::start().await;
    let router = Router::ready(&[&worker.url], &[]).await;
    let mut client = router.connect().await;
    client.send(request("POST /generate", &[], "{}")).await;
    let exchange = worker.request().await;
    delete(&router, &worker.url).await;
    let answer = join(&router, &worker.url).await;
    assert_eq!((answer.status(), &answer.json()["worker_id"]), (202, &"1".into()));
    router.until_healthy(1).await;
    assert_eq!(router.worker(&worker.url).await["id"], "1");
    assert_eq!(router.json("/workers").await["total"], 2);
    let mut second = router.connect().await;
    second.send(request("POST /generate", &[(PIN, &worker.url)], "{}")).await;
    worker.request().await.answer(ok("{}")).await;
    assert_eq!(second.answer().await.status(), 200);
    let gauge = format!("smg_worker_requests_active{{worker=\"{}\"}} 1", worker.url);
    assert!(router.get("/metrics").await.text().contains(&gauge));
    exchange.answer(ok("{}")).await;
    assert_eq!(client.answer().await.status(), 200);
    until_gone(&router, "0").await;
    assert_eq!(router.worker(&worker.url).await["id"], "1");
    served_by(&router, &mut worker).await;
}

#[tokio::test]
async fn what_a_joining_worker_brings_acts_and_the_rest_is_named() {
    let worker = ScriptedWorker::start().await;
    let router = Router::start(&[], &[]);
    let body = json!({
        "url": worker.url, "node_id": "mine", "weight": 2.5, "worker_type": "regular",
        "priority": 3, "labels": {"policy": "random"}, "api_key": null,
    });
    let answer = router.post("/workers", body.to_string()).await;
    let message = answer.json()["message"].as_str().expect("a message").to_owned();
    assert!(message.ends_with("without effect here: labels, priority"), "{message}");
    router.until_healthy(1).await;
    assert_eq!(router.json("/workers/mine").await["url"], worker.url.as_str());
}

#[tokio::test]
async fn add_worker_answers_when_the_worker_may_be_picked() {
    let mut worker = ScriptedWorker::start_with(Health::Withheld).await;
    let router = Router::start(&[], &[]);
    let mut client = router.connect().await;
    client.send(request(&format!("POST /add_worker?url={}", encoded(&worker.url)), &[], "")).await;
    worker.until_checked(1).await;
    assert_eq!(router.worker(&worker.url).await["state"], "starting");
    worker.set_health(Health::Good);
    let answer = client.answer().await;
    assert_eq!((answer.status(), &answer.json()["status"]), (200, &"success".into()));
    served_by(&router, &mut worker).await;

    let answer = router.post(&format!("/remove_worker?url={}", worker.url), "").await;
    assert_eq!((answer.status(), &answer.json()["worker_id"]), (200, &"0".into()));
    assert_eq!(router.post("/generate", "{}").await.error_code(), "no_available_workers");
    until_gone(&router, "0").await;
    let answer = router.post(&format!("/remove_worker?url={}", worker.url), "").await;
    assert_eq!((answer.status(), answer.error_code().as_str()), (404, "not_found"));
}

#[tokio::test]
async fn add_worker_says_why_a_worker_is_not_healthy() {
    let worker = ScriptedWorker::start_with(Health::Bad).await;
    let router = Router::start(&[], &["--worker-startup-timeout-secs=1"]);
    let answer = router.post(&format!("/add_worker?url={}", worker.url), "").await;
    assert_eq!((answer.status(), answer.error_code().as_str()), (503, "no_available_workers"));
    let message = answer.error_message();
    assert!(message.contains("/health answered 503"), "{message}");
    assert!(message.contains("worker_startup_timeout_secs"), "{message}");
    worker.set_health(Health::Good);
    router.until_healthy(1).await;
}

#[tokio::test]
async fn add_worker_does_not_wait_for_one_that_was_removed() {
    let worker = ScriptedWorker::start_with(Health::Bad).await;
    let router = Router::start(&[], &[]);
    let mut client = router.connect().await;
    client.send(request(&format!("POST /add_worker?url={}", worker.url), &[], "")).await;
    worker.until_checked(1).await;
    assert_eq!(delete(&router, "0").await.status(), 202);
    let answer = client.answer().await;
    assert_eq!((answer.status(), answer.error_code().as_str()), (503, "no_available_workers"));
    assert!(answer.error_message().contains("removed"));
}

#[tokio::test]
async fn what_is_not_understood_changes_nothing() {
    let worker = ScriptedWorker::start().await;
    let router = Router::ready(&[&worker.url], &[]).await;
    let long = format!(r#"{{"url":"http://{}:1"}}"#, "h".repeat(5000));
    for (body, why) in [
        ("", "the body is not"),
        ("{", "the body is not"),
        ("[]", "the body is not"),
        ("\u{feff}{}", "the body is not"),
        ("{}", "url is missing"),
        (r#"{"url":["http://a:1"]}"#, "not a string"),
        (r#"{"url":"a:1"}"#, "no scheme"),
        (r#"{"url":"https://a:1"}"#, "https"),
        (r#"{"url":"http://a:1/?x"}"#, "query"),
        (r#"{"url":"http://a:1","wieght":1}"#, "\"wieght\""),
        (r#"{"url":"http://a:1","weight":1e999}"#, "the body is not"),
        (r#"{"url":"http://a:1","worker_type":"decode"}"#, "worker_type"),
        (&long, "at most 2048"),
    ] {
        let answer = router.post("/workers", body).await;
        assert_eq!(
            (answer.status(), answer.error_code().as_str()),
            (400, "invalid_request"),
            "{body}"
        );
        assert!(answer.error_message().contains(why), "{body}: {}", answer.error_message());
    }
    let deep = format!(r#"{{"url":"http://a:1","labels":{}}}"#, "[".repeat(5000));
    assert_eq!(router.post("/workers", deep).await.error_code(), "invalid_request");
    let answer = router.post("/workers", vec![b' '; 70 << 10]).await;
    assert_eq!((answer.status(), answer.error_code().as_str()), (413, "payload_too_large"));
    for path in ["/add_worker", "/remove_worker"] {
        for query in [
            "",
            "?",
            "?url=",
            "?url=a:1",
            "?url=https://a:1",
            "?url=http://a:1&x=1",
            "?x=1",
            "?url=http://a:1&url=http://b:1",
        ] {
            let answer = router.post(&format!("{path}{query}"), "").await;
            assert_eq!(
                (answer.status(), answer.error_code().as_str()),
                (400, "invalid_request"),
                "{path}{query}"
            );
        }
    }
    for id in ["1", "-1", "", "http://nobody:1", "%ff", "gpu_9"] {
        let answer =
            router.ask(request(&format!("DELETE /workers/{}", encoded(id)), &[], "")).await;
        assert_eq!((answer.status(), answer.error_code().as_str()), (404, "not_found"), "{id:?}");
    }
    let answer = router.ask(request("PUT /workers/0", &[], "{}")).await;
    assert_eq!((answer.status(), answer.header("allow").is_some()), (405, true));
    assert_eq!(router.json("/list_workers").await, json!({"urls": [worker.url]}));
}

/// How much of the prompt the router believes to be in the worker's cache.
async fn matched_tokens(router: &Router, id: &str) -> Value {
    let body =
        r#"{"text":"once upon a time there was a prompt","sampling_params":{"max_new_tokens":1}}"#;
    let answer = router.ask(request("POST /generate", &[("x-request-id", id)], body)).await;
    assert_eq!(answer.status(), 200, "{}", answer.text());
    router.trace_when(id, "completed").await["matched_tokens"].clone()
}

#[tokio::test]
async fn a_restarted_worker_has_an_empty_cache() {
    let sims = Simulated::start(1).await;
    let flags = ["--policy=cache_aware", "--health-check-interval-secs=1"];
    let router = Router::ready(&sims.urls(), &flags).await;
    assert_eq!(matched_tokens(&router, "a").await, 0);
    let warm = matched_tokens(&router, "b").await;
    assert!(warm.as_u64().expect("a number") > 5, "{warm}");
    let url = sims.urls[0].clone();
    // As a rule so fast that no check finds it down.
    let _again = sims.restart().await;
    until("the restart to be noticed", async || {
        let is_noticed = matched_tokens(&router, "c").await == 0;
        is_noticed.then_some(())
    })
    .await;
    assert_eq!(router.worker(&url).await["id"], "0");
}

#[tokio::test]
async fn a_worker_that_was_unreachable_has_an_empty_cache() {
    let mut worker = ScriptedWorker::start().await;
    let flags = ["--policy=cache_aware", "--health-check-interval-secs=3600"];
    let router = Router::ready(&[&worker.url], &flags).await;
    let body = r#"{"text":"once upon a time there was a prompt"}"#;
    let mut client = router.connect().await;
    for id in ["a", "b"] {
        client.send(request("POST /generate", &[("x-request-id", id)], body)).await;
        worker.request().await.answer(ok("{}")).await;
        client.answer().await;
    }
    assert!(router.trace_now("b").await["matched_tokens"].as_u64().expect("a number") > 5);
    worker.go_down().await;
    assert_eq!(router.post("/generate", body).await.error_code(), "worker_unreachable");
    worker.up();
    router.until_healthy(1).await;
    client.send(request("POST /generate", &[("x-request-id", "c")], body)).await;
    worker.request().await.answer(ok("{}")).await;
    client.answer().await;
    assert_eq!(router.trace_now("c").await["matched_tokens"], 0);
}

#[tokio::test]
async fn a_name_stands_for_the_workers_at_its_addresses() {
    let mut worker = ScriptedWorker::start().await;
    // An address is a name of its own.
    let name = format!("dns+{}", worker.url);
    let names = format!("--node-ids={}=only", worker.url);
    let router = Router::start(&[&name], &[&names]);
    served_by(&router, &mut worker).await;
    let shown = router.worker(&worker.url).await;
    assert_eq!((&shown["url"], &shown["node_id"]), (&worker.url.as_str().into(), &"only".into()));
}

#[tokio::test]
async fn a_name_that_is_not_found_keeps_nobody_waiting() {
    let router = Router::start(&["dns+http://nobody.invalid:1"], &[]);
    let answer = router.post("/generate", "{}").await;
    assert_eq!((answer.status(), answer.error_code().as_str()), (503, "no_available_workers"));
}

#[tokio::test]
async fn a_router_is_not_its_own_worker() {
    let router = Router::start(&[], &[]);
    let own = format!("http://{}", router.address);
    join(&router, &own).await;
    let worker = until("a failed check", async || {
        let worker = router.worker(&own).await;
        worker["last_error"].is_string().then_some(worker)
    })
    .await;
    assert!(worker["last_error"].as_str().is_some_and(|error| error.contains("508")), "{worker}");
    assert_eq!(worker["is_healthy"], false);
    assert_eq!(router.post("/generate", "{}").await.status(), 503);
}
