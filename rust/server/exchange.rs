//! What a client's connection and the request on it know of each other.

use std::sync::Arc;
use std::time::Instant;

use super::in_flight::Abort;

/// One request on a connection, handed to it among the request's extensions.
#[derive(Clone, Debug)]
pub(super) struct Exchange {
    /// When the request has to be over.
    pub(super) deadline: Instant,
    /// How it is ended from outside.
    pub(super) abort: Arc<Abort>,
}
