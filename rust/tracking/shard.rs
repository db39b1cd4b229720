//! The records of one shard, with everything that is known about them under one lock.
//!
//! A record is found by slot (its own request), by id (look-ups), by arrival (listings), by last
//! use and by ending (eviction and expiry). All but the arrival order are O(1), whatever the number
//! of records and however often an id repeats. Time is an argument: microseconds since the store's
//! start.
//!
//! Invariant: each record held is in `by_arrival`, in the list of its id, and once it has
//! ended in both `used` and `ended`; `counts` agrees with the records after each call.

use std::mem::size_of;
use std::sync::Arc;

use hashbrown::HashTable;

use super::WorkerName;
use super::arrivals::Arrivals;
use super::query::Query;
use super::record::{Record, Status};
use super::slab::{List, Slab};
use super::stats::Counts;
use super::text::{CompactId, Names, Text};
use super::trace::{Timestamp, Trace};

/// Most records one call of [`Shard::newest_before`] looks at, so that a listing never holds the
/// lock for long.
const MAX_SCANNED: usize = 256;

/// Ids there is room for from the first record on.
const FIRST_IDS: usize = 3_584;

/// Ended records by last use.
const USE: usize = 0;
/// Ended records by their ending.
const ENDING: usize = 1;
/// Records with one id by arrival.
const SAME_ID: usize = 2;

#[derive(Debug)]
struct Entry {
    /// Arrival number, unique in the store: it also tells a record from a later one in its slot.
    seq: u64,
    /// Of its id.
    hash: u32,
    record: Record,
}

/// The records with one id, oldest first, by the hash of that: here too, so that the table grows without a look at
/// any record.
#[derive(Debug)]
struct SameId {
    hash: u32,
    list: List<SAME_ID>,
}

/// A request's own record: its slot, and the arrival number that must be found there.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    pub(super) slot: u32,
    pub(super) seq: u64,
}

/// Added to the number of the record that is next to leave where none has ended.
const OPEN: u64 = 1 << 63;

/// What one look along the arrival order found.
#[derive(Debug)]
pub(super) struct Found {
    /// What matched, newest first, with its arrival number.
    pub(super) traces: Vec<(u64, Trace)>,
    /// Everything from here on was looked at.
    pub(super) before: u64,
    /// There is nothing older.
    pub(super) is_exhausted: bool,
}

#[derive(Debug)]
pub(super) struct Shard {
    /// Of the records inserted.
    routing_policy: Text,
    slab: Slab<Entry>,
    by_id: HashTable<SameId>,
    by_arrival: Arrivals,
    /// Ended records, least recently used first.
    used: List<USE>,
    /// Ended records, first ended first.
    ended: List<ENDING>,
    names: Names,
    pub(super) counts: Counts,
    /// Heap memory behind the records; of an open one that of its id, as it gains more until it ends.
    heap_bytes: usize,
}

