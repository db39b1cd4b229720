//! The program without Python.

use std::process::ExitCode;

use sglang_router_rs::routing::own::load_nothing;

fn main() -> ExitCode {
    let argv: Vec<String> =
        std::env::args_os().map(|argument| argument.to_string_lossy().into_owned()).collect();
    ExitCode::from(sglang_router_rs::cli::run(&argv, &[], &load_nothing))
}
