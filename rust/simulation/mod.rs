//! A whole router in memory, on a paused clock, under random schedules.
//!
//! Everything between the client's connection and the worker's is the product's own code; the network, the workers and
//! the clients are simulated. A schedule is a function of its seed: workers join, leave, die, come back, hang and
//! refuse; clients read slowly, leave, and have their requests aborted. What must hold whatever happens is checked
//! when all has ended.
//!
//! `SIMULATION_SEED=n` replays one schedule and shows it, `SIMULATION_RUNS=n` runs another number of them.

mod clients;
mod plan;
mod workers;

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use clap::FromArgMatches;
use hyper_util::server::graceful::GracefulShutdown;
use parking_lot::Mutex;
use serde_json::Value;
use tokio::io::{DuplexStream, duplex};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::options::{self, Options};
use crate::routing::candidates::Weighed;
use crate::routing::own::load_nothing;
use crate::routing::{self, Pick, PickError, Policy, Target, Underway, WorkerId};
use crate::running;
use crate::server::{App, Front, routes, serve_connection};
use crate::workers::{Joining, Snapshot, State, Workers, breaker};
use clients::{Answers, Seen};
use plan::{Ask, Manner, Plan, What};
use workers::Cluster;

const RUNS: u64 = 10_000;
/// A client's side of its connection holds so much that it has not read.
const PIPE_BYTES: usize = 1 << 10;
const LOOKS_EVERY: Duration = Duration::from_millis(250);
/// By then all timeouts are over. Nobody waits for it: the clock is paused.
const FOREVER: Duration = Duration::from_secs(100_000);

#[test]
fn every_request_ends_once_whatever_happens() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse().expect("a number"));
    if let Some(seed) = number("SIMULATION_SEED") {
        println!("{:#?}", Plan::draw(seed));
        run(seed);
        return;
    }
    let runs: u64 = number("SIMULATION_RUNS").unwrap_or(RUNS);
    let threads = std::thread::available_parallelism().map_or(1, usize::from) as u64;
    std::thread::scope(|scope| {
        for first in 0..threads {
            scope.spawn(move || (first..runs).step_by(threads as usize).for_each(run));
        }
    });
}

/// Says how to see it again if a schedule fails.
struct Replay(u64);

impl Drop for Replay {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!(
                "replay it: SIMULATION_SEED={} cargo test --locked --lib every_request_ends_once -- --nocapture",
                self.0
            );
        }
    }
}

fn run(seed: u64) {
    let _replay = Replay(seed);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let plan = Plan::draw(seed);
        let simulation = Simulation::start(&plan);
        let seen = tokio::time::timeout(FOREVER, simulation.play(&plan)).await;
        let seen = seen.expect("every request ends");
        simulation.settle().await;
        simulation.check(&plan, &seen);
    });
}

struct Simulation {
    cluster: Arc<Cluster>,
    app: Arc<App>,
    front: Front,
    request_timeout: Duration,
    watched: Arc<Watched>,
}

impl Simulation {
    fn start(plan: &Plan) -> Self {
        let cluster = Cluster::new(plan.all_workers());
        let mut argv = vec!["launch".to_owned()];
        argv.extend(plan.flags.iter().cloned());
        let of_the_start = &cluster.workers[..plan.workers];
        argv.extend(of_the_start.iter().map(|worker| format!("--worker-urls={}", worker.url)));
        let matches = options::command().try_get_matches_from(argv).expect("flags");
        let options = Options::from_arg_matches(&matches).expect("options");
        let request_timeout = options.server.request_timeout();
        let timeout_secs = options.workers.breaker.cb_timeout_duration_secs;
        let watched = Arc::new(Watched {
            policy: routing::build(&options.routing, &load_nothing)
                .expect("one of the router's own"),
            workers: OnceLock::new(),
            faults: Mutex::default(),
            breaker_timeout: Duration::from_secs(timeout_secs),
            not_open_at: Mutex::default(),
        });
        let app = running::app(options, watched.clone(), cluster.clone());
        let app = Arc::new(app.expect("no trace log to open"));
        watched.workers.set(app.workers().clone()).ok().expect("only here");
        app.workers().start_checks();
        let front = routes::front(&app);
        Self { cluster, app, front, request_timeout, watched }
    }

