//! A load as Mooncake's traces write it: when each request came, how long prompt and answer are, and
//! which prompts begin alike.
//!
//! The format: JSON lines with `timestamp` (milliseconds, never going back), `input_length` and
//! `output_length` (tokens), and `hash_ids`, one for each 512 tokens of the prompt; equal ids are equal
//! pieces of text. One field is not Mooncake's and may be missing: `routing_key`, what the requests of a session
//! have in common. Other fields are passed over.
//!
//! Source: the traces of R. Qin et al., "Mooncake" (FAST 2025).

use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Read, Write};
use std::path::Path;

use hashbrown::{HashMap, HashSet};
use serde_json::{Map, Value};

use crate::sim::MAX_OUTPUT_TOKENS;
use crate::sim::kv_cache::chain;

/// Tokens that one of the `hash_ids` stands for.
pub const BLOCK_TOKENS: usize = 512;

/// A longer line is no line of a trace.
const MAX_LINE_BYTES: u64 = 64 << 20;

/// A request of a trace.
#[derive(Clone, Debug, PartialEq)]
pub struct Asked {
    /// Seconds since the trace began, at least 0.
    pub at_secs: f64,
    /// Tokens of the prompt, at least 1.
    pub prompt_tokens: u32,
    /// Tokens of the answer, at least 1.
    pub output_tokens: u32,
    /// The prompt's pieces of [`BLOCK_TOKENS`] tokens, the last one cut: equal numbers are equal text.
    pub blocks: Box<[u32]>,
    /// What the requests of its session have in common, as the header `x-smg-routing-key` would say.
    pub routing_key: Option<Box<str>>,
}

/// Requests in the order of their arrival. Memory: what was asked for, about 4 bytes per block.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Trace {
    pub requests: Vec<Asked>,
}

/// Why a trace cannot be replayed, with file and line.
#[derive(Debug, thiserror::Error)]
#[error("{path}{}: {problem}", line.map(|line| format!(", line {line}")).unwrap_or_default())]
pub struct BadTrace {
    pub path: String,
    pub line: Option<usize>,
    pub problem: String,
}

impl Trace {
    /// Reads a file: all of it, or its first `wanted` requests.
    ///
    /// # Errors
    /// The file cannot be read, is empty or has fewer than `wanted` requests; or what is wrong with
    /// one of its lines.
    pub fn read(path: &Path, wanted: Option<usize>) -> Result<Self, BadTrace> {
        let bad = |line, problem| BadTrace { path: path.display().to_string(), line, problem };
        let unreadable = |error: io::Error| bad(None, format!("cannot be read: {error}"));
        let mut file = BufReader::new(File::open(path).map_err(unreadable)?);
        let mut trace = Self::default();
        let mut numbers = HashMap::new();
        let mut text = Vec::new();
        for line in 1.. {
            if wanted.is_some_and(|wanted| trace.requests.len() >= wanted) {
                break;
            }
            text.clear();
            let part = file.by_ref().take(MAX_LINE_BYTES + 1).read_until(b'\n', &mut text);
            if part.map_err(unreadable)? == 0 {
                break;
            }
            if text.trim_ascii().is_empty() {
                continue;
            }
            let earliest = trace.requests.last().map_or(0.0, |asked| asked.at_secs);
            let asked = parse(&text, earliest, &mut numbers);
            trace.requests.push(asked.map_err(|problem| bad(Some(line), problem))?);
        }
        match (trace.requests.len(), wanted) {
            (0, _) => Err(bad(None, "has no requests".to_owned())),
            (found, Some(wanted)) if found < wanted => {
                let problem = format!("has {found} requests, fewer than --num-requests {wanted}");
                Err(bad(None, problem))
            }
            _ => Ok(trace),
        }
    }

    /// The same requests, their blocks numbered in the order of their first appearance, as they are when they
    /// are read from a file.
    pub fn renumbered(mut self) -> Self {
        let mut numbers = HashMap::new();
        for block in self.requests.iter_mut().flat_map(|asked| &mut asked.blocks) {
            let next = numbers.len() as u32;
            *block = *numbers.entry(*block).or_insert(next);
        }
        self
    }

    /// Writes a file that [`Trace::read`] understands, times in whole milliseconds.
    ///
    /// # Errors
    /// The system's, for a file that cannot be written.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        let mut file = BufWriter::new(File::create(path)?);
        for asked in &self.requests {
            let Asked { at_secs, prompt_tokens, output_tokens, blocks, routing_key } = asked;
            let mut line = serde_json::json!({
                "timestamp": (at_secs * 1e3).round() as u64,
                "input_length": prompt_tokens,
                "output_length": output_tokens,
                "hash_ids": blocks,
            });
            if let Some(routing_key) = routing_key {
                line["routing_key"] = routing_key.as_ref().into();
            }
            writeln!(file, "{line}")?;
        }
        file.flush()
    }

    /// The same requests, coming that many times faster.
    pub fn faster(mut self, rate_scale: f64) -> Self {
        for asked in &mut self.requests {
            asked.at_secs /= rate_scale;
        }
        self
    }

    /// Tokens of all prompts.
    pub fn prompt_tokens(&self) -> u64 {
        self.requests.iter().map(|asked| u64::from(asked.prompt_tokens)).sum()
    }

    /// Tokens of all answers.
    pub fn output_tokens(&self) -> u64 {
        self.requests.iter().map(|asked| u64::from(asked.output_tokens)).sum()
    }

    /// Seconds from the first to the last arrival.
    pub fn span_secs(&self) -> f64 {
        match &self.requests[..] {
            [first, .., last] => last.at_secs - first.at_secs,
            _ => 0.0,
        }
    }

    /// Prompt tokens that one endless cache for all workers would have, in whole blocks: no policy can find more
    /// in a replay. Prompts that begin alike for less than a block have nothing in common here.
    pub fn reusable_tokens(&self) -> u64 {
        let mut seen = HashSet::new();
        let reusable = |asked: &Asked| {
            let names = chain(asked.blocks.iter().map(|block| u64::from(*block)));
            let known = names.iter().take_while(|name| seen.contains(*name)).count();
            seen.extend(names);
            // At least one token of each prompt is computed.
            (known * BLOCK_TOKENS).min(asked.prompt_tokens as usize - 1) as u64
        };
        self.requests.iter().map(reusable).sum()
    }
}

