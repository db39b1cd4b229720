//! What is written, what is lost, and that reading back tells what was written.

use std::fs;
use std::path::PathBuf;

use proptest::prelude::*;
use tempfile::TempDir;

use super::file::{LogFile, older};
use super::*;
use crate::routing::WorkerName;
use crate::tracking::tests::options;
use crate::tracking::{
    AnswerFacts, Arrived, Candidate, Mooncake, PromptBlocks, Query, RequestFacts, Tracker,
};

const ROOM: u64 = 1 << 20;

fn folder() -> (TempDir, PathBuf) {
    let folder = TempDir::new().expect("a temporary folder");
    let path = folder.path().join("traces.jsonl");
    (folder, path)
}

fn text(path: &Path) -> String {
    fs::read_to_string(path).expect("a file of text")
}

fn tracker(path: &Path, max_trace_entries: u32) -> Arc<Tracker> {
    let mut options = options(max_trace_entries);
    options.trace_log = Some(path.to_owned());
    Tracker::new(options, "cache_aware").expect("a file to write")
}

fn worker(index: u32) -> Arc<WorkerName> {
    let (url, node_id) = (format!("http://a:{index}"), format!("gpu_{index}"));
    Arc::new(WorkerName { index, url: url.into(), node_id: node_id.into() })
}

fn error(path: &Path) -> String {
    TraceLog::read(path).expect_err("no good log").to_string()
}

/// In flight, matched tokens and score of a candidate.
type Seen = (u32, Option<u32>, Option<f64>);

/// How a request goes.
#[derive(Debug, Clone)]
struct Life {
    id: String,
    route: &'static str,
    /// Microseconds after the one before.
    after_us: i64,
    model: Option<String>,
    trace_id: Option<String>,
    /// Workers tried, and the error of each but the last.
    attempts: Vec<(u32, String)>,
    worker_request_id: Option<String>,
    tokens: Option<u32>,
    latency_us: u64,
    error: Option<String>,
    /// Workers 0, 1, and so on.
    candidates: Option<Vec<Seen>>,
}

fn life() -> impl Strategy<Value = Life> {
    let text = || prop_oneof![".{0,20}", "[a-c]", "\\PC{0,200}"];
    let attempts = prop::collection::vec((0..3_u32, text()), 0..4);
    let request =
        ("[a-c]|.{1,20}", 0..3_i64, prop::option::of(text()), prop::option::of("[0-9a-f]{32}"));
    let candidate = (any::<u32>(), any::<Option<u32>>(), prop::option::of(-1e300..1e300));
    let candidates = prop::option::of(prop::collection::vec(candidate, 0..4));
    let answer =
        (prop::option::of(text()), any::<Option<u32>>(), any::<u32>(), prop::option::of(text()));
    let life = (request, attempts, answer, candidates, prop::bool::ANY);
    life.prop_map(|(request, attempts, answer, candidates, is_chat)| {
        let (id, after_us, model, trace_id) = request;
        let (worker_request_id, tokens, latency_us, error) = answer;
        let route = if is_chat { "/v1/chat/completions" } else { "/generate" };
        let latency_us = u64::from(latency_us);
        Life {
            id,
            route,
            after_us,
            model,
            trace_id,
            attempts,
            worker_request_id,
            tokens,
            latency_us,
            error,
            candidates,
        }
    })
}

fn candidates(told: &[Seen]) -> Arc<Vec<Candidate>> {
    let candidate = |(index, (in_flight, matched_tokens, score))| Candidate {
        worker: worker(index),
        in_flight,
        matched_tokens,
        pending_tokens: matched_tokens,
        speed: score,
        same_prefix: matched_tokens,
        score,
    };
    Arc::new((0..).zip(told.iter().copied()).map(candidate).collect())
}

