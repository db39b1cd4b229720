//! The policies: every one alone and with all that it hears of a request, and `least_ttft` with full caches.

use std::sync::Arc;

use criterion::{BenchmarkId, Criterion};
use sglang_router_rs::routing::{BlockNames, Draws, InFlight, Policy, PolicyKind, Request, Target};

use crate::load::{
    Options, PREFIXES, PROMPT_BYTES, Prompts, SEED, WORKERS, end, request, send, targets,
};

const WORKER_COUNTS: [u32; 3] = [4, 64, 512];

/// Requests in flight at a worker are 0 to this many.
const IN_FLIGHT_MAX: u32 = 8;

/// Sessions that requests belong to, in turn: all are known after one round.
const SESSIONS: u64 = 10_000;

/// Blocks of 64 bytes in the caches that `least_ttft` looks through, all different.
const CACHED_BLOCKS: usize = 100_000;
const BLOCK_BYTES: usize = 64;

pub fn bench(criterion: &mut Criterion) {
    alone(criterion);
    whole(criterion);
    full_caches(criterion);
}

/// Without the match: a prompt of 64 bytes that no worker has any of, by one of many sessions.
fn alone(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("pick_alone");
    for &kind in PolicyKind::ALL {
        for workers in WORKER_COUNTS {
            let mut load = None;
            group.bench_function(BenchmarkId::new(kind.name(), workers), |bencher| {
                let load = load.get_or_insert_with(|| Load::new(kind, workers));
                let mut prompts = Prompts::new(64, u64::MAX, SEED);
                let keys: Vec<_> =
                    (0..SESSIONS).map(|session| format!("session-{session}")).collect();
                let mut sessions = keys.iter().cycle();
                bencher.iter(|| {
                    let routing_key = sessions.next().map(String::as_str);
                    load.pick(&Request { routing_key, ..request(prompts.next(), load.at_secs) })
                });
            });
        }
    }
    group.finish();
}

/// Picked, sent, begun and ended; prompts of 2.4 KB, 64 workers.
fn whole(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("pick_sent_ended");
    for &kind in PolicyKind::ALL {
        let mut load = None;
        let mut prompts = Prompts::new(PROMPT_BYTES, PREFIXES, SEED);
        group.bench_function(kind.name(), |bencher| {
            let load = load.get_or_insert_with(|| Load::new(kind, WORKERS));
            bencher.iter(|| {
                load.at_secs += 0.001;
                let block_names = BlockNames::default();
                let request = Request {
                    block_names: Some(&block_names),
                    ..request(prompts.next(), load.at_secs)
                };
                let picked = load.pick(&request);
                end(send(&*load.policy, &request, &load.targets[picked]), &request);
            });
        });
    }
    group.finish();
}

/// `least_ttft`, match included: half of each prompt is in some caches.
fn full_caches(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("pick_full_caches");
    let mut prompts = Prompts::new(PROMPT_BYTES, PREFIXES, SEED);
    let mut load = None;
    group.bench_function(PolicyKind::LeastTtft.name(), |bencher| {
        let load = load.get_or_insert_with(|| Load::with_full_caches(&mut prompts));
        bencher.iter(|| load.pick(&request(prompts.next(), load.at_secs)));
    });
    group.finish();
}

/// A policy before workers that are at work.
struct Load {
    policy: Arc<dyn Policy>,
    targets: Vec<Arc<Target>>,
    draws: Draws,
    at_secs: f64,
    /// What the workers are at.
    _in_flight: Vec<InFlight>,
}

impl Load {
    fn new(kind: PolicyKind, workers: u32) -> Self {
        let policy = kind.build(&Options::defaults().routing);
        let targets = targets(workers);
        let mut prompts = Prompts::new(PROMPT_BYTES, PREFIXES, SEED + 1);
        let mut random = fastrand::Rng::with_seed(SEED);
        let mut in_flight = Vec::new();
        for target in &targets {
            // Its speed is known.
            let request = request(prompts.next(), 0.0);
            end(send(&*policy, &request, target), &request);
            for _ in 0..random.u32(..=IN_FLIGHT_MAX) {
                in_flight.push(send(&*policy, &self::request(prompts.next(), 0.0), target));
            }
        }
        Self { policy, targets, draws: Draws::new(Some(SEED)), at_secs: 1.0, _in_flight: in_flight }
    }

    /// `least_ttft`, by which so many different blocks are cached.
    fn with_full_caches(prompts: &mut Prompts) -> Self {
        let load = Self::new(PolicyKind::LeastTtft, WORKERS);
        let new_blocks_each = PROMPT_BYTES / 2 / BLOCK_BYTES;
        for number in 0..CACHED_BLOCKS / new_blocks_each {
            let target = &load.targets[number % load.targets.len()];
            let request = request(prompts.next(), 0.0);
            end(send(&*load.policy, &request, target), &request);
        }
        load
    }

    fn pick(&self, request: &Request) -> usize {
        let picked = self.policy.pick(request, &self.targets, &mut self.draws.next(), None);
        picked.expect("the router's own policies never fail").index
    }
}
