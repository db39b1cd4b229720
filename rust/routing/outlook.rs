//! What is believed of the workers from what they were sent and what came back: how much prefill waits there, how fast
//! it goes, and what of a prompt is in whose cache.
//!
//! The one idea: everything is learned from three moments of each request. It was [`sent`](Outlook::sent); its first
//! content came; it ended, and the worker said how many tokens there were and how many it had cached. A policy that needs
//! any of this holds an `Outlook`, tells it of what is sent and forgotten, and reads all workers at
//! once with [`Outlook::see`].
//!
//! A prompt counts as cached from the moment it is sent, because the worker will have computed it before it comes to what is sent
//! later. It is taken back if the request ends without a sign that it was computed. It is used again when the
//! request ends, and the answer takes room beside it.
//!
//! Where a worker had less of a prompt than was believed, what it used even longer ago is gone too, whether it was evicted or the
//! cache was emptied; that is believed at the second time, as a prompt can also differ in what is not text.
//!
//! Bounds: per request in flight 8 bytes per block of its prompt; per worker the size of its cache in blocks, at most
//! 2^22 tokens (see [`Mirror`]). A worker that has left is swept out when the next one does.
//!
//! One lock, shared by those who look and held alone by those who tell, each for about a microsecond; names of blocks are computed
//! outside of it, and tokens per byte are read outside of it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::RwLock;

use super::backlog::{Backlog, Computed, Ticket};
use super::herds::{DrawnBy, Herds};
use super::kv_size::{KvSize, MOST_TOKENS};
use super::mirror::{BLOCK_BYTES, Mirror, Use, UseNumber};
use super::speed::{Speed, Speeds};
use super::{BYTES_PER_TOKEN, Request, Target, Told, Underway, WorkerId};

/// Prompts after which what was learned of tokens per byte counts half.
const RATIO_HALF_LIFE: f64 = 256.0;

/// The tokens per byte change only by more than this share, so that estimates made at about the same time agree.
const RATIO_STEP: f64 = 0.01;

/// Tokens per byte stay between these: a token of 64 bytes, and one for each byte.
const RATIO_RANGE: [f64; 2] = [1.0 / 64.0, 1.0];

/// Text is at most so many times as dense as all text in the mean, or as thin.
const MOST_DENSE: f64 = 2.0;

/// Pending tokens are told in steps of so many: that is how well they are known, and workers that are as good as idle
/// shall be equally idle.
const PENDING_STEP: u64 = 64;

/// A worker's word on what it had cached is taken as agreeing within this share of it, or two blocks: text is not
/// equally dense everywhere, and workers cache whole pages.
const AGREEMENT: f64 = 0.05;

/// Blocks of a cache that is void are dropped so many at a time.
const CUT_AT_ONCE: usize = 4096;

/// What is known of a worker when a prompt is to be sent.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct View {
    /// Tokens that it has still to compute of prompts sent to it, and how long it is overdue with them, as tokens.
    pub pending_tokens: u32,
    /// Tokens of this prompt believed to be in its cache; at least one of a prompt never is.
    pub matched_tokens: u32,
    /// Tokens it computes a second; `None` if nobody's speed is known.
    pub speed: Option<f64>,
    /// Requests in flight there for the part of this prompt that is cached anywhere.
    pub same_prefix: u32,
}

impl View {
    /// Its speed; as long as nobody's is known, those of all workers are the same.
    pub fn tokens_per_sec(&self) -> f64 {
        self.speed.unwrap_or(1.0)
    }
}

/// What is known of all workers when a prompt is to be sent.
#[derive(Clone, Debug, PartialEq)]
pub struct Views {
    /// Tokens of the prompt, as estimated from its bytes.
    pub input_tokens: u32,
    /// The mean of [`View::tokens_per_sec`] over all targets.
    pub mean_speed: f64,
    /// One per target, in their order.
    pub workers: Vec<View>,
}

/// See the module.
#[derive(Debug)]
pub struct Outlook {
    /// What each worker's cache holds, if an operator says so.
    kv_tokens: Option<u64>,
    /// The bits of [`Ratio::tokens_per_byte`], for those who ask for nothing else.
    tokens_per_byte: AtomicU64,
    state: RwLock<State>,
}

#[derive(Debug, Default)]
struct State {
    mirror: Mirror,
    workers: Workers,
    speeds: Speeds,
    ratio: Ratio,
    herds: Herds,
    next_ticket: Ticket,
    /// The latest moment that was told of.
    now_secs: f64,
}

/// Those that were ever sent anything, sorted by id: a pick goes through all of them, side by side with its targets.
#[derive(Debug, Default)]
struct Workers(Vec<Worker>);

