//! One request's record, as small as it can be kept.
//!
//! 100,000 of these lie in memory, so options are coded by a value that never occurs, names are
//! shared, and a single attempt sits inside the record. [`Record::view`] spreads a record out into
//! the [`Trace`] that people read, [`Record::of`] is its inverse; nothing else turns one into the
//! other.

use std::mem::size_of;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use smallvec::SmallVec;

use super::WorkerName;
use super::prompt_blocks::PromptBlocks;
use super::text::{CompactId, Names, Text, hex, parse_hex};
use super::trace::{AttemptView, CandidateView, Timestamp, Trace};

/// Attempts kept of one request; beyond it the oldest go.
const MAX_ATTEMPTS: usize = 32;

/// How far a request has come. It only ever moves down this list, except that a retry on another
/// worker goes back to [`Status::Routed`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Arrived; no worker picked yet.
    Queued,
    /// A worker was picked.
    Routed,
    /// The worker's response headers arrived.
    Processing,
    /// The last byte of a 2xx answer was relayed.
    Completed,
    /// It ended in any other way; `error_message` says which.
    Failed,
}

impl Status {
    /// All, in the order of a request's life.
    pub const ALL: [Status; 5] =
        [Status::Queued, Status::Routed, Status::Processing, Status::Completed, Status::Failed];

    /// The name in JSON and in queries.
    pub fn name(self) -> &'static str {
        match self {
            Status::Queued => "queued",
            Status::Routed => "routed",
            Status::Processing => "processing",
            Status::Completed => "completed",
            Status::Failed => "failed",
        }
    }

    /// Whether the request is over.
    pub fn is_ended(self) -> bool {
        matches!(self, Status::Completed | Status::Failed)
    }
}

/// An `Option` without the extra word: the largest number stands for "none", and a value that large
/// is kept as one less.
macro_rules! compact_option {
    ($name:ident, $number:ty) => {
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(super) struct $name($number);

        impl $name {
            pub(super) const NONE: $name = $name(<$number>::MAX);

            pub(super) fn some(value: $number) -> $name {
                $name(value.min(<$number>::MAX - 1))
            }

            pub(super) fn get(self) -> Option<$number> {
                (self != Self::NONE).then_some(self.0)
            }
        }

        impl From<Option<$number>> for $name {
            fn from(value: Option<$number>) -> $name {
                value.map_or(Self::NONE, Self::some)
            }
        }
    };
}

compact_option!(OptionalU32, u32);
compact_option!(OptionalU64, u64);

impl OptionalU32 {
    /// Takes over a value that was reported, and keeps the old one otherwise.
    pub(super) fn update(&mut self, reported: Option<u32>) {
        *self = reported.or(self.get()).into();
    }
}

impl OptionalU64 {
    /// Whole nanoseconds.
    pub(super) fn nanos(duration: Duration) -> OptionalU64 {
        OptionalU64::some(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX))
    }

    /// A thousandth: microseconds read as milliseconds, nanoseconds as microseconds.
    fn thousandths(self) -> Option<f64> {
        self.get().map(|value| value as f64 / 1_000.0)
    }

    /// The number whose thousandth this is.
    fn of_thousandths(thousandths: Option<f64>) -> OptionalU64 {
        thousandths.map(|thousandths| (thousandths * 1_000.0).round() as u64).into()
    }
}

/// One attempt to get an answer from a worker.
#[derive(Debug, Clone)]
pub(super) struct Attempt {
    pub(super) worker: Arc<WorkerName>,
    pub(super) error: Option<Text>,
    pub(super) latency_us: OptionalU64,
    pub(super) http_status: Option<u16>,
}

/// A worker that the policy could have picked, as the policy saw it.
#[derive(Debug, Clone, PartialEq)]
pub struct Candidate {
    /// Which worker.
    pub worker: Arc<WorkerName>,
    /// Its requests in flight, without this one.
    pub in_flight: u32,
    /// Tokens of the prompt the policy believes to be in its cache; `None` without a prefix tree.
    pub matched_tokens: Option<u32>,
    /// Tokens of prompts to be computed there before this one, if the policy counts them.
    pub pending_tokens: Option<u32>,
    /// Tokens of prompts computed in a second, if the policy knows.
    pub speed: Option<f64>,
    /// Requests in flight there for the part of the prompt that is cached anywhere, if the policy counts them.
    pub same_prefix: Option<u32>,
    /// What the rule compared, a finite number; `None` if it compared nothing of this worker.
    pub score: Option<f64>,
}

