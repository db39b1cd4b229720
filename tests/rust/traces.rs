//! A request's record, end to end: every field is what the worker said, or what happened, or null.

use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::support::{Message, Router, ScriptedWorker, Simulated, ok, request, until};

/// Fields that hold times; checked for sense and then taken out.
const TIMES: [&str; 8] = [
    "timestamp",
    "completion_time",
    "queue_ms",
    "decision_us",
    "first_byte_ms",
    "ttft_ms",
    "latency_ms",
    "attempts",
];

/// The trace of an ended request without its times, after their check.
fn timeless(mut trace: Value) -> Value {
    let number = |name: &str| trace[name].as_f64();
    let steps = ["queue_ms", "first_byte_ms", "ttft_ms", "latency_ms"];
    let steps: Vec<f64> = steps.into_iter().filter_map(number).collect();
    assert!(steps.is_sorted() && steps.iter().all(|ms| *ms >= 0.0), "{trace}");
    let moment = |name: &str| {
        let text = trace[name].as_str().expect("a time");
        assert!(text.ends_with('Z') && text.len() == "2026-01-01T00:00:00.000000Z".len(), "{text}");
        OffsetDateTime::parse(text, &Rfc3339).expect("RFC 3339")
    };
    let took = (moment("completion_time") - moment("timestamp")).whole_microseconds() as f64;
    assert!((took / 1e3 - number("latency_ms").expect("an end")).abs() < 0.0015, "{trace}");
    for attempt in trace["attempts"].as_array().expect("a list") {
        assert!(attempt["latency_ms"].as_f64() <= number("latency_ms"), "{trace}");
    }
    let object = trace.as_object_mut().expect("an object");
    for name in TIMES {
        assert!(object.remove(name).is_some(), "{name} is missing");
    }
    trace
}

fn frames(answer: &Message) -> Vec<Value> {
    let text = answer.text();
    let data = text.lines().filter_map(|line| line.strip_prefix("data: "));
    data.filter(|data| *data != "[DONE]")
        .map(|data| serde_json::from_str(data).expect("JSON"))
        .collect()
}

async fn simulated(flags: &[&str]) -> (Simulated, Router) {
    let sims = Simulated::start(1).await;
    let router = Router::ready(&sims.urls(), flags).await;
    (sims, router)
}

async fn ask(router: &Router, id: &str, path: &str, body: &Value) -> Message {
    let headers = [("x-request-id", id), ("content-type", "application/json")];
    let answer = router.ask(request(&format!("POST {path}"), &headers, body.to_string())).await;
    assert_eq!(answer.status(), 200, "{}", answer.text());
    assert!(answer.is_whole);
    answer
}

#[tokio::test]
async fn generate_whole_and_streamed() {
    let (sims, router) = simulated(&["--policy=cache_aware", "--node-id-from=index"]).await;
    for (number, stream) in [(1, false), (2, true), (3, false)] {
        let id = format!("g{number}");
        let text = "the same words every time ".repeat(20);
        let body = json!({
            "text": text, "sampling_params": {"max_new_tokens": 4}, "stream": stream, "rid": format!("rid-{number}"),
        });
        let answer = ask(&router, &id, "/generate", &body).await;
        let said = if stream { frames(&answer).pop().expect("a frame") } else { answer.json() };
        let meta = &said["meta_info"];
        assert_eq!(meta["cached_tokens"].as_u64() > Some(0), number > 1, "{meta}");
        let trace = router.trace_now(&id).await;
        assert_eq!(trace["ttft_ms"].is_f64(), stream);
        let attempt = &trace["attempts"][0];
        assert_eq!(
            (&attempt["worker_url"], &attempt["node_id"]),
            (&sims.urls[0].clone().into(), &"worker_0".into())
        );
        assert_eq!((&attempt["http_status"], &attempt["error"]), (&200.into(), &Value::Null));
        assert!(attempt["latency_ms"].is_f64());
        let input_tokens = text.len().div_ceil(4);
        let reason = if number == 1 { "no_match" } else { "prefix_match" };
        let matched = if number == 1 { 0 } else { input_tokens };
        assert_eq!(
            timeless(trace),
            json!({
                "request_id": id, "worker_url": sims.urls[0], "node_id": "worker_0", "routing_policy": "cache_aware",
                "status": "completed", "route": "/generate", "cache_hit": number > 1,
                "input_tokens": input_tokens, "error_message": null, "model": null, "stream": stream,
                "http_status": 200, "finish_reason": "length", "reason": reason, "matched_tokens": matched,
                "prompt_tokens": meta["prompt_tokens"], "cached_tokens": meta["cached_tokens"],
                "completion_tokens": 4, "worker_request_id": format!("rid-{number}"), "trace_id": null,
                "candidates": null,
                "prompt_blocks": null,
            })
        );
    }
}

