//! One simulated worker: its engine on the wall clock, and the requests that wait for it.
//!
//! The one idea: one driver task per worker sleeps until the engine's next event and publishes what
//! changed. A request watches a single cell with the progress of its parts, so many tokens that
//! fall due at once cost one wake-up, a slow reader costs no memory, and no request has a timer.
//!
//! Invariant: the engine is touched only under the lock and only after it was brought up to now. A
//! [`Job`] that is dropped has left the engine.
//!
//! Not here: HTTP, and the shapes of answers.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use hashbrown::HashMap;
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use super::Options;
use super::engine::{Engine, Event, Id, Load, Sequence};
use super::faults::Faults;
use super::kv_cache::pages;
use super::tokens;

/// The longest the driver sleeps, in seconds: keeps very late events within the timer's range.
const LONGEST_SLEEP_SECS: f64 = 3600.0;

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// It generated all tokens asked for.
    Length,
    /// `/abort_request` ended it.
    Abort,
}

/// How far one prompt of a request has come.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Progress {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Of these, found in the cache; 0 before prefill ends.
    pub cached_tokens: usize,
    /// Tokens generated so far; of a stream those of whole frames until it ends.
    pub completion_tokens: usize,
    /// Simulated seconds spent waiting for prefill to start.
    pub queue_secs: f64,
    /// Simulated seconds from submission to the end; 0 before.
    pub e2e_secs: f64,
    /// How it ended, if it has.
    pub finish: Option<Finish>,
}

/// What a request asks of the model.
#[derive(Clone, Debug, PartialEq)]
pub struct Work {
    /// The parts: one prompt each, in tokens.
    pub prompts: Vec<Vec<u32>>,
    /// Tokens to generate for each.
    pub output_tokens: usize,
    /// Whether the client wants to see each token as it comes.
    pub stream: bool,
}

/// Totals since start, as `/sim/stats` tells them.
#[derive(Clone, Copy, Debug, Default)]
pub struct Totals {
    /// Prompt tokens of all prefills.
    pub prompt_tokens: u64,
    /// Of these, found in the cache.
    pub cached_tokens: u64,
}

/// A simulated worker. Shared by its connections and its driver.
#[derive(Debug)]
pub struct Worker {
    /// The port it listens on.
    pub port: u16,
    /// The GPU it says it is on.
    pub base_gpu_id: Option<u32>,
    /// How it was set up.
    pub options: Options,
    /// Another one at each start, as the seed that SGLang draws.
    pub random_seed: u32,
    started: Instant,
    state: Mutex<State>,
    /// Tells the driver that the engine's next event may have changed.
    changed: Notify,
    faults: watch::Sender<Faults>,
    draws: Mutex<fastrand::Rng>,
    served: AtomicU64,
}

#[derive(Debug)]
struct State {
    engine: Engine,
    /// One per request in the engine.
    outlets: HashMap<Id, Outlet>,
    totals: Totals,
    /// Reused by each advance; holds at most one advance's events.
    events: Vec<Event>,
}

/// Where the progress of one part goes.
#[derive(Debug)]
struct Outlet {
    parts: Arc<watch::Sender<Vec<Progress>>>,
    part: usize,
    rid: String,
    stream: bool,
    stream_interval: usize,
    output_tokens: usize,
    submitted_at: f64,
}

impl Outlet {
    fn publish(&self, update: impl FnOnce(&mut Progress)) {
        self.parts.send_modify(|parts| update(&mut parts[self.part]));
    }

    /// Publishes as many of the tokens made as frames tell, waking the request only if there is a frame to tell.
    fn publish_tokens(&self, made: usize) {
        let told = made - made.saturating_sub(1) % self.stream_interval;
        self.parts.send_if_modified(|parts| {
            let known = &mut parts[self.part].completion_tokens;
            std::mem::replace(known, told) != told
        });
    }
}

impl Worker {
    /// The `index`-th worker of a process, idle. Its clock starts now.
    pub fn new(options: Options, port: u16, index: u32) -> Self {
        let state = State {
            engine: Engine::new(options.hardware.engine()),
            outlets: HashMap::new(),
            totals: Totals::default(),
            events: Vec::new(),
        };
        Self {
            port,
            base_gpu_id: options.base_gpu_id.map(|first| first.saturating_add(index)),
            random_seed: fastrand::u32(..1 << 30),
            started: Instant::now(),
            state: Mutex::new(state),
            changed: Notify::new(),
            faults: watch::Sender::new(options.faults.clone()),
            // Workers of one process must not fail in step.
            draws: Mutex::new(fastrand::Rng::with_seed(
                options.seed.wrapping_add(u64::from(index)),
            )),
            served: AtomicU64::new(0),
            options,
        }
    }

