//! What happens in one simulated run, drawn from its seed before it begins.

use std::time::Duration;

use hyper::StatusCode;

use crate::routing::PolicyKind;

/// How long clients go on asking; runs last longer, until all has ended.
const ASKING_MS: u64 = 40_000;

#[derive(Debug)]
pub struct Plan {
    pub flags: Vec<String>,
    /// Workers of the start; others join.
    pub workers: usize,
    pub events: Vec<Event>,
    pub asks: Vec<Ask>,
}

/// Something happens to a worker, by its number.
#[derive(Clone, Copy, Debug)]
pub struct Event {
    pub at: Duration,
    pub worker: usize,
    pub what: What,
}

#[derive(Clone, Copy, Debug)]
pub enum What {
    Joins,
    Leaves,
    /// Its process ends, and with it every connection.
    Dies,
    /// A new process at the same address.
    Starts,
    /// Answers nothing, and takes no connection either.
    Hangs,
    Answers(StatusCode),
    Recovers,
}

/// One client with one request.
#[derive(Clone, Debug)]
pub struct Ask {
    pub at: Duration,
    pub id: String,
    pub stream: bool,
    /// Events of the answer, or nothing of the kind without a stream.
    pub chunks: u32,
    pub body_bytes: usize,
    pub manner: Manner,
}

#[derive(Clone, Copy, Debug)]
pub enum Manner {
    Patient,
    /// Waits so long before it reads on.
    Slow(Duration),
    /// Closes its connection after so long, wherever the answer is.
    Leaves(Duration),
    /// Sends further bytes behind its request, and then leaves.
    LeavesBehind(Duration),
    /// Somebody aborts the request by its id after so long.
    Aborted(Duration),
}

impl Plan {
    pub fn draw(seed: u64) -> Self {
        let mut rng = fastrand::Rng::with_seed(seed);
        let workers = rng.usize(1..=5);
        let mut events = Vec::new();
        for _ in 0..rng.usize(0..12) {
            let at = millis(rng.u64(0..ASKING_MS));
            let worker = rng.usize(0..workers);
            let after = at + millis(rng.u64(1..15_000));
            let (what, then) = match rng.u8(0..8) {
                0 | 1 => (What::Dies, What::Starts),
                2 => (What::Hangs, What::Recovers),
                3 => (What::Answers(StatusCode::INTERNAL_SERVER_ERROR), What::Recovers),
                4 => (What::Answers(StatusCode::TOO_MANY_REQUESTS), What::Recovers),
                5 => (What::Answers(StatusCode::SERVICE_UNAVAILABLE), What::Recovers),
                6 => (What::Leaves, What::Joins),
                _ => (What::Answers(StatusCode::BAD_REQUEST), What::Recovers),
            };
            events.push(Event { at, worker, what });
            events.push(Event { at: after, worker, what: then });
        }
        for worker in workers..workers + rng.usize(0..3) {
            events.push(Event { at: millis(rng.u64(0..ASKING_MS)), worker, what: What::Joins });
        }
        events.sort_by_key(|event| event.at);
        let asks = (0..rng.usize(5..40)).map(|number| Ask::draw(number, &mut rng)).collect();
        Self { flags: flags(seed, &mut rng), workers, events, asks }
    }

    /// Workers there will have been.
    pub fn all_workers(&self) -> usize {
        let joining = self.events.iter().map(|event| event.worker + 1).max();
        joining.unwrap_or(0).max(self.workers)
    }
}

impl Ask {
    fn draw(number: usize, rng: &mut fastrand::Rng) -> Self {
        let a_while = |rng: &mut fastrand::Rng| millis(rng.u64(0..3_000));
        Self {
            at: millis(rng.u64(0..ASKING_MS)),
            id: format!("r{number}"),
            stream: rng.bool(),
            chunks: rng.u32(1..30),
            body_bytes: rng.usize(0..3_000),
            manner: match rng.u8(0..10) {
                0 => Manner::Slow(millis(rng.u64(1..4_000))),
                1 | 2 => Manner::Leaves(a_while(rng)),
                3 => Manner::LeavesBehind(a_while(rng)),
                4 => Manner::Aborted(a_while(rng)),
                _ => Manner::Patient,
            },
        }
    }
}

fn flags(seed: u64, rng: &mut fastrand::Rng) -> Vec<String> {
    let policies: Vec<_> = PolicyKind::ALL.iter().map(|policy| policy.name()).collect();
    let mut flag = |name: &str, values: &[&str]| {
        let value = values[rng.usize(0..values.len())];
        if value.is_empty() { None } else { Some(format!("--{name}={value}")) }
    };
    let drawn = [
        flag("policy", &policies),
        flag("max-concurrent-requests", &["", "", "1", "3", "8"]),
        flag("queue-size", &["", "0", "2"]),
        flag("queue-timeout-secs", &["", "1", "5"]),
        flag("rate-limit-tokens-per-second", &["", "", "", "2"]),
        flag("max-buffered-bytes", &["", "", "5000"]),
        flag("request-timeout-secs", &["5", "30", "60"]),
        flag("stream-stall-timeout-secs", &["1", "3", "60"]),
        flag("retry-max-retries", &["1", "2", "5"]),
        flag("disable-retries", &["", "", "", "true"]),
        flag("cb-failure-threshold", &["1", "2", "10"]),
        flag("cb-success-threshold", &["1", "2"]),
        flag("cb-timeout-duration-secs", &["1", "5", "60"]),
        flag("disable-circuit-breaker", &["", "", "true"]),
        flag("health-check-interval-secs", &["5", "60"]),
        flag("health-check-timeout-secs", &["1", "5"]),
        flag("health-failure-threshold", &["1", "3"]),
        flag("disable-health-check", &["", "", "", "true"]),
        flag("max-trace-entries", &["", "", "10"]),
    ];
    let fixed = [format!("--seed={seed}"), "--enable-request-tracking".to_owned()];
    fixed.into_iter().chain(drawn.into_iter().flatten()).collect()
}

pub fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}
