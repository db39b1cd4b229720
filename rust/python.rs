//! All that Python sees: the module `sglang_router_rs._core`.
//!
//! Thin on purpose. Options come as names and texts and go through the one parser; traces go out as JSON text;
//! everything that waits or serves runs without the GIL. Signals and Python's manners are `router.py`'s.

// The names below are Python's, exported by PyO3's macros.
#![allow(unreachable_pub)]

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use pyo3::exceptions::{PyOSError, PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use serde::Serialize;

use crate::cli;
use crate::error::Kind;
use crate::options::{self, OptionError, Options, Setting, Shape, Source};
use crate::routing::own::{Chooser, LoadError};
use crate::routing::{self, Choice, Policy, PolicyKind};
use crate::running::{self, Running};
use crate::server::routes;
use crate::telemetry::metrics;
use crate::tracking;
use crate::tracking::{LogError, Page, Query, Trace, Tracker};

mod policy;

/// A year: longer waits are mistakes.
const LONGEST: Duration = Duration::from_secs(365 * 86_400);

/// A router with its options, not yet serving.
#[pyclass(frozen)]
struct Server {
    running: Arc<Running>,
    /// The process its threads live in.
    process: u32,
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.process != std::process::id() {
            // A fork copies locks as they were and no threads: an end in the child could wait for ever.
            std::mem::forget(self.running.clone());
        } else {
            // What ends may wait for Python, which must not wait for it.
            Python::try_attach(|py| py.detach(|| self.running.end()));
        }
    }
}

#[pymethods]
impl Server {
    /// Checks options given as (name, texts); what they come to. Raises TypeError for an unknown name, ValueError
    /// for a bad value or a policy of one's own that wants more than there is.
    #[staticmethod]
    #[pyo3(signature = (keywords, own=None))]
    fn check(keywords: Vec<(String, Vec<String>)>, own: Option<Own>) -> PyResult<String> {
        let (options, policy) = with_own(keywords, own)?;
        if let Some(policy) = policy {
            running::check(&options, &*policy).map_err(|error| value_error(&error))?;
        }
        Ok(format!("{options:?}"))
    }

    /// FILE.py:NAME, if the options name a policy in a file.
    #[staticmethod]
    fn policy_file(keywords: Vec<(String, Vec<String>)>) -> PyResult<Option<&'static str>> {
        parse(keywords).map(|options| match options.routing.policy {
            Choice::Own(own) => Some(own.text),
            Choice::Rule(_) => None,
        })
    }

    /// Binds the port and serves on threads of its own. Raises OSError when the port is taken or a log cannot be
    /// written. `own` is a policy of one's own, instead of the one that the options name.
    #[new]
    #[pyo3(signature = (keywords, own=None))]
    fn start(
        py: Python<'_>,
        keywords: Vec<(String, Vec<String>)>,
        own: Option<Own>,
    ) -> PyResult<Self> {
        let (options, policy) = with_own(keywords, own)?;
        let policy = match policy {
            Some(policy) => policy,
            None => routing::build(&options.routing, &load).map_err(|error| value_error(&error))?,
        };
        running::check(&options, &*policy).map_err(|error| value_error(&error))?;
        let running =
            py.detach(|| Running::start(options, policy)).map_err(|error| os_error(py, &error))?;
        Ok(Self { running: Arc::new(running), process: std::process::id() })
    }

    /// (host, port) it listens on.
    #[getter]
    fn address(&self) -> (String, u16) {
        let address = self.running.address();
        (address.ip().to_string(), address.port())
    }

    #[getter]
    fn is_ready(&self) -> bool {
        self.running.is_ready()
    }

    /// Takes nothing new; what is in flight has `grace_secs` (None: as configured). Returns at once.
    #[pyo3(signature = (grace_secs=None))]
    fn drain(&self, grace_secs: Option<f64>) -> PyResult<()> {
        let grace = grace_secs.map(seconds).transpose()?;
        self.running.drain(grace);
        Ok(())
    }

    /// Cuts everything. Returns at once.
    fn stop(&self) {
        self.running.stop();
    }

    /// Waits for the end, at most this long; whether it has come.
    fn wait(&self, py: Python<'_>, timeout_secs: f64) -> PyResult<bool> {
        let timeout = seconds(timeout_secs)?;
        Ok(py.detach(|| self.running.wait(timeout)))
    }

    #[getter]
    fn has_tracker(&self) -> bool {
        self.running.tracker().is_some()
    }

    /// JSON of one trace, or None.
    fn trace(&self, py: Python<'_>, request_id: &str) -> PyResult<Option<String>> {
        let tracker = self.tracker()?;
        Ok(trace_text(py, || tracker.get(request_id)))
    }

    /// JSON of the traces that match (name, text) pairs, as GET /v1/traces takes them, and the next cursor.
    fn traces(
        &self,
        py: Python<'_>,
        filters: Vec<(String, String)>,
    ) -> PyResult<(String, Option<String>)> {
        let tracker = self.tracker()?;
        page_text(py, filters, |query| tracker.list(query))
    }

    /// JSON of the statistics.
    fn trace_stats(&self, py: Python<'_>) -> PyResult<String> {
        let tracker = self.tracker()?;
        Ok(py.detach(|| json_text(&tracker.stats())))
    }
}

