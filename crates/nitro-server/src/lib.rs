//! An HTTP image service over the nitro pipeline.
//!
//! A request's way: [`http`](self) middleware names it and asks for its key, `parse` reads it, `openai`
//! or `a1111` turn it into a wish, `app` checks that against the limits and queues it as a job of the
//! `engine`, whose one thread denoises the pictures of many jobs together, step by step, and hands
//! them back as events, which become one answer or a stream.
//!
//! [`Server::bind`] and [`Server::run`] are the whole library.

mod a1111;
mod app;
mod client;
mod engine;
mod error;
mod http;
mod images;
mod metrics;
mod openai;
mod openapi;
mod options;
mod page;
mod parse;
mod server;
mod shares;

pub use client::{KeyError, Keys};
pub use engine::EngineOptions;
pub use options::{RequestLimits, ServerOptions};
pub use server::{ServeError, Server, Stopper};
pub use shares::ClientLimits;

/// The readers of request bodies, for fuzzing: none may panic, whatever the bytes.
#[doc(hidden)]
pub mod readers {
    use axum::body::Bytes;

    /// `/v1/images/generations`: whether the body can be meant.
    pub fn generation(body: &[u8]) -> bool {
        let read = crate::openai::types::generation(body);
        read.is_ok_and(|p| p.answer().is_ok() && p.wish(None).is_ok())
    }

    /// `/v1/images/edits`, the pictures included.
    pub fn edit(content_type: &str, body: &[u8]) -> bool {
        let body = Bytes::copy_from_slice(body);
        let runtime = tokio::runtime::Builder::new_current_thread().build();
        let Ok(runtime) = runtime else { return false };
        let read = runtime.block_on(crate::openai::types::edit(content_type, body));
        read.is_ok_and(|edit| edit.init().is_ok() && edit.parameters.wish(None).is_ok())
    }

    /// `/sdapi/v1/txt2img` and, where there is a picture, `img2img`.
    pub fn a1111(body: &[u8]) -> bool {
        crate::a1111::types::request(body).is_ok_and(|request| {
            request.wish(None);
            request.init().is_ok()
        })
    }

    /// A picture inside a request.
    pub fn picture(bytes: &[u8]) -> bool {
        crate::images::decode("image", bytes).is_ok()
    }
}
