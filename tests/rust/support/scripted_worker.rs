//! A worker that does to the byte what the test says.
//!
//! Health checks are answered by itself. Every other request waits as an [`Exchange`] for the test to answer,
//! break or withhold it; dropping the exchange closes its connection.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use futures_util::future::select_all;
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::{mpsc, watch};
use tokio::task::{AbortHandle, JoinSet};

use super::{Message, Wire, soon, until};

/// What a worker says of itself, and to whoever checks it.
const ABOUT_ITSELF: &str = r#"{"model_path":"scripted"}"#;

/// How health checks are answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    Good,
    Bad,
    /// Not at all, until this changes.
    Withheld,
}

pub struct ScriptedWorker {
    pub url: String,
    /// Holds the port, so that nobody else gets it while the worker is down. It never listens.
    holder: TcpSocket,
    state: Arc<State>,
    exchanges: mpsc::UnboundedReceiver<Exchange>,
    /// None while the worker is down.
    serving: Option<AbortHandle>,
}

struct State {
    health: watch::Sender<Health>,
    is_up: watch::Sender<bool>,
    /// Connections that brought a request other than a check, since the start.
    connections: AtomicUsize,
    /// Those of them that are open.
    open: AtomicUsize,
    checks: AtomicUsize,
    /// Whether requests reach the test without their bodies, which stay unread.
    is_hasty: AtomicBool,
    to_test: mpsc::UnboundedSender<Exchange>,
}

/// One request that waits for its answer.
pub struct Exchange {
    pub request: Message,
    /// Which connection it came on, counted from 0.
    pub connection: usize,
    open: Option<Open>,
}

struct Open {
    wire: Wire,
    connection: Option<usize>,
    state: Arc<State>,
}

impl ScriptedWorker {
    /// A healthy worker.
    pub async fn start() -> ScriptedWorker {
        ScriptedWorker::start_with(Health::Good).await
    }

    pub async fn start_with(health: Health) -> ScriptedWorker {
        let mut worker = ScriptedWorker::down().await;
        worker.set_health(health);
        worker.up();
        worker
    }

    /// A worker whose port refuses connections.
    pub async fn down() -> ScriptedWorker {
        let holder = socket();
        holder.bind(([127, 0, 0, 1], 0).into()).expect("a free port");
        let port = holder.local_addr().expect("a bound socket").port();
        let (to_test, exchanges) = mpsc::unbounded_channel();
        let state = State {
            health: watch::Sender::new(Health::Good),
            is_up: watch::Sender::new(false),
            connections: AtomicUsize::new(0),
            open: AtomicUsize::new(0),
            checks: AtomicUsize::new(0),
            is_hasty: AtomicBool::new(false),
            to_test,
        };
        let url = format!("http://127.0.0.1:{port}");
        ScriptedWorker { url, holder, state: Arc::new(state), exchanges, serving: None }
    }

    /// Begins to listen.
    pub fn up(&mut self) {
        let socket = socket();
        socket.bind(self.holder.local_addr().expect("a bound socket")).expect("our own port");
        let listener = socket.listen(1024).expect("a bound socket");
        self.state.is_up.send_replace(true);
        self.serving = Some(tokio::spawn(accept(listener, self.state.clone())).abort_handle());
    }

    /// Stops to listen and closes the connections that wait for a request.
    pub async fn go_down(&mut self) {
        self.state.is_up.send_replace(false);
        if let Some(serving) = self.serving.take() {
            serving.abort();
            until("the worker's end", async || serving.is_finished().then_some(())).await;
        }
    }

    pub fn set_health(&self, health: Health) {
        self.state.health.send_replace(health);
    }

    /// So many healthy workers.
    pub async fn several<const COUNT: usize>() -> [ScriptedWorker; COUNT] {
        let mut workers = Vec::new();
        for _ in 0..COUNT {
            workers.push(ScriptedWorker::start().await);
        }
        workers.try_into().unwrap_or_else(|_| unreachable!("as many as asked for"))
    }

    /// The next request at any of these workers, and at which of them.
    pub async fn request_at_any(workers: &mut [ScriptedWorker]) -> (Exchange, usize) {
        let requests = workers.iter_mut().map(|worker| Box::pin(worker.request()));
        let (exchange, which, _) = select_all(requests).await;
        (exchange, which)
    }

