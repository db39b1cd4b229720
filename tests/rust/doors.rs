//! Keys, and which origins a browser lets ask.

use sglang_router_rs::server::{Door, routes::ROUTES};

use crate::support::{Message, Router, ScriptedWorker, Simulated, encoded, ok, request};

const API: &str = "--api-key=open-sesame";
const ADMIN: &str = "--admin-api-key=master-key";

async fn ask(router: &Router, line: &str, authorizations: &[&str]) -> Message {
    let headers: Vec<_> = authorizations.iter().map(|value| ("authorization", *value)).collect();
    router.ask(request(line, &headers, "")).await
}

async fn status(router: &Router, line: &str, authorizations: &[&str]) -> u16 {
    let answer = ask(router, line, authorizations).await;
    if answer.status() == 401 {
        assert_eq!(answer.error_code(), "unauthorized");
        assert_eq!(answer.header("www-authenticate").as_deref(), Some("Bearer"));
        for key in ["open-sesame", "master-key"] {
            assert!(!answer.text().contains(key), "{}", answer.text());
        }
    }
    answer.status()
}

/// Every route with a path that it answers, and its door.
fn doors() -> Vec<(String, Door)> {
    let path = |path: &str| path.replace("{id}", "0").replace("{*id}", "x");
    let line =
        |(method, declared, purpose): &(_, &str, sglang_router_rs::server::routes::Purpose)| {
            (format!("{method} {}", path(declared)), purpose.door())
        };
    ROUTES.iter().map(line).collect()
}

#[tokio::test]
async fn without_keys_nobody_is_asked_for_one() {
    let router = Router::start(&[], &[]);
    for (line, _) in doors() {
        assert_ne!(status(&router, &line, &[]).await, 401, "{line}");
    }
}

#[tokio::test]
async fn every_route_but_those_of_health_and_metrics_asks_for_the_api_key() {
    let router = Router::start(&[], &[API, "--extra-routes=/v1/more"]);
    let open: Vec<_> = doors().into_iter().filter(|(_, door)| *door == Door::Open).collect();
    let lines: Vec<_> = open.iter().map(|(line, _)| line.as_str()).collect();
    assert_eq!(lines, ["GET /health", "GET /liveness", "GET /readiness", "GET /metrics"]);
    for (line, door) in doors() {
        let refused = status(&router, &line, &[]).await == 401;
        assert_eq!(refused, door != Door::Open, "{line}");
        let refused = status(&router, &line, &["Bearer open-sesame"]).await == 401;
        assert!(!refused, "{line}");
    }
    // Who has no key does not learn which routes there are.
    for (line, otherwise) in [
        ("POST /v1/more", 503),
        ("GET /nowhere", 404),
        ("GET //generate", 404),
        ("GET /%67enerate", 404),
        ("GET /generate", 405),
        ("OPTIONS /generate", 405),
        ("DELETE /v1/traces", 405),
    ] {
        assert_eq!(status(&router, line, &[]).await, 401, "{line}");
        assert_eq!(status(&router, line, &["Bearer open-sesame"]).await, otherwise, "{line}");
    }
}

#[tokio::test]
async fn the_key_has_to_be_the_key() {
    let router = Router::start(&[], &[API]);
    // White space around a header is not part of it.
    for good in
        ["Bearer open-sesame", "bearer open-sesame", "BeArEr  open-sesame", "Bearer open-sesame "]
    {
        assert_eq!(status(&router, "GET /workers", &[good]).await, 200, "{good}");
    }
    let long = format!("Bearer {}", "open-sesame".repeat(1000));
    for bad in [
        "",
        "Bearer",
        "Bearer ",
        "Bearer o",
        "Bearer open-sesam",
        "Bearer open-sesame1",
        "Bearer OPEN-SESAME",
        "Bearer open-sesame x",
        "open-sesame",
        "Basic open-sesame",
        "Basic b3Blbi1zZXNhbWU=",
        "Token open-sesame",
        "Bearer \u{1f511}",
        &long,
    ] {
        assert_eq!(status(&router, "GET /workers", &[bad]).await, 401, "{bad}");
    }
    assert_eq!(status(&router, "GET /workers", &[]).await, 401);
    let twice = ["Bearer open-sesame", "Bearer open-sesame"];
    assert_eq!(status(&router, "GET /workers", &twice).await, 401);
    let metrics = router.get("/metrics").await.text();
    assert!(metrics.contains("sgl_router_unauthorized_total 16\n"), "{metrics}");
}

