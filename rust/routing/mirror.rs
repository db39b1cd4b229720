//! What each worker's KV cache is believed to hold.
//!
//! The one idea: a prompt is a chain of blocks, and a block's name ([`names`]) is a hash of its text
//! and of the name before it, so of everything up to its end. One table from name to holders
//! answers for all workers at once how much of a prompt each of them has.
//!
//! Each worker has a list of its blocks by last use. A use of a prompt marks its last block first and
//! its first block last, so a block was used at least as recently as all that follow it, and what is
//! dropped from the old end is always an end. Source: SGLang's radix cache, which evicts the least
//! recently used leaf.
//!
//! Invariants, between calls:
//! - who holds a block holds all blocks before it. So the holders along a prompt only ever get
//!   fewer, as many holders are the same holders, and where they change is found by bisection;
//! - a worker holds at most the bytes it was last given room for.
//!
//! Memory: about 70 bytes for each block of a worker, of which 24 are its own and the rest is shared by all that
//! hold the block. Not here: tokens, the rest of a prompt beyond its last whole block, and
//! how large a cache is.

use std::collections::VecDeque;

use hashbrown::{HashMap, HashTable};
use smallvec::SmallVec;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::WorkerId;

/// Bytes of prompt per block. Small, so that short prompts match too.
pub const BLOCK_BYTES: usize = 64;

/// Marks the ends of a list.
const NONE: u32 = u32::MAX;

/// Uses without bytes that a list may hold before they are swept out, beside one per block.
const EMPTY_USES_MAX: usize = 64;

/// The names of the whole blocks of a prompt.
pub fn names(prompt: &[u8]) -> Box<[u64]> {
    let name = |parent: &mut u64, block: &[u8; BLOCK_BYTES]| {
        *parent = xxh3_64_with_seed(block, *parent);
        Some(*parent)
    };
    prompt.as_chunks().0.iter().scan(0, name).collect()
}

/// Numbers the uses of one worker's cache; grows.
pub type UseNumber = u64;

/// What was believed of a prompt's beginning when it was used again: these blocks of it were last used
/// together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Blocks of the prompt up to the end of the run; it begins where the one before ends.
    pub end: usize,
    /// When they were used before.
    pub last_use: UseNumber,
    /// Bytes of the cache that had been used since.
    pub newer_bytes: u64,
}

/// A prompt's use of a worker's cache.
#[derive(Clone, Debug, Default)]
pub struct Use {
    pub number: UseNumber,
    /// What was there of it, from the prompt's beginning. Few: as many as there were uses of parts of it.
    pub runs: SmallVec<[Run; 4]>,
}

impl Use {
    /// Blocks of the prompt that were there already.
    pub fn matched_blocks(&self) -> usize {
        self.runs.last().map_or(0, |run| run.end)
    }
}

/// A worker that holds a block.
#[derive(Clone, Copy, Debug)]
pub struct Holder {
    pub worker: WorkerId,
    /// Of the block in that worker's list.
    place: u32,
}

