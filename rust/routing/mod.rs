//! Picks a worker for each request.
//!
//! The one idea: a policy is a pure rule. It sees the request, the routable workers and a source
//! of randomness, and answers with an index and the reason for it; so every policy can be tested
//! by properties, replayed in virtual time, and compared with another on the same load.
//!
//! Invariant: a policy only ever answers with one of the workers it was given, and holds nothing
//! that grows without a bound.
//!
//! What is absent: no tokio, no HTTP, no clock, no health. Which workers are routable is decided
//! before a policy is asked; what was decided is recorded after.

use std::fmt;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use candidates::Weighed;
use clap::ValueEnum;
use clap::builder::RangedU64ValueParser;
use crossbeam_utils::CachePadded;
use names::Names;
pub use own::{Choice, build};
use xxhash_rust::xxh3::xxh3_64;

mod backlog;
mod cache_aware;
pub mod candidates;
mod consistent_hashing;
mod fixed_probability;
mod herds;
mod kv_size;
mod least_ttft;
mod manual;
mod mirror;
pub mod names;
mod outlook;
pub mod own;
mod power_of_two;
mod prefix_hash;
pub mod prefix_tree;
mod random;
mod rendezvous;
mod round_robin;
mod shortest_queue;
mod speed;
mod sticky_keys;
pub mod worker_set;

pub use manual::AssignmentMode;

/// A worker's place in the order of joining. Never reused.
pub type WorkerId = u32;

/// Bytes of a [`Request::prompt`] per token: exact for token ids, an estimate for text.
pub const BYTES_PER_TOKEN: usize = 4;

/// More tokens than any KV cache holds.
pub const KV_TOKENS_MAX: u64 = 1 << 40;

/// What a worker is called. Shared by all that speak of the worker; never changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkerName {
    /// Order of joining; never used again.
    pub index: WorkerId,
    /// Its URL, as it was written.
    pub url: Box<str>,
    /// Its short name, unique among all workers there have been.
    pub node_id: Box<str>,
}

/// What a policy may know of a worker.
#[derive(Debug)]
pub struct Target {
    pub id: WorkerId,
    /// Share of the requests under `fixed_probability`; see [`check_weight`].
    pub weight: f64,
    /// What hashing tells it by.
    name_hash: u64,
    /// Set before it may be picked.
    name: OnceLock<Arc<WorkerName>>,
    in_flight: AtomicU32,
    /// 0 where it is not known.
    kv_tokens: AtomicU64,
}

impl Target {
    /// A worker with nothing in flight, which hashing tells by its id. `weight` has passed
    /// [`check_weight`].
    pub fn new(id: WorkerId, weight: f64) -> Self {
        Self {
            id,
            weight,
            name_hash: xxh3_64(&id.to_le_bytes()),
            name: OnceLock::new(),
            in_flight: AtomicU32::new(0),
            kv_tokens: AtomicU64::new(0),
        }
    }

    /// The same worker, which hashing tells by its name: so a session finds it again whatever the
    /// order of joining, also through another router.
    pub fn named(self, name: &str) -> Self {
        Self { name_hash: xxh3_64(name.as_bytes()), ..self }
    }

    /// What it is called, if that was said.
    pub fn name(&self) -> Option<&Arc<WorkerName>> {
        self.name.get()
    }

    /// Says what it is called. The first word counts.
    pub fn set_name(&self, name: Arc<WorkerName>) {
        self.name.get_or_init(|| name);
    }

    /// Requests picked for this worker that have not ended.
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Tokens that its KV cache holds, in its own words.
    pub fn kv_tokens(&self) -> Option<u64> {
        Some(self.kv_tokens.load(Ordering::Relaxed)).filter(|tokens| *tokens > 0)
    }

    /// The worker has said how many tokens its KV cache holds, or is another one that has not.
    pub fn set_kv_tokens(&self, tokens: Option<u64>) {
        self.kv_tokens.store(tokens.unwrap_or(0), Ordering::Relaxed);
    }

