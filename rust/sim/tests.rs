//! The simulated worker over HTTP, and its command line.

use bytes::Bytes;
use clap::{Args, FromArgMatches};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1;
use hyper::{Request, Response, body::Incoming, header::HeaderMap};
use serde_json::{Value, json};
use tokio::sync::oneshot;

use super::*;

/// Simulated workers that end with the test.
struct Running {
    ports: Vec<u16>,
    stop: oneshot::Sender<()>,
    task: tokio::task::JoinHandle<()>,
}

/// An answer, as far as it came.
struct Answer {
    status: u16,
    headers: HeaderMap,
    chunks: Vec<Bytes>,
    is_complete: bool,
}

impl Answer {
    fn text(&self) -> String {
        String::from_utf8(self.chunks.concat()).unwrap()
    }

    fn json(&self) -> Value {
        serde_json::from_str(&self.text()).unwrap()
    }

    /// The JSON of each event; `[DONE]` as a string.
    fn events(&self) -> Vec<Value> {
        let text = self.text();
        let data = text.lines().filter_map(|line| line.strip_prefix("data: "));
        data.map(|data| serde_json::from_str(data).unwrap_or_else(|_| json!(data))).collect()
    }
}

fn parse(args: &[&str]) -> Result<Options, clap::Error> {
    let command = Options::augment_args(clap::Command::new("sim").no_binary_name(true));
    command.try_get_matches_from(args).and_then(|m| Options::from_arg_matches(&m))
}

async fn start(args: &[&str]) -> Running {
    let args = [&["--port", "0", "--speed", "2000"], args].concat();
    let args = if args.contains(&"--ports") { &args[2..] } else { &args[..] };
    let command = Options::augment_args(clap::Command::new("sim").no_binary_name(true))
        .args_override_self(true);
    let options = command.try_get_matches_from(args).and_then(|m| Options::from_arg_matches(&m));
    let sim = Sim::bind(options.unwrap()).await.unwrap();
    let ports = sim.ports();
    let (stop, stopped) = oneshot::channel();
    let task = tokio::spawn(sim.run(stopped));
    Running { ports, stop, task }
}

impl Running {
    async fn send(&self, method: &str, path: &str, body: &str) -> Response<Incoming> {
        let address = ("127.0.0.1", self.ports[0]);
        let stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        let request = Request::builder().method(method).uri(path).header("host", "sim");
        let body = Full::new(Bytes::copy_from_slice(body.as_bytes()));
        sender.send_request(request.body(body).unwrap()).await.unwrap()
    }

    async fn call(&self, method: &str, path: &str, body: &str) -> Answer {
        let response = self.send(method, path, body).await;
        let (head, mut body) = response.into_parts();
        let (mut chunks, mut is_complete) = (Vec::new(), true);
        while let Some(frame) = body.frame().await {
            match frame {
                Ok(frame) => chunks.extend(frame.into_data()),
                Err(_) => {
                    is_complete = false;
                    break;
                }
            }
        }
        Answer { status: head.status.as_u16(), headers: head.headers, chunks, is_complete }
    }

    async fn get(&self, path: &str) -> Answer {
        self.call("GET", path, "").await
    }

    async fn post(&self, path: &str, body: Value) -> Answer {
        self.call("POST", path, &body.to_string()).await
    }

    /// Polls `/sim/stats` until `holds`.
    async fn until(&self, holds: impl Fn(&Value) -> bool) -> Value {
        loop {
            let stats = self.get("/sim/stats").await.json();
            if holds(&stats) {
                return stats;
            }
        }
    }
}

fn generate(text: &str, tokens: usize) -> Value {
    json!({"text": text, "sampling_params": {"max_new_tokens": tokens}})
}

