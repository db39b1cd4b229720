//! What prompts have in common, in traces and as a load to send again.

use std::fs;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{Message, Router, Simulated, request};

const ON: &str = "--trace-prompt-blocks";
/// Bytes of 512 tokens.
const BLOCK: usize = 2048;

async fn send(router: &Router, id: &str, body: &Value) -> Message {
    let headers = [("x-request-id", id)];
    router.ask(request("POST /generate", &headers, body.to_string())).await
}

/// Asks for two tokens after this prompt, and waits for the trace.
async fn ask(router: &Router, id: &str, prompt: &str) -> Value {
    let body =
        json!({"text": prompt, "sampling_params": {"max_new_tokens": 2, "ignore_eos": true}});
    assert_eq!(send(router, id, &body).await.status(), 200);
    router.trace_when(id, "completed").await
}

fn lines(answer: &Message) -> Vec<Value> {
    answer.text().lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

#[tokio::test]
async fn an_export_has_a_line_for_each_request_with_known_lengths() {
    let sims = Simulated::start(2).await;
    let router = Router::ready(&sims.urls(), &[ON]).await;
    let system = "s".repeat(2 * BLOCK);
    let first = ask(&router, "first", &format!("{system} one")).await;
    assert_eq!(send(&router, "refused", &json!({"model": "none"})).await.status(), 400);
    let second = ask(&router, "second", &format!("{system} two")).await;
    ask(&router, "third", "short").await;

    let hashes =
        |trace: &Value| trace["prompt_blocks"]["hashes"].as_array().cloned().unwrap_or_default();
    assert_eq!(first["prompt_blocks"]["bytes"], 2 * BLOCK + 4);
    assert_eq!((hashes(&first).len(), hashes(&second).len()), (3, 3));
    assert_eq!(hashes(&first)[..2], hashes(&second)[..2]);
    assert_ne!(hashes(&first)[2], hashes(&second)[2]);
    assert!(router.trace_now("refused").await["prompt_blocks"].is_null(), "it had no prompt");

    let answer = router.get("/v1/traces?format=mooncake").await;
    assert_eq!(answer.status(), 200, "{}", answer.text());
    assert_eq!(answer.header("content-type").as_deref(), Some("application/jsonl"));
    assert_eq!(answer.header("x-left-out").as_deref(), Some("1"));
    let lines = lines(&answer);
    assert_eq!(lines[0]["timestamp"], 0);
    assert!(
        lines.windows(2).all(|pair| pair[0]["timestamp"].as_u64() <= pair[1]["timestamp"].as_u64())
    );
    let rest: Vec<_> = lines
        .iter()
        .map(|line| json!([line["input_length"], line["output_length"], line["hash_ids"]]))
        .collect();
    let told = [&first, &second].map(|trace| trace["prompt_tokens"].clone());
    assert_eq!(rest[..2], [json!([told[0], 2, [0, 1, 2]]), json!([told[1], 2, [0, 1, 3]])]);
    assert_eq!(rest[2], json!([2, 2, [4]]));
    assert!(lines.iter().all(|line| line.as_object().map(serde_json::Map::len) == Some(4)));

    let answer = router.get("/v1/traces?format=mooncake&request_id=second").await;
    assert_eq!(
        (answer.text().lines().count(), answer.header("x-left-out").as_deref()),
        (1, Some("0"))
    );
    let answer = router.get("/v1/traces?format=mooncake&route=/nowhere").await;
    assert_eq!((answer.status(), answer.text().as_str()), (200, ""));
}

#[tokio::test]
async fn without_the_option_nothing_is_kept_and_the_error_names_it() {
    let sims = Simulated::start(1).await;
    let router = Router::ready(&sims.urls(), &[]).await;
    let trace = ask(&router, "x", "a prompt").await;
    assert!(trace.as_object().is_some_and(|trace| trace.contains_key("prompt_blocks")));
    assert!(trace["prompt_blocks"].is_null());
    let answer = router.get("/v1/traces?format=mooncake").await;
    assert_eq!((answer.status(), answer.error_code().as_str()), (400, "invalid_query"));
    assert!(answer.error_message().contains(ON), "{}", answer.error_message());
}

#[tokio::test]
async fn the_text_is_nowhere() {
    let folder = TempDir::new().expect("a temporary folder");
    let path = folder.path().join("traces.jsonl");
    let sims = Simulated::start(1).await;
    let log = format!("--trace-log={}", path.display());
    let router = Router::ready(&sims.urls(), &[ON, &log]).await;
    let trace = ask(&router, "x", "a secret prompt").await;
    let mut told = router.get("/v1/traces?format=csv").await.text();
    told += &router.get("/v1/traces?format=mooncake").await.text();
    drop(router);
    let line = fs::read_to_string(&path).expect("a file of text");
    assert_eq!(serde_json::from_str::<Value>(&line).expect("JSON"), trace);
    told += &line;
    assert!(!told.contains("secret"), "{told}");
}

#[tokio::test]
async fn a_prompt_of_any_shape_has_blocks_of_what_routing_sees() {
    let sims = Simulated::start(1).await;
    let router = Router::ready(&sims.urls(), &[ON]).await;
    let ids: Vec<u32> = (0..513).collect();
    let body = json!({"input_ids": ids, "sampling_params": {"max_new_tokens": 1}});
    assert_eq!(send(&router, "ids", &body).await.status(), 200);
    let blocks = router.trace_when("ids", "completed").await["prompt_blocks"].clone();
    assert_eq!(blocks["bytes"], 4 * 513);
    assert_eq!(blocks["hashes"].as_array().map(Vec::len), Some(2));
    // Larger than what is scanned between other requests.
    ask(&router, "large", &"word ".repeat(80_000)).await;
    let blocks = router.trace_now("large").await["prompt_blocks"].clone();
    assert_eq!(blocks["hashes"].as_array().map(Vec::len), Some(400_000_usize.div_ceil(BLOCK)));
}