impl Shard {
    /// An empty shard.
    pub(super) fn new(routing_policy: &str) -> Shard {
        let mut names = Names::default();
        Shard {
            routing_policy: names.share(routing_policy),
            slab: Slab::new(),
            by_id: HashTable::new(),
            by_arrival: Arrivals::new(),
            used: List::new(),
            ended: List::new(),
            names,
            counts: Counts::default(),
            heap_bytes: 0,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.slab.len()
    }

    /// Adds an open record, the newest of its id, which has this hash.
    pub(super) fn insert(
        &mut self,
        seq: u64,
        id: &str,
        hash: u32,
        route: &str,
        unix_us: i64,
    ) -> Place {
        if self.by_id.capacity() == 0 {
            self.by_id.reserve(FIRST_IDS, |same| table_hash(same.hash));
        }
        let policy = self.routing_policy.clone();
        let route = self.counts.arrives(route, &mut self.names);
        let record = Record::new(id, route, policy, unix_us);
        self.heap_bytes += record.request_id.heap_bytes();
        let entry = Entry { seq, hash, record };
        let slot = self.slab.insert(entry);
        self.by_arrival.push(seq, slot);
        self.join_id(slot);
        Place { slot, seq }
    }

    /// Changes a record, unless it has left.
    pub(super) fn edit(&mut self, place: Place, change: impl FnOnce(&mut Record, &mut Names)) {
        if let Some(entry) = entry_at(&mut self.slab, place) {
            change(&mut entry.record, &mut self.names);
        }
    }

    /// A request got a worker, perhaps in place of an earlier one, and its record is changed. Counts even if that left.
    /// The worker as the shard names it.
    pub(super) fn route(
        &mut self,
        place: Place,
        (from_worker, from): (Option<&Arc<WorkerName>>, Status),
        worker: &Arc<WorkerName>,
        change: impl FnOnce(&mut Record, &mut Names),
    ) -> Arc<WorkerName> {
        let entry = entry_at(&mut self.slab, place);
        let worker = self.counts.changes_worker(from_worker, worker, entry.is_some());
        self.counts.changes_status(from, Status::Routed, entry.is_some());
        if let Some(Entry { record, .. }) = entry {
            record.status = Status::Routed;
            record.attempt(Arc::clone(&worker));
            change(record, &mut self.names);
        }
        worker
    }

    /// An open request came further without ending, and its record is changed. Counts even if that left.
    pub(super) fn advance(
        &mut self,
        place: Place,
        (from, to): (Status, Status),
        change: impl FnOnce(&mut Record),
    ) {
        let entry = entry_at(&mut self.slab, place);
        self.counts.changes_status(from, to, entry.is_some());
        if let Some(Entry { record, .. }) = entry {
            record.status = to;
            change(record);
        }
    }

    /// A request ended, and its record is changed. Counts even if that left. Whether it is now
    /// the only ended one held.
    pub(super) fn end(
        &mut self,
        place: Place,
        (from, to): (Status, Status),
        had_worker: bool,
        now_us: u64,
        change: impl FnOnce(&mut Record),
    ) -> bool {
        if !had_worker {
            self.counts.ends_unrouted();
        }
        let last_us = self.ended.last().map_or(0, |slot| self.slab.at(slot).record.ended_us);
        let entry = entry_at(&mut self.slab, place);
        self.counts.changes_status(from, to, entry.is_some());
        let Some(Entry { record, .. }) = entry else { return false };
        change(record);
        record.status = to;
        // Threads may come here out of order; the list of endings must not run backwards.
        record.ended_us = now_us.max(last_us);
        self.heap_bytes += record.heap_bytes() - record.request_id.heap_bytes();
        self.used.push(&mut self.slab, place.slot);
        self.ended.push(&mut self.slab, place.slot);
        self.used.len() == 1
    }

    /// Adds the record of a request that has ended elsewhere, the newest of its id, which has this hash.
    pub(super) fn restore(&mut self, seq: u64, id: &str, hash: u32, record: Record) {
        let (status, had_worker) = (record.status, record.worker().is_some());
        let unix_us = record.arrived_unix_us;
        let place = self.insert(seq, id, hash, record.route.as_str(), unix_us);
        if let Some(worker) = record.worker() {
            self.counts.changes_worker(None, worker, true);
        }
        self.end(place, (Status::Queued, status), had_worker, 0, |held| *held = record);
    }

    /// A record, unless it has left.
    pub(super) fn record(&self, place: Place) -> Option<&Record> {
        let entry = self.slab.get(place.slot).filter(|entry| entry.seq == place.seq);
        entry.map(|entry| &entry.record)
    }

    /// The newest record with this id, which has this hash, and how many have it.
    pub(super) fn newest(&self, id: &CompactId, hash: u32) -> Option<(Place, &Record, u32)> {
        let is_same = |same: &SameId| list_id(&self.slab, &same.list) == Some(id);
        let list = &self.by_id.find(table_hash(hash), is_same)?.list;
        let slot = list.last()?;
        let Entry { seq, record, .. } = self.slab.at(slot);
        Some((Place { slot, seq: *seq }, record, list.len()))
    }

    /// A record was looked at; it may have left since.
    pub(super) fn is_used(&mut self, place: Place) {
        if self.record(place).is_some_and(|record| record.status.is_ended()) {
            self.used.remove(&mut self.slab, place.slot);
            self.used.push(&mut self.slab, place.slot);
        }
    }

    /// Matching records that arrived before the one numbered `before`, newest first: up to
    /// `max_found` of them, out of a bounded number looked at.
    pub(super) fn newest_before(&self, before: u64, query: &Query, max_found: usize) -> Found {
        let mut found = Found { traces: Vec::new(), before, is_exhausted: false };
        let mut older = self.by_arrival.before(before);
        for _ in 0..MAX_SCANNED {
            let Some((seq, slot)) = older.next() else {
                found.is_exhausted = true;
                break;
            };
            found.before = seq;
            let Some(slot) = slot else { continue };
            let record = &self.slab.at(slot).record;
            if query.matches(record) {
                found.traces.push((seq, record.view()));
                if found.traces.len() == max_found {
                    break;
                }
            }
        }
        found
    }

    /// Whether [`Shard::expire`] would remove anything.
    pub(super) fn has_expired(&self, now_us: u64, ttl_us: u64) -> bool {
        self.ended
            .first()
            .is_some_and(|slot| self.slab.at(slot).record.ended_us.saturating_add(ttl_us) <= now_us)
    }

    /// Removes records that ended `ttl_us` ago or earlier, at most so many; says how many.
    pub(super) fn expire(&mut self, now_us: u64, ttl_us: u64, max: usize) -> usize {
        let mut removed = 0;
        while removed < max && self.has_expired(now_us, ttl_us) {
            let Some(slot) = self.ended.first() else {
                break;
            };
            self.remove(slot);
            removed += 1;
        }
        self.counts.expired += removed as u64;
        removed
    }

    /// Removes the least recently used ended record, else the oldest open one; says if there was
    /// any.
    pub(super) fn evict(&mut self) -> bool {
        let next = self.next();
        if let Some(slot) = next {
            self.remove(slot);
            self.counts.evicted += 1;
        }
        // It was not touched for long. The store looks at its beginning at once, and the next eviction at all of it.
        if let Some(slot) = self.used.first() {
            self.slab.prefetch(slot);
        }
        next.is_some()
    }

    /// How late the turn of the next eviction is among those of all shards: the time its record ended at, behind all
    /// others if that is open, and last of all if there is none.
    pub(super) fn next_out(&self) -> u64 {
        let Some(slot) = self.next() else { return u64::MAX };
        let Entry { seq, record, .. } = self.slab.at(slot);
        if record.status.is_ended() { record.ended_us } else { OPEN + seq }
    }

    fn next(&self) -> Option<u32> {
        // Where none has ended, all are open.
        let oldest = || self.by_arrival.ends().map(|[(_, oldest), _]| oldest);
        self.used.first().or_else(oldest)
    }

    /// Arrival of the oldest and of the newest record, each with its number.
    pub(super) fn arrivals(&self) -> Option<[(u64, Timestamp); 2]> {
        let arrival = |(seq, slot): (u64, u32)| {
            (seq, Timestamp::from_unix_us(self.slab.at(slot).record.arrived_unix_us))
        };
        self.by_arrival.ends().map(|ends| ends.map(arrival))
    }

    /// Estimate of all memory the shard has taken.
    pub(super) fn memory_bytes(&self) -> usize {
        size_of::<Shard>()
            + self.slab.memory_bytes()
            + self.by_id.allocation_size()
            + self.by_arrival.memory_bytes()
            + self.names.memory_bytes()
            + self.counts.memory_bytes()
            + self.heap_bytes
    }

    fn join_id(&mut self, slot: u32) {
        let Entry { hash, record, .. } = self.slab.at(slot);
        let (hash, id) = (*hash, Some(&record.request_id));
        let is_same = |same: &SameId| list_id(&self.slab, &same.list) == id;
        let rehash = |same: &SameId| table_hash(same.hash);
        let entry = self.by_id.entry(table_hash(hash), is_same, rehash);
        let same = entry.or_insert_with(|| SameId { hash, list: List::new() }).into_mut();
        same.list.push(&mut self.slab, slot);
    }

    fn leave_id(&mut self, slot: u32) {
        let Entry { hash, record, .. } = self.slab.at(slot);
        // The oldest leaves first, and is found without a look at its id.
        let is_same = |SameId { list, .. }: &SameId| {
            list.first() == Some(slot) || list_id(&self.slab, list) == Some(&record.request_id)
        };
        let entry = self.by_id.find_entry(table_hash(*hash), is_same);
        let mut entry = entry.expect("a record is in the list of its id");
        let list = &mut entry.get_mut().list;
        list.remove(&mut self.slab, slot);
        if list.len() == 0 {
            entry.remove();
            if self.by_id.len() < self.by_id.capacity() / 8 && self.by_id.len() >= FIRST_IDS {
                self.by_id.shrink_to(2 * self.by_id.len(), |same| table_hash(same.hash));
            }
        }
    }

    fn remove(&mut self, slot: u32) {
        self.leave_id(slot);
        if self.slab.at(slot).record.status.is_ended() {
            self.used.remove(&mut self.slab, slot);
            self.ended.remove(&mut self.slab, slot);
        }
        let entry = self.slab.remove(slot);
        self.by_arrival.remove(entry.seq);
        let Record { request_id, status, .. } = &entry.record;
        self.heap_bytes -=
            if status.is_ended() { entry.record.heap_bytes() } else { request_id.heap_bytes() };
        self.counts.leaves(&entry.record);
    }
}

/// Spreads a hash over the bits that the table looks at.
fn table_hash(hash: u32) -> u64 {
    u64::from(hash).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// A request's own record, unless it has left.
fn entry_at(slab: &mut Slab<Entry>, place: Place) -> Option<&mut Entry> {
    slab.get_mut(place.slot).filter(|entry| entry.seq == place.seq)
}

/// The id that all records of a list have.
fn list_id<'a>(slab: &'a Slab<Entry>, list: &List<SAME_ID>) -> Option<&'a CompactId> {
    list.first().map(|slot| &slab.at(slot).record.request_id)
}
