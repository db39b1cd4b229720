//! All records, spread over shards by the hash of their id.
//!
//! The shards share one capacity, so that nothing leaves while there is room anywhere. When there
//! is none, a new record takes the room of one in its own shard; if that shard holds less than its
//! even share, of one in a shard that holds more. So a store fills up exactly, and its shards even
//! out by themselves. No call that changes records locks more than one shard at a time; statistics
//! lock all of them, for reading.
//!
//! A listing merges the shards by arrival number, a few records at a time, without ever seeing an
//! expired one. Time is an argument: microseconds since the store's start.

use std::collections::VecDeque;
use std::hash::BuildHasher;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use hashbrown::DefaultHashBuilder;
use parking_lot::{RwLock, RwLockWriteGuard};

use super::query::{Cursor, Query};
use super::record::Record;
use super::shard::{Place, Shard};
use super::stats::Stats;
use super::trace::Trace;

/// A store of at most this many records has one shard, and its order of eviction is exact.
const MAX_SINGLE_SHARD_ENTRIES: usize = 1_024;

/// Shards of a larger store.
const SHARDS: usize = 16;

/// Most records spread out for a listing while one shard is locked.
const MAX_FOUND: usize = 32;

/// One page of a listing.
#[derive(Debug, Clone)]
pub struct Page {
    /// Newest first.
    pub traces: Vec<Trace>,
    /// Where the next page begins; `None` on the last one.
    pub next_cursor: Option<Cursor>,
}

/// Where a request's own record is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Key {
    shard: usize,
    pub(super) place: Place,
}

#[derive(Debug)]
pub(super) struct Store {
    shards: Box<[RwLock<Shard>]>,
    hasher: DefaultHashBuilder,
    capacity: usize,
    ttl_us: u64,
    /// Records held, and rooms taken for records about to be inserted: never above `capacity`.
    taken: AtomicUsize,
    next_seq: AtomicU64,
    has_warned: AtomicBool,
}

impl Store {
    /// A store of at most `capacity` ≥ 1 records, kept `ttl_us` after they end.
    pub(super) fn new(capacity: usize, ttl_us: u64, routing_policy: &str) -> Store {
        let shards = if capacity <= MAX_SINGLE_SHARD_ENTRIES { 1 } else { SHARDS };
        Store::with_shards(shards, capacity, ttl_us, routing_policy)
    }

    /// `shards` is at most `capacity`, so that each has a share.
    fn with_shards(shards: usize, capacity: usize, ttl_us: u64, routing_policy: &str) -> Store {
        let shard = |_| RwLock::new(Shard::new(routing_policy));
        Store {
            shards: (0..shards).map(shard).collect(),
            hasher: DefaultHashBuilder::default(),
            capacity,
            ttl_us,
            taken: AtomicUsize::new(0),
            next_seq: AtomicU64::new(0),
            has_warned: AtomicBool::new(false),
        }
    }

    /// Adds an open record, the newest of its id.
    pub(super) fn open(&self, id: &str, route: &str, unix_us: i64, now_us: u64) -> Key {
        let hash = self.hasher.hash_one(id);
        let index = self.shard_of(hash);
        loop {
            let mut shard = self.shards[index].write();
            self.expire(&mut shard, now_us);
            let has_room = self.take_room()
                || (shard.len() >= self.share(index) && self.evict_from(&mut shard));
            if has_room {
                return self.insert(index, &mut shard, id, hash, route, unix_us);
            }
            drop(shard);
            if self.evict_above_share() {
                let mut shard = self.shards[index].write();
                return self.insert(index, &mut shard, id, hash, route, unix_us);
            }
            // Others hold rooms they are about to fill; let them.
            std::thread::yield_now();
        }
    }

    /// A store of these records of ended requests, in the order of their arrival. They never expire.
    pub(super) fn of(records: Vec<Record>) -> Store {
        let store = Store::new(records.len().max(1), u64::MAX, "");
        store.taken.store(records.len(), Ordering::Relaxed);
        for (seq, record) in (0..).zip(records) {
            let id = record.request_id.to_string();
            let hash = store.hasher.hash_one(&*id);
            store.shards[store.shard_of(hash)].write().restore(seq, &id, hash, record);
            store.next_seq.store(seq + 1, Ordering::Relaxed);
        }
        store
    }