    /// The worker as it is now, with a count that nothing changes.
    fn still(&self) -> Self {
        let still = Self { name_hash: self.name_hash, ..Self::new(self.id, self.weight) };
        still.in_flight.store(self.in_flight(), Ordering::Relaxed);
        still.set_kv_tokens(self.kv_tokens());
        if let Some(name) = self.name() {
            still.set_name(name.clone());
        }
        still
    }

    /// Counts a request as in flight here until the guard is dropped. Taken right after the pick,
    /// so that the next pick sees it.
    pub fn begin(self: &Arc<Self>) -> InFlight {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        InFlight { target: Arc::clone(self), underway: None }
    }
}

/// One request in flight at a worker; dropping it ends that, whatever the ending was.
#[must_use = "the request counts as in flight only while this is held"]
pub struct InFlight {
    target: Arc<Target>,
    /// What the policy keeps of it.
    underway: Option<Box<dyn Underway>>,
}

impl InFlight {
    /// The worker this request is at.
    pub fn target(&self) -> &Arc<Target> {
        &self.target
    }

    /// The policy hears of it from now on.
    pub fn heard_by(&mut self, underway: Option<Box<dyn Underway>>) {
        self.underway = underway;
    }

    /// The first content of its answer has come.
    pub fn begun(&mut self, at_secs: f64) {
        if let Some(underway) = &mut self.underway {
            underway.begun(at_secs);
        }
    }

    /// Its answer has come to its end.
    pub fn answered(&mut self, at_secs: f64) {
        if let Some(underway) = &mut self.underway {
            underway.answered(at_secs);
        }
    }

    /// The answer has told how many tokens there were.
    pub fn told(&mut self, told: &Told) {
        if let Some(underway) = &mut self.underway {
            underway.told(told);
        }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        // Whoever sees that it is over can rely on the policy's having heard of it.
        self.underway = None;
        self.target.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What a policy keeps of a request that was sent, and wants to hear of it. Dropped when the request
/// is over at that worker, whatever the ending.
pub trait Underway: Send {
    /// The first content of a stream has come: the prompt has been computed. Not called for answers
    /// that are no streams.
    fn begun(&mut self, at_secs: f64);

    /// What the worker said of the tokens. At most once.
    fn told(&mut self, told: &Told);

    /// The answer has come to its end, and is no error.
    fn answered(&mut self, _at_secs: f64) {}
}

/// Tokens as a worker counted them; `None` where it did not say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Told {
    pub prompt_tokens: Option<u32>,
    pub cached_tokens: Option<u32>,
    pub completion_tokens: Option<u32>,
}

/// What a policy may know of a request.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// UTF-8 text, or four little-endian bytes per token id, so that [`BYTES_PER_TOKEN`] holds for
    /// both. May be empty; is never decoded.
    pub prompt: &'a [u8],
    /// Whether the prompt is token ids: then its tokens are known.
    pub is_ids: bool,
    /// Whether a stream was asked for.
    pub stream: bool,
    /// The path, such as `/generate`.
    pub route: &'a str,
    /// The model asked for.
    pub model: Option<&'a str>,
    /// The header `x-smg-routing-key`: what the requests of a session have in common. Not empty.
    pub routing_key: Option<&'a str>,
    /// The id it is traced by.
    pub request_id: Option<&'a str>,
    /// When it is routed, in seconds of a clock that never goes back.
    pub at_secs: f64,
    /// Keeps what is computed of the prompt for the next call about it; none where there is only one.
    pub block_names: Option<&'a BlockNames>,
}

impl<'a> Request<'a> {
    /// The prompt as the prefix tree takes it.
    fn tree_names(&self) -> Arc<Names> {
        let name = || Arc::new(Names::of(self.prompt));
        self.block_names.map_or_else(name, |known| known.tree.get_or_init(name).clone())
    }

    /// The prompt as the mirror of the workers' caches takes it.
    fn mirror_names(&self) -> Arc<[u64]> {
        let name = || mirror::names(self.prompt);
        self.block_names.map_or_else(name, |known| known.mirror.get_or_init(name).clone())
    }

