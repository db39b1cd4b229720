use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use clap::Parser;
use parking_lot::Mutex;
use proptest::prelude::*;

use super::check_files;
use super::cluster::{Loss, Outcome, Setup, replay};
use super::options::Options;
use super::report::{About, Report, Run, Summary};
use super::synthetic::Kind;
use super::text::{Words, pages};
use super::trace::{Asked, BLOCK_TOKENS, Trace};
use crate::routing::candidates::Weighed;
use crate::routing::own::load_nothing;
use crate::routing::{self, Pick, PickError, Policy, Request, Target, Told, Underway, WorkerId};
use crate::sim::engine::Config;

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    replay: Options,
}

pub fn options(flags: &[&str]) -> Result<Options, String> {
    let line = Line::try_parse_from([&["test"], flags].concat());
    line.map(|line| line.replay).map_err(|error| error.to_string())
}

fn asked(at_secs: f64, prompt_tokens: u32, output_tokens: u32, blocks: &[u32]) -> Asked {
    Asked { at_secs, prompt_tokens, output_tokens, blocks: blocks.into(), routing_key: None }
}

/// Workers that compute 100 tokens a second, and then make one token a second.
fn setup(workers: usize) -> Setup {
    let engine = Config {
        prefill_rate: 100.0,
        step_base_secs: 1.0,
        step_per_seq_secs: 0.0,
        kv_tokens: 100_000,
        max_running: 4,
        page_tokens: 1,
    };
    let engines = vec![engine; workers];
    Setup { engines, is_kv_told: true, weights: vec![1.0; workers], losses: vec![], seed: 0 }
}

fn run(requests: Vec<Asked>, setup: &Setup, policy: &dyn Policy) -> Vec<Outcome> {
    replay(&Trace { requests }, setup, policy, &AtomicUsize::new(0))
}

fn in_turn() -> Arc<dyn Policy> {
    let kind = routing::PolicyKind::RoundRobin;
    kind.build(&options(&["t", "--policy=round_robin"]).expect("flags").routing(kind))
}

/// Always picks the first, and notes what it hears.
#[derive(Clone, Default)]
struct Listener {
    heard: Arc<Mutex<Vec<String>>>,
}

struct Heard {
    listener: Listener,
    name: String,
}

impl Listener {
    fn note(&self, what: String) {
        self.heard.lock().push(what);
    }
}

impl Policy for Listener {
    fn pick(
        &self,
        request: &Request,
        targets: &[Arc<Target>],
        _: &mut fastrand::Rng,
        _: Option<&mut Weighed>,
    ) -> Result<Pick, PickError> {
        let in_flight: Vec<_> = targets.iter().map(|target| target.in_flight()).collect();
        self.note(format!("{} pick of {in_flight:?}", request.at_secs));
        Ok(Pick { index: 0, reason: "first", matched_tokens: Some(7) })
    }

    fn sent(&self, request: &Request, target: &Arc<Target>) -> Option<Box<dyn Underway>> {
        let name = format!("{} bytes at {}", request.prompt.len(), target.id);
        Some(Box::new(Heard { listener: self.clone(), name }))
    }

    fn forget(&self, worker: WorkerId) {
        self.note(format!("forget {worker}"));
    }
}

impl Underway for Heard {
    fn begun(&mut self, at_secs: f64) {
        self.listener.note(format!("{} began at {at_secs}", self.name));
    }

    fn told(&mut self, told: &Told) {
        let Told { prompt_tokens, cached_tokens, completion_tokens } = told;
        let counts =
            [prompt_tokens, cached_tokens, completion_tokens].map(|count| count.unwrap_or(9999));
        self.listener.note(format!("{} told {counts:?}", self.name));
    }
}

impl Drop for Heard {
    fn drop(&mut self) {
        self.listener.note(format!("{} over", self.name));
    }
}

#[test]
fn a_policy_hears_what_it_would_in_the_router() {
    let listener = Listener::default();
    let requests = vec![asked(1.0, 600, 4, &[0, 1]), asked(20.0, 512, 2, &[0])];
    let outcomes = run(requests, &setup(2), &listener);
    let heard = [
        "1 pick of [0, 0]",
        "2400 bytes at 0 began at 7",
        "2400 bytes at 0 told [600, 0, 4]",
        "2400 bytes at 0 over",
        "20 pick of [0, 0]",
        "2048 bytes at 0 began at 20.01",
        "2048 bytes at 0 told [512, 511, 2]",
        "2048 bytes at 0 over",
    ];
    assert_eq!(*listener.heard.lock(), heard);
    let expected = Outcome {
        worker: Some(0),
        reason: Some("first"),
        matched_tokens: Some(7),
        attempts: 1,
        cached_tokens: Some(0),
        prefill_secs: Some(6.0),
        first_at_secs: Some(7.0),
        ended_at_secs: Some(11.0),
        ..Outcome::default()
    };
    assert_eq!(outcomes[0], expected);
}