/// Lives them one after the other.
fn live(tracker: &Arc<Tracker>, lives: &[Life]) {
    let mut unix_us = 1_767_225_600_000_000;
    for life in lives {
        unix_us += life.after_us;
        let arrived = Arrived { unix_us, at: Instant::now() };
        let mut open = tracker.open(arrived, &life.id, life.route);
        let (model, trace_id) = (life.model.as_deref(), life.trace_id.as_deref());
        open.request(RequestFacts {
            model,
            stream: Some(true),
            input_tokens: life.tokens,
            trace_id,
            prompt_blocks: PromptBlocks::of(life.id.as_bytes()).as_ref(),
        });
        for (index, (number, error)) in life.attempts.iter().enumerate() {
            open.routed(
                &worker(*number),
                "no_match",
                Some(7),
                Duration::from_nanos(life.latency_us),
                life.candidates.as_deref().map(candidates),
            );
            open.sent(arrived.at);
            if index + 1 < life.attempts.len() {
                open.attempt_failed(arrived.at, None, error);
            }
        }
        let at = arrived.at + Duration::from_micros(life.latency_us);
        open.headers(200);
        open.ttft(at);
        open.answer(AnswerFacts {
            prompt_tokens: life.tokens.map(|tokens| tokens % 2_000),
            cached_tokens: life.tokens,
            completion_tokens: Some(3),
            worker_request_id: life.worker_request_id.as_deref(),
            ..AnswerFacts::default()
        });
        match &life.error {
            None => open.complete(at),
            Some(error) => open.fail(at, None, error),
        }
    }
}

fn everything() -> Query {
    Query::parse([("limit", "1000")]).expect("a good query")
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_log_reads_as_what_the_tracker_said(lives in prop::collection::vec(life(), 1..40)) {
        let (_folder, path) = folder();
        let tracker = tracker(&path, 1_000);
        live(&tracker, &lives);
        tracker.close_log();
        prop_assert_eq!((tracker.log_written(), tracker.log_lost()), (lives.len() as u64, 0));

        let mut traces = tracker.list(&everything()).traces;
        let log = TraceLog::read(&path).expect("a good log");
        prop_assert_eq!(&log.list(&everything()).traces, &traces);
        for life in &lives {
            prop_assert_eq!(log.get(&life.id), tracker.get(&life.id));
            let filters = [
                ("request_id", life.id.clone()),
                ("route", life.route.to_owned()),
                ("model", life.model.clone().unwrap_or_default()),
                ("node_id", "gpu_1".to_owned()),
                ("policy", "cache_aware".to_owned()),
                ("since", "2026-01-01T00:00:00.000004Z".to_owned()),
            ];
            for filter in filters {
                let query = Query::parse([filter]).expect("a good query");
                prop_assert_eq!(log.list(&query).traces, tracker.list(&query).traces);
            }
        }
        let (from_log, from_tracker) =
            (log.mooncake(&Query::default()), Mooncake::of(tracker.pages(&Query::default())));
        prop_assert_eq!(from_log.left_out(), from_tracker.left_out());
        prop_assert_eq!(from_log.flatten().collect::<Vec<_>>(), from_tracker.flatten().collect::<Vec<_>>());
        let mut told = serde_json::to_value(tracker.stats()).expect("plain data");
        for name in ["evicted", "expired", "in_flight", "memory_bytes", "config", "version"] {
            told[name] = serde_json::Value::Null;
        }
        prop_assert_eq!(log.stats(), told);

        traces.reverse();
        let line = |trace| serde_json::to_string(trace).expect("plain data") + "\n";
        prop_assert_eq!(text(&path), traces.iter().map(line).collect::<String>());
    }
}

#[test]
fn files_beyond_the_bound_move_on_and_the_oldest_go() {
    let (_folder, path) = folder();
    let mut file = LogFile::open(&path, 10, 2).expect("a file");
    for line in ["one\n", "two\n", "three\n", "four\n", "five\n", "longer than a file\n", "6\n"] {
        file.append(line.as_bytes()).expect("written");
    }
    assert_eq!(text(&path), "6\n");
    assert_eq!(text(&older(&path, 1)), "longer than a file\n");
    assert_eq!(text(&older(&path, 2)), "four\nfive\n");
    assert!(!older(&path, 3).exists());
}

#[test]
fn no_older_file_is_kept_if_none_is_wanted() {
    let (_folder, path) = folder();
    let mut file = LogFile::open(&path, 4, 0).expect("a file");
    for line in ["one\n", "two\n"] {
        file.append(line.as_bytes()).expect("written");
    }
    assert_eq!(text(&path), "two\n");
    assert!(!older(&path, 1).exists());
}