/// What is kept of one request.
#[derive(Debug, Clone)]
pub(super) struct Record {
    pub(super) request_id: CompactId,
    pub(super) arrived_unix_us: i64,
    /// Since the store's start; 0 while open.
    pub(super) ended_us: u64,
    pub(super) routing_policy: Text,
    pub(super) route: Text,
    pub(super) model: Option<Text>,
    pub(super) finish_reason: Option<Text>,
    pub(super) error_message: Option<Text>,
    pub(super) reason: Option<Text>,
    pub(super) worker_request_id: Option<CompactId>,
    pub(super) trace_id: Option<[u8; 16]>,
    /// Empty until a worker is picked; the last one's worker is the record's.
    pub(super) attempts: SmallVec<[Attempt; 1]>,
    /// Of the last pick, best first; at most as many as there are workers. Shared with the copy that
    /// goes to the trace log, and behind one pointer because most routers trace none.
    pub(super) candidates: Option<Arc<Vec<Candidate>>>,
    /// Behind one pointer for the same reason.
    pub(super) prompt_blocks: Option<PromptBlocks>,
    pub(super) queue_us: OptionalU64,
    pub(super) decision_ns: OptionalU64,
    pub(super) first_byte_us: OptionalU64,
    pub(super) ttft_us: OptionalU64,
    pub(super) latency_us: OptionalU64,
    pub(super) input_tokens: OptionalU32,
    pub(super) matched_tokens: OptionalU32,
    pub(super) prompt_tokens: OptionalU32,
    pub(super) cached_tokens: OptionalU32,
    pub(super) completion_tokens: OptionalU32,
    pub(super) http_status: Option<u16>,
    pub(super) stream: Option<bool>,
    pub(super) status: Status,
}

impl Record {
    /// A record of a request that has just arrived.
    pub(super) fn new(
        request_id: &str,
        route: Text,
        routing_policy: Text,
        arrived_unix_us: i64,
    ) -> Record {
        Record {
            request_id: CompactId::new(request_id),
            arrived_unix_us,
            ended_us: 0,
            routing_policy,
            route,
            model: None,
            finish_reason: None,
            error_message: None,
            reason: None,
            worker_request_id: None,
            trace_id: None,
            attempts: SmallVec::new(),
            candidates: None,
            prompt_blocks: None,
            queue_us: OptionalU64::NONE,
            decision_ns: OptionalU64::NONE,
            first_byte_us: OptionalU64::NONE,
            ttft_us: OptionalU64::NONE,
            latency_us: OptionalU64::NONE,
            input_tokens: OptionalU32::NONE,
            matched_tokens: OptionalU32::NONE,
            prompt_tokens: OptionalU32::NONE,
            cached_tokens: OptionalU32::NONE,
            completion_tokens: OptionalU32::NONE,
            http_status: None,
            stream: None,
            status: Status::Queued,
        }
    }

    /// The worker picked last.
    pub(super) fn worker(&self) -> Option<&Arc<WorkerName>> {
        self.attempts.last().map(|attempt| &attempt.worker)
    }

    /// Begins an attempt on a worker.
    pub(super) fn attempt(&mut self, worker: Arc<WorkerName>) {
        if self.attempts.len() == MAX_ATTEMPTS {
            self.attempts.remove(0);
        }
        self.attempts.push(Attempt {
            worker,
            error: None,
            latency_us: OptionalU64::NONE,
            http_status: None,
        });
    }

