//! A policy of one's own: a Python function that chooses a worker.
//!
//! The one idea: the function is called in the request's own time, with the GIL held for the call alone; what it is shown are
//! two small kinds of objects whose numbers were taken before. What it hears of ended requests comes from a thread of
//! its own.
//!
//! Invariant: whatever it raises or returns, the request fails or goes where it said; the router goes on.
//!
//! Bound: [`MAX_WAITING`] traces wait for it. What finds no room is lost, counted and told in the log.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use pyo3::PyTypeInfo;
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyTuple};
use tracing::dispatcher;

use super::json_text;
use crate::routing::own::{Chooser, Seen};
use crate::routing::{self, PickError, Replayed, WorkerName};
use crate::tracking::{Status, Timestamp, Trace};

/// Most traces waiting to be heard, about a KiB each.
const MAX_WAITING: usize = 4096;

/// How long the end of a router waits for a policy to hear what is left.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// How often the log says what may happen with every request.
const WARN_EVERY: Duration = Duration::from_secs(60);

/// A `choose` that takes longer than this is told of.
const SLOW: Duration = Duration::from_millis(100);

/// Longest traceback in the log, in bytes; its end is kept.
const TRACEBACK_MAX: usize = 8192;

/// Longest answer of a policy that a message repeats, in characters.
const ANSWER_MAX: usize = 80;

/// A request as a policy sees it.
#[pyclass(frozen, get_all, module = "sglang_router_rs")]
pub(super) struct RequestView {
    request_id: Option<String>,
    tokens: u32,
    prompt_bytes: usize,
    route: String,
    model: Option<String>,
    stream: bool,
    routing_key: Option<String>,
    at_secs: f64,
}

#[pymethods]
impl RequestView {
    fn __repr__(view: &Bound<'_, Self>) -> PyResult<String> {
        repr(view, "request_id tokens prompt_bytes route model stream routing_key at_secs")
    }
}

/// A worker as a policy sees it.
#[pyclass(frozen, module = "sglang_router_rs")]
pub(super) struct WorkerView {
    name: Option<Arc<WorkerName>>,
    #[pyo3(get)]
    in_flight: u32,
    #[pyo3(get)]
    pending_tokens: u32,
    #[pyo3(get)]
    matched_tokens: u32,
    #[pyo3(get)]
    same_prefix: u32,
    #[pyo3(get)]
    speed: Option<f64>,
    #[pyo3(get)]
    weight: f64,
    #[pyo3(get)]
    last_ttft_ms: Option<f64>,
    #[pyo3(get)]
    last_e2e_ms: Option<f64>,
}

#[pymethods]
impl WorkerView {
    #[getter]
    fn url(&self) -> &str {
        self.name.as_ref().map_or("", |name| &name.url)
    }

    #[getter]
    fn node_id(&self) -> &str {
        self.name.as_ref().map_or("", |name| &name.node_id)
    }

    fn __repr__(view: &Bound<'_, Self>) -> PyResult<String> {
        repr(
            view,
            "url node_id in_flight pending_tokens matched_tokens same_prefix speed weight last_ttft_ms last_e2e_ms",
        )
    }
}

/// As Python writes a dataclass of these fields.
fn repr(object: &Bound<'_, impl PyTypeInfo>, fields: &str) -> PyResult<String> {
    let object = object.as_any();
    let written = |field| Ok(format!("{field}={}", object.getattr(field)?.repr()?));
    let fields: Vec<_> = fields.split(' ').map(written).collect::<PyResult<_>>()?;
    Ok(format!("{}({})", object.get_type().name()?, fields.join(", ")))
}

/// The rule that these Python objects are.
pub(super) fn chooser(
    name: &'static str,
    choose: Py<PyAny>,
    finished: Option<Py<PyAny>>,
) -> Arc<dyn Chooser> {
    Arc::new(PythonPolicy {
        name,
        choose,
        finished: finished.map(Arc::new),
        ended: OnceLock::new(),
        slow: Mutex::default(),
        raised: Mutex::default(),
    })
}

struct PythonPolicy {
    name: &'static str,
    choose: Py<PyAny>,
    finished: Option<Arc<Py<PyAny>>>,
    /// From the first request that is over.
    ended: OnceLock<Ended>,
    slow: Mutex<Slow>,
    /// In a replay, how often `finished` raised, and the first traceback.
    raised: Mutex<(u64, Option<String>)>,
}