    /// Plays the whole plan; what each client has seen, in the order of the asks.
    async fn play(&self, plan: &Plan) -> Vec<Seen> {
        let began = Instant::now();
        let graceful = GracefulShutdown::new();
        let seen = Mutex::new(Vec::new());
        let mut served = JoinSet::new();
        let connect = |served: &mut JoinSet<()>| -> DuplexStream {
            let (near, far) = duplex(PIPE_BYTES);
            let front = self.front.clone();
            served.spawn(serve_connection(far, front, &graceful, self.request_timeout));
            near
        };
        let streams: Vec<DuplexStream> = plan.asks.iter().map(|_| connect(&mut served)).collect();
        let asking = plan.asks.iter().zip(streams).enumerate().map(|(number, (ask, stream))| {
            let seen = &seen;
            async move {
                tokio::time::sleep_until(began + ask.at).await;
                let outcome = clients::ask(ask, stream).await;
                seen.lock().push((number, outcome));
            }
        });
        let aborting = plan.asks.iter().map(|ask| async move {
            if let Manner::Aborted(after) = ask.manner {
                tokio::time::sleep_until(began + ask.at + after).await;
                self.app.abort(&ask.id);
            }
        });
        let suffering = async {
            for event in &plan.events {
                tokio::time::sleep_until(began + event.at).await;
                self.happens(event.worker, event.what);
            }
        };
        use futures_util::future::join_all;
        let all = async { tokio::join!(join_all(asking), join_all(aborting), suffering) };
        tokio::select! {
            _ = all => {}
            () = self.watched.look() => {}
        }
        while let Some(connection) = served.join_next().await {
            connection.expect("no connection of a client's panics");
        }
        let mut seen = seen.into_inner();
        seen.sort_by_key(|(number, _)| *number);
        seen.into_iter().map(|(_, seen)| seen).collect()
    }

    fn happens(&self, number: usize, what: What) {
        let worker = &self.cluster.workers[number];
        worker.suffers(what);
        let workers = self.app.workers();
        match what {
            What::Joins => {
                let url = worker.url.parse().expect("a URL");
                workers.join(Joining::at(url)).expect("room for another worker");
            }
            What::Leaves => {
                if let Some(worker) = workers.snapshot().find(&worker.url) {
                    workers.leave(worker);
                }
            }
            _ => {}
        }
    }

    /// Waits until the workers that leave have gone.
    async fn settle(&self) {
        tokio::time::sleep(Duration::from_secs(3)).await;
    }

    fn check(&self, plan: &Plan, seen: &[Seen]) {
        let faults = self.watched.faults.lock();
        assert!(faults.is_empty(), "{faults:?}");
        self.app.assert_idle();
        for worker in &self.app.workers().snapshot().all {
            assert_eq!(worker.target.in_flight(), 0, "in flight at {}", worker.url);
            assert!(!worker.is_draining(), "{} is empty and has not gone", worker.url);
        }
        let tracker = self.app.tracker().expect("tracking is on");
        let stats = serde_json::to_value(tracker.stats()).expect("plain data");
        assert_eq!(stats["in_flight"], 0, "{stats}");
        let by_status = stats["requests_per_status"].as_object().expect("counts");
        let ended = |status: &str| by_status.get(status).and_then(Value::as_u64).unwrap_or(0);
        let total = stats["total_requests"].as_u64();
        assert_eq!(Some(ended("completed") + ended("failed")), total, "{stats}");
        assert_eq!(Some(self.app.answered()), total, "each ends once in the metrics too");
        for (ask, seen) in plan.asks.iter().zip(seen) {
            let trace = tracker.get(&ask.id);
            let trace = trace.map(|trace| serde_json::to_value(&trace).expect("plain data"));
            self.agree(ask, seen, trace.as_ref());
        }
    }

