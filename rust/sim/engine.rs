//! The simulated engine: when each request gets its tokens, on a clock that is an argument.
//!
//! The model of time:
//! - requests wait first come, first served for one of `max_running` places;
//! - prefill: one request at a time, at `prefill_rate` tokens a second, for the prompt's tokens
//!   that are not in the [`KvCache`]. At least one token is always computed. The first token of the
//!   answer comes when prefill ends; the prompt is cached from then on, the answer when the request
//!   ends;
//! - decode: all decoding requests advance together, one step each in `step_base + step_per_seq ×
//!   running` seconds, where `running` counts the requests that hold a place. A request of n tokens
//!   takes n steps, and its k-th token (k > 1) comes with step k.
//!
//! The one idea: as all decoding requests advance at the same rate, one *decode clock*, counted in
//! steps, serves them all. A request that starts at step s ends at step s + n whatever happens in
//! between, so the order of endings is a sorted set and only the rate of the clock changes. Work is
//! per request, not per token.
//!
//! Times are seconds as `f64`, counted from 0; one that is earlier than the last changes nothing.
//! The engine does not sleep, draw random numbers, or know HTTP; requests' private memory does not
//! compete with the cache.

use std::cmp::Ordering;
use std::collections::BTreeSet;

use hashbrown::HashMap;

use super::kv_cache::KvCache;

/// Steps within which a token counts as made: far below a step, far above the clock's rounding
/// error.
const STEP_TOLERANCE: f64 = 1e-6;
/// Endings on the decode clock are whole multiples of this part of a step, and one that is not later than a prefill's by
/// as many seconds comes before it: what happens at the same time has an order, whatever the rounding error.
const SAME_TIME: f64 = 1.0 / (1 << 30) as f64;

/// How fast and how large the simulated worker is.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Uncached prompt tokens per second, over 0.
    pub prefill_rate: f64,
    /// Seconds of one decode step, over 0.
    pub step_base_secs: f64,
    /// Seconds added to a decode step by each running request, at least 0.
    pub step_per_seq_secs: f64,
    /// Tokens that the KV cache holds.
    pub kv_tokens: usize,
    /// Requests in prefill and decode together, at least 1; the others wait.
    pub max_running: usize,
    /// Tokens per page of the KV cache, at least 1.
    pub page_tokens: usize,
}

/// A request as the engine sees it.
#[derive(Clone, Debug, Default)]
pub struct Sequence {
    /// Names of the whole pages of prompt and answer together (see [`super::kv_cache::chain`]).
    /// Those of the answer may be missing: then only the prompt is cached.
    pub pages: Vec<u64>,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens to generate; 0 ends with prefill.
    pub output_tokens: usize,
}

/// Names a request of one engine; grows with each submission.
pub type Id = u64;

/// What happened to a request, at which second.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Prefill ended and the first token is there.
    Prefilled {
        /// The request.
        id: Id,
        /// When, in seconds.
        at: f64,
        /// Prompt tokens found in the cache.
        cached_tokens: usize,
        /// Seconds from submission to the start of prefill.
        queue_secs: f64,
    },
    /// All tokens are there and the place is free again.
    Finished {
        /// The request.
        id: Id,
        /// When, in seconds.
        at: f64,
    },
}

/// How busy an engine is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Requests in prefill or decode.
    pub running: usize,
    /// Requests without a place yet.
    pub waiting: usize,
    /// Prompt and generated tokens of all of them.
    pub tokens: usize,
}

/// A point on the decode clock, in steps.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Steps(f64);

impl Steps {
    fn rounded(steps: f64) -> Self {
        Self((steps / SAME_TIME).round() * SAME_TIME)
    }
}

impl Eq for Steps {}

impl Ord for Steps {
    fn cmp(&self, other: &Self) -> Ordering {
        self.0.total_cmp(&other.0)
    }
}

