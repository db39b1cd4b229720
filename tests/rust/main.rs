//! The router over real sockets: each test starts its own router on a free port, in front of workers it
//! scripts byte by byte ([`support::ScriptedWorker`]) or of simulated ones.
//!
//! Invariants: no test waits by sleeping, asserts a time, or shares a port or a router with another one.

mod bad_input;
mod bytes;
mod connections;
mod dependencies;
mod disconnects;
mod doors;
mod fan_out;
mod listing;
mod load;
mod pins;
mod start_up;
mod streams;
mod support;
mod traces;
mod worker_life;
mod worker_routes;
