//! A client's connection that notices when its client is gone, whatever hyper is doing.
//!
//! hyper reads while it waits for a request or for a client's leaving, but no more once bytes wait that are not their
//! turn, such as a pipelined request. Then [`Watched`], around hyper's side of the connection, reads ahead into a
//! small buffer: a client that leaves behind its further bytes is seen all the same. A FIN counts as leaving, also
//! before the answer: nobody who still wants one closes half of a connection on which the next request would come.
//!
//! A client that does not read its answer is cut when its request's time is over, or when the request is aborted: it
//! could not be told in any other way.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BytesMut};
use parking_lot::Mutex;
use pin_project_lite::pin_project;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;

use super::exchange::Exchange;

/// Most bytes read ahead of hyper. A client that sends more before its answer has come is read no further, and then
/// missed only when something is written to it.
const AHEAD_BYTES_MAX: usize = 64 << 10;
/// How much is read at a time.
const READ_BYTES: usize = 4 << 10;

/// What both sides of a client's connection share. Both are polled by the same task, so the lock is never waited for.
#[derive(Debug)]
struct Shared<S> {
    stream: S,
    ahead: BytesMut,
    /// hyper waits for bytes itself.
    is_awaited: bool,
    /// The end came while bytes were read ahead.
    has_ended: bool,
    /// The request on this connection.
    exchange: Option<Exchange>,
    /// Running while a write waits for the client.
    stalled: Option<Pin<Box<Sleep>>>,
}

/// hyper's side.
#[derive(Debug)]
pub(super) struct ClientStream<S>(Arc<Mutex<Shared<S>>>);

/// Watches over the connection that hyper makes of the stream.
pub(super) struct Watch<S>(Arc<Mutex<Shared<S>>>);

impl<S> Watch<S> {
    /// That connection, ended when its client is gone.
    pub(super) fn around<C>(self, connection: C) -> Watched<C, S> {
        Watched { connection, shared: self.0 }
    }
}

/// Tells the connection of its next request.
pub(super) struct Exchanges<S>(Arc<Mutex<Shared<S>>>);

