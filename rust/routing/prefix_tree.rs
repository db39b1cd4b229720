//! A radix tree that remembers which workers were sent which prompts.
//!
//! The one idea: every node knows the workers that were sent the text from the root to its end. A
//! worker that was sent a prompt was sent all its prefixes, so the workers of a node are among
//! those of its parent, and the deepest node of a prompt's path that names a worker ends the
//! longest prefix that worker was sent.
//!
//! The text is not here: a node has the [`Names`] of its blocks. A look-up goes from node to node by
//! one table, and the last name of a node tells whether all of it matches. So a few lines of memory are touched
//! per node, however much text it stands for.
//!
//! Recency is kept of ends alone, the nodes at which a prompt ended, in a queue of uses: to use a
//! prompt again adds a use, and what the queue has of it before is passed over. Any other node lasts as long
//! as something below it. So a prompt loses its end before its beginning, and what is on the way to it is read
//! and not written.
//!
//! Invariants, between calls:
//! - text remembered ≤ `max_bytes` rounded up to a whole block, where a prefix shared by several workers or
//!   prompts counts once, and the last block of a prompt as a whole one;
//! - memory ≤ 1.25 × `max_bytes` + 16 KiB, with all nodes and lists, but without what the
//!   allocator adds. Long prompts meet the first bound, many short ones this one;
//! - a prompt just inserted is there in full if it is not longer than `max_bytes`. (Only if its
//!   path branches so often that the branches' nodes alone exceed the memory, its end is missing.)
//!
//! What is absent: no text, no clock, no lock, and no recursion, because prompts decide how deep the tree
//! is.
//!
//! Source: D. Morrison, "PATRICIA" (1968), for trees whose nodes are split on demand; SGLang's
//! router for naming the workers in the nodes (its tree is over characters and evicts by a timer).

use std::collections::VecDeque;
use std::iter;
use std::mem::{self, size_of};

use hashbrown::HashTable;

use super::WorkerId;
use super::names::{Name, Names, blocks_of, bytes_of};
use super::worker_set::WorkerSet;
use crate::prefetch::prefetch;

/// Largest useful `max_bytes`, 128 GiB: beyond it, node ids would need more than 32 bits.
pub const LARGEST_MAX_BYTES: usize = 1 << 37;

/// Longest piece of a prompt in one node. Splitting a node copies its names, so this bounds that copy;
/// longer prompts become chains, so that the end of a long prompt can be evicted alone.
const MAX_BLOCKS: usize = 256;

/// Memory that does not depend on `max_bytes`, so that the smallest trees hold a few dozen nodes.
const BASE_BYTES: usize = 16 * 1024;

/// Memory per place for a node: the node and its uses, in lists that grow by an eighth, and an entry of a hash
/// table that has just doubled.
const PLACE_BYTES: usize = (size_of::<Node>() + USES_PER_PLACE * size_of::<Use>()) * 9 / 8
    + (size_of::<Child>() + 1) * 16 / 7;

/// Uses in the queue per place, those included that are passed over.
const USES_PER_PLACE: usize = 2;

type NodeId = u32;

/// Above all prompts. Has no names and no workers, and is never evicted.
const ROOT: NodeId = 0;

/// No node.
const NONE: NodeId = NodeId::MAX;

#[derive(Debug)]
struct Node {
    /// What this node adds to its parent: 1 to [`MAX_BLOCKS`] names. None in a place that is free.
    names: Box<[Name]>,
    /// Never empty.
    workers: WorkerSet,
    /// The first and the last of the names, here too because they are what look-ups need.
    first: Name,
    last: Name,
    /// In a place that is free, the next one that is.
    parent: NodeId,
    children: u32,
    /// Bytes of prompt that the names stand for.
    text_bytes: u32,
    /// When a prompt ended here, if that is in the queue of uses; else 0.
    used_at: u32,
}

/// A look-up waits for a node once: at most two lines of a processor's cache that are neighbours.
const _: () = assert!(size_of::<Node>() <= 64);

/// A node as the table has it.
#[derive(Debug)]
struct Child {
    first: Name,
    node: NodeId,
}

/// A prompt ended at this node.
#[derive(Debug)]
struct Use {
    node: NodeId,
    /// Its time, only ever compared for equality.
    at: u32,
}

impl Node {
    /// Of the `names` after the first `start` of a prompt.
    fn new(start: usize, names: &[Name], workers: WorkerSet, parent: NodeId) -> Self {
        let mut node = Self {
            names: Box::default(),
            workers,
            first: 0,
            last: 0,
            parent,
            children: 0,
            text_bytes: 0,
            used_at: 0,
        };
        node.set_names(start, names);
        node
    }