impl Server {
    fn tracker(&self) -> PyResult<&Tracker> {
        let tracker = self.running.tracker().map(AsRef::as_ref);
        tracker.ok_or_else(|| PyRuntimeError::new_err("request tracking is off"))
    }
}

/// The traces of a trace log and its older files, read whole.
#[pyclass(frozen)]
struct TraceLog {
    log: tracking::TraceLog,
}

#[pymethods]
impl TraceLog {
    /// Raises OSError for a file that cannot be read, ValueError for a malformed line; both name it.
    #[new]
    fn read(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        let log = py.detach(|| tracking::TraceLog::read(&path)).map_err(|error| match &error {
            LogError::Unreadable { error: cause, .. } => {
                os_error(py, &io::Error::new(cause.kind(), error.to_string()))
            }
            LogError::Malformed { .. } => PyValueError::new_err(error.to_string()),
        })?;
        Ok(Self { log })
    }

    /// Lines left out because they break off.
    #[getter]
    fn torn_lines(&self) -> u64 {
        self.log.torn_lines()
    }

    /// As Server.trace.
    fn trace(&self, py: Python<'_>, request_id: &str) -> Option<String> {
        trace_text(py, || self.log.get(request_id))
    }

    /// As Server.traces.
    fn traces(
        &self,
        py: Python<'_>,
        filters: Vec<(String, String)>,
    ) -> PyResult<(String, Option<String>)> {
        page_text(py, filters, |query| self.log.list(query))
    }

    /// All that match as a load to send again, in the format of Mooncake's traces, and how many gave no line.
    fn mooncake(
        &self,
        py: Python<'_>,
        filters: Vec<(String, String)>,
    ) -> PyResult<(String, usize)> {
        let query = parse_query(filters)?;
        Ok(py.detach(|| {
            let lines = self.log.mooncake(&query);
            let left_out = lines.left_out();
            (String::from_utf8_lossy(&lines.flatten().collect::<Vec<_>>()).into_owned(), left_out)
        }))
    }

    /// As Server.trace_stats, of what the log holds.
    fn trace_stats(&self, py: Python<'_>) -> String {
        py.detach(|| json_text(&self.log.stats()))
    }
}

fn trace_text(py: Python<'_>, get: impl FnOnce() -> Option<Trace> + Send) -> Option<String> {
    py.detach(|| get().map(|trace| json_text(&trace)))
}

fn parse_query(filters: Vec<(String, String)>) -> PyResult<Query> {
    Query::parse(filters).map_err(|error| PyValueError::new_err(error.to_string()))
}

fn page_text(
    py: Python<'_>,
    filters: Vec<(String, String)>,
    list: impl FnOnce(&Query) -> Page + Send,
) -> PyResult<(String, Option<String>)> {
    let query = parse_query(filters)?;
    Ok(py.detach(|| {
        let page = list(&query);
        (json_text(&page.traces), page.next_cursor.map(|cursor| cursor.to_string()))
    }))
}

