//! A router at work, from binding its port to its end.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing::Dispatch;

use crate::options::Options;
use crate::routing::Policy;
use crate::routing::own::LoadError;
use crate::server::{self, App, Order, Secret, routes};
use crate::telemetry::logging::{self, LogWriters};
use crate::tracking::Tracker;
use crate::upstream::{self, Network};
use crate::workers::Workers;

const DESCRIPTORS_WANTED: u64 = 4096;

/// A router that serves on threads of its own until it is told to stop. Dropping it cuts everything.
pub struct Running {
    address: SocketAddr,
    app: Arc<App>,
    orders: watch::Sender<Order>,
    ended: Arc<Ended>,
    /// Its threads, its log and those that write its lines; None once the router has ended.
    threads: Mutex<Option<(Runtime, Dispatch, LogWriters)>>,
}

#[derive(Default)]
struct Ended {
    is_ended: Mutex<bool>,
    rung: Condvar,
}

impl Running {
    /// Binds the port and starts to serve, with the policy that the options name.
    ///
    /// # Errors
    /// The port is taken, the address is not one of this machine, or a file or directory of logs cannot be made; the
    /// message names it.
    pub fn start(options: Options, policy: Arc<dyn Policy>) -> io::Result<Self> {
        let (log, log_writers) = logging::subscriber(&options.logging)?;
        let runtime = runtime(&options, &log)?;
        let in_runtime = runtime.enter();
        let _logged = tracing::dispatcher::set_default(&log);

        let listen = |host, port| runtime.block_on(server::listen(host, port));
        let listener = listen(&options.server.host, options.server.port)?;
        let metrics_port = options.server.prometheus_port;
        let metrics_listener =
            metrics_port.map(|port| listen(&options.server.prometheus_host, port)).transpose()?;
        let address = listener.local_addr()?;
        let request_timeout = options.server.request_timeout();
        raise_descriptor_limit();
        let app = Arc::new(app(options, policy, Arc::new(upstream::Tcp))?);
        announce(&app, address);
        app.workers().start_checks();
        if let Some(tracker) = app.tracker() {
            tokio::spawn(remove_expired_forever(tracker.clone()));
        }
        let orders = watch::Sender::new(Order::Serve);
        // Readings of a drain are wanted too, so it serves until that has ended.
        let metrics_orders = watch::Sender::new(Order::Serve);
        if let Some(listener) = metrics_listener {
            tracing::info!("metrics on http://{}/metrics too", listener.local_addr()?);
            let front = routes::metrics_only(&app);
            let orders = metrics_orders.subscribe();
            tokio::spawn(server::serve(listener, front, orders, request_timeout));
        }
        let ended = Arc::new(Ended::default());
        let front = routes::front(&app);
        let serving = server::serve(listener, front, orders.subscribe(), request_timeout);
        tokio::spawn(ring_when_ended(serving, metrics_orders, app.clone(), ended.clone()));
        drop(in_runtime);
        let threads = Mutex::new(Some((runtime, log.clone(), log_writers)));
        Ok(Self { address, app, orders, ended, threads })
    }

    /// The address it listens on, with the port it got.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// None when request tracking is off.
    pub fn tracker(&self) -> Option<&Arc<Tracker>> {
        self.app.tracker()
    }

    /// Whether a request would find a worker now.
    pub fn is_ready(&self) -> bool {
        self.app.is_ready()
    }

    /// Is not ready any more, takes no new connections after `shutdown_delay_secs`, and from then on what is in flight
    /// has `grace` to end, or less if that was said before. Returns at once.
    pub fn drain(&self, grace: Option<Duration>) {
        self.app.drain();
        let options = self.app.options();
        let grace = grace.unwrap_or_else(|| options.grace_period());
        self.orders.send_if_modified(|order| {
            let (from, earlier) = match *order {
                Order::Serve => (tokio::time::Instant::now() + options.shutdown_delay(), None),
                Order::Drain { from, until } => (from, Some(until)),
                Order::Stop => return false,
            };
            let until = from.max(tokio::time::Instant::now()) + grace;
            let is_sooner = earlier.is_none_or(|earlier| until < earlier);
            if is_sooner {
                *order = Order::Drain { from, until };
            }
            is_sooner
        });
    }

    /// Cuts everything. Returns at once.
    pub fn stop(&self) {
        self.app.drain();
        self.orders.send_replace(Order::Stop);
    }

    /// Waits for the end, at most this long. Returns whether the router has ended; then its port is free, its log lines
    /// and trace log are written, and its threads are gone. Those may take three seconds more: a look-up of a name that
    /// hangs, or a standard error that nobody reads, is not waited for any longer, and its thread stays behind.
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

