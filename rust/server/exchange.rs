//! What a client's connection and the request on it know of each other.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::in_flight::Abort;
use super::now;
use crate::tracking::Arrived;

/// One request on a connection, handed to it among the request's extensions.
#[derive(Clone, Debug)]
pub(super) struct Exchange {
    pub(super) arrived: Arrived,
    /// When the request has to be over.
    pub(super) deadline: Instant,
    /// How it is ended from outside.
    pub(super) abort: Arc<Abort>,
}

impl Exchange {
    /// A request has come, which may take so long.
    pub(super) fn begin(timeout: Duration) -> Self {
        let at = now();
        Self { arrived: Arrived::at(at), deadline: at + timeout, abort: Arc::default() }
    }
}
