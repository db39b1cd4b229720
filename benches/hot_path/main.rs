//! What the parts of the hot path cost: the scan of a body, the prefix tree, the policies, the tracker.
//!
//!     make bench-hot-path                    all of it, in a minute and a half
//!     make bench-hot-path HOT_PATH=tree      what has this in its name
//!
//! Each part is measured by criterion, which compares with its own last run and keeps the figures in `target/criterion`. At the
//! end the medians of this run stand beside the bounds they must keep; the exit status is 1 if one does not. Seeds are fixed.
//!
//! What others do on the machine shows, most of all in the figures of two threads: run it on one that is idle.
//!
//! Not here: the network and the life of a request, which `make bench-overhead` measures from outside.

mod bounds;
mod load;
mod pick;
mod scan;
mod threads;
mod tracker;
mod tree;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use criterion::Criterion;

fn main() -> ExitCode {
    let began = SystemTime::now();
    let load_before = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let figures = figures();
    let mut criterion = Criterion::default()
        .output_directory(&figures)
        .sample_size(20)
        .nresamples(10_000)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(500))
        .without_plots()
        .configure_from_args();
    scan::bench(&mut criterion);
    tree::bench(&mut criterion);
    pick::bench(&mut criterion);
    tracker::bench(&mut criterion);
    criterion.final_summary();
    if std::env::args().any(|arg| ["--test", "--list", "--profile-time"].contains(&arg.as_str())) {
        return ExitCode::SUCCESS;
    }
    let two_over_one = threads::two_over_one();
    println!("\nload average before the run: {}", load_before.trim_end());
    match bounds::all_held(&bounds::Medians { figures, since: began }, two_over_one) {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}

/// Where criterion's figures are: beside the profile's directory, in which this program stands under `deps`.
fn figures() -> PathBuf {
    let program = std::env::current_exe().expect("a program knows where it stands");
    program.ancestors().nth(3).expect("target/release/deps/hot_path").join("criterion")
}
