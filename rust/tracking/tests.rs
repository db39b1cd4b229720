//! The tracker as the server uses it: the life of a request, and the memory of a record.

use super::*;

/// Options of a tracker of this size.
pub(super) fn options(max_trace_entries: u32) -> Options {
    Options {
        enable_request_tracking: true,
        max_trace_entries,
        trace_ttl_seconds: 3600,
        trace_cleanup_interval_secs: 60,
        trace_candidates: 0,
        trace_prompt_blocks: false,
        trace_log: None,
        trace_log_max_mb: 100,
        trace_log_keep: 10,
    }
}

fn new_tracker(max_trace_entries: u32) -> Arc<Tracker> {
    Tracker::new(options(max_trace_entries), "cache_aware").expect("no log to open")
}

fn tracker() -> Arc<Tracker> {
    new_tracker(100)
}

fn worker(index: u32) -> Arc<WorkerName> {
    let (url, node_id) = (format!("http://127.0.0.1:{}", 30001 + index), format!("gpu_{index}"));
    Arc::new(WorkerName { index, url: url.into(), node_id: node_id.into() })
}

fn arrived() -> Arrived {
    Arrived { unix_us: 1_767_225_600_000_000, at: Instant::now() }
}

const fn ms(number: u64) -> Duration {
    Duration::from_millis(number)
}

#[test]
fn a_completed_request_has_every_fact() {
    let (tracker, arrived) = (tracker(), arrived());
    let status = || tracker.get("id").expect("it is held").status;
    let mut open = tracker.open(arrived, "id", "/generate");
    assert_eq!((open.status(), status()), (Status::Queued, Status::Queued));
    open.request(RequestFacts {
        model: Some("llama"),
        stream: Some(true),
        input_tokens: Some(605),
        trace_id: Some("0af7651916cd43dd8448eb211c80319c"),
        prompt_blocks: PromptBlocks::of(b"abc").as_ref(),
    });
    open.admitted(arrived.at + ms(1));
    open.routed(&worker(4), "prefix_match", Some(512), Duration::from_nanos(3_100), None);
    assert_eq!((open.status(), status()), (Status::Routed, Status::Routed));
    open.sent(arrived.at + ms(2));
    open.headers(200);
    assert_eq!((open.status(), status()), (Status::Processing, Status::Processing));
    open.first_byte(arrived.at + ms(41));
    open.first_byte(arrived.at + ms(50));
    open.ttft(arrived.at + ms(42));
    open.ttft(arrived.at + ms(50));
    open.answer(AnswerFacts {
        prompt_tokens: Some(605),
        cached_tokens: Some(512),
        completion_tokens: Some(10),
        finish_reason: Some("length"),
        worker_request_id: Some("chatcmpl-1"),
    });
    open.complete(arrived.at + ms(93));
    let trace = tracker.get("id").expect("it is held");
    let json = serde_json::to_value(trace).expect("plain data");
    let expected = serde_json::json!({
        "request_id": "id", "worker_url": "http://127.0.0.1:30005", "node_id": "gpu_4",
        "timestamp": "2026-01-01T00:00:00.000000Z", "routing_policy": "cache_aware",
        "status": "completed", "route": "/generate", "cache_hit": true, "input_tokens": 605,
        "completion_time": "2026-01-01T00:00:00.093000Z", "error_message": null,
        "model": "llama", "stream": true, "http_status": 200, "finish_reason": "length",
        "reason": "prefix_match", "matched_tokens": 512, "prompt_tokens": 605,
        "cached_tokens": 512, "completion_tokens": 10, "queue_ms": 1.0, "decision_us": 3.1,
        "first_byte_ms": 41.0, "ttft_ms": 42.0, "latency_ms": 93.0,
        "worker_request_id": "chatcmpl-1", "trace_id": "0af7651916cd43dd8448eb211c80319c",
        "attempts": [{"worker_url": "http://127.0.0.1:30005", "node_id": "gpu_4",
                      "http_status": 200, "error": null, "latency_ms": 91.0}],
        "candidates": null,
        "prompt_blocks": {"bytes": 3, "hashes": ["78af5f94892f3950"]}
    });
    assert_eq!(json, expected);
}

