//! Routes that ask all workers.

use serde_json::{Value, json};

use crate::support::{Router, ScriptedWorker, Simulated, ok, request};

#[tokio::test]
async fn all_caches_are_flushed_and_what_was_believed_of_them_is_forgotten() {
    let sims = Simulated::start(2).await;
    let router = Router::ready(&sims.urls(), &["--policy=cache_aware"]).await;
    let prompt = "the quick brown fox jumps over the lazy dog ".repeat(20);
    let body = json!({"text": prompt, "sampling_params": {"max_new_tokens": 1}}).to_string();
    let matched = async || {
        let answer = router.post("/generate", &body).await;
        let id = answer.header("x-request-id").expect("an id");
        let trace = router.trace_when(&id, "completed").await;
        (trace["matched_tokens"].as_u64(), trace["cached_tokens"].as_u64())
    };
    assert_eq!(matched().await, (Some(0), Some(0)));
    let (believed, cached) = matched().await;
    assert!(believed > Some(0) && cached > Some(0), "{believed:?} {cached:?}");

    let answer = router.post("/flush_cache", "").await;
    assert_eq!(answer.status(), 200);
    let report = answer.json();
    let message = report["message"].as_str().expect("a message").to_owned();
    assert!(message.contains("2 of 2"), "{message}");
    let expected = json!({
        "status": "success", "message": message, "workers_flushed": 2, "total_http_workers": 2, "total_workers": 2,
    });
    assert_eq!(report, expected);
    assert_eq!(matched().await, (Some(0), Some(0)));
}

#[tokio::test]
async fn a_flush_says_which_workers_it_failed_at() {
    let mut good = ScriptedWorker::start().await;
    let mut busy = ScriptedWorker::start().await;
    let mut dying = ScriptedWorker::start().await;
    let mut slow = ScriptedWorker::start().await;
    let dead = ScriptedWorker::down().await;
    let urls = [&good.url, &busy.url, &dying.url, &slow.url, &dead.url].map(String::as_str);
    let router = Router::start(&urls, &[]);
    router.until_healthy(4).await;
    let mut client = router.connect().await;
    client.send(request("POST /flush_cache?timeout=1.5", &[], "")).await;

    let exchange = good.request().await;
    let asked = &exchange.request;
    assert_eq!(asked.first_line(), "POST /flush_cache?timeout=1.5 HTTP/1.1");
    assert_eq!(asked.header("content-length").as_deref(), Some("0"));
    assert_eq!(asked.header("host").as_deref(), good.url.strip_prefix("http://"));
    exchange.answer(ok("Cache flushed.")).await;
    let refusal = "HTTP/1.1 400 Bad Request\r\ncontent-length: 8\r\n\r\nrunning\n";
    busy.request().await.answer(refusal).await;
    drop(dying.request().await);
    // The slow one is waited for.
    slow.request().await.answer(ok("")).await;

    let answer = client.answer().await;
    assert_eq!(answer.status(), 206);
    let report = answer.json();
    assert_eq!(report["status"], "partial_success");
    assert_eq!((&report["workers_flushed"], &report["total_workers"]), (&2.into(), &5.into()));
    assert_eq!(report["successful"], json!([good.url, slow.url]));
    let failed = report["failed"].as_array().expect("a list");
    let workers: Vec<_> = failed.iter().map(|failure| failure["worker"].as_str()).collect();
    assert_eq!(workers, [Some(busy.url.as_str()), Some(&dying.url), Some(&dead.url)]);
    let why = failed[0]["error"].as_str().expect("why");
    assert!(why.contains("400") && why.contains("running"), "{why}");
    assert!(failed.iter().all(|failure| failure["error"].is_string()));
    let of_slow = |message: &Value| message.as_str().is_some_and(|text| text.contains("2 of 5"));
    assert!(of_slow(&report["message"]), "{report}");
}

