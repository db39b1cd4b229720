//! Reads a few named fields of a JSON object and skips the rest (RFC 8259).
//!
//! The idea: a value of interest stays the slice of the text it is until someone asks what it is, so a field of a wrong
//! type spoils that field alone, and what nobody asks for is passed over once, without a copy, without stack however
//! deep it nests, and many bytes at a time where it is a string. Reading a string's escapes and anything else than skipping
//! is serde_json's.
//! Does not build a tree of the text and never reports an error: what cannot be read is `None`.

use std::borrow::Cow;

use smallvec::SmallVec;

/// A field's value as it stands in the text; `None` when it is absent or `null`.
pub(crate) type Field<'a> = Option<&'a str>;

/// The fields of the object `json`, in the order of `names`; of a name given twice, the last.
/// `None` when `json` is not one well-formed object with nothing but white space around it.
pub(crate) fn fields<'a, const N: usize>(
    json: &'a str,
    names: [&str; N],
) -> Option<[Field<'a>; N]> {
    let mut found = [None; N];
    let mut text = Text::new(json);
    text.members(|key, value| {
        let place = names.iter().position(|name| key == *name).or_else(|| {
            let key = unescaped(key)?;
            names.iter().position(|name| key == *name)
        });
        if let Some(place) = place {
            found[place] = (value != "null").then_some(value);
        }
    })?;
    text.ends().then_some(found)
}

/// The string `value` is, borrowed unless it holds escapes; `None` when it is something else.
pub(crate) fn string(value: &str) -> Option<Cow<'_, str>> {
    if let Some(plain) = plain_string(value) {
        return Some(Cow::Borrowed(plain));
    }
    value.starts_with('"').then(|| serde_json::from_str(value).ok().map(Cow::Owned))?
}

/// The inside of a string that holds no escapes; `None` of all else.
pub(crate) fn plain_string(value: &str) -> Option<&str> {
    let inside = value.strip_prefix('"')?.strip_suffix('"')?;
    memchr::memchr(b'\\', inside.as_bytes()).is_none().then_some(inside)
}

/// The items of the list `json`; `None` when it is something else. 16 bytes are held per item.
pub(crate) fn list(json: &str) -> Option<Vec<&str>> {
    let mut items = Vec::new();
    let mut text = Text::new(json);
    text.items(|item| items.push(item))?;
    text.ends().then_some(items)
}

/// The first item of the list `json`; `None` when it is empty or something else. Holds nothing of the others.
pub(crate) fn first(json: &str) -> Option<&str> {
    let mut first = None;
    let mut text = Text::new(json);
    text.items(|item| first = first.or(Some(item)))?;
    first.filter(|_| text.ends())
}

/// The whole number `value` is; `None` when it is something else, negative, fractional or too large.
pub(crate) fn number(value: &str) -> Option<u32> {
    value.parse().ok()
}

/// The value that `json` begins with, and what follows it.
pub(crate) fn leading(json: &str) -> Option<(&str, &str)> {
    let mut text = Text::new(json);
    let value = text.value()?;
    Some((value, &json[text.at..]))
}

/// What a key means, as it stands between its quotes, if that is something else than it says.
fn unescaped(key: &str) -> Option<String> {
    let has_escapes = key.bytes().any(|byte| byte == b'\\');
    has_escapes.then(|| serde_json::from_str(&format!("\"{key}\"")).ok())?
}

/// Whether a byte has a meaning inside a string: the quote, the backslash and control characters.
const HAS_MEANING: [bool; 256] = {
    let mut table = [false; 256];
    let mut byte = 0;
    while byte < 256 {
        table[byte] = byte < b' ' as usize || byte == b'"' as usize || byte == b'\\' as usize;
        byte += 1;
    }
    table
};

/// A text that is read from its beginning to its end; `None` of any step means that it is not well formed.
struct Text<'a> {
    json: &'a str,
    at: usize,
}

impl<'a> Text<'a> {
    /// At its first value.
    fn new(json: &'a str) -> Self {
        let mut text = Self { json, at: 0 };
        text.space();
        text
    }

    /// An object's members: each key as it stands between its quotes, and its value.
    fn members(&mut self, mut each: impl FnMut(&'a str, &'a str)) -> Option<()> {
        self.parts(b'{', b'}', |text| {
            let key = text.key()?;
            each(key, text.value()?);
            Some(())
        })
    }

