//! The workers: who they are, which are fit to be picked, and what they are called.
//!
//! The one idea: whoever routes reads an immutable [`Snapshot`] without a lock; every change of a worker's health
//! publishes a new one. A worker is in `routable` when its checks say it is healthy and it has its name.
//!
//! Does not choose among workers (`routing`) and does not send requests for clients (`server`).

pub mod breaker;
mod checks;
mod gate;
mod health;
pub mod node_id;
mod options;
mod server_info;
mod url;

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use arc_swap::ArcSwap;
use hyper::header::{AUTHORIZATION, HeaderValue};
use hyper::http::uri::PathAndQuery;
use hyper::{HeaderMap, Uri};
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};

use crate::routing::{Policy, Target, WorkerName};
use crate::upstream::{self, Connections};
use gate::Limiting;
pub use gate::{Gate, Pass};
use health::Health;
pub use health::State;
use node_id::{NodeIdFrom, NodeIds, Unnamed};
pub use options::Options;
pub use server_info::ServerInfo;
pub use url::WorkerUrl;

/// One worker, from joining to leaving.
#[derive(Debug)]
pub struct Worker {
    /// Order of joining, never reused.
    pub index: u32,
    pub url: WorkerUrl,
    pub connections: Arc<Connections>,
    pub target: Arc<Target>,
    /// Requests it answered to the end with a 2xx status.
    pub served: AtomicU64,
    /// Requests that failed on it.
    pub failed: AtomicU64,
    pub gate: Arc<Gate>,
    /// What it is sent as `authorization`, where a request brings none of its own.
    authorization: Option<HeaderValue>,
    name: OnceLock<Arc<WorkerName>>,
    info: OnceLock<ServerInfo>,
    health: Mutex<Health>,
    /// Why its last check failed; None after a good one.
    last_error: Mutex<Option<String>>,
    /// Rung when a request could not connect, so that it is checked now and not at the end of the interval.
    check_now: Notify,
}

impl Worker {
    /// Its name. None until it was first fit to be picked, where the name is the worker's own word.
    pub fn name(&self) -> Option<&Arc<WorkerName>> {
        self.name.get()
    }

    pub fn node_id(&self) -> Option<&str> {
        self.name().map(|name| &*name.node_id)
    }

    /// What `/get_server_info` said, once it did.
    pub fn info(&self) -> Option<&ServerInfo> {
        self.info.get()
    }

    pub fn state(&self) -> State {
        self.health.lock().state()
    }

    /// Why its last check failed; None after a good one.
    pub fn last_error(&self) -> Option<String> {
        self.last_error.lock().clone()
    }

    /// Where a path of the router's is on this worker.
    pub fn uri(&self, path: &PathAndQuery) -> Uri {
        if self.url.base_path().is_empty() {
            return path.clone().into();
        }
        let whole = format!("{}{path}", self.url.base_path());
        // Both parts were parsed before, each beginning with a slash.
        whole.parse().unwrap_or_else(|_| path.clone().into())
    }

    /// Gives a request on its way here the key that this worker asks for, unless it brings one of its own.
    pub fn authorize(&self, headers: &mut HeaderMap) {
        if let (Some(key), false) = (&self.authorization, headers.contains_key(AUTHORIZATION)) {
            headers.insert(AUTHORIZATION, key.clone());
        }
    }

    /// Whether it may be picked.
    pub fn is_routable(&self) -> bool {
        self.state() == State::Healthy && self.name.get().is_some()
    }
}

/// The workers as they were at one moment, in order of joining.
#[derive(Debug, Default)]
pub struct Snapshot {
    pub all: Vec<Arc<Worker>>,
    /// Those that may be picked.
    pub routable: Vec<Arc<Worker>>,
    /// The same, as the policies see them: `targets[i]` belongs to `routable[i]`.
    pub targets: Vec<Arc<Target>>,
}