#[test]
fn a_file_that_is_there_is_appended_to_after_its_torn_line_was_ended() {
    let (_folder, path) = folder();
    for (there, then) in [("a\n", "a\nb\n"), ("a\n{\"x", "a\n{\"x\nb\n"), ("", "b\n")] {
        fs::write(&path, there).expect("a file");
        LogFile::open(&path, ROOM, 1).expect("a file").append(b"b\n").expect("written");
        assert_eq!(text(&path), then);
    }
}

#[test]
fn a_rotation_that_fails_loses_nothing_and_goes_on_later() {
    let (_folder, path) = folder();
    let mut file = LogFile::open(&path, 4, 2).expect("a file");
    file.append(b"one\n").expect("written");
    file.append(b"two\n").expect("written");
    fs::create_dir(older(&path, 2)).expect("a directory in the way");
    file.append(b"too\n").expect("written");
    assert_eq!(text(&path), "two\ntoo\n");
    fs::remove_dir(older(&path, 2)).expect("it is empty");
    // As if it had come so far that only the new file is missing.
    fs::rename(older(&path, 1), older(&path, 2)).expect("a new name");
    fs::rename(&path, older(&path, 1)).expect("a new name");
    file.append(b"three\n").expect("written");
    assert_eq!(text(&older(&path, 2)), "one\n");
    assert_eq!(text(&older(&path, 1)), "two\ntoo\n");
    assert_eq!(text(&path), "three\n");
}

#[test]
fn lines_go_into_no_file_that_has_no_name() {
    let (_folder, path) = folder();
    let mut file = LogFile::open(&path, 4, 0).expect("a file");
    file.append(b"one\n").expect("written");
    // The rotation finds nothing to remove and no place for a new file.
    fs::remove_file(&path).expect("a file");
    fs::create_dir(&path).expect("a directory in the way");
    assert!(file.append(b"two\n").is_err());
    fs::remove_dir(&path).expect("it is empty");
    file.append(b"three\n").expect("written");
    assert_eq!(text(&path), "three\n");
}

#[test]
fn a_request_that_finds_the_buffer_full_or_the_log_closed_counts_as_lost() {
    let (log, records) = Log::new(2);
    let record = || {
        let text = crate::tracking::text::Text::new;
        Record::new("id", text("/generate"), text("random"), 0)
    };
    for lost in [0, 0, 1, 2] {
        log.hand_over(Some(record()));
        assert_eq!(log.lost(), lost);
    }
    assert!(records.recv().is_ok());
    log.hand_over(Some(record()));
    assert_eq!(log.lost(), 2);
    log.close();
    assert_eq!(records.iter().count(), 2, "what was handed over is there after the closing");
    log.hand_over(Some(record()));
    assert_eq!((log.written(), log.lost()), (0, 3));
}

#[test]
fn a_record_that_left_while_its_request_ran_counts_as_lost() {
    let (_folder, path) = folder();
    let tracker = tracker(&path, 1);
    let arrived = Arrived::now();
    let first = tracker.open(arrived, "first", "/generate");
    let second = tracker.open(arrived, "second", "/generate");
    first.complete(arrived.at);
    drop(second);
    tracker.close_log();
    assert_eq!((tracker.log_written(), tracker.log_lost()), (1, 1));
    let log = TraceLog::read(&path).expect("a good log");
    assert!(log.get("first").is_none() && log.get("second").is_some());
}

#[test]
fn a_full_disk_loses_lines_and_ends_nothing() {
    let tracker = tracker(Path::new("/dev/full"), 10);
    for id in ["a", "b"] {
        drop(tracker.open(Arrived::now(), id, "/generate"));
    }
    tracker.close_log();
    assert_eq!((tracker.log_written(), tracker.log_lost()), (0, 2));
}

#[test]
fn part_of_a_line_is_taken_back_before_the_next() {
    let (_folder, path) = folder();
    let mut file = LogFile::open(&path, ROOM, 1).expect("a file");
    file.append(b"whole\n").expect("written");
    file.break_off(b"par");
    assert_eq!(text(&path), "whole\npar");
    file.append(b"next\n").expect("written");
    assert_eq!(text(&path), "whole\nnext\n");
}

#[test]
fn what_cannot_be_written_is_named() {
    let (folder, path) = folder();
    let pipe = folder.path().join("pipe");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().expect("mkfifo").success());
    for path in [folder.path(), &path.join("file"), &pipe] {
        let error = Log::open(path, ROOM, 1).expect_err("no file").to_string();
        assert!(
            error.starts_with(&format!("cannot write trace_log {}: ", path.display())),
            "{error}"
        );
    }
}