#[tokio::test]
async fn managing_and_looking_back_asks_for_the_key_of_administrators() {
    let both = Router::start(&[], &[API, ADMIN]);
    let admin_only = Router::start(&[], &[ADMIN]);
    for (line, door) in doors() {
        for key in ["open-sesame", "master-key", "wrong"] {
            let header = format!("Bearer {key}");
            let opens = status(&both, &line, &[&header]).await != 401;
            let expected = match door {
                Door::Open => true,
                Door::Api => key == "open-sesame",
                Door::Admin => key == "master-key",
            };
            assert_eq!(opens, expected, "{line} with {key}");
            let opens = status(&admin_only, &line, &[&header]).await != 401;
            assert_eq!(opens, door != Door::Admin || key == "master-key", "{line} with {key}");
        }
    }
    let admin: Vec<_> = doors().into_iter().filter(|(_, door)| *door == Door::Admin).collect();
    for part in ["/workers", "/v1/traces", "/flush_cache", "/get_loads"] {
        assert!(admin.iter().any(|(line, _)| line.contains(part)), "{part}");
    }
    assert_eq!(status(&admin_only, "GET /nowhere", &[]).await, 404);
}

#[tokio::test]
async fn who_is_refused_leaves_no_trace_and_reads_why() {
    let mut worker = ScriptedWorker::start().await;
    let router = Router::start(&[&worker.url], &[API]);
    router.until_healthy(1).await;
    let large = vec![b'x'; 4 << 20];
    let answer = router.ask(request("POST /generate", &[("x-request-id", "mine")], &large)).await;
    assert_eq!((answer.status(), answer.error_code().as_str()), (401, "unauthorized"));
    assert!(answer.error_message().contains("api_key"), "{}", answer.error_message());
    assert_eq!(answer.header("x-request-id"), None);
    let stats = ask(&router, "GET /v1/traces/stats", &["Bearer open-sesame"]).await.json();
    assert_eq!(stats["total_requests"], 0);
    assert!(worker.request_now().is_none());

    let mut client = router.connect().await;
    client.send("POST /generate HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n").await;
    assert_eq!(client.answer().await.status(), 401);
}

#[tokio::test]
async fn workers_are_sent_the_api_key() {
    let mut worker = ScriptedWorker::start().await;
    let flags = [API, ADMIN, "--health-check-endpoint=/probe"];
    let router = Router::start(&[&worker.url], &flags);
    let check = worker.request().await;
    assert_eq!(check.request.header("authorization").as_deref(), Some("Bearer open-sesame"));
    check.answer(ok("")).await;
    router.until_healthy(1).await;

    for (line, key, path) in [
        ("POST /generate", "open-sesame", "POST /generate "),
        ("GET /v1/models", "open-sesame", "GET /v1/models "),
        ("GET /engine_metrics", "open-sesame", "GET /metrics "),
        ("POST /flush_cache", "master-key", "POST /flush_cache "),
        ("GET /get_loads", "master-key", "GET /get_load "),
    ] {
        let mut client = router.connect().await;
        // As typed by hand; the worker is sent it in the common form.
        client.send(request(line, &[("authorization", &format!("bearer {key}"))], "")).await;
        let exchange = worker.request().await;
        assert!(exchange.request.first_line().starts_with(path), "{line}");
        let sent = exchange.request.header("authorization");
        assert_eq!(sent.as_deref(), Some("Bearer open-sesame"), "{line}");
        exchange.answer(ok("[]")).await;
        assert_eq!(client.answer().await.status(), 200, "{line}");
    }
    let workers = ask(&router, "GET /workers", &["Bearer master-key"]).await.text();
    assert!(workers.contains(&worker.url) && !workers.contains("open-sesame"), "{workers}");
}

