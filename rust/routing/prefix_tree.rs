//! A radix tree over bytes that remembers which workers were sent which prompts.
//!
//! The one idea: every node knows the workers that were sent the text from the root to its end. A
//! worker that was sent a prompt was sent all its prefixes, so the workers of a node are among
//! those of its parent, and the deepest node of a prompt's path that names a worker ends the
//! longest prefix that worker was sent.
//!
//! Recency is one list through all nodes in which a parent comes before its children. So the last
//! of the list is always a leaf, and evicting it costs the same in any tree. A prompt loses its end
//! before its beginning.
//!
//! Invariants, between calls:
//! - text held ≤ `max_bytes`, a prefix shared by several workers or prompts counted once;
//! - memory ≤ 1.25 × `max_bytes` + 16 KiB, with all nodes and lists, but without what the
//!   allocator adds. Long prompts meet the first bound, many short ones this one;
//! - a prompt just inserted is there in full if it is not longer than `max_bytes`. (Only if its
//!   path branches so often that the branches' nodes alone exceed the memory, its end is missing.)
//!
//! What is absent: no decoding (a match may end within a character), no clock, no lock, and no
//! recursion, because prompts decide how deep the tree is.
//!
//! Source: D. Morrison, "PATRICIA" (1968), for trees whose nodes are split on demand; SGLang's
//! router for naming the workers in the nodes (its tree is over characters and evicts by a timer).

use std::iter;
use std::mem::size_of;

use smallvec::{SmallVec, smallvec};

use super::WorkerId;

/// Largest useful `max_bytes`, 128 GiB: beyond it, node ids would need more than 32 bits.
pub const LARGEST_MAX_BYTES: usize = 1 << 37;

/// Longest text of one node. Splitting a node copies its text, so this bounds that copy; longer
/// texts become chains, so that the end of a long prompt can be evicted alone.
const MAX_EDGE_BYTES: usize = 4096;

/// Memory that does not depend on `max_bytes`, so that the smallest trees hold a few dozen nodes.
const BASE_BYTES: usize = 16 * 1024;

/// Memory per slot of the node table and per entry of its free list; twice their sizes, because
/// vectors double.
const SLOT_BYTES: usize = 2 * (size_of::<Option<Box<Node>>>() + size_of::<NodeId>());

type NodeId = u32;

/// Above all prompts. Has no text and no workers, is never evicted and not in the recency list.
const ROOT: NodeId = 0;

/// No node: the ends of the recency list.
const NONE: NodeId = NodeId::MAX;

struct Node {
    /// What this node adds to its parent's text: 1 to [`MAX_EDGE_BYTES`] bytes.
    text: Box<[u8]>,
    /// Sorted by first byte, which differs between siblings; so at most 256.
    children: SmallVec<[Child; 2]>,
    /// Sorted; never empty.
    workers: SmallVec<[WorkerId; 4]>,
    parent: NodeId,
    newer: NodeId,
    older: NodeId,
}

struct Child {
    first_byte: u8,
    node: NodeId,
}

impl Node {
    fn child(&self, first_byte: u8) -> Result<usize, usize> {
        self.children.binary_search_by_key(&first_byte, |child| child.first_byte)
    }

    /// Bytes this node holds outside of itself.
    fn heap_bytes(&self) -> usize {
        let mut bytes = self.text.len();
        if self.children.spilled() {
            bytes += self.children.capacity() * size_of::<Child>();
        }
        if self.workers.spilled() {
            bytes += self.workers.capacity() * size_of::<WorkerId>();
        }
        bytes
    }
}

/// See the module.
pub struct PrefixTree {
    max_bytes: usize,
    max_memory_bytes: usize,
    /// Indexed by [`NodeId`]. Boxed, so that a phase of many small nodes leaves behind only their
    /// slots. Bounded, like `free`, through the memory of the nodes.
    slots: Vec<Option<Box<Node>>>,
    /// Slots without a node.
    free: Vec<NodeId>,
    /// Ends of the recency list.
    newest: NodeId,
    oldest: NodeId,
    text_bytes: usize,
    /// Sum of all nodes' [`Node::heap_bytes`].
    heap_bytes: usize,
}

