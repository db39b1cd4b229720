//! Counts of requests and records, kept as they change, so that reading them costs nothing.
//!
//! Every count comes twice: of all requests since the start, and of the records held now. Each
//! shard of the store has its own [`Counts`], changed under the shard's lock together with the
//! record; [`Stats`] is their sum.

use std::collections::BTreeMap;
use std::mem::size_of;
use std::sync::Arc;

use hashbrown::HashMap;
use hashbrown::hash_map::Entry;
use serde::Serialize;

use super::record::{Record, Status};
use super::text::{Names, Text};
use super::trace::Timestamp;
use super::{Options, WorkerName};

/// Workers counted under their own names: the first of a router's life, by order of joining. The
/// later ones are counted together.
const MAX_NODES: u32 = 65_536;

/// The name the workers beyond [`MAX_NODES`] are counted under.
const OTHER_NODES: &str = "(others)";

/// Requests since the start, and those of them whose record is held now.
#[derive(Debug, Clone, Copy, Default)]
struct Tally {
    since_start: u64,
    held: u64,
}

impl Tally {
    fn add(&mut self, is_held: bool) {
        self.since_start += 1;
        self.held += u64::from(is_held);
    }

    fn subtract(&mut self, is_held: bool) {
        self.since_start -= 1;
        self.held -= u64::from(is_held);
    }
}

/// The counts of one shard.
#[derive(Debug, Default)]
pub(super) struct Counts {
    statuses: [Tally; Status::ALL.len()],
    // Bounded by the routes the server knows, and hardly ever more than one or two.
    routes: Vec<(Text, Tally)>,
    /// By worker index; at most [`MAX_NODES`] + 1.
    nodes: HashMap<u32, (Arc<WorkerName>, Tally)>,
    /// Of the names in `nodes`.
    name_bytes: usize,
    unrouted: u64,
    pub(super) evicted: u64,
    pub(super) expired: u64,
}

impl Counts {
    /// A request arrived, and its record is held; the name of its route.
    pub(super) fn arrives(&mut self, route: &str, names: &mut Names) -> Text {
        self.statuses[Status::Queued as usize].add(true);
        let known = self.routes.iter().position(|(name, _)| name.as_str() == route);
        let place = known.unwrap_or_else(|| {
            self.routes.push((names.share(route), Tally::default()));
            self.routes.len() - 1
        });
        let (name, tally) = &mut self.routes[place];
        tally.add(true);
        name.clone()
    }

    /// A request came further, or went back for a retry.
    pub(super) fn changes_status(&mut self, from: Status, to: Status, is_held: bool) {
        self.statuses[from as usize].subtract(is_held);
        self.statuses[to as usize].add(is_held);
    }

    /// A request got a worker, perhaps in place of an earlier one. The shard's own copy of its name, as the count of
    /// references to one that all threads share would go from one processor's cache to another's.
    pub(super) fn changes_worker(
        &mut self,
        from: Option<&Arc<WorkerName>>,
        to: &Arc<WorkerName>,
        is_held: bool,
    ) -> Arc<WorkerName> {
        if let Some(from) = from {
            self.node(from).1.subtract(is_held);
        }
        let (name, tally) = self.node(to);
        tally.add(is_held);
        if name.index == to.index { Arc::clone(name) } else { Arc::clone(to) }
    }

    /// A request ended without ever having had a worker.
    pub(super) fn ends_unrouted(&mut self) {
        self.unrouted += 1;
    }

    /// A record is no longer held.
    pub(super) fn leaves(&mut self, record: &Record) {
        self.statuses[record.status as usize].held -= 1;
        if let Some((_, tally)) = self.routes.iter_mut().find(|(name, _)| *name == record.route) {
            tally.held -= 1;
        }
        if let Some(worker) = record.worker() {
            self.node(worker).1.held -= 1;
        }
    }

    fn node(&mut self, worker: &Arc<WorkerName>) -> &mut (Arc<WorkerName>, Tally) {
        match self.nodes.entry(worker.index.min(MAX_NODES)) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                self.name_bytes +=
                    size_of::<WorkerName>() + worker.url.len() + worker.node_id.len();
                entry.insert((Arc::new(WorkerName::clone(worker)), Tally::default()))
            }
        }
    }

    pub(super) fn memory_bytes(&self) -> usize {
        self.routes.capacity() * size_of::<(Text, Tally)>()
            + self.nodes.capacity() * size_of::<(u32, (Arc<WorkerName>, Tally))>()
            + self.name_bytes
    }
}