    /// A request with this text, of which nothing else is known.
    pub fn of(prompt: &'a [u8]) -> Self {
        Self {
            prompt,
            is_ids: false,
            stream: false,
            route: "",
            model: None,
            routing_key: None,
            request_id: None,
            at_secs: 0.0,
            block_names: None,
        }
    }
}

/// Room for the names of one prompt's blocks, so that they are computed once for all that is asked about it, and only
/// if a policy goes by them.
#[derive(Clone, Debug, Default)]
pub struct BlockNames {
    tree: OnceLock<Arc<Names>>,
    mirror: OnceLock<Arc<[u64]>>,
}

/// A policy's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pick {
    /// Into the targets the policy was given.
    pub index: usize,
    /// One of the policy's [`PolicyKind::reasons`].
    pub reason: &'static str,
    /// Tokens of the prompt the policy believes to be in that worker's cache, whatever the reason
    /// for the pick; `None` from a policy without a prefix tree.
    pub matched_tokens: Option<u32>,
}

/// Why a policy did not pick: one from outside failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct PickError {
    /// In words for whoever sent the request.
    pub message: String,
    /// In words for whoever wrote the policy, such as a traceback.
    pub detail: String,
}

/// A rule that picks a worker. Shared by all requests at once.
pub trait Policy: Send + Sync {
    /// Picks one of `targets`, which are the routable workers: never empty, sorted by id. If someone
    /// wants to know why, notes in `weighed` what it compared, and picks no other one for that.
    ///
    /// # Errors
    /// A policy from outside failed. The router's own never do.
    fn pick(
        &self,
        request: &Request,
        targets: &[Arc<Target>],
        rng: &mut fastrand::Rng,
        weighed: Option<&mut Weighed>,
    ) -> Result<Pick, PickError>;

    /// Whether a pick may take so long that other requests should not wait for it.
    fn may_block(&self) -> bool {
        false
    }

    /// Tokens of the prompt, as this policy estimates them; `None` from one that does not.
    fn input_tokens(&self, _request: &Request) -> Option<u32> {
        None
    }

    /// Tokens of the prompt this policy believes to be in a worker's cache, as a pick of it would say.
    fn matched_tokens(&self, _request: &Request, _worker: WorkerId) -> Option<u32> {
        None
    }

    /// The request is now being sent to this worker; also called when it was pinned or is sent
    /// again, that is, when this policy did not pick. What is returned hears of it until it ends.
    fn sent(&self, _request: &Request, _target: &Arc<Target>) -> Option<Box<dyn Underway>> {
        None
    }

    /// The worker left, or was gone and is back: what was believed of its cache is void.
    fn forget(&self, _worker: WorkerId) {}

    /// Whether it wants the trace of each request that is over.
    fn wants_traces(&self) -> bool {
        false
    }

    /// A request is over, with its trace as JSON. Must not wait.
    fn finished(&self, _trace: String) {}

    /// No more comes: waits a moment until what was told is heard.
    fn close(&self) {}

    /// A request of a replay is over. It has no trace.
    fn replayed(&self, _replayed: &Replayed) {}

    /// What is to be said at the end of a replay of what it does, beside the requests that failed; a text each.
    fn remarks(&self) -> Vec<String> {
        Vec::new()
    }
}

/// What became of a request of a replay.
#[derive(Clone, Debug)]
pub struct Replayed<'a> {
    /// Its place in the trace.
    pub number: usize,
    /// The worker it was sent to last.
    pub worker: Option<&'a WorkerName>,
    pub routing_key: Option<&'a str>,
    /// Seconds of the trace's clock.
    pub arrived_at_secs: f64,
    pub first_at_secs: Option<f64>,
    pub ended_at_secs: f64,
    pub reason: Option<&'static str>,
    pub input_tokens: Option<u32>,
    pub matched_tokens: Option<u32>,
    pub told: Told,
    /// Why it failed.
    pub error: Option<&'a str>,
}

