//! Workers that come and go with the addresses of a name.
//!
//! The one idea: the addresses of the last good answer are remembered, and only what differs in the next one joins or
//! leaves. An answer that fails or is empty says nothing, so a resolver's trouble removes nobody. Whoever is named by its
//! URL too, or has another name, stays when the name loses its address, and whoever was removed by hand stays away until
//! the name has lost it.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use super::source::{DnsName, change};
use super::wanted::WantedBy;
use super::{FirstRound, Joining, WORKERS_MAX, Worker, Workers};

const RESOLVE_EVERY: Duration = Duration::from_secs(5);
/// The system's resolver may take half a minute to give up.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(5);

/// Resolves the name at once and then forever. The first round of checks is over no earlier than the first answer
/// and the first checks of the workers it brought.
pub(super) async fn follow(workers: Arc<Workers>, name: DnsName, round: Arc<FirstRound>) {
    let mut round = Some(round);
    let mut followed = Followed { workers, name, has: BTreeMap::new() };
    let mut trouble = None;
    loop {
        let outcome = match followed.resolve().await {
            Ok(found) => followed.take(&found, round.as_ref()),
            Err(why) => Err(format!("{why}; its workers stay")),
        };
        round = None;
        let why = outcome.err();
        // Said again only when it is another reason.
        if why != trouble {
            match &why {
                Some(why) => tracing::warn!("{}: {why}", followed.name),
                None => tracing::info!("{} resolves again", followed.name),
            }
            trouble = why;
        }
        tokio::time::sleep(RESOLVE_EVERY).await;
    }
}

struct Followed {
    workers: Arc<Workers>,
    name: DnsName,
    /// The addresses of the last good answer, at most [`WORKERS_MAX`], and the worker at each.
    has: BTreeMap<SocketAddr, Arc<Worker>>,
}

impl Followed {
    /// The name's addresses, in order and each once: at least one, at most [`WORKERS_MAX`].
    async fn resolve(&self) -> Result<Vec<SocketAddr>, String> {
        let resolving = self.workers.network.resolve(self.name.name(), self.name.port());
        let answer = tokio::time::timeout(RESOLVE_TIMEOUT, resolving)
            .await
            .map_err(|_| format!("not resolved within {} s", RESOLVE_TIMEOUT.as_secs()))?;
        let mut found = answer.map_err(|error| format!("cannot be resolved: {error}"))?;
        found.sort_unstable();
        found.dedup();
        found.truncate(WORKERS_MAX);
        if found.is_empty() { Err("has no address".to_owned()) } else { Ok(found) }
    }

    /// Lets workers join and leave, so that they are those at the addresses found.
    fn take(
        &mut self,
        found: &[SocketAddr],
        round: Option<&Arc<FirstRound>>,
    ) -> Result<(), String> {
        let had: Vec<SocketAddr> = self.has.keys().copied().collect();
        let change = change(&had, found);
        for address in &change.went {
            if let Some(worker) = self.has.remove(address) {
                tracing::info!(worker = %worker.url, "{} has lost this address", self.name);
                self.workers.lost_by_name(&worker);
            }
        }
        let (places, joining): (Vec<SocketAddr>, Vec<Joining>) = change
            .came
            .iter()
            .filter_map(|address| Some((*address, Joining::at(self.name.worker_at(*address)?))))
            .unzip();
        let mut refused = None;
        let joined = self.workers.join_all(joining, WantedBy::Name, round);
        for (address, joined) in places.into_iter().zip(joined) {
            match joined {
                Ok(joined) => {
                    self.has.insert(address, joined.worker);
                }
                Err(full) => refused = Some(full.to_string()),
            }
        }
        refused.map_or(Ok(()), Err)
    }
}
