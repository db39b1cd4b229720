//! Who may ask what.
//!
//! The one idea: each route says in `routes.rs` behind which [`Door`] it stands, and [`ask_for_key`] stands before all
//! routes and asks for the key of that door. The door is that of the route that would answer, so that no spelling of a
//! path leads around it. A path without a route stands behind the door of the API: who has no key does not learn which
//! routes there are.
//!
//! Invariant: a key of the router's goes no further than here. It is taken off the request, and a worker is sent the
//! key that the worker asks for (`Worker::authorize`); so the key of the administrators reaches no worker.
//!
//! Where no key is asked for, a browser must still not be made to manage a router: a page of another origin may send a
//! POST without asking first, and is refused.
//!
//! What is refused here never becomes a request of the router's: it is counted, and leaves no trace.

use std::sync::Arc;

use axum::extract::{MatchedPath, Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use hyper::HeaderMap;
use hyper::header::{AUTHORIZATION, HOST, HeaderValue, ORIGIN};
use subtle::ConstantTimeEq;

use super::secret::{KEY_BYTES_MAX, Secret};
use super::{App, Options, body, cors, routes};
use crate::error::{Error, Kind, shown};

/// What a route asks of who uses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Door {
    /// Nothing.
    Open,
    /// The `api_key`, if there is one.
    Api,
    /// The `admin_api_key`, if there is one, else what [`Door::Api`] asks.
    Admin,
}

impl Door {
    /// The option with its key, for the documentation.
    pub const fn option(self) -> Option<&'static str> {
        match self {
            Door::Open => None,
            Door::Api => Some("api_key"),
            Door::Admin => Some("admin_api_key"),
        }
    }
}

/// The doors of one router.
pub(super) struct Doors {
    api: Option<Lock>,
    admin: Option<Lock>,
    origins: Vec<HeaderValue>,
}

/// What one key opens.
struct Lock {
    option: &'static str,
    key: [u8; KEY_BYTES_MAX],
}

impl Doors {
    pub(super) fn new(options: &Options) -> Self {
        Self {
            api: options.api_key.as_ref().map(|key| Lock::new("api_key", key)),
            admin: options.admin_api_key.as_ref().map(|key| Lock::new("admin_api_key", key)),
            origins: options.cors_allowed_origins.clone(),
        }
    }

    fn lock(&self, door: Door) -> Option<&Lock> {
        match door {
            Door::Open => None,
            Door::Api => self.api.as_ref(),
            Door::Admin => self.admin.as_ref().or(self.api.as_ref()),
        }
    }

    /// Refuses what a page of a foreign origin makes a browser do to the router, where no key would.
    fn check_origin(&self, door: Door, request: &Request) -> Result<(), Error> {
        // Requests to workers may well come by way of a page's own server, which changes the host and not the origin.
        let is_safe = door != Door::Admin || request.method().is_safe();
        let Some(origin) = request.headers().get(ORIGIN) else { return Ok(()) };
        let is_allowed = |allowed: &HeaderValue| allowed == origin || allowed == cors::ANY;
        let is_own = request.headers().get(HOST).is_some_and(|host| is_at(origin, host));
        if is_safe || self.lock(door).is_some() || is_own || self.origins.iter().any(is_allowed) {
            return Ok(());
        }
        let message = format!(
            "pages of {} may not manage this router: name their origin in cors_allowed_origins, or set api_key",
            shown(&String::from_utf8_lossy(origin.as_bytes()))
        );
        Err(Error::new(Kind::ForbiddenOrigin, message))
    }

    /// Lets a request through a door and takes the router's keys off it.
    fn enter(&self, door: Door, headers: &mut HeaderMap) -> Result<(), Error> {
        if let Some(lock) = self.lock(door) {
            lock.open(headers)?;
            headers.remove(AUTHORIZATION);
            return Ok(());
        }
        let is_ours = |given| self.api.iter().chain(&self.admin).any(|lock| lock.fits(given));
        if headers.get_all(AUTHORIZATION).iter().any(is_ours) {
            headers.remove(AUTHORIZATION);
        }
        Ok(())
    }
}

impl Lock {
    fn new(option: &'static str, key: &Secret) -> Self {
        Self { option, key: padded(key.as_bytes()) }
    }

