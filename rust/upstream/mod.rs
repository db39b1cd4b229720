//! The way to one worker: its connections ([`Connections`]) over a [`Network`], and what its answer says ([`answer`]).
//!
//! Knows nothing of policies, of other workers or of the client: it sends one request to one address and
//! says precisely how that failed.

pub mod answer;
mod connections;
mod network;
mod sse;

use std::time::Duration;

pub use connections::{Answer, Connections, SendError};
pub use network::{Network, Stream, Tcp};

/// Options of the connections to workers.
#[derive(clap::Args, Clone, Debug)]
#[group(skip)]
pub struct Options {
    /// Seconds to wait for a connection to a worker
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub connect_timeout_secs: u64,
}

impl Options {
    pub fn connect_timeout(&self) -> Duration {
        Duration::from_secs(self.connect_timeout_secs)
    }
}
