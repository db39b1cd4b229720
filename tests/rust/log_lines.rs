//! What the program writes to its log about a request: nothing but the pick when all goes well, one line when it fails.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use crate::support::{ScriptedWorker, Wire, ok, request, until};

/// The program in front of one worker, with all it has logged so far.
struct Program {
    child: Child,
    lines: Arc<Mutex<Vec<String>>>,
}

impl Program {
    fn start(worker: &ScriptedWorker, flags: &[&str]) -> Program {
        let mut child = Command::new(env!("CARGO_BIN_EXE_sglang-router-rs"))
            .args(["launch", "--port=0", "--log-level=debug", "--worker-urls", &worker.url])
            .args(flags)
            .stderr(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .expect("the program");
        let log = child.stderr.take().expect("its log");
        let lines: Arc<Mutex<Vec<String>>> = Arc::default();
        let seen = lines.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(log).lines().map_while(Result::ok) {
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
        let line = self.lines_with("request tracking off").await.remove(0);
        let address = line.split("http://").nth(1).and_then(|rest| rest.split(',').next());
        let address: SocketAddr = address.and_then(|it| it.parse().ok()).expect("an address");
        Wire::connect(address).await
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
