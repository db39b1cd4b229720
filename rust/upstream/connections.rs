//! The connections to one worker, HTTP/1.1, kept and used again.
//!
//! The one idea: whether a connection is *new* or *reused* decides what its failure means. A worker may close an
//! idle connection at the very moment we write to it; that says nothing about the worker, so a request whose
//! reused connection ended before any byte of the answer is sent once more, on a new one. A new connection that
//! fails does speak about the worker, and the caller hears of it.
//!
//! Framing and parsing are hyper's; [`Driver`] runs its connection in the task of the request that is on it. A
//! connection that was dropped in the middle of an answer is closed: SGLang takes that as the request's abort.

use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::{Request, Response, StatusCode, Version};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

use super::driver::Driver;
use super::has_known_coding;
use super::network::{Network, Stream};
use crate::error::with_causes;

/// uvicorn, SGLang's server, closes a connection that was idle for 5 s; ours are gone before.
const IDLE_MAX: Duration = Duration::from_millis(2500);
/// How much of a body's head is shown to who asks before it is relayed.
const BEGUN_BYTES_MAX: usize = 400;

/// What a failed connect says about the other side.
const OF_THE_PEER: [io::ErrorKind; 6] = [
    io::ErrorKind::ConnectionRefused,
    io::ErrorKind::ConnectionReset,
    io::ErrorKind::HostUnreachable,
    io::ErrorKind::NetworkUnreachable,
    io::ErrorKind::NetworkDown,
    io::ErrorKind::TimedOut,
];

/// How a write fails once the other side has closed.
const GONE: [io::ErrorKind; 3] =
    [io::ErrorKind::BrokenPipe, io::ErrorKind::ConnectionReset, io::ErrorKind::ConnectionAborted];

/// Why a request got no answer from this worker.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// No connection: refused, unreachable, unknown name.
    #[error("cannot connect to {address}: {source}")]
    Connect { address: Box<str>, source: io::Error },
    #[error("no connection to {address} within {} s", timeout.as_secs())]
    ConnectTimeout { address: Box<str>, timeout: Duration },
    /// A new connection ended, or spoke something else than HTTP, before the head of an answer.
    #[error("the connection to {address} ended before an answer: {}", with_causes(source))]
    NoAnswer { address: Box<str>, source: hyper::Error },
    #[error("{address} switched to another protocol, which nobody had asked for")]
    Upgrade { address: Box<str> },
    #[error("{address} answered in a transfer-encoding other than chunked alone")]
    UnknownCoding { address: Box<str> },
    /// The head of an answer came, and nothing of its body.
    #[error("the answer broke off before its first byte: {}", with_causes(source))]
    BrokenAnswer { source: hyper::Error },
}

impl SendError {
    /// Whether it says nothing of the worker: a want of file descriptors or ports is the router's own.
    pub fn is_ours(&self) -> bool {
        matches!(self, Self::Connect { .. }) && !self.is_unconnected()
    }

    /// Whether nobody was found at the address.
    pub fn is_unconnected(&self) -> bool {
        match self {
            Self::ConnectTimeout { .. } => true,
            // A name that is not found has no number of the system's.
            Self::Connect { source, .. } => {
                source.raw_os_error().is_none() || OF_THE_PEER.contains(&source.kind())
            }
            Self::NoAnswer { .. }
            | Self::Upgrade { .. }
            | Self::UnknownCoding { .. }
            | Self::BrokenAnswer { .. } => false,
        }
    }
}

/// Idle connections to one worker, and the way to make new ones.
#[derive(Debug)]
pub struct Connections {
    /// `HOST:PORT`
    address: Box<str>,
    connect_timeout: Duration,
    network: Arc<dyn Network>,
    /// Newest last. Holds at most as many as were in use at once within that time. None once nothing is kept any more.
    idle: Mutex<Option<Vec<Idle>>>,
}

#[derive(Debug)]
struct Connection {
    sender: SendRequest<Full<Bytes>>,
    driver: Driver<http1::Connection<TokioIo<Wire>, Full<Bytes>>>,
    /// Bytes the worker has sent on it so far.
    received: Arc<AtomicU64>,
}

#[derive(Debug)]
struct Idle {
    connection: Box<Connection>,
    since: Instant,
}

