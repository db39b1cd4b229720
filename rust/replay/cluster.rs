//! A trace through one policy and simulated workers, in virtual time.
//!
//! The one idea: a router and its workers are a row of events. The next one is the end of a prefill or
//! of an answer at some worker, a worker that is lost or back, or a request that arrives, whichever
//! is earliest; time jumps from one to the next. The policy is the router's own, asked and told as the
//! router does it: a request is picked for, counted in flight, sent; its first token and its end come back
//! to what the policy keeps of it.
//!
//! What a lost worker had in hand ends there. What had not begun to answer is sent again at once to
//! another worker, as the router does; the rest has failed. A lost worker is not picked.
//!
//! Invariant: the outcomes are a function of trace, setup and policy. At the same time workers come
//! before arrivals.
//!
//! Not here: the router's queue, its breakers and its checks of workers, and the time that the network
//! takes.

use std::borrow::Cow;
use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;
use std::sync::Arc;
use std::sync::atomic::{self, AtomicUsize};

use hashbrown::HashMap;
use serde::Serialize;

use super::text::{Words, pages};
use super::trace::Trace;
use crate::routing::{
    BlockNames, Draws, InFlight, Policy, Replayed, Request, Target, Told, WorkerId, WorkerName,
};
use crate::sim::engine::{Config, Engine, Event, Id, Sequence};

/// Workers that a request is sent to at most: the router's `retry_max_retries`, unless it is set.
const ATTEMPTS_MAX: u32 = 5;

/// The workers, and what happens to them.
#[derive(Clone, Debug)]
pub struct Setup {
    /// One engine per worker, all with pages of the same size.
    pub engines: Vec<Config>,
    /// Whether workers tell how large their KV caches are.
    pub is_kv_told: bool,
    /// One per worker, under `fixed_probability`.
    pub weights: Vec<f64>,
    pub losses: Vec<Loss>,
    /// Of the policy's random draws.
    pub seed: u64,
}

/// A worker that dies.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Loss {
    /// Into [`Setup::engines`].
    pub worker: usize,
    pub at_secs: f64,
    /// When it is back, with nothing in its cache.
    pub back_at_secs: Option<f64>,
}

/// What became of a request. Times are seconds of the trace's clock.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    /// The worker it was sent to last.
    pub worker: Option<WorkerId>,
    /// Why the policy picked that one.
    pub reason: Option<&'static str>,
    /// Prompt tokens as the policy estimated them.
    pub input_tokens: Option<u32>,
    /// Prompt tokens that the policy believed to be in its cache.
    pub matched_tokens: Option<u32>,
    /// Workers it was sent to.
    pub attempts: u32,
    /// Prompt tokens that were in its cache.
    pub cached_tokens: Option<u32>,
    /// Seconds of prefill at that worker.
    pub prefill_secs: Option<f64>,
    /// When its first token was there.
    pub first_at_secs: Option<f64>,
    /// When its last token was there, or it failed.
    pub ended_at_secs: Option<f64>,
    /// Whether it failed because the policy did.
    pub is_policys: bool,
    /// Why it failed.
    pub error: Option<Cow<'static, str>>,
}

/// What becomes of each request of the trace. `ended` counts them as they end.
pub fn replay(
    trace: &Trace,
    setup: &Setup,
    policy: &dyn Policy,
    ended: &AtomicUsize,
) -> Vec<Outcome> {
    let mut run = Run::new(trace, setup, policy, ended);
    let changes = changes(&setup.losses);
    let (mut arrived, mut changed) = (0, 0);
    loop {
        let engine = run.next_due();
        let change = changes.get(changed).map(|change| change.at_secs);
        let arrival = trace.requests.get(arrived).map(|asked| asked.at_secs);
        let Some(now) = [engine, change, arrival].into_iter().flatten().min_by(f64::total_cmp)
        else {
            break;
        };
        if engine == Some(now) {
            run.advance_due();
        } else if change == Some(now) {
            let same = changes[changed..].iter().take_while(|change| change.at_secs == now);
            let same: Vec<_> = same.collect();
            changed += same.len();
            run.change(&same, now);
        } else {
            run.send(arrived, now);
            arrived += 1;
        }
    }
    run.finish()
}

/// A worker that goes or comes.
struct Change {
    at_secs: f64,
    worker: usize,
    is_back: bool,
}

fn changes(losses: &[Loss]) -> Vec<Change> {
    let of_loss = |loss: &Loss| {
        let Loss { worker, at_secs, back_at_secs } = *loss;
        let back = back_at_secs.map(|at_secs| Change { at_secs, worker, is_back: true });
        [Some(Change { at_secs, worker, is_back: false }), back]
    };
    let mut changes: Vec<_> = losses.iter().flat_map(of_loss).flatten().collect();
    changes.sort_by(|one, other| {
        one.at_secs.total_cmp(&other.at_secs).then(one.worker.cmp(&other.worker))
    });
    changes
}