/// Runs a command line (without the program's name) until it ends; its exit status. `defaults` replace those of
/// `launch`.
#[pyfunction]
#[pyo3(signature = (arguments, defaults=BTreeMap::new()))]
fn run(py: Python<'_>, arguments: Vec<String>, defaults: BTreeMap<String, String>) -> i32 {
    let argv: Vec<String> =
        std::iter::once("sglang-router-rs".to_owned()).chain(arguments).collect();
    let defaults: Vec<Setting> =
        defaults.into_iter().map(|(name, value)| Setting { name, values: vec![value] }).collect();
    py.detach(|| i32::from(cli::run(&argv, &defaults, &load)))
}

/// What the flags of `launch` and an environment come to, to compare with `Server.check`. Raises ValueError for
/// what the command line refuses.
#[pyfunction]
fn check_flags(flags: Vec<String>, environment: BTreeMap<String, String>) -> PyResult<String> {
    let argv = std::iter::once("launch".to_owned()).chain(flags.clone());
    let refused = |error: &dyn std::fmt::Display| PyValueError::new_err(error.to_string());
    let matches = options::command().try_get_matches_from(argv).map_err(|error| refused(&error))?;
    let environment = environment.into_iter().map(|(name, text)| (name.into(), text.into()));
    Options::from_command_line(&matches, &flags, environment, &[])
        .map(|options| format!("{options:?}"))
        .map_err(|error| refused(&error))
}

/// Every option: name, shape, default (text or None), choices, help, aliases.
#[pyfunction(name = "options")]
fn all_options(py: Python<'_>) -> PyResult<Vec<Bound<'_, PyDict>>> {
    let row = |option: options::Described| {
        let row = PyDict::new(py);
        row.set_item("name", option.name)?;
        row.set_item("shape", shape_name(option.shape))?;
        row.set_item("default", option.default)?;
        row.set_item("choices", option.choices)?;
        row.set_item("help", option.help)?;
        row.set_item("aliases", option.aliases)?;
        Ok(row)
    };
    options::described().into_iter().map(row).collect()
}

/// Every policy: member of `PolicyType`, name, rule, reasons, score.
#[pyfunction(name = "policies")]
fn all_policies(py: Python<'_>) -> PyResult<Vec<Bound<'_, PyDict>>> {
    let row = |policy: &PolicyKind| {
        let row = PyDict::new(py);
        row.set_item("member", format!("{policy:?}"))?;
        row.set_item("name", policy.name())?;
        row.set_item("rule", policy.rule())?;
        row.set_item("reasons", policy.reasons().to_vec())?;
        row.set_item("score", policy.score())?;
        Ok(row)
    };
    PolicyKind::ALL.iter().map(row).collect()
}

/// What traces, metrics and the log call the policy that the option names so. Raises ValueError for a bad value.
#[pyfunction]
fn policy_name(policy: String) -> PyResult<&'static str> {
    let options = parse(vec![("policy".to_owned(), vec![policy])])?;
    Ok(options.routing.policy.name())
}

/// Every error of the router's own: code, status, origin, meaning.
#[pyfunction(name = "errors")]
fn all_errors() -> Vec<(&'static str, u16, &'static str, &'static str)> {
    let row = |kind: &Kind| (kind.code(), kind.status(), kind.origin().name(), kind.meaning());
    Kind::ALL.iter().map(row).collect()
}

/// Method, path, the option with the key it asks for, and meaning.
type Route = (&'static str, &'static str, Option<&'static str>, &'static str);

/// Every route.
#[pyfunction(name = "routes")]
fn all_routes() -> Vec<Route> {
    let row = |(method, path, purpose): &'static (hyper::Method, &'static str, routes::Purpose)| {
        (method.as_str(), *path, purpose.door().option(), purpose.meaning())
    };
    routes::ROUTES.iter().map(row).collect()
}

/// Every metric: name, kind, labels and meaning.
#[pyfunction(name = "metrics")]
fn all_metrics() -> Vec<(String, &'static str, Vec<&'static str>, &'static str)> {
    let row = |metric: &metrics::Described| {
        (metric.name(), metric.kind, metric.labels.to_vec(), metric.meaning)
    };
    metrics::described().map(row).collect()
}

