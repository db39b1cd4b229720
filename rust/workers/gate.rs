//! A worker's breaker as requests meet it: shared, counted, and closed behind each attempt by `Drop`.
//!
//! The one idea: an attempt holds a [`Pass`]. However the attempt ends, also by being dropped, the breaker hears of
//! it once. While no breaker limits anything, which is nearly always, a pick does not look at them at all: one number
//! shared by all gates says so.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

use parking_lot::Mutex;

use super::breaker::{Breaker, Fitness, Options, Outcome, State, Ticket};

/// How many gates do not let every request through as if they were not there.
pub(super) type Limiting = Arc<AtomicUsize>;

#[derive(Debug)]
pub struct Gate {
    /// Whose it is, for the log.
    worker: Box<str>,
    inner: Mutex<Inner>,
    /// Whether it is counted in `limiting`.
    is_limiting: AtomicBool,
    limiting: Limiting,
}

#[derive(Debug)]
struct Inner {
    breaker: Breaker,
    counts: Counts,
}

/// What has passed since the worker joined.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    /// Indexed by the state before and the state after.
    pub transitions: [[u64; 3]; 3],
    pub successes: u64,
    pub failures: u64,
}

impl Gate {
    pub(super) fn new(worker: &str, options: Options, limiting: Limiting) -> Arc<Self> {
        let inner = Inner { breaker: Breaker::new(options), counts: Counts::default() };
        Arc::new(Self {
            worker: worker.into(),
            inner: Mutex::new(inner),
            is_limiting: AtomicBool::new(false),
            limiting,
        })
    }

    pub fn state(&self) -> State {
        self.inner.lock().breaker.state()
    }

    pub fn counts(&self) -> Counts {
        self.inner.lock().counts
    }

    /// Failures in a row, and answered probes in a row.
    pub fn streaks(&self) -> (u32, u32) {
        let inner = self.inner.lock();
        (inner.breaker.consecutive_failures(), inner.breaker.consecutive_successes())
    }

    pub fn fitness(&self, now: Instant) -> Fitness {
        self.change(|breaker| breaker.fitness(now))
    }

    /// Lets an attempt through; None if the breaker is open, or half-open with a probe on its way.
    pub fn begin(self: &Arc<Self>, now: Instant) -> Option<Pass> {
        let ticket = self.change(|breaker| breaker.begin(now))?;
        Some(Pass { gate: self.clone(), ticket: Some(ticket) })
    }

    /// The worker is another process now.
    pub fn reset(&self) {
        self.change(Breaker::reset);
    }

    /// Whether [`Gate::fitness`] may answer anything but fit.
    pub(super) fn is_limiting(&self) -> bool {
        self.is_limiting.load(Ordering::Acquire)
    }

    fn change<T>(&self, change: impl FnOnce(&mut Breaker) -> T) -> T {
        self.change_and_count(change, |_| {})
    }

    fn change_and_count<T>(
        &self,
        change: impl FnOnce(&mut Breaker) -> T,
        count: impl FnOnce(&mut Counts),
    ) -> T {
        let mut inner = self.inner.lock();
        count(&mut inner.counts);
        let before = inner.breaker.state();
        let outcome = change(&mut inner.breaker);
        let after = inner.breaker.state();
        let is_limiting = inner.breaker.is_limiting();
        if is_limiting != self.is_limiting() {
            self.is_limiting.store(is_limiting, Ordering::Release);
            if is_limiting {
                self.limiting.fetch_add(1, Ordering::AcqRel);
            } else {
                self.limiting.fetch_sub(1, Ordering::AcqRel);
            }
        }
        if before != after {
            inner.counts.transitions[before as usize][after as usize] += 1;
            let (worker, failures) = (&*self.worker, inner.breaker.consecutive_failures());
            drop(inner);
            match after {
                State::Open => tracing::warn!(worker, failures, "circuit breaker open"),
                State::HalfOpen => tracing::info!(worker, "circuit breaker half-open"),
                State::Closed => tracing::info!(worker, "circuit breaker closed"),
            }
        }
        outcome
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        if *self.is_limiting.get_mut() {
            self.limiting.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

/// One attempt's way through a worker's breaker. Dropped, it says nothing of the worker.
#[derive(Debug)]
#[must_use = "dropped, the attempt counts for nothing"]
pub struct Pass {
    gate: Arc<Gate>,
    /// None once the attempt has ended.
    ticket: Option<Ticket>,
}

impl Pass {
    /// The worker has begun to answer, and not with an error.
    pub fn answered(&mut self) {
        if let Some(ticket) = &mut self.ticket {
            self.gate.change(|breaker| breaker.answered(ticket));
        }
    }

    /// The attempt has ended; only the first word counts.
    pub fn ended(&mut self, outcome: Outcome, now: Instant) {
        let Some(ticket) = self.ticket.take() else { return };
        let count = |counts: &mut Counts| match outcome {
            Outcome::Success => counts.successes += 1,
            Outcome::Failure => counts.failures += 1,
            Outcome::Pressure(_) | Outcome::Neutral => {}
        };
        self.gate.change_and_count(|breaker| breaker.ended(ticket, outcome, now), count);
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        if self.ticket.is_some() {
            // The moment matters to failures alone.
            self.ended(Outcome::Neutral, Instant::now());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn gate(limiting: &Limiting) -> Arc<Gate> {
        let options = Options {
            cb_failure_threshold: 1,
            cb_success_threshold: 1,
            cb_timeout_duration_secs: 60,
            cb_window_duration_secs: 60,
            disable_circuit_breaker: false,
        };
        Gate::new("http://a:1", options, limiting.clone())
    }

    #[test]
    fn the_number_of_limiting_gates_is_exact_whatever_happens() {
        let limiting = Limiting::default();
        let (one, other) = (gate(&limiting), gate(&limiting));
        let now = Instant::now();
        one.begin(now).expect("closed").ended(Outcome::Failure, now);
        other.begin(now).expect("closed").ended(Outcome::Pressure(Duration::from_secs(1)), now);
        assert_eq!(limiting.load(Ordering::Relaxed), 2);
        assert_eq!(other.fitness(now + Duration::from_secs(2)), Fitness::Fit);
        assert_eq!(limiting.load(Ordering::Relaxed), 1);
        drop(one);
        assert_eq!(limiting.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_dropped_pass_frees_its_probe() {
        let limiting = Limiting::default();
        let gate = gate(&limiting);
        let now = Instant::now();
        gate.begin(now).expect("closed").ended(Outcome::Failure, now);
        assert!(gate.begin(now).is_none());
        let later = now + Duration::from_secs(60);
        drop(gate.begin(later).expect("a probe"));
        let mut probe = gate.begin(later).expect("free again");
        probe.answered();
        probe.ended(Outcome::Success, later);
        assert_eq!(gate.state(), State::Closed);
        let counts = gate.counts();
        assert_eq!((counts.successes, counts.failures), (1, 1));
        assert_eq!(counts.transitions, [[0, 1, 0], [0, 0, 1], [1, 0, 0]]);
        assert_eq!(limiting.load(Ordering::Relaxed), 0);
    }
}
