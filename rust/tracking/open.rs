//! A request's hold on its own record while it runs.
//!
//! The proxy tells an [`OpenTrace`] what happens, in the order it happens. However the request
//! ends, its record ends: dropping the value is an ending too, so a cancelled request cannot leave
//! a record open. It writes to its own record only; if that record had to make room, what happens
//! still counts in the statistics.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::prompt_blocks::PromptBlocks;
use super::record::{Candidate, OptionalU64, Record, Status};
use super::shard::Place;
use super::store::Home;
use super::text::{CompactId, Names, Text, capped, parse_hex};
use super::{Context, Told, WorkerName};

const MAX_ERROR_BYTES: usize = 512;
const MAX_MODEL_BYTES: usize = 128;
const MAX_WORKER_REQUEST_ID_BYTES: usize = 128;
const MAX_FINISH_REASON_BYTES: usize = 64;
const MAX_REASON_BYTES: usize = 64;

/// The error of a request that was dropped without an end.
const UNENDED: &str = "dropped before its end";

/// What the request itself says. `None` leaves what is known.
#[derive(Debug, Clone, Copy, Default)]
pub struct RequestFacts<'a> {
    /// The model asked for; cut at 128 bytes.
    pub model: Option<&'a str>,
    /// Whether a stream is asked for.
    pub stream: Option<bool>,
    /// The router's estimate of the prompt.
    pub input_tokens: Option<u32>,
    /// 32 lower-case hex digits, from `traceparent`; anything else is passed over.
    pub trace_id: Option<&'a str>,
    /// Hashes of the prompt's blocks, if they are to be kept.
    pub prompt_blocks: Option<&'a PromptBlocks>,
}

/// What the worker's answer says. `None` leaves what is known.
#[derive(Debug, Clone, Copy, Default)]
pub struct AnswerFacts<'a> {
    /// Tokens of the prompt.
    pub prompt_tokens: Option<u32>,
    /// Those of them the worker had in its cache.
    pub cached_tokens: Option<u32>,
    /// Tokens generated.
    pub completion_tokens: Option<u32>,
    /// Why generation ended; cut at 64 bytes.
    pub finish_reason: Option<&'a str>,
    /// The worker's own id; cut at 128 bytes.
    pub worker_request_id: Option<&'a str>,
}

/// The record of a running request. See the module's documentation. Its moments are in nanoseconds since the tracker's
/// start.
#[derive(Debug)]
pub struct OpenTrace {
    /// Where the record is.
    home: Arc<Home>,
    place: Place,
    arrived_ns: u64,
    status: Status,
    worker: Option<Arc<WorkerName>>,
    is_attempt_open: bool,
    sent_ns: Option<u64>,
    /// Written with what follows: the pick, or the end.
    queue_us: OptionalU64,
    /// The answer's status; kept here too because it decides how the request ends.
    http_status: Option<u16>,
}

impl OpenTrace {
    pub(super) fn new((home, place): (Arc<Home>, Place), arrived_ns: u64) -> OpenTrace {
        OpenTrace {
            home,
            place,
            arrived_ns,
            status: Status::Queued,
            worker: None,
            is_attempt_open: false,
            sent_ns: None,
            queue_us: OptionalU64::NONE,
            http_status: None,
        }
    }

    /// How far the request has come.
    pub fn status(&self) -> Status {
        self.status
    }

    /// The worker picked last.
    pub fn worker(&self) -> Option<&Arc<WorkerName>> {
        self.worker.as_ref()
    }

    /// What was read from the request.
    pub fn request(&mut self, facts: RequestFacts<'_>) {
        self.edit(|record, names| {
            if let Some(model) = facts.model {
                record.model = Some(names.share(capped(model, MAX_MODEL_BYTES)));
            }
            record.stream = facts.stream.or(record.stream);
            record.input_tokens.update(facts.input_tokens);
            record.trace_id = facts.trace_id.and_then(parse_hex).or(record.trace_id);
            if let Some(blocks) = facts.prompt_blocks {
                record.prompt_blocks = Some(blocks.clone());
            }
        });
    }

    /// The request may go on to a worker.
    pub fn admitted(&mut self, at: Instant) {
        self.queue_us = self.since_arrival(at);
    }

    /// A worker was picked, for the first attempt or for another one. `reason` is the policy's,
    /// cut at 64 bytes; `decision` the time it took to read the prompt and pick; `candidates` what the
    /// policy chose among, best first, if that is traced.
    pub fn routed(
        &mut self,
        worker: &Arc<WorkerName>,
        reason: &str,
        matched_tokens: Option<u32>,
        decision: Duration,
        candidates: Option<Arc<Vec<Candidate>>>,
    ) {
        let from = (self.worker.as_ref(), self.status);
        let own = self.home.shard().route(self.place, from, worker, |record, names| {
            record.queue_us = self.queue_us;
            record.reason = Some(names.share(capped(reason, MAX_REASON_BYTES)));
            record.http_status = None;
            record.matched_tokens = matched_tokens.into();
            record.decision_ns = OptionalU64::nanos(decision);
            record.candidates = candidates;
        });
        self.worker = Some(own);
        self.status = Status::Routed;
        self.is_attempt_open = true;
        self.sent_ns = None;
        self.http_status = None;
    }

    /// The policy's own estimate of the prompt's tokens, if it has one.
    pub fn estimated(&mut self, input_tokens: Option<u32>) {
        if input_tokens.is_some() {
            self.edit(|record, _| record.input_tokens = input_tokens.into());
        }
    }

    /// The request is being sent to the worker; the attempt's own clock starts.
    pub fn sent(&mut self, at: Instant) {
        self.sent_ns = Some(self.home.context.nanos_at(at));
    }

