//! How fast each worker computes prompts, learned from how long they took.
//!
//! The one idea: speed is tokens over the seconds spent on them, summed over many prompts, so that long prompts count
//! for what they are and the overhead of a short one does not. What a worker has shown is forgotten while the
//! others go on showing theirs, and what is missing is filled up with the mean of all; so a worker that nobody
//! is sent to any more, because it was slow once, gets another chance.
//!
//! Nothing here has a unit of time but the seconds that are measured: how much is remembered is counted in prompts, so
//! a cluster that runs twenty times as fast learns the same.
//!
//! Speeds are told in [`STEPS`] to a doubling, those that hardly differ as the same one. Otherwise noise would send every request to
//! the one worker that was a percent faster.

/// Prompts per worker after which what was learned counts half.
const HALF_LIFE: f64 = 16.0;

/// A worker's speed is that of what it has shown and of so many prompts at the mean speed.
const ASSUMED: f64 = 2.0;

/// A prompt of less than this share of the mean says nothing: its time is not that of its tokens.
const MEANINGFUL: f64 = 0.1;

/// A prompt counts as at most so many times as slow as expected: it may have waited for something else than prefill.
const SLOWEST: f64 = 8.0;

/// Speeds between one and twice as much.
const STEPS: f64 = 4.0;

/// Exponentially forgotten sums over prompts.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    prompts: f64,
    tokens: f64,
    secs: f64,
}

impl Sums {
    fn add(&mut self, tokens: f64, secs: f64) {
        self.prompts += 1.0;
        self.tokens += tokens;
        self.secs += secs;
    }

    fn scaled(self, by: f64) -> Self {
        Self { prompts: self.prompts * by, tokens: self.tokens * by, secs: self.secs * by }
    }

    /// Tokens a second, if anything has taken time.
    fn speed(self) -> Option<f64> {
        (self.tokens > 0.0 && self.secs > 0.0).then(|| self.tokens / self.secs)
    }
}

/// What all workers together have shown.
#[derive(Clone, Debug, Default)]
pub struct Speeds {
    sums: Sums,
    /// Prompts so far, of all workers.
    prompts: u64,
    /// Workers that have shown anything.
    workers: u32,
}

/// What one worker has shown.
#[derive(Clone, Debug, Default)]
pub struct Speed {
    sums: Sums,
    /// [`Speeds::prompts`] when it last showed anything; 0 before.
    shown_at: u64,
}

impl Speeds {
    /// Notes what one of the workers took for a prompt.
    pub fn learn(&mut self, speed: &mut Speed, tokens: u64, secs: f64) {
        let tokens = tokens as f64;
        if tokens < MEANINGFUL * self.tokens_per_prompt() {
            return;
        }
        let expected = self.of(speed).map(|speed| SLOWEST * tokens / speed);
        let secs = expected.map_or(secs, |slowest| secs.min(slowest));
        if tokens <= 0.0 || secs.is_nan() {
            return;
        }
        if speed.shown_at == 0 {
            self.workers = self.workers.saturating_add(1);
        }
        self.prompts += 1;
        speed.sums = speed.sums.scaled(self.kept(speed));
        self.sums = self.sums.scaled(self.kept_of(1));
        speed.shown_at = self.prompts;
        speed.sums.add(tokens, secs);
        self.sums.add(tokens, secs);
    }

    /// Tokens of the prompts that were learned from, in the mean; 0 if there was none.
    fn tokens_per_prompt(&self) -> f64 {
        if self.sums.prompts > 0.0 { self.sums.tokens / self.sums.prompts } else { 0.0 }
    }

    /// Notes that the tokens learned from were `more` than was said.
    pub fn correct(&mut self, speed: &mut Speed, more: f64) {
        for sums in [&mut self.sums, &mut speed.sums] {
            sums.tokens = (sums.tokens + more).max(1.0);
        }
    }

    /// A worker that has shown something is gone.
    pub fn remove(&mut self, speed: &Speed) {
        self.workers -= u32::from(speed.shown_at > 0);
    }

    /// Tokens a second of a worker, the mean of all if it has not shown any; `None` if nobody has.
    pub fn of(&self, speed: &Speed) -> Option<f64> {
        let mean = self.sums.speed()?;
        let tokens = ASSUMED * self.tokens_per_prompt();
        let mut sums = speed.sums.scaled(self.kept(speed));
        sums.add(tokens, tokens / mean);
        let steps = (STEPS * (sums.speed()? / mean).log2()).round();
        Some(mean * (steps / STEPS).exp2())
    }

    /// How much of what a worker has shown still counts.
    fn kept(&self, speed: &Speed) -> f64 {
        self.kept_of(self.prompts - speed.shown_at)
    }

    fn kept_of(&self, prompts: u64) -> f64 {
        (-(prompts as f64) / (HALF_LIFE * f64::from(self.workers.max(1)))).exp2()
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
    fn short_prompts_and_long_waits_hardly_count() {
        let (mut speeds, mut speed) = (Speeds::default(), Speed::default());
        shown(&mut speeds, &mut speed, 8000.0, 20);
        for _ in 0..100 {
            speeds.learn(&mut speed, 1, 0.05);
            speeds.learn(&mut speed, 0, 0.05);
        }
        assert!(is_near(speeds.of(&speed), 8000.0), "{:?}", speeds.of(&speed));
        speeds.learn(&mut speed, 1000, 1e6);
        assert!(speeds.of(&speed) > Some(4000.0), "{:?}", speeds.of(&speed));
        speeds.learn(&mut speed, 1000, f64::NAN);
        speeds.learn(&mut speed, 1000, 0.0);
        assert!(speeds.of(&speed).is_some_and(f64::is_finite));
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
        shown(&mut speeds, &mut speed, 8000.0, 100);
        shown(&mut speeds, &mut speed, 2000.0, 100);
        assert!(is_near(speeds.of(&speed), 2000.0), "{:?}", speeds.of(&speed));
    }

    #[test]
    fn what_was_estimated_wrong_is_corrected() {
        let (mut speeds, mut speed) = (Speeds::default(), Speed::default());
        for _ in 0..20 {
            speeds.learn(&mut speed, 1000, 1.0);
            speeds.correct(&mut speed, 3000.0);
        }
        assert!(is_near(speeds.of(&speed), 4000.0), "{:?}", speeds.of(&speed));
        speeds.correct(&mut speed, -1e12);
        assert!(speeds.of(&speed).is_some_and(|speed| speed > 0.0));
    }
}
