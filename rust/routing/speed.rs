//! How fast each worker computes prompts, learned from how long they took.
//!
//! The one idea: the time of a prompt is often not that of its tokens. It waited for a place or for other work, or the
//! first contents of two came in one packet. So a worker's speed is the median over its last prompts, which such
//! ones hardly move. Prompts count by their tokens, so that the overhead of a short one says little.
//!
//! What a worker has shown is forgotten while the others go on showing theirs, and what is missing is filled up with
//! the mean of all; so a worker that nobody is sent to any more, because it was slow once, gets another chance.
//!
//! Nothing here has a unit of time but the seconds that are measured: how much is remembered is counted in prompts, so
//! a cluster that runs twenty times as fast learns the same.
//!
//! Speeds are told in [`STEPS`] to a doubling, those that hardly differ as the same one. Otherwise noise would send every request to
//! the one worker that was a percent faster.

use std::collections::VecDeque;

/// The last prompts of a worker that its speed is taken from.
const REMEMBERED: usize = 32;

/// Prompts per worker after which what was learned counts half.
const HALF_LIFE: f64 = 16.0;

/// A worker's speed is that of what it has shown and of so many prompts at the mean speed.
const ASSUMED: f64 = 2.0;

/// Speeds between one and twice as much.
const STEPS: f64 = 4.0;

/// What all workers together have shown, exponentially forgotten.
#[derive(Clone, Debug, Default)]
pub struct Speeds {
    /// Prompts, their tokens, and the seconds that these take at their workers' speeds.
    prompts: f64,
    tokens: f64,
    secs: f64,
    /// Prompts so far, of all workers.
    count: u64,
    /// Workers that have shown anything.
    workers: u32,
}

/// What one worker has shown.
#[derive(Clone, Debug, Default)]
pub struct Speed {
    /// The last [`REMEMBERED`] prompts.
    shown: VecDeque<Shown>,
    /// Tokens of these.
    tokens: f64,
    /// The median of them; over 0 once anything is shown.
    secs_per_token: f64,
    /// [`Speeds::count`] when it last showed anything; 0 before.
    shown_at: u64,
}

#[derive(Clone, Copy, Debug)]
struct Shown {
    tokens: f64,
    secs_per_token: f64,
}

impl Speeds {
    /// Notes what one of the workers took for a prompt. What took no tokens or no time says nothing.
    pub fn learn(&mut self, speed: &mut Speed, tokens: u64, secs: f64) {
        if tokens == 0 || !secs.is_finite() || secs <= 0.0 {
            return;
        }
        if speed.shown_at == 0 {
            self.workers = self.workers.saturating_add(1);
        }
        let tokens = tokens as f64;
        speed.show(Shown { tokens, secs_per_token: secs / tokens });
        self.count += 1;
        speed.shown_at = self.count;
        let kept = self.kept_of(1);
        self.prompts = self.prompts * kept + 1.0;
        self.tokens = self.tokens * kept + tokens;
        self.secs = self.secs * kept + tokens * speed.secs_per_token;
    }

    /// A worker that has shown something is gone.
    pub fn remove(&mut self, speed: &Speed) {
        self.workers -= u32::from(speed.shown_at > 0);
    }

    /// Tokens a second of a worker, the mean of all if it has not shown any; `None` if nobody has.
    pub fn of(&self, speed: &Speed) -> Option<f64> {
        if self.count == 0 {
            return None;
        }
        let mean = self.secs / self.tokens;
        let assumed = ASSUMED * self.tokens / self.prompts;
        let shown = speed.tokens * self.kept_of(self.count - speed.shown_at);
        let secs_per_token = (shown * speed.secs_per_token + assumed * mean) / (shown + assumed);
        let steps = (STEPS * (mean / secs_per_token).log2()).round();
        Some((steps / STEPS).exp2() / mean)
    }

    fn kept_of(&self, prompts: u64) -> f64 {
        (-(prompts as f64) / (HALF_LIFE * f64::from(self.workers.max(1)))).exp2()
    }
}

