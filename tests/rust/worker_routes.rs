//! What workers say of themselves, and what the router says of its workers and itself.

use crate::support::{Health, Router, ScriptedWorker, Simulated, ok, request};

#[tokio::test]
async fn a_simulated_worker_answers_for_itself() {
    let sims = Simulated::start(1).await;
    let router = Router::ready(&sims.urls(), &[]).await;
    assert_eq!(router.json("/v1/models").await["data"][0]["id"], "sim-model");
    for path in ["/get_server_info", "/server_info"] {
        let info = router.json(path).await;
        assert!(sims.urls[0].ends_with(&format!(":{}", info["port"])), "{info}");
    }
    for path in ["/get_model_info", "/model_info"] {
        assert_eq!(router.json(path).await["is_generation"], true);
    }
    let answer = router.get("/health_generate").await;
    assert_eq!(answer.status(), 200);
    assert_eq!(answer.header("x-sglang-worker").as_deref(), Some(sims.urls[0].as_str()));
    // Not routed, so not traced.
    assert_eq!(router.json("/v1/traces/stats").await["total_requests"], 0);
}

#[tokio::test]
async fn a_workers_answer_is_passed_on_to_the_byte() {
    let mut worker = ScriptedWorker::start().await;
    let url = format!("{}/base", worker.url);
    let router = Router::ready(&[&url], &[]).await;
    let mut client = router.connect().await;
    let headers = [("authorization", "Bearer x"), ("x-request-id", "mine")];
    client.send(request("GET /v1/models?limit=1", &headers, "")).await;
    let exchange = worker.request().await;
    assert_eq!(exchange.request.first_line(), "GET /base/v1/models?limit=1 HTTP/1.1");
    assert_eq!(exchange.request.header("authorization").as_deref(), Some("Bearer x"));
    assert_eq!(exchange.request.header("host").as_deref(), worker.url.strip_prefix("http://"));
    exchange
        .answer(b"HTTP/1.1 418 Odd\r\nx-a: 1\r\nx-a: 2\r\ncontent-length: 3\r\n\r\n\xff{ ")
        .await;
    let answer = client.answer().await;
    assert_eq!((answer.status(), answer.headers("x-a").len()), (418, 2));
    assert_eq!(answer.body, b"\xff{ ");
}

