//! A record as people read it: one JSON object or one CSV row, the same fields in the same order.
//!
//! The fields are declared once, in [`Trace`]; JSON, [`Trace::COLUMNS`] and the CSV row follow.

use std::fmt::{self, Display, Formatter};

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::prompt_blocks::PromptBlocks;
use super::record::Status;

/// The last microsecond of the year 9999, where RFC 3339 ends.
pub(super) const MAX_UNIX_US: i64 = 253_402_300_799_999_999;

/// Wall-clock time, written in RFC 3339 with exactly six fractional digits and `Z`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Timestamp {
    unix_us: i64,
}

impl Timestamp {
    /// From microseconds since the Unix epoch; held within the years 1970 to 9999.
    pub fn from_unix_us(unix_us: i64) -> Timestamp {
        Timestamp { unix_us: unix_us.clamp(0, MAX_UNIX_US) }
    }

    /// Microseconds since the Unix epoch.
    pub fn unix_us(self) -> i64 {
        self.unix_us
    }
}

impl Display for Timestamp {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let moment = OffsetDateTime::from_unix_timestamp_nanos(i128::from(self.unix_us) * 1_000)
            .unwrap_or(OffsetDateTime::UNIX_EPOCH);
        let (year, month, day) = moment.to_calendar_date();
        let (hour, minute, second, micros) = moment.to_hms_micro();
        let month = u8::from(month);
        write!(f, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{micros:06}Z")
    }
}

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Timestamp, D::Error> {
        let text = String::deserialize(deserializer)?;
        let moment = OffsetDateTime::parse(&text, &Rfc3339).map_err(serde::de::Error::custom)?;
        let unix_us = moment.unix_timestamp_nanos().div_euclid(1_000);
        Ok(Timestamp::from_unix_us(i64::try_from(unix_us).unwrap_or(i64::MAX)))
    }
}

/// One attempt, as read.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttemptView {
    /// The worker it went to.
    pub worker_url: String,
    /// That worker's node.
    pub node_id: String,
    /// The worker's answer, once there was one.
    pub http_status: Option<u16>,
    /// Why it failed.
    pub error: Option<String>,
    /// From its own send to its own last byte.
    pub latency_ms: Option<f64>,
}

/// A worker that the policy could have picked, as read.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CandidateView {
    /// The worker.
    pub worker_url: String,
    /// That worker's node.
    pub node_id: String,
    /// Its requests in flight when the policy picked, without this one.
    pub in_flight: u32,
    /// Predicted by the policy's prefix tree.
    pub matched_tokens: Option<u32>,
    /// Tokens of prompts that the policy believed to be computed there before this one.
    #[serde(default)]
    pub pending_tokens: Option<u32>,
    /// Tokens of prompts that the policy believed to be computed in a second.
    #[serde(default)]
    pub speed: Option<f64>,
    /// Requests that were in flight there for the part of the prompt that is cached anywhere.
    #[serde(default)]
    pub same_prefix: Option<u32>,
    /// What the rule compared.
    pub score: Option<f64>,
    /// Whether it was picked.
    pub chosen: bool,
}