    /// Whether these headers have the key, once.
    fn open(&self, headers: &HeaderMap) -> Result<(), Error> {
        let mut given = headers.get_all(AUTHORIZATION).iter();
        let why_not = match (given.next(), given.next()) {
            (None, _) => "the request has no such header",
            (Some(_), Some(_)) => "the request has more than one",
            (Some(one), None) if self.fits(one) => return Ok(()),
            (Some(one), None) if bearer(one).is_none() => "the one given is not of that form",
            (Some(_), None) => "the key given is another",
        };
        let option = self.option;
        let message = format!(
            "this route asks for the header authorization: Bearer KEY with the router's {option}; {why_not}"
        );
        Err(Error::new(Kind::Unauthorized, message))
    }

    /// Takes the same time whatever the key is: all keys are as long here, and compared to the end.
    fn fits(&self, given: &HeaderValue) -> bool {
        bearer(given)
            .filter(|key| key.len() <= KEY_BYTES_MAX)
            .is_some_and(|key| padded(key).ct_eq(&self.key).into())
    }
}

/// Whether pages of this origin come from this host, which is the router's own.
fn is_at(origin: &HeaderValue, host: &HeaderValue) -> bool {
    let authority = |origin: &'_ str| origin.split_once("://").map(|(_, rest)| rest.to_owned());
    let origin = origin.to_str().ok().and_then(authority);
    origin.is_some_and(|authority| authority.as_bytes().eq_ignore_ascii_case(host.as_bytes()))
}

/// A key with zeros behind it, which neither a key nor a header has inside.
fn padded(key: &[u8]) -> [u8; KEY_BYTES_MAX] {
    let mut padded = [0; KEY_BYTES_MAX];
    padded[..key.len()].copy_from_slice(key);
    padded
}

/// The key in `Bearer KEY`; the scheme in any case (RFC 9110, section 11.1).
fn bearer(given: &HeaderValue) -> Option<&[u8]> {
    const SCHEME: &[u8] = b"bearer ";
    let (scheme, key) = given.as_bytes().split_at_checked(SCHEME.len())?;
    scheme.eq_ignore_ascii_case(SCHEME).then(|| key.trim_ascii())
}

/// Stands before all routes.
pub(super) async fn ask_for_key(
    State(app): State<Arc<App>>,
    request: Request,
    next: Next,
) -> Response {
    let door = routes::door(request.extensions().get::<MatchedPath>().map(MatchedPath::as_str));
    match enter(&app, door, request).await {
        Ok(request) => next.run(request).await,
        Err(refusal) => refusal,
    }
}

