//! The load of `make bench-overhead` beside wrk's: requests in turn, requests at a constant rate, streams, and the worker of the streams.
//!
//! Every client prints one line of JSON at its end. The worker writes into each chunk when it did so, by the clock of
//! the machine, which its client reads too; so a chunk's delay is known although the two are different programs.
//! HTTP is read and written by hand here, because client and worker share a core and shall cost less than any router.
//!
//! Not here: routers, processors' time, and what must hold; see `overhead.py`.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use bytes::{Buf, BytesMut};
use clap::{Args, Parser, Subcommand};
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
/// Requests between two lines that say how many were answered.
const REPORT_EVERY: u64 = 10_000;
/// A client gives up what is then still waiting, in multiples of the time it was to take.
const PATIENCE: f64 = 2.0;
const HEAD_BYTES: usize = 1 << 14;
const WRITTEN: &str = "\"written_ns\":";

#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Requests to /generate, each connection with its next one when its last was answered
    Turns(Turns),
    /// Requests to /generate when they are due, with the time since then
    Rate(Rate),
    /// Streams from /v1/completions, each connection with its next one when its last has ended
    Streams(Streams),
    /// The worker of the streams
    Worker(Worker),
}

#[derive(Args)]
struct Turns {
    #[arg(long)]
    port: u16,
    #[arg(long, default_value_t = 64)]
    connections: u64,
    #[arg(long)]
    requests: u64,
    /// No prompt begins like another, and each request has an id
    #[arg(long)]
    distinct: bool,
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

#[derive(Args)]
struct Rate {
    #[arg(long)]
    port: u16,
    #[arg(long, default_value_t = 64)]
    connections: u64,
    #[arg(long)]
    per_sec: f64,
    #[arg(long)]
    secs: f64,
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

#[derive(Args)]
struct Streams {
    #[arg(long)]
    port: u16,
    #[arg(long, default_value_t = 64)]
    streams: u64,
    #[arg(long, default_value_t = 200)]
    chunks: u64,
    #[arg(long)]
    secs: f64,
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

#[derive(Args)]
struct Worker {
    #[arg(long, num_args = 1.., required = true)]
    ports: Vec<u16>,
    #[arg(long, default_value_t = 5.0)]
    gap_ms: f64,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let made = match Cli::parse().command {
        Command::Turns(options) => turns(options).await?,
        Command::Rate(options) => rate(options).await?,
        Command::Streams(options) => streams(options).await?,
        Command::Worker(options) => return worker(options).await,
    };
    println!("{made}");
    Ok(())
}

// --- prompts ------------------------------------------------------------------------------------

/// What prompts are cut from: the same for every connection.
struct Texts {
    prefixes: Vec<String>,
    text: String,
}

impl Texts {
    fn new(seed: u64) -> Arc<Self> {
        let mut draw = fastrand::Rng::with_seed(seed);
        let prefixes = (0..PREFIXES).map(|_| words(&mut draw, PREFIX_BYTES)).collect();
        Arc::new(Self { prefixes, text: words(&mut draw, TEXT_BYTES) })
    }
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
    /// Makes ids and tails unlike those of other connections and runs.
    name: String,
    count: u64,
}

impl Requests {
    fn new(texts: &Arc<Texts>, seed: u64, connection: u64) -> Self {
        let draw = fastrand::Rng::with_seed(seed ^ (connection + 1).rotate_right(16));
        let name = format!("{seed:x}-{connection:x}");
        Self { texts: texts.clone(), draw, name, count: 0 }
    }

    fn text(&mut self, bytes: usize) -> String {
        self.count += 1;
        let own = format!("{}-{:x} ", self.name, self.count);
        let at = self.draw.usize(..TEXT_BYTES - bytes);
        let rest = &self.texts.text[at..at + bytes - own.len()];
        own + rest
    }

    /// A prompt that begins like one in 64 others.
    fn shared(&mut self) -> String {
        let prefix = self.draw.usize(..PREFIXES);
        let tail = self.text(TAIL_BYTES);
        self.texts.prefixes[prefix].clone() + &tail
    }

