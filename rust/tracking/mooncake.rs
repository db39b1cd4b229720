//! Traces as a load that can be sent again: lines in the format of the traces that Mooncake published.
//!
//! One line for each request, oldest first: `timestamp` (milliseconds since the first line),
//! `input_length` and `output_length` (tokens), and `hash_ids`, one for each 512 tokens of the
//! prompt. Equal ids of two lines stand for equal text, and so does all that is before them. Ids
//! count up in the order of their first appearance. Source of the format: Qin et al., "Mooncake: A
//! KVCache-centric Disaggregated Architecture for LLM Serving" (2024), and its repository.
//!
//! Lengths are the worker's own words. A request whose worker did not tell both, or told 0 or a
//! prompt longer than any that has blocks, and one without known blocks, is left out and counted:
//! nothing is guessed.
//!
//! The one difficulty: blocks were cut by bytes, before anyone knew the tokens, and ids stand for
//! tokens. Both are laid over each other by the mean bytes per token of all lines: an id is the hash
//! of the block in which its last token lies by that measure. So there are always as many ids as
//! the length asks for, and they never claim text to be shared that is not. By up to a block they
//! may claim too little.

use std::io::Write;

use hashbrown::HashMap;

use super::prompt_blocks::{BLOCK_BYTES, BLOCK_TOKENS, Hash, MAX_BLOCKS, PromptBlocks};
use super::trace::Trace;

/// Lines written at a time: a few dozen KB, at most 2.5 MB.
const LINES: usize = 100;

/// The longest prompt of a line, and so at most as many ids as there are blocks.
const MAX_TOKENS: u32 = (MAX_BLOCKS * BLOCK_TOKENS) as u32;

/// One request of the load.
#[derive(Debug)]
struct Request {
    arrived_unix_us: i64,
    prompt_tokens: u32,
    completion_tokens: u32,
    blocks: PromptBlocks,
}

/// The lines of some traces, many at a time. Holds about 40 bytes for each line and each id.
#[derive(Debug)]
pub struct Mooncake {
    requests: std::vec::IntoIter<Request>,
    left_out: usize,
    first_unix_us: i64,
    /// Of all requests together.
    bytes: u64,
    tokens: u64,
    /// Ids given so far, by the place in the prompt and the text up to there: in a text of few bytes
    /// per token several ids end in the same block.
    ids: HashMap<(u32, Hash), u32>,
}

impl Mooncake {
    /// The lines of these traces, which come newest first.
    pub fn of(pages: impl Iterator<Item = Vec<Trace>>) -> Mooncake {
        let mut requests = Vec::new();
        let mut left_out = 0;
        for trace in pages.flatten() {
            match request(trace) {
                Some(request) => requests.push(request),
                None => left_out += 1,
            }
        }
        requests.reverse();
        // Stable: what arrived in the same microsecond stays in the order of arrival.
        requests.sort_by_key(|request| request.arrived_unix_us);
        Mooncake {
            left_out,
            first_unix_us: requests.first().map_or(0, |request| request.arrived_unix_us),
            bytes: requests.iter().map(|request| u64::from(request.blocks.bytes())).sum(),
            tokens: requests.iter().map(|request| u64::from(request.prompt_tokens)).sum(),
            ids: HashMap::new(),
            requests: requests.into_iter(),
        }
    }

    /// Traces that give no line.
    pub fn left_out(&self) -> usize {
        self.left_out
    }

    fn write(&mut self, request: &Request, lines: &mut Vec<u8>) {
        let timestamp = (request.arrived_unix_us - self.first_unix_us) / 1_000;
        let Request { prompt_tokens, completion_tokens, .. } = request;
        // Memory takes all bytes.
        let _ = write!(
            lines,
            r#"{{"timestamp": {timestamp}, "input_length": {prompt_tokens}, "output_length": {completion_tokens}, "hash_ids": ["#
        );
        for place in 0..prompt_tokens.div_ceil(BLOCK_TOKENS as u32) {
            let comma = if place == 0 { "" } else { ", " };
            let id = self.id(request, place);
            let _ = write!(lines, "{comma}{id}");
        }
        lines.extend_from_slice(b"]}\n");
    }

