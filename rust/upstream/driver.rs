//! Runs a connection in the task that waits for its answer.
//!
//! The one idea: hyper gives a connection as two ends, a handle for requests and a future that reads and writes. That
//! future could run in a task of its own, and each message between the two would wake one task or the other. Here who
//! waits for an answer, or for more of it, runs the future too: [`Driver::poll_beside`]. What the two ends say to each
//! other then rings a [`Bell`] that is heard at once, and wakes nobody.
//!
//! Invariant: while somebody waits, whatever happens on the connection wakes that task. While nobody does, nothing is
//! read or written, and nobody is woken.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use futures_util::task::AtomicWaker;

/// The bell rang since it was last looked at.
const RUNG: u8 = 1;
/// Whoever waits is awake, and will look at the bell before it sleeps.
const ATTENDED: u8 = 2;

/// What a connection's future and its handle wake.
#[derive(Debug, Default)]
struct Bell {
    state: AtomicU8,
    task: AtomicWaker,
}

impl Bell {
    /// From here on the bell wakes nobody.
    fn attend(&self, waker: &Waker) {
        self.task.register(waker);
        self.state.store(ATTENDED, Ordering::Release);
    }

    /// From here on the bell wakes the task that attended to it; not if it has rung meanwhile.
    fn leave(&self) -> bool {
        let left = self.state.compare_exchange(ATTENDED, 0, Ordering::AcqRel, Ordering::Acquire);
        if left.is_err() {
            self.state.store(ATTENDED, Ordering::Release);
        }
        left.is_ok()
    }
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if self.state.fetch_or(RUNG, Ordering::AcqRel) & ATTENDED == 0 {
            self.task.wake();
        }
    }
}

/// A connection's future, which ends with the connection.
pub(super) struct Driver<C> {
    /// None once it has ended. What it ended with reaches the request that was on it.
    connection: Option<C>,
    bell: Arc<Bell>,
    /// The bell, as the connection knows it.
    waker: Waker,
}

impl<C: Future + Unpin> Driver<C> {
    pub(super) fn new(connection: C) -> Self {
        let bell: Arc<Bell> = Arc::default();
        // As if somebody had just gone and did not wait.
        bell.state.store(ATTENDED, Ordering::Release);
        let waker = bell.clone().into();
        Self { connection: Some(connection), bell, waker }
    }

    /// Polls something that depends on the connection, and the connection, until the one is ready or both have nothing
    /// to do.
    pub(super) fn poll_beside<T>(
        &mut self,
        cx: &Context<'_>,
        mut poll: impl FnMut(&mut Context<'_>) -> Poll<T>,
    ) -> Poll<T> {
        self.bell.attend(cx.waker());
        loop {
            if let Poll::Ready(it) = poll(&mut Context::from_waker(&self.waker)) {
                return Poll::Ready(it);
            }
            let was_alive = self.connection.is_some();
            if self.is_alive() == was_alive && self.bell.leave() {
                return Poll::Pending;
            }
        }
    }

    /// Lets the connection do what there is to do; whether it goes on after that.
    pub(super) fn is_alive(&mut self) -> bool {
        let mut cx = Context::from_waker(&self.waker);
        let Some(connection) = &mut self.connection else { return false };
        if Pin::new(connection).poll(&mut cx).is_ready() {
            self.connection = None;
        }
        self.connection.is_some()
    }
}

impl<C> fmt::Debug for Driver<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Driver").field("has_ended", &self.connection.is_none()).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use parking_lot::Mutex;

    use super::*;

    /// Counts how often a task was woken.
    #[derive(Default)]
    struct Wakes(AtomicUsize);

    impl Wake for Wakes {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A connection and its handle: what was put in, by the network or by a poll of the one end, wakes the other.
    #[derive(Default)]
    struct Pipe {
        network: Vec<u8>,
        read: Vec<u8>,
        connection: Option<Waker>,
        handle: Option<Waker>,
        has_ended: bool,
    }

    struct Connection(Arc<Mutex<Pipe>>);

    impl Future for Connection {
        type Output = ();

        fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
            let mut pipe = self.0.lock();
            pipe.connection = Some(cx.waker().clone());
            if let Some(byte) = pipe.network.pop() {
                pipe.read.push(byte);
                pipe.handle.take().expect("a handle that waits").wake();
            }
            if pipe.has_ended { Poll::Ready(()) } else { Poll::Pending }
        }
    }

    fn connected() -> (Arc<Mutex<Pipe>>, Driver<Connection>) {
        let pipe: Arc<Mutex<Pipe>> = Arc::default();
        (pipe.clone(), Driver::new(Connection(pipe)))
    }

    fn task() -> (Arc<Wakes>, Waker) {
        let wakes: Arc<Wakes> = Arc::default();
        (wakes.clone(), wakes.into())
    }

    fn read(pipe: &Mutex<Pipe>, cx: &Context<'_>) -> Poll<u8> {
        let mut pipe = pipe.lock();
        pipe.handle = Some(cx.waker().clone());
        pipe.read.pop().map_or(Poll::Pending, Poll::Ready)
    }

    #[test]
    fn what_the_ends_say_to_each_other_wakes_nobody_and_what_comes_meanwhile_does() {
        let (pipe, mut driver) = connected();
        let (wakes, waker) = task();
        let cx = Context::from_waker(&waker);
        let count = || wakes.0.load(Ordering::Relaxed);
        let put = |byte| {
            pipe.lock().network.push(byte);
            let ring = pipe.lock().connection.take();
            ring.expect("a connection that waits").wake();
        };
        assert_eq!(driver.poll_beside(&cx, |cx| read(&pipe, cx)), Poll::Pending);
        for byte in 1..4 {
            put(byte);
            assert_eq!(count(), usize::from(byte), "who waits is woken");
            assert_eq!(driver.poll_beside(&cx, |cx| read(&pipe, cx)), Poll::Ready(byte));
            assert_eq!(driver.poll_beside(&cx, |cx| read(&pipe, cx)), Poll::Pending);
            assert_eq!(count(), usize::from(byte), "by what comes, and by nothing else");
        }
    }

    #[test]
    fn nobody_is_woken_who_does_not_wait_and_the_end_is_noticed() {
        let (pipe, mut driver) = connected();
        let (wakes, waker) = task();
        let cx = Context::from_waker(&waker);
        assert_eq!(driver.poll_beside(&cx, |_| Poll::Ready(0)), Poll::Ready(0));
        assert!(driver.is_alive());
        pipe.lock().has_ended = true;
        pipe.lock().connection.take().expect("a connection that waits").wake();
        assert_eq!(wakes.0.load(Ordering::Relaxed), 0);
        // The handle hears of the end from the connection, and is asked once more.
        let mut asked = 0;
        let heard = driver.poll_beside(&cx, |_| {
            asked += 1;
            if asked < 2 { Poll::Pending } else { Poll::Ready(()) }
        });
        assert_eq!(heard, Poll::Ready(()));
        assert!(!driver.is_alive());
    }
}
