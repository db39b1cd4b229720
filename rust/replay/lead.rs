//! What `least_ttft` is worth, held fast: a change to a policy, the simulated worker or the replay that
//! loses its lead fails here.
//!
//! Bounds are of its mean TTFT over that of another policy, on the same requests and workers. Those on
//! caches lie a little above what was measured; those on loads without any use for a cache say that it
//! costs nothing there.

use std::path::Path;
use std::sync::atomic::AtomicUsize;

use super::cluster::replay;
use super::report::{Run, Summary};
use super::synthetic::Kind;
use super::tests::options;
use super::trace::{Asked, Trace};
use crate::routing;
use crate::routing::own::load_nothing;

/// Fails if the mean TTFT of `least_ttft` is more than so many times that of another policy: on several
/// traces the geometric mean of the ratios, as on a single one chance has its say.
fn assert_within(bound: f64, other: &str, traces: &[Trace], flags: &[&str]) {
    let logs = traces.iter().map(|trace| ratio_to(other, trace, flags).ln());
    let ratio = (logs.sum::<f64>() / traces.len() as f64).exp();
    println!("{ratio:.3} x {other}, at most {bound}: {flags:?}");
    assert!(
        ratio <= bound,
        "least_ttft: mean TTFT {ratio:.3} x that of {other}, over {bound}: {flags:?}"
    );
}

fn ratio_to(other: &str, trace: &Trace, flags: &[&str]) -> f64 {
    let list = format!("--policy=least_ttft,{other}");
    let options = options(&[&["t", list.as_str()], flags].concat()).expect("flags");
    let setup = options.setup().expect("they go together");
    let trace = trace.clone().faster(options.flags.rate_scale);
    let mean_secs = |policy: &routing::Choice| {
        let rule = routing::build(&options.routing(*policy), &load_nothing).expect("the router's");
        let outcomes = replay(&trace, &setup, &*rule, &AtomicUsize::new(0));
        let run = Run { policy: policy.name().to_owned(), outcomes };
        Summary::new(&run, &trace, &setup).ttft_mean_secs.expect("first tokens")
    };
    let means: Vec<_> = options.policies.iter().map(mean_secs).collect();
    means[0] / means[1]
}

/// Requests that come evenly, each with a prompt of one block that no other has.
fn unalike(requests: u32, per_sec: f64, prompt_tokens: u32, output_tokens: u32) -> Trace {
    let asked = |number: u32| Asked {
        at_secs: f64::from(number) / per_sec,
        prompt_tokens,
        output_tokens,
        blocks: [number].into(),
        routing_key: None,
    };
    Trace { requests: (0..requests).map(asked).collect() }
}

/// The same prompt so many times, evenly over that many seconds.
fn burst(requests: u32, at_secs: f64, span_secs: f64) -> impl Iterator<Item = Asked> {
    let asked = move |number: u32| Asked {
        at_secs: at_secs + span_secs * f64::from(number) / f64::from(requests),
        prompt_tokens: 3000,
        output_tokens: 100,
        blocks: (u32::MAX - 6..u32::MAX).collect(),
        routing_key: None,
    };
    (0..requests).map(asked)
}

#[test]
fn on_conversations() {
    let traces = [1, 2].map(|seed| Kind::Chat.make(1200, seed));
    for (bound, flags) in [
        (0.67, &[][..]),
        (0.70, &["--hide-kv"]),
        (0.60, &["--speeds=1,1,0.5,0.5"]),
        (0.63, &["--rate-scale=1.15"]),
        (0.56, &["--kv-tokens=100000"]),
        (0.62, &["--lose=0@100"]),
    ] {
        assert_within(bound, "cache_aware", &traces, flags);
    }
}

#[test]
fn on_agents() {
    let traces = [1, 2, 3, 4, 5, 6, 7, 8].map(|seed| Kind::Agents.make(1000, seed));
    for (bound, flags) in [(0.72, &[][..]), (0.50, &["--speeds=1,1,0.5,0.5"])] {
        assert_within(bound, "cache_aware", &traces, flags);
    }
}

#[test]
fn on_short_prompts() {
    // Of the 320 a second that the workers could bear.
    for per_sec in [125.0, 175.0, 225.0, 250.0] {
        assert_within(1.05, "shortest_queue", &[unalike(4000, per_sec, 200, 30)], &[]);
    }
}

#[test]
fn on_workers_that_run_few_at_a_time() {
    // Of some 140 a second that the workers could bear.
    for per_sec in [50.0, 90.0, 130.0] {
        let trace = unalike(4000, per_sec, 200, 30);
        assert_within(1.05, "shortest_queue", &[trace], &["--max-running=8"]);
    }
}

#[test]
fn on_one_prompt_at_once() {
    assert_on_one_prompt_over(0.0);
}

#[test]
fn on_one_prompt_again_and_again() {
    assert_on_one_prompt_over(2.0);
}

fn assert_on_one_prompt_over(span_secs: f64) {
    let burst = |at_secs| burst(300, at_secs, span_secs);
    let alone = Trace { requests: burst(0.0).collect() };
    assert_within(1.05, "shortest_queue", &[alone], &[]);
    let mut among_others = unalike(500, 10.0, 500, 100);
    among_others.requests.extend([5.0, 20.0, 30.0].into_iter().flat_map(burst));
    among_others.requests.sort_by(|one, other| one.at_secs.total_cmp(&other.at_secs));
    assert_within(1.05, "shortest_queue", &[among_others], &[]);
}

#[test]
fn on_many_workers() {
    let flags = &["--workers=500"];
    assert_within(1.05, "shortest_queue", &[Kind::Chat.make(2000, 1).faster(40.0)], flags);
    assert_within(1.05, "shortest_queue", &[unalike(4000, 10_000.0, 200, 30)], flags);
    assert_within(1.05, "shortest_queue", &[unalike(4000, 1250.0, 512, 30)], flags);
}

/// On the file that `ROUTER_TRACE` names, if it is set.
#[test]
fn on_a_trace_of_ones_own() {
    let Some(path) = std::env::var_os("ROUTER_TRACE") else { return };
    let trace = Trace::read(Path::new(&path), None).expect("ROUTER_TRACE names a trace");
    assert_within(0.65, "cache_aware", &[trace], &[]);
}
