//! The page at `/`: three files, part of the program.

use std::sync::Arc;

use axum::Router;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use axum::routing::get;

use crate::app::App;

/// Only what comes from this server, and pictures the page itself made.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; \
                      img-src 'self' blob: data:; connect-src 'self'; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

pub(crate) fn routes() -> Router<Arc<App>> {
    let html = || {
        file(
            "text/html; charset=utf-8",
            include_str!("../page/index.html"),
        )
    };
    let css = || file("text/css; charset=utf-8", include_str!("../page/style.css"));
    let js = |text: &'static str| file("text/javascript; charset=utf-8", text);
    Router::new()
        .route("/", get(move || async move { html() }))
        .route("/style.css", get(move || async move { css() }))
        .route(
            "/app.js",
            get(move || async move { js(include_str!("../page/app.js")) }),
        )
        .route(
            "/gallery.js",
            get(move || async move { js(include_str!("../page/gallery.js")) }),
        )
        .route(
            "/api.js",
            get(move || async move { js(include_str!("../page/api.js")) }),
        )
}

fn file(kind: &'static str, text: &'static str) -> Response {
    let headers = [
        (header::CONTENT_TYPE, kind),
        (header::CACHE_CONTROL, "no-cache"),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
    ];
    (headers, text).into_response()
}
