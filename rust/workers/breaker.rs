//! Whether requests may go to a worker: a circuit breaker, without a clock or a network.
//!
//! ```text
//! closed ──failure_threshold failures in a row within the window──▶ open
//!   ▲                                                             ▲   │ after the timeout
//!   │                                           any failure       │   ▼
//!   └──────────── success_threshold probes answered ──────────── half-open, one probe at a time
//! ```
//!
//! A failure is an attempt that got no answer, an answer that broke off, or a server error. What a client did wrong
//! (4xx) and what a client gave up count for nothing. A worker that says that it is full (429, 503) is alive: it is
//! only avoided for a moment, and not even that while there is no other.
//!
//! The pattern is M. Nygard's, *Release It!* (2007), with probes one at a time.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Options of the breakers, one per worker.
#[derive(clap::Args, Clone, Copy, Debug)]
#[group(skip)]
pub struct Options {
    /// Failures in a row, all within cb_window_duration_secs, that open a worker's circuit breaker
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub cb_failure_threshold: u32,

    /// Answered probes that close a half-open circuit breaker
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub cb_success_threshold: u32,

    /// Seconds a circuit breaker stays open before it lets a probe through
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub cb_timeout_duration_secs: u64,

    /// Seconds within which failures add up
    #[arg(long, default_value_t = 120, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub cb_window_duration_secs: u64,

    /// Let requests through to a worker however often it has failed
    #[arg(long, default_value_t = false, num_args = 0..=1, default_missing_value = "true", action = clap::ArgAction::Set, value_parser = clap::builder::BoolishValueParser::new())]
    pub disable_circuit_breaker: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    Closed,
    Open,
    HalfOpen,
}

impl State {
    pub const fn name(self) -> &'static str {
        match self {
            State::Closed => "closed",
            State::Open => "open",
            State::HalfOpen => "half_open",
        }
    }
}

/// How an attempt at a worker ended, as far as its breaker is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Success,
    Failure,
    /// The worker is full, and asked to be left alone for this long.
    Pressure(Duration),
    /// Says nothing of the worker.
    Neutral,
}

/// Whether a worker may be picked now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fitness {
    Fit,
    /// Only if there is no other.
    Avoided,
    Barred,
}

/// One attempt's way through the breaker.
#[derive(Debug)]
pub struct Ticket {
    /// Of the breaker's life: what was begun before a restart of the worker counts for nothing after it.
    era: u32,
    is_probe: bool,
}

#[derive(Debug)]
pub struct Breaker {
    options: Options,
    state: State,
    era: u32,
    /// Times of the latest failures in a row; at most `cb_failure_threshold`.
    failures: VecDeque<Instant>,
    /// Answered probes since it was half-open.
    successes: u32,
    is_probing: bool,
    opened_at: Option<Instant>,
    avoided_until: Option<Instant>,
}

impl Breaker {
    pub fn new(options: Options) -> Self {
        Self {
            options,
            state: State::Closed,
            era: 0,
            failures: VecDeque::new(),
            successes: 0,
            is_probing: false,
            opened_at: None,
            avoided_until: None,
        }
    }

    pub fn state(&self) -> State {
        self.state
    }

    /// Failures in a row that count now.
    pub fn consecutive_failures(&self) -> u32 {
        self.failures.len() as u32
    }

    /// Answered probes in a row.
    pub fn consecutive_successes(&self) -> u32 {
        self.successes
    }

    /// Whether the answer to [`Breaker::fitness`] may be another than [`Fitness::Fit`].
    pub fn is_limiting(&self) -> bool {
        self.state != State::Closed || self.avoided_until.is_some()
    }

    pub fn fitness(&mut self, now: Instant) -> Fitness {
        let is_barred = match self.state {
            State::Closed => false,
            // A probe may still be out that another failure has overtaken.
            State::Open => self.is_probing || !self.has_waited(now),
            State::HalfOpen => self.is_probing,
        };
        self.avoided_until = self.avoided_until.filter(|until| now < *until);
        match (is_barred, self.avoided_until) {
            (true, _) => Fitness::Barred,
            (false, Some(_)) => Fitness::Avoided,
            (false, None) => Fitness::Fit,
        }
    }

    /// Lets an attempt through; None if it may not.
    pub fn begin(&mut self, now: Instant) -> Option<Ticket> {
        if self.fitness(now) == Fitness::Barred {
            return None;
        }
        let is_probe = self.state != State::Closed;
        if is_probe {
            self.enter(State::HalfOpen);
            self.is_probing = true;
        }
        Some(Ticket { era: self.era, is_probe })
    }

    /// The worker has begun to answer, and not with an error. A probe has done its work with this: an answer may
    /// go on for minutes.
    pub fn answered(&mut self, ticket: &mut Ticket) {
        if !self.takes_back(ticket) {
            return;
        }
        self.successes += 1;
        if self.successes >= self.options.cb_success_threshold {
            self.close();
        }
    }

