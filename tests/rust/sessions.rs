//! Requests of one session find the same worker.

use std::collections::BTreeMap;

use serde_json::json;

use crate::support::{Router, Simulated, request};

const KEYS: usize = 24;

/// Where a request with this key and this prompt went, and why.
async fn send(router: &Router, key: &str, prompt: &str) -> (String, String) {
    let headers = [("x-smg-routing-key", key), ("x-request-id", "x")];
    let body = json!({"text": prompt, "sampling_params": {"max_new_tokens": 1}}).to_string();
    let answer = router.ask(request("POST /generate", &headers, body)).await;
    assert_eq!(answer.status(), 200, "{}", answer.text());
    // Its load is gone with the end of the trace.
    let trace = router.trace_when("x", "completed").await;
    router.until_idle().await;
    (
        answer.header("x-sglang-worker").expect("a worker"),
        trace["reason"].as_str().expect("a reason").to_owned(),
    )
}

/// Where each of `KEYS` sessions goes, all for this reason.
async fn homes(router: &Router, reason: &str) -> BTreeMap<String, String> {
    let mut homes = BTreeMap::new();
    for number in 0..KEYS {
        let key = format!("session {number}, 中文");
        let (worker, why) = send(router, &key, &format!("turn of {number}")).await;
        assert_eq!(why, reason, "{key}");
        homes.insert(key, worker);
    }
    homes
}

#[tokio::test]
async fn routers_agree_on_the_worker_of_a_key_and_a_lost_worker_moves_only_its_own() {
    let sims = Simulated::start(3).await;
    let [one, two, three] = *sims.urls() else { panic!("three workers") };
    let policy = ["--policy=consistent_hashing"];
    let router = Router::ready(&[one, two, three], &policy).await;
    let before = homes(&router, "routing_key").await;
    assert_eq!(homes(&router, "routing_key").await, before);
    for url in [one, two, three] {
        assert!(before.values().any(|worker| worker == url), "{before:?}");
    }

    let other = Router::ready(&[three, one, two], &policy).await;
    assert_eq!(homes(&other, "routing_key").await, before);

    assert_eq!(router.post(&format!("/remove_worker?url={two}"), "").await.status(), 200);
    for (key, worker) in homes(&router, "routing_key").await {
        assert!(worker == before[&key] || before[&key] == two, "{key} moved");
    }
    assert_eq!(router.post(&format!("/add_worker?url={two}"), "").await.status(), 200);
    assert_eq!(homes(&router, "routing_key").await, before, "they come home");
}

#[tokio::test]
async fn equal_heads_of_prompts_go_to_one_worker() {
    let sims = Simulated::start(3).await;
    let flags = ["--policy=prefix_hash", "--prefix-token-count=8"];
    let router = Router::ready(&sims.urls(), &flags).await;
    for system in [
        "You are a helpful assistant with",
        "You answer in French, and briefly",
        "3".repeat(40).as_str(),
    ] {
        let mut workers = Vec::new();
        for question in ["", " patience.", " a long question after it"] {
            let (worker, reason) = send(&router, "whatever", &format!("{system}{question}")).await;
            assert_eq!(reason, "prefix_hash");
            workers.push(worker);
        }
        assert!(workers.iter().all(|worker| worker == &workers[0]), "{system}: {workers:?}");
    }
}

#[tokio::test]
async fn a_key_keeps_the_worker_it_was_given() {
    let sims = Simulated::start(2).await;
    let flags = ["--policy=manual", "--assignment-mode=min_group", "--trace-candidates=-1"];
    let [one, two] = *sims.urls() else { panic!("two workers") };
    let router = Router::ready(&[one], &flags).await;
    let before = homes(&router, "new_key").await;
    assert_eq!(router.post(&format!("/add_worker?url={two}"), "").await.status(), 200);
    assert_eq!(homes(&router, "sticky").await, before, "whoever joins");

    let (worker, reason) = send(&router, "of a new session", "x").await;
    assert_eq!((worker.as_str(), reason.as_str()), (two, "new_key"));
    let candidates = router.trace_now("x").await["candidates"].clone();
    let scores = [candidates[0]["score"].as_f64(), candidates[1]["score"].as_f64()];
    assert_eq!(scores, [Some(0.0), Some(KEYS as f64)], "keys of each");
    assert_eq!(send(&router, "", "x").await.1, "no_key");

    assert_eq!(router.post(&format!("/remove_worker?url={one}"), "").await.status(), 200);
    for key in before.keys() {
        // Moved, if its worker was not quite gone.
        let (worker, reason) = send(&router, key, "x").await;
        assert!(worker == two && ["new_key", "moved_key"].contains(&&*reason), "{reason}");
        assert_eq!(send(&router, key, "x").await, (two.to_owned(), "sticky".to_owned()));
    }
}
