//! Which requests are in flight, by id, so that they can be ended from outside (`POST /abort_request`).
//!
//! A request is listed under its id and under its body's `rid`, from the moment each is known until the guard is
//! dropped. Holds at most two entries per request in flight.

use std::hash::BuildHasher;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use futures_util::task::AtomicWaker;
use hashbrown::{DefaultHashBuilder, HashTable};
use parking_lot::Mutex;

use crate::workers::Worker;

const SHARDS: usize = 16;

/// Said to one request: end now. Nothing but the request's own task waits for it.
#[derive(Debug, Default)]
pub(super) struct Abort {
    is_said: AtomicBool,
    waker: AtomicWaker,
    /// Where the request is.
    worker: Mutex<Option<Arc<Worker>>>,
}

impl Abort {
    pub(super) fn is_said(&self) -> bool {
        self.is_said.load(Ordering::Acquire)
    }

    /// Ready once it was said.
    pub(super) fn poll(&self, cx: &Context<'_>) -> Poll<()> {
        self.waker.register(cx.waker());
        if self.is_said() { Poll::Ready(()) } else { Poll::Pending }
    }

    pub(super) async fn said(&self) {
        std::future::poll_fn(|cx| self.poll(cx)).await;
    }

    pub(super) fn move_to(&self, worker: Option<&Arc<Worker>>) {
        *self.worker.lock() = worker.cloned();
    }

    fn say(&self) {
        self.is_said.store(true, Ordering::Release);
        self.waker.wake();
    }
}

/// A request under one of its ids, by the hash of the id.
type Entry = (Arc<str>, Arc<Abort>);

#[derive(Debug, Default)]
pub(super) struct InFlight {
    hasher: DefaultHashBuilder,
    shards: [Mutex<HashTable<Entry>>; SHARDS],
}

impl InFlight {
    /// Lists a request under this id until the guard is dropped.
    pub(super) fn list(self: &Arc<Self>, id: &Arc<str>, abort: &Arc<Abort>) -> Listed {
        let hash = self.hasher.hash_one(&**id);
        let rehash = |(id, _): &Entry| self.hasher.hash_one(&**id);
        self.shard(hash).lock().insert_unique(hash, (id.clone(), abort.clone()), rehash);
        Listed { list: self.clone(), hash, abort: abort.clone() }
    }

    /// Ends all requests of this id. Returns how many there were, and the workers they were at, each once.
    pub(super) fn abort(&self, id: &str) -> (usize, Vec<Arc<Worker>>) {
        let hash = self.hasher.hash_one(id);
        let found: Vec<Arc<Abort>> = {
            let shard = self.shard(hash).lock();
            let same_hash = shard.iter_hash(hash).filter(|(listed, _)| **listed == *id);
            same_hash.map(|(_, abort)| abort.clone()).collect()
        };
        let mut workers: Vec<Arc<Worker>> = Vec::new();
        for abort in &found {
            // Before the request lets go of its worker.
            let worker = abort.worker.lock().clone();
            let is_new = |worker: &Arc<Worker>| workers.iter().all(|it| it.index != worker.index);
            workers.extend(worker.filter(is_new));
            abort.say();
        }
        (found.len(), workers)
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.shards.iter().all(|shard| shard.lock().is_empty())
    }

    fn shard(&self, hash: u64) -> &Mutex<HashTable<Entry>> {
        // Not from the bits the shard's own table uses: the lowest and the highest.
        &self.shards[(hash >> 32) as usize % SHARDS]
    }
}

/// A request's entry under one id.
#[derive(Debug)]
pub(super) struct Listed {
    list: Arc<InFlight>,
    hash: u64,
    abort: Arc<Abort>,
}

impl Drop for Listed {
    fn drop(&mut self) {
        // Should both ids of a request have one hash, either entry goes first.
        let is_own = |(_, abort): &Entry| Arc::ptr_eq(abort, &self.abort);
        if let Ok(entry) = self.list.shard(self.hash).lock().find_entry(self.hash, is_own) {
            entry.remove();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_of_an_id_are_ended_and_none_of_another() {
        let list = Arc::new(InFlight::default());
        let aborts: [Arc<Abort>; 3] = std::array::from_fn(|_| Arc::default());
        let listed: Vec<_> = ["a", "a", "b"]
            .iter()
            .zip(&aborts)
            .map(|(id, abort)| list.list(&Arc::from(*id), abort))
            .collect();
        assert_eq!(list.abort("a").0, 2);
        assert_eq!(aborts.each_ref().map(|abort| abort.is_said()), [true, true, false]);
        drop(listed);
        assert_eq!(list.abort("b").0, 0);
        assert!(list.is_empty());
    }

    #[tokio::test]
    async fn it_is_heard_while_waiting_and_afterwards() {
        let list = Arc::new(InFlight::default());
        let abort: Arc<Abort> = Arc::default();
        let _listed = list.list(&"a".into(), &abort);
        let waiting = tokio::spawn({
            let abort = abort.clone();
            async move { abort.said().await }
        });
        tokio::task::yield_now().await;
        list.abort("a");
        waiting.await.expect("woken");
        abort.said().await;
    }
}