impl PartialOrd for Steps {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

#[derive(Debug)]
struct Request {
    sequence: Sequence,
    submitted_at: f64,
    /// Where on the decode clock it ends; set when prefill ends.
    ends: Option<Steps>,
}

#[derive(Clone, Copy, Debug)]
struct Prefill {
    id: Id,
    ends_at: f64,
    cached_tokens: usize,
    queue_secs: f64,
}

/// One simulated worker's engine. Holds what was submitted and has not ended; the caller bounds how
/// much it submits.
#[derive(Debug)]
pub struct Engine {
    config: Config,
    now: f64,
    next_id: Id,
    requests: HashMap<Id, Request>,
    /// Ids grow, so their order is the order of arrival.
    waiting: BTreeSet<Id>,
    prefill: Option<Prefill>,
    /// The first to end first; at most `max_running`.
    decoding: BTreeSet<(Steps, Id)>,
    /// The decode clock. Starts over whenever nothing decodes, which keeps it exact for ever.
    clock: f64,
    cache: KvCache,
    max_running_seen: usize,
}

impl Engine {
    /// An idle engine with an empty cache, at second 0.
    pub fn new(config: Config) -> Self {
        let cache = KvCache::new(config.kv_tokens / config.page_tokens.max(1));
        Self {
            config,
            now: 0.0,
            next_id: 0,
            requests: HashMap::new(),
            waiting: BTreeSet::new(),
            prefill: None,
            decoding: BTreeSet::new(),
            clock: 0.0,
            cache,
            max_running_seen: 0,
        }
    }

    /// Adds a request at the engine's own now: the time of the last [`Engine::advance`].
    pub fn submit(&mut self, sequence: Sequence) -> Id {
        let id = self.next_id;
        self.next_id += 1;
        self.requests.insert(id, Request { sequence, submitted_at: self.now, ends: None });
        self.waiting.insert(id);
        self.start_prefill();
        id
    }

    /// Takes a request out, at the engine's own now. Nothing more is heard of it. Returns whether
    /// it was there.
    pub fn cancel(&mut self, id: Id) -> bool {
        let Some(request) = self.requests.remove(&id) else {
            return false;
        };
        if let Some(ends) = request.ends {
            self.decoding.remove(&(ends, id));
        } else if self.prefill.is_some_and(|prefill| prefill.id == id) {
            self.prefill = None;
        } else {
            self.waiting.remove(&id);
        }
        self.start_prefill();
        true
    }

    /// When the next [`Event`] happens if nothing is submitted or cancelled before; `None` when
    /// idle.
    pub fn next_event(&self) -> Option<f64> {
        let prefilled = self.prefill.map(|prefill| prefill.ends_at);
        let finished = self.first_ending().map(|(at, _, _)| at);
        earlier(prefilled, finished)
    }

    /// When the next token of any decoding request is made; `None` when none decodes. O(running).
    pub fn next_token(&self) -> Option<f64> {
        let steps = self.decoding.iter().map(|(ends, _)| {
            let left = ends.0 - self.clock;
            left - (left - STEP_TOLERANCE).ceil() + 1.0
        });
        steps.min_by(f64::total_cmp).map(|steps| self.now + steps * self.step_secs())
    }

    /// Moves the clock to `to` (if that is later than now) and appends what happened, in order, to
    /// `events`.
    pub fn advance(&mut self, to: f64, events: &mut Vec<Event>) {
        while let Some(at) = self.next_event().filter(|at| *at <= to) {
            // Before the clock moves: rounding must not make the two endings change places.
            let finished = self.first_ending().filter(|(ending, _, _)| *ending <= at + SAME_TIME);
            self.move_to(at);
            events.push(match finished {
                Some((_, ends, id)) => self.finish_decode(ends, id),
                None => self.finish_prefill(),
            });
        }
        self.move_to(to);
    }

    /// Decoding requests with the tokens each has made so far, at most `max_running`.
    pub fn decoding(&self) -> impl Iterator<Item = (Id, usize)> + '_ {
        self.decoding.iter().map(|&(ends, id)| (id, self.made(ends, id)))
    }

    /// Requests in prefill or decode.
    pub fn running(&self) -> usize {
        self.decoding.len() + usize::from(self.prefill.is_some())
    }