    /// The id of the `place`-th 512 tokens of a prompt.
    fn id(&mut self, request: &Request, place: u32) -> u32 {
        let end = (u64::from(place) + 1) * BLOCK_TOKENS as u64;
        let end_tokens = end.min(u64::from(request.prompt_tokens));
        let end_bytes = u128::from(end_tokens) * u128::from(self.bytes) / u128::from(self.tokens);
        let block = end_bytes.saturating_sub(1) / BLOCK_BYTES as u128;
        let hashes = request.blocks.hashes();
        let last = hashes.len() - 1;
        let hash = hashes[usize::try_from(block).map_or(last, |block| block.min(last))];
        let next = u32::try_from(self.ids.len()).unwrap_or(u32::MAX);
        *self.ids.entry((place, hash)).or_insert(next)
    }
}

impl Iterator for Mooncake {
    type Item = Vec<u8>;

    fn next(&mut self) -> Option<Vec<u8>> {
        let mut lines = Vec::new();
        for _ in 0..LINES {
            let Some(request) = self.requests.next() else { break };
            self.write(&request, &mut lines);
        }
        (!lines.is_empty()).then_some(lines)
    }
}

/// What a trace says of the load, if it says all of it.
fn request(trace: Trace) -> Option<Request> {
    let told = |tokens: Option<u32>| tokens.filter(|tokens| *tokens > 0);
    Some(Request {
        arrived_unix_us: trace.timestamp.unix_us(),
        prompt_tokens: told(trace.prompt_tokens).filter(|tokens| *tokens <= MAX_TOKENS)?,
        completion_tokens: told(trace.completion_tokens)?,
        blocks: trace.prompt_blocks.filter(|blocks| !blocks.hashes().is_empty())?,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;
    use crate::tracking::record::Record;
    use crate::tracking::text::Text;

    /// A trace of this prompt, so many milliseconds after the year began, with what its worker told.
    fn trace(at_ms: i64, prompt: &[u8], prompt_tokens: u32, completion_tokens: u32) -> Trace {
        let arrived = 1_767_225_600_000_000 + at_ms * 1_000;
        let record = Record::new("id", Text::new("/generate"), Text::new("random"), arrived);
        let mut trace = record.view();
        trace.prompt_blocks = PromptBlocks::of(prompt);
        trace.prompt_tokens = Some(prompt_tokens);
        trace.completion_tokens = Some(completion_tokens);
        trace
    }

    fn lines(mooncake: Mooncake) -> Vec<Value> {
        let text: Vec<u8> = mooncake.flatten().collect();
        let lines = std::str::from_utf8(&text).expect("text").lines();
        lines.map(|line| serde_json::from_str(line).expect("JSON")).collect()
    }

    fn ids(line: &Value) -> Vec<u64> {
        let ids = line["hash_ids"].as_array().expect("a list");
        ids.iter().map(|id| id.as_u64().expect("a number")).collect()
    }

    fn length(line: &Value) -> u64 {
        line["input_length"].as_u64().expect("a number")
    }

    /// How many of the first ones are equal.
    fn shared<T: PartialEq>(one: &[T], other: &[T]) -> usize {
        one.iter().zip(other).take_while(|(one, other)| one == other).count()
    }

    #[test]
    fn lines_are_oldest_first_and_share_ids_where_prompts_share_text() {
        let system = vec![b's'; 2 * BLOCK_BYTES];
        let asks = |letter| [system.clone(), vec![letter; 100]].concat();
        let newest_first = vec![
            trace(3_200, &asks(b'b'), 1_049, 7),
            trace(200, &asks(b'a'), 1_049, 5),
            trace(200, b"short", 1, 1),
        ];
        let expected = [
            json!({"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": [0]}),
            json!({"timestamp": 0, "input_length": 1049, "output_length": 5, "hash_ids": [1, 2, 3]}),
            json!({"timestamp": 3000, "input_length": 1049, "output_length": 7, "hash_ids": [1, 2, 4]}),
        ];
        assert_eq!(lines(Mooncake::of(vec![newest_first].into_iter())), expected);
    }

    #[test]
    fn what_is_not_known_is_left_out_and_counted() {
        let mut untold = trace(0, b"a", 1, 1);
        untold.prompt_tokens = None;
        let mut unended = trace(0, b"a", 1, 1);
        unended.completion_tokens = None;
        let nothing = [trace(0, b"", 1, 1), trace(0, b"a", 0, 1), trace(0, b"a", 1, 0)];
        let nonsense = [trace(0, b"a", u32::MAX, 1), trace(0, b"a", MAX_TOKENS + 1, 1)];
        let good = [trace(0, b"a", 1, 1), trace(0, b"a", MAX_TOKENS, 1)];
        let pages = [vec![untold, unended], nothing.to_vec(), nonsense.to_vec(), good.to_vec()];
        let mooncake = Mooncake::of(pages.into_iter());
        assert_eq!(mooncake.left_out(), 7);
        let lines = lines(mooncake);
        assert_eq!(lines.iter().map(|line| ids(line).len()).collect::<Vec<_>>(), [MAX_BLOCKS, 1]);
        assert_eq!(Mooncake::of(std::iter::empty()).next(), None);
    }

    #[test]
    fn many_lines_come_in_parts() {
        let traces = (0..250).rev().map(|at_ms| trace(at_ms, b"a", 1, 1)).collect();
        let parts: Vec<_> = Mooncake::of(vec![traces].into_iter()).collect();
        let newlines = |part: &Vec<u8>| part.iter().filter(|byte| **byte == b'\n').count();
        assert_eq!(parts.iter().map(newlines).collect::<Vec<_>>(), [100, 100, 50]);
    }

    proptest! {
        #[test]
        fn ids_are_as_many_as_the_length_asks_for_and_shared_only_with_the_text(
            requests in prop::collection::vec((0..6_usize, 0..3_u8, 0..5_000_usize, 1..20_u32), 1..12),
            tokens_per_kib in 50..900_u32,
        ) {
            // So many blocks of a conversation, then text of its own; tokens of the text vary a little.
            let prompt = |(blocks, conversation, own, _): (usize, u8, usize, u32)| {
                let shared = vec![conversation; blocks * BLOCK_BYTES];
                [shared, vec![b'x'; own + 1]].concat()
            };
            let prompts: Vec<_> = requests.iter().map(|request| prompt(*request)).collect();
            let tokens = |prompt: &[u8], more: u32| prompt.len() as u32 * tokens_per_kib / 1024 + more;
            let traces = requests.iter().zip(&prompts).zip(0..);
            let mut newest_first: Vec<_> = traces
                .map(|((request, prompt), at_ms)| trace(at_ms, prompt, tokens(prompt, request.3), 1))
                .collect();
            newest_first.reverse();
            let lines = lines(Mooncake::of(vec![newest_first].into_iter()));
            prop_assert_eq!(lines.len(), requests.len());
            let sum = |field: fn(&(&Value, &Vec<u8>)) -> u64| lines.iter().zip(&prompts).map(|it| field(&it)).sum::<u64>();
            let (bytes, tokens) = (sum(|(_, prompt)| prompt.len() as u64), sum(|(line, _)| length(line)));
            let mut next = 0;
            for (line, prompt) in lines.iter().zip(&prompts) {
                prop_assert_eq!(ids(line).len() as u64, length(line).div_ceil(512));
                for id in ids(line) {
                    prop_assert!(id <= next);
                    next = next.max(id + 1);
                }
                for (other, other_prompt) in lines.iter().zip(&prompts) {
                    let shared_ids = shared(&ids(line), &ids(other)) as u64;
                    let shared_bytes = shared(prompt, other_prompt) as u64;
                    // The last place that both have in whole.
                    let whole = length(line).min(length(other)) / 512;
                    let end = |places: u64| places * 512 * bytes / tokens;
                    // Not too much: the text of all shared ids is shared.
                    let is_same = prompt == other_prompt;
                    prop_assert!(is_same || end(shared_ids.min(whole)) <= shared_bytes);
                    // Nor too little: but for a block cut off, shared text has shared ids.
                    let in_blocks = shared_bytes / BLOCK_BYTES as u64 * BLOCK_BYTES as u64;
                    let expected = (0..=whole).rev().find(|places| end(*places) <= in_blocks);
                    prop_assert!(Some(shared_ids) >= expected, "{shared_ids} of {expected:?}");
                }
            }
        }
    }
}
