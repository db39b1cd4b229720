//! `consistent_hashing`: the same session at the same worker, by a hash of its routing key.
//!
//! Source: see [`super::rendezvous`], which says which worker a key belongs to and what happens
//! when that one is lost or busy. SGLang's router has a policy of this name without a bound on the
//! load; it also takes the headers `authorization`, `x-forwarded-for` and `cookie` for a key, which
//! would send all who share an API key or a proxy to one worker. Here a request without a key goes
//! where the fewest requests are in flight.
//!
//! Holds nothing. Workers are told apart by name, so that several routers with the same workers
//! agree, and a router agrees with itself after a restart.

use std::sync::Arc;

use xxhash_rust::xxh3::xxh3_64;

use super::candidates::Weighed;
use super::{Options, Pick, PickError, Policy, Request, Target, least_in_flight, rendezvous};

const ROUTING_KEY: &str = "routing_key";
const OVERFLOW: &str = "overflow";
const NO_KEY: &str = "no_key";

/// Every reason this policy gives: the key's own worker; the next one in the key's order, because
/// those before it have their share; fewest in flight for want of a key.
pub const REASONS: &[&str] = &[ROUTING_KEY, OVERFLOW, NO_KEY];

/// See [`super::PolicyKind::score`].
pub const SCORE: &str = "The worker's draw for the key, 0 to 1, null if the worker has its share of the load; the \
    highest wins. With the reason `no_key` requests in flight; the lowest wins.";

/// See the module.
pub struct ConsistentHashing {
    load_factor: f64,
}

impl ConsistentHashing {
    pub fn new(options: &Options) -> Self {
        Self { load_factor: options.hash_load_factor }
    }
}

impl Policy for ConsistentHashing {
    fn pick(
        &self,
        request: &Request,
        targets: &[Arc<Target>],
        rng: &mut fastrand::Rng,
        weighed: Option<&mut Weighed>,
    ) -> Result<Pick, PickError> {
        let Some(key) = request.routing_key else {
            if let Some(weighed) = weighed {
                weighed.fewest_in_flight_wins();
            }
            let index = least_in_flight(targets, rng);
            return Ok(Pick { index, reason: NO_KEY, matched_tokens: None });
        };
        let key = xxh3_64(key.as_bytes());
        let place = rendezvous::place(key, self.load_factor, targets, weighed);
        let reason = if place.is_first { ROUTING_KEY } else { OVERFLOW };
        Ok(Pick { index: place.index, reason, matched_tokens: None })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routing::tests::{keyed, loaded, options, scores_of, tally};

    fn policy() -> ConsistentHashing {
        ConsistentHashing::new(&options(&[]).expect("defaults"))
    }

    fn pick(key: &str, targets: &[Arc<Target>]) -> Pick {
        policy()
            .pick(&keyed(key), targets, &mut fastrand::Rng::with_seed(1), None)
            .expect("never fails")
    }

    #[test]
    fn a_key_stays_where_it_is_whatever_is_asked() {
        let (targets, _held) = loaded(&[0; 6]);
        let home = pick("session-1", &targets);
        assert_eq!(home.reason, ROUTING_KEY);
        for (prompt, seed) in [("a", 1), ("b", 2), ("", 3)] {
            let request = Request { prompt: prompt.as_bytes(), ..keyed("session-1") };
            let rng = &mut fastrand::Rng::with_seed(seed);
            assert_eq!(policy().pick(&request, &targets, rng, None).expect("never fails"), home);
        }
    }

    #[test]
    fn a_busy_worker_passes_the_key_on_and_the_score_shows_it() {
        let (targets, _) = loaded(&[0; 3]);
        let home = pick("session-1", &targets).index;
        let _held = [targets[home].begin(), targets[home].begin()];
        let (pick, scores) = scores_of(&policy(), &keyed("session-1"), &targets);
        assert_eq!(pick.reason, OVERFLOW);
        assert_ne!(pick.index, home);
        assert_eq!(scores[home], None);
        let best = scores.iter().flatten().copied().fold(0.0, f64::max);
        assert!(scores[pick.index] == Some(best) && best <= 1.0, "{scores:?}");
    }

    #[test]
    fn without_a_key_the_fewest_in_flight_win() {
        let (targets, _held) = loaded(&[3, 1, 2]);
        assert_eq!(tally(&policy(), &targets, 50), [0, 50, 0]);
        let (pick, scores) = scores_of(&policy(), &Request::of(b"a"), &targets);
        assert_eq!((pick.reason, scores), (NO_KEY, vec![Some(3.0), Some(1.0), Some(2.0)]));
    }
}
