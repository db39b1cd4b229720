//! What each worker's KV cache is believed to hold.
//!
//! The one idea: a prompt is a chain of blocks, and a block's name ([`names`]) is a hash of its text
//! and of the name before it, so of everything up to its end. Blocks that were only ever used together stand in one
//! segment, so a prompt is a path of few segments, and what is done with it is done once for each of these. One table finds
//! a segment by its first name, and a segment knows its holders; so one walk tells how much of a prompt each worker has.
//!
//! Each worker has a list of its parts of segments by last use. A use of a prompt marks its last part first and
//! its first part last, so a block was used at least as recently as all that follow it, and what is
//! dropped from the old end is always an end. Source: SGLang's radix cache, which evicts the least
//! recently used leaf.
//!
//! Invariants, between calls:
//! - each block that is held is in one segment, and each block of a segment is held;
//! - who holds a block holds all blocks before it, those of its segment and those of the path there. So a worker's part of a
//!   segment is a number of blocks from its beginning. All of them were last used together: where a use ends
//!   within the part, the segment is split;
//! - a worker holds at most the bytes it was last given room for.
//!
//! A path may leave a segment in its middle: the blocks that follow are found by their names, wherever they hang.
//!
//! Memory: 8 bytes for each block that anybody holds, at most twice that for one that grows; for each segment some 80
//! bytes, for each of its holders 24, and 12 more from the third on. Not here: tokens, the rest of a prompt beyond its last whole
//! block, and how large a cache is.

use std::collections::VecDeque;
use std::sync::Arc;

use hashbrown::{HashMap, HashTable};
use smallvec::SmallVec;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::WorkerId;

/// Bytes of prompt per block. Small, so that short prompts match too.
pub const BLOCK_BYTES: usize = 64;

/// Marks the ends of a list.
const NONE: u32 = u32::MAX;

/// Uses without bytes that a list may hold before they are swept out, beside one per entry.
const EMPTY_USES_MAX: usize = 64;

/// The names of the whole blocks of a prompt.
pub fn names(prompt: &[u8]) -> Arc<[u64]> {
    let mut parent = 0;
    let name = |block: &[u8; BLOCK_BYTES]| {
        parent = xxh3_64_with_seed(block, parent);
        parent
    };
    prompt.as_chunks().0.iter().map(name).collect()
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
    /// Blocks of the prompt that any worker had.
    pub held_by_any: usize,
}

impl Use {
    /// Blocks of the prompt that were there already.
    pub fn matched_blocks(&self) -> usize {
        self.runs.last().map_or(0, |run| run.end)
    }
}

/// A worker that holds a segment's beginning.
#[derive(Clone, Copy, Debug)]
pub struct Holder {
    pub worker: WorkerId,
    /// How much of it; at least one.
    blocks: u32,
    /// Of the segment in that worker's list.
    place: u32,
}

/// The part of a prompt that is in one segment.
#[derive(Clone, Copy, Debug)]
struct Step {
    segment: u32,
    /// Blocks of the prompt before it.
    start: usize,
    /// At least one, from the segment's beginning.
    blocks: usize,
}

impl Step {
    fn end(&self) -> usize {
        self.start + self.blocks
    }
}

/// A prompt's beginning, as far as it is held, in parts without gaps.
type Path = SmallVec<[Step; 8]>;

/// A part of a prompt and those who hold any of it.
#[derive(Clone, Copy, Debug)]
pub struct Part<'a> {
    step: Step,
    /// Sorted by worker.
    pub holders: &'a [Holder],
}

impl Part<'_> {
    /// Blocks of the prompt up to the part's end.
    pub fn end(&self) -> usize {
        self.step.end()
    }

    /// Blocks of the prompt up to the end of what one of its holders holds of the part.
    pub fn end_for(&self, holder: &Holder) -> usize {
        self.step.start + self.step.blocks.min(holder.blocks as usize)
    }
}