#[test]
fn a_lost_worker_takes_along_what_it_answers_and_no_more() {
    let mut setup = setup(2);
    setup.losses = vec![Loss { worker: 0, at_secs: 2.0, back_at_secs: Some(50.0) }];
    let listener = Listener::default();
    // At 2 s the first answers, the second computes, the third waits.
    let mut requests: Vec<_> = (0..3).map(|block| asked(0.0, 100, 9, &[block])).collect();
    requests[1].prompt_tokens = 200;
    // Came while the worker was gone, and once it was back.
    requests.extend([asked(40.0, 100, 1, &[5]), asked(60.0, 100, 1, &[0])]);
    let outcomes = run(requests, &setup, &listener);
    let ends: Vec<_> = outcomes
        .iter()
        .map(|outcome| {
            (outcome.worker, outcome.attempts, outcome.first_at_secs, outcome.error.is_some())
        })
        .collect();
    let expected = [
        (Some(0), 1, Some(1.0), true),
        (Some(1), 2, Some(4.0), false),
        (Some(1), 2, Some(5.0), false),
        (Some(1), 1, Some(41.0), false),
        (Some(0), 1, Some(61.0), false),
    ];
    assert_eq!(ends, expected);
    assert_eq!(outcomes[4].cached_tokens, Some(0), "it came back with an empty cache");
    let heard = listener.heard.lock();
    let over = heard.iter().filter(|what| what.ends_with("at 0 over")).count();
    assert_eq!(over, 4);
    let at = |what: &str| heard.iter().position(|heard| heard == what).expect("was heard");
    assert!(at("800 bytes at 0 over") < at("forget 0"));
    assert!(at("forget 0") < at("2 pick of [0]"));
}

#[test]
fn without_workers_requests_fail_and_the_replay_ends() {
    let mut setup = setup(2);
    let loss = |worker| Loss { worker, at_secs: 1.5, back_at_secs: None };
    setup.losses = vec![loss(0), loss(1)];
    let requests = (0..4).map(|block| asked(f64::from(block), 100, 5, &[block])).collect();
    let outcomes = run(requests, &setup, &*in_turn());
    let errors: Vec<_> =
        outcomes.iter().map(|outcome| outcome.error.as_deref().unwrap_or_default()).collect();
    let (answering, nobody) = ("its worker was lost while it answered", "no worker was left");
    assert_eq!(errors, [answering, nobody, nobody, nobody]);
}

#[test]
fn faster_workers_take_less_time() {
    let options =
        options(&["t", "--workers=4", "--speeds=2,0.5", "--prefill-rate=100"]).expect("flags");
    let setup = options.setup().expect("they go together");
    let rates: Vec<_> = setup.engines.iter().map(|engine| engine.prefill_rate).collect();
    assert_eq!(rates, [200.0, 50.0, 200.0, 50.0]);
    let requests = (0..2).map(|block| asked(0.0, 100, 1, &[block])).collect();
    let outcomes = run(requests, &setup, &*in_turn());
    let mut first: Vec<_> = outcomes.iter().filter_map(|outcome| outcome.first_at_secs).collect();
    first.sort_by(f64::total_cmp);
    assert_eq!(first, [0.5, 2.0]);
}

#[test]
fn the_numbers_of_a_run() {
    let trace = Trace {
        requests: vec![
            asked(0.0, 512, 10, &[0]),
            asked(30.0, 512, 10, &[0]),
            asked(30.0, 100, 1, &[1]),
        ],
    };
    let (setup, ended) = (setup(1), AtomicUsize::new(0));
    let outcomes = replay(&trace, &setup, &*in_turn(), &ended);
    assert_eq!(ended.into_inner(), 3);
    let summary = Summary::new(&Run { policy: "p".into(), outcomes }, &trace, &setup);
    // The second computes one token; the third waits for it.
    assert_eq!(summary.hit_rate, Some(511.0 / 1124.0));
    let is_near = |secs: Option<f64>, expected: f64| {
        assert!((secs.expect("known") - expected).abs() < 1e-9, "{secs:?} instead of {expected}");
    };
    is_near(summary.ttft_p50_secs, 1.01);
    is_near(summary.ttft_mean_secs, (5.12 + 0.01 + 1.01) / 3.0);
    is_near(summary.ttft_p95_secs, 1.01 + 0.9 * (5.12 - 1.01));
    assert_eq!((summary.imbalance, summary.failed), (Some(1.0), 0));
    assert_eq!(trace.reusable_tokens(), 511);
}

