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
