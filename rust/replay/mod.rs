//! A trace through policies and simulated workers, in virtual time: an hour of traffic in seconds, the
//! same to the byte every time.
//!
//! The one idea: what stands in the router is tried here, not a copy of it. The policies are
//! [`routing`]'s, the workers are [`sim`](crate::sim)'s engines; between them stands only what the
//! router does with the two. Read in this order: [`trace`], [`text`], [`cluster`], [`report`],
//! [`synthetic`], [`options`].
//!
//! Not here: HTTP, and a clock.

pub mod cluster;
pub mod options;
pub mod report;
pub mod synthetic;
pub mod text;
pub mod trace;

use std::fs::{self, File};
use std::io::{self, IsTerminal, Write};
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use anyhow::{anyhow, bail};

use crate::routing::own::Load;
use crate::routing::{self, Choice, Policy, PolicyKind};
use cluster::Setup;
pub use options::Options;
use report::{About, Notes, Report, Run, Summary};
use trace::Trace;

/// Requests of a trace that is made, unless someone says how many.
const SYNTHETIC_REQUESTS: usize = 3000;

/// The reason of policies that go by the routing key, for requests that have none.
const NO_KEY: &str = "no_key";

/// How often progress is shown.
const PROGRESS: Duration = Duration::from_millis(500);

/// Replays what the options ask for and prints the results.
///
/// # Errors
/// A trace that cannot be used, options that do not go together, files that cannot be written, a policy that `load` cannot
/// load; after the results were printed, that no request succeeded.
pub fn run(options: &Options, load: Load<'_>) -> anyhow::Result<()> {
    let flags = &options.flags;
    if flags.plot.is_some() {
        bail!("--plot: plots are made by the Python package: python -m sglang_router_rs replay");
    }
    options.check_policies().map_err(anyhow::Error::msg)?;
    check_files(options)?;
    let setup = options.setup().map_err(anyhow::Error::msg)?;
    let built = |policy| routing::build(&options.routing(policy), load);
    let policies: Result<Vec<_>, _> = options.policies.iter().copied().map(built).collect();
    let policies = policies?;
    let (name, trace) = trace(options)?;
    let trace = trace.faster(flags.rate_scale);
    for warning in warnings(options, &setup, &trace) {
        warn(&warning);
    }
    // Before the replay, so that it is not in vain.
    let csv = match &flags.csv {
        Some(path) => Some((path, written("--csv", path, File::create(path))?)),
        None => None,
    };
    let runs = replay_all(&trace, &setup, options, &policies);
    complain(&runs, &policies);
    if let Some((path, file)) = csv {
        written("--csv", path, report::write_csv(file, &trace, &runs))?;
    }
    let policies = runs.iter().map(|run| Summary::new(run, &trace, &setup)).collect();
    let trace = About::new(name, &trace, &setup);
    let report = Report { trace, settings: options.settings.clone(), policies };
    if let Some(path) = &flags.notes {
        let (header, workers) = (report.header(), setup.engines.len());
        let notes = Notes { header, workers, losses: &setup.losses };
        written("--notes", path, fs::write(path, serde_json::to_vec(&notes)?))?;
    }
    print(&if flags.json { report.json() } else { report.table() })?;
    if runs.iter().all(|run| run.errors().count() == run.outcomes.len()) {
        let first = runs.iter().flat_map(Run::errors).next().unwrap_or_default();
        // Of a traceback the last line says what it was.
        bail!("no request succeeded; the first one: {}", first.lines().last().unwrap_or_default());
    }
    Ok(())
}

/// Checks that no file is named twice: what is written would replace what was read, or written before.
fn check_files(options: &Options) -> anyhow::Result<()> {
    let flags = &options.flags;
    let files = [("TRACE", &flags.trace), ("--write", &flags.write), ("--csv", &flags.csv)];
    let named = files.iter().filter_map(|(option, path)| Some((option, path.as_ref()?)));
    let mut seen: Vec<(&str, PathBuf)> = Vec::new();
    for (option, path) in named {
        let real = fs::canonicalize(path).unwrap_or_else(|_| path.clone());
        if let Some((other, _)) = seen.iter().find(|(_, earlier)| *earlier == real) {
            bail!("{option}: {} is also named by {other}", path.display());
        }
        seen.push((option, real));
    }
    Ok(())
}

/// What came of writing the file that an option names.
fn written<T>(option: &str, path: &Path, outcome: io::Result<T>) -> anyhow::Result<T> {
    outcome.map_err(|error| anyhow!("{option}: cannot write {}: {error}", path.display()))
}

