//! The address of a worker: `http://HOST:PORT[/BASE]`, kept as it was written, checked once.

use std::fmt;
use std::str::FromStr;

use hyper::Uri;
use hyper::header::HeaderValue;

/// Far longer than any host and path of use.
const LENGTH_MAX: usize = 2048;

/// A checked worker URL. Two are equal when they lead to the same place.
#[derive(Clone, Debug)]
pub struct WorkerUrl {
    /// As written, without a trailing slash.
    text: Box<str>,
    authority: HeaderValue,
    /// Lower case, without the brackets of an IPv6 address.
    host: Box<str>,
    explicit_port: Option<u16>,
    /// Empty, or starts with a slash and does not end with one.
    base_path: Box<str>,
}

impl WorkerUrl {
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The value of the `host` header.
    pub fn authority(&self) -> &HeaderValue {
        &self.authority
    }

    pub fn host(&self) -> &str {
        &self.host
    }

    pub fn port(&self) -> u16 {
        self.explicit_port.unwrap_or(80)
    }

    /// The port, if the URL names one.
    pub fn explicit_port(&self) -> Option<u16> {
        self.explicit_port
    }

    pub fn base_path(&self) -> &str {
        &self.base_path
    }

    /// Where it leads to: the same text for equal URLs.
    pub fn place(&self) -> String {
        format!("{}{}", self.host_and_port(), self.base_path)
    }

    /// `HOST:PORT`, with the brackets of an IPv6 address.
    pub fn host_and_port(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port())
        } else {
            format!("{}:{}", self.host, self.port())
        }
    }
}

impl PartialEq for WorkerUrl {
    fn eq(&self, other: &Self) -> bool {
        (&self.host, self.port(), &self.base_path) == (&other.host, other.port(), &other.base_path)
    }
}

impl Eq for WorkerUrl {}

impl fmt::Display for WorkerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl FromStr for WorkerUrl {
    type Err = String;

    fn from_str(given: &str) -> Result<Self, String> {
        if given.len() > LENGTH_MAX {
            return Err(format!("a worker URL of {} bytes; at most {LENGTH_MAX}", given.len()));
        }
        let wrong = |why: &str| {
            format!(
                "{given:?} is not a worker URL: {why}; write http://HOST:PORT, for instance http://localhost:30005"
            )
        };
        if given.contains(',') {
            return Err(wrong("it has a comma; several URLs are separated by spaces"));
        }
        let (scheme, rest) =
            given.split_once("://").ok_or_else(|| wrong("it has no scheme (http://)"))?;
        if scheme.eq_ignore_ascii_case("https") {
            return Err(wrong("https to workers is not supported yet"));
        }
        if !scheme.eq_ignore_ascii_case("http") {
            return Err(wrong("its scheme is not http"));
        }
        if rest.contains(['?', '#']) {
            return Err(wrong("it has a query or a fragment"));
        }
        let text = given.trim_end_matches('/');
        let uri: Uri = text.parse().map_err(|error| wrong(&format!("{error}")))?;
        let authority = uri.authority().ok_or_else(|| wrong("it has no host"))?;
        if authority.as_str().contains('@') {
            return Err(wrong("it has user information"));
        }
        let host = authority.host();
        let bare = host.trim_start_matches('[').trim_end_matches(']').to_ascii_lowercase();
        if bare.is_empty() {
            return Err(wrong("it has no host"));
        }
        if host.starts_with('[') && bare.parse::<std::net::Ipv6Addr>().is_err() {
            return Err(wrong("the brackets hold no IPv6 address"));
        }
        let explicit_port = match &authority.as_str()[host.len()..] {
            "" => None,
            port => match port.strip_prefix(':').map(str::parse) {
                Some(Ok(port)) if port > 0 => Some(port),
                _ => return Err(wrong("its port is not in 1..=65535")),
            },
        };
        Ok(Self {
            text: text.into(),
            authority: HeaderValue::from_str(authority.as_str())
                .map_err(|_| wrong("its host is not ASCII"))?,
            host: bare.into(),
            explicit_port,
            base_path: uri.path().trim_end_matches('/').into(),
        })
    }
}

/// Refuses a list in which two URLs lead to the same place.
pub fn check_distinct<U: PartialEq + fmt::Display>(urls: &[U]) -> Result<(), String> {
    for (index, url) in urls.iter().enumerate() {
        if let Some(first) = urls[..index].iter().find(|first| *first == url) {
            return Err(format!("{first} and {url} are the same worker; name each once"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> WorkerUrl {
        text.parse().expect(text)
    }

    #[test]
    fn a_url_is_kept_as_written_without_its_trailing_slash() {
        assert_eq!(parse("http://Localhost:30005/").as_str(), "http://Localhost:30005");
        assert_eq!(parse("http://h/base/").base_path(), "/base");
        assert_eq!(parse("http://h").base_path(), "");
    }

    #[test]
    fn ports_and_hosts() {
        let url = parse("http://[::1]:8000/x");
        assert_eq!((url.host(), url.port()), ("::1", 8000));
        assert_eq!(url.host_and_port(), "[::1]:8000");
        assert_eq!(parse("http://h").explicit_port(), None);
        assert_eq!(parse("http://h:80").explicit_port(), Some(80));
        assert_eq!(parse("http://h").port(), 80);
    }

    #[test]
    fn what_is_no_worker_url_says_why() {
        for (text, why) in [
            ("localhost:30005", "no scheme"),
            ("", "no scheme"),
            ("https://h:1", "https"),
            ("http://a:1,http://b:1", "comma"),
            ("ftp://h:1", "not http"),
            ("http://u:p@h:1", "user information"),
            ("http://h:1?x=1", "query"),
            ("http://h:1#x", "fragment"),
            ("http://h:0", "port"),
            ("http://h:70000", "port"),
            ("http://h:", "port"),
            ("http://", "not a worker URL"),
            ("http://:80", "not a worker URL"),
            ("http://[zz]:1", "not a worker URL"),
            ("http://a b:1", "not a worker URL"),
        ] {
            let error = text.parse::<WorkerUrl>().expect_err(text);
            assert!(error.contains(why), "{text}: {error}");
        }
    }

    #[test]
    fn a_url_has_a_longest_length() {
        let long = |length: usize| format!("http://h:1/{}", "x".repeat(length - 11));
        assert!(long(LENGTH_MAX).parse::<WorkerUrl>().is_ok());
        let error = long(LENGTH_MAX + 1).parse::<WorkerUrl>().expect_err("too long");
        assert!(error.contains("2049") && error.len() < 100, "{error}");
    }

    #[test]
    fn the_same_place_twice_is_refused() {
        let urls = [parse("http://a:80"), parse("http://b:1"), parse("http://A/")];
        assert!(check_distinct(&urls).expect_err("same").contains("http://A"));
        assert!(check_distinct(&urls[..2]).is_ok());
    }
}
