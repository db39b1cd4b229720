//! What a prompt had in common with others, without its text: a hash for each of its blocks.
//!
//! The one idea: each hash is made of its block and of the hash before it. So two prompts whose
//! first n hashes are equal begin with the same n blocks, and one hash names all the text up to its
//! end.
//!
//! A block is [`BLOCK_TOKENS`] tokens at four bytes each: exactly so many of a prompt of token ids, an
//! estimate of a prompt of text. The size does not follow what workers tell of their tokens, because
//! then the same text would be cut differently from one hour to the next. The last block may be
//! shorter.
//!
//! The hash (XXH3, 64 bits) has no secret: the same prompt has the same hashes in every router. They
//! do not give the text back, but who guesses a whole prompt can tell that the guess was right.

use std::fmt;
use std::mem::size_of;
use std::sync::Arc;

use serde::de::{Error, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::routing::BYTES_PER_TOKEN;

/// Tokens of a block, as in Mooncake's traces.
pub(super) const BLOCK_TOKENS: usize = 512;

/// Bytes of a block.
pub(super) const BLOCK_BYTES: usize = BLOCK_TOKENS * BYTES_PER_TOKEN;

/// Most blocks of a prompt, which is a million tokens; nothing is kept of a longer one.
pub(super) const MAX_BLOCKS: usize = 2_048;

/// The hashes of a prompt's blocks, behind one pointer.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptBlocks(Arc<Blocks>);

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Blocks {
    bytes: u32,
    hashes: Vec<Hash>,
}

/// Written as 16 hex digits: a number this large loses its last digits in some readers of JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Hash(u64);

impl PromptBlocks {
    /// The blocks of a prompt as routing sees it; `None` of an empty one, of which nothing is known,
    /// and of one that is too long.
    pub fn of(prompt: &[u8]) -> Option<PromptBlocks> {
        if prompt.is_empty() || prompt.len() > MAX_BLOCKS * BLOCK_BYTES {
            return None;
        }
        let mut before = 0;
        let chained = |block| {
            before = xxh3_64_with_seed(block, before);
            Hash(before)
        };
        let hashes = prompt.chunks(BLOCK_BYTES).map(chained).collect();
        let bytes = u32::try_from(prompt.len()).ok()?;
        Some(PromptBlocks(Arc::new(Blocks { bytes, hashes })))
    }

    /// Bytes of the prompt.
    pub(super) fn bytes(&self) -> u32 {
        self.0.bytes
    }

    /// One hash for each block, in their order.
    pub(super) fn hashes(&self) -> &[Hash] {
        &self.0.hashes
    }

    pub(super) fn heap_bytes(&self) -> usize {
        size_of::<Blocks>() + self.0.hashes.capacity() * size_of::<Hash>()
    }
}

impl Serialize for PromptBlocks {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for PromptBlocks {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<PromptBlocks, D::Error> {
        let blocks = Blocks::deserialize(deserializer)?;
        let count = (blocks.bytes as usize).div_ceil(BLOCK_BYTES);
        if blocks.hashes.len() != count {
            let (bytes, hashes) = (blocks.bytes, blocks.hashes.len());
            let message = format!("{bytes} bytes have {count} hashes, not {hashes}");
            return Err(D::Error::custom(message));
        }
        Ok(PromptBlocks(Arc::new(blocks)))
    }
}

impl Serialize for Hash {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{:016x}", self.0))
    }
}

impl<'de> Deserialize<'de> for Hash {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Hash, D::Error> {
        deserializer.deserialize_str(Digits)
    }
}

struct Digits;

impl Visitor<'_> for Digits {
    type Value = Hash;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("16 lower-case hex digits")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Hash, E> {
        let is_digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        let digits = Some(text).filter(|text| text.len() == 16 && text.bytes().all(is_digit));
        let number = digits.and_then(|digits| u64::from_str_radix(digits, 16).ok());
        number.map(Hash).ok_or_else(|| E::invalid_value(serde::de::Unexpected::Str(text), &self))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn hashes(prompt: &[u8]) -> Vec<Hash> {
        PromptBlocks::of(prompt).map(|blocks| blocks.hashes().to_vec()).unwrap_or_default()
    }

    #[test]
    fn a_prompt_has_one_hash_for_each_block_begun() {
        for (bytes, count) in [(0, 0), (1, 1), (BLOCK_BYTES, 1), (BLOCK_BYTES + 1, 2)] {
            assert_eq!(hashes(&vec![b'a'; bytes]).len(), count, "{bytes}");
        }
    }

    #[test]
    fn nothing_is_kept_of_a_prompt_over_the_bound() {
        let longest = vec![b'a'; MAX_BLOCKS * BLOCK_BYTES];
        assert_eq!(hashes(&longest).len(), MAX_BLOCKS);
        assert!(PromptBlocks::of(&[longest, vec![b'a']].concat()).is_none());
    }

    #[test]
    fn equal_blocks_have_other_hashes_after_another_beginning() {
        let block = |letter| vec![letter; BLOCK_BYTES];
        let one = hashes(&[block(b'a'), block(b'c')].concat());
        let other = hashes(&[block(b'b'), block(b'c')].concat());
        assert!(one[0] != other[0] && one[1] != other[1]);
        assert!(!hashes(&block(b'c')).contains(&one[1]));
    }

    #[test]
    fn they_are_written_in_hex_and_read_as_they_were_written() {
        let blocks = PromptBlocks::of(b"abc").expect("a prompt");
        let json = serde_json::to_string(&blocks).expect("plain data");
        assert_eq!(json, r#"{"bytes":3,"hashes":["78af5f94892f3950"]}"#);
        assert_eq!(serde_json::from_str::<PromptBlocks>(&json).expect("as written"), blocks);
        for bad in [
            r#"{"bytes":3,"hashes":["78AF5F94892F3950"]}"#,
            r#"{"bytes":3,"hashes":["78af5f94892f395"]}"#,
            r#"{"bytes":3,"hashes":["+8af5f94892f3950"]}"#,
            r#"{"bytes":3,"hashes":[]}"#,
            r#"{"bytes":2049,"hashes":["78af5f94892f3950"]}"#,
            r#"{"hashes":["78af5f94892f3950"]}"#,
        ] {
            assert!(serde_json::from_str::<PromptBlocks>(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_record_holds_them_behind_one_pointer() {
        assert_eq!(size_of::<Option<PromptBlocks>>(), size_of::<usize>());
    }

    proptest! {
        #[test]
        fn equal_leading_hashes_are_equal_leading_text(
            shared in 0..4 * BLOCK_BYTES,
            ends in prop::array::uniform2(0..2 * BLOCK_BYTES),
        ) {
            let prompts = [(ends[0], b'x'), (ends[1], b'y')]
                .map(|(bytes, letter)| [vec![b'a'; shared], vec![letter; bytes]].concat());
            let [one, other] = prompts.map(|prompt| hashes(&prompt));
            let equal = one.iter().zip(&other).take_while(|(one, other)| one == other).count();
            // Without an end of their own both are the same prompt, to its last block.
            let expected =
                if ends == [0, 0] { shared.div_ceil(BLOCK_BYTES) } else { shared / BLOCK_BYTES };
            prop_assert_eq!(equal, expected);
        }
    }
}
