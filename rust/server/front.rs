//! What answers the requests that come on a connection.
//!
//! The one idea: nearly all of them are routed ones, which need none of what axum does for the others. A [`Front`]
//! takes those straight to [`proxy`]; axum would clone and box its way there once for each layer, which takes a tenth of
//! what a request costs. All others, and all when pages of other origins are to be answered, are axum's.
//!
//! Invariant: who answers makes no difference to the answer. Both ways lead through the same door.

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use hashbrown::HashMap;
use hyper::Method;
use hyper::body::Incoming;
use hyper::service::Service;
use hyper_util::service::TowerToHyperService;

use super::routes::Purpose;
use super::{App, doors, proxy};
use crate::telemetry::metrics::Route;

/// See the module. A clone is another hand on the same.
#[derive(Clone)]
pub(crate) struct Front {
    router: TowerToHyperService<Router>,
    straight: Option<Arc<Straight>>,
}

/// The routed routes, by their path.
struct Straight {
    app: Arc<App>,
    routes: HashMap<String, Arc<Route>>,
}

impl Front {
    /// Routed requests are those to `routes`, which the router has too.
    pub(super) fn new(app: &Arc<App>, router: Router, routes: HashMap<String, Arc<Route>>) -> Self {
        let straight = Straight { app: app.clone(), routes };
        Self { straight: Some(Arc::new(straight)), ..router.into() }
    }

    pub(super) fn answer(&self, request: hyper::Request<Incoming>) -> BoxFuture<'static, Response> {
        if let Some((app, route)) = self.route(&request) {
            return Box::pin(routed(app, route, request.map(Body::new)));
        }
        let answering = self.router.call(request);
        Box::pin(answering.map(|answer| answer.unwrap_or_else(|never| match never {})))
    }

    fn route<B>(&self, request: &hyper::Request<B>) -> Option<(Arc<App>, Arc<Route>)> {
        let Straight { app, routes } = &**self.straight.as_ref()?;
        let route = routes.get(request.uri().path()).filter(|_| request.method() == Method::POST);
        Some((app.clone(), route?.clone()))
    }
}

/// Everything by way of axum.
impl From<Router> for Front {
    fn from(router: Router) -> Self {
        Self { router: TowerToHyperService::new(router), straight: None }
    }
}

async fn routed(app: Arc<App>, route: Arc<Route>, request: Request) -> Response {
    match doors::enter(&app, Purpose::Routed.door(), request).await {
        Ok(request) => proxy::proxy(app, route, request).await,
        Err(refusal) => refusal,
    }
}
