//! Whatever comes in, the router says clearly what is wrong with it, or passes on what only the worker can
//! judge, and goes on serving.

use serde_json::json;

use crate::support::{Router, ScriptedWorker, Simulated, Wire, chunked, ok, request};

#[tokio::test]
async fn a_body_that_only_the_worker_can_judge_is_passed_on() {
    let sims = Simulated::start(1).await;
    let router = Router::ready(&sims.urls(), &[]).await;
    let deep = "[".repeat(100_000);
    let bodies: [&[u8]; 10] = [
        b"",
        b"{",
        b"null",
        b"[]",
        b"\"text\"",
        b"{}",
        br#"{"text":5}"#,
        br#"{"text":"x","stream":"yes","rid":{}}"#,
        b"\xff\xff",
        deep.as_bytes(),
    ];
    for body in bodies {
        let answer = router.post("/generate", body).await;
        assert_eq!(answer.header("x-router-error-code"), None, "{}", answer.text());
        assert_eq!(answer.header("x-sglang-worker").as_deref(), Some(sims.urls[0].as_str()));
        let id = answer.header("x-request-id").expect("an id");
        let ended = if answer.status() == 200 { "completed" } else { "failed" };
        let trace = router.trace_now(&id).await;
        assert_eq!(
            (trace["status"].as_str(), &trace["http_status"]),
            (Some(ended), &answer.status().into())
        );
    }
    assert_eq!(router.post("/generate", "{").await.status(), 400);
    assert_eq!(router.post("/generate", r#"{"text":"hi"}"#).await.status(), 200);
    router.until_idle().await;
}

async fn limited() -> (ScriptedWorker, Router) {
    let worker = ScriptedWorker::start().await;
    let router = Router::ready(&[&worker.url], &["--max-payload-size=1000"]).await;
    (worker, router)
}

#[tokio::test]
async fn a_client_that_sends_too_much_reads_why_not() {
    let (mut worker, router) = limited().await;
    let large = vec![b'x'; 4 << 20];
    let chunks: Vec<u8> = large.chunks(60_000).flat_map(chunked).collect();
    let head = "POST /generate HTTP/1.1\r\nhost: x\r\nx-request-id: large\r\ntransfer-encoding: chunked\r\n\r\n";
    let as_chunks = [head.as_bytes(), &chunks, b"0\r\n\r\n"].concat();
    let at_once = request("POST /generate", &[("x-request-id", "large")], &large);
    for bytes in [at_once, as_chunks] {
        let answer = router.ask(bytes).await;
        assert_eq!((answer.status(), answer.error_code().as_str()), (413, "payload_too_large"));
        assert!(answer.error_message().contains("1000"), "{}", answer.error_message());
        let trace = router.trace_now("large").await;
        assert_eq!(
            (trace["status"].as_str(), &trace["http_status"]),
            (Some("failed"), &413.into())
        );
        assert!(trace["worker_url"].is_null() && trace["attempts"] == json!([]));
    }
    // The limit itself is allowed.
    let mut client = router.connect().await;
    client.send(request("POST /generate", &[], &large[..1000])).await;
    worker.request().await.answer(ok("{}")).await;
    assert_eq!(client.answer().await.status(), 200);
    assert_eq!(router.ask(request("POST /generate", &[], &large[..1001])).await.status(), 413);
}

#[tokio::test]
async fn who_asks_before_sending_is_told_before_sending() {
    let (mut worker, router) = limited().await;
    let mut client = router.connect().await;
    client
        .send("POST /generate HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 1001\r\n\r\n")
        .await;
    let answer = client.answer().await;
    assert_eq!((answer.status(), answer.error_code().as_str()), (413, "payload_too_large"));

    let mut client = router.connect().await;
    client
        .send("POST /generate HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n")
        .await;
    assert_eq!(client.head().await.expect("an interim answer").status(), 100);
    client.send("{}").await;
    let exchange = worker.request().await;
    assert_eq!(exchange.request.header("expect"), None);
    exchange.answer(ok("{}")).await;
    assert_eq!(client.answer().await.status(), 200);
}

#[tokio::test]
async fn a_body_that_ends_early_is_named_so() {
    let (mut worker, router) = limited().await;
    for start in ["content-length: 100\r\n\r\n{", "transfer-encoding: chunked\r\n\r\n5\r\n{"] {
        let mut client = router.connect().await;
        client
            .send(format!("POST /generate HTTP/1.1\r\nhost: x\r\nx-request-id: part\r\n{start}"))
            .await;
        client.finish_sending().await;
        client.rest().await;
        let trace = router.trace_when("part", "failed").await;
        assert!(trace["worker_url"].is_null(), "{trace}");
    }
    assert!(worker.request_now().is_none());
    router.assert_alive().await;
}

#[tokio::test]
async fn unknown_routes_and_wrong_methods() {
    let router = Router::start(&[], &[]);
    for line in [
        "GET /nowhere",
        "POST /v2/generate",
        "GET /",
        "DELETE /generate/x",
        "GET //generate",
        "GET /v1/traces/",
        "GET /workers/",
        "POST /%67enerate%",
    ] {
        let answer = router.ask(request(line, &[], "")).await;
        assert_eq!((answer.status(), answer.error_code().as_str()), (404, "not_found"), "{line}");
        let path = line.split(' ').nth(1).expect("a path");
        assert!(answer.error_message().contains(path), "{}", answer.error_message());
    }
    for (line, allowed) in [
        ("GET /generate", "POST"),
        ("PUT /v1/chat/completions", "POST"),
        ("POST /health", "GET"),
        ("DELETE /v1/traces", "GET"),
        ("GET /v1/traces/batch", "POST"),
        ("POST /v1/traces/some/id", "GET"),
        ("POST /workers/0", "GET"),
        ("BREW /metrics", "GET"),
    ] {
        let answer = router.ask(request(line, &[], "")).await;
        assert_eq!(
            (answer.status(), answer.error_code().as_str()),
            (405, "method_not_allowed"),
            "{line}"
        );
        let allow = answer.header("allow").expect("allow");
        assert!(allow.split(',').any(|method| method == allowed), "{line}: {allow}");
    }
    // Neither is a request that is traced.
    assert_eq!(router.json("/v1/traces/stats").await["total_requests"], 0);
}

#[tokio::test]
async fn queries_of_traces_that_make_no_sense() {
    let router = Router::start(&[], &[]);
    for (query, named) in [
        ("limit=0", "1 to 1000"),
        ("limit=-1", "1 to 1000"),
        ("limit=1001", "1 to 1000"),
        ("limit=99999999999999999999999", "1 to 1000"),
        ("limit=ten", "1 to 1000"),
        ("limit=", "1 to 1000"),
        ("limit=1&limit=2", "more than once"),
        ("cursor=x", "x-next-cursor"),
        ("cursor=", "x-next-cursor"),
        ("cursor=c-1", "x-next-cursor"),
        ("status=done", "completed"),
        ("since=yesterday", "RFC 3339"),
        ("until=1e400", "RFC 3339"),
        ("format=xml", "jsonl"),
        ("nodeid=x", "node_id"),
        ("status=%ff%fe", "completed"),
    ] {
        let answer = router.get(&format!("/v1/traces?{query}")).await;
        assert_eq!(
            (answer.status(), answer.error_code().as_str()),
            (400, "invalid_query"),
            "{query}"
        );
        assert!(answer.error_message().contains(named), "{query}: {}", answer.error_message());
    }
    assert_eq!(router.json("/v1/traces?limit=1000").await, json!([]));
    router.assert_alive().await;
}

#[tokio::test]
async fn batches_that_make_no_sense() {
    let router = Router::start(&[], &[]);
    for body in
        ["", "{", "[]", "{}", r#"{"request_ids":"x"}"#, r#"{"request_ids":[1]}"#, r#"{"ids":[]}"#]
    {
        let answer = router.post("/v1/traces/batch", body).await;
        assert_eq!(
            (answer.status(), answer.error_code().as_str()),
            (400, "invalid_query"),
            "{body}"
        );
        assert!(answer.error_message().contains("request_ids"), "{}", answer.error_message());
    }
    let ids = |count: usize| json!({"request_ids": vec!["x"; count]}).to_string();
    let answer = router.post("/v1/traces/batch", ids(10_001)).await;
    assert_eq!((answer.status(), answer.error_code().as_str()), (413, "payload_too_large"));
    assert!(answer.error_message().contains("10000"), "{}", answer.error_message());
    let answer = router.post("/v1/traces/batch", ids(10_000)).await;
    assert_eq!((answer.status(), answer.json()), (200, json!([])));
}

#[tokio::test]
async fn garbage_instead_of_http() {
    let router = Router::start(&[], &[]);
    let long =
        [b"GET /".to_vec(), vec![b'a'; 200_000], b" HTTP/1.1\r\nhost: x\r\n\r\n".to_vec()].concat();
    let many: String = (0..150).map(|number| format!("x-{number}: 1\r\n")).collect();
    let many = format!("GET /health HTTP/1.1\r\nhost: x\r\n{many}\r\n");
    let wide = format!("GET /health HTTP/1.1\r\nhost: x\r\nx: {}\r\n\r\n", "a".repeat(2 << 20));
    let garbage: [(&[u8], &[u16]); 9] = [
        (b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03\r\n\r\n", &[400]),
        (b"hello\r\n\r\n", &[400]),
        (b"GET\r\n\r\n", &[400]),
        (b"GET / HTTP/9.9\r\n\r\n", &[400]),
        (b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n", &[400]),
        (b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nx", &[400]),
        (&long, &[414]),
        (many.as_bytes(), &[431]),
        (wide.as_bytes(), &[431]),
    ];
    for (bytes, statuses) in garbage {
        let mut client = router.connect().await;
        // The refusal may come before all was sent.
        let _ = client.try_send(bytes).await;
        if let Some(answer) = client.head().await {
            assert!(statuses.contains(&answer.status()), "{}", answer.first_line());
        }
        client.rest().await;
        router.assert_alive().await;
    }
    let stats = router.json("/v1/traces/stats").await;
    assert_eq!(stats["in_flight"], 0, "{stats}");
}

#[tokio::test]
async fn connections_that_say_nothing_or_little_are_no_burden() {
    let router = Router::start(&[], &[]);
    let silent: Vec<Wire> = futures_util::future::join_all((0..50).map(|_| router.connect())).await;
    let mut slow = router.connect().await;
    slow.send("GET /hea").await;
    router.assert_alive().await;
    slow.send("lth HTTP/1.1\r\nhost: x\r\n\r\n").await;
    assert_eq!(slow.answer().await.status(), 200);
    drop(silent);
    router.assert_alive().await;
}