impl Snapshot {
    /// The worker of this `node_id` or URL.
    pub fn find(&self, node_id_or_url: &str) -> Option<&Arc<Worker>> {
        let url: Option<WorkerUrl> = node_id_or_url.parse().ok();
        self.all.iter().find(|worker| {
            worker.node_id() == Some(node_id_or_url) || url.as_ref() == Some(&worker.url)
        })
    }
}

/// All workers of one router.
pub struct Workers {
    options: Options,
    snapshot: ArcSwap<Snapshot>,
    /// Taken by whoever names workers or publishes a snapshot, so that snapshots follow each other in order.
    node_ids: Mutex<NodeIds>,
    /// Workers of the start whose first check has not ended.
    unchecked: AtomicUsize,
    has_first_round_ended: AtomicBool,
    /// Changes with every snapshot and at the end of the first round.
    news: watch::Sender<()>,
    /// How many workers' breakers limit what may be picked.
    limiting: Limiting,
    /// Told when what it believes of a worker is void.
    policy: Arc<dyn Policy>,
}

impl Workers {
    /// The workers of the start, each sent `authorization` where a request brings none. None is checked yet.
    pub fn new(
        options: Options,
        upstream: &upstream::Options,
        policy: Arc<dyn Policy>,
        authorization: Option<HeaderValue>,
    ) -> Arc<Self> {
        let limiting = Limiting::default();
        let all: Vec<Arc<Worker>> = (0..)
            .zip(&options.worker_urls)
            .map(|(index, url)| new_worker(index, url, &options, upstream, &limiting))
            .map(|worker| Arc::new(Worker { authorization: authorization.clone(), ..worker }))
            .collect();
        let unchecked = if options.disable_health_check { 0 } else { all.len() };
        let workers = Arc::new(Self {
            node_ids: Mutex::new(NodeIds::new(options.node_id_from, options.node_ids.clone())),
            unchecked: AtomicUsize::new(unchecked),
            has_first_round_ended: AtomicBool::new(unchecked == 0),
            news: watch::Sender::new(()),
            limiting,
            policy,
            snapshot: ArcSwap::from_pointee(Snapshot { all, ..Snapshot::default() }),
            options,
        });
        // A name that is the worker's own word has to wait for it.
        if workers.options.node_id_from != NodeIdFrom::Gpu || unchecked == 0 {
            workers.name(|_| true);
        }
        workers.publish();
        workers
    }

    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshot.load_full()
    }

    /// Whether a worker's breaker keeps it, or may keep it, from being picked.
    pub fn is_any_limited(&self) -> bool {
        self.limiting.load(Ordering::Acquire) > 0
    }

    /// Checks all workers until the runtime ends.
    pub fn start_checks(self: &Arc<Self>) {
        for worker in &self.snapshot().all {
            if !self.options.disable_health_check {
                tokio::spawn(checks::check_forever(self.clone(), worker.clone()));
            }
        }
        tokio::spawn(checks::close_idle_forever(self.clone()));
    }

    /// Waits until every worker of the start has been checked once, or until `is_enough` of a snapshot.
    pub async fn first_round_or(&self, is_enough: impl Fn(&Snapshot) -> bool) {
        let mut news = self.news.subscribe();
        while !self.first_round_ended() && !is_enough(&self.snapshot()) {
            // The sender lives as long as `self`.
            let _ = news.changed().await;
        }
    }

    fn first_round_ended(&self) -> bool {
        self.has_first_round_ended.load(Ordering::Acquire)
    }

    /// A request found nobody at the worker's address: it is not picked again before a good check.
    pub fn unreachable(&self, worker: &Worker) {
        if !self.options.disable_health_check && worker.health.lock().unreachable() {
            tracing::warn!(worker = %worker.url, "worker unreachable: out until a check succeeds");
            self.publish();
            worker.check_now.notify_one();
        }
    }

    /// The outcome of one check.
    fn checked(&self, worker: &Arc<Worker>, outcome: Result<(), String>) {
        let earlier_error = {
            let error = outcome.as_ref().err().cloned();
            std::mem::replace(&mut *worker.last_error.lock(), error)
        };
        if let Err(why) = &outcome
            && earlier_error.as_ref() != Some(why)
        {
            // Said again only when it is another reason, so that a worker that stays down is quiet.
            tracing::warn!(worker = %worker.url, "check failed: {why}");
        }
        let (before, changed) = {
            let mut health = worker.health.lock();
            (health.state(), health.checked(outcome.is_ok(), &self.options))
        };
        if self.first_round_ended() {
            self.name_healthy();
        }
        if !changed {
            return;
        }
        if before == State::Unreachable {
            // Nobody was at its address: it is another process now, with an empty cache.
            self.policy.forget(worker.index);
        }
        match worker.state() {
            State::Healthy => tracing::info!(
                node = worker.node_id(), worker = %worker.url, "worker healthy"
            ),
            state => tracing::warn!(worker = %worker.url, "worker {}", state.name()),
        }
        self.publish();
    }

    /// Called once per worker of the start, after its first check.
    fn first_check_ended(&self) {
        if self.unchecked.fetch_sub(1, Ordering::AcqRel) > 1 {
            return;
        }
        self.name_healthy();
        self.has_first_round_ended.store(true, Ordering::Release);
        // A worker whose later check succeeded between the two lines above saw no end of the round yet.
        self.name_healthy();
        self.news.send_replace(());
        let snapshot = self.snapshot();
        let (healthy, workers) = (snapshot.routable.len(), snapshot.all.len());
        if healthy == 0 {
            tracing::warn!(workers, "first round of worker checks ended: none is healthy");
        } else {
            tracing::info!(healthy, workers, "first round of worker checks ended");
        }
    }

    /// Names and publishes the healthy workers that have no name yet.
    fn name_healthy(&self) {
        if self.name(|worker| worker.state() == State::Healthy) {
            self.publish();
        }
    }

    /// Names those workers among the nameless, all at once; whether there were any.
    fn name(&self, is_meant: impl Fn(&Worker) -> bool) -> bool {
        let mut node_ids = self.node_ids.lock();
        let snapshot = self.snapshot();
        let is_nameless = |worker: &&Arc<Worker>| worker.name.get().is_none() && is_meant(worker);
        let nameless: Vec<_> = snapshot.all.iter().filter(is_nameless).collect();
        let unnamed: Vec<Unnamed<'_>> = nameless
            .iter()
            .map(|worker| Unnamed {
                index: worker.index,
                url: &worker.url,
                base_gpu_id: worker.info().and_then(|info| info.base_gpu_id),
            })
            .collect();
        for (worker, node_id) in nameless.iter().zip(node_ids.assign(&unnamed)) {
            let name = WorkerName {
                index: worker.index,
                url: worker.url.as_str().into(),
                node_id: node_id.into(),
            };
            // A worker is named once; the lock above keeps it so.
            let _ = worker.name.set(Arc::new(name));
        }
        !nameless.is_empty()
    }

    fn publish(&self) {
        let _one_at_a_time = self.node_ids.lock();
        let all = self.snapshot().all.clone();
        let routable: Vec<_> = all.iter().filter(|worker| worker.is_routable()).cloned().collect();
        let targets = routable.iter().map(|worker| worker.target.clone()).collect();
        self.snapshot.store(Arc::new(Snapshot { all, routable, targets }));
        self.news.send_replace(());
    }
}

