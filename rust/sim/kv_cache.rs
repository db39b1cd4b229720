//! The simulated worker's KV cache: which prompt prefixes are still in the GPU's memory.
//!
//! The one idea: a prompt is a chain of pages, and a page's name ([`chain`]) is a hash of
//! everything up to and including it. So one flat least-recently-used list of names behaves like a
//! radix tree, as long as a use of a prompt marks its *last* page first and its first page last.
//!
//! Invariant: a page is cached only if all pages before it are, and each of those was used at least
//! as recently. Hence eviction from the old end takes leaves before their parents, and the length
//! of the longest cached prefix can be found by binary search.
//!
//! Not here: pages locked by running requests. Eviction follows recency alone.

use hashbrown::HashMap;

/// Marks the end of the recency list.
const NONE: u32 = u32::MAX;

/// One step of the prefix hash: the name of the page that holds `content` and follows `parent`.
fn link(parent: u64, content: u64) -> u64 {
    // The finaliser of splitmix64 (Steele, Lea, Flood 2014): every input bit reaches every output
    // bit.
    let mut hash = parent.rotate_left(23) ^ content.wrapping_add(0x9e37_79b9_7f4a_7c15);
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ (hash >> 31)
}

/// The names of the pages of a prompt whose pages hold `contents`, one name per page.
pub fn chain(contents: impl IntoIterator<Item = u64>) -> Vec<u64> {
    let next = |parent: &mut u64, content| {
        *parent = link(*parent, content);
        Some(*parent)
    };
    contents.into_iter().scan(0, next).collect()
}

/// The names of the whole pages of `page_tokens` ≥ 1 tokens each.
pub fn pages(tokens: impl IntoIterator<Item = u32>, page_tokens: usize) -> Vec<u64> {
    // A token's name tells all before it, so that of its last token names a page.
    chain(tokens.into_iter().map(u64::from))
        .into_iter()
        .skip(page_tokens - 1)
        .step_by(page_tokens)
        .collect()
}

/// A bounded set of pages in order of use. Memory: about 50 bytes per page held, at most `capacity`
/// pages.
#[derive(Debug)]
pub struct KvCache {
    capacity: usize,
    /// Page name to its place in `entries`.
    places: HashMap<u64, u32>,
    /// At most `capacity` entries; an evicted one is reused at once.
    entries: Vec<Entry>,
    newest: u32,
    oldest: u32,
}

#[derive(Debug)]
struct Entry {
    page: u64,
    newer: u32,
    older: u32,
}

impl KvCache {
    /// An empty cache for `capacity` pages (at least one is kept, at most `u32::MAX - 1`).
    pub fn new(capacity: usize) -> Self {
        let capacity = capacity.clamp(1, NONE as usize - 1);
        let (places, entries) = (HashMap::new(), Vec::new());
        Self { capacity, places, entries, newest: NONE, oldest: NONE }
    }

    /// Pages held now.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether no page is held.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// How many of a prompt's first pages are cached. Does not count as a use. O(log n).
    pub fn matching(&self, pages: &[u64]) -> usize {
        pages.partition_point(|page| self.places.contains_key(page))
    }

    /// Caches a prompt's pages, or marks them used, evicting the least recently used ones.
    /// Of a prompt larger than the cache only the head is kept.
    pub fn insert(&mut self, pages: &[u64]) {
        let held = &pages[..pages.len().min(self.capacity)];
        for &page in held.iter().rev() {
            self.touch(page);
        }
    }

    /// Forgets every page.
    pub fn clear(&mut self) {
        *self = Self::new(self.capacity);
    }

    fn touch(&mut self, page: u64) {
        let place = match self.places.get(&page) {
            Some(&place) => {
                self.unlink(place);
                place
            }
            None => self.place_for(page),
        };
        self.link_newest(place);
    }

