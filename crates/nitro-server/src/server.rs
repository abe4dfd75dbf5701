//! A server's life: bind, load, serve, drain, stop.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::routing::{get, post};
use axum::{Json, Router, middleware};
use nitro_pipeline::Pipeline;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tower_http::catch_panic::CatchPanicLayer;
use utoipa::OpenApi as _;

use crate::app::{self, App};
use crate::engine::Engine;
use crate::http::connection::{Bounded, Peer};
use crate::openapi::Api;
use crate::options::ServerOptions;
use crate::{a1111, http, openai, page};

/// After the grace, connections get this long to be told.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Why a server did not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Other machines would reach a server without keys.
    #[error(
        "{address} can be reached from other machines, and there is no API key: anybody could use \
         this server. Give keys, listen on 127.0.0.1, or allow it explicitly"
    )]
    Open {
        /// Where it would have listened.
        address: SocketAddr,
    },
    /// The address is taken, or not ours.
    #[error("cannot listen on {address}: {source}")]
    Bind {
        /// Where it would have listened.
        address: SocketAddr,
        /// Why not.
        source: std::io::Error,
    },
    /// The system gave no thread, timer or socket.
    #[error("cannot run the server: {0}")]
    System(#[from] std::io::Error),
    /// There is nothing to serve.
    #[error("no model was loaded")]
    NoModel,
}

/// A bound server, ready to run.
#[derive(Debug)]
pub struct Server {
    options: ServerOptions,
    listener: std::net::TcpListener,
    address: SocketAddr,
    stop: watch::Sender<u32>,
    signals: bool,
}

/// Stops a running server: asked once, it finishes what runs; asked again, it ends at once.
#[derive(Clone, Debug)]
pub struct Stopper(watch::Sender<u32>);

impl Stopper {
    /// Asks the server to stop.
    pub fn stop(&self) {
        self.0.send_modify(|asked| *asked += 1);
    }
}

impl Server {
    /// Takes the address. Nothing is answered before [`Server::run`].
    pub fn bind(options: ServerOptions) -> Result<Self, ServeError> {
        let address = options.address;
        if !address.ip().is_loopback() && options.keys.is_empty() && !options.allow_anonymous {
            return Err(ServeError::Open { address });
        }
        let failed = |source| ServeError::Bind { address, source };
        let listener = std::net::TcpListener::bind(address).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        Ok(Self {
            options,
            listener,
            address,
            stop: watch::Sender::new(0),
            signals: false,
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What stops it.
    pub fn stopper(&self) -> Stopper {
        Stopper(self.stop.clone())
    }

    /// Lets Ctrl-C and SIGTERM stop it: the first finishes what runs, the second ends at once.
    pub fn stop_on_signals(mut self) -> Self {
        self.signals = true;
        self
    }

    /// Loads the models with `load`, calls `ready`, and serves until it is stopped. Until the models
    /// are there it answers that it is loading. The models are variants of one, the default first.
    pub fn run<E: From<ServeError> + Send + 'static>(
        self,
        load: impl FnOnce() -> Result<Vec<Pipeline>, E> + Send + 'static,
        ready: impl FnOnce() + Send + 'static,
    ) -> Result<(), E> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .max_blocking_threads(16)
            .thread_name("nitro-http")
            .enable_all()
            .build()
            .map_err(ServeError::System)?;
        let result = runtime.block_on(self.serve(load, ready));
        // Whoever still computes for a client that is gone is not waited for.
        runtime.shutdown_background();
        result
    }

    async fn serve<E: From<ServeError> + Send + 'static>(
        self,
        load: impl FnOnce() -> Result<Vec<Pipeline>, E> + Send + 'static,
        ready: impl FnOnce() + Send + 'static,
    ) -> Result<(), E> {
        let (grace, connections) = (self.options.grace, self.options.connections);
        let listener = TcpListener::from_std(self.listener).map_err(ServeError::System)?;
        if self.signals {
            tokio::spawn(signals(Stopper(self.stop.clone())));
        }
        let app = Arc::new(App::new(self.options));
        let listener = Bounded::new(listener, connections, app.metrics.connections.clone());

        let loading = app.clone();
        let mut loaded = tokio::task::spawn_blocking(move || -> Result<(), E> {
            let pipelines = load()?;
            if pipelines.is_empty() {
                return Err(ServeError::NoModel.into());
            }
            let options = loading.options.engine.clone();
            let engine = Engine::start(pipelines, options, loading.metrics.clone())
                .map_err(ServeError::System)?;
            let _ = loading.engine.set(engine);
            ready();
            Ok(())
        });

        let (drain, drained) = watch::channel(false);
        let routes = router(&app).into_make_service_with_connect_info::<Peer>();
        let serving = axum::serve(listener, routes).with_graceful_shutdown(until(drained));
        let mut serving = tokio::spawn(async move { serving.await });

        let mut asked = self.stop.subscribe();
        let mut outcome = Ok(());
        tokio::select! {
            // A model that cannot be loaded ends the server; one that is loaded does not.
            failed = async {
                match (&mut loaded).await {
                    Ok(Ok(())) => std::future::pending().await,
                    Ok(Err(error)) => error,
                    Err(error) => ServeError::System(std::io::Error::other(error)).into(),
                }
            } => outcome = Err(failed),
            _ = asked.wait_for(|asked| *asked > 0) => {}
        }

        app.draining.store(true, Ordering::SeqCst);
        if let Some(engine) = app.engine.get() {
            tracing::info!(jobs = engine.jobs(), "stopping");
            engine.drain();
        }
        drain.send_replace(true);
        let again = asked.wait_for(|asked| *asked > 1);
        tokio::select! {
            _ = &mut serving => return outcome,
            _ = again => {}
            () = tokio::time::sleep(grace) => {}
        }
        // The rest is told that the server stops, and has a moment to hear it.
        if let Some(engine) = app.engine.get() {
            engine.stop();
        }
        let _ = tokio::time::timeout(LAST_WORDS, &mut serving).await;
        serving.abort();
        outcome
    }
}

