//! Which worker a key belongs to, and which one next if that one has enough to do.
//!
//! The one idea: each worker draws a number for each key, a hash of both, and the highest draw wins.
//! So every key has an order of its own among the workers, which nobody stores: a worker that is
//! lost leaves its keys to those that come next in their orders, which are all the others in equal
//! parts; one that joins takes its share of the keys and moves no other one.
//!
//! A worker that has its share of the load is passed over, so a popular key spreads over the workers
//! at the head of its order. Its share is the mean of the requests in flight, the new one included,
//! times the load factor, rounded up.
//!
//! Sources: rendezvous hashing is by Thaler and Ravishankar, "Using name-based mappings to increase
//! hit rates" (1998); bounded loads are by Mirrokni, Thorup and Zadimoghaddam, "Consistent Hashing
//! with Bounded Loads" (2016), who use a ring. A ring finds the first worker sooner, in log n steps.
//! Here all n are asked, a few nanoseconds each; in return there are no virtual nodes to place and
//! to place again, the keys are spread as evenly as chance does it, and so are those of a lost
//! worker.

use std::sync::Arc;

use super::candidates::Weighed;
use super::{Target, scatter};

/// The worker for a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// Into the targets.
    pub(super) index: usize,
    /// Whether it comes first in the key's order; if not, those before it have their share.
    pub(super) is_first: bool,
}

/// The first target in the key's order that has room for one more request. `load_factor` is at
/// least 1, so that there always is one, and `targets` are not empty.
pub(super) fn place(
    key: u64,
    load_factor: f64,
    targets: &[Arc<Target>],
    weighed: Option<&mut Weighed>,
) -> Place {
    let share = share(load_factor, targets);
    let (mut first, mut with_room) = (None, None);
    for (index, target) in targets.iter().enumerate() {
        // An index tells apart two workers that drew the same.
        let drawn = Some((draw(key, target), index));
        first = first.max(drawn);
        if target.in_flight() < share {
            with_room = with_room.max(drawn);
        }
    }
    if let Some(weighed) = weighed {
        weighed.highest_wins(|candidate| {
            let drawn = draw(key, &targets[candidate.index]);
            (candidate.in_flight < share).then_some(unit(drawn))
        });
    }
    // None has room only if requests began while the loads were read.
    let chosen = with_room.or(first);
    Place { index: chosen.map_or(0, |(_, index)| index), is_first: chosen == first }
}

/// The most requests in flight that a worker may have with the next one.
fn share(load_factor: f64, targets: &[Arc<Target>]) -> u32 {
    let in_flight: u64 = targets.iter().map(|target| u64::from(target.in_flight())).sum();
    // The cast holds what is beyond 32 bits at their maximum.
    (load_factor * (in_flight + 1) as f64 / targets.len() as f64).ceil() as u32
}

fn draw(key: u64, target: &Target) -> u64 {
    scatter(key, target.name_hash)
}

/// A draw as a number from 0 to 1.
fn unit(drawn: u64) -> f64 {
    drawn as f64 / u64::MAX as f64
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::routing::tests::{close_to, loaded};
    use crate::routing::{InFlight, WorkerId};

    const UNBOUNDED: f64 = 1e12;

    fn homes(keys: std::ops::Range<u64>, targets: &[Arc<Target>]) -> Vec<WorkerId> {
        keys.map(|key| targets[place(scatter(7, key), UNBOUNDED, targets, None).index].id).collect()
    }

    #[test]
    fn keys_are_spread_evenly() {
        for names in
            [["a", "b", "c", "d"], ["http://a:1", "http://a:2", "http://a:3", "http://a:4"]]
        {
            let named = |(id, name): (u32, &&str)| Arc::new(Target::new(id, 1.0).named(name));
            let targets: Vec<_> = (0..).zip(&names).map(named).collect();
            let mut counts = [0; 4];
            for home in homes(0..8_000, &targets) {
                counts[home as usize] += 1;
            }
            assert!(close_to(&counts, &[2000.0; 4]), "{counts:?}");
        }
    }

    #[test]
    fn the_keys_of_a_lost_worker_go_to_all_others_alike() {
        let (targets, _held) = loaded(&[0; 5]);
        let before = homes(0..10_000, &targets);
        let after = homes(0..10_000, &targets[1..]);
        let mut counts = [0; 4];
        for (before, after) in before.into_iter().zip(after) {
            if before == 0 {
                counts[after as usize - 1] += 1;
            }
        }
        assert!(close_to(&counts, &[500.0; 4]), "{counts:?}");
    }

    #[test]
    fn a_name_has_the_same_keys_whatever_its_number() {
        let targets = |ids: [u32; 2]| {
            let [one, two] = ids;
            [
                Arc::new(Target::new(one, 1.0).named("http://a:1")),
                Arc::new(Target::new(two, 1.0).named("http://a:2")),
            ]
        };
        for key in 0..100 {
            let [before, after] =
                [targets([0, 1]), targets([7, 9])].map(|all| place(key, 1.25, &all, None).index);
            assert_eq!(before, after);
        }
    }

    /// The order of the workers that one key fills, one request after the other.
    fn fill(key: u64, requests: usize, targets: &[Arc<Target>]) -> (Vec<Place>, Vec<InFlight>) {
        let sent = |_| {
            let place = place(key, 1.25, targets, None);
            (place, targets[place.index].begin())
        };
        (0..requests).map(sent).unzip()
    }

    #[test]
    fn a_popular_key_spreads_in_its_order_and_comes_home() {
        let (targets, _) = loaded(&[0; 4]);
        let (places, held) = fill(1, 16, &targets);
        let home = places[0].index;
        assert!(places[0].is_first && !places[1].is_first, "{places:?}");
        assert_eq!(targets[home].in_flight(), 5, "a quarter more than the mean of 16 on 4");
        drop(held);
        assert_eq!(place(1, 1.25, &targets, None), Place { index: home, is_first: true });
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100))]

        #[test]
        fn a_lost_worker_moves_only_its_own_keys(
            workers in 2..20_usize,
            lost in any::<prop::sample::Index>(),
            keys in prop::collection::vec(any::<u64>(), 1..50),
        ) {
            let (all, _) = loaded(&vec![0; workers]);
            let lost = lost.index(workers);
            let mut rest = all.clone();
            rest.remove(lost);
            for key in keys {
                let before = all[place(key, UNBOUNDED, &all, None).index].id;
                let after = rest[place(key, UNBOUNDED, &rest, None).index].id;
                // Read backwards: a worker that joins takes its share and moves no other key.
                prop_assert!(before == after || before as usize == lost);
            }
        }

        #[test]
        fn the_bound_holds_and_the_first_with_room_is_taken(
            loads in prop::collection::vec(0..12_u32, 1..12),
            load_factor in 1.0..3.0_f64,
            key in any::<u64>(),
        ) {
            let (targets, _held) = loaded(&loads);
            let place = place(key, load_factor, &targets, None);
            let total: u32 = loads.iter().sum();
            let mean = f64::from(total + 1) / loads.len() as f64;
            prop_assert!(f64::from(loads[place.index] + 1) <= (load_factor * mean).ceil());

            let mut order: Vec<usize> = (0..loads.len()).collect();
            order.sort_by_key(|&index| std::cmp::Reverse(draw(key, &targets[index])));
            let has_room = |&index: &usize| f64::from(loads[index] + 1) <= (load_factor * mean).ceil();
            prop_assert_eq!(Some(place.index), order.iter().copied().find(has_room));
            prop_assert_eq!(place.is_first, place.index == order[0]);
        }
    }
}