/// Makes the enum, its words and [`PolicyKind::build`] from one row per policy: the rule in a sentence, the
/// name, and the module, which has a type named like the variant with `new(&Options)`, the list
/// `REASONS`, and the sentence `SCORE`.
macro_rules! policies {
    ($($(#[doc = $rule:literal])+ $kind:ident = $name:literal in $module:ident;)+) => {
        /// The policies, by name.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, ValueEnum)]
        pub enum PolicyKind {
            $($(#[doc = $rule])+ #[value(name = $name)] $kind,)+
        }

        impl PolicyKind {
            /// Every policy, in the order of the documentation.
            pub const ALL: &[Self] = &[$(Self::$kind),+];

            /// The name in options, traces and metrics, for example `cache_aware`.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$kind => $name,)+ }
            }

            /// The rule in a sentence or two, for help and documentation.
            pub const fn rule(self) -> &'static str {
                match self { $(Self::$kind => concat!($($rule),+).trim_ascii(),)+ }
            }

            /// Every reason the policy can give for a pick.
            pub const fn reasons(self) -> &'static [&'static str] {
                match self { $(Self::$kind => $module::REASONS,)+ }
            }

            /// What [`candidates::Candidate::score`] is under the policy, and which is best.
            pub const fn score(self) -> &'static str {
                match self { $(Self::$kind => $module::SCORE,)+ }
            }

            /// The policy as it is at the start.
            pub fn build(self, options: &Options) -> Arc<dyn Policy> {
                match self {
                    $(Self::$kind => Arc::new($module::$kind::new(options)),)+
                }
            }
        }
    };
}

policies! {
    /// Any routable worker, all equally likely.
    Random = "random" in random;
    /// The routable workers in turn, in the order of joining.
    RoundRobin = "round_robin" in round_robin;
    /// Two distinct workers at random, of them the one with fewer requests in flight.
    PowerOfTwo = "power_of_two" in power_of_two;
    /// The fewest requests in flight, ties at random.
    ShortestQueue = "shortest_queue" in shortest_queue;
    /// Drawn by the workers' weights.
    FixedProbability = "fixed_probability" in fixed_probability;
    /// The worker that was sent the longest prefix of the prompt, unless the load is uneven or the
    /// prefix is short: then the fewest requests in flight.
    CacheAware = "cache_aware" in cache_aware;
    /// The least expected time to the first token: prefill that waits and that this prompt needs, over
    /// the worker's speed, plus cache_weight times what is not in its cache, over the mean speed.
    LeastTtft = "least_ttft" in least_ttft;
    /// The worker of the request's `x-smg-routing-key` by its hash; the next one in the key's order if that one
    /// has more than its share of the requests in flight. Without the header the fewest requests in flight.
    ConsistentHashing = "consistent_hashing" in consistent_hashing;
    /// The worker of the prompt's head by its hash; the next one in the head's order if that one has more
    /// than its share of the requests in flight. Without a prompt the fewest requests in flight.
    PrefixHash = "prefix_hash" in prefix_hash;
    /// The worker that the request's `x-smg-routing-key` was first given, a stand-in while that one cannot be
    /// picked. New keys, and requests without the header, are assigned by `assignment_mode`.
    Manual = "manual" in manual;
}

impl fmt::Display for PolicyKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The options of routing.
#[derive(Clone, Debug, clap::Args)]
#[group(skip)]
pub struct Options {
    /// The rule that picks a worker for each request: one of these, or FILE.py:NAME, a rule of your own in Python.
    #[arg(long, ignore_case = true, value_parser = own::ChoiceParser, default_value_t = PolicyKind::CacheAware.into())]
    pub policy: Choice,

    /// cache_aware: follow a matching prefix only if it is more than this share of the prompt,
    /// 0 to 1.
    #[arg(long, value_parser = parse_share, default_value_t = 0.3)]
    pub cache_threshold: f64,

    /// cache_aware: the load is uneven only if the most and the fewest requests in flight differ
    /// by more than this many.
    #[arg(long, default_value_t = 64)]
    pub balance_abs_threshold: usize,

    /// cache_aware: the load is uneven only if the most requests in flight are also more than this
    /// many times the fewest, at least 1.
    #[arg(long, value_parser = parse_ratio, default_value_t = 1.5)]
    pub balance_rel_threshold: f64,

    /// Accepted for compatibility, without effect: the prefix tree evicts whenever it is added to.
    #[arg(long, default_value_t = 60)]
    pub eviction_interval_secs: u64,