    /// The shard of a record, for its request to change it.
    pub(super) fn shard(&self, key: Key) -> RwLockWriteGuard<'_, Shard> {
        self.shards[key.shard].write()
    }

    /// The newest record with this id; looking at it is a use.
    pub(super) fn get(&self, id: &str, now_us: u64) -> Option<Trace> {
        let hash = self.hasher.hash_one(id);
        let mut shard = self.shards[self.shard_of(hash)].write();
        self.expire(&mut shard, now_us);
        shard.get(id, hash)
    }

    /// A page of what the query asks for. Records that arrive meanwhile are not on it.
    pub(super) fn list(&self, query: &Query, now_us: u64) -> Page {
        let mut page = Page { traces: Vec::new(), next_cursor: None };
        self.remove_expired(now_us);
        let newest = self.next_seq.load(Ordering::Relaxed);
        let before = query.cursor.map_or(newest, |cursor| cursor.seq.min(newest));
        let mut walks: Vec<Walk> = self.shards.iter().map(|_| Walk::new(before)).collect();
        let page_size = query.page_size();
        // Few, because what a walk has found but the page has no room for is thrown away.
        let max_found = (page_size / walks.len() / 4 + 4).min(MAX_FOUND);
        let mut last_seq = before;
        while let Some(index) = next_walk(&walks) {
            match walks[index].found.pop_front() {
                // One more than fits shows that there is another page.
                Some(_) if page.traces.len() == page_size => {
                    page.next_cursor = Some(Cursor { seq: last_seq });
                    break;
                }
                Some((seq, trace)) => {
                    last_seq = seq;
                    page.traces.push(trace);
                }
                None => {
                    let shard = self.shards[index].read();
                    walks[index].go_on(&shard, query, max_found);
                }
            }
        }
        page
    }

    /// Adds up the counts of what is held; first removes what has expired.
    pub(super) fn add_to(&self, stats: &mut Stats, now_us: u64) {
        self.remove_expired(now_us);
        let mut first_and_last = None;
        // All shards at one moment: a record on its way from one to another is not counted twice.
        let shards: Vec<_> = self.shards.iter().map(RwLock::read).collect();
        for shard in &shards {
            stats.add(&shard.counts);
            stats.memory_bytes += shard.memory_bytes();
            if let Some([first, last]) = shard.arrivals() {
                let (oldest, newest) = first_and_last.unwrap_or((first, last));
                let oldest = if first.0 < oldest.0 { first } else { oldest };
                let newest = if last.0 > newest.0 { last } else { newest };
                first_and_last = Some((oldest, newest));
            }
        }
        stats.oldest_trace = first_and_last.map(|(oldest, _)| oldest.1);
        stats.newest_trace = first_and_last.map(|(_, newest)| newest.1);
    }

    /// Removes the records whose time is over; says how many.
    pub(super) fn remove_expired(&self, now_us: u64) -> usize {
        let mut removed = 0;
        for shard in &self.shards {
            // Readers are not held up when there is nothing to do.
            if shard.read().has_expired(now_us, self.ttl_us) {
                removed += self.expire(&mut shard.write(), now_us);
            }
        }
        removed
    }

    /// The shard of the ids with this hash.
    fn shard_of(&self, hash: u64) -> usize {
        // Not from the bits the shard's own table uses: the lowest and the highest.
        (hash >> 32) as usize % self.shards.len()
    }

    /// The even share of a shard; all shares together are the capacity.
    fn share(&self, index: usize) -> usize {
        let shards = self.shards.len();
        self.capacity / shards + usize::from(index < self.capacity % shards)
    }

    fn take_room(&self) -> bool {
        let taken = |taken| (taken < self.capacity).then_some(taken + 1);
        self.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, taken).is_ok()
    }

    /// Inserts into a room already taken. Arrival numbers are given under the shard's lock, so that
    /// a listing that waits for the lock sees all numbers it knows of.
    fn insert(
        &self,
        index: usize,
        shard: &mut Shard,
        id: &str,
        hash: u64,
        route: &str,
        unix_us: i64,
    ) -> Key {
        let seq = self.next_seq.fetch_add(1, Ordering::Relaxed);
        Key { shard: index, place: shard.insert(seq, id, hash, route, unix_us) }
    }

    /// Makes a room, which stays taken, in the first shard that holds more than its share.
    fn evict_above_share(&self) -> bool {
        self.shards.iter().enumerate().any(|(index, shard)| {
            let mut shard = shard.write();
            shard.len() > self.share(index) && self.evict_from(&mut shard)
        })
    }

    fn evict_from(&self, shard: &mut Shard) -> bool {
        let is_evicted = shard.evict();
        if is_evicted && !self.has_warned.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                max_trace_entries = self.capacity,
                "the trace store is full: records leave before trace_ttl_seconds; \
                 raise max_trace_entries to keep them"
            );
        }
        is_evicted
    }

    fn expire(&self, shard: &mut Shard, now_us: u64) -> usize {
        let removed = shard.expire(now_us, self.ttl_us);
        self.taken.fetch_sub(removed, Ordering::Relaxed);
        removed
    }
}

/// How far a listing has come in one shard.
struct Walk {
    before: u64,
    /// Matching records not yet on the page; at most `max_found`.
    found: VecDeque<(u64, Trace)>,
    is_exhausted: bool,
}

impl Walk {
    fn new(before: u64) -> Walk {
        Walk { before, found: VecDeque::new(), is_exhausted: false }
    }

    fn go_on(&mut self, shard: &Shard, query: &Query, max_found: usize) {
        let found = shard.newest_before(self.before, query, max_found);
        self.before = found.before;
        self.found = found.traces.into();
        self.is_exhausted = found.is_exhausted;
    }

    /// No record still to come from this shard has this number or a higher one; `None` if no record
    /// is to come.
    fn bound(&self) -> Option<u64> {
        match self.found.front() {
            Some((seq, _)) => Some(seq + 1),
            None => (!self.is_exhausted).then_some(self.before),
        }
    }
}

/// The walk that may have the newest record still to come.
fn next_walk(walks: &[Walk]) -> Option<usize> {
    let bounds = walks.iter().enumerate().filter_map(|(index, walk)| Some((walk.bound()?, index)));
    bounds.max().map(|(_, index)| index)
}

#[cfg(test)]
mod tests;
