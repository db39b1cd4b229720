//! What a listing asks for: a page size, a place to go on from, and filters.
//!
//! A query is checked in full before anything is read: an unknown name, a name given twice or a
//! value out of range is an error that says what would be right. Filters are joined by "and".

use std::fmt::{self, Display, Formatter};
use std::str::FromStr;

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::record::{Record, Status};
use super::text::{CompactId, capped};
use super::trace::MAX_UNIX_US;

/// Traces on a page unless `limit` says otherwise.
pub const DEFAULT_LIMIT: usize = 100;

/// Most traces on a page.
pub const MAX_LIMIT: usize = 1_000;

/// Bytes of a wrong name or value that an error repeats.
const MAX_ECHO_BYTES: usize = 80;

/// All names a query may have.
const NAMES: [&str; 13] = [
    "limit",
    "cursor",
    "format",
    "request_id",
    "worker_request_id",
    "node_id",
    "status",
    "route",
    "worker_url",
    "policy",
    "model",
    "since",
    "until",
];

/// Why a query cannot be answered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QueryError {
    /// No such name.
    #[error("unknown query parameter {name:?}; there are {}", NAMES.join(", "))]
    Unknown { name: String },
    /// A name came more than once.
    #[error("{name} is given more than once")]
    Repeated { name: &'static str },
    /// A value that its name cannot have.
    #[error("{name}={value:?} is not {expected}")]
    Invalid { name: &'static str, value: String, expected: &'static str },
}

/// How the answer is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Format {
    /// One page, an array.
    #[default]
    Json,
    /// All that match, one row each.
    Csv,
    /// All that match, one object a line.
    Jsonl,
    /// All that match and can be sent again, as a load: see [`super::Mooncake`].
    Mooncake,
}

/// Where a listing goes on: after the record it names, towards older ones. Opaque to clients, and
/// good whatever arrives or leaves in between.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cursor {
    /// Arrival number of the last record shown.
    pub(super) seq: u64,
}

impl Display for Cursor {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "c{:016x}", self.seq)
    }
}

impl FromStr for Cursor {
    type Err = ();

    fn from_str(text: &str) -> Result<Cursor, ()> {
        let digits = text.strip_prefix('c').ok_or(())?;
        let seq = u64::from_str_radix(digits, 16).map_err(|_| ())?;
        // Only what was handed out comes back equal; a sign or upper case does not.
        let cursor = Cursor { seq };
        if cursor.to_string() == text { Ok(cursor) } else { Err(()) }
    }
}

/// A checked query. The default one asks for the newest traces of all.
#[derive(Debug, Clone, Default)]
pub struct Query {
    /// Traces on the page, 1 to [`MAX_LIMIT`]; `None` when not given.
    pub limit: Option<usize>,
    /// Where to go on; `None` for the newest.
    pub cursor: Option<Cursor>,
    /// How the answer is written.
    pub format: Format,
    policy: Option<String>,
    request_id: Option<CompactId>,
    worker_request_id: Option<CompactId>,
    node_id: Option<String>,
    status: Option<Status>,
    route: Option<String>,
    worker_url: Option<String>,
    model: Option<String>,
    since_unix_us: Option<i64>,
    until_unix_us: Option<i64>,
}

impl Query {
    /// Reads the decoded pairs of a query string. `since` is inclusive, `until` is not.
    ///
    /// # Errors
    /// On the first name or value that is wrong, saying what would be right.
    pub fn parse<Name, Value>(
        pairs: impl IntoIterator<Item = (Name, Value)>,
    ) -> Result<Query, QueryError>
    where
        Name: AsRef<str>,
        Value: AsRef<str>,
    {
        let mut query = Query::default();
        let mut seen = [false; NAMES.len()];
        for (name, value) in pairs {
            let (name, value) = (name.as_ref(), value.as_ref());
            let index = NAMES
                .iter()
                .position(|known| *known == name)
                .ok_or_else(|| QueryError::Unknown { name: capped(name, MAX_ECHO_BYTES).into() })?;
            if std::mem::replace(&mut seen[index], true) {
                return Err(QueryError::Repeated { name: NAMES[index] });
            }
            query.set(NAMES[index], value)?;
        }
        Ok(query)
    }

