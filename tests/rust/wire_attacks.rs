//! Bytes that are meant to be read in two ways, or not at all: refused or handled as RFC 9110 and 9112 say, and never
//! passed on in doubt. After each of them an honest request comes through, the very next one at the worker.

use serde_json::json;

use crate::support::{
    Exchange, Message, Router, STREAM_HEAD, ScriptedWorker, Wire, answer, chunked, ok, request,
};

const HEAD: &str = "POST /generate HTTP/1.1\r\nhost: x\r\nx-request-id: x\r\n";

async fn pair(flags: &[&str]) -> (ScriptedWorker, Router) {
    let worker = ScriptedWorker::start().await;
    let router = Router::ready(&[&worker.url], &[flags, &["--disable-retries"]].concat()).await;
    (worker, router)
}

/// The lines of a head, sorted but for the first.
fn lines(request: &Message) -> Vec<String> {
    let head = String::from_utf8(request.head.clone()).expect("text");
    let mut lines: Vec<String> = head.trim_end().split("\r\n").map(str::to_owned).collect();
    lines[1..].sort();
    lines
}

/// What the worker got is this body behind a head of the router's making, and nothing else.
fn assert_plain(exchange: &Exchange, worker: &ScriptedWorker, body: &[u8]) {
    let host = worker.url.strip_prefix("http://").expect("a URL");
    let expected = [
        "POST /generate HTTP/1.1".to_owned(),
        format!("content-length: {}", body.len()),
        format!("host: {host}"),
        "x-request-id: x".to_owned(),
    ];
    assert_eq!(lines(&exchange.request), expected);
    assert_eq!(exchange.request.body, body);
}

/// The next request at the worker is an honest one, and its answer the honest one's.
async fn assert_sound(router: &Router, worker: &mut ScriptedWorker, name: &str) {
    let mut client = router.connect().await;
    client.send(request("POST /generate", &[("x-request-id", "x")], "honest")).await;
    let exchange = worker.request().await;
    assert_eq!(exchange.request.text(), "honest", "after {name}");
    assert_plain(&exchange, worker, b"honest");
    exchange.answer(ok("to the honest")).await;
    assert_eq!(client.answer().await.text(), "to the honest", "after {name}");
    assert_eq!(router.until_idle().await.len(), 1);
}

/// Sends bytes of which nothing may reach the worker. The answer, if there is one, has one of these statuses; then the
/// connection is closed.
async fn refused(router: &Router, name: &str, bytes: &[u8], statuses: &[u16]) -> Option<Message> {
    let mut client = router.connect().await;
    // The refusal may come before all was sent.
    let _ = client.try_send(bytes).await;
    let head = client.head().await;
    let answer = match head {
        Some(head) => Some(client.body_of(head).await),
        None => None,
    };
    if let Some(answer) = &answer {
        assert!(statuses.contains(&answer.status()), "{name}: {}", answer.first_line());
    }
    let rest = client.rest().await;
    assert!(rest.is_empty(), "{name}: {:?}", String::from_utf8_lossy(&rest));
    answer
}

