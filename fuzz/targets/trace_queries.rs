//! Listings of the request tracker: any query string is read or refused, and what is listed of any
//! records is what was asked for: each record once, newest first, in JSON and CSV that read back the same.
#![no_main]

use std::sync::Arc;
use std::time::{Duration, Instant};

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use serde_json::Value;
use sglang_router_rs::routing::WorkerName;
use sglang_router_rs::tracking::{
    AnswerFacts, Arrived, Candidate, MAX_LIMIT, OpenTrace, Options, PromptBlocks, Query,
    RequestFacts, Trace, Tracker, csv_header, csv_rows,
};

/// Up to 1024 a store has one shard, above that sixteen.
const CAPACITIES: [u32; 4] = [1, 7, 1024, 2000];
const RECORDS_MAX: usize = 48;
/// What the server allows.
const ID_BYTES_MAX: usize = 256;
const ROUTES: [&str; 3] = ["/generate", "/v1/chat/completions", "/x,\"y\""];
const POLICY: &str = "cache_aware";

#[derive(Arbitrary, Debug)]
struct Session<'a> {
    query: &'a str,
    capacity: u8,
    page_size: u8,
    records: Vec<Request<'a>>,
}

/// A request's life, as far as `steps` goes.
#[derive(Arbitrary, Debug)]
struct Request<'a> {
    id: &'a str,
    route: u8,
    unix_us: i64,
    words: &'a str,
    worker_request_id: &'a str,
    error: &'a str,
    stream: Option<bool>,
    tokens: Option<u32>,
    http_status: Option<u16>,
    worker: u8,
    attempts: u8,
    steps: u8,
}

fuzz_target!(|session: Session| {
    let tracker = Tracker::new(
        Options {
            enable_request_tracking: true,
            max_trace_entries: CAPACITIES[usize::from(session.capacity) % CAPACITIES.len()],
            trace_ttl_seconds: 3600,
            trace_cleanup_interval_secs: 60,
            trace_candidates: -1,
            trace_prompt_blocks: true,
            trace_log: None,
            trace_log_max_mb: 100,
            trace_log_keep: 10,
        },
        POLICY,
    )
    .expect("no log to open");
    let count = session.records.len().min(RECORDS_MAX);
    // Those not ended stay open until all is read.
    let open: Vec<_> = session.records[..count].iter().map(|it| live(&tracker, it)).collect();

    let all = listed(&tracker, &Query::default());
    check_counts(&tracker, &all, count);
    check_written(&all);
    // In pages of any size the same comes.
    let limit = (session.page_size.max(1)).to_string();
    let mut query = Query::parse([("limit", limit.as_str())]).expect("a limit from 1 to 255");
    let mut paged = Vec::new();
    loop {
        let page = tracker.list(&query);
        assert!(page.traces.len() <= query.page_size());
        paged.extend(page.traces);
        let Some(next) = page.next_cursor else { break };
        assert_eq!(next.to_string().parse(), Ok(next));
        query.cursor = Some(next);
    }
    assert_eq!(paged, all);

    let Ok(pairs) = serde_urlencoded::from_str::<Vec<(String, String)>>(session.query) else {
        return;
    };
    let query = match Query::parse(&mut pairs.iter().map(|(name, value)| (name, value))) {
        Ok(query) => query,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            return;
        }
    };
    assert!((1..=MAX_LIMIT).contains(&query.page_size()));
    let found = listed(&tracker, &query);
    assert!(query.limit.is_none_or(|limit| found.len() <= limit));
    check_found(&all, &found, &pairs);
    drop(open);
});

/// Plays a request; `None` once it has ended.
fn live(tracker: &Arc<Tracker>, request: &Request) -> Option<OpenTrace> {
    let at = Instant::now();
    let id = capped(request.id, ID_BYTES_MAX);
    let route = ROUTES[usize::from(request.route) % ROUTES.len()];
    let mut trace = tracker.open(Arrived { unix_us: request.unix_us, at }, id, route);
    trace.request(RequestFacts {
        model: Some(request.words),
        stream: request.stream,
        input_tokens: request.tokens,
        trace_id: Some(request.words),
        prompt_blocks: PromptBlocks::of(request.words.as_bytes()).as_ref(),
    });
    if request.steps == 0 {
        return Some(trace);
    }
    trace.admitted(at);
    for attempt in 0..=request.attempts % 40 {
        let index = u32::from(request.worker.wrapping_add(attempt) % 5);
        let worker = WorkerName {
            index,
            url: format!("http://worker,{index}").into(),
            node_id: format!("gpu_{index}").into(),
        };
        let decision = Duration::from_nanos(request.unix_us.unsigned_abs());
        let worker = Arc::new(worker);
        let candidate = Candidate {
            worker: worker.clone(),
            in_flight: index,
            matched_tokens: request.tokens,
            pending_tokens: request.tokens,
            speed: request.stream.map(|_| f64::from(index) * 1e3),
            same_prefix: request.tokens,
            score: request.http_status.map(|status| f64::from(status) / 7.0),
        };
        let candidates = request.stream.map(|_| Arc::new(vec![candidate]));
        trace.routed(&worker, request.words, request.tokens, decision, candidates);
        trace.sent(at);
        if attempt < request.attempts % 40 {
            trace.attempt_failed(at, request.http_status, request.error);
        }
    }
    if request.steps == 1 {
        return Some(trace);
    }
    trace.headers(request.http_status.unwrap_or(200));
    trace.first_byte(at);
    trace.ttft(at);
    trace.answer(AnswerFacts {
        prompt_tokens: request.tokens,
        cached_tokens: request.tokens,
        completion_tokens: request.tokens,
        finish_reason: Some(request.words),
        worker_request_id: Some(request.worker_request_id),
    });
    match request.steps {
        2 => return Some(trace),
        3..128 => trace.complete(at),
        128..254 => trace.fail(at, request.http_status, request.error),
        _ => drop(trace),
    }
    None
}