/// Calls of `choose` that took longer than [`SLOW`].
#[derive(Default)]
struct Slow {
    count: u64,
    longest: Duration,
    said: Said,
}

impl PythonPolicy {
    /// A call of `choose` took so long.
    fn took(&self, took: Duration) {
        if took > SLOW {
            let mut slow = self.slow.lock();
            slow.count += 1;
            slow.longest = slow.longest.max(took);
            self.tell_slow(&mut slow, false);
        }
    }

    /// Says how many calls were slow since that was last said, if it is time.
    fn tell_slow(&self, slow: &mut Slow, is_over: bool) {
        if let Some(new) = slow.said.due(slow.count, is_over) {
            tracing::warn!(
                "policy {}: choose() took over {} ms {new} times since this was last said (at most once a minute), up to \
                 {:.1} s: while it computes, other requests wait for Python's lock",
                self.name,
                SLOW.as_millis(),
                slow.longest.as_secs_f64()
            );
        }
    }

    /// Calls `choose`; the error is a traceback, or says what was wrong with its answer.
    fn ask(
        &self,
        py: Python<'_>,
        request: RequestView,
        workers: &[Seen<'_>],
    ) -> Result<usize, String> {
        let raised = |error: PyErr| traceback(py, &error);
        let views: Vec<_> = workers.iter().map(view).collect();
        let views = PyTuple::new(py, views).map_err(raised)?;
        let answer = self.choose.bind(py).call1((request, views)).map_err(raised)?;
        let is_bool = answer.is_instance_of::<PyBool>();
        let index = answer.extract::<i64>().ok().filter(|_| !is_bool);
        let index = index.and_then(|index| usize::try_from(index).ok());
        index.filter(|index| *index < workers.len()).ok_or_else(|| {
            let answer = answer.repr().map(|text| in_short(&text.to_string_lossy()));
            let answer = answer.unwrap_or_else(|_| "something that has no repr".to_owned());
            let last = workers.len() - 1;
            format!(
                "{}: choose() returned {answer}, which is not the place of a worker: an int from 0 to {last}",
                self.name
            )
        })
    }
}

impl Chooser for PythonPolicy {
    fn choose(
        &self,
        request: &routing::Request<'_>,
        input_tokens: u32,
        workers: &[Seen<'_>],
    ) -> Result<usize, PickError> {
        let request = RequestView {
            request_id: request.request_id.map(str::to_owned),
            tokens: input_tokens,
            prompt_bytes: request.prompt.len(),
            route: request.route.to_owned(),
            model: request.model.map(str::to_owned),
            stream: request.stream,
            routing_key: request.routing_key.map(str::to_owned),
            at_secs: request.at_secs,
        };
        let asked = Python::try_attach(|py| {
            let began = Instant::now();
            let asked = self.ask(py, request, workers);
            self.took(began.elapsed());
            asked
        });
        let chosen = asked.unwrap_or_else(|| Err("the Python interpreter is ending".to_owned()));
        chosen.map_err(|detail| PickError {
            message: format!(
                "the policy {} failed: the trace of this request and the router's log say why",
                self.name
            ),
            detail,
        })
    }

    fn wants_traces(&self) -> bool {
        self.finished.is_some()
    }

    fn finished(&self, trace: String) {
        let Some(finished) = &self.finished else { return };
        let ended = self.ended.get_or_init(|| Ended::start(self.name, finished.clone()));
        ended.hand_over(trace);
    }

    fn close(&self) {
        self.tell_slow(&mut self.slow.lock(), true);
        if let Some(ended) = self.ended.get() {
            ended.close(self.name);
        }
    }

    fn replayed(&self, replayed: &Replayed<'_>) {
        let Some(finished) = &self.finished else { return };
        let trace = json_text(&trace_of(replayed, self.name));
        // An interpreter that ends hears nothing.
        Python::try_attach(|py| {
            if let Err(error) = hear(py, finished, &trace) {
                // Python may let another thread run meanwhile, so not under the lock.
                let is_first = self.raised.lock().0 == 0;
                let first = is_first.then(|| traceback(py, &error));
                let mut raised = self.raised.lock();
                raised.0 += 1;
                raised.1 = raised.1.take().or(first);
            }
        });
    }

    fn remarks(&self) -> Vec<String> {
        let mut remarks = Vec::new();
        if let (count, Some(first)) = &*self.raised.lock() {
            remarks.push(format!("finished() raised {count} times; the first time:\n{first}"));
        }
        let slow = self.slow.lock();
        if slow.count > 0 {
            remarks.push(format!(
                "choose() took over {} ms {} times, up to {:.1} s: while it computes, other requests of a router wait \
                 for Python's lock",
                SLOW.as_millis(),
                slow.count,
                slow.longest.as_secs_f64()
            ));
        }
        remarks
    }
}

/// What a policy wrote, on one line and cut: it may be long.
fn in_short(text: &str) -> String {
    let plain = |c: char| if c.is_control() { ' ' } else { c };
    let short: String = text.chars().take(ANSWER_MAX).map(plain).collect();
    let more = if text.chars().nth(ANSWER_MAX).is_some() { "..." } else { "" };
    short + more
}

fn view(seen: &Seen<'_>) -> WorkerView {
    WorkerView {
        name: seen.target.name().cloned(),
        in_flight: seen.target.in_flight(),
        pending_tokens: seen.view.pending_tokens,
        matched_tokens: seen.view.matched_tokens,
        same_prefix: seen.view.same_prefix,
        speed: seen.view.speed,
        weight: seen.target.weight,
        last_ttft_ms: seen.last.ttft_ms,
        last_e2e_ms: seen.last.e2e_ms,
    }
}

/// Calls `finished` with a trace, given as JSON.
fn hear(py: Python<'_>, finished: &Py<PyAny>, trace: &str) -> PyResult<()> {
    let record = py.import("json")?.call_method1("loads", (trace,))?;
    finished.bind(py).call1((record,)).map(drop)
}

/// The traceback as Python prints it, or its end.
fn traceback(py: Python<'_>, error: &PyErr) -> String {
    let lines = py.import("traceback").and_then(|traceback| {
        let raised = (error.get_type(py), error.value(py), error.traceback(py));
        let lines = traceback.call_method1("format_exception", raised)?;
        lines.extract::<Vec<String>>()
    });
    let mut text = lines.map_or_else(|_| error.to_string(), |lines| lines.concat());
    text.truncate(text.trim_end().len());
    let mut start = text.len().saturating_sub(TRACEBACK_MAX);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    text.split_off(start)
}

/// Of requests that are over.
#[derive(Default)]
struct Counts {
    all: AtomicU64,
    /// For want of room.
    lost: AtomicU64,
    /// `finished` has returned, or raised.
    heard: AtomicU64,
}

/// Requests that are over, on their way to `finished`.
struct Ended {
    /// None once it is closed.
    waiting: Mutex<Option<SyncSender<String>>>,
    counts: Arc<Counts>,
    /// Disconnected when the thread has ended.
    is_over: Mutex<Receiver<()>>,
}

impl Ended {
    fn start(name: &'static str, finished: Arc<Py<PyAny>>) -> Self {
        let (waiting, traces) = sync_channel(MAX_WAITING);
        let (over, is_over) = sync_channel(0);
        let counts = Arc::<Counts>::default();
        let hearer = Hearer {
            name,
            finished,
            counts: counts.clone(),
            lost_said: Said::default(),
            raised: 0,
            raised_said: Said::default(),
            last_raised: None,
        };
        // The thread is not the runtime's, so it has to be told where the router's log lines go.
        let lines = dispatcher::get_default(Clone::clone);
        let hear_all = move || {
            let _over: SyncSender<()> = over;
            dispatcher::with_default(&lines, || hearer.hear_all(&traces));
        };
        let thread = std::thread::Builder::new().name("own-policy".to_owned()).spawn(hear_all);
        if let Err(error) = thread {
            tracing::error!("policy {name}: finished() hears nothing: {error}");
        }
        Self { waiting: Mutex::new(Some(waiting)), counts, is_over: Mutex::new(is_over) }
    }

