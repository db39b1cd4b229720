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

    /// Blocks of the prompt that a worker holds.
    pub fn matched_blocks(&self, names: &[u64], worker: WorkerId) -> usize {
        names.partition_point(|name| find(self.holders(*name), worker).is_ok())
    }

    /// Bytes that a worker holds.
    pub fn bytes(&self, worker: WorkerId) -> u64 {
        self.caches.get(&worker).map_or(0, |cache| cache.bytes)
    }

    /// Notes that a worker uses a prompt: from now on it holds its blocks, and of all it holds no more than
    /// fits into `room_bytes`, the least recently used going first. Of a prompt that is larger only the
    /// head is held.
    pub fn use_prompt(&mut self, worker: WorkerId, names: &[u64], room_bytes: u64) -> Use {
        let fitting = usize::try_from(room_bytes).unwrap_or(usize::MAX) / BLOCK_BYTES;
        let names = &names[..names.len().min(fitting)];
        let runs = self.runs(worker, names);
        let number = self.caches.entry(worker).or_default().begin_use();
        for name in names.iter().rev() {
            self.touch(worker, *name);
        }
        self.shrink(worker, room_bytes);
        Use { number, runs }
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

    /// Forgets all that a worker holds.
    pub fn forget(&mut self, worker: WorkerId) {
        self.drop_while(worker, |cache| cache.oldest != NONE);
        self.caches.remove(&worker);
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

fn find(holders: &[Holder], worker: WorkerId) -> Result<usize, usize> {
    holders.binary_search_by_key(&worker, |holder| holder.worker)
}

fn place_of(index: usize) -> u32 {
    u32::try_from(index).expect("room for 2^32 blocks is more memory than there is")
}
