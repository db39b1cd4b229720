//! Where workers come from: a URL is one worker, a name of the DNS is one worker per address.

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;

use super::url::WorkerUrl;

const DNS_PREFIX: &str = "dns+";

/// One entry of `worker_urls`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    Url(WorkerUrl),
    Dns(DnsName),
}

/// `dns+http://NAME:PORT[/BASE]`: each address of the name is a worker, `http://ADDRESS:PORT[/BASE]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DnsName {
    /// Its workers' URL, with the name in place of their addresses.
    url: WorkerUrl,
}

impl DnsName {
    pub fn name(&self) -> &str {
        self.url.host()
    }

    pub fn port(&self) -> u16 {
        self.url.port()
    }

    /// The URL of the worker at one address. None for an address that no URL can name.
    pub fn worker_at(&self, address: SocketAddr) -> Option<WorkerUrl> {
        // The scope that an IPv6 address may carry is this machine's affair.
        let address = SocketAddr::new(address.ip(), address.port());
        format!("http://{address}{}", self.url.base_path()).parse().ok()
    }
}

impl fmt::Display for DnsName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{DNS_PREFIX}{}", self.url)
    }
}

impl FromStr for Source {
    type Err = String;

    fn from_str(given: &str) -> Result<Self, String> {
        let prefix = given.get(..DNS_PREFIX.len());
        if prefix.is_none_or(|prefix| !prefix.eq_ignore_ascii_case(DNS_PREFIX)) {
            return given.parse().map(Self::Url);
        }
        let url = given[DNS_PREFIX.len()..].parse().map_err(|why| {
            format!("{given:?} is not {DNS_PREFIX}http://NAME:PORT[/BASE]: {why}")
        })?;
        Ok(Self::Dns(DnsName { url }))
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Url(url) => url.fmt(f),
            Self::Dns(name) => name.fmt(f),
        }
    }
}

/// What changed from one answer of the resolver to the next.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Change {
    pub came: Vec<SocketAddr>,
    pub went: Vec<SocketAddr>,
}

/// The change from the addresses that were there to those found now; both in order and each address once.
pub fn change(had: &[SocketAddr], found: &[SocketAddr]) -> Change {
    let not_in =
        |others: &[SocketAddr], address: &SocketAddr| others.binary_search(address).is_err();
    Change {
        came: found.iter().filter(|address| not_in(had, address)).copied().collect(),
        went: had.iter().filter(|address| not_in(found, address)).copied().collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn dns(text: &str) -> DnsName {
        match text.parse() {
            Ok(Source::Dns(name)) => name,
            other => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    fn a_name_is_told_from_a_url() {
        assert!(matches!("http://a:1".parse(), Ok(Source::Url(_))));
        let name = dns("DNS+http://Workers.default.svc:30001/base/");
        assert_eq!((name.name(), name.port()), ("workers.default.svc", 30001));
        assert_eq!(name.to_string(), "dns+http://Workers.default.svc:30001/base");
    }

    #[test]
    fn each_address_is_a_worker() {
        let name = dns("dns+http://w:30001/base");
        let at = |address: &str| {
            name.worker_at(address.parse().expect("an address")).expect("a URL").to_string()
        };
        assert_eq!(at("10.0.0.1:30001"), "http://10.0.0.1:30001/base");
        assert_eq!(at("[fd00::1]:30001"), "http://[fd00::1]:30001/base");
        assert_eq!(at("[fe80::1%3]:30001"), "http://[fe80::1]:30001/base");
    }

    #[test]
    fn what_is_no_name_says_why() {
        for (text, why) in [
            ("dns+https://w:1", "https"),
            ("dns+w:1", "no scheme"),
            ("dns+", "no scheme"),
            ("dns+http://w:0", "port"),
            ("dns+http://w:1?x", "query"),
        ] {
            let error = text.parse::<Source>().expect_err(text);
            assert!(error.contains(why) && error.contains("NAME:PORT"), "{text}: {error}");
        }
    }

    fn addresses() -> impl Strategy<Value = BTreeSet<SocketAddr>> {
        proptest::collection::btree_set((0..20_u8).prop_map(|n| ([10, 0, 0, n], 80).into()), 0..20)
    }

    proptest! {
        #[test]
        fn a_change_leads_from_one_answer_to_the_next(had in addresses(), found in addresses()) {
            let list = |set: &BTreeSet<SocketAddr>| set.iter().copied().collect::<Vec<_>>();
            let change = change(&list(&had), &list(&found));
            let set = |list: &[SocketAddr]| list.iter().copied().collect::<BTreeSet<_>>();
            prop_assert_eq!(set(&change.came), &found - &had);
            prop_assert_eq!(set(&change.went), &had - &found);
        }
    }
}
