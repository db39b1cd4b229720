//! The store against a model that is a plain list, and under many threads.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::tracking::record::Status;
use crate::tracking::{Timestamp, WorkerName};

const TTL_US: u64 = 100;
const ROUTES: [&str; 2] = ["/generate", "/v1/completions"];

fn worker(index: u32) -> Arc<WorkerName> {
    let (url, node_id) = (format!("http://a:{index}"), format!("gpu_{index}"));
    Arc::new(WorkerName { index, url: url.into(), node_id: node_id.into() })
}

fn query(pairs: &[(&str, String)]) -> Query {
    Query::parse(pairs.iter().map(|(name, value)| (*name, value))).expect("a good query")
}

fn store(capacity: usize) -> Store {
    Store::new(capacity, TTL_US, "random", Arc::new(Context::new(None)))
}

fn with_shards(shards: usize, capacity: usize) -> Store {
    with_ttl(TTL_US, shards, capacity)
}

fn with_ttl(ttl_us: u64, shards: usize, capacity: usize) -> Store {
    Store::with_shards(shards, capacity, ttl_us, "random", Arc::new(Context::new(None)))
}

/// Where a request's own record is.
type Own = (Arc<Home>, Place);

/// As if one of the threads of `home` did.
fn open_in(store: &Store, home: usize, id: &str, route: &str, unix_us: i64, now_us: u64) -> Own {
    let home = &store.homes[home % store.homes.len()];
    (Arc::clone(home), store.open_in(home, id, route, unix_us, now_us))
}

/// The end of a request that had no worker.
fn end(own: &Own, to: Status) {
    end_at(own, to, 0);
}

fn end_at((home, place): &Own, to: Status, now_us: u64) {
    drop(home.end(*place, (Status::Queued, to), false, now_us, |_| {}));
}

fn stats(store: &Store, now_us: u64) -> Stats {
    let mut stats = Stats::new(None);
    store.add_to(&mut stats, now_us);
    stats
}

/// One request of the model, whether or not its record is held.
#[derive(Debug, Clone)]
struct Request {
    /// Arrival number and, as these tests open them, arrival time.
    seq: usize,
    id: String,
    route: &'static str,
    status: Status,
    worker: Option<u32>,
    ended_us: u64,
    /// Number of the step that last used it.
    used: usize,
    is_held: bool,
}

/// What the store should do, in the plainest way.
#[derive(Debug, Default)]
struct Model {
    requests: Vec<Request>,
    capacity: usize,
    now_us: u64,
    steps: usize,
    evicted: u64,
    expired: u64,
}

impl Model {
    fn held(&self) -> impl DoubleEndedIterator<Item = &Request> {
        self.requests.iter().filter(|request| request.is_held)
    }

    fn expire(&mut self) {
        for request in &mut self.requests {
            let is_over = request.status.is_ended() && request.ended_us + TTL_US <= self.now_us;
            if request.is_held && is_over {
                request.is_held = false;
                self.expired += 1;
            }
        }
    }

    fn open(&mut self, id: String, route: &'static str) {
        self.expire();
        if self.held().count() == self.capacity {
            let ended = self.held().filter(|request| request.status.is_ended());
            let victim = ended.min_by_key(|request| request.used).or_else(|| self.held().next());
            let seq = victim.expect("a full store holds something").seq;
            self.requests[seq].is_held = false;
            self.evicted += 1;
        }
        self.requests.push(Request {
            seq: self.requests.len(),
            id,
            route,
            status: Status::Queued,
            worker: None,
            ended_us: 0,
            used: 0,
            is_held: true,
        });
    }

    fn get(&mut self, id: &str) -> Option<(usize, Option<u32>)> {
        self.expire();
        let same_id = self.held().filter(|request| request.id == id).count() as u32;
        let seq = self.held().rfind(|request| request.id == id)?.seq;
        if self.requests[seq].status.is_ended() {
            self.requests[seq].used = self.steps;
        }
        Some((seq, (same_id > 1).then_some(same_id)))
    }

    fn count(
        &self,
        name: impl Fn(&Request) -> Option<String>,
        held: bool,
    ) -> BTreeMap<String, u64> {
        let mut counts = BTreeMap::new();
        for request in self.requests.iter().filter(|request| request.is_held || !held) {
            if let Some(name) = name(request) {
                *counts.entry(name).or_default() += 1;
            }
        }
        counts
    }
}