    /// The attempt has ended.
    pub fn ended(&mut self, mut ticket: Ticket, outcome: Outcome, now: Instant) {
        if ticket.era != self.era {
            return;
        }
        match outcome {
            Outcome::Success => {
                self.answered(&mut ticket);
                if self.state == State::Closed {
                    self.failures.clear();
                }
            }
            Outcome::Failure => self.failed(&mut ticket, now),
            Outcome::Pressure(pause) => {
                self.takes_back(&mut ticket);
                self.avoided_until = self.avoided_until.max(Some(now + pause));
            }
            Outcome::Neutral => {
                self.takes_back(&mut ticket);
            }
        }
    }

    /// The worker is another process now.
    pub fn reset(&mut self) {
        self.era = self.era.wrapping_add(1);
        self.avoided_until = None;
        self.close();
    }

    fn failed(&mut self, ticket: &mut Ticket, now: Instant) {
        self.takes_back(ticket);
        if self.options.disable_circuit_breaker {
            return;
        }
        let threshold = self.options.cb_failure_threshold as usize;
        let window = Duration::from_secs(self.options.cb_window_duration_secs);
        self.failures.retain(|at| now.saturating_duration_since(*at) < window);
        if self.failures.len() == threshold {
            self.failures.pop_front();
        }
        self.failures.push_back(now);
        match self.state {
            State::Closed if self.failures.len() == threshold => self.open(now),
            State::HalfOpen => self.open(now),
            State::Closed | State::Open => {}
        }
    }

    /// Ends a probe. False if the ticket is none, or no more.
    fn takes_back(&mut self, ticket: &mut Ticket) -> bool {
        let was_probe = std::mem::take(&mut ticket.is_probe) && ticket.era == self.era;
        if was_probe {
            self.is_probing = false;
        }
        was_probe && self.state == State::HalfOpen
    }

    fn has_waited(&self, now: Instant) -> bool {
        let timeout = Duration::from_secs(self.options.cb_timeout_duration_secs);
        self.opened_at.is_none_or(|at| now.saturating_duration_since(at) >= timeout)
    }

    fn open(&mut self, now: Instant) {
        self.opened_at = Some(now);
        self.enter(State::Open);
    }

    fn close(&mut self) {
        self.failures.clear();
        self.is_probing = false;
        self.enter(State::Closed);
    }