    /// What a client has seen, its trace, and what the workers remember are one story.
    fn agree(&self, ask: &Ask, seen: &Seen, trace: Option<&Value>) {
        let story = || format!("{ask:?}\n{seen:?}\n{trace:#?}");
        if let Manner::Patient | Manner::Aborted(_) = ask.manner {
            assert!(!matches!(seen, Seen::Nothing), "who waits is answered: {}", story());
            let is_cut = matches!(seen, Seen::Cut { .. });
            assert!(!(is_cut && ask.stream), "a stream of events is told of its end: {}", story());
        }
        if let Seen::Whole { status, worker, body } = seen
            && status.as_u16() == 200
        {
            let worker = worker.as_deref().expect("the answer says who gave it");
            let Answers { from, dones, errors } = Seen::answers(body);
            let is_right = |(url, id): &(String, String)| url == worker && *id == ask.id;
            assert!(from.iter().all(is_right), "another answer: {}", story());
            let expected = if ask.stream { ask.chunks as usize } else { 1 };
            if errors == 0 {
                assert_eq!(from.len(), expected, "one whole answer: {}", story());
                assert_eq!(dones, usize::from(ask.stream), "{}", story());
                assert!(self.cluster.by_url(worker).has_finished(&ask.id), "{}", story());
            } else {
                assert_eq!((errors, dones), (1, 0), "told once, and nothing after: {}", story());
            }
        }
        let Some(trace) = trace else { return };
        let is_failed = trace["status"] == "failed";
        assert!(is_failed || trace["status"] == "completed", "{}", story());
        assert_eq!(is_failed, trace["error_message"].is_string(), "{}", story());
        match seen {
            Seen::Whole { status, worker, body } => {
                assert_eq!(trace["http_status"], status.as_u16(), "{}", story());
                assert_eq!(trace["worker_url"].as_str(), worker.as_deref(), "{}", story());
                let is_good = status.as_u16() == 200 && Seen::answers(body).errors == 0;
                assert_eq!(is_good, !is_failed, "{}", story());
            }
            Seen::Cut { status } => {
                assert_eq!(trace["http_status"], status.as_u16(), "{}", story());
                // Who reads slowly may be cut with the last bytes of a whole answer still on their way.
                let is_slow = matches!(ask.manner, Manner::Slow(_));
                assert!(is_failed || is_slow, "{}", story());
            }
            Seen::Nothing => assert!(is_failed, "{}", story()),
            Seen::Left => {}
        }
        let attempts = trace["attempts"].as_array().expect("a list");
        for attempt in attempts {
            if !attempt["http_status"].is_null() {
                let url = attempt["worker_url"].as_str().expect("a URL");
                assert!(self.cluster.by_url(url).has_received(&ask.id), "{}", story());
            }
        }
        if let Some(last) = attempts.last() {
            assert_eq!(last["worker_url"], trace["worker_url"], "{}", story());
        }
    }
}

/// The policy, with an eye on what it is asked and on what comes of it.
struct Watched {
    policy: Arc<dyn Policy>,
    workers: OnceLock<Arc<Workers>>,
    faults: Mutex<Vec<String>>,
    breaker_timeout: Duration,
    /// When each worker's breaker was last seen in another state than open.
    not_open_at: Mutex<HashMap<WorkerId, Instant>>,
}

impl Watched {
    /// Looks at the breakers for as long as it is polled.
    async fn look(&self) {
        loop {
            for worker in &self.workers.get().expect("set at the start").snapshot().all {
                if worker.gate.state() != breaker::State::Open {
                    self.not_open_at.lock().insert(worker.index, Instant::now());
                }
            }
            tokio::time::sleep(LOOKS_EVERY).await;
        }
    }

    /// A moment that the worker's breaker has opened after, if it is open or has just been.
    fn opened_after(&self, worker: WorkerId) -> Instant {
        let seen = self.not_open_at.lock().get(&worker).copied();
        // Half-open before and now: the last look says nothing of when it was open.
        seen.filter(|at| at.elapsed() > LOOKS_EVERY).unwrap_or_else(|| Instant::now() - FOREVER)
    }
}

impl Policy for Watched {
    fn pick(
        &self,
        request: &routing::Request<'_>,
        targets: &[Arc<Target>],
        draw: &mut fastrand::Rng,
        weighed: Option<&mut Weighed>,
    ) -> Result<Pick, PickError> {
        self.policy.pick(request, targets, draw, weighed)
    }

    fn input_tokens(&self, request: &routing::Request<'_>) -> Option<u32> {
        self.policy.input_tokens(request)
    }

    fn matched_tokens(&self, request: &routing::Request<'_>, worker: WorkerId) -> Option<u32> {
        self.policy.matched_tokens(request, worker)
    }

    fn sent(
        &self,
        request: &routing::Request<'_>,
        target: &Arc<Target>,
    ) -> Option<Box<dyn Underway>> {
        let worker = target.id;
        let snapshot: Arc<Snapshot> = self.workers.get().expect("set at the start").snapshot();
        let picked = snapshot.all.iter().find(|known| known.index == worker);
        let fault = match picked {
            None => Some("is gone"),
            Some(picked) if picked.state() != State::Healthy => Some("is not healthy"),
            Some(picked) => match picked.gate.state() {
                breaker::State::Closed => None,
                breaker::State::Open => Some("has its breaker open"),
                breaker::State::HalfOpen => {
                    let is_early =
                        self.opened_after(worker) + self.breaker_timeout > Instant::now();
                    is_early.then_some("had its breaker open a moment ago")
                }
            },
        };
        self.faults.lock().extend(fault.map(|fault| format!("worker {worker} {fault}")));
        self.policy.sent(request, target)
    }

    fn forget(&self, worker: WorkerId) {
        self.policy.forget(worker);
    }
}
