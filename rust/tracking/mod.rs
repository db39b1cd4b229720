//! Which worker served which request, why, and how long it took.
//!
//! Every request on a routed route has a record from its arrival, kept for a while after its end.
//! The request writes it through an [`OpenTrace`]; anyone may read it meanwhile and afterwards, by
//! id, in listings and in statistics.
//!
//! In reading order: [`OpenTrace`] (what a request tells), `record` (how little is kept of it),
//! [`Trace`] (how it is read), `shard` and `store` (where records are, and which one makes room),
//! [`Stats`], [`Query`], `log` (records in files, and read back from there), [`PromptBlocks`] (what
//! prompts have in common) and [`Mooncake`] (records as a load to send again).
//!
//! Invariants: a request writes its own record only; each record ends exactly once; a record that
//! has expired is never read; all counts are exact; at most `max_trace_entries` records are held.
//! No HTTP, no async and no timers here: the server calls [`Tracker::remove_expired`] now and then.

mod arrivals;
mod log;
mod mooncake;
mod open;
mod prompt_blocks;
mod query;
mod record;
mod shard;
mod slab;
mod stats;
mod store;
mod text;
mod trace;

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::Serialize;

pub use log::{LogError, TraceLog};
pub use mooncake::Mooncake;
pub use open::{AnswerFacts, OpenTrace, RequestFacts};
pub use prompt_blocks::PromptBlocks;
pub use query::{Cursor, DEFAULT_LIMIT, Format, MAX_LIMIT, Query, QueryError};
pub use record::{Candidate, Status};
pub use stats::Stats;
pub use store::Page;
pub use text::REQUEST_ID_PREFIX;
pub use trace::{AttemptView, CandidateView, Timestamp, Trace, csv_header, csv_rows};

use crate::routing::WorkerName;
use log::Log;
use store::Store;

/// Most older files of a trace log, and the highest number one has.
const MAX_KEPT_LOGS: u32 = 999;

/// Options of request tracking.
#[derive(clap::Args, Clone, Debug, PartialEq, Eq, Serialize)]
#[group(skip)]
pub struct Options {
    /// Record which worker served each request, why and how long it took; read at /v1/traces
    #[arg(long, alias = "enable-request-tracing", default_value_t = false, num_args = 0..=1, default_missing_value = "true", action = clap::ArgAction::Set, value_parser = clap::builder::BoolishValueParser::new())]
    pub enable_request_tracking: bool,

    /// Most traces held; when full, the least recently used ended one goes first
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u32).range(1..=1 << 31))]
    pub max_trace_entries: u32,

    /// Seconds a trace is held after its request has ended
    #[arg(long, alias = "trace-ttl", default_value_t = 3600, value_parser = clap::value_parser!(u64).range(1..))]
    pub trace_ttl_seconds: u64,

    /// Seconds between removals of traces whose time is over; they are never shown, removed or not
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..))]
    pub trace_cleanup_interval_secs: u64,

    /// Workers named in a trace's candidates with what the policy compared: the so many best of those it chose
    /// among, 0 for none, -1 for all; needs enable_request_tracking
    #[arg(long, default_value_t = 0, allow_negative_numbers = true, value_parser = clap::value_parser!(i64).range(-1..))]
    pub trace_candidates: i64,

    /// Keep hashes of each prompt's blocks of 512 tokens in its trace, never its text: what GET
    /// /v1/traces?format=mooncake makes a load of that can be replayed; needs enable_request_tracking
    #[arg(long, default_value_t = false, num_args = 0..=1, default_missing_value = "true", action = clap::ArgAction::Set, value_parser = clap::builder::BoolishValueParser::new())]
    pub trace_prompt_blocks: bool,

    /// File to append each ended trace to, as one line of JSON; needs enable_request_tracking
    #[arg(long, value_name = "FILE")]
    pub trace_log: Option<PathBuf>,

    /// MiB that trace_log grows to before it becomes FILE.1, and FILE.1 becomes FILE.2
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    pub trace_log_max_mb: u32,

    /// Older files of trace_log to keep
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(0..=i64::from(MAX_KEPT_LOGS)))]
    pub trace_log_keep: u32,
}

