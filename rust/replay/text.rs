//! The prompts of a trace: as text for policies, and as the pages of a worker's KV cache.
//!
//! The one idea: a prompt is a row of numbered blocks, and both are functions of the numbers. So nothing
//! is kept: text is written into one buffer when a request is sent, and pages are named without it.
//!
//! A block of text is its number in words, the lowest digit first, and then a piece of a tape of random
//! words; so two blocks differ from their first few words on. A word is one token of a simulated worker:
//! a space and three letters.

use super::trace::{Asked, BLOCK_TOKENS};
use crate::routing::BYTES_PER_TOKEN;
use crate::sim::kv_cache::chain;

const CONSONANTS: &[u8] = b"bcdfghjklmnpqrstvwxyz";
const VOWELS: &[u8] = b"aeiou";

/// Different words.
const WORDS: usize = CONSONANTS.len() * VOWELS.len() * CONSONANTS.len();

/// Digits that tell any two block numbers apart: 2205³ > 2³².
const DIGITS: usize = 3;

/// Words of the tape.
const TAPE_WORDS: usize = 1 << 16;

/// Odd, so that neighbouring numbers start far apart on the tape, and no two of that many at the
/// same place.
const TAPE_STEP: usize = 7919;

/// In the content of a page marks a page of an answer.
const ANSWER: u64 = 1 << 63;

/// Writes prompts. Holds half a megabyte.
pub struct Words {
    /// Long enough for a block from any of [`TAPE_WORDS`] places.
    tape: Vec<u8>,
}

impl Default for Words {
    fn default() -> Self {
        let mut rng = fastrand::Rng::with_seed(0);
        let words = TAPE_WORDS + BLOCK_TOKENS;
        Self { tape: (0..words).flat_map(|_| word(rng.usize(..WORDS))).collect() }
    }
}

impl Words {
    /// Puts the text of a prompt into `text` in place of what is there.
    pub fn write(&self, asked: &Asked, text: &mut Vec<u8>) {
        text.clear();
        for block in &asked.blocks {
            let mut number = *block as usize;
            for _ in 0..DIGITS {
                text.extend(word(number % WORDS));
                number /= WORDS;
            }
            let start = *block as usize * TAPE_STEP % TAPE_WORDS * BYTES_PER_TOKEN;
            let bytes = (BLOCK_TOKENS - DIGITS) * BYTES_PER_TOKEN;
            text.extend_from_slice(&self.tape[start..start + bytes]);
        }
        text.truncate(asked.prompt_tokens as usize * BYTES_PER_TOKEN);
    }
}

fn word(number: usize) -> [u8; BYTES_PER_TOKEN] {
    let (rest, last) = (number / CONSONANTS.len(), number % CONSONANTS.len());
    let (first, middle) = (rest / VOWELS.len() % CONSONANTS.len(), rest % VOWELS.len());
    [b' ', CONSONANTS[first], VOWELS[middle], CONSONANTS[last]]
}

/// The names of the whole pages of prompt and answer together. `page_tokens` divides
/// [`BLOCK_TOKENS`]. As simulated workers always say the same, equal prompts have equal answers.
pub fn pages(asked: &Asked, output_tokens: usize, page_tokens: usize) -> Vec<u64> {
    let prompt_tokens = asked.prompt_tokens as usize;
    let pages_per_block = BLOCK_TOKENS / page_tokens;
    let content = |page: usize| {
        let block = u64::from(asked.blocks[page / pages_per_block]);
        block * pages_per_block as u64 + (page % pages_per_block) as u64
    };
    let in_prompt = prompt_tokens / page_tokens;
    let in_all = (prompt_tokens + output_tokens) / page_tokens;
    let of_answer = |page: usize| match page * page_tokens < prompt_tokens {
        // The prompt's last tokens and the answer's first.
        true => ANSWER ^ content(page) ^ (prompt_tokens as u64).rotate_left(32),
        false => ANSWER | (page * page_tokens - prompt_tokens) as u64,
    };
    chain((0..in_prompt).map(content).chain((in_prompt..in_all).map(of_answer)))
}
