//! The prefix tree against a list of all that was sent: it never knows more, knows as much while there is
//! room, and stays within its bounds.
#![no_main]

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use sglang_router_rs::routing::WorkerId;
use sglang_router_rs::routing::names::{Names, blocks_of, bytes_of};
use sglang_router_rs::routing::prefix_tree::PrefixTree;
use sglang_router_rs::routing::worker_set::WorkerSet;

/// Room for all that a session can send.
const AMPLE_BYTES: usize = 1 << 24;
/// The longest prompt; longer than three nodes.
const PROMPT_BYTES_MAX: usize = 16 << 10;
const STEPS_MAX: usize = 64;
/// So far apart that a set of them takes memory of its own.
const WORKERS: [WorkerId; 6] = [0, 1, 63, 64, 200, 10_000];

#[derive(Arbitrary, Debug)]
struct Session {
    /// How much the tree may remember; `None` for more than is ever sent.
    max_bytes: Option<u16>,
    steps: Vec<Step>,
}

#[derive(Arbitrary, Debug)]
enum Step {
    Insert(Prompt, u8),
    Match(Prompt),
    Forget(u8),
}

/// The beginning of an earlier prompt and something of its own, repeated.
#[derive(Arbitrary, Debug)]
struct Prompt {
    earlier: u8,
    shared_bytes: u16,
    own: Vec<u8>,
    times: u8,
}

impl Prompt {
    fn bytes(&self, sent: &[(Vec<u8>, WorkerId)]) -> Vec<u8> {
        let earlier = sent.get(usize::from(self.earlier) % sent.len().max(1));
        let earlier = earlier.map_or(&[][..], |(prompt, _)| prompt);
        let shared = &earlier[..usize::from(self.shared_bytes).min(earlier.len())];
        let own = self.own.repeat(usize::from(self.times % 64) + 1);
        let mut prompt = [shared, &own].concat();
        prompt.truncate(PROMPT_BYTES_MAX);
        prompt
    }
}

fuzz_target!(|session: Session| {
    let max_bytes = session.max_bytes.map_or(AMPLE_BYTES, usize::from);
    let is_ample = session.max_bytes.is_none();
    let mut tree = PrefixTree::new(max_bytes);
    let mut sent: Vec<(Vec<u8>, WorkerId)> = Vec::new();
    for step in session.steps.iter().take(STEPS_MAX) {
        match step {
            Step::Insert(prompt, worker) => {
                let (prompt, worker) = (prompt.bytes(&sent), worker_of(*worker));
                tree.insert(&Names::of(&prompt), worker);
                check_inserted(&tree, &prompt, max_bytes, worker);
                sent.push((prompt, worker));
            }
            Step::Match(prompt) => check_match(&tree, &sent, &prompt.bytes(&sent), is_ample),
            Step::Forget(worker) => {
                let worker = worker_of(*worker);
                tree.remove_worker(worker);
                for (prompt, _) in &sent {
                    let found = tree.matched(&Names::of(prompt)).bytes_for(worker);
                    assert_eq!(found, 0, "forgotten");
                }
                sent.retain(|(_, sent_to)| *sent_to != worker);
            }
        }
        assert!(tree.text_bytes() <= bytes_of(blocks_of(max_bytes)));
        assert!(tree.memory_bytes() <= max_bytes + max_bytes / 4 + (16 << 10));
    }
    for (prompt, _) in &sent {
        check_match(&tree, &sent, prompt, is_ample);
    }
});

fn worker_of(number: u8) -> WorkerId {
    WORKERS[usize::from(number) % WORKERS.len()]
}

/// A prompt just sent is there in full; but for the nodes of its own path, when these alone take all memory.
fn check_inserted(tree: &PrefixTree, prompt: &[u8], max_bytes: usize, worker: WorkerId) {
    let found = tree.matched(&Names::of(prompt)).bytes_for(worker);
    let bytes = prompt.len().min(bytes_of(blocks_of(max_bytes)));
    let is_alone = tree.text_bytes() == found;
    assert!(found == bytes || is_alone, "{found} of {bytes} bytes");
}

/// What the tree says of a prompt's prefixes, held against all that was sent.
fn check_match(tree: &PrefixTree, sent: &[(Vec<u8>, WorkerId)], prompt: &[u8], is_ample: bool) {
    let found = tree.matched(&Names::of(prompt));
    for worker in WORKERS {
        let own = sent.iter().filter(|(_, sent_to)| *sent_to == worker);
        let longest = own.map(|(sent, _)| common_prefix(sent, prompt)).max().unwrap_or(0);
        let bytes = found.bytes_for(worker);
        assert!(bytes <= longest, "worker {worker} was sent {longest} bytes, not {bytes}");
        assert!(bytes == longest || !is_ample, "worker {worker} was sent {longest}, not {bytes}");
    }
    let mut before: Option<(usize, &WorkerSet)> = None;
    for (bytes, workers) in found.deepest_first() {
        assert!(bytes > 0 && !workers.is_empty() && workers.iter().is_sorted_by(|a, b| a < b));
        if let Some((longer, those)) = before {
            assert!(bytes < longer && those.iter().all(|worker| workers.contains(worker)));
        }
        before = Some((bytes, workers));
    }
}

/// In whole blocks, unless all is the same.
fn common_prefix(a: &[u8], b: &[u8]) -> usize {
    let bytes = a.iter().zip(b).take_while(|(a, b)| a == b).count();
    match blocks_of(bytes) {
        _ if a == b => bytes,
        blocks if bytes_of(blocks) > bytes => bytes_of(blocks - 1),
        blocks => bytes_of(blocks),
    }
}