#[derive(Debug, Default)]
struct Segment {
    /// The first of the names, to be found by without a look at the rest.
    first: u64,
    /// As many as the holder of most holds.
    names: SmallVec<[u64; 2]>,
    /// By worker; never empty while the segment is in the table.
    holders: SmallVec<[Holder; 2]>,
    /// More than one prompt went on from its end, so the next one may too.
    is_forked: bool,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Mirror {
    /// Places in `segments`, by first name.
    by_name: HashTable<u32>,
    segments: Vec<Segment>,
    /// Places in `segments` that are free.
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
    /// A place in the mirror's segments. How much of it is held stands there.
    Segment(u32),
    /// So many bytes that take room and are never matched, as answers.
    Nameless(u32),
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
    /// The parts of a prompt that anybody holds, from its beginning. Who holds any of a part holds all of those before it.
    pub fn parts<'a>(&'a self, names: &'a [u64]) -> impl Iterator<Item = Part<'a>> {
        let mut start = 0;
        std::iter::from_fn(move || {
            let step = self.step(names, start)?;
            start = step.end();
            Some(Part { step, holders: &self.segments[step.segment as usize].holders })
        })
    }

    /// Blocks of the prompt that a worker holds.
    pub fn matched_blocks(&self, names: &[u64], worker: WorkerId) -> usize {
        let own = |part: Part| {
            let at = find(part.holders, worker).ok()?;
            Some(part.end_for(&part.holders[at]))
        };
        self.parts(names).map_while(own).last().unwrap_or(0)
    }

    /// Notes that a worker uses a prompt: from now on it holds its blocks, and of all it holds no more than
    /// fits into `room_bytes`, the least recently used going first. Of a prompt that is larger only the
    /// head is held.
    pub fn use_prompt(&mut self, worker: WorkerId, names: &[u64], room_bytes: u64) -> Use {
        let path = self.path(names);
        let held_by_any = path.last().map_or(0, Step::end);
        let fitting = fitting(names, room_bytes);
        let path = up_to(path, fitting.len());
        let runs = self.runs(worker, &path);
        Use { number: self.use_path(worker, fitting, path, room_bytes), runs, held_by_any }
    }

    /// As [`Mirror::use_prompt`], without looking at what was there.
    pub fn use_again(&mut self, worker: WorkerId, names: &[u64], room_bytes: u64) -> UseNumber {
        let names = fitting(names, room_bytes);
        self.use_path(worker, names, self.path(names), room_bytes)
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
        cache.link_newest(place, bytes.into());
        self.shrink(worker, room_bytes);
    }

    /// Takes back what a use brought in, where nothing has used it since.
    pub fn retract(&mut self, worker: WorkerId, names: &[u64], taken_back: &Use) {
        for step in self.path(names).iter().rev() {
            let holders = &self.segments[step.segment as usize].holders;
            let Ok(at) = find(holders, worker) else { continue };
            let Holder { blocks, place, .. } = holders[at];
            let is_its =
                |cache: &Cache| cache.entries[place as usize].last_use == taken_back.number;
            if self.caches.get(&worker).is_some_and(is_its) {
                let kept = taken_back.matched_blocks().saturating_sub(step.start);
                self.drop_blocks(worker, step.segment, (blocks as usize).saturating_sub(kept));
            }
        }
    }

    /// Drops what a worker has not used since the use of this number, and what it used then.
    pub fn cut(&mut self, worker: WorkerId, last_use: UseNumber) {
        while let Some(cache) = self.caches.get(&worker)
            && cache.oldest != NONE
            && cache.entries[cache.oldest as usize].last_use <= last_use
        {
            self.drop_oldest(worker, usize::MAX);
        }
    }

    /// Drops the least recently used until the rest fits.
    pub fn shrink(&mut self, worker: WorkerId, room_bytes: u64) {
        while let Some(cache) = self.caches.get(&worker)
            && cache.bytes > room_bytes
        {
            let blocks = (cache.bytes - room_bytes).div_ceil(BLOCK_BYTES as u64);
            self.drop_oldest(worker, usize::try_from(blocks).unwrap_or(usize::MAX));
        }
    }

    /// The latest use of a worker's cache, if it has one.
    pub fn latest_use(&self, worker: WorkerId) -> Option<UseNumber> {
        self.caches.get(&worker).map(|cache| cache.next_use.saturating_sub(1))
    }

    /// Does a part of [`Mirror::cut`], at most so many segments of it, and forgets a cache that is empty. Returns
    /// whether there is more to do.
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
            self.drop_oldest(worker, usize::MAX);
        }
        true
    }

    /// The part of a prompt that begins after so many blocks of it; `None` if nobody holds the next one.
    fn step(&self, names: &[u64], start: usize) -> Option<Step> {
        let rest = names.get(start..)?;
        let segment = self.place(*rest.first()?)?;
        let blocks = in_common(&self.segments[segment as usize].names, rest);
        Some(Step { segment, start, blocks })
    }

    fn path(&self, names: &[u64]) -> Path {
        self.parts(names).map(|part| part.step).collect()
    }

    fn place(&self, first: u64) -> Option<u32> {
        let is_it = |place: &u32| self.segments[*place as usize].first == first;
        self.by_name.find(first, is_it).copied()
    }

    /// The runs of a prompt's beginning that a worker holds.
    fn runs(&self, worker: WorkerId, path: &Path) -> SmallVec<[Run; 4]> {
        let mut runs: SmallVec<[Run; 4]> = SmallVec::new();
        let Some(cache) = self.caches.get(&worker) else { return runs };
        for step in path {
            let holders = &self.segments[step.segment as usize].holders;
            let Ok(at) = find(holders, worker) else { break };
            let Holder { blocks, place, .. } = holders[at];
            let last_use = cache.entries[place as usize].last_use;
            let end = step.start + step.blocks.min(blocks as usize);
            match runs.last_mut() {
                Some(run) if run.last_use == last_use => run.end = end,
                _ => runs.push(Run { end, last_use, newer_bytes: 0 }),
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

    /// A worker uses these blocks, of which those of the path are held by someone.
    fn use_path(
        &mut self,
        worker: WorkerId,
        names: &[u64],
        mut path: Path,
        room_bytes: u64,
    ) -> UseNumber {
        let number = self.caches.entry(worker).or_default().begin_use();
        let known = path.last().map_or(0, Step::end);
        if known < names.len() {
            self.add_blocks(&mut path, &names[known..]);
        }
        for step in path.iter().rev() {
            self.touch(worker, *step);
        }
        self.shrink(worker, room_bytes);
        number
    }

    /// Blocks that nobody holds yet, at the end of a path: a prompt that goes on lengthens its segment, unless there are
    /// others that go on from there.
    fn add_blocks(&mut self, path: &mut Path, names: &[u64]) {
        if let Some(last) = path.last_mut() {
            let segment = &mut self.segments[last.segment as usize];
            if last.blocks == segment.names.len() && !segment.is_forked {
                segment.names.extend_from_slice(names);
                last.blocks += names.len();
                return;
            }
        }
        let start = path.last().map_or(0, Step::end);
        let segment = self.add_segment(SmallVec::from_slice(names));
        path.push(Step { segment, start, blocks: names.len() });
    }

    /// A worker uses a part of a prompt.
    fn touch(&mut self, worker: WorkerId, step: Step) {
        let holders = &self.segments[step.segment as usize].holders;
        if find(holders, worker).is_ok_and(|at| holders[at].blocks as usize > step.blocks) {
            self.split(step.segment, step.blocks);
        }
        let holders = &mut self.segments[step.segment as usize].holders;
        let cache = self.caches.entry(worker).or_default();
        let blocks = blocks_of(step.blocks);
        let place = match find(holders, worker) {
            Ok(at) => {
                let holder = &mut holders[at];
                cache.unlink(holder.place, bytes_of(holder.blocks));
                holder.blocks = blocks;
                holder.place
            }
            Err(at) => {
                let place = cache.add(Content::Segment(step.segment));
                holders.insert(at, Holder { worker, blocks, place });
                place
            }
        };
        cache.link_newest(place, bytes_of(blocks));
    }

    /// Makes two segments of one, the first with so many blocks. Who holds more than these holds a part of both from
    /// now on, last used when it was.
    fn split(&mut self, segment: u32, blocks: usize) {
        let upper = &mut self.segments[segment as usize];
        let names = SmallVec::from_slice(&upper.names[blocks..]);
        upper.names.truncate(blocks);
        upper.names.shrink_to_fit();
        let is_forked = std::mem::replace(&mut upper.is_forked, true);
        let lower = self.add_segment(names);
        self.segments[lower as usize].is_forked = is_forked;
        let kept = blocks_of(blocks);
        let mut lower_holders = SmallVec::new();
        for holder in &mut self.segments[segment as usize].holders {
            if holder.blocks <= kept {
                continue;
            }
            let cache = self.caches.get_mut(&holder.worker).expect("who holds has a cache");
            let place = cache.add_behind(holder.place, Content::Segment(lower));
            let blocks = holder.blocks - kept;
            lower_holders.push(Holder { worker: holder.worker, blocks, place });
            holder.blocks = kept;
        }
        self.segments[lower as usize].holders = lower_holders;
    }

    /// A segment that nobody holds yet.
    fn add_segment(&mut self, names: SmallVec<[u64; 2]>) -> u32 {
        let first = names[0];
        let segment = Segment { first, names, ..Segment::default() };
        let place = match self.free.pop() {
            Some(place) => {
                self.segments[place as usize] = segment;
                place
            }
            None => {
                self.segments.push(segment);
                place_of(self.segments.len() - 1)
            }
        };
        let Self { by_name, segments, .. } = self;
        by_name.insert_unique(first, place, |place| segments[*place as usize].first);
        place
    }

    /// Drops the end of what a worker has not used for longest: so many blocks of it at most, but all of what has no names.
    fn drop_oldest(&mut self, worker: WorkerId, blocks: usize) {
        let Some(cache) = self.caches.get_mut(&worker) else { return };
        let place = cache.oldest;
        match cache.entries[place as usize].content {
            Content::Segment(segment) => self.drop_blocks(worker, segment, blocks),
            Content::Nameless(bytes) => cache.remove(place, bytes.into()),
        }
    }

    /// Drops the end of a worker's part of a segment, all of it if it has no more than so many blocks.
    fn drop_blocks(&mut self, worker: WorkerId, segment: u32, blocks: usize) {
        let Some(cache) = self.caches.get_mut(&worker) else { return };
        let Segment { names, holders, .. } = &mut self.segments[segment as usize];
        let at = find(holders, worker).expect("a worker's entry is known to its segment");
        let Holder { blocks: held, place, .. } = holders[at];
        let dropped = u32::try_from(blocks).unwrap_or(u32::MAX).min(held);
        if dropped < held {
            cache.lessen(place, bytes_of(dropped));
            holders[at].blocks -= dropped;
        } else {
            cache.remove(place, bytes_of(held));
            holders.remove(at);
            if holders.len() <= holders.capacity() / 4 {
                // A segment that many held once must not take that much for ever.
                holders.shrink_to_fit();
            }
        }
        if held as usize == names.len() {
            self.drop_unheld(segment);
        }
    }

    /// Drops the end of a segment that nobody holds.
    fn drop_unheld(&mut self, place: u32) {
        let segment = &mut self.segments[place as usize];
        let most = segment.holders.iter().map(|holder| holder.blocks as usize).max().unwrap_or(0);
        if most == 0 {
            let found = self.by_name.find_entry(segment.first, |other| *other == place);
            found.expect("a segment with holders is in the table").remove();
            *segment = Segment::default();
            self.free.push(place);
            return;
        }
        segment.names.truncate(most);
        if most <= segment.names.capacity() / 2 {
            segment.names.shrink_to_fit();
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

    /// A new entry next to another one in the list, on its older side. It takes over some of the other's bytes, so that all
    /// that is counted stays as it is.
    fn add_behind(&mut self, newer: u32, content: Content) -> u32 {
        let place = self.add(content);
        let Entry { older, last_use, .. } = self.entries[newer as usize];
        self.entries[place as usize] = Entry { content, newer, older, last_use };
        self.entries[newer as usize].older = place;
        match older {
            NONE => self.oldest = place,
            older => self.entries[older as usize].newer = place,
        }
        place
    }

    /// Takes an entry of so many bytes out of the list.
    fn unlink(&mut self, place: u32, bytes: u64) {
        self.lessen(place, bytes);
        let Entry { newer, older, .. } = self.entries[place as usize];
        match newer {
            NONE => self.newest = older,
            newer => self.entries[newer as usize].older = older,
        }
        match older {
            NONE => self.oldest = newer,
            older => self.entries[older as usize].newer = newer,
        }
    }

    /// An entry has so many bytes less.
    fn lessen(&mut self, place: u32, bytes: u64) {
        self.bytes -= bytes;
        let last_use = self.entries[place as usize].last_use;
        if let Ok(at) = self.uses.binary_search_by_key(&last_use, |(number, _)| *number) {
            self.uses[at].1 -= bytes;
        }
    }

    /// An entry of so many bytes is no more.
    fn remove(&mut self, place: u32, bytes: u64) {
        self.unlink(place, bytes);
        self.free.push(place);
    }

    /// Puts an entry that is in no list to its new end, with so many bytes, as used by the latest use.
    fn link_newest(&mut self, place: u32, bytes: u64) {
        self.bytes += bytes;
        let older = self.newest;
        let entry = &mut self.entries[place as usize];
        (entry.newer, entry.older) = (NONE, older);
        if let Some((number, used)) = self.uses.back_mut() {
            entry.last_use = *number;
            *used += bytes;
        }
        match older {
            NONE => self.oldest = place,
            older => self.entries[older as usize].newer = place,
        }
        self.newest = place;
    }
}

/// Names that are the same from the beginning on. As each stands for all before it, they are the same up to some
/// place and different from there on.
fn in_common(these: &[u64], those: &[u64]) -> usize {
    let most = these.len().min(those.len());
    let (these, those) = (&these[..most], &those[..most]);
    if these.last() == those.last() {
        return most;
    }
    let (mut same, mut other) = (0, most - 1);
    while same + 1 < other {
        let middle = same.midpoint(other);
        *(if these[middle] == those[middle] { &mut same } else { &mut other }) = middle;
    }
    other
}

/// A path's beginning, of so many blocks.
fn up_to(mut path: Path, blocks: usize) -> Path {
    while path.last().is_some_and(|last| last.start >= blocks) {
        path.pop();
    }
    if let Some(last) = path.last_mut() {
        last.blocks = last.blocks.min(blocks - last.start);
    }
    path
}

/// The names that fit into so many bytes.
fn fitting(names: &[u64], room_bytes: u64) -> &[u64] {
    let blocks = usize::try_from(room_bytes).unwrap_or(usize::MAX) / BLOCK_BYTES;
    &names[..names.len().min(blocks)]
}

fn find(holders: &[Holder], worker: WorkerId) -> Result<usize, usize> {
    holders.binary_search_by_key(&worker, |holder| holder.worker)
}

fn bytes_of(blocks: u32) -> u64 {
    u64::from(blocks) * BLOCK_BYTES as u64
}

fn blocks_of(count: usize) -> u32 {
    u32::try_from(count).expect("a prompt of 2^38 bytes is more memory than there is")
}

fn place_of(index: usize) -> u32 {
    u32::try_from(index).expect("room for 2^32 segments is more memory than there is")
}

#[cfg(test)]
impl Mirror {
    /// Bytes that a worker holds.
    fn bytes(&self, worker: WorkerId) -> u64 {
        self.caches.get(&worker).map_or(0, |cache| cache.bytes)
    }

    /// Panics unless the module's invariants hold.
    fn check_invariants(&self) {
        use std::collections::HashSet;
        assert_eq!(self.by_name.len() + self.free.len(), self.segments.len());
        let names: Vec<_> = self.segments.iter().flat_map(|segment| &segment.names).collect();
        assert_eq!(names.iter().collect::<HashSet<_>>().len(), names.len(), "each block once");
        for segment in &self.segments {
            assert_eq!(segment.names.first().copied().unwrap_or(0), segment.first);
            let held = segment.holders.iter().map(|holder| holder.blocks).max().unwrap_or(0);
            assert_eq!(held as usize, segment.names.len());
            assert!(segment.holders.iter().all(|holder| holder.blocks > 0));
        }
        let held: usize = self.segments.iter().map(|segment| segment.holders.len()).sum();
        let mut listed = 0;
        for (worker, cache) in &self.caches {
            let (mut newer, mut place, mut bytes, mut use_before) =
                (NONE, cache.newest, 0, UseNumber::MAX);
            while place != NONE {
                let entry = cache.entries[place as usize];
                assert_eq!(entry.newer, newer, "the list is the same both ways");
                assert!(entry.last_use <= use_before, "newest first");
                bytes += match entry.content {
                    Content::Segment(segment) => {
                        let holders = &self.segments[segment as usize].holders;
                        assert!(holders.is_sorted_by_key(|holder| holder.worker));
                        let at = find(holders, *worker).expect("a holder");
                        assert_eq!(holders[at].place, place);
                        listed += 1;
                        bytes_of(holders[at].blocks)
                    }
                    Content::Nameless(bytes) => bytes.into(),
                };
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
    fn prompt(blocks: &[u8]) -> Arc<[u64]> {
        names(&blocks.iter().flat_map(|&byte| [byte; BLOCK_BYTES]).collect::<Vec<_>>())
    }

    /// The blocks each worker holds, from the parts.
    fn by_part(mirror: &Mirror, names: &[u64]) -> BTreeMap<WorkerId, usize> {
        let mut matched = BTreeMap::new();
        for part in mirror.parts(names) {
            matched.extend(part.holders.iter().map(|one| (one.worker, part.end_for(one))));
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
    fn parts_tell_who_holds_how_much() {
        let mut mirror = Mirror::default();
        mirror.use_prompt(5, &prompt(b"abcdef"), 100 * BLOCK);
        mirror.use_prompt(2, &prompt(b"abcx"), 100 * BLOCK);
        mirror.use_prompt(9, &prompt(b"abcdefgh"), 100 * BLOCK);
        let matched = by_part(&mirror, &prompt(b"abcdefghi"));
        assert_eq!(matched, BTreeMap::from([(2, 3), (5, 6), (9, 8)]));
        assert!(by_part(&mirror, &prompt(b"zabc")).is_empty());
        assert!(by_part(&mirror, &[]).is_empty());
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
        Again(usize, u64),
        Retract(usize),
        Nameless(WorkerId, u32),
        Forget(WorkerId),
        Cut(WorkerId),
    }

    /// A prefix, or `None` for what has no name, its bytes, and when it was last used.
    type Held = (Option<Vec<u8>>, u64, u64);

    /// The same, kept as a list per worker.
    #[derive(Default)]
    struct Naive {
        /// Least recently used first.
        caches: BTreeMap<WorkerId, Vec<Held>>,
        uses: u64,
    }

    impl Naive {
        fn use_prompt(&mut self, worker: WorkerId, prompt: &[u8], room_bytes: u64) {
            self.uses += 1;
            let fitting = prompt.len().min((room_bytes / BLOCK) as usize);
            let cache = self.caches.entry(worker).or_default();
            for end in (1..=fitting).rev() {
                let prefix = Some(prompt[..end].to_vec());
                cache.retain(|(held, ..)| *held != prefix);
                cache.push((prefix, BLOCK, self.uses));
            }
            self.shrink(worker, room_bytes);
        }

        fn shrink(&mut self, worker: WorkerId, room_bytes: u64) {
            let cache = self.caches.entry(worker).or_default();
            while cache.iter().map(|(_, bytes, _)| bytes).sum::<u64>() > room_bytes {
                cache.remove(0);
            }
        }

        fn matched(&self, worker: WorkerId, prompt: &[u8]) -> usize {
            let Some(cache) = self.caches.get(&worker) else { return 0 };
            let is_held = |end: &usize| {
                cache.iter().any(|(held, ..)| held.as_deref() == Some(&prompt[..*end]))
            };
            (1..=prompt.len()).take_while(is_held).count()
        }
    }

    struct Sent {
        worker: WorkerId,
        text: Vec<u8>,
        used: Use,
        naive_use: u64,
    }

    fn step() -> impl Strategy<Value = Step> {
        let text = prop::collection::vec(0..3_u8, 0..8);
        prop_oneof![
            12 => (0..4_u32, text, 0..14_u64).prop_map(|(w, text, room)| Step::Use(w, text, room)),
            4 => (any::<usize>(), 0..14_u64).prop_map(|(which, room)| Step::Again(which, room)),
            3 => any::<usize>().prop_map(Step::Retract),
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
            let mut sent: Vec<Sent> = Vec::new();
            for step in steps {
                match step {
                    Step::Use(worker, text, blocks) => {
                        let fitting = text.len().min(blocks as usize);
                        let held = naive.matched(worker, &text);
                        let by_any = (0..4).map(|worker| naive.matched(worker, &text)).max();
                        let used = mirror.use_prompt(worker, &prompt(&text), blocks * BLOCK);
                        naive.use_prompt(worker, &text, blocks * BLOCK);
                        prop_assert_eq!(used.matched_blocks(), held.min(fitting));
                        prop_assert_eq!(Some(used.held_by_any), by_any);
                        sent.push(Sent { worker, text, used, naive_use: naive.uses });
                    }
                    Step::Again(which, blocks) if !sent.is_empty() => {
                        let Sent { worker, text, .. } = &sent[which % sent.len()];
                        mirror.use_again(*worker, &prompt(text), blocks * BLOCK);
                        naive.use_prompt(*worker, text, blocks * BLOCK);
                    }
                    Step::Retract(which) if !sent.is_empty() => {
                        let Sent { worker, text, used, naive_use } = &sent[which % sent.len()];
                        mirror.retract(*worker, &prompt(text), used);
                        let cache = naive.caches.entry(*worker).or_default();
                        let is_its = |(held, _, at): &Held| {
                            let blocks = held.as_ref().map_or(0, Vec::len);
                            at == naive_use && blocks > used.matched_blocks()
                        };
                        cache.retain(|held| !is_its(held));
                    }
                    Step::Again(..) | Step::Retract(_) => {}
                    Step::Nameless(worker, bytes) => {
                        mirror.use_nameless(worker, bytes, room);
                        let cache = naive.caches.entry(worker).or_default();
                        cache.push((None, bytes.into(), 0));
                        naive.shrink(worker, room);
                    }
                    Step::Forget(worker) => {
                        if let Some(latest) = mirror.latest_use(worker) {
                            while mirror.cut_some(worker, latest, 3) {}
                        }
                        naive.caches.remove(&worker);
                        sent.retain(|sent| sent.worker != worker);
                    }
                    Step::Cut(worker) => {
                        mirror.cut(worker, UseNumber::MAX);
                        naive.caches.remove(&worker);
                    }
                }
                mirror.check_invariants();
                for Sent { text, .. } in &sent {
                    let names = prompt(text);
                    let parts = by_part(&mirror, &names);
                    for worker in 0..4 {
                        let matched = naive.matched(worker, text);
                        prop_assert_eq!(mirror.matched_blocks(&names, worker), matched);
                        prop_assert_eq!(parts.get(&worker).copied().unwrap_or(0), matched);
                    }
                }
            }
        }
    }
}