fn assert_same_stats(store: &Store, model: &mut Model) {
    model.expire();
    let stats = stats(store, model.now_us);
    let node = |request: &Request| request.worker.map(|index| format!("gpu_{index}"));
    let route = |request: &Request| Some(request.route.to_owned());
    let status = |request: &Request| Some(request.status.name().to_owned());
    let nonzero = |counts: &BTreeMap<&'static str, u64>| -> BTreeMap<String, u64> {
        assert_eq!(counts.len(), Status::ALL.len());
        let counts = counts.iter().filter(|(_, count)| **count > 0);
        counts.map(|(name, count)| ((*name).to_owned(), *count)).collect()
    };
    assert_eq!(stats.requests_per_node, model.count(node, false));
    assert_eq!(stats.node_distribution, model.count(node, true));
    assert_eq!(stats.requests_per_route, model.count(route, false));
    assert_eq!(stats.route_distribution, model.count(route, true));
    assert_eq!(nonzero(&stats.requests_per_status), model.count(status, false));
    assert_eq!(nonzero(&stats.status_distribution), model.count(status, true));
    assert_eq!(stats.total_requests, model.requests.len() as u64);
    assert_eq!(stats.active_traces, model.held().count() as u64);
    assert_eq!(stats.total_traces, stats.active_traces);
    assert_eq!((stats.evicted, stats.expired), (model.evicted, model.expired));
    let open = model.requests.iter().filter(|request| !request.status.is_ended());
    assert_eq!(stats.in_flight, open.count() as u64);
    let unrouted = |request: &&Request| request.status.is_ended() && request.worker.is_none();
    assert_eq!(stats.unrouted, model.requests.iter().filter(unrouted).count() as u64);
    let arrival = |request: &Request| Timestamp::from_unix_us(request.seq as i64);
    assert_eq!(stats.oldest_trace, model.held().next().map(arrival));
    assert_eq!(stats.newest_trace, model.held().next_back().map(arrival));
}

/// All that a query finds, page by page.
fn all_pages(store: &Store, query: &Query, now_us: u64) -> Vec<i64> {
    let mut query = query.clone();
    let mut seqs = Vec::new();
    loop {
        let page = store.list(&query, now_us);
        assert!(page.traces.len() <= query.page_size());
        assert!(page.next_cursor.is_none() || page.traces.len() == query.page_size());
        seqs.extend(page.traces.iter().map(|trace| trace.timestamp.unix_us()));
        query.cursor = page.next_cursor;
        if query.cursor.is_none() {
            return seqs;
        }
    }
}

#[derive(Debug, Clone)]
enum Step {
    Open { id: u8, route: usize, home: usize },
    Route { which: usize, worker: u32 },
    Headers { which: usize },
    End { which: usize, to: Status },
    Get { id: u8 },
    Wait { by_us: u64 },
    Expire,
    List { limit: usize, filter: usize, value: u32 },
}

fn step() -> impl Strategy<Value = Step> {
    let which = 0usize..64;
    let to = prop_oneof![Just(Status::Completed), Just(Status::Failed)];
    prop_oneof![
        5 => (0u8..6, 0usize..2, 0usize..8)
            .prop_map(|(id, route, home)| Step::Open { id, route, home }),
        3 => (which.clone(), 0u32..3).prop_map(|(which, worker)| Step::Route { which, worker }),
        1 => which.clone().prop_map(|which| Step::Headers { which }),
        4 => (which, to).prop_map(|(which, to)| Step::End { which, to }),
        3 => (0u8..6).prop_map(|id| Step::Get { id }),
        1 => (1u64..60).prop_map(|by_us| Step::Wait { by_us }),
        1 => Just(Step::Expire),
        1 => (1usize..4, 0usize..8, 0u32..6)
            .prop_map(|(limit, filter, value)| Step::List { limit, filter, value }),
    ]
}

/// A store and its model, taking the same steps.
struct Pair {
    store: Store,
    model: Model,
    owns: Vec<Own>,
}

impl Pair {
    fn new(capacity: usize, shards: usize) -> Pair {
        let store = with_shards(shards, capacity);
        Pair { store, model: Model { capacity, ..Model::default() }, owns: Vec::new() }
    }

    /// One of the open requests.
    fn pick(&self, which: usize) -> Option<usize> {
        let is_open = |request: &&Request| !request.status.is_ended();
        let open: Vec<usize> =
            self.model.requests.iter().filter(is_open).map(|request| request.seq).collect();
        (!open.is_empty()).then(|| open[which % open.len()])
    }