    /// Moves the engine along with the wall clock, for ever.
    pub async fn drive(self: Arc<Self>) {
        loop {
            let due = self.state.lock().catch_up(self.now());
            let changed = self.changed.notified();
            match due {
                None => changed.await,
                Some(at) => {
                    tokio::select! {
                        () = changed => {}
                        () = tokio::time::sleep_until(self.instant(at)) => {}
                    }
                }
            }
        }
    }

    /// Hands a request to the engine; part `i` is known as `rids[i]`.
    pub fn submit(self: &Arc<Self>, work: Work, rids: &[String]) -> Job {
        let progress =
            |prompt: &Vec<u32>| Progress { prompt_tokens: prompt.len(), ..Progress::default() };
        let (parts, receiver) = watch::channel(work.prompts.iter().map(progress).collect());
        let parts = Arc::new(parts);
        let page_tokens = self.options.hardware.page_tokens as usize;
        let sequence = |prompt: &Vec<u32>| sequence(prompt, work.output_tokens, page_tokens);
        let sequences: Vec<_> = work.prompts.iter().map(sequence).collect();
        let ids = self.at_now(|state, now| {
            let submit = |(part, sequence): (usize, Sequence)| {
                let outlet = Outlet {
                    parts: Arc::clone(&parts),
                    part,
                    rid: rids.get(part).cloned().unwrap_or_default(),
                    stream: work.stream,
                    stream_interval: self.options.stream_interval as usize,
                    output_tokens: sequence.output_tokens,
                    submitted_at: now,
                };
                let id = state.engine.submit(sequence);
                state.outlets.insert(id, outlet);
                id
            };
            sequences.into_iter().enumerate().map(submit).collect()
        });
        Job { worker: Arc::clone(self), ids, parts: receiver }
    }

    /// Ends requests early: those whose id begins with `rid`, as in SGLang, or all.
    pub fn abort(&self, rid: Option<&str>) {
        self.at_now(|state, now| {
            let meant = |outlet: &Outlet| rid.is_none_or(|rid| outlet.rid.starts_with(rid));
            let ids: Vec<_> =
                state.outlets.iter().filter(|(_, o)| meant(o)).map(|(id, _)| *id).collect();
            let made: HashMap<_, _> = state.engine.decoding().collect();
            for id in &ids {
                state.engine.cancel(*id);
                state.end(*id, now, made.get(id).copied().unwrap_or(0), Finish::Abort);
            }
        });
    }

    /// Empties the KV cache.
    pub fn flush_cache(&self) {
        self.at_now(|state, _| state.engine.flush_cache());
    }

    /// How busy the engine is, with the most requests that ran at once and the totals.
    pub fn load(&self) -> (Load, usize, Totals) {
        self.at_now(|state, _| (state.engine.load(), state.engine.max_running_seen(), state.totals))
    }

    /// Counts a request that was answered.
    pub fn count_served(&self) {
        self.served.fetch_add(1, Relaxed);
    }

    /// Requests answered.
    pub fn served(&self) -> u64 {
        self.served.load(Relaxed)
    }

    /// The faults in force.
    pub fn faults(&self) -> Faults {
        self.faults.borrow().clone()
    }

    /// Changes the faults as a JSON object asks; returns those now in force.
    pub fn change_faults(&self, json: &[u8]) -> Result<Faults, String> {
        let mut outcome = Ok(());
        self.faults.send_if_modified(|faults| {
            outcome = faults.changed(json).map(|changed| *faults = changed);
            outcome.is_ok()
        });
        outcome.map(|()| self.faults())
    }

    /// Waits while the worker hangs.
    pub async fn responsive(&self) {
        // An error would mean that the worker, which holds the sender, is gone.
        let _ = self.faults.subscribe().wait_for(|faults| !faults.hang).await;
    }

    /// The next random number from 0 to 1.
    pub fn draw(&self) -> f64 {
        self.draws.lock().f64()
    }

    /// The simulated second it is.
    fn now(&self) -> f64 {
        self.started.elapsed().as_secs_f64() * self.options.speed
    }

