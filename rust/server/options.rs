//! Options of the server: where it listens, what it takes, how long it waits.

use std::time::Duration;

use hyper::header::{HeaderName, HeaderValue};

use super::relay::Patience;
use super::secret::Secret;
use super::{admission, cors, retry, routes};
use crate::telemetry::metrics;

/// Which headers of an answer say who gave it.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum WorkerHeaders {
    /// x-sglang-worker (the URL) and x-sglang-node
    Url,
    /// x-sglang-node only
    Node,
    /// Neither
    Off,
}

#[derive(clap::Args, Clone, Debug)]
#[group(skip)]
pub struct Options {
    /// Address to listen on
    #[arg(long, default_value = "127.0.0.1")]
    pub host: String,

    /// Port to listen on; 0 takes a free one
    #[arg(long, default_value_t = 30000)]
    pub port: u16,

    /// Key that clients send as `authorization: Bearer KEY` and that the router sends to workers; not asked for on /health, /liveness, /readiness and /metrics
    #[arg(long, value_name = "KEY")]
    pub api_key: Option<Secret>,

    /// Key for the routes that manage workers or read traces, in place of api_key; never sent to a worker
    #[arg(long, value_name = "KEY")]
    pub admin_api_key: Option<Secret>,

    /// Origins whose pages may ask the router in a browser, for instance https://chat.example.org; * for all
    #[arg(long, num_args = 0.., value_name = "ORIGIN", value_parser = cors::parse_origin)]
    pub cors_allowed_origins: Vec<HeaderValue>,

    /// Largest request body in bytes
    #[arg(long, default_value_t = 512 << 20, value_parser = clap::value_parser!(u64).range(1..=1 << 40))]
    pub max_payload_size: u64,

    /// Seconds a request may take from its arrival to the last byte of its answer
    #[arg(long, default_value_t = 1800, value_parser = clap::value_parser!(u64).range(1..=604_800))]
    pub request_timeout_secs: u64,

    /// Seconds that requests in flight have to end when the router stops
    #[arg(long, default_value_t = 180, value_parser = clap::value_parser!(u64).range(0..=86_400))]
    pub shutdown_grace_period_secs: u64,

    /// Seconds the router still accepts connections after it was told to stop, not ready any more, so that load balancers notice first
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u64).range(0..=86_400))]
    pub shutdown_delay_secs: u64,

    /// Headers a request's id is taken from, in this order [default: x-request-id x-correlation-id x-trace-id request-id]
    #[arg(long, num_args = 0.., value_name = "HEADER")]
    pub request_id_headers: Vec<HeaderName>,

    /// Seconds that may pass between two chunks of an answer
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=604_800))]
    pub stream_stall_timeout_secs: u64,

    /// Bytes that the bodies of all requests in flight may take together; beyond, requests are refused with 503
    #[arg(long, default_value_t = 1 << 30, value_parser = clap::value_parser!(u64).range(1..=1 << 50))]
    pub max_buffered_bytes: u64,

    #[command(flatten)]
    pub admission: admission::Options,

    #[command(flatten)]
    pub retry: retry::Options,

    /// Further POST routes to route and trace, for instance /v1/audio/transcriptions
    #[arg(long, num_args = 0.., value_name = "PATH", value_parser = routes::parse_extra)]
    pub extra_routes: Vec<String>,

    /// Which headers of an answer say which worker gave it
    #[arg(long, value_enum, default_value_t = WorkerHeaders::Url)]
    pub worker_headers: WorkerHeaders,

    /// Threads that serve requests [default: one per core]
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub worker_threads: Option<u16>,

    /// Port of a second listener that answers /metrics only; 0 takes a free one
    #[arg(long)]
    pub prometheus_port: Option<u16>,

    /// Address of that second listener
    #[arg(long, default_value = "127.0.0.1")]
    pub prometheus_host: String,

    #[command(flatten)]
    pub metrics: metrics::Options,
}

impl Options {
    /// What no single value shows.
    pub fn check(&self) -> Result<(), (&'static str, String)> {
        for (index, path) in self.extra_routes.iter().enumerate() {
            if self.extra_routes[..index].contains(path) {
                return Err(("extra_routes", format!("{path} is named twice")));
            }
        }
        self.metrics.check()
    }

    /// Whether whoever reaches the router may do everything.
    pub fn is_open_to_all(&self) -> bool {
        self.api_key.is_none() && self.admin_api_key.is_none()
    }

    /// The largest body that could ever be taken.
    pub(super) fn body_bytes_max(&self) -> u64 {
        self.max_payload_size.min(self.max_buffered_bytes)
    }

    pub fn request_timeout(&self) -> Duration {
        Duration::from_secs(self.request_timeout_secs)
    }

    pub(super) fn patience(&self) -> Patience {
        let stall = Duration::from_secs(self.stream_stall_timeout_secs);
        Patience { whole: self.request_timeout(), stall }
    }

    pub fn shutdown_delay(&self) -> Duration {
        Duration::from_secs(self.shutdown_delay_secs)
    }

    pub fn grace_period(&self) -> Duration {
        Duration::from_secs(self.shutdown_grace_period_secs)
    }
}
