//! One look at the JSON body of a routed request, for the few fields the router needs.
//!
//! The idea: one pass over the body finds where those fields stand; only the prompt's own field is
//! read a second time. Nothing is copied unless a string holds escapes or the prompt has several
//! pieces, so 200 MB of image data cost a skip and no memory.
//!
//! Invariant: no body is rejected here and none makes this panic. A body that is not one well-formed
//! JSON object in UTF-8 gives a scan with everything unknown, also when its beginning was readable;
//! a field of a wrong type is unknown by itself. Does not judge values (that is the worker's task)
//! and does not change the body.

use std::borrow::Cow;

use super::prompt::{Prompt, Routed};
use crate::json::{self, Field};

/// The fields that are read; those from `text` on are where a prompt may stand.
const NAMES: [&str; 15] = [
    "model",
    "stream",
    "rid",
    "text",
    "input_ids",
    "prompt",
    "system",
    "messages",
    "instructions",
    "input",
    "query",
    "documents",
    "items",
    "text_1",
    "text_2",
];
/// How many of the prompt's fields, in their order, make up each candidate for the prompt.
const CANDIDATE_LENS: [usize; 6] = [1, 1, 1, 2, 2, 5];

/// What a request's body says.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Scan<'a> {
    /// The `model` asked for.
    pub model: Option<Cow<'a, str>>,
    /// Whether a stream was asked for: `Some(false)` when absent or `null`, `None` when the body
    /// could not be read or `stream` is no boolean.
    pub stream: Option<bool>,
    /// The request's own id `rid`; of a list, the first.
    pub rid: Option<Cow<'a, str>>,
    /// The prompt for routing: pieces of text in UTF-8 with
    /// [`PIECE_SEPARATOR`](super::PIECE_SEPARATOR) between them, or four little-endian bytes per
    /// token id; empty when none was found.
    pub prompt: Cow<'a, [u8]>,
    /// Whether it is token ids.
    pub is_ids: bool,
    /// The prompt's length in tokens: the number of ids, or a quarter of the text's bytes rounded
    /// up; `None` when no prompt was found.
    pub input_tokens: Option<u32>,
}

/// Scans a request's body.
///
/// The prompt is the first of these that holds text or token ids: `text`; `input_ids`; `prompt`;
/// `system` and `messages`; `instructions` and `input`; `query`, `documents`, `items`, `text_1` and
/// `text_2`. Where one holds both, its text counts. Ids of which one is negative, fractional or
/// beyond 32 bits are no ids.
pub fn scan(body: &[u8]) -> Scan<'_> {
    // All of it is checked once here; reading from a `str` then checks nothing twice.
    std::str::from_utf8(body).ok().and_then(scan_object).unwrap_or_default()
}

fn scan_object(body: &str) -> Option<Scan<'_>> {
    let [model, stream, rid, prompt_fields @ ..] = json::fields(body, NAMES)?;
    let (prompt, input_tokens, is_ids) = match route_by(&prompt_fields) {
        Some(routed) => (routed.bytes, Some(routed.tokens), routed.is_ids),
        None => Default::default(),
    };
    Some(Scan {
        model: model.and_then(json::string),
        stream: stream.map_or(Some(false), |it| it.parse().ok()),
        rid: rid.and_then(first_string),
        prompt,
        is_ids,
        input_tokens,
    })
}

/// The prompt of the first candidate that has one.
fn route_by<'a>(prompt_fields: &[Field<'a>]) -> Option<Routed<'a>> {
    let mut rest = prompt_fields;
    CANDIDATE_LENS.into_iter().find_map(|len| {
        let (candidate, others) = rest.split_at(len);
        rest = others;
        let mut prompt = Prompt::default();
        for field in candidate.iter().flatten() {
            prompt.add(field);
        }
        prompt.routed()
    })
}

