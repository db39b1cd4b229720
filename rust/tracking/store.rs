//! All records, in shards of which each thread that opens records has one.
//!
//! The one idea: a request hardly ever leaves the thread it came to, so what is written for its record (the lock of the
//! shard, its tables, counts and names) stays in that processor's cache. A look-up by id asks all shards, which is
//! rare and cheap.
//!
//! The shards share one capacity, so that nothing leaves while there is room anywhere, and a store fills up exactly.
//! When there is none, the record leaves that was used least recently. Between shards that is judged by when it ended,
//! and only what is older by a sixteenth counts, so that threads of the same pace leave each other alone. A store of
//! few records has one shard, and its order is exact.
//!
//! No call that changes records locks more than one shard at a time; statistics lock all of them, for reading. A
//! listing merges the shards by arrival number, a few records at a time, without ever seeing an expired one.
//! Time is an argument: microseconds since the store's start.

use std::collections::{BTreeSet, VecDeque};
use std::hash::BuildHasher;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use crossbeam_utils::CachePadded;
use hashbrown::DefaultHashBuilder;
use parking_lot::{Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::Context;
use super::query::{Cursor, Query};
use super::record::{Record, Status};
use super::shard::{Place, Shard};
use super::stats::Stats;
use super::text::CompactId;
use super::trace::Trace;

/// A store of at most this many records has one shard, and its order of eviction is exact.
const MAX_SINGLE_SHARD_ENTRIES: usize = 1_024;

/// Shards of a larger store. Of more threads than these, some share one.
const SHARDS: usize = 16;

/// A record may be older than one that leaves before it, in another shard, by one of so many parts of its age.
const AGE_PER_LAG: u64 = 16;

/// How many times in such a lag a shard says which of its records is next.
const SAID_PER_LAG: u64 = 4;

/// Most records removed while one shard is locked because their time is over.
const MAX_EXPIRED: usize = 256;

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

/// One shard, and what requests whose records are there need.
#[derive(Debug)]
pub(super) struct Home {
    shard: RwLock<Shard>,
    /// [`Shard::next_out`] as it was when that was last said. Since then it may have become more. Seldom written, so that
    /// others read it at no cost.
    next_out: CachePadded<AtomicU64>,
    pub(super) context: Arc<Context>,
}

impl Home {
    /// The shard, for a request to change its own record.
    pub(super) fn shard(&self) -> RwLockWriteGuard<'_, Shard> {
        self.shard.write()
    }

    /// A request ended, and its record is changed. The shard stays locked.
    pub(super) fn end(
        &self,
        place: Place,
        from_to: (Status, Status),
        had_worker: bool,
        now_us: u64,
        change: impl FnOnce(&mut Record),
    ) -> RwLockWriteGuard<'_, Shard> {
        let mut shard = self.shard.write();
        let is_only = shard.end(place, from_to, had_worker, now_us, change);
        if is_only {
            self.say_next_out(&shard);
        }
        shard
    }

    fn said_next_out(&self) -> u64 {
        self.next_out.load(Ordering::Relaxed)
    }

    fn say_next_out(&self, shard: &Shard) {
        self.next_out.store(shard.next_out(), Ordering::Relaxed);
    }
}

#[derive(Debug)]
pub(super) struct Store {
    /// Each behind a count of its own, which only the requests of its thread change.
    homes: Box<[Arc<Home>]>,
    hasher: DefaultHashBuilder,
    capacity: usize,
    ttl_us: u64,
    has_warned: AtomicBool,
    /// Records held, and rooms taken for records about to be inserted: never above `capacity`.
    taken: CachePadded<AtomicUsize>,
    next_seq: CachePadded<AtomicU64>,
}

impl Store {
    /// A store of at most `capacity` ≥ 1 records, kept `ttl_us` after they end.
    pub(super) fn new(
        capacity: usize,
        ttl_us: u64,
        routing_policy: &str,
        context: Arc<Context>,
    ) -> Store {
        let shards = if capacity <= MAX_SINGLE_SHARD_ENTRIES { 1 } else { SHARDS };
        Store::with_shards(shards, capacity, ttl_us, routing_policy, context)
    }