#[test]
fn requests_that_failed_are_in_no_number_but_their_count() {
    let mut setup = setup(2);
    setup.losses = vec![Loss { worker: 0, at_secs: 2.0, back_at_secs: None }];
    let trace = Trace {
        requests: vec![
            asked(0.0, 100, 9, &[0]),
            asked(3.0, 400, 1, &[1]),
            asked(9.0, 400, 1, &[1]),
        ],
    };
    let outcomes = replay(&trace, &setup, &Listener::default(), &AtomicUsize::new(0));
    assert!(outcomes[0].first_at_secs.is_some());
    let summary = Summary::new(&Run { policy: "p".into(), outcomes }, &trace, &setup);
    assert_eq!((summary.failed, summary.hit_rate), (1, Some(399.0 / 800.0)));
    let mean_secs = summary.ttft_mean_secs.expect("first tokens");
    assert!((mean_secs - (4.0 + 0.01) / 2.0).abs() < 1e-9, "{mean_secs}");
    assert_eq!(summary.imbalance, Some(2.0), "all of the work was at one of two workers");
}

#[test]
fn settings_are_what_is_not_as_by_default() {
    let flags = [
        "t",
        "--num-requests=5",
        "--workers=4",
        "--policy=manual,random",
        "--rate-scale=1.0",
        "--prefill-rate=8e3",
        "--speeds=1,.5",
        "--hide-kv",
        "--lose=3@5-9",
        "--lose=1@7",
        "--assignment-mode=random",
        "--seed=18446744073709551615",
        "--csv=rows.csv",
    ];
    let settings = options(&flags).expect("flags").settings;
    let expected = serde_json::json!({
        "assignment_mode": "random",
        "hide_kv": true,
        "lose": ["3@5-9", "1@7"],
        "seed": u64::MAX,
        "speeds": [1, 0.5],
    });
    assert_eq!(serde_json::Value::from(settings.clone()), expected);
    let trace = Trace { requests: vec![asked(0.0, 1100, 1, &[0, 1, 2])] };
    let report =
        Report { trace: About::new("t".into(), &trace, &setup(4)), settings, policies: vec![] };
    let header = [
        "t: 1 requests in 0.0 s to 4 workers, 1100 prompt tokens (1100 each), 1 answer tokens (1 each)",
        "--assignment-mode random --hide-kv --lose 3@5-9,1@7 --seed 18446744073709551615 --speeds 1,0.5",
        "one endless cache would have 0.0 % of the prompt tokens, counted in whole blocks of 512 tokens",
    ];
    assert_eq!(report.header(), header);
    assert!(options(&["t", "--seed=0", "--lose=3@5"]).expect("flags").settings.len() == 1);
    assert!(options(&["t"]).expect("flags").settings.is_empty());
}

#[test]
fn a_table_names_files_by_as_little_as_tells_them_apart() {
    let trace = Trace { requests: vec![asked(0.0, 10, 1, &[0])] };
    let labels = |policies: &[&str]| {
        let run = |policy: &&str| Run { policy: (*policy).to_owned(), outcomes: vec![] };
        let summary = |policy| Summary::new(&run(policy), &trace, &setup(1));
        let report = Report {
            trace: About::new("t".into(), &trace, &setup(1)),
            settings: serde_json::Map::new(),
            policies: policies.iter().map(summary).collect(),
        };
        let table = report.table();
        let rows =
            table.lines().skip(4).map(|row| row.split(' ').next().expect("a name").to_owned());
        rows.collect::<Vec<_>>()
    };
    let far = "/a/long/way/to/mine.py:choose";
    assert_eq!(labels(&["random", far]), ["random", "mine.py:choose"]);
    assert_eq!(labels(&[far, "/a/long/way/to/mine.py:other"]), ["mine.py:choose", "mine.py:other"]);
    assert_eq!(
        labels(&[far, "x/to/mine.py:choose", "mine.py:choose"]),
        ["way/to/mine.py:choose", "x/to/mine.py:choose", "mine.py:choose"]
    );
}