/// Declares [`Trace`], its columns and its cells from one list of fields.
macro_rules! trace {
    ($($(#[$doc:meta])* $field:ident: $kind:ty,)*) => {
        /// What is known of one request. What is not known is `None`, never guessed.
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
        #[serde(deny_unknown_fields)]
        pub struct Trace {
            $($(#[$doc])* pub $field: $kind,)*
            /// Records held with this id, on a look-up by id and only when there are several.
            #[serde(skip_serializing_if = "Option::is_none", skip_deserializing)]
            pub same_id: Option<u32>,
        }

        impl Trace {
            /// The fields in record order: the columns of a CSV export.
            pub const COLUMNS: &[&str] = &[$(stringify!($field)),*];

            fn cells(&self) -> Vec<String> {
                vec![$(cell(&self.$field)),*]
            }
        }
    };
}

trace! {
    /// The client's id, or the router's own.
    request_id: String,
    /// The worker picked last.
    worker_url: Option<String>,
    /// That worker's node.
    node_id: Option<String>,
    /// Wall clock at arrival.
    timestamp: Timestamp,
    /// The router's policy.
    routing_policy: String,
    /// How far the request has come.
    status: Status,
    /// The route, such as `/generate`.
    route: String,
    /// Whether the worker reported cached tokens; `None` if it reported nothing.
    cache_hit: Option<bool>,
    /// The router's estimate of the prompt.
    input_tokens: Option<u32>,
    /// `timestamp` + `latency_ms`.
    completion_time: Option<Timestamp>,
    /// Why it failed, at most 512 bytes.
    error_message: Option<String>,
    /// The model asked for, at most 128 bytes.
    model: Option<String>,
    /// Whether a stream was asked for.
    stream: Option<bool>,
    /// What the client was answered.
    http_status: Option<u16>,
    /// The worker's word, at most 64 bytes.
    finish_reason: Option<String>,
    /// Why the policy picked this worker.
    reason: Option<String>,
    /// Predicted by the policy's prefix tree.
    matched_tokens: Option<u32>,
    /// The worker's own count.
    prompt_tokens: Option<u32>,
    /// The worker's own count.
    cached_tokens: Option<u32>,
    /// The worker's own count.
    completion_tokens: Option<u32>,
    /// From arrival to admission.
    queue_ms: Option<f64>,
    /// Reading the prompt and picking the worker.
    decision_us: Option<f64>,
    /// From arrival to the first byte of the answer's body.
    first_byte_ms: Option<f64>,
    /// From arrival to the first stream frame with content.
    ttft_ms: Option<f64>,
    /// From arrival to the end.
    latency_ms: Option<f64>,
    /// The worker's own id, at most 128 bytes.
    worker_request_id: Option<String>,
    /// From `traceparent`.
    trace_id: Option<String>,
    /// All attempts, the last one being the record's worker.
    attempts: Vec<AttemptView>,
    /// What the policy chose among at the last pick, best first; `None` if that is not traced, or
    /// the policy was not asked.
    candidates: Option<Vec<CandidateView>>,
    /// Hashes of the prompt's blocks; `None` if they are not traced, there is no prompt, or it is too
    /// long.
    prompt_blocks: Option<PromptBlocks>,
}

/// A value in one CSV cell: text as it is, null as nothing, anything nested as JSON.
fn cell(value: &impl Serialize) -> String {
    let json = serde_json::to_string(value).expect("a trace is plain data");
    match json.as_bytes() {
        b"null" => String::new(),
        [b'"', ..] => serde_json::from_str(&json).expect("what was just written"),
        _ => json,
    }
}

/// The CSV line that names the columns.
pub fn csv_header() -> Vec<u8> {
    csv_lines(std::iter::once(Trace::COLUMNS))
}

/// One CSV line for each trace.
pub fn csv_rows(traces: &[Trace]) -> Vec<u8> {
    csv_lines(traces.iter().map(Trace::cells))
}

fn csv_lines<Line>(lines: impl Iterator<Item = Line>) -> Vec<u8>
where
    Line: IntoIterator,
    Line::Item: AsRef<[u8]>,
{
    let mut writer = csv::Writer::from_writer(Vec::new());
    for line in lines {
        writer.write_record(line).expect("lines have equal length and memory takes all bytes");
    }
    writer.into_inner().expect("memory takes all bytes")
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use serde_json::Value;

    use super::*;
    use crate::tracking::WorkerName;
    use crate::tracking::record::{Candidate, OptionalU32, OptionalU64, Record};
    use crate::tracking::text::{CompactId, Text, parse_hex};

    const ARRIVED_UNIX_US: i64 = 1_767_225_600_000_000;

    fn new_record(id: &str) -> Record {
        Record::new(id, Text::new("/generate"), Text::new("random"), ARRIVED_UNIX_US)
    }

    fn full_record() -> Record {
        let mut record = new_record("a \"b\", c");
        let worker =
            WorkerName { index: 0, url: "http://127.0.0.1:30005".into(), node_id: "gpu_4".into() };
        record.attempt(Arc::new(worker));
        record.attempts[0].http_status = Some(200);
        record.attempts[0].latency_us = OptionalU64::some(92_000);
        record.status = Status::Completed;
        record.cached_tokens = OptionalU32::some(512);
        record.stream = Some(true);
        record.http_status = Some(200);
        record.model = Some(Text::new("two\nlines"));
        record.reason = Some(Text::new("prefix_match"));
        record.decision_ns = OptionalU64::nanos(Duration::from_nanos(3_100));
        record.latency_us = OptionalU64::some(93_001);
        record.worker_request_id = Some(CompactId::new("0af7651916cd43dd8448eb211c80319c"));
        record.trace_id = parse_hex("0af7651916cd43dd8448eb211c80319c");
        let worker = record.attempts[0].worker.clone();
        let candidate = Candidate {
            worker,
            in_flight: 2,
            matched_tokens: Some(512),
            pending_tokens: Some(64),
            speed: Some(8000.5),
            same_prefix: Some(1),
            score: Some(0.5),
        };
        record.candidates = Some(Arc::new(vec![candidate]));
        record.prompt_blocks = PromptBlocks::of(b"Once upon a time");
        record
    }

    #[test]
    fn timestamps_have_six_digits_and_stay_in_range() {
        let written = |unix_us| Timestamp::from_unix_us(unix_us).to_string();
        assert_eq!(written(ARRIVED_UNIX_US), "2026-01-01T00:00:00.000000Z");
        assert_eq!(written(ARRIVED_UNIX_US + 93_001), "2026-01-01T00:00:00.093001Z");
        assert_eq!(written(i64::MAX), "9999-12-31T23:59:59.999999Z");
        assert_eq!(written(-1), "1970-01-01T00:00:00.000000Z");
    }

    #[test]
    fn json_has_every_field_in_order_and_nulls_for_the_unknown() {
        let mut trace = new_record("id").view();
        let json = serde_json::to_string(&trace).expect("a trace is plain data");
        assert_eq!(
            json,
            concat!(
                r#"{"request_id":"id","worker_url":null,"node_id":null,"#,
                r#""timestamp":"2026-01-01T00:00:00.000000Z","routing_policy":"random","#,
                r#""status":"queued","route":"/generate","cache_hit":null,"input_tokens":null,"#,
                r#""completion_time":null,"error_message":null,"model":null,"stream":null,"#,
                r#""http_status":null,"finish_reason":null,"reason":null,"matched_tokens":null,"#,
                r#""prompt_tokens":null,"cached_tokens":null,"completion_tokens":null,"#,
                r#""queue_ms":null,"decision_us":null,"first_byte_ms":null,"ttft_ms":null,"#,
                r#""latency_ms":null,"worker_request_id":null,"trace_id":null,"attempts":[],"#,
                r#""candidates":null,"prompt_blocks":null}"#
            )
        );
        trace.same_id = Some(2);
        let json = serde_json::to_string(&trace).expect("a trace is plain data");
        assert!(json.ends_with(r#","same_id":2}"#));
    }

    #[test]
    fn json_values_are_derived_from_the_record() {
        let json = serde_json::to_value(full_record().view()).expect("plain data");
        assert_eq!(json["worker_url"], "http://127.0.0.1:30005");
        assert_eq!(json["cache_hit"], true);
        assert_eq!(json["decision_us"], 3.1);
        assert_eq!(json["latency_ms"], 93.001);
        assert_eq!(json["completion_time"], "2026-01-01T00:00:00.093001Z");
        assert_eq!(json["trace_id"], "0af7651916cd43dd8448eb211c80319c");
        assert_eq!(json["attempts"][0]["latency_ms"], 92.0);
        assert_eq!(json["candidates"][0]["chosen"], true);
        assert_eq!(json["prompt_blocks"]["bytes"], 16);
    }

    #[test]
    fn csv_comes_back_as_it_went_in() {
        let trace = full_record().view();
        let mut text = csv_header();
        text.extend(csv_rows(std::slice::from_ref(&trace)));
        let mut reader = csv::Reader::from_reader(text.as_slice());
        let header: Vec<String> =
            reader.headers().expect("a header").iter().map(str::to_owned).collect();
        assert_eq!(header, Trace::COLUMNS);
        let rows: Vec<csv::StringRecord> =
            reader.records().map(|row| row.expect("a row")).collect();
        assert_eq!(rows.len(), 1);
        let json = serde_json::to_value(&trace).expect("plain data");
        for (column, cell) in header.iter().zip(rows[0].iter()) {
            match &json[column] {
                Value::Null => assert_eq!(cell, "", "{column}"),
                Value::String(text) => assert_eq!(cell, text, "{column}"),
                value => {
                    let read: Value = serde_json::from_str(cell).expect("a cell of JSON");
                    assert_eq!(&read, value, "{column}");
                }
            }
        }
    }
}