#[tokio::test]
async fn heads_that_are_malformed_are_refused() {
    let (mut worker, router) = pair(&[]).await;
    let with = |header: &str| format!("{HEAD}{header}\r\n\r\nab").into_bytes();
    let many: String = (0..100_000).map(|number| format!("x-{number}: 1\r\n")).collect();
    let heads: Vec<(&str, Vec<u8>)> = vec![
        ("two lengths", with("content-length: 2\r\ncontent-length: 3")),
        ("a list of lengths", with("content-length: 2, 3")),
        ("a negative length", with("content-length: -2")),
        ("a signed length", with("content-length: +2")),
        ("a hexadecimal length", with("content-length: 0x2")),
        ("a length and more", with("content-length: 2a")),
        ("no length", with("content-length:")),
        ("a length beyond all", with("content-length: 99999999999999999999")),
        ("the largest length", with("content-length: 18446744073709551615")),
        ("a blank before the colon", with("content-length : 2")),
        ("a folded line", with("x-a: 1\r\n 2\r\ncontent-length: 2")),
        ("a folded first line", b"POST /generate HTTP/1.1\r\n host: x\r\n\r\n".to_vec()),
        ("a folded length", with("content-length:\r\n 2")),
        ("a NUL in a value", with("x-a: 1\0\r\ncontent-length: 2")),
        ("a NUL in a name", with("x-\0: 1\r\ncontent-length: 2")),
        ("a NUL in the target", b"POST /gen\0erate HTTP/1.1\r\nhost: x\r\n\r\n".to_vec()),
        ("a bare CR", with("x-a: 1\rcontent-length: 2")),
        ("a control character", with("x-a: \x0b1\r\ncontent-length: 2")),
        ("no name", with(": 1\r\ncontent-length: 2")),
        ("no colon", with("x-a\r\ncontent-length: 2")),
        ("another coding", with("transfer-encoding: gzip")),
        ("no coding", with("transfer-encoding: identity")),
        ("a coding that looks alike", with("transfer-encoding: xchunked")),
        ("chunked first", with("transfer-encoding: chunked, gzip")),
        ("a parameter", with("transfer-encoding: chunked;q=1")),
        ("a vertical tab", with("transfer-encoding:\x0bchunked")),
        ("a blank in the target", b"POST /gene rate HTTP/1.1\r\nhost: x\r\n\r\n".to_vec()),
        ("another version", b"POST /generate HTTP/1.2\r\nhost: x\r\n\r\n".to_vec()),
        ("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec()),
        ("HTTP/0.9", b"GET /health\r\n\r\n".to_vec()),
        (
            "chunks in HTTP/1.0",
            b"POST /generate HTTP/1.0\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n".to_vec(),
        ),
        ("100,000 headers", format!("{HEAD}{many}content-length: 2\r\n\r\nab").into_bytes()),
        ("a header of 1 MB", with(&format!("x-a: {}\r\ncontent-length: 2", "a".repeat(1 << 20)))),
    ];
    for (name, bytes) in heads {
        refused(&router, name, &bytes, &[400, 431]).await;
        assert!(worker.request_now().is_none(), "{name}");
        assert_sound(&router, &mut worker, name).await;
    }
}

#[tokio::test]
async fn a_request_names_one_host() {
    let (mut worker, router) = pair(&[]).await;
    for (line, hosts, is_fine) in [
        ("HTTP/1.1", "", false),
        ("HTTP/1.1", "host: x\r\nhost: x\r\n", false),
        ("HTTP/1.0", "host: x\r\nhost: y\r\n", false),
        ("HTTP/1.0", "", true),
    ] {
        let mut client = router.connect().await;
        client.send(format!("GET /health {line}\r\n{hosts}\r\n")).await;
        let answer = client.answer().await;
        if is_fine {
            assert_eq!(answer.status(), 200);
        } else {
            assert_eq!((answer.status(), &*answer.error_code()), (400, "invalid_request"));
        }
    }
    assert_sound(&router, &mut worker, "hosts").await;
}

#[tokio::test]
async fn bodies_in_a_coding_that_is_not_chunked_alone_are_refused_by_name() {
    let (mut worker, router) = pair(&[]).await;
    for codings in [
        "transfer-encoding: gzip, chunked",
        "transfer-encoding: chunked, chunked",
        "transfer-encoding: chunked\r\ntransfer-encoding: chunked",
        "transfer-encoding: gzip\r\ntransfer-encoding: chunked",
        "transfer-encoding: , chunked",
    ] {
        // Asked before it is sent, so that a 100 would be seen.
        let bytes = format!("{HEAD}expect: 100-continue\r\n{codings}\r\n\r\n");
        let answer = refused(&router, codings, bytes.as_bytes(), &[400]).await.expect("an answer");
        assert_eq!(answer.error_code(), "incomplete_body", "{codings}");
        assert!(answer.error_message().contains("chunked"), "{}", answer.error_message());
        let trace = router.trace_when("x", "failed").await;
        assert_eq!((&trace["attempts"], &trace["http_status"]), (&json!([]), &400.into()));
        assert!(worker.request_now().is_none(), "{codings}");
    }
    assert_sound(&router, &mut worker, "codings").await;
}

#[tokio::test]
async fn chunks_that_are_malformed_are_refused() {
    let (mut worker, router) = pair(&[]).await;
    let chunks: [(&str, &[u8]); 12] = [
        ("a negative size", b"-2\r\nab\r\n0\r\n\r\n"),
        ("a size beyond all", b"fffffffffffffffff\r\nab\r\n0\r\n\r\n"),
        ("a prefixed size", b"0x2\r\nab\r\n0\r\n\r\n"),
        ("a blank size", b"\r\nab\r\n0\r\n\r\n"),
        ("a blank before the size", b" 2\r\nab\r\n0\r\n\r\n"),
        ("two sizes", b"2 2\r\nab\r\n0\r\n\r\n"),
        ("a size ended by a bare LF", b"2\nab\r\n0\r\n\r\n"),
        ("an extension with a bare LF", b"2;a\nab\r\n0\r\n\r\n"),
        ("a chunk longer than its size", b"2\r\nabc\r\n0\r\n\r\n"),
        ("a chunk without an end", b"2\r\nab0\r\n\r\n"),
        ("a chunk ended by a bare LF", b"2\r\nab\n0\r\n\r\n"),
        ("no hexadecimal size", b"zz\r\nab\r\n0\r\n\r\n"),
    ];
    for (name, bytes) in chunks {
        let bytes = [HEAD.as_bytes(), b"transfer-encoding: chunked\r\n\r\n", bytes].concat();
        let answer = refused(&router, name, &bytes, &[400]).await.expect("an answer");
        assert_eq!(answer.error_code(), "incomplete_body", "{name}");
        assert_eq!(router.trace_when("x", "failed").await["attempts"], json!([]), "{name}");
        assert!(worker.request_now().is_none(), "{name}");
    }
    assert_sound(&router, &mut worker, "chunks").await;
    // A length that only announces too much.
    let length = "expect: 100-continue\r\ncontent-length: 9223372036854775807\r\n\r\n";
    let bytes = [HEAD, length].concat();
    let answer = refused(&router, length, bytes.as_bytes(), &[413]).await.expect("an answer");
    assert_eq!(answer.error_code(), "payload_too_large");
}

#[tokio::test]
async fn odd_framing_that_means_one_thing_is_made_plain() {
    let (mut worker, router) = pair(&[]).await;
    let framed: [(&str, &[u8], &[u8]); 8] = [
        ("one length twice", b"content-length: 2\r\ncontent-length: 2\r\n\r\nab", b"ab"),
        ("leading zeros", b"content-length: 002\r\n\r\nab", b"ab"),
        ("no body", b"\r\n", b""),
        ("an extension", b"transfer-encoding: chunked\r\n\r\n2;a=\"b\";c\r\nab\r\n0;x\r\n\r\n", b"ab"),
        ("a long size", b"transfer-encoding: chunked\r\n\r\n00000000000002\r\nab\r\n000\r\n\r\n", b"ab"),
        ("trailers", b"transfer-encoding: chunked\r\n\r\n2\r\nab\r\n0\r\ncontent-length: 9\r\nx-b: 1\r\n\r\n", b"ab"),
        ("capitals", b"Transfer-Encoding: Chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n", b"ab"),
        ("what its connection names", b"connection: x-a, content-length\r\nx-a: 1\r\ncontent-length: 2\r\n\r\nab", b"ab"),
    ];
    for (name, bytes, body) in framed {
        let mut client = router.connect().await;
        client.send([HEAD.as_bytes(), bytes].concat()).await;
        let exchange = worker.request().await;
        assert_plain(&exchange, &worker, body);
        exchange.answer(ok(name)).await;
        assert_eq!(client.answer().await.text(), name);
        assert_sound(&router, &mut worker, name).await;
    }
    let mut client = router.connect().await;
    client.send("POST /generate HTTP/1.1\nhost: x\nx-request-id: x\ncontent-length: 2\n\nab").await;
    let exchange = worker.request().await;
    assert_plain(&exchange, &worker, b"ab");
    exchange.answer(ok("{}")).await;
    assert_eq!(client.answer().await.status(), 200);
}

#[tokio::test]
async fn a_length_beside_chunks_counts_for_nothing_and_the_connection_ends() {
    let (mut worker, router) = pair(&[]).await;
    let hidden = request("POST /generate", &[("x-request-id", "hidden")], "hidden");
    for headers in [
        "content-length: 4\r\ntransfer-encoding: chunked",
        "transfer-encoding: chunked\r\ncontent-length: 4",
        "content-length: 4\r\ntransfer-encoding: chunked\r\ncontent-length: 5",
        "transfer-encoding: chunked\r\ncontent-length: -1",
    ] {
        let mut client = router.connect().await;
        let head = format!("{HEAD}{headers}\r\n\r\n");
        client.send([head.as_bytes(), b"2\r\nab\r\n0\r\n\r\n", &hidden].concat()).await;
        let exchange = worker.request().await;
        assert_plain(&exchange, &worker, b"ab");
        exchange.answer(ok("{}")).await;
        assert_eq!(client.answer().await.status(), 200);
        assert!(client.rest().await.is_empty(), "{headers}: closed behind it");
        assert!(worker.request_now().is_none(), "{headers}: what followed was no request");
        assert_sound(&router, &mut worker, headers).await;
    }
}

#[tokio::test]
async fn bytes_behind_a_request_are_a_request_of_their_own_or_an_error() {
    let (mut worker, router) = pair(&[]).await;
    let mut client = router.connect().await;
    let honest = request("POST /generate", &[("x-request-id", "x")], "ab");
    client.send([&honest[..], b"and more\r\n\r\n"].concat()).await;
    let exchange = worker.request().await;
    assert_plain(&exchange, &worker, b"ab");
    exchange.answer(ok("{}")).await;
    assert_eq!(client.answer().await.status(), 200);
    assert_eq!(client.answer().await.status(), 400);
    assert!(client.rest().await.is_empty());
    assert!(worker.request_now().is_none());
    assert_sound(&router, &mut worker, "more").await;
}

#[tokio::test]
async fn answers_to_pipelined_requests_of_all_kinds_are_in_order() {
    let (mut worker, router) = pair(&["--max-payload-size=1000"]).await;
    let mut client = router.connect().await;
    let routed = |body: &str| request("POST /generate", &[("x-request-id", "x")], body);
    let all = [
        routed("1"),
        request("GET /health", &[], ""),
        request("GET /nowhere", &[], "body"),
        b"HEAD /generate HTTP/1.1\r\nhost: x\r\n\r\n".to_vec(),
        b"\r\nPUT /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\n\r\nx".to_vec(),
        routed("2"),
    ];
    client.send(all.concat()).await;
    let exchange = worker.request().await;
    assert_plain(&exchange, &worker, b"1");
    assert!(worker.request_now().is_none());
    exchange.answer(ok("to 1")).await;
    assert_eq!(client.answer().await.text(), "to 1");
    assert_eq!(client.answer().await.text(), "OK");
    assert_eq!(client.answer().await.error_code(), "not_found");
    let to_head = client.head().await.expect("an answer without a body");
    assert_eq!((to_head.status(), to_head.header("allow").as_deref()), (405, Some("POST")));
    assert_eq!(client.answer().await.error_code(), "method_not_allowed");
    let exchange = worker.request().await;
    assert_plain(&exchange, &worker, b"2");
    exchange.answer(ok("to 2")).await;
    assert_eq!(client.answer().await.text(), "to 2");
}

#[tokio::test]
async fn http_1_0_is_closed_behind_its_answer_unless_it_asks_otherwise() {
    let (mut worker, router) = pair(&[]).await;
    for (connection, is_kept) in [("", false), ("connection: keep-alive\r\n", true)] {
        let mut client = router.connect().await;
        let ask = format!(
            "POST /generate HTTP/1.0\r\nx-request-id: x\r\n{connection}content-length: 2\r\n\r\nab"
        );
        client.send(&ask).await;
        let exchange = worker.request().await;
        assert_plain(&exchange, &worker, b"ab");
        exchange.answer(ok("{}")).await;
        let answer = client.answer().await;
        assert_eq!((answer.status(), answer.text().as_str()), (200, "{}"));
        assert_eq!(answer.header("connection").is_some_and(|it| it == "keep-alive"), is_kept);
        if is_kept {
            client.send(&ask).await;
            worker.request().await.answer(ok("again")).await;
            assert_eq!(client.answer().await.text(), "again");
        } else {
            assert!(client.rest().await.is_empty());
        }
    }
    // It knows no chunks: a stream ends with its connection, kept or not.
    let mut client = router.connect().await;
    client
        .send("POST /generate HTTP/1.0\r\nconnection: keep-alive\r\ncontent-length: 0\r\n\r\n")
        .await;
    let stream = [STREAM_HEAD.as_bytes(), &chunked("data: 1\n\n"), &chunked("")].concat();
    worker.request().await.answer(stream).await;
    let answer = client.answer().await;
    assert_eq!(answer.header("transfer-encoding"), None);
    assert_eq!(answer.text(), "data: 1\n\n");
}

#[tokio::test]
async fn a_continue_is_said_once_and_only_before_a_body_that_is_wanted() {
    let (mut worker, router) = pair(&["--max-payload-size=1000"]).await;
    let mut client = router.connect().await;
    client.send(format!("{HEAD}expect: 100-Continue\r\ntransfer-encoding: chunked\r\n\r\n")).await;
    assert_eq!(client.head().await.expect("an interim answer").status(), 100);
    client.send(chunked("a")).await;
    client.send([chunked("b"), chunked("")].concat()).await;
    let exchange = worker.request().await;
    assert_plain(&exchange, &worker, b"ab");
    exchange.answer(ok("{}")).await;
    assert_eq!(client.answer().await.status(), 200);

    for (line, status) in [("POST /nowhere", 404), ("PUT /generate", 405), ("POST /health", 405)] {
        let bytes = format!(
            "{line} HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n"
        );
        refused(&router, line, bytes.as_bytes(), &[status]).await.expect("an answer");
    }
    // HTTP/1.0 has no interim answers.
    let mut client = router.connect().await;
    client
        .send("POST /generate HTTP/1.0\r\nx-request-id: x\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\nab")
        .await;
    let exchange = worker.request().await;
    assert_plain(&exchange, &worker, b"ab");
    exchange.answer(ok("{}")).await;
    assert_eq!(client.answer().await.status(), 200);
}

#[tokio::test]
async fn nobody_is_switched_to_another_protocol() {
    let (mut worker, router) = pair(&[]).await;
    for headers in [
        "connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABk\r\n",
        "connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n",
    ] {
        let mut client = router.connect().await;
        client.send(format!("{HEAD}{headers}content-length: 2\r\n\r\nab")).await;
        let exchange = worker.request().await;
        for name in ["connection", "upgrade", "http2-settings"] {
            assert!(exchange.request.headers(name).is_empty(), "{name}");
        }
        assert_eq!(exchange.request.text(), "ab");
        exchange.answer(ok("{}")).await;
        assert_eq!(client.answer().await.status(), 200);
    }
    let websocket = "GET /generate HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n\
                     sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n\r\n";
    assert_eq!(router.ask(websocket).await.status(), 405);
    assert!(worker.request_now().is_none());
}

#[tokio::test]
async fn targets_and_methods_that_are_meant_for_other_servers() {
    let (mut worker, router) = pair(&[]).await;
    for (line, status) in [
        ("CONNECT 127.0.0.1:1", 404),
        ("CONNECT /generate", 405),
        ("TRACE /generate", 405),
        ("TRACE /", 404),
        ("OPTIONS *", 404),
        ("OPTIONS /generate", 405),
        ("POST 127.0.0.1:80", 404),
        ("POST *", 404),
        ("POST http://127.0.0.1:1", 404),
        ("POST http://127.0.0.1:1/nowhere", 404),
        ("POST /generate/../generate", 404),
        ("POST /%2e%2e/generate", 404),
        ("PATCH http://x/generate", 405),
    ] {
        let mut client = router.connect().await;
        client.send(format!("{line} HTTP/1.1\r\nhost: x\r\nmax-forwards: 0\r\n\r\n")).await;
        let head = client.head().await.unwrap_or_else(|| panic!("{line} has no answer"));
        assert_eq!(head.status(), status, "{line}");
        let answer = client.body_of(head).await;
        assert!(!answer.text().contains("max-forwards"), "{line}: nothing is echoed");
        assert!(worker.request_now().is_none(), "{line}");
    }
    let mut client = router.connect().await;
    client.send("POST http://evil.test:1/generate HTTP/1.1\r\nhost: x\r\nx-request-id: x\r\ncontent-length: 2\r\n\r\nab").await;
    let exchange = worker.request().await;
    assert_plain(&exchange, &worker, b"ab");
    exchange.answer(ok("{}")).await;
    assert_eq!(client.answer().await.status(), 200);
    assert_sound(&router, &mut worker, "targets").await;
}

/// One request, to which the worker answers these bytes and closes.
async fn answered(router: &Router, worker: &mut ScriptedWorker, bytes: &[u8]) -> Message {
    let mut client = router.connect().await;
    client.send(request("POST /generate", &[("x-request-id", "x")], "ab")).await;
    let mut exchange = worker.request().await;
    // The router may have seen enough before all was sent.
    let _ = exchange.wire().try_send(bytes).await;
    drop(exchange);
    client.answer().await
}

#[tokio::test]
async fn answers_that_are_malformed_are_no_answers() {
    let (mut worker, router) = pair(&["--disable-circuit-breaker"]).await;
    let many: String = (0..100_000).map(|number| format!("x-{number}: 1\r\n")).collect();
    let with = |headers: &str| format!("HTTP/1.1 200 OK\r\n{headers}\r\n\r\nab").into_bytes();
    let answers: Vec<(&str, Vec<u8>)> = vec![
        ("status 000", b"HTTP/1.1 000 None\r\ncontent-length: 2\r\n\r\nab".to_vec()),
        ("status 99", b"HTTP/1.1 99 Low\r\ncontent-length: 2\r\n\r\nab".to_vec()),
        ("status 1000", b"HTTP/1.1 1000 High\r\ncontent-length: 2\r\n\r\nab".to_vec()),
        ("a word for a status", b"HTTP/1.1 OK\r\ncontent-length: 2\r\n\r\nab".to_vec()),
        ("a negative status", b"HTTP/1.1 -20 Odd\r\ncontent-length: 2\r\n\r\nab".to_vec()),
        ("another version", b"HTTP/2.0 200 OK\r\ncontent-length: 2\r\n\r\nab".to_vec()),
        ("another protocol", b"SSH-2.0-OpenSSH_9.6\r\n\r\n".to_vec()),
        (
            "a switch",
            b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n"
                .to_vec(),
        ),
        ("two lengths", with("content-length: 2\r\ncontent-length: 3")),
        ("a negative length", with("content-length: -2")),
        ("a length beyond all", with("content-length: 99999999999999999999")),
        ("another coding", with("transfer-encoding: gzip")),
        ("a coding below chunks", with("transfer-encoding: gzip, chunked\r\n\r\n2\r\nab\r\n0")),
        ("chunks within chunks", with("transfer-encoding: chunked, chunked\r\n\r\n2\r\nab\r\n0")),
        (
            "chunks named twice",
            with("transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n0"),
        ),
        (
            "chunks in HTTP/1.0",
            b"HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n".to_vec(),
        ),
        ("a folded line", with("x-a: 1\r\n 2\r\ncontent-length: 2")),
        ("a NUL in a value", with("x-a: \0\r\ncontent-length: 2")),
        ("a blank before the colon", with("content-length : 2")),
        ("no colon", with("x-a\r\ncontent-length: 2")),
        ("100,000 headers", with(&format!("{many}content-length: 2"))),
        ("a header of 1 MB", with(&format!("x-a: {}\r\ncontent-length: 2", "a".repeat(1 << 20)))),
        ("chunks that are none", with("transfer-encoding: chunked")),
        ("a negative chunk", with("transfer-encoding: chunked\r\n\r\n-2")),
        ("a chunk beyond all", with("transfer-encoding: chunked\r\n\r\nfffffffffffffffff")),
    ];
    for (name, bytes) in answers {
        let answer = answered(&router, &mut worker, &bytes).await;
        assert_eq!(
            (answer.status(), answer.error_code().as_str()),
            (502, "worker_unreachable"),
            "{name}"
        );
        assert_eq!(answer.header("x-sglang-worker").as_deref(), Some(worker.url.as_str()));
        let trace = router.trace_when("x", "failed").await;
        assert_eq!(
            trace["error_message"].as_str(),
            Some(answer.error_message().as_str()),
            "{name}"
        );
        assert!(trace["attempts"][0]["error"].is_string(), "{name}: {trace}");
        assert_sound(&router, &mut worker, name).await;
    }
}

#[tokio::test]
async fn odd_answers_that_mean_one_thing_are_made_plain() {
    let (mut worker, router) = pair(&["--disable-circuit-breaker"]).await;
    let interim = "HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n".repeat(100);
    let answers: Vec<(&str, Vec<u8>, u16)> = vec![
        ("one length twice", b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 2\r\n\r\nab".to_vec(), 200),
        ("both lengths", b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n".to_vec(), 200),
        ("no reason", b"HTTP/1.1 200\r\ncontent-length: 2\r\n\r\nab".to_vec(), 200),
        ("bare LFs", b"HTTP/1.1 200 OK\ncontent-length: 2\n\nab".to_vec(), 200),
        ("status 999", b"HTTP/1.1 999 Odd\r\ncontent-length: 2\r\n\r\nab".to_vec(), 999),
        ("status 600", b"HTTP/1.1 600 Odd\r\ncontent-length: 2\r\n\r\nab".to_vec(), 600),
        ("trailers", b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2;x\r\nab\r\n0\r\nset-cookie: x\r\n\r\n".to_vec(), 200),
        ("interim answers", format!("{interim}HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nab").into_bytes(), 200),
        ("more than its length", b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nab and more".to_vec(), 200),
        ("more than its chunks", b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\nand more".to_vec(), 200),
        ("another answer behind it", [ok("ab"), ok("evil")].concat(), 200),
    ];
    for (name, bytes, status) in answers {
        let answer = answered(&router, &mut worker, &bytes).await;
        assert_eq!((answer.status(), answer.text().as_str()), (status, "ab"), "{name}");
        assert!(answer.is_whole, "{name}");
        let framing = (answer.headers("content-length"), answer.headers("transfer-encoding"));
        let is_plain = framing.0 == ["2"] && framing.1.is_empty()
            || framing.0.is_empty() && framing.1 == ["chunked"];
        assert!(is_plain, "{name}: {framing:?}");
        for header in ["link", "set-cookie", "trailer"] {
            assert!(answer.headers(header).is_empty(), "{name}");
        }
        assert_sound(&router, &mut worker, name).await;
    }
}

#[tokio::test]
async fn a_connection_with_bytes_behind_its_answer_is_not_used_again() {
    let (mut worker, router) = pair(&[]).await;
    for name in ["garbage", "another answer"] {
        let mut client = router.connect().await;
        client.send(request("POST /generate", &[("x-request-id", "x")], "ab")).await;
        let exchange = worker.request().await;
        let connection = exchange.connection;
        let more = if name == "garbage" { b"garbage\r\n\r\n".to_vec() } else { ok("evil") };
        exchange.answer([ok("ab"), more].concat()).await;
        assert_eq!(client.answer().await.text(), "ab");
        client.send(request("POST /generate", &[("x-request-id", "x")], "honest")).await;
        let exchange = worker.request().await;
        assert!(exchange.connection > connection, "{name}");
        exchange.answer(ok("to the honest")).await;
        assert_eq!(client.answer().await.text(), "to the honest");
    }
}

/// A request with a body of 20 MB, of which the worker has read nothing.
async fn unread(router: &Router, worker: &mut ScriptedWorker) -> (Wire, Exchange) {
    worker.stop_reading_bodies();
    let mut client = router.connect().await;
    let body = vec![b'x'; 20 << 20];
    client.send(request("POST /generate", &[("x-request-id", "x")], body)).await;
    let exchange = worker.request().await;
    (client, exchange)
}

#[tokio::test]
async fn an_answer_before_the_body_was_read_is_the_answer() {
    let (mut worker, router) = pair(&[]).await;
    let (mut client, mut exchange) = unread(&router, &mut worker).await;
    exchange.send(answer("413 Too Large", &[], "no more than 1 MB")).await;
    let refusal = client.answer().await;
    assert_eq!((refusal.status(), refusal.text().as_str()), (413, "no more than 1 MB"));
    assert_eq!(refusal.header("x-router-error-code"), None);
    let trace = router.trace_when("x", "failed").await;
    assert_eq!(trace["attempts"][0]["http_status"], 413);

    // A stream too, though its body is never read.
    let (mut client, mut streaming) = unread(&router, &mut worker).await;
    assert!(streaming.connection > exchange.connection, "half a body lies on the other one");
    streaming.send([STREAM_HEAD.as_bytes(), &chunked("data: 1\n\n")].concat()).await;
    let head = client.head().await.expect("a head");
    assert_eq!(client.chunk().await.expect("a chunk"), b"data: 1\n\n");
    streaming.send(chunked("")).await;
    assert!(client.body_of(head).await.is_whole);
    drop((exchange, streaming));
    router.until_idle().await;
}

#[tokio::test]
async fn a_worker_that_answers_and_closes_on_a_body_has_answered() {
    for _ in 0..10 {
        let (mut worker, router) = pair(&[]).await;
        let (mut client, mut exchange) = unread(&router, &mut worker).await;
        exchange.send(answer("413 Too Large", &[], "no more than 1 MB")).await;
        drop(exchange);
        let refusal = client.answer().await;
        assert_eq!((refusal.status(), refusal.text().as_str()), (413, "no more than 1 MB"));
        let trace = router.trace_when("x", "failed").await;
        assert_eq!(trace["attempts"][0]["http_status"], 413);
        assert_eq!(router.worker(&worker.url).await["failed"], 0);
    }
}

#[tokio::test]
async fn a_worker_that_answers_nothing_and_closes_on_a_body_has_failed() {
    let (mut worker, router) = pair(&[]).await;
    let (mut client, exchange) = unread(&router, &mut worker).await;
    drop(exchange);
    let refusal = client.answer().await;
    assert_eq!((refusal.status(), refusal.error_code().as_str()), (502, "worker_unreachable"));
    router.until_idle().await;
}
