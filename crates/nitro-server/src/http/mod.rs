//! Everything between a connection and a handler: who asks, under which number, and what is counted.

pub(crate) mod body;
pub(crate) mod connection;

use std::any::Any;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use axum::Json;
use axum::body::Body;
use axum::extract::{ConnectInfo, MatchedPath, Request, State};
use axum::http::{HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use nitro_api::ApiError;
use serde::{Deserialize, Serialize};
use tower_http::cors::{AllowOrigin, Any as AnyHeader, CorsLayer};
use utoipa::ToSchema;

use self::connection::Peer;
use crate::app::App;
use crate::metrics::{RequestLabels, RouteLabel};

/// Under which number a request is found in logs, here and elsewhere.
pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Numbers the request, and logs and counts its answer.
pub(crate) async fn observe(
    State(app): State<Arc<App>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    mut request: Request,
    next: Next,
) -> Response {
    let _busy = peer.busy();
    let began = Instant::now();
    let id = request_id(&request);
    request.headers_mut().insert(REQUEST_ID, id.clone());
    let method = request.method().clone();
    let path = request.uri().path().to_owned();
    let route = match request.extensions().get::<MatchedPath>() {
        Some(matched) => matched.as_str().to_owned(),
        None => "other".to_owned(),
    };
    let mut response = next.run(request).await;
    response.headers_mut().insert(REQUEST_ID, id.clone());
    let seconds = began.elapsed().as_secs_f64();
    let status = response.status().as_u16();
    if let Some(error) = response.extensions().get::<ApiError>() {
        app.metrics.refuse(error.reason());
    }
    // Methods are any word; only those we know become labels.
    let known = [Method::GET, Method::POST, Method::HEAD, Method::OPTIONS];
    let label = match known.contains(&method) {
        true => method.as_str(),
        false => "other",
    };
    let labels = RequestLabels {
        method: label.to_owned(),
        route: route.clone(),
        status,
    };
    app.metrics.requests.get_or_create(&labels).inc();
    let time = app
        .metrics
        .request_seconds
        .get_or_create(&RouteLabel { route });
    time.observe(seconds);
    tracing::info!(
        %method, path, status, seconds, peer = %peer.address,
        id = id.to_str().unwrap_or_default(), "answered"
    );
    response
}

/// The client's own number if it is one, else a new one.
fn request_id(request: &Request) -> HeaderValue {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    if let Some(id) = request.headers().get(&REQUEST_ID)
        && (1..=128).contains(&id.len())
        && id.as_bytes().iter().all(u8::is_ascii_graphic)
    {
        return id.clone();
    }
    let random = RandomState::new().build_hasher().finish();
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let id = format!("{random:016x}-{count}");
    HeaderValue::from_str(&id).unwrap_or(HeaderValue::from_static("none"))
}

/// Finds out who asks; without a valid key nobody may.
pub(crate) async fn authenticate(
    State(app): State<Arc<App>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    mut request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let client = app
        .options
        .keys
        .client(request.headers(), peer.address.ip())?;
    request.extensions_mut().insert(client);
    Ok(next.run(request).await)
}

/// Refuses what other origins' web pages send without having asked: forms reach a server on loopback
/// although the page cannot read the answer.
pub(crate) async fn same_origin(
    State(app): State<Arc<App>>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    // A page whose own name was made to mean this machine (DNS rebinding) looks like ours; but on
    // loopback nobody without a key has a reason to call the server by such a name.
    let private = app.options.keys.is_empty() && app.options.address.ip().is_loopback();
    let allowed = from_here(&request, &app.options.cors, private);
    if !allowed && request.method() != Method::OPTIONS {
        return Err(ApiError::new(
            StatusCode::FORBIDDEN,
            "origin_not_allowed",
            "web pages of other origins may not use this server; start it with --cors ORIGIN",
        ));
    }
    Ok(next.run(request).await)
}

/// Whether a request comes from no web page, from our own or from one of a listed origin. A `private`
/// server's own page has an address for a name.
fn from_here(request: &Request, listed: &[String], private: bool) -> bool {
    let text = |name: HeaderName| request.headers().get(name)?.to_str().ok();
    let Some(origin) = text(header::ORIGIN) else {
        return true;
    };
    let host = origin.split_once("://").map(|(_, host)| host);
    let own = host == text(header::HOST) && (!private || host.is_some_and(is_address));
    own || listed
        .iter()
        .any(|listed| listed == "*" || listed == origin)
}

/// Whether `HOST` or `HOST:PORT` is an IP address or this machine's own name.
fn is_address(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    let bare = name.trim_start_matches('[').trim_end_matches(']');
    bare.parse::<IpAddr>().is_ok() || name == "localhost" || name.ends_with(".localhost")
}

/// What browsers are told about other origins: nothing, unless some are listed.
pub(crate) fn cors(origins: &[String]) -> CorsLayer {
    let layer = CorsLayer::new();
    if origins.is_empty() {
        return layer;
    }
    let origins: Vec<HeaderValue> = origins.iter().filter_map(|o| o.parse().ok()).collect();
    let allowed = match origins.iter().any(|o| o == "*") {
        true => AllowOrigin::any(),
        false => AllowOrigin::list(origins),
    };
    layer
        .allow_origin(allowed)
        .allow_methods([Method::GET, Method::POST])
        .allow_headers([
            header::AUTHORIZATION,
            header::CONTENT_TYPE,
            HeaderName::from_static("x-api-key"),
            REQUEST_ID,
        ])
        .expose_headers(AnyHeader)
}

/// A handler's panic is that request's misfortune.
pub(crate) fn panicked(_: Box<dyn Any + Send>) -> Response<Body> {
    tracing::error!("a handler panicked");
    ApiError::internal().into_response()
}

/// How the server is.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct Health {
    /// `ready`, `loading` or `stopping`.
    pub(crate) status: String,
    pub(crate) version: String,
    pub(crate) model: Option<String>,
    pub(crate) variants: Vec<String>,
    /// Requests that wait or run.
    pub(crate) jobs: usize,
}

