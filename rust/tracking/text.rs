//! How a record keeps its strings small: names that repeat are shared, ids in hex are packed.
//!
//! A `Text` is one pointer. Names that many records have in common (route, model, reasons)
//! come out of a bounded `Names` set and cost the record that pointer; a text of its own costs its
//! bytes as well. A `CompactId` halves the usual id of 32 hex digits.

use std::borrow::Borrow;
use std::fmt::{self, Display, Formatter};
use std::hash::{Hash, Hasher};
use std::mem::size_of;
use std::sync::Arc;

use hashbrown::HashSet;
use uuid::Uuid;
use uuid::fmt::Hyphenated;

/// Most names one `Names` set shares; records with further ones keep a text of their own.
const MAX_NAMES: usize = 1_024;

/// What the router's own ids begin with.
pub const REQUEST_ID_PREFIX: &str = "req_";

/// A model, a reason to pick and one to finish; and one more.
const RECENT: usize = 4;

/// What an `Arc` adds to its content: two counts.
const ARC_COUNTS_BYTES: usize = 2 * size_of::<usize>();

/// The longest head of `text` that has at most `max_bytes` bytes and ends between characters.
pub(super) fn capped(text: &str, max_bytes: usize) -> &str {
    if text.len() <= max_bytes {
        return text;
    }
    let mut end = max_bytes;
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

/// An immutable string behind one pointer.
#[derive(Debug, Clone)]
pub(super) struct Text(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// Held by a `Names` set, which accounts for its memory.
    named: bool,
    text: Box<str>,
}

impl Text {
    /// A text of its own.
    pub(super) fn new(text: &str) -> Text {
        Text(Arc::new(Shared { named: false, text: text.into() }))
    }

    pub(super) fn as_str(&self) -> &str {
        &self.0.text
    }

    /// Heap memory this text adds to its record: none if it is shared by name.
    pub(super) fn own_bytes(&self) -> usize {
        if self.0.named { 0 } else { self.heap_bytes() }
    }

    fn heap_bytes(&self) -> usize {
        ARC_COUNTS_BYTES + size_of::<Shared>() + self.0.text.len()
    }
}

impl PartialEq for Text {
    fn eq(&self, other: &Text) -> bool {
        Arc::ptr_eq(&self.0, &other.0) || self.as_str() == other.as_str()
    }
}

impl Eq for Text {}

impl Hash for Text {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.as_str().hash(state);
    }
}

impl Borrow<str> for Text {
    fn borrow(&self) -> &str {
        self.as_str()
    }
}

/// The texts that records share, at most [`MAX_NAMES`].
#[derive(Debug, Default)]
pub(super) struct Names {
    texts: HashSet<Text>,
    /// Some that were shared last: what is asked for is nearly always one of them.
    recent: [Option<Text>; RECENT],
    oldest: usize,
    heap_bytes: usize,
}

impl Names {
    /// The shared text equal to `name`; a text of its own when the set is full.
    pub(super) fn share(&mut self, name: &str) -> Text {
        if let Some(text) = self.recent.iter().flatten().find(|text| text.as_str() == name) {
            return text.clone();
        }
        let text = match self.texts.get(name) {
            Some(text) => text.clone(),
            None if self.texts.len() >= MAX_NAMES => return Text::new(name),
            None => self.add(name),
        };
        self.recent[self.oldest] = Some(text.clone());
        self.oldest = (self.oldest + 1) % RECENT;
        text
    }

    fn add(&mut self, name: &str) -> Text {
        let text = Text(Arc::new(Shared { named: true, text: name.into() }));
        self.heap_bytes += text.heap_bytes();
        self.texts.insert(text.clone());
        text
    }

    /// Heap memory of the set and its texts.
    pub(super) fn memory_bytes(&self) -> usize {
        // One control byte per bucket stands beside each pointer.
        self.heap_bytes + self.texts.capacity() * (size_of::<Text>() + 1)
    }
}

/// An id, in 16 bytes when it is 32 lower-case hex digits or a UUID, be it the router's own with its prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum CompactId {
    Hex([u8; 16]),
    Uuid([u8; 16]),
    /// A UUID behind [`REQUEST_ID_PREFIX`].
    Own([u8; 16]),
    Other(Box<str>),
}

impl CompactId {
    pub(super) fn new(id: &str) -> CompactId {
        CompactId::packed(id).unwrap_or_else(|| CompactId::Other(id.into()))
    }

    fn packed(id: &str) -> Option<CompactId> {
        match id.strip_prefix(REQUEST_ID_PREFIX) {
            Some(uuid) => parse_uuid(uuid).map(CompactId::Own),
            None if id.len() == Hyphenated::LENGTH => parse_uuid(id).map(CompactId::Uuid),
            None => parse_hex(id).map(CompactId::Hex),
        }
    }

