//! Traces and log lines in files.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{Router, ScriptedWorker, Simulated, request, until};

fn folder() -> TempDir {
    TempDir::new().expect("a temporary folder")
}

fn lines(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).expect("a file of text");
    text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

async fn send(router: &Router, id: &str, body: &Value) -> u16 {
    let headers = [("x-request-id", id)];
    router.ask(request("POST /generate", &headers, body.to_string())).await.status()
}

#[tokio::test]
async fn each_line_is_what_the_route_answered() {
    let folder = folder();
    let path = folder.path().join("traces.jsonl");
    let sims = Simulated::start(2).await;
    let flags = [&*format!("--trace-log={}", path.display())];
    for generation in ["before", "after"] {
        let router = Router::ready(&sims.urls(), &flags).await;
        let mut told = Vec::new();
        let good = json!({"text": "a \"b\"\n中", "sampling_params": {"max_new_tokens": 2}});
        let bad = json!({"model": "two\nlines and \"quotes\""});
        for (id, body) in [("good", &good), ("bad", &bad), (r"of\and%", &good)] {
            let id = format!("{generation}-{id}");
            let is_good = send(&router, &id, body).await == 200;
            assert_eq!(is_good, body == &good);
            let status = if is_good { "completed" } else { "failed" };
            told.push(router.trace_when(&id, status).await);
        }
        let written = format!("sgl_router_trace_log_written_total {}\n", told.len());
        until("the lines to be counted", async || {
            let metrics = router.get("/metrics").await.text();
            assert!(metrics.contains("sgl_router_trace_log_lost_total 0\n"), "{metrics}");
            metrics.contains(&written).then_some(())
        })
        .await;
        drop(router);
        let written = lines(&path);
        assert_eq!(written[written.len() - told.len()..], told);
    }
    assert_eq!(lines(&path).len(), 6, "a router goes on in the file of the one before");
}

#[tokio::test]
async fn what_a_router_cuts_at_its_end_is_in_the_log() {
    let folder = folder();
    let path = folder.path().join("traces.jsonl");
    let mut worker = ScriptedWorker::start().await;
    let flags = [&*format!("--trace-log={}", path.display())];
    let router = Router::ready(&[&worker.url], &flags).await;
    let mut wire = router.connect().await;
    wire.send(request("POST /generate", &[("x-request-id", "hanging")], "{}")).await;
    let _exchange = worker.request().await;
    drop(router);
    let written = lines(&path);
    assert_eq!(written.len(), 1);
    assert_eq!(
        (&written[0]["request_id"], &written[0]["status"]),
        (&json!("hanging"), &json!("failed"))
    );
}

#[tokio::test]
async fn log_lines_go_to_a_file_too() {
    for (flag, is_json) in [("--log-json=false", false), ("--log-json", true)] {
        let folder = folder();
        let log_dir = folder.path().join("new").join("deep");
        let flags = [&*format!("--log-dir={}", log_dir.display()), "--log-level=info", flag];
        let router = Router::start(&[], &flags);
        let url = format!("http://{}", router.address);
        drop(router);
        let files: Vec<_> = fs::read_dir(&log_dir).expect("a directory").collect();
        assert_eq!(files.len(), 1);
        let path = files[0].as_ref().expect("an entry").path();
        let name = path.file_name().expect("a name").to_string_lossy().into_owned();
        assert!(name.starts_with("sglang-router.2") && name.ends_with(".log"), "{name}");
        let text = fs::read_to_string(&path).expect("a file of text");
        assert!(text.contains(&url) && text.contains("no workers"), "{text}");
        assert!(!text.contains('\u{1b}'), "colours in a file: {text}");
        if is_json {
            let lines = lines(&path);
            let line = lines.iter().find(|line| line["level"] == "WARN").expect("a warning");
            assert!(line["message"].as_str().is_some_and(|text| text.starts_with("no workers")));
            assert!(line["timestamp"].is_string());
        }
    }
}
