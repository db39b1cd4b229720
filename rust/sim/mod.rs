//! A simulated SGLang worker: anyone can try the router, and measure policies, without a GPU.
//!
//! The one idea: a pure [`engine`] decides when each token comes and what the KV cache holds;
//! everything else dresses that up as SGLang's HTTP server. Read in this order: [`engine`],
//! [`kv_cache`], [`hardware`], `tokens`, `worker` (the engine on the wall clock), `ask` and `answer`
//! (a request's way in and out), `shapes`, `faults`, `request_log`, `http`.
//!
//! Invariant: workers of one process share nothing but its threads.
//!
//! Not here: a model. Every answer is the same few words.

pub mod engine;
pub mod hardware;
pub mod kv_cache;

mod answer;
mod ask;
mod faults;
mod http;
mod refusal;
mod request_log;
mod shapes;
mod tokens;
mod worker;

use std::io::{self, Write};
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, FromArgMatches};
use hyper::server::conn::http1;
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::task::JoinSet;

pub use faults::Faults;
use hardware::{Hardware, positive};
use request_log::RequestLog;
pub use tokens::MAX_OUTPUT_TOKENS;
use worker::Worker;

/// Pause after a failed accept, such as too many open files, which would fail again at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);

/// The most workers in one process.
const MAX_WORKERS: usize = 1024;

/// Simulate SGLang workers, to try the router without a GPU.
#[derive(Args, Clone, Debug)]
#[group(skip)]
pub struct Options {
    /// Address to listen on.
    #[arg(long, default_value = "127.0.0.1")]
    pub host: String,
    /// Port to listen on; 0 takes a free one.
    #[arg(long, default_value_t = 30005)]
    pub port: u16,
    /// Several simulated workers in one process, such as 33000-33007 or 33000,33002.
    #[arg(long, value_name = "FIRST-LAST,…", conflicts_with = "port")]
    pub ports: Option<Ports>,
    /// How fast and how large each worker is.
    #[command(flatten)]
    pub hardware: Hardware,
    /// Runs that many times faster than time.
    #[arg(long, default_value_t = 1.0, allow_negative_numbers = true, value_parser = positive)]
    pub speed: f64,
    /// Tokens of a streamed answer from one frame to the next, as in SGLang; the first token has a frame of its own.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub stream_interval: u32,
    /// Name of the model.
    #[arg(long, default_value = "sim-model")]
    pub model: String,
    /// GPU id that the worker reports; with --ports the first one's, counting up.
    #[arg(long)]
    pub base_gpu_id: Option<u32>,
    /// Seed of --fail-rate.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// File to which each request that arrives and each that ends is added, as a JSON line.
    #[arg(long, value_name = "FILE")]
    pub request_log: Option<PathBuf>,
    /// What goes wrong.
    #[command(flatten)]
    pub faults: Faults,
}

impl Default for Options {
    /// The command line's own defaults.
    fn default() -> Self {
        let command = Self::augment_args(clap::Command::new("sim").no_binary_name(true));
        let matches = command.get_matches_from(std::iter::empty::<String>());
        Self::from_arg_matches(&matches).expect("every option has a default")
    }
}

impl Options {
    fn listen_ports(&self) -> Vec<u16> {
        self.ports.as_ref().map_or_else(|| vec![self.port], |ports| ports.0.clone())
    }
}

/// A list of ports such as `33000-33002,33010`: not empty, each port once (0, any free port, as
/// often as wanted), at most 1024 in all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ports(Vec<u16>);

impl FromStr for Ports {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut ports = Vec::new();
        for item in text.split(',') {
            let (first, last) = item.split_once('-').unwrap_or((item, item));
            let (first, last) = (port(first)?, port(last)?);
            if first > last {
                return Err(format!("{item:?} counts down"));
            }
            ports.extend(first..=last);
            if ports.len() > MAX_WORKERS {
                return Err(format!("more than {MAX_WORKERS} ports"));
            }
        }
        let mut sorted: Vec<_> = ports.iter().filter(|port| **port != 0).collect();
        sorted.sort_unstable();
        match sorted.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(format!("port {} is named twice", pair[0])),
            None => Ok(Self(ports)),
        }
    }
}