/// When something happens at a worker's engine.
#[derive(Clone, Copy, PartialEq)]
struct Due {
    at_secs: f64,
    worker: usize,
}

impl Eq for Due {}

impl Ord for Due {
    fn cmp(&self, other: &Self) -> Ordering {
        self.at_secs.total_cmp(&other.at_secs).then(self.worker.cmp(&other.worker))
    }
}

impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

struct Worker {
    engine: Engine,
    target: Arc<Target>,
    /// What is in the engine.
    flights: HashMap<Id, Flight>,
    is_lost: bool,
}

/// A request at a worker.
struct Flight {
    /// Into the trace.
    request: usize,
    in_flight: InFlight,
    has_begun: bool,
}

struct Run<'a> {
    trace: &'a Trace,
    setup: &'a Setup,
    policy: &'a dyn Policy,
    ended: &'a AtomicUsize,
    draws: Draws,
    words: Words,
    workers: Vec<Worker>,
    /// Those that are not lost, in their order.
    routable: Vec<Arc<Target>>,
    /// Has each engine's next event. One that is not its engine's next any more is passed over; there
    /// is one for each thing that was done to an engine.
    due: BinaryHeap<Reverse<Due>>,
    /// One per request of the trace.
    outcomes: Vec<Outcome>,
    /// Reused: the prompt that is being sent, and the events of one engine.
    prompt: Vec<u8>,
    events: Vec<Event>,
}

impl<'a> Run<'a> {
    fn new(
        trace: &'a Trace,
        setup: &'a Setup,
        policy: &'a dyn Policy,
        ended: &'a AtomicUsize,
    ) -> Self {
        let worker = |(id, (config, weight)): (WorkerId, (&Config, &f64))| {
            let target = Arc::new(Target::new(id, *weight));
            target.set_name(Arc::new(WorkerName {
                index: id,
                url: format!("http://worker-{id}").into(),
                node_id: format!("worker_{id}").into(),
            }));
            target.set_kv_tokens(setup.is_kv_told.then_some(config.kv_tokens as u64));
            let engine = Engine::new(config.clone());
            Worker { engine, target, flights: HashMap::new(), is_lost: false }
        };
        let workers: Vec<_> =
            (0..).zip(setup.engines.iter().zip(&setup.weights)).map(worker).collect();
        Self {
            trace,
            setup,
            policy,
            ended,
            draws: Draws::new(Some(setup.seed)),
            words: Words::default(),
            routable: workers.iter().map(|worker| worker.target.clone()).collect(),
            workers,
            due: BinaryHeap::new(),
            outcomes: vec![Outcome::default(); trace.requests.len()],
            prompt: Vec::new(),
            events: Vec::new(),
        }
    }

    /// When the next event of any engine happens.
    fn next_due(&mut self) -> Option<f64> {
        while let Some(Reverse(due)) = self.due.peek() {
            if self.workers[due.worker].engine.next_event() == Some(due.at_secs) {
                return Some(due.at_secs);
            }
            self.due.pop();
        }
        None
    }

    /// Lets happen what [`Run::next_due`] told.
    fn advance_due(&mut self) {
        if let Some(Reverse(due)) = self.due.pop() {
            self.advance(due.worker, due.at_secs);
            self.note_due(due.worker);
        }
    }

    fn note_due(&mut self, worker: usize) {
        if let Some(at_secs) = self.workers[worker].engine.next_event() {
            self.due.push(Reverse(Due { at_secs, worker }));
        }
    }

    /// Brings an engine up to now.
    fn advance(&mut self, worker: usize, now: f64) {
        let mut events = std::mem::take(&mut self.events);
        self.workers[worker].engine.advance(now, &mut events);
        for event in events.drain(..) {
            match event {
                Event::Prefilled { id, at, cached_tokens, .. } => {
                    self.begun(worker, id, at, cached_tokens);
                }
                Event::Finished { id, at } => self.finished(worker, id, at),
            }
        }
        self.events = events;
    }

