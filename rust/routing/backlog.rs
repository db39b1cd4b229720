//! The prefill that one worker still has to do, of what it was sent.
//!
//! The one idea: a worker computes prompts first come, first served, so what was sent stands in a queue, and only its
//! head is being computed. The first content of a stream says that its prompt has left the queue, and when;
//! the time since the one before is what the prompt took. Of an answer that is no stream nobody says when
//! prefill ended: it is taken to leave when its time at the worker's speed is over, and at the latest
//! when it ends or when a stream that was sent after it begins.
//!
//! Invariant: the queue holds only requests in flight there, each at most once; with none, nothing is pending.
//!
//! Not here: a clock, how fast a worker is, and what a prompt has in the cache.

use std::collections::VecDeque;

/// Names a request; grows in the order of sending.
pub type Ticket = u64;

/// Prefill that has ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Computed {
    /// Uncached tokens, as estimated.
    pub tokens: u64,
    /// Seconds that were spent on them, of those in which there was something to compute.
    pub secs: f64,
}

/// See the module. Bounded by the requests in flight.
#[derive(Debug, Default)]
pub struct Backlog {
    /// By ticket.
    queue: VecDeque<Waiting>,
    /// Of all in the queue.
    tokens: u64,
    /// Since when the head is being computed.
    since_secs: f64,
}

#[derive(Clone, Copy, Debug)]
struct Waiting {
    ticket: Ticket,
    /// Uncached ones, as estimated.
    tokens: u32,
    is_stream: bool,
}

impl Backlog {
    /// A request was sent, of which so many tokens have to be computed.
    pub fn enter(&mut self, ticket: Ticket, tokens: u32, is_stream: bool, at_secs: f64) {
        if self.queue.is_empty() {
            self.since_secs = at_secs;
        }
        self.queue.push_back(Waiting { ticket, tokens, is_stream });
        self.tokens += u64::from(tokens);
    }

    /// Tokens left to compute. `speed` in tokens a second; without one nothing is taken as computed that has
    /// not been heard of.
    ///
    /// A prompt that takes longer than its tokens is held up, by a lack of places, by other work, or for good. Nobody
    /// knows for how long; what has lasted for a while is taken to last as long again.
    pub fn pending_tokens(&self, at_secs: f64, speed: Option<f64>) -> u64 {
        let Some(speed) = speed else { return self.tokens };
        let mut done = (at_secs - self.since_secs).max(0.0) * speed;
        let mut left = self.tokens;
        // Most often the first one is the last one that is looked at: an iterator would take longer to set up.
        for at in 0..self.queue.len() {
            let Waiting { tokens, is_stream, .. } = self.queue[at];
            // A float that is too large becomes the largest number: nothing pends for so long.
            left -= u64::from((done as u32).min(tokens));
            let tokens = f64::from(tokens);
            if done < tokens {
                break;
            }
            done -= tokens;
            if is_stream {
                return left + u64::from(done as u32);
            }
        }
        left
    }

    /// Lets those leave whose time at this speed is over, as far as nobody will say when they have.
    pub fn drain(&mut self, at_secs: f64, speed: f64) {
        while let Some(head) = self.queue.front() {
            let secs = f64::from(head.tokens) / speed;
            if head.is_stream || self.since_secs + secs > at_secs {
                return;
            }
            self.since_secs += secs;
            self.tokens -= u64::from(head.tokens);
            self.queue.pop_front();
        }
    }

    /// The first content of a stream came. Tells what was computed until then; `None` if it was not waited for, or
    /// if it overtook another stream: then the time was not that of its tokens. Two that begin at about the same time
    /// are often heard of in the wrong order, as they come over different connections.
    pub fn begun(&mut self, ticket: Ticket, at_secs: f64) -> Option<Computed> {
        let tokens = self.remove(ticket)? + self.remove_silent_before(ticket);
        if self.queue.front().is_some_and(|head| head.ticket < ticket) {
            return None;
        }
        let secs = (at_secs - self.since_secs).max(0.0);
        self.since_secs = self.since_secs.max(at_secs);
        Some(Computed { tokens, secs })
    }

    /// An answer has ended of which it was not heard when it began, or that never came.
    pub fn left(&mut self, ticket: Ticket, is_computed: bool, at_secs: f64) {
        let head = self.queue.front().map(|head| head.ticket);
        self.remove(ticket);
        if is_computed {
            self.remove_silent_before(ticket);
        }
        if self.queue.front().map(|head| head.ticket) != head {
            self.since_secs = self.since_secs.max(at_secs);
        }
    }

    fn remove(&mut self, ticket: Ticket) -> Option<u64> {
        let at = self.queue.binary_search_by_key(&ticket, |waiting| waiting.ticket).ok()?;
        let tokens = u64::from(self.queue.remove(at)?.tokens);
        self.tokens -= tokens;
        Some(tokens)
    }