#[tokio::test]
async fn chat_whole_and_streamed_with_and_without_usage() {
    let (sims, router) = simulated(&[]).await;
    for (id, stream, usage) in
        [("whole", false, true), ("usage", true, true), ("bare", true, false)]
    {
        let mut body = json!({
            "model": "m-1", "messages": [{"role": "user", "content": "how are you today?"}], "max_tokens": 3,
            "stream": stream,
        });
        if stream && usage {
            body["stream_options"] = json!({"include_usage": true});
        }
        let answer = ask(&router, id, "/v1/chat/completions", &body).await;
        let said = if stream { frames(&answer).pop().expect("a frame") } else { answer.json() };
        let counts = &said["usage"];
        assert_eq!(counts.is_object(), usage);
        let cached = &counts["prompt_tokens_details"]["cached_tokens"];
        let trace = router.trace_now(id).await;
        assert_eq!(trace["ttft_ms"].is_f64(), stream);
        assert_eq!(
            timeless(trace),
            json!({
                "request_id": id, "worker_url": sims.urls[0], "node_id": "gpu_0", "routing_policy": "round_robin",
                "status": "completed", "route": "/v1/chat/completions",
                "cache_hit": cached.as_u64().map(|cached| cached > 0), "input_tokens": 5, "error_message": null,
                "model": "m-1", "stream": stream, "http_status": 200, "finish_reason": "length",
                "reason": "round_robin", "matched_tokens": null, "prompt_tokens": counts["prompt_tokens"],
                "cached_tokens": cached, "completion_tokens": counts["completion_tokens"],
                "worker_request_id": said["id"], "trace_id": null, "candidates": null, "prompt_blocks": null,
            })
        );
    }
}

#[tokio::test]
async fn of_lists_the_tokens_are_sums() {
    let (_sims, router) = simulated(&[]).await;
    for stream in [false, true] {
        let id = format!("list-{stream}");
        let body = json!({
            "text": ["one", "two words", "now three words"], "sampling_params": {"max_new_tokens": 2}, "stream": stream,
        });
        let answer = ask(&router, &id, "/generate", &body).await;
        let items = if stream {
            last_of_each(&frames(&answer))
        } else {
            answer.json().as_array().expect("a list").clone()
        };
        assert_eq!(items.len(), 3);
        let trace = router.trace_now(&id).await;
        for name in ["prompt_tokens", "cached_tokens", "completion_tokens"] {
            let sum: u64 = items.iter().filter_map(|item| item["meta_info"][name].as_u64()).sum();
            assert_eq!(trace[name], sum, "{name} {stream}");
        }
        assert_eq!(trace["completion_tokens"], 6);
    }
}

fn last_of_each(frames: &[Value]) -> Vec<Value> {
    let last = |index| frames.iter().rfind(|frame| frame["index"] == index).cloned();
    (0..).map_while(last).collect()
}