#[test]
fn bad_options_are_named_with_their_range() {
    for (args, words) in [
        (["--prefill-rate", "0"], "must be a number over 0"),
        (["--step-base", "-1"], "--step-base"),
        (["--speed", "inf"], "at most 1e9"),
        (["--step-per-seq", "-1"], "from 0 to 1e9"),
        (["--fail-rate", "1.5"], "between 0 and 1"),
        (["--fail-status", "200"], "400..=599"),
        (["--kv-tokens", "0"], "1..=1000000000"),
        (["--max-running", "0"], "1..="),
        (["--page-tokens", "24"], "a power of two from 1 to 512"),
        (["--page-tokens", "1024"], "a power of two from 1 to 512"),
        (["--stream-interval", "0"], "--stream-interval"),
        (["--port", "65536"], "65536"),
        (["--ports", "33002-33000"], "counts down"),
        (["--ports", "33000,x"], "not a port"),
        (["--ports", "33000-33005,33001"], "33001 is named twice"),
        (["--ports", "1-65535"], "more than 1024"),
    ] {
        let error = parse(&args).expect_err(words).to_string();
        assert!(error.contains(words), "{args:?}: {error}");
    }
    assert!(parse(&["--port", "1", "--ports", "2"]).is_err());
}

#[test]
fn ports_are_lists_and_ranges() {
    let ports = |text: &str| parse(&["--ports", text]).unwrap().listen_ports();
    assert_eq!(ports("33000-33002,33010"), [33000, 33001, 33002, 33010]);
    assert_eq!(ports("0,0"), [0, 0]);
    assert_eq!(Options::default().listen_ports(), [30005]);
    assert_eq!(Options::default().hardware.kv_tokens, 400_000);
    assert_eq!(Options::default().hardware.page_tokens, 1);
}

#[tokio::test]
async fn generate_answers_in_sglangs_shape() {
    let sim = start(&[]).await;
    let answer = sim.post("/generate", generate("Hello, world!", 5)).await;
    assert_eq!(answer.status, 200);
    assert_eq!(answer.headers["content-type"], "application/json");
    assert_eq!(answer.headers["x-sim-port"], sim.ports[0].to_string().as_str());
    let json = answer.json();
    assert_eq!(json["text"], " the old fox ran far");
    assert_eq!(json["output_ids"].as_array().unwrap().len(), 5);
    let meta = &json["meta_info"];
    assert_eq!(meta["finish_reason"], json!({"type": "length", "length": 5}));
    assert_eq!((&meta["prompt_tokens"], &meta["completion_tokens"]), (&json!(4), &json!(5)));
    assert_eq!(meta["worker_port"], sim.ports[0]);
    assert_eq!(meta["id"].as_str().unwrap().len(), 32);
    // 4 tokens of prefill, 5 steps of one request.
    let seconds = meta["e2e_latency"].as_f64().unwrap();
    assert!((seconds - (4.0 / 8000.0 + 5.0 * 0.0123)).abs() < 1e-9, "{seconds}");
    let again = sim.post("/generate", generate("Hello, world!", 5)).await.json();
    assert_eq!(again["meta_info"]["cached_tokens"], 3);
    let stats = sim.get("/sim/stats").await.json();
    assert_eq!((&stats["served"], &stats["running"]), (&json!(2), &json!(0)));
    assert_eq!((&stats["prompt_tokens"], &stats["cached_tokens"]), (&json!(8), &json!(3)));
    sim.post("/flush_cache", json!({})).await;
    let fresh = sim.post("/generate", generate("Hello, world!", 5)).await.json();
    assert_eq!(fresh["meta_info"]["cached_tokens"], 0);
}