/// Lets a request through a door; else what it is answered.
pub(super) async fn enter(
    app: &App,
    door: Door,
    mut request: Request,
) -> Result<Request, Response> {
    let entered = app.doors.check_origin(door, &request);
    let Err(error) = entered.and_then(|()| app.doors.enter(door, request.headers_mut())) else {
        return Ok(request);
    };
    app.metrics.unauthorized.inc();
    tracing::debug!("refused: {error}");
    let (head, body) = request.into_parts();
    body::refuse(&head.headers, body).await;
    Err(error.into_response())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lock(option: &'static str, key: &str) -> Option<Lock> {
        Some(Lock::new(option, &Secret::new(key).expect("a key")))
    }

    fn headers(authorizations: &[&str]) -> HeaderMap {
        let pair = |value: &&str| (AUTHORIZATION, value.parse().expect("a value"));
        authorizations.iter().map(pair).collect()
    }

    /// Whether a request with these headers gets in, and what of them goes on.
    fn enter(doors: &Doors, door: Door, authorizations: &[&str]) -> Option<usize> {
        let mut headers = headers(authorizations);
        doors.enter(door, &mut headers).ok()?;
        Some(headers.len())
    }

    #[test]
    fn each_door_has_its_key() {
        let both = Doors {
            api: lock("api_key", "user"),
            admin: lock("admin_api_key", "boss"),
            origins: Vec::new(),
        };
        let api = Doors { api: lock("api_key", "user"), admin: None, origins: Vec::new() };
        let admin = Doors { api: None, admin: lock("admin_api_key", "boss"), origins: Vec::new() };
        let none = Doors { api: None, admin: None, origins: Vec::new() };
        let opens = |doors, key: &str| {
            let key = format!("Bearer {key}");
            [Door::Open, Door::Api, Door::Admin].map(|door| enter(doors, door, &[&key]).is_some())
        };
        assert_eq!(opens(&both, "user"), [true, true, false]);
        assert_eq!(opens(&both, "boss"), [true, false, true]);
        assert_eq!(opens(&api, "user"), [true, true, true]);
        assert_eq!(opens(&api, "boss"), [true, false, false]);
        assert_eq!(opens(&admin, "boss"), [true, true, true]);
        assert_eq!(opens(&admin, "user"), [true, true, false]);
        assert_eq!(opens(&none, "user"), [true, true, true]);
    }

    #[test]
    fn without_a_key_a_page_of_another_origin_changes_nothing() {
        let none = |origins: &[&'static str]| Doors {
            api: None,
            admin: None,
            origins: origins.iter().map(|origin| HeaderValue::from_static(origin)).collect(),
        };
        let enters = |doors: &Doors, method: &str, origin: &str| {
            let request = hyper::Request::builder()
                .method(method)
                .header(HOST, "router:30001")
                .header(ORIGIN, origin)
                .body(axum::body::Body::empty())
                .expect("a request");
            doors.check_origin(Door::Admin, &request).is_ok()
        };
        for (method, origin, is_let_in) in [
            ("POST", "https://evil.example", false),
            ("DELETE", "null", false),
            ("POST", "http://router:30001.evil.example", false),
            ("POST", "http://Router:30001", true),
            ("GET", "https://evil.example", true),
        ] {
            assert_eq!(enters(&none(&[]), method, origin), is_let_in, "{method} {origin}");
        }
        assert!(enters(&none(&["https://chat.example"]), "POST", "https://chat.example"));
        assert!(enters(&none(&["*"]), "POST", "https://evil.example"));
        let locked = Doors { admin: lock("admin_api_key", "boss"), ..none(&[]) };
        assert!(enters(&locked, "POST", "https://evil.example"), "its key will say");
    }

    #[test]
    fn a_key_fits_as_a_whole_or_not_at_all() {
        let doors = Doors { api: lock("api_key", "open-sesame"), admin: None, origins: Vec::new() };
        let too_long = format!("Bearer {}", "x".repeat(KEY_BYTES_MAX + 1));
        for good in ["Bearer open-sesame", "bearer open-sesame", "BEARER  open-sesame "] {
            assert_eq!(enter(&doors, Door::Api, &[good]), Some(0), "{good}");
        }
        for bad in [
            "",
            "Bearer",
            "Bearer ",
            "open-sesame",
            "Bearer open-sesam",
            "Bearer open-sesame1",
            "Bearer Open-Sesame",
            "Bearer open-sesame x",
            "Basic open-sesame",
            "Bearer: open-sesame",
            "Bearer,open-sesame",
            "Bearer \u{e4}",
            &too_long,
        ] {
            assert_eq!(enter(&doors, Door::Api, &[bad]), None, "{bad}");
        }
        assert_eq!(enter(&doors, Door::Api, &[]), None);
        assert_eq!(enter(&doors, Door::Api, &["Bearer open-sesame"; 2]), None);
    }

    #[test]
    fn only_the_routers_own_keys_are_taken_off() {
        let doors = Doors { api: None, admin: lock("admin_api_key", "boss"), origins: Vec::new() };
        assert_eq!(enter(&doors, Door::Api, &["Bearer boss"]), Some(0));
        assert_eq!(enter(&doors, Door::Api, &["Bearer a", "Bearer boss"]), Some(0));
        assert_eq!(enter(&doors, Door::Api, &["Bearer a", "Basic b"]), Some(2));
    }

    #[test]
    fn a_refusal_names_the_option_and_not_the_key() {
        let doors = Doors {
            api: lock("api_key", "user"),
            admin: lock("admin_api_key", "boss"),
            origins: Vec::new(),
        };
        for (door, given, words) in [
            (Door::Api, vec![], "api_key; the request has no"),
            (Door::Admin, vec!["Bearer user"], "admin_api_key; the key given is another"),
            (Door::Api, vec!["Basic user"], "not of that form"),
            (Door::Api, vec!["Bearer user"; 2], "more than one"),
        ] {
            let error = doors.enter(door, &mut headers(&given)).expect_err("refused");
            assert_eq!(error.kind, Kind::Unauthorized);
            assert!(error.message.contains(words), "{}", error.message);
            assert!(!error.message.contains("user") && !error.message.contains("boss"));
        }
    }
}
