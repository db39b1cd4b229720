//! The way to one worker: its connections ([`Connections`]) over a [`Network`], and what its answer says ([`answer`]).
//!
//! Knows nothing of policies, of other workers or of the client: it sends one request to one address and
//! says precisely how that failed.

pub mod answer;
mod connections;
mod driver;
mod network;
mod sse;

use std::time::Duration;

use hyper::HeaderMap;
use hyper::header::TRANSFER_ENCODING;

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

/// Whether the body behind these headers is in chunks or in no coding, the two the router knows. It would pass on
/// the inside of any other coding as if it were the body (RFC 9112, section 6.1).
pub fn has_known_coding(headers: &HeaderMap) -> bool {
    let mut codings = headers.get_all(TRANSFER_ENCODING).iter();
    let is_chunked = |coding: &[u8]| coding.trim_ascii().eq_ignore_ascii_case(b"chunked");
    codings.next().is_none_or(|coding| is_chunked(coding.as_bytes())) && codings.next().is_none()
}