async fn until(mut flag: watch::Receiver<bool>) {
    // A sender that is gone means the same.
    let _ = flag.wait_for(|flag| *flag).await;
}

/// Passes signals on.
async fn signals(stopper: Stopper) {
    #[cfg(unix)]
    let mut terminate = {
        use tokio::signal::unix::{SignalKind, signal};
        match signal(SignalKind::terminate()) {
            Ok(terminate) => terminate,
            Err(error) => return tracing::error!(%error, "cannot listen for SIGTERM"),
        }
    };
    loop {
        #[cfg(unix)]
        tokio::select! {
            _ = tokio::signal::ctrl_c() => {}
            _ = terminate.recv() => {}
        }
        #[cfg(not(unix))]
        let _ = tokio::signal::ctrl_c().await;
        stopper.stop();
    }
}

/// All routes.
fn router(app: &Arc<App>) -> Router {
    let keyed = |routes: Router<Arc<App>>| {
        routes
            .route_layer(middleware::from_fn_with_state(
                app.clone(),
                http::authenticate,
            ))
            .route_layer(middleware::from_fn_with_state(
                app.clone(),
                http::same_origin,
            ))
    };
    let openai = Router::new()
        .route("/v1/images/generations", post(openai::generations))
        .route("/v1/images/edits", post(openai::edits))
        .route("/v1/models", get(openai::models));
    Router::new()
        .merge(keyed(openai))
        .merge(keyed(a1111::routes()).layer(middleware::map_response(a1111::reword)))
        .merge(page::routes())
        .route("/health", get(http::health))
        .route("/health/ready", get(http::health))
        .route("/health/live", get(http::live))
        .route("/metrics", get(http::metrics))
        .route("/openapi.json", get(|| async { Json(Api::openapi()) }))
        .fallback(app::no_route)
        .method_not_allowed_fallback(app::no_method)
        .layer(CatchPanicLayer::custom(http::panicked))
        .layer(http::cors(&app.options.cors))
        .layer(middleware::from_fn_with_state(app.clone(), http::observe))
        .with_state(app.clone())
}
