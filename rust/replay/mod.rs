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

use std::io::{self, IsTerminal, Write};
use std::num::NonZero;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use anyhow::{anyhow, bail};

use crate::routing::own::Load;
use crate::routing::{self, Policy};
use cluster::Setup;
pub use options::Options;
use report::{About, Report, Run, Summary};
use trace::Trace;

/// Requests of a trace that is made, unless someone says how many.
const SYNTHETIC_REQUESTS: usize = 3000;

/// How often progress is shown.
const PROGRESS: Duration = Duration::from_millis(500);

/// Replays what the options ask for and prints the results.
///
/// # Errors
/// A trace that cannot be used, options that do not go together, files that cannot be written, a policy that `load` cannot
/// load.
pub fn run(options: &Options, load: Load<'_>) -> anyhow::Result<()> {
    let flags = &options.flags;
    if flags.plot.is_some() {
        bail!("--plot: plots are made by the Python package: python -m sglang_router_rs replay");
    }
    options.check_policies().map_err(anyhow::Error::msg)?;
    let setup = options.setup().map_err(anyhow::Error::msg)?;
    let built = |policy| routing::build(&options.routing(policy), load);
    let policies: Result<Vec<_>, _> = options.policies.iter().copied().map(built).collect();
    let policies = policies?;
    let (name, trace) = trace(options)?;
    let trace = trace.faster(flags.rate_scale);
    let runs = replay_all(&trace, &setup, options, &policies);
    complain(&runs, &policies);
    if let Some(path) = &flags.csv {
        report::write_csv(path, &trace, &runs)
            .map_err(|error| anyhow!("--csv: cannot write {}: {error}", path.display()))?;
    }
    let policies = runs.iter().map(|run| Summary::new(run, &trace, &setup)).collect();
    let report = Report { trace: About::new(name, &trace, &setup), policies };
    print(&if flags.json { report.json() } else { report.table() })?;
    Ok(())
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
        let written = trace.write(path);
        written.map_err(|error| anyhow!("--write: cannot write {}: {error}", path.display()))?;
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
            // A terminal that is gone sees nothing.
            let _ = writeln!(
                io::stderr(),
                "warning: {} failed on {count} requests; the first time:\n{error}",
                run.policy
            );
        }
        for remark in policy.remarks() {
            // As above.
            let _ = writeln!(io::stderr(), "warning: {}: {remark}", run.policy);
        }
    }
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