    /// Heap memory behind the record, without the names it shares.
    pub(super) fn heap_bytes(&self) -> usize {
        let spilled = if self.attempts.spilled() {
            self.attempts.capacity() * size_of::<Attempt>()
        } else {
            0
        };
        let texts = [&self.model, &self.finish_reason, &self.error_message, &self.reason];
        let own = texts.into_iter().chain(self.attempts.iter().map(|attempt| &attempt.error));
        let candidates = self.candidates.as_ref().map_or(0, |candidates| {
            size_of::<Vec<Candidate>>() + candidates.capacity() * size_of::<Candidate>()
        });
        self.request_id.heap_bytes()
            + candidates
            + self.prompt_blocks.as_ref().map_or(0, PromptBlocks::heap_bytes)
            + self.worker_request_id.as_ref().map_or(0, CompactId::heap_bytes)
            + own.flatten().map(Text::own_bytes).sum::<usize>()
            + spilled
    }

    /// The record as people read it.
    pub(super) fn view(&self) -> Trace {
        let worker = self.worker();
        let text = |text: &Option<Text>| text.as_ref().map(|text| text.as_str().to_owned());
        Trace {
            request_id: self.request_id.to_string(),
            worker_url: worker.map(|worker| worker.url.to_string()),
            node_id: worker.map(|worker| worker.node_id.to_string()),
            timestamp: Timestamp::from_unix_us(self.arrived_unix_us),
            routing_policy: self.routing_policy.as_str().to_owned(),
            status: self.status,
            route: self.route.as_str().to_owned(),
            cache_hit: self.cached_tokens.get().map(|tokens| tokens > 0),
            input_tokens: self.input_tokens.get(),
            completion_time: self.completion_time(),
            error_message: text(&self.error_message),
            model: text(&self.model),
            stream: self.stream,
            http_status: self.http_status,
            finish_reason: text(&self.finish_reason),
            reason: text(&self.reason),
            matched_tokens: self.matched_tokens.get(),
            prompt_tokens: self.prompt_tokens.get(),
            cached_tokens: self.cached_tokens.get(),
            completion_tokens: self.completion_tokens.get(),
            queue_ms: self.queue_us.thousandths(),
            decision_us: self.decision_ns.thousandths(),
            first_byte_ms: self.first_byte_us.thousandths(),
            ttft_ms: self.ttft_us.thousandths(),
            latency_ms: self.latency_us.thousandths(),
            worker_request_id: self.worker_request_id.as_ref().map(CompactId::to_string),
            trace_id: self.trace_id.map(hex),
            attempts: self.attempts.iter().map(Attempt::view).collect(),
            candidates: self.candidate_views(),
            prompt_blocks: self.prompt_blocks.clone(),
            same_id: None,
        }
    }

    /// The record whose view is `trace`. What a view derives is not read, so a trace that is not a
    /// record's view gives a record with another one. `worker` names the worker of a URL and a
    /// node.
    pub(super) fn of(
        trace: &Trace,
        names: &mut Names,
        mut worker: impl FnMut(&str, &str) -> Arc<WorkerName>,
    ) -> Record {
        let mut shared = |text: &Option<String>| text.as_ref().map(|text| names.share(text));
        let own = |text: &Option<String>| text.as_deref().map(Text::new);
        let (model, finish_reason) = (shared(&trace.model), shared(&trace.finish_reason));
        let reason = shared(&trace.reason);
        let mut attempt = |attempt: &AttemptView| Attempt {
            worker: worker(&attempt.worker_url, &attempt.node_id),
            error: own(&attempt.error),
            latency_us: OptionalU64::of_thousandths(attempt.latency_ms),
            http_status: attempt.http_status,
        };
        let attempts = trace.attempts.iter().map(&mut attempt).collect();
        let candidate = |candidate: &CandidateView| Candidate {
            worker: worker(&candidate.worker_url, &candidate.node_id),
            in_flight: candidate.in_flight,
            matched_tokens: candidate.matched_tokens,
            pending_tokens: candidate.pending_tokens,
            speed: candidate.speed,
            same_prefix: candidate.same_prefix,
            score: candidate.score,
        };
        let candidates = trace.candidates.as_ref();
        Record {
            request_id: CompactId::new(&trace.request_id),
            arrived_unix_us: trace.timestamp.unix_us(),
            ended_us: 0,
            routing_policy: names.share(&trace.routing_policy),
            route: names.share(&trace.route),
            model,
            finish_reason,
            error_message: own(&trace.error_message),
            reason,
            worker_request_id: trace.worker_request_id.as_deref().map(CompactId::new),
            trace_id: trace.trace_id.as_deref().and_then(parse_hex),
            attempts,
            candidates: candidates.map(|all| Arc::new(all.iter().map(candidate).collect())),
            prompt_blocks: trace.prompt_blocks.clone(),
            queue_us: OptionalU64::of_thousandths(trace.queue_ms),
            decision_ns: OptionalU64::of_thousandths(trace.decision_us),
            first_byte_us: OptionalU64::of_thousandths(trace.first_byte_ms),
            ttft_us: OptionalU64::of_thousandths(trace.ttft_ms),
            latency_us: OptionalU64::of_thousandths(trace.latency_ms),
            input_tokens: trace.input_tokens.into(),
            matched_tokens: trace.matched_tokens.into(),
            prompt_tokens: trace.prompt_tokens.into(),
            cached_tokens: trace.cached_tokens.into(),
            completion_tokens: trace.completion_tokens.into(),
            http_status: trace.http_status,
            stream: trace.stream,
            status: trace.status,
        }
    }

