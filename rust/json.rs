//! Reads a few named fields of a JSON object and skips the rest.
//!
//! The idea: a value of interest stays a slice of the text it stands in ([`RawValue`]) until someone
//! asks what it is, so a field of a wrong type spoils that field alone, and skipping costs neither
//! a copy nor stack: values that nobody asks for are skipped by iteration, however deep they nest.
//! Does not build a tree of the text and never reports an error: what cannot be read is `None`.

use std::borrow::Cow;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;

/// A field's value as it stands in the text; `None` when it is absent or `null`.
pub(crate) type Field<'a> = Option<&'a RawValue>;

/// The fields of the object `json`, in the order of `names`; of a name given twice, the last.
/// `None` when `json` is not one well-formed object with nothing but white space around it.
pub(crate) fn fields<'a, const N: usize>(
    json: &'a str,
    names: [&str; N],
) -> Option<[Field<'a>; N]> {
    let mut source = serde_json::Deserializer::from_str(json);
    let found = Names(names).deserialize(&mut source).ok()?;
    source.end().ok()?;
    Some(found)
}

/// The string `value` is, borrowed unless it holds escapes; `None` when it is something else.
pub(crate) fn string(value: &RawValue) -> Option<Cow<'_, str>> {
    #[derive(serde::Deserialize)]
    struct Borrowed<'a>(#[serde(borrow)] Cow<'a, str>);

    serde_json::from_str(value.get()).ok().map(|Borrowed(string)| string)
}

/// The items of the list `json`; `None` when it is something else. 16 bytes are held per item.
pub(crate) fn list(json: &str) -> Option<Vec<&RawValue>> {
    serde_json::from_str(json).ok()
}

/// The whole number `value` is; `None` when it is something else, negative, fractional or too large.
pub(crate) fn number(value: &RawValue) -> Option<u32> {
    serde_json::from_str(value.get()).ok()
}

/// Picks the named fields out of an object.
struct Names<'n, const N: usize>([&'n str; N]);

impl<'de, const N: usize> DeserializeSeed<'de> for Names<'_, N> {
    type Value = [Field<'de>; N];

    fn deserialize<D: Deserializer<'de>>(self, source: D) -> Result<Self::Value, D::Error> {
        source.deserialize_map(self)
    }
}

impl<'de, const N: usize> Visitor<'de> for Names<'_, N> {
    type Value = [Field<'de>; N];

    fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("an object")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut object: M) -> Result<Self::Value, M::Error> {
        let mut found = [None; N];
        while let Some(place) = object.next_key_seed(Place(&self.0))? {
            match place {
                Some(place) => found[place] = object.next_value()?,
                None => drop(object.next_value::<IgnoredAny>()?),
            }
        }
        Ok(found)
    }
}

/// Where a key stands among the names.
struct Place<'n>(&'n [&'n str]);

impl<'de> DeserializeSeed<'de> for Place<'_> {
    type Value = Option<usize>;

    fn deserialize<D: Deserializer<'de>>(self, source: D) -> Result<Self::Value, D::Error> {
        source.deserialize_identifier(self)
    }
}

impl Visitor<'_> for Place<'_> {
    type Value = Option<usize>;

    fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("a key")
    }

    fn visit_str<E>(self, key: &str) -> Result<Self::Value, E> {
        Ok(self.0.iter().position(|name| *name == key))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts<const N: usize>(json: &str, names: [&str; N]) -> Option<[Option<String>; N]> {
        fields(json, names).map(|found| found.map(|field| field.map(|raw| raw.get().to_owned())))
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
}