#[test]
fn a_retry_keeps_both_attempts_and_the_last_worker() {
    let (tracker, arrived) = (tracker(), arrived());
    let mut open = tracker.open(arrived, "id", "/generate");
    open.routed(&worker(0), "prefix_match", Some(7), ms(1), None);
    open.sent(arrived.at + ms(1));
    open.attempt_failed(arrived.at + ms(3), Some(503), "busy");
    open.routed(&worker(1), "least_loaded", None, ms(1), None);
    assert_eq!(open.worker(), Some(&worker(1)));
    open.sent(arrived.at + ms(4));
    open.headers(200);
    open.complete(arrived.at + ms(9));
    let trace = tracker.get("id").expect("it is held");
    assert_eq!(trace.node_id.as_deref(), Some("gpu_1"));
    assert_eq!((trace.reason.as_deref(), trace.matched_tokens), (Some("least_loaded"), None));
    assert_eq!((trace.status, trace.error_message), (Status::Completed, None));
    let [first, second] = trace.attempts.as_slice() else { panic!("two attempts") };
    assert_eq!((first.http_status, first.latency_ms), (Some(503), Some(2.0)));
    assert_eq!(first.error.as_deref(), Some("busy"));
    assert_eq!((second.http_status, second.latency_ms), (Some(200), Some(5.0)));
    assert_eq!(second.error, None);
    let stats = tracker.stats();
    assert_eq!(stats.requests_per_node.into_iter().collect::<Vec<_>>(), [("gpu_1".to_owned(), 1)]);
}

#[test]
fn a_refused_request_has_no_worker() {
    let (tracker, arrived) = (tracker(), arrived());
    tracker.open(arrived, "id", "/generate").fail(arrived.at, Some(429), "queue full");
    let trace = tracker.get("id").expect("it is held");
    assert_eq!((trace.status, trace.http_status), (Status::Failed, Some(429)));
    assert_eq!((trace.worker_url, trace.node_id, trace.reason), (None, None, None));
    assert!(trace.attempts.is_empty());
    assert_eq!(trace.error_message.as_deref(), Some("queue full"));
    let stats = tracker.stats();
    assert_eq!((stats.unrouted, stats.in_flight, stats.total_requests), (1, 0, 1));
}

#[test]
fn a_failed_answer_has_its_status_and_its_error_in_the_attempt_too() {
    let (tracker, arrived) = (tracker(), arrived());
    let mut open = tracker.open(arrived, "id", "/generate");
    open.routed(&worker(0), "random", None, ms(0), None);
    open.headers(500);
    open.fail(arrived.at, Some(500), "worker answered 500");
    let trace = tracker.get("id").expect("it is held");
    assert_eq!((trace.status, trace.http_status), (Status::Failed, Some(500)));
    assert_eq!(trace.error_message.as_deref(), Some("worker answered 500"));
    let attempt = &trace.attempts[0];
    assert_eq!((attempt.http_status, &attempt.error), (Some(500), &trace.error_message));
}

#[test]
fn what_the_client_was_not_answered_is_unknown() {
    let (tracker, arrived) = (tracker(), arrived());
    let mut open = tracker.open(arrived, "id", "/generate");
    open.routed(&worker(0), "random", None, ms(0), None);
    open.headers(200);
    open.fail(arrived.at, None, "client disconnected");
    let trace = tracker.get("id").expect("it is held");
    assert_eq!((trace.http_status, trace.attempts[0].http_status), (None, Some(200)));
}

#[test]
fn a_dropped_request_is_ended_all_the_same() {
    let tracker = tracker();
    let mut open = tracker.open(arrived(), "id", "/generate");
    open.routed(&worker(0), "random", None, ms(0), None);
    open.headers(200);
    drop(open);
    let trace = tracker.get("id").expect("it is held");
    assert_eq!((trace.status, trace.http_status), (Status::Failed, None));
    assert!(trace.error_message.is_some());
    assert_eq!(trace.attempts[0].error, trace.error_message);
    assert!(trace.latency_ms.is_some() && trace.completion_time.is_some());
    assert_eq!(tracker.stats().in_flight, 0);
}

#[test]
fn a_request_whose_record_left_still_counts_and_touches_no_other() {
    let tracker = new_tracker(1);
    let mut first = tracker.open(arrived(), "first", "/generate");
    let second = tracker.open(arrived(), "second", "/generate");
    first.routed(&worker(0), "random", None, ms(0), None);
    first.headers(200);
    first.complete(Instant::now());
    assert!(tracker.get("first").is_none());
    let trace = tracker.get("second").expect("it is held");
    assert_eq!((trace.status, trace.node_id), (Status::Queued, None));
    let stats = tracker.stats();
    assert_eq!((stats.requests_per_status["completed"], stats.in_flight), (1, 1));
    assert_eq!((stats.requests_per_node["gpu_0"], stats.node_distribution.len()), (1, 0));
    drop(second);
}

