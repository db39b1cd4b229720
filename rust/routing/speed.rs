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
//!
//! Each prompt changes all speeds a little, and each pick asks for all of them. So they are told anew when something was learned, and
//! a pick reads what was told. So that this takes no power per worker, what a worker has shown is put as if it had been
//! shown at one moment for all, where an epoch began; what was forgotten since then is the same for all.

use std::collections::VecDeque;

/// The last prompts of a worker that its speed is taken from.
const REMEMBERED: usize = 32;

/// Prompts per worker after which what was learned counts half.
const HALF_LIFE: f64 = 16.0;

/// A worker's speed is that of what it has shown and of so many prompts at the mean speed.
const ASSUMED: f64 = 2.0;

/// Speeds between one and twice as much.
const STEPS: usize = 4;

/// The steps from 1 to below 2.
const STEP: [f64; STEPS] =
    [1.0, 1.189_207_115_002_721, std::f64::consts::SQRT_2, 1.681_792_830_507_429];

/// Half a step. So much above a ratio, the step below it is the one that is nearest to the ratio.
const HALF_STEP: f64 = 1.090_507_732_665_257_7;

/// Half-lives of an epoch at most: two to this power is still a number.
const EPOCH: f64 = 256.0;

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
    /// The mean of all.
    secs_per_token: f64,
    /// Tokens a second at each [`STEP`] over the mean.
    steps: [f64; STEPS],
    /// What each worker's are filled up with: tokens, and their seconds at the mean speed.
    assumed: f64,
    assumed_secs: f64,
    /// Counts the epochs. A new one begins when the half-life changes, which depends on the number of workers.
    epoch: u64,
    /// The count when it began.
    began_at: u64,
    /// What is kept of what was known then.
    kept: f64,
    /// There are workers that have not come to this epoch.
    is_new: bool,
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
    /// The epoch that it has come to.
    epoch: u64,
    /// The tokens that this epoch would have to begin with, for as many to be kept now.
    tokens_then: f64,
    told: Option<f64>,
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
        let tokens = tokens as f64;
        speed.show(Shown { tokens, secs_per_token: secs / tokens });
        self.count += 1;
        let is_first = speed.shown_at == 0;
        speed.shown_at = self.count;
        self.workers = self.workers.saturating_add(u32::from(is_first));
        if is_first || self.half_lives(self.began_at, self.count) > EPOCH {
            self.begin_epoch();
        }
        let kept = (-self.half_lives(0, 1)).exp2();
        self.prompts = self.prompts * kept + 1.0;
        self.tokens = self.tokens * kept + tokens;
        self.secs = self.secs * kept + tokens * speed.secs_per_token;
        self.secs_per_token = self.secs / self.tokens;
        self.steps = STEP.map(|step| step / self.secs_per_token);
        self.assumed = ASSUMED * self.tokens / self.prompts;
        self.assumed_secs = self.assumed * self.secs_per_token;
        self.kept = self.half_lives(self.count, self.began_at).exp2();
        self.bring(speed);
    }

    /// A worker that has shown something is gone.
    pub fn remove(&mut self, speed: &Speed) {
        if speed.shown_at > 0 {
            self.workers -= 1;
            self.begin_epoch();
        }
    }

    /// Tells the speeds of all workers. To be called after each change, with all of them.
    pub fn tell_all<'a>(&mut self, all: impl Iterator<Item = &'a mut Speed>) {
        let is_new = std::mem::take(&mut self.is_new);
        for speed in all {
            if is_new {
                self.bring(speed);
            }
            self.tell(speed);
        }
    }

    /// Tells the speed of a worker that has joined the others.
    pub fn tell(&self, speed: &mut Speed) {
        speed.told = self.of(speed);
    }

    /// Tokens a second of a worker, the mean of all if it has not shown any; `None` if nobody has.
    pub fn of(&self, speed: &Speed) -> Option<f64> {
        if self.count == 0 {
            return None;
        }
        let shown = if speed.epoch == self.epoch {
            speed.tokens_then * self.kept
        } else {
            speed.tokens * self.half_lives(self.count, speed.shown_at).exp2()
        };
        let secs = shown * speed.secs_per_token + self.assumed_secs;
        let ratio = self.secs_per_token * (shown + self.assumed) / secs;
        Some(step_below(HALF_STEP * ratio, &self.steps))
    }

    fn begin_epoch(&mut self) {
        self.epoch += 1;
        self.began_at = self.count;
        self.kept = 1.0;
        self.is_new = true;
    }

    fn bring(&self, speed: &mut Speed) {
        speed.epoch = self.epoch;
        speed.tokens_then = speed.tokens * self.half_lives(self.began_at, speed.shown_at).exp2();
    }

    /// From one count of prompts to another; below 0 if that was before.
    fn half_lives(&self, from: u64, to: u64) -> f64 {
        (to as f64 - from as f64) / (HALF_LIFE * f64::from(self.workers.max(1)))
    }
}

impl Speed {
    /// Tokens a second, as told last.
    pub fn told(&self) -> Option<f64> {
        self.told
    }

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

/// The highest step that is not above a ratio, by these from 1 to below 2. Each doubling has the same ones; which doubling it is
/// stands in a number's exponent.
fn step_below(ratio: f64, steps: &[f64; STEPS]) -> f64 {
    const EXPONENT: u64 = f64::INFINITY.to_bits();
    const ONE: u64 = 1_f64.to_bits();
    let doublings = f64::from_bits(ratio.to_bits() & EXPONENT);
    let beyond = f64::from_bits(ratio.to_bits() & !EXPONENT | ONE);
    let half = 2 * usize::from(beyond >= STEP[2]);
    let step = half + usize::from(beyond >= STEP[half + 1]);
    steps[step] * doublings
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

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

    proptest! {
        #[test]
        fn steps_are_those_of_the_logarithm(log in -40.0..40.0_f64) {
            let expected = ((log * STEPS as f64).round() / STEPS as f64).exp2();
            prop_assert_eq!(step_below(HALF_STEP * log.exp2(), &STEP), expected);
        }

        #[test]
        fn what_is_told_is_what_is_kept_of_what_was_shown(
            prompts in prop::collection::vec((0..6_usize, 1..2000_u64, 0.001..1.0_f64, any::<bool>()), 1..300),
        ) {
            let mut speeds = Speeds::default();
            let mut workers: [Speed; 6] = Default::default();
            for (worker, tokens, secs, is_told) in prompts {
                speeds.learn(&mut workers[worker], tokens, secs);
                if is_told {
                    speeds.tell_all(workers.iter_mut());
                }
                for speed in &workers {
                    let mean = speeds.secs / speeds.tokens;
                    let assumed = ASSUMED * speeds.tokens / speeds.prompts;
                    let ago = (speeds.count - speed.shown_at) as f64;
                    let kept = (-ago / (HALF_LIFE * f64::from(speeds.workers))).exp2();
                    let shown = speed.tokens * kept;
                    let own = (shown * speed.secs_per_token + assumed * mean) / (shown + assumed);
                    prop_assert!(!is_told || speed.told() == speeds.of(speed));
                    let told = speeds.of(speed).expect("some have shown") * own;
                    prop_assert!((-0.126..0.126).contains(&told.log2()), "{told}");
                }
            }
        }
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
