//! The workers: who they are, which are fit to be picked, and what they are called.
//!
//! The one idea: whoever routes reads an immutable [`Snapshot`] without a lock; every change of a worker's health, and
//! each joining and leaving, publishes a new one. A worker is in `routable` when its checks say it is healthy and it
//! has its name. One that is told to leave is not picked from then on, and is gone when nothing is in flight there.
//!
//! Does not choose among workers (`routing`) and does not send requests for clients (`server`).

pub mod breaker;
mod cache_use;
mod discovery;
mod gate;
mod health;
mod life;
pub mod node_id;
mod options;
mod server_info;
mod source;
mod url;
mod wanted;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use arc_swap::{ArcSwap, ArcSwapOption};
use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{AUTHORIZATION, CONTENT_LENGTH, HOST, HeaderName, HeaderValue};
use hyper::http::uri::PathAndQuery;
use hyper::{HeaderMap, Method, Request, Uri};
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};

use crate::routing::{Policy, Target, WorkerName};
use crate::upstream::{self, Connections, Network};
pub use cache_use::CacheUse;
use gate::Limiting;
pub use gate::{Gate, Pass};
use health::Health;
pub use health::State;
use node_id::{NodeIdFrom, NodeIds, Unnamed};
pub use options::Options;
pub use server_info::ServerInfo;
pub use source::{DnsName, Source};
pub use url::WorkerUrl;
use wanted::{Wanted, WantedBy};

/// Most workers at a time, those that drain among them.
pub const WORKERS_MAX: usize = 4096;

/// The header by which a router knows a check as its own: the id of the [`Workers`] that check.
pub const CHECKED_BY: HeaderName = HeaderName::from_static("x-sglang-router-id");

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
    /// Times it was picked.
    pub picked: AtomicU64,
    pub cache: CacheUse,
    pub gate: Arc<Gate>,
    /// The name that came with it, if one did.
    given_name: Option<String>,
    /// What it is sent as `authorization`, where a request brings none of its own.
    authorization: Option<HeaderValue>,
    name: OnceLock<Arc<WorkerName>>,
    info: ArcSwapOption<ServerInfo>,
    /// Whether it has said which process it is since it was last unreachable.
    is_known: AtomicBool,
    /// Changes only under the lock of the roster, as does whether it was told to leave.
    wanted: Mutex<Wanted>,
    health: Mutex<Health>,
    /// Why its last check failed; None after a good one.
    last_error: Mutex<Option<String>>,
    /// Rung when a request could not connect, so that it is checked now and not at the end of the interval.
    check_now: Notify,
    /// Rung once.
    told_to_leave: Notify,
}

impl Worker {
    /// Its name. None until it was first fit to be picked, where the name is the worker's own word.
    pub fn name(&self) -> Option<&Arc<WorkerName>> {
        self.name.get()
    }

    pub fn node_id(&self) -> Option<&str> {
        self.name().map(|name| &*name.node_id)
    }

    /// What its process said on `/server_info`, once it did.
    pub fn info(&self) -> Option<Arc<ServerInfo>> {
        self.info.load_full()
    }

    pub fn state(&self) -> State {
        self.health.lock().state()
    }

    /// Why its last check failed; None after a good one.
    pub fn last_error(&self) -> Option<String> {
        self.last_error.lock().clone()
    }

    /// Why it may not be picked, in words that follow its name.
    pub fn why_not(&self) -> String {
        let state = self.state();
        if state == State::Healthy {
            return match self.gate.state() {
                breaker::State::Closed => "has just become healthy".to_owned(),
                breaker::State::Open => "has its circuit breaker open".to_owned(),
                breaker::State::HalfOpen => {
                    "has its circuit breaker half_open and a probe on its way".to_owned()
                }
            };
        }
        let why = self.last_error().map(|why| format!(" ({why})")).unwrap_or_default();
        format!("is {}{why}", state.name())
    }

    /// Where a path of the router's is on this worker.
    fn uri(&self, path: &PathAndQuery) -> Uri {
        if self.url.base_path().is_empty() {
            return path.clone().into();
        }
        let whole = format!("{}{path}", self.url.base_path());
        // Both parts were parsed before, each beginning with a slash, and the server takes no target too long for both.
        whole.parse().unwrap_or_else(|_| path.clone().into())
    }

