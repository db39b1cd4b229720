//! What the program writes to its log: of a request nothing but the pick when all goes well, one line when it fails; all
//! there is until its end, and no request waits for it.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::{Arc, Mutex};

use crate::support::{ScriptedWorker, Wire, ok, request, until};

/// The program in front of one worker, with all it has logged so far.
struct Program {
    child: Child,
    lines: Arc<Mutex<Vec<String>>>,
}

impl Program {
    fn start(worker: &ScriptedWorker, flags: &[&str]) -> Program {
        let (child, log) = launch(worker, flags);
        let lines: Arc<Mutex<Vec<String>>> = Arc::default();
        let seen = lines.clone();
        std::thread::spawn(move || {
            for line in log.lines().map_while(Result::ok) {
                seen.lock().expect("no panic").push(line);
            }
        });
        Program { child, lines }
    }

    /// The lines that hold this text, once there are any.
    async fn lines_with(&self, text: &str) -> Vec<String> {
        until(&format!("a line with {text}"), async || {
            let lines = self.lines.lock().expect("no panic");
            let found: Vec<String> =
                lines.iter().filter(|line| line.contains(text)).cloned().collect();
            (!found.is_empty()).then_some(found)
        })
        .await
    }

    async fn client(&self) -> Wire {
        self.client_of("request tracking off").await
    }

    /// A client of the address in the line that holds this text.
    async fn client_of(&self, text: &str) -> Wire {
        Wire::connect(address_in(&self.lines_with(text).await[0])).await
    }