#[tokio::test]
async fn generate_streams_cumulative_frames() {
    let sim = start(&[]).await;
    let mut body = generate("Hello", 4);
    body["stream"] = json!(true);
    body["rid"] = json!("mine");
    let answer = sim.post("/generate", body).await;
    assert!(answer.headers["content-type"].to_str().unwrap().starts_with("text/event-stream"));
    let events = answer.events();
    assert_eq!(events.len(), 5);
    assert_eq!(events[4], "[DONE]");
    for (number, event) in (1..).zip(&events[..4]) {
        assert_eq!(event["output_ids"].as_array().unwrap().len(), number);
        assert_eq!(event["text"].as_str().unwrap().len(), 4 * number);
        assert_eq!(event["meta_info"]["id"], "mine");
        assert_eq!(event["meta_info"]["completion_tokens"], number);
        assert_eq!(event["meta_info"]["finish_reason"].is_null(), number < 4);
        assert!(event.get("index").is_none());
    }
    assert_eq!(sim.get("/sim/stats").await.json()["served"], 1);
}

#[tokio::test]
async fn a_stream_has_a_frame_per_interval_and_the_same_text_and_counts() {
    let sim = start(&["--stream-interval", "8"]).await;
    let mut body = generate("Hello", 20);
    body["stream"] = json!(true);
    let events = sim.post("/generate", body.clone()).await.events();
    let counts: Vec<_> =
        events.iter().map(|event| &event["meta_info"]["completion_tokens"]).collect();
    assert_eq!(counts, [&json!(1), &json!(9), &json!(17), &json!(20), &Value::Null]);
    let (text, _) = tokens::output(20);
    assert_eq!(events[3]["text"], text);
    let usage = json!({"include_usage": true});
    let asked =
        json!({"prompt": "Hello", "max_tokens": 20, "stream": true, "stream_options": usage});
    let events = sim.post("/v1/completions", asked).await.events();
    let pieces: Vec<_> =
        events.iter().filter_map(|event| event["choices"][0]["text"].as_str()).collect();
    assert_eq!((pieces.len(), pieces[0], pieces.concat()), (5, " the", text.to_owned()));
    assert_eq!(events[5]["usage"]["completion_tokens"], 20);
    sim.post("/sim/faults", json!({"die_after_chunks": 2})).await;
    let events = sim.post("/generate", body).await.events();
    assert_eq!((events.len(), &events[1]["meta_info"]["completion_tokens"]), (2, &json!(9)));
}

#[tokio::test]
async fn what_a_stream_has_not_told_comes_with_its_end() {
    let sim = start(&["--speed", "1", "--stream-interval", "1000000"]).await;
    let mut body = generate("Hello", 100_000);
    body["stream"] = json!(true);
    let abort = async {
        // The answer's words count as tokens in use once they are made.
        while sim.get("/get_load").await.json()[0]["num_tokens"].as_u64() < Some(5) {}
        sim.post("/abort_request", json!({"abort_all": true})).await;
    };
    let (answer, ()) = tokio::join!(sim.post("/generate", body), abort);
    let events = answer.events();
    assert_eq!((events.len(), &events[0]["meta_info"]["completion_tokens"]), (3, &json!(1)));
    let told = &events[1]["meta_info"];
    assert_eq!(told["finish_reason"]["type"], "abort");
    assert!(told["completion_tokens"].as_u64() > Some(1), "{told}");
}

#[tokio::test]
async fn the_cache_holds_whole_pages() {
    let sim = start(&["--page-tokens", "4"]).await;
    let prompt = "abcd".repeat(10);
    let mut cached = Vec::new();
    for prompt in [
        prompt.clone(),
        prompt.clone(),
        format!("{}else", "abcd".repeat(9)),
        prompt[..12].to_owned(),
    ] {
        let answer = sim.post("/generate", generate(&prompt, 1)).await.json();
        cached.push(answer["meta_info"]["cached_tokens"].as_u64().unwrap());
    }
    assert_eq!(cached, [0, 8, 8, 0]);
    assert_eq!(sim.get("/get_server_info").await.json()["page_size"], 4);
}