    /// The most requests that ran at the same time.
    pub fn max_running_seen(&self) -> usize {
        self.max_running_seen
    }

    /// How busy the engine is now. O(requests).
    pub fn load(&self) -> Load {
        let prompts: usize = self.requests.values().map(|r| r.sequence.prompt_tokens).sum();
        let made: usize = self.decoding().map(|(_, made)| made).sum();
        let (running, waiting) = (self.running(), self.waiting.len());
        Load { running, waiting, tokens: prompts + made }
    }

    /// Empties the KV cache; requests go on.
    pub fn flush_cache(&mut self) {
        self.cache.clear();
    }

    /// Tokens in the KV cache.
    pub fn cached_tokens(&self) -> usize {
        self.cache.len() * self.config.page_tokens
    }

    /// Prompt tokens that a request for these pages would find cached.
    pub fn matching_tokens(&self, pages: &[u64]) -> usize {
        self.cache.matching(pages) * self.config.page_tokens
    }

    fn step_secs(&self) -> f64 {
        self.config.step_base_secs + self.config.step_per_seq_secs * self.running() as f64
    }

    fn first_ending(&self) -> Option<(f64, Steps, Id)> {
        let &(ends, id) = self.decoding.first()?;
        let left = (ends.0 - self.clock).max(0.0);
        Some((self.now + left * self.step_secs(), ends, id))
    }

    fn made(&self, ends: Steps, id: Id) -> usize {
        let total = self.requests[&id].sequence.output_tokens;
        let left = (ends.0 - self.clock - STEP_TOLERANCE).ceil().max(1.0) as usize;
        total.saturating_sub(left).max(1)
    }

    fn move_to(&mut self, to: f64) {
        if to <= self.now {
            return;
        }
        if self.decoding.is_empty() {
            self.clock = 0.0;
        } else {
            self.clock += (to - self.now) / self.step_secs();
        }
        self.now = to;
    }

    fn start_prefill(&mut self) {
        if self.prefill.is_some() || self.running() >= self.config.max_running.max(1) {
            return;
        }
        let Some(id) = self.waiting.pop_first() else {
            return;
        };
        let Request { sequence, submitted_at, .. } = &self.requests[&id];
        let found = self.matching_tokens(&sequence.pages);
        let cached_tokens = found.min(sequence.prompt_tokens.saturating_sub(1));
        let uncached = sequence.prompt_tokens - cached_tokens;
        self.prefill = Some(Prefill {
            id,
            ends_at: self.now + uncached as f64 / self.config.prefill_rate,
            cached_tokens,
            queue_secs: self.now - submitted_at,
        });
        self.max_running_seen = self.max_running_seen.max(self.running());
    }

    fn finish_prefill(&mut self) -> Event {
        let prefill = self.prefill.take().expect("the next event is the end of a prefill");
        let Prefill { id, cached_tokens, queue_secs, .. } = prefill;
        let request = self.requests.get_mut(&id).expect("a request in prefill is held");
        let Sequence { pages, prompt_tokens, output_tokens } = &request.sequence;
        let whole_pages = prompt_tokens / self.config.page_tokens.max(1);
        self.cache.insert(&pages[..whole_pages.min(pages.len())]);
        let ends = Steps::rounded(self.clock + *output_tokens as f64);
        request.ends = Some(ends);
        self.decoding.insert((ends, id));
        self.start_prefill();
        Event::Prefilled { id, at: self.now, cached_tokens, queue_secs }
    }

    fn finish_decode(&mut self, ends: Steps, id: Id) -> Event {
        self.clock = ends.0;
        self.decoding.remove(&(ends, id));
        if let Some(request) = self.requests.remove(&id) {
            self.cache.insert(&request.sequence.pages);
        }
        self.start_prefill();
        Event::Finished { id, at: self.now }
    }
}

fn earlier(a: Option<f64>, b: Option<f64>) -> Option<f64> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}

#[cfg(test)]
mod tests {
    use super::super::kv_cache::chain;
    use super::*;
    use proptest::prelude::*;