    /// From now on requests reach the test as soon as their heads are there, with their bodies unread.
    pub fn stop_reading_bodies(&self) {
        self.state.is_hasty.store(true, Ordering::SeqCst);
    }

    /// The next request that is no check.
    pub async fn request(&mut self) -> Exchange {
        soon("a request at the worker", self.exchanges.recv()).await.expect("the state lives")
    }

    /// A request that is there already.
    pub fn request_now(&mut self) -> Option<Exchange> {
        self.exchanges.try_recv().ok()
    }

    /// Connections that brought requests, since the start.
    pub fn connections(&self) -> usize {
        self.state.connections.load(Ordering::SeqCst)
    }

    /// Those of them that are open.
    pub fn open_connections(&self) -> usize {
        self.state.open.load(Ordering::SeqCst)
    }

    /// Waits until the worker has been asked for its health so often.
    pub async fn until_checked(&self, times: usize) {
        until("checks", async || (self.state.checks.load(Ordering::SeqCst) >= times).then_some(()))
            .await;
    }
}

impl Drop for ScriptedWorker {
    fn drop(&mut self) {
        if let Some(serving) = self.serving.take() {
            serving.abort();
        }
    }
}

impl Exchange {
    /// Sends these bytes and leaves the answer open.
    pub async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.wire().send(bytes).await;
    }

    /// Sends these bytes as the end of the answer; the connection waits for the next request.
    pub async fn answer(mut self, bytes: impl AsRef<[u8]>) {
        self.send(bytes).await;
        if let Some(open) = self.open.take() {
            tokio::spawn(open.serve());
        }
    }

    /// Waits until the router has closed the connection.
    pub async fn closed(&mut self) {
        let rest = self.wire().rest().await;
        assert!(rest.is_empty(), "the router sent more: {rest:?}");
    }

    /// The connection itself.
    pub fn wire(&mut self) -> &mut Wire {
        &mut self.open.as_mut().expect("open until it is answered").wire
    }
}

impl Open {
    /// Waits for one request: answers a check, hands any other to the test. Ends early when the
    /// connection ends or the worker goes down.
    async fn serve(self) {
        let mut is_up = self.state.is_up.subscribe();
        tokio::select! {
            biased;
            _ = is_up.wait_for(|is_up| !is_up) => {}
            () = self.serve_up() => {}
        }
    }

    async fn serve_up(mut self) {
        let Some(head) = self.wire.next_head().await else {
            return;
        };
        let is_hasty = self.state.is_hasty.load(Ordering::SeqCst);
        let request = if is_hasty { head } else { self.wire.body_of(head).await };
        if is_check(&request) {
            return self.answer_check().await;
        }
        let connection = *self.connection.get_or_insert_with(|| {
            self.state.open.fetch_add(1, Ordering::SeqCst);
            self.state.connections.fetch_add(1, Ordering::SeqCst)
        });
        let to_test = self.state.to_test.clone();
        // Nobody may be left to see it.
        let _ = to_test.send(Exchange { request, connection, open: Some(self) });
    }

    /// Answers, and closes the connection: what clients ask for then comes on connections of its own.
    async fn answer_check(&mut self) {
        self.state.checks.fetch_add(1, Ordering::SeqCst);
        let mut health = self.state.health.subscribe();
        let health = health.wait_for(|health| *health != Health::Withheld).await;
        let health = *health.expect("the state lives");
        let status = if health == Health::Good { "200 OK" } else { "503 Service Unavailable" };
        let answer = format!(
            "HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{ABOUT_ITSELF}",
            ABOUT_ITSELF.len()
        );
        // A router that is gone does not want it any more.
        let _ = self.wire.try_send(answer).await;
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        if self.connection.is_some() {
            self.state.open.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

fn is_check(request: &Message) -> bool {
    let line = request.first_line();
    let path = line.split(' ').nth(1).unwrap_or_default();
    line.starts_with("GET ")
        && ["/health", "/get_server_info", "/server_info"].iter().any(|end| path.ends_with(end))
}

fn socket() -> TcpSocket {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.set_reuseaddr(true).expect("a fresh socket");
    socket.set_reuseport(true).expect("a fresh socket");
    socket
}

/// Accepts connections; aborted, it takes those with it that wait for a request.
async fn accept(listener: TcpListener, state: Arc<State>) {
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let (stream, _) = listener.accept().await.expect("a connection");
        let open = Open { wire: Wire::new(stream), connection: None, state: state.clone() };
        connections.spawn(open.serve());
    }
}