impl Connections {
    /// `address` is `HOST:PORT`, with the brackets of an IPv6 address.
    pub fn new(address: &str, connect_timeout: Duration, network: Arc<dyn Network>) -> Arc<Self> {
        let idle = Mutex::new(Some(Vec::new()));
        Arc::new(Self { address: address.into(), connect_timeout, network, idle })
    }

    /// Sends a request and waits for the head of the answer.
    ///
    /// A reused connection that ends before any byte of the answer is replaced by a new one, once; the request is made
    /// anew for it.
    pub async fn send(
        self: &Arc<Self>,
        request: impl Fn() -> Request<Full<Bytes>>,
    ) -> Result<Response<Answer>, SendError> {
        if let Some(connection) = self.reusable() {
            let received = connection.received.clone();
            let before = received.load(Ordering::Relaxed);
            match self.send_on(connection, request()).await {
                Err(_) if received.load(Ordering::Relaxed) == before => {}
                answered => return self.final_answer(answered),
            }
        }
        let connection = self.connect().await?;
        self.final_answer(self.send_on(connection, request()).await)
    }

    fn final_answer(
        &self,
        answered: Result<Response<Answer>, hyper::Error>,
    ) -> Result<Response<Answer>, SendError> {
        match answered {
            Ok(answer) if answer.status() == StatusCode::SWITCHING_PROTOCOLS => {
                Err(SendError::Upgrade { address: self.address.clone() })
            }
            Ok(answer) if !has_known_coding(answer.headers()) => {
                Err(SendError::UnknownCoding { address: self.address.clone() })
            }
            Ok(answer) => Ok(answer),
            Err(source) => Err(self.no_answer(source)),
        }
    }

    /// Closes what has been idle for too long. Called every second or so.
    pub fn close_idle(&self) {
        if let Some(idle) = &mut *self.idle.lock() {
            idle.retain_mut(Idle::is_usable);
        }
    }

    /// Closes what is idle, and from now on each connection at the end of its answer.
    pub fn close(&self) {
        *self.idle.lock() = None;
    }

    async fn send_on(
        self: &Arc<Self>,
        mut connection: Box<Connection>,
        request: Request<Full<Bytes>>,
    ) -> Result<Response<Answer>, hyper::Error> {
        let Connection { sender, driver, .. } = &mut *connection;
        let mut answering = pin!(sender.send_request(request));
        let answered =
            std::future::poll_fn(|cx| driver.poll_beside(cx, |cx| answering.as_mut().poll(cx)));
        let mut response = answered.await?;
        // The version is a matter of one connection; the client's is another one.
        *response.version_mut() = Version::HTTP_11;
        let connections = self.clone();
        let lease = Some(Lease { connections, connection });
        Ok(response.map(|body| Answer { body, held: None, lease }))
    }

    /// The connection that was given back last among those that can take a request.
    fn reusable(&self) -> Option<Box<Connection>> {
        loop {
            let mut newest = self.idle.lock().as_mut()?.pop()?;
            if newest.is_usable() {
                return Some(newest.connection);
            }
        }
    }

    fn give_back(&self, mut connection: Box<Connection>) {
        // One that the worker wants closed, or whose request is still being sent though it was answered, is of no use.
        if connection.is_ready()
            && let Some(idle) = &mut *self.idle.lock()
        {
            idle.push(Idle { connection, since: Instant::now() });
        }
    }

    async fn connect(&self) -> Result<Box<Connection>, SendError> {
        let dialling = self.network.dial(&self.address);
        let stream = tokio::time::timeout(self.connect_timeout, dialling)
            .await
            .map_err(|_| SendError::ConnectTimeout {
                address: self.address.clone(),
                timeout: self.connect_timeout,
            })?
            .map_err(|source| SendError::Connect { address: self.address.clone(), source })?;
        let received = Arc::new(AtomicU64::new(0));
        let io = TokioIo::new(Wire { stream, received: received.clone(), is_gone: false });
        let (sender, connection) =
            http1::handshake(io).await.map_err(|source| self.no_answer(source))?;
        Ok(Box::new(Connection { sender, driver: Driver::new(connection), received }))
    }

    fn no_answer(&self, source: hyper::Error) -> SendError {
        SendError::NoAnswer { address: self.address.clone(), source }
    }
}

impl Connection {
    /// Whether it would take a request now.
    fn is_ready(&mut self) -> bool {
        self.driver.is_alive() && self.sender.is_ready()
    }
}

