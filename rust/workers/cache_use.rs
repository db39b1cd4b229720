//! How much of the prompts sent to a worker it had in its cache already, in its own words.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Sums over the answers that told both numbers, so that their ratio is a hit rate.
#[derive(Debug, Default)]
pub struct CacheUse {
    prompt_tokens: AtomicU64,
    cached_tokens: AtomicU64,
    /// Whether it has told more tokens cached than there were.
    has_told_nonsense: AtomicBool,
}

impl CacheUse {
    /// What an answer told. More tokens cached than there were are not counted; returns whether that was the
    /// first time.
    pub fn told(&self, prompt_tokens: Option<u32>, cached_tokens: Option<u32>) -> bool {
        let (Some(prompt), Some(cached)) = (prompt_tokens, cached_tokens) else { return false };
        if cached > prompt {
            return !self.has_told_nonsense.swap(true, Ordering::Relaxed);
        }
        self.prompt_tokens.fetch_add(prompt.into(), Ordering::Relaxed);
        self.cached_tokens.fetch_add(cached.into(), Ordering::Relaxed);
        false
    }

    /// Tokens of the prompts, and those of them that were cached.
    pub fn tokens(&self) -> (u64, u64) {
        (self.prompt_tokens.load(Ordering::Relaxed), self.cached_tokens.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_cached_than_there_was_is_told_once_and_never_counted() {
        let cache = CacheUse::default();
        assert!(!cache.told(Some(10), Some(4)));
        assert!(cache.told(Some(10), Some(11)));
        assert!(!cache.told(Some(10), Some(99)));
        assert!(!cache.told(Some(10), Some(10)) && !cache.told(None, Some(1)));
        assert_eq!(cache.tokens(), (20, 14));
    }
}
