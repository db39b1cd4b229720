//! What a worker's answer says about itself, read while its bytes pass by.
//!
//! The idea: every fact stands near the end of some JSON object, be it the whole answer or one event
//! of a stream. A whole answer is kept and read once at its end. Of a stream each event is read as
//! it passes: with care until the first content came, after that only where a short search says
//! that it can hold facts. The frames of `/generate` repeat the whole text so far; of those only
//! the `meta_info` at their end is read, and each replaces the one before.
//!
//! Invariants: at most [`MAX_KEPT_BYTES`] of an answer are kept; where chunks end makes no difference;
//! what was not said, or was said where this module could not read it, is unknown, never the value
//! of an earlier moment. Does not touch the bytes, does not decompress, does not measure time.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use memchr::{memchr_iter, memmem, memrchr_iter};

use super::sse::{Event, Events, MAX_EVENT_BYTES};
use crate::json::{self, Field};

/// The most bytes of an answer held at any time: a whole answer or one event of a stream. The facts
/// of a larger one are unknown.
pub const MAX_KEPT_BYTES: usize = MAX_EVENT_BYTES;
/// The most items of a streamed batch whose tokens are summed; with more the sums are unknown.
const MAX_ITEMS: usize = 1024;
/// A longer id or finish reason, in bytes, is unknown.
const MAX_NAME_BYTES: usize = 256;

/// The worker's own words about one answer. Of a batch (a list, or several samples) the tokens are
/// sums, unknown unless every item tells, and the words are the first item's. Of a stream that broke
/// off they are what its last events said.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Facts {
    /// Tokens of the prompt, cached ones included.
    pub prompt_tokens: Option<u32>,
    /// Tokens of the prompt that the worker found in its cache.
    pub cached_tokens: Option<u32>,
    /// Tokens generated.
    pub completion_tokens: Option<u32>,
    /// `finish_reason`, `stop_reason`, or the final `status` of a response.
    pub finish_reason: Option<Box<str>>,
    /// `meta_info.id` or the answer's `id`.
    pub worker_request_id: Option<Box<str>>,
}

/// Reads one answer.
#[derive(Debug)]
pub struct Reader(Form);

#[derive(Debug)]
enum Form {
    /// Compressed, or neither JSON nor a stream of events.
    Unread,
    /// At most [`MAX_KEPT_BYTES`]; `None` once the answer has outgrown them.
    Whole(Option<Vec<u8>>),
    Stream(Events, Box<Progress>),
}

/// Whether an answer with this `content-type` is a stream of server-sent events.
pub fn is_stream(content_type: Option<&str>) -> bool {
    is_media_type(content_type, "text/event-stream")
}

fn is_media_type(content_type: Option<&str>, wanted: &str) -> bool {
    let media_type = content_type.and_then(|it| it.split(';').next()).unwrap_or_default();
    media_type.trim().eq_ignore_ascii_case(wanted)
}

impl Reader {
    /// A reader for an answer with these values of the headers `content-type` and
    /// `content-encoding`. Reads JSON and `text/event-stream`, and nothing that is compressed.
    pub fn new(content_type: Option<&str>, content_encoding: Option<&str>) -> Self {
        let plain = content_encoding
            .is_none_or(|it| it.trim().is_empty() || it.trim().eq_ignore_ascii_case("identity"));
        Reader(if plain && is_stream(content_type) {
            Form::Stream(Events::new(), Box::default())
        } else if plain && is_media_type(content_type, "application/json") {
            Form::Whole(Some(Vec::new()))
        } else {
            Form::Unread
        })
    }

    /// Reads the next bytes. True once at most: when they complete the first event of a stream that
    /// has content (never, when an event too large to read came before it).
    pub fn read(&mut self, chunk: &[u8]) -> bool {
        let mut first_content = false;
        match &mut self.0 {
            Form::Unread => {}
            Form::Whole(kept) => {
                *kept = kept.take().filter(|kept| kept.len() + chunk.len() <= MAX_KEPT_BYTES);
                kept.iter_mut().for_each(|kept| kept.extend_from_slice(chunk));
            }
            Form::Stream(events, progress) => {
                events.read(chunk, |event| first_content |= progress.take(event));
            }
        }
        first_content
    }

    /// Ends the answer, complete or not, and tells what it said.
    pub fn finish(self) -> Facts {
        match self.0 {
            Form::Unread | Form::Whole(None) => Facts::default(),
            Form::Whole(Some(kept)) => {
                std::str::from_utf8(&kept).map_or_else(|_| Facts::default(), whole)
            }
            Form::Stream(events, mut progress) => {
                events.finish(|event| {
                    progress.take(event);
                });
                progress.facts()
            }
        }
    }
}

/// The facts of an answer that is no stream: one object, or a list of them.
fn whole(json: &str) -> Facts {
    let mut items: Vec<Said> = match json::list(json) {
        Some(items) => items.iter().map(|item| Said::of(item).unwrap_or_default()).collect(),
        None => Said::of(json).into_iter().collect(),
    };
    let tokens = Tokens::sum(items.iter().map(|item| item.tokens));
    items.truncate(1);
    let first = items.pop().unwrap_or_default();
    tokens.with_words(first.id, first.finish_reason)
}