impl Workers {
    fn at(&self, id: WorkerId) -> Result<usize, usize> {
        // Ids count up from 0, so as long as nobody has left this is where it is.
        match self.0.get(id as usize) {
            Some(worker) if worker.id == id => Ok(id as usize),
            _ => self.0.binary_search_by_key(&id, |worker| worker.id),
        }
    }

    fn get(&self, id: WorkerId) -> Option<&Worker> {
        self.at(id).ok().map(|at| &self.0[at])
    }

    fn get_mut(&mut self, id: WorkerId) -> Option<&mut Worker> {
        self.at(id).ok().map(|at| &mut self.0[at])
    }

    /// The worker that something is sent to.
    fn of(&mut self, target: &Arc<Target>) -> &mut Worker {
        let at = self.at(target.id).unwrap_or_else(|at| {
            self.0.insert(at, Worker { id: target.id, ..Worker::default() });
            at
        });
        let worker = &mut self.0[at];
        if !std::ptr::eq(worker.target.as_ptr(), &**target) {
            worker.target = Arc::downgrade(target);
        }
        worker
    }
}

#[derive(Debug, Default)]
struct Worker {
    id: WorkerId,
    target: Weak<Target>,
    backlog: Backlog,
    speed: Speed,
    kv_size: KvSize,
    /// Counts the caches it has had: it lost what was in the ones before.
    cache_number: u64,
    /// What was last used then was gone once, though it was believed to be there.
    doubted: Option<UseNumber>,
}

impl Worker {
    /// As they are told.
    fn pending_tokens(&self, at_secs: f64, speed: Option<f64>) -> u32 {
        let pending_tokens = self.backlog.pending_tokens(at_secs, speed);
        let steps = (pending_tokens + PENDING_STEP / 2) / PENDING_STEP;
        u32::try_from(steps * PENDING_STEP).unwrap_or(u32::MAX)
    }
}

impl Outlook {
    /// Nothing is known yet. `kv_tokens` is what each cache holds, whatever the workers say.
    pub fn new(kv_tokens: Option<u64>) -> Self {
        let tokens_per_byte = AtomicU64::new(Ratio::default().tokens_per_byte.to_bits());
        Self { kv_tokens, tokens_per_byte, state: RwLock::default() }
    }

    /// What is known of these workers, sorted by id, with regard to a request.
    pub fn see(&self, request: &Request, targets: &[Arc<Target>]) -> Views {
        let names = request.mirror_names();
        let state = self.state.read();
        let ratio = state.ratio.of(request.is_ids);
        let input_tokens = ratio.tokens(request.prompt.len());
        let speed = state.speeds.of(&Speed::default());
        let unknown = View { pending_tokens: 0, matched_tokens: 0, speed, same_prefix: 0 };
        let mut workers = vec![unknown; targets.len()];
        let mut known = &state.workers.0[..];
        let mut speeds = 0.0;
        for (view, target) in workers.iter_mut().zip(targets) {
            while let [worker, rest @ ..] = known
                && worker.id < target.id
            {
                known = rest;
            }
            if let [worker, ..] = known
                && worker.id == target.id
            {
                view.speed = worker.speed.told();
                view.pending_tokens = worker.pending_tokens(request.at_secs, view.speed);
            }
            speeds += view.tokens_per_sec();
        }
        let mean_speed = speeds / workers.len() as f64;
        let mut held = 0;
        let mut parts = state.mirror.parts(&names).peekable();
        while let Some(part) = parts.next() {
            held = part.end();
            // Who holds any of the next part is told of then.
            if parts.peek().is_some_and(|next| next.holders.len() == part.holders.len()) {
                continue;
            }
            let mut places = Places { targets, from: 0 };
            for holder in part.holders {
                if let Some(at) = places.of(holder.worker) {
                    workers[at].matched_tokens = ratio.matched(part.end_for(holder), input_tokens);
                }
            }
        }
        if let Some(last_held) = names[..held].last() {
            for (worker, requests) in state.herds.of(*last_held) {
                if let Some(at) = (Places { targets, from: 0 }).of(*worker) {
                    workers[at].same_prefix = *requests;
                }
            }
        }
        Views { input_tokens, mean_speed, workers }
    }

    /// Tokens of a prompt, as estimated from its bytes if it is text; `None` of a request without one.
    pub fn input_tokens(&self, request: &Request) -> Option<u32> {
        let tokens_per_byte = f64::from_bits(self.tokens_per_byte.load(Ordering::Relaxed));
        let ratio = Ratio { tokens_per_byte, ..Ratio::default() }.of(request.is_ids);
        (!request.prompt.is_empty()).then(|| ratio.tokens(request.prompt.len()))
    }

