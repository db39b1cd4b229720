//! Log lines on standard error, and in files if a directory is named.
//!
//! Each router has its own subscriber, set on the threads of its own runtime, so that several routers in one
//! process log each at its own level and an embedding program's logging is left alone. Standard error and the files
//! have a thread each that writes to them, so that neither a slow disk nor a pipe that nobody reads holds up a request.

use std::error::Error as _;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};

use tracing::level_filters::LevelFilter;
use tracing::{Dispatch, Subscriber};
use tracing_appender::non_blocking::{NonBlocking, NonBlockingBuilder, WorkerGuard};
use tracing_appender::rolling::{RollingFileAppender, Rotation};
use tracing_subscriber::Layer;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::{LookupSpan, Registry};

/// Lines waiting to be written to standard error, and to a file; more are left out there.
const WAITING_LINES_MAX: usize = 65_536;
/// A file for each day; older ones are removed.
const FILES_MAX: usize = 30;

#[derive(clap::Args, Clone, Debug)]
#[group(skip)]
pub struct Options {
    /// Least severe lines to log: trace, debug, info, warn (or warning), error or off, in any case
    #[arg(long, default_value = "info", value_name = "LEVEL", value_parser = parse_level)]
    pub log_level: LevelFilter,

    /// Directory where log lines go too, into a file for each day (UTC), the last 30 of which stay; made if it is not there
    #[arg(long, value_name = "DIR")]
    pub log_dir: Option<PathBuf>,

    /// Write log lines as JSON objects
    #[arg(long, default_value_t = false, num_args = 0..=1, default_missing_value = "true", action = clap::ArgAction::Set, value_parser = clap::builder::BoolishValueParser::new())]
    pub log_json: bool,
}

fn parse_level(text: &str) -> Result<LevelFilter, String> {
    match text.to_ascii_lowercase().as_str() {
        "warning" => Ok(LevelFilter::WARN),
        "critical" | "fatal" => Ok(LevelFilter::ERROR),
        level => {
            level.parse().map_err(|_| "not one of trace, debug, info, warn, error, off".to_owned())
        }
    }
}

/// The threads that write one router's lines. Dropped, it writes what is waiting, as far as a second for each allows;
/// lines that come later are left out.
#[must_use]
#[derive(Debug)]
pub struct LogWriters(#[allow(dead_code, reason = "its drop is its use")] Vec<WorkerGuard>);

/// The subscriber of one router, and what writes its lines.
///
/// # Errors
/// The directory or the first file in it cannot be made; the message names the directory.
pub fn subscriber(options: &Options) -> io::Result<(Dispatch, LogWriters)> {
    let files = options.log_dir.as_deref().map(open_files).transpose()?;
    let (file, file_guard) = files.map(in_background).unzip();
    let (terminal, terminal_guard) = in_background(io::stderr());
    let file = file.map(|writer| lines(options, writer, false));
    let terminal = lines(options, terminal, io::stderr().is_terminal());
    let subscriber = Registry::default().with(options.log_level).with(file).with(terminal);
    let guards = file_guard.into_iter().chain([terminal_guard]).collect();
    Ok((Dispatch::new(subscriber), LogWriters(guards)))
}

fn in_background(writer: impl Write + Send + 'static) -> (NonBlocking, WorkerGuard) {
    let builder = NonBlockingBuilder::default().buffered_lines_limit(WAITING_LINES_MAX);
    builder.thread_name("router-log").finish(writer)
}

fn lines<S, W>(options: &Options, writer: W, has_colours: bool) -> Box<dyn Layer<S> + Send + Sync>
where
    S: Subscriber + for<'span> LookupSpan<'span>,
    W: for<'writer> MakeWriter<'writer> + Send + Sync + 'static,
{
    let layer = tracing_subscriber::fmt::layer()
        .with_writer(writer)
        // A log that nobody reads any more must not end a request.
        .log_internal_errors(false)
        .with_ansi(has_colours && !options.log_json)
        .with_target(false);
    if options.log_json { layer.json().flatten_event(true).boxed() } else { layer.boxed() }
}

fn open_files(directory: &Path) -> io::Result<RollingFileAppender> {
    // The appender would make it too, but looks for old files in it first, and complains to the terminal.
    let made = std::fs::create_dir_all(directory);
    made.map_err(|error| unusable(directory, error.kind(), &error))?;
    RollingFileAppender::builder()
        .rotation(Rotation::DAILY)
        .filename_prefix("sglang-router")
        .filename_suffix("log")
        .max_log_files(FILES_MAX)
        .build(directory)
        .map_err(|error| {
            let source = error.source().and_then(|source| source.downcast_ref::<io::Error>());
            match source {
                Some(source) => unusable(directory, source.kind(), source),
                None => unusable(directory, io::ErrorKind::Other, &error),
            }
        })
}

fn unusable(directory: &Path, kind: io::ErrorKind, why: &dyn std::fmt::Display) -> io::Error {
    io::Error::new(kind, format!("cannot write to log_dir {}: {why}", directory.display()))
}