#[test]
fn texts_are_capped_between_characters() {
    let (tracker, arrived) = (tracker(), arrived());
    let long = "中".repeat(1_000);
    let mut open = tracker.open(arrived, "id", "/generate");
    open.request(RequestFacts { model: Some(&long), trace_id: Some("odd"), ..Default::default() });
    open.routed(&worker(0), "random", None, ms(0), None);
    open.answer(AnswerFacts {
        finish_reason: Some(&long),
        worker_request_id: Some(&long),
        ..Default::default()
    });
    open.fail(arrived.at, None, &long);
    let trace = tracker.get("id").expect("it is held");
    let bytes = |text: &Option<String>| text.as_ref().map(String::len);
    assert_eq!(bytes(&trace.model), Some(126));
    assert_eq!(bytes(&trace.finish_reason), Some(63));
    assert_eq!(bytes(&trace.worker_request_id), Some(126));
    assert_eq!(bytes(&trace.error_message), Some(510));
    assert_eq!(bytes(&trace.attempts[0].error), Some(510));
    assert_eq!(trace.trace_id, None);
}

#[test]
fn batches_keep_the_order_asked_for() {
    let tracker = tracker();
    for id in ["a", "b", "c", "a"] {
        tracker.open(arrived(), id, "/generate").complete(Instant::now());
    }
    let found = tracker.get_many(&["c", "unknown", "a", "c"]);
    let ids: Vec<(&str, Option<u32>)> =
        found.iter().map(|trace| (trace.request_id.as_str(), trace.same_id)).collect();
    assert_eq!(ids, [("c", None), ("a", Some(2)), ("c", None)]);
}

#[test]
fn filters_see_the_facts() {
    let tracker = tracker();
    for (id, model, worker_id) in
        [("a", "m1", "x"), ("b", "m2", "0af7651916cd43dd8448eb211c80319c")]
    {
        let mut open = tracker.open(arrived(), id, "/generate");
        open.request(RequestFacts { model: Some(model), ..Default::default() });
        open.routed(&worker(u32::from(id == "b")), "random", None, ms(0), None);
        open.answer(AnswerFacts { worker_request_id: Some(worker_id), ..Default::default() });
        open.complete(Instant::now());
    }
    for (name, value) in [
        ("model", "m2"),
        ("worker_request_id", "0af7651916cd43dd8448eb211c80319c"),
        ("worker_url", "http://127.0.0.1:30002"),
        ("node_id", "gpu_1"),
        ("request_id", "b"),
    ] {
        let query = Query::parse([(name, value)]).expect("a good query");
        let found = tracker.list(&query).traces;
        assert_eq!(found.len(), 1, "{name}");
        assert_eq!(found[0].request_id, "b", "{name}");
    }
}

#[test]
fn exports_page_through_everything_or_up_to_a_limit() {
    let tracker = new_tracker(3_000);
    let ids: Vec<String> = (0..2_500).map(|number| format!("req_{number}")).collect();
    for id in &ids {
        tracker.open(arrived(), id, "/generate").complete(Instant::now());
    }
    let mut query = Query::default();
    let sizes: Vec<usize> = tracker.pages(&query).map(|page| page.len()).collect();
    assert_eq!(sizes, [1_000, 1_000, 500]);
    let newest_first = tracker.pages(&query).flatten().map(|trace| trace.request_id);
    assert!(newest_first.eq(ids.iter().rev().cloned()));
    query.limit = Some(7);
    assert_eq!(tracker.pages(&query).flatten().count(), 7);
    assert_eq!(new_tracker(1).pages(&query).count(), 0);
}

#[test]
fn options_have_one_default_and_one_range() {
    #[derive(clap::Parser)]
    struct Program {
        #[command(flatten)]
        options: Options,
    }
    let parse = |arguments: &[&str]| {
        let arguments = std::iter::once(&"router").chain(arguments);
        <Program as clap::Parser>::try_parse_from(arguments).map(|program| program.options)
    };
    let defaults = Options { enable_request_tracking: false, ..options(100_000) };
    assert_eq!(parse(&[]).ok(), Some(defaults));
    let short = Options { trace_ttl_seconds: 5, ..options(1) };
    for arguments in [
        ["--enable-request-tracking", "--max-trace-entries=1", "--trace-ttl-seconds=5"],
        ["--enable-request-tracing=true", "--max-trace-entries=1", "--trace-ttl=5"],
    ] {
        assert_eq!(parse(&arguments).ok(), Some(short.clone()));
    }
    for (argument, kept) in [("0", None), ("3", Some(3)), ("-1", Some(usize::MAX))] {
        let options = parse(&["--trace-candidates", argument]).expect("in the range");
        assert_eq!(options.candidates_max(), kept);
    }
    for argument in [
        "--max-trace-entries=0",
        "--max-trace-entries=2147483649",
        "--trace-ttl-seconds=0",
        "--trace-cleanup-interval-secs=0",
        "--enable-request-tracking=maybe",
        "--trace-candidates=-2",
    ] {
        assert!(parse(&[argument]).is_err(), "{argument}");
    }
}

