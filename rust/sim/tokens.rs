//! The simulated worker's tokenizer and what its model says.
//!
//! The one idea: a token *is* up to four bytes of text, packed into its id. So text, `input_ids`,
//! `/tokenize` and `/detokenize` agree with each other without a vocabulary, and an answer sent
//! back as part of the next prompt consists of the tokens that the worker generated (every token it
//! generates is four bytes long).

use std::sync::LazyLock;

/// Bytes of text per token.
const TOKEN_BYTES: usize = 4;

/// The most tokens one request can generate; more is cut to this, as SGLang cuts to its context
/// length.
pub const MAX_OUTPUT_TOKENS: usize = 1 << 17;

/// What the simulated model says, over and over.
const WORDS: [&str; 15] = [
    " the", " old", " fox", " ran", " far", " and", " saw", " her", " own", " new", " red", " hat",
    " lie", " too", " low",
];

static OUTPUT: LazyLock<(String, Vec<u32>)> = LazyLock::new(|| {
    let text: String = WORDS.iter().copied().cycle().take(MAX_OUTPUT_TOKENS).collect();
    let ids = encode(&text);
    (text, ids)
});

/// The tokens of a text: one per four bytes, at least one.
pub fn encode(text: &str) -> Vec<u32> {
    let pack = |bytes: &[u8]| {
        let mut id = [0; TOKEN_BYTES];
        id[..bytes.len()].copy_from_slice(bytes);
        u32::from_le_bytes(id)
    };
    match text {
        "" => vec![0],
        text => text.as_bytes().chunks(TOKEN_BYTES).map(pack).collect(),
    }
}

/// The text of some tokens. Bytes that are no UTF-8 become the replacement character.
pub fn decode(ids: &[u32]) -> String {
    let mut bytes = Vec::with_capacity(ids.len() * TOKEN_BYTES);
    for id in ids {
        let token = id.to_le_bytes();
        let padding = token.iter().rev().take_while(|byte| **byte == 0).count();
        bytes.extend_from_slice(&token[..TOKEN_BYTES - padding]);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Text and ids of the first `count` tokens that every answer begins with.
pub fn output(count: usize) -> (&'static str, &'static [u32]) {
    let (text, ids) = &*OUTPUT;
    let count = count.min(MAX_OUTPUT_TOKENS);
    (&text[..count * TOKEN_BYTES], &ids[..count])
}

/// Text of those of an answer's first `to` tokens that come after its first `from`.
pub fn words(from: usize, to: usize) -> &'static str {
    &output(to).0[output(from.min(to)).0.len()..]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_four_bytes() {
        let counts: Vec<_> = ["", "a", "abcd", "abcde"].map(|text| encode(text).len()).into();
        assert_eq!(counts, [1, 1, 1, 2]);
        assert_eq!(encode("abcdefgh")[0], encode("abcdxyz")[0]);
    }

    #[test]
    fn decoding_gives_the_text_back() {
        for text in ["", "a", "abcd", "héllo wörld", "你好，世界"] {
            assert_eq!(decode(&encode(text)), text);
        }
        assert_eq!(decode(&[u32::MAX]), "\u{fffd}".repeat(4));
    }

    #[test]
    fn the_answer_is_its_words_in_turn() {
        let (text, ids) = output(20);
        assert_eq!(ids.len(), 20);
        assert_eq!(text, (0..20).map(|number| words(number, number + 1)).collect::<String>());
        assert_eq!((words(1, 3), words(3, 3), words(3, 1)), (" old fox", "", ""));
        assert_eq!(encode(text), ids);
        assert_eq!(output(usize::MAX).1.len(), MAX_OUTPUT_TOKENS);
        assert!(WORDS.iter().all(|word| word.len() == TOKEN_BYTES));
    }
}