#[test]
fn options_that_do_nothing_on_a_trace_are_told() {
    let mut requests = vec![asked(0.0, 10, 1, &[0]), asked(8.0, 10, 1, &[0])];
    requests[1].routing_key = Some("a".into());
    let trace = Trace { requests };
    for (flags, expected) in [
        (&["t", "--policy=random,least_ttft", "--lose=0@8"][..], &[][..]),
        (
            &["t", "--policy=manual,random,consistent_hashing"],
            &[
                "1 of 2 requests have no routing_key in the trace; manual and consistent_hashing cannot",
            ],
        ),
        (&["t", "--lose=3@8.5-9"], &["--lose: the last request comes at 8.0 s, before worker 3"]),
        (&["t", "--policy=fixed_probability"], &["fixed_probability draws all workers alike"]),
        (&["t", "--policy=fixed_probability", "--worker-weights=1,3"], &[]),
    ] {
        let options = options(flags).expect("flags");
        let told = super::warnings(&options, &options.setup().expect("they go together"), &trace);
        assert_eq!(told.len(), expected.len(), "{flags:?}: {told:?}");
        for (warning, start) in told.iter().zip(expected) {
            assert!(warning.starts_with(start), "{warning}");
        }
    }
}

#[test]
fn weights_say_who_gets_how_much() {
    let flags = ["t", "--policy=fixed_probability", "--workers=4", "--worker-weights=0,2"];
    let options = options(&flags).expect("flags");
    let setup = options.setup().expect("they go together");
    let policy = routing::build(&options.routing(options.policies[0]), &load_nothing);
    let requests = (0..100).map(|block| asked(f64::from(block), 10, 1, &[block])).collect();
    let outcomes = run(requests, &setup, &*policy.expect("the router's"));
    let at = |worker| outcomes.iter().filter(|outcome| outcome.worker == Some(worker)).count();
    assert_eq!([at(0), at(2)], [0, 0]);
    assert!(at(1) > 30 && at(3) > 30, "{} and {}", at(1), at(3));
}

#[test]
fn plots_are_not_made_here() {
    let options = options(&["t", "--plot=p.png"]).expect("flags");
    let error = super::run(&options, &load_nothing).expect_err("refused").to_string();
    assert!(error.contains("python -m sglang_router_rs replay"), "{error}");
}

#[test]
fn the_same_again_is_the_same() {
    let trace = Kind::Chat.make(300, 5);
    let options =
        options(&["t", "--policy=cache_aware,random,power_of_two", "--seed=9"]).expect("flags");
    let mut setup = options.setup().expect("they go together");
    setup.losses = vec![Loss { worker: 2, at_secs: 30.0, back_at_secs: Some(60.0) }];
    for policy in &options.policies {
        let outcomes = || {
            replay(
                &trace,
                &setup,
                &*routing::build(&options.routing(*policy), &load_nothing)
                    .expect("one of the router's"),
                &AtomicUsize::new(0),
            )
        };
        assert_eq!(outcomes(), outcomes(), "{policy}");
    }
}

#[test]
fn a_session_finds_its_worker_by_its_key() {
    let policy = ByKey;
    let mut requests: Vec<_> =
        (0..6).map(|block| asked(f64::from(block), 10, 1, &[block])).collect();
    for (asked, key) in requests.iter_mut().zip(["1", "0", "1", "1", "0"]) {
        asked.routing_key = Some(key.into());
    }
    let workers: Vec<_> =
        run(requests, &setup(3), &policy).iter().map(|outcome| outcome.worker).collect();
    assert_eq!(workers, [1, 0, 1, 1, 0, 2].map(Some));
}

/// The worker that the key names, the last one without.
struct ByKey;

impl Policy for ByKey {
    fn pick(
        &self,
        request: &Request,
        targets: &[Arc<Target>],
        _: &mut fastrand::Rng,
        _: Option<&mut Weighed>,
    ) -> Result<Pick, PickError> {
        let index =
            request.routing_key.map_or(targets.len() - 1, |key| key.parse().expect("a number"));
        Ok(Pick { index, reason: "key", matched_tokens: None })
    }
}