    /// A list's items.
    fn items(&mut self, mut each: impl FnMut(&'a str)) -> Option<()> {
        self.parts(b'[', b']', |text| {
            each(text.value()?);
            Some(())
        })
    }

    /// What stands between two brackets, with commas between its parts.
    fn parts(
        &mut self,
        open: u8,
        close: u8,
        mut part: impl FnMut(&mut Self) -> Option<()>,
    ) -> Option<()> {
        self.take(open)?;
        self.space();
        if self.take(close).is_some() {
            return Some(());
        }
        loop {
            part(self)?;
            if !self.goes_on(close)? {
                return Some(());
            }
        }
    }

    /// Passes over one value. What is open is kept in a byte for each level.
    fn value(&mut self) -> Option<&'a str> {
        let start = self.at;
        let mut open = SmallVec::<[u8; 32]>::new();
        loop {
            match self.peek()? {
                b'"' => drop(self.string()?),
                b'{' => {
                    self.at += 1;
                    self.space();
                    if self.take(b'}').is_none() {
                        open.push(b'}');
                        self.key()?;
                        continue;
                    }
                }
                b'[' => {
                    self.at += 1;
                    self.space();
                    if self.take(b']').is_none() {
                        open.push(b']');
                        continue;
                    }
                }
                b't' => self.literal("true")?,
                b'f' => self.literal("false")?,
                b'n' => self.literal("null")?,
                _ => self.number()?,
            }
            loop {
                let Some(close) = open.last().copied() else {
                    return Some(&self.json[start..self.at]);
                };
                if self.goes_on(close)? {
                    if close == b'}' {
                        self.key()?;
                    }
                    break;
                }
                open.pop();
            }
        }
    }

    /// Behind a member or an item: whether another one follows. Passes over `close`, or the comma and to what follows.
    fn goes_on(&mut self, close: u8) -> Option<bool> {
        self.space();
        if self.take(close).is_some() {
            return Some(false);
        }
        self.take(b',')?;
        self.space();
        Some(true)
    }