    fn candidate_views(&self) -> Option<Vec<CandidateView>> {
        let chosen = self.worker().map(|worker| worker.index);
        let view = |candidate: &Candidate| CandidateView {
            worker_url: candidate.worker.url.to_string(),
            node_id: candidate.worker.node_id.to_string(),
            in_flight: candidate.in_flight,
            matched_tokens: candidate.matched_tokens,
            pending_tokens: candidate.pending_tokens,
            speed: candidate.speed,
            same_prefix: candidate.same_prefix,
            score: candidate.score,
            chosen: Some(candidate.worker.index) == chosen,
        };
        self.candidates.as_ref().map(|candidates| candidates.iter().map(view).collect())
    }

    fn completion_time(&self) -> Option<Timestamp> {
        let latency_us = i64::try_from(self.latency_us.get()?).unwrap_or(i64::MAX);
        Some(Timestamp::from_unix_us(self.arrived_unix_us.saturating_add(latency_us)))
    }
}

impl Attempt {
    fn view(&self) -> AttemptView {
        AttemptView {
            worker_url: self.worker.url.to_string(),
            node_id: self.worker.node_id.to_string(),
            http_status: self.http_status,
            error: self.error.as_ref().map(|error| error.as_str().to_owned()),
            latency_ms: self.latency_us.thousandths(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_compact_option_tells_none_from_every_value() {
        assert_eq!(OptionalU32::NONE.get(), None);
        assert_eq!(OptionalU32::some(0).get(), Some(0));
        assert_eq!(OptionalU32::some(u32::MAX).get(), Some(u32::MAX - 1));
        assert_eq!(OptionalU64::nanos(Duration::MAX).get(), Some(u64::MAX - 1));
        assert_eq!(OptionalU64::nanos(Duration::from_nanos(3_100)).thousandths(), Some(3.1));
    }

    #[test]
    fn the_oldest_attempts_go_beyond_the_bound() {
        let mut record = Record::new("id", Text::new("/generate"), Text::new("random"), 0);
        assert!(record.worker().is_none());
        for index in 0..MAX_ATTEMPTS as u32 + 3 {
            let node_id = format!("gpu_{index}").into();
            record.attempt(Arc::new(WorkerName { index, url: "http://a:1".into(), node_id }));
        }
        assert_eq!(record.attempts.len(), MAX_ATTEMPTS);
        assert_eq!(record.attempts[0].worker.index, 3);
        assert_eq!(record.worker().map(|worker| worker.index), Some(MAX_ATTEMPTS as u32 + 2));
    }

    #[test]
    fn status_names_are_the_serialised_ones() {
        for status in Status::ALL {
            let json = serde_json::to_string(&status).expect("a name");
            assert_eq!(json, format!("\"{}\"", status.name()));
        }
    }
}
