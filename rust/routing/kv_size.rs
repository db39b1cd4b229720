//! How many tokens a worker's KV cache holds, where nobody says.
//!
//! The one idea: what was used again after so many other tokens had been used, and was gone, says that the cache
//! is smaller than that; what was there, that it is larger. The estimate follows what contradicts it, and creeps up
//! while what it keeps near its edge is always there; so it ends where both happen equally often.
//! A single wrong word moves it by a fifth at most.

/// What is believed before anything is known: rather too much, as only what is believed can prove to be gone.
const FIRST_TOKENS: f64 = (1 << 20) as f64;

/// The estimate stays between these.
const FEWEST_TOKENS: f64 = 1024.0;
/// No cache is believed to hold more, whoever says so: what is believed takes memory.
pub const MOST_TOKENS: f64 = (1 << 22) as f64;

/// How much of the way, by ratio, the estimate goes to what proved gone.
const PULL: f64 = 0.5;
/// The most it shrinks at once.
const MOST_SHRUNK: f64 = 0.8;
/// From this share of the estimate on it is near the edge.
const NEAR_EDGE: f64 = 0.75;
/// How much it grows when what is near its edge was there.
const GROWTH: f64 = 1.05;

/// See the module.
#[derive(Clone, Copy, Debug)]
pub struct KvSize {
    tokens: f64,
}

impl Default for KvSize {
    fn default() -> Self {
        Self { tokens: FIRST_TOKENS }
    }
}

impl KvSize {
    /// The estimate.
    pub fn tokens(self) -> f64 {
        self.tokens
    }

    /// What was used so many tokens ago was gone.
    pub fn gone(&mut self, tokens_since: f64) {
        if tokens_since < self.tokens {
            let shrunk = (tokens_since.max(1.0) / self.tokens).powf(PULL).max(MOST_SHRUNK);
            self.tokens = (self.tokens * shrunk).max(FEWEST_TOKENS);
        }
    }

    /// What was used so many tokens ago was there.
    pub fn there(&mut self, tokens_since: f64) {
        if tokens_since > NEAR_EDGE * self.tokens {
            self.tokens = (self.tokens * GROWTH).min(MOST_TOKENS);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routing::mirror::{BLOCK_BYTES, Mirror, names};

    /// What is learned of a cache that holds so many prompts of 100 tokens, of which there are twice as many.
    fn learned(true_tokens: u64, prompts: u64, rng: &mut fastrand::Rng) -> f64 {
        const TOKENS: u64 = 100;
        let bytes = |tokens: f64| (tokens / TOKENS as f64) as u64 * BLOCK_BYTES as u64;
        let tokens = |bytes: u64| (bytes / BLOCK_BYTES as u64 * TOKENS) as f64;
        let mut size = KvSize::default();
        let (mut believed, mut real) = (Mirror::default(), Mirror::default());
        for _ in 0..prompts {
            // Recent prompts come back more often than old ones.
            let back = rng.f64().powi(2) * 2.0 * true_tokens as f64 / TOKENS as f64;
            let prompt = rng.u64(..3).min(1) * back as u64;
            let mut text = [0; BLOCK_BYTES];
            text[..8].copy_from_slice(&prompt.to_le_bytes());
            let names = names(&text);
            let is_there = real.matched_blocks(&names, 0) > 0;
            let used = believed.use_prompt(0, &names, bytes(size.tokens()));
            real.use_prompt(0, &names, bytes(true_tokens as f64));
            for run in &used.runs {
                let since = tokens(run.newer_bytes + BLOCK_BYTES as u64);
                if is_there { size.there(since) } else { size.gone(since) }
            }
        }
        size.tokens()
    }

    #[test]
    fn the_size_of_a_cache_is_learned_from_what_it_had() {
        let mut rng = fastrand::Rng::with_seed(5);
        for true_tokens in [20_000, 100_000, 400_000] {
            let learned = learned(true_tokens, 30 * true_tokens / 100, &mut rng);
            let ratio = learned / true_tokens as f64;
            assert!((0.7..1.3).contains(&ratio), "{learned} of {true_tokens}");
        }
    }

    #[test]
    fn one_wrong_word_moves_it_by_a_fifth() {
        let mut size = KvSize { tokens: 100_000.0 };
        size.gone(1.0);
        assert_eq!(size.tokens(), 80_000.0);
        size.gone(1e9);
        size.there(1.0);
        assert_eq!(size.tokens(), 80_000.0);
        size.there(79_000.0);
        assert!((80_000.0..90_000.0).contains(&size.tokens()));
    }

    #[test]
    fn it_stays_in_its_bounds() {
        let mut size = KvSize::default();
        for _ in 0..1000 {
            size.gone(0.0);
        }
        assert_eq!(size.tokens(), FEWEST_TOKENS);
        for _ in 0..1000 {
            size.there(f64::INFINITY);
        }
        assert_eq!(size.tokens(), MOST_TOKENS);
    }
}