    /// A key and its colon; leads to the value.
    fn key(&mut self) -> Option<&'a str> {
        let key = self.string()?;
        self.space();
        self.take(b':')?;
        self.space();
        Some(key)
    }

    /// A string; what stands between its quotes.
    fn string(&mut self) -> Option<&'a str> {
        self.take(b'"')?;
        let start = self.at;
        loop {
            self.plain();
            match self.peek()? {
                b'"' => {
                    self.at += 1;
                    return Some(&self.json[start..self.at - 1]);
                }
                b'\\' => self.escape()?,
                // A control character.
                _ => return None,
            }
        }
    }

    /// Passes over what has no meaning inside a string.
    fn plain(&mut self) {
        /// Most strings are shorter.
        const SHORT: usize = 32;
        let has_meaning = |byte: &u8| HAS_MEANING[usize::from(*byte)];
        let rest = &self.json.as_bytes()[self.at..];
        let (begun, rest) = rest.split_at(rest.len().min(SHORT));
        if let Some(here) = begun.iter().position(has_meaning) {
            self.at += here;
            return;
        }
        let end = memchr::memchr2(b'"', b'\\', rest).unwrap_or(rest.len());
        // All bytes are looked at, which takes the processor a few steps for sixteen of them.
        let is_plain = rest[..end].iter().fold(0, |any, byte| any | u8::from(*byte < b' ')) == 0;
        let here = if is_plain { Some(end) } else { rest.iter().position(has_meaning) };
        self.at += begun.len() + here.unwrap_or(rest.len());
    }

    /// A backslash and what it takes.
    fn escape(&mut self) -> Option<()> {
        let escape = &self.json.as_bytes()[self.at..];
        self.at += match escape.get(1)? {
            b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't' => 2,
            b'u' if escape.get(2..6)?.iter().all(u8::is_ascii_hexdigit) => 6,
            _ => return None,
        };
        Some(())
    }

    fn number(&mut self) -> Option<()> {
        let _ = self.take(b'-');
        if self.take(b'0').is_none() {
            self.digits()?;
        }
        if self.take(b'.').is_some() {
            self.digits()?;
        }
        if self.take(b'e').or_else(|| self.take(b'E')).is_some() {
            let _ = self.take(b'-').or_else(|| self.take(b'+'));
            self.digits()?;
        }
        Some(())
    }

    /// At least one digit.
    fn digits(&mut self) -> Option<()> {
        let start = self.at;
        while self.peek().is_some_and(|next| next.is_ascii_digit()) {
            self.at += 1;
        }
        (self.at > start).then_some(())
    }

    fn literal(&mut self, literal: &str) -> Option<()> {
        let is_here = self.json.as_bytes()[self.at..].starts_with(literal.as_bytes());
        self.at += literal.len();
        is_here.then_some(())
    }

    fn space(&mut self) {
        while let Some(b' ' | b'\n' | b'\t' | b'\r') = self.peek() {
            self.at += 1;
        }
    }

    fn take(&mut self, byte: u8) -> Option<()> {
        let is_here = self.peek() == Some(byte);
        self.at += usize::from(is_here);
        is_here.then_some(())
    }

    fn peek(&self) -> Option<u8> {
        self.json.as_bytes().get(self.at).copied()
    }

    /// Whether nothing but white space is left.
    fn ends(&mut self) -> bool {
        self.space();
        self.at == self.json.len()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde::de::IgnoredAny;

    use super::*;

    fn texts<const N: usize>(json: &str, names: [&str; N]) -> Option<[Option<String>; N]> {
        fields(json, names).map(|found| found.map(|field| field.map(str::to_owned)))
    }

    #[test]
    fn the_last_of_a_repeated_name_wins() {
        let found = texts(r#" {"a": 1 ,"b":[2, {}],"\u0061":"x","c":null} "#, ["b", "a", "c", "d"]);
        assert_eq!(found, Some([Some("[2, {}]".into()), Some("\"x\"".into()), None, None]));
        assert_eq!(texts(r#"{"a":1,"a":null}"#, ["a"]), Some([None]));
    }

    #[test]
    fn only_one_whole_object_is_read() {
        for json in
            ["", "[]", "null", "1", "{", "{}{}", "{}x", r#"{"a":}"#, r#"{"a":01}"#, "{'a':1}"]
        {
            assert_eq!(texts(json, ["a"]), None, "{json}");
        }
        assert_eq!(texts("{}", ["a"]), Some([None]));
    }

    #[test]
    fn depth_costs_no_stack() {
        let nest = "[".repeat(200_000) + &"]".repeat(200_000);
        let json = format!(r#"{{"skipped":{nest},"a":{nest},"b":1}}"#);
        assert_eq!(texts(&json, ["b", "a"]), Some([Some("1".into()), Some(nest)]));
    }

    #[test]
    fn values_are_read_as_what_they_are() {
        let read = |json| fields(json, ["a"]).and_then(|[a]| a);
        assert!(matches!(read(r#"{"a":"x y"}"#).and_then(string), Some(Cow::Borrowed("x y"))));
        assert_eq!(read(r#"{"a":"\u00e9\n"}"#).and_then(string).as_deref(), Some("é\n"));
        assert_eq!(read(r#"{"a":"\ud800"}"#).and_then(string), None);
        assert_eq!(read(r#"{"a":4294967295}"#).and_then(number), Some(u32::MAX));
        for json in ["4294967296", "-1", "1.0", "1e2", "\"1\"", "true", "[1]"] {
            let json = format!(r#"{{"a":{json}}}"#);
            assert_eq!(fields(&json, ["a"]).and_then(|[a]| a).and_then(number), None, "{json}");
        }
        assert_eq!(list("[1, [2]]").map(|items| items.len()), Some(2));
        assert!(list("{}").is_none());
    }

    #[test]
    fn a_value_at_the_beginning_is_told_from_what_follows() {
        assert_eq!(leading(" {\"a\":[1]} ,x"), Some(("{\"a\":[1]}", " ,x")));
        assert_eq!(leading("1.5e3}"), Some(("1.5e3", "}")));
        assert_eq!(leading("{\"a\""), None);
    }

    proptest! {
        /// What is well formed is what serde_json takes; most of these texts are nearly so.
        #[test]
        fn it_takes_what_serde_json_takes(
            json in "(\\{\"|\"|\\{|\\}|\\[|\\]|,|:| |\n|true|null|-|0|1|12|\\.5|e|E\\+|\\\\u00e9|\\\\n|\\\\x|\u{1}|é|a{33}){0,12}"
        ) {
            let strict = serde_json::from_str::<IgnoredAny>(&json).is_ok();
            let ours = leading(&json).is_some_and(|(_, rest)| {
                rest.trim_matches([' ', '\n', '\t', '\r']).is_empty()
            });
            prop_assert_eq!(ours, strict);
        }

        /// The same of texts that are well formed, cut or changed in one place.
        #[test]
        fn one_change_is_seen_as_serde_json_sees_it(
            texts in prop::collection::vec(".{0,40}", 3), at in any::<prop::sample::Index>(), change in any::<char>()
        ) {
            let value = serde_json::json!({"a": texts, "b": {"c": [1, -2.5e-3, true, null, {}]}, "d": []});
            let json = value.to_string();
            let chars: Vec<char> = json.chars().collect();
            let at = at.index(chars.len());
            let changed: String = chars[..at].iter().chain([&change]).chain(&chars[at + 1..]).collect();
            let cut: String = chars[..at].iter().collect();
            for json in [json, changed, cut] {
                let strict = serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(&json).ok();
                let found = fields(&json, ["a", "b", "d"]);
                // A lone surrogate or a number too large is well formed, and no value.
                prop_assert!(found.is_some() || strict.is_none(), "{json}");
                if let (Some(strict), Some(found)) = (strict, found) {
                    let strict = ["a", "b", "d"].map(|name| strict.get(name).filter(|it| !it.is_null()));
                    let found = found.map(|it| it.map(|it| serde_json::from_str::<serde_json::Value>(it).ok()));
                    prop_assert_eq!(strict.map(|it| it.cloned().map(Some)), found);
                }
            }
        }
    }
}
