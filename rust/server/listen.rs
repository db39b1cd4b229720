//! Listens, serves connections, and ends in steps: told to drain it still accepts for as long as load balancers need to
//! notice; then no more, and what is open drains; at the end of the grace period or when told to, what is left is cut.

use std::convert::Infallible;
use std::io;
use std::pin::pin;
use std::time::Duration;

use axum::response::IntoResponse;
use futures_util::FutureExt;
use futures_util::future::ready;
use hyper::body::Incoming;
use hyper::header::HOST;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Version};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::client_stream::ClientStream;
use super::exchange::Exchange;
use super::front::Front;
use crate::error::{Error, Kind};

/// Connections that wait to be accepted; a burst of clients arrives faster than threads wake up.
const BACKLOG: u32 = 4096;
/// A failed accept, for instance for want of file descriptors, would fail again at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
const WARN_EVERY: Duration = Duration::from_secs(60);

/// How long a client may take for the head of its next request. Longer than clients keep idle connections.
const HEAD_WITHIN: Duration = Duration::from_secs(120);

/// A longer target would leave no room for the base path of a worker: hyper takes 65,534 bytes in all.
const TARGET_BYTES_MAX: usize = 63_000;

/// What a server was told about its end.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Order {
    Serve,
    /// From `from` on take nothing new; what is in flight has until `until`.
    Drain {
        from: Instant,
        until: Instant,
    },
    /// Cut everything.
    Stop,
}

/// A listener with a long backlog on the first address of `host` that takes it.
pub(crate) async fn listen(host: &str, port: u16) -> io::Result<TcpListener> {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let addresses = tokio::net::lookup_host((bare, port)).await.map_err(|error| {
        io::Error::new(error.kind(), format!("cannot listen on {host}: {error}"))
    })?;
    let mut failure = None;
    for address in addresses {
        let bind = || {
            let socket =
                if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
            socket.set_reuseaddr(true)?;
            socket.bind(address)?;
            socket.listen(BACKLOG)
        };
        match bind() {
            Ok(listener) => return Ok(listener),
            Err(error) => {
                let is_taken = error.kind() == io::ErrorKind::AddrInUse;
                failure = Some(error);
                // On another address of the same name clients might still find the other program.
                if is_taken {
                    break;
                }
            }
        }
    }
    let error = failure.unwrap_or_else(|| io::ErrorKind::AddrNotAvailable.into());
    let hint = if error.kind() == io::ErrorKind::AddrInUse {
        "; another program has it: stop that, or choose another port (0 takes a free one)"
    } else {
        ""
    };
    Err(io::Error::new(
        error.kind(),
        format!("cannot listen on port {port} of {host}: {error}{hint}"),
    ))
}

/// Serves until told to drain, then waits for what is in flight. Returns when all has ended or is to be cut, with the
/// connections that are left; dropping them cuts them.
pub(crate) async fn serve(
    listener: TcpListener,
    front: Front,
    mut orders: watch::Receiver<Order>,
    request_timeout: Duration,
) -> JoinSet<()> {
    let graceful = GracefulShutdown::new();
    // As many as clients open, which the system's limit of file descriptors bounds.
    let mut connections = JoinSet::new();
    let mut warned_at = None;
    loop {
        let order = *orders.borrow_and_update();
        let closing = async {
            match order {
                Order::Serve => std::future::pending().await,
                Order::Drain { from, .. } => tokio::time::sleep_until(from).await,
                Order::Stop => {}
            }
        };
        tokio::select! {
            biased;
            () = closing => break,
            changed = orders.changed() => if changed.is_err() { return connections },
            // One that panicked has told about itself.
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    accept(stream, front.clone(), &graceful, request_timeout, &mut connections);
                }
                Err(error) => refused(&error, &mut warned_at).await,
            },
        }
    }
    drop(listener);
    tracing::info!("draining {} connections", graceful.count());
    let mut drained = pin!(graceful.shutdown());
    loop {
        let Order::Drain { until, .. } = *orders.borrow_and_update() else {
            tracing::warn!("told to stop at once: cutting what is left");
            return connections;
        };
        tokio::select! {
            () = &mut drained => {
                tracing::info!("drained");
                return connections;
            }
            () = tokio::time::sleep_until(until) => {
                tracing::warn!("grace period over: cutting what is left");
                return connections;
            }
            _ = orders.changed() => {}
        }
    }
}