impl PrefixTree {
    /// An empty tree that remembers at most `max_bytes` of text; see [`LARGEST_MAX_BYTES`].
    pub fn new(max_bytes: usize) -> Self {
        let max_bytes = max_bytes.min(LARGEST_MAX_BYTES);
        let root = Node {
            text: Box::default(),
            children: SmallVec::new(),
            workers: SmallVec::new(),
            parent: NONE,
            newer: NONE,
            older: NONE,
        };
        Self {
            max_bytes,
            max_memory_bytes: max_bytes + max_bytes / 4 + BASE_BYTES,
            slots: vec![Some(Box::new(root))],
            free: Vec::new(),
            newest: NONE,
            oldest: NONE,
            text_bytes: 0,
            heap_bytes: 0,
        }
    }

    /// Bytes of prompt text held.
    pub fn text_bytes(&self) -> usize {
        self.text_bytes
    }

    /// Bytes of memory held, without what the allocator adds: text, nodes and lists are exact, the
    /// node table counts as if it had just doubled.
    pub fn memory_bytes(&self) -> usize {
        let nodes = self.slots.len() - self.free.len();
        self.heap_bytes + nodes * size_of::<Node>() + self.slots.len() * SLOT_BYTES
    }

    /// Nodes that hold text.
    pub fn node_count(&self) -> usize {
        self.slots.len() - self.free.len() - 1
    }

