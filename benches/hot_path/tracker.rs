//! The tracker, when it is full: each request that is opened makes room, so each evicts one.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use criterion::Criterion;
use sglang_router_rs::routing::WorkerName;
use sglang_router_rs::tracking::{AnswerFacts, Arrived, OpenTrace, RequestFacts, Tracker};

use crate::load::{Options, SEED, WORKERS, targets};

pub fn bench(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("tracker");
    let mut load = None;
    group.bench_function("open_to_end", |bencher| {
        let load = load.get_or_insert_with(Load::full);
        bencher.iter(|| load.record());
    });
    let mut load = None;
    let mut random = fastrand::Rng::with_seed(SEED);
    group.bench_function("look_up", |bencher| {
        let load = load.get_or_insert_with(Load::full);
        bencher.iter(|| {
            let id = &load.ids[random.usize(..load.held)];
            black_box(load.tracker.get(id).expect("a full store holds those that filled it"))
        });
    });
    group.finish();
}

struct Load {
    tracker: Arc<Tracker>,
    workers: Vec<Arc<WorkerName>>,
    arrived: Arrived,
    held: usize,
    ids: Vec<String>,
    next: usize,
}

impl Load {
    fn full() -> Self {
        let options = Options::defaults().tracking;
        let held = options.max_trace_entries as usize;
        let mut load = Self {
            tracker: Tracker::new(options, "cache_aware").expect("no log to open"),
            workers: targets(WORKERS).iter().filter_map(|it| it.name().cloned()).collect(),
            arrived: Arrived::now(),
            held,
            // So many that one that comes again has been forgotten.
            ids: ids(0, 2 * held),
            next: 0,
        };
        for _ in 0..held {
            load.record();
        }
        load
    }

    fn record(&mut self) {
        let (id, worker) = (&self.ids[self.next], &self.workers[self.next % self.workers.len()]);
        let trace = open(&self.tracker, self.arrived, id);
        end(trace, self.arrived, worker, "prefix_match", Some(300));
        self.next = (self.next + 1) % self.ids.len();
    }
}

/// Ids as clients send them; each thread has its own.
pub fn ids(thread: usize, count: usize) -> Vec<String> {
    (0..count).map(|number| format!("req_{thread:04}-{number:031}")).collect()
}

/// What is told before the pick.
pub fn open(tracker: &Arc<Tracker>, arrived: Arrived, id: &str) -> OpenTrace {
    let mut trace = tracker.open(arrived, id, "/generate");
    trace.request(RequestFacts {
        model: Some("meta-llama/Llama-3.1-8B-Instruct"),
        stream: Some(true),
        input_tokens: Some(600),
        trace_id: Some("0123456789abcdef0123456789abcdef"),
        prompt_blocks: None,
    });
    trace.admitted(arrived.at);
    trace
}

/// What is told from the pick on, of a stream that ends well.
pub fn end(
    mut trace: OpenTrace,
    arrived: Arrived,
    worker: &Arc<WorkerName>,
    reason: &'static str,
    matched_tokens: Option<u32>,
) {
    let after = |millis| arrived.at + Duration::from_millis(millis);
    trace.routed(worker, reason, matched_tokens, Duration::from_micros(3), None);
    trace.estimated(Some(600));
    trace.sent(after(1));
    trace.headers(200);
    trace.first_byte(after(41));
    trace.ttft(after(41));
    trace.answer(AnswerFacts {
        prompt_tokens: Some(600),
        cached_tokens: Some(300),
        completion_tokens: Some(10),
        finish_reason: Some("length"),
        worker_request_id: Some("0123456789abcdef0123456789abcdef"),
    });
    trace.complete(after(93));
}