#[derive(Debug)]
struct Block {
    name: u64,
    /// By worker; never empty.
    holders: SmallVec<[Holder; 2]>,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Mirror {
    /// Places in `blocks`, by name.
    by_name: HashTable<u32>,
    blocks: Vec<Block>,
    /// Places in `blocks` that are free.
    free: Vec<u32>,
    caches: HashMap<WorkerId, Cache>,
}

/// What a worker holds, newest first.
#[derive(Debug)]
struct Cache {
    entries: Vec<Entry>,
    /// Places in `entries` that are free.
    free: Vec<u32>,
    newest: u32,
    oldest: u32,
    bytes: u64,
    next_use: UseNumber,
    /// Which uses were the last ones of how many bytes, oldest first. At most one per entry and
    /// [`EMPTY_USES_MAX`], or twice as many.
    uses: VecDeque<(UseNumber, u64)>,
    /// Bytes without a name that are too few for an entry; under [`BLOCK_BYTES`].
    loose_bytes: u32,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    content: Content,
    newer: u32,
    older: u32,
    last_use: UseNumber,
}

#[derive(Clone, Copy, Debug)]
enum Content {
    /// A place in the mirror's blocks.
    Block(u32),
    /// So many bytes that take room and are never matched, as answers.
    Nameless(u32),
}

impl Content {
    fn bytes(self) -> u64 {
        match self {
            Self::Block(_) => BLOCK_BYTES as u64,
            Self::Nameless(bytes) => bytes.into(),
        }
    }
}

impl Default for Cache {
    fn default() -> Self {
        Self {
            entries: Vec::new(),
            free: Vec::new(),
            newest: NONE,
            oldest: NONE,
            bytes: 0,
            next_use: 0,
            uses: VecDeque::new(),
            loose_bytes: 0,
        }
    }
}

impl Mirror {
    /// How much of a prompt who holds: numbers of its blocks, growing, each with all workers that hold
    /// as many, sorted by id. A worker that holds more is in the later ones too.
    pub fn levels<'a>(&'a self, names: &'a [u64]) -> impl Iterator<Item = (usize, &'a [Holder])> {
        let mut from = 0;
        std::iter::from_fn(move || {
            let holders = self.holders(*names.get(from)?);
            if holders.is_empty() {
                return None;
            }
            let is_level = |name: &u64| self.holders(*name).len() == holders.len();
            from += names[from..].partition_point(is_level);
            Some((from, holders))
        })
    }

    /// The name of the last block of the prompt that anybody holds.
    pub fn last_held(&self, names: &[u64]) -> Option<u64> {
        let held = names.partition_point(|name| !self.holders(*name).is_empty());
        names[..held].last().copied()
    }

    /// Blocks of the prompt that a worker holds.
    pub fn matched_blocks(&self, names: &[u64], worker: WorkerId) -> usize {
        names.partition_point(|name| find(self.holders(*name), worker).is_ok())
    }

    /// Notes that a worker uses a prompt: from now on it holds its blocks, and of all it holds no more than
    /// fits into `room_bytes`, the least recently used going first. Of a prompt that is larger only the
    /// head is held.
    pub fn use_prompt(&mut self, worker: WorkerId, names: &[u64], room_bytes: u64) -> Use {
        let runs = self.runs(worker, fitting(names, room_bytes));
        Use { number: self.use_again(worker, names, room_bytes), runs }
    }

    /// As [`Mirror::use_prompt`], without looking at what was there.
    pub fn use_again(&mut self, worker: WorkerId, names: &[u64], room_bytes: u64) -> UseNumber {
        let number = self.caches.entry(worker).or_default().begin_use();
        for name in fitting(names, room_bytes).iter().rev() {
            self.touch(worker, *name);
        }
        self.shrink(worker, room_bytes);
        number
    }

    /// Notes that bytes without a name entered a worker's cache as part of its latest use.
    pub fn use_nameless(&mut self, worker: WorkerId, bytes: u32, room_bytes: u64) {
        let cache = self.caches.entry(worker).or_default();
        let bytes = cache.loose_bytes.saturating_add(bytes);
        if (bytes as usize) < BLOCK_BYTES {
            cache.loose_bytes = bytes;
            return;
        }
        cache.loose_bytes = 0;
        cache.begin_use();
        let place = cache.add(Content::Nameless(bytes));
        cache.link_newest(place);
        self.shrink(worker, room_bytes);
    }

    /// Takes back what a use brought in, where nothing has used it since.
    pub fn retract(&mut self, worker: WorkerId, names: &[u64], taken_back: &Use) {
        for name in names.iter().skip(taken_back.matched_blocks()).rev() {
            let holders = self.holders(*name);
            let Ok(at) = find(holders, worker) else { continue };
            let place = holders[at].place;
            let is_its =
                |cache: &Cache| cache.entries[place as usize].last_use == taken_back.number;
            if self.caches.get(&worker).is_some_and(is_its) {
                self.drop_entry(worker, place);
            }
        }
    }