/// What would go unnoticed: options that do not do what they seem to, on this trace.
fn warnings(options: &Options, setup: &Setup, trace: &Trace) -> Vec<String> {
    let mut warnings = Vec::new();
    let rules = options.policies.iter().filter_map(|policy| match policy {
        Choice::Rule(kind) => Some(*kind),
        Choice::Own(_) => None,
    });
    let by_key: Vec<_> = rules.clone().filter(|kind| kind.reasons().contains(&NO_KEY)).collect();
    let keyless = trace.requests.iter().filter(|asked| asked.routing_key.is_none()).count();
    if keyless > 0 && !by_key.is_empty() {
        let names: Vec<_> = by_key.iter().map(|kind| kind.name()).collect();
        warnings.push(format!(
            "{keyless} of {} requests have no routing_key in the trace; {} cannot keep their sessions together",
            trace.requests.len(),
            names.join(" and "),
        ));
    }
    let is_even = setup.weights.iter().all(|weight| *weight == setup.weights[0]);
    if is_even && rules.clone().any(|kind| kind == PolicyKind::FixedProbability) {
        warnings.push(
            "fixed_probability draws all workers alike, unless --worker-weights says otherwise"
                .to_owned(),
        );
    }
    let last_secs = trace.requests.last().map_or(0.0, |asked| asked.at_secs);
    for loss in setup.losses.iter().filter(|loss| loss.at_secs > last_secs) {
        warnings.push(format!(
            "--lose: the last request comes at {last_secs:.1} s, before worker {} is lost at {} s",
            loss.worker, loss.at_secs,
        ));
    }
    warnings
}

/// The trace that is asked for, and its name.
fn trace(options: &Options) -> anyhow::Result<(String, Trace)> {
    let flags = &options.flags;
    let wanted = flags.num_requests.map(|requests| requests as usize);
    if let Some(path) = &flags.trace {
        let name = path.file_name().unwrap_or(path.as_os_str());
        return Ok((name.to_string_lossy().into_owned(), Trace::read(path, wanted)?));
    }
    let Some(kind) = flags.synthetic else { bail!("replay needs a trace, or --synthetic") };
    let seed = flags.routing.seed.unwrap_or_default();
    let trace = kind.make(wanted.unwrap_or(SYNTHETIC_REQUESTS), seed);
    if let Some(path) = &flags.write {
        written("--write", path, trace.write(path))?;
    }
    Ok((format!("{} (seed {seed})", kind.name()), trace))
}

/// Each policy's run, several at a time, in the order of the policies.
fn replay_all(
    trace: &Trace,
    setup: &Setup,
    options: &Options,
    policies: &[Arc<dyn Policy>],
) -> Vec<Run> {
    let (next, ended) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let (sender, receiver) = mpsc::channel();
    let threads = thread::available_parallelism().map_or(1, NonZero::get).min(policies.len());
    let mut runs: Vec<_> = thread::scope(|scope| {
        for _ in 0..threads {
            let sender = sender.clone();
            let (next, ended) = (&next, &ended);
            scope.spawn(move || {
                while let Some((place, policy)) = pop(next, policies) {
                    let outcomes = cluster::replay(trace, setup, &**policy, ended);
                    let policy = options.policies[place].to_string();
                    // The receiver waits for all.
                    let _ = sender.send((place, Run { policy, outcomes }));
                }
            });
        }
        drop(sender);
        collect(&receiver, &ended, policies.len() * trace.requests.len())
    });
    runs.sort_by_key(|(place, _)| *place);
    runs.into_iter().map(|(_, run)| run).collect()
}

/// The next thing to do, and its place.
fn pop<'a, T>(next: &AtomicUsize, things: &'a [T]) -> Option<(usize, &'a T)> {
    let place = next.fetch_add(1, Relaxed);
    things.get(place).map(|thing| (place, thing))
}

/// What comes, until there is no more; a terminal sees how far it is.
fn collect<T>(receiver: &mpsc::Receiver<T>, ended: &AtomicUsize, all: usize) -> Vec<T> {
    let mut terminal = io::stderr();
    let is_shown = terminal.is_terminal();
    let mut collected = Vec::new();
    loop {
        match receiver.recv_timeout(PROGRESS) {
            Ok(one) => collected.push(one),
            Err(RecvTimeoutError::Timeout) if is_shown => {
                let percent = 100 * ended.load(Relaxed) / all;
                // A terminal that is gone sees nothing.
                let _ =
                    write!(terminal, "\r\x1b[Kreplay: {percent} %").and_then(|()| terminal.flush());
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    if is_shown {
        let _ = write!(terminal, "\r\x1b[K");
    }
    collected
}

/// Shows the first error of each policy from outside, and what else is to be said of it.
fn complain(runs: &[Run], policies: &[Arc<dyn Policy>]) {
    for (run, policy) in runs.iter().zip(policies) {
        let failed = || run.outcomes.iter().filter(|outcome| outcome.is_policys);
        if let Some(error) = failed().next().and_then(|outcome| outcome.error.as_deref()) {
            let count = failed().count();
            warn(&format!("{} failed on {count} requests; the first time:\n{error}", run.policy));
        }
        for remark in policy.remarks() {
            warn(&format!("{}: {remark}", run.policy));
        }
    }
}

fn warn(text: &str) {
    // A terminal that is gone sees nothing.
    let _ = writeln!(io::stderr(), "warning: {text}");
}

/// Prints; who reads no further has seen enough.
fn print(text: &str) -> io::Result<()> {
    match io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        outcome => outcome,
    }
}

#[cfg(test)]
mod lead;
#[cfg(test)]
mod tests;