#[tokio::test]
async fn a_clients_own_key_goes_to_the_worker_and_that_of_administrators_does_not() {
    let mut worker = ScriptedWorker::start().await;
    let router = Router::start(&[&worker.url], &[ADMIN]);
    router.until_healthy(1).await;
    for (given, sent) in [
        (vec!["Bearer worker-key"], vec!["Bearer worker-key"]),
        (vec!["Basic dTpw"], vec!["Basic dTpw"]),
        (vec!["Bearer master-key"], vec![]),
        (vec!["Bearer a", "bearer  master-key"], vec![]),
        (vec![], vec![]),
    ] {
        for line in ["POST /generate", "GET /v1/models"] {
            let mut client = router.connect().await;
            let headers: Vec<_> = given.iter().map(|value| ("authorization", *value)).collect();
            client.send(request(line, &headers, "")).await;
            let exchange = worker.request().await;
            assert_eq!(exchange.request.headers("authorization"), sent, "{line}");
            exchange.answer(ok("{}")).await;
            assert_eq!(client.answer().await.status(), 200);
        }
    }
    let mut client = router.connect().await;
    client.send(request("POST /flush_cache", &[("authorization", "Bearer master-key")], "")).await;
    let exchange = worker.request().await;
    assert_eq!(exchange.request.header("authorization"), None);
    exchange.answer(ok("")).await;
    assert_eq!(client.answer().await.status(), 200);
}