#[tokio::test]
async fn what_cannot_be_read_is_null() {
    let mut worker = ScriptedWorker::start().await;
    let router = Router::ready(&[&worker.url], &[]).await;
    let meta = r#"{"text":"","meta_info":{"id":"w","prompt_tokens":1,"cached_tokens":0,"completion_tokens":1}}"#;
    let large = format!(r#"{{"pad":"{}",{}"#, "x".repeat(70_000), &meta[1..]);
    let plain = "content-type: application/json\r\n";
    for (headers, body, is_read) in [
        (plain, meta, true),
        ("content-type: application/json\r\ncontent-encoding: gzip\r\n", meta, false),
        ("content-type: text/plain\r\n", meta, false),
        (plain, large.as_str(), false),
        (plain, r#"{"meta_info":{"prompt_tokens":-1,"cached_tokens":"0"}}"#, false),
        (plain, "not json", false),
    ] {
        let mut client = router.connect().await;
        client.send(request("POST /generate", &[], r#"{"text":"x"}"#)).await;
        let head = format!("HTTP/1.1 200 OK\r\n{headers}content-length: {}\r\n\r\n", body.len());
        worker.request().await.answer(head + body).await;
        let answer = client.answer().await;
        assert_eq!(answer.text(), body);
        let trace = router.trace_now(&answer.header("x-request-id").expect("an id")).await;
        assert_eq!((&trace["status"], &trace["http_status"]), (&"completed".into(), &200.into()));
        for name in [
            "prompt_tokens",
            "cached_tokens",
            "completion_tokens",
            "worker_request_id",
            "cache_hit",
        ] {
            assert_eq!(!trace[name].is_null(), is_read, "{name}: {trace}");
        }
    }
}

#[tokio::test]
async fn what_the_request_says_of_itself() {
    let (_sims, router) = simulated(&[]).await;
    let headers = [
        ("x-request-id", "x"),
        ("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"),
    ];
    let body = r#"{"input_ids":[5,6,7],"stream":null,"model":"m"}"#;
    router.ask(request("POST /generate", &headers, body)).await;
    let trace = router.trace_now("x").await;
    assert_eq!((&trace["input_tokens"], &trace["stream"]), (&3.into(), &false.into()));
    assert_eq!(trace["trace_id"], "4bf92f3577b34da6a3ce929d0e0e4736");
    assert_eq!(trace["model"], "m");
    router.ask(request("POST /generate", &[("x-request-id", "y")], "{")).await;
    let trace = router.trace_now("y").await;
    assert_eq!(
        (&trace["input_tokens"], &trace["stream"], &trace["model"]),
        (&Value::Null, &Value::Null, &Value::Null)
    );
}

/// The id that a request with these headers and this body goes by, on all three sides.
async fn id_of(
    worker: &mut ScriptedWorker,
    router: &Router,
    headers: &[(&str, &str)],
    body: &str,
) -> String {
    let mut client = router.connect().await;
    client.send(request("POST /generate", headers, body)).await;
    let exchange = worker.request().await;
    let at_worker = exchange.request.header("x-request-id").expect("an id");
    assert_eq!(exchange.request.text(), body, "the body is never changed");
    exchange.answer(ok("{}")).await;
    assert_eq!(client.answer().await.header("x-request-id"), Some(at_worker.clone()));
    assert_eq!(router.trace_now(&at_worker).await["request_id"], at_worker);
    at_worker
}

#[tokio::test]
async fn the_first_usable_id_counts() {
    let mut worker = ScriptedWorker::start().await;
    let router = Router::ready(&[&worker.url], &[]).await;
    let long = "x".repeat(257);
    let longest = "y".repeat(256);
    let rid = r#"{"rid":"of-body","text":"x"}"#;
    let all = [
        ("request-id", "d"),
        ("x-trace-id", "c"),
        ("x-correlation-id", "b"),
        ("x-request-id", "a"),
    ];
    for (headers, body, expected) in [
        (&all[..], rid, "a"),
        (&all[..3], rid, "b"),
        (&all[..2], rid, "c"),
        (&all[..1], rid, "d"),
        (&[("x-request-id", "")][..], rid, "of-body"),
        (&[("x-request-id", ""), ("request-id", "e")], rid, "e"),
        (&[("x-request-id", "two words")], rid, "of-body"),
        (&[("x-request-id", long.as_str())], rid, "of-body"),
        (&[("x-request-id", longest.as_str())], rid, longest.as_str()),
        (&[("x-request-id", "é")], rid, "of-body"),
        (&[], r#"{"rid":["first","second"],"text":["x","y"]}"#, "first"),
        (&[], r#"{"rid":"a\/b"}"#, "a/b"),
        (&[], r#"{"rid":""}"#, "req_"),
        (&[], r#"{"rid":5}"#, "req_"),
        (&[], r#"{"rid":"two words"}"#, "req_"),
        (&[], r#"{"rid":"é"}"#, "req_"),
        (&[], "not json", "req_"),
    ] {
        let id = id_of(&mut worker, &router, headers, body).await;
        if expected == "req_" {
            assert_eq!((id.len(), &id[..4]), (40, "req_"), "{body}");
        } else {
            assert_eq!(id, expected);
        }
    }
}

#[tokio::test]
async fn ids_are_taken_from_the_headers_asked_for() {
    let mut worker = ScriptedWorker::start().await;
    let router = Router::ready(&[&worker.url], &["--request-id-headers=x-mine"]).await;
    let headers = [("x-request-id", "a"), ("x-mine", "b")];
    assert_eq!(id_of(&mut worker, &router, &headers, "{}").await, "b");
    assert!(id_of(&mut worker, &router, &headers[..1], "{}").await.starts_with("req_"));
}

#[tokio::test]
async fn odd_ids_are_found_by_their_path() {
    let mut worker = ScriptedWorker::start().await;
    let router = Router::ready(&[&worker.url], &[]).await;
    for id in [
        "a/b", "/", "//a//", "a/../b", "..", ".", "\"q\"", "'", "100%", "%2F", "%", "a?b", "a#b",
        "a&b=c", "a+b", "{x}", "*", "\\", "~!@$^*()", "a;b", "[]", "batch/x", "stats/",
    ] {
        assert_eq!(id_of(&mut worker, &router, &[("x-request-id", id)], "{}").await, id);
    }
    // Slashes need no escape.
    assert_eq!(router.json("/v1/traces/a/b").await["request_id"], "a/b");
    // These two are routes of their own.
    for id in ["stats", "batch"] {
        let mut client = router.connect().await;
        client.send(request("POST /generate", &[("x-request-id", id)], "{}")).await;
        worker.request().await.answer(ok("{}")).await;
        client.answer().await;
        assert_eq!(router.json(&format!("/v1/traces?request_id={id}")).await[0]["request_id"], id);
    }
    for path in [
        "/v1/traces/nobody",
        "/v1/traces/%20",
        "/v1/traces/%22x",
        "/v1/traces/A/B",
        "/v1/traces/%F0%9F%98%80",
    ] {
        let answer = router.get(path).await;
        assert_eq!((answer.status(), answer.error_code().as_str()), (404, "not_found"), "{path}");
    }
    for path in ["/v1/traces/%ff", "/v1/traces/%zz"] {
        let answer = router.get(path).await;
        assert_eq!((answer.status(), answer.error_code().as_str()), (404, "not_found"), "{path}");
    }
}

#[tokio::test]
async fn of_an_id_used_again_the_newest_is_shown_and_each_writes_its_own() {
    let mut worker = ScriptedWorker::start().await;
    let router = Router::ready(&[&worker.url], &["--disable-retries"]).await;
    let mut first = router.connect().await;
    first
        .send(request("POST /generate", &[("x-request-id", "twin")], r#"{"text":"1","model":"1"}"#))
        .await;
    let open = worker.request().await;
    assert!(router.trace_now("twin").await.get("same_id").is_none());
    for model in ["2", "3"] {
        let mut client = router.connect().await;
        let body = format!(r#"{{"text":"x","model":"{model}"}}"#);
        client.send(request("POST /generate", &[("x-request-id", "twin")], body)).await;
        worker.request().await.answer(ok("{}")).await;
        client.answer().await;
    }
    let trace = router.trace_now("twin").await;
    assert_eq!((&trace["model"], &trace["same_id"]), (&"3".into(), &3.into()));
    let listed = router.json("/v1/traces?request_id=twin").await;
    let shown = |name: &str| -> Vec<Value> {
        listed.as_array().expect("a list").iter().map(|trace| trace[name].clone()).collect()
    };
    assert_eq!(shown("model"), ["3", "2", "1"]);
    assert_eq!(shown("status"), ["completed", "completed", "routed"]);

    open.answer("HTTP/1.1 500 Oops\r\ncontent-length: 0\r\n\r\n").await;
    assert_eq!(first.answer().await.status(), 500);
    let trace = router.trace_now("twin").await;
    assert_eq!((&trace["model"], &trace["status"]), (&"3".into(), &"completed".into()));
    let listed = router.json("/v1/traces?request_id=twin&status=failed").await;
    assert_eq!((listed.as_array().map(Vec::len), &listed[0]["model"]), (Some(1), &"1".into()));
}

#[tokio::test]
async fn a_full_store_lets_go_of_what_was_used_least_recently() {
    let (_sims, router) = simulated(&["--max-trace-entries=3"]).await;
    let body = json!({"text": "x", "sampling_params": {"max_new_tokens": 1}});
    for id in ["1", "2", "3"] {
        ask(&router, id, "/generate", &body).await;
    }
    // A look-up is a use; a listing is none.
    router.trace_now("1").await;
    router.json("/v1/traces").await;
    ask(&router, "4", "/generate", &body).await;
    let listed = router.json("/v1/traces").await;
    let ids: Vec<&str> = listed
        .as_array()
        .expect("a list")
        .iter()
        .filter_map(|it| it["request_id"].as_str())
        .collect();
    assert_eq!(ids, ["4", "3", "1"]);
    assert_eq!(router.get("/v1/traces/2").await.error_code(), "not_found");
    let stats = router.json("/v1/traces/stats").await;
    assert_eq!((&stats["total_requests"], &stats["active_traces"]), (&4.into(), &3.into()));
    assert_eq!(stats["evicted"], 1);
    let sum = |name: &str| {
        stats[name].as_object().expect("an object").values().filter_map(Value::as_u64).sum::<u64>()
    };
    assert_eq!((sum("requests_per_status"), sum("status_distribution")), (4, 3));
}

#[tokio::test]
async fn records_expire_after_their_end() {
    let mut worker = ScriptedWorker::start().await;
    let router = Router::ready(&[&worker.url], &["--trace-ttl-seconds=1"]).await;
    let mut open = router.connect().await;
    open.send(request("POST /generate", &[("x-request-id", "open")], "{}")).await;
    let exchange = worker.request().await;
    let mut client = router.connect().await;
    client.send(request("POST /generate", &[("x-request-id", "ended")], "{}")).await;
    worker.request().await.answer(ok("{}")).await;
    client.answer().await;
    until("the trace's end", async || {
        (router.get("/v1/traces/ended").await.status() == 404).then_some(())
    })
    .await;
    assert_eq!(router.trace_now("open").await["status"], "routed", "open ones do not expire");
    assert_eq!(router.json("/v1/traces").await.as_array().map(Vec::len), Some(1));
    exchange.answer(ok("{}")).await;
    assert_eq!(open.answer().await.status(), 200);
}

#[tokio::test]
async fn without_tracking_the_four_routes_say_how_to_get_it() {
    let sims = Simulated::start(1).await;
    let router = Router::ready(&sims.urls(), &["--enable-request-tracking=false"]).await;
    let answer =
        router.ask(request("POST /generate", &[("x-request-id", "x")], r#"{"text":"x"}"#)).await;
    assert_eq!((answer.status(), answer.header("x-request-id").as_deref()), (200, Some("x")));
    let bodies = [
        router.get("/v1/traces/x").await,
        router.get("/v1/traces").await,
        router.get("/v1/traces/stats").await,
        router.post("/v1/traces/batch", r#"{"request_ids":["x"]}"#).await,
    ];
    for answer in bodies {
        assert_eq!((answer.status(), answer.error_code().as_str()), (501, "tracking_disabled"));
        assert!(answer.error_message().contains("enable_request_tracking"));
    }
}
