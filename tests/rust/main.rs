//! The router over real sockets: each test starts its own router on a free port, in front of workers it
//! scripts byte by byte ([`support::ScriptedWorker`]) or of simulated ones.
//!
//! Invariants: no test waits by sleeping, asserts a time, or shares a port or a router with another one.

mod aborts;
mod admission;
mod bad_input;
mod breaker;
mod bytes;
mod candidates;
mod connections;
mod dependencies;
mod disconnects;
mod doors;
mod endings;
mod fan_out;
mod least_ttft;
mod listing;
mod load;
mod log_lines;
mod metrics;
mod pins;
mod prompt_blocks;
mod retries;
mod sessions;
mod start_up;
mod streams;
mod support;
mod trace_log;
mod traces;
mod wire_attacks;
mod worker_life;
mod worker_routes;