    fn generate(&mut self, distinct: bool) -> Vec<u8> {
        let (prompt, header) = if distinct {
            let prompt = self.text(PREFIX_BYTES + TAIL_BYTES);
            (prompt, format!("x-request-id: {}-{:x}\r\n", self.name, self.count))
        } else {
            (self.shared(), String::new())
        };
        let sampling = r#""sampling_params":{"max_new_tokens":8,"temperature":0}"#;
        post("/generate", &header, &format!(r#"{{"text":"{prompt}",{sampling},"stream":false}}"#))
    }

    fn stream(&mut self, chunks: u64) -> Vec<u8> {
        let prompt = self.shared();
        let options = format!(r#""max_tokens":{chunks},"temperature":0,"stream":true"#);
        post("/v1/completions", "", &format!(r#"{{"model":"m","prompt":"{prompt}",{options}}}"#))
    }
}

fn post(path: &str, header: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    let fixed = "host: localhost\r\ncontent-type: application/json\r\n";
    format!("POST {path} HTTP/1.1\r\n{fixed}{header}content-length: {length}\r\n\r\n{body}").into()
}

// --- a connection -------------------------------------------------------------------------------

/// What of an answer is to come next.
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
    /// The body as far as it has arrived and is still wanted, without framing.
    body: BytesMut,
}

impl Connection {
    async fn open(port: u16) -> Result<Self> {
        let stream = TcpStream::connect(("127.0.0.1", port)).await.context("connecting")?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, next: Next::Head, received: BytesMut::new(), body: BytesMut::new() })
    }

    async fn send(&mut self, request: &[u8]) -> Result<()> {
        self.body.clear();
        self.stream.write_all(request).await.context("sending")
    }

    /// Reads once; whether the answer has ended.
    async fn read(&mut self) -> Result<bool> {
        let read = self.stream.read_buf(&mut self.received).await.context("receiving")?;
        ensure!(read > 0, "the connection ended within an answer");
        self.unframe()
    }

    async fn exchange(&mut self, request: &[u8]) -> Result<()> {
        self.send(request).await?;
        while !self.read().await? {}
        Ok(())
    }

    /// Moves what has been received into the body; whether the answer has ended.
    fn unframe(&mut self) -> Result<bool> {
        loop {
            match self.next {
                Next::Head => {
                    let Some(head) = until(&mut self.received, b"\r\n\r\n") else {
                        return Ok(false);
                    };
                    self.next = after_head(&String::from_utf8_lossy(&head))?;
                }
                Next::Body(left) => {
                    let part = self.received.split_to(left.min(self.received.len()));
                    self.body.extend_from_slice(&part);
                    self.next = Next::Body(left - part.len());
                    if left == part.len() {
                        self.next = Next::Head;
                        return Ok(true);
                    }
                    return Ok(false);
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
                    let of_chunk = part.len().min(left.saturating_sub(2));
                    self.body.extend_from_slice(&part[..of_chunk]);
                    self.next = Next::Chunk(left - part.len());
                    if left > part.len() {
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

fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    let named = |line: &'a str| line.split_once(':').filter(|it| it.0.eq_ignore_ascii_case(name));
    head.lines().find_map(named).map(|(_, value)| value.trim())
}

fn after_head(head: &str) -> Result<Next> {
    ensure!(head.starts_with("HTTP/1.1 200 "), "answered {:?}", head.lines().next());
    match (header(head, "content-length"), header(head, "transfer-encoding")) {
        (Some(length), _) => Ok(Next::Body(length.parse().context("content-length")?)),
        (None, Some("chunked")) => Ok(Next::ChunkHead),
        _ => bail!("an answer without a length"),
    }
}

// --- requests in turn ---------------------------------------------------------------------------

async fn turns(options: Turns) -> Result<Value> {
    let texts = Texts::new(options.seed);
    let (asked, answered) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let mut clients = JoinSet::new();
    let began = Instant::now();
    for index in 0..options.connections {
        let mut requests = Requests::new(&texts, options.seed, index);
        let (asked, answered) = (asked.clone(), answered.clone());
        clients.spawn(async move {
            let mut connection = Connection::open(options.port).await?;
            while asked.fetch_add(1, Ordering::Relaxed) < options.requests {
                connection.exchange(&requests.generate(options.distinct)).await?;
                let count = answered.fetch_add(1, Ordering::Relaxed) + 1;
                if count.is_multiple_of(REPORT_EVERY) {
                    println!("{count}");
                }
            }
            anyhow::Ok(())
        });
    }
    while let Some(ended) = clients.join_next().await {
        ended??;
    }
    let per_sec = options.requests as f64 / began.elapsed().as_secs_f64();
    Ok(json!({"requests": options.requests, "per_sec": per_sec}))
}

// --- requests at a rate -------------------------------------------------------------------------

/// Says when each request is due, from a thread that sleeps: the runtime's timer knows whole milliseconds only.
fn pace(began: Instant, count: u64, per_sec: f64, due: mpsc::Sender<Instant>) {
    for number in 0..count {
        let at = began + Duration::from_secs_f64(number as f64 / per_sec);
        std::thread::sleep(at.saturating_duration_since(Instant::now()));
        // There is room for all; and nobody listens any more once a client has failed.
        let _ = due.try_send(at);
    }
}

async fn rate(options: Rate) -> Result<Value> {
    let texts = Texts::new(options.seed);
    let mut connections = Vec::new();
    for _ in 0..options.connections {
        connections.push(Connection::open(options.port).await?);
    }
    let count = (options.per_sec * options.secs) as u64;
    let (sender, due) = mpsc::channel(count.max(1) as usize);
    let due = Arc::new(Mutex::new(due));
    let began = Instant::now();
    let until = began + Duration::from_secs_f64(PATIENCE * options.secs);
    std::thread::spawn(move || pace(began, count, options.per_sec, sender));
    let mut clients = JoinSet::new();
    for (index, mut connection) in (0..).zip(connections) {
        let mut requests = Requests::new(&texts, options.seed, index);
        let due = due.clone();
        clients.spawn(async move {
            let mut latencies = Vec::new();
            let mut request = requests.generate(false);
            while Instant::now() < until {
                let Some(at) = due.lock().await.recv().await else { break };
                connection.exchange(&request).await?;
                latencies.push(at.elapsed());
                request = requests.generate(false);
            }
            anyhow::Ok(latencies)
        });
    }
    let mut latencies = Vec::new();
    while let Some(ended) = clients.join_next().await {
        latencies.extend(ended??);
    }
    let took = began.elapsed().as_secs_f64().max(options.secs);
    let reached = latencies.len() as f64 / took;
    let latencies = Sorted::of(latencies)?;
    Ok(json!({
        "reached_per_sec": reached,
        "p50_us": latencies.at(50.0),
        "p99_us": latencies.at(99.0),
        "p999_us": latencies.at(99.9),
    }))
}

/// Times in order; there is one at least.
struct Sorted(Vec<Duration>);

impl Sorted {
    fn of(mut times: Vec<Duration>) -> Result<Self> {
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

// --- streams ------------------------------------------------------------------------------------

/// What clients saw of streams.
#[derive(Default)]
struct Seen {
    streams: u64,
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
    async fn watch(
        &mut self,
        connection: &mut Connection,
        request: &[u8],
        chunks: u64,
    ) -> Result<()> {
        let sent = Instant::now();
        let mut last: Option<Instant> = None;
        let mut count = 0;
        connection.send(request).await?;
        loop {
            let has_ended = connection.read().await?;
            let (now, clock) = (Instant::now(), clock());
            let mut stamps = 0;
            while let Some(frame) = until(&mut connection.body, b"\n\n") {
                let Some(stamp) = stamp(&frame) else { continue };
                stamps += 1;
                self.delays.push(clock.saturating_sub(stamp));
                match last {
                    Some(before) => self.gaps.push(now - before),
                    None => self.first.push(now - sent),
                }
                last = Some(now);
            }
            count += stamps;
            self.reads += u64::from(stamps > 0);
            self.crowded += u64::from(stamps > 1);
            if has_ended {
                break;
            }
        }
        ensure!(count == chunks, "a stream of {count} chunks of {chunks}");
        self.streams += 1;
        Ok(())
    }

    fn add(&mut self, other: Self) {
        self.streams += other.streams;
        self.reads += other.reads;
        self.crowded += other.crowded;
        self.first.extend(other.first);
        self.delays.extend(other.delays);
        self.gaps.extend(other.gaps);
    }
}

/// When the worker wrote a frame; nothing for the last ones.
fn stamp(frame: &[u8]) -> Option<Duration> {
    let at = memmem::find(frame, WRITTEN.as_bytes())? + WRITTEN.len();
    let digits = frame[at..].split(|byte| !byte.is_ascii_digit()).next()?;
    std::str::from_utf8(digits).ok()?.parse().ok().map(Duration::from_nanos)
}

fn clock() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

async fn streams(options: Streams) -> Result<Value> {
    let texts = Texts::new(options.seed);
    let until = Instant::now() + Duration::from_secs_f64(options.secs);
    let mut clients = JoinSet::new();
    for index in 0..options.streams {
        let mut requests = Requests::new(&texts, options.seed, index);
        clients.spawn(async move {
            let mut connection = Connection::open(options.port).await?;
            let mut seen = Seen::default();
            while Instant::now() < until {
                let request = requests.stream(options.chunks);
                seen.watch(&mut connection, &request, options.chunks).await?;
            }
            anyhow::Ok(seen)
        });
    }
    let mut seen = Seen::default();
    while let Some(ended) = clients.join_next().await {
        seen.add(ended??);
    }
    let (first, delays, gaps) =
        (Sorted::of(seen.first)?, Sorted::of(seen.delays)?, Sorted::of(seen.gaps)?);
    Ok(json!({
        "streams": seen.streams,
        "chunks": delays.0.len(),
        "first_us": first.at(50.0),
        "delay_p50_us": delays.at(50.0),
        "delay_p99_us": delays.at(99.0),
        "gap_p50_us": gaps.at(50.0),
        "gap_p99_us": gaps.at(99.0),
        "crowded": seen.crowded as f64 / seen.reads.max(1) as f64,
    }))
}

// --- the worker ---------------------------------------------------------------------------------

async fn worker(options: Worker) -> Result<()> {
    ensure!(options.gap_ms > 0.0, "--gap-ms {} is not above 0", options.gap_ms);
    let gap = Duration::from_secs_f64(options.gap_ms / 1e3);
    let mut listeners = JoinSet::new();
    for port in options.ports.into_iter().collect::<BTreeSet<_>>() {
        let listener = TcpListener::bind(("127.0.0.1", port)).await.context("listening")?;
        listeners.spawn(async move {
            loop {
                let (stream, _) = listener.accept().await?;
                tokio::spawn(async move {
                    // A router that closes a connection has no more to ask on it.
                    let _ = serve(stream, gap).await;
                });
            }
        });
    }
    listeners.join_next().await.unwrap_or(Ok(Ok(())))?
}

async fn serve(mut stream: TcpStream, gap: Duration) -> Result<()> {
    stream.set_nodelay(true)?;
    let mut received = BytesMut::new();
    loop {
        let head = loop {
            if let Some(head) = until(&mut received, b"\r\n\r\n") {
                break String::from_utf8_lossy(&head).into_owned();
            }
            ensure!(received.len() < HEAD_BYTES, "a head without an end");
            if stream.read_buf(&mut received).await? == 0 {
                return Ok(());
            }
        };
        let length: usize = header(&head, "content-length").unwrap_or("0").parse()?;
        while received.len() < length {
            ensure!(stream.read_buf(&mut received).await? > 0, "a body without an end");
        }
        if head.starts_with("POST /v1/completions ") {
            let asked: Value = serde_json::from_slice(&received[..length])?;
            received.advance(length);
            answer(&mut stream, asked["max_tokens"].as_u64().unwrap_or(0), gap).await?;
        } else {
            received.advance(length);
            let status = if head.starts_with("GET /health ") { "200 OK" } else { "404 Not Found" };
            let head = format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\n\r\n");
            stream.write_all(head.as_bytes()).await?;
        }
    }
}

/// The head and every chunk in a write of its own, as SGLang's server does.
async fn answer(stream: &mut TcpStream, chunks: u64, gap: Duration) -> Result<()> {
    let head =
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
    stream.write_all(head.as_bytes()).await?;
    let mut ticks = tokio::time::interval(gap);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let shared = r#""id":"0123456789abcdef0123456789abcdef","object":"text_completion","created":1760000000,"model":"m""#;
    for _ in 0..chunks {
        ticks.tick().await;
        let choices = r#"[{"index":0,"text":" word","logprobs":null,"finish_reason":null}]"#;
        let written = clock().as_nanos();
        let frame = format!(
            "data: {{{shared},\"choices\":{choices},\"usage\":null,{WRITTEN}{written}}}\n\n"
        );
        stream.write_all(chunk(&frame).as_bytes()).await?;
    }
    let usage = format!(
        r#"{{"prompt_tokens":605,"completion_tokens":{chunks},"total_tokens":{}}}"#,
        605 + chunks
    );
    let last = format!("data: {{{shared},\"choices\":[],\"usage\":{usage}}}\n\n");
    let end = chunk(&last) + &chunk("data: [DONE]\n\n") + "0\r\n\r\n";
    Ok(stream.write_all(end.as_bytes()).await?)
}

fn chunk(frame: &str) -> String {
    format!("{:x}\r\n{frame}\r\n", frame.len())
}