    /// Tokens of a prompt believed to be in a worker's cache.
    pub fn matched_tokens(&self, request: &Request, worker: WorkerId) -> u32 {
        let names = request.mirror_names();
        let state = self.state.read();
        let ratio = state.ratio.of(request.is_ids);
        let input_tokens = ratio.tokens(request.prompt.len());
        ratio.matched(state.mirror.matched_blocks(&names, worker), input_tokens)
    }

    /// A request is being sent to a worker.
    pub fn sent(self: &Arc<Self>, request: &Request, target: &Arc<Target>) -> Box<dyn Underway> {
        let mut sent = Box::new(Sent {
            outlook: Arc::clone(self),
            target: Arc::clone(target),
            ticket: 0,
            prompt_bytes: request.prompt.len(),
            is_ids: request.is_ids,
            names: request.mirror_names(),
            used: Use::default(),
            drawn_by: DrawnBy::default(),
            cache_number: 0,
            uncached_tokens: 0,
            computed: None,
            is_answered: false,
            has_begun: false,
            told: Told::default(),
        });
        self.state.write().sent(&mut sent, request, self.kv_tokens);
        sent
    }

    /// What was believed of a worker's cache is void.
    pub fn forget(&self, worker: WorkerId) {
        let latest_use = self.state.write().forget(worker);
        // All at once it would take tens of milliseconds, and every pick would wait.
        while let Some(latest_use) = latest_use
            && self.state.write().mirror.cut_some(worker, latest_use, CUT_AT_ONCE)
        {}
    }
}

impl State {
    /// Bytes of prompts that a worker's cache holds.
    fn room_bytes(&self, kv_tokens: Option<u64>, target: &Target) -> u64 {
        let told = kv_tokens.or_else(|| target.kv_tokens());
        let learned = || self.workers.get(target.id).map_or_else(KvSize::default, |w| w.kv_size);
        let tokens = told.map_or_else(|| learned().tokens(), |tokens| tokens as f64);
        (tokens.min(MOST_TOKENS) / self.ratio.tokens_per_byte) as u64
    }

    /// A worker's cache is another one. Returns the latest use of the one before, of which all is to be cut.
    fn forget(&mut self, worker: WorkerId) -> Option<UseNumber> {
        if let Some(worker) = self.workers.get_mut(worker) {
            worker.cache_number += 1;
            worker.kv_size = KvSize::default();
            worker.doubted = None;
        }
        let Self { workers, speeds, .. } = self;
        workers.0.retain(|worker| {
            let is_there = worker.target.strong_count() > 0;
            if !is_there {
                speeds.remove(&worker.speed);
            }
            is_there
        });
        self.tell_speeds();
        self.mirror.latest_use(worker)
    }

    /// A request is being sent. Notes with it what is believed of it.
    fn sent(&mut self, sent: &mut Sent, request: &Request, kv_tokens: Option<u64>) {
        let (id, at_secs) = (sent.target.id, request.at_secs);
        let room_bytes = self.room_bytes(kv_tokens, &sent.target);
        self.now_secs = self.now_secs.max(at_secs);
        self.next_ticket += 1;
        sent.ticket = self.next_ticket;
        sent.used = self.mirror.use_prompt(id, &sent.names, room_bytes);
        let last_held = sent.names[..sent.used.held_by_any].last();
        sent.drawn_by = [last_held.copied(), sent.names.last().copied()];
        self.herds.join(sent.drawn_by, id);
        let ratio = self.ratio.of(sent.is_ids);
        let input_tokens = ratio.tokens(sent.prompt_bytes);
        let matched_tokens = ratio.matched(sent.used.matched_blocks(), input_tokens);
        sent.uncached_tokens = input_tokens - matched_tokens;
        let worker = self.workers.of(&sent.target);
        sent.cache_number = worker.cache_number;
        self.speeds.tell(&mut worker.speed);
        if let Some(speed) = worker.speed.told() {
            worker.backlog.drain(at_secs, speed);
        }
        worker.backlog.enter(sent.ticket, sent.uncached_tokens, request.stream, at_secs);
    }

    /// The first content of a stream came. Tells what was computed until then.
    fn begun(&mut self, sent: &Sent, at_secs: f64) -> Option<Computed> {
        self.now_secs = self.now_secs.max(at_secs);
        self.workers.get_mut(sent.target.id)?.backlog.begun(sent.ticket, at_secs)
    }

