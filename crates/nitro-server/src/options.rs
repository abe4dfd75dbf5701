//! How a server is set up.

use std::net::SocketAddr;
use std::time::Duration;

use crate::client::Keys;
use crate::engine::EngineOptions;
use crate::shares::ClientLimits;

/// How a server is set up; [`ServerOptions::default`] is right for one user on one machine.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// Where it listens. Port 0 takes a free one.
    pub address: SocketAddr,
    /// Keys that open it; without any everybody may ask.
    pub keys: Keys,
    /// Allows an address that other machines reach although there is no key.
    pub allow_anonymous: bool,
    /// Name of the model in the OpenAI API; the model's own by default.
    pub model_name: Option<String>,
    /// Further names that stand for the same model, for clients that insist on one.
    pub aliases: Vec<String>,
    /// What a command line of `nitro generate` needs to use the same model in the same way; the page
    /// shows it with its pictures.
    pub command_line: String,
    /// Batching and queueing.
    pub engine: EngineOptions,
    /// What one request may ask for.
    pub limits: RequestLimits,
    /// What one client may ask for.
    pub client_limits: ClientLimits,
    /// Most time from a request to its last picture.
    pub timeout: Duration,
    /// Time that running requests get when the server is asked to stop.
    pub grace: Duration,
    /// Most open connections; more wait to be accepted.
    pub connections: usize,
    /// Web origins that may call the API from a browser, besides the server's own page; `*` for all.
    pub cors: Vec<String>,
}

/// What one request may ask for.
#[derive(Clone, Copy, Debug)]
pub struct RequestLimits {
    /// Pictures.
    pub pictures: usize,
    /// Denoising steps.
    pub steps: usize,
    /// Pixels on a side.
    pub side: usize,
    /// Bytes of a prompt.
    pub prompt_bytes: usize,
    /// Bytes of a request's body, pictures included.
    pub body_bytes: usize,
    /// Time a client may take to send a body.
    pub body_time: Duration,
}

impl Default for RequestLimits {
    fn default() -> Self {
        Self {
            pictures: 10,
            steps: 100,
            side: 2048,
            prompt_bytes: 8000,
            body_bytes: 32 << 20,
            body_time: Duration::from_secs(30),
        }
    }
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            address: SocketAddr::from(([127, 0, 0, 1], 8080)),
            keys: Keys::default(),
            allow_anonymous: false,
            model_name: None,
            aliases: Vec::new(),
            command_line: String::new(),
            engine: EngineOptions::default(),
            limits: RequestLimits::default(),
            client_limits: ClientLimits::default(),
            timeout: Duration::from_secs(600),
            grace: Duration::from_secs(30),
            connections: 512,
            cors: Vec::new(),
        }
    }
}
