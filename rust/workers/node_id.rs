//! The short names of workers (`node_id`).
//!
//! A name is given once and never passes to another URL: [`NodeIds`] remembers every name it gave, up to
//! [`REMEMBERED_MAX`] of them. What it gives beyond carries the worker's index, which is not used twice.

use std::collections::{HashMap, HashSet};

use super::url::WorkerUrl;

/// Names remembered. Whoever comes to so many has had that many different workers.
const REMEMBERED_MAX: usize = 1 << 16;

/// What a worker's `node_id` is made from.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeIdFrom {
    /// The URL's port: 30001-30010 is gpu_<port-30001>, 8000-8010 is gpu_<port-8000>, any other gpu_<worker index>, none worker_<worker index>
    Port,
    /// worker_<worker index>
    Index,
    /// The URL's host and port
    Host,
    /// gpu_<base_gpu_id> as the worker's own /server_info says; worker_<worker index> where it does not say
    Gpu,
}

/// A worker that wants a name.
#[derive(Clone, Debug)]
pub struct Unnamed<'a> {
    pub index: u32,
    pub url: &'a WorkerUrl,
    /// The name that came with it, if one did.
    pub given: Option<&'a str>,
    /// The worker's own word, where it is known.
    pub base_gpu_id: Option<u64>,
}

/// Gives names, each to one URL only.
#[derive(Debug)]
pub struct NodeIds {
    from: NodeIdFrom,
    given_by_hand: Vec<(WorkerUrl, String)>,
    /// The place each name belongs to; at most [`REMEMBERED_MAX`].
    owners: HashMap<String, String>,
}

impl NodeIds {
    pub fn new(from: NodeIdFrom, given_by_hand: Vec<(WorkerUrl, String)>) -> Self {
        Self { from, given_by_hand, owners: HashMap::new() }
    }