    /// A request as it is sent here, with these headers but for the router's own. The body is whole, so its length is
    /// known.
    pub fn request(
        &self,
        method: Method,
        path: &PathAndQuery,
        headers: HeaderMap,
        body: Bytes,
    ) -> Request<Full<Bytes>> {
        let length = body.len();
        let mut request = Request::new(Full::new(body));
        *request.uri_mut() = self.uri(path);
        *request.headers_mut() = headers;
        request.headers_mut().insert(HOST, self.url.authority().clone());
        if method == Method::POST {
            // Left alone, hyper would say nothing of a body of length 0.
            request.headers_mut().insert(CONTENT_LENGTH, length.into());
        }
        *request.method_mut() = method;
        self.authorize(request.headers_mut());
        request
    }

    /// Gives a request on its way here the key that this worker asks for, unless it brings one of its own.
    fn authorize(&self, headers: &mut HeaderMap) {
        if let (Some(key), false) = (&self.authorization, headers.contains_key(AUTHORIZATION)) {
            headers.insert(AUTHORIZATION, key.clone());
        }
    }

    /// Whether it may be picked.
    pub fn is_routable(&self) -> bool {
        self.state() == State::Healthy && self.name.get().is_some()
    }

    /// Whether it was told to leave.
    pub fn is_draining(&self) -> bool {
        self.state() == State::Draining
    }

    /// Whether a request is in flight there, or may still come to be: a pick that began before it was told to leave has
    /// a snapshot in which it is routable, however long it takes.
    fn is_held(&self) -> bool {
        // Both hold the target beside the worker itself.
        let is_held = Arc::strong_count(&self.target) > 1;
        // What they did while they held it, as telling the policy, is seen by whoever was told that it is over.
        fence(Ordering::Acquire);
        is_held
    }

    /// Another process is behind its URL: what is known of the one before is void.
    fn restarted(&self) {
        self.gate.reset();
        self.info.store(None);
        self.target.set_kv_tokens(None);
    }
}

/// A worker that wants to join.
#[derive(Clone, Debug)]
pub struct Joining {
    pub url: WorkerUrl,
    /// Instead of what `worker_weights` says.
    pub weight: Option<f64>,
    /// Instead of what `node_ids` and `node_id_from` say.
    pub node_id: Option<String>,
    /// What it is sent as `authorization`, instead of what the other workers are.
    pub authorization: Option<HeaderValue>,
}

impl Joining {
    /// A worker of which nothing is known but its URL.
    pub fn at(url: WorkerUrl) -> Self {
        Self { url, weight: None, node_id: None, authorization: None }
    }
}

/// The worker with the URL that was to join.
#[derive(Clone, Debug)]
pub struct Joined {
    pub worker: Arc<Worker>,
    /// False for one that was there already, which stays as it is.
    pub is_new: bool,
}

/// Why a worker cannot join.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{WORKERS_MAX} workers are the most a router takes, those that drain among them; remove one first"
)]
pub struct TooManyWorkers;

/// The workers as they were at one moment, in order of joining.
#[derive(Debug, Default)]
pub struct Snapshot {
    /// At most [`WORKERS_MAX`].
    pub all: Vec<Arc<Worker>>,
    /// Those that may be picked.
    pub routable: Vec<Arc<Worker>>,
    /// The same, as the policies see them: `targets[i]` belongs to `routable[i]`.
    pub targets: Vec<Arc<Target>>,
}

impl Snapshot {
    /// The worker of this `node_id` or URL. Of two with one URL the one that stays.
    pub fn find(&self, node_id_or_url: &str) -> Option<&Arc<Worker>> {
        let url: Option<WorkerUrl> = node_id_or_url.parse().ok();
        let is_meant = |worker: &&Arc<Worker>| {
            worker.node_id() == Some(node_id_or_url) || url.as_ref() == Some(&worker.url)
        };
        self.all.iter().filter(is_meant).min_by_key(|worker| worker.is_draining())
    }

    /// The worker of this id, which is its index, or else of this `node_id` or URL.
    pub fn find_by_id(&self, id: &str) -> Option<&Arc<Worker>> {
        let by_index = self.all.iter().find(|worker| worker.index.to_string() == id);
        by_index.or_else(|| self.find(id))
    }
}

/// All workers of one router.
pub struct Workers {
    /// Random; tells this router from all others.
    id: HeaderValue,
    options: Options,
    upstream: upstream::Options,
    network: Arc<dyn Network>,
    /// The workers' own key, sent where a request brings none.
    authorization: Option<HeaderValue>,
    snapshot: ArcSwap<Snapshot>,
    /// Taken by whoever names workers or publishes a snapshot, so that snapshots follow each other in order.
    roster: Mutex<Roster>,
    has_first_round_ended: AtomicBool,
    /// Changes with every snapshot and at the end of the first round.
    news: watch::Sender<()>,
    /// How many workers' breakers limit what may be picked.
    limiting: Limiting,
    /// Checks that ended well, and that did not.
    checks: [AtomicU64; 2],
    /// Told when what it believes of a worker is void.
    policy: Arc<dyn Policy>,
}