    fn set_names(&mut self, start: usize, names: &[Name]) {
        let ends = names.first().zip(names.last());
        (self.first, self.last) = ends.map_or((0, 0), |(first, last)| (*first, *last));
        self.text_bytes = text_bytes(start, names.len()) as u32;
        self.names = names.into();
    }

    /// Bytes this node holds outside of itself.
    fn heap_bytes(&self) -> usize {
        size_of_val(&*self.names) + self.workers.heap_bytes()
    }
}

/// Bytes of prompt that `blocks` blocks after the first `start` stand for.
fn text_bytes(start: usize, blocks: usize) -> usize {
    bytes_of(start + blocks) - bytes_of(start)
}

/// See the module.
#[derive(Debug)]
pub struct PrefixTree {
    /// In whole blocks.
    max_text_bytes: usize,
    max_memory_bytes: usize,
    /// So many that a quarter of the memory is left for names.
    max_places: usize,
    /// Indexed by [`NodeId`]. At most `max_places`, which are used again and never given back: so many small
    /// nodes must leave room for long prompts.
    nodes: Vec<Node>,
    /// The first place that is free, or [`NONE`].
    free: NodeId,
    node_count: usize,
    /// All nodes but the root, by parent and first name.
    by_first: HashTable<Child>,
    /// Oldest first; at most [`USES_PER_PLACE`]. Every node below which nothing is has one.
    uses: VecDeque<Use>,
    /// Of the last use; counts around the end of the numbers, and never 0.
    now: u32,
    text_bytes: usize,
    /// Sum of all nodes' [`Node::heap_bytes`].
    heap_bytes: usize,
}

impl PrefixTree {
    /// An empty tree that remembers at most `max_bytes` of text; see [`LARGEST_MAX_BYTES`].
    pub fn new(max_bytes: usize) -> Self {
        let max_bytes = max_bytes.min(LARGEST_MAX_BYTES);
        let max_memory_bytes = max_bytes + max_bytes / 4 + BASE_BYTES;
        Self {
            max_text_bytes: bytes_of(blocks_of(max_bytes)),
            max_memory_bytes,
            max_places: max_memory_bytes / 4 * 3 / PLACE_BYTES,
            nodes: vec![Node::new(0, &[], WorkerSet::default(), NONE)],
            free: NONE,
            node_count: 0,
            by_first: HashTable::new(),
            uses: VecDeque::new(),
            now: 0,
            text_bytes: 0,
            heap_bytes: 0,
        }
    }

    /// Bytes of prompt text remembered, in whole blocks.
    pub fn text_bytes(&self) -> usize {
        self.text_bytes
    }

    /// Bytes of memory held, without what the allocator adds: names and lists are exact, the tables count as
    /// if they had just grown.
    pub fn memory_bytes(&self) -> usize {
        self.heap_bytes + self.nodes.len() * PLACE_BYTES
    }

    /// Nodes below the root.
    pub fn node_count(&self) -> usize {
        self.node_count
    }