#[tokio::test]
async fn lists_and_samples_give_lists() {
    let sim = start(&[]).await;
    let params = json!({"max_new_tokens": 2, "n": 2});
    let mut body = json!({"text": ["a", "b"], "sampling_params": params, "rid": "r"});
    let answers = sim.post("/generate", body.clone()).await.json();
    let ids: Vec<_> = answers.as_array().unwrap().iter().map(|a| &a["meta_info"]["id"]).collect();
    assert_eq!(ids, ["r_0", "r_1", "r_2", "r_3"]);
    body["stream"] = json!(true);
    let events = sim.post("/generate", body).await.events();
    for part in 0..4 {
        let mut of_part = events.iter().filter(|event| event["index"] == part);
        assert!(of_part.clone().count() >= 2);
        assert_eq!(of_part.next_back().unwrap()["meta_info"]["finish_reason"]["type"], "length");
    }
    assert_eq!(events.last().unwrap(), "[DONE]");
    let ids = json!({"input_ids": [[1, 2, 3], [4]], "sampling_params": {"max_new_tokens": 1}});
    let answers = sim.post("/generate", ids).await.json();
    assert_eq!(answers[0]["meta_info"]["prompt_tokens"], 3);
}

#[tokio::test]
async fn chat_and_completions_answer_in_openais_shape() {
    let sim = start(&[]).await;
    let messages = json!([{"role": "user", "content": "Hello"}]);
    let chat = json!({"model": "m", "messages": messages, "max_tokens": 3, "n": 2});
    let json = sim.post("/v1/chat/completions", chat).await.json();
    assert_eq!((&json["object"], &json["model"]), (&json!("chat.completion"), &json!("m")));
    assert_eq!(json["choices"][1]["message"]["content"], " the old fox");
    assert_eq!(json["choices"][0]["finish_reason"], "length");
    assert_eq!(json["usage"]["completion_tokens"], 6);
    let prompt_tokens = json["usage"]["prompt_tokens"].as_u64().unwrap();
    assert_eq!(json["usage"]["total_tokens"], prompt_tokens + 6);
    assert_eq!(json["worker_port"], sim.ports[0]);
    let completion = json!({"prompt": "Hello", "max_tokens": 3, "rid": "mine"});
    let json = sim.post("/v1/completions", completion).await.json();
    assert_eq!((&json["object"], &json["id"]), (&json!("text_completion"), &json!("mine")));
    assert_eq!(
        (&json["choices"][0]["text"], &json["model"]),
        (&json!(" the old fox"), &json!("sim-model"))
    );
}