    /// The attempt came to nothing, with the worker's status if it answered. Another one may follow;
    /// if not, [`OpenTrace::fail`] or [`OpenTrace::complete`] must.
    pub fn attempt_failed(&mut self, at: Instant, http_status: Option<u16>, error: &str) {
        let attempt = self.take_attempt(self.home.context.nanos_at(at));
        self.edit(|record, _| close_attempt(record, attempt, http_status, Some(error)));
    }

    /// The worker's headers arrived, and its answer is going to be relayed.
    pub fn headers(&mut self, http_status: u16) {
        self.http_status = Some(http_status);
        let from = std::mem::replace(&mut self.status, Status::Processing);
        self.home.shard().advance(self.place, (from, Status::Processing), |record| {
            if let Some(attempt) = record.attempts.last_mut() {
                attempt.http_status = Some(http_status);
            }
        });
    }

    /// The first byte of the answer's body, on its way to the client; later calls change nothing.
    pub fn first_byte(&mut self, at: Instant) {
        let (first_byte_us, http_status) = (self.since_arrival(at), self.http_status);
        self.edit(|record, _| {
            record.http_status = http_status;
            if record.first_byte_us == OptionalU64::NONE {
                record.first_byte_us = first_byte_us;
            }
        });
    }

    /// The first stream frame with content; later calls change nothing.
    pub fn ttft(&mut self, at: Instant) {
        let ttft_us = self.since_arrival(at);
        self.edit(|record, _| {
            if record.ttft_us == OptionalU64::NONE {
                record.ttft_us = ttft_us;
            }
        });
    }

    /// What was read from the worker's answer.
    pub fn answer(&mut self, facts: AnswerFacts<'_>) {
        self.edit(|record, names| {
            record.prompt_tokens.update(facts.prompt_tokens);
            record.cached_tokens.update(facts.cached_tokens);
            record.completion_tokens.update(facts.completion_tokens);
            if let Some(reason) = facts.finish_reason {
                record.finish_reason = Some(names.share(capped(reason, MAX_FINISH_REASON_BYTES)));
            }
            if let Some(id) = facts.worker_request_id {
                let id = CompactId::new(capped(id, MAX_WORKER_REQUEST_ID_BYTES));
                record.worker_request_id = Some(id);
            }
        });
    }

    /// The last byte of an answer that is no error was relayed.
    pub fn complete(mut self, at: Instant) {
        self.end(at, Status::Completed, self.http_status, None);
    }

    /// The request failed. `http_status` is what the client was answered, `None` if it was not.
    pub fn fail(mut self, at: Instant, http_status: Option<u16>, error_message: &str) {
        self.end(at, Status::Failed, http_status, Some(error_message));
    }

    /// Writes all that the ending says and ends the record, in one step for readers.
    fn end(&mut self, at: Instant, to: Status, http_status: Option<u16>, error: Option<&str>) {
        let now_ns = self.home.context.nanos_at(at);
        let attempt = self.take_attempt(now_ns);
        let latency_us = micros_between(self.arrived_ns, now_ns);
        let from = std::mem::replace(&mut self.status, to);
        let (queue_us, had_worker) = (self.queue_us, self.worker.is_some());
        let end_us = now_ns / 1_000;
        let shard = self.home.end(self.place, (from, to), had_worker, end_us, |record| {
            close_attempt(record, attempt, None, error);
            record.queue_us = queue_us;
            record.latency_us = latency_us;
            record.http_status = http_status;
            record.error_message = error.map(error_text);
        });
        let Context { log, told, .. } = &*self.home.context;
        let told = told.get();
        if log.is_none() && told.is_none() {
            return;
        }
        let record = shard.record(self.place).cloned();
        drop(shard);
        if let (Some(Told(told)), Some(record)) = (told, &record) {
            told(&record.view());
        }
        if let Some(log) = log {
            log.hand_over(record);
        }
    }

    /// Ends the attempt that is under way: its latency, which is none if it was never sent.
    fn take_attempt(&mut self, now_ns: u64) -> Option<OptionalU64> {
        let latency = |sent_ns| micros_between(sent_ns, now_ns);
        let latency_us = self.sent_ns.take().map_or(OptionalU64::NONE, latency);
        std::mem::take(&mut self.is_attempt_open).then_some(latency_us)
    }

    fn edit(&self, change: impl FnOnce(&mut Record, &mut Names)) {
        self.home.shard().edit(self.place, change);
    }

    fn since_arrival(&self, at: Instant) -> OptionalU64 {
        micros_between(self.arrived_ns, self.home.context.nanos_at(at))
    }
}

impl Drop for OpenTrace {
    fn drop(&mut self) {
        if !self.status.is_ended() {
            self.end(Instant::now(), Status::Failed, None, Some(UNENDED));
        }
    }
}

/// Writes how the last attempt went, if one was under way.
fn close_attempt(
    record: &mut Record,
    latency_us: Option<OptionalU64>,
    http_status: Option<u16>,
    error: Option<&str>,
) {
    if let (Some(latency_us), Some(attempt)) = (latency_us, record.attempts.last_mut()) {
        attempt.latency_us = latency_us;
        attempt.http_status = http_status.or(attempt.http_status);
        attempt.error = error.map(error_text);
    }
}

/// Whole microseconds.
fn micros_between(from_ns: u64, to_ns: u64) -> OptionalU64 {
    OptionalU64::some(to_ns.saturating_sub(from_ns) / 1_000)
}

fn error_text(error: &str) -> Text {
    Text::new(capped(error, MAX_ERROR_BYTES))
}