    /// The path of `prompt`, as far as the tree has it.
    pub fn matched(&self, prompt: &[u8]) -> Match<'_> {
        let mut found = Match { tree: self, node: ROOT, bytes_in_node: 0, bytes: 0 };
        while let Some(child) = self.child(found.node, &prompt[found.bytes..]) {
            let text = &self.node(child).text;
            let common = common_prefix(text, &prompt[found.bytes..]);
            found.node = child;
            found.bytes_in_node = common;
            found.bytes += common;
            if common < text.len() {
                break;
            }
        }
        found
    }

    /// Remembers that `worker` was sent `prompt`, as the most recent use. Evicts the least recently
    /// used leaves to make room. Of a prompt longer than `max_bytes`, the beginning is remembered.
    pub fn insert(&mut self, prompt: &[u8], worker: WorkerId) {
        let prompt = &prompt[..prompt.len().min(self.max_bytes)];
        let (mut node, known_bytes) = self.mark_path(prompt, worker);
        self.touch_path(node);
        for text in prompt[known_bytes..].chunks(MAX_EDGE_BYTES) {
            // Room first, then text: memory stays within its bound also while this runs. The path
            // is the most recent of all, so it is reached only when nothing else is left.
            while !self.has_room(text.len()) && self.oldest != NONE && self.oldest != node {
                self.remove_leaf(self.oldest);
            }
            if !self.has_room(text.len()) {
                break;
            }
            node = self.add_leaf(node, text, worker);
        }
        // Splits and grown lists have taken memory too.
        while self.memory_bytes() > self.max_memory_bytes && self.oldest != NONE {
            self.remove_leaf(self.oldest);
        }
    }

    /// Forgets all that `worker` was sent. Takes time in proportion to the number of nodes.
    pub fn remove_worker(&mut self, worker: WorkerId) {
        // From the oldest, children come before their parents: a node left without workers has
        // lost its children already.
        let mut id = self.oldest;
        while id != NONE {
            let newer = self.node(id).newer;
            if let Ok(at) = self.node(id).workers.binary_search(&worker) {
                self.change(id, |node| {
                    node.workers.remove(at);
                    node.workers.shrink_to_fit();
                });
                if self.node(id).workers.is_empty() {
                    self.remove_leaf(id);
                }
            }
            id = newer;
        }
    }

    /// Adds `worker` to the nodes of the known beginning of `prompt`, splitting the last one where
    /// the prompt leaves it. Returns the last node and the length of that beginning.
    fn mark_path(&mut self, prompt: &[u8], worker: WorkerId) -> (NodeId, usize) {
        let (mut id, mut bytes) = (ROOT, 0);
        while let Some(child) = self.child(id, &prompt[bytes..]) {
            let text = &self.node(child).text;
            let common = common_prefix(text, &prompt[bytes..]);
            id = if common < text.len() { self.split(child, common) } else { child };
            bytes += common;
            if let Err(at) = self.node(id).workers.binary_search(&worker) {
                self.change(id, |node| node.workers.insert(at, worker));
            }
        }
        (id, bytes)
    }

    /// Makes the path from the root to `id` the most recent, the root's end first.
    fn touch_path(&mut self, mut id: NodeId) {
        while id != ROOT {
            self.unlink(id);
            self.link(id, NONE, self.newest);
            id = self.node(id).parent;
        }
    }

    /// Puts a node with the first `at` bytes of `lower`'s text above it, and returns that.
    fn split(&mut self, lower: NodeId, at: usize) -> NodeId {
        let node = self.node_mut(lower);
        let (head, tail) = node.text.split_at(at);
        let (head, tail): (Box<[u8]>, Box<[u8]>) = (head.into(), tail.into());
        let (workers, parent, newer) = (node.workers.clone(), node.parent, node.newer);
        let child = Child { first_byte: tail[0], node: lower };
        let first_byte = head[0];

        self.change(lower, |node| node.text = tail);
        let upper = self.add(Node {
            text: head,
            children: smallvec![child],
            workers,
            parent,
            newer: NONE,
            older: NONE,
        });
        // Just before its child, thus behind its parent.
        self.link(upper, newer, lower);
        self.node_mut(lower).parent = upper;
        let above = self.node_mut(parent);
        let place = above.child(first_byte).expect("a parent lists its child");
        above.children[place].node = upper;
        upper
    }

    fn add_leaf(&mut self, parent: NodeId, text: &[u8], worker: WorkerId) -> NodeId {
        let leaf = self.add(Node {
            text: Box::from(text),
            children: SmallVec::new(),
            workers: smallvec![worker],
            parent,
            newer: NONE,
            older: NONE,
        });
        self.text_bytes += text.len();
        // Just behind its parent, the most recent place it can have.
        match parent {
            ROOT => self.link(leaf, NONE, self.newest),
            _ => self.link(leaf, parent, self.node(parent).older),
        }
        self.change(parent, |node| {
            let place = node.child(text[0]).expect_err("a known child would have been followed");
            node.children.insert(place, Child { first_byte: text[0], node: leaf });
        });
        leaf
    }

    fn remove_leaf(&mut self, id: NodeId) {
        self.unlink(id);
        let leaf = self.slots[id as usize].take().expect("links lead to nodes");
        debug_assert!(leaf.children.is_empty(), "only leaves are removed");
        self.free.push(id);
        self.text_bytes -= leaf.text.len();
        self.heap_bytes -= leaf.heap_bytes();
        self.change(leaf.parent, |node| {
            let place = node.child(leaf.text[0]).expect("a parent lists its child");
            node.children.remove(place);
            // A node that was wide once must not hold that much for ever.
            if node.children.len() <= node.children.capacity() / 4 {
                node.children.shrink_to_fit();
            }
        });
    }

    fn has_room(&self, text_bytes: usize) -> bool {
        let memory_bytes = self.memory_bytes() + size_of::<Node>() + SLOT_BYTES + text_bytes;
        self.text_bytes + text_bytes <= self.max_bytes && memory_bytes <= self.max_memory_bytes
    }

    /// The child of `id` on the path of `rest`, what is left of the prompt after `id`.
    fn child(&self, id: NodeId, rest: &[u8]) -> Option<NodeId> {
        let node = self.node(id);
        let place = node.child(*rest.first()?).ok()?;
        Some(node.children[place].node)
    }

    fn node(&self, id: NodeId) -> &Node {
        self.slots[id as usize].as_deref().expect("links lead to nodes")
    }

    fn node_mut(&mut self, id: NodeId) -> &mut Node {
        self.slots[id as usize].as_deref_mut().expect("links lead to nodes")
    }

    /// Changes a node's text or lists; the only way to, so that `heap_bytes` stays the sum.
    fn change(&mut self, id: NodeId, change: impl FnOnce(&mut Node)) {
        let node = self.node_mut(id);
        let before = node.heap_bytes();
        change(node);
        let after = node.heap_bytes();
        self.heap_bytes = self.heap_bytes - before + after;
    }

    fn add(&mut self, node: Node) -> NodeId {
        self.heap_bytes += node.heap_bytes();
        let node = Some(Box::new(node));
        if let Some(id) = self.free.pop() {
            self.slots[id as usize] = node;
            return id;
        }
        self.slots.push(node);
        NodeId::try_from(self.slots.len() - 1).expect("LARGEST_MAX_BYTES bounds the ids")
    }

    /// Puts `id` into the recency list between two neighbours.
    fn link(&mut self, id: NodeId, newer: NodeId, older: NodeId) {
        let node = self.node_mut(id);
        (node.newer, node.older) = (newer, older);
        *self.older_of(newer) = id;
        *self.newer_of(older) = id;
    }

    /// Joins the neighbours of `id` in the recency list; `id` itself is dropped or linked anew.
    fn unlink(&mut self, id: NodeId) {
        let node = self.node(id);
        let (newer, older) = (node.newer, node.older);
        *self.older_of(newer) = older;
        *self.newer_of(older) = newer;
    }

    /// What comes after `id` in the recency list, after its beginning for [`NONE`].
    fn older_of(&mut self, id: NodeId) -> &mut NodeId {
        if id == NONE { &mut self.newest } else { &mut self.node_mut(id).older }
    }

    /// What comes before `id` in the recency list, before its end for [`NONE`].
    fn newer_of(&mut self, id: NodeId) -> &mut NodeId {
        if id == NONE { &mut self.oldest } else { &mut self.node_mut(id).newer }
    }
}

