//! What `/metrics` shows of things that are there anyway, read when somebody asks.

use std::collections::HashSet;
use std::sync::atomic::Ordering;

use super::App;
use crate::telemetry::metrics::labels::{
    BuildLabels, CheckLabels, Http, OutcomeLabels, PoolLabels, Regular, TransitionLabels,
    WorkerLabels, WorkerStateLabels,
};
use crate::telemetry::metrics::{NO_MODEL, Reading};
use crate::tracking::Tracker;
use crate::workers::breaker::State;
use crate::workers::{Worker, Workers};

pub(super) async fn read(app: &App) -> Reading {
    let reading = Reading::new(&app.options.metrics);
    read_workers(&app.workers, &reading);
    reading.queue_depth.set(whole(app.admission.waiting() as u64));
    reading.buffered_bytes.set(whole(app.budget.taken()));
    if let Some(tracker) = &app.tracker {
        read_tracker(tracker, &reading);
    }
    let build = BuildLabels { version: env!("CARGO_PKG_VERSION"), policy: app.policy_name };
    reading.build_info.get_or_create(&build).set(1);
    read_descriptors(&reading).await;
    reading
}

fn read_workers(workers: &Workers, reading: &Reading) {
    let all = &workers.snapshot().all;
    let mut urls = HashSet::with_capacity(all.len());
    for worker in all.iter().rev() {
        let labels = WorkerLabels { worker: worker.url.as_str().into() };
        let in_flight = i64::from(worker.target.in_flight());
        reading.requests_active.get_or_create(&labels).inc_by(in_flight);
        reading.running.get_or_create(&labels).inc_by(in_flight);
        // Of two workers of one URL the older one is on its way out, and the newer one's counts begin anew.
        if urls.insert(worker.url.as_str()) {
            read_worker(worker, &labels, reading);
            read_breaker(worker, &labels, reading);
        }
    }
    for (result, count) in ["success", "failure"].into_iter().zip(workers.checks()) {
        let labels = CheckLabels { worker_type: Regular, result };
        reading.checks.get_or_create(&labels).inc_by(count);
    }
}

fn read_worker(worker: &Worker, labels: &WorkerLabels, reading: &Reading) {
    let info = worker.info();
    let model = info.as_ref().and_then(|info| info.model_id.as_deref()).unwrap_or(NO_MODEL);
    let pool = PoolLabels { worker_type: Regular, connection_mode: Http, model: model.into() };
    reading.pool_size.get_or_create(&pool).inc();
    reading.health.get_or_create(labels).set(i64::from(worker.is_routable()));
    let (prompt_tokens, cached_tokens) = worker.cache.tokens();
    for (counters, count) in [
        (&reading.processed, worker.served.load(Ordering::Relaxed)),
        (&reading.failed, worker.failed.load(Ordering::Relaxed)),
        (&reading.attempts, worker.picked.load(Ordering::Relaxed)),
        (&reading.prompt_tokens, prompt_tokens),
        (&reading.cached_tokens, cached_tokens),
    ] {
        counters.get_or_create(labels).inc_by(count);
    }
    let state = WorkerStateLabels {
        worker: labels.worker.clone(),
        node_id: worker.node_id().unwrap_or_default().into(),
        state: worker.state().name(),
    };
    reading.worker_state.get_or_create(&state).set(1);
}

fn read_breaker(worker: &Worker, labels: &WorkerLabels, reading: &Reading) {
    let (failures, successes) = worker.gate.streaks();
    reading.breaker_state.get_or_create(labels).set(match worker.gate.state() {
        State::Closed => 0,
        State::Open => 1,
        State::HalfOpen => 2,
    });
    reading.breaker_failures.get_or_create(labels).set(failures.into());
    reading.breaker_successes.get_or_create(labels).set(successes.into());
    let counts = worker.gate.counts();
    for (outcome, count) in [("success", counts.successes), ("failure", counts.failures)] {
        let labels = OutcomeLabels { worker: labels.worker.clone(), outcome };
        reading.breaker_outcomes.get_or_create(&labels).inc_by(count);
    }
    const STATES: [State; 3] = [State::Closed, State::Open, State::HalfOpen];
    for from in STATES {
        for to in STATES.into_iter().filter(|to| *to != from) {
            let labels = TransitionLabels {
                worker: labels.worker.clone(),
                from: from.name(),
                to: to.name(),
            };
            let count = counts.transitions[from as usize][to as usize];
            reading.breaker_transitions.get_or_create(&labels).inc_by(count);
        }
    }
}

fn read_tracker(tracker: &Tracker, reading: &Reading) {
    let stats = tracker.stats();
    reading.traces_held.now().set(whole(stats.active_traces));
    reading.traces_bytes.now().set(whole(stats.memory_bytes as u64));
    reading.traces_evicted.now().inc_by(stats.evicted);
    reading.traces_expired.now().inc_by(stats.expired);
    if tracker.options().trace_log.is_some() {
        reading.trace_log_written.now().inc_by(tracker.log_written());
        reading.trace_log_lost.now().inc_by(tracker.log_lost());
    }
}

/// Nothing is said where the system does not tell.
async fn read_descriptors(reading: &Reading) {
    // Thousands of entries take a while to list.
    let open =
        tokio::task::spawn_blocking(|| std::fs::read_dir("/proc/self/fd").map(Iterator::count));
    if let Ok(Ok(open)) = open.await {
        // The list itself was one of them.
        reading.open_fds.now().set(whole(open.saturating_sub(1) as u64));
    }
    if let Ok((soft, _)) = rlimit::Resource::NOFILE.get() {
        reading.max_fds.now().set(whole(soft));
    }
}

fn whole(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}
