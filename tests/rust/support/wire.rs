//! One TCP connection, read as HTTP/1.1 by hand: what a library would mend or hide stays visible.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::{Message, soon};

/// Who takes nothing for so long is not reading.
const STUCK_AFTER: Duration = Duration::from_millis(300);

/// How the body after a head is framed.
enum Framing {
    None,
    Length(usize),
    Chunks,
    UntilClosed,
}

pub struct Wire {
    stream: TcpStream,
    /// Read and not yet asked for.
    pending: Vec<u8>,
}

impl Wire {
    pub async fn connect(address: SocketAddr) -> Wire {
        let stream = soon("a connection", TcpStream::connect(address)).await.expect("connect");
        Wire::new(stream)
    }

    pub fn new(stream: TcpStream) -> Wire {
        stream.set_nodelay(true).expect("a fresh socket");
        Wire { stream, pending: Vec::new() }
    }

    pub async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.try_send(bytes).await.expect("the other side listens");
    }

    pub async fn try_send(&mut self, bytes: impl AsRef<[u8]>) -> io::Result<()> {
        soon("room to send", self.stream.write_all(bytes.as_ref())).await
    }

    /// Says that nothing more is sent.
    pub async fn finish_sending(&mut self) {
        self.stream.shutdown().await.expect("an open socket");
    }

    /// When this is dropped, the other side gets a reset instead of an end.
    pub fn reset_at_end(&mut self) {
        let socket = SockRef::from(&self.stream);
        socket.set_linger(Some(Duration::ZERO)).expect("an open socket");
    }

    /// Sends these bytes until the other side takes no more; how many it took.
    pub async fn send_while_taken(&mut self, bytes: &[u8]) -> usize {
        let mut taken = 0;
        while taken < bytes.len() {
            let writing = tokio::time::timeout(STUCK_AFTER, self.stream.write(&bytes[taken..]));
            match writing.await {
                Ok(Ok(count)) => taken += count,
                Ok(Err(_)) | Err(_) => break,
            }
        }
        taken
    }

    /// The next answer, read to its end.
    pub async fn answer(&mut self) -> Message {
        let head = self.head().await.expect("an answer");
        self.body_of(head).await
    }

    /// Sends a request and reads its answer.
    pub async fn ask(&mut self, request: impl AsRef<[u8]>) -> Message {
        self.send(request).await;
        self.answer().await
    }

    /// The next head, or `None` when the connection ends first.
    pub async fn head(&mut self) -> Option<Message> {
        soon("a head", self.next_head()).await
    }

    /// Waits for the next head however long it takes.
    pub async fn next_head(&mut self) -> Option<Message> {
        loop {
            if let Some(end) = find(&self.pending, b"\r\n\r\n") {
                let head = self.pending.drain(..end + 4).collect();
                return Some(Message { head, ..Message::default() });
            }
            if !self.read_more().await {
                return None;
            }
        }
    }

    /// The message whose head this is, with its body.
    pub async fn body_of(&mut self, mut message: Message) -> Message {
        message.is_whole = match framing(&message) {
            Framing::None => true,
            Framing::Length(length) => match self.exactly(length).await {
                Ok(body) => {
                    message.body = body;
                    true
                }
                Err(part) => {
                    message.body = part;
                    false
                }
            },
            Framing::Chunks => loop {
                match self.chunk().await {
                    Some(chunk) if chunk.is_empty() => break true,
                    Some(chunk) => message.body.extend(chunk),
                    None => break false,
                }
            },
            Framing::UntilClosed => {
                message.body = self.rest().await;
                true
            }
        };
        message
    }

    /// The next chunk of a chunked body, empty at its end; `None` when the connection ends first.
    pub async fn chunk(&mut self) -> Option<Vec<u8>> {
        let size = self.line().await?;
        let size =
            usize::from_str_radix(size.split(';').next()?.trim(), 16).expect("a chunk's size");
        let chunk = self.exactly(size).await.ok()?;
        // After the last chunk come trailers, and then a blank line.
        while !self.line().await?.is_empty() {
            assert_eq!(size, 0, "a chunk is longer than it says");
        }
        Some(chunk)
    }

    /// Exactly so many bytes, or what there was before the connection ended.
    pub async fn exactly(&mut self, length: usize) -> Result<Vec<u8>, Vec<u8>> {
        while self.pending.len() < length {
            if !soon("more bytes", self.read_more()).await {
                return Err(std::mem::take(&mut self.pending));
            }
        }
        Ok(self.pending.drain(..length).collect())
    }

    /// All bytes until the other side closes.
    pub async fn rest(&mut self) -> Vec<u8> {
        while soon("the end", self.read_more()).await {}
        std::mem::take(&mut self.pending)
    }

    async fn line(&mut self) -> Option<String> {
        loop {
            if let Some(end) = find(&self.pending, b"\r\n") {
                let line = self.pending.drain(..end + 2).collect::<Vec<u8>>();
                return Some(String::from_utf8_lossy(&line[..end]).into_owned());
            }
            if !soon("a line", self.read_more()).await {
                return None;
            }
        }
    }

    /// False at the end, however it came.
    async fn read_more(&mut self) -> bool {
        self.stream.read_buf(&mut self.pending).await.is_ok_and(|count| count > 0)
    }
}

fn framing(message: &Message) -> Framing {
    let is_answer = message.first_line().starts_with("HTTP/");
    if is_answer && matches!(message.status(), 100..200 | 204 | 304) {
        return Framing::None;
    }
    if message.header("transfer-encoding").is_some_and(|encoding| encoding == "chunked") {
        return Framing::Chunks;
    }
    match message.header("content-length") {
        Some(length) => Framing::Length(length.parse().expect("content-length")),
        None if is_answer => Framing::UntilClosed,
        None => Framing::None,
    }
}

fn find(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    memchr::memmem::find(bytes, wanted)
}