    fn set(&mut self, name: &'static str, value: &str) -> Result<(), QueryError> {
        let invalid = |expected| QueryError::Invalid {
            name,
            value: capped(value, MAX_ECHO_BYTES).to_owned(),
            expected,
        };
        let text = || Some(value.to_owned());
        match name {
            "limit" => {
                let limit = parse_limit(value);
                self.limit = Some(limit.ok_or_else(|| invalid("a whole number from 1 to 1000"))?);
            }
            "cursor" => {
                let cursor = value.parse();
                self.cursor = Some(cursor.map_err(|()| invalid("a cursor from x-next-cursor"))?);
            }
            "format" => {
                let format = parse_format(value);
                self.format = format.ok_or_else(|| invalid("one of json, csv, jsonl, mooncake"))?;
            }
            "status" => {
                let status = Status::ALL.into_iter().find(|status| status.name() == value);
                let expected = "one of queued, routed, processing, completed, failed";
                self.status = Some(status.ok_or_else(|| invalid(expected))?);
            }
            "since" | "until" => {
                let expected = "a time in RFC 3339 (2026-01-01T00:00:00Z) or seconds since 1970";
                let moment = Some(parse_moment(value).ok_or_else(|| invalid(expected))?);
                match name {
                    "since" => self.since_unix_us = moment,
                    _ => self.until_unix_us = moment,
                }
            }
            "worker_request_id" => self.worker_request_id = Some(CompactId::new(value)),
            "request_id" => self.request_id = Some(CompactId::new(value)),
            "node_id" => self.node_id = text(),
            "route" => self.route = text(),
            "worker_url" => self.worker_url = text(),
            "policy" => self.policy = text(),
            "model" => self.model = text(),
            _ => unreachable!("every known name is matched above"),
        }
        Ok(())
    }

    /// Traces on a page.
    pub fn page_size(&self) -> usize {
        self.limit.unwrap_or(DEFAULT_LIMIT).clamp(1, MAX_LIMIT)
    }

    /// Whether a record passes all filters.
    pub(super) fn matches(&self, record: &Record) -> bool {
        let same = |wanted: &Option<String>, found: Option<&str>| match wanted {
            Some(wanted) => found == Some(wanted.as_str()),
            None => true,
        };
        let worker = record.worker();
        self.status.is_none_or(|status| record.status == status)
            && self.since_unix_us.is_none_or(|since| record.arrived_unix_us >= since)
            && self.until_unix_us.is_none_or(|until| record.arrived_unix_us < until)
            && same(&self.policy, Some(record.routing_policy.as_str()))
            && self.request_id.as_ref().is_none_or(|id| *id == record.request_id)
            && same(&self.node_id, worker.map(|worker| &*worker.node_id))
            && same(&self.worker_url, worker.map(|worker| &*worker.url))
            && same(&self.route, Some(record.route.as_str()))
            && same(&self.model, record.model.as_ref().map(|model| model.as_str()))
            && self
                .worker_request_id
                .as_ref()
                .is_none_or(|id| Some(id) == record.worker_request_id.as_ref())
    }
}

fn parse_limit(value: &str) -> Option<usize> {
    let digits = value.bytes().all(|byte| byte.is_ascii_digit());
    value.parse().ok().filter(|limit| digits && (1..=MAX_LIMIT).contains(limit))
}

fn parse_format(value: &str) -> Option<Format> {
    match value {
        "json" => Some(Format::Json),
        "csv" => Some(Format::Csv),
        "jsonl" => Some(Format::Jsonl),
        "mooncake" => Some(Format::Mooncake),
        _ => None,
    }
}

