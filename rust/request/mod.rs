//! What the router reads in a request before it picks a worker.
//!
//! Pure: bytes in, facts out. The body itself goes to the worker as it came.

mod prompt;
mod scan;

pub use prompt::PIECE_SEPARATOR;
pub use scan::{Scan, scan};