    fn take(&mut self, step: &Step) {
        self.model.steps += 1;
        match *step {
            Step::Open { id, route, home } => {
                let unix_us = self.model.requests.len() as i64;
                let id = format!("id-{id}");
                let now_us = self.model.now_us;
                let own = open_in(&self.store, home, &id, ROUTES[route], unix_us, now_us);
                self.owns.push(own);
                self.model.open(id, ROUTES[route]);
            }
            Step::Route { which, worker } => self.route(which, worker),
            Step::Headers { which } => {
                let Some(seq) = self.pick(which) else { return };
                let (request, (home, place)) = (&mut self.model.requests[seq], &self.owns[seq]);
                home.shard().advance(*place, (request.status, Status::Processing), |_| {});
                request.status = Status::Processing;
            }
            Step::End { which, to } => {
                let Some(seq) = self.pick(which) else { return };
                let (request, (home, place)) = (&mut self.model.requests[seq], &self.owns[seq]);
                let had_worker = request.worker.is_some();
                let now_us = self.model.now_us;
                drop(home.end(*place, (request.status, to), had_worker, now_us, |_| {}));
                request.status = to;
                request.ended_us = self.model.now_us;
                request.used = self.model.steps;
            }
            Step::Get { id } => {
                let id = format!("id-{id}");
                let found = self.store.get(&id, self.model.now_us);
                let found = found.map(|trace| (trace.timestamp.unix_us() as usize, trace.same_id));
                assert_eq!(found, self.model.get(&id));
            }
            Step::Wait { by_us } => self.model.now_us += by_us,
            Step::Expire => {
                self.model.expire();
                self.store.remove_expired(self.model.now_us);
                let held = self.store.taken.load(Ordering::Relaxed);
                assert_eq!(held, self.model.held().count());
            }
            Step::List { limit, filter, value } => self.list(limit, filter, value),
        }
    }

    fn route(&mut self, which: usize, index: u32) {
        let Some(seq) = self.pick(which) else { return };
        let (request, (home, place)) = (&mut self.model.requests[seq], &self.owns[seq]);
        let (from, to) = (request.worker.replace(index).map(worker), worker(index));
        let own = home.shard().route(*place, (from.as_ref(), request.status), &to, |_, _| {});
        assert_eq!(own, to);
        request.status = Status::Routed;
    }

