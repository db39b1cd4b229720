//! A router at work, from binding its port to its end.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use parking_lot::{Condvar, Mutex};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tracing::Dispatch;

use super::request_id::RequestIds;
use super::{App, endpoints, routes};
use crate::options::Options;
use crate::routing::{self, Draws};
use crate::telemetry::logging;
use crate::telemetry::metrics::Metrics;
use crate::tracking::Tracker;
use crate::workers::{Worker, Workers};

/// Connections that wait to be accepted; a burst of clients arrives faster than threads wake up.
const BACKLOG: u32 = 4096;

/// What the router was told about its end.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Order {
    Serve,
    /// Take nothing new; what is in flight has this long.
    Drain(Duration),
    /// Cut everything.
    Stop,
}

/// A router that serves on threads of its own until it is told to stop. Dropping it cuts everything.
pub struct Running {
    address: SocketAddr,
    app: Arc<App>,
    orders: watch::Sender<Order>,
    ended: Arc<Ended>,
    /// None once the router has ended.
    runtime: Mutex<Option<Runtime>>,
}

#[derive(Default)]
struct Ended {
    is_ended: Mutex<bool>,
    rung: Condvar,
}

impl Running {
    /// Binds the port and starts to serve.
    ///
    /// # Errors
    /// The port is taken or the address is not one of this machine; the message names both.
    pub fn start(options: Options) -> io::Result<Self> {
        let log = logging::subscriber(&options.logging);
        let runtime = runtime(&options, &log)?;
        let _in_runtime = runtime.enter();
        let _logged = tracing::dispatcher::set_default(&log);

        let listener = listen(&runtime, &options.server.host, options.server.port)?;
        let metrics_listener = match options.server.prometheus_port {
            Some(port) => Some(listen(&runtime, &options.server.prometheus_host, port)?),
            None => None,
        };
        let address = listener.local_addr()?;
        let app = Arc::new(app(options));
        announce(&app, address);
        app.workers.start_checks();
        if let Some(tracker) = &app.tracker {
            tokio::spawn(remove_expired_forever(tracker.clone()));
        }
        let orders = watch::Sender::new(Order::Serve);
        if let Some(listener) = metrics_listener {
            let router = Router::new().route("/metrics", axum::routing::get(endpoints::metrics));
            let router = router.with_state(app.clone());
            tokio::spawn(serve(listener, router, orders.subscribe(), app.clone()));
        }
        let ended = Arc::new(Ended::default());
        let serving = serve(listener, routes::router(&app), orders.subscribe(), app.clone());
        let bell = ended.clone();
        tokio::spawn(async move {
            serving.await;
            *bell.is_ended.lock() = true;
            bell.rung.notify_all();
        });
        drop(_in_runtime);
        Ok(Self { address, app, orders, ended, runtime: Mutex::new(Some(runtime)) })
    }

    /// The address it listens on, with the port it got.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// None when request tracking is off.
    pub fn tracker(&self) -> Option<&Arc<Tracker>> {
        self.app.tracker.as_ref()
    }

    /// Whether a request would find a worker now.
    pub fn is_ready(&self) -> bool {
        !self.app.is_draining.load(Ordering::Relaxed)
            && !self.app.workers.snapshot().routable.is_empty()
    }

    /// Takes no new connections; what is in flight has `grace` to end. Returns at once.
    pub fn drain(&self, grace: Option<Duration>) {
        self.app.is_draining.store(true, Ordering::Relaxed);
        let grace = grace.unwrap_or_else(|| self.app.options.grace_period());
        self.orders.send_if_modified(|order| {
            let is_serving = *order == Order::Serve;
            if is_serving {
                *order = Order::Drain(grace);
            }
            is_serving
        });
    }

    /// Cuts everything. Returns at once.
    pub fn stop(&self) {
        self.app.is_draining.store(true, Ordering::Relaxed);
        self.orders.send_replace(Order::Stop);
    }

    /// Waits for the end, at most this long. Returns whether the router has ended; then its port is free and
    /// its threads are gone.
    pub fn wait(&self, timeout: Duration) -> bool {
        let until = Instant::now() + timeout;
        let mut is_ended = self.ended.is_ended.lock();
        while !*is_ended {
            if self.ended.rung.wait_until(&mut is_ended, until).timed_out() {
                return *is_ended;
            }
        }
        drop(is_ended);
        self.end();
        true
    }

    fn end(&self) {
        self.app.is_stopped.store(true, Ordering::Relaxed);
        if let Some(runtime) = self.runtime.lock().take() {
            // A name look-up that hangs in a blocking thread is not waited for.
            runtime.shutdown_timeout(Duration::from_secs(1));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.end();
    }
}

fn runtime(options: &Options, log: &Dispatch) -> io::Result<Runtime> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    if let Some(threads) = options.server.worker_threads {
        builder.worker_threads(usize::from(threads));
    }
    let log = log.clone();
    builder
        .thread_name("sglang-router")
        .enable_all()
        // The subscriber stays for the thread's life.
        .on_thread_start(move || std::mem::forget(tracing::dispatcher::set_default(&log)))
        .build()
}

