//! Listens, serves connections, and ends in steps: told to drain it still accepts for as long as load balancers need to
//! notice; then no more, and what is open drains; at the end of the grace period or when told to, what is left is cut.

use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::response::IntoResponse;
use futures_util::FutureExt;
use futures_util::future::ready;
use hyper::body::Incoming;
use hyper::header::HOST;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper::{Request, Version};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::watch;
use tokio::time::Instant;

use super::client_stream::ClientStream;
use super::exchange::Exchange;
use super::now;
use crate::error::{Error, Kind};

/// Connections that wait to be accepted; a burst of clients arrives faster than threads wake up.
const BACKLOG: u32 = 4096;
/// A failed accept, for instance for want of file descriptors, would fail again at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// How long a client may take for the head of its next request. Longer than clients keep idle connections.
const HEAD_WITHIN: Duration = Duration::from_secs(120);

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

/// Serves until told to drain, then waits for what is in flight. Returns when all has ended or is to be cut.
pub(crate) async fn serve(
    listener: TcpListener,
    router: Router,
    mut orders: watch::Receiver<Order>,
    request_timeout: Duration,
) {
    let graceful = GracefulShutdown::new();
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
            changed = orders.changed() => if changed.is_err() { return },
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => accept(stream, router.clone(), &graceful, request_timeout),
                Err(error) => refused(&error).await,
            },
        }
    }
    drop(listener);
    tracing::info!("draining {} connections", graceful.count());
    let mut drained = pin!(graceful.shutdown());
    loop {
        let Order::Drain { until, .. } = *orders.borrow_and_update() else {
            return tracing::warn!("told to stop at once: cutting what is left");
        };
        tokio::select! {
            () = &mut drained => return tracing::info!("drained"),
            () = tokio::time::sleep_until(until) => {
                return tracing::warn!("grace period over: cutting what is left");
            }
            _ = orders.changed() => {}
        }
    }
}

fn accept(
    stream: TcpStream,
    router: Router,
    graceful: &GracefulShutdown,
    request_timeout: Duration,
) {
    match stream.set_nodelay(true) {
        Ok(()) => drop(tokio::spawn(serve_connection(stream, router, graceful, request_timeout))),
        Err(error) => tracing::debug!("a client was gone before it was served: {error}"),
    }
}

/// Serves one client until it leaves, or until its connection is idle after `graceful` was shut down.
pub(crate) fn serve_connection<S>(
    stream: S,
    router: Router,
    graceful: &GracefulShutdown,
    request_timeout: Duration,
) -> impl Future<Output = ()> + use<S>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let stream = ClientStream::new(stream);
    let exchanges = stream.exchanges();
    let router = TowerToHyperService::new(router);
    let service = service_fn(move |mut request: Request<Incoming>| {
        let exchange = Exchange { deadline: now() + request_timeout, abort: Arc::default() };
        exchanges.begin(exchange.clone());
        request.extensions_mut().insert(exchange);
        match check_host(&request) {
            Ok(()) => router.call(request).left_future(),
            Err(error) => ready(Ok(error.into_response())).right_future(),
        }
    });
    let watched = stream.watch();
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_WITHIN)
        .serve_connection(TokioIo::new(stream), service);
    let connection = watched.around(graceful.watch(connection));
    async move {
        if let Err(error) = connection.await {
            tracing::debug!("a client's connection ended: {error}");
        }
    }
}

/// A request names the host it is for, and only one (RFC 9112, section 3.2). Two parties that read two of them
/// differently would disagree about whose request it is.
fn check_host<Body>(request: &Request<Body>) -> Result<(), Error> {
    let hosts = request.headers().get_all(HOST).iter().count();
    if hosts == 1 || (hosts == 0 && request.version() < Version::HTTP_11) {
        return Ok(());
    }
    let message = format!("the request has {hosts} host headers; HTTP asks for one");
    Err(Error::new(Kind::InvalidRequest, message))
}

/// Out of file descriptors, or a client that left again: neither ends the router.
async fn refused(error: &io::Error) {
    tracing::warn!("cannot accept a connection: {error}");
    tokio::time::sleep(ACCEPT_PAUSE).await;
}

#[cfg(test)]
mod tests {
    use super::*;
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
            tokio::spawn(serve_connection(server, Router::new(), &graceful, timeout));
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