    fn with_shards(
        shards: usize,
        capacity: usize,
        ttl_us: u64,
        routing_policy: &str,
        context: Arc<Context>,
    ) -> Store {
        let home = |_| {
            let shard = Shard::new(routing_policy);
            let next_out = CachePadded::new(AtomicU64::new(shard.next_out()));
            Arc::new(Home { shard: RwLock::new(shard), next_out, context: Arc::clone(&context) })
        };
        Store {
            homes: (0..shards).map(home).collect(),
            hasher: DefaultHashBuilder::default(),
            capacity,
            ttl_us,
            has_warned: AtomicBool::new(false),
            taken: CachePadded::new(AtomicUsize::new(0)),
            next_seq: CachePadded::new(AtomicU64::new(0)),
        }
    }

    /// Adds an open record, the newest of its id.
    pub(super) fn open(
        &self,
        id: &str,
        route: &str,
        unix_us: i64,
        now_us: u64,
    ) -> (Arc<Home>, Place) {
        let home = &self.homes[thread_number() % self.homes.len()];
        (Arc::clone(home), self.open_in(home, id, route, unix_us, now_us))
    }

    fn open_in(&self, home: &Arc<Home>, id: &str, route: &str, unix_us: i64, now_us: u64) -> Place {
        let hash = self.hash(id);
        loop {
            let mut shard = home.shard.write();
            self.expire(&mut shard, now_us);
            if !self.take_room() && !self.evict_own(home, &mut shard, now_us) {
                drop(shard);
                if !self.evict_oldest(now_us) {
                    // Others hold rooms they are about to fill; let them.
                    std::thread::yield_now();
                    continue;
                }
                shard = home.shard.write();
            }
            // Given under the shard's lock, so that a listing that waits for the lock sees all numbers it knows of.
            let seq = self.next_seq.fetch_add(1, Ordering::Relaxed);
            let place = shard.insert(seq, id, hash, route, unix_us);
            if shard.len() == 1 {
                home.say_next_out(&shard);
            }
            return place;
        }
    }

    /// A store of these records of ended requests, in the order of their arrival. They never expire.
    pub(super) fn of(records: Vec<Record>) -> Store {
        let store = Store::new(records.len().max(1), u64::MAX, "", Arc::new(Context::new(None)));
        store.taken.store(records.len(), Ordering::Relaxed);
        store.next_seq.store(records.len() as u64, Ordering::Relaxed);
        for (seq, record) in (0..).zip(records) {
            let id = record.request_id.to_string();
            let home = &store.homes[seq as usize % store.homes.len()];
            home.shard.write().restore(seq, &id, store.hash(&id), record);
        }
        store
    }

    /// The newest record with this id; looking at it is a use. None also if the only one leaves meanwhile.
    pub(super) fn get(&self, id: &str, now_us: u64) -> Option<Trace> {
        let (hash, id) = (self.hash(id), CompactId::new(id));
        let mut newest: Option<(&Home, Place, Trace)> = None;
        let mut same_id = 0;
        for home in &self.homes {
            let shard = self.unexpired(home, now_us);
            let Some((place, record, held)) = shard.newest(&id, hash) else { continue };
            same_id += held;
            if newest.as_ref().is_none_or(|(_, other, _)| other.seq < place.seq) {
                newest = Some((home, place, record.view()));
            }
        }
        let (home, place, mut trace) = newest?;
        trace.same_id = (same_id > 1).then_some(same_id);
        if trace.status.is_ended() {
            home.shard.write().is_used(place);
        }
        Some(trace)
    }

    /// A page of what the query asks for. Records that arrive meanwhile are not on it.
    pub(super) fn list(&self, query: &Query, now_us: u64) -> Page {
        let mut page = Page { traces: Vec::new(), next_cursor: None };
        self.remove_expired(now_us);
        let newest = self.next_seq.load(Ordering::Relaxed);
        let before = query.cursor.map_or(newest, |cursor| cursor.seq.min(newest));
        let mut walks: Vec<Walk> = self.homes.iter().map(|_| Walk::new(before)).collect();
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
                    let shard = self.homes[index].shard.read();
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
        // All shards at one moment: what leaves one and makes room for another is not counted twice.
        let shards: Vec<_> = self.homes.iter().map(|home| home.shard.read()).collect();
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
        self.homes.iter().map(|home| self.remove_expired_of(home, now_us)).sum()
    }

