//! How many requests are let in: a true cap on those in flight, a rate, and a bounded queue in order of arrival.
//!
//! A request that may not go on at once takes a place in the queue. Slots are handed on in order of arrival. With a
//! rate, one of the waiting has the *turn*: only it waits for the rate and then for a slot, so that the others follow
//! in the order they came. All of it is held by guards: a client that leaves gives back its place, its turn or its slot.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use crate::error::{Error, Kind};

#[derive(clap::Args, Clone, Debug)]
#[group(skip)]
pub struct Options {
    /// Most routed requests in flight at once, -1 for no limit; others wait in the queue
    #[arg(long, default_value_t = -1, allow_negative_numbers = true, value_parser = parse_limit)]
    pub max_concurrent_requests: i64,

    /// Most requests that wait to be let in; the next one is refused with 429
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(0..=10_000_000))]
    pub queue_size: u32,

    /// Seconds a request may wait before a worker is picked for it; then it is refused with 408
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(0..=86_400))]
    pub queue_timeout_secs: u64,

    /// Most routed requests let in per second, with bursts of up to a second's worth; others wait in the queue [default: no limit]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    pub rate_limit_tokens_per_second: Option<u32>,
}

const LIMIT_MAX: i64 = 10_000_000;

fn parse_limit(text: &str) -> Result<i64, String> {
    match text.parse() {
        Ok(-1) => Ok(-1),
        Ok(limit) if (1..=LIMIT_MAX).contains(&limit) => Ok(limit),
        _ => Err(format!("not a whole number in 1..={LIMIT_MAX}, nor -1 for no limit")),
    }
}

impl Options {
    fn limit(&self) -> Option<usize> {
        usize::try_from(self.max_concurrent_requests).ok()
    }

    pub(super) fn queue_timeout(&self) -> Duration {
        Duration::from_secs(self.queue_timeout_secs)
    }
}

pub(super) struct Admission {
    slots: Option<Arc<Semaphore>>,
    rate: Option<Rate>,
    /// One permit, handed on in order of arrival.
    turn: Semaphore,
    waiting: AtomicUsize,
    queue_size: usize,
    #[cfg(test)]
    limit: Option<usize>,
}

/// A request's right to be in flight; dropping it lets the next one in.
#[derive(Debug)]
#[must_use = "the slot is taken only while this is held"]
pub(super) struct Slot(
    #[expect(dead_code, reason = "held for its drop")] Option<OwnedSemaphorePermit>,
);

impl Admission {
    pub(super) fn new(options: &Options) -> Self {
        Self {
            slots: options.limit().map(|limit| Arc::new(Semaphore::new(limit))),
            rate: options.rate_limit_tokens_per_second.map(Rate::new),
            turn: Semaphore::new(1),
            waiting: AtomicUsize::new(0),
            queue_size: options.queue_size as usize,
            #[cfg(test)]
            limit: options.limit(),
        }
    }

    /// Requests in the queue.
    pub(super) fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    /// Lets a request in, when it is its turn. The caller bounds how long that may take.
    ///
    /// # Errors
    /// `queue_full` if it would have to wait and there is no place to.
    pub(super) async fn enter(&self) -> Result<Slot, Error> {
        if self.slots.is_none() && self.rate.is_none() {
            return Ok(Slot(None));
        }
        if let Some(slot) = self.enter_at_once() {
            return Ok(slot);
        }
        let _place = self.queue_up()?;
        // Neither semaphore is ever closed.
        let mut _turn = None;
        if let Some(rate) = &self.rate {
            _turn = self.turn.acquire().await.ok();
            while let Err(at) = rate.take(Instant::now()) {
                tokio::time::sleep_until(at).await;
            }
        }
        Ok(Slot(match &self.slots {
            Some(slots) => slots.clone().acquire_owned().await.ok(),
            None => None,
        }))
    }

    /// Lets a request in that finds a free slot, which those who wait for one are given first, and the rate not used up.
    fn enter_at_once(&self) -> Option<Slot> {
        if self.rate.is_some() && self.waiting() > 0 {
            return None;
        }
        let slot = match &self.slots {
            Some(slots) => Some(slots.clone().try_acquire_owned().ok()?),
            None => None,
        };
        if let Some(rate) = &self.rate {
            rate.take(Instant::now()).ok()?;
        }
        Some(Slot(slot))
    }

    #[cfg(test)]
    pub(super) fn assert_idle(&self) {
        assert_eq!(self.waiting(), 0, "requests in the queue");
        assert_eq!(self.turn.available_permits(), 1, "the turn");
        let free = self.slots.as_ref().map(|slots| slots.available_permits());
        assert_eq!(free, self.limit, "free slots");
    }

    fn queue_up(&self) -> Result<Place<'_>, Error> {
        let has_place = |waiting: usize| (waiting < self.queue_size).then_some(waiting + 1);
        match self.waiting.fetch_update(Ordering::Relaxed, Ordering::Relaxed, has_place) {
            Ok(_) => Ok(Place(&self.waiting)),
            Err(waiting) => {
                let message = format!(
                    "the router is full and {waiting} requests wait already (max_concurrent_requests, \
                     rate_limit_tokens_per_second, queue_size); try again later"
                );
                Err(Error::new(Kind::QueueFull, message))
            }
        }
    }
}