    fn ended(&mut self, sent: &Sent, kv_tokens: Option<u64>) {
        let id = sent.target.id;
        let told = Counts::told(&sent.told);
        self.herds.leave(sent.drawn_by, id);
        let Some(worker) = self.workers.get_mut(id) else { return };
        let is_computed = sent.has_begun || sent.is_answered || told.is_some();
        worker.backlog.left(sent.ticket, is_computed, self.now_secs);
        let has_its_cache = worker.cache_number == sent.cache_number;
        if let Some(Computed { tokens, secs }) = sent.computed {
            let others = tokens.saturating_sub(u64::from(sent.uncached_tokens));
            let own = told.and_then(Counts::uncached_tokens).unwrap_or(sent.uncached_tokens);
            self.speeds.learn(&mut worker.speed, others + u64::from(own), secs);
            self.tell_speeds();
        }
        if !has_its_cache {
            return;
        }
        if !is_computed {
            self.mirror.retract(id, &sent.names, &sent.used);
            return;
        }
        if let Some(told) = told {
            let ratio = self.ratio.of(sent.is_ids);
            if let Some(cached_bytes) = ratio.cached_bytes(sent.prompt_bytes, told) {
                self.compare(sent, cached_bytes);
            }
            if !sent.is_ids {
                self.ratio.learn(sent.prompt_bytes, told.prompt_tokens);
            }
        }
        let room_bytes = self.room_bytes(kv_tokens, &sent.target);
        let answer_tokens = f64::from(sent.told.completion_tokens.unwrap_or(0));
        let rest_bytes = sent.prompt_bytes - sent.names.len() * BLOCK_BYTES;
        let nameless_bytes = answer_tokens / self.ratio.tokens_per_byte + rest_bytes as f64;
        // An answer that would not fit has not driven out its own prompt.
        let most = room_bytes.saturating_sub((sent.names.len() * BLOCK_BYTES) as u64);
        let nameless_bytes = (nameless_bytes as u64).min(most);
        self.mirror.use_nameless(id, u32::try_from(nameless_bytes).unwrap_or(u32::MAX), room_bytes);
        self.mirror.use_again(id, &sent.names, room_bytes);
    }

    /// After each change of the speeds.
    fn tell_speeds(&mut self) {
        self.speeds.tell_all(self.workers.0.iter_mut().map(|worker| &mut worker.speed));
    }

    /// Compares what a worker had of a prompt, in bytes, with what was believed when it was sent.
    fn compare(&mut self, sent: &Sent, cached_bytes: f64) {
        let id = sent.target.id;
        let Some(worker) = self.workers.get_mut(id) else { return };
        let tolerance = (AGREEMENT * cached_bytes).max((2 * BLOCK_BYTES) as f64);
        let tokens_per_byte = self.ratio.tokens_per_byte;
        let mut start_bytes = 0.0;
        for run in &sent.used.runs {
            let end_bytes = (run.end * BLOCK_BYTES) as f64;
            let newer_bytes = run.newer_bytes as f64;
            if end_bytes > cached_bytes + tolerance {
                let there_bytes = (cached_bytes - start_bytes).max(0.0);
                worker.kv_size.gone((newer_bytes + there_bytes) * tokens_per_byte);
                if let Some(doubted) = worker.doubted.replace(run.last_use) {
                    self.mirror.cut(id, doubted.min(run.last_use));
                    worker.doubted = Some(doubted.max(run.last_use));
                }
                return;
            }
            worker.kv_size.there((newer_bytes + end_bytes - start_bytes) * tokens_per_byte);
            worker.doubted = worker.doubted.filter(|doubted| *doubted < run.last_use);
            start_bytes = end_bytes;
        }
    }
}

/// A request on its way.
struct Sent {
    outlook: Arc<Outlook>,
    target: Arc<Target>,
    ticket: Ticket,
    prompt_bytes: usize,
    is_ids: bool,
    names: Arc<[u64]>,
    used: Use,
    /// The blocks it is counted by in the herds.
    drawn_by: DrawnBy,
    /// The worker's when it was sent.
    cache_number: u64,
    /// As estimated.
    uncached_tokens: u32,
    has_begun: bool,
    is_answered: bool,
    /// What was computed until its first content came.
    computed: Option<Computed>,
    told: Told,
}

impl Underway for Sent {
    fn begun(&mut self, at_secs: f64) {
        if !self.has_begun {
            self.has_begun = true;
            let computed = self.outlook.state.write().begun(self, at_secs);
            self.computed = computed;
        }
    }

    fn answered(&mut self, _at_secs: f64) {
        self.is_answered = true;
    }

    fn told(&mut self, told: &Told) {
        self.told = *told;
    }
}

impl Drop for Sent {
    fn drop(&mut self) {
        let Outlook { kv_tokens, tokens_per_byte, state } = &*self.outlook;
        let mut state = state.write();
        state.ended(self, *kv_tokens);
        let learned = state.ratio.tokens_per_byte.to_bits();
        if tokens_per_byte.load(Ordering::Relaxed) != learned {
            tokens_per_byte.store(learned, Ordering::Relaxed);
        }
    }
}