    /// Drops what a worker has not used since the use of this number, and what it used then.
    pub fn cut(&mut self, worker: WorkerId, last_use: UseNumber) {
        self.drop_while(worker, |cache| {
            cache.oldest != NONE && cache.entries[cache.oldest as usize].last_use <= last_use
        });
    }

    /// Drops the least recently used until the rest fits.
    pub fn shrink(&mut self, worker: WorkerId, room_bytes: u64) {
        self.drop_while(worker, |cache| cache.bytes > room_bytes);
    }

    /// The latest use of a worker's cache, if it has one.
    pub fn latest_use(&self, worker: WorkerId) -> Option<UseNumber> {
        self.caches.get(&worker).map(|cache| cache.next_use.saturating_sub(1))
    }

    /// Does a part of [`Mirror::cut`], at most so many blocks of it. Returns whether there is more to do.
    pub fn cut_some(&mut self, worker: WorkerId, last_use: UseNumber, at_most: usize) -> bool {
        for _ in 0..at_most {
            let Some(cache) = self.caches.get(&worker) else { return false };
            if cache.oldest == NONE {
                self.caches.remove(&worker);
                return false;
            }
            if cache.entries[cache.oldest as usize].last_use > last_use {
                return false;
            }
            self.drop_entry(worker, cache.oldest);
        }
        true
    }

    fn holders(&self, name: u64) -> &[Holder] {
        match self.place(name) {
            Some(place) => &self.blocks[place as usize].holders,
            None => &[],
        }
    }

    fn place(&self, name: u64) -> Option<u32> {
        let is_it = |place: &u32| self.blocks[*place as usize].name == name;
        self.by_name.find(name, is_it).copied()
    }

    /// The runs of a prompt's beginning that a worker holds.
    fn runs(&self, worker: WorkerId, names: &[u64]) -> SmallVec<[Run; 4]> {
        let mut runs: SmallVec<[Run; 4]> = SmallVec::new();
        let Some(cache) = self.caches.get(&worker) else { return runs };
        for (index, name) in names.iter().enumerate() {
            let holders = self.holders(*name);
            let Ok(at) = find(holders, worker) else { break };
            let last_use = cache.entries[holders[at].place as usize].last_use;
            match runs.last_mut() {
                Some(run) if run.last_use == last_use => run.end = index + 1,
                _ => runs.push(Run { end: index + 1, last_use, newer_bytes: 0 }),
            }
        }
        let mut newer = cache.uses.iter().rev().peekable();
        let mut newer_bytes = 0;
        for run in &mut runs {
            while let Some((_, bytes)) = newer.next_if(|(number, _)| *number > run.last_use) {
                newer_bytes += bytes;
            }
            run.newer_bytes = newer_bytes;
        }
        runs
    }

    fn touch(&mut self, worker: WorkerId, name: u64) {
        let block = self.place(name).unwrap_or_else(|| self.add_block(name));
        let cache = self.caches.entry(worker).or_default();
        let holders = &mut self.blocks[block as usize].holders;
        let place = match find(holders, worker) {
            Ok(at) => {
                let place = holders[at].place;
                cache.unlink(place);
                place
            }
            Err(at) => {
                let place = cache.add(Content::Block(block));
                holders.insert(at, Holder { worker, place });
                place
            }
        };
        cache.link_newest(place);
    }

    /// A block that nobody holds yet.
    fn add_block(&mut self, name: u64) -> u32 {
        let block = Block { name, holders: SmallVec::new() };
        let place = match self.free.pop() {
            Some(place) => {
                self.blocks[place as usize] = block;
                place
            }
            None => {
                self.blocks.push(block);
                place_of(self.blocks.len() - 1)
            }
        };
        let Self { by_name, blocks, .. } = self;
        by_name.insert_unique(name, place, |place| blocks[*place as usize].name);
        place
    }

