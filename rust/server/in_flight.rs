//! Which requests are in flight, by id, so that they can be ended from outside (`POST /abort_request`).
//!
//! A request is listed under its id and under its body's `rid`, from the moment each is known until the guard is
//! dropped. Holds at most two entries per request in flight.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use futures_util::task::AtomicWaker;
use parking_lot::Mutex;
use smallvec::SmallVec;

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

type Shard = Mutex<HashMap<Box<str>, SmallVec<[Arc<Abort>; 1]>>>;

#[derive(Debug, Default)]
pub(super) struct InFlight {
    hasher: RandomState,
    shards: [Shard; SHARDS],
}

impl InFlight {
    /// Lists a request under this id until the guard is dropped.
    pub(super) fn list(self: &Arc<Self>, id: &str, abort: &Arc<Abort>) -> Listed {
        self.shard(id).lock().entry(id.into()).or_default().push(abort.clone());
        Listed { list: self.clone(), id: id.into(), abort: abort.clone() }
    }

    /// Ends all requests of this id. Returns how many there were, and the workers they were at, each once.
    pub(super) fn abort(&self, id: &str) -> (usize, Vec<Arc<Worker>>) {
        let found = self.shard(id).lock().get(id).cloned().unwrap_or_default();
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

    fn shard(&self, id: &str) -> &Shard {
        &self.shards[self.hasher.hash_one(id) as usize % SHARDS]
    }
}

/// A request's entry under one id.
#[derive(Debug)]
pub(super) struct Listed {
    list: Arc<InFlight>,
    id: Box<str>,
    abort: Arc<Abort>,
}

impl Drop for Listed {
    fn drop(&mut self) {
        let mut shard = self.list.shard(&self.id).lock();
        if let Entry::Occupied(mut entry) = shard.entry(std::mem::take(&mut self.id)) {
            entry.get_mut().retain(|abort| !Arc::ptr_eq(abort, &self.abort));
            if entry.get().is_empty() {
                entry.remove();
            }
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
        let listed: Vec<_> =
            ["a", "a", "b"].iter().zip(&aborts).map(|(id, abort)| list.list(id, abort)).collect();
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
        let _listed = list.list("a", &abort);
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
