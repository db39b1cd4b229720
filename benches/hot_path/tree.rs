//! The prefix tree of `cache_aware`: a match and an insert, in a tree that is full, so that each insert evicts.
//!
//! Prompts go to a random one of the workers, so that each prefix is known to all of them.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput};
use sglang_router_rs::routing::names::Names;
use sglang_router_rs::routing::prefix_tree::PrefixTree;

use crate::load::{Options, PREFIXES, PROMPT_BYTES, Prompts, SEED, WORKERS};

const LENGTHS: [usize; 5] = [1 << 10, PROMPT_BYTES, 1 << 14, 1 << 17, 1 << 20];
const PREFIX_COUNTS: [u64; 3] = [1_000, 10_000, 100_000];

pub fn bench(criterion: &mut Criterion) {
    short_prompts_match();
    let max_tree_size = Options::defaults().routing.max_tree_size;
    let mut group = criterion.benchmark_group("tree_by_prompt_bytes");
    for len in LENGTHS {
        group.throughput(Throughput::Bytes(len as u64));
        let mut load = None;
        group.bench_function(BenchmarkId::from_parameter(len), |bencher| {
            let load = load.get_or_insert_with(|| Load::new(len, PREFIXES, max_tree_size));
            bencher.iter(|| load.match_and_insert());
        });
    }
    group.finish();

    let mut group = criterion.benchmark_group("tree_by_prefixes");
    for prefixes in PREFIX_COUNTS {
        // Room for each prefix with one end of its own: the tree grows as the prefixes do.
        let max_bytes = prefixes as usize * PROMPT_BYTES;
        let mut load = None;
        group.bench_function(BenchmarkId::from_parameter(prefixes), |bencher| {
            let load = load.get_or_insert_with(|| Load::new(PROMPT_BYTES, prefixes, max_bytes));
            bencher.iter(|| load.match_and_insert());
        });
    }
    group.finish();
}

/// However the tree is made: what makes it fast must not cost short prompts their match.
fn short_prompts_match() {
    let prompt = [b'p'; 64];
    let mut tree = PrefixTree::new(Options::defaults().routing.max_tree_size);
    let names = Names::of(&prompt);
    tree.insert(&names, 1);
    assert_eq!(tree.matched(&names).bytes_for(1), prompt.len(), "64 bytes match each other");
}

struct Load {
    tree: PrefixTree,
    prompts: Prompts,
    random: fastrand::Rng,
}

impl Load {
    /// As it is after text of twice the bound was sent.
    fn new(prompt_bytes: usize, prefixes: u64, max_bytes: usize) -> Self {
        let mut load = Self {
            tree: PrefixTree::new(max_bytes),
            prompts: Prompts::new(prompt_bytes, prefixes, SEED),
            random: fastrand::Rng::with_seed(SEED),
        };
        let prompts = 4 * max_bytes / prompt_bytes;
        for _ in 0..prompts {
            load.match_and_insert();
        }
        load
    }

    fn match_and_insert(&mut self) {
        let worker = self.random.u32(..WORKERS);
        let prompt = self.prompts.next();
        // As the policy does it, which names the blocks once per request.
        let names = Names::of(prompt);
        black_box(self.tree.matched(&names).bytes_for(worker));
        self.tree.insert(&names, worker);
    }
}