fn listed(tracker: &Arc<Tracker>, query: &Query) -> Vec<Trace> {
    tracker.pages(query).flatten().collect()
}

/// Each record is held once, or its place was taken.
fn check_counts(tracker: &Arc<Tracker>, all: &[Trace], opened: usize) {
    let capacity = tracker.options().max_trace_entries as usize;
    assert_eq!(all.len(), opened.min(capacity));
    let stats = tracker.stats();
    assert_eq!(stats.total_requests, opened as u64);
    assert_eq!(stats.active_traces, all.len() as u64);
    assert_eq!(stats.evicted, (opened - all.len()) as u64);
    assert_eq!(stats.requests_per_status.values().sum::<u64>(), stats.total_requests);
    assert_eq!(stats.requests_per_route.values().sum::<u64>(), stats.total_requests);
    for trace in all {
        let found = tracker.get(&trace.request_id).expect("what is listed is found by its id");
        let same_id = all.iter().filter(|other| other.request_id == trace.request_id).count();
        assert_eq!(found.same_id, (same_id > 1).then_some(same_id as u32));
        let newest = all.iter().find(|other| other.request_id == trace.request_id);
        assert_eq!(Some(&Trace { same_id: None, ..found }), newest);
    }
}

/// JSON and CSV say the same and can be read.
fn check_written(traces: &[Trace]) {
    let csv = [csv_header(), csv_rows(traces)].concat();
    let mut reader = csv::Reader::from_reader(csv.as_slice());
    let names = reader.headers().expect("a header").clone();
    assert_eq!(names.iter().collect::<Vec<_>>(), Trace::COLUMNS);
    let rows: Vec<_> = reader.records().map(|row| row.expect("a row")).collect();
    assert_eq!(rows.len(), traces.len());
    for (row, trace) in rows.iter().zip(traces) {
        let json = serde_json::to_vec(trace).expect("a trace is plain data");
        let json: Value = serde_json::from_slice(&json).expect("what was written is JSON");
        assert_eq!(json.as_object().map(|fields| fields.len()), Some(Trace::COLUMNS.len()));
        for (name, cell) in names.iter().zip(row) {
            match &json[name] {
                Value::Null => assert_eq!(cell, "", "{name}"),
                Value::String(text) => assert_eq!(cell, text, "{name}"),
                value => {
                    let read: Value = serde_json::from_str(cell).expect("a cell of JSON");
                    assert_eq!(&read, value, "{name}");
                }
            }
        }
    }
}

/// What was found is, in the same order, what the filters say of all there is.
fn check_found(all: &[Trace], found: &[Trace], pairs: &[(String, String)]) {
    let mut rest = all.iter();
    for trace in found {
        assert!(rest.any(|other| other == trace), "listed twice, or out of order");
    }
    let passes = |trace: &&Trace| pairs.iter().all(|(name, value)| is_equal(trace, name, value));
    assert!(found.iter().all(|trace| passes(&trace)));
    let narrows = |(name, _): &(String, String)| {
        ["limit", "cursor", "since", "until"].contains(&name.as_str())
    };
    if !pairs.iter().any(narrows) {
        assert_eq!(found.len(), all.iter().filter(passes).count());
    }
}

fn is_equal(trace: &Trace, name: &str, value: &str) -> bool {
    let field = match name {
        "request_id" => Some(trace.request_id.as_str()),
        "worker_request_id" => trace.worker_request_id.as_deref(),
        "node_id" => trace.node_id.as_deref(),
        "status" => Some(trace.status.name()),
        "route" => Some(trace.route.as_str()),
        "worker_url" => trace.worker_url.as_deref(),
        "policy" => Some(trace.routing_policy.as_str()),
        "model" => trace.model.as_deref(),
        _ => return true,
    };
    field == Some(value)
}

/// The longest head of at most that many bytes that ends between characters.
fn capped(text: &str, max_bytes: usize) -> &str {
    let mut end = text.len().min(max_bytes);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}