impl Speed {
    fn show(&mut self, shown: Shown) {
        if self.shown.len() == REMEMBERED {
            self.shown.pop_front();
        }
        self.shown.push_back(shown);
        self.tokens = self.shown.iter().map(|shown| shown.tokens).sum();
        let mut fastest: Vec<_> = self.shown.iter().collect();
        fastest.sort_by(|one, other| one.secs_per_token.total_cmp(&other.secs_per_token));
        let mut tokens = 0.0;
        for shown in fastest {
            tokens += shown.tokens;
            self.secs_per_token = shown.secs_per_token;
            if tokens >= self.tokens / 2.0 {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(speeds: &mut Speeds, speed: &mut Speed, tokens_per_sec: f64, prompts: u32) {
        for prompt in 0..prompts {
            let tokens = 1000 + u64::from(prompt * 37 % 500);
            speeds.learn(speed, tokens, tokens as f64 / tokens_per_sec);
        }
    }

    fn is_near(speed: Option<f64>, expected: f64) -> bool {
        speed.is_some_and(|speed| (speed / expected - 1.0).abs() < 0.2)
    }

    #[test]
    fn each_worker_has_its_own_speed_and_an_unknown_one_the_mean() {
        let mut speeds = Speeds::default();
        let (mut fast, mut slow) = (Speed::default(), Speed::default());
        assert_eq!(speeds.of(&fast), None);
        for _ in 0..20 {
            shown(&mut speeds, &mut fast, 8000.0, 2);
            shown(&mut speeds, &mut slow, 4000.0, 1);
        }
        assert!(is_near(speeds.of(&fast), 8000.0), "{:?}", speeds.of(&fast));
        assert!(is_near(speeds.of(&slow), 4000.0), "{:?}", speeds.of(&slow));
        let unknown = speeds.of(&Speed::default()).expect("the mean");
        assert!((4000.0..8000.0).contains(&unknown), "{unknown}");
    }

    #[test]
    fn workers_that_are_about_as_fast_are_as_fast() {
        let mut speeds = Speeds::default();
        let (mut one, mut other) = (Speed::default(), Speed::default());
        for _ in 0..20 {
            shown(&mut speeds, &mut one, 8000.0, 1);
            shown(&mut speeds, &mut other, 7700.0, 1);
        }
        assert_eq!(speeds.of(&one), speeds.of(&other));
    }

    #[test]
    fn waits_bunches_and_short_prompts_say_little() {
        let (mut speeds, mut speed) = (Speeds::default(), Speed::default());
        for round in 0..40 {
            // Of five one waits, one is heard of too late and so seems fast; and short ones take long.
            let secs = [0.125, 0.125, 0.125 + f64::from(round), 0.001, 0.125][round as usize % 5];
            speeds.learn(&mut speed, 1000, secs);
            speeds.learn(&mut speed, 1, 0.05);
        }
        assert!(is_near(speeds.of(&speed), 8000.0), "{:?}", speeds.of(&speed));
    }

    #[test]
    fn what_says_nothing_teaches_nothing() {
        let (mut speeds, mut speed) = (Speeds::default(), Speed::default());
        for (tokens, secs) in [(0, 1.0), (10, 0.0), (10, -1.0), (10, f64::NAN), (10, f64::INFINITY)]
        {
            speeds.learn(&mut speed, tokens, secs);
        }
        assert_eq!(speeds.of(&speed), None);
    }

    #[test]
    fn a_worker_that_was_slow_once_gets_another_chance() {
        let mut speeds = Speeds::default();
        let (mut well, mut once_slow) = (Speed::default(), Speed::default());
        speeds.learn(&mut once_slow, 1000, 10.0);
        shown(&mut speeds, &mut well, 8000.0, 400);
        assert!(is_near(speeds.of(&once_slow), 8000.0), "{:?}", speeds.of(&once_slow));
    }

    #[test]
    fn a_change_of_speed_is_learned() {
        let (mut speeds, mut speed) = (Speeds::default(), Speed::default());
        for tokens_per_sec in [8000.0, 2000.0, 4000.0] {
            shown(&mut speeds, &mut speed, tokens_per_sec, 100);
            assert!(is_near(speeds.of(&speed), tokens_per_sec), "{:?}", speeds.of(&speed));
        }
    }

    #[test]
    fn prompts_that_get_shorter_are_learned_from() {
        let mut speeds = Speeds::default();
        let (mut fast, mut slow) = (Speed::default(), Speed::default());
        shown(&mut speeds, &mut fast, 8000.0, 40);
        shown(&mut speeds, &mut slow, 8000.0, 40);
        for _ in 0..60 {
            speeds.learn(&mut fast, 50, 0.005);
            speeds.learn(&mut slow, 50, 0.05);
        }
        let ratio = speeds.of(&fast).expect("known") / speeds.of(&slow).expect("known");
        assert!(ratio > 5.0, "{ratio}");
    }
}