    /// Level and message of each line about a request, the pick's left out.
    fn about(&self, id: &str) -> Vec<(String, String)> {
        let lines = self.lines.lock().expect("no panic");
        let about = |line: &&String| line.contains(&format!("request_id=\"{id}\""));
        let is_pick = |line: &&String| line.contains("DEBUG") && line.contains("picked");
        assert!(lines.iter().filter(about).filter(is_pick).count() <= 1, "{lines:#?}");
        let words = |line: &String| {
            let (level, message) =
                line.split_once("Z").expect("a time").1.trim().split_once(' ').expect("a level");
            (level.to_owned(), message.trim().to_owned())
        };
        lines.iter().filter(about).filter(|line| !is_pick(line)).map(words).collect()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn launch(worker: &ScriptedWorker, flags: &[&str]) -> (Child, BufReader<ChildStderr>) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_sglang-router-rs"))
        .args(["launch", "--port=0", "--log-level=debug", "--worker-urls", &worker.url])
        .args(flags)
        .stderr(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .expect("the program");
    let log = child.stderr.take().expect("its log");
    (child, BufReader::new(log))
}

fn address_in(line: &str) -> SocketAddr {
    let address = line.split("http://").nth(1).and_then(|rest| rest.split([',', '/']).next());
    address.and_then(|it| it.parse().ok()).expect("an address")
}

fn terminate(child: &Child) {
    let kill = format!("kill -TERM {}", child.id());
    assert!(Command::new("sh").args(["-c", &kill]).status().expect("a shell").success());
}

/// The program's own end, in good order.
async fn ends_well(child: &mut Child) {
    let status = until("the program's end", async || child.try_wait().expect("a child")).await;
    assert!(status.success(), "{status}");
}

fn post(id: &str) -> Vec<u8> {
    request("POST /generate", &[("x-request-id", id)], "{}")
}

#[tokio::test]
async fn one_line_for_each_failure_and_none_for_what_went_well() {
    let mut worker = ScriptedWorker::start().await;
    let program = Program::start(&worker, &["--disable-retries"]);
    program.lines_with("worker healthy").await;

    let mut client = program.client().await;
    client.send(post("good")).await;
    worker.request().await.answer(ok("{}")).await;
    assert_eq!(client.answer().await.status(), 200);
    let picked = program.lines_with("request_id=\"good\"").await;
    assert!(picked.len() == 1 && picked[0].contains("DEBUG") && picked[0].contains("decision_us"));

    client.send(post("broken")).await;
    let failure = "HTTP/1.1 500 Internal Server Error\r\ncontent-length: 4\r\n\r\noops";
    worker.request().await.answer(failure).await;
    assert_eq!(client.answer().await.status(), 500);

    let pin = [("x-request-id", "lost"), ("x-sglang-target-worker", "nobody")];
    let refused = client.ask(request("POST /generate", &pin, "{}")).await;
    assert_eq!(refused.status(), 400);

    let mut leaving = program.client().await;
    leaving.send(post("left")).await;
    let exchange = worker.request().await;
    drop(leaving);
    program.lines_with("client disconnected").await;
    drop(exchange);

    let told = |id: &str| {
        let mut lines = program.about(id);
        assert_eq!(lines.len(), 1, "{lines:#?}");
        lines.remove(0)
    };
    assert_eq!(program.about("good"), []);
    let (level, message) = told("broken");
    assert!(level == "WARN" && message.contains("500") && message.contains("oops"), "{message}");
    assert!(message.contains(&worker.url), "{message}");
    let (level, message) = told("lost");
    assert!(level == "INFO" && message.contains("nobody"), "{message}");
    let (level, message) = told("left");
    assert!(level == "INFO" && message.contains("client disconnected"), "{message}");
}

#[tokio::test]
async fn while_it_drains_its_metrics_are_read_and_its_last_line_is_written() {
    let mut worker = ScriptedWorker::start().await;
    let mut program = Program::start(&worker, &["--prometheus-port=0"]);
    program.lines_with("worker healthy").await;
    let mut client = program.client().await;
    client.send(post("open")).await;
    let exchange = worker.request().await;
    terminate(&program.child);
    program.lines_with("draining 1 connections").await;
    let metrics = program.client_of("metrics on").await.ask(request("GET /metrics", &[], "")).await;
    assert!(metrics.text().contains("smg_http_connections_active 1\n"), "{}", metrics.text());
    exchange.answer(ok("{}")).await;
    assert_eq!(client.answer().await.status(), 200);
    ends_well(&mut program.child).await;
    program.lines_with("drained").await;
}

#[tokio::test]
async fn of_counts_that_cannot_be_there_is_one_line() {
    let mut worker = ScriptedWorker::start().await;
    let program = Program::start(&worker, &["--policy=least_ttft"]);
    program.lines_with("worker healthy").await;
    let mut client = program.client().await;
    for id in ["first", "second"] {
        client.send(post(id)).await;
        let told = r#"{"text":"x","meta_info":{"prompt_tokens":5,"cached_tokens":6}}"#;
        worker.request().await.answer(ok(told)).await;
        assert_eq!(client.answer().await.status(), 200);
    }
    client.ask(request("POST /generate", &[("x-sglang-target-worker", "nobody")], "{}")).await;
    program.lines_with("nobody").await;
    let lines = program.lines_with("6 cached of 5 prompt tokens").await;
    assert!(lines.len() == 1 && lines[0].contains("WARN"), "{lines:?}");
}

#[tokio::test]
async fn a_log_that_nobody_reads_holds_up_nothing() {
    /// More than a pipe holds, 64 KiB, and than is read of it at once.
    const REQUESTS: usize = 1000;
    let worker = ScriptedWorker::start().await;
    let (child, mut log) = launch(&worker, &["--log-level=info"]);
    let mut program = Program { child, lines: Arc::default() };
    let mut line = String::new();
    while !line.contains("request tracking off") {
        line.clear();
        log.read_line(&mut line).expect("a line");
    }
    let mut client = Wire::connect(address_in(&line)).await;
    for _ in 0..REQUESTS {
        let pin = [("x-sglang-target-worker", "nobody, whose name is told in a line of the log")];
        assert_eq!(client.ask(request("POST /generate", &pin, "{}")).await.status(), 400);
    }
    terminate(&program.child);
    ends_well(&mut program.child).await;
}
