//! What the router shows of itself: log lines and Prometheus metrics. Decides nothing.

pub mod logging;
pub mod metrics;