#[pymodule]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<Server>()?;
    module.add_class::<TraceLog>()?;
    module.add_class::<policy::RequestView>()?;
    module.add_class::<policy::WorkerView>()?;
    module.add_function(wrap_pyfunction!(run, module)?)?;
    module.add_function(wrap_pyfunction!(check_flags, module)?)?;
    module.add_function(wrap_pyfunction!(all_options, module)?)?;
    module.add_function(wrap_pyfunction!(all_policies, module)?)?;
    module.add_function(wrap_pyfunction!(policy_name, module)?)?;
    module.add_function(wrap_pyfunction!(all_errors, module)?)?;
    module.add_function(wrap_pyfunction!(all_routes, module)?)?;
    module.add_function(wrap_pyfunction!(all_metrics, module)?)
}

/// A policy of one's own: `choose`, `finished` or None, and its name or `FILE.py:NAME`.
type Own = (Py<PyAny>, Option<Py<PyAny>>, String);

/// The options, and the policy of one's own if there is one, which is then what the options name.
fn with_own(
    keywords: Vec<(String, Vec<String>)>,
    own: Option<Own>,
) -> PyResult<(Options, Option<Arc<dyn Policy>>)> {
    let mut options = parse(keywords)?;
    let Some((choose, finished, name)) = own else { return Ok((options, None)) };
    let choice = Choice::own(&name).map_err(|why| value_error(&LoadError(why)))?;
    options.routing.policy = choice;
    let chooser = policy::chooser(choice.name(), choose, finished);
    let policy = routing::build(&options.routing, &move |_: &str| Ok(chooser.clone()));
    Ok((options, Some(policy.map_err(|error| value_error(&error))?)))
}

/// The policy of one's own that `FILE.py:NAME` names.
fn load(text: &str) -> Result<Arc<dyn Chooser>, LoadError> {
    Python::attach(|py| {
        let loaded = py.import("sglang_router_rs.own_policy")?.call_method1("load", (text,))?;
        let (choose, finished, name): Own = loaded.extract()?;
        let choice = Choice::own(&name).map_err(PyValueError::new_err)?;
        Ok(policy::chooser(choice.name(), choose, finished))
    })
    .map_err(|error: PyErr| LoadError(Python::attach(|py| error.value(py).to_string())))
}

fn value_error(error: &LoadError) -> PyErr {
    PyValueError::new_err(error.to_string())
}

fn parse(keywords: Vec<(String, Vec<String>)>) -> PyResult<Options> {
    let settings: Vec<Setting> =
        keywords.into_iter().map(|(name, values)| Setting { name, values }).collect();
    Options::from_keywords(&settings).map_err(|error| match &error {
        OptionError::Unknown { origin: Source::Keyword, .. } => {
            PyTypeError::new_err(error.to_string())
        }
        _ => PyValueError::new_err(error.to_string()),
    })
}

fn shape_name(shape: Shape) -> &'static str {
    match shape {
        Shape::Boolean => "bool",
        Shape::Integer => "int",
        Shape::Number => "float",
        Shape::Text => "str",
        Shape::List => "list",
        Shape::Map => "map",
    }
}

fn json_text(value: &impl Serialize) -> String {
    // A trace always serialises.
    serde_json::to_string(value).unwrap_or_default()
}

fn seconds(value: f64) -> PyResult<Duration> {
    Duration::try_from_secs_f64(value).ok().filter(|value| *value <= LONGEST).ok_or_else(|| {
        PyValueError::new_err(format!(
            "{value} is not a number of seconds from 0 to {}",
            LONGEST.as_secs()
        ))
    })
}

/// With the number that Python's `errno` knows the kind by, for those who look at it.
fn os_error(py: Python<'_>, error: &io::Error) -> PyErr {
    let name = match error.kind() {
        io::ErrorKind::AddrInUse => "EADDRINUSE",
        io::ErrorKind::AddrNotAvailable => "EADDRNOTAVAIL",
        io::ErrorKind::PermissionDenied => "EACCES",
        io::ErrorKind::NotFound => "ENOENT",
        io::ErrorKind::AlreadyExists => "EEXIST",
        io::ErrorKind::IsADirectory => "EISDIR",
        io::ErrorKind::NotADirectory => "ENOTDIR",
        _ => return PyOSError::new_err(error.to_string()),
    };
    let number = py.import("errno").and_then(|errno| errno.getattr(name)?.extract::<i32>());
    match number {
        Ok(number) => PyOSError::new_err((number, error.to_string())),
        Err(failure) => failure,
    }
}