    /// A shard in which no record's time is over.
    fn unexpired<'a>(&self, home: &'a Home, now_us: u64) -> RwLockReadGuard<'a, Shard> {
        loop {
            let shard = home.shard.read();
            if !shard.has_expired(now_us, self.ttl_us) {
                return shard;
            }
            drop(shard);
            self.remove_expired_of(home, now_us);
        }
    }

    fn remove_expired_of(&self, home: &Home, now_us: u64) -> usize {
        let mut removed = 0;
        // Readers are not held up when there is nothing to do, and nobody for long when there is.
        while home.shard.read().has_expired(now_us, self.ttl_us) {
            removed += self.expire(&mut home.shard.write(), now_us);
        }
        removed
    }

    fn hash(&self, id: &str) -> u32 {
        self.hasher.hash_one(id) as u32
    }

    fn take_room(&self) -> bool {
        let taken = |taken| (taken < self.capacity).then_some(taken + 1);
        self.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, taken).is_ok()
    }

    /// Makes a room, which stays taken, in this shard; not if the next to leave is in another one.
    fn evict_own(&self, home: &Arc<Home>, shard: &mut Shard, now_us: u64) -> bool {
        let next_out = shard.next_out();
        let is_next = |other: &Arc<Home>| {
            let said = other.said_next_out();
            Arc::ptr_eq(home, other) || next_out <= said.saturating_add(lag(next_out, now_us))
        };
        self.homes.iter().all(is_next) && self.evict_from(home, shard, now_us)
    }

    /// Makes a room, which stays taken, in the shard that has the next to leave.
    fn evict_oldest(&self, now_us: u64) -> bool {
        loop {
            let (said, home) = self.oldest();
            if let Some(is_made) = self.evict_said(said, home, now_us) {
                return is_made;
            }
        }
    }

    /// The shard that has the next to leave, and what it said of that.
    fn oldest(&self) -> (u64, &Home) {
        let said = self.homes.iter().map(|home| (home.said_next_out(), &**home));
        said.min_by_key(|(said, _)| *said).expect("a store has a shard")
    }

    /// Makes a room, which stays taken, in a shard that said this; None if what it said of has left since, perhaps for
    /// another thread that had read the same.
    fn evict_said(&self, said: u64, home: &Home, now_us: u64) -> Option<bool> {
        let mut shard = home.shard.write();
        if self.expire(&mut shard, now_us) > 0 && self.take_room() {
            return Some(true);
        }
        let next_out = shard.next_out();
        if next_out <= said.saturating_add(lag(next_out, now_us)) {
            return Some(self.evict_from(home, &mut shard, now_us));
        }
        home.say_next_out(&shard);
        None
    }

    fn evict_from(&self, home: &Home, shard: &mut Shard, now_us: u64) -> bool {
        let is_evicted = shard.evict();
        let next_out = shard.next_out();
        let unsaid = next_out.checked_sub(home.said_next_out());
        if unsaid.is_none_or(|unsaid| unsaid >= lag(next_out, now_us) / SAID_PER_LAG) {
            home.say_next_out(shard);
        }
        // Read first: what nobody writes stays in every processor's cache.
        if is_evicted
            && !self.has_warned.load(Ordering::Relaxed)
            && !self.has_warned.swap(true, Ordering::Relaxed)
        {
            tracing::warn!(
                max_trace_entries = self.capacity,
                "the trace store is full: records leave before trace_ttl_seconds; \
                 raise max_trace_entries to keep them"
            );
        }
        is_evicted
    }

    fn expire(&self, shard: &mut Shard, now_us: u64) -> usize {
        let removed = shard.expire(now_us, self.ttl_us, MAX_EXPIRED);
        if removed > 0 {
            self.taken.fetch_sub(removed, Ordering::Relaxed);
        }
        removed
    }
}

/// By how much a record may be older than this one and leave after it, in microseconds.
fn lag(next_out: u64, now_us: u64) -> u64 {
    now_us.saturating_sub(next_out) / AGE_PER_LAG
}

/// The number of this thread among those alive that have opened records: the lowest that was free.
fn thread_number() -> usize {
    /// Those of threads that have ended, and how many numbers were ever given.
    static FREE: Mutex<(BTreeSet<usize>, usize)> = Mutex::new((BTreeSet::new(), 0));

    struct Number(usize);

    impl Drop for Number {
        fn drop(&mut self) {
            FREE.lock().0.insert(self.0);
        }
    }

    thread_local! {
        static NUMBER: Number = {
            let (free, given) = &mut *FREE.lock();
            Number(free.pop_first().unwrap_or_else(|| {
                *given += 1;
                *given - 1
            }))
        };
    }
    NUMBER.with(|number| number.0)
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