    /// Never waits.
    fn hand_over(&self, trace: String) {
        self.counts.all.fetch_add(1, Ordering::Relaxed);
        let waiting = self.waiting.lock();
        if waiting.as_ref().is_none_or(|waiting| waiting.try_send(trace).is_err()) {
            self.counts.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn close(&self, name: &str) {
        self.waiting.lock().take();
        let is_over = self.is_over.lock().recv_timeout(LAST_WORDS);
        if is_over == Err(RecvTimeoutError::Timeout) {
            let Counts { all, heard, .. } = &*self.counts;
            tracing::warn!(
                "policy {name}: finished() takes long and has heard of {} of {} requests; of the others it hears only \
                 what the program leaves it time for",
                heard.load(Ordering::Relaxed),
                all.load(Ordering::Relaxed)
            );
        }
    }
}

/// The thread's part.
struct Hearer {
    name: &'static str,
    finished: Arc<Py<PyAny>>,
    counts: Arc<Counts>,
    lost_said: Said,
    /// How often `finished` raised.
    raised: u64,
    raised_said: Said,
    /// The last that it raised, until that is said.
    last_raised: Option<PyErr>,
}

/// How much of what may happen with every request was said.
#[derive(Default)]
struct Said {
    at: Option<Instant>,
    count: u64,
}

impl Said {
    /// How many of so many are to be said now, if any are: at most once in [`WARN_EVERY`], and at the end.
    fn due(&mut self, count: u64, is_over: bool) -> Option<u64> {
        let is_due = is_over || self.at.is_none_or(|at| at.elapsed() >= WARN_EVERY);
        let new = count - self.count;
        (is_due && new > 0).then(|| {
            *self = Self { at: Some(Instant::now()), count };
            new
        })
    }
}

impl Hearer {
    fn hear_all(mut self, traces: &Receiver<String>) {
        while let Ok(trace) = traces.recv() {
            match Python::try_attach(|py| hear(py, &self.finished, &trace)) {
                Some(Ok(())) => {}
                Some(Err(error)) => {
                    self.raised += 1;
                    self.last_raised = Some(error);
                }
                // The interpreter is ending.
                None => return,
            }
            self.counts.heard.fetch_add(1, Ordering::Relaxed);
            self.tell(false);
        }
        self.tell(true);
    }

    /// Says what was lost and what was raised since that was last said, if it is time.
    fn tell(&mut self, is_over: bool) {
        let name = self.name;
        if let Some(new) = self.lost_said.due(self.counts.lost.load(Ordering::Relaxed), is_over) {
            tracing::warn!(
                "policy {name}: {new} traces were lost, as finished() is slower than they come (said at most once a \
                 minute)"
            );
        }
        if let Some(new) = self.raised_said.due(self.raised, is_over) {
            let error = self.last_raised.take();
            let why = error.and_then(|error| Python::try_attach(|py| traceback(py, &error)));
            tracing::warn!(
                "policy {name}: finished() raised {new} times since this was last said (at most once a minute), the last \
                 time:\n{}",
                why.unwrap_or_default()
            );
        }
    }
}

/// A request of a replay as if a router had traced it.
fn trace_of(replayed: &Replayed<'_>, policy: &str) -> Trace {
    let Replayed { arrived_at_secs, ended_at_secs, told, error, worker, .. } = *replayed;
    let at = |secs: f64| Timestamp::from_unix_us((secs * 1e6) as i64);
    let ms = |secs: f64| (secs - arrived_at_secs) * 1e3;
    Trace {
        request_id: replayed.number.to_string(),
        worker_url: worker.map(|name| name.url.to_string()),
        node_id: worker.map(|name| name.node_id.to_string()),
        timestamp: at(arrived_at_secs),
        routing_policy: policy.to_owned(),
        status: if error.is_none() { Status::Completed } else { Status::Failed },
        route: "/generate".to_owned(),
        cache_hit: told.cached_tokens.map(|tokens| tokens > 0),
        input_tokens: replayed.input_tokens,
        completion_time: Some(at(ended_at_secs)),
        error_message: error.map(str::to_owned),
        model: None,
        stream: Some(true),
        http_status: error.is_none().then_some(200),
        finish_reason: None,
        reason: replayed.reason.map(str::to_owned),
        matched_tokens: replayed.matched_tokens,
        prompt_tokens: told.prompt_tokens,
        cached_tokens: told.cached_tokens,
        completion_tokens: told.completion_tokens,
        queue_ms: None,
        decision_us: None,
        first_byte_ms: None,
        ttft_ms: replayed.first_at_secs.map(ms),
        latency_ms: Some(ms(ended_at_secs)),
        worker_request_id: None,
        trace_id: None,
        attempts: Vec::new(),
        prompt_blocks: None,
        candidates: None,
        same_id: None,
    }
}