fn accept(
    stream: TcpStream,
    front: Front,
    graceful: &GracefulShutdown,
    request_timeout: Duration,
    connections: &mut JoinSet<()>,
) {
    match stream.set_nodelay(true) {
        Ok(()) => {
            connections.spawn(serve_connection(stream, front, graceful, request_timeout));
        }
        Err(error) => tracing::debug!("a client was gone before it was served: {error}"),
    }
}

/// Serves one client until it leaves, or until its connection is idle after `graceful` was shut down.
pub(crate) fn serve_connection<S>(
    stream: S,
    front: Front,
    graceful: &GracefulShutdown,
    request_timeout: Duration,
) -> impl Future<Output = ()> + use<S>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let stream = ClientStream::new(stream);
    let exchanges = stream.exchanges();
    let service = service_fn(move |mut request: Request<Incoming>| {
        let exchange = Exchange::begin(request_timeout);
        exchanges.begin(exchange.clone());
        request.extensions_mut().insert(exchange);
        if let Err(error) = check_head(&request) {
            return ready(error.into_response()).left_future().map(Ok::<_, Infallible>);
        }
        let mut answering = front.answer(request);
        // Begun before hyper looks whether the client is still there: a request that came has a trace, also if its
        // client left behind it. hyper polls it again, with a waker, or drops it.
        let answering = match (&mut answering).now_or_never() {
            Some(answer) => ready(answer).left_future(),
            None => answering.right_future(),
        };
        answering.map(Ok)
    });
    let watched = stream.watch();
    // A chunk is copied behind its head and sent as one piece: of some hundred bytes that is a microsecond less than a
    // list of pieces, and of an answer of 1 MB a tenth more. An idle connection keeps the memory for its largest piece.
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_WITHIN)
        .writev(false)
        .serve_connection(TokioIo::new(stream), service);
    let connection = watched.around(graceful.watch(connection));
    async move {
        if let Err(error) = connection.await {
            tracing::debug!("a client's connection ended: {error}");
        }
    }
}

/// A target leaves room for a worker's base path, and a request names the host it is for, and only one (RFC 9112,
/// section 3.2): two parties that read two of them differently would disagree about whose request it is.
fn check_head<Body>(request: &Request<Body>) -> Result<(), Error> {
    let target_bytes = request.uri().path_and_query().map_or(0, |target| target.as_str().len());
    if target_bytes > TARGET_BYTES_MAX {
        let message =
            format!("a target of {target_bytes} bytes; at most {TARGET_BYTES_MAX} are taken");
        return Err(Error::new(Kind::UriTooLong, message));
    }
    let hosts = request.headers().get_all(HOST).iter().count();
    if hosts == 1 || (hosts == 0 && request.version() < Version::HTTP_11) {
        return Ok(());
    }
    let message = format!("the request has {hosts} host headers; HTTP asks for one");
    Err(Error::new(Kind::InvalidRequest, message))
}

/// Out of file descriptors, or a client that left again: neither ends the router.
async fn refused(error: &io::Error, warned_at: &mut Option<Instant>) {
    if warned_at.is_none_or(|at| at.elapsed() >= WARN_EVERY) {
        *warned_at = Some(Instant::now());
        tracing::warn!("cannot accept a connection: {error} (said at most once a minute)");
    }
    tokio::time::sleep(ACCEPT_PAUSE).await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::Router;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    const STEP: Duration = Duration::from_secs(10);

    #[tokio::test(start_paused = true)]
    async fn a_head_that_takes_too_long_ends_its_connection() {
        let whole: &[u8] = b"GET /x HTTP/1.1\r\nhost: x\r\n\r\n";
        // From the first byte on, and behind a request that was answered.
        for before in [&b""[..], whole] {
            let (mut client, server) = duplex(1 << 16);
            let graceful = GracefulShutdown::new();
            let timeout = Duration::from_secs(1800);
            tokio::spawn(serve_connection(server, Router::new().into(), &graceful, timeout));
            client.write_all(before).await.expect("open");
            let began = Instant::now();
            let head = b"GET /x HTTP/1.1\r\nx-slow: ".iter().chain(std::iter::repeat(&b'x'));
            for byte in head {
                if client.write_all(&[*byte]).await.is_err() {
                    break;
                }
                tokio::time::sleep(STEP).await;
            }
            let took = began.elapsed();
            assert!((HEAD_WITHIN..HEAD_WITHIN + 3 * STEP).contains(&took), "{took:?}");
            let mut answers = Vec::new();
            client.read_to_end(&mut answers).await.expect("an end");
            assert_eq!(answers.starts_with(b"HTTP/1.1 404"), !before.is_empty());
        }
    }
}
