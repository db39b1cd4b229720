//! The scan of a request's body: survives any bytes, and says what the documented rules say of the same
//! body as `serde_json` reads it.
//!
//! The model below is those rules on a tree that keeps the order of an object's keys. Where
//! `serde_json` reads no tree (a number out of range, half of a surrogate pair, more than 128 levels)
//! the scan may know more, and only has to survive.
#![no_main]

use std::borrow::Cow;
use std::fmt;

use libfuzzer_sys::fuzz_target;
use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use sglang_router_rs::request::{PIECE_SEPARATOR, Scan, scan};

/// Where a prompt may stand; fields in one group make up one prompt.
const PROMPTS: [&[&str]; 6] = [
    &["text"],
    &["input_ids"],
    &["prompt"],
    &["system", "messages"],
    &["instructions", "input"],
    &["query", "documents", "items", "text_1", "text_2"],
];

fuzz_target!(|body: &[u8]| {
    let scanned = scan(body);
    let text = std::str::from_utf8(body).unwrap_or_default();
    if serde_json::from_str::<IgnoredAny>(text).is_err() {
        assert_eq!(scanned, Scan::default(), "what is no JSON is unknown");
    }
    match serde_json::from_str(text) {
        Ok(Json::Object(fields)) => assert_eq!(scanned, expected(&fields)),
        Ok(_) => assert_eq!(scanned, Scan::default(), "what is no object is unknown"),
        Err(_) => {}
    }
});

/// A JSON value as far as the rules look at it.
enum Json {
    Null,
    Bool(bool),
    /// The token id that the number is, if it is one.
    Number(Option<u32>),
    String(String),
    List(Vec<Json>),
    /// In the order of the text, repeated keys included.
    Object(Vec<(String, Json)>),
}

impl<'de> Deserialize<'de> for Json {
    fn deserialize<D: Deserializer<'de>>(source: D) -> Result<Self, D::Error> {
        source.deserialize_any(Reading)
    }
}

struct Reading;

impl<'de> Visitor<'de> for Reading {
    type Value = Json;

    fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("a value")
    }

    fn visit_unit<E>(self) -> Result<Json, E> {
        Ok(Json::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Json, E> {
        Ok(Json::Bool(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Json, E> {
        Ok(Json::Number(u32::try_from(value).ok()))
    }

    fn visit_i64<E>(self, _: i64) -> Result<Json, E> {
        Ok(Json::Number(None))
    }

    fn visit_f64<E>(self, _: f64) -> Result<Json, E> {
        Ok(Json::Number(None))
    }

    fn visit_str<E>(self, value: &str) -> Result<Json, E> {
        Ok(Json::String(value.to_owned()))
    }

    fn visit_seq<S: SeqAccess<'de>>(self, mut list: S) -> Result<Json, S::Error> {
        let mut items = Vec::new();
        while let Some(item) = list.next_element()? {
            items.push(item);
        }
        Ok(Json::List(items))
    }

    fn visit_map<M: MapAccess<'de>>(self, mut object: M) -> Result<Json, M::Error> {
        let mut fields = Vec::new();
        while let Some(field) = object.next_entry()? {
            fields.push(field);
        }
        Ok(Json::Object(fields))
    }
}

/// The last field of this name, unless it is null.
fn field<'j>(fields: &'j [(String, Json)], name: &str) -> Option<&'j Json> {
    let (_, value) = fields.iter().rev().find(|(key, _)| key == name)?;
    (!matches!(value, Json::Null)).then_some(value)
}

fn string(value: &Json) -> Option<Cow<'static, str>> {
    match value {
        Json::String(text) => Some(Cow::Owned(text.clone())),
        _ => None,
    }
}

fn expected(fields: &[(String, Json)]) -> Scan<'static> {
    let prompt = PROMPTS.iter().find_map(|names| prompt(fields, names));
    let input_tokens = prompt.as_ref().map(|(_, tokens, _)| *tokens);
    let (prompt, _, is_ids) = prompt.unwrap_or_default();
    Scan {
        model: field(fields, "model").and_then(string),
        stream: match field(fields, "stream") {
            None => Some(false),
            Some(Json::Bool(stream)) => Some(*stream),
            Some(_) => None,
        },
        rid: field(fields, "rid").and_then(|rid| match rid {
            Json::List(list) => list.first().and_then(string),
            rid => string(rid),
        }),
        prompt: prompt.into(),
        is_ids,
        input_tokens,
    }
}

/// The bytes and tokens of the prompt in these fields, and whether it is ids: of its text if there is any, else of its
/// ids if all of them are ids.
fn prompt(fields: &[(String, Json)], names: &[&str]) -> Option<(Vec<u8>, u32, bool)> {
    let (mut texts, mut ids) = (Vec::new(), Vec::new());
    for value in names.iter().filter_map(|name| field(fields, name)) {
        collect(value, false, &mut texts, &mut ids);
    }
    if !texts.is_empty() {
        let bytes = texts.join(&PIECE_SEPARATOR);
        let tokens = bytes.len().div_ceil(4) as u32;
        return Some((bytes, tokens, false));
    }
    let ids: Vec<u32> = ids.into_iter().collect::<Option<_>>()?;
    let bytes = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    (!ids.is_empty()).then_some((bytes, ids.len() as u32, true))
}

fn collect<'j>(
    value: &'j Json,
    in_list: bool,
    texts: &mut Vec<&'j [u8]>,
    ids: &mut Vec<Option<u32>>,
) {
    match value {
        Json::String(text) => texts.push(text.as_bytes()),
        Json::Number(id) if in_list => ids.push(*id),
        Json::List(list) => list.iter().for_each(|item| collect(item, true, texts, ids)),
        Json::Object(fields) => {
            let text = fields.iter().rev().find(|(key, _)| key == "content" || key == "text");
            text.into_iter().for_each(|(_, text)| collect(text, false, texts, ids));
        }
        _ => {}
    }
}