impl Idle {
    fn is_usable(&mut self) -> bool {
        self.since.elapsed() < IDLE_MAX && self.connection.is_ready()
    }
}

/// The body of a worker's answer. Read to its end, its connection becomes free for the next request;
/// dropped before, the connection is closed.
#[derive(Debug)]
pub struct Answer {
    body: Incoming,
    /// The first frame, once [`Answer::begin`] has waited for it.
    held: Option<Frame<Bytes>>,
    lease: Option<Lease>,
}

#[derive(Debug)]
struct Lease {
    connections: Arc<Connections>,
    connection: Box<Connection>,
}

impl Answer {
    /// Waits for the first frame and keeps it for whoever reads the body.
    pub async fn begin(&mut self) -> Result<(), SendError> {
        let frame = std::future::poll_fn(|cx| Pin::new(&mut *self).poll_frame(cx)).await;
        self.held = frame.transpose().map_err(|source| SendError::BrokenAnswer { source })?;
        Ok(())
    }

    /// The head of a body that [`Answer::begin`] has waited for, at most 400 bytes.
    pub fn begun(&self) -> &[u8] {
        let data = self.held.as_ref().and_then(Frame::data_ref).map_or(&[][..], |data| data);
        &data[..data.len().min(BEGUN_BYTES_MAX)]
    }

    fn end(&mut self) {
        if let Some(Lease { connections, connection }) = self.lease.take() {
            connections.give_back(connection);
        }
    }
}

impl Body for Answer {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        if let Some(held) = self.held.take() {
            return Poll::Ready(Some(Ok(held)));
        }
        let Self { body, lease, .. } = &mut *self;
        let frame = match lease {
            Some(Lease { connection, .. }) => {
                ready!(connection.driver.poll_beside(cx, |cx| Pin::new(&mut *body).poll_frame(cx)))
            }
            None => ready!(Pin::new(body).poll_frame(cx)),
        };
        // Trailers are hop-by-hop here, as is the header that announces them; nothing follows them.
        let frame = frame.filter(|frame| !frame.as_ref().is_ok_and(Frame::is_trailers));
        if frame.is_none() || self.body.is_end_stream() {
            self.end();
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.held.is_none() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let left = self.body.size_hint();
        let held = self.held.as_ref().and_then(Frame::data_ref).map_or(0, |data| data.len() as u64);
        let mut whole = SizeHint::new();
        whole.set_lower(left.lower() + held);
        if let Some(upper) = left.upper() {
            whole.set_upper(upper + held);
        }
        whole
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        // An answer without a body is never polled.
        if self.body.is_end_stream() {
            self.end();
        }
    }
}

pin_project_lite::pin_project! {
    /// A stream that counts what it has received, and is read to its end also when it cannot be written to.
    ///
    /// A worker may refuse a request by its head and close, with the body unread. Its answer is there to be read; an
    /// error in writing would end the connection before.
    struct Wire {
        #[pin]
        stream: Stream,
        received: Arc<AtomicU64>,
        // The worker takes nothing more: what is written is thrown away, and reading tells what that means.
        is_gone: bool,
    }
}

impl AsyncRead for Wire {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.project();
        let before = buffer.filled().len();
        ready!(this.stream.poll_read(cx, buffer))?;
        this.received.fetch_add((buffer.filled().len() - before) as u64, Ordering::Relaxed);
        Poll::Ready(Ok(()))
    }
}

impl Wire {
    fn write(
        self: Pin<&mut Self>,
        bytes: usize,
        write: impl FnOnce(Pin<&mut Stream>) -> Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        let this = self.project();
        if !*this.is_gone {
            let written = ready!(write(this.stream));
            *this.is_gone = written.as_ref().is_err_and(|error| GONE.contains(&error.kind()));
            if !*this.is_gone {
                return Poll::Ready(written);
            }
        }
        Poll::Ready(Ok(bytes))
    }
}

impl AsyncWrite for Wire {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.write(bytes.len(), |stream| stream.poll_write(cx, bytes))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.project().stream.poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.project().stream.poll_shutdown(cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let bytes = buffers.iter().map(|buffer| buffer.len()).sum();
        self.write(bytes, |stream| stream.poll_write_vectored(cx, buffers))
    }
}
