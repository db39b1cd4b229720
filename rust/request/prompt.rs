//! The prompt of a request as the bytes that routing compares.
//!
//! One reader for all request shapes: a prompt is a string, or token ids, or a message or a part of
//! one, or a list of these. Text in reading order is what counts; roles, images, tools and whatever
//! else stands around it are skipped without a copy.
//!
//! Invariant: two prompts with equal leading pieces have equal leading bytes. Does not tokenize and
//! does not apply a chat template.

use std::borrow::Cow;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use crate::json;

/// Stands between two pieces of text. It is no byte of any UTF-8 text, so a piece cannot imitate
/// the border between two.
pub const PIECE_SEPARATOR: u8 = 0xFF;

/// The prompt read so far. Memory grows with the text or ids read, never with what is skipped.
#[derive(Default)]
pub(super) struct Prompt<'a> {
    /// The pieces of text; borrowed while there is one piece and it has no escapes.
    text: Option<Cow<'a, [u8]>>,
    /// Token ids, four little-endian bytes each.
    ids: Vec<u8>,
    /// A number that is no token id was among them.
    ids_unusable: bool,
}

/// The bytes to compare, with the number of tokens they stand for.
pub(super) struct Routed<'a> {
    pub(super) bytes: Cow<'a, [u8]>,
    pub(super) tokens: u32,
    pub(super) is_ids: bool,
}

impl<'a> Prompt<'a> {
    /// Adds one field of the body. A field that cannot be read to its end (nested deeper than 128
    /// levels, or half of a surrogate pair) adds nothing.
    pub(super) fn add(&mut self, field: &'a str) {
        if let Some(piece) = json::plain_string(field) {
            return self.push_borrowed(piece);
        }
        let before = self.mark();
        let mut source = serde_json::Deserializer::from_str(field);
        let reading = Reading { prompt: self, in_list: false };
        if reading.deserialize(&mut source).is_err() {
            self.go_back(before);
        }
    }

    /// The text when there was any, else the ids when all were good; `None` when there was neither.
    pub(super) fn routed(self) -> Option<Routed<'a>> {
        if let Some(bytes) = self.text {
            let tokens = u32::try_from(bytes.len().div_ceil(4)).unwrap_or(u32::MAX);
            return Some(Routed { bytes, tokens, is_ids: false });
        }
        if self.ids.is_empty() || self.ids_unusable {
            return None;
        }
        let tokens = u32::try_from(self.ids.len() / 4).unwrap_or(u32::MAX);
        Some(Routed { bytes: Cow::Owned(self.ids), tokens, is_ids: true })
    }

    fn push_borrowed(&mut self, piece: &'a str) {
        match self.text {
            None => self.text = Some(Cow::Borrowed(piece.as_bytes())),
            Some(_) => self.push(piece),
        }
    }

    fn push(&mut self, piece: &str) {
        match &mut self.text {
            None => self.text = Some(Cow::Owned(piece.as_bytes().to_vec())),
            Some(text) => {
                let text = text.to_mut();
                text.push(PIECE_SEPARATOR);
                text.extend_from_slice(piece.as_bytes());
            }
        }
    }

    fn push_id(&mut self, id: u64) {
        match u32::try_from(id) {
            Ok(id) => self.ids.extend_from_slice(&id.to_le_bytes()),
            Err(_) => self.ids_unusable = true,
        }
    }

    fn mark(&self) -> Mark {
        Mark {
            text_len: self.text.as_ref().map(|text| text.len()),
            ids_len: self.ids.len(),
            ids_unusable: self.ids_unusable,
        }
    }

    fn go_back(&mut self, mark: Mark) {
        match (&mut self.text, mark.text_len) {
            (Some(Cow::Borrowed(text)), Some(len)) => *text = &text[..len],
            (Some(Cow::Owned(text)), Some(len)) => text.truncate(len),
            (text, _) => *text = None,
        }
        self.ids.truncate(mark.ids_len);
        self.ids_unusable = mark.ids_unusable;
    }
}

/// How far the prompt was read at some point.
#[derive(Clone, Copy)]
struct Mark {
    /// `None` before the first piece, even an empty one.
    text_len: Option<usize>,
    ids_len: usize,
    ids_unusable: bool,
}

/// Reads one value into the prompt, whatever its shape.
struct Reading<'p, 'a> {
    prompt: &'p mut Prompt<'a>,
    /// A number is a token id only inside a list.
    in_list: bool,
}

impl<'de> DeserializeSeed<'de> for Reading<'_, 'de> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, source: D) -> Result<(), D::Error> {
        source.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Reading<'_, 'de> {
    type Value = ();

    fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("text, token ids or messages")
    }

    fn visit_borrowed_str<E>(self, piece: &'de str) -> Result<(), E> {
        self.prompt.push_borrowed(piece);
        Ok(())
    }

    fn visit_str<E>(self, piece: &str) -> Result<(), E> {
        self.prompt.push(piece);
        Ok(())
    }

    fn visit_u64<E>(self, id: u64) -> Result<(), E> {
        if self.in_list {
            self.prompt.push_id(id);
        }
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        self.prompt.ids_unusable |= self.in_list;
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        self.prompt.ids_unusable |= self.in_list;
        Ok(())
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<S: SeqAccess<'de>>(self, mut list: S) -> Result<(), S::Error> {
        let prompt = self.prompt;
        while list.next_element_seed(Reading { prompt, in_list: true })?.is_some() {}
        Ok(())
    }

    fn visit_map<M: MapAccess<'de>>(self, mut object: M) -> Result<(), M::Error> {
        let prompt = self.prompt;
        let before = prompt.mark();
        while let Some(key) = object.next_key()? {
            match key {
                Key::Text => {
                    // A message has `content`, a part has `text`: of either, the last one counts.
                    prompt.go_back(before);
                    object.next_value_seed(Reading { prompt, in_list: false })?;
                }
                Key::Other => drop(object.next_value::<IgnoredAny>()?),
            }
        }
        Ok(())
    }
}

/// Whether a key of a message or part leads to its text.
#[derive(serde::Deserialize)]
#[serde(field_identifier)]
enum Key {
    #[serde(rename = "content", alias = "text")]
    Text,
    #[serde(other)]
    Other,
}