#[tokio::test]
async fn a_worker_may_have_a_key_of_its_own() {
    let mut first = ScriptedWorker::start().await;
    let mut second = ScriptedWorker::start().await;
    let router = Router::start(&[&first.url], &[API]);
    let key = [("authorization", "Bearer open-sesame")];
    let joining = format!(r#"{{"url": "{}", "api_key": "its-own"}}"#, second.url);
    let answer = router.ask(request("POST /workers", &key, joining)).await;
    assert_eq!(answer.status(), 202);
    assert!(!answer.text().contains("its-own"), "{}", answer.text());
    router.until_healthy(2).await;
    let mut clients = [router.connect().await, router.connect().await];
    for client in &mut clients {
        client.send(request("POST /generate", &key, "")).await;
    }
    for (worker, sent) in [(&mut first, "Bearer open-sesame"), (&mut second, "Bearer its-own")] {
        let exchange = worker.request().await;
        assert_eq!(exchange.request.header("authorization").as_deref(), Some(sent));
        exchange.answer(ok("{}")).await;
    }
    for client in &mut clients {
        assert_eq!(client.answer().await.status(), 200);
    }
    let workers = ask(&router, "GET /workers", &["Bearer open-sesame"]).await.text();
    assert!(!workers.contains("its-own"), "{workers}");
}

/// The CORS headers of an answer, in order of their names.
fn cors(answer: &Message) -> Vec<String> {
    let head = String::from_utf8_lossy(&answer.head).into_owned();
    let mut lines: Vec<String> =
        head.split("\r\n").filter(|line| line.starts_with("access-")).map(str::to_owned).collect();
    lines.sort();
    lines
}

const PAGE: &str = "https://chat.example.org";

#[tokio::test]
async fn without_allowed_origins_no_answer_has_cors_headers() {
    let mut worker = ScriptedWorker::start().await;
    let router = Router::ready(&[&worker.url], &[]).await;
    let origin = [("origin", PAGE), ("access-control-request-method", "POST")];
    for line in ["GET /health", "GET /nowhere", "OPTIONS /generate"] {
        assert!(cors(&router.ask(request(line, &origin, "")).await).is_empty(), "{line}");
    }
    // A worker does not decide which pages may read from the router.
    let mut client = router.connect().await;
    client.send(request("POST /generate", &origin, "{}")).await;
    let head = "HTTP/1.1 200 OK\r\naccess-control-allow-origin: *\r\naccess-control-allow-credentials: true\r\n";
    worker.request().await.answer(format!("{head}content-length: 0\r\n\r\n")).await;
    assert!(cors(&client.answer().await).is_empty());
}

#[tokio::test]
async fn a_page_of_another_origin_does_not_manage_a_router_without_a_key() {
    let worker = ScriptedWorker::start().await;
    let router = Router::ready(&[&worker.url], &[]).await;
    let path = format!("POST /remove_worker?url={}", encoded(&worker.url));
    let refusal = router.ask(request(&path, &[("origin", PAGE)], "")).await;
    assert_eq!((refusal.status(), &*refusal.error_code()), (403, "forbidden_origin"));
    assert!(refusal.error_message().contains("cors_allowed_origins"), "{}", refusal.text());
    router.until_healthy(1).await;
    let own = [("origin", "http://router.test")];
    assert_eq!(router.ask(request(&path, &own, "")).await.status(), 200);
}

#[tokio::test]
async fn a_page_of_an_allowed_origin_may_ask_and_read() {
    let sims = Simulated::start(1).await;
    let flags =
        [API, "--max-payload-size=1000", "--cors-allowed-origins", PAGE, "http://localhost:3000"];
    let router = Router::start(&sims.urls(), &flags);
    router.until_healthy(1).await;
    let preflight = [
        ("origin", PAGE),
        ("access-control-request-method", "POST"),
        ("access-control-request-headers", "authorization,content-type"),
    ];
    let answer = router.ask(request("OPTIONS /v1/chat/completions", &preflight, "")).await;
    assert_eq!(answer.status(), 200);
    let expected = [
        "access-control-allow-headers: authorization,content-type",
        "access-control-allow-methods: *",
        "access-control-allow-origin: https://chat.example.org",
    ];
    assert_eq!(cors(&answer), expected);

    let exposed = "access-control-expose-headers: x-request-id,x-sglang-worker,x-sglang-node,\
                   x-router-error-code,x-next-cursor,x-left-out,retry-after";
    let expected = ["access-control-allow-origin: https://chat.example.org", exposed];
    let key = ("authorization", "Bearer open-sesame");
    let large = vec![b'x'; 1001];
    for (line, headers, body, status) in [
        ("POST /generate", vec![("origin", PAGE), key], &br#"{"text":"hi"}"#[..], 200),
        ("POST /generate", vec![("origin", PAGE)], b"{}", 401),
        ("POST /generate", vec![("origin", PAGE), key], &large, 413),
        ("GET /nowhere", vec![("origin", PAGE), key], b"", 404),
        ("GET /generate", vec![("origin", PAGE), key], b"", 405),
        ("GET /health", vec![("origin", PAGE)], b"", 200),
    ] {
        let answer = router.ask(request(line, &headers, body)).await;
        assert_eq!(answer.status(), status, "{line}");
        assert_eq!(cors(&answer), expected, "{line} {status}");
        assert!(answer.headers("vary").iter().any(|vary| vary.contains("origin")));
    }
    let other = router.ask(request("GET /health", &[("origin", "https://evil.test")], "")).await;
    assert!(!cors(&other).iter().any(|line| line.contains("allow-origin")), "{:?}", cors(&other));
}

#[tokio::test]
async fn all_origins_may_be_allowed() {
    let router = Router::start(&[], &["--cors-allowed-origins=*"]);
    let answer = router.ask(request("GET /nowhere", &[("origin", PAGE)], "")).await;
    assert_eq!(answer.status(), 404);
    assert_eq!(cors(&answer)[0], "access-control-allow-origin: *");
}