    fn config() -> Config {
        Config {
            prefill_rate: 100.0,
            step_base_secs: 0.5,
            step_per_seq_secs: 0.25,
            kv_tokens: 1000,
            max_running: 4,
            page_tokens: 1,
        }
    }

    /// A request whose prompt is `prompt_tokens` tokens of the family `kind`.
    fn sequence(kind: u64, prompt_tokens: usize, output_tokens: usize) -> Sequence {
        let length = (prompt_tokens + output_tokens) as u64;
        let pages = chain((0..length).map(|token| kind << 32 | token));
        Sequence { pages, prompt_tokens, output_tokens }
    }

    fn run(engine: &mut Engine) -> Vec<Event> {
        let mut events = Vec::new();
        while let Some(at) = engine.next_event() {
            engine.advance(at, &mut events);
        }
        events
    }

    fn prefilled(id: Id, at: f64, cached_tokens: usize, queue_secs: f64) -> Event {
        Event::Prefilled { id, at, cached_tokens, queue_secs }
    }

    #[test]
    fn one_request_takes_its_prefill_and_one_step_a_token() {
        let mut engine = Engine::new(config());
        let id = engine.submit(sequence(1, 200, 4));
        assert_eq!(run(&mut engine), [prefilled(id, 2.0, 0, 0.0), Event::Finished { id, at: 5.0 }]);
        assert_eq!(engine.load(), Load::default());
        assert_eq!(engine.cached_tokens(), 204);
    }

    #[test]
    fn prefill_is_one_at_a_time_and_decode_slows_with_company() {
        let mut engine = Engine::new(config());
        let first = engine.submit(sequence(1, 100, 2));
        let second = engine.submit(sequence(2, 100, 2));
        // From 1 s to 2 s the second is in prefill: steps of 1 s. At 2 s both decode: steps of 1 s;
        // from 3 s the second is alone: 0.75 s a step.
        let expected = [
            prefilled(first, 1.0, 0, 0.0),
            prefilled(second, 2.0, 0, 1.0),
            Event::Finished { id: first, at: 3.0 },
            Event::Finished { id: second, at: 3.75 },
        ];
        assert_eq!(run(&mut engine), expected);
    }

    #[test]
    fn those_above_max_running_wait_in_order() {
        let mut engine = Engine::new(Config { max_running: 1, ..config() });
        let ids: Vec<_> = (0..3).map(|kind| engine.submit(sequence(kind, 100, 4))).collect();
        assert_eq!((engine.load().running, engine.load().waiting), (1, 2));
        let ends: Vec<_> = run(&mut engine)
            .into_iter()
            .filter_map(|event| match event {
                Event::Finished { id, at } => Some((id, at)),
                Event::Prefilled { .. } => None,
            })
            .collect();
        assert_eq!(ends, [(ids[0], 4.0), (ids[1], 8.0), (ids[2], 12.0)]);
        assert_eq!(engine.max_running_seen(), 1);
    }

    #[test]
    fn a_repeated_prompt_computes_one_token() {
        let mut engine = Engine::new(config());
        engine.submit(sequence(1, 100, 1));
        run(&mut engine);
        engine.submit(sequence(1, 100, 1));
        assert!(matches!(run(&mut engine)[0], Event::Prefilled { cached_tokens: 99, .. }));
        engine.flush_cache();
        engine.submit(sequence(1, 100, 1));
        assert!(matches!(run(&mut engine)[0], Event::Prefilled { cached_tokens: 0, .. }));
    }

    #[test]
    fn the_answer_is_cached_for_the_next_turn() {
        let mut engine = Engine::new(config());
        engine.submit(sequence(1, 100, 20));
        run(&mut engine);
        engine.submit(sequence(1, 150, 1));
        assert!(matches!(run(&mut engine)[0], Event::Prefilled { cached_tokens: 120, .. }));
    }

