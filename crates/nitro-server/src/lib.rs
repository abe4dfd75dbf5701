//! An HTTP image service over the nitro pipeline.
//!
//! A request's way: [`http`](self) middleware names it and asks for its key, `openai` or `a1111` read it
//! with [`nitro_api`] into a wish, `app` checks that against the limits and queues it as a job of the
//! `engine`, whose one thread denoises the pictures of many jobs together, step by step, and hands
//! them back as events, which become one answer or a stream.
//!
//! [`Server::bind`] and [`Server::run`] are the whole library.

mod a1111;
mod app;
mod client;
mod engine;
mod http;
mod images;
mod metrics;
mod openai;
mod openapi;
mod options;
mod page;
mod refusals;
mod server;
mod shares;

pub use client::{KeyError, Keys};
pub use engine::EngineOptions;
pub use options::{RequestLimits, ServerOptions};
pub use server::{ServeError, Server, Stopper};
pub use shares::ClientLimits;