    /// Names for workers that join together. Of several that would share one, each becomes `name@host:port`;
    /// where the name was given before, only the newcomer does.
    pub fn assign(&mut self, joining: &[Unnamed<'_>]) -> Vec<String> {
        let wanted: Vec<String> = joining.iter().map(|worker| self.wanted(worker)).collect();
        let mut seen = HashSet::new();
        let shared: HashSet<&String> = wanted.iter().filter(|name| !seen.insert(*name)).collect();
        let mut names = Vec::with_capacity(joining.len());
        for (worker, name) in joining.iter().zip(&wanted) {
            let place = worker.url.place();
            let free = |name: &str| self.owners.get(name).is_none_or(|owner| *owner == place);
            let mut given = name.clone();
            if shared.contains(name) || !free(&given) {
                given = format!("{name}@{}", worker.url.host_and_port());
            }
            let is_remembered = self.owners.contains_key(&given);
            let is_full = self.owners.len() >= REMEMBERED_MAX;
            if !free(&given) || (is_full && !is_remembered) {
                // Two base paths on one host and port, or no room to remember the name.
                given = format!("{given}#{}", worker.index);
            }
            if !is_full {
                self.owners.insert(given.clone(), place);
            }
            names.push(given);
        }
        names
    }

    fn wanted(&self, worker: &Unnamed<'_>) -> String {
        if let Some(name) = worker.given {
            return name.to_owned();
        }
        if let Some((_, name)) = self.given_by_hand.iter().find(|(url, _)| url == worker.url) {
            return name.clone();
        }
        let by_index = || format!("worker_{}", worker.index);
        match self.from {
            NodeIdFrom::Port => match worker.url.explicit_port() {
                Some(port @ 30001..=30010) => format!("gpu_{}", port - 30001),
                Some(port @ 8000..=8010) => format!("gpu_{}", port - 8000),
                Some(_) => format!("gpu_{}", worker.index),
                None => by_index(),
            },
            NodeIdFrom::Index => by_index(),
            NodeIdFrom::Host => worker.url.host_and_port(),
            NodeIdFrom::Gpu => worker.base_gpu_id.map_or_else(by_index, |gpu| format!("gpu_{gpu}")),
        }
    }
}

/// One entry of `node_ids`: `URL=NAME`.
pub fn parse_entry(entry: &str) -> Result<(WorkerUrl, String), String> {
    let (url, name) = super::options::split_entry(entry, "NAME")?;
    Ok((url.parse()?, check_name(name)?))
}

/// Passes a name that someone gave to a worker through if it is 1 to 128 visible ASCII characters.
pub fn check_name(name: &str) -> Result<String, String> {
    if name.is_empty() || name.len() > 128 || !name.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(format!("the name {name:?} is not 1 to 128 visible ASCII characters"));
    }
    Ok(name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn assign(ids: &mut NodeIds, first_index: u32, urls: &[&str]) -> Vec<String> {
        let urls: Vec<WorkerUrl> = urls.iter().map(|url| url.parse().expect("url")).collect();
        let joining: Vec<Unnamed<'_>> = (first_index..)
            .zip(&urls)
            .map(|(index, url)| Unnamed {
                index,
                url,
                given: None,
                base_gpu_id: (index == 1).then_some(7),
            })
            .collect();
        ids.assign(&joining)
    }

    #[test]
    fn by_port() {
        let mut ids = NodeIds::new(NodeIdFrom::Port, vec![]);
        let urls = ["http://h:30005", "http://h:8010", "http://h:9999", "http://h"];
        assert_eq!(assign(&mut ids, 0, &urls), ["gpu_4", "gpu_10", "gpu_2", "worker_3"]);
    }

    #[test]
    fn a_name_shared_at_start_is_given_to_nobody() {
        let mut ids = NodeIds::new(NodeIdFrom::Port, vec![]);
        let urls = ["http://a:30001", "http://b:8000", "http://b:30002"];
        assert_eq!(assign(&mut ids, 0, &urls), ["gpu_0@a:30001", "gpu_0@b:8000", "gpu_1"]);
    }

    #[test]
    fn a_latecomer_gives_way_and_a_name_stays_with_its_url() {
        let mut ids = NodeIds::new(NodeIdFrom::Port, vec![]);
        assert_eq!(assign(&mut ids, 0, &["http://a:30001"]), ["gpu_0"]);
        assert_eq!(assign(&mut ids, 1, &["http://b:30001"]), ["gpu_0@b:30001"]);
        assert_eq!(assign(&mut ids, 2, &["http://A:30001/"]), ["gpu_0"]);
    }

    #[test]
    fn names_stay_unique_when_no_more_are_remembered() {
        let mut ids = NodeIds::new(NodeIdFrom::Host, vec![]);
        for index in 0..REMEMBERED_MAX as u32 {
            assign(&mut ids, index, &[&format!("http://h{index}:1")]);
        }
        assert_eq!(assign(&mut ids, 70_000, &["http://new:1"]), ["new:1#70000"]);
        assert_eq!(assign(&mut ids, 70_001, &["http://new:1"]), ["new:1#70001"]);
        assert_eq!(assign(&mut ids, 70_002, &["http://h5:1"]), ["h5:1"]);
        assert_eq!(ids.owners.len(), REMEMBERED_MAX);
    }

    #[test]
    fn a_name_that_came_with_the_worker_is_wanted_first() {
        let mut ids = NodeIds::new(NodeIdFrom::Port, vec![]);
        let url = "http://a:30001".parse().expect("url");
        let joining = Unnamed { index: 0, url: &url, given: Some("left"), base_gpu_id: None };
        assert_eq!(ids.assign(&[joining]), ["left"]);
    }

    #[test]
    fn by_index_host_gpu_and_by_hand() {
        let urls = ["http://a:1", "http://b:1"];
        let names = |from, by_hand| assign(&mut NodeIds::new(from, by_hand), 0, &urls);
        assert_eq!(names(NodeIdFrom::Index, vec![]), ["worker_0", "worker_1"]);
        assert_eq!(names(NodeIdFrom::Host, vec![]), ["a:1", "b:1"]);
        assert_eq!(names(NodeIdFrom::Gpu, vec![]), ["worker_0", "gpu_7"]);
        let by_hand = vec![parse_entry("http://a:1/=left").expect("entry")];
        assert_eq!(names(NodeIdFrom::Port, by_hand), ["left", "gpu_1"]);
    }

    #[test]
    fn two_base_paths_on_one_port_have_two_names() {
        let mut ids = NodeIds::new(NodeIdFrom::Host, vec![]);
        let names = assign(&mut ids, 0, &["http://a:1/x", "http://a:1/y"]);
        assert_ne!(names[0], names[1]);
    }

    #[test]
    fn a_bad_entry_says_why() {
        assert!(parse_entry("http://a:1").expect_err("no name").contains("URL=NAME"));
        assert!(parse_entry("a=b").expect_err("no scheme").contains("scheme"));
        assert!(parse_entry("http://a:1=").expect_err("empty").contains("visible ASCII"));
    }
}