    /// The path of `prompt`, as far as the tree has it.
    pub fn matched(&self, prompt: &Names) -> Match<'_> {
        let prompt_bytes = prompt.prompt_bytes();
        let mut found =
            Match { tree: self, prompt_bytes, node: ROOT, blocks_in_node: 0, blocks: 0 };
        while let Some((child, common)) = self.step(found.node, &prompt.as_slice()[found.blocks..])
        {
            found.node = child;
            found.blocks_in_node = common;
            found.blocks += common;
            if common < self.node(child).names.len() {
                break;
            }
        }
        found
    }

    /// Remembers that `worker` was sent `prompt`, as the most recent use. Evicts the least recently
    /// used ends to make room. Of a prompt longer than `max_bytes`, the beginning is remembered.
    pub fn insert(&mut self, prompt: &Names, worker: WorkerId) {
        let names = prompt.as_slice();
        let names = &names[..names.len().min(blocks_of(self.max_text_bytes))];
        self.tick();
        let (mut node, mut known) = self.mark_path(names, worker);
        for piece in names[known..].chunks(MAX_BLOCKS) {
            let text_bytes = text_bytes(known, piece.len());
            // Room first, then names: memory stays within its bound also while this runs.
            while !self.has_room(piece.len(), text_bytes) && self.evict_oldest(node) {}
            if !self.has_room(piece.len(), text_bytes) {
                break;
            }
            node = self.add_leaf(node, known, piece, worker);
            known += piece.len();
        }
        self.note_use(node);
        // Splits and grown lists have taken memory too.
        while !self.has_room(0, 0) && self.evict_oldest(NONE) {}
    }

    /// Forgets all that `worker` was sent. Takes time in proportion to the number of nodes.
    pub fn remove_worker(&mut self, worker: WorkerId) {
        self.tick();
        for id in 1..self.nodes.len() as NodeId {
            if self.node(id).workers.contains(worker) {
                self.change(id, |node| node.workers.remove(worker));
                self.remove_if_forgotten(id);
            }
        }
    }

    /// Removes a node of which no worker is left, if nothing is below it, and then those above it of which
    /// the same is true. What is below was sent to nobody else, so the walk comes to it too.
    fn remove_if_forgotten(&mut self, mut id: NodeId) {
        while id != ROOT && self.node(id).workers.is_empty() && self.node(id).children == 0 {
            id = self.remove_leaf(id);
        }
        // Others were sent this as the beginning of prompts whose ends were evicted: its turn is next.
        self.expose(id, self.now);
    }

    /// Adds `worker` to the nodes of the known beginning of a prompt, splitting the last one where
    /// the prompt leaves it. Returns the last node and the number of names of that beginning.
    fn mark_path(&mut self, names: &[Name], worker: WorkerId) -> (NodeId, usize) {
        let (mut id, mut known) = (ROOT, 0);
        while let Some((child, common)) = self.step(id, &names[known..]) {
            let whole = common == self.node(child).names.len();
            id = if whole { child } else { self.split(child, known, common) };
            known += common;
            if !self.node(id).workers.contains(worker) {
                self.change(id, |node| node.workers.insert(worker));
            }
        }
        (id, known)
    }

    /// The child of `id` on the path of `rest`, what is left of a prompt after `id`, and how many names of that
    /// child's are the prompt's.
    fn step(&self, id: NodeId, rest: &[Name]) -> Option<(NodeId, usize)> {
        let first = *rest.first()?;
        let is_it = |child: &Child| child.first == first && self.node(child.node).parent == id;
        let child = self.by_first.find(table_hash(first), is_it)?.node;
        let node = self.node(child);
        let len = node.names.len();
        // A name stands for all before it too.
        let common = match rest.get(len - 1) == Some(&node.last) {
            true => len,
            false => node.names.iter().zip(rest).take_while(|(a, b)| a == b).count(),
        };
        Some((child, common))
    }

    /// Puts a node with the first `at` names of `lower` above it, and returns that. `start` names are before both.
    fn split(&mut self, lower: NodeId, start: usize, at: usize) -> NodeId {
        let node = self.node_mut(lower);
        let (names, first) = (mem::take(&mut node.names), node.first);
        let (workers, parent) = (node.workers.clone(), node.parent);
        let upper = self.add(Node::new(start, &names[..at], workers, parent));
        self.node_mut(upper).children = 1;
        let entry = self.by_first.find_mut(table_hash(first), |child| child.node == lower);
        entry.expect("every node is in the table").node = upper;

        let node = self.node_mut(lower);
        node.set_names(start + at, &names[at..]);
        node.parent = upper;
        self.heap_bytes -= at * size_of::<Name>();
        self.list(lower);
        upper
    }

    fn add_leaf(
        &mut self,
        parent: NodeId,
        start: usize,
        names: &[Name],
        worker: WorkerId,
    ) -> NodeId {
        let leaf = self.add(Node::new(start, names, WorkerSet::of(worker), parent));
        self.text_bytes += self.node(leaf).text_bytes as usize;
        self.node_mut(parent).children += 1;
        self.list(leaf);
        leaf
    }

    /// Returns its parent.
    fn remove_leaf(&mut self, id: NodeId) -> NodeId {
        let free = Node::new(0, &[], WorkerSet::default(), self.free);
        let leaf = mem::replace(self.node_mut(id), free);
        debug_assert_eq!(leaf.children, 0, "only leaves are removed");
        self.free = id;
        self.node_count -= 1;
        let entry = self.by_first.find_entry(table_hash(leaf.first), |child| child.node == id);
        entry.expect("every node is in the table").remove();
        self.node_mut(leaf.parent).children -= 1;
        self.text_bytes -= leaf.text_bytes as usize;
        self.heap_bytes -= leaf.heap_bytes();
        leaf.parent
    }

    /// Whether another node with so many names that stand for so much text fits, beside one that a split adds.
    fn has_room(&self, names: usize, text_bytes: usize) -> bool {
        let place = if self.free == NONE { PLACE_BYTES } else { 0 };
        let memory_bytes = self.memory_bytes() + place + names * size_of::<Name>();
        self.text_bytes + text_bytes <= self.max_text_bytes
            && memory_bytes <= self.max_memory_bytes
            && self.node_count + 2 < self.max_places
    }

    fn tick(&mut self) {
        self.now = self.now.wrapping_add(1).max(1);
    }

    fn note_use(&mut self, id: NodeId) {
        if id != ROOT {
            self.make_place_for_use();
            self.uses.push_back(Use { node: id, at: self.now });
            self.node_mut(id).used_at = self.now;
        }
    }

    /// A node that lasted as long as what was below it is the next to go.
    fn expose(&mut self, id: NodeId, at: u32) {
        let node = self.node_mut(id);
        if id != ROOT && node.children == 0 && node.used_at == 0 {
            node.used_at = at;
            self.make_place_for_use();
            self.uses.push_front(Use { node: id, at });
        }
    }

    fn make_place_for_use(&mut self) {
        let len = self.uses.len();
        if len >= USES_PER_PLACE * self.nodes.len() {
            let nodes = &self.nodes;
            self.uses.retain(|it| nodes[it.node as usize].used_at == it.at);
        } else if len == self.uses.capacity() {
            self.uses.reserve_exact(len / 8 + 1);
        }
    }

    /// Removes the least recently used end, but not `kept`; false if there is none.
    fn evict_oldest(&mut self, kept: NodeId) -> bool {
        while let Some(oldest) = self.uses.pop_front() {
            self.look_ahead();
            let node = self.node_mut(oldest.node);
            if node.used_at != oldest.at {
                continue;
            }
            node.used_at = 0;
            if node.children == 0 && oldest.node != kept {
                let parent = self.remove_leaf(oldest.node);
                self.expose(parent, oldest.at);
                return true;
            }
        }
        false
    }

    /// Has fetched what later evictions will touch, as nothing lies farther from the processor than what was used least
    /// recently: first the use, some evictions later its node, and then what the node points to. A use may be one that
    /// will be passed over; a place that is free by then has no names, and its parent is none.
    fn look_ahead(&self) {
        if let Some(a_use) = self.uses.get(16) {
            prefetch(a_use);
        }
        if let Some(a_use) = self.uses.get(5) {
            prefetch(self.node(a_use.node));
        }
        if let Some(a_use) = self.uses.get(1) {
            let node = self.node(a_use.node);
            if let Some(first) = node.names.first() {
                prefetch(first);
                prefetch(self.node(node.parent));
            }
        }
    }

    /// Puts a node into the table.
    fn list(&mut self, id: NodeId) {
        let child = Child { first: self.node(id).first, node: id };
        self.by_first.insert_unique(table_hash(child.first), child, |it| table_hash(it.first));
    }

    fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id as usize]
    }

    fn node_mut(&mut self, id: NodeId) -> &mut Node {
        &mut self.nodes[id as usize]
    }

    /// Changes a node's workers; the only way to, so that `heap_bytes` stays the sum.
    fn change(&mut self, id: NodeId, change: impl FnOnce(&mut Node)) {
        let node = self.node_mut(id);
        let before = node.heap_bytes();
        change(node);
        let after = node.heap_bytes();
        self.heap_bytes = self.heap_bytes - before + after;
    }

    fn add(&mut self, node: Node) -> NodeId {
        self.heap_bytes += node.heap_bytes();
        self.node_count += 1;
        if self.free != NONE {
            let id = self.free;
            self.free = self.node(id).parent;
            *self.node_mut(id) = node;
            return id;
        }
        if self.nodes.len() == self.nodes.capacity() {
            self.nodes.reserve_exact(self.nodes.len() / 8 + 1);
        }
        self.nodes.push(node);
        NodeId::try_from(self.nodes.len() - 1).expect("LARGEST_MAX_BYTES bounds the ids")
    }
}