/// Microseconds since 1970 of a time in RFC 3339 or in epoch seconds, which may have fractions.
fn parse_moment(value: &str) -> Option<i64> {
    let unix_us = match value.parse::<f64>() {
        Ok(seconds) => (seconds * 1e6).round(),
        Err(_) => {
            // An offset's `+` that was not percent-encoded arrives as a space.
            let moment = OffsetDateTime::parse(value, &Rfc3339)
                .or_else(|_| OffsetDateTime::parse(&value.replace(' ', "+"), &Rfc3339))
                .ok()?;
            return i64::try_from(moment.unix_timestamp_nanos().div_euclid(1_000)).ok();
        }
    };
    // Also turns away milliseconds, infinities and what is not a number.
    (0.0..=MAX_UNIX_US as f64).contains(&unix_us).then_some(unix_us as i64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(pairs: &[(&str, &str)]) -> Result<Query, QueryError> {
        Query::parse(pairs.iter().copied())
    }

    fn message(name: &str, value: &str) -> String {
        parse(&[(name, value)]).expect_err("a wrong query").to_string()
    }

    #[test]
    fn every_name_is_understood() {
        for name in NAMES {
            let value = match name {
                "limit" => "1000",
                "cursor" => "c00000000000000ff",
                "format" => "csv",
                "status" => "failed",
                "since" | "until" => "1767225600.5",
                _ => "anything",
            };
            assert!(parse(&[(name, value)]).is_ok(), "{name}");
        }
        let query = parse(&[]).expect("nothing is wrong");
        assert_eq!((query.page_size(), query.format), (DEFAULT_LIMIT, Format::Json));
    }

    #[test]
    fn errors_name_what_is_wrong_and_what_would_be_right() {
        for value in ["0", "1001", "-1", "+1", "ten", "", "1.5", "99999999999999999999999"] {
            let expected = format!("limit={value:?} is not a whole number from 1 to 1000");
            assert_eq!(message("limit", value), expected);
        }
        for value in
            ["", "ff", "cff", "c00000000000000FF", "c+0000000000000ff", "c0000000000000ffff"]
        {
            assert!(message("cursor", value).contains("x-next-cursor"), "{value}");
        }
        assert!(message("status", "done").contains("queued, routed, processing"));
        assert!(message("format", "xml").contains("json, csv, jsonl"));
        assert!(message("nodeid", "gpu_0").contains("node_id"));
        assert_eq!(
            message("limit", &"9".repeat(5_000)).len(),
            message("limit", &"9".repeat(80)).len()
        );
        let twice = parse(&[("limit", "1"), ("limit", "2")]).expect_err("given twice");
        assert_eq!(twice, QueryError::Repeated { name: "limit" });
    }

    #[test]
    fn moments_are_read_in_both_ways() {
        let newyear = 1_767_225_600_000_000;
        for value in [
            "1767225600",
            "1767225600.0",
            "2026-01-01T00:00:00Z",
            "2026-01-01T08:00:00+08:00",
            "2026-01-01T08:00:00 08:00",
            "2025-12-31T23:00:00.000000-01:00",
        ] {
            assert_eq!(parse_moment(value), Some(newyear), "{value}");
        }
        assert_eq!(parse_moment("1767225600.123456"), Some(newyear + 123_456));
        assert_eq!(parse_moment("2026-01-01T00:00:00.123456Z"), Some(newyear + 123_456));
        for value in
            ["", "now", "nan", "inf", "-1", "1767225600000", "2026-01-01", "2026-13-01T00:00:00Z"]
        {
            assert_eq!(parse_moment(value), None, "{value}");
            assert!(message("since", value).contains("RFC 3339"));
        }
    }

    #[test]
    fn a_cursor_comes_back_as_it_went_out() {
        for seq in [0, 1, 255, u64::MAX] {
            let cursor = Cursor { seq };
            assert_eq!(cursor.to_string().parse(), Ok(cursor));
        }
    }
}
