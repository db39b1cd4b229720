//! Memory at rest: of 100,000 traces, and of the prefix tree after a million distinct prompts.
//!
//!     make bench-memory
//!
//! Bytes asked of the allocator, counted by it, beside what the program says of itself.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use sglang_router_rs::routing::WorkerName;
use sglang_router_rs::routing::names::Names;
use sglang_router_rs::routing::prefix_tree::PrefixTree;
use sglang_router_rs::tracking::{AnswerFacts, Arrived, Options, RequestFacts, Tracker};

const TRACES: u32 = 100_000;
const PROMPTS: u64 = 1_000_000;
const PROMPT_BYTES: usize = 2_400;
const TREE_BYTES: usize = 1 << 26;
const WORKERS: u32 = 64;

struct Counting;

static BYTES: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator unchanged; counting beside it touches no memory of the caller.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        BYTES.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promises are those the system's allocator asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        BYTES.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

fn allocated() -> usize {
    BYTES.load(Ordering::Relaxed)
}

fn main() {
    println!("{:<44} {:>16} {:>16} {:>9}", "what", "counted, bytes", "its own word", "bound");
    traces();
    tree();
}

/// Ended records with a 40-character id, a worker's id of 32 hex digits, a trace id, a model and one attempt.
fn traces() {
    let options = Options {
        enable_request_tracking: true,
        max_trace_entries: TRACES,
        trace_ttl_seconds: 3600,
        trace_cleanup_interval_secs: 60,
        trace_candidates: 0,
        trace_prompt_blocks: false,
        trace_log: None,
        trace_log_max_mb: 100,
        trace_log_keep: 10,
    };
    let before = allocated();
    let tracker = Tracker::new(options, "cache_aware").expect("no log to open");
    let name =
        WorkerName { index: 0, url: "http://localhost:30005".into(), node_id: "gpu_4".into() };
    let worker = Arc::new(name);
    for round in ["after filling", "after replacing all"] {
        for number in 0..TRACES {
            track(&tracker, &worker, number);
        }
        let each = (allocated() - before) as f64 / f64::from(TRACES);
        let own = tracker.stats().memory_bytes as f64 / f64::from(TRACES);
        println!(
            "{:<44} {each:>16.0} {own:>16.0} {:>9}",
            format!("one trace of 100,000, {round}"),
            400
        );
    }
}

fn track(tracker: &Arc<Tracker>, worker: &Arc<WorkerName>, number: u32) {
    let arrived = Arrived::now();
    let hex = format!("{number:032x}");
    let mut open = tracker.open(arrived, &format!("req_{number:036}"), "/generate");
    open.request(RequestFacts {
        model: Some("meta-llama/Llama-3.1-8B-Instruct"),
        stream: Some(true),
        input_tokens: Some(605),
        trace_id: Some(&hex),
        prompt_blocks: None,
    });
    open.admitted(arrived.at);
    open.routed(worker, "prefix_match", Some(512), Duration::from_nanos(3_100), None);
    open.sent(arrived.at);
    open.headers(200);
    open.first_byte(arrived.at);
    open.ttft(arrived.at);
    open.answer(AnswerFacts {
        prompt_tokens: Some(605),
        cached_tokens: Some(512),
        completion_tokens: Some(10),
        finish_reason: Some("length"),
        worker_request_id: Some(&hex),
    });
    open.complete(Instant::now());
}

/// Distinct prompts of 2.4 KB for 64 workers in turn, at the default bound.
fn tree() {
    let mut random = fastrand::Rng::with_seed(0);
    let mut prompt = vec![0; PROMPT_BYTES];
    let before = allocated();
    let mut tree = PrefixTree::new(TREE_BYTES);
    let began = Instant::now();
    let mut filling = Duration::ZERO;
    for number in 0..PROMPTS {
        let made = Instant::now();
        random.fill(&mut prompt);
        filling += made.elapsed();
        black_box(tree.matched(&Names::of(&prompt)).bytes_for(0));
        tree.insert(&Names::of(&prompt), (number % u64::from(WORKERS)) as u32);
    }
    let took = began.elapsed() - filling;
    let share = |bytes: usize| bytes as f64 / TREE_BYTES as f64;
    println!(
        "{:<44} {:>16.3} {:>16.3} {:>9}",
        "tree / max_tree_size, 1,000,000 x 2.4 KB",
        share(allocated() - before),
        share(tree.memory_bytes()),
        1.5
    );
    println!(
        "\nmatch + insert of a new 2.4 KB prompt: {} ns",
        took.as_nanos() / u128::from(PROMPTS)
    );
}