impl<S> Exchanges<S> {
    pub(super) fn begin(&self, exchange: Exchange) {
        self.0.lock().exchange = Some(exchange);
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> ClientStream<S> {
    pub(super) fn new(stream: S) -> Self {
        Self(Arc::new(Mutex::new(Shared {
            stream,
            ahead: BytesMut::new(),
            is_awaited: false,
            has_ended: false,
            exchange: None,
            stalled: None,
        })))
    }

    pub(super) fn exchanges(&self) -> Exchanges<S> {
        Exchanges(self.0.clone())
    }

    pub(super) fn watch(&self) -> Watch<S> {
        Watch(self.0.clone())
    }
}

impl<S: AsyncRead + Unpin> Shared<S> {
    fn read(&mut self, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if !self.ahead.is_empty() {
            let count = self.ahead.len().min(buffer.remaining());
            buffer.put_slice(&self.ahead[..count]);
            self.ahead.advance(count);
            return Poll::Ready(Ok(()));
        }
        if self.has_ended {
            return Poll::Ready(Ok(()));
        }
        let read = Pin::new(&mut self.stream).poll_read(cx, buffer);
        self.is_awaited = read.is_pending();
        read
    }

    /// Reads what hyper has no use for yet. Ready when the client is gone.
    fn read_ahead(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        while !self.is_awaited && !self.has_ended && self.ahead.len() < AHEAD_BYTES_MAX {
            let mut room = [0; READ_BYTES];
            let mut buffer = ReadBuf::new(&mut room);
            match ready!(Pin::new(&mut self.stream).poll_read(cx, &mut buffer)) {
                Ok(()) if buffer.filled().is_empty() => {
                    self.has_ended = true;
                    return Poll::Ready(io::ErrorKind::UnexpectedEof.into());
                }
                Ok(()) => self.ahead.extend_from_slice(buffer.filled()),
                Err(error) => return Poll::Ready(error),
            }
        }
        Poll::Pending
    }
}

impl<S: AsyncWrite + Unpin> Shared<S> {
    fn write(
        &mut self,
        cx: &mut Context<'_>,
        write: impl FnOnce(Pin<&mut S>, &mut Context<'_>) -> Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        let written = write(Pin::new(&mut self.stream), cx);
        let Some(exchange) = self.exchange.as_ref().filter(|_| written.is_pending()) else {
            self.stalled = None;
            return written;
        };
        // Who says it wakes the connection's task, which is the one that last asked for it.
        if !exchange.abort.is_said() {
            let timer = || Box::pin(tokio::time::sleep_until(exchange.deadline.into()));
            ready!(self.stalled.get_or_insert_with(timer).as_mut().poll(cx));
        }
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client has stopped reading")))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for ClientStream<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.0.lock().read(cx, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for ClientStream<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.0.lock().write(cx, |stream, cx| stream.poll_write(cx, bytes))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.0.lock().write(cx, |stream, cx| stream.poll_write_vectored(cx, buffers))
    }

    fn is_write_vectored(&self) -> bool {
        self.0.lock().stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0.lock().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0.lock().stream).poll_shutdown(cx)
    }
}

/// Why a connection ended before its time.
#[derive(Debug, thiserror::Error)]
pub(super) enum Ended<E> {
    #[error("{0}")]
    Served(E),
    #[error("the client left: {0}")]
    Left(io::Error),
}

pin_project! {
    /// A connection, over when hyper says so or when its client is gone.
    pub(super) struct Watched<C, S> {
        // Dropped before the stream it stands on.
        #[pin]
        connection: C,
        shared: Arc<Mutex<Shared<S>>>,
    }
}

impl<C, S, E> Future for Watched<C, S>
where
    C: Future<Output = Result<(), E>>,
    S: AsyncRead + Unpin,
{
    type Output = Result<(), Ended<E>>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        this.shared.lock().is_awaited = false;
        if let Poll::Ready(ended) = this.connection.poll(cx) {
            return Poll::Ready(ended.map_err(Ended::Served));
        }
        this.shared.lock().read_ahead(cx).map(|gone| Err(Ended::Left(gone)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;
    use std::future::pending;
    use std::time::Duration;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
    use tokio::time::Instant;

    #[tokio::test(start_paused = true)]
    async fn a_client_that_stops_reading_is_cut_when_its_time_is_over() {
        let (client, server) = duplex(1 << 10);
        let mut stream = ClientStream::new(server);
        let until = Instant::now() + Duration::from_secs(5);
        let exchange = Exchange { deadline: until.into_std(), ..Exchange::begin(Duration::ZERO) };
        stream.exchanges().begin(exchange);
        let error = stream.write_all(&[0; 4 << 10]).await.expect_err("nobody reads");
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(Instant::now() >= until);
        drop(client);
    }

    #[tokio::test]
    async fn what_is_read_ahead_is_not_lost() {
        let (mut client, server) = duplex(1 << 20);
        let mut stream = ClientStream::new(server);
        let sent: Vec<u8> = (0..100_000_u32).map(|i| i as u8).collect();
        client.write_all(&sent).await.expect("room");
        let mut watched = stream.watch().around(pending::<io::Result<()>>());
        assert!((&mut watched).now_or_never().is_none());
        assert_eq!(stream.0.lock().ahead.len() / AHEAD_BYTES_MAX, 1, "full, and no more");
        let mut got = vec![0; sent.len()];
        stream.read_exact(&mut got).await.expect("all of it");
        assert_eq!(got, sent);
    }

    #[tokio::test]
    async fn a_client_that_leaves_behind_further_bytes_ends_its_connection() {
        let (mut client, server) = duplex(1 << 20);
        let stream = ClientStream::new(server);
        client.write_all(b"GET /next HTTP/1.1\r\n").await.expect("room");
        let mut watched = stream.watch().around(pending::<io::Result<()>>());
        assert!((&mut watched).now_or_never().is_none());
        drop(client);
        assert!(watched.await.is_err());
    }
}