    /// Sends a request to a worker that the policy picks.
    fn send(&mut self, index: usize, now: f64) {
        if self.routable.is_empty() {
            return self.failed(index, now, "no worker was left".into());
        }
        let asked = &self.trace.requests[index];
        self.words.write(asked, &mut self.prompt);
        let (number, block_names) = (index.to_string(), BlockNames::default());
        let request = Request {
            prompt: &self.prompt,
            is_ids: false,
            stream: true,
            route: "/generate",
            model: None,
            routing_key: asked.routing_key.as_deref(),
            request_id: Some(&number),
            at_secs: now,
            block_names: Some(&block_names),
        };
        let pick = self.policy.pick(&request, &self.routable, &mut self.draws.next(), None);
        let input_tokens = self.policy.input_tokens(&request);
        let pick = match pick {
            Ok(pick) => pick,
            Err(error) => {
                self.outcomes[index].is_policys = true;
                return self.failed(index, now, error.detail.into());
            }
        };
        let target = self.routable[pick.index].clone();
        let mut in_flight = target.begin();
        in_flight.heard_by(self.policy.sent(&request, &target));
        let outcome = &mut self.outcomes[index];
        outcome.worker = Some(target.id);
        outcome.reason = Some(pick.reason);
        outcome.input_tokens = input_tokens;
        outcome.matched_tokens = pick.matched_tokens;
        outcome.attempts += 1;

        let worker = target.id as usize;
        self.advance(worker, now);
        let output_tokens = asked.output_tokens as usize;
        let page_tokens = self.setup.engines[worker].page_tokens;
        let id = self.workers[worker].engine.submit(Sequence {
            pages: pages(asked, output_tokens, page_tokens),
            prompt_tokens: asked.prompt_tokens as usize,
            output_tokens,
        });
        let flight = Flight { request: index, in_flight, has_begun: false };
        self.workers[worker].flights.insert(id, flight);
        self.note_due(worker);
    }

    fn begun(&mut self, worker: usize, id: Id, at: f64, cached_tokens: usize) {
        let Some(flight) = self.workers[worker].flights.get_mut(&id) else { return };
        flight.has_begun = true;
        flight.in_flight.begun(at);
        let asked = &self.trace.requests[flight.request];
        let outcome = &mut self.outcomes[flight.request];
        // Not more than the prompt has.
        let cached_tokens = cached_tokens as u32;
        let uncached = f64::from(asked.prompt_tokens - cached_tokens);
        outcome.cached_tokens = Some(cached_tokens);
        outcome.prefill_secs = Some(uncached / self.setup.engines[worker].prefill_rate);
        outcome.first_at_secs = Some(at);
    }

    fn finished(&mut self, worker: usize, id: Id, at: f64) {
        let Some(mut flight) = self.workers[worker].flights.remove(&id) else { return };
        let asked = &self.trace.requests[flight.request];
        let outcome = &mut self.outcomes[flight.request];
        outcome.ended_at_secs = Some(at);
        let told = Told {
            prompt_tokens: Some(asked.prompt_tokens),
            cached_tokens: outcome.cached_tokens,
            completion_tokens: Some(asked.output_tokens),
        };
        flight.in_flight.told(&told);
        flight.in_flight.answered(at);
        let request = flight.request;
        // No longer in flight when its end is told.
        drop(flight);
        self.over(request, at, told);
    }

    /// A request is over.
    fn over(&mut self, number: usize, ended_at_secs: f64, told: Told) {
        let (asked, outcome) = (&self.trace.requests[number], &self.outcomes[number]);
        let worker = outcome.worker.map(|worker| &self.workers[worker as usize].target);
        self.policy.replayed(&Replayed {
            number,
            worker: worker.and_then(|target| target.name()).map(|name| &**name),
            routing_key: asked.routing_key.as_deref(),
            arrived_at_secs: asked.at_secs,
            first_at_secs: outcome.first_at_secs,
            ended_at_secs,
            reason: outcome.reason,
            input_tokens: outcome.input_tokens,
            matched_tokens: outcome.matched_tokens,
            told,
            error: outcome.error.as_deref(),
        });
        self.ended.fetch_add(1, atomic::Ordering::Relaxed);
    }

    fn failed(&mut self, index: usize, now: f64, error: Cow<'static, str>) {
        let outcome = &mut self.outcomes[index];
        outcome.error = Some(error);
        outcome.ended_at_secs = Some(now);
        self.over(index, now, Told::default());
    }

    /// Workers go and come, all at the same moment; then what they had in hand finds its end.
    fn change(&mut self, changes: &[&Change], now: f64) {
        let mut in_hand = Vec::new();
        for change in changes {
            let worker = &mut self.workers[change.worker];
            worker.is_lost = !change.is_back;
            if change.is_back {
                continue;
            }
            worker.engine = Engine::new(self.setup.engines[change.worker].clone());
            let flights = worker.flights.drain().map(|(_, flight)| flight);
            in_hand.extend(flights.map(|flight| (flight.request, flight.has_begun)));
            self.policy.forget(worker.target.id);
        }
        let routable = self.workers.iter().filter(|worker| !worker.is_lost);
        self.routable = routable.map(|worker| worker.target.clone()).collect();
        in_hand.sort_unstable();
        for (request, has_begun) in in_hand {
            if has_begun {
                self.failed(request, now, "its worker was lost while it answered".into());
            } else if self.outcomes[request].attempts >= ATTEMPTS_MAX {
                self.failed(request, now, "its workers were lost".into());
            } else {
                self.send(request, now);
            }
        }
    }

    /// The outcomes, now that nothing more happens.
    fn finish(mut self) -> Vec<Outcome> {
        for outcome in &mut self.outcomes {
            if outcome.ended_at_secs.is_none() {
                outcome.error = Some("it takes longer than numbers can tell".into());
            }
        }
        self.outcomes
    }
}