#[tokio::test]
async fn a_dead_worker_is_passed_over() {
    let mut dead = ScriptedWorker::start().await;
    let mut good = ScriptedWorker::start().await;
    let flags = ["--health-check-interval-secs=3600"];
    let router = Router::ready(&[&dead.url, &good.url], &flags).await;
    dead.go_down().await;
    let mut client = router.connect().await;
    client.send(request("GET /v1/models", &[], "")).await;
    good.request().await.answer(ok(r#"{"data":[]}"#)).await;
    assert_eq!(client.answer().await.status(), 200);
    assert_eq!(router.worker(&dead.url).await["state"], "unreachable");
    good.go_down().await;
    let answer = router.get("/v1/models").await;
    assert_eq!((answer.status(), answer.error_code().as_str()), (502, "worker_unreachable"));
    for path in ["/v1/models", "/engine_metrics", "/health_generate"] {
        let answer = router.get(path).await;
        assert_eq!((answer.status(), answer.error_code().as_str()), (503, "no_available_workers"));
    }
}

#[tokio::test]
async fn engine_metrics_are_merged() {
    let sims = Simulated::start(2).await;
    let router = Router::ready(&sims.urls(), &[]).await;
    let answer = router.get("/engine_metrics").await;
    assert_eq!(answer.status(), 200);
    assert!(answer.header("content-type").is_some_and(|it| it.starts_with("text/plain")));
    let text = answer.text();
    assert_eq!(text.matches("# TYPE sglang:num_running_reqs gauge").count(), 1, "{text}");
    for url in &sims.urls {
        let sample =
            format!("sglang:num_running_reqs{{worker_addr=\"{url}\",model_name=\"sim-model\"}} 0");
        assert!(text.lines().any(|line| line.starts_with(&sample)), "{text}");
    }
}

#[tokio::test]
async fn engine_metrics_of_those_that_have_them() {
    let mut first = ScriptedWorker::start().await;
    let mut second = ScriptedWorker::start().await;
    let router = Router::ready(&[&first.url, &second.url], &[]).await;
    let mut client = router.connect().await;
    client.send(request("GET /engine_metrics", &[], "")).await;
    first.request().await.answer("HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n").await;
    second.request().await.answer(ok("up 1\n")).await;
    let answer = client.answer().await;
    assert_eq!(answer.text(), format!("up{{worker_addr=\"{}\"}} 1\n", second.url));
    client.send(request("GET /engine_metrics", &[], "")).await;
    drop(first.request().await);
    drop(first.request().await);
    second.request().await.answer("HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n").await;
    let answer = client.answer().await;
    assert_eq!((answer.status(), answer.error_code().as_str()), (502, "worker_unreachable"));
    assert!(answer.error_message().contains("--enable-metrics"));
}

#[tokio::test]
async fn workers_are_listed_and_found() {
    let sims = Simulated::start(1).await;
    let other = ScriptedWorker::start_with(Health::Bad).await;
    let router = Router::start(&[&sims.urls[0], &other.url], &[]);
    router.until_healthy(1).await;
    other.until_checked(1).await;
    router.until_told().await;
    let all = router.json("/workers").await;
    assert_eq!(all["total"], 2);
    let first = &all["workers"][0];
    assert_eq!((&first["id"], &first["url"]), (&"0".into(), &sims.urls[0].clone().into()));
    assert_eq!((&first["is_healthy"], &first["state"]), (&true.into(), &"healthy".into()));
    assert_eq!(
        (&first["load"], &first["served"], &first["failed"]),
        (&0.into(), &0.into(), &0.into())
    );
    assert_eq!((&first["node_id"], &first["kv_tokens"]), (&"gpu_0".into(), &400_000.into()));
    assert_eq!(first["model_id"], "sim-model");
    let second = &all["workers"][1];
    assert_eq!((&second["is_healthy"], &second["state"]), (&false.into(), &"starting".into()));
    assert_eq!(router.json("/workers/0").await, *first);
    assert_eq!(router.worker(&sims.urls[0]).await, *first);
    assert_eq!(router.json("/workers/gpu_0").await, *first);
    for path in [
        "/workers/2",
        "/workers/-1",
        "/workers/http%3A%2F%2Fnobody%3A1",
        "/workers/%20",
        "/workers/%ff",
    ] {
        let answer = router.get(path).await;
        assert_eq!((answer.status(), answer.error_code().as_str()), (404, "not_found"), "{path}");
    }
}

#[tokio::test]
async fn the_routers_own_metrics_count_what_happened() {
    let sims = Simulated::start(1).await;
    let router = Router::ready(&sims.urls(), &[]).await;
    for _ in 0..3 {
        let body = r#"{"text":"hi","sampling_params":{"max_new_tokens":2}}"#;
        assert_eq!(router.post("/generate", body).await.status(), 200);
    }
    assert_eq!(router.post("/generate", "{").await.status(), 400);
    let answer = router.get("/metrics").await;
    assert!(answer.header("content-type").is_some_and(|it| it.contains("openmetrics")));
    let text = answer.text();
    let url = &sims.urls[0];
    for line in [
        "smg_http_requests_total{method=\"POST\",path=\"/generate\"} 4".to_owned(),
        "smg_http_responses_total{status_code=\"200\",error_code=\"\"} 3".to_owned(),
        "smg_http_responses_total{status_code=\"400\",error_code=\"\"} 1".to_owned(),
        format!("sgl_router_processed_requests_total{{worker=\"{url}\"}} 3"),
        format!("smg_worker_requests_active{{worker=\"{url}\"}} 0"),
        format!("smg_worker_health{{worker=\"{url}\"}} 1"),
        "sgl_router_traces_held 4".to_owned(),
        "# EOF".to_owned(),
    ] {
        assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
    }
}