    fn enter(&mut self, state: State) {
        if self.state != state {
            self.state = state;
            self.successes = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const OPTIONS: Options = Options {
        cb_failure_threshold: 3,
        cb_success_threshold: 2,
        cb_timeout_duration_secs: 60,
        cb_window_duration_secs: 120,
        disable_circuit_breaker: false,
    };

    /// A breaker and a clock that tests move.
    struct Bench {
        breaker: Breaker,
        now: Instant,
    }

    impl Bench {
        fn new() -> Self {
            Self { breaker: Breaker::new(OPTIONS), now: Instant::now() }
        }

        fn after(&mut self, secs: u64) -> &mut Self {
            self.now += Duration::from_secs(secs);
            self
        }

        fn attempt(&mut self, outcome: Outcome) -> &mut Self {
            let ticket = self.breaker.begin(self.now).expect("not barred");
            self.breaker.ended(ticket, outcome, self.now);
            self
        }

        fn opened() -> Self {
            let mut bench = Self::new();
            for _ in 0..3 {
                bench.attempt(Outcome::Failure);
            }
            assert_eq!(bench.breaker.state(), State::Open);
            bench
        }

        fn fitness(&mut self) -> Fitness {
            self.breaker.fitness(self.now)
        }
    }

    #[test]
    fn failures_in_a_row_open_it() {
        let mut bench = Bench::new();
        bench.attempt(Outcome::Failure).attempt(Outcome::Failure).attempt(Outcome::Success);
        bench.attempt(Outcome::Failure).attempt(Outcome::Failure);
        assert_eq!(bench.breaker.state(), State::Closed);
        bench.attempt(Outcome::Neutral).attempt(Outcome::Failure);
        assert_eq!(bench.breaker.state(), State::Open);
        assert_eq!(bench.fitness(), Fitness::Barred);
        assert!(bench.breaker.begin(bench.now).is_none());
    }

    #[test]
    fn failures_far_apart_do_not_add_up() {
        let mut bench = Bench::new();
        for _ in 0..10 {
            bench.attempt(Outcome::Failure).after(61);
        }
        assert_eq!(bench.breaker.state(), State::Closed);
        assert_eq!(bench.breaker.consecutive_failures(), 2);
    }

    #[test]
    fn pressure_is_a_short_avoidance_and_no_failure() {
        let mut bench = Bench::new();
        for _ in 0..10 {
            bench.attempt(Outcome::Pressure(Duration::from_secs(1)));
        }
        assert_eq!((bench.breaker.state(), bench.fitness()), (State::Closed, Fitness::Avoided));
        assert!(bench.breaker.is_limiting());
        assert_eq!(bench.after(1).fitness(), Fitness::Fit);
        assert!(!bench.breaker.is_limiting());
    }

    #[test]
    fn half_open_lets_one_probe_through_at_a_time() {
        let mut bench = Bench::opened();
        assert_eq!(bench.after(59).fitness(), Fitness::Barred);
        assert_eq!(bench.after(1).fitness(), Fitness::Fit);
        let mut probe = bench.breaker.begin(bench.now).expect("a probe");
        assert_eq!(bench.breaker.state(), State::HalfOpen);
        assert!(bench.breaker.begin(bench.now).is_none(), "one at a time");
        bench.breaker.answered(&mut probe);
        let second = bench.breaker.begin(bench.now).expect("the first has answered");
        bench.breaker.ended(second, Outcome::Neutral, bench.now);
        assert_eq!(bench.breaker.state(), State::HalfOpen, "nothing was learnt");
        bench.attempt(Outcome::Success);
        assert_eq!(bench.breaker.state(), State::Closed);
        bench.breaker.ended(probe, Outcome::Failure, bench.now);
        assert_eq!(bench.breaker.consecutive_failures(), 1, "it broke off after its beginning");
    }

    #[test]
    fn a_failed_probe_opens_it_again() {
        let mut bench = Bench::opened();
        bench.after(60).attempt(Outcome::Success).attempt(Outcome::Failure);
        assert_eq!(bench.breaker.state(), State::Open);
        assert_eq!(bench.after(59).fitness(), Fitness::Barred);
        bench.after(1).attempt(Outcome::Success).attempt(Outcome::Success);
        assert_eq!(bench.breaker.state(), State::Closed);
    }

    #[test]
    fn a_failure_that_overtakes_a_probe_does_not_let_a_second_one_through() {
        let mut bench = Bench::new();
        let early = bench.breaker.begin(bench.now).expect("closed");
        for _ in 0..3 {
            bench.attempt(Outcome::Failure);
        }
        bench.after(60);
        let probe = bench.breaker.begin(bench.now).expect("a probe");
        bench.breaker.ended(early, Outcome::Failure, bench.now);
        bench.after(60);
        assert!(bench.breaker.begin(bench.now).is_none(), "the probe is still out");
        bench.breaker.ended(probe, Outcome::Neutral, bench.now);
        assert!(bench.breaker.begin(bench.now).is_some());
    }

    #[test]
    fn what_began_before_it_opened_does_not_close_it() {
        let mut bench = Bench::new();
        let early = bench.breaker.begin(bench.now).expect("closed");
        for _ in 0..3 {
            bench.attempt(Outcome::Failure);
        }
        bench.breaker.ended(early, Outcome::Success, bench.now);
        assert_eq!(bench.breaker.state(), State::Open);
    }

    #[test]
    fn a_new_process_has_a_fresh_breaker() {
        let mut bench = Bench::new();
        let early = bench.breaker.begin(bench.now).expect("closed");
        for _ in 0..3 {
            bench.attempt(Outcome::Failure);
        }
        bench.breaker.reset();
        assert_eq!((bench.breaker.state(), bench.fitness()), (State::Closed, Fitness::Fit));
        bench.breaker.ended(early, Outcome::Failure, bench.now);
        assert_eq!(bench.breaker.consecutive_failures(), 0, "it failed at the old process");
    }

    #[test]
    fn disabled_it_never_opens() {
        let options = Options { disable_circuit_breaker: true, ..OPTIONS };
        let mut bench = Bench { breaker: Breaker::new(options), now: Instant::now() };
        for _ in 0..100 {
            bench.attempt(Outcome::Failure);
        }
        assert_eq!(bench.fitness(), Fitness::Fit);
    }

    proptest! {
        #[test]
        fn it_is_never_stuck_and_never_lets_two_probes_through(
            steps in prop::collection::vec((0..6_u8, 0..40_u64), 1..200)
        ) {
            let mut bench = Bench::new();
            let mut held: Vec<Ticket> = Vec::new();
            for (step, secs) in steps {
                bench.after(secs);
                let before = bench.breaker.state();
                match step {
                    0 | 1 => held.extend(bench.breaker.begin(bench.now)),
                    2 if held.is_empty() => bench.breaker.reset(),
                    _ => if !held.is_empty() {
                        let ticket = held.swap_remove(secs as usize % held.len());
                        let outcome = [
                            Outcome::Success,
                            Outcome::Failure,
                            Outcome::Pressure(Duration::from_secs(1)),
                            Outcome::Neutral,
                        ][usize::from(step) - 2];
                        bench.breaker.ended(ticket, outcome, bench.now);
                    },
                }
                prop_assert!(held.iter().filter(|ticket| ticket.is_probe).count() <= 1);
                prop_assert!(bench.breaker.failures.len() <= 3);
                if before == State::Open && bench.breaker.state() == State::Closed {
                    prop_assert_eq!(step, 2, "from open only through probes, or anew");
                }
            }
            for ticket in held.drain(..) {
                bench.breaker.ended(ticket, Outcome::Neutral, bench.now);
            }
            bench.after(60);
            prop_assert!(bench.breaker.begin(bench.now).is_some());
        }
    }
}