#[test]
fn a_trace_that_was_written_is_read_again() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("trace.jsonl");
    for kind in [Kind::Chat, Kind::Agents] {
        let trace = kind.make(500, 3);
        trace.write(&path).expect("written");
        let read = Trace::read(&path, None).expect("read");
        assert_eq!(read, trace);
        assert_ne!(kind.make(500, 4), trace, "the seed is of no use");
        let first = Trace::read(&path, Some(20)).expect("read");
        assert_eq!(first.requests, read.requests[..20]);
    }
}

#[test]
fn what_is_made_is_a_load_of_its_kind() {
    for kind in [Kind::Chat, Kind::Agents] {
        let trace = kind.make(2000, 0);
        assert_eq!(trace.requests.len(), 2000);
        for asked in &trace.requests {
            let blocks = (asked.prompt_tokens as usize).div_ceil(BLOCK_TOKENS);
            assert_eq!(asked.blocks.len(), blocks);
            assert!(asked.output_tokens > 0);
        }
        let times = trace.requests.windows(2).map(|pair| pair[0].at_secs <= pair[1].at_secs);
        assert!(times.into_iter().all(|ascends| ascends));
        let share = trace.reusable_tokens() as f64 / trace.prompt_tokens() as f64;
        assert!(share > 0.4, "{kind:?}: {share}");
    }
}

#[test]
fn a_bad_trace_is_refused_with_its_line() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("trace.jsonl");
    let good = r#"{"timestamp": 5, "input_length": 600, "output_length": 1, "hash_ids": [1, 2]}"#;
    let line = |from: &str, to: &str| good.replace(from, to);
    let cases = [
        (String::new(), "trace.jsonl: has no requests"),
        (" \n\n".into(), "trace.jsonl: has no requests"),
        (format!("{good}\n\n{{\"timestamp\""), "line 3: is no JSON object: EOF"),
        ("[1]".into(), "line 1: is no JSON object"),
        (format!("{good}\n{}", line("5", "4.5")), "line 2: timestamp 4.5 is earlier"),
        (line("5", "-1"), "timestamp must be a number of milliseconds"),
        (line("5", "1e300"), "timestamp must be"),
        (line("5", "NaN"), "is no JSON object"),
        (line("\"timestamp\": 5, ", ""), "has no timestamp"),
        (line("5", "5, \"routing_key\": 7"), "routing_key must be a text"),
        (line("600", "0"), "input_length must be a whole number from 1"),
        (line("600", "1e99"), "input_length must be a whole number from 1"),
        (line("600", "null"), "has no input_length"),
        (line("\"output_length\": 1", "\"output_length\": 0"), "output_length must be"),
        (line("\"output_length\": 1", "\"output_length\": 2.5"), "output_length must be"),
        (line("\"output_length\": 1", "\"output_length\": 131073"), "from 1 to 131072"),
        (line("600", "1025"), "has 2 hash_ids, and input_length 1025 needs 3"),
        (line("[1, 2]", "7"), "hash_ids must be a list, not 7"),
        (line("[1, 2]", "[1, -2]"), "each of hash_ids must be"),
        (line("[1, 2]", "[1, \"a\"]"), "each of hash_ids must be"),
        (line(", \"hash_ids\": [1, 2]", ""), "has no hash_ids"),
    ];
    for (text, problem) in cases {
        std::fs::write(&path, &text).expect("written");
        let error = Trace::read(&path, None).expect_err(&text).to_string();
        assert!(error.contains(problem) && error.contains("trace.jsonl"), "{text}: {error}");
    }
    std::fs::write(&path, b"\xff\xfe").expect("written");
    assert!(Trace::read(&path, None).is_err());
    std::fs::write(&path, good).expect("written");
    let error = Trace::read(&path, Some(2)).expect_err("too few").to_string();
    assert!(error.contains("has 1 requests, fewer than --num-requests 2"), "{error}");
    assert!(Trace::read(Path::new("/no/such"), None).is_err());
}

#[test]
fn no_file_is_named_twice() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name).display().to_string();
    std::fs::write(path("t"), "").expect("written");
    for (flags, found) in [
        (vec![path("./t"), format!("--csv={}", path("t"))], "--csv: "),
        (
            vec![
                "--synthetic=chat".into(),
                format!("--write={}", path("new")),
                format!("--csv={}", path("new")),
            ],
            "is also named by --write",
        ),
    ] {
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        let error = check_files(&options(&flags).expect("flags")).expect_err("refused").to_string();
        assert!(error.contains(found), "{error}");
    }
    let different = [&path("t")[..], &format!("--csv={}", path("u"))];
    assert!(check_files(&options(&different).expect("flags")).is_ok());
}