fn candidates(workers: &[u32]) -> Arc<Vec<Candidate>> {
    let candidate = |&index: &u32| Candidate {
        worker: worker(index),
        in_flight: 10 + index,
        matched_tokens: Some(3),
        pending_tokens: None,
        speed: Some(8000.5),
        same_prefix: None,
        score: Some(0.1),
    };
    Arc::new(workers.iter().map(candidate).collect())
}

#[test]
fn candidates_are_those_of_the_last_pick_and_tell_which_was_chosen() {
    let (tracker, arrived) = (tracker(), arrived());
    let mut open = tracker.open(arrived, "id", "/generate");
    let told = || tracker.get("id").and_then(|trace| trace.candidates);
    assert_eq!(told(), None);
    open.routed(&worker(0), "prefix_match", Some(3), ms(0), Some(candidates(&[0, 1, 2])));
    open.attempt_failed(arrived.at, None, "refused");
    open.routed(&worker(2), "prefix_match", Some(3), ms(0), Some(candidates(&[1, 2])));
    assert_eq!(
        serde_json::to_value(told()).expect("plain data"),
        serde_json::json!([
            {"worker_url": "http://127.0.0.1:30002", "node_id": "gpu_1", "in_flight": 11, "matched_tokens": 3,
             "pending_tokens": null, "speed": 8000.5, "same_prefix": null, "score": 0.1, "chosen": false},
            {"worker_url": "http://127.0.0.1:30003", "node_id": "gpu_2", "in_flight": 12, "matched_tokens": 3,
             "pending_tokens": null, "speed": 8000.5, "same_prefix": null, "score": 0.1, "chosen": true},
        ])
    );
    open.routed(&worker(1), "pinned", None, ms(0), None);
    assert_eq!(told(), None);
}

#[test]
fn the_memory_of_candidates_is_counted() {
    let memory_bytes = |candidates: Option<Arc<Vec<Candidate>>>| {
        let (tracker, arrived) = (tracker(), arrived());
        let mut open = tracker.open(arrived, "id", "/generate");
        open.routed(&worker(0), "random", None, ms(0), candidates);
        open.complete(arrived.at);
        tracker.stats().memory_bytes
    };
    let all: Vec<u32> = (0..100).collect();
    let added = memory_bytes(Some(candidates(&all))) - memory_bytes(None);
    assert!((100 * size_of::<Candidate>()..100 * 80).contains(&added), "{added}");
}

#[test]
fn the_memory_of_prompt_blocks_is_counted() {
    let memory_bytes = |prompt: &[u8]| {
        let (tracker, arrived) = (tracker(), arrived());
        let mut open = tracker.open(arrived, "id", "/generate");
        let blocks = PromptBlocks::of(prompt);
        open.request(RequestFacts { prompt_blocks: blocks.as_ref(), ..Default::default() });
        open.complete(arrived.at);
        tracker.stats().memory_bytes
    };
    let added = memory_bytes(&vec![b'a'; 2048 * 1_000]) - memory_bytes(b"");
    assert!((8_000..8_100).contains(&added), "{added}");
}

#[test]
fn an_open_trace_may_cross_threads() {
    fn is_send<T: Send + 'static>() {}
    is_send::<OpenTrace>();
}

#[test]
fn a_record_at_rest_takes_at_most_400_bytes() {
    const RECORDS: usize = 100_000;
    let tracker = new_tracker(RECORDS as u32);
    let (arrived, worker) = (arrived(), worker(0));
    for number in 0..RECORDS {
        let mut open = tracker.open(arrived, &format!("req_{number:036}"), "/generate");
        let hex_id = format!("{number:032x}");
        open.request(RequestFacts {
            model: Some("meta-llama/Llama-3.1-8B-Instruct"),
            trace_id: Some(&hex_id),
            ..Default::default()
        });
        open.routed(&worker, "prefix_match", Some(512), ms(0), None);
        open.answer(AnswerFacts { worker_request_id: Some(&hex_id), ..Default::default() });
        open.complete(arrived.at);
    }
    let stats = tracker.stats();
    assert_eq!(stats.total_traces as usize, RECORDS);
    assert!(stats.memory_bytes <= 400 * RECORDS, "{} bytes", stats.memory_bytes);
    let before = stats.memory_bytes;
    tracker.remove_expired(arrived.at + Duration::from_secs(3_600));
    assert!(tracker.stats().memory_bytes < before / 5, "expiry gives the memory back");
}
