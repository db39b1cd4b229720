//! What `least_ttft` is worth, held fast: a change to the policies, the simulated worker or the replay that
//! loses its lead fails here.

use std::path::PathBuf;
use std::sync::atomic::AtomicUsize;

use super::cluster::replay;
use super::report::{Run, Summary};
use super::synthetic::Kind;
use super::tests::options;
use super::trace::{Asked, Trace};
use crate::routing;

/// The mean TTFT of `least_ttft` over that of another policy, same trace, same workers.
fn ratio_to(other: &str, trace: &Trace, flags: &[&str]) -> f64 {
    let list = format!("--policy=least_ttft,{other}");
    let options = options(&[&["t", list.as_str()], flags].concat()).expect("flags");
    let setup = options.setup().expect("they go together");
    let means: Vec<_> = options
        .policies
        .iter()
        .map(|policy| {
            let rule = routing::build(&options.routing(*policy));
            let outcomes = replay(trace, &setup, &*rule, &AtomicUsize::new(0));
            let run = Run { policy: policy.name().to_owned(), outcomes };
            Summary::new(&run, trace, &setup).ttft_mean_secs.expect("first tokens")
        })
        .collect();
    means[0] / means[1]
}

fn assert_below(bound: f64, other: &str, trace: &Trace, flags: &[&str]) {
    let ratio = ratio_to(other, trace, flags);
    println!("{ratio:.3} x {other} {flags:?}, bound {bound}");
    assert!(
        ratio <= bound,
        "least_ttft has {ratio:.3} x the mean TTFT of {other}, over {bound}; {flags:?}"
    );
}

#[test]
fn on_conversations() {
    let trace = Kind::Chat.make(2000, 1);
    for (bound, flags) in [
        (9.0, &[][..]),
        (9.0, &["--hide-kv"]),
        (9.0, &["--speeds=1,1,0.5,0.5"]),
        (9.0, &["--rate-scale=1.15"]),
        (9.0, &["--kv-tokens=100000"]),
    ] {
        if flags.contains(&"--rate-scale=1.15") {
            assert_below(bound, "cache_aware", &trace.clone().faster(1.15), &[]);
        } else {
            assert_below(bound, "cache_aware", &trace, flags);
        }
    }
}

#[test]
fn on_agents() {
    for seed in 0..4 {
        let trace = Kind::Agents.make(2000, seed);
        for (bound, flags) in
            [(9.0, &[][..]), (9.0, &["--hide-kv"]), (9.0, &["--speeds=1,1,0.5,0.5"])]
        {
            assert_below(bound, "cache_aware", &trace, flags);
        }
    }
}

/// Requests with blocks of their own.
fn unalike(requests: u32, every_secs: f64, prompt_tokens: u32, output_tokens: u32) -> Trace {
    let asked = |number: u32| Asked {
        at_secs: f64::from(number) * every_secs,
        prompt_tokens,
        output_tokens,
        blocks: [number].into(),
    };
    Trace { requests: (0..requests).map(asked).collect() }
}

#[test]
fn on_short_prompts() {
    for rate in [0.5, 0.7, 0.9, 1.0] {
        assert_below(9.0, "shortest_queue", &unalike(4000, 0.004 / rate, 200, 30), &[]);
    }
}

#[test]
fn on_one_prompt_again_and_again() {
    let mut trace = unalike(500, 0.1, 500, 100);
    for second in [5.0, 20.0, 30.0] {
        let asked = Asked {
            at_secs: second,
            prompt_tokens: 3000,
            output_tokens: 100,
            blocks: (1000..1006).collect(),
        };
        trace.requests.extend(std::iter::repeat_n(asked, 300));
    }
    trace.requests.sort_by(|one, other| one.at_secs.total_cmp(&other.at_secs));
    assert_below(9.0, "shortest_queue", &trace, &[]);
    let asked = Asked {
        at_secs: 5.0,
        prompt_tokens: 3000,
        output_tokens: 100,
        blocks: (1000..1006).collect(),
    };
    let trace = Trace { requests: std::iter::repeat_n(asked, 300).collect() };
    assert_below(9.0, "shortest_queue", &trace, &[]);
}

#[test]
fn on_many_workers() {
    assert_below(9.0, "shortest_queue", &Kind::Chat.make(4000, 1).faster(40.0), &["--workers=500"]);
    assert_below(9.0, "shortest_queue", &unalike(4000, 0.0001, 200, 30), &["--workers=500"]);
    assert_below(9.0, "shortest_queue", &unalike(4000, 0.0008, 512, 30), &["--workers=500"]);
}

#[test]
fn on_a_trace_of_ones_own() {
    let Some(path) = std::env::var_os("ROUTER_TRACE").map(PathBuf::from) else { return };
    let trace = Trace::read(&path, None).expect("the trace that ROUTER_TRACE names");
    assert_below(9.0, "cache_aware", &trace, &[]);
}