    /// cache_aware: bytes of prompt text the prefix tree remembers, all workers together, 1024 to
    /// 2^37.
    #[arg(long, default_value_t = 1 << 26, value_parser = tree_size())]
    pub max_tree_size: usize,

    /// consistent_hashing, prefix_hash: the most requests in flight at a worker as a multiple of the
    /// mean over all workers, at least 1; a large number is no bound.
    #[arg(long, alias = "prefix-hash-load-factor", value_parser = parse_ratio, default_value_t = 1.25)]
    pub hash_load_factor: f64,

    /// prefix_hash: tokens of the prompt's head, four bytes each.
    #[arg(long, default_value_t = 256, value_parser = RangedU64ValueParser::<usize>::new().range(1..=1 << 20))]
    pub prefix_token_count: usize,

    /// manual: how a key gets its worker: any, the fewest requests in flight, or the fewest keys.
    #[arg(long, value_enum, ignore_case = true, default_value_t = AssignmentMode::MinLoad)]
    pub assignment_mode: AssignmentMode,

    /// manual: seconds after its last request until a key is forgotten.
    #[arg(long, default_value_t = 14_400, value_parser = clap::value_parser!(u64).range(1..))]
    pub max_idle_secs: u64,

    /// least_ttft: how much the tokens of a prompt that a worker has not cached count on top of the time they take
    /// there: what is computed twice costs later requests. At least 0.
    #[arg(long, value_parser = parse_weight, default_value_t = 4.0)]
    pub cache_weight: f64,

    /// least_ttft: tokens that each worker's KV cache holds, 1 to 2^40, instead of what the workers say or, where they
    /// say nothing, what is learned from their answers.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=KV_TOKENS_MAX))]
    pub worker_kv_tokens: Option<u64>,

    /// Makes every random draw of routing repeatable: the n-th request draws the same numbers in
    /// each run. Without it they differ from run to run.
    #[arg(long)]
    pub seed: Option<u64>,
}

fn tree_size() -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(1024..=prefix_tree::LARGEST_MAX_BYTES as u64)
}

fn parse_weight(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(value) if (0.0..f64::INFINITY).contains(&value) => Ok(value),
        _ => Err("must be a finite number of at least 0".to_owned()),
    }
}

fn parse_share(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(value) if (0.0..=1.0).contains(&value) => Ok(value),
        _ => Err("must be a number from 0 to 1".to_owned()),
    }
}

fn parse_ratio(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(value) if (1.0..f64::INFINITY).contains(&value) => Ok(value),
        _ => Err("must be a finite number of at least 1".to_owned()),
    }
}

/// Passes a worker's weight through if it is a finite number of at least 0; the error is a sentence
/// that names the value.
pub fn check_weight(weight: f64) -> Result<f64, String> {
    if (0.0..f64::INFINITY).contains(&weight) {
        Ok(weight)
    } else {
        Err(format!("weight {weight} must be a finite number of at least 0"))
    }
}

/// A source of randomness for each request, without a lock.
///
/// The n-th source is a function of the seed and n alone, so with a seed a run is repeatable as far
/// as the order of arrivals is.
#[derive(Debug)]
pub struct Draws {
    seed: u64,
    requests: CachePadded<AtomicU64>,
}

impl Draws {
    /// Draws that follow `seed`, or that differ from run to run without one.
    pub fn new(seed: Option<u64>) -> Self {
        let seed = seed.unwrap_or_else(|| fastrand::u64(..));
        Self { seed, requests: CachePadded::new(AtomicU64::new(0)) }
    }

    /// The next request's source.
    pub fn next(&self) -> fastrand::Rng {
        let request = self.requests.fetch_add(1, Ordering::Relaxed);
        fastrand::Rng::with_seed(scatter(self.seed, request))
    }
}