    #[test]
    fn tokens_come_one_a_step_after_the_first() {
        let mut engine = Engine::new(config());
        let id = engine.submit(sequence(1, 100, 4));
        let mut seen = Vec::new();
        let mut events = Vec::new();
        while let Some(at) = earlier(engine.next_event(), engine.next_token()) {
            engine.advance(at, &mut events);
            seen.extend(engine.decoding().map(|(_, made)| (at, made)));
        }
        assert_eq!(seen, [(1.0, 1), (1.75, 1), (2.5, 2), (3.25, 3)]);
        assert_eq!(events[1], Event::Finished { id, at: 4.0 });
    }

    #[test]
    fn no_tokens_to_generate_ends_with_prefill() {
        let mut engine = Engine::new(config());
        let id = engine.submit(sequence(1, 100, 0));
        assert_eq!(run(&mut engine), [prefilled(id, 1.0, 0, 0.0), Event::Finished { id, at: 1.0 }]);
    }

    #[test]
    fn cancelling_frees_the_place_at_once() {
        let mut engine = Engine::new(Config { max_running: 2, ..config() });
        let ids: Vec<_> = (0..4).map(|kind| engine.submit(sequence(kind, 100, 1000))).collect();
        let mut events = Vec::new();
        engine.advance(1.5, &mut events);
        assert_eq!((engine.running(), engine.load().waiting), (2, 2));
        for id in [ids[2], ids[1], ids[0]] {
            assert!(engine.cancel(id));
            assert!(!engine.cancel(id));
        }
        assert_eq!((engine.running(), engine.load().waiting), (1, 0));
        assert_eq!(engine.next_event(), Some(2.5));
        assert!(engine.cancel(ids[3]));
        assert_eq!(engine.next_event(), None);
    }

    #[test]
    fn going_back_in_time_does_nothing() {
        let mut engine = Engine::new(config());
        let mut events = Vec::new();
        engine.advance(5.0, &mut events);
        let id = engine.submit(sequence(1, 100, 0));
        engine.advance(1.0, &mut events);
        assert!(events.is_empty());
        assert_eq!(run(&mut engine)[0], prefilled(id, 6.0, 0, 0.0));
    }

    /// The same model, token by token: every request keeps its own remaining work.
    #[derive(Default)]
    struct Naive {
        now: f64,
        waiting: Vec<(Id, f64, f64)>,
        prefill: Option<(Id, f64, f64)>,
        decoding: Vec<(Id, f64)>,
        ends: Vec<(Id, f64)>,
    }

    impl Naive {
        fn advance(&mut self, to: f64, config: &Config) {
            loop {
                let places = config.max_running - self.decoding.len();
                if self.prefill.is_none() && places > 0 && !self.waiting.is_empty() {
                    self.prefill = Some(self.waiting.remove(0));
                }
                let running = self.decoding.len() + usize::from(self.prefill.is_some());
                let step = config.step_base_secs + config.step_per_seq_secs * running as f64;
                let mut pause = (to - self.now).max(0.0);
                let mut due = false;
                for left in self
                    .decoding
                    .iter()
                    .map(|(_, steps)| steps * step)
                    .chain(self.prefill.iter().map(|(_, left, _)| *left))
                {
                    due |= left <= pause;
                    pause = pause.min(left);
                }
                self.now += pause;
                self.decoding.iter_mut().for_each(|(_, steps)| *steps -= pause / step);
                if let Some((_, left, _)) = &mut self.prefill {
                    *left -= pause;
                }
                if !due {
                    return;
                }
                if let Some(index) = self.decoding.iter().position(|(_, steps)| *steps < 1e-9) {
                    self.ends.push((self.decoding.remove(index).0, self.now));
                } else if let Some((id, _, steps)) =
                    self.prefill.take_if(|(_, left, _)| *left < 1e-9)
                {
                    self.decoding.push((id, steps));
                }
            }
        }

        fn cancel(&mut self, id: Id) {
            self.waiting.retain(|(i, ..)| *i != id);
            self.prefill.take_if(|(i, ..)| *i == id);
            self.decoding.retain(|(i, _)| *i != id);
        }
    }

