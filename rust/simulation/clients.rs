//! Clients in memory: how they ask, and what they have seen in the end.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

use super::plan::{Ask, Manner};

/// What one client has seen.
#[derive(Debug)]
pub enum Seen {
    /// An answer to its end.
    Whole { status: StatusCode, worker: Option<String>, body: String },
    /// The head and some of an answer that was cut.
    Cut { status: StatusCode },
    /// It left before.
    Left,
    /// The connection ended without an answer.
    Nothing,
}

/// Sends one request over this connection and looks at what comes.
pub async fn ask(ask: &Ask, stream: DuplexStream) -> Seen {
    match ask.manner {
        Manner::Leaves(after) => tokio::time::timeout(after, exchange(ask, stream, Duration::ZERO))
            .await
            .unwrap_or(Seen::Left),
        Manner::LeavesBehind(after) => {
            leave_behind(ask, stream, after).await;
            Seen::Left
        }
        Manner::Slow(pause) => exchange(ask, stream, pause).await,
        Manner::Patient | Manner::Aborted(_) => exchange(ask, stream, Duration::ZERO).await,
    }
}

fn body(ask: &Ask) -> String {
    let text = "a prompt ".repeat(ask.body_bytes / 9);
    json!({"text": text, "stream": ask.stream, "chunks": ask.chunks}).to_string()
}

async fn exchange(ask: &Ask, stream: DuplexStream, pause: Duration) -> Seen {
    let request = Request::post("/generate")
        .header("host", "router")
        .header("x-request-id", &ask.id)
        // Ids of the same first digit are a session.
        .header("x-smg-routing-key", &ask.id[..ask.id.len().min(2)])
        .body(Full::new(Bytes::from(body(ask))))
        .expect("a request");
    let answered: Result<Seen, hyper::Error> = async {
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        // Dropped with the client, so that leaving closes the connection.
        let mut connection = std::pin::pin!(connection);
        let reading = async {
            let response = sender.send_request(request).await?;
            Ok(read(response, pause).await)
        };
        let mut reading = std::pin::pin!(reading);
        tokio::select! {
            biased;
            seen = &mut reading => seen,
            ended = &mut connection => {
                ended?;
                reading.await
            }
        }
    }
    .await;
    answered.unwrap_or(Seen::Nothing)
}

async fn read(response: Response<hyper::body::Incoming>, pause: Duration) -> Seen {
    let (head, mut body) = response.into_parts();
    let status = head.status;
    let worker = head.headers.get("x-sglang-worker").and_then(|url| url.to_str().ok());
    let worker = worker.map(str::to_owned);
    let mut whole = Vec::new();
    while let Some(frame) = body.frame().await {
        match frame {
            Ok(frame) => whole.extend_from_slice(frame.data_ref().unwrap_or(&Bytes::new())),
            Err(_) => return Seen::Cut { status },
        }
        if !pause.is_zero() {
            tokio::time::sleep(pause).await;
        }
    }
    Seen::Whole { status, worker, body: String::from_utf8_lossy(&whole).into_owned() }
}

/// Writes a request and the beginning of the next, reads nothing but what is there, and leaves.
async fn leave_behind(ask: &Ask, mut stream: DuplexStream, after: Duration) {
    let body = body(ask);
    let request = format!(
        "POST /generate HTTP/1.1\r\nhost: router\r\nx-request-id: {}\r\ncontent-length: {}\r\n\r\n{body}\r\nPOST",
        ask.id,
        body.len()
    );
    let going = async {
        if stream.write_all(request.as_bytes()).await.is_err() {
            return;
        }
        let mut buffer = [0; 1024];
        while stream.read(&mut buffer).await.is_ok_and(|count| count > 0) {}
    };
    let _ = tokio::time::timeout(after, going).await;
}

impl Seen {
    /// What the events or the object of a whole 200 answer say: how many, and whether the end was told.
    pub fn answers(body: &str) -> Answers {
        let mut answers = Answers::default();
        let events = body.split("\n\n").map(|event| event.strip_prefix("data: ").unwrap_or(event));
        for event in events.filter(|event| !event.is_empty()) {
            if event == "[DONE]" {
                answers.dones += 1;
                continue;
            }
            let json: Value = serde_json::from_str(event).unwrap_or_default();
            if json.get("error").is_some() {
                answers.errors += 1;
            } else {
                let word = |name: &str| json[name].as_str().unwrap_or_default().to_owned();
                answers.from.push((word("worker"), word("id")));
            }
        }
        answers
    }
}

#[derive(Debug, Default)]
pub struct Answers {
    /// Worker and request id of each event, or of the one object.
    pub from: Vec<(String, String)>,
    pub dones: usize,
    pub errors: usize,
}
