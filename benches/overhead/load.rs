//! The load of `make bench-overhead` beside wrk's: requests in turn, requests at a constant rate, streams, and the
//! worker of the streams.
//!
//! Every client prints one line of JSON at its end. The worker writes into each chunk when it did so, by the clock of
//! the machine, which its client reads too; so a chunk's delay is known although the two are different programs.
//! HTTP is read and written by hand, because client and worker share a core and shall cost less than any router.
//!
//! Not here: routers, processors' time, and what must hold; see `overhead.py`.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use bytes::BytesMut;
use clap::{Args, Parser};
use memchr::memmem;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Mutex, mpsc};
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;

const PREFIXES: usize = 64;
const PREFIX_BYTES: usize = 1600;
const TAIL_BYTES: usize = 800;
const TEXT_BYTES: usize = 100_000;
const READ_BYTES: usize = 1 << 16;
/// Requests between two lines that say how many were answered.
const REPORT_EVERY: u64 = 10_000;
/// A client at a rate gives up what is still waiting then, in multiples of the time it was to take.
const PATIENCE: u32 = 2;
/// Until then all connections of such a client are open.
const CONNECT: Duration = Duration::from_millis(200);
const WRITTEN: &str = "\"written_ns\":";

#[derive(Parser)]
enum Command {
    /// Requests to /generate, each connection with its next one when its last was answered
    Turns {
        #[command(flatten)]
        clients: Clients,
        #[arg(long)]
        requests: u64,
        /// No prompt begins like another, and each request has an id
        #[arg(long)]
        distinct: bool,
    },
    /// Requests to /generate when they are due, with the time since then
    Rate {
        #[command(flatten)]
        clients: Clients,
        #[arg(long)]
        per_sec: f64,
        #[arg(long)]
        secs: f64,
    },
    /// Streams from /v1/completions, each connection with its next one when its last has ended
    Streams {
        #[command(flatten)]
        clients: Clients,
        #[arg(long)]
        chunks: u64,
        #[arg(long)]
        secs: f64,
    },
    /// The worker of the streams
    Worker {
        #[arg(long, num_args = 1.., required = true)]
        ports: Vec<u16>,
        #[arg(long)]
        gap_ms: f64,
    },
}

#[derive(Args, Clone, Copy)]
struct Clients {
    #[arg(long)]
    port: u16,
    #[arg(long)]
    connections: u64,
    #[arg(long)]
    seed: u64,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let secs = Duration::from_secs_f64;
    let made = match Command::parse() {
        Command::Turns { clients, requests, distinct } => turns(clients, requests, distinct).await,
        Command::Rate { clients, per_sec, secs: length } => {
            rate(clients, per_sec, secs(length)).await
        }
        Command::Streams { clients, chunks, secs: length } => {
            streams(clients, chunks, secs(length)).await
        }
        Command::Worker { ports, gap_ms } => return worker(ports, secs(gap_ms / 1e3)).await,
    };
    println!("{}", made?);
    Ok(())
}

// --- prompts ------------------------------------------------------------------------------------

/// What prompts are cut from: the same for every connection.
struct Texts {
    prefixes: Vec<String>,
    text: String,
}

fn words(draw: &mut fastrand::Rng, bytes: usize) -> String {
    let mut made = String::with_capacity(bytes + 8);
    while made.len() < bytes {
        made.extend((0..draw.usize(2..=7)).map(|_| draw.lowercase()));
        made.push(' ');
    }
    made.truncate(bytes);
    made
}

/// The requests of one connection.
struct Requests {
    texts: Arc<Texts>,
    draw: fastrand::Rng,
    connection: u64,
    count: u64,
}

impl Requests {
    /// Text that begins like no other.
    fn own(&mut self, bytes: usize) -> String {
        self.count += 1;
        let own = format!("{}-{:x} ", self.connection, self.count);
        let at = self.draw.usize(..TEXT_BYTES - bytes);
        let rest = &self.texts.text[at..at + bytes - own.len()];
        own + rest
    }

    fn prompt(&mut self) -> String {
        let prefix = self.draw.usize(..PREFIXES);
        let tail = self.own(TAIL_BYTES);
        self.texts.prefixes[prefix].clone() + &tail
    }