/// What the events of a stream have said so far.
#[derive(Debug, Default)]
struct Progress {
    content: Content,
    id: Option<Box<str>>,
    finish_reason: Option<Box<str>>,
    /// From the last `usage`.
    usage: Tokens,
    /// From the last frame of each item of the batch, 0 without an index; at most [`MAX_ITEMS`].
    frames: BTreeMap<u32, Tokens>,
    /// Frames carry an index, so none of them stands for the whole answer.
    indexed: bool,
    /// Some frame is missing from `frames`, and it is not known whose.
    gap: bool,
}

/// How far a stream is on its way to content.
#[derive(Debug, Default, PartialEq, Eq)]
enum Content {
    #[default]
    Awaited,
    Seen,
    /// An event passed unread, perhaps with content.
    Missed,
}

impl Progress {
    /// Takes in one event; true when it is the first with content.
    fn take(&mut self, event: Event<'_>) -> bool {
        let data = match event {
            Event::TooLarge => {
                self.lose();
                return false;
            }
            Event::Data(data) => data,
        };
        if self.content == Content::Awaited {
            self.read(&data)
        } else if let Some((index, meta)) = frame_end(&data) {
            self.replace(index, Said::of_meta(meta));
            false
        } else {
            // Deltas are many and facts are few, but until one told the id any may.
            (self.id.is_none() || may_hold_facts(&data)) && self.read(&data)
        }
    }

    fn read(&mut self, data: &[u8]) -> bool {
        let Some(said) = std::str::from_utf8(data).ok().and_then(Said::of_event) else {
            return false;
        };
        let first_content = said.content && self.content == Content::Awaited;
        if first_content {
            self.content = Content::Seen;
        }
        match said.source {
            Source::Frame { index } => self.replace(index, said),
            Source::Usage { .. } | Source::Nothing => self.add(said),
        }
        first_content
    }

    /// Notes a frame, which says again all that the frames before it said.
    fn replace(&mut self, index: Option<u32>, said: Said) {
        self.indexed |= index.is_some();
        let index = index.unwrap_or(0);
        if index == 0 {
            self.id = said.id;
            self.finish_reason = said.finish_reason;
        }
        if self.frames.len() < MAX_ITEMS || self.frames.contains_key(&index) {
            self.frames.insert(index, said.tokens);
        } else {
            self.gap = true;
        }
    }

    /// Notes an event that says something new.
    fn add(&mut self, said: Said) {
        self.id = self.id.take().or(said.id);
        self.finish_reason = self.finish_reason.take().or(said.finish_reason);
        match said.source {
            Source::Usage { prompt_told: true } => self.usage = said.tokens,
            Source::Usage { prompt_told: false } => self.usage.completion = said.tokens.completion,
            Source::Frame { .. } | Source::Nothing => {}
        }
    }

    /// Notes that an event passed unread: what was counted before it is of the past.
    fn lose(&mut self) {
        self.usage = Tokens::default();
        self.frames.clear();
        self.gap = true;
        if self.content == Content::Awaited {
            self.content = Content::Missed;
        }
    }

    fn facts(self) -> Facts {
        let tokens = if self.indexed && self.gap {
            Tokens::default()
        } else if self.frames.is_empty() {
            self.usage
        } else {
            Tokens::sum(self.frames.into_values())
        };
        tokens.with_words(self.id, self.finish_reason)
    }
}

/// Token counts; `None` when unknown.
#[derive(Debug, Clone, Copy, Default)]
struct Tokens {
    prompt: Option<u32>,
    cached: Option<u32>,
    completion: Option<u32>,
}

impl Tokens {
    fn sum(items: impl Iterator<Item = Tokens>) -> Tokens {
        let add = |a: Option<u32>, b: Option<u32>| a?.checked_add(b?);
        let sum = items.reduce(|a, b| Tokens {
            prompt: add(a.prompt, b.prompt),
            cached: add(a.cached, b.cached),
            completion: add(a.completion, b.completion),
        });
        sum.unwrap_or_default()
    }

    /// From OpenAI's or Anthropic's `usage`, and whether it speaks of the prompt. Anthropic does not
    /// count the tokens read from and written to the cache among its `input_tokens`; here the prompt
    /// is all of them.
    fn of_usage(usage: &str) -> Option<(Tokens, bool)> {
        let names = [
            "prompt_tokens",
            "completion_tokens",
            "prompt_tokens_details",
            "input_tokens",
            "output_tokens",
            "input_tokens_details",
            "cache_read_input_tokens",
            "cache_creation_input_tokens",
        ];
        let [prompt, completion, prompt_details, input, output, input_details, read, written] =
            json::fields(usage, names)?;
        let beside = |count: Field<'_>| count.map_or(Some(0), json::number);
        let details = prompt_details.or(input_details);
        let detailed = details.and_then(|it| json::fields(it, ["cached_tokens"])?[0]);
        let prompt = prompt.or(input);
        let tokens = Tokens {
            prompt: prompt.and_then(|prompt| {
                json::number(prompt)?.checked_add(beside(read)?)?.checked_add(beside(written)?)
            }),
            cached: read.or(detailed).and_then(json::number),
            completion: completion.or(output).and_then(json::number),
        };
        Some((tokens, prompt.is_some()))
    }

    fn with_words(self, id: Option<Box<str>>, finish_reason: Option<Box<str>>) -> Facts {
        Facts {
            prompt_tokens: self.prompt,
            cached_tokens: self.cached,
            completion_tokens: self.completion,
            finish_reason,
            worker_request_id: id,
        }
    }
}