#[test]
fn bad_options_are_refused_by_name() {
    for (flags, found) in [
        (&[][..], "TRACE"),
        (&["t", "--workers=0"], "--workers"),
        (&["t", "--speeds=1,NaN"], "from 0.001 to 1000"),
        (&["t", "--speeds=-1"], "from 0.001 to 1000"),
        (&["t", "--rate-scale=0"], "--rate-scale"),
        (&["t", "--policy=cache_awar"], "'cache_aware'"),
        (&["t", "--policy="], "--policy"),
        (&["t", "--page-tokens=24"], "a power of two"),
        (&["t", "--lose=3"], "WORKER@SECONDS"),
        (&["t", "--lose=3@-1"], "WORKER@SECONDS"),
        (&["t", "--lose=3@9-8"], "must come back after"),
        (&["t", "--kv-tokens=0"], "--kv-tokens"),
        (&["t", "--worker-weights=-1"], "must be a finite number of at least 0"),
        (&["t", "--synthetic=chat"], "cannot be used with"),
        (&["t", "--write=x"], "cannot be used with"),
        (&["--write=x"], "--synthetic"),
        (&["--synthetic=chats"], "'chat'"),
    ] {
        let error = options(flags).expect_err("refused");
        assert!(error.contains(found), "{flags:?}: {error}");
    }
    for (flags, found) in [
        (&["t", "--workers=3", "--speeds=1,2"][..], "--speeds: 3 workers"),
        (&["t", "--workers=1", "--speeds=1,2"], "--speeds: 1 workers"),
        (&["t", "--worker-weights=1,2,3"], "--worker-weights: 8 workers"),
        (&["t", "--worker-weights=0"], "--worker-weights: one of them must be over 0"),
        (&["t", "--lose=8@1"], "--lose: there is no worker 8, only 0 to 7"),
        (&["t", "--lose=1@5-9,1@8"], "--lose: worker 1 is lost already at 8 s"),
    ] {
        let error = options(flags).expect("each by itself is right").setup().expect_err("refused");
        assert!(error.contains(found), "{flags:?}: {error}");
    }
    let twice = options(&["t", "--policy=random,random"]).expect("parses");
    assert!(twice.check_policies().expect_err("refused").contains("random is named twice"));
}

fn prompts() -> impl Strategy<Value = Asked> {
    (prop::collection::vec(0u32..3, 1..4), 0u32..512).prop_map(|(blocks, cut)| {
        let prompt_tokens = (blocks.len() * BLOCK_TOKENS) as u32 - cut;
        asked(0.0, prompt_tokens, 1, &blocks)
    })
}

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::with_cases(100)
    })]

    #[test]
    fn prompts_share_pages_where_they_share_text(
        one in prompts(),
        other in prompts(),
        page_tokens in prop::sample::select(vec![1usize, 16, 512]),
        output_tokens in 0usize..600,
    ) {
        let words = Words::default();
        let (mut text, mut other_text) = (Vec::new(), Vec::new());
        words.write(&one, &mut text);
        words.write(&other, &mut other_text);
        prop_assert_eq!(text.len(), one.prompt_tokens as usize * 4);
        prop_assert!(text.is_ascii());
        let alike = text.iter().zip(&other_text).take_while(|(a, b)| a == b).count() / 4;
        let own = pages(&one, output_tokens, page_tokens);
        let others = pages(&other, output_tokens, page_tokens);
        prop_assert_eq!(own.len(), (one.prompt_tokens as usize + output_tokens) / page_tokens);
        let shared = own.iter().zip(&others).take_while(|(a, b)| a == b).count();
        if one.prompt_tokens == other.prompt_tokens && text == other_text {
            prop_assert_eq!(shared, own.len());
        } else {
            prop_assert_eq!(shared, alike / page_tokens);
        }
    }
}

#[test]
fn blocks_differ_from_their_first_words_on() {
    let words = Words::default();
    let text = |block| {
        let mut text = Vec::new();
        words.write(&asked(0.0, 512, 1, &[block]), &mut text);
        text
    };
    let mut heads: Vec<_> =
        (0..3000).chain([u32::MAX - 1, u32::MAX]).map(|block| text(block)[..12].to_vec()).collect();
    heads.sort();
    heads.dedup();
    assert_eq!(heads.len(), 3002);
    assert_ne!(text(0)[12..], text(1)[12..]);
}
