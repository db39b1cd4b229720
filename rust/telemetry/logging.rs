//! Log lines on standard error.
//!
//! Each router has its own subscriber, set on the threads of its own runtime, so that several routers in one
//! process log each at its own level and an embedding program's logging is left alone.

use std::io::IsTerminal;

use tracing::Dispatch;
use tracing::level_filters::LevelFilter;

#[derive(clap::Args, Clone, Debug)]
#[group(skip)]
pub struct Options {
    /// Least severe lines to log: trace, debug, info, warn (or warning), error or off, in any case
    #[arg(long, default_value = "info", value_name = "LEVEL", value_parser = parse_level)]
    pub log_level: LevelFilter,
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

/// The subscriber of one router.
pub fn subscriber(options: &Options) -> Dispatch {
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(options.log_level)
        .with_writer(std::io::stderr)
        // A log that nobody reads any more must not end a request.
        .log_internal_errors(false)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .finish();
    Dispatch::new(subscriber)
}