fn new_worker(
    index: u32,
    url: &WorkerUrl,
    options: &Options,
    upstream: &upstream::Options,
    limiting: &Limiting,
) -> Worker {
    Worker {
        index,
        url: url.clone(),
        connections: Connections::new(&url.host_and_port(), upstream.connect_timeout()),
        target: Arc::new(Target::new(index, options.weight(url))),
        served: AtomicU64::new(0),
        failed: AtomicU64::new(0),
        gate: Gate::new(url.as_str(), options.breaker, limiting.clone()),
        authorization: None,
        name: OnceLock::new(),
        info: OnceLock::new(),
        health: Mutex::new(Health::new(options)),
        last_error: Mutex::new(None),
        check_now: Notify::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routing;
    use clap::Parser;

    /// Options as the command line gives them.
    pub(super) fn options(argv: &[&str]) -> Options {
        #[derive(Parser)]
        struct Line {
            #[command(flatten)]
            options: Options,
        }
        Line::try_parse_from([&["router"], argv].concat()).expect("options").options
    }

    fn workers(argv: &[&str]) -> Arc<Workers> {
        let policy = routing::build(&crate::routing::tests::options(&[]).expect("defaults"));
        Workers::new(options(argv), &upstream::Options { connect_timeout_secs: 1 }, policy, None)
    }

    const TWO: [&str; 3] = ["--worker-urls", "http://a:30001", "http://b:30002"];

    #[test]
    fn the_snapshot_follows_health() {
        let workers = workers(&TWO);
        assert_eq!(workers.snapshot().routable.len(), 0);
        let all = workers.snapshot().all.clone();
        workers.checked(&all[1], Ok(()));
        assert_eq!(workers.snapshot().routable[0].node_id(), Some("gpu_1"));
        workers.unreachable(&all[1]);
        assert_eq!(workers.snapshot().routable.len(), 0);
        workers.checked(&all[1], Ok(()));
        assert_eq!(workers.snapshot().targets.len(), 1);
    }

    #[test]
    fn the_first_round_ends_with_its_last_check() {
        let workers = workers(&TWO);
        assert!(!workers.first_round_ended());
        workers.first_check_ended();
        assert!(!workers.first_round_ended());
        workers.first_check_ended();
        assert!(workers.first_round_ended());
    }

    #[test]
    fn names_that_are_the_workers_own_word_are_given_when_the_round_ends() {
        let workers = workers(&[&TWO[..], &["--node-id-from", "gpu"]].concat());
        let all = workers.snapshot().all.clone();
        let info = ServerInfo { base_gpu_id: Some(3), ..ServerInfo::default() };
        all[0].info.set(info.clone()).expect("first");
        workers.checked(&all[0], Ok(()));
        assert_eq!(workers.snapshot().routable.len(), 0, "no name yet");
        workers.first_check_ended();
        workers.first_check_ended();
        assert_eq!(workers.snapshot().routable[0].node_id(), Some("gpu_3"));
        all[1].info.set(info).expect("first");
        workers.checked(&all[1], Ok(()));
        assert_eq!(all[1].node_id(), Some("gpu_3@b:30002"), "a latecomer gives way");
    }

    #[test]
    fn without_checks_every_worker_is_routable_at_once() {
        let workers = workers(&[&TWO[..], &["--disable-health-check"]].concat());
        assert!(workers.first_round_ended());
        assert_eq!(workers.snapshot().routable.len(), 2);
        workers.unreachable(&workers.snapshot().all[0]);
        assert_eq!(workers.snapshot().routable.len(), 2);
    }

    #[test]
    fn a_worker_is_found_by_name_and_by_url() {
        let snapshot = workers(&TWO).snapshot();
        assert_eq!(snapshot.find("gpu_1").expect("name").index, 1);
        assert_eq!(snapshot.find("http://A:30001/").expect("url").index, 0);
        assert!(snapshot.find("gpu_9").is_none());
    }

    #[test]
    fn weights_are_checked_together() {
        let check = |argv: &[&str]| options(&[&TWO[..], argv].concat()).check();
        assert!(check(&["--worker-weights", "http://a:30001=0"]).is_ok());
        let zeros = ["--worker-weights", "http://a:30001=0", "http://b:30002=0"];
        assert!(check(&zeros).expect_err("zeros").1.contains("weight 0"));
        let stranger = ["--worker-weights", "http://c:1=1"];
        assert!(check(&stranger).expect_err("stranger").1.contains("not one of worker_urls"));
    }
}