/// The `n`-th output of SplitMix64 (Steele, Lea, Flood 2014) from `seed`. A generator seeded with
/// seed + n itself would give neighbouring requests related draws.
fn scatter(seed: u64, n: u64) -> u64 {
    let mut z = seed.wrapping_add(n.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Index of the target with the fewest requests in flight, ties at random.
fn least_in_flight(targets: &[Arc<Target>], rng: &mut fastrand::Rng) -> usize {
    least_by(targets.iter().map(|target| Some(target.in_flight())), rng)
}

/// The place of the lowest load, ties at random (reservoir sampling, so one pass sees each load once). Those
/// without one are passed over; the first place if nobody has one.
fn least_by<L: PartialOrd>(
    loads: impl Iterator<Item = Option<L>>,
    rng: &mut fastrand::Rng,
) -> usize {
    let (mut index, mut lowest, mut tied) = (0, None, 0);
    for (i, load) in loads.enumerate() {
        if load.is_none() {
            continue;
        }
        if lowest.is_none() || load < lowest {
            (index, lowest, tied) = (i, load, 1);
        } else if load == lowest {
            tied += 1;
            if rng.usize(..tied) == 0 {
                index = i;
            }
        }
    }
    index
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use clap::Parser;
    use proptest::prelude::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        routing: Options,
    }

    pub fn options(flags: &[&str]) -> Result<Options, String> {
        let line = Line::try_parse_from([&["test"], flags].concat());
        line.map(|line| line.routing).map_err(|error| error.to_string())
    }

    /// Targets with these loads; the guards keep them.
    pub fn loaded(loads: &[u32]) -> (Vec<Arc<Target>>, Vec<InFlight>) {
        let targets: Vec<_> =
            (0..).zip(loads).map(|(id, _)| Arc::new(Target::new(id, 1.0))).collect();
        let held = targets
            .iter()
            .zip(loads)
            .flat_map(|(target, &load)| (0..load).map(|_| target.begin()))
            .collect();
        (targets, held)
    }

    /// A pick of this prompt with a fixed seed, and the scores of all targets in their order.
    pub fn scores(
        policy: &dyn Policy,
        prompt: &[u8],
        targets: &[Arc<Target>],
    ) -> (Pick, Vec<Option<f64>>) {
        scores_of(policy, &Request::of(prompt), targets)
    }

    /// The same of this request.
    pub fn scores_of(
        policy: &dyn Policy,
        request: &Request,
        targets: &[Arc<Target>],
    ) -> (Pick, Vec<Option<f64>>) {
        let mut rng = fastrand::Rng::with_seed(7);
        let (pick, mut candidates) =
            candidates::explained(policy, request, targets, &mut rng, usize::MAX)
                .expect("never fails");
        candidates.sort_by_key(|candidate| candidate.index);
        (pick, candidates.iter().map(|candidate| candidate.score).collect())
    }

    /// A request with this routing key, of which nothing else is known.
    pub fn keyed(routing_key: &str) -> Request<'_> {
        Request { routing_key: Some(routing_key), ..Request::of(b"") }
    }

    /// How often each index was picked in `rounds` picks of an empty prompt with a fixed seed.
    pub fn tally(policy: &dyn Policy, targets: &[Arc<Target>], rounds: usize) -> Vec<usize> {
        let mut rng = fastrand::Rng::with_seed(7);
        let mut counts = vec![0; targets.len()];
        for _ in 0..rounds {
            let pick = policy.pick(&Request::of(b""), targets, &mut rng, None);
            counts[pick.expect("never fails").index] += 1;
        }
        counts
    }

    /// Whether counts are within a fifth of the expectation, far outside chance for the sizes used.
    pub fn close_to(counts: &[usize], expected: &[f64]) -> bool {
        counts.iter().zip(expected).all(|(&count, &e)| (count as f64 - e).abs() <= e / 5.0)
    }

    fn built(kind: PolicyKind) -> Arc<dyn Policy> {
        kind.build(&options(&["--policy", kind.name()]).expect("names parse"))
    }

    #[test]
    fn the_defaults_are_sglangs() {
        let options = options(&[]).expect("no flag is needed");
        assert_eq!(options.policy, PolicyKind::CacheAware.into());
        assert_eq!(options.cache_threshold, 0.3);
        assert_eq!(options.balance_abs_threshold, 64);
        assert_eq!(options.balance_rel_threshold, 1.5);
        assert_eq!(options.eviction_interval_secs, 60);
        assert_eq!(options.max_tree_size, 67_108_864);
        assert_eq!((options.hash_load_factor, options.prefix_token_count), (1.25, 256));
        assert_eq!(options.max_idle_secs, 14_400);
        assert_eq!(options.seed, None);
    }

    #[test]
    fn values_out_of_range_are_refused_by_flag_value_and_range() {
        for (flag, value, range) in [
            ("--cache-threshold", "NaN", "from 0 to 1"),
            ("--cache-threshold", "1.01", "from 0 to 1"),
            ("--cache-threshold", "-0.1", "from 0 to 1"),
            ("--balance-rel-threshold", "nan", "at least 1"),
            ("--balance-rel-threshold", "inf", "finite"),
            ("--balance-rel-threshold", "0.99", "at least 1"),
            ("--balance-abs-threshold", "-1", "invalid digit"),
            ("--max-tree-size", "1023", "1024..=137438953472"),
            ("--max-tree-size", "999999999999", "1024..=137438953472"),
            ("--policy", "fastest", "cache_aware"),
            ("--hash-load-factor", "0.9", "at least 1"),
            ("--prefix-token-count", "0", "1..=1048576"),
            ("--assignment-mode", "fewest", "min_group"),
            ("--max-idle-secs", "0", "1.."),
        ] {
            let error = options(&[&format!("{flag}={value}")]).expect_err(flag);
            for part in [flag, value, range] {
                assert!(error.contains(part), "{part} in {error}");
            }
        }
        assert!(options(&["--cache-threshold=0", "--balance-rel-threshold=1"]).is_ok());
        assert!(options(&["--cache-threshold=1", "--max-tree-size=1024"]).is_ok());
    }

    #[test]
    fn weights_are_finite_and_not_negative() {
        assert_eq!(check_weight(0.0), Ok(0.0));
        assert_eq!(check_weight(2.5), Ok(2.5));
        for bad in [-0.1, f64::NAN, f64::INFINITY] {
            let error = check_weight(bad).expect_err("refused");
            assert!(error.contains(&bad.to_string()), "{error}");
        }
    }

    #[test]
    fn each_policy_has_one_name_everywhere() {
        assert_eq!(PolicyKind::ALL, PolicyKind::value_variants());
        for &kind in PolicyKind::ALL {
            let value = kind.to_possible_value().expect("no policy is hidden");
            assert_eq!(value.get_name(), kind.name());
            assert_eq!(kind.to_string(), kind.name());
            assert!(kind.rule().ends_with('.') && !kind.reasons().is_empty());
            assert!(kind.score().ends_with('.'));
            let upper = kind.name().to_uppercase();
            assert_eq!(options(&["--policy", &upper]).expect("any case").policy, kind.into());
        }
    }

    #[test]
    fn a_request_is_in_flight_while_its_guard_lives() {
        let target = Arc::new(Target::new(3, 1.0));
        let first = target.begin();
        let second = target.begin();
        assert_eq!((target.in_flight(), second.target().id), (2, 3));
        drop(first);
        assert_eq!(target.in_flight(), 1);
        drop(second);
        assert_eq!(target.in_flight(), 0);
    }

    #[test]
    fn draws_follow_the_seed() {
        let run = |seed| {
            let draws = Draws::new(seed);
            (0..100).map(|_| draws.next().u64(..)).collect::<Vec<_>>()
        };
        assert_eq!(run(Some(1)), run(Some(1)));
        assert_ne!(run(Some(1)), run(Some(2)));
        assert_ne!(run(None), run(None));
        let mut distinct = run(Some(1));
        distinct.sort_unstable();
        distinct.dedup();
        assert_eq!(distinct.len(), 100);
    }

    #[test]
    fn draws_of_neighbouring_requests_are_unrelated() {
        let draws = Draws::new(Some(0));
        let mut counts = [0; 16];
        for _ in 0..16_000 {
            counts[draws.next().usize(..4) * 4 + draws.next().usize(..4)] += 1;
        }
        assert!(close_to(&counts, &[1000.0; 16]), "{counts:?}");
    }

    #[derive(Clone, Debug)]
    enum Step {
        Ask { prompt: Vec<u8>, key: Option<u8>, routable: u8 },
        End,
        Forget(WorkerId),
    }

    fn step() -> impl Strategy<Value = Step> {
        let prompt = prop::collection::vec(0..3_u8, 0..20);
        let ask = (prompt, prop::option::of(0..5_u8), 1..=255_u8);
        prop_oneof![
            8 => ask.prop_map(|(prompt, key, routable)| Step::Ask { prompt, key, routable }),
            2 => Just(Step::End),
            1 => (0..8_u32).prop_map(Step::Forget),
        ]
    }

    /// Picks, and checks what the pick is explained with.
    fn explained_pick(
        policy: &dyn Policy,
        request: &Request,
        given: &[Arc<Target>],
        rng: &mut fastrand::Rng,
        keep: usize,
    ) -> Pick {
        let (pick, candidates) =
            candidates::explained(policy, request, given, rng, keep).expect("never fails");
        assert_eq!(candidates.len(), keep.min(given.len()));
        let chosen = candidates.iter().find(|candidate| candidate.index == pick.index);
        let chosen = chosen.expect("the chosen one is always kept");
        assert_eq!(chosen.matched_tokens, pick.matched_tokens);
        for candidate in &candidates {
            let target = &given[candidate.index];
            assert_eq!(candidate.in_flight, target.in_flight());
            assert_eq!(candidate.matched_tokens, policy.matched_tokens(request, target.id));
            assert!(candidate.score.is_none_or(f64::is_finite));
        }
        // A draw does not go by the score; every other rule that has one does.
        if ["weighted", "all_weights_zero"].contains(&pick.reason) {
            assert!(candidates.iter().all(|candidate| candidate.score.is_some()));
        } else {
            assert_eq!(candidates[0].index, pick.index, "{candidates:?}");
        }
        pick
    }

    /// Runs the steps on a fresh policy; checks every pick and returns them. With `keep`, each is
    /// explained.
    fn run(kind: PolicyKind, steps: &[Step], weights: &[f64], keep: Option<usize>) -> Vec<Pick> {
        let (policy, draws) = (built(kind), Draws::new(Some(9)));
        let all: Vec<_> = (0..).zip(weights).map(|(id, &w)| Arc::new(Target::new(id, w))).collect();
        let (mut held, mut picks) = (Vec::new(), Vec::new());
        for step in steps {
            match step {
                Step::Ask { prompt, key, routable } => {
                    let given: Vec<_> =
                        all.iter().filter(|t| routable >> t.id & 1 == 1).cloned().collect();
                    let key = key.map(|key| key.to_string());
                    let request = Request { routing_key: key.as_deref(), ..Request::of(prompt) };
                    let rng = &mut draws.next();
                    let pick = match keep {
                        Some(keep) => explained_pick(&*policy, &request, &given, rng, keep),
                        None => policy.pick(&request, &given, rng, None).expect("never fails"),
                    };
                    assert!(kind.reasons().contains(&pick.reason));
                    let tokens = (prompt.len() / BYTES_PER_TOKEN) as u32;
                    assert!(pick.matched_tokens.is_none_or(|matched| matched <= tokens));
                    held.push(given[pick.index].begin());
                    policy.sent(&request, &given[pick.index]);
                    picks.push(pick);
                }
                Step::End => drop(held.pop()),
                Step::Forget(worker) => policy.forget(*worker),
            }
        }
        picks
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        #[test]
        fn every_policy_picks_what_it_was_given_and_repeats_itself(
            steps in prop::collection::vec(step(), 1..60),
            weights in prop::collection::vec(0.0..4.0_f64, 8),
            keep in 1..10_usize,
        ) {
            for &kind in PolicyKind::ALL {
                let picks = run(kind, &steps, &weights, None);
                prop_assert_eq!(&run(kind, &steps, &weights, None), &picks);
                prop_assert_eq!(&run(kind, &steps, &weights, Some(keep)), &picks, "explained");
            }
        }
    }
}