#[tokio::test]
async fn chat_streams_role_deltas_end_and_usage() {
    let sim = start(&[]).await;
    let mut body = json!({"messages": [{"content": "Hello"}], "max_tokens": 3, "stream": true});
    let events = sim.post("/v1/chat/completions", body.clone()).await.events();
    let choices: Vec<_> = events.iter().map(|event| &event["choices"][0]).collect();
    assert_eq!(choices[0]["delta"], json!({"role": "assistant", "content": ""}));
    assert_eq!(choices[3]["delta"]["content"], " fox");
    assert_eq!(choices[4]["finish_reason"], "length");
    assert_eq!((events.len(), &events[5]), (6, &json!("[DONE]")));
    body["stream_options"] = json!({"include_usage": true});
    let events = sim.post("/v1/chat/completions", body).await.events();
    assert_eq!(events[5]["choices"], json!([]));
    assert_eq!(events[5]["usage"]["completion_tokens"], 3);
    assert!(events[5]["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap() > 0);
    let body = json!({"prompt": "Hello", "max_tokens": 2, "stream": true});
    let events = sim.post("/v1/completions", body).await.events();
    let texts: Vec<_> = events.iter().map(|event| &event["choices"][0]["text"]).collect();
    assert_eq!(texts[..3], [" the", " old", ""]);
}

#[tokio::test]
async fn responses_and_messages_answer_and_stream() {
    let sim = start(&[]).await;
    let json =
        sim.post("/v1/responses", json!({"input": "Hello", "max_output_tokens": 2})).await.json();
    assert_eq!(json["output"][0]["content"][0]["text"], " the old");
    assert_eq!(json["usage"]["output_tokens"], 2);
    let body = json!({"input": "Hello", "max_output_tokens": 2, "stream": true});
    let events = sim.post("/v1/responses", body).await.events();
    let kinds: Vec<_> = events.iter().map(|event| event["type"].as_str().unwrap()).collect();
    let delta = "response.output_text.delta";
    assert_eq!(kinds, ["response.created", delta, delta, "response.completed"]);
    assert_eq!(events[3]["response"]["usage"]["output_tokens"], 2);
    let mut body =
        json!({"system": "Be.", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2});
    let json = sim.post("/v1/messages", body.clone()).await.json();
    assert_eq!(
        (&json["type"], &json["content"][0]["text"]),
        (&json!("message"), &json!(" the old"))
    );
    body["stream"] = json!(true);
    let events = sim.post("/v1/messages", body).await.events();
    assert_eq!(events[0]["type"], "message_start");
    assert_eq!(events[5]["usage"]["output_tokens"], 2);
    assert_eq!(events[6]["type"], "message_stop");
}

#[tokio::test]
async fn the_other_model_routes_answer_too() {
    let sim = start(&[]).await;
    let pair = json!({"query": "q", "items": ["a", "b"], "documents": ["a", "b"]});
    let input = json!({"input": ["a", "b"]});
    let json = sim.post("/v1/embeddings", input.clone()).await.json();
    assert_eq!(json["data"].as_array().unwrap().len(), 2);
    assert_eq!(json["usage"]["prompt_tokens"], 2);
    assert_eq!(sim.post("/v1/classify", input).await.json()["data"][0]["label"], "LABEL_0");
    assert_eq!(
        sim.post("/v1/score", pair.clone()).await.json()["scores"].as_array().unwrap().len(),
        2
    );
    for path in ["/rerank", "/v1/rerank"] {
        let json = sim.post(path, pair.clone()).await.json();
        assert_eq!((&json[1]["index"], &json[1]["document"]), (&json!(1), &json!("b")));
    }
    for path in ["/encode", "/classify"] {
        let json = sim.post(path, json!({"text": "abcdefgh"})).await.json();
        assert_eq!(json["meta_info"]["prompt_tokens"], 2);
    }
    for prefix in ["", "/v1"] {
        let tokens =
            sim.post(&format!("{prefix}/tokenize"), json!({"prompt": "Hello"})).await.json();
        assert_eq!(tokens["count"], 2);
        let text = sim.post(&format!("{prefix}/detokenize"), tokens).await.json();
        assert_eq!(text["text"], "Hello");
    }
    assert_eq!(sim.get("/sim/stats").await.json()["served"], 11);
}

#[tokio::test]
async fn a_worker_tells_about_itself() {
    let sim = start(&["--ports", "0,0", "--base-gpu-id", "4", "--kv-tokens", "1000"]).await;
    for path in ["/health", "/health_generate"] {
        assert_eq!(sim.get(path).await.status, 200);
    }
    let model = &sim.get("/v1/models").await.json()["data"][0];
    assert_eq!((&model["id"], &model["max_model_len"]), (&json!("sim-model"), &json!(1000)));
    let info = sim.get("/get_server_info").await.json();
    assert_eq!((&info["max_total_num_tokens"], &info["base_gpu_id"]), (&json!(1000), &json!(4)));
    assert_eq!(info["enable_cache_report"], true);
    assert_eq!(sim.get("/server_info").await.json(), info);
    assert_eq!(sim.get("/model_info").await.json()["model_path"], "sim-model");
    assert_eq!(sim.get("/get_load").await.json()[0]["num_reqs"], 0);
    let metrics = sim.get("/metrics").await.text();
    assert!(metrics.contains("sglang:num_running_reqs{model_name=\"sim-model\"} 0\n"), "{metrics}");
    let second = Running { ports: vec![sim.ports[1]], ..start(&[]).await };
    assert_eq!(second.get("/get_server_info").await.json()["base_gpu_id"], 5);
    let hidden = start(&["--hide-kv"]).await.get("/get_server_info").await.json();
    assert!(hidden.get("max_total_num_tokens").is_none() && hidden["base_gpu_id"].is_null());
}

#[tokio::test]
async fn errors_have_sglangs_shapes() {
    let sim = start(&[]).await;
    let answer = sim.post("/generate", json!({})).await;
    assert_eq!(answer.status, 400);
    assert!(answer.json()["error"]["message"].as_str().unwrap().contains("text"));
    for body in ["", "{", "[]", "\u{0}", "7"] {
        for path in ["/generate", "/v1/chat/completions", "/tokenize", "/abort_request"] {
            let answer = sim.call("POST", path, body).await;
            assert_eq!((answer.status, &answer.json()["object"]), (400, &json!("error")));
        }
    }
    let answer = sim.post("/v1/chat/completions", json!({"messages": []})).await;
    assert_eq!((answer.status, &answer.json()["object"]), (400, &json!("error")));
    let answer = sim.get("/nowhere").await;
    assert_eq!((answer.status, answer.json()), (404, json!({"detail": "Not Found"})));
    assert!(answer.headers.contains_key("x-sim-port"));
    let answer = sim.get("/generate").await;
    assert_eq!((answer.status, answer.json()), (405, json!({"detail": "Method Not Allowed"})));
}

#[tokio::test]
async fn a_share_of_requests_fails_by_the_seed() {
    let args = ["--fail-rate", "0.5", "--fail-status", "503", "--seed", "7"];
    let (first, second) = (start(&args).await, start(&args).await);
    let mut fates = Vec::new();
    for sim in [&first, &second] {
        let mut statuses = Vec::new();
        for _ in 0..20 {
            statuses.push(sim.post("/generate", generate("a", 1)).await.status);
        }
        fates.push(statuses);
    }
    assert_eq!(fates[0], fates[1]);
    assert!(fates[0].contains(&200) && fates[0].contains(&503), "{fates:?}");
    assert_eq!(first.get("/health").await.status, 200);
}

#[tokio::test]
async fn faults_change_at_run_time() {
    let sim = start(&[]).await;
    let faults = sim.post("/sim/faults", json!({"fail_rate": 1, "fail_status": 429})).await;
    let expected =
        json!({"fail_rate": 1.0, "fail_status": 429, "die_after_chunks": 0, "hang": false});
    assert_eq!((faults.status, faults.json()), (200, expected.clone()));
    assert_eq!(sim.post("/generate", generate("a", 1)).await.status, 429);
    let refused = sim.post("/sim/faults", json!({"fail_rate": 0, "frail_rate": 0})).await;
    assert_eq!(refused.status, 400);
    assert!(refused.json()["error"]["message"].as_str().unwrap().contains("frail_rate"));
    assert_eq!(sim.get("/sim/faults").await.json(), expected);
    sim.post("/sim/faults", json!({"fail_rate": 0})).await;
    assert_eq!(sim.post("/generate", generate("a", 1)).await.status, 200);
}

#[tokio::test]
async fn a_dying_worker_cuts_its_answers() {
    let sim = start(&["--die-after-chunks", "3"]).await;
    let mut body = generate("Hello", 50);
    let answer = sim.post("/generate", body.clone()).await;
    assert!(answer.status == 200 && !answer.is_complete);
    assert!(serde_json::from_str::<Value>(&answer.text()).is_err());
    assert!(!answer.chunks.is_empty());
    body["stream"] = json!(true);
    let answer = sim.post("/generate", body).await;
    assert!(!answer.is_complete);
    assert_eq!(answer.events().len(), 3);
    sim.until(|stats| stats["running"] == 0).await;
}

#[tokio::test]
async fn a_hanging_worker_answers_nothing_until_it_is_mended() {
    let sim = start(&["--hang"]).await;
    let waiting = sim.call("GET", "/health", "");
    tokio::pin!(waiting);
    tokio::select! {
        biased;
        _ = &mut waiting => panic!("/health answered"),
        _ = sim.until(|stats| stats["served"] == 0) => {}
    }
    for path in ["/health", "/generate", "/get_server_info"] {
        let answer = sim.send("POST", path, "{}");
        tokio::select! {
            biased;
            _ = sim.until(|stats| stats["served"] == 0) => {}
            _ = answer => panic!("{path} answered"),
        }
    }
    sim.post("/sim/faults", json!({"hang": false})).await;
    assert_eq!(sim.get("/health").await.status, 200);
    assert_eq!(waiting.await.status, 200, "what waited is answered");
}

/// A file for a request log, removed with this value.
struct LogFile(std::path::PathBuf);

impl LogFile {
    fn new(name: &str) -> Self {
        Self(std::env::temp_dir().join(format!("sim-{name}-{}.jsonl", std::process::id())))
    }

    fn lines(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(&self.0).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// The lines, once there are this many.
    async fn until(&self, count: usize) -> Vec<Value> {
        while self.lines().len() < count {
            tokio::task::yield_now().await;
        }
        self.lines()
    }
}

impl Drop for LogFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

#[tokio::test]
async fn each_request_is_logged_as_it_arrives_and_ends() {
    let file = LogFile::new("requests");
    let flag = ["--request-log", file.0.to_str().unwrap()];
    let sim = start(&flag).await;
    let mut body = generate("Hello", 3);
    body["rid"] = json!("r-1");
    sim.post("/generate", body.clone()).await;
    body["stream"] = json!(true);
    sim.post("/generate", body.clone()).await;
    sim.get("/health").await;
    sim.post("/sim/faults", json!({"die_after_chunks": 1})).await;
    sim.post("/generate", body.clone()).await;
    sim.post("/sim/faults", json!({"die_after_chunks": 0, "fail_rate": 1, "fail_status": 503}))
        .await;
    sim.post("/generate", body.clone()).await;
    let lines = file.until(8).await;
    let told: Vec<_> =
        lines.iter().map(|line| (&line["event"], &line["status"], &line["ending"])).collect();
    let arrived = (&json!("arrived"), &json!(null), &json!(null));
    let ended = json!("ended");
    let [ok, failed, completed, died] = [json!(200), json!(503), json!("completed"), json!("died")];
    let completed_ok = (&ended, &ok, &completed);
    let ends = [completed_ok, completed_ok, (&ended, &ok, &died), (&ended, &failed, &completed)];
    let expected: Vec<_> = ends.into_iter().flat_map(|end| [arrived, end]).collect();
    assert_eq!(told, expected);
    for line in &lines {
        assert_eq!((&line["path"], &line["rid"]), (&json!("/generate"), &json!("r-1")));
        assert_eq!((&line["port"], &line["request_id"]), (&json!(sim.ports[0]), &json!(null)));
        assert!(line["at"].as_f64().is_some_and(|at| at > 1.6e9));
    }
}

#[tokio::test]
async fn a_request_that_hangs_is_logged_until_its_client_leaves() {
    let file = LogFile::new("hanging");
    let sim = start(&["--hang", "--request-log", file.0.to_str().unwrap()]).await;
    tokio::select! {
        biased;
        _ = sim.send("POST", "/generate", "no JSON") => panic!("answered"),
        lines = file.until(1) => assert_eq!(lines[0]["rid"], json!(null)),
    }
    let lines = file.until(2).await;
    assert_eq!((&lines[1]["status"], &lines[1]["ending"]), (&json!(null), &json!("cut_off")));
}

#[test]
fn a_request_log_that_cannot_be_opened_is_named() {
    let error = RequestLog::open(std::path::Path::new("/nowhere/requests.jsonl")).unwrap_err();
    assert!(error.to_string().contains("/nowhere/requests.jsonl"), "{error}");
}

#[tokio::test]
async fn a_client_that_leaves_frees_its_place() {
    let sim = start(&["--speed", "1", "--max-running", "1"]).await;
    for stream in [true, false] {
        let mut body = generate("Hello", 100_000);
        body["stream"] = json!(stream);
        let body = body.to_string();
        let (running, waiting) =
            (sim.send("POST", "/generate", &body), sim.send("POST", "/generate", &body));
        let both = async { tokio::join!(running, waiting) };
        let busy = |stats: &Value| stats["running"] == 1 && stats["waiting"] == 1;
        if stream {
            let answers = both.await;
            sim.until(busy).await;
            drop(answers);
        } else {
            tokio::select! {
                _ = both => panic!("ended too soon"),
                _ = sim.until(busy) => {}
            }
        }
        sim.until(|stats| stats["running"] == 0 && stats["waiting"] == 0).await;
    }
    assert_eq!(sim.get("/sim/stats").await.json()["served"], 0);
}

#[tokio::test]
async fn aborted_requests_end_with_what_they_have() {
    let sim = start(&["--speed", "1"]).await;
    for (abort, stream) in [(json!({"rid": "mine"}), false), (json!({"abort_all": true}), true)] {
        let mut body = generate("Hello", 100_000);
        body["rid"] = json!("mine-1");
        body["stream"] = json!(stream);
        let abort = async {
            sim.until(|stats| stats["running"] == 1).await;
            sim.post("/abort_request", json!({"rid": "other"})).await;
            assert_eq!(sim.post("/abort_request", abort).await.status, 200);
        };
        let (answer, ()) = tokio::join!(sim.post("/generate", body), abort);
        let last =
            if stream { answer.events().into_iter().rev().nth(1).unwrap() } else { answer.json() };
        assert_eq!(last["meta_info"]["finish_reason"]["type"], "abort");
        assert!(last["meta_info"]["completion_tokens"].as_u64().unwrap() < 100_000);
    }
    assert_eq!(sim.post("/abort_request", json!({})).await.status, 400);
}

#[tokio::test]
async fn max_running_bounds_what_runs_under_load() {
    let sim = start(&["--max-running", "8"]).await;
    let call = |number: usize| {
        let mut body = generate(&format!("{number} and more"), 20);
        body["stream"] = json!(number.is_multiple_of(2));
        sim.post("/generate", body)
    };
    let answers = futures_util::future::join_all((0..100).map(call)).await;
    assert!(answers.iter().all(|answer| answer.status == 200 && answer.is_complete));
    for answer in answers.iter().step_by(2) {
        assert_eq!(answer.events().len(), 21);
    }
    let stats = sim.get("/sim/stats").await.json();
    assert_eq!(
        (&stats["served"], &stats["running"], &stats["waiting"]),
        (&json!(100), &json!(0), &json!(0))
    );
    // Handed in together, so that they run together however slow the machine is.
    let prompts: Vec<_> = (0..20).map(|number| format!("{number} of a batch")).collect();
    sim.post("/generate", json!({"text": prompts})).await;
    assert_eq!(sim.get("/sim/stats").await.json()["max_running_seen"], 8);
}

#[tokio::test]
async fn a_taken_port_is_named() {
    let sim = start(&[]).await;
    let options = Options { port: sim.ports[0], ..Options::default() };
    let error = Sim::bind(options).await.expect_err("the port is taken");
    assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
    assert!(error.to_string().contains(&format!("127.0.0.1:{}", sim.ports[0])));
}

#[tokio::test]
async fn the_end_closes_connections_at_once() {
    let sim = start(&["--speed", "1"]).await;
    let mut body = generate("Hello", 100_000);
    body["stream"] = json!(true);
    let answer = sim.send("POST", "/generate", &body.to_string()).await;
    sim.stop.send(()).unwrap();
    sim.task.await.unwrap();
    assert!(answer.into_body().collect().await.is_err());
}