/// The fields of an answer or an event that are read: what wraps others, SGLang's own, and those of OpenAI and Anthropic.
const FIELDS: [&str; 14] = [
    "response",
    "message",
    "error",
    "meta_info",
    "index",
    "text",
    "output_ids",
    "id",
    "choices",
    "usage",
    "delta",
    "stop_reason",
    "object",
    "status",
];

/// What one JSON object says: a whole answer, an item of one, or an event.
#[derive(Debug, Default)]
struct Said {
    id: Option<Box<str>>,
    finish_reason: Option<Box<str>>,
    tokens: Tokens,
    source: Source,
    /// It brings generated text, tokens or tool calls.
    content: bool,
}

/// Where an object's tokens come from.
#[derive(Debug, Default, Clone, Copy)]
enum Source {
    #[default]
    Nothing,
    /// `meta_info`: the state of one item.
    Frame { index: Option<u32> },
    /// `usage`: the state of the answer, where `prompt_told` is false without the prompt's side.
    Usage { prompt_told: bool },
}

impl Said {
    /// What an event says; `None` when it is no object or an error.
    fn of_event(json: &str) -> Option<Said> {
        let fields = json::fields(json, FIELDS)?;
        let [response, message, ..] = fields;
        match (response, message) {
            // Responses wrap the whole response, a Message's beginning what is known of it by then,
            // with a count of output tokens that means nothing yet.
            (Some(response), _) => Some(Said { content: false, ..Said::of(response)? }),
            (None, Some(message)) => {
                let said = Said::of(message)?;
                let tokens = Tokens { completion: None, ..said.tokens };
                Some(Said { content: false, tokens, ..said })
            }
            (None, None) => Said::of_fields(fields),
        }
    }

    /// What an object says by itself; `None` when it is no object or an error.
    fn of(json: &str) -> Option<Said> {
        Said::of_fields(json::fields(json, FIELDS)?)
    }

    fn of_fields(fields: [Field<'_>; FIELDS.len()]) -> Option<Said> {
        let [_, _, error, meta, index, text, output_ids, others @ ..] = fields;
        match (error, meta) {
            (Some(_), _) => None,
            (None, Some(meta)) => Some(Said {
                source: Source::Frame { index: index.and_then(json::number) },
                content: is_filled(text) || is_filled(output_ids),
                ..Said::of_meta(meta)
            }),
            (None, None) => Some(Said::of_others(others)),
        }
    }

    /// What an object in OpenAI's or Anthropic's shapes says.
    fn of_others([id, choices, usage, delta, stop, object, status]: [Field<'_>; 7]) -> Said {
        let (chosen, finish_reason) = of_choices(choices);
        let stop = stop.or(delta.and_then(|delta| json::fields(delta, ["stop_reason"])?[0]));
        let ended = status.filter(|it| {
            let response = object.is_some_and(|object| object == "\"response\"");
            response && !["\"in_progress\"", "\"queued\""].contains(it)
        });
        let usage = usage.and_then(Tokens::of_usage);
        let content = is_filled(delta) || any_filled(delta, ["text", "thinking", "partial_json"]);
        Said {
            id: id.and_then(name),
            finish_reason: finish_reason.or(stop.or(ended).and_then(name)),
            tokens: usage.map_or_else(Tokens::default, |(tokens, _)| tokens),
            source: usage.map_or(Source::Nothing, |(_, prompt_told)| Source::Usage { prompt_told }),
            content: chosen || content,
        }
    }

    /// What `meta_info` says, in SGLang's native answers.
    fn of_meta(meta: &str) -> Said {
        let names = ["id", "finish_reason", "prompt_tokens", "cached_tokens", "completion_tokens"];
        let [id, finish_reason, prompt, cached, completion] =
            json::fields(meta, names).unwrap_or_default();
        let kind = |reason: &str| json::fields(reason, ["type"])?[0].and_then(name);
        Said {
            id: id.and_then(name),
            finish_reason: finish_reason.and_then(|reason| name(reason).or_else(|| kind(reason))),
            tokens: Tokens {
                prompt: prompt.and_then(json::number),
                cached: cached.and_then(json::number),
                completion: completion.and_then(json::number),
            },
            ..Said::default()
        }
    }
}

/// Whether `choices` bring content, and why the first of them ended.
fn of_choices(choices: Field<'_>) -> (bool, Option<Box<str>>) {
    let (mut content, mut finish_reason) = (false, None);
    for choice in choices.and_then(json::list).unwrap_or_default() {
        let names = ["index", "finish_reason", "text", "delta"];
        let Some([index, reason, text, delta]) = json::fields(choice, names) else {
            continue;
        };
        content |=
            is_filled(text) || any_filled(delta, ["content", "reasoning_content", "tool_calls"]);
        if index.is_none_or(|index| index == "0") {
            finish_reason = finish_reason.or(reason.and_then(name));
        }
    }
    (content, finish_reason)
}

/// A string of a length fit to be kept.
fn name(value: &str) -> Option<Box<str>> {
    json::string(value).filter(|name| name.len() <= MAX_NAME_BYTES).map(Into::into)
}

/// Whether the value is a string or a list with something in it.
fn is_filled(value: Field<'_>) -> bool {
    let Some(text) = value else {
        return false;
    };
    let inside = |open, close| text.strip_prefix(open)?.strip_suffix(close);
    inside('"', '"').is_some_and(|string: &str| !string.is_empty())
        || inside('[', ']').is_some_and(|list: &str| !list.trim().is_empty())
}

fn any_filled<const N: usize>(object: Field<'_>, names: [&str; N]) -> bool {
    let found = object.and_then(|object| json::fields(object, names));
    found.is_some_and(|found| found.into_iter().any(is_filled))
}

/// The `index` and `meta_info` of a frame that ends `…,"meta_info":{…},"index":0}` or without the
/// index, read from behind so that the text and token ids before them cost nothing. `None` for all
/// else, also a frame with its fields in another order.
fn frame_end(data: &[u8]) -> Option<(Option<u32>, &str)> {
    let is_key = |at: &usize| data[*at..].starts_with(b"\"meta_info\"");
    let mut keys = memrchr_iter(b'_', data).filter_map(|at| at.checked_sub(b"\"meta".len()));
    let (before, meta) = data.split_at(keys.find(is_key)?);
    // A quote inside a string has a backslash before it, the quote of a key a comma or brace.
    if !before.trim_ascii_end().ends_with(b",") && before.trim_ascii() != b"{" {
        return None;
    }
    let meta = std::str::from_utf8(after_key(meta, b"\"meta_info\"")?).ok()?;
    let (value, rest) = json::leading(meta)?;
    let rest = rest.trim_ascii().strip_suffix('}')?;
    if rest.is_empty() {
        // The index may stand in front as well.
        return memmem::find(before, b"\"index\"").is_none().then_some((None, value));
    }
    let index = after_key(rest.strip_prefix(',')?.trim_ascii_start().as_bytes(), b"\"index\"")?;
    Some((Some(serde_json::from_slice(index).ok()?), value))
}

/// What follows `key` and a colon.
fn after_key<'d>(data: &'d [u8], key: &[u8]) -> Option<&'d [u8]> {
    let value = data.strip_prefix(key)?.trim_ascii_start().strip_prefix(b":")?;
    Some(value.trim_ascii_start())
}

