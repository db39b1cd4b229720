//! A key as an option gives it: known to the router and to the workers it is for, shown to nobody.

use std::ffi::OsStr;
use std::fmt;

use clap::builder::{TypedValueParser, ValueParserFactory};
use clap::{Arg, Command};
use hyper::header::HeaderValue;

/// The longest key in bytes. Every comparison takes as long as one of such a key.
pub(super) const KEY_BYTES_MAX: usize = 512;

/// A key that can stand in a header. Neither its `Debug` nor an error about it shows it.
#[derive(Clone)]
pub struct Secret(String);

impl Secret {
    /// # Errors
    /// It is empty, too long, or not all visible ASCII.
    pub fn new(key: &str) -> Result<Self, String> {
        let is_key = (1..=KEY_BYTES_MAX).contains(&key.len())
            && key.bytes().all(|byte| byte.is_ascii_graphic());
        if !is_key {
            return Err(format!(
                "a key is 1 to {KEY_BYTES_MAX} visible ASCII characters, without spaces"
            ));
        }
        Ok(Self(key.to_owned()))
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }

    /// The header `authorization` that carries it: `Bearer KEY` (RFC 6750, section 2.1).
    pub fn authorization(&self) -> HeaderValue {
        let credentials = format!("Bearer {}", self.0);
        let mut value = HeaderValue::from_str(&credentials).expect("a key is visible ASCII");
        value.set_sensitive(true);
        value
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(hidden)")
    }
}

/// Parses a key for clap, whose errors repeat the values they are about.
#[derive(Clone)]
pub struct SecretParser;

impl TypedValueParser for SecretParser {
    type Value = Secret;

    fn parse_ref(
        &self,
        command: &Command,
        arg: Option<&Arg>,
        value: &OsStr,
    ) -> Result<Secret, clap::Error> {
        let parsed = Secret::new(value.to_str().unwrap_or_default());
        let as_parsed = move |_: &str| parsed.clone();
        as_parsed.parse_ref(command, arg, OsStr::new("(hidden)"))
    }
}

impl ValueParserFactory for Secret {
    type Parser = SecretParser;

    fn value_parser() -> SecretParser {
        SecretParser
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_visible_ascii_and_not_too_long() {
        for good in ["k", "sk-1_2/3+4==", "~!", &"x".repeat(KEY_BYTES_MAX)] {
            assert!(Secret::new(good).is_ok(), "{good}");
        }
        for bad in ["", " ", "a b", "a ", "ä", "a\n", "a\0", &"x".repeat(KEY_BYTES_MAX + 1)] {
            assert!(Secret::new(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_key_is_not_shown() {
        let secret = Secret::new("open-sesame").expect("a key");
        assert_eq!(secret.authorization(), "Bearer open-sesame");
        for shown in [format!("{secret:?}"), format!("{:?}", secret.authorization())] {
            assert!(!shown.contains("sesame"), "{shown}");
        }
    }
}