impl Options {
    /// What no single option shows: the name of the wrong one, and why.
    pub fn check(&self) -> Result<(), (&'static str, String)> {
        if self.trace_log.is_some() && !self.enable_request_tracking {
            let why = "it takes the traces of enable_request_tracking, which is off";
            return Err(("trace_log", why.to_owned()));
        }
        if self.trace_candidates != 0 && !self.enable_request_tracking {
            let why = "it adds to the traces of enable_request_tracking, which is off";
            return Err(("trace_candidates", why.to_owned()));
        }
        if self.trace_prompt_blocks && !self.enable_request_tracking {
            let why = "it adds to the traces of enable_request_tracking, which is off";
            return Err(("trace_prompt_blocks", why.to_owned()));
        }
        Ok(())
    }

    /// How many candidates a trace keeps; `None` for none.
    pub fn candidates_max(&self) -> Option<usize> {
        match self.trace_candidates {
            0 => None,
            // All: no router has as many workers.
            kept => Some(usize::try_from(kept).unwrap_or(usize::MAX)),
        }
    }
}

/// When a request arrived, by both clocks.
#[derive(Debug, Clone, Copy)]
pub struct Arrived {
    /// Wall clock, in microseconds since the Unix epoch.
    pub unix_us: i64,
    /// What all durations count from.
    pub at: Instant,
}

impl Arrived {
    /// Now.
    pub fn now() -> Arrived {
        Arrived::at(Instant::now())
    }

    /// Now, which is this moment by the clock that durations are measured by.
    pub fn at(at: Instant) -> Arrived {
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let unix_us = i64::try_from(since_epoch.as_micros()).unwrap_or(i64::MAX);
        Arrived { unix_us, at }
    }
}

/// All traces of one router.
#[derive(Debug)]
pub struct Tracker {
    options: Options,
    store: Store,
    context: Arc<Context>,
}

/// What requests share while they run: the clock, and who hears of those that are over.
#[derive(Debug)]
struct Context {
    started_at: Instant,
    log: Option<Log>,
    told: OnceLock<Told>,
}

impl Context {
    /// Time begins.
    fn new(log: Option<Log>) -> Context {
        Context { started_at: Instant::now(), log, told: OnceLock::new() }
    }

    fn nanos_at(&self, at: Instant) -> u64 {
        let since_start: Duration = at.saturating_duration_since(self.started_at);
        // Half a thousand years fit.
        since_start.as_nanos() as u64
    }
}

/// Who is told of requests that are over.
struct Told(Box<dyn Fn(&Trace) + Send + Sync>);

impl fmt::Debug for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Told")
    }
}

impl Tracker {
    /// An empty tracker. All its traces bear the router's one policy.
    ///
    /// # Errors
    /// The trace log cannot be opened to write; the message names it.
    pub fn new(options: Options, routing_policy: &str) -> io::Result<Arc<Tracker>> {
        let capacity = options.max_trace_entries.max(1) as usize;
        let ttl_us = options.trace_ttl_seconds.saturating_mul(1_000_000);
        let max_log_bytes = u64::from(options.trace_log_max_mb) << 20;
        let open_log = |path: &PathBuf| Log::open(path, max_log_bytes, options.trace_log_keep);
        let log = options.trace_log.as_ref().map(open_log).transpose()?;
        let context = Arc::new(Context::new(log));
        let store = Store::new(capacity, ttl_us, routing_policy, Arc::clone(&context));
        Ok(Arc::new(Tracker { options, store, context }))
    }

    /// The options in force.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// From now on this hears the trace of each request that is over, while the request waits; only the first counts.
    pub fn tell(&self, told: Box<dyn Fn(&Trace) + Send + Sync>) {
        self.context.told.get_or_init(|| Told(told));
    }