    /// Cuts everything and waits for the end, as [`Running::wait`] does.
    pub fn end(&self) {
        self.app.stop();
        if let Some((runtime, log, log_writers)) = self.threads.lock().take() {
            // A name look-up that hangs in a blocking thread is not waited for.
            runtime.shutdown_timeout(Duration::from_secs(1));
            // Now that every request has ended, and so that what goes wrong can be logged.
            tracing::dispatcher::with_default(&log, || {
                if let Some(tracker) = self.app.tracker() {
                    tracker.close_log();
                }
                self.app.policy().close();
            });
            drop(log_writers);
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

/// Each request in flight takes two file descriptors; many systems begin with 1,024.
fn raise_descriptor_limit() {
    match rlimit::increase_nofile_limit(u64::MAX) {
        Ok(limit) if limit < DESCRIPTORS_WANTED => tracing::warn!(
            "only {limit} file descriptors: about {} requests at once; raise the limit (ulimit -Hn)",
            limit / 2
        ),
        Ok(_) => {}
        Err(error) => tracing::warn!("cannot raise the limit of file descriptors: {error}"),
    }
}

async fn ring_when_ended(
    serving: impl Future<Output = JoinSet<()>> + Send + 'static,
    metrics_orders: watch::Sender<Order>,
    app: Arc<App>,
    ended: Arc<Ended>,
) {
    // Also a server that ended in a panic has ended.
    let left = tokio::spawn(serving).await;
    app.stop();
    // Cuts the connections that are left, now that their requests can tell why.
    drop(left);
    // The end of its orders is the end of the other listener.
    drop(metrics_orders);
    *ended.is_ended.lock() = true;
    ended.rung.notify_all();
}

/// Checks that the policy gets what it wants.
///
/// # Errors
/// It wants traces, and there are none.
pub fn check(options: &Options, policy: &dyn Policy) -> Result<(), LoadError> {
    if policy.wants_traces() && !options.tracking.enable_request_tracking {
        let why = "its finished() takes the traces of enable_request_tracking, which is off";
        return Err(LoadError(why.to_owned()));
    }
    Ok(())
}

pub(crate) fn app(
    options: Options,
    policy: Arc<dyn Policy>,
    network: Arc<dyn Network>,
) -> io::Result<App> {
    let tracking = options.tracking;
    let tracker = tracking
        .enable_request_tracking
        .then(|| Tracker::new(tracking, options.routing.policy.name()))
        .transpose()?;
    if let Some(tracker) = tracker.as_ref().filter(|_| policy.wants_traces()) {
        let policy = policy.clone();
        // A trace always serialises.
        tracker.tell(Box::new(move |trace| {
            policy.finished(serde_json::to_string(trace).unwrap_or_default());
        }));
    }
    let authorization = options.server.api_key.as_ref().map(Secret::authorization);
    let workers =
        Workers::new(options.workers, &options.upstream, policy.clone(), network, authorization);
    Ok(App::new(options.server, workers, policy, &options.routing, tracker))
}

/// What an operator wants to read first.
fn announce(app: &App, address: SocketAddr) {
    let tracking = if app.tracker().is_some() { "on" } else { "off" };
    tracing::info!(
        "sglang_router_rs {} on http://{address}, policy {}, request tracking {tracking}",
        env!("CARGO_PKG_VERSION"),
        app.policy_name()
    );
    if app.options().is_open_to_all() && !address.ip().to_canonical().is_loopback() {
        tracing::warn!(
            "no key is set and {address} is not of this machine alone: whoever reaches it may use the workers and \
             manage them; set api_key and admin_api_key, or let host be 127.0.0.1"
        );
    }
    let workers = &app.workers().snapshot().all;
    let mut names = app.workers().dns_names().peekable();
    if workers.is_empty() && names.peek().is_none() {
        tracing::warn!(
            "no workers: requests are refused until some join (worker_urls, or POST /workers)"
        );
    }
    for name in names {
        tracing::info!("workers join and leave with the addresses of {name}");
    }
    for worker in workers {
        let name = worker.node_id().unwrap_or("named once it has said its GPU");
        tracing::info!("worker {} is {name}", worker.url);
    }
}

async fn remove_expired_forever(tracker: Arc<Tracker>) {
    let every = Duration::from_secs(tracker.options().trace_cleanup_interval_secs);
    let mut ticks = tokio::time::interval(every);
    loop {
        ticks.tick().await;
        tracker.remove_expired(Instant::now());
    }
}