/// Finds one worker after the other, growing ids, among targets sorted by id.
struct Places<'a> {
    targets: &'a [Arc<Target>],
    /// Where the next one may be.
    from: usize,
}

impl Places<'_> {
    fn of(&mut self, worker: WorkerId) -> Option<usize> {
        let rest = self.targets.get(self.from..)?;
        // Where many hold the same, they are neighbours.
        let at = match rest.first() {
            Some(first) if first.id >= worker => 0,
            _ => rest.partition_point(|target| target.id < worker),
        };
        let at = self.from + at;
        let is_there = self.targets.get(at)?.id == worker;
        self.from = at + usize::from(is_there);
        is_there.then_some(at)
    }
}

/// A worker's word on a prompt, as far as it can be true.
#[derive(Clone, Copy, Debug)]
struct Counts {
    /// Over 0.
    prompt_tokens: u32,
    /// At most as many.
    cached_tokens: Option<u32>,
}

impl Counts {
    fn told(told: &Told) -> Option<Self> {
        let prompt_tokens = told.prompt_tokens.filter(|tokens| *tokens > 0)?;
        let cached_tokens = told.cached_tokens.filter(|cached| *cached <= prompt_tokens);
        Some(Self { prompt_tokens, cached_tokens })
    }

    fn uncached_tokens(self) -> Option<u32> {
        Some(self.prompt_tokens - self.cached_tokens?)
    }
}

/// Tokens per byte of prompts.
#[derive(Clone, Copy, Debug)]
struct Ratio {
    tokens: f64,
    bytes: f64,
    /// The ratio, as it is used.
    tokens_per_byte: f64,
}

impl Default for Ratio {
    fn default() -> Self {
        Self { tokens: 0.0, bytes: 0.0, tokens_per_byte: 1.0 / BYTES_PER_TOKEN as f64 }
    }
}

impl Ratio {
    /// That of a prompt; of token ids it is known.
    fn of(self, is_ids: bool) -> Self {
        if is_ids { Self::default() } else { self }
    }

    fn learn(&mut self, bytes: usize, tokens: u32) {
        // A token of text has at least a byte.
        if u64::from(tokens) > bytes as u64 {
            return;
        }
        let mut tokens = f64::from(tokens);
        if self.bytes > 0.0 {
            // A picture among texts moves it little, another language wins all the same.
            let expected = self.tokens / self.bytes * bytes as f64;
            tokens = tokens.clamp(expected / MOST_DENSE, expected * MOST_DENSE);
        }
        let kept = 0.5_f64.powf(1.0 / RATIO_HALF_LIFE);
        self.tokens = self.tokens * kept + tokens;
        self.bytes = self.bytes * kept + bytes as f64;
        let [least, most] = RATIO_RANGE;
        let learned = (self.tokens / self.bytes).clamp(least, most);
        if (learned / self.tokens_per_byte - 1.0).abs() > RATIO_STEP {
            self.tokens_per_byte = learned;
        }
    }

    /// Bytes of a prompt of so many that a worker had cached; `None` if it does not say, or if its tokens are
    /// those of more than the text, such as a picture's, or of less: then nobody knows which of them were cached.
    fn cached_bytes(self, bytes: usize, told: Counts) -> Option<f64> {
        let tokens_per_byte = f64::from(told.prompt_tokens) / bytes as f64;
        let density = tokens_per_byte / self.tokens_per_byte;
        let is_text = (1.0 / MOST_DENSE..=MOST_DENSE).contains(&density);
        let cached_tokens = told.cached_tokens.filter(|_| is_text)?;
        Some(f64::from(cached_tokens) / tokens_per_byte)
    }

    /// Tokens of a prompt of so many bytes.
    fn tokens(self, bytes: usize) -> u32 {
        // A float that is too large becomes the largest number.
        (bytes as f64 * self.tokens_per_byte).round() as u32
    }