#[tokio::test]
async fn a_flush_that_failed_everywhere_is_no_success() {
    let mut worker = ScriptedWorker::start().await;
    let router = Router::ready(&[&worker.url], &[]).await;
    worker.go_down().await;
    let answer = router.post("/flush_cache", "").await;
    assert_eq!(answer.status(), 206);
    assert_eq!(answer.json()["successful"], json!([]));
    assert_eq!(router.worker(&worker.url).await["state"], "unreachable");
}

#[tokio::test]
async fn a_worker_that_leaves_is_not_asked() {
    let mut leaving = ScriptedWorker::start().await;
    let mut staying = ScriptedWorker::start().await;
    let router = Router::ready(&[&leaving.url, &staying.url], &[]).await;
    let mut held = router.connect().await;
    held.send(request("POST /generate", &[("x-sglang-target-worker", &leaving.url)], "")).await;
    let exchange = leaving.request().await;
    assert_eq!(router.ask(request("DELETE /workers/0", &[], "")).await.status(), 202);

    let mut client = router.connect().await;
    client.send(request("POST /flush_cache", &[], "")).await;
    staying.request().await.answer(ok("")).await;
    let report = client.answer().await.json();
    assert_eq!((&report["status"], &report["total_workers"]), (&"success".into(), &1.into()));
    assert!(leaving.request_now().is_none());
    exchange.answer(ok("{}")).await;
    assert_eq!(held.answer().await.status(), 200);
}

#[tokio::test]
async fn without_workers_there_is_nothing_to_flush() {
    let router = Router::start(&[], &[]);
    let answer = router.post("/flush_cache", "").await;
    assert_eq!((answer.status(), answer.error_code().as_str()), (503, "no_available_workers"));
    assert_eq!(router.json("/get_loads").await, json!({"workers": []}));
    assert_eq!(router.get("/flush_cache").await.status(), 405);
}

#[tokio::test]
async fn more_workers_than_are_asked_at_once_are_all_asked() {
    let sims = Simulated::start(40).await;
    let router = Router::ready(&sims.urls(), &[]).await;
    assert_eq!(router.post("/flush_cache", "").await.json()["workers_flushed"], 40);
    let loads = router.json("/get_loads").await;
    let loads = loads["workers"].as_array().expect("a list");
    let urls: Vec<_> = loads.iter().filter_map(|load| load["worker"].as_str()).collect();
    assert_eq!(urls, sims.urls());
    assert!(loads.iter().all(|load| load["load"] == 0));
}

#[tokio::test]
async fn loads_are_the_workers_own_words() {
    let mut first = ScriptedWorker::start().await;
    let mut second = ScriptedWorker::start().await;
    let mut third = ScriptedWorker::start().await;
    let dead = ScriptedWorker::down().await;
    let urls = [&first.url, &second.url, &third.url, &dead.url].map(String::as_str);
    let router = Router::start(&urls, &[]);
    router.until_healthy(3).await;
    let mut client = router.connect().await;
    client.send(request("GET /get_loads", &[], "")).await;
    let exchange = third.request().await;
    assert_eq!(exchange.request.first_line(), "GET /get_load HTTP/1.1");
    exchange.answer("HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n").await;
    second.request().await.answer(ok(r#"{"num_tokens": 5}"#)).await;
    let ranks = r#"[{"dp_rank":0,"num_reqs":2,"num_tokens":30},{"dp_rank":1,"num_tokens":12}]"#;
    first.request().await.answer(ok(ranks)).await;
    let loads = client.answer().await.json();
    assert_eq!(loads["workers"][0], json!({"worker": first.url, "load": 42}));
    assert_eq!(loads["workers"][1], json!({"worker": second.url, "load": 5}));
    for (place, url, why) in [(2, &third.url, "404"), (3, &dead.url, "refused")] {
        let load = &loads["workers"][place];
        assert_eq!((&load["worker"], &load["load"]), (&json!(url), &Value::Null));
        assert!(load["error"].as_str().is_some_and(|text| text.contains(why)), "{load}");
    }
}
