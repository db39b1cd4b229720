//! How much of the prompts sent to a worker it had in its cache already, in its own words.

use std::sync::atomic::{AtomicU64, Ordering};

/// Sums over the answers that told both numbers, so that their ratio is a hit rate.
#[derive(Debug, Default)]
pub struct CacheUse {
    prompt_tokens: AtomicU64,
    cached_tokens: AtomicU64,
}

impl CacheUse {
    /// What an answer told.
    pub fn told(&self, prompt_tokens: Option<u32>, cached_tokens: Option<u32>) {
        if let (Some(prompt), Some(cached)) = (prompt_tokens, cached_tokens) {
            self.prompt_tokens.fetch_add(prompt.into(), Ordering::Relaxed);
            self.cached_tokens.fetch_add(cached.into(), Ordering::Relaxed);
        }
    }

    /// Tokens of the prompts, and those of them that were cached.
    pub fn tokens(&self) -> (u64, u64) {
        (self.prompt_tokens.load(Ordering::Relaxed), self.cached_tokens.load(Ordering::Relaxed))
    }
}