    fn drop_while(&mut self, worker: WorkerId, is_too_much: impl Fn(&Cache) -> bool) {
        while let Some(cache) = self.caches.get(&worker)
            && is_too_much(cache)
        {
            self.drop_entry(worker, cache.oldest);
        }
    }

    fn drop_entry(&mut self, worker: WorkerId, place: u32) {
        let Some(cache) = self.caches.get_mut(&worker) else { return };
        cache.unlink(place);
        let content = cache.entries[place as usize].content;
        cache.bytes -= content.bytes();
        cache.free.push(place);
        let Content::Block(block) = content else { return };
        let Block { name, holders } = &mut self.blocks[block as usize];
        let at = find(holders, worker).expect("a worker's entry is known to its block");
        holders.remove(at);
        if holders.is_empty() {
            let found = self.by_name.find_entry(*name, |place| *place == block);
            found.expect("a block with holders is in the table").remove();
            self.free.push(block);
        } else if holders.len() <= holders.capacity() / 4 {
            // A block that many held once must not take that much for ever.
            holders.shrink_to_fit();
        }
    }
}

impl Cache {
    fn begin_use(&mut self) -> UseNumber {
        let number = self.next_use;
        self.next_use += 1;
        while self.uses.front().is_some_and(|(_, bytes)| *bytes == 0) {
            self.uses.pop_front();
        }
        if self.uses.len() >= 2 * (self.entries.len() + EMPTY_USES_MAX) {
            self.uses.retain(|(_, bytes)| *bytes > 0);
        }
        self.uses.push_back((number, 0));
        number
    }

    /// A new entry, not in the list yet.
    fn add(&mut self, content: Content) -> u32 {
        self.bytes += content.bytes();
        let entry = Entry { content, newer: NONE, older: NONE, last_use: 0 };
        match self.free.pop() {
            Some(place) => {
                self.entries[place as usize] = entry;
                place
            }
            None => {
                self.entries.push(entry);
                place_of(self.entries.len() - 1)
            }
        }
    }

    /// Takes an entry out of the list.
    fn unlink(&mut self, place: u32) {
        let Entry { newer, older, last_use, content } = self.entries[place as usize];
        match newer {
            NONE => self.newest = older,
            newer => self.entries[newer as usize].older = older,
        }
        match older {
            NONE => self.oldest = newer,
            older => self.entries[older as usize].newer = newer,
        }
        if let Ok(at) = self.uses.binary_search_by_key(&last_use, |(number, _)| *number) {
            self.uses[at].1 -= content.bytes();
        }
    }

    /// Puts an entry that is in no list to its new end, as used by the latest use.
    fn link_newest(&mut self, place: u32) {
        let older = self.newest;
        let entry = &mut self.entries[place as usize];
        (entry.newer, entry.older) = (NONE, older);
        if let Some((number, bytes)) = self.uses.back_mut() {
            entry.last_use = *number;
            *bytes += entry.content.bytes();
        }
        match older {
            NONE => self.oldest = place,
            older => self.entries[older as usize].newer = place,
        }
        self.newest = place;
    }
}

/// The names that fit into so many bytes.
fn fitting(names: &[u64], room_bytes: u64) -> &[u64] {
    let blocks = usize::try_from(room_bytes).unwrap_or(usize::MAX) / BLOCK_BYTES;
    &names[..names.len().min(blocks)]
}

fn find(holders: &[Holder], worker: WorkerId) -> Result<usize, usize> {
    holders.binary_search_by_key(&worker, |holder| holder.worker)
}

fn place_of(index: usize) -> u32 {
    u32::try_from(index).expect("room for 2^32 blocks is more memory than there is")
}

#[cfg(test)]
impl Mirror {
    /// Bytes that a worker holds.
    fn bytes(&self, worker: WorkerId) -> u64 {
        self.caches.get(&worker).map_or(0, |cache| cache.bytes)
    }