/// A place in the queue.
struct Place<'a>(&'a AtomicUsize);

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// So many a second, with bursts of up to a second's worth: the generic cell rate algorithm (ITU-T I.371).
struct Rate {
    interval: Duration,
    /// How far arrivals may be ahead of their time.
    tolerance: Duration,
    /// When the next would arrive if all came evenly.
    expected: Mutex<Option<Instant>>,
}

impl Rate {
    fn new(per_second: u32) -> Self {
        let interval = Duration::from_secs(1) / per_second;
        Self { interval, tolerance: Duration::from_secs(1) - interval, expected: Mutex::new(None) }
    }

    /// Takes one, or says when there will be one.
    fn take(&self, now: Instant) -> Result<(), Instant> {
        let mut expected = self.expected.lock();
        let due = expected.map_or(now, |expected| expected.max(now));
        let earliest = due.checked_sub(self.tolerance).unwrap_or(now);
        if now < earliest {
            return Err(earliest);
        }
        *expected = Some(due + self.interval);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;
    use std::pin::pin;

    fn admission(limit: i64, queue_size: u32, rate: Option<u32>) -> Admission {
        Admission::new(&Options {
            max_concurrent_requests: limit,
            queue_size,
            queue_timeout_secs: 60,
            rate_limit_tokens_per_second: rate,
        })
    }

    fn is_full(entered: Result<Slot, Error>) -> bool {
        matches!(entered, Err(error) if error.kind == Kind::QueueFull)
    }

    #[tokio::test(start_paused = true)]
    async fn the_cap_holds_and_the_queue_is_served_in_order() {
        let admission = admission(1, 2, None);
        let first = admission.enter().await.expect("a slot");
        let mut second = pin!(admission.enter());
        let mut third = pin!(admission.enter());
        assert!(second.as_mut().now_or_never().is_none());
        assert!(third.as_mut().now_or_never().is_none());
        assert_eq!(admission.waiting(), 2);
        assert!(is_full(admission.enter().await));
        drop(first);
        assert!(third.as_mut().now_or_never().is_none(), "not before its turn");
        let slot = second.await.expect("the next in turn");
        assert!(third.as_mut().now_or_never().is_none(), "a cap of one");
        drop(slot);
        let _slot = third.await.expect("the last");
        assert_eq!(admission.waiting(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn who_leaves_the_queue_gives_back_place_and_turn() {
        let admission = admission(1, 2, None);
        let first = admission.enter().await.expect("a slot");
        {
            let mut leaving = pin!(admission.enter());
            assert!(leaving.as_mut().now_or_never().is_none());
        }
        assert_eq!(admission.waiting(), 0);
        let mut next = pin!(admission.enter());
        assert!(next.as_mut().now_or_never().is_none());
        drop(first);
        let _slot = next.await.expect("the turn was given back");
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_queue_nobody_waits() {
        let admission = admission(2, 0, None);
        let slots = [admission.enter().await, admission.enter().await];
        assert!(slots.iter().all(Result::is_ok));
        assert!(is_full(admission.enter().await));
        drop(slots);
        assert!(admission.enter().await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn the_rate_allows_a_burst_of_a_second_and_then_so_many_a_second() {
        let admission = admission(-1, 1000, Some(10));
        let began = Instant::now();
        for _ in 0..10 {
            drop(admission.enter().await.expect("burst"));
        }
        assert_eq!(began.elapsed(), Duration::ZERO);
        for _ in 0..20 {
            drop(admission.enter().await.expect("in turn"));
        }
        let took = began.elapsed().as_millis();
        assert!((2000..2050).contains(&took), "20 at 10 a second took {took} ms");
    }

    #[tokio::test(start_paused = true)]
    async fn a_thousand_tasks_never_exceed_the_cap() {
        let admission = Arc::new(admission(7, 1000, None));
        let inside = Arc::new(AtomicUsize::new(0));
        let tasks: Vec<_> = (0..1000)
            .map(|_| {
                let (admission, inside) = (admission.clone(), inside.clone());
                tokio::spawn(async move {
                    let _slot = admission.enter().await.expect("a place for each");
                    assert!(inside.fetch_add(1, Ordering::SeqCst) < 7);
                    tokio::time::sleep(Duration::from_millis(1)).await;
                    inside.fetch_sub(1, Ordering::SeqCst);
                })
            })
            .collect();
        for task in tasks {
            task.await.expect("no panic");
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn nobody_is_refused_below_the_cap_however_many_come_at_once() {
        let admission = Arc::new(admission(1000, 0, None));
        let enter = |admission: Arc<Admission>| async move {
            for _ in 0..200 {
                drop(admission.enter().await.expect("500 of 1000 slots"));
                tokio::task::yield_now().await;
            }
        };
        let tasks: Vec<_> = (0..500).map(|_| tokio::spawn(enter(admission.clone()))).collect();
        for task in tasks {
            task.await.expect("not refused");
        }
        admission.assert_idle();
    }

    #[test]
    fn a_limit_is_minus_one_or_at_least_one() {
        assert_eq!(parse_limit("-1"), Ok(-1));
        assert_eq!(parse_limit("7"), Ok(7));
        for bad in ["0", "-2", "x", "10000001", ""] {
            assert!(parse_limit(bad).is_err(), "{bad}");
        }
    }
}