/// A request, if the line is one and does not go back in time; `numbers` has the block of each id so
/// far.
fn parse(
    text: &[u8],
    earliest_secs: f64,
    numbers: &mut HashMap<u64, u32>,
) -> Result<Asked, String> {
    if text.len() as u64 > MAX_LINE_BYTES {
        return Err(format!("is longer than {} MiB", MAX_LINE_BYTES >> 20));
    }
    let fields: Map<String, Value> = serde_json::from_slice(text)
        .map_err(|error| format!("is no JSON object: {}", without_line(&error)))?;
    let prompt_tokens = length(&fields, "input_length", u32::MAX)?;
    let ids = ids(&fields)?;
    let needed = (prompt_tokens as usize).div_ceil(BLOCK_TOKENS);
    if ids.len() < needed {
        return Err(format!(
            "has {} hash_ids, and input_length {prompt_tokens} needs {needed}: one for each \
             {BLOCK_TOKENS} tokens",
            ids.len()
        ));
    }
    let at_secs = seconds(&fields)?;
    if at_secs < earliest_secs {
        return Err(format!(
            "timestamp {} is earlier than the line before",
            shown(&fields["timestamp"])
        ));
    }
    let blocks = ids[..needed].iter().map(|id| number(numbers, *id)).collect::<Result<_, _>>()?;
    let output_tokens = length(&fields, "output_length", MAX_OUTPUT_TOKENS as u32)?;
    let routing_key = routing_key(&fields)?;
    Ok(Asked { at_secs, prompt_tokens, output_tokens, blocks, routing_key })
}

fn without_line(error: &serde_json::Error) -> String {
    let text = error.to_string();
    // The line is the file's, not the one that serde_json counts.
    let problem = text.split(" at line ").next().unwrap_or_default();
    format!("{problem} at character {}", error.column())
}

fn field<'a>(fields: &'a Map<String, Value>, name: &str) -> Result<&'a Value, String> {
    fields.get(name).filter(|value| !value.is_null()).ok_or_else(|| format!("has no {name}"))
}

fn length(fields: &Map<String, Value>, name: &str, most: u32) -> Result<u32, String> {
    let value = field(fields, name)?;
    let length = value.as_u64().and_then(|length| u32::try_from(length).ok());
    length.filter(|length| (1..=most).contains(length)).ok_or_else(|| {
        format!("{name} must be a whole number from 1 to {most}, not {}", shown(value))
    })
}

fn ids(fields: &Map<String, Value>) -> Result<Vec<u64>, String> {
    let value = field(fields, "hash_ids")?;
    let ids =
        value.as_array().ok_or_else(|| format!("hash_ids must be a list, not {}", shown(value)))?;
    let id = |id: &Value| {
        id.as_u64().ok_or_else(|| {
            format!("each of hash_ids must be a whole number from 0 to 2^64-1, not {}", shown(id))
        })
    };
    ids.iter().map(id).collect()
}

fn seconds(fields: &Map<String, Value>) -> Result<f64, String> {
    let value = field(fields, "timestamp")?;
    let ms = value.as_f64().filter(|ms| (0.0..=LATEST_MS).contains(ms));
    let problem = || {
        format!(
            "timestamp must be a number of milliseconds from 0 to {LATEST_MS:e}, not {}",
            shown(value)
        )
    };
    ms.map(|ms| ms / 1e3).ok_or_else(problem)
}

fn routing_key(fields: &Map<String, Value>) -> Result<Option<Box<str>>, String> {
    let Ok(value) = field(fields, "routing_key") else { return Ok(None) };
    let text = value.as_str().filter(|text| !text.is_empty());
    let problem = || format!("routing_key must be a text that is not empty, not {}", shown(value));
    text.map(|text| Some(text.into())).ok_or_else(problem)
}

/// Some thirty thousand years: times beyond it lose their milliseconds.
const LATEST_MS: f64 = 1e15;

fn number(numbers: &mut HashMap<u64, u32>, id: u64) -> Result<u32, String> {
    let next = u32::try_from(numbers.len()).map_err(|_| "has too many different hash_ids")?;
    Ok(*numbers.entry(id).or_insert(next))
}

/// A value as JSON, cut where it is long.
fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(40) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