/// A listener with a long backlog on the first address of `host` that takes it.
fn listen(runtime: &Runtime, host: &str, port: u16) -> io::Result<TcpListener> {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let addresses = runtime.block_on(tokio::net::lookup_host((bare, port))).map_err(|error| {
        io::Error::new(error.kind(), format!("cannot listen on {host}: {error}"))
    })?;
    let mut failure = None;
    for address in addresses {
        let bind = || {
            let socket =
                if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
            socket.set_reuseaddr(true)?;
            socket.bind(address)?;
            socket.listen(BACKLOG)
        };
        match bind() {
            Ok(listener) => return Ok(listener),
            Err(error) => failure = Some(error),
        }
    }
    let error = failure.unwrap_or_else(|| io::ErrorKind::AddrNotAvailable.into());
    let hint = if error.kind() == io::ErrorKind::AddrInUse {
        "; another program has it: stop that, or choose another port (0 takes a free one)"
    } else {
        ""
    };
    let message = format!("cannot listen on port {port} of {host}: {error}{hint}");
    // Keeps the number of the system's error for those who look at it.
    Err(io::Error::new(error.kind(), message))
}

fn app(options: Options) -> App {
    let policy = options.routing.policy;
    let tracking = options.tracking.enable_request_tracking;
    App {
        workers: Workers::new(options.workers, &options.upstream),
        policy: routing::build(&options.routing),
        policy_name: policy.name(),
        draws: Draws::new(options.routing.seed),
        tracker: tracking.then(|| Tracker::new(options.tracking, policy.name())),
        metrics: Metrics::default(),
        request_ids: RequestIds::new(&options.server.request_id_headers),
        is_draining: AtomicBool::new(false),
        is_stopped: AtomicBool::new(false),
        options: options.server,
    }
}

/// What an operator wants to read first.
fn announce(app: &App, address: SocketAddr) {
    let tracking = if app.tracker.is_some() { "on" } else { "off" };
    tracing::info!(
        "sglang_router_rs {} on http://{address}, policy {}, request tracking {tracking}",
        env!("CARGO_PKG_VERSION"),
        app.policy_name
    );
    for worker in &app.workers.snapshot().all {
        tracing::info!("worker {} is {}", worker.url, node_id(worker));
    }
}

fn node_id(worker: &Worker) -> &str {
    worker.node_id().unwrap_or("named once it has said its GPU")
}

/// Accepts connections until told to drain, then waits for those that are open.
async fn serve(
    listener: TcpListener,
    router: Router,
    mut orders: watch::Receiver<Order>,
    app: Arc<App>,
) {
    let graceful = GracefulShutdown::new();
    let grace = loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => serve_connection(stream, router.clone(), &graceful),
                Err(error) => refused(&error).await,
            },
            changed = orders.changed() => match (changed, *orders.borrow()) {
                (Ok(()), Order::Serve) => {}
                (Ok(()), Order::Drain(grace)) => break grace,
                (Ok(()), Order::Stop) | (Err(_), _) => return app.is_stopped.store(true, Ordering::Relaxed),
            },
        }
    };
    drop(listener);
    tracing::info!("draining: {} connections have {} s", graceful.count(), grace.as_secs());
    let is_stop = |order: &Order| *order == Order::Stop;
    tokio::select! {
        () = graceful.shutdown() => tracing::info!("drained"),
        () = tokio::time::sleep(grace) => tracing::warn!("grace period over: cutting what is left"),
        _ = orders.wait_for(is_stop) => tracing::warn!("told to stop at once: cutting what is left"),
    }
    app.is_stopped.store(true, Ordering::Relaxed);
}

fn serve_connection(stream: TcpStream, router: Router, graceful: &GracefulShutdown) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!("a client was gone before it was served: {error}");
        return;
    }
    let service = TowerToHyperService::new(router);
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(None)
        .serve_connection(TokioIo::new(stream), service);
    let connection = graceful.watch(connection);
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!("a client's connection ended: {error}");
        }
    });
}

/// Out of file descriptors, or a client that left again: neither ends the router.
async fn refused(error: &io::Error) {
    tracing::warn!("cannot accept a connection: {error}");
    tokio::time::sleep(Duration::from_millis(50)).await;
}

async fn remove_expired_forever(tracker: Arc<Tracker>) {
    let every = Duration::from_secs(tracker.options().trace_cleanup_interval_secs);
    let mut ticks = tokio::time::interval(every);
    loop {
        ticks.tick().await;
        tracker.remove_expired(Instant::now());
    }
}