/// One line each of two requests, of the ids `a` and `b`.
fn two_lines() -> [String; 2] {
    let (_folder, path) = folder();
    let tracker = tracker(&path, 10);
    for id in ["a", "b"] {
        let mut open = tracker.open(Arrived::now(), id, "/generate");
        open.routed(&worker(0), "no_match", None, Duration::from_nanos(1_500), None);
        drop(open);
    }
    tracker.close_log();
    let lines: Vec<String> = text(&path).lines().map(str::to_owned).collect();
    lines.try_into().expect("two lines")
}

#[test]
fn lines_that_break_off_are_left_out() {
    let [one, two] = two_lines();
    let (_folder, path) = folder();
    for cut in (0..one.len()).step_by(19) {
        let torn = &one.as_bytes()[..cut];
        let inside = [torn, b"\n", two.as_bytes(), b"\n"].concat();
        let at_the_end = [two.as_bytes(), b"\n", torn].concat();
        for (text, torn_lines) in [(inside, 1), (at_the_end, 0)] {
            fs::write(&path, text).expect("a file");
            let log = TraceLog::read(&path).expect("a good log");
            assert_eq!(
                (log.stats()["total_requests"].as_u64(), log.torn_lines()),
                (Some(1), torn_lines)
            );
            assert!(log.get("b").is_some());
        }
    }
}

#[test]
fn a_line_that_is_no_trace_is_named() {
    let [one, two] = two_lines();
    let (_folder, path) = folder();
    for (line, why) in [
        ("no JSON".to_owned(), "expected"),
        ("[]".to_owned(), "invalid"),
        ("{}".to_owned(), "missing field `request_id`"),
        (format!("{one}{one}"), "trailing characters at column"),
        (one.replacen("\"node_id\"", "\"gpu\"", 1), "unknown field `gpu`"),
        (one.replacen("\"failed\"", "\"routed\"", 1), "its status is routed"),
        (one.replacen("\"failed\"", "\"gone\"", 1), "unknown variant `gone`"),
        (one.replacen("gpu_0", "gpu_1", 1), "its fields do not agree"),
        (one.replacen("\"decision_us\":1.5", "\"decision_us\":-1.5", 1), "its fields do not agree"),
        (one.replacen("\"timestamp\":\"2", "\"timestamp\":\"x", 1), "at column"),
        ("x".repeat(1 << 24), "longer than"),
    ] {
        assert_ne!(line, one);
        fs::write(older(&path, 7), format!("{two}\n{line}\n{two}\n")).expect("a file");
        let error = error(&path);
        let place = format!("{}, line 2: ", older(&path, 7).display());
        assert!(error.starts_with(&place) && error.contains(why), "{why}: {error}");
    }
}

#[test]
fn older_files_are_read_too_each_once() {
    let [one, two] = two_lines();
    let (_folder, path) = folder();
    fs::write(older(&path, 12), format!("{one}\n")).expect("a file");
    fs::write(older(&path, 1), format!("{two}\n")).expect("a file");
    // As if the log had been rotated between two looks.
    fs::hard_link(older(&path, 1), older(&path, 2)).expect("a link");
    let log = TraceLog::read(&path).expect("a good log");
    let ids = log.list(&everything()).traces.into_iter().map(|trace| trace.request_id);
    assert_eq!(ids.collect::<Vec<_>>(), ["b", "a"]);
}

#[test]
fn what_cannot_be_read_is_named() {
    let (folder, path) = folder();
    for (path, why) in [(&*path, "No such file"), (folder.path(), "Is a directory")] {
        let error = error(path);
        let place = format!("cannot read the trace log {}: ", path.display());
        assert!(error.starts_with(&place) && error.contains(why), "{error}");
    }
}

#[test]
fn an_empty_log_holds_nothing() {
    let (_folder, path) = folder();
    fs::write(&path, "").expect("a file");
    let log = TraceLog::read(&path).expect("a good log");
    assert!(log.list(&everything()).traces.is_empty());
    assert_eq!(log.stats()["oldest_trace"], serde_json::Value::Null);
}
