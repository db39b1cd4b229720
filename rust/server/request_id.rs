//! Which id a request goes by: a header's, else the body's `rid`, else a fresh one.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use hyper::HeaderMap;
use hyper::header::{HeaderName, HeaderValue};
use uuid::Uuid;
use uuid::fmt::Hyphenated;

use crate::tracking::REQUEST_ID_PREFIX;

/// Longest id taken from a request.
pub(super) const LENGTH_MAX: usize = 256;
const WARN_EVERY_SECS: u64 = 60;

/// The name of the header that carries the id to the worker and back to the client.
pub(super) const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Headers an id is taken from unless `request_id_headers` says otherwise, in this order.
pub(super) const DEFAULT_HEADERS: [&str; 4] =
    ["x-request-id", "x-correlation-id", "x-trace-id", "request-id"];

/// Finds ids; holds the time of its last warning.
#[derive(Debug)]
pub(super) struct RequestIds {
    headers: Vec<HeaderName>,
    warned_at_secs: AtomicU64,
}

impl RequestIds {
    pub(super) fn new(headers: &[HeaderName]) -> Self {
        let headers = if headers.is_empty() {
            DEFAULT_HEADERS.map(HeaderName::from_static).to_vec()
        } else {
            headers.to_vec()
        };
        Self { headers, warned_at_secs: AtomicU64::new(0) }
    }

    /// The first usable id among the headers.
    pub(super) fn in_headers(&self, headers: &HeaderMap) -> Option<Arc<str>> {
        let values = self.headers.iter().filter_map(|name| headers.get(name));
        values.map(HeaderValue::as_bytes).find_map(|value| self.usable(value))
    }

    /// The body's `rid`, if it is usable.
    pub(super) fn in_rid(&self, rid: &str) -> Option<Arc<str>> {
        self.usable(rid.as_bytes())
    }

    fn usable(&self, id: &[u8]) -> Option<Arc<str>> {
        if (1..=LENGTH_MAX).contains(&id.len()) && id.iter().all(u8::is_ascii_graphic) {
            return std::str::from_utf8(id).ok().map(Into::into);
        }
        self.warn();
        None
    }

    fn warn(&self) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
        let last = self.warned_at_secs.load(Ordering::Relaxed);
        let is_due = now >= last + WARN_EVERY_SECS;
        if is_due
            && self
                .warned_at_secs
                .compare_exchange(last, now, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
        {
            tracing::warn!(
                "a request id was passed over: it is not 1 to {LENGTH_MAX} visible ASCII characters \
                 (said at most once a minute)"
            );
        }
    }
}

pub(super) fn generate() -> Arc<str> {
    const PREFIX: &[u8] = REQUEST_ID_PREFIX.as_bytes();
    let mut id = [0; PREFIX.len() + Hyphenated::LENGTH];
    let (prefix, rest) = id.split_at_mut(PREFIX.len());
    prefix.copy_from_slice(PREFIX);
    Uuid::new_v4().hyphenated().encode_lower(rest);
    std::str::from_utf8(&id).expect("letters, digits and hyphens").into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(headers: &[(&'static str, &[u8])]) -> Option<Arc<str>> {
        let headers = headers
            .iter()
            .map(|(name, value)| {
                let value = HeaderValue::from_bytes(value).expect("value");
                (HeaderName::from_static(name), value)
            })
            .collect();
        RequestIds::new(&[]).in_headers(&headers)
    }

    #[test]
    fn the_first_usable_header_gives_the_id() {
        assert_eq!(from(&[("request-id", b"d"), ("x-correlation-id", b"b")]).as_deref(), Some("b"));
        assert_eq!(from(&[("x-request-id", b""), ("x-trace-id", b"c")]).as_deref(), Some("c"));
        assert_eq!(from(&[("x-other", b"x")]), None);
    }

    #[test]
    fn unusable_ids_are_passed_over() {
        for id in [&b"with space"[..], b"\xc3\xa9", &[b'x'; 257]] {
            assert_eq!(from(&[("x-request-id", id)]), None);
        }
        assert_eq!(from(&[("x-request-id", &[b'x'; 256])]).map(|id| id.len()), Some(256));
        assert_eq!(from(&[("x-request-id", b"a/b\"%2F'")]).as_deref(), Some("a/b\"%2F'"));
        let ids = RequestIds::new(&[]);
        assert_eq!(ids.in_rid("r"), Some("r".into()));
        assert_eq!(ids.in_rid("\u{e9}"), None);
    }

    #[test]
    fn generated_ids_differ() {
        assert!(generate().starts_with("req_"));
        assert_ne!(generate(), generate());
    }
}
