//! Values in numbered slots, and lists threaded through them.
//!
//! A value sits in up to three doubly linked lists at once without any allocation of its own: each
//! node carries one pair of links per chain. A [`List`] is only its two ends, so joining and
//! leaving one are O(1). Values stand in chunks, in the order in which they came as long as none leaves, so that those
//! of one time are neighbours; a chunk that is empty gives its memory back. Growing moves chunks, never values.

use std::mem::size_of;

use crate::prefetch::prefetch;

/// Stands for "no slot" in links.
const NIL: u32 = u32::MAX;

/// Chains a value can be part of, one list on each.
const CHAINS: usize = 3;

#[derive(Debug, Clone, Copy)]
struct Link {
    previous: u32,
    next: u32,
}

const UNLINKED: Link = Link { previous: NIL, next: NIL };

#[derive(Debug)]
struct Node<T> {
    links: [Link; CHAINS],
    value: T,
}

/// Values in a chunk.
pub(super) const CHUNK: usize = 128;

#[derive(Debug)]
struct Chunk<T> {
    /// [`CHUNK`] of them; none while no slot is in use.
    nodes: Box<[Option<Node<T>>]>,
    used: usize,
}

impl<T> Chunk<T> {
    fn empty() -> Chunk<T> {
        Chunk { nodes: Box::default(), used: 0 }
    }
}

/// Values by slot number. A slot is reused once its value is removed.
#[derive(Debug)]
pub(super) struct Slab<T> {
    // Bounded by its owner, which removes a value before it inserts one too many.
    chunks: Vec<Chunk<T>>,
    /// The slots without a value.
    free: Vec<u32>,
}

impl<T> Slab<T> {
    pub(super) fn new() -> Slab<T> {
        Slab { chunks: Vec::new(), free: Vec::new() }
    }

    pub(super) fn len(&self) -> usize {
        self.chunks.len() * CHUNK - self.free.len()
    }

    pub(super) fn insert(&mut self, value: T) -> u32 {
        if self.free.is_empty() {
            let first = self.chunks.len() * CHUNK;
            let end = u32::try_from(first + CHUNK).expect("capacity is at most 2^31");
            self.free.extend((first as u32..end).rev());
            self.chunks.push(Chunk::empty());
        }
        let slot = self.free.pop().expect("a chunk of them, if there were none");
        let chunk = &mut self.chunks[slot as usize / CHUNK];
        if chunk.used == 0 {
            chunk.nodes = (0..CHUNK).map(|_| None).collect();
        }
        chunk.used += 1;
        chunk.nodes[slot as usize % CHUNK] = Some(Node { links: [UNLINKED; CHAINS], value });
        slot
    }

    /// Takes the value out of a slot that no list runs through any more.
    pub(super) fn remove(&mut self, slot: u32) -> T {
        let chunk = &mut self.chunks[slot as usize / CHUNK];
        let node = chunk.nodes[slot as usize % CHUNK].take().expect("a slot in use holds a value");
        chunk.used -= 1;
        if chunk.used == 0 {
            *chunk = Chunk::empty();
        }
        self.free.push(slot);
        node.value
    }

    pub(super) fn get(&self, slot: u32) -> Option<&T> {
        Some(&self.place(slot)?.as_ref()?.value)
    }

    pub(super) fn get_mut(&mut self, slot: u32) -> Option<&mut T> {
        Some(&mut self.node(slot)?.value)
    }

    /// Has the value in this slot fetched, which is soon needed.
    pub(super) fn prefetch(&self, slot: u32) {
        if let Some(place) = self.place(slot) {
            prefetch(place);
        }
    }

    /// The value in a slot known to be in use.
    pub(super) fn at(&self, slot: u32) -> &T {
        self.get(slot).expect("a slot in use holds a value")
    }

    /// Heap memory of the slab, without what the values themselves point to.
    pub(super) fn memory_bytes(&self) -> usize {
        let chunks_used = self.chunks.iter().filter(|chunk| chunk.used > 0).count();
        self.chunks.capacity() * size_of::<Chunk<T>>()
            + self.free.capacity() * size_of::<u32>()
            + chunks_used * CHUNK * size_of::<Option<Node<T>>>()
    }

    fn place(&self, slot: u32) -> Option<&Option<Node<T>>> {
        self.chunks.get(slot as usize / CHUNK)?.nodes.get(slot as usize % CHUNK)
    }

    fn node(&mut self, slot: u32) -> Option<&mut Node<T>> {
        let chunk = self.chunks.get_mut(slot as usize / CHUNK)?;
        chunk.nodes.get_mut(slot as usize % CHUNK)?.as_mut()
    }

