//! What all handlers share, and the way from a client's wish to a job.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::http::StatusCode;
use nitro_api::picture::OutputFormat;
use nitro_api::{ApiError, Start, Wish};
use nitro_pipeline::picture::Parameters;
use nitro_pipeline::{InitImage, Pipeline, Request, Truncation};

use tokio::sync::Semaphore;

use crate::client::Client;
use crate::engine::{Engine, Event, Job, Refusal, Source, Ticket};
use crate::http::body::Bodies;
use crate::images;
use crate::metrics::Metrics;
use crate::options::ServerOptions;
use crate::shares::{Pass, Shares};

/// Decoding a picture takes up to some hundred MiB for a moment.
const DECODED_AT_ONCE: usize = 2;

/// The state of a running server.
pub(crate) struct App {
    pub(crate) options: ServerOptions,
    /// Absent while the model is being loaded.
    pub(crate) engine: OnceLock<Engine>,
    pub(crate) shares: Shares,
    pub(crate) bodies: Bodies,
    /// Pictures of clients that are decoded at once.
    decoding: Arc<Semaphore>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) draining: AtomicBool,
    /// Unix time at which the server was started; models were "created" then.
    pub(crate) started: u64,
}

/// A wish the engine has accepted.
pub(crate) struct Order {
    pub(crate) request: Request,
    pub(crate) pipeline: usize,
    pub(crate) seed: u64,
    pub(crate) ticket: Ticket,
    pub(crate) deadline: tokio::time::Instant,
    pub(crate) timeout: Duration,
    _pass: Pass,
}

/// A finished picture.
#[derive(Clone, Debug)]
pub(crate) struct Picture {
    pub(crate) file: Vec<u8>,
    pub(crate) seed: u64,
    pub(crate) parameters: Parameters,
}

/// All pictures of an order.
#[derive(Debug, Default)]
pub(crate) struct Finished {
    /// In order; fewer than asked for after an interruption.
    pub(crate) pictures: Vec<Picture>,
    pub(crate) truncations: Vec<Truncation>,
}

impl App {
    pub(crate) fn new(options: ServerOptions) -> Self {
        Self {
            shares: Shares::new(options.client_limits),
            bodies: Bodies::new(options.limits),
            decoding: Arc::new(Semaphore::new(DECODED_AT_ONCE)),
            engine: OnceLock::new(),
            metrics: Arc::new(Metrics::new()),
            draining: AtomicBool::new(false),
            started: unix_time(),
            options,
        }
    }

    /// The engine, once the model is loaded.
    pub(crate) fn engine(&self) -> Result<&Engine, ApiError> {
        if self.draining.load(Ordering::SeqCst) {
            return Err(ApiError::stopping());
        }
        self.engine.get().ok_or_else(ApiError::loading)
    }

    /// The pipeline with this number.
    pub(crate) fn pipeline(&self, number: usize) -> Result<&Pipeline, ApiError> {
        let engine = self.engine.get().ok_or_else(ApiError::loading)?;
        engine
            .pipelines()
            .get(number)
            .ok_or_else(ApiError::internal)
    }

    /// Decodes the picture a wish starts from, and cuts it to the size of the pictures that will come of
    /// it: what waits in the queue is no larger than that.
    pub(crate) async fn start(
        &self,
        wish: &Wish,
        decode: impl FnOnce() -> Result<Start, ApiError> + Send + 'static,
    ) -> Result<Start, ApiError> {
        // Nothing is decoded for a wish that would be refused.
        let engine = self.engine()?;
        self.check(wish)?;
        let variant = self.variant(engine, wish.variant.as_deref())?;
        let own = self.pipeline(variant)?.variant().resolution;
        let side = match wish.size {
            Some((width, height)) if width == height && width > 0 => width,
            _ => own,
        };
        // It is never closed.
        let turn = self.decoding.clone().acquire_owned().await;
        aside(move || {
            // The work goes on where the client has left meanwhile: its turn lasts as long.
            let _turn = turn;
            let Start {
                image,
                strength,
                mask,
            } = decode()?;
            let fitted = InitImage {
                image,
                strength,
                mask,
            }
            .fitted(side)
            .map_err(|error| Refusal::Impossible(error.into()))?;
            Ok(Start {
                image: fitted.image,
                strength,
                mask: fitted.mask,
            })
        })
        .await
    }

    /// Checks a wish against the server's limits and the model, and queues it.
    pub(crate) fn order(
        &self,
        wish: Wish,
        client: &Client,
        source: Source,
    ) -> Result<Order, ApiError> {
        let engine = self.engine()?;
        let pipeline = self.variant(engine, wish.variant.as_deref())?;
        self.check(&wish)?;
        let seed = wish.seed.unwrap_or_else(random_seed);
        let init = wish.start.map(|start| InitImage {
            image: start.image,
            strength: start.strength,
            mask: start.mask,
        });
        let request = Request {
            negative_prompts: match wish.negative_prompt.is_empty() {
                true => Vec::new(),
                false => vec![wish.negative_prompt],
            },
            images_per_prompt: wish.pictures,
            steps: wish.steps,
            guidance_scale: wish.guidance,
            width: wish.size.map(|size| size.0),
            height: wish.size.map(|size| size.1),
            init,
            ..Request::new(wish.prompt).seed(seed)
        };
        let pass = self.shares.enter(client, request.pictures())?;
        let ticket = engine.submit(Job {
            pipeline,
            request: request.clone(),
            previews: wish.previews,
            client: client.clone(),
            source,
        })?;
        let timeout = self.options.timeout;
        Ok(Order {
            request,
            pipeline,
            seed,
            ticket,
            deadline: tokio::time::Instant::now() + timeout,
            timeout,
            _pass: pass,
        })
    }