    pub(super) fn heap_bytes(&self) -> usize {
        match self {
            CompactId::Other(id) => id.len(),
            _ => 0,
        }
    }
}

impl Display for CompactId {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            CompactId::Hex(bytes) => f.write_str(&hex(*bytes)),
            CompactId::Uuid(bytes) => Uuid::from_bytes(*bytes).as_hyphenated().fmt(f),
            CompactId::Own(bytes) => {
                f.write_str(REQUEST_ID_PREFIX)?;
                Uuid::from_bytes(*bytes).as_hyphenated().fmt(f)
            }
            CompactId::Other(id) => f.write_str(id),
        }
    }
}

/// The 16 bytes that 32 lower-case hex digits stand for; `None` for any other text.
pub(super) fn parse_hex(text: &str) -> Option<[u8; 16]> {
    parse_digits(text.as_bytes().try_into().ok()?)
}

fn parse_digits(digits: &[u8; 32]) -> Option<[u8; 16]> {
    // Without branches, so that all digits are read at once.
    let value = |digit: u8| match digit {
        b'0'..=b'9' => digit - b'0',
        b'a'..=b'f' => digit - b'a' + 10,
        _ => u8::MAX,
    };
    let values = digits.map(value);
    let is_hex = values.iter().fold(0, |all, value| all | value) < 16;
    let pairs = values.as_chunks().0;
    is_hex.then(|| {
        std::array::from_fn(|byte| {
            let [high, low]: [u8; 2] = pairs[byte];
            high << 4 | low
        })
    })
}

/// The 16 bytes of a UUID in lower case with its hyphens; `None` for any other text.
fn parse_uuid(text: &str) -> Option<[u8; 16]> {
    let text: &[u8; Hyphenated::LENGTH] = text.as_bytes().try_into().ok()?;
    if [text[8], text[13], text[18], text[23]] != [b'-'; 4] {
        return None;
    }
    let mut digits = [0; 32];
    digits[..8].copy_from_slice(&text[..8]);
    digits[8..12].copy_from_slice(&text[9..13]);
    digits[12..16].copy_from_slice(&text[14..18]);
    digits[16..20].copy_from_slice(&text[19..23]);
    digits[20..].copy_from_slice(&text[24..]);
    parse_digits(&digits)
}

/// 32 lower-case hex digits.
pub(super) fn hex(bytes: [u8; 16]) -> String {
    format!("{:032x}", u128::from_be_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_cap_never_splits_a_character() {
        assert_eq!(capped("abc", 3), "abc");
        assert_eq!(capped("abc", 2), "ab");
        assert_eq!(capped("aé", 2), "a");
        assert_eq!(capped("中文", 5), "中");
        assert_eq!(capped("中", 0), "");
    }

    #[test]
    fn names_are_shared_up_to_the_bound_and_kept_beyond_it() {
        let mut names = Names::default();
        for number in 0..MAX_NAMES + 10 {
            let name = format!("model-{number}");
            assert_eq!(names.share(&name).as_str(), name);
        }
        assert_eq!(names.texts.len(), MAX_NAMES);
        assert_eq!(names.share("model-0").own_bytes(), 0);
        assert!(names.share("one more").own_bytes() > 0);
        assert!(names.memory_bytes() > MAX_NAMES * 40);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn an_id_comes_back_as_it_went_in(
            id in "[0-9a-f]{32}|[0-9a-fA-F]{31,33}|(req_)?[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-fA]{12}|req_.{0,40}|.{0,40}",
            other in "[0-9a-f]{32}|req_.{0,40}|.{0,40}",
        ) {
            prop_assert_eq!(CompactId::new(&id) == CompactId::new(&other), id == other);
            prop_assert_eq!(CompactId::new(&id).to_string(), id);
        }
    }

    #[test]
    fn only_lower_case_hex_of_the_right_length_is_packed() {
        let id = "00f067aa0ba902b700f067aa0ba902b7";
        assert_eq!(CompactId::new(id).heap_bytes(), 0);
        let uuid = "00f067aa-0ba9-02b7-00f0-67aa0ba902b7";
        for id in [uuid, &format!("req_{uuid}")] {
            assert_eq!(CompactId::new(id).heap_bytes(), 0);
            for other in [id.to_uppercase(), id.replace('-', "0"), format!("{id}0")] {
                assert_eq!(CompactId::new(&other).heap_bytes(), other.len());
            }
        }
        assert_eq!(parse_hex(&id.to_uppercase()), None);
        assert_eq!(parse_hex(&id[1..]), None);
        assert_eq!(parse_hex("+0f067aa0ba902b700f067aa0ba902b7"), None);
    }
}
