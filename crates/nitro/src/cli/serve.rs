//! `nitro serve`: the HTTP image service.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use nitro::Pipeline;
use nitro_server::{
    ClientLimits, EngineOptions, Keys, RequestLimits, ServeError, Server, ServerOptions,
};
use tracing_subscriber::EnvFilter;

use super::failure::{bad_input, say};
use super::model_args::ModelArgs;
use super::progress::Progress;

/// Arguments of `nitro serve`.
#[derive(Args)]
pub(super) struct ServeArgs {
    /// Address to listen on; one that other machines reach needs --keys
    #[arg(long, default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST), value_name = "ADDRESS")]
    host: IpAddr,
    /// Port to listen on; 0 takes a free one
    #[arg(short, long, default_value_t = 8080, value_name = "PORT")]
    port: u16,
    /// File of API keys, one per line, optionally after a name and a space
    #[arg(long, env = "NITRO_KEYS", value_name = "FILE")]
    keys: Option<PathBuf>,
    /// Listen on an address that other machines reach although there is no key
    #[arg(long)]
    allow_anonymous: bool,
    /// Name of the model in the OpenAI API [default: the model's own]
    #[arg(long, value_name = "NAME")]
    model_name: Option<String>,
    /// Another name for the model, for clients that insist on one (repeatable)
    #[arg(long, value_name = "NAME")]
    alias: Vec<String>,
    /// Another variant to load and serve beside the default one (repeatable)
    #[arg(long, value_name = "NAME")]
    also: Vec<String>,
    /// Most pictures denoised together; 1 switches batching off
    #[arg(long, default_value_t = 8, value_name = "N", value_parser = at_least_one)]
    max_batch: usize,
    /// Milliseconds that an idle server waits for company of a request
    #[arg(long, default_value_t = 0, value_name = "MS")]
    max_wait: u64,
    /// Most pictures that wait
    #[arg(long, default_value_t = 64, value_name = "N")]
    max_queue: usize,
    /// Memory for encoded prompts, in MiB; a prompt takes 1 MiB in the full-size model
    #[arg(long, default_value_t = 256, value_name = "MIB")]
    prompt_cache: usize,
    /// Most pictures of a request
    #[arg(long, default_value_t = 10, value_name = "N", value_parser = at_least_one)]
    max_images: usize,
    /// Most denoising steps of a request
    #[arg(long, default_value_t = 100, value_name = "N", value_parser = at_least_one)]
    max_steps: usize,
    /// Longest side of a picture
    #[arg(long, default_value_t = 2048, value_name = "PIXELS")]
    max_size: usize,
    /// Largest body of a request, in MiB
    #[arg(long, default_value_t = 32, value_name = "MIB", value_parser = at_least_one)]
    max_body: usize,
    /// Most requests of one client (key, or address without keys) at once
    #[arg(long, value_name = "N")]
    client_requests: Option<usize>,
    /// Most pictures of one client per minute
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    client_rate: Option<u32>,
    /// Seconds until a request without its pictures is given up
    #[arg(long, default_value_t = 600, value_name = "SECONDS")]
    timeout: u64,
    /// Seconds that running requests get after Ctrl-C or SIGTERM
    #[arg(long, default_value_t = 30, value_name = "SECONDS")]
    grace: u64,
    /// Most open connections
    #[arg(long, default_value_t = 512, value_name = "N", value_parser = at_least_one)]
    max_connections: usize,
    /// Web origin that may call the API from a browser, * for all (repeatable)
    #[arg(long, value_name = "ORIGIN")]
    cors: Vec<String>,
    /// Log one JSON object per line
    #[arg(long)]
    log_json: bool,
    #[command(flatten)]
    model: ModelArgs,
}

fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) | Err(_) => Err("give a whole number of 1 or more".to_owned()),
        Ok(number) => Ok(number),
    }
}

/// Runs the command.
pub(super) fn run(args: ServeArgs) -> anyhow::Result<()> {
    args.log()?;
    let quiet = args.model.location.quiet;
    let server = Server::bind(args.options()?).map_err(|error| match error {
        ServeError::Open { .. } => {
            bad_input(format!("{error} (--keys, --host, --allow-anonymous)"))
        }
        error => error.into(),
    })?;
    let address = server.address();

    let load = move || -> anyhow::Result<Vec<Pipeline>> {
        let progress = Progress::new(quiet);
        let bytes = args.prompt_cache.saturating_mul(1 << 20);
        let builder = args.model.builder(None, &progress)?.prompt_cache(bytes);
        let loaded = builder.load_with(&args.also);
        progress.clear();
        Ok(loaded?)
    };
    let ready = move || say(format!("ready: http://{address}"));
    if !quiet {
        eprintln!("listening on http://{address}, loading the model");
    }
    server.stop_on_signals().run(load, ready)
}

impl ServeArgs {
    fn options(&self) -> anyhow::Result<ServerOptions> {
        let keys = match &self.keys {
            Some(path) => Keys::read(path).map_err(|error| bad_input(error.to_string()))?,
            None => Keys::default(),
        };
        Ok(ServerOptions {
            address: SocketAddr::new(self.host, self.port),
            keys,
            allow_anonymous: self.allow_anonymous,
            model_name: self.model_name.clone(),
            aliases: self.alias.clone(),
            command_line: self.model.command_line(),
            engine: EngineOptions {
                max_batch: self.max_batch,
                max_wait: Duration::from_millis(self.max_wait),
                max_queue: self.max_queue,
            },
            limits: RequestLimits {
                pictures: self.max_images,
                steps: self.max_steps,
                side: self.max_size,
                body_bytes: self.max_body << 20,
                ..RequestLimits::default()
            },
            client_limits: ClientLimits {
                requests: self.client_requests,
                pictures_per_minute: self.client_rate,
            },
            timeout: Duration::from_secs(self.timeout),
            grace: Duration::from_secs(self.grace),
            connections: self.max_connections,
            cors: self.cors.clone(),
        })
    }

    /// Logs go to standard error, as `RUST_LOG` says.
    fn log(&self) -> anyhow::Result<()> {
        let level = match self.model.location.quiet {
            true => "warn",
            false => "info",
        };
        let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
        let log = tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(std::io::stderr);
        let set = match self.log_json {
            true => log.json().try_init(),
            false => log.try_init(),
        };
        set.map_err(|error| anyhow::anyhow!("cannot write logs: {error}"))
    }
}