    fn list(&mut self, limit: usize, filter: usize, value: u32) {
        self.model.expire();
        let limit = ("limit", limit.to_string());
        let seq = value as usize * 4;
        let moment = format!("{:.6}", seq as f64 / 1e6);
        let node_id = format!("gpu_{value}");
        let id = format!("id-{value}");
        let status = Status::ALL[value as usize % Status::ALL.len()];
        type Keep = Box<dyn Fn(&Request) -> bool>;
        let (pair, keep): ((&str, String), Keep) = match filter {
            0 => (("since", moment), Box::new(move |request| request.seq >= seq)),
            1 => (("until", moment), Box::new(move |request| request.seq < seq)),
            2 => (("node_id", node_id), Box::new(move |request| request.worker == Some(value))),
            3 => (("request_id", id.clone()), Box::new(move |request| request.id == id)),
            4 => (
                ("status", status.name().into()),
                Box::new(move |request| request.status == status),
            ),
            5 => (("route", ROUTES[0].into()), Box::new(|request| request.route == ROUTES[0])),
            6 => (("policy", "random".into()), Box::new(|_| true)),
            _ => (("policy", "other".into()), Box::new(|_| false)),
        };
        let expected: Vec<i64> = self
            .model
            .held()
            .rev()
            .filter(|request| keep(request))
            .map(|request| request.seq as i64)
            .collect();
        let found = all_pages(&self.store, &query(&[limit, pair]), self.model.now_us);
        assert_eq!(found, expected);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    // One shard: the order of eviction is exact.
    #[test]
    fn the_store_does_what_the_model_does(
        capacity in 1usize..8,
        steps in prop::collection::vec(step(), 1..80),
    ) {
        let mut pair = Pair::new(capacity, 1);
        for step in steps {
            pair.take(&step);
            assert_same_stats(&pair.store, &mut pair.model);
        }
    }

    // Several shards and room for all: look-up, expiry, listings and counts do not depend on where
    // a record is.
    #[test]
    fn shards_make_no_difference(steps in prop::collection::vec(step(), 1..80)) {
        let mut pair = Pair::new(1_000, 4);
        for step in steps {
            pair.take(&step);
        }
        assert_same_stats(&pair.store, &mut pair.model);
    }

    // Several shards and too little room: whichever records leave, the rest is complete.
    #[test]
    fn a_sharded_store_fills_up_exactly(
        capacity in 4usize..40,
        ids in prop::collection::vec(0u8..60, 1..120),
    ) {
        let store = with_shards(4, capacity);
        for (seq, id) in ids.iter().enumerate() {
            let own =
                open_in(&store, usize::from(*id), &format!("id-{id}"), ROUTES[0], seq as i64, 0);
            if seq % 3 > 0 {
                end(&own, Status::Failed);
            }
            let held = capacity.min(seq + 1);
            let stats = stats(&store, 0);
            prop_assert_eq!(stats.active_traces as usize, held);
            prop_assert_eq!(stats.evicted as usize, seq + 1 - held);
            prop_assert!(stats.newest_trace == Some(Timestamp::from_unix_us(seq as i64)));
        }
        let listed = all_pages(&store, &query(&[("limit", "7".into())]), 0);
        prop_assert_eq!(listed.len(), capacity.min(ids.len()));
        prop_assert!(listed.windows(2).all(|pair| pair[0] > pair[1]));
    }

    // However unequal the pace of the threads, and though some stop: what is held is what arrived last.
    #[test]
    fn no_shard_keeps_what_is_old(
        capacity in 4usize..200,
        runs in prop::collection::vec((0usize..4, 1usize..100), 1..20),
    ) {
        let store = with_ttl(u64::MAX, 4, capacity);
        let homes = runs.into_iter().flat_map(|(home, requests)| vec![home; requests]);
        for (seq, home) in homes.enumerate() {
            let now_us = seq as u64;
            let own = open_in(&store, home, "id", ROUTES[0], seq as i64, now_us);
            end_at(&own, Status::Completed, now_us);
            let stats = stats(&store, now_us);
            prop_assert_eq!(stats.active_traces as usize, capacity.min(seq + 1));
            let oldest = stats.oldest_trace.map_or(0, Timestamp::unix_us) as usize;
            prop_assert!(seq < oldest + capacity + capacity / AGE_PER_LAG as usize + 1);
        }
    }
}

#[test]
fn a_store_holds_as_many_as_it_says() {
    for capacity in [1, 1_024, 1_025, 3_000] {
        let store = store(capacity);
        for seq in 0..capacity + 500 {
            store.open(&format!("req_{seq}"), ROUTES[0], seq as i64, 0);
            assert_eq!(store.taken.load(Ordering::Relaxed), capacity.min(seq + 1));
        }
        assert_eq!(store.homes.len(), if capacity <= 1_024 { 1 } else { SHARDS });
    }
}

#[test]
fn an_open_record_leaves_only_when_none_has_ended() {
    let store = with_shards(4, 20);
    for seq in 0..10 {
        open_in(&store, 0, "open", ROUTES[0], seq, 0);
        end(&open_in(&store, 1, "ended", ROUTES[0], 10 + seq, 0), Status::Completed);
    }
    let held = |id| store.get(id, 0).map_or(0, |trace| trace.same_id.unwrap_or(1));
    for more in 1..=10 {
        open_in(&store, 0, "open", ROUTES[0], 0, 0);
        assert_eq!((held("open"), held("ended")), (10 + more, 10 - more));
    }
}

#[test]
fn a_shard_whose_ended_records_are_gone_does_not_lose_its_open_ones() {
    let store = with_shards(4, 20);
    for seq in 0..5 {
        end(&open_in(&store, 0, "old", ROUTES[0], seq, 0), Status::Completed);
        open_in(&store, 0, "open", ROUTES[0], seq, 0);
    }
    for seq in 0..20 {
        let own = open_in(&store, 1, "new", ROUTES[0], seq, TTL_US);
        end_at(&own, Status::Failed, TTL_US);
        store.remove_expired(TTL_US);
    }
    let held = |id| store.get(id, TTL_US).map_or(0, |trace| trace.same_id.unwrap_or(1));
    assert_eq!([held("old"), held("open"), held("new")], [0, 5, 15]);
}

#[test]
fn two_that_want_the_same_one_do_not_take_an_open_one() {
    let store = with_shards(4, 4);
    end(&open_in(&store, 0, "old", ROUTES[0], 0, 0), Status::Completed);
    open_in(&store, 0, "open", ROUTES[0], 1, 0);
    end_at(&open_in(&store, 1, "new", ROUTES[0], 2, 0), Status::Completed, 50);
    let (said, home) = store.oldest();
    assert_eq!(store.evict_said(said, home, 50), Some(true));
    assert_eq!(store.evict_said(said, home, 50), None, "it was gone");
    assert!(store.evict_oldest(50));
    let is_held = |id| store.get(id, 50).is_some();
    assert_eq!(["old", "open", "new"].map(is_held), [false, true, false]);
}

#[test]
fn a_thread_that_ends_leaves_its_shard_to_the_next() {
    let shards: HashSet<usize> = (0..100)
        .map(|_| std::thread::spawn(thread_number).join().expect("it does not panic"))
        .collect();
    // Other tests open records too, on their threads.
    assert!(shards.len() < 100);
}

#[test]
fn the_warning_is_armed_until_records_leave_early() {
    let store = store(1);
    end(&store.open("a", ROUTES[0], 0, 0), Status::Failed);
    store.open("b", ROUTES[0], 1, TTL_US);
    assert!(!store.has_warned.load(Ordering::Relaxed), "the first one's time was over");
    store.open("c", ROUTES[0], 2, TTL_US);
    assert!(store.has_warned.load(Ordering::Relaxed));
}

#[test]
fn one_id_many_times_is_no_slower_and_found_newest_first() {
    let store = store(20_000);
    for seq in 0..50_000 {
        let own = store.open("same", ROUTES[0], seq, 0);
        if seq % 2 == 0 {
            end(&own, Status::Completed);
        }
    }
    let newest = store.get("same", 0).expect("it is held");
    assert_eq!((newest.timestamp.unix_us(), newest.same_id), (49_999, Some(20_000)));
    // A record of another id takes the room of one of these.
    store.open("other", ROUTES[0], 50_000, 0);
    assert_eq!(store.get("other", 0).and_then(|trace| trace.same_id), None);
    assert_eq!(store.get("same", 0).and_then(|trace| trace.same_id), Some(19_999));
}

#[test]
fn a_page_is_not_disturbed_by_what_arrives_or_leaves() {
    let store = store(2_000);
    let open = |seq: i64| store.open(&format!("req_{seq}"), ROUTES[0], seq, 0);
    let owns: Vec<Own> = (0..100).map(open).collect();
    let mut query = query(&[("limit", "10".into())]);
    let first = store.list(&query, 0);
    query.cursor = first.next_cursor;
    (100..200).for_each(|seq| {
        open(seq);
    });
    // The record the cursor names goes away.
    end(&owns[90], Status::Failed);
    let second: Vec<i64> =
        store.list(&query, TTL_US).traces.iter().map(|trace| trace.timestamp.unix_us()).collect();
    assert_eq!(second, (80..90).rev().collect::<Vec<i64>>());
}

#[test]
fn threads_leave_exact_counts() {
    const THREADS: u64 = 8;
    const REQUESTS: u64 = 400;
    for capacity in [50, 1_100] {
        let store = store(capacity);
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let store = &store;
                scope.spawn(move || hammer(store, thread, REQUESTS));
            }
        });
        let stats = stats(&store, 0);
        assert_eq!(stats.total_requests, THREADS * REQUESTS);
        assert_eq!(stats.requests_per_status.values().sum::<u64>(), stats.total_requests);
        assert_eq!(stats.requests_per_node.values().sum::<u64>(), stats.total_requests);
        assert_eq!((stats.in_flight, stats.unrouted), (0, 0));
        assert_eq!(stats.active_traces as usize, capacity);
        assert_eq!(stats.status_distribution.values().sum::<u64>(), stats.active_traces);
        assert_eq!(stats.node_distribution.values().sum::<u64>(), stats.active_traces);
        assert_eq!(stats.route_distribution.values().sum::<u64>(), stats.active_traces);
        assert_eq!(stats.evicted + stats.active_traces, stats.total_requests);
        assert_eq!(all_pages(&store, &Query::default(), 0).len(), capacity);
        assert_eq!(store.remove_expired(TTL_US), capacity);
        assert_eq!(store.taken.load(Ordering::Relaxed), 0);
    }
}

/// Opens and ends requests, and reads in between. Each record is its own thread's alone.
fn hammer(store: &Store, thread: u64, requests: u64) {
    let mine = worker(thread as u32);
    for number in 0..requests {
        let id = format!("{thread}-{}", number % 50);
        let unix_us = (thread * requests + number) as i64;
        let (home, place) = store.open(&id, ROUTES[0], unix_us, 0);
        home.shard().route(place, (None, Status::Queued), &mine, |_, _| {});
        if let Some(trace) = store.get(&id, 0) {
            assert!(trace.node_id.is_none_or(|node_id| node_id == *mine.node_id));
        }
        if number % 16 == 0 {
            let limit = ("limit", "40".to_owned());
            let page = store.list(&query(&[limit]), 0);
            let arrivals: HashSet<i64> =
                page.traces.iter().map(|trace| trace.timestamp.unix_us()).collect();
            assert_eq!(arrivals.len(), page.traces.len(), "no record twice");
            let stats = stats(store, 0);
            assert!(stats.active_traces as usize <= store.capacity);
        }
        drop(home.end(place, (Status::Routed, Status::Completed), true, 0, |_| {}));
    }
}
