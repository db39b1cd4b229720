//! `prefix_hash`: prompts that begin alike at the same worker, by a hash of the prompt's head.
//!
//! Source: the rule of that name of SGLang's router, with the worker found as in
//! [`super::rendezvous`]. Where `cache_aware` remembers what it sent, this one remembers nothing, so
//! any number of routers agree without talking to each other. The price: two prompts go to the same
//! worker only if their heads are equal to the last byte, or if both are shorter and equal.
//!
//! The head is the first `prefix_token_count` tokens, four bytes each. It is not measured by a
//! tokenizer, and does not follow what workers tell of their tokens, which would move all keys.

use std::sync::Arc;

use xxhash_rust::xxh3::xxh3_64;

use super::candidates::Weighed;
use super::{
    BYTES_PER_TOKEN, Options, Pick, PickError, Policy, Request, Target, least_in_flight, rendezvous,
};

const PREFIX_HASH: &str = "prefix_hash";
const OVERFLOW: &str = "overflow";
const NO_PROMPT: &str = "no_prompt";

/// Every reason this policy gives: the worker of the prompt's head; the next one in that head's
/// order, because those before it have their share; fewest in flight for want of a prompt.
pub const REASONS: &[&str] = &[PREFIX_HASH, OVERFLOW, NO_PROMPT];

/// See [`super::PolicyKind::score`].
pub const SCORE: &str = "The worker's draw for the prompt's head, 0 to 1, null if the worker has its share of the \
    load; the highest wins. With the reason `no_prompt` requests in flight; the lowest wins.";

/// See the module.
pub struct PrefixHash {
    head_bytes: usize,
    load_factor: f64,
}

impl PrefixHash {
    pub fn new(options: &Options) -> Self {
        Self {
            head_bytes: options.prefix_token_count.saturating_mul(BYTES_PER_TOKEN),
            load_factor: options.hash_load_factor,
        }
    }
}

impl Policy for PrefixHash {
    fn pick(
        &self,
        request: &Request,
        targets: &[Arc<Target>],
        rng: &mut fastrand::Rng,
        weighed: Option<&mut Weighed>,
    ) -> Result<Pick, PickError> {
        if request.prompt.is_empty() {
            if let Some(weighed) = weighed {
                weighed.fewest_in_flight_wins();
            }
            let index = least_in_flight(targets, rng);
            return Ok(Pick { index, reason: NO_PROMPT, matched_tokens: None });
        }
        let head = &request.prompt[..request.prompt.len().min(self.head_bytes)];
        let place = rendezvous::place(xxh3_64(head), self.load_factor, targets, weighed);
        let reason = if place.is_first { PREFIX_HASH } else { OVERFLOW };
        Ok(Pick { index: place.index, reason, matched_tokens: None })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routing::tests::{loaded, options, scores, tally};

    fn policy(flags: &[&str]) -> PrefixHash {
        PrefixHash::new(&options(flags).expect("flags parse"))
    }

    #[test]
    fn only_the_head_counts() {
        let policy = policy(&["--prefix-token-count=2"]);
        let (targets, _held) = loaded(&[0; 64]);
        let place = |prompt: &[u8]| scores(&policy, prompt, &targets).0;
        let home = place(b"aaaabbbb");
        assert_eq!(home.reason, PREFIX_HASH);
        assert_eq!(place(b"aaaabbbbcccc"), home);
        assert_eq!(place(b"aaaabbbbd"), home);
        // By chance one of these could be at the same of 64 workers; with this hash none is.
        for other in [&b"aaaabbb"[..], b"aaaabbbc", b"baaabbbb"] {
            assert_ne!(place(other).index, home.index);
        }
    }

    #[test]
    fn a_head_is_256_tokens_of_four_bytes_unless_told_otherwise() {
        let (targets, _held) = loaded(&[0; 64]);
        let place = |len: usize, last: u8| {
            let mut prompt = vec![b'a'; len];
            prompt[len - 1] = last;
            scores(&policy(&[]), &prompt, &targets).0.index
        };
        assert_eq!(place(1025, b'b'), place(1025, b'c'));
        assert_ne!(place(1024, b'b'), place(1024, b'c'));
    }

    #[test]
    fn equal_prompts_at_once_spread() {
        let (targets, _) = loaded(&[0; 4]);
        let mut held = Vec::new();
        let mut reasons = Vec::new();
        for _ in 0..40 {
            let (pick, _) = scores(&policy(&[]), b"the same", &targets);
            reasons.push(pick.reason);
            held.push(targets[pick.index].begin());
        }
        assert!(reasons.contains(&PREFIX_HASH) && reasons.contains(&OVERFLOW), "{reasons:?}");
        assert!(targets.iter().all(|target| target.in_flight() <= 13), "a quarter over ten");
    }

    #[test]
    fn without_a_prompt_the_fewest_in_flight_win() {
        let (targets, _held) = loaded(&[3, 1, 2]);
        assert_eq!(tally(&policy(&[]), &targets, 50), [0, 50, 0]);
        let (pick, scores) = scores(&policy(&[]), b"", &targets);
        assert_eq!((pick.reason, scores), (NO_PROMPT, vec![Some(3.0), Some(1.0), Some(2.0)]));
    }
}
