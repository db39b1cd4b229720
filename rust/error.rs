//! What can go wrong, told once.
//!
//! An [`Error`] knows which of the router's errors it is ([`Kind`]), whose fault it is ([`Origin`]) and says in
//! words what happened. It knows nothing of HTTP bodies or Python exceptions: `server/error_response.rs` and
//! `python.rs` render it. Every kind is one row of the table below; `docs/errors.md` is generated from it.

use std::fmt;

/// Whose fault an error is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The request could not have been served by any router.
    Client,
    /// The router refused or gave up on a request that was in order.
    Router,
    /// A worker failed.
    Worker,
}

impl Origin {
    pub const fn name(self) -> &'static str {
        match self {
            Origin::Client => "client",
            Origin::Router => "router",
            Origin::Worker => "worker",
        }
    }
}

macro_rules! kinds {
    ($($kind:ident $code:literal $status:literal $origin:ident $meaning:literal;)*) => {
        /// The errors the router itself answers with.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Kind {
            $(#[doc = $meaning] $kind,)*
        }

        impl Kind {
            /// Every kind, in the order of the documentation.
            pub const ALL: &'static [Kind] = &[$(Kind::$kind),*];

            /// The stable word clients may compare with (`error.code`, header `x-router-error-code`).
            pub const fn code(self) -> &'static str {
                match self { $(Kind::$kind => $code),* }
            }

            /// The HTTP status it is answered with.
            pub const fn status(self) -> u16 {
                match self { $(Kind::$kind => $status),* }
            }

            pub const fn origin(self) -> Origin {
                match self { $(Kind::$kind => Origin::$origin),* }
            }

            /// One sentence for the documentation.
            pub const fn meaning(self) -> &'static str {
                match self { $(Kind::$kind => $meaning),* }
            }
        }
    };
}

kinds! {
    InvalidQuery "invalid_query" 400 Client "A parameter of a trace query is unknown or has a bad value.";
    InvalidRequest "invalid_request" 400 Client "The body or the query of a management request is malformed or has a bad value, or a request does not name one host.";
    TooManyWorkers "too_many_workers" 409 Router "No further worker can join.";
    UnknownTargetWorker "unknown_target_worker" 400 Client "`x-sglang-target-worker` names no worker of this router.";
    Unauthorized "unauthorized" 401 Client "The route asks for a key that the request does not have: see [keys.md](keys.md).";
    ForbiddenOrigin "forbidden_origin" 403 Client "A page of another origin, which `cors_allowed_origins` does not name, would manage a router without a key.";
    NotFound "not_found" 404 Client "No such route, trace or worker.";
    MethodNotAllowed "method_not_allowed" 405 Client "The route exists, but not for this method.";
    UriTooLong "uri_too_long" 414 Client "The request's target is longer than 63,000 bytes.";
    PayloadTooLarge "payload_too_large" 413 Client "The request body is larger than `max_payload_size`, or a batch names too many ids.";
    IncompleteBody "incomplete_body" 400 Client "The request body is not framed as HTTP asks.";
    Aborted "aborted" 499 Client "The request was ended by `POST /abort_request`, or its client left.";
    LoopDetected "loop_detected" 508 Router "The router checks itself: its own URL was named as a worker's.";
    TrackingDisabled "tracking_disabled" 501 Router "Traces were asked for, but request tracking is off.";
    QueueFull "queue_full" 429 Router "`max_concurrent_requests` are in flight, or the rate is used up, and `queue_size` wait already.";
    QueueTimeout "queue_timeout" 408 Router "The request waited longer than `queue_timeout_secs` to be routed.";
    Overloaded "overloaded" 503 Router "The bodies of all requests together would take more than `max_buffered_bytes`.";
    NoAvailableWorkers "no_available_workers" 503 Router "No worker may be picked, or not the one asked for: unhealthy, leaving, or its circuit breaker is open.";
    PolicyFailed "policy_failed" 500 Router "The policy is one of your own in Python, and raised an error, chose no worker, or had not answered when the request's time was over: the trace and the log say which, with the traceback.";
    WorkerUnreachable "worker_unreachable" 502 Worker "The last worker tried refused the connection, or ended it without an answer or in the middle of one.";
    Timeout "timeout" 504 Worker "The answer had not ended within `request_timeout_secs`, or nothing more of it came for `stream_stall_timeout_secs`.";
}

/// One error: which, and what happened in words that say what would be right.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    pub kind: Kind,
    /// Whose fault it is this time; the kind's, unless something else is known.
    pub origin: Origin,
    pub message: String,
    /// What the trace and the log say instead, if that is not the client's affair.
    pub detail: Option<String>,
}

impl Error {
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, origin: kind.origin(), message: message.into(), detail: None }
    }

    /// The same error by somebody else's fault.
    pub fn by(self, origin: Origin) -> Self {
        Self { origin, ..self }
    }

    /// The same error, with more to tell to those who run the router.
    pub fn with_detail(self, detail: String) -> Self {
        Self { detail: Some(detail), ..self }
    }
}

/// Longest text of a stranger's that a message repeats, in characters.
const SHOWN_MAX: usize = 80;

/// A stranger's text as a message may repeat it: quoted, with control characters escaped, and cut.
pub fn shown(text: &str) -> String {
    match text.char_indices().nth(SHOWN_MAX) {
        Some((end, _)) => format!("{:?}...", &text[..end]),
        None => format!("{text:?}"),
    }
}

/// An error and what caused it, in one line: libraries tell the reason only in the error's sources.
pub fn with_causes(error: &(dyn std::error::Error + 'static)) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !line.contains(&cause_text) {
            line = format!("{line}: {cause_text}");
        }
        source = cause.source();
    }
    line
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.code())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_strangers_text_is_quoted_escaped_and_cut() {
        assert_eq!(shown("a\nb\u{1b}"), r#""a\nb\u{1b}""#);
        assert_eq!(shown(&"é".repeat(90)), format!("\"{}\"...", "é".repeat(80)));
    }

    #[test]
    fn causes_are_told_once_each() {
        let inner = std::io::Error::other("disk full");
        let error = anyhow::Error::new(inner).context("cannot write");
        assert_eq!(with_causes(error.as_ref()), "cannot write: disk full");
    }
}