    fn variant(&self, engine: &Engine, wanted: Option<&str>) -> Result<usize, ApiError> {
        let Some(wanted) = wanted else { return Ok(0) };
        let names = || engine.pipelines().iter().map(|p| p.variant().name.as_str());
        names().position(|name| name == wanted).ok_or_else(|| {
            let known: Vec<&str> = names().collect();
            ApiError::bad(
                "variant",
                format!(
                    "this server has no variant `{wanted}`; it has {}",
                    known.join(", ")
                ),
            )
        })
    }

    fn check(&self, wish: &Wish) -> Result<(), ApiError> {
        let limits = &self.options.limits;
        let at_most = |param: &str, found: usize, limit: usize| match found > limit {
            true => Err(ApiError::bad(
                param,
                format!("`{param}` is {found}; this server allows at most {limit}"),
            )),
            false => Ok(()),
        };
        if wish.pictures == 0 {
            return Err(ApiError::bad("n", "`n` is 0; ask for at least one picture"));
        }
        at_most("n", wish.pictures, limits.pictures)?;
        at_most("num_inference_steps", wish.steps.unwrap_or(0), limits.steps)?;
        let (width, height) = wish.size.unwrap_or_default();
        at_most("size", width.max(height), limits.side)?;
        for (param, text) in [
            ("prompt", &wish.prompt),
            ("negative_prompt", &wish.negative_prompt),
        ] {
            if text.len() > limits.prompt_bytes {
                return Err(ApiError::bad(
                    param,
                    format!(
                        "`{param}` has {} bytes; this server allows at most {}",
                        text.len(),
                        limits.prompt_bytes
                    ),
                ));
            }
        }
        Ok(())
    }
}

impl Order {
    /// The next event, or the error that ends the order.
    pub(crate) async fn next(&mut self) -> Result<Event, ApiError> {
        match tokio::time::timeout_at(self.deadline, self.ticket.events.recv()).await {
            Err(_) => Err(ApiError::timeout(self.timeout)),
            // The engine says a last word to everybody; without one it crashed.
            Ok(None) => Err(ApiError::internal()),
            Ok(Some(Event::Failed(failure))) => Err(failure.into()),
            Ok(Some(event)) => Ok(event),
        }
    }

    /// Waits for all pictures.
    pub(crate) async fn finish(
        mut self,
        app: &App,
        format: OutputFormat,
        quality: u8,
    ) -> Result<Finished, ApiError> {
        let count = self.request.pictures();
        let mut pictures: Vec<(usize, Picture)> = Vec::new();
        let mut finished = Finished::default();
        while pictures.len() < count {
            match self.next().await? {
                Event::Started { truncations } => finished.truncations = truncations,
                Event::Picture {
                    picture,
                    image,
                    steps,
                } => {
                    let made = self.picture(app, picture, image, steps, format, quality);
                    pictures.push((picture, made.await?));
                }
                Event::Interrupted => break,
                _ => {}
            }
        }
        pictures.sort_by_key(|(number, _)| *number);
        finished.pictures = pictures.into_iter().map(|(_, picture)| picture).collect();
        Ok(finished)
    }

    /// A finished picture as a file with its parameters.
    pub(crate) async fn picture(
        &self,
        app: &App,
        number: usize,
        image: image::RgbImage,
        steps: usize,
        format: OutputFormat,
        quality: u8,
    ) -> Result<Picture, ApiError> {
        // The request counts its pictures' seeds up in the same way.
        let seed = self.seed.wrapping_add(number as u64);
        let mut plan = self.ticket.plan.clone();
        plan.steps = steps;
        let pipeline = app.pipeline(self.pipeline)?;
        let parameters = pipeline.parameters(&self.request, &plan, 0, seed);
        let file = encoded(image, Some(parameters.clone()), format, quality).await?;
        Ok(Picture {
            file,
            seed,
            parameters,
        })
    }
}

/// Encodes a picture aside from the threads that serve connections.
pub(crate) async fn encoded(
    image: image::RgbImage,
    parameters: Option<Parameters>,
    format: OutputFormat,
    quality: u8,
) -> Result<Vec<u8>, ApiError> {
    aside(move || {
        images::encode(&image, parameters.as_ref(), format, quality).map_err(|error| {
            tracing::error!(%error, "cannot encode a picture");
            ApiError::internal()
        })
    })
    .await
}

/// Runs work that computes aside from the threads that serve connections.
pub(crate) async fn aside<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => {
            tracing::error!(%error, "a helper task failed");
            Err(ApiError::internal())
        }
    }
}

/// 32 bits, so that the seed means the same to every tool.
pub(crate) fn random_seed() -> u64 {
    RandomState::new().build_hasher().finish() & 0xffff_ffff
}

/// Seconds since 1970.
pub(crate) fn unix_time() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |time| time.as_secs())
}

/// What the server says to addresses it does not have.
pub(crate) async fn no_route(uri: axum::http::Uri) -> ApiError {
    ApiError::new(
        StatusCode::NOT_FOUND,
        "not_found",
        format!(
            "there is nothing at {}; /openapi.json lists what is",
            uri.path()
        ),
    )
}

/// What the server says to methods an address does not have.
pub(crate) async fn no_method(method: axum::http::Method, uri: axum::http::Uri) -> ApiError {
    ApiError::new(
        StatusCode::METHOD_NOT_ALLOWED,
        "method_not_allowed",
        format!(
            "{} does not take {method}; /openapi.json lists what it takes",
            uri.path()
        ),
    )
}