    /// Panics unless the module's invariants hold.
    fn check_invariants(&self) {
        assert_eq!(self.by_name.len() + self.free.len(), self.blocks.len());
        let held: usize = self.blocks.iter().map(|block| block.holders.len()).sum();
        let mut listed = 0;
        for (worker, cache) in &self.caches {
            let (mut newer, mut place, mut bytes, mut use_before) =
                (NONE, cache.newest, 0, UseNumber::MAX);
            while place != NONE {
                let entry = cache.entries[place as usize];
                assert_eq!(entry.newer, newer, "the list is the same both ways");
                assert!(entry.last_use <= use_before, "newest first");
                if let Content::Block(block) = entry.content {
                    let holders = &self.blocks[block as usize].holders;
                    assert!(holders.is_sorted_by_key(|holder| holder.worker));
                    let at = find(holders, *worker).expect("a holder");
                    assert_eq!(holders[at].place, place);
                    listed += 1;
                }
                bytes += entry.content.bytes();
                (newer, place, use_before) = (place, entry.older, entry.last_use);
            }
            assert_eq!(bytes, cache.bytes);
            assert_eq!(bytes, cache.uses.iter().map(|(_, bytes)| bytes).sum::<u64>());
        }
        assert_eq!(held, listed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    const BLOCK: u64 = BLOCK_BYTES as u64;

    /// A prompt with one block per byte.
    fn prompt(blocks: &[u8]) -> Box<[u64]> {
        names(&blocks.iter().flat_map(|&byte| [byte; BLOCK_BYTES]).collect::<Vec<_>>())
    }

    /// The blocks each worker holds, from the levels.
    fn by_level(mirror: &Mirror, names: &[u64]) -> BTreeMap<WorkerId, usize> {
        let mut matched = BTreeMap::new();
        for (blocks, holders) in mirror.levels(names) {
            matched.extend(holders.iter().map(|holder| (holder.worker, blocks)));
        }
        matched
    }

    #[test]
    fn a_block_is_named_by_all_that_stands_before_it() {
        assert_eq!(names(&[7; BLOCK_BYTES - 1]).len(), 0);
        assert_eq!(names(&[7; 2 * BLOCK_BYTES + 1]).len(), 2);
        assert_eq!(prompt(b"abc")[..2], prompt(b"abd")[..2]);
        assert_ne!(prompt(b"abc")[2], prompt(b"abd")[2]);
        assert_ne!(prompt(b"xbc")[2], prompt(b"abc")[2]);
        assert_ne!(prompt(b"aa")[0], prompt(b"aa")[1]);
    }

    #[test]
    fn levels_tell_who_holds_how_much() {
        let mut mirror = Mirror::default();
        mirror.use_prompt(5, &prompt(b"abcdef"), 100 * BLOCK);
        mirror.use_prompt(2, &prompt(b"abcx"), 100 * BLOCK);
        mirror.use_prompt(9, &prompt(b"abcdefgh"), 100 * BLOCK);
        let matched = by_level(&mirror, &prompt(b"abcdefghi"));
        assert_eq!(matched, BTreeMap::from([(2, 3), (5, 6), (9, 8)]));
        assert!(by_level(&mirror, &prompt(b"zabc")).is_empty());
        assert!(by_level(&mirror, &[]).is_empty());
    }

    #[test]
    fn the_end_of_what_was_not_used_for_longest_goes_first() {
        let mut mirror = Mirror::default();
        mirror.use_prompt(0, &prompt(b"abcd"), 8 * BLOCK);
        mirror.use_prompt(0, &prompt(b"xyz"), 8 * BLOCK);
        mirror.use_prompt(0, &prompt(b"abq"), 8 * BLOCK);
        // One more: d, then c, then the end of xyz.
        mirror.use_prompt(0, &prompt(b"1"), 8 * BLOCK);
        assert_eq!(mirror.matched_blocks(&prompt(b"abcd"), 0), 3);
        mirror.use_prompt(0, &prompt(b"23"), 8 * BLOCK);
        assert_eq!(mirror.matched_blocks(&prompt(b"abcd"), 0), 2);
        assert_eq!(mirror.matched_blocks(&prompt(b"xyz"), 0), 2);
        assert_eq!(mirror.bytes(0), 8 * BLOCK);
        // Of a prompt that is too large its head.
        mirror.use_prompt(0, &prompt(b"0123456789"), 8 * BLOCK);
        assert_eq!(mirror.matched_blocks(&prompt(b"0123456789"), 0), 8);
        assert_eq!(mirror.use_prompt(0, &prompt(b"k"), 0).matched_blocks(), 0);
        assert_eq!(mirror.bytes(0), 0);
        mirror.check_invariants();
    }

    #[test]
    fn a_use_tells_when_its_parts_were_used_before() {
        let mut mirror = Mirror::default();
        let first = mirror.use_prompt(0, &prompt(b"abcd"), 100 * BLOCK);
        assert_eq!((first.matched_blocks(), first.runs.len()), (0, 0));
        let second = mirror.use_prompt(0, &prompt(b"abx"), 100 * BLOCK);
        mirror.use_nameless(0, 100, 100 * BLOCK);
        let third = mirror.use_prompt(0, &prompt(b"abcde"), 100 * BLOCK);
        let expected = [
            Run { end: 2, last_use: second.number, newer_bytes: 100 },
            Run { end: 4, last_use: first.number, newer_bytes: 100 + 3 * BLOCK },
        ];
        assert_eq!(third.runs[..], expected);
    }

    #[test]
    fn what_was_taken_back_is_gone_unless_it_was_used_since() {
        let mut mirror = Mirror::default();
        mirror.use_prompt(0, &prompt(b"ab"), 100 * BLOCK);
        let failed = mirror.use_prompt(0, &prompt(b"abcdef"), 100 * BLOCK);
        mirror.use_prompt(0, &prompt(b"abcdx"), 100 * BLOCK);
        mirror.retract(0, &prompt(b"abcdef"), &failed);
        assert_eq!(mirror.matched_blocks(&prompt(b"abcdef"), 0), 4);
        mirror.check_invariants();
        mirror.retract(0, &prompt(b"abcdef"), &failed);
        mirror.retract(7, &prompt(b"abcdef"), &failed);
        assert_eq!(mirror.bytes(0), 5 * BLOCK);
    }

    #[test]
    fn a_cut_takes_all_that_was_used_no_later() {
        let mut mirror = Mirror::default();
        mirror.use_prompt(0, &prompt(b"abc"), 100 * BLOCK);
        let second = mirror.use_prompt(0, &prompt(b"xy"), 100 * BLOCK);
        mirror.use_prompt(0, &prompt(b"ax"), 100 * BLOCK);
        mirror.cut(0, second.number);
        assert_eq!(mirror.matched_blocks(&prompt(b"abc"), 0), 1);
        assert_eq!(mirror.matched_blocks(&prompt(b"xy"), 0), 0);
        mirror.cut(4, second.number);
        mirror.check_invariants();
    }

    #[test]
    fn small_change_adds_up() {
        let mut mirror = Mirror::default();
        for _ in 0..10 {
            mirror.use_nameless(0, 30, 1000);
        }
        assert_eq!(mirror.bytes(0), 270);
        mirror.use_nameless(0, u32::MAX, 1000);
        assert_eq!(mirror.bytes(0), 0);
        mirror.check_invariants();
    }

    #[test]
    fn uses_that_left_nothing_take_no_room_for_ever() {
        let mut mirror = Mirror::default();
        mirror.use_prompt(0, &prompt(b"old"), 100 * BLOCK);
        for _ in 0..10_000 {
            mirror.use_prompt(0, &prompt(b"new"), 100 * BLOCK);
        }
        assert!(mirror.caches[&0].uses.len() <= 2 * (6 + EMPTY_USES_MAX) + 1);
        mirror.check_invariants();
    }

    #[derive(Clone, Debug)]
    enum Step {
        Use(WorkerId, Vec<u8>, u64),
        Nameless(WorkerId, u32),
        Forget(WorkerId),
        Cut(WorkerId),
    }

    /// A prefix, or `None` for what has no name, and its bytes.
    type Held = (Option<Vec<u8>>, u64);

    /// The same, kept as a list per worker.
    #[derive(Default)]
    struct Naive {
        /// Least recently used first.
        caches: BTreeMap<WorkerId, Vec<Held>>,
    }

    impl Naive {
        fn use_prompt(&mut self, worker: WorkerId, prompt: &[u8], room_bytes: u64) {
            let fitting = prompt.len().min((room_bytes / BLOCK) as usize);
            let cache = self.caches.entry(worker).or_default();
            for end in (1..=fitting).rev() {
                let prefix = Some(prompt[..end].to_vec());
                cache.retain(|(held, _)| *held != prefix);
                cache.push((prefix, BLOCK));
            }
            self.shrink(worker, room_bytes);
        }

        fn shrink(&mut self, worker: WorkerId, room_bytes: u64) {
            let cache = self.caches.entry(worker).or_default();
            while cache.iter().map(|(_, bytes)| bytes).sum::<u64>() > room_bytes {
                cache.remove(0);
            }
        }

        fn matched(&self, worker: WorkerId, prompt: &[u8]) -> usize {
            let Some(cache) = self.caches.get(&worker) else { return 0 };
            let is_held = |end: &usize| {
                cache.iter().any(|(held, _)| held.as_deref() == Some(&prompt[..*end]))
            };
            (1..=prompt.len()).take_while(is_held).count()
        }
    }

    fn step() -> impl Strategy<Value = Step> {
        let text = prop::collection::vec(0..3_u8, 0..8);
        prop_oneof![
            12 => (0..4_u32, text, 0..14_u64).prop_map(|(w, text, room)| Step::Use(w, text, room)),
            3 => (0..4_u32, BLOCK as u32..300).prop_map(|(w, bytes)| Step::Nameless(w, bytes)),
            1 => (0..4_u32).prop_map(Step::Forget),
            1 => (0..4_u32).prop_map(Step::Cut),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            failure_persistence: None,
            ..ProptestConfig::with_cases(200)
        })]

        #[test]
        fn behaves_like_prefixes_in_a_list(steps in prop::collection::vec(step(), 1..40)) {
            let (mut mirror, mut naive) = (Mirror::default(), Naive::default());
            let room = 12 * BLOCK;
            let mut prompts: Vec<Vec<u8>> = Vec::new();
            for step in steps {
                match step {
                    Step::Use(worker, text, blocks) => {
                        mirror.use_prompt(worker, &prompt(&text), blocks * BLOCK);
                        naive.use_prompt(worker, &text, blocks * BLOCK);
                        prompts.push(text);
                    }
                    Step::Nameless(worker, bytes) => {
                        mirror.use_nameless(worker, bytes, room);
                        let cache = naive.caches.entry(worker).or_default();
                        cache.push((None, bytes.into()));
                        naive.shrink(worker, room);
                    }
                    Step::Forget(worker) => {
                        if let Some(latest) = mirror.latest_use(worker) {
                            while mirror.cut_some(worker, latest, 3) {}
                        }
                        naive.caches.remove(&worker);
                    }
                    Step::Cut(worker) => {
                        mirror.cut(worker, UseNumber::MAX);
                        naive.caches.remove(&worker);
                    }
                }
                mirror.check_invariants();
                for text in &prompts {
                    let names = prompt(text);
                    let levels = by_level(&mirror, &names);
                    for worker in 0..4 {
                        let matched = naive.matched(worker, text);
                        prop_assert_eq!(mirror.matched_blocks(&names, worker), matched);
                        prop_assert_eq!(levels.get(&worker).copied().unwrap_or(0), matched);
                    }
                }
            }
        }
    }
}