/// A prompt's path in a [`PrefixTree`].
pub struct Match<'a> {
    tree: &'a PrefixTree,
    /// The deepest node of the path, [`ROOT`] if nothing matches.
    node: NodeId,
    /// How much of that node's text matches.
    bytes_in_node: usize,
    /// Length of the longest prefix that any worker was sent.
    bytes: usize,
}

impl<'a> Match<'a> {
    /// Lengths of prefixes in bytes, longest first, with all the workers that were sent as much,
    /// sorted by id. Never a length of 0. Each list has all workers of the one before.
    pub fn deepest_first(&self) -> impl Iterator<Item = (usize, &'a [WorkerId])> + use<'a> {
        let tree = self.tree;
        let start = (self.node, self.bytes_in_node, self.bytes);
        let up = move |&(id, bytes_in_node, bytes): &(NodeId, usize, usize)| {
            let parent = tree.node(id).parent;
            (parent != NONE).then(|| (parent, tree.node(parent).text.len(), bytes - bytes_in_node))
        };
        iter::successors(Some(start), up)
            .take_while(|&(id, ..)| id != ROOT)
            .map(move |(id, _, bytes)| (bytes, tree.node(id).workers.as_slice()))
    }

    /// Bytes of the longest prefix that `worker` was sent, 0 if none.
    pub fn bytes_for(&self, worker: WorkerId) -> usize {
        self.deepest_first()
            .find(|(_, workers)| workers.binary_search(&worker).is_ok())
            .map_or(0, |(bytes, _)| bytes)
    }
}

/// Length of the longest common prefix; by blocks the compiler compares in a few instructions.
fn common_prefix(a: &[u8], b: &[u8]) -> usize {
    const BLOCK: usize = 32;
    let blocks = a.as_chunks::<BLOCK>().0.iter().zip(b.as_chunks::<BLOCK>().0);
    let same = blocks.take_while(|(a, b)| a == b).count() * BLOCK;
    same + a[same..].iter().zip(&b[same..]).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
impl PrefixTree {
    /// Panics unless the module's invariants hold.
    pub(super) fn check_invariants(&self) {
        let mut rank = vec![usize::MAX; self.slots.len()];
        let (mut newer, mut id, mut count, mut text_bytes) = (NONE, self.newest, 0, 0);
        while id != NONE {
            let node = self.node(id);
            assert_eq!(node.newer, newer, "the list is the same both ways");
            assert!((1..=MAX_EDGE_BYTES).contains(&node.text.len()));
            assert!(!node.workers.is_empty() && node.workers.is_sorted_by(|a, b| a < b));
            let parent = self.node(node.parent);
            let place = parent.child(node.text[0]).expect("the parent lists its child");
            assert_eq!(parent.children[place].node, id);
            if node.parent != ROOT {
                assert!(rank[node.parent as usize] < count, "a parent is more recent");
                assert!(node.workers.iter().all(|worker| parent.workers.contains(worker)));
            }
            rank[id as usize] = count;
            count += 1;
            text_bytes += node.text.len();
            (newer, id) = (id, node.older);
        }
        assert_eq!(newer, self.oldest);
        assert_eq!((count, text_bytes), (self.node_count(), self.text_bytes));
        let nodes = self.slots.iter().flatten();
        assert_eq!(nodes.clone().map(|node| node.children.len()).sum::<usize>(), count);
        assert_eq!(nodes.map(|node| node.heap_bytes()).sum::<usize>(), self.heap_bytes);
        assert!(self.text_bytes <= self.max_bytes);
        assert!(self.memory_bytes() <= self.max_memory_bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const AMPLE_BYTES: usize = 1 << 20;

    fn tree(prompts: &[(&str, WorkerId)]) -> PrefixTree {
        let mut tree = PrefixTree::new(AMPLE_BYTES);
        for (prompt, worker) in prompts {
            tree.insert(prompt.as_bytes(), *worker);
            tree.check_invariants();
        }
        tree
    }

    fn longest(tree: &PrefixTree, prompt: &[u8]) -> Option<(usize, Vec<WorkerId>)> {
        let found = tree.matched(prompt).deepest_first().next();
        found.map(|(bytes, workers)| (bytes, workers.to_vec()))
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
        let tree = tree(&[("hello world", 1), ("hello there", 2), ("hello", 3)]);
        assert_eq!(tree.text_bytes(), "hello ".len() + "world".len() + "there".len());
        assert_eq!(longest(&tree, b"hello world!"), Some((11, vec![1])));
        assert_eq!(longest(&tree, b"hello you"), Some((6, vec![1, 2])));
        assert_eq!(longest(&tree, b"hell"), Some((4, vec![1, 2, 3])));
        let found = tree.matched(b"hello there");
        assert_eq!([1, 2, 3, 4].map(|worker| found.bytes_for(worker)), [6, 11, 5, 0]);
        assert_eq!(
            found.deepest_first().map(|(bytes, _)| bytes).collect::<Vec<_>>(),
            [11, 6, 5],
            "longest first"
        );
    }

    #[test]
    fn the_same_prompt_again_adds_nothing() {
        let mut tree = tree(&[("abc", 1)]);
        let before = (tree.text_bytes(), tree.memory_bytes(), tree.node_count());
        tree.insert(b"abc", 1);
        assert_eq!((tree.text_bytes(), tree.memory_bytes(), tree.node_count()), before);
    }

    #[test]
    fn a_match_may_end_within_a_character() {
        let tree = tree(&[("数学", 1), ("数字", 2)]);
        assert_eq!(longest(&tree, "数学".as_bytes()), Some((6, vec![1])));
        let common = common_prefix("数学".as_bytes(), "数字".as_bytes());
        assert!(common > 3, "the second characters share bytes");
        assert_eq!(tree.matched("数学".as_bytes()).bytes_for(2), common);
        assert_eq!(longest(&tree, &[0xff, 0xfe]), None);
    }

    #[test]
    fn wide_nodes_find_every_child_and_shrink() {
        let mut tree = PrefixTree::new(AMPLE_BYTES);
        for byte in 0..=255 {
            tree.insert(&[b'x', byte, byte], u32::from(byte) % 2);
        }
        tree.check_invariants();
        for byte in 0..=255 {
            assert_eq!(
                longest(&tree, &[b'x', byte, byte, 0]),
                Some((3, vec![u32::from(byte) % 2]))
            );
        }
        tree.remove_worker(1);
        tree.check_invariants();
        assert_eq!(tree.node_count(), 1 + 128);
        let wide = tree.child(ROOT, b"x").expect("all prompts begin so");
        for byte in (2..=254).step_by(2) {
            tree.remove_leaf(tree.child(wide, &[byte]).expect("the even ones are still there"));
        }
        tree.check_invariants();
        assert!(!tree.node(wide).children.spilled(), "one child needs no list of its own");
    }

    #[test]
    fn many_workers_share_a_prompt() {
        let mut tree = PrefixTree::new(AMPLE_BYTES);
        for worker in (0..512).rev() {
            tree.insert(b"system prompt", worker);
        }
        tree.check_invariants();
        assert_eq!(longest(&tree, b"system"), Some((6, (0..512).collect())));
        for worker in 0..511 {
            tree.remove_worker(worker);
        }
        tree.check_invariants();
        assert_eq!(longest(&tree, b"system"), Some((6, vec![511])));
    }

    #[test]
    fn a_removed_worker_takes_only_its_own() {
        let mut tree = tree(&[("aaa", 1), ("aaabbb", 1), ("aaaccc", 2), ("d", 1)]);
        tree.remove_worker(1);
        tree.check_invariants();
        assert_eq!(longest(&tree, b"aaabbb"), Some((3, vec![2])));
        assert_eq!(longest(&tree, b"d"), None);
        assert_eq!(tree.text_bytes(), 6);
        tree.remove_worker(2);
        tree.check_invariants();
        assert_eq!((tree.text_bytes(), tree.node_count()), (0, 0));
    }

    #[test]
    fn the_least_recently_used_goes_first() {
        let mut tree = PrefixTree::new(1000);
        let prompts: Vec<_> = (0..4_u8).map(|byte| vec![byte; 300]).collect();
        for prompt in &prompts[..3] {
            tree.insert(prompt, 1);
        }
        tree.insert(&prompts[0], 2);
        tree.insert(&prompts[3], 1);
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
            tree.insert(&prompt, 1);
            tree.check_invariants();
            assert_eq!(longest(&tree, &prompt), Some((700, vec![1])));
        }
        assert_eq!(tree.text_bytes(), 1000);
    }

    #[test]
    fn of_a_prompt_over_the_bound_the_beginning_is_kept() {
        for max_bytes in [1024, 3 * MAX_EDGE_BYTES, 10_000] {
            let mut tree = PrefixTree::new(max_bytes);
            let long: Vec<_> = (0..50_000_u32).map(|i| (i % 251) as u8).collect();
            tree.insert(b"something older", 1);
            tree.insert(&long, 2);
            tree.check_invariants();
            assert_eq!(longest(&tree, &long), Some((max_bytes, vec![2])));
            tree.insert(b"something newer", 1);
            tree.check_invariants();
            let (kept, _) = longest(&tree, &long).unwrap_or_default();
            assert!(kept + MAX_EDGE_BYTES + 15 >= max_bytes, "only the last node went: {kept}");
        }
    }

    #[test]
    fn a_long_prompt_is_found_across_its_nodes() {
        let mut tree = PrefixTree::new(AMPLE_BYTES);
        let long: Vec<_> = (0..100_000_u32).map(|i| (i % 241) as u8).collect();
        tree.insert(&long, 1);
        tree.insert(&long[..50_000], 2);
        tree.check_invariants();
        assert_eq!(tree.text_bytes(), 100_000);
        let found = tree.matched(&long);
        assert_eq!((found.bytes_for(1), found.bytes_for(2)), (100_000, 50_000));
    }

    #[test]
    fn many_short_prompts_stay_within_the_memory() {
        let mut tree = PrefixTree::new(100_000);
        for i in 0..20_000_u64 {
            tree.insert(&i.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes(), (i % 64) as u32);
        }
        tree.check_invariants();
        assert!(tree.node_count() > 500, "{}", tree.node_count());
        let long = vec![1; 100_000];
        tree.insert(&long, 1);
        tree.check_invariants();
        assert_eq!(tree.matched(&long).bytes_for(1), 100_000, "small nodes leave their room");
    }

    #[test]
    fn a_path_of_single_bytes_is_walked_without_recursion() {
        let mut tree = PrefixTree::new(AMPLE_BYTES);
        let prompt = vec![b'a'; 3000];
        for end in 1..=prompt.len() {
            tree.insert(&prompt[..end], 1);
        }
        tree.check_invariants();
        assert_eq!(tree.node_count(), 3000);
        tree.remove_worker(1);
        assert_eq!(tree.node_count(), 0);
    }

    #[test]
    fn a_path_of_too_many_nodes_loses_its_end() {
        let mut tree = PrefixTree::new(1024);
        let prompt = vec![b'a'; 1000];
        for end in 1..=prompt.len() {
            tree.insert(&prompt[..end], 1);
            tree.check_invariants();
        }
        let (kept, _) = longest(&tree, &prompt).unwrap_or_default();
        assert!((100..1000).contains(&kept), "{kept}");
    }

    /// What the tree should know: every prompt that each worker was sent.
    #[derive(Default)]
    struct Model(Vec<(Vec<u8>, WorkerId)>);

    impl Model {
        fn bytes_for(&self, prompt: &[u8], worker: WorkerId) -> usize {
            let common = |sent: &[u8]| sent.iter().zip(prompt).take_while(|(a, b)| a == b).count();
            let own = self.0.iter().filter(|(_, sent_to)| *sent_to == worker);
            own.map(|(sent, _)| common(sent)).max().unwrap_or(0)
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Insert(Vec<u8>, WorkerId),
        Remove(WorkerId),
    }

    /// Prompts of few letters, so that they share, some repeated to be longer than a block.
    fn prompt() -> impl Strategy<Value = Vec<u8>> {
        (prop::collection::vec(0..3_u8, 0..12), 1..6_usize)
            .prop_map(|(letters, times)| letters.repeat(times))
    }

    fn steps(removals: u32) -> impl Strategy<Value = Vec<Step>> {
        let insert = (prompt(), 0..6_u32).prop_map(|(prompt, worker)| Step::Insert(prompt, worker));
        let step = prop_oneof![
            12 => insert,
            removals => (0..6_u32).prop_map(Step::Remove),
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
                        tree.insert(&prompt, worker);
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
                let found = tree.matched(query);
                let best = (0..6).map(|worker| model.bytes_for(query, worker)).max();
                let longest = found.deepest_first().next().map(|(bytes, _)| bytes);
                prop_assert_eq!(longest.unwrap_or(0), best.unwrap_or(0));
                for worker in 0..6 {
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
                        tree.insert(&prompt, worker);
                        let found = tree.matched(&prompt).bytes_for(worker);
                        prop_assert_eq!(found, prompt.len().min(max_bytes));
                        model.0.push((prompt, worker));
                    }
                    Step::Remove(worker) => tree.remove_worker(worker),
                }
                tree.check_invariants();
                for (prompt, worker) in &model.0 {
                    let found = tree.matched(prompt).bytes_for(*worker);
                    prop_assert!(found <= model.bytes_for(prompt, *worker));
                }
            }
        }

        #[test]
        fn common_prefix_is_that_of_the_bytes(
            a in prop::collection::vec(any::<u8>(), 0..200),
            b in prop::collection::vec(any::<u8>(), 0..200),
            shared in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let (a, b) = ([&shared[..], &a].concat(), [&shared[..], &b].concat());
            let naive = a.iter().zip(&b).take_while(|(a, b)| a == b).count();
            prop_assert_eq!(common_prefix(&a, &b), naive);
        }
    }
}