    /// A place for a new page, not yet in the recency list.
    fn place_for(&mut self, page: u64) -> u32 {
        let place = if self.entries.len() < self.capacity {
            self.entries.push(Entry { page, newer: NONE, older: NONE });
            (self.entries.len() - 1) as u32
        } else {
            let victim = self.oldest;
            self.unlink(victim);
            let entry = &mut self.entries[victim as usize];
            self.places.remove(&entry.page);
            entry.page = page;
            victim
        };
        self.places.insert(page, place);
        place
    }

    fn unlink(&mut self, place: u32) {
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

    fn link_newest(&mut self, place: u32) {
        let older = self.newest;
        let entry = &mut self.entries[place as usize];
        (entry.newer, entry.older) = (NONE, older);
        match older {
            NONE => self.oldest = place,
            older => self.entries[older as usize].newer = place,
        }
        self.newest = place;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn pages(prompt: &[u8]) -> Vec<u64> {
        chain(prompt.iter().map(|&content| u64::from(content)))
    }

    /// A prefix tree kept as a map from prefix to time of last use.
    struct Naive {
        capacity: usize,
        used: BTreeMap<Vec<u8>, usize>,
    }

    impl Naive {
        fn insert(&mut self, prompt: &[u8], now: usize) {
            for end in 1..=prompt.len().min(self.capacity) {
                self.used.insert(prompt[..end].to_vec(), now);
            }
            while self.used.len() > self.capacity {
                let is_leaf = |prefix: &Vec<u8>| {
                    !self.used.keys().any(|p| p.len() > prefix.len() && p.starts_with(prefix))
                };
                let leaves = self.used.iter().filter(|(prefix, _)| is_leaf(prefix));
                let oldest =
                    leaves.min_by_key(|(_, at)| **at).expect("a tree has a leaf").0.clone();
                self.used.remove(&oldest);
            }
        }

        fn matching(&self, prompt: &[u8]) -> usize {
            let cached = |end: &usize| self.used.contains_key(&prompt[..*end]);
            (1..=prompt.len()).take_while(cached).count()
        }
    }

    #[test]
    fn a_page_is_named_by_all_that_stands_before_it() {
        assert_eq!(pages(b"abc")[..2], pages(b"abd")[..2]);
        assert_ne!(pages(b"abc")[2], pages(b"abd")[2]);
        assert_ne!(pages(b"xbc")[2], pages(b"abc")[2]);
        assert_ne!(pages(b"aa")[0], pages(b"aa")[1]);
    }

    #[test]
    fn the_least_recently_used_leaf_goes_first() {
        let mut cache = KvCache::new(4);
        cache.insert(&pages(b"ab"));
        cache.insert(&pages(b"xy"));
        cache.insert(&pages(b"ab"));
        cache.insert(&pages(b"q"));
        assert_eq!(cache.matching(&pages(b"ab")), 2);
        assert_eq!(cache.matching(&pages(b"xy")), 1);
        assert_eq!(cache.len(), 4);
    }

    #[test]
    fn a_prompt_larger_than_the_cache_keeps_its_head() {
        let mut cache = KvCache::new(3);
        cache.insert(&pages(b"abcdef"));
        assert_eq!(cache.matching(&pages(b"abcdef")), 3);
        cache.clear();
        assert!(cache.is_empty());
        assert_eq!(cache.matching(&pages(b"a")), 0);
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            failure_persistence: None,
            ..ProptestConfig::with_cases(200)
        })]

        #[test]
        fn behaves_like_a_prefix_tree(
            capacity in 1usize..12,
            prompts in prop::collection::vec(prop::collection::vec(0u8..3, 0..6), 1..40),
        ) {
            let mut cache = KvCache::new(capacity);
            let mut naive = Naive { capacity, used: BTreeMap::new() };
            for (now, prompt) in prompts.iter().enumerate() {
                cache.insert(&pages(prompt));
                naive.insert(prompt, now);
                prop_assert_eq!(cache.len(), naive.used.len());
                for probe in &prompts {
                    prop_assert_eq!(cache.matching(&pages(probe)), naive.matching(probe));
                }
            }
        }
    }
}
