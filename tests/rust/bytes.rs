//! What one side sends, the other gets: bodies to the byte, end-to-end headers, statuses.

use crate::support::{Router, ScriptedWorker, chunked, ok, request};

async fn pair() -> (ScriptedWorker, Router) {
    let worker = ScriptedWorker::start().await;
    let router = Router::ready(&[&worker.url], &[]).await;
    (worker, router)
}

#[tokio::test]
async fn request_bodies_reach_the_worker_as_they_were_sent() {
    let (mut worker, router) = pair().await;
    let mut client = router.connect().await;
    let large = format!(r#"{{"text":"{}","stream":false}}"#, "pad ".repeat(80_000));
    let bodies: [&[u8]; 12] = [
        b" { \"text\" :\t\"hi\" ,\"unknown\":{\"x\":[1,2 , 3]} }\n",
        br#"{"text":["a","b"],"sampling_params":[{},{}]}"#,
        br#"{"input_ids":[1,2,3]}"#,
        br#"{"input_ids":[[1],[2,3]]}"#,
        br#"{"text":"first","text":"second","stream":false,"stream":true}"#,
        br#"{"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"data:,x"}}]}]}"#,
        "{\"text\":\"h\\u00e9llo 世界 \\ud83d\\ude00\"}".as_bytes(),
        b"{\"text\": ",
        b"\xff\xfe{\"text\":\"\x80\"}\0",
        b"[1,2,3]",
        b"",
        large.as_bytes(),
    ];
    for body in bodies {
        client.send(request("POST /generate", &[], body)).await;
        let exchange = worker.request().await;
        assert_eq!(exchange.request.body, body);
        assert_eq!(exchange.request.header("content-length"), Some(body.len().to_string()));
        exchange.answer(ok("{}")).await;
        assert_eq!(client.answer().await.status(), 200);
    }
}

#[tokio::test]
async fn a_chunked_request_reaches_the_worker_whole() {
    let (mut worker, router) = pair().await;
    let mut client = router.connect().await;
    client.send("POST /generate HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n").await;
    client.send([chunked("{\"text\":"), chunked(" \"hi\"}")].concat()).await;
    client.send("0\r\nx-trailer: 1\r\n\r\n").await;
    let exchange = worker.request().await;
    assert_eq!(exchange.request.body, b"{\"text\": \"hi\"}");
    assert_eq!(exchange.request.header("content-length").as_deref(), Some("14"));
    assert_eq!(exchange.request.header("transfer-encoding"), None);
    exchange.answer(ok("{}")).await;
    assert_eq!(client.answer().await.body, b"{}");
}

#[tokio::test]
async fn answers_reach_the_client_as_the_worker_gave_them() {
    let (mut worker, router) = pair().await;
    let mut client = router.connect().await;
    let gzip: &[u8] = b"\x1f\x8b\x08\0\0\0\0\0\0\x03\xab\xae\x05\0C\xbf\xa6\xa3\x02\0\0\0";
    let large = vec![0xfe; 300_000];
    let answers: [(&str, &str, &[u8]); 6] = [
        ("application/json", "content-encoding: gzip\r\n", gzip),
        ("application/json", "", b"{ \"text\" : \"\xff\xfe\" }\n\n"),
        ("text/plain; charset=latin-1", "", b"caf\xe9"),
        ("application/json; charset=utf-8", "", b""),
        ("application/octet-stream", "", &large),
        ("audio/wav", "etag: \"x\"\r\ncache-control: no-store\r\n", b"RIFF"),
    ];
    for (content_type, headers, body) in answers {
        for is_chunked in [false, true] {
            client.send(request("POST /v1/completions", &[], "{}")).await;
            let mut exchange = worker.request().await;
            let head = format!("HTTP/1.1 200 OK\r\ncontent-type: {content_type}\r\n{headers}");
            exchange.send(head).await;
            if is_chunked {
                exchange.send("transfer-encoding: chunked\r\n\r\n").await;
                for piece in body.chunks(7_000.max(body.len() / 3)) {
                    exchange.send(chunked(piece)).await;
                }
                exchange.answer(chunked("")).await;
            } else {
                exchange.send(format!("content-length: {}\r\n\r\n", body.len())).await;
                exchange.answer(body).await;
            }
            let answer = client.answer().await;
            assert!(answer.is_whole);
            assert_eq!(answer.body, body, "{content_type}");
            assert_eq!(answer.header("content-type").as_deref(), Some(content_type));
            for header in headers.lines() {
                let (name, value) = header.split_once(": ").expect("a header");
                assert_eq!(answer.header(name).as_deref(), Some(value));
            }
            let length = (!is_chunked).then(|| body.len().to_string());
            assert_eq!(answer.header("content-length"), length, "{content_type}");
        }
    }
}

#[tokio::test]
async fn an_answer_that_ends_with_its_connection_is_whole() {
    let (mut worker, router) = pair().await;
    let mut client = router.connect().await;
    client.send(request("POST /generate", &[], "{}")).await;
    let mut exchange = worker.request().await;
    exchange.send("HTTP/1.0 200 OK\r\nserver: old\r\n\r\nno length").await;
    drop(exchange);
    let answer = client.answer().await;
    assert_eq!((answer.is_whole, answer.body.as_slice()), (true, &b"no length"[..]));
    assert_eq!(answer.header("server").as_deref(), Some("old"));
}

#[tokio::test]
async fn interim_answers_are_the_connections_own() {
    let (mut worker, router) = pair().await;
    let mut client = router.connect().await;
    client.send(request("POST /generate", &[], "{}")).await;
    let mut exchange = worker.request().await;
    exchange.send("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n").await;
    exchange.answer(ok("{}")).await;
    let answer = client.answer().await;
    assert_eq!((answer.status(), answer.header("link")), (200, None));
}

#[tokio::test]
async fn statuses_are_the_workers() {
    let mut worker = ScriptedWorker::start().await;
    let router = Router::ready(&[&worker.url], &["--disable-retries"]).await;
    let mut client = router.connect().await;
    let lines = [
        "200 OK",
        "201 Created",
        "202 Accepted",
        "206 Partial Content",
        "307 Temporary Redirect",
        "400 Bad Request",
        "401 Unauthorized",
        "404 Not Found",
        "422 Unprocessable Entity",
        "429 Too Many Requests",
        "500 Internal Server Error",
        "503 Service Unavailable",
        "599 Odd",
    ];
    for line in lines {
        client.send(request("POST /v1/embeddings", &[], "{}")).await;
        let body = r#"{"object":"error","message":"no"}"#;
        let head =
            format!("HTTP/1.1 {line}\r\nretry-after: 7\r\ncontent-length: {}\r\n\r\n", body.len());
        worker.request().await.answer(head + body).await;
        let answer = client.answer().await;
        assert!(line.starts_with(&answer.status().to_string()), "{line}");
        assert_eq!(answer.text(), body);
        assert_eq!(answer.header("retry-after").as_deref(), Some("7"));
        assert_eq!(answer.header("x-router-error-code"), None);
        assert_eq!(answer.header("x-sglang-worker").as_deref(), Some(worker.url.as_str()));
    }
    for line in ["204 No Content", "304 Not Modified"] {
        client.send(request("POST /v1/embeddings", &[], "{}")).await;
        worker.request().await.answer(format!("HTTP/1.1 {line}\r\nx-a: 1\r\n\r\n")).await;
        let answer = client.answer().await;
        assert!(line.starts_with(&answer.status().to_string()), "{line}");
        assert!(answer.body.is_empty());
        let id = answer.header("x-request-id").expect("an id");
        let status = if line.starts_with('2') { "completed" } else { "failed" };
        assert_eq!(router.trace_when(&id, status).await["http_status"], answer.status());
    }
    router.until_idle().await;
}

#[tokio::test]
async fn end_to_end_headers_go_both_ways_and_hop_by_hop_ones_do_not() {
    let (mut worker, router) = pair().await;
    let mut client = router.connect().await;
    let headers = [
        ("authorization", "Bearer secret"),
        ("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"),
        ("accept-encoding", "gzip, br"),
        ("x-many", "1"),
        ("X-Many", "2"),
        ("content-type", "application/json"),
        ("x-request-id", "mine"),
        ("user-agent", "test/1"),
        ("connection", "keep-alive, X-Private"),
        ("x-private", "1"),
        ("keep-alive", "timeout=9"),
        ("te", "trailers"),
        ("proxy-connection", "keep-alive"),
        ("proxy-authorization", "Basic x"),
    ];
    client.send(request("POST /generate", &headers, "{}")).await;
    let mut exchange = worker.request().await;
    let got = exchange.request.clone();
    for (name, value) in &headers[..8] {
        if !name.eq_ignore_ascii_case("x-many") {
            assert_eq!(got.header(name).as_deref(), Some(*value), "{name}");
        }
    }
    assert_eq!(got.headers("x-many"), ["1", "2"]);
    for (name, _) in &headers[9..] {
        assert!(got.headers(name).is_empty(), "{name}");
    }
    assert!(!got.headers("connection").concat().contains("rivate"));
    assert_eq!(got.header("host").as_deref(), worker.url.strip_prefix("http://"));

    exchange
        .send(
            "HTTP/1.1 200 Fine\r\nset-cookie: a=1\r\nSet-Cookie: b=2\r\nx-process-time: 3\r\nconnection: x-hop\r\n\
             x-hop: 1\r\nkeep-alive: timeout=5\r\nproxy-authenticate: Basic\r\nupgrade: h2c\r\n\
             x-request-id: the-workers-own\r\ndate: Thu, 01 Jan 1970 00:00:00 GMT\r\ncontent-length: 2\r\n\r\n",
        )
        .await;
    exchange.answer("{}").await;
    let answer = client.answer().await;
    assert_eq!(answer.headers("set-cookie"), ["a=1", "b=2"]);
    assert_eq!(answer.header("x-process-time").as_deref(), Some("3"));
    assert_eq!(answer.header("date").as_deref(), Some("Thu, 01 Jan 1970 00:00:00 GMT"));
    for name in ["x-hop", "keep-alive", "proxy-authenticate", "upgrade", "connection"] {
        assert!(answer.headers(name).is_empty(), "{name}");
    }
    assert_eq!(answer.header("x-request-id").as_deref(), Some("mine"));
    assert_eq!(answer.header("x-sglang-worker").as_deref(), Some(worker.url.as_str()));
    assert_eq!(answer.header("x-sglang-node").as_deref(), Some("gpu_0"));
    assert!(answer.headers("access-control-allow-origin").is_empty());
}

#[tokio::test]
async fn the_base_path_is_put_in_front_and_the_query_stays() {
    let mut worker = ScriptedWorker::start().await;
    let url = format!("{}/base/v2/", worker.url);
    let router = Router::ready(&[&url], &["--extra-routes=/v1/audio/speech"]).await;
    let mut client = router.connect().await;
    for (path, expected) in [
        ("/generate", "POST /base/v2/generate HTTP/1.1"),
        ("/generate?a=1&b=%2F%20&a=2", "POST /base/v2/generate?a=1&b=%2F%20&a=2 HTTP/1.1"),
        ("/v1/chat/completions?", "POST /base/v2/v1/chat/completions? HTTP/1.1"),
        ("/v1/audio/speech", "POST /base/v2/v1/audio/speech HTTP/1.1"),
    ] {
        client.send(request(&format!("POST {path}"), &[], "{}")).await;
        let exchange = worker.request().await;
        assert_eq!(exchange.request.first_line(), expected);
        exchange.answer(ok("{}")).await;
        let answer = client.answer().await;
        assert_eq!(answer.header("x-sglang-worker").as_deref(), url.strip_suffix('/'));
    }
}

#[tokio::test]
async fn long_heads_and_absolute_targets_are_passed_on() {
    let (mut worker, router) = pair().await;
    let mut client = router.connect().await;
    let query = "q".repeat(60_000);
    let value = "v".repeat(60_000);
    client.send(request(&format!("POST /generate?{query}"), &[("x-long", &value)], "{}")).await;
    let exchange = worker.request().await;
    assert_eq!(exchange.request.first_line(), format!("POST /generate?{query} HTTP/1.1"));
    assert_eq!(exchange.request.header("x-long"), Some(value));
    exchange.answer(ok("{}")).await;
    assert_eq!(client.answer().await.status(), 200);

    client.send(request("POST http://elsewhere.test:9/generate?a=b", &[], "{}")).await;
    let exchange = worker.request().await;
    assert_eq!(exchange.request.first_line(), "POST /generate?a=b HTTP/1.1");
    exchange.answer(ok("{}")).await;
    assert_eq!(client.answer().await.status(), 200);
}

#[tokio::test]
async fn every_routed_route_is_passed_on_and_traced_under_its_name() {
    let (mut worker, router) = pair().await;
    let mut client = router.connect().await;
    let routes = [
        "/generate",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/rerank",
        "/rerank",
        "/v1/score",
        "/v1/classify",
        "/classify",
        "/encode",
        "/v1/responses",
        "/v1/messages",
        "/tokenize",
        "/v1/tokenize",
        "/detokenize",
        "/v1/detokenize",
    ];
    for route in routes {
        client.send(request(&format!("POST {route}"), &[("x-request-id", route)], "{}")).await;
        let exchange = worker.request().await;
        assert_eq!(exchange.request.first_line(), format!("POST {route} HTTP/1.1"));
        assert_eq!(exchange.request.header("x-request-id").as_deref(), Some(route));
        exchange.answer(ok("{}")).await;
        assert_eq!(client.answer().await.status(), 200);
        let trace = router.trace_now(route).await;
        assert_eq!(
            (trace["route"].as_str(), trace["status"].as_str()),
            (Some(route), Some("completed"))
        );
    }
}

#[tokio::test]
async fn an_http_1_0_client_gets_an_answer_without_chunks() {
    let (mut worker, router) = pair().await;
    let mut client = router.connect().await;
    client.send("POST /generate HTTP/1.0\r\ncontent-length: 2\r\n\r\n{}").await;
    let mut exchange = worker.request().await;
    assert!(exchange.request.first_line().ends_with("HTTP/1.1"));
    exchange.send("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").await;
    exchange.answer([chunked("one "), chunked("two"), chunked("")].concat()).await;
    let answer = client.answer().await;
    assert_eq!(answer.header("transfer-encoding"), None);
    assert_eq!(answer.body, b"one two");
    assert!(client.rest().await.is_empty());
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_order() {
    let (mut worker, router) = pair().await;
    let mut client = router.connect().await;
    let requests: Vec<u8> =
        ["1", "2", "3"].iter().flat_map(|body| request("POST /generate", &[], body)).collect();
    client.send(requests).await;
    for body in ["1", "2", "3"] {
        let exchange = worker.request().await;
        assert_eq!(exchange.request.text(), body);
        exchange.answer(ok(body)).await;
    }
    for body in ["1", "2", "3"] {
        assert_eq!(client.answer().await.text(), body);
    }
}

#[tokio::test]
async fn answers_name_their_worker_as_asked() {
    for (flag, has_url, has_node) in
        [("url", true, true), ("node", false, true), ("off", false, false)]
    {
        let mut worker = ScriptedWorker::start().await;
        let flags = [format!("--worker-headers={flag}"), format!("--node-ids={}=left", worker.url)];
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        let router = Router::ready(&[&worker.url], &flags).await;
        let mut client = router.connect().await;
        client.send(request("POST /generate", &[], "{}")).await;
        worker.request().await.answer(ok("{}")).await;
        let answer = client.answer().await;
        assert_eq!(answer.header("x-sglang-worker").is_some(), has_url, "{flag}");
        assert_eq!(answer.header("x-sglang-node").as_deref(), has_node.then_some("left"));
    }
}