/// The statistics as read: since the start, and of the records held now.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Stats {
    /// Requests since the start.
    pub total_requests: u64,
    /// Requests since the start by the node picked last; the others had none.
    pub requests_per_node: BTreeMap<String, u64>,
    /// Requests since the start by status; together `total_requests`.
    pub requests_per_status: BTreeMap<&'static str, u64>,
    /// Requests since the start by route; together `total_requests`.
    pub requests_per_route: BTreeMap<String, u64>,
    /// Requests since the start that ended without ever having had a worker.
    pub unrouted: u64,
    /// Records that went because the store was full.
    pub evicted: u64,
    /// Records that went because their time was over.
    pub expired: u64,
    /// Records held now.
    pub active_traces: u64,
    /// Records held now.
    pub total_traces: u64,
    /// Records held now by node.
    pub node_distribution: BTreeMap<String, u64>,
    /// Records held now by status.
    pub status_distribution: BTreeMap<&'static str, u64>,
    /// Records held now by route.
    pub route_distribution: BTreeMap<String, u64>,
    /// Requests that have not ended.
    pub in_flight: u64,
    /// Estimate of the memory of all records, lists and tables.
    pub memory_bytes: usize,
    /// Arrival of the oldest record held.
    pub oldest_trace: Option<Timestamp>,
    /// Arrival of the newest record held.
    pub newest_trace: Option<Timestamp>,
    /// The options in force; `None` for a log.
    pub config: Option<Options>,
    /// The router's version.
    pub version: &'static str,
}

impl Stats {
    /// Nothing counted yet. Every status is there from the start.
    pub(super) fn new(config: Option<Options>) -> Stats {
        let no_status: BTreeMap<_, _> =
            Status::ALL.into_iter().map(|status| (status.name(), 0)).collect();
        Stats {
            total_requests: 0,
            requests_per_node: BTreeMap::new(),
            requests_per_status: no_status.clone(),
            requests_per_route: BTreeMap::new(),
            unrouted: 0,
            evicted: 0,
            expired: 0,
            active_traces: 0,
            total_traces: 0,
            node_distribution: BTreeMap::new(),
            status_distribution: no_status,
            route_distribution: BTreeMap::new(),
            in_flight: 0,
            memory_bytes: 0,
            oldest_trace: None,
            newest_trace: None,
            config,
            version: env!("CARGO_PKG_VERSION"),
        }
    }

    /// Adds the counts of one shard.
    pub(super) fn add(&mut self, counts: &Counts) {
        for status in Status::ALL {
            let Tally { since_start, held } = counts.statuses[status as usize];
            *self.requests_per_status.entry(status.name()).or_default() += since_start;
            *self.status_distribution.entry(status.name()).or_default() += held;
            self.total_requests += since_start;
            self.active_traces += held;
            self.total_traces += held;
            if !status.is_ended() {
                self.in_flight += since_start;
            }
        }
        for (route, tally) in &counts.routes {
            add_named(&mut self.requests_per_route, route.as_str(), tally.since_start);
            add_named(&mut self.route_distribution, route.as_str(), tally.held);
        }
        for (index, (worker, tally)) in &counts.nodes {
            let name = if *index < MAX_NODES { &*worker.node_id } else { OTHER_NODES };
            add_named(&mut self.requests_per_node, name, tally.since_start);
            add_named(&mut self.node_distribution, name, tally.held);
        }
        self.unrouted += counts.unrouted;
        self.evicted += counts.evicted;
        self.expired += counts.expired;
    }
}

/// Adds to a count by name; names that count nothing do not appear.
fn add_named(counts: &mut BTreeMap<String, u64>, name: &str, count: u64) {
    if count > 0 {
        *counts.entry(name.to_owned()).or_default() += count;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worker(index: u32) -> Arc<WorkerName> {
        let (url, node_id) = (format!("http://a:{index}"), format!("gpu_{index}"));
        Arc::new(WorkerName { index, url: url.into(), node_id: node_id.into() })
    }

    #[test]
    fn workers_beyond_the_bound_are_counted_together() {
        let mut counts = Counts::default();
        for index in [0, MAX_NODES - 1, MAX_NODES, MAX_NODES + 1, u32::MAX] {
            counts.changes_worker(None, &worker(index), true);
        }
        let mut stats = Stats::new(None);
        stats.add(&counts);
        let names: Vec<_> = stats.requests_per_node.into_iter().collect();
        let expected = [("(others)", 3), ("gpu_0", 1), ("gpu_65535", 1)];
        assert_eq!(names, expected.map(|(name, count)| (name.to_owned(), count)));
    }

    #[test]
    fn a_retry_elsewhere_moves_the_request_to_the_other_node() {
        let mut counts = Counts::default();
        counts.changes_worker(None, &worker(0), true);
        counts.changes_worker(Some(&worker(0)), &worker(1), true);
        let mut stats = Stats::new(None);
        stats.add(&counts);
        assert_eq!(stats.requests_per_node, BTreeMap::from([("gpu_1".to_owned(), 1)]));
        assert_eq!(stats.node_distribution, stats.requests_per_node);
    }
}
