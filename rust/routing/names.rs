//! A prompt as the prefix tree sees it: a chain of blocks, each named by a hash of everything up to its end.
//!
//! The one idea: two prompts have a beginning in common as far as their names are the same. So a tree of
//! names answers what a tree of text would, in a fraction of the memory; and one comparison, at its end,
//! tells whether a piece of any length is the same.
//!
//! A block is a token of four bytes in the prompt's head and sixteen of them behind it. So short prompts
//! match as closely as tokens are counted, and long ones by up to sixteen tokens less than they could.
//! The last block is as long as what is left, so that a prompt matches itself in full.
//!
//! Two different beginnings have the same name once in four billion times. Then a match is believed to be
//! longer than it is. The hash does not withstand someone who wants that.
//!
//! Source: wyhash, for folded products of words and keys as a hash.

/// Blocks of [`HEAD_BLOCK_BYTES`] at a prompt's beginning.
const HEAD_BLOCKS: usize = 32;
const HEAD_BLOCK_BYTES: usize = 4;
const HEAD_BYTES: usize = HEAD_BLOCKS * HEAD_BLOCK_BYTES;

/// Bytes of the blocks behind the head.
pub const BLOCK_BYTES: usize = 64;

/// A hash of a prompt up to the end of a block.
pub type Name = u32;

/// The names of a prompt's blocks. The last block may be shorter than the others.
#[derive(Clone, Debug)]
pub struct Names {
    names: Vec<Name>,
    prompt_bytes: usize,
}

impl Names {
    pub fn of(prompt: &[u8]) -> Self {
        let (head, rest) = prompt.split_at(prompt.len().min(HEAD_BYTES));
        let mut chain =
            Chain { names: Vec::with_capacity(blocks_of(prompt.len())), sum: 0, key: KEY };
        chain.extend(head, |block: &[u8; HEAD_BLOCK_BYTES], key| {
            fold(u64::from(u32::from_le_bytes(*block)).wrapping_add(key), !key)
        });
        chain.extend(rest, |block: &[u8; BLOCK_BYTES], key| {
            let (words, _) = block.as_chunks();
            let word = |at: usize| u64::from_le_bytes(words[at]);
            let pair =
                |pair: usize| fold(word(2 * pair) ^ key, word(2 * pair + 1) ^ PAIR_KEYS[pair]);
            (0..4).map(pair).fold(0, u64::wrapping_add)
        });
        Self { names: chain.names, prompt_bytes: prompt.len() }
    }

    /// From the prompt's beginning.
    pub fn as_slice(&self) -> &[Name] {
        &self.names
    }

    pub fn prompt_bytes(&self) -> usize {
        self.prompt_bytes
    }
}

/// Bytes of the first so many blocks of a prompt, the last one counted as a whole one.
pub fn bytes_of(blocks: usize) -> usize {
    let head = blocks.min(HEAD_BLOCKS);
    head * HEAD_BLOCK_BYTES + (blocks - head) * BLOCK_BYTES
}

/// Blocks of a prompt of so many bytes.
pub fn blocks_of(prompt_bytes: usize) -> usize {
    let head = prompt_bytes.min(HEAD_BYTES);
    head.div_ceil(HEAD_BLOCK_BYTES) + (prompt_bytes - head).div_ceil(BLOCK_BYTES)
}

/// Without a pattern in its bits: the fraction of the golden ratio.
const KEY: u64 = 0x9e37_79b9_7f4a_7c15;

/// Another one for each pair of words in a block: fractions of the square roots of 2, 3, 5 and 7.
const PAIR_KEYS: [u64; 4] =
    [0x6a09_e667_f3bc_c908, 0xbb67_ae85_84ca_a73b, 0x3c6e_f372_fe94_f82b, 0xa54f_f53a_5f1d_36f1];

struct Chain {
    names: Vec<Name>,
    /// Of the hashes of all blocks.
    sum: u64,
    /// Another one for each block, so that two that change places change the sum.
    key: u64,
}

impl Chain {
    fn extend<const BYTES: usize>(&mut self, text: &[u8], hash: impl Fn(&[u8; BYTES], u64) -> u64) {
        let (blocks, end) = text.as_chunks();
        let Self { names, sum, key } = self;
        let mut name = |block| {
            *sum = sum.wrapping_add(hash(block, *key));
            *key = key.wrapping_add(KEY);
            (*sum >> 32) as Name ^ *sum as Name
        };
        names.extend(blocks.iter().map(&mut name));
        if !end.is_empty() {
            let mut block = [0; BYTES];
            block[..end.len()].copy_from_slice(end);
            // Tells it from a whole block that ends in zeros.
            let len = Name::from(end.len() as u8);
            names.push(name(&block) ^ len);
        }
    }
}

/// A product of which every bit depends on all bits of both.
fn fold(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    (product >> 64) as u64 ^ product as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn common(a: &[u8], b: &[u8]) -> usize {
        let (a, b) = (Names::of(a), Names::of(b));
        a.as_slice().iter().zip(b.as_slice()).take_while(|(a, b)| a == b).count()
    }

    #[test]
    fn a_block_is_a_token_in_the_head_and_sixteen_behind() {
        for (bytes, blocks) in
            [(0, 0), (1, 1), (4, 1), (5, 2), (128, 32), (129, 33), (192, 33), (193, 34)]
        {
            assert_eq!(blocks_of(bytes), blocks, "{bytes} bytes");
            assert_eq!(Names::of(&vec![7; bytes]).as_slice().len(), blocks, "{bytes} bytes");
            assert!(bytes_of(blocks) >= bytes && (blocks == 0 || bytes_of(blocks - 1) < bytes));
        }
    }

    #[test]
    fn blocks_that_change_places_change_names() {
        for len in [8, 256] {
            let prompt: Vec<u8> = (0..len).map(|at| (at / 4) as u8).collect();
            for at in (0..len).step_by(4) {
                for other in (0..at).step_by(4) {
                    let mut swapped = prompt.clone();
                    swapped[other..other + 4].fill(prompt[at]);
                    swapped[at..at + 4].fill(prompt[other]);
                    assert_ne!(
                        Names::of(&swapped).as_slice().last(),
                        Names::of(&prompt).as_slice().last()
                    );
                }
            }
        }
    }

    proptest! {
        #[test]
        fn names_are_the_same_as_far_as_whole_blocks_are(
            shared in prop::collection::vec(any::<u8>(), 0..700),
            a in prop::collection::vec(0..2_u8, 0..200),
            b in prop::collection::vec(0..2_u8, 0..200),
        ) {
            let (a, b) = ([&shared[..], &a].concat(), [&shared[..], &b].concat());
            let bytes = a.iter().zip(&b).take_while(|(a, b)| a == b).count();
            let whole = (0..=blocks_of(bytes)).rfind(|blocks| bytes_of(*blocks) <= bytes);
            let same = if a == b { Some(blocks_of(bytes)) } else { whole };
            prop_assert_eq!(Some(common(&a, &b)), same);
        }
    }
}
