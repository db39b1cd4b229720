//! The command line: `sglang-router-rs` with `launch`, `sim` or `replay`, the same from Python and without it.

use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use clap::{CommandFactory, FromArgMatches, Parser};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::options::{Options, Setting};
use crate::replay;
use crate::routing;
use crate::routing::own::{Load, LoadError};
use crate::running::{self, Running};
use crate::sim;

/// The commands that are the Python package's own, as `--help` lists those that are here.
#[cfg(feature = "python")]
fn python_commands() -> String {
    let styles = clap::builder::Styles::default();
    let (header, name) = (styles.get_header(), styles.get_literal());
    format!(
        "{header}Commands of the Python package:{header:#}\n  \
         {name}bench{name:#}    Send a load through a router, one CSV row per request\n  \
         {name}compare{name:#}  Send the same load against several policies, with a report"
    )
}

/// A router in front of SGLang servers that tells which worker served which request, why, and how long it took
#[derive(Parser)]
#[command(name = "sglang-router-rs", version, args_override_self = true)]
#[cfg_attr(feature = "python", command(after_help = python_commands()))]
enum Cli {
    /// Start the router
    ///
    /// Each option is also read from the environment (SGLANG_ROUTER__PORT for --port; lists with commas) and
    /// from a TOML or JSON --config file. A flag beats the environment, which beats the file.
    Launch(Box<Options>),
    /// Start simulated SGLang workers, to try the router without a GPU
    Sim(sim::Options),
    /// Replay a trace through policies and simulated workers, in virtual time
    Replay(Box<replay::Options>),
}

/// The command as clap knows it, for `--help` and for what is derived from it.
pub fn command() -> clap::Command {
    Cli::command()
}

/// Runs one command line, `argv[0]` being the program, until it ends; returns the exit status. Errors and help go
/// to the terminal. `defaults` replace those of `launch`; `load` is where policies from outside come from.
pub fn run(argv: &[String], defaults: &[Setting], load: Load<'_>) -> u8 {
    let matches = match command().try_get_matches_from(argv) {
        Ok(matches) => matches,
        Err(error) => return refuse(&error),
    };
    let outcome = match matches.subcommand() {
        Some(("launch", launch)) => {
            // A subcommand is the first argument: the program itself has no options but --help and --version.
            let flags = argv.get(2..).unwrap_or_default();
            match Options::from_command_line(launch, flags, std::env::vars_os(), defaults) {
                Ok(options) => self::launch(options, load),
                Err(error) => Err(anyhow::Error::new(error)),
            }
        }
        _ => match Cli::from_arg_matches(&matches) {
            Ok(Cli::Sim(options)) => simulate(options),
            Ok(Cli::Replay(options)) => replay::run(&options, load),
            Ok(Cli::Launch(options)) => self::launch(*options, load),
            Err(error) => return refuse(&error),
        },
    };
    match outcome {
        Ok(()) => 0,
        Err(error) => {
            complain(&error.to_string());
            if error.is::<LoadError>() { 2 } else { 1 }
        }
    }
}

/// clap's own words.
fn refuse(error: &clap::Error) -> u8 {
    // Nothing can be done about a terminal that is gone.
    let _ = error.print();
    u8::try_from(error.exit_code()).unwrap_or(2)
}

fn complain(error: &str) {
    // As above.
    let _ = writeln!(std::io::stderr(), "error: {error}");
}

fn launch(options: Options, load: Load<'_>) -> anyhow::Result<()> {
    let policy = routing::build(&options.routing, load)?;
    running::check(&options, &*policy)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    // Before the port opens: who sees it open may send a signal.
    let mut signals = runtime.block_on(async { Signals::new() })?;
    let running = Arc::new(Running::start(options, policy)?);
    let until_end = running.clone();
    runtime.block_on(async {
        let ended = move || while !until_end.wait(Duration::from_secs(3600)) {};
        let mut ended = tokio::task::spawn_blocking(ended);
        let mut is_first = true;
        loop {
            tokio::select! {
                outcome = &mut ended => return Ok(outcome?),
                () = signals.next() => {}
            }
            if is_first {
                running.drain(None);
            } else {
                running.stop();
            }
            is_first = false;
        }
    })
}

fn simulate(options: sim::Options) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut signals = Signals::new()?;
        sim::serve(options, signals.next()).await
    })?;
    Ok(())
}

/// SIGINT and SIGTERM. While it is there they no longer end the process by themselves.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    /// To be called in a runtime.
    fn new() -> std::io::Result<Self> {
        let interrupt = signal(SignalKind::interrupt())?;
        Ok(Self { interrupt, terminate: signal(SignalKind::terminate())? })
    }

    /// Waits for one of them.
    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn clap_finds_no_fault_with_the_commands() {
        super::command().debug_assert();
    }
}
