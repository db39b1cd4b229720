//! Policy, tree and tracker together, from one thread and from two: what they share must not make them wait for each other.
//!
//! Criterion measures one thread, so this is a plain timed loop.

use std::sync::{Arc, Barrier};
use std::thread;
use std::time::Instant;

use sglang_router_rs::routing::{BlockNames, Draws, Policy, PolicyKind, Request, Target};
use sglang_router_rs::tracking::{Arrived, Tracker};

use crate::load::{
    self, Options, PREFIXES, PROMPT_BYTES, Prompts, SEED, WORKERS, request, targets,
};
use crate::tracker::{self, ids};

const ROUNDS: u64 = 5;

/// Of each thread in each round.
const REQUESTS: usize = 200_000;

/// Of all threads together before the first round: the store of traces and the tree, with their default bounds, are full then.
const FIRST_REQUESTS: usize = 200_000;

/// Requests per second with two threads over those with one, the median of all rounds, of `cache_aware`. Prints a table.
pub fn two_over_one() -> f64 {
    println!(
        "\n{:<14} {:>30} {:>22}",
        "from threads", "requests/s with 1, with 2", "2 over 1, each round"
    );
    let ratios = [PolicyKind::CacheAware, PolicyKind::LeastTtft].map(|kind| {
        // As in two routers, one with one thread and one with two.
        let routers = [1, 2].map(|threads| {
            let shared = Shared::new(kind);
            shared.requests_per_sec(threads, FIRST_REQUESTS / threads, 0);
            (threads, shared)
        });
        let rounds: Vec<_> = (1..=ROUNDS)
            .map(|round| {
                routers
                    .each_ref()
                    .map(|(threads, shared)| shared.requests_per_sec(*threads, REQUESTS, round))
            })
            .collect();
        let ratios: Vec<_> = rounds.iter().map(|[one, two]| two / one).collect();
        let [one, two] = [0, 1].map(|i| median(rounds.iter().map(|rates| rates[i]).collect()));
        let each: Vec<_> = ratios.iter().map(|ratio| format!("{ratio:.2}")).collect();
        println!("{:<14} {one:>15.0} {two:>14.0} {:>26}", kind.name(), each.join(" "));
        median(ratios)
    });
    ratios[0]
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

struct Shared {
    policy: Arc<dyn Policy>,
    targets: Vec<Arc<Target>>,
    tracker: Arc<Tracker>,
    arrived: Arrived,
    draws: Draws,
}

impl Shared {
    fn new(kind: PolicyKind) -> Self {
        let options = Options::defaults();
        Self {
            policy: kind.build(&options.routing),
            targets: targets(WORKERS),
            tracker: Tracker::new(options.tracking, kind.name()).expect("no log to open"),
            arrived: Arrived::now(),
            draws: Draws::new(Some(SEED)),
        }
    }

    /// In each round prompts and ids are new, and it is later.
    fn requests_per_sec(&self, threads: usize, requests: usize, round: u64) -> f64 {
        let run = 2 * round + threads as u64;
        let start = Barrier::new(threads + 1);
        let began = thread::scope(|scope| {
            for thread in 0..threads {
                let start = &start;
                scope.spawn(move || {
                    let seed = 2 * run + thread as u64;
                    let prompts = Prompts::new(PROMPT_BYTES, PREFIXES, seed);
                    let ids = ids(seed as usize, requests);
                    start.wait();
                    self.work(prompts, &ids, run as f64 * 1e3);
                });
            }
            start.wait();
            Instant::now()
        });
        (threads * requests) as f64 / began.elapsed().as_secs_f64()
    }

    fn work(&self, mut prompts: Prompts, ids: &[String], from_secs: f64) {
        for (number, id) in ids.iter().enumerate() {
            let block_names = BlockNames::default();
            let request = Request {
                block_names: Some(&block_names),
                ..request(prompts.next(), from_secs + number as f64 / 1e3)
            };
            let trace = tracker::open(&self.tracker, self.arrived, id);
            let pick = self.policy.pick(&request, &self.targets, &mut self.draws.next(), None);
            let pick = pick.expect("the router's own policies never fail");
            let target = &self.targets[pick.index];
            let in_flight = load::send(&*self.policy, &request, target);
            let name = target.name().expect("every target was given one");
            load::end(in_flight, &request);
            tracker::end(trace, self.arrived, name, pick.reason, pick.matched_tokens);
        }
    }
}