    fn generate(&mut self, prompt: &str, header: &str) -> String {
        let sampling = r#""sampling_params":{"max_new_tokens":8,"temperature":0}"#;
        post("/generate", header, &format!(r#"{{"text":"{prompt}",{sampling},"stream":false}}"#))
    }

    fn shared(&mut self) -> String {
        let prompt = self.prompt();
        self.generate(&prompt, "")
    }

    fn distinct(&mut self) -> String {
        let prompt = self.own(PREFIX_BYTES + TAIL_BYTES);
        let id = format!("x-request-id: {}-{:x}\r\n", self.connection, self.count);
        self.generate(&prompt, &id)
    }

    fn stream(&mut self, chunks: u64) -> String {
        let prompt = self.prompt();
        let options = format!(r#""max_tokens":{chunks},"temperature":0,"stream":true"#);
        post("/v1/completions", "", &format!(r#"{{"model":"m","prompt":"{prompt}",{options}}}"#))
    }
}

fn post(path: &str, header: &str, body: &str) -> String {
    let length = body.len();
    let fixed = "host: localhost\r\ncontent-type: application/json\r\n";
    format!("POST {path} HTTP/1.1\r\n{fixed}{header}content-length: {length}\r\n\r\n{body}")
}

// --- connections --------------------------------------------------------------------------------

/// What of a message is to come next.
enum Next {
    Head,
    /// So many bytes, and then the end.
    Body(usize),
    ChunkHead,
    /// So many bytes of a chunk and of the line's end behind it.
    Chunk(usize),
}

struct Connection {
    stream: TcpStream,
    next: Next,
    received: BytesMut,
    head: String,
    /// The body as far as it has arrived and is still wanted, without framing.
    body: BytesMut,
}

impl Connection {
    fn new(stream: TcpStream) -> Result<Self> {
        stream.set_nodelay(true)?;
        let (received, body) = (BytesMut::new(), BytesMut::new());
        Ok(Self { stream, next: Next::Head, received, head: String::new(), body })
    }

    async fn send(&mut self, text: &str) -> Result<()> {
        self.stream.write_all(text.as_bytes()).await.context("sending")
    }

    /// Reads once; whether the message has ended. Its body is for the caller to clear.
    async fn read(&mut self) -> Result<bool> {
        self.received.reserve(READ_BYTES);
        let read = self.stream.read_buf(&mut self.received).await.context("receiving")?;
        ensure!(read > 0, "the connection ended");
        self.unframe()
    }

    async fn message(&mut self) -> Result<()> {
        self.body.clear();
        while !self.read().await? {}
        Ok(())
    }

    async fn exchange(&mut self, request: &str) -> Result<()> {
        self.send(request).await?;
        self.message().await?;
        self.check_status()
    }

    fn check_status(&self) -> Result<()> {
        ensure!(self.head.starts_with("HTTP/1.1 200 "), "answered {:?}", self.head);
        Ok(())
    }

    fn header(&self, name: &str) -> Option<&str> {
        let mut fields = self.head.lines().filter_map(|line| line.split_once(':'));
        fields.find(|field| field.0.eq_ignore_ascii_case(name)).map(|field| field.1.trim())
    }

    /// Moves what has been received into head and body; whether the message has ended.
    fn unframe(&mut self) -> Result<bool> {
        loop {
            match self.next {
                Next::Head => {
                    let Some(head) = until(&mut self.received, b"\r\n\r\n") else {
                        return Ok(false);
                    };
                    self.head = String::from_utf8_lossy(&head).into_owned();
                    self.next = match self.header("content-length") {
                        Some(length) => Next::Body(length.parse().context("content-length")?),
                        None if self.header("transfer-encoding").is_some() => Next::ChunkHead,
                        None => Next::Body(0),
                    };
                }
                Next::Body(left) => {
                    let part = self.received.split_to(left.min(self.received.len()));
                    self.body.extend_from_slice(&part);
                    let has_ended = part.len() == left;
                    self.next = if has_ended { Next::Head } else { Next::Body(left - part.len()) };
                    return Ok(has_ended);
                }
                Next::ChunkHead => {
                    let Some(line) = until(&mut self.received, b"\r\n") else { return Ok(false) };
                    let line = String::from_utf8_lossy(&line);
                    let bytes =
                        usize::from_str_radix(line.trim(), 16).context("size of a chunk")?;
                    self.next = if bytes == 0 { Next::Body(2) } else { Next::Chunk(bytes + 2) };
                }
                Next::Chunk(left) => {
                    let part = self.received.split_to(left.min(self.received.len()));
                    self.body.extend_from_slice(&part[..part.len().min(left.saturating_sub(2))]);
                    if part.len() < left {
                        self.next = Next::Chunk(left - part.len());
                        return Ok(false);
                    }
                    self.next = Next::ChunkHead;
                }
            }
        }
    }
}

/// Takes what ends with the mark, mark and all; nothing if it has not arrived.
fn until(received: &mut BytesMut, mark: &[u8]) -> Option<BytesMut> {
    let at = memmem::find(received, mark)?;
    Some(received.split_to(at + mark.len()))
}

/// What each of so many clients, all at once, has made of its connection.
async fn each<T, F>(clients: Clients, client: impl Fn(Connection, Requests) -> F) -> Result<Vec<T>>
where
    T: Send + 'static,
    F: Future<Output = Result<T>> + Send + 'static,
{
    let mut draw = fastrand::Rng::with_seed(clients.seed);
    let prefixes = (0..PREFIXES).map(|_| words(&mut draw, PREFIX_BYTES)).collect();
    let texts = Arc::new(Texts { prefixes, text: words(&mut draw, TEXT_BYTES) });
    let mut tasks = JoinSet::new();
    for connection in 0..clients.connections {
        let stream = TcpStream::connect(("127.0.0.1", clients.port)).await.context("connecting")?;
        let requests = Requests { texts: texts.clone(), draw: draw.fork(), connection, count: 0 };
        tasks.spawn(client(Connection::new(stream)?, requests));
    }
    tasks.join_all().await.into_iter().collect()
}

/// Times in order; there is one at least.
struct Sorted(Vec<Duration>);

impl Sorted {
    fn of(times: impl Iterator<Item = Duration>) -> Result<Self> {
        let mut times: Vec<_> = times.collect();
        ensure!(!times.is_empty(), "nothing was answered");
        times.sort_unstable();
        Ok(Self(times))
    }

    /// The nearest-rank percentile in microseconds.
    fn at(&self, percent: f64) -> f64 {
        let rank = (self.0.len() as f64 * percent / 100.0).ceil() as usize;
        self.0[rank.saturating_sub(1)].as_secs_f64() * 1e6
    }
}

// --- requests in turn ---------------------------------------------------------------------------

async fn turns(clients: Clients, total: u64, distinct: bool) -> Result<Value> {
    let (asked, answered) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let began = Instant::now();
    each(clients, |mut connection, mut requests| {
        let (asked, answered) = (asked.clone(), answered.clone());
        async move {
            while asked.fetch_add(1, Ordering::Relaxed) < total {
                let request = if distinct { requests.distinct() } else { requests.shared() };
                connection.exchange(&request).await?;
                let count = answered.fetch_add(1, Ordering::Relaxed) + 1;
                if count.is_multiple_of(REPORT_EVERY) {
                    println!("{count}");
                }
            }
            Ok(())
        }
    })
    .await?;
    Ok(json!({"requests": total, "per_sec": total as f64 / began.elapsed().as_secs_f64()}))
}

// --- requests at a rate -------------------------------------------------------------------------

/// Says when each request is due, from a thread that sleeps: the runtime's timer knows whole milliseconds only.
fn pace(began: Instant, count: u32, gap: Duration, due: mpsc::Sender<Instant>) {
    for number in 0..count {
        let at = began + gap * number;
        std::thread::sleep(at.saturating_duration_since(Instant::now()));
        // There is room for all; and nobody listens any more once the clients have given up.
        let _ = due.try_send(at);
    }
}

async fn rate(clients: Clients, per_sec: f64, length: Duration) -> Result<Value> {
    let count = ((per_sec * length.as_secs_f64()) as u32).max(1);
    let (sender, due) = mpsc::channel(count as usize);
    let due = Arc::new(Mutex::new(due));
    let began = Instant::now() + CONNECT;
    std::thread::spawn(move || pace(began, count, Duration::from_secs_f64(1.0 / per_sec), sender));
    let latencies = each(clients, |mut connection, mut requests| {
        let due = due.clone();
        async move {
            let mut latencies = Vec::new();
            while began.elapsed() < length * PATIENCE {
                let request = requests.shared();
                let Some(at) = due.lock().await.recv().await else { break };
                connection.exchange(&request).await?;
                latencies.push(at.elapsed());
            }
            Ok(latencies)
        }
    })
    .await?;
    let took = began.elapsed().max(length);
    let latencies = Sorted::of(latencies.into_iter().flatten())?;
    Ok(json!({
        "reached_per_sec": latencies.0.len() as f64 / took.as_secs_f64(),
        "p50_us": latencies.at(50.0),
        "p99_us": latencies.at(99.0),
        "p999_us": latencies.at(99.9),
    }))
}

// --- streams ------------------------------------------------------------------------------------

/// What a client saw of its streams.
#[derive(Default)]
struct Seen {
    /// Reads that brought a chunk, and those of them that brought more than one.
    reads: u64,
    crowded: u64,
    /// From the request to the first chunk.
    first: Vec<Duration>,
    /// From the worker's writing of a chunk to its arrival.
    delays: Vec<Duration>,
    /// From one chunk of a stream to the next.
    gaps: Vec<Duration>,
}

impl Seen {
    async fn watch(&mut self, connection: &mut Connection, request: &str) -> Result<()> {
        let mut last: Option<Instant> = None;
        let sent = Instant::now();
        connection.send(request).await?;
        connection.body.clear();
        loop {
            let has_ended = connection.read().await?;
            let (now, clock) = (Instant::now(), clock());
            let mut chunks = 0;
            while let Some(frame) = until(&mut connection.body, b"\n\n") {
                let Some(written) = written(&frame) else { continue };
                chunks += 1;
                self.delays.push(clock.saturating_sub(written));
                match last.replace(now) {
                    Some(before) => self.gaps.push(now - before),
                    None => self.first.push(now - sent),
                }
            }
            self.reads += u64::from(chunks > 0);
            self.crowded += u64::from(chunks > 1);
            if has_ended {
                return connection.check_status();
            }
        }
    }
}

/// When the worker wrote a frame; nothing for the last ones.
fn written(frame: &[u8]) -> Option<Duration> {
    let at = memmem::find(frame, WRITTEN.as_bytes())? + WRITTEN.len();
    let digits = frame[at..].split(|byte| !byte.is_ascii_digit()).next()?;
    std::str::from_utf8(digits).ok()?.parse().ok().map(Duration::from_nanos)
}

fn clock() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

async fn streams(clients: Clients, chunks: u64, length: Duration) -> Result<Value> {
    let began = Instant::now();
    let seen = each(clients, |mut connection, mut requests| async move {
        let (mut seen, mut count) = (Seen::default(), 0);
        while began.elapsed() < length {
            seen.watch(&mut connection, &requests.stream(chunks)).await?;
            count += chunks;
            let arrived = seen.delays.len() as u64;
            ensure!(arrived == count, "{arrived} chunks arrived of {count}");
        }
        Ok(seen)
    })
    .await?;
    let first = Sorted::of(seen.iter().flat_map(|it| it.first.iter().copied()))?;
    let delays = Sorted::of(seen.iter().flat_map(|it| it.delays.iter().copied()))?;
    let gaps = Sorted::of(seen.iter().flat_map(|it| it.gaps.iter().copied()))?;
    let (crowded, reads) = (seen.iter().map(|it| it.crowded), seen.iter().map(|it| it.reads));
    Ok(json!({
        "chunks": delays.0.len(),
        "first_us": first.at(50.0),
        "delay_p50_us": delays.at(50.0),
        "delay_p99_us": delays.at(99.0),
        "gap_p50_us": gaps.at(50.0),
        "gap_p99_us": gaps.at(99.0),
        "crowded": crowded.sum::<u64>() as f64 / reads.sum::<u64>() as f64,
    }))
}

// --- the worker ---------------------------------------------------------------------------------

async fn worker(ports: Vec<u16>, gap: Duration) -> Result<()> {
    let mut listeners = JoinSet::new();
    for port in ports {
        let listener = TcpListener::bind(("127.0.0.1", port)).await.context("listening")?;
        listeners.spawn(async move {
            loop {
                let (stream, _) = listener.accept().await?;
                // It ends with the connection; its client tells what is wrong with an answer.
                tokio::spawn(serve(stream, gap));
            }
        });
    }
    listeners.join_next().await.unwrap_or(Ok(Ok(())))?
}

async fn serve(stream: TcpStream, gap: Duration) -> Result<()> {
    let mut connection = Connection::new(stream)?;
    loop {
        connection.message().await?;
        if connection.head.starts_with("POST /v1/completions ") {
            let asked: Value = serde_json::from_slice(&connection.body)?;
            answer(&mut connection, asked["max_tokens"].as_u64().unwrap_or(0), gap).await?;
        } else {
            let is_check = connection.head.starts_with("GET /health ");
            let status = if is_check { "200 OK" } else { "404 Not Found" };
            connection.send(&format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\n\r\n")).await?;
        }
    }
}

/// The head and every chunk in a write of its own, as SGLang's server does.
async fn answer(connection: &mut Connection, chunks: u64, gap: Duration) -> Result<()> {
    let kind = "content-type: text/event-stream\r\ntransfer-encoding: chunked";
    connection.send(&format!("HTTP/1.1 200 OK\r\n{kind}\r\n\r\n")).await?;
    let fields =
        r#""id":"0123456789abcdef0123456789abcdef","object":"text_completion","model":"m""#;
    let choices = r#"[{"index":0,"text":" word","logprobs":null,"finish_reason":null}]"#;
    let mut ticks = tokio::time::interval_at(tokio::time::Instant::now() + gap, gap);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    for number in 0..chunks {
        if number > 0 {
            ticks.tick().await;
        }
        let stamp = format!("{WRITTEN}{}", clock().as_nanos());
        connection.send(&chunk(&format!("{fields},\"choices\":{choices},{stamp}"))).await?;
    }
    let usage = format!(r#"{{"prompt_tokens":605,"completion_tokens":{chunks}}}"#);
    let last = chunk(&format!("{fields},\"choices\":[],\"usage\":{usage}"));
    connection.send(&format!("{last}e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")).await
}

/// An event of an object with these fields, framed.
fn chunk(fields: &str) -> String {
    format!("{:x}\r\ndata: {{{fields}}}\n\n\r\n", fields.len() + 10)
}
