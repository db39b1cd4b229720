//! The bounds, beside what this run measured.

use std::fs;
use std::path::PathBuf;
use std::time::SystemTime;

use serde_json::Value;
use sglang_router_rs::routing::PolicyKind;

use crate::load::PROMPT_BYTES;

const TREE_NS_MAX: f64 = 2_000.0;
const TREE_GROWTH_MAX: f64 = 2.0;
const PICK_NS_MAX: f64 = 5_000.0;
const FULL_CACHES_NS_MAX: f64 = 10_000.0;
const TWO_OVER_ONE_MIN: f64 = 1.7;

/// The medians of one run, in nanoseconds, where criterion wrote them.
pub struct Medians {
    pub figures: PathBuf,
    /// What is older is another run's.
    pub since: SystemTime,
}

impl Medians {
    /// `None` of what this run did not measure.
    fn of(&self, name: &str) -> Option<f64> {
        let path = self.figures.join(name).join("new/estimates.json");
        let written = fs::metadata(&path).and_then(|it| it.modified()).ok()?;
        if written < self.since {
            return None;
        }
        let estimates: Value = serde_json::from_slice(&fs::read(&path).ok()?).ok()?;
        estimates["median"]["point_estimate"].as_f64()
    }

    fn tree(&self, bytes: usize) -> Option<f64> {
        self.of(&format!("tree_by_prompt_bytes/{bytes}"))
    }

    /// The policy that takes longest for a pick over 512 workers; none if one was not measured.
    fn slowest_pick(&self) -> Option<(&'static str, f64)> {
        let of =
            |kind: &PolicyKind| Some((kind.name(), self.of(&format!("pick_alone/{kind}/512"))?));
        let all: Option<Vec<_>> = PolicyKind::ALL.iter().map(of).collect();
        all?.into_iter().max_by(|(_, a), (_, b)| a.total_cmp(b))
    }
}

/// Prints the table; false if a bound that was measured is not kept.
pub fn all_held(medians: &Medians, two_over_one: f64) -> bool {
    let ns = |at_most: f64| {
        move |it: f64| {
            (it <= at_most, format!("{:.2} µs", it / 1e3), format!("≤ {} µs", at_most / 1e3))
        }
    };
    let ratio =
        |it: f64| (it <= TREE_GROWTH_MAX, format!("{it:.2} ×"), format!("≤ {TREE_GROWTH_MAX} ×"));

    let per_byte = |len: usize| Some(medians.tree(len)? / len as f64);
    let by_prompt = per_byte(1 << 20).zip(per_byte(1 << 14)).map(|(large, small)| large / small);
    let prefixes = |count: u32| medians.of(&format!("tree_by_prefixes/{count}"));
    let by_prefixes = prefixes(100_000).zip(prefixes(1_000)).map(|(many, few)| many / few);
    let (slowest, slowest_ns) = medians.slowest_pick().unzip();
    let slowest =
        format!("pick, no match, 512 workers: {}", slowest.unwrap_or("the slowest policy"));

    let rows = [
        (
            "tree: match + insert, 2.4 KB, 64 workers",
            medians.tree(PROMPT_BYTES).map(ns(TREE_NS_MAX)),
        ),
        ("tree: per byte, 1 MB over 16 KB", by_prompt.map(ratio)),
        ("tree: 100,000 prefixes over 1,000", by_prefixes.map(ratio)),
        (&slowest, slowest_ns.map(ns(PICK_NS_MAX))),
        (
            "least_ttft: match + pick, 2.4 KB, 64 workers",
            medians.of("pick_full_caches/least_ttft").map(ns(FULL_CACHES_NS_MAX)),
        ),
        (
            "two threads over one: pick + tree + tracker",
            Some((
                two_over_one >= TWO_OVER_ONE_MIN,
                format!("{two_over_one:.2} ×"),
                format!("≥ {TWO_OVER_ONE_MIN} ×"),
            )),
        ),
    ];
    println!("\n{:<56} {:>10} {:>10}  held", "what", "median", "bound");
    for (what, row) in &rows {
        match row {
            Some((held, measured, bound)) => println!(
                "{what:<56} {measured:>10} {bound:>10}  {}",
                if *held { "yes" } else { "NO" }
            ),
            None => println!("{what:<56} {:>10}", "not run"),
        }
    }
    rows.iter().flat_map(|(_, row)| row).all(|(held, ..)| *held)
}