    fn ends(events: &[Event]) -> Vec<(Id, f64)> {
        let mut ends: Vec<_> = events
            .iter()
            .filter_map(|event| match event {
                Event::Finished { id, at } => Some((*id, *at)),
                Event::Prefilled { .. } => None,
            })
            .collect();
        ends.sort_by_key(|(id, _)| *id);
        ends
    }

    #[test]
    fn endings_at_the_same_time_have_an_order() {
        let (mut lazy, mut eager) = (Engine::new(config()), Engine::new(config()));
        // The second and the third end together, and what the fifth finds cached depends on which goes first.
        for (kind, prompt_tokens, output_tokens) in
            [(2, 12, 6), (2, 107, 5), (0, 125, 4), (0, 1, 4), (0, 127, 0)]
        {
            lazy.submit(sequence(kind, prompt_tokens, output_tokens));
            eager.submit(sequence(kind, prompt_tokens, output_tokens));
        }
        let (mut once, mut often) = (Vec::new(), Vec::new());
        eager.advance(1.0949567475548518, &mut often);
        eager.advance(2.264406438065415, &mut often);
        lazy.advance(1e6, &mut once);
        eager.advance(1e6, &mut often);
        for (a, b) in ends(&once).iter().zip(&ends(&often)) {
            assert!(a.0 == b.0 && (a.1 - b.1).abs() < 1e-6, "{a:?} {b:?}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            failure_persistence: None,
            ..ProptestConfig::with_cases(200)
        })]

        #[test]
        fn agrees_with_the_naive_model(
            load in prop::collection::vec(
                (0.0f64..3.0, 1usize..300, 0usize..12, any::<bool>()),
                1..25,
            ),
            max_running in 1usize..5,
        ) {
            let config = Config { max_running, ..config() };
            let (mut engine, mut naive) = (Engine::new(config.clone()), Naive::default());
            let mut events = Vec::new();
            let mut now = 0.0;
            for (kind, (pause, prompt_tokens, output_tokens, cancels)) in (0..).zip(load) {
                now += pause;
                engine.advance(now, &mut events);
                naive.advance(now, &config);
                // Prompts of a family of their own: no cache hits to follow.
                let id = engine.submit(sequence(kind, prompt_tokens, output_tokens));
                let prefill_secs = prompt_tokens as f64 / config.prefill_rate;
                naive.waiting.push((id, prefill_secs, output_tokens as f64));
                if cancels {
                    engine.cancel(id / 2);
                    naive.cancel(id / 2);
                }
                prop_assert!(engine.running() <= max_running);
            }
            events.extend(run(&mut engine));
            naive.advance(1e9, &config);
            naive.ends.sort_by_key(|(id, _)| *id);
            let ends = ends(&events);
            prop_assert_eq!(ends.len(), naive.ends.len());
            for ((id, at), (naive_id, naive_at)) in ends.iter().zip(&naive.ends) {
                prop_assert_eq!(id, naive_id);
                prop_assert!((at - naive_at).abs() < 1e-6, "{id}: {at} instead of {naive_at}");
            }
        }

        #[test]
        fn how_often_it_is_asked_changes_nothing(
            load in prop::collection::vec((0u64..4, 1usize..200, 0usize..9), 1..20),
            looks in prop::collection::vec(0.0f64..2.0, 0..60),
        ) {
            let (mut lazy, mut eager) = (Engine::new(config()), Engine::new(config()));
            for (kind, prompt_tokens, output_tokens) in load {
                lazy.submit(sequence(kind, prompt_tokens, output_tokens));
                eager.submit(sequence(kind, prompt_tokens, output_tokens));
            }
            let (mut once, mut often, mut now) = (Vec::new(), Vec::new(), 0.0);
            for pause in looks {
                now += pause;
                eager.advance(now, &mut often);
            }
            lazy.advance(1e6, &mut once);
            eager.advance(1e6, &mut often);
            prop_assert_eq!(ends(&once).len(), ends(&often).len());
            for (a, b) in ends(&once).iter().zip(&ends(&often)) {
                prop_assert!(a.0 == b.0 && (a.1 - b.1).abs() < 1e-6);
            }
        }
    }
}