    /// When a simulated second is on the wall clock.
    fn instant(&self, at: f64) -> Instant {
        let from_now = (at - self.now()) / self.options.speed;
        Instant::now() + Duration::from_secs_f64(from_now.clamp(0.0, LONGEST_SLEEP_SECS))
    }

    /// Does something to the engine at this moment.
    fn at_now<R>(&self, change: impl FnOnce(&mut State, f64) -> R) -> R {
        let mut state = self.state.lock();
        let now = self.now();
        state.advance(now);
        let result = change(&mut state, now);
        drop(state);
        self.changed.notify_one();
        result
    }
}

/// A prompt as the engine sees it.
fn sequence(prompt: &[u32], output_tokens: usize, page_tokens: usize) -> Sequence {
    let (_, answer) = tokens::output(output_tokens);
    let pages = pages(prompt.iter().chain(answer).copied(), page_tokens);
    Sequence { pages, prompt_tokens: prompt.len(), output_tokens: answer.len() }
}

impl State {
    /// Brings engine and watchers up to `now`; returns when there is more to publish.
    fn catch_up(&mut self, now: f64) -> Option<f64> {
        self.advance(now);
        let event = self.engine.next_event();
        match self.publish_streams() {
            false => event,
            true => [event, self.engine.next_token()].into_iter().flatten().reduce(f64::min),
        }
    }

    fn advance(&mut self, now: f64) {
        let mut events = std::mem::take(&mut self.events);
        self.engine.advance(now, &mut events);
        for event in events.drain(..) {
            match event {
                Event::Prefilled { id, cached_tokens, queue_secs, .. } => {
                    self.prefilled(id, cached_tokens, queue_secs);
                }
                Event::Finished { id, at } => self.end(id, at, usize::MAX, Finish::Length),
            }
        }
        self.events = events;
    }

    /// Publishes the tokens of streamed requests; returns whether there are such.
    fn publish_streams(&self) -> bool {
        let mut any = false;
        for (id, made) in self.engine.decoding() {
            if let Some(outlet) = self.outlets.get(&id).filter(|outlet| outlet.stream) {
                outlet.publish_tokens(made);
                any = true;
            }
        }
        any
    }

    fn prefilled(&mut self, id: Id, cached_tokens: usize, queue_secs: f64) {
        let Some(outlet) = self.outlets.get(&id) else {
            return;
        };
        outlet.publish(|progress| {
            progress.cached_tokens = cached_tokens;
            progress.completion_tokens = outlet.output_tokens.min(1);
            progress.queue_secs = queue_secs;
            self.totals.prompt_tokens += progress.prompt_tokens as u64;
            self.totals.cached_tokens += cached_tokens as u64;
        });
    }

    /// A request ended with `made` tokens, or all it asked for if that is less.
    fn end(&mut self, id: Id, at: f64, made: usize, finish: Finish) {
        let Some(outlet) = self.outlets.remove(&id) else {
            return;
        };
        outlet.publish(|progress| {
            progress.completion_tokens = made.min(outlet.output_tokens);
            progress.e2e_secs = at - outlet.submitted_at;
            progress.finish = Some(finish);
        });
    }
}

/// A request in the engine. Dropping it frees its places.
#[derive(Debug)]
pub struct Job {
    worker: Arc<Worker>,
    ids: Vec<Id>,
    parts: watch::Receiver<Vec<Progress>>,
}

impl Job {
    /// The worker that does it.
    pub fn worker(&self) -> &Worker {
        &self.worker
    }

    /// How far the parts have come; holds up the driver, so not across an await.
    pub fn parts(&mut self) -> watch::Ref<'_, Vec<Progress>> {
        self.parts.borrow_and_update()
    }

    /// Waits until there is something new to see.
    pub async fn changed(&mut self) {
        // An error means that all parts have ended, which is all there is to see.
        let _ = self.parts.changed().await;
    }

    /// Waits for the end of all parts.
    pub async fn done(&mut self) -> Vec<Progress> {
        let ended = |parts: &Vec<Progress>| parts.iter().all(|part| part.finish.is_some());
        match self.parts.wait_for(ended).await {
            Ok(parts) => parts.clone(),
            Err(_) => Vec::new(),
        }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        let ended = self.parts.borrow().iter().all(|part| part.finish.is_some());
        if ended {
            return;
        }
        self.worker.at_now(|state, _| {
            for id in &self.ids {
                state.engine.cancel(*id);
                state.outlets.remove(id);
            }
        });
    }
}