fn port(text: &str) -> Result<u16, String> {
    text.trim().parse().map_err(|_| format!("{text:?} is not a port from 0 to 65535"))
}

/// Simulated workers that listen and wait to be run.
#[derive(Debug)]
pub struct Sim {
    host: String,
    log: Option<Arc<RequestLog>>,
    workers: Vec<(TcpListener, Arc<Worker>)>,
}

impl Sim {
    /// Opens the ports. Connections made from now on are answered once [`Sim::run`] runs.
    ///
    /// # Errors
    /// The system's error for the request log, with its path in the text, or for the first port that
    /// cannot be opened, with host and port.
    pub async fn bind(options: Options) -> io::Result<Self> {
        let log = options.request_log.as_deref().map(RequestLog::open).transpose()?.map(Arc::new);
        let mut workers = Vec::new();
        for (index, port) in (0..).zip(options.listen_ports()) {
            let address = (options.host.as_str(), port);
            let listener = TcpListener::bind(address).await.map_err(|error| {
                let text = format!("cannot listen on {}:{port}: {error}", options.host);
                io::Error::new(error.kind(), text)
            })?;
            let port = listener.local_addr()?.port();
            workers.push((listener, Arc::new(Worker::new(options.clone(), port, index))));
        }
        Ok(Self { host: options.host, log, workers })
    }

    /// The port of each worker.
    pub fn ports(&self) -> Vec<u16> {
        self.workers.iter().map(|(_, worker)| worker.port).collect()
    }

    /// The URL of each worker.
    pub fn urls(&self) -> Vec<String> {
        let host = match self.host.contains(':') {
            true => format!("[{}]", self.host),
            false => self.host.clone(),
        };
        self.ports().iter().map(|port| format!("http://{host}:{port}")).collect()
    }

    /// Serves until `shutdown` ends, then closes all connections at once.
    pub async fn run(self, shutdown: impl Future) {
        let mut tasks = JoinSet::new();
        for (listener, worker) in self.workers {
            tasks.spawn(serve_worker(listener, worker, self.log.clone()));
        }
        shutdown.await;
        tasks.shutdown().await;
    }
}

/// Runs simulated workers until `shutdown` ends; prints a line for each once all listen.
///
/// # Errors
/// As [`Sim::bind`].
pub async fn serve(options: Options, shutdown: impl Future) -> io::Result<()> {
    let sim = Sim::bind(options).await?;
    let lines: String =
        sim.urls().iter().map(|url| format!("simulated worker on {url}\n")).collect();
    let mut stdout = io::stdout();
    // A closed stdout is no reason not to serve.
    let _ = stdout.write_all(lines.as_bytes()).and_then(|()| stdout.flush());
    sim.run(shutdown).await;
    Ok(())
}

/// Answers one worker's connections, for ever. Dropping it ends them all; the system's limit
/// of open files bounds how many there are.
async fn serve_worker(listener: TcpListener, worker: Arc<Worker>, log: Option<Arc<RequestLog>>) {
    let service = TowerToHyperService::new(http::routes(Arc::clone(&worker), log));
    let mut tasks = JoinSet::new();
    tasks.spawn(worker.drive());
    loop {
        while tasks.try_join_next().is_some() {}
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(ACCEPT_PAUSE).await;
            continue;
        };
        // Without it a frame waits for the acknowledgement of the one before.
        let _ = stream.set_nodelay(true);
        let connection =
            http1::Builder::new().serve_connection(TokioIo::new(stream), service.clone());
        tasks.spawn(async move {
            // It ends in an error when the client goes away, which is the client's affair.
            let _ = connection.await;
        });
    }
}

#[cfg(test)]
mod tests;
