//! The load: prompts of which some share a beginning, workers, and requests that run there.

use std::sync::Arc;

use clap::Parser;
use sglang_router_rs::routing::{self, InFlight, Policy, Request, Target, Told, WorkerName};
use sglang_router_rs::tracking;

pub const SEED: u64 = 6;
pub const WORKERS: u32 = 64;
pub const PROMPT_BYTES: usize = 2_400;
/// How many different beginnings prompts have.
pub const PREFIXES: u64 = 64;

/// Tokens that each worker's cache holds.
const KV_TOKENS: u64 = 100_000;

/// Every option that the parts take, with its default.
#[derive(Parser)]
pub struct Options {
    #[command(flatten)]
    pub routing: routing::Options,
    #[command(flatten)]
    pub tracking: tracking::Options,
}

impl Options {
    pub fn defaults() -> Self {
        Self::parse_from(["bench", "--enable-request-tracking"])
    }
}

/// One prompt after the other, of the same length. The first half is one of some prefixes at random, the second half is
/// new each time.
///
/// All are made in one buffer by changing the first bytes of each half: to make one costs next to nothing, so it can
/// be made within what is timed, and it is as warm in the processor's caches as one that has just been received.
pub struct Prompts {
    bytes: Vec<u8>,
    prefixes: u64,
    made: u64,
    random: fastrand::Rng,
}

impl Prompts {
    /// Prompts of two different `seed`s, below 2^32, have prefixes in common and no second half.
    pub fn new(len: usize, prefixes: u64, seed: u64) -> Self {
        let mut bytes = vec![0; len];
        fastrand::Rng::with_seed(SEED).fill(&mut bytes);
        let random = fastrand::Rng::with_seed(seed);
        Self { bytes, prefixes, made: seed << 32, random }
    }

    pub fn next(&mut self) -> &[u8] {
        let prefix = self.random.u64(..self.prefixes);
        self.made += 1;
        self.mark(0, prefix);
        self.mark(self.bytes.len() / 2, self.made);
        &self.bytes
    }

    /// Eight bytes that differ for each number, from the first byte on.
    fn mark(&mut self, at: usize, number: u64) {
        let mark = number.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes();
        self.bytes[at..at + mark.len()].copy_from_slice(&mark);
    }
}

/// Workers of unequal weight, which have told the size of their caches.
pub fn targets(count: u32) -> Vec<Arc<Target>> {
    let mut random = fastrand::Rng::with_seed(SEED);
    let target = |id| {
        let target = Target::new(id, 0.5 + random.f64());
        let url = format!("http://10.0.0.{}:{}", id / 8, 30_000 + id % 8);
        let node_id = format!("gpu_{id}").into();
        let target = target.named(&url);
        target.set_kv_tokens(Some(KV_TOKENS));
        target.set_name(Arc::new(WorkerName { index: id, url: url.into(), node_id }));
        Arc::new(target)
    };
    (0..count).map(target).collect()
}

/// A stream is asked for, at this moment.
pub fn request(prompt: &[u8], at_secs: f64) -> Request<'_> {
    Request { stream: true, route: "/generate", at_secs, ..Request::of(prompt) }
}

/// The request goes to the worker.
pub fn send(policy: &dyn Policy, request: &Request, target: &Arc<Target>) -> InFlight {
    let mut in_flight = target.begin();
    in_flight.heard_by(policy.sent(request, target));
    in_flight
}

/// Its first content comes after 50 ms and its end after 100 ms, with the worker's own counts.
pub fn end(mut in_flight: InFlight, request: &Request) {
    in_flight.begun(request.at_secs + 0.05);
    let prompt_tokens = Some(request.prompt.len() as u32 / 4);
    let cached_tokens = prompt_tokens.map(|tokens| tokens / 2);
    in_flight.told(&Told { prompt_tokens, cached_tokens, completion_tokens: Some(10) });
    in_flight.answered(request.at_secs + 0.1);
}
