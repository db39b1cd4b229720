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
//! Speeds that differ by less than [`STEP`] are the same speed. Otherwise noise would send every request to
//! the one worker that was a percent faster.

/// Prompts per worker after which what was learned counts half.
const HALF_LIFE: f64 = 16.0;

/// A prompt of less than this share of the mean says nothing: its time is not that of its tokens.
const MEANINGFUL: f64 = 0.1;

/// A prompt counts as at most so many times as slow as expected: it may have waited for something else than prefill.
const SLOWEST: f64 = 8.0;

/// The ratio of two neighbouring speeds.
const STEP: f64 = 1.2;

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
        speed.sums = speed.sums.scaled(self.kept(speed));
        self.sums = self.sums.scaled(self.kept_of(1));
        self.prompts += 1;
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
        // As if one more prompt had been computed at the mean speed.
        let tokens = self.tokens_per_prompt();
        let mut sums = speed.sums.scaled(self.kept(speed));
        sums.add(tokens, tokens / mean);
        let steps = (sums.speed()? / mean).log(STEP).round();
        Some(mean * STEP.powf(steps))
    }

    /// How much of what a worker has shown still counts.
    fn kept(&self, speed: &Speed) -> f64 {
        self.kept_of(self.prompts - speed.shown_at)
    }

    fn kept_of(&self, prompts: u64) -> f64 {
        0.5_f64.powf(prompts as f64 / (HALF_LIFE * f64::from(self.workers.max(1))))
    }
}
