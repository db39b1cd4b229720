//! Simulated SGLang workers in the test's own runtime.

use sglang_router_rs::sim::{Faults, Options, Ports, Sim};
use tokio::task::AbortHandle;

use super::until;

pub struct Simulated {
    pub urls: Vec<String>,
    serving: AbortHandle,
}

impl Simulated {
    /// So many workers on free ports, a thousand times faster than time.
    pub async fn start(count: usize) -> Simulated {
        Simulated::start_with(count, Options::default().faults).await
    }

    /// The same, with something wrong.
    pub async fn start_with(count: usize, faults: Faults) -> Simulated {
        Simulated::start_on(vec!["0".to_owned(); count], faults).await
    }

    /// Ends the workers and starts others on the same ports.
    pub async fn restart(self) -> Simulated {
        let port = |url: &String| url.rsplit(':').next().expect("a port").to_owned();
        let ports = self.urls.iter().map(port).collect();
        self.serving.abort();
        until("the workers' end", async || self.serving.is_finished().then_some(())).await;
        Simulated::start_on(ports, Options::default().faults).await
    }

    async fn start_on(ports: Vec<String>, faults: Faults) -> Simulated {
        let ports: Ports = ports.join(",").parse().expect("ports");
        let options = Options { ports: Some(ports), speed: 1000.0, faults, ..Options::default() };
        let sim = Sim::bind(options).await.expect("free ports");
        let urls = sim.urls();
        let serving = tokio::spawn(sim.run(std::future::pending::<()>())).abort_handle();
        Simulated { urls, serving }
    }

    pub fn urls(&self) -> Vec<&str> {
        self.urls.iter().map(String::as_str).collect()
    }
}

impl Drop for Simulated {
    fn drop(&mut self) {
        self.serving.abort();
    }
}