/// Whether the server takes requests: 200 when ready, 503 otherwise, with the same body.
#[utoipa::path(
    get,
    path = "/health",
    tag = "Operation",
    responses(
        (status = 200, description = "Ready", body = Health),
        (status = 503, description = "Loading or stopping", body = Health),
    )
)]
pub(crate) async fn health(State(app): State<Arc<App>>) -> Response {
    let engine = app.engine.get();
    let draining = app.draining.load(Ordering::SeqCst);
    let (status, word) = match (engine, draining) {
        (_, true) => (StatusCode::SERVICE_UNAVAILABLE, "stopping"),
        (None, _) => (StatusCode::SERVICE_UNAVAILABLE, "loading"),
        (Some(_), _) => (StatusCode::OK, "ready"),
    };
    let pipelines = engine.map_or(&[][..], |engine| engine.pipelines());
    let health = Health {
        status: word.to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        model: pipelines.first().map(|p| p.name().to_owned()),
        variants: pipelines.iter().map(|p| p.variant().name.clone()).collect(),
        jobs: engine.map_or(0, |engine| engine.jobs()),
    };
    (status, Json(health)).into_response()
}

/// Whether the process lives: always 200.
#[utoipa::path(
    get,
    path = "/health/live",
    tag = "Operation",
    responses((status = 200, description = "Alive", body = String, content_type = "text/plain"))
)]
pub(crate) async fn live() -> &'static str {
    "alive\n"
}

/// Metrics for Prometheus.
#[utoipa::path(
    get,
    path = "/metrics",
    tag = "Operation",
    responses((status = 200, description = "OpenMetrics text", body = String, content_type = "text/plain"))
)]
pub(crate) async fn metrics(State(app): State<Arc<App>>) -> Response {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], app.metrics.render()).into_response()
}

#[cfg(test)]
mod tests {
    use super::is_address;

    #[test]
    fn addresses_and_this_machine_are_no_names_of_others() {
        for address in [
            "127.0.0.1:8080",
            "127.0.0.1",
            "[::1]:8080",
            "[::1]",
            "192.168.1.7:80",
            "localhost:8080",
            "localhost",
            "a.localhost:1",
        ] {
            assert!(is_address(address), "{address}");
        }
        for name in [
            "evil.example:8080",
            "evil.example",
            "localhost.evil.example",
            "",
            "127.0.0.1.evil.example",
        ] {
            assert!(!is_address(name), "{name}");
        }
    }
}