    /// Removes those sent before that are no streams, and tells their tokens.
    fn remove_silent_before(&mut self, ticket: Ticket) -> u64 {
        let before = self.tokens;
        let is_silent = |waiting: &Waiting| waiting.ticket < ticket && !waiting.is_stream;
        if self.queue.front().is_some_and(is_silent) || self.queue.iter().any(is_silent) {
            self.queue.retain(|waiting| !is_silent(waiting));
            self.tokens = self.queue.iter().map(|waiting| u64::from(waiting.tokens)).sum();
        }
        before - self.tokens
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SPEED: Option<f64> = Some(100.0);

    #[test]
    fn the_head_of_the_queue_is_computed_as_time_goes() {
        let mut backlog = Backlog::default();
        assert_eq!(backlog.pending_tokens(5.0, SPEED), 0);
        backlog.enter(1, 1000, true, 10.0);
        backlog.enter(2, 500, true, 11.0);
        assert_eq!(backlog.pending_tokens(10.0, SPEED), 1500);
        assert_eq!(backlog.pending_tokens(12.0, SPEED), 1300);
        // It takes twice as long as expected, and what is behind it waits.
        assert_eq!(backlog.pending_tokens(30.0, SPEED), 500 + 1000);
        assert_eq!(backlog.pending_tokens(f64::INFINITY, SPEED), 500 + u64::from(u32::MAX));
        assert_eq!(backlog.pending_tokens(40.0, None), 1500);
        // Before its time.
        assert_eq!(backlog.pending_tokens(1.0, SPEED), 1500);
    }

    #[test]
    fn what_begins_took_the_time_since_the_one_before() {
        let mut backlog = Backlog::default();
        backlog.enter(1, 1000, true, 10.0);
        backlog.enter(2, 500, true, 11.0);
        assert_eq!(backlog.begun(1, 18.0), Some(Computed { tokens: 1000, secs: 8.0 }));
        assert_eq!(backlog.begun(1, 19.0), None);
        assert_eq!(backlog.begun(2, 22.0), Some(Computed { tokens: 500, secs: 4.0 }));
        // Idle until then.
        backlog.enter(3, 100, true, 50.0);
        assert_eq!(backlog.begun(3, 51.0), Some(Computed { tokens: 100, secs: 1.0 }));
        assert_eq!(backlog.pending_tokens(51.0, SPEED), 0);
    }

    #[test]
    fn who_overtakes_says_nothing_of_the_time() {
        let mut backlog = Backlog::default();
        backlog.enter(1, 1000, true, 0.0);
        backlog.enter(2, 10, true, 5.0);
        assert_eq!(backlog.begun(2, 9.9), None);
        assert_eq!(backlog.pending_tokens(9.9, SPEED), 10);
        assert_eq!(backlog.begun(1, 10.0), Some(Computed { tokens: 1000, secs: 10.0 }));
    }

    #[test]
    fn what_is_no_stream_leaves_when_its_time_is_over() {
        let mut backlog = Backlog::default();
        for ticket in 1..=3 {
            backlog.enter(ticket, 100, false, 0.0);
        }
        backlog.enter(4, 100, true, 0.0);
        assert_eq!(backlog.pending_tokens(1.5, SPEED), 250);
        backlog.drain(1.5, 100.0);
        assert_eq!(backlog.pending_tokens(1.5, SPEED), 250);
        backlog.drain(100.0, 100.0);
        assert_eq!(backlog.pending_tokens(3.5, SPEED), 50);
        // The stream alone, since the others were through at 3 s.
        assert_eq!(backlog.begun(4, 5.0), Some(Computed { tokens: 100, secs: 2.0 }));
    }

    #[test]
    fn a_stream_that_begins_says_that_those_before_it_were_computed() {
        let mut backlog = Backlog::default();
        backlog.enter(1, 100, true, 0.0);
        backlog.enter(2, 200, false, 0.0);
        backlog.enter(3, 300, true, 0.0);
        backlog.enter(4, 400, false, 0.0);
        // But of the first one, a stream, it does not.
        assert_eq!(backlog.begun(3, 5.0), None);
        assert_eq!(backlog.pending_tokens(5.0, None), 500);
        backlog.left(4, true, 6.0);
        backlog.left(1, false, 7.0);
        assert_eq!(backlog.pending_tokens(8.0, None), 0);
    }

    proptest! {
        #[test]
        fn nothing_is_pending_once_all_have_ended(
            steps in prop::collection::vec((0..4_u8, 0..20_u64, 0..1000_u32, any::<bool>()), 0..60),
        ) {
            let mut backlog = Backlog::default();
            let mut sent = 0;
            for (at, (kind, which, tokens, flag)) in steps.into_iter().enumerate() {
                let (at, ticket) = (at as f64, which.min(sent));
                match kind {
                    0 => {
                        sent += 1;
                        backlog.enter(sent, tokens, flag, at);
                    }
                    1 => drop(backlog.begun(ticket, at)),
                    2 => backlog.left(ticket, flag, at),
                    _ => backlog.drain(at, f64::from(tokens) + 1.0),
                }
                let queued: u64 = backlog.queue.iter().map(|waiting| u64::from(waiting.tokens)).sum();
                prop_assert_eq!(backlog.tokens, queued);
                let since = (at - backlog.since_secs).max(0.0);
                prop_assert!(backlog.pending_tokens(at, Some(50.0)) as f64 <= queued as f64 + 50.0 * since);
            }
            for ticket in 1..=sent {
                backlog.left(ticket, false, 100.0);
            }
            prop_assert_eq!(backlog.pending_tokens(0.0, None), 0);
        }
    }
}
