//! A router on a free port, stopped when the test ends.

use std::net::SocketAddr;
use std::time::Duration;

use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::Value;
use sglang_router_rs::options::{self, Options};
use sglang_router_rs::routing::{self, own::load_nothing};
use sglang_router_rs::running::Running;

use super::{Message, ScriptedWorker, Wire, request, until};

pub struct Router {
    /// None only while it is being dropped.
    running: Option<Running>,
    pub address: SocketAddr,
}

impl Router {
    /// Starts a router in front of these workers, with request tracking, in turn unless `flags` say otherwise.
    pub fn start(worker_urls: &[&str], flags: &[&str]) -> Router {
        let ours = ["--enable-request-tracking", "--policy=round_robin", "--worker-threads=2"];
        let mut argv: Vec<String> = ["--port=0", "--log-level=off"]
            .iter()
            .chain(&ours)
            .map(|flag| (*flag).to_owned())
            .collect();
        argv.extend(worker_urls.iter().map(|url| format!("--worker-urls={url}")));
        argv.extend(flags.iter().map(|flag| (*flag).to_owned()));
        let named = std::iter::once("launch".to_owned()).chain(argv.iter().cloned());
        let matches = options::command().try_get_matches_from(named).expect("flags");
        let options =
            Options::from_command_line(&matches, &argv, std::iter::empty(), &[]).expect("options");
        // Starting blocks for a moment, which a test's own runtime does not allow.
        let policy = routing::build(&options.routing, &load_nothing).expect("the router's own");
        let start = || Running::start(options, policy);
        let running = std::thread::spawn(start).join().expect("no panic");
        let running = running.expect("a free port");
        Router { address: running.address(), running: Some(running) }
    }

    /// The same, once so many workers may be picked.
    pub async fn ready(worker_urls: &[&str], flags: &[&str]) -> Router {
        let router = Router::start(worker_urls, flags);
        router.until_healthy(worker_urls.len()).await;
        // So that no connection is in use but for what a test asks for.
        router.until_told().await;
        router
    }

    /// The same, in front of scripted workers.
    pub async fn before(workers: &[ScriptedWorker], flags: &[&str]) -> Router {
        let urls: Vec<&str> = workers.iter().map(|worker| worker.url.as_str()).collect();
        Router::ready(&urls, flags).await
    }

    /// Waits until every healthy worker has told about itself.
    pub async fn until_told(&self) {
        until("workers that have told about themselves", async || {
            let workers = self.get("/workers").await.json();
            let told = workers["workers"].as_array().is_some_and(|workers| {
                workers
                    .iter()
                    .all(|worker| worker["is_healthy"] == false || worker["model_id"].is_string())
            });
            told.then_some(())
        })
        .await;
    }

    /// Waits until exactly so many workers may be picked.
    pub async fn until_healthy(&self, count: usize) {
        until("healthy workers", async || {
            let ready = self.get("/readiness").await.json();
            let healthy = ready["healthy_workers"].as_u64().unwrap_or(0);
            (healthy == count as u64).then_some(())
        })
        .await;
    }

    pub async fn connect(&self) -> Wire {
        Wire::connect(self.address).await
    }

    /// One request on a connection of its own.
    pub async fn ask(&self, request: impl AsRef<[u8]>) -> Message {
        self.connect().await.ask(request).await
    }

    pub async fn get(&self, path: &str) -> Message {
        self.ask(request(&format!("GET {path}"), &[("connection", "close")], "")).await
    }

    pub async fn post(&self, path: &str, body: impl AsRef<[u8]>) -> Message {
        let headers = [("content-type", "application/json"), ("connection", "close")];
        self.ask(request(&format!("POST {path}"), &headers, body)).await
    }

    /// A JSON answer with status 200.
    pub async fn json(&self, path: &str) -> Value {
        let answer = self.get(path).await;
        assert_eq!(answer.status(), 200, "{path}: {}", answer.text());
        answer.json()
    }

    /// The trace of a request as it is now.
    pub async fn trace_now(&self, id: &str) -> Value {
        self.json(&format!("/v1/traces/{}", encoded(id))).await
    }

    /// The trace of a request, once it is there and has this status.
    pub async fn trace_when(&self, id: &str, status: &str) -> Value {
        until(&format!("trace {id:?} to be {status}"), async || {
            let answer = self.get(&format!("/v1/traces/{}", encoded(id))).await;
            (answer.status() == 200 && answer.json()["status"] == status).then(|| answer.json())
        })
        .await
    }

    /// The one worker with this URL, as `GET /workers` shows it.
    pub async fn worker(&self, url: &str) -> Value {
        self.json(&format!("/workers/{}", encoded(url))).await
    }

    /// Requests in flight at each worker, in order of joining.
    pub async fn loads(&self) -> Vec<u64> {
        let workers = self.json("/workers").await;
        let workers = workers["workers"].as_array().expect("workers").clone();
        workers.iter().map(|worker| worker["load"].as_u64().expect("a count")).collect()
    }

    /// Waits until nothing is in flight at any worker, and says how many each has served and failed.
    pub async fn until_idle(&self) -> Vec<(String, u64, u64)> {
        until("nothing in flight", async || {
            let workers = self.json("/workers").await;
            let workers = workers["workers"].as_array().expect("workers").clone();
            workers.iter().all(|worker| worker["load"] == 0).then(|| {
                let count = |worker: &Value, name: &str| worker[name].as_u64().expect("a count");
                let summary = |worker: &Value| {
                    let url = worker["url"].as_str().expect("url").to_owned();
                    (url, count(worker, "served"), count(worker, "failed"))
                };
                workers.iter().map(summary).collect()
            })
        })
        .await
    }

    /// Tells the router to take nothing new and to end when what it has is done.
    pub fn drain(&self) {
        self.running().drain(None);
    }

    /// Tells the router to cut everything.
    pub fn stop(&self) {
        self.running().stop();
    }

    /// Whether it has ended.
    pub fn has_ended(&self) -> bool {
        let wait = || self.running().wait(Duration::ZERO);
        // Ending may block, see `drop`.
        std::thread::scope(|scope| scope.spawn(wait).join().expect("no panic"))
    }

    fn running(&self) -> &Running {
        self.running.as_ref().expect("not being dropped")
    }

    /// Whether the router still does its work, whatever was done to it.
    pub async fn assert_alive(&self) {
        assert_eq!(self.get("/health").await.status(), 200);
    }
}

impl Drop for Router {
    fn drop(&mut self) {
        let running = self.running.take();
        // Ending blocks for a moment, which a test's own runtime does not allow.
        let ended = std::thread::spawn(move || drop(running)).join();
        assert!(ended.is_ok() || std::thread::panicking(), "the router panicked at its end");
    }
}

pub fn encoded(text: &str) -> String {
    utf8_percent_encode(text, NON_ALPHANUMERIC).to_string()
}
