//! A router in front of SGLang servers that can tell, for every request, which worker served it, why it was chosen,
//! and how long each part took.
//!
//! In reading order:
//! - [`running`]: a router at work, from binding its port to its end.
//! - [`server`]: the HTTP side. `server/proxy.rs` is the life of a request, top to bottom.
//! - [`request`]: what is read in a request's body.
//! - [`routing`]: the policies that pick a worker. Pure: no network, no clock.
//! - [`workers`]: who the workers are, which are healthy, what they are called.
//! - [`upstream`]: the connections to one worker, and what its answer says.
//! - [`tracking`]: the request tracker: one record per request, looked up by id.
//! - [`telemetry`]: log lines and metrics.
//! - [`sim`]: a simulated SGLang worker, to try all this without a GPU.
//! - [`replay`]: a trace through the policies and simulated workers, in virtual time.
//! - [`options`]: every option, composed of what the modules declare.
//! - [`error`]: what can go wrong, told once.
//! - [`cli`]: the command line; `python.rs`: what Python sees.

pub mod cli;
pub mod error;
mod json;
pub mod options;
mod prefetch;
#[cfg(feature = "python")]
mod python;
pub mod replay;
pub mod request;
pub mod routing;
pub mod running;
pub mod server;
pub mod sim;
#[cfg(test)]
mod simulation;
pub mod telemetry;
pub mod tracking;
pub mod upstream;
pub mod workers;
