//! What the tests stand on: a router, workers, a client that sees every byte, and bounded waiting.

mod message;
mod router;
mod scripted_worker;
mod simulated;
mod wire;

use std::time::Duration;

pub use message::{Message, STREAM_HEAD, answer, chunked, ok, request};
pub use router::{Router, encoded};
pub use scripted_worker::{Exchange, Health, ScriptedWorker};
pub use simulated::Simulated;
pub use wire::Wire;

/// Nothing a test waits for takes this long, unless it never comes.
const PATIENCE: Duration = Duration::from_secs(20);
const POLL_EVERY: Duration = Duration::from_millis(5);

/// The output of `future`, which must come.
pub async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, future).await {
        Ok(output) => output,
        Err(_) => panic!("waited in vain for {what}"),
    }
}

/// Asks again and again until the answer is there.
pub async fn until<T>(what: &str, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    soon(what, async {
        loop {
            if let Some(answer) = ask().await {
                return answer;
            }
            tokio::time::sleep(POLL_EVERY).await;
        }
    })
    .await
}