/// Spreads a name over the bits that a hash table looks at.
fn table_hash(first: Name) -> u64 {
    u64::from(first).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// A prompt's path in a [`PrefixTree`].
pub struct Match<'a> {
    tree: &'a PrefixTree,
    prompt_bytes: usize,
    /// The deepest node of the path, [`ROOT`] if nothing matches.
    node: NodeId,
    /// How many of that node's names match.
    blocks_in_node: usize,
    /// Of the longest prefix that any worker was sent.
    blocks: usize,
}

impl<'a> Match<'a> {
    /// Lengths of prefixes in bytes, longest first, with all the workers that were sent as much.
    /// Never a length of 0. Each set has all workers of the one before.
    pub fn deepest_first(&self) -> impl Iterator<Item = (usize, &'a WorkerSet)> + use<'a> {
        let (tree, prompt_bytes) = (self.tree, self.prompt_bytes);
        let start = (self.node, self.blocks_in_node, self.blocks);
        let up = move |&(id, blocks_in_node, blocks): &(NodeId, usize, usize)| {
            let parent = tree.node(id).parent;
            (parent != NONE)
                .then(|| (parent, tree.node(parent).names.len(), blocks - blocks_in_node))
        };
        iter::successors(Some(start), up).take_while(|&(id, ..)| id != ROOT).map(
            move |(id, _, blocks)| (bytes_of(blocks).min(prompt_bytes), &tree.node(id).workers),
        )
    }

    /// Bytes of the longest prefix that `worker` was sent, 0 if none.
    pub fn bytes_for(&self, worker: WorkerId) -> usize {
        self.deepest_first()
            .find(|(_, workers)| workers.contains(worker))
            .map_or(0, |(bytes, _)| bytes)
    }
}

#[cfg(test)]
impl PrefixTree {
    /// Panics unless the module's invariants hold.
    pub(super) fn check_invariants(&self) {
        let (mut count, mut text_bytes, mut heap_bytes) = (0, 0, 0);
        let (mut children, mut uses) = (vec![0; self.nodes.len()], vec![0; self.nodes.len()]);
        for it in &self.uses {
            uses[it.node as usize] += u32::from(it.at == self.node(it.node).used_at);
        }
        for (node, id) in self.nodes.iter().zip(0..).filter(|(node, _)| !node.names.is_empty()) {
            assert!(node.names.len() <= MAX_BLOCKS);
            assert_eq!(
                (Some(&node.first), Some(&node.last)),
                (node.names.first(), node.names.last())
            );
            assert!(!node.workers.is_empty() && node.workers.iter().is_sorted_by(|a, b| a < b));
            assert_eq!(self.step(node.parent, &node.names), Some((id, node.names.len())));
            if node.parent != ROOT {
                let parent = self.node(node.parent);
                assert!(node.workers.iter().all(|worker| parent.workers.contains(worker)));
            }
            assert_eq!(
                uses[id as usize],
                u32::from(node.used_at != 0),
                "a last use is in the queue"
            );
            assert!(node.children > 0 || node.used_at != 0, "every leaf has one");
            children[node.parent as usize] += 1;
            count += 1;
            text_bytes += node.text_bytes as usize;
            heap_bytes += node.heap_bytes();
        }
        for (node, counted) in self.nodes.iter().zip(children) {
            assert_eq!(node.children, counted);
        }
        assert_eq!((count, text_bytes), (self.node_count(), self.text_bytes));
        assert_eq!((heap_bytes, self.by_first.len()), (self.heap_bytes, count));
        assert!(self.uses.len() <= USES_PER_PLACE * self.nodes.len());
        assert!(self.nodes.len() <= self.max_places);
        assert!(self.text_bytes <= self.max_text_bytes);
        assert!(self.memory_bytes() <= self.max_memory_bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const AMPLE_BYTES: usize = 1 << 20;

    impl PrefixTree {
        fn insert_text(&mut self, prompt: &[u8], worker: WorkerId) {
            self.insert(&Names::of(prompt), worker);
        }

        fn matched_text(&self, prompt: &[u8]) -> Match<'_> {
            self.matched(&Names::of(prompt))
        }
    }

    fn tree(prompts: &[(&str, WorkerId)]) -> PrefixTree {
        let mut tree = PrefixTree::new(AMPLE_BYTES);
        for (prompt, worker) in prompts {
            tree.insert_text(prompt.as_bytes(), *worker);
            tree.check_invariants();
        }
        tree
    }

    fn longest(tree: &PrefixTree, prompt: &[u8]) -> Option<(usize, Vec<WorkerId>)> {
        let found = tree.matched_text(prompt).deepest_first().next();
        found.map(|(bytes, workers)| (bytes, workers.iter().collect()))
    }

    #[test]
    fn an_empty_tree_matches_nothing() {
        let tree = tree(&[("", 1)]);
        assert_eq!(longest(&tree, b"abc"), None);
        assert_eq!(longest(&tree, b""), None);
        assert_eq!((tree.text_bytes(), tree.node_count()), (0, 0));
    }

    #[test]
    fn prompts_share_their_prefix() {
        let tree = tree(&[("kind and wise", 1), ("kind and able", 2), ("kind", 3)]);
        assert_eq!(tree.text_bytes(), bytes_of(1 + 1 + 2 + 2));
        assert_eq!(longest(&tree, b"kind and wise"), Some((13, vec![1])));
        assert_eq!(longest(&tree, b"kind and witty"), Some((8, vec![1, 2])));
        assert_eq!(longest(&tree, b"kindness"), Some((4, vec![1, 2, 3])));
        let found = tree.matched_text(b"kind and able");
        assert_eq!([1, 2, 3, 4].map(|worker| found.bytes_for(worker)), [8, 13, 4, 0]);
        assert_eq!(
            found.deepest_first().map(|(bytes, _)| bytes).collect::<Vec<_>>(),
            [13, 8, 4],
            "longest first"
        );
    }

    #[test]
    fn the_same_prompt_again_adds_nothing() {
        let mut tree = tree(&[("abc", 1)]);
        let before = (tree.text_bytes(), tree.memory_bytes(), tree.node_count());
        tree.insert_text(b"abc", 1);
        assert_eq!((tree.text_bytes(), tree.memory_bytes(), tree.node_count()), before);
    }

    #[test]
    fn a_match_may_end_within_a_character() {
        let tree = tree(&[("数学", 1), ("数字", 2)]);
        assert_eq!(longest(&tree, "数学".as_bytes()), Some((6, vec![1])));
        assert_eq!(tree.matched_text("数学".as_bytes()).bytes_for(2), "数".len() + 1);
        assert_eq!(longest(&tree, &[0xff, 0xfe]), None);
    }

    #[test]
    fn wide_nodes_find_every_child() {
        let mut tree = PrefixTree::new(AMPLE_BYTES);
        let prompt = |number: u32| [*b"head", number.to_le_bytes(), *b"tail"].concat();
        for number in 0..2000 {
            tree.insert_text(&prompt(number), number % 2);
        }
        tree.check_invariants();
        for number in 0..2000 {
            assert_eq!(longest(&tree, &prompt(number)), Some((12, vec![number % 2])));
        }
        tree.remove_worker(1);
        tree.check_invariants();
        assert_eq!(tree.node_count(), 1 + 1000);
        assert_eq!(longest(&tree, &prompt(1)), Some((4, vec![0])));
    }

    #[test]
    fn many_workers_share_a_prompt() {
        let mut tree = PrefixTree::new(AMPLE_BYTES);
        for worker in (0..512).rev() {
            tree.insert_text(b"system prompt", worker);
        }
        tree.check_invariants();
        assert_eq!(longest(&tree, b"system p"), Some((8, (0..512).collect())));
        for worker in 0..511 {
            tree.remove_worker(worker);
        }
        tree.check_invariants();
        assert_eq!(longest(&tree, b"system p"), Some((8, vec![511])));
    }

    #[test]
    fn a_removed_worker_takes_only_its_own() {
        let mut tree = tree(&[("aaaa", 1), ("aaaabbbb", 1), ("aaaacccc", 2), ("d", 1)]);
        tree.remove_worker(1);
        tree.check_invariants();
        assert_eq!(longest(&tree, b"aaaabbbb"), Some((4, vec![2])));
        assert_eq!(longest(&tree, b"d"), None);
        assert_eq!(tree.text_bytes(), 8);
        tree.remove_worker(2);
        tree.check_invariants();
        assert_eq!((tree.text_bytes(), tree.node_count()), (0, 0));
    }

    #[test]
    fn what_a_removed_worker_leaves_can_be_evicted() {
        let mut tree = PrefixTree::new(1000);
        let prompt = |byte: u8| [vec![b's'; 320], vec![byte; 320]].concat();
        tree.insert_text(&prompt(1), 1);
        tree.insert_text(&prompt(2), 2);
        tree.insert_text(&prompt(3), 2);
        assert_eq!(longest(&tree, &prompt(1)), Some((320, vec![1, 2])), "its end was evicted");
        tree.remove_worker(2);
        tree.check_invariants();
        assert_eq!(longest(&tree, &prompt(1)), Some((320, vec![1])));
        tree.insert_text(&vec![4; 1000], 2);
        tree.check_invariants();
        assert_eq!(longest(&tree, &prompt(1)), None);
    }

    #[test]
    fn the_least_recently_used_goes_first() {
        let mut tree = PrefixTree::new(1000);
        let prompts: Vec<_> = (0..4_u8).map(|byte| vec![byte; 300]).collect();
        for prompt in &prompts[..3] {
            tree.insert_text(prompt, 1);
        }
        tree.insert_text(&prompts[0], 2);
        tree.insert_text(&prompts[3], 1);
        tree.check_invariants();
        let kept: Vec<_> = prompts.iter().map(|prompt| longest(&tree, prompt)).collect();
        let full = |workers: &[WorkerId]| Some((300, workers.to_vec()));
        assert_eq!(kept, [full(&[1, 2]), None, full(&[1]), full(&[1])]);
    }

    #[test]
    fn a_shared_prefix_outlives_its_branches() {
        let mut tree = PrefixTree::new(1000);
        for byte in 0..=255 {
            let mut prompt = vec![b's'; 400];
            prompt.extend([byte; 300]);
            tree.insert_text(&prompt, 1);
            tree.check_invariants();
            assert_eq!(longest(&tree, &prompt), Some((700, vec![1])));
        }
        assert_eq!(tree.text_bytes(), bytes_of(blocks_of(1000)));
    }

    #[test]
    fn of_a_prompt_over_the_bound_the_beginning_is_kept() {
        for max_bytes in [1024, 40_000, 3 * bytes_of(MAX_BLOCKS)] {
            let mut tree = PrefixTree::new(max_bytes);
            let long: Vec<_> = (0..150_000_u32).map(|i| (i % 251) as u8).collect();
            tree.insert_text(b"something older", 1);
            tree.insert_text(&long, 2);
            tree.check_invariants();
            assert_eq!(longest(&tree, &long), Some((bytes_of(blocks_of(max_bytes)), vec![2])));
            tree.insert_text(b"something newer", 1);
            tree.check_invariants();
            let (kept, _) = longest(&tree, &long).unwrap_or_default();
            assert!(
                kept + bytes_of(MAX_BLOCKS + 1) >= max_bytes,
                "only the last node went: {kept}"
            );
        }
    }

    #[test]
    fn a_long_prompt_is_found_across_its_nodes() {
        let mut tree = PrefixTree::new(AMPLE_BYTES);
        let long: Vec<_> = (0..bytes_of(1500)).map(|i| (i % 241) as u8).collect();
        tree.insert_text(&long, 1);
        tree.insert_text(&long[..bytes_of(700)], 2);
        tree.check_invariants();
        assert_eq!(tree.text_bytes(), long.len());
        let found = tree.matched_text(&long);
        assert_eq!((found.bytes_for(1), found.bytes_for(2)), (long.len(), bytes_of(700)));
    }

    #[test]
    fn many_short_prompts_stay_within_the_memory() {
        let mut tree = PrefixTree::new(100_000);
        for i in 0..20_000_u64 {
            tree.insert_text(&i.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes(), (i % 64) as u32);
        }
        tree.check_invariants();
        assert!(tree.node_count() > 500, "{}", tree.node_count());
        let long = vec![1; 100_000];
        tree.insert_text(&long, 1);
        tree.check_invariants();
        assert_eq!(tree.matched_text(&long).bytes_for(1), 100_000, "small nodes leave their room");
    }

    #[test]
    fn a_path_of_single_blocks_is_walked_without_recursion() {
        let mut tree = PrefixTree::new(AMPLE_BYTES);
        let prompt = vec![b'a'; bytes_of(3000)];
        for blocks in 1..=3000 {
            tree.insert_text(&prompt[..bytes_of(blocks)], 1);
        }
        tree.check_invariants();
        assert_eq!(tree.node_count(), 3000);
        tree.remove_worker(1);
        assert_eq!(tree.node_count(), 0);
    }

    #[test]
    fn a_path_of_too_many_nodes_loses_its_end() {
        let mut tree = PrefixTree::new(100_000);
        let prompt = vec![b'a'; bytes_of(1500)];
        for blocks in 1..=1500 {
            tree.insert_text(&prompt[..bytes_of(blocks)], 1);
            tree.check_invariants();
        }
        let (kept, _) = longest(&tree, &prompt).unwrap_or_default();
        assert!((50_000..prompt.len()).contains(&kept), "{kept}");
    }

    #[test]
    fn no_more_is_evicted_than_room_is_needed_for() {
        let mut tree = PrefixTree::new(4 * AMPLE_BYTES);
        let mut prompts = (0..).map(|number: u32| [number.to_be_bytes(); 32].concat());
        let mut insert = |tree: &mut PrefixTree| {
            let prompt = prompts.next().expect("endless");
            tree.insert_text(&prompt, 1);
            tree.node_count()
        };
        let mut most = 0;
        while insert(&mut tree) > most {
            most = tree.node_count();
        }
        for _ in 0..100 {
            assert_eq!(insert(&mut tree), most);
        }
        tree.check_invariants();
    }

    #[test]
    fn uses_of_the_same_prompts_stay_within_the_queue() {
        let mut tree = tree(&[("aaaa", 1), ("bbbb", 1)]);
        for _ in 0..1000 {
            tree.insert_text(b"aaaa", 1);
            tree.insert_text(b"aaaacccc", 1);
            tree.check_invariants();
        }
        assert_eq!(longest(&tree, b"bbbb"), Some((4, vec![1])));
    }

    /// What the tree should know: every prompt that each worker was sent.
    #[derive(Default)]
    struct Model(Vec<(Vec<u8>, WorkerId)>);

    impl Model {
        fn bytes_for(&self, prompt: &[u8], worker: WorkerId) -> usize {
            let common = |sent: &[u8]| {
                let bytes = sent.iter().zip(prompt).take_while(|(a, b)| a == b).count();
                let whole = (0..=blocks_of(bytes)).rfind(|blocks| bytes_of(*blocks) <= bytes);
                if sent == prompt { bytes } else { whole.map_or(0, bytes_of) }
            };
            let own = self.0.iter().filter(|(_, sent_to)| *sent_to == worker);
            own.map(|(sent, _)| common(sent)).max().unwrap_or(0)
        }
    }

    /// So far apart that a set of them takes memory of its own.
    const WORKERS: [WorkerId; 6] = [0, 1, 63, 64, 200, 10_000];

    #[derive(Clone, Debug)]
    enum Step {
        Insert(Vec<u8>, WorkerId),
        Remove(WorkerId),
    }

    /// Prompts of few letters, so that they share, some repeated to be longer than a head.
    fn prompt() -> impl Strategy<Value = Vec<u8>> {
        (prop::collection::vec(0..3_u8, 0..12), 1..20_usize)
            .prop_map(|(letters, times)| letters.repeat(times))
    }

    fn steps(removals: u32) -> impl Strategy<Value = Vec<Step>> {
        let worker = || prop::sample::select(&WORKERS[..]);
        let insert = (prompt(), worker()).prop_map(|(prompt, worker)| Step::Insert(prompt, worker));
        let step = prop_oneof![
            12 => insert,
            removals => worker().prop_map(Step::Remove),
        ];
        prop::collection::vec(step, 1..80)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        #[test]
        fn without_eviction_the_tree_equals_the_model(
            steps in steps(1),
            queries in prop::collection::vec(prompt(), 1..10),
        ) {
            let (mut tree, mut model) = (PrefixTree::new(AMPLE_BYTES), Model::default());
            for step in steps {
                match step {
                    Step::Insert(prompt, worker) => {
                        tree.insert_text(&prompt, worker);
                        model.0.push((prompt, worker));
                    }
                    Step::Remove(worker) => {
                        tree.remove_worker(worker);
                        model.0.retain(|(_, sent_to)| *sent_to != worker);
                    }
                }
                tree.check_invariants();
            }
            for query in &queries {
                let found = tree.matched_text(query);
                let best = WORKERS.iter().map(|worker| model.bytes_for(query, *worker)).max();
                let longest = found.deepest_first().next().map(|(bytes, _)| bytes);
                prop_assert_eq!(longest.unwrap_or(0), best.unwrap_or(0));
                for worker in WORKERS {
                    prop_assert_eq!(found.bytes_for(worker), model.bytes_for(query, worker));
                }
            }
        }

        #[test]
        fn with_eviction_the_bounds_hold_and_the_last_prompt_is_there(
            max_bytes in 1..300_usize,
            steps in steps(1),
        ) {
            let (mut tree, mut model) = (PrefixTree::new(max_bytes), Model::default());
            for step in steps {
                match step {
                    Step::Insert(prompt, worker) => {
                        tree.insert_text(&prompt, worker);
                        let found = tree.matched_text(&prompt).bytes_for(worker);
                        prop_assert_eq!(found, prompt.len().min(bytes_of(blocks_of(max_bytes))));
                        model.0.push((prompt, worker));
                    }
                    Step::Remove(worker) => tree.remove_worker(worker),
                }
                tree.check_invariants();
                for (prompt, worker) in &model.0 {
                    let found = tree.matched_text(prompt).bytes_for(*worker);
                    prop_assert!(found <= model.bytes_for(prompt, *worker));
                }
            }
        }
    }
}