    /// Begins a record, `queued`. The caller bounds the length of ids (256) and the number of
    /// routes.
    pub fn open(&self, arrived: Arrived, request_id: &str, route: &str) -> OpenTrace {
        let arrived_ns = self.context.nanos_at(arrived.at);
        let now_us = arrived_ns / 1_000;
        let own = self.store.open(request_id, route, arrived.unix_us, now_us);
        OpenTrace::new(own, arrived_ns)
    }

    /// The newest trace with this id. Counts as a use of it.
    pub fn get(&self, request_id: &str) -> Option<Trace> {
        self.store.get(request_id, self.now_us())
    }

    /// The newest trace for each id, in the order of the ids; unknown ones are left out. Counts as
    /// a use of each.
    pub fn get_many<Id: AsRef<str>>(&self, request_ids: &[Id]) -> Vec<Trace> {
        request_ids.iter().filter_map(|id| self.get(id.as_ref())).collect()
    }

    /// One page, newest first. Costs what is on it and what its filters pass over.
    pub fn list(&self, query: &Query) -> Page {
        self.store.list(query, self.now_us())
    }

    /// All that match, page by page, up to `query.limit` if that is given. Nothing is locked between
    /// two pages.
    pub fn pages(
        self: &Arc<Self>,
        query: &Query,
    ) -> impl Iterator<Item = Vec<Trace>> + Send + use<> {
        let tracker = Arc::clone(self);
        Pages::new(query, move |query| tracker.list(query))
    }

    /// Counts since the start and of what is held now, in time that does not depend on how much that
    /// is.
    pub fn stats(&self) -> Stats {
        let mut stats = Stats::new(Some(self.options.clone()));
        self.store.add_to(&mut stats, self.now_us());
        stats
    }

    /// Gives back the memory of traces whose time is over at `now`; says how many.
    pub fn remove_expired(&self, now: Instant) -> usize {
        self.store.remove_expired(self.micros_at(now))
    }

    /// Ended requests whose trace is in the trace log.
    pub fn log_written(&self) -> u64 {
        self.context.log.as_ref().map_or(0, Log::written)
    }

    /// Ended requests whose trace did not get into the trace log: the buffer before it was full, it
    /// could not be written, or the record was evicted while the request ran.
    pub fn log_lost(&self) -> u64 {
        self.context.log.as_ref().map_or(0, Log::lost)
    }

    /// Waits until the traces of all requests that have ended are in the trace log, and closes it.
    pub fn close_log(&self) {
        if let Some(log) = &self.context.log {
            log.close();
        }
    }

    fn now_us(&self) -> u64 {
        self.micros_at(Instant::now())
    }

    fn micros_at(&self, at: Instant) -> u64 {
        self.context.nanos_at(at) / 1_000
    }
}

/// Everything a query asks for, a page of up to [`MAX_LIMIT`] traces at a time. See
/// [`Tracker::pages`].
struct Pages<List> {
    list: List,
    /// `None` after the last page.
    query: Option<Query>,
    remaining: usize,
}

impl<List: FnMut(&Query) -> Page> Pages<List> {
    fn new(query: &Query, list: List) -> Self {
        let remaining = query.limit.unwrap_or(usize::MAX);
        Pages { list, query: Some(query.clone()), remaining }
    }
}

impl<List: FnMut(&Query) -> Page> Iterator for Pages<List> {
    type Item = Vec<Trace>;

    fn next(&mut self) -> Option<Vec<Trace>> {
        let mut query = self.query.take()?;
        query.limit = Some(self.remaining.min(MAX_LIMIT));
        let page = (self.list)(&query);
        self.remaining -= page.traces.len();
        if page.next_cursor.is_some() && self.remaining > 0 {
            query.cursor = page.next_cursor;
            self.query = Some(query);
        }
        (!page.traces.is_empty()).then_some(page.traces)
    }
}

#[cfg(test)]
mod tests;
