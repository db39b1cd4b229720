//! Pages of which other origins a browser lets ask the router: the CORS protocol of the Fetch standard.

use hyper::Uri;
use hyper::header::{HeaderName, HeaderValue, RETRY_AFTER};
use tower_http::cors::{AllowHeaders, AllowOrigin, Any, CorsLayer};

use super::headers::{X_NODE, X_ROUTER_ERROR_CODE, X_WORKER};
use super::request_id::X_REQUEST_ID;
use super::traces::{X_LEFT_OUT, X_NEXT_CURSOR};

pub(super) const ANY: &str = "*";

/// Headers of the router's that a page may read.
const EXPOSED: [HeaderName; 7] =
    [X_REQUEST_ID, X_WORKER, X_NODE, X_ROUTER_ERROR_CODE, X_NEXT_CURSOR, X_LEFT_OUT, RETRY_AFTER];

/// What answers preflights and adds the headers; None where no origin is allowed.
pub(super) fn layer(origins: &[HeaderValue]) -> Option<CorsLayer> {
    if origins.is_empty() {
        return None;
    }
    let allowed = if origins.iter().any(|origin| origin == ANY) {
        AllowOrigin::any()
    } else {
        AllowOrigin::list(origins.iter().cloned())
    };
    let layer = CorsLayer::new()
        .allow_origin(allowed)
        .allow_methods(Any)
        // To a browser `*` is any header but authorization.
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers(EXPOSED);
    Some(layer)
}

/// An origin as a browser writes it (RFC 6454, section 6.2), or `*`.
pub(super) fn parse_origin(text: &str) -> Result<HeaderValue, String> {
    let origin = if text == ANY { Some(ANY.to_owned()) } else { serialized(text) };
    origin.and_then(|origin| HeaderValue::from_str(&origin).ok()).ok_or_else(|| {
        format!(
            "{text:?} is not an origin: a scheme and a host, and a port where it is not the scheme's own, such as \
             https://chat.example.org or http://localhost:3000; * allows all"
        )
    })
}

fn serialized(text: &str) -> Option<String> {
    let uri: Uri = text.parse().ok()?;
    let (scheme, host) = (uri.scheme_str()?.to_ascii_lowercase(), uri.host()?.to_ascii_lowercase());
    let port = uri.port().map(|port| format!(":{port}")).unwrap_or_default();
    let whole = format!("{scheme}://{host}{port}");
    // No path, not even `/`, no user, and no pattern.
    let is_origin = whole.eq_ignore_ascii_case(text) && !host.is_empty() && !host.contains('*');
    let is_implied =
        matches!((scheme.as_str(), port.as_str()), ("http", ":80") | ("https", ":443"));
    is_origin.then(|| if is_implied { format!("{scheme}://{host}") } else { whole })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins_are_read_as_browsers_write_them() {
        for (text, origin) in [
            ("*", "*"),
            ("https://chat.example.org", "https://chat.example.org"),
            ("HTTPS://Chat.Example.org:443", "https://chat.example.org"),
            ("http://localhost:3000", "http://localhost:3000"),
            ("http://localhost:80", "http://localhost"),
            ("https://a:80", "https://a:80"),
            ("http://[::1]:8080", "http://[::1]:8080"),
            ("chrome-extension://abcdef", "chrome-extension://abcdef"),
        ] {
            assert_eq!(parse_origin(text).expect(text), origin);
        }
    }

    #[test]
    fn what_is_no_origin_is_told_what_one_is() {
        for text in [
            "",
            "null",
            "localhost",
            "localhost:3000",
            "https://a/",
            "https://a/path",
            "https://a?b",
            "https://u@a",
            "https://*.example.org",
            "https://a:99999",
            "https://a:",
            "https://",
            "//a",
            "https://a, https://b",
            "https://ä",
            "**",
        ] {
            let why = parse_origin(text).expect_err(text);
            assert!(why.contains("https://chat.example.org"), "{why}");
        }
    }
}