    /// Tokens of so many blocks of a prompt of `input_tokens`: at least one of it is always computed.
    fn matched(self, blocks: usize, input_tokens: u32) -> u32 {
        self.tokens(blocks * BLOCK_BYTES).min(input_tokens.saturating_sub(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: usize = BLOCK_BYTES;

    fn targets(count: WorkerId) -> Vec<Arc<Target>> {
        (0..count).map(|id| Arc::new(Target::new(id, 1.0))).collect()
    }

    fn outlook() -> Arc<Outlook> {
        Arc::new(Outlook::new(Some(1_000_000)))
    }

    /// A stream of so many blocks of text that begins like no other of another kind.
    fn text(kind: u8, blocks: usize) -> Vec<u8> {
        vec![kind; blocks * BLOCK]
    }

    fn stream(prompt: &[u8], at_secs: f64) -> Request<'_> {
        Request { stream: true, at_secs, ..Request::of(prompt) }
    }

    fn told(prompt_tokens: u32, cached_tokens: u32) -> Told {
        Told {
            prompt_tokens: Some(prompt_tokens),
            cached_tokens: Some(cached_tokens),
            completion_tokens: Some(0),
        }
    }

    fn matched(outlook: &Arc<Outlook>, prompt: &[u8], targets: &[Arc<Target>]) -> Vec<u32> {
        let views = outlook.see(&Request::of(prompt), targets);
        let matched: Vec<u32> = views.workers.iter().map(|view| view.matched_tokens).collect();
        for (target, matched) in targets.iter().zip(&matched) {
            assert_eq!(outlook.matched_tokens(&Request::of(prompt), target.id), *matched);
        }
        matched
    }

    fn pending(outlook: &Arc<Outlook>, targets: &[Arc<Target>], at_secs: f64) -> Vec<u32> {
        let views = outlook.see(&stream(b"", at_secs), targets);
        views.workers.iter().map(|view| view.pending_tokens).collect()
    }

    #[test]
    fn a_prompt_is_pending_and_cached_from_when_it_is_sent() {
        let (outlook, targets) = (outlook(), targets(3));
        let prompt = text(1, 40);
        let _sent = outlook.sent(&stream(&prompt, 0.0), &targets[1]);
        assert_eq!(pending(&outlook, &targets, 0.0), [0, 640, 0]);
        assert_eq!(matched(&outlook, &text(1, 80), &targets), [0, 640, 0]);
        // A token of it is always computed.
        assert_eq!(matched(&outlook, &prompt, &targets), [0, 639, 0]);
        let _same = outlook.sent(&stream(&prompt, 0.0), &targets[1]);
        assert_eq!(pending(&outlook, &targets, 0.0), [0, 640, 0]);
        assert_eq!(outlook.input_tokens(&Request::of(&text(1, 2))), Some(32));
        assert_eq!(matched(&outlook, b"", &targets), [0, 0, 0]);
    }

    #[test]
    fn nothing_is_pending_after_any_ending() {
        let (outlook, targets) = (outlook(), targets(1));
        let prompts: Vec<_> = (0..6).map(|kind| text(kind, 40)).collect();
        for is_stream in [true, false] {
            let mut sent: Vec<_> = prompts
                .iter()
                .map(|prompt| {
                    let request = Request { stream: is_stream, ..stream(prompt, 1.0) };
                    outlook.sent(&request, &targets[0])
                })
                .collect();
            sent[0].begun(2.0);
            sent[0].begun(3.0);
            sent[0].told(&told(640, 0));
            sent[1].begun(3.0);
            sent[2].told(&told(640, 0));
            sent[3].told(&Told::default());
            sent.rotate_left(1);
            drop(sent);
            let state = outlook.state.read();
            assert_eq!(state.workers.0[0].backlog.pending_tokens(1.0, None), 0);
        }
    }

    #[test]
    fn what_came_to_nothing_is_not_believed() {
        let (outlook, targets) = (outlook(), targets(1));
        drop(outlook.sent(&stream(&text(1, 4), 0.0), &targets[0]));
        assert_eq!(matched(&outlook, &text(1, 8), &targets), [0]);
        let mut computed = outlook.sent(&stream(&text(1, 4), 0.0), &targets[0]);
        computed.begun(1.0);
        drop(computed);
        drop(outlook.sent(&stream(&text(1, 6), 0.0), &targets[0]));
        assert_eq!(matched(&outlook, &text(1, 8), &targets), [64]);
    }

    #[test]
    fn an_answer_without_counts_was_computed_too() {
        let (outlook, targets) = (outlook(), targets(1));
        let mut answered = outlook.sent(&Request::of(&text(1, 4)), &targets[0]);
        answered.answered(1.0);
        drop(answered);
        assert_eq!(matched(&outlook, &text(1, 8), &targets), [64]);
    }

    #[test]
    fn what_is_not_in_the_text_says_nothing_of_the_text() {
        let (outlook, targets) = (outlook(), targets(1));
        let serve = |prompt: &[u8], told| {
            let mut sent = outlook.sent(&stream(prompt, 0.0), &targets[0]);
            sent.begun(0.0);
            sent.told(&told);
        };
        (0..5).for_each(|kind| serve(&text(kind, 40), told(640, 0)));
        for kind in 2..5 {
            // A picture of 1,250 tokens beside it: all of the text was cached.
            serve(&text(kind, 40), told(640 + 1250, 640));
        }
        assert!(matched(&outlook, &text(0, 80), &targets)[0] >= 640);
    }

    #[test]
    fn token_ids_are_counted_and_not_estimated() {
        let (outlook, targets) = (outlook(), targets(1));
        for kind in 0..3 {
            outlook.sent(&stream(&text(kind, 40), 0.0), &targets[0]).told(&told(1280, 0));
        }
        let ids = Request { is_ids: true, ..Request::of(&[7; 400]) };
        assert_eq!(outlook.input_tokens(&ids), Some(100));
        assert_eq!(outlook.see(&ids, &targets).input_tokens, 100);
        // They say nothing of text.
        for _ in 0..1000 {
            outlook.sent(&ids, &targets[0]).told(&told(100, 0));
        }
        assert_eq!(outlook.input_tokens(&Request::of(&text(9, 10))), Some(320));
    }

    #[test]
    fn what_was_sent_before_a_cache_was_lost_is_not_in_the_new_one() {
        let (outlook, targets) = (outlook(), targets(1));
        let mut sent = outlook.sent(&stream(&text(1, 40), 0.0), &targets[0]);
        sent.begun(0.0);
        outlook.forget(0);
        outlook.sent(&stream(&text(2, 40), 0.0), &targets[0]).begun(0.0);
        sent.told(&told(640, 0));
        drop(sent);
        assert_eq!(matched(&outlook, &text(1, 80), &targets), [0]);
        assert_eq!(matched(&outlook, &text(2, 80), &targets), [640]);
    }

    #[test]
    fn an_answer_beyond_all_room_leaves_its_prompt() {
        let (outlook, targets) = (outlook(), targets(1));
        let mut sent = outlook.sent(&stream(&text(1, 40), 0.0), &targets[0]);
        sent.told(&Told { completion_tokens: Some(u32::MAX), ..told(640, 0) });
        drop(sent);
        assert_eq!(matched(&outlook, &text(1, 80), &targets), [640]);
    }

    #[test]
    fn a_worker_without_a_cache_is_not_the_faster_for_it() {
        let (outlook, targets) = (outlook(), targets(2));
        for round in 0..60 {
            let at = f64::from(round);
            for target in &targets {
                let mut sent = outlook.sent(&stream(&text(1, 40), at), target);
                let cached = if target.id == 0 { 0 } else { 639 };
                sent.begun(at + f64::from(640 - cached) / 10_000.0);
                sent.told(&told(640, cached));
            }
        }
        let views = outlook.see(&stream(b"", 100.0), &targets);
        let speeds: Vec<_> = views.workers.iter().filter_map(|view| view.speed).collect();
        assert!(speeds.iter().all(|speed| (8_000.0..12_500.0).contains(speed)), "{speeds:?}");
    }

    #[test]
    fn a_worker_that_had_less_twice_has_lost_what_it_used_before() {
        let (outlook, targets) = (outlook(), targets(1));
        let serve = |prompt: &[u8], cached: u32| {
            let mut sent = outlook.sent(&stream(prompt, 0.0), &targets[0]);
            sent.begun(0.0);
            sent.told(&told(prompt.len() as u32 / 4, cached));
        };
        for kind in 0..5 {
            serve(&text(kind, 40), 0);
        }
        serve(&text(3, 40), 0);
        assert_eq!(matched(&outlook, &text(1, 80), &targets), [640], "once is nothing");
        serve(&text(2, 40), 0);
        assert_eq!(matched(&outlook, &text(1, 80), &targets), [0]);
        assert_eq!(matched(&outlook, &text(0, 80), &targets), [0]);
        // What was computed since is there, and so is what was never doubted.
        assert_eq!(matched(&outlook, &text(2, 80), &targets), [640]);
        assert_eq!(matched(&outlook, &text(4, 80), &targets), [640]);
    }

    #[test]
    fn a_word_that_agrees_clears_a_doubt() {
        let (outlook, targets) = (outlook(), targets(1));
        let serve = |kind: u8, cached: u32| {
            let mut sent = outlook.sent(&stream(&text(kind, 40), 0.0), &targets[0]);
            sent.told(&told(640, cached));
        };
        (0..5).for_each(|kind| serve(kind, 0));
        serve(3, 0);
        serve(2, 640);
        serve(4, 0);
        assert_eq!(matched(&outlook, &text(1, 80), &targets), [640]);
    }

    #[test]
    fn nonsense_teaches_nothing() {
        let (outlook, targets) = (outlook(), targets(1));
        let serve = |prompt: &[u8], told: Told| {
            let mut sent = outlook.sent(&stream(prompt, 0.0), &targets[0]);
            sent.begun(0.0);
            sent.told(&told);
        };
        (0..3).for_each(|kind| serve(&text(kind, 40), told(640, 0)));
        for _ in 0..3 {
            serve(&text(1, 40), told(640, 641));
            serve(&text(1, 40), told(0, 0));
            serve(b"", told(u32::MAX, 0));
        }
        assert_eq!(matched(&outlook, &text(0, 80), &targets), [640]);
        assert_eq!(outlook.input_tokens(&Request::of(&text(0, 40))), Some(640));
        // More tokens than bytes are not those of text; and times are bounded.
        serve(&text(1, 1), told(u32::MAX, 0));
        assert_eq!(outlook.input_tokens(&Request::of(&text(0, 1))), Some(16));
        let views = outlook.see(&stream(&text(0, 1), f64::NAN), &targets);
        assert!(views.workers[0].speed.is_none_or(f64::is_finite));
    }

    #[test]
    fn tokens_per_byte_are_learned() {
        let (outlook, targets) = (outlook(), targets(1));
        for kind in 0..3 {
            let mut sent = outlook.sent(&stream(&text(kind, 40), 0.0), &targets[0]);
            sent.told(&told(1280, 0));
        }
        assert_eq!(outlook.input_tokens(&Request::of(&text(9, 10))), Some(320));
        assert_eq!(matched(&outlook, &text(1, 80), &targets), [1280]);
    }

    #[test]
    fn speeds_are_learned_from_the_time_to_the_first_token() {
        let (outlook, targets) = (outlook(), targets(3));
        let mut at = 0.0;
        for round in 0..30_u8 {
            // Two at a time: the second waits for the first.
            for (target, speed) in targets.iter().zip([1000.0, 500.0]) {
                let prompts = [text(100 + round, 125), text(200 - round, 125)];
                let send = |prompt: &Vec<u8>| outlook.sent(&stream(prompt, at), target);
                let mut sent: Vec<_> = prompts.iter().map(send).collect();
                for (place, sent) in (1..).zip(&mut sent) {
                    sent.begun(at + f64::from(place) * 2000.0 / speed);
                    sent.told(&told(2000, 0));
                }
            }
            at += 100.0;
        }
        let views = outlook.see(&stream(b"", at), &targets);
        let speeds: Vec<f64> = views.workers.iter().filter_map(|view| view.speed).collect();
        let [fast, slow, unknown] = speeds[..] else { panic!("{speeds:?}") };
        assert!((fast / 1000.0 - 1.0).abs() < 0.15, "{speeds:?}");
        assert!((slow / 500.0 - 1.0).abs() < 0.15, "{speeds:?}");
        assert!(slow < unknown && unknown < fast, "{speeds:?}");
    }

    #[test]
    fn a_cache_is_as_large_as_the_operator_or_the_worker_says() {
        let targets = targets(2);
        targets[0].set_kv_tokens(Some(64));
        let told = Arc::new(Outlook::new(None));
        let fixed = Arc::new(Outlook::new(Some(32)));
        for outlook in [&told, &fixed] {
            for target in &targets {
                outlook.sent(&stream(&text(1, 10), 0.0), target).begun(0.0);
            }
        }
        assert_eq!(matched(&told, &text(1, 20), &targets), [64, 160]);
        assert_eq!(matched(&fixed, &text(1, 20), &targets), [32, 32]);
    }

    #[test]
    fn an_answer_takes_room() {
        let (outlook, targets) = (Arc::new(Outlook::new(Some(160))), targets(1));
        let serve = |kind, completion_tokens| {
            let mut sent = outlook.sent(&stream(&text(kind, 4), 0.0), &targets[0]);
            sent.told(&Told { completion_tokens: Some(completion_tokens), ..told(64, 0) });
        };
        serve(1, 0);
        serve(2, 64);
        assert_eq!(matched(&outlook, &text(1, 8), &targets), [32]);
        assert_eq!(matched(&outlook, &text(2, 8), &targets), [64]);
    }

    #[test]
    fn what_is_forgotten_is_gone_and_so_is_who_has_left() {
        let (outlook, mut targets) = (outlook(), targets(2));
        for target in &targets {
            outlook.sent(&stream(&text(1, 40), 0.0), target).begun(1.0);
        }
        let held = outlook.sent(&stream(&text(2, 40), 5.0), &targets[0]);
        outlook.forget(0);
        assert_eq!(matched(&outlook, &text(1, 80), &targets), [0, 640]);
        assert_eq!(pending(&outlook, &targets, 5.0), [640, 0]);
        drop(held);
        assert_eq!(pending(&outlook, &targets, 5.0), [0, 0]);
        targets.pop();
        outlook.forget(1);
        assert_eq!(outlook.state.read().workers.0.len(), 1);
        outlook.forget(77);
    }
}
