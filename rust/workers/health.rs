//! Whether a worker is fit to be picked: a state machine without a clock or a network.
//!
//! ```text
//! starting ──good──▶ healthy ──failure_threshold bad in a row──▶ unhealthy
//!                     ▲  │ ▲                                        │
//!                good │  │ └──── success_threshold good in a row ───┘
//!                     │  ▼ a request could not connect (also from unhealthy)
//!                   unreachable
//! ```
//!
//! From each of them a worker that is told to leave becomes draining, which it stays.

use std::time::Duration;

use super::Options;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Never been healthy yet.
    Starting,
    Healthy,
    /// Failed too many checks in a row.
    Unhealthy,
    /// Refused a connection; the next good check re-admits it.
    Unreachable,
    /// Told to leave: not picked again, and gone when nothing is in flight there.
    Draining,
}

impl State {
    pub fn name(self) -> &'static str {
        match self {
            State::Starting => "starting",
            State::Healthy => "healthy",
            State::Unhealthy => "unhealthy",
            State::Unreachable => "unreachable",
            State::Draining => "draining",
        }
    }
}

const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// A worker whose process was restarted is back within a second of its port.
const UNREACHABLE_PAUSE_MAX: Duration = Duration::from_secs(1);

#[derive(Clone, Debug)]
pub struct Health {
    state: State,
    /// Checks of the same outcome in a row, within this state.
    streak: u32,
    last_was_good: bool,
    /// Checks since this state began.
    checks: u32,
}

impl Health {
    pub fn new(options: &Options) -> Self {
        let state = if options.disable_health_check { State::Healthy } else { State::Starting };
        Self { state, streak: 0, last_was_good: false, checks: 0 }
    }

    pub fn state(&self) -> State {
        self.state
    }

    /// A check has ended. Returns whether the state changed.
    pub fn checked(&mut self, good: bool, options: &Options) -> bool {
        self.checks = self.checks.saturating_add(1);
        self.streak = if self.last_was_good == good { self.streak.saturating_add(1) } else { 1 };
        self.last_was_good = good;
        match (self.state, good) {
            (State::Starting | State::Unreachable, true) => self.enter(State::Healthy),
            (State::Healthy, false) if self.streak >= options.health_failure_threshold => {
                self.enter(State::Unhealthy)
            }
            (State::Unhealthy, true) if self.streak >= options.health_success_threshold => {
                self.enter(State::Healthy)
            }
            _ => false,
        }
    }

    /// A request found nobody at the worker's address. Returns whether the state changed.
    pub fn unreachable(&mut self) -> bool {
        match self.state {
            State::Healthy | State::Unhealthy => self.enter(State::Unreachable),
            State::Starting | State::Unreachable | State::Draining => false,
        }
    }

    /// The worker is to leave. Returns whether that is news.
    pub fn leave(&mut self) -> bool {
        self.state != State::Draining && self.enter(State::Draining)
    }

    /// Time from the beginning of one check to the beginning of the next.
    pub fn pause(&self, options: &Options) -> Duration {
        let interval = Duration::from_secs(options.health_check_interval_secs);
        let longest = match self.state {
            State::Healthy | State::Unhealthy | State::Draining => return interval,
            State::Starting => Duration::from_secs(options.worker_startup_check_interval),
            State::Unreachable => UNREACHABLE_PAUSE_MAX,
        };
        let doublings = self.checks.saturating_sub(1).min(20);
        longest.min(FIRST_PAUSE * 2_u32.pow(doublings))
    }

    fn enter(&mut self, state: State) -> bool {
        *self = Self { state, streak: 0, last_was_good: self.last_was_good, checks: 0 };
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workers::tests::options;

    fn after(start: &[bool]) -> (Health, Options) {
        let options = options(&[]);
        let mut health = Health::new(&options);
        for good in start {
            health.checked(*good, &options);
        }
        (health, options)
    }

    #[test]
    fn one_good_check_starts_a_worker() {
        assert_eq!(after(&[]).0.state(), State::Starting);
        assert_eq!(after(&[false, false, false, false]).0.state(), State::Starting);
        assert_eq!(after(&[false, true]).0.state(), State::Healthy);
    }

    #[test]
    fn three_failures_in_a_row_and_two_successes_in_a_row() {
        assert_eq!(after(&[true, false, false, true, false, false]).0.state(), State::Healthy);
        assert_eq!(after(&[true, false, false, false]).0.state(), State::Unhealthy);
        let down = [true, false, false, false];
        assert_eq!(after(&[&down[..], &[true, false, true]].concat()).0.state(), State::Unhealthy);
        assert_eq!(after(&[&down[..], &[true, true]].concat()).0.state(), State::Healthy);
    }

    #[test]
    fn a_refused_connection_takes_a_worker_out_and_one_good_check_brings_it_back() {
        let (mut health, options) = after(&[true]);
        assert!(health.unreachable());
        assert!(!health.unreachable());
        assert_eq!(health.state(), State::Unreachable);
        health.checked(false, &options);
        assert_eq!(health.state(), State::Unreachable);
        health.checked(true, &options);
        assert_eq!(health.state(), State::Healthy);
    }

    #[test]
    fn who_leaves_does_not_come_back() {
        for begun in [&[][..], &[true], &[true, false, false, false]] {
            let (mut health, options) = after(begun);
            assert!(health.leave());
            assert!(!health.leave() && !health.unreachable());
            for good in [true, true, false, false, false] {
                assert!(!health.checked(good, &options));
            }
            assert_eq!(health.state(), State::Draining);
        }
    }

    #[test]
    fn pauses_double_up_to_their_bound() {
        let (mut health, options) = after(&[]);
        let mut pauses = vec![];
        for _ in 0..10 {
            health.checked(false, &options);
            pauses.push(health.pause(&options).as_millis());
        }
        assert_eq!(pauses, [100, 200, 400, 800, 1600, 3200, 6400, 12800, 25600, 30000]);
        health.checked(true, &options);
        assert_eq!(health.pause(&options).as_secs(), 60);
        health.unreachable();
        for _ in 0..10 {
            health.checked(false, &options);
        }
        assert_eq!(health.pause(&options).as_millis(), 1000);
    }
}