    fn link(&mut self, chain: usize, slot: u32) -> &mut Link {
        let node = self.node(slot).expect("a listed slot holds a value");
        &mut node.links[chain]
    }
}

/// A list through the slots of one slab, along the chain of number `CHAIN`. No value is in two
/// lists along one chain.
#[derive(Debug)]
pub(super) struct List<const CHAIN: usize> {
    first: u32,
    last: u32,
    len: u32,
}

impl<const CHAIN: usize> List<CHAIN> {
    pub(super) fn new() -> List<CHAIN> {
        const { assert!(CHAIN < CHAINS) };
        List { first: NIL, last: NIL, len: 0 }
    }

    pub(super) fn len(&self) -> u32 {
        self.len
    }

    pub(super) fn first(&self) -> Option<u32> {
        (self.first != NIL).then_some(self.first)
    }

    pub(super) fn last(&self) -> Option<u32> {
        (self.last != NIL).then_some(self.last)
    }

    pub(super) fn push<T>(&mut self, slab: &mut Slab<T>, slot: u32) {
        *slab.link(CHAIN, slot) = Link { previous: self.last, next: NIL };
        match self.last() {
            Some(last) => slab.link(CHAIN, last).next = slot,
            None => self.first = slot,
        }
        self.last = slot;
        self.len += 1;
    }

    /// Takes a slot of this list out of it.
    pub(super) fn remove<T>(&mut self, slab: &mut Slab<T>, slot: u32) {
        let Link { previous, next } = std::mem::replace(slab.link(CHAIN, slot), UNLINKED);
        match previous {
            NIL => self.first = next,
            _ => slab.link(CHAIN, previous).next = next,
        }
        match next {
            NIL => self.last = previous,
            _ => slab.link(CHAIN, next).previous = previous,
        }
        self.len -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn forwards<const CHAIN: usize>(slab: &mut Slab<u32>, list: &List<CHAIN>) -> Vec<u32> {
        let mut slots = Vec::new();
        let mut next = list.first;
        while next != NIL {
            slots.push(next);
            next = slab.link(CHAIN, next).next;
        }
        slots
    }

    fn backwards<const CHAIN: usize>(slab: &mut Slab<u32>, list: &List<CHAIN>) -> Vec<u32> {
        let mut slots = Vec::new();
        let mut previous = list.last;
        while previous != NIL {
            slots.push(previous);
            previous = slab.link(CHAIN, previous).previous;
        }
        slots
    }

    #[test]
    fn an_empty_chunk_gives_its_memory_back_and_is_used_again() {
        let mut slab = Slab::new();
        let slots: Vec<u32> = (0..10 * CHUNK as u32).map(|value| slab.insert(value)).collect();
        let full = slab.memory_bytes();
        for slot in &slots[CHUNK..] {
            slab.remove(*slot);
        }
        assert_eq!(slab.len(), CHUNK);
        assert!(slab.memory_bytes() < full / 2);
        for value in 0..9 * CHUNK as u32 {
            let slot = slab.insert(value);
            assert!(slots[CHUNK..].contains(&slot));
            assert_eq!(slab.at(slot), &value);
        }
        assert_eq!(slab.chunks.len(), 10);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        // A number below 100 inserts a value; a larger one picks which value leaves.
        #[test]
        fn lists_keep_the_order_of_joining(steps in prop::collection::vec(0u32..200, 0..120)) {
            let mut slab = Slab::new();
            let mut order = List::<0>::new();
            let mut even = List::<2>::new();
            let mut model: Vec<(u32, u32)> = Vec::new();
            for step in steps {
                if step < 100 {
                    let slot = slab.insert(step);
                    order.push(&mut slab, slot);
                    if step % 2 == 0 {
                        even.push(&mut slab, slot);
                    }
                    model.push((slot, step));
                } else if !model.is_empty() {
                    let (slot, value) = model.remove(step as usize % model.len());
                    order.remove(&mut slab, slot);
                    if value % 2 == 0 {
                        even.remove(&mut slab, slot);
                    }
                    prop_assert_eq!(slab.remove(slot), value);
                    prop_assert!(slab.get(slot).is_none());
                }
                let all: Vec<u32> = model.iter().map(|entry| entry.0).collect();
                let evens: Vec<u32> =
                    model.iter().filter(|entry| entry.1 % 2 == 0).map(|entry| entry.0).collect();
                let reversed: Vec<u32> = all.iter().rev().copied().collect();
                prop_assert_eq!(slab.len(), model.len());
                prop_assert_eq!(order.len() as usize, model.len());
                prop_assert_eq!(forwards(&mut slab, &even), evens);
                prop_assert_eq!(forwards(&mut slab, &order), all);
                prop_assert_eq!(backwards(&mut slab, &order), reversed);
            }
        }
    }
}