/// The string `value` is, or the first string of the list it is.
fn first_string(value: &str) -> Option<Cow<'_, str>> {
    json::string(value).or_else(|| json::first(value).and_then(json::string))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Map, Value, json};

    use super::super::PIECE_SEPARATOR;
    use super::*;

    fn joined(pieces: &[&str]) -> Vec<u8> {
        let pieces: Vec<&[u8]> = pieces.iter().map(|piece| piece.as_bytes()).collect();
        pieces.join(&PIECE_SEPARATOR)
    }

    fn id_bytes(ids: &[u32]) -> Vec<u8> {
        ids.iter().flat_map(|id| id.to_le_bytes()).collect()
    }

    fn assert_text(body: &str, pieces: &[&str]) {
        let scan = scan(body.as_bytes());
        let expected = joined(pieces);
        assert_eq!((&*scan.prompt, scan.is_ids), (&*expected, false), "{body}");
        assert_eq!(scan.input_tokens, Some(expected.len().div_ceil(4) as u32), "{body}");
    }

    fn assert_ids(body: &str, ids: &[u32]) {
        let scan = scan(body.as_bytes());
        assert_eq!((&*scan.prompt, scan.is_ids), (&*id_bytes(ids), true), "{body}");
        assert_eq!(scan.input_tokens, Some(ids.len() as u32), "{body}");
    }

    fn assert_no_prompt(body: &str) {
        let scan = scan(body.as_bytes());
        assert_eq!((&*scan.prompt, scan.input_tokens), (&b""[..], None), "{body}");
        assert!(scan.stream.is_some(), "{body} is an object");
    }

    #[test]
    fn generate() {
        let body = br#" { "rid" : "r-1" ,"text":"Once upon a time", "stream":true,"sampling_params":{"n":1}}"#;
        let scan = scan(body);
        assert_eq!(scan.stream, Some(true));
        assert!(matches!(scan.rid, Some(Cow::Borrowed("r-1"))));
        assert!(matches!(scan.prompt, Cow::Borrowed(b"Once upon a time")), "not copied");
        assert_eq!((scan.input_tokens, scan.model), (Some(4), None));
        assert_text(r#"{"text":["a","b c"]}"#, &["a", "b c"]);
        assert_text(r#"{"text":"tab\t\u00e9\ud83d\ude00"}"#, &["tab\té😀"]);
        assert_ids(r#"{"input_ids":[1, 2,4294967295]}"#, &[1, 2, u32::MAX]);
        assert_ids(r#"{"input_ids":[[1,2],[3]]}"#, &[1, 2, 3]);
        assert_ids(r#"{"text":null,"input_ids":[7]}"#, &[7]);
        assert_text(r#"{"input_ids":[7],"text":"wins"}"#, &["wins"]);
    }

    #[test]
    fn completions() {
        let body = r#"{"model":"llama","prompt":"hi"}"#;
        assert!(matches!(scan(body.as_bytes()).model, Some(Cow::Borrowed("llama"))));
        assert_text(body, &["hi"]);
        assert_text(r#"{"prompt":["hi","ho"]}"#, &["hi", "ho"]);
        assert_ids(r#"{"prompt":[5,6]}"#, &[5, 6]);
        assert_ids(r#"{"prompt":[[5],[6]]}"#, &[5, 6]);
        assert_text(r#"{"prompt":""}"#, &[""]);
    }

    #[test]
    fn chat() {
        assert_text(
            r#"{"messages":[{"role":"system","content":"be brief"},
                {"content":[{"type":"text","text":"what is"},
                    {"type":"image_url","image_url":{"url":"data:;base64,AAAA","text":"no"}},
                    {"type":"text","text":"this?"}],"role":"user"},
                {"role":"assistant","content":null,"tool_calls":[{"id":"c"}]}, null, 5,
                {"role":"user","content":5}, {"role":"user"}, {"content":"end"}]}"#,
            &["be brief", "what is", "this?", "end"],
        );
        assert_no_prompt(r#"{"messages":[null,null]}"#);
        assert_no_prompt(r#"{"messages":[]}"#);
        let one = scan(br#"{"messages":[{"role":"user","content":"only"}]}"#);
        assert!(matches!(one.prompt, Cow::Borrowed(b"only")), "not copied");
    }

    #[test]
    fn messages_of_anthropic() {
        let messages =
            r#""messages":[{"role":"user","content":[{"type":"tool_result","content":"42"}]}]"#;
        assert_text(&format!(r#"{{{messages},"system":"sys"}}"#), &["sys", "42"]);
        assert_text(
            &format!(r#"{{"system":[{{"type":"text","text":"a"}},{{"text":"b"}}],{messages}}}"#),
            &["a", "b", "42"],
        );
    }

    #[test]
    fn responses_and_embeddings() {
        assert_text(r#"{"input":"q","instructions":"do"}"#, &["do", "q"]);
        assert_text(
            r#"{"input":[{"role":"user","content":"q"},{"type":"reasoning","summary":[]},
                {"type":"message","content":[{"type":"input_text","text":"r"}]}]}"#,
            &["q", "r"],
        );
        assert_text(r#"{"input":["a","b"]}"#, &["a", "b"]);
        assert_ids(r#"{"input":[1,2]}"#, &[1, 2]);
        assert_ids(r#"{"input":[[1],[2]]}"#, &[1, 2]);
    }

    #[test]
    fn rerank_and_score() {
        assert_text(r#"{"documents":["d","e"],"query":"q"}"#, &["q", "d", "e"]);
        assert_text(r#"{"items":["i"],"query":"q"}"#, &["q", "i"]);
        assert_text(r#"{"text_1":"a","text_2":["b","c"]}"#, &["a", "b", "c"]);
        assert_ids(r#"{"query":[1],"items":[[2],[3]]}"#, &[1, 2, 3]);
    }

    #[test]
    fn ids_that_are_none() {
        for ids in
            ["[-1]", "[1,4294967296]", "[1.0]", "[1e99]", "[[1],[-2]]", "[18446744073709551616]"]
        {
            assert_no_prompt(&format!(r#"{{"input_ids":{ids}}}"#));
            assert_text(&format!(r#"{{"input_ids":{ids},"prompt":"p"}}"#), &["p"]);
        }
    }

    #[test]
    fn a_wrong_type_spoils_its_field_alone() {
        let scan_of = |fields: &str| format!(r#"{{"text":"t",{fields}}}"#);
        for wrong in ["5", "[]", "[1,null]", "{}", "true", "{\"a\":\"b\"}", "\"\\ud800\""] {
            let body = scan_of(&format!(r#""rid":{wrong},"model":{wrong}"#));
            let scan = scan(body.as_bytes());
            assert_eq!((scan.rid, scan.model, &*scan.prompt), (None, None, &b"t"[..]), "{wrong}");
        }
        for wrong in ["\"yes\"", "1", "[true]", "{}"] {
            let body = scan_of(&format!(r#""stream":{wrong}"#));
            assert_eq!(scan(body.as_bytes()).stream, None, "{wrong}");
        }
        assert_eq!(scan(scan_of(r#""stream":null"#).as_bytes()).stream, Some(false));
        assert_eq!(scan(br#"{}"#).stream, Some(false));
        for wrong in ["5", "true", "null", "[]", "{}", "\"\\ud800\"", "[{\"content\":{}}]"] {
            assert_no_prompt(&format!(r#"{{"text":{wrong}}}"#));
            assert_ids(&format!(r#"{{"text":{wrong},"input_ids":[3]}}"#), &[3]);
        }
    }

    #[test]
    fn the_last_of_a_repeated_field_wins() {
        assert_text(r#"{"text":"a","text":"b"}"#, &["b"]);
        assert_text(r#"{"text":["x",{"content":"a","content":["b","c"]}]}"#, &["x", "b", "c"]);
        assert_ids(r#"{"prompt":[{"content":[1,-1],"content":[2]}]}"#, &[2]);
        assert_eq!(scan(br#"{"rid":"a","rid":["\u0062","c"]}"#).rid.as_deref(), Some("b"));
    }

    #[test]
    fn what_is_no_object_is_unknown() {
        for body in ["", " ", "[]", "null", "5", "\"text\"", "{\"text\":\"a\"}x", "{\"text\":'a'}"]
        {
            assert_eq!(scan(body.as_bytes()), Scan::default(), "{body}");
        }
        assert_eq!(scan(b"{\"text\":\"\xff\"}"), Scan::default());
        assert_eq!(scan(b"\xef\xbb\xbf{\"text\":\"a\"}"), Scan::default());
    }

    #[test]
    fn cut_anywhere_all_is_unknown() {
        let body =
            r#"{"rid":"é","stream":true,"messages":[{"content":[{"text":"\u00e9"}]}],"n":1.5e3}"#;
        for len in 0..body.len() {
            assert_eq!(scan(&body.as_bytes()[..len]), Scan::default(), "first {len} bytes");
        }
        assert_text(body, &["é"]);
    }

    #[test]
    fn deep_nesting_costs_the_prompt_at_most() {
        let nest = "[".repeat(100_000) + &"]".repeat(100_000);
        let body = format!(r#"{{"x":{nest},"messages":["a",{nest}],"rid":"r"}}"#);
        assert_eq!(scan(body.as_bytes()).rid.as_deref(), Some("r"));
        assert_no_prompt(&body);
        let objects = r#"{"content":"#.repeat(100_000) + "1" + &"}".repeat(100_000);
        assert_no_prompt(&format!(r#"{{"messages":{objects}}}"#));
    }

    /// The documented rules on a parsed tree.
    fn naive(body: &[u8]) -> Scan<'static> {
        let Ok(Value::Object(object)) = serde_json::from_slice(body) else {
            return Scan::default();
        };
        let string = |value: &Value| value.as_str().map(|text| Cow::Owned(text.to_owned()));
        let stream = match object.get("stream") {
            None | Some(Value::Null) => Some(false),
            Some(value) => value.as_bool(),
        };
        let rid = object.get("rid").and_then(|rid| match rid {
            Value::Array(list) => list.first().and_then(string),
            other => string(other),
        });
        let model = object.get("model").and_then(string);
        let prompt = naive_prompt(&object);
        let input_tokens = prompt.as_ref().map(|(_, tokens, _)| *tokens);
        let (prompt, _, is_ids) = prompt.unwrap_or_default();
        Scan { model, stream, rid, prompt: prompt.into(), is_ids, input_tokens }
    }

    fn naive_prompt(object: &Map<String, Value>) -> Option<(Vec<u8>, u32, bool)> {
        let (single, groups) = NAMES[3..].split_at(3);
        let groups = [&groups[..2], &groups[2..4], &groups[4..]];
        single.chunks(1).chain(groups).find_map(|names| {
            let (mut texts, mut ids) = (Vec::new(), Vec::new());
            for value in names.iter().filter_map(|name| object.get(*name)) {
                collect(value, false, &mut texts, &mut ids);
            }
            if !texts.is_empty() {
                let bytes = joined(&texts);
                let tokens = bytes.len().div_ceil(4) as u32;
                return Some((bytes, tokens, false));
            }
            let ids: Vec<u32> = ids.into_iter().collect::<Option<_>>()?;
            (!ids.is_empty()).then(|| (id_bytes(&ids), ids.len() as u32, true))
        })
    }

    fn collect<'v>(
        value: &'v Value,
        in_list: bool,
        texts: &mut Vec<&'v str>,
        ids: &mut Vec<Option<u32>>,
    ) {
        match value {
            Value::String(text) => texts.push(text),
            Value::Number(id) if in_list => {
                ids.push(id.as_u64().and_then(|id| u32::try_from(id).ok()));
            }
            Value::Array(list) => list.iter().for_each(|item| collect(item, true, texts, ids)),
            Value::Object(object) => {
                let text = object.get("content").or_else(|| object.get("text"));
                text.into_iter().for_each(|text| collect(text, false, texts, ids));
            }
            _ => {}
        }
    }

    fn any_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<u16>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            (-1e9..1e9f64).prop_map(Value::from),
            "\\PC{0,6}|[\"\\\\\n\u{0}a]{0,4}".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 24, 5, |inner| {
            prop_oneof![
                prop::collection::vec(any::<u16>(), 1..5).prop_map(Value::from),
                prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
                ("content|text|role", inner.clone(), inner).prop_map(|(key, value, other)| {
                    Value::Object(Map::from_iter([(key, value), ("image_url".to_owned(), other)]))
                }),
            ]
        })
    }

    /// The same JSON with everything beyond ASCII escaped.
    fn in_ascii(json: &str) -> String {
        let escaped = |unit: &u16| match u8::try_from(*unit) {
            Ok(byte) if byte.is_ascii() => char::from(byte).to_string(),
            _ => format!("\\u{unit:04x}"),
        };
        json.encode_utf16().map(|unit| escaped(&unit)).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        #[test]
        fn agrees_with_the_naive_model(
            fields in prop::collection::vec((prop::sample::select(&NAMES[..]), any_value()), 0..6),
        ) {
            let object: Map<_, _> = fields.into_iter().map(|(key, v)| (key.to_owned(), v)).collect();
            let compact = serde_json::to_string(&object).unwrap_or_default();
            let spaced = serde_json::to_string_pretty(&object).unwrap_or_default();
            for body in [in_ascii(&compact), compact, spaced] {
                prop_assert_eq!(scan(body.as_bytes()), naive(body.as_bytes()), "{}", body);
            }
        }

        #[test]
        fn any_bytes_are_survived(
            bytes in prop::collection::vec(any::<u8>(), 0..200),
            jsonish in "([\\[\\]{},:]|\"text\"|\"content\"|\"messages\"|[0-9-]|true|\"\\\\u[0-9a-f]{0,4}){0,40}",
        ) {
            scan(&bytes);
            scan(jsonish.as_bytes());
            scan(format!("{{{jsonish}}}").as_bytes());
        }

        #[test]
        fn equal_leading_messages_give_equal_leading_bytes(
            shared in prop::collection::vec("\\PC{0,8}", 1..5),
            left in prop::collection::vec("\\PC{0,8}", 0..4),
            right in prop::collection::vec("\\PC{0,8}", 0..4),
        ) {
            let common = joined(&shared.iter().map(String::as_str).collect::<Vec<_>>());
            for rest in [left, right] {
                let texts = shared.iter().chain(&rest);
                let messages: Vec<_> = texts.map(|text| json!({"role": "user", "content": text})).collect();
                let body = json!({"messages": messages}).to_string();
                let scan = scan(body.as_bytes());
                prop_assert!(scan.prompt.starts_with(&common));
                let next = scan.prompt.get(common.len());
                prop_assert!(next.is_none_or(|next| *next == PIECE_SEPARATOR));
            }
        }
    }
}
