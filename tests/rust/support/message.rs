//! A request or an answer as it was on the wire, and how to write one.

use serde_json::Value;

/// A request or an answer, read to its end.
#[derive(Clone, Debug, Default)]
pub struct Message {
    /// From the first line to the blank one.
    pub head: Vec<u8>,
    /// Without its framing.
    pub body: Vec<u8>,
    /// False when the connection ended before the body did.
    pub is_whole: bool,
}

impl Message {
    pub fn first_line(&self) -> String {
        self.lines().next().unwrap_or_default()
    }

    /// An answer's status.
    pub fn status(&self) -> u16 {
        let line = self.first_line();
        let status = line.split(' ').nth(1).and_then(|status| status.parse().ok());
        status.unwrap_or_else(|| panic!("{line:?} has no status"))
    }

    /// The only value of a header.
    pub fn header(&self, name: &str) -> Option<String> {
        let mut values = self.headers(name);
        assert!(values.len() < 2, "{name} comes {} times", values.len());
        values.pop()
    }

    /// All values of a header, in order.
    pub fn headers(&self, name: &str) -> Vec<String> {
        self.lines()
            .skip(1)
            .filter_map(|line| {
                let (found, value) = line.split_once(':')?;
                found.eq_ignore_ascii_case(name).then(|| value.trim().to_owned())
            })
            .collect()
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{error}: {:?}", self.text()))
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The word of an error the router made; it must stand in header and body alike.
    pub fn error_code(&self) -> String {
        let json = self.json();
        let code = json["error"]["code"].as_str().expect("error.code");
        assert_eq!(self.header("x-router-error-code").as_deref(), Some(code));
        assert_eq!(self.header("content-type").as_deref(), Some("application/json"));
        assert!(json["error"]["type"].is_string(), "{json}");
        assert!(!self.error_message().is_empty());
        code.to_owned()
    }

    pub fn error_message(&self) -> String {
        self.json()["error"]["message"].as_str().expect("error.message").to_owned()
    }

    fn lines(&self) -> impl Iterator<Item = String> {
        let head = String::from_utf8_lossy(&self.head).into_owned();
        let lines: Vec<String> = head.split("\r\n").map(str::to_owned).collect();
        lines.into_iter()
    }
}

/// The bytes of a request with a body of known length.
pub fn request(line: &str, headers: &[(&str, &str)], body: impl AsRef<[u8]>) -> Vec<u8> {
    let body = body.as_ref();
    let mut bytes = format!("{line} HTTP/1.1\r\nhost: router.test\r\n").into_bytes();
    for (name, value) in headers {
        bytes.extend_from_slice(format!("{name}: {value}\r\n").as_bytes());
    }
    bytes.extend_from_slice(format!("content-length: {}\r\n\r\n", body.len()).as_bytes());
    bytes.extend_from_slice(body);
    bytes
}

/// The bytes of an answer with status 200 and a JSON body of known length.
pub fn ok(body: impl AsRef<[u8]>) -> Vec<u8> {
    let body = body.as_ref();
    let head = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    [head.as_bytes(), body].concat()
}

/// The bytes of an answer with this status line and a body of known length.
pub fn answer(status: &str, headers: &[(&str, &str)], body: impl AsRef<[u8]>) -> Vec<u8> {
    let body = body.as_ref();
    let mut bytes = format!("HTTP/1.1 {status}\r\n").into_bytes();
    for (name, value) in headers {
        bytes.extend_from_slice(format!("{name}: {value}\r\n").as_bytes());
    }
    bytes.extend_from_slice(format!("content-length: {}\r\n\r\n", body.len()).as_bytes());
    bytes.extend_from_slice(body);
    bytes
}

/// The head of a stream of server-sent events, in chunks.
pub const STREAM_HEAD: &str =
    "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";

/// One chunk of a chunked body; the empty one ends it.
pub fn chunked(data: impl AsRef<[u8]>) -> Vec<u8> {
    let data = data.as_ref();
    [format!("{:x}\r\n", data.len()).as_bytes(), data, b"\r\n"].concat()
}