/// Whether an event gives a value, other than `null`, to a field that can hold facts.
fn may_hold_facts(data: &[u8]) -> bool {
    // A search is prepared once, as it takes longer than to search one event.
    static KEYS: LazyLock<[memmem::Finder<'static>; 2]> =
        LazyLock::new(|| [&b"\"usage\""[..], b"\"response\""].map(memmem::Finder::new));
    // One search finds these three: hardly anything else has the byte.
    const BEFORE_UNDERSCORE: [(&[u8], usize); 3] = [
        (b"\"finish_reason\"", b"\"finish".len()),
        (b"\"stop_reason\"", b"\"stop".len()),
        (b"\"meta_info\"", b"\"meta".len()),
    ];
    let has_value = |at: usize, key: &[u8]| {
        after_key(&data[at..], key).is_some_and(|value| !value.starts_with(b"null"))
    };
    let is_of_these = |underscore: usize| {
        BEFORE_UNDERSCORE.iter().any(|(key, before)| {
            underscore.checked_sub(*before).is_some_and(|at| has_value(at, key))
        })
    };
    memchr_iter(b'_', data).any(is_of_these)
        || KEYS.iter().any(|key| key.find_iter(data).any(|at| has_value(at, key.needle())))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn facts(
        tokens: [Option<u32>; 3],
        finish_reason: Option<&str>,
        worker_request_id: Option<&str>,
    ) -> Facts {
        let [prompt_tokens, cached_tokens, completion_tokens] = tokens;
        let finish_reason = finish_reason.map(Into::into);
        let worker_request_id = worker_request_id.map(Into::into);
        Facts { prompt_tokens, cached_tokens, completion_tokens, finish_reason, worker_request_id }
    }

    fn known(prompt: u32, cached: u32, completion: u32) -> [Option<u32>; 3] {
        [Some(prompt), Some(cached), Some(completion)]
    }

    const UNKNOWN: [Option<u32>; 3] = [None; 3];

    fn kept_bytes(reader: &Reader) -> usize {
        match &reader.0 {
            Form::Unread | Form::Whole(None) => 0,
            Form::Whole(Some(kept)) => kept.len(),
            Form::Stream(events, _) => events.kept_bytes(),
        }
    }

    /// The facts, and after how many bytes the first content was reported.
    fn read<'c>(
        mut reader: Reader,
        chunks: impl IntoIterator<Item = &'c [u8]>,
    ) -> (Facts, Option<usize>) {
        let (mut passed, mut content_at) = (0, None);
        for chunk in chunks {
            passed += chunk.len();
            if reader.read(chunk) {
                assert_eq!(content_at.replace(passed), None, "told once");
            }
            assert!(kept_bytes(&reader) <= MAX_KEPT_BYTES);
        }
        (reader.finish(), content_at)
    }

    fn json_reader() -> Reader {
        Reader::new(Some("application/json"), None)
    }

    fn sse_reader() -> Reader {
        Reader::new(Some("text/event-stream; charset=utf-8"), None)
    }

    fn of_body(body: &Value) -> Facts {
        let body = body.to_string();
        let (facts, content_at) = read(json_reader(), body.as_bytes().chunks(7));
        assert_eq!(content_at, None);
        facts
    }

    fn stream_of(events: &[Value]) -> String {
        let events = events.iter().map(|event| format!("data: {event}\n\n"));
        events.chain(["data: [DONE]\n\n".to_owned()]).collect()
    }

    /// The facts of a stream, and which of its events brought the first content.
    fn of_stream(events: &[Value]) -> (Facts, Option<usize>) {
        let stream = stream_of(events);
        let (facts, content_at) =
            read(sse_reader(), stream.split_inclusive("\n\n").map(str::as_bytes));
        let event_at = content_at.map(|end| stream[..end].matches("\n\n").count() - 1);
        (facts, event_at)
    }

    fn meta(id: &str, reason: &Value, tokens: [u32; 3]) -> Value {
        let [prompt, cached, completion] = tokens;
        json!({"id": id, "finish_reason": reason, "prompt_tokens": prompt, "cached_tokens": cached,
            "completion_tokens": completion, "e2e_latency": 0.1})
    }

    fn length() -> Value {
        json!({"type": "length", "length": 10})
    }

    #[test]
    fn generate() {
        let body = json!({"text": "x", "output_ids": [1], "meta_info": meta("r", &length(), [605, 512, 10])});
        assert_eq!(of_body(&body), facts(known(605, 512, 10), Some("length"), Some("r")));
        for (reason, expected) in
            [(json!(null), None), (json!("stop"), Some("stop")), (json!(5), None)]
        {
            let body = json!({"meta_info": meta("r", &reason, [1, 0, 2])});
            assert_eq!(of_body(&body), facts(known(1, 0, 2), expected, Some("r")));
        }
    }

    #[test]
    fn lists_are_summed() {
        let items = [
            json!({"text": "a", "meta_info": meta("r0", &length(), [3, 1, 10])}),
            json!({"text": "b", "meta_info": meta("r1", &json!("stop"), [4, 0, 20])}),
        ];
        assert_eq!(of_body(&json!(items)), facts(known(7, 1, 30), Some("length"), Some("r0")));
        let scores = json!([{"score": 0.5, "index": 0, "meta_info": {"id": "s", "prompt_tokens": 5}},
            {"score": 0.1, "index": 1, "meta_info": {"id": "t", "prompt_tokens": 6}}]);
        assert_eq!(of_body(&scores), facts([Some(11), None, None], None, Some("s")));
        let silent = json!([items[0], {"text": "says nothing"}]);
        assert_eq!(of_body(&silent), facts(UNKNOWN, Some("length"), Some("r0")));
        let huge = json!([{"meta_info": {"prompt_tokens": u32::MAX}}, {"meta_info": {"prompt_tokens": 1}}]);
        assert_eq!(of_body(&huge), Facts::default());
        assert_eq!(of_body(&json!([])), Facts::default());
    }

    #[test]
    fn openai() {
        let body = |details: &Value| {
            json!({"id": "c", "object": "chat.completion",
                "choices": [{"index": 0, "message": {"content": "x"}, "finish_reason": "stop"},
                    {"index": 1, "finish_reason": "length"}],
                "usage": {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11,
                    "prompt_tokens_details": details}})
        };
        let cached = body(&json!({"cached_tokens": 8}));
        assert_eq!(of_body(&cached), facts(known(9, 8, 2), Some("stop"), Some("c")));
        for details in [json!(null), json!({}), json!(8), json!({"cached_tokens": null})] {
            let expected = facts([Some(9), None, Some(2)], Some("stop"), Some("c"));
            assert_eq!(of_body(&body(&details)), expected);
        }
        let embeddings = json!({"object": "list", "data": [], "usage": {"prompt_tokens": 4}});
        assert_eq!(of_body(&embeddings), facts([Some(4), None, None], None, None));
    }

    #[test]
    fn responses() {
        let body = |status: &str| {
            json!({"id": "resp", "object": "response", "status": status, "error": null,
            "text": {"format": {"type": "text"}}, "usage": {"input_tokens": 9, "output_tokens": 2,
                "input_tokens_details": {"cached_tokens": 8}}})
        };
        assert_eq!(
            of_body(&body("incomplete")),
            facts(known(9, 8, 2), Some("incomplete"), Some("resp"))
        );
        assert_eq!(of_body(&body("queued")), facts(known(9, 8, 2), None, Some("resp")));
    }

    #[test]
    fn messages() {
        let body = json!({"id": "msg", "type": "message", "stop_reason": "end_turn", "content": [],
            "usage": {"input_tokens": 5, "output_tokens": 2, "cache_read_input_tokens": 30,
                "cache_creation_input_tokens": 1}});
        assert_eq!(of_body(&body), facts(known(36, 30, 2), Some("end_turn"), Some("msg")));
    }

    #[test]
    fn values_of_a_wrong_kind_are_unknown() {
        for wrong in
            [json!(-1), json!(1.5), json!(4_294_967_296_u64), json!("7"), json!([1]), json!(null)]
        {
            let body = json!({"meta_info": {"id": wrong, "prompt_tokens": wrong, "cached_tokens": 1,
                "completion_tokens": wrong, "finish_reason": wrong}});
            let word = wrong.as_str();
            assert_eq!(of_body(&body), facts([None, Some(1), None], word, word));
            let body =
                json!({"id": 5, "usage": {"input_tokens": 3, "cache_read_input_tokens": wrong}});
            let prompt = wrong.is_null().then_some(3);
            assert_eq!(of_body(&body), facts([prompt, None, None], None, None));
        }
        let body =
            json!({"id": "x".repeat(MAX_NAME_BYTES + 1), "choices": 5, "usage": [], "delta": 1});
        assert_eq!(of_body(&body), Facts::default());
    }

    #[test]
    fn errors_say_nothing() {
        let error = json!({"id": "e", "error": {"message": "no"}, "usage": {"prompt_tokens": 1}});
        assert_eq!(of_body(&error), Facts::default());
        assert_eq!(of_stream(&[error]), (Facts::default(), None));
        let old = json!({"object": "error", "message": "no", "code": 400});
        assert_eq!(of_body(&old), Facts::default());
    }

    #[test]
    fn other_answers_are_not_read() {
        let json = br#"{"id":"r"}"#;
        let told = |content_type, encoding| {
            let (facts, _) = read(Reader::new(content_type, encoding), [&json[..]]);
            facts.worker_request_id.is_some()
        };
        assert!(told(Some("Application/JSON ; charset=utf-8"), Some("Identity")));
        assert!(told(Some("application/json"), Some("")));
        assert!(!told(Some("application/json"), Some("gzip")));
        assert!(!told(Some("text/plain"), None));
        assert!(!told(None, None));
        let gzip = Reader::new(Some("text/event-stream"), Some("gzip"));
        assert_eq!(
            read(gzip, [&b"data: {\"id\":\"r\",\"text\":\"x\"}\n\n"[..]]),
            (Facts::default(), None)
        );
    }

    #[test]
    fn a_whole_answer_is_kept_up_to_the_bound() {
        let body = json!({"meta_info": meta("r", &length(), [1, 0, 1])}).to_string();
        for (len, fits) in [(MAX_KEPT_BYTES, true), (MAX_KEPT_BYTES + 1, false)] {
            let padded = body.clone() + &" ".repeat(len - body.len());
            let (facts, _) = read(json_reader(), padded.as_bytes().chunks(1000));
            assert_eq!(facts.prompt_tokens.is_some(), fits, "{len}");
        }
        for cut in 0..body.len() {
            assert_eq!(read(json_reader(), [&body.as_bytes()[..cut]]).0, Facts::default());
        }
    }

    /// A frame of `/generate`.
    fn frame(text: &str, reason: &Value, tokens: [u32; 3], index: Option<u32>) -> Value {
        let mut frame =
            json!({"text": text, "output_ids": [], "meta_info": meta("r", reason, tokens)});
        if let Some(index) = index {
            frame["meta_info"]["id"] = json!(format!("r{index}"));
            frame["index"] = json!(index);
        }
        frame
    }

    #[test]
    fn generate_streamed() {
        let null = json!(null);
        let frames = [
            frame("", &null, [9, 4, 0], None),
            frame("a", &null, [9, 4, 1], None),
            frame("ab", &null, [9, 4, 2], None),
            frame("abc", &length(), [9, 4, 3], None),
        ];
        let expected = facts(known(9, 4, 3), Some("length"), Some("r"));
        assert_eq!(of_stream(&frames), (expected, Some(1)));
        let broken_off = facts(known(9, 4, 2), None, Some("r"));
        assert_eq!(of_stream(&frames[..3]), (broken_off, Some(1)));
        let ids = json!({"output_ids": [5], "meta_info": meta("r", &null, [1, 0, 1])});
        assert_eq!(of_stream(&[ids]).1, Some(0));
    }

    #[test]
    fn a_streamed_batch_is_summed_over_its_last_frames() {
        let null = json!(null);
        let frames = [
            frame("a", &null, [3, 1, 1], Some(1)),
            frame("a", &null, [5, 2, 1], Some(0)),
            frame("ab", &length(), [3, 1, 2], Some(1)),
            frame("abc", &json!("stop"), [5, 2, 3], Some(0)),
        ];
        let expected = facts(known(8, 3, 5), Some("stop"), Some("r0"));
        assert_eq!(of_stream(&frames), (expected, Some(0)));
        let count = u32::try_from(MAX_ITEMS).unwrap_or(u32::MAX);
        for (count, sums) in [(count, known(count, 0, count)), (count + 1, UNKNOWN)] {
            let frames: Vec<_> =
                (0..count).map(|i| frame("a", &length(), [1, 0, 1], Some(i))).collect();
            assert_eq!(of_stream(&frames).0, facts(sums, Some("length"), Some("r0")));
        }
    }

    fn chat_chunk(delta: &Value, reason: &Value, usage: &Value) -> Value {
        json!({"id": "c", "object": "chat.completion.chunk", "usage": usage,
            "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]})
    }

    fn usage(prompt: u32, completion: u32) -> Value {
        json!({"prompt_tokens": prompt, "completion_tokens": completion, "prompt_tokens_details": null})
    }

    #[test]
    fn chat_streamed() {
        let null = json!(null);
        let mut events = vec![
            chat_chunk(&json!({"role": "assistant", "content": ""}), &null, &null),
            chat_chunk(&json!({"content": null, "tool_calls": []}), &null, &null),
            chat_chunk(&json!({"content": "\"usage\":{\"prompt_tokens\":1}"}), &null, &null),
            chat_chunk(&json!({"content": "b"}), &null, &null),
            chat_chunk(&json!({}), &json!("stop"), &null),
        ];
        let without_usage = facts(UNKNOWN, Some("stop"), Some("c"));
        assert_eq!(of_stream(&events), (without_usage, Some(2)));
        events.push(json!({"id": "c", "choices": [], "usage": usage(9, 3)}));
        let with_usage = facts([Some(9), None, Some(3)], Some("stop"), Some("c"));
        assert_eq!(of_stream(&events), (with_usage, Some(2)));
        for delta in [json!({"reasoning_content": "hm"}), json!({"tool_calls": [{"index": 0}]})] {
            assert_eq!(of_stream(&[chat_chunk(&delta, &null, &null)]).1, Some(0));
        }
    }

    #[test]
    fn the_last_usage_wins() {
        let null = json!(null);
        let delta = json!({"content": "a"});
        let events = [1, 2, 3].map(|count| chat_chunk(&delta, &null, &usage(9, count)));
        assert_eq!(of_stream(&events).0, facts([Some(9), None, Some(3)], None, Some("c")));
    }

    #[test]
    fn completions_streamed() {
        let chunk = |index: u32, text: &str, reason: Value| json!({"id": "c", "choices": [{"index": index, "text": text, "finish_reason": reason}]});
        let null = json!(null);
        let events = [
            chunk(0, "", null.clone()),
            chunk(1, "x", json!("length")),
            chunk(0, "y", null),
            chunk(0, "", json!("stop")),
        ];
        assert_eq!(of_stream(&events), (facts(UNKNOWN, Some("stop"), Some("c")), Some(1)));
    }

    #[test]
    fn responses_streamed() {
        let response = |status: &str, usage: Value| {
            json!({"type": "response.x", "response": {"id": "resp", "object": "response",
                "status": status, "usage": usage, "output": []}})
        };
        let delta = |text: &str| json!({"type": "response.output_text.delta", "delta": text});
        let used = json!({"input_tokens": 9, "output_tokens": 2, "input_tokens_details": {"cached_tokens": 8}});
        let mut events =
            vec![response("in_progress", json!(null)), delta(""), delta("a"), delta("b")];
        assert_eq!(of_stream(&events), (facts(UNKNOWN, None, Some("resp")), Some(2)));
        events.push(response("completed", used));
        let expected = facts(known(9, 8, 2), Some("completed"), Some("resp"));
        assert_eq!(of_stream(&events), (expected, Some(2)));
    }

    #[test]
    fn messages_streamed() {
        let delta = |kind: &str, text: &str| json!({"type": "content_block_delta", "index": 0, "delta": {"type": "some_delta", kind: text}});
        let mut events = vec![
            json!({"type": "message_start", "message": {"id": "msg", "stop_reason": null, "content": [],
                "usage": {"input_tokens": 5, "cache_read_input_tokens": 30, "output_tokens": 1}}}),
            json!({"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}),
            delta("partial_json", ""),
            delta("thinking", "hm"),
            delta("text", "a"),
        ];
        let begun = facts([Some(35), Some(30), None], None, Some("msg"));
        assert_eq!(of_stream(&events), (begun, Some(3)));
        events.push(json!({"type": "message_delta", "delta": {"stop_reason": "end_turn"},
            "usage": {"output_tokens": 7}}));
        let ended = facts(known(35, 30, 7), Some("end_turn"), Some("msg"));
        assert_eq!(of_stream(&events), (ended, Some(3)));
        let told_again = json!({"type": "message_delta", "delta": {"stop_reason": null},
            "usage": {"input_tokens": 6, "cache_read_input_tokens": 31, "output_tokens": 8}});
        events.push(told_again);
        assert_eq!(of_stream(&events).0, facts(known(37, 31, 8), Some("end_turn"), Some("msg")));
    }

    #[test]
    fn a_frame_too_large_leaves_no_older_count() {
        let null = json!(null);
        let large = "x".repeat(MAX_KEPT_BYTES);
        let small = |count| frame("a", &null, [9, 4, count], None);
        let last = frame(&large, &length(), [9, 4, 3], None);
        assert_eq!(
            of_stream(&[small(1), small(2), last.clone()]),
            (facts(UNKNOWN, None, Some("r")), Some(0))
        );
        let newer = facts(known(9, 4, 4), None, Some("r"));
        assert_eq!(of_stream(&[small(1), last.clone(), small(4)]), (newer, Some(0)));
        assert_eq!(of_stream(&[last, small(4)]).1, None, "the first content may have been missed");

        let item = |text, index| frame(text, &length(), [9, 4, 1], Some(index));
        let batch = [item("a", 0), item(&large, 1), item("a", 2)];
        assert_eq!(of_stream(&batch).0, facts(UNKNOWN, Some("length"), Some("r0")));

        let chunk = |text: &str| chat_chunk(&json!({"content": text}), &null, &usage(9, 1));
        assert_eq!(of_stream(&[chunk("a"), chunk(&large)]).0, facts(UNKNOWN, None, Some("c")));
    }

    #[test]
    fn a_last_event_needs_no_blank_line() {
        let stream = format!("data: {}", frame("a", &length(), [9, 4, 1], None));
        let expected = facts(known(9, 4, 1), Some("length"), Some("r"));
        assert_eq!(read(sse_reader(), [stream.as_bytes()]), (expected.clone(), None));
        let cut = format!("data: {}\n\n{}", frame("a", &length(), [9, 4, 1], None), &stream[..50]);
        assert_eq!(read(sse_reader(), [cut.as_bytes()]).0, expected);
    }

    #[test]
    fn depth_costs_no_stack() {
        for inner in ["{\"response\":", "{\"message\":", "{\"delta\":", "[", "{\"meta_info\":"] {
            let json = inner.repeat(5000);
            read(sse_reader(), [format!("data: {json}\n\n").as_bytes()]);
            let close: String = inner
                .chars()
                .rev()
                .filter_map(|c| match c {
                    '{' => Some('}'),
                    '[' => Some(']'),
                    _ => None,
                })
                .collect();
            let json = format!("{json}1{}", close.repeat(5000));
            read(sse_reader(), [format!("data: {json}\n\n").as_bytes()]);
            read(json_reader(), [json.as_bytes()]);
        }
    }

    /// Frames in the ways they may be written: `frame_end` must tell what reading all of it tells.
    fn written(frame: &Value, way: u8) -> String {
        let (text, meta) = (&frame["text"], &frame["meta_info"]);
        match (frame.get("index"), way) {
            (None, 0) => format!(r#"{{"text":{text},"meta_info":{meta}}}"#),
            (None, 1) => format!(r#"{{ "text": {text} , "meta_info" : {meta} }}"#),
            (None, _) => format!(r#"{{"meta_info":{meta},"text":{text}}}"#),
            (Some(index), 0) => format!(r#"{{"text":{text},"meta_info":{meta},"index":{index}}}"#),
            (Some(index), 1) => {
                format!(r#"{{"text":{text}, "meta_info": {meta}, "index": {index}}}"#)
            }
            (Some(index), _) => format!(r#"{{"index":{index},"text":{text},"meta_info":{meta}}}"#),
        }
    }

    fn any_stream() -> impl Strategy<Value = String> {
        let event = prop_oneof![
            ("\\PC{0,4}", any::<u16>(), prop::option::of(0..3u32), 0..3u8).prop_map(
                |(text, count, index, way)| {
                    let reason = if count % 3 == 0 { length() } else { json!(null) };
                    written(&frame(&text, &reason, [9, 4, count.into()], index), way)
                }
            ),
            ("\\PC{0,4}", any::<u16>()).prop_map(|(text, count)| {
                let used = if count % 2 == 0 { usage(9, count.into()) } else { json!(null) };
                let reason = if count % 3 == 0 { json!("stop") } else { json!(null) };
                chat_chunk(&json!({"content": text}), &reason, &used).to_string()
            }),
            Just("[DONE]".to_owned()),
            Just("{\"error\":{\"message\":\"x\"}}".to_owned()),
            "[{}\":a-z]{0,9}",
        ];
        let prefix =
            prop::sample::select(vec!["data: ", "data:", ": ping\n\ndata: ", "event: e\r\ndata: "]);
        let end = prop::sample::select(vec!["\n\n", "\r\n\r\n", "\n"]);
        let event =
            (prefix, event, end).prop_map(|(prefix, event, end)| format!("{prefix}{event}{end}"));
        prop::collection::vec(event, 0..8).prop_map(|events| events.concat())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        #[test]
        fn where_chunks_end_makes_no_difference(
            stream in any_stream(),
            mut cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..8),
        ) {
            let bytes = stream.as_bytes();
            let (facts, content_at) = read(sse_reader(), bytes.chunks(1));
            cuts.sort_unstable_by_key(|cut| cut.index(bytes.len() + 1));
            let mut start = 0;
            let mut chunks = Vec::new();
            for end in cuts.iter().map(|cut| cut.index(bytes.len() + 1)).chain([bytes.len()]) {
                chunks.push(&bytes[start..end]);
                start = end;
            }
            let ends = chunks.iter().scan(0, |end, chunk| { *end += chunk.len(); Some(*end) });
            let chunk_with_content = content_at.and_then(|at| ends.into_iter().find(|end| *end >= at));
            prop_assert_eq!(read(sse_reader(), chunks), (facts, chunk_with_content));
        }

        #[test]
        fn the_last_frame_of_each_item_counts(
            frames in prop::collection::vec(
                ("(\\PC|\"meta_info\":\\{|\\}|\")", 0..3u32, [0..99u32, 0..99, 0..99], 0..3u8),
                1..12,
            ),
            batch in any::<bool>(),
        ) {
            let mut last = BTreeMap::new();
            let mut stream = String::new();
            for (text, index, tokens, way) in frames {
                let index = batch.then_some(index);
                let reason = json!("stop");
                let frame = frame(&text, &reason, tokens, index);
                stream += &format!("data: {}\n\n", written(&frame, way));
                last.insert(index.unwrap_or(0), tokens);
            }
            let sums = [0, 1, 2].map(|i| Some(last.values().map(|tokens| tokens[i]).sum()));
            let words = last.contains_key(&0);
            let id = if batch { "r0" } else { "r" };
            let expected = facts(sums, words.then_some("stop"), words.then_some(id));
            prop_assert_eq!(read(sse_reader(), stream.as_bytes().chunks(50)).0, expected);
        }

        #[test]
        fn any_bytes_are_survived(
            bytes in prop::collection::vec(any::<u8>(), 0..200),
            jsonish in "(data:|\n|[\\[\\]{},:]|\"(meta_info|usage|choices|delta|id|index|text)\"|1|null){0,40}",
        ) {
            for reader in [json_reader, sse_reader] {
                read(reader(), bytes.chunks(9));
                read(reader(), [jsonish.as_bytes()]);
                read(reader(), [format!("data: {{{jsonish}}}\n\n").as_bytes()]);
            }
        }
    }
}