/// What a worker gets when it joins, and nobody gets again.
struct Roster {
    next_index: u32,
    node_ids: NodeIds,
}

/// Held by all that the first round of checks waits for: each worker of the start until its first check has ended,
/// and each source of workers until it has told of them. The last one to let go ends the round.
struct FirstRound(Arc<Workers>);

impl Drop for FirstRound {
    fn drop(&mut self) {
        self.0.end_first_round();
    }
}

impl Workers {
    /// The workers of the start, each sent `authorization` where a request brings none. None is checked yet, and no name
    /// is resolved.
    pub fn new(
        options: Options,
        upstream: &upstream::Options,
        policy: Arc<dyn Policy>,
        network: Arc<dyn Network>,
        authorization: Option<HeaderValue>,
    ) -> Arc<Self> {
        let joining: Vec<Joining> = options.urls().cloned().map(Joining::at).collect();
        let has_checks = !options.disable_health_check && !joining.is_empty();
        let is_round_needed = has_checks || options.dns_names().next().is_some();
        let node_ids = NodeIds::new(options.node_id_from, options.node_ids.clone());
        let workers = Arc::new(Self {
            options,
            id: random_id(),
            upstream: upstream.clone(),
            network,
            authorization,
            snapshot: ArcSwap::default(),
            roster: Mutex::new(Roster { next_index: 0, node_ids }),
            has_first_round_ended: AtomicBool::new(!is_round_needed),
            news: watch::Sender::new(()),
            limiting: Limiting::default(),
            checks: Default::default(),
            policy,
        });
        // The options hold no more than may join.
        workers.enter(joining, WantedBy::Url);
        workers
    }

    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshot.load_full()
    }

    /// Tells this router from all others.
    pub fn id(&self) -> &HeaderValue {
        &self.id
    }

    /// Whether the breaker of a routable worker keeps it, or may keep it, from being picked.
    pub fn is_any_limited(&self, snapshot: &Snapshot) -> bool {
        self.limiting.load(Ordering::Acquire) > 0
            && snapshot.routable.iter().any(|worker| worker.gate.is_limiting())
    }

    /// Checks so far that ended well, and that did not.
    pub fn checks(&self) -> [u64; 2] {
        self.checks.each_ref().map(|count| count.load(Ordering::Relaxed))
    }

    /// The names whose addresses are workers.
    pub fn dns_names(&self) -> impl Iterator<Item = &DnsName> {
        self.options.dns_names()
    }

    /// How long a worker may take from its joining to its first good check before that is an error.
    pub fn startup_timeout(&self) -> Duration {
        Duration::from_secs(self.options.worker_startup_timeout_secs)
    }

    /// Checks all workers, and looks for those that have to be looked for, until the runtime ends.
    pub fn start_checks(self: &Arc<Self>) {
        let round = Arc::new(FirstRound(self.clone()));
        for worker in &self.snapshot().all {
            self.start_life(worker, Some(&round));
        }
        for name in self.options.dns_names() {
            tokio::spawn(discovery::follow(self.clone(), name.clone(), round.clone()));
        }
        tokio::spawn(life::close_idle_forever(self.clone()));
    }

    /// Takes a worker in. It is checked at once, and may be picked after its first good check.
    ///
    /// # Errors
    /// There are [`WORKERS_MAX`] already.
    pub fn join(self: &Arc<Self>, joining: Joining) -> Result<Joined, TooManyWorkers> {
        self.join_all(vec![joining], WantedBy::Url, None).pop().unwrap_or(Err(TooManyWorkers))
    }

    /// Takes workers in together: none of those that would share a name keeps it.
    fn join_all(
        self: &Arc<Self>,
        joining: Vec<Joining>,
        by: WantedBy,
        round: Option<&Arc<FirstRound>>,
    ) -> Vec<Result<Joined, TooManyWorkers>> {
        let outcomes = self.enter(joining, by);
        for Joined { worker, is_new } in outcomes.iter().flatten() {
            if *is_new {
                tracing::info!(node = worker.node_id(), worker = %worker.url, "worker joined");
                self.start_life(worker, round);
            }
        }
        outcomes
    }

    /// Tells a worker to leave: it is not picked from now on, and gone when nothing is in flight there.
    pub fn leave(&self, worker: &Worker) {
        self.tell_to_leave(&self.roster.lock(), worker);
    }

    /// A name has lost the worker's address: tells it to leave, unless somebody else wants it.
    fn lost_by_name(&self, worker: &Worker) {
        let roster = self.roster.lock();
        if worker.wanted.lock().lost_by_name() {
            self.tell_to_leave(&roster, worker);
        }
    }

    fn tell_to_leave(&self, locked: &Roster, worker: &Worker) {
        let in_flight = worker.target.in_flight();
        if worker.health.lock().leave() {
            tracing::info!(node = worker.node_id(), worker = %worker.url, in_flight, "worker leaves");
            self.store(locked, self.snapshot().all.clone());
            worker.told_to_leave.notify_one();
        }
    }

    /// Waits until every worker of the start has been checked once, or until `is_enough` of a snapshot.
    pub async fn first_round_or(&self, is_enough: impl Fn(&Snapshot) -> bool) {
        if !self.first_round_ended() {
            self.until(|snapshot| self.first_round_ended() || is_enough(snapshot)).await;
        }
    }

    /// Waits until `is_so` of a snapshot.
    pub async fn until(&self, is_so: impl Fn(&Snapshot) -> bool) {
        let mut news = self.news.subscribe();
        while !is_so(&self.snapshot()) {
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
            worker.is_known.store(false, Ordering::Relaxed);
            self.publish();
            worker.check_now.notify_one();
        }
    }

    /// The outcome of one check.
    fn checked(&self, worker: &Worker, outcome: Result<(), String>) {
        self.checks[usize::from(outcome.is_err())].fetch_add(1, Ordering::Relaxed);
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
        if before == State::Unreachable && !worker.is_known.load(Ordering::Relaxed) {
            // Nobody was at its address, and nobody says that it is the same process: its cache may be empty.
            self.restarted(worker);
        }
        match worker.state() {
            State::Healthy => tracing::info!(
                node = worker.node_id(), worker = %worker.url, "worker healthy"
            ),
            state => tracing::warn!(worker = %worker.url, "worker {}", state.name()),
        }
        self.publish();
    }

    /// What the worker says of itself now.
    fn told(&self, worker: &Worker, info: ServerInfo) {
        let before = worker.info();
        let was_named = before.as_ref().is_some_and(|before| before.names_its_process());
        worker.is_known.store(was_named && info.names_its_process(), Ordering::Relaxed);
        if before.as_deref() == Some(&info) {
            return;
        }
        if before.is_some_and(|before| info.is_of_another_process(&before)) {
            self.restarted(worker);
        }
        tracing::info!(
            worker = %worker.url, model = info.model_id, gpu = info.base_gpu_id,
            kv_tokens = info.kv_tokens, "worker reports"
        );
        if let Some(nonsense) = &info.kv_tokens_nonsense {
            tracing::warn!(
                worker = %worker.url,
                "max_total_num_tokens is {nonsense}, which is no size of a KV cache: ignored"
            );
        }
        worker.target.set_kv_tokens(info.kv_tokens);
        worker.info.store(Some(Arc::new(info)));
    }

    /// Another process is behind the worker's URL, with an empty cache.
    fn restarted(&self, worker: &Worker) {
        tracing::info!(node = worker.node_id(), worker = %worker.url, "worker restarted");
        worker.restarted();
        self.policy.forget(worker.index);
    }

    fn end_first_round(&self) {
        if self.first_round_ended() {
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

    /// Puts workers on the roster, and those that are not there yet into the snapshot.
    fn enter(&self, joining: Vec<Joining>, by: WantedBy) -> Vec<Result<Joined, TooManyWorkers>> {
        let mut roster = self.roster.lock();
        let mut all = self.snapshot().all.clone();
        let mut enter_one = |joining: Joining| {
            let is_there =
                |worker: &&Arc<Worker>| worker.url == joining.url && !worker.is_draining();
            if let Some(worker) = all.iter().find(is_there) {
                worker.wanted.lock().add(by);
                return Ok(Joined { worker: worker.clone(), is_new: false });
            }
            if all.len() >= WORKERS_MAX || roster.next_index == u32::MAX {
                return Err(TooManyWorkers);
            }
            let worker = Arc::new(self.new_worker(roster.next_index, joining));
            roster.next_index += 1;
            worker.wanted.lock().add(by);
            all.push(worker.clone());
            Ok(Joined { worker, is_new: true })
        };
        let outcomes = joining.into_iter().map(&mut enter_one).collect();
        // A name that is the worker's own word has to wait for it.
        if self.options.node_id_from != NodeIdFrom::Gpu || self.options.disable_health_check {
            roster.name(&all, |_| true);
        }
        self.store(&roster, all);
        outcomes
    }

    /// Nothing is in flight any more at a worker that was told to leave.
    fn gone(&self, worker: &Worker) {
        let roster = self.roster.lock();
        let mut all = self.snapshot().all.clone();
        all.retain(|other| other.index != worker.index);
        self.store(&roster, all);
        drop(roster);
        worker.connections.close();
        self.policy.forget(worker.index);
        tracing::info!(node = worker.node_id(), worker = %worker.url, "worker gone");
    }

    /// Names and publishes the healthy workers that have no name yet.
    fn name_healthy(&self) {
        let mut roster = self.roster.lock();
        let all = &self.snapshot().all;
        if roster.name(all, |worker| worker.state() == State::Healthy) {
            self.store(&roster, all.clone());
        }
    }

    fn publish(&self) {
        let roster = self.roster.lock();
        self.store(&roster, self.snapshot().all.clone());
    }

    /// Publishes a snapshot of these workers, one at a time.
    fn store(&self, _locked: &Roster, all: Vec<Arc<Worker>>) {
        let routable: Vec<_> = all.iter().filter(|worker| worker.is_routable()).cloned().collect();
        let targets = routable.iter().map(|worker| worker.target.clone()).collect();
        self.snapshot.store(Arc::new(Snapshot { all, routable, targets }));
        self.news.send_replace(());
    }

    fn start_life(self: &Arc<Self>, worker: &Arc<Worker>, round: Option<&Arc<FirstRound>>) {
        tokio::spawn(life::live(self.clone(), worker.clone(), round.cloned()));
    }

    fn new_worker(&self, index: u32, joining: Joining) -> Worker {
        let Joining { url, weight, node_id, authorization } = joining;
        let weight = weight.unwrap_or_else(|| self.options.weight(&url));
        let timeout = self.upstream.connect_timeout();
        Worker {
            index,
            connections: Connections::new(&url.host_and_port(), timeout, self.network.clone()),
            gate: Gate::new(url.as_str(), self.options.breaker, self.limiting.clone()),
            target: Arc::new(Target::new(index, weight).named(url.as_str())),
            url,
            served: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            picked: AtomicU64::new(0),
            cache: CacheUse::default(),
            given_name: node_id,
            authorization: authorization.or_else(|| self.authorization.clone()),
            name: OnceLock::new(),
            info: ArcSwapOption::empty(),
            is_known: AtomicBool::new(false),
            wanted: Mutex::default(),
            health: Mutex::new(Health::new(&self.options)),
            last_error: Mutex::new(None),
            check_now: Notify::new(),
            told_to_leave: Notify::new(),
        }
    }
}

fn random_id() -> HeaderValue {
    let mut text = uuid::Uuid::encode_buffer();
    let text = uuid::Uuid::new_v4().simple().encode_lower(&mut text);
    HeaderValue::from_str(text).expect("hexadecimal digits")
}

impl Roster {
    /// Names those workers among the nameless, all at once; whether there were any.
    fn name(&mut self, all: &[Arc<Worker>], is_meant: impl Fn(&Worker) -> bool) -> bool {
        let is_nameless = |worker: &&Arc<Worker>| worker.name.get().is_none() && is_meant(worker);
        let nameless: Vec<_> = all.iter().filter(is_nameless).collect();
        let unnamed: Vec<Unnamed<'_>> = nameless
            .iter()
            .map(|worker| Unnamed {
                index: worker.index,
                url: &worker.url,
                given: worker.given_name.as_deref(),
                base_gpu_id: worker.info().and_then(|info| info.base_gpu_id),
            })
            .collect();
        for (worker, node_id) in nameless.iter().zip(self.node_ids.assign(&unnamed)) {
            let name = WorkerName {
                index: worker.index,
                url: worker.url.as_str().into(),
                node_id: node_id.into(),
            };
            // A worker is named once; the lock that the roster is under keeps it so.
            let name = Arc::new(name);
            worker.target.set_name(name.clone());
            let _ = worker.name.set(name);
        }
        !nameless.is_empty()
    }
}

#[cfg(test)]
mod tests;
