//! A streamed answer: OpenAI's server-sent events.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::response::sse::{self, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use futures_util::stream;
use nitro_api::openai::{Answer, ImageEvent, ProgressEvent};
use nitro_api::{ApiError, ErrorBody};
use serde::Serialize;

use super::{size, usage, warning};
use crate::app::{App, Order, encoded, unix_time};
use crate::engine::Event;

/// So often something is sent, that proxies keep the connection and a client that left is noticed.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// Answers an order with events; `kind` is `image_generation` or `image_edit`.
pub(super) fn respond(app: Arc<App>, order: Order, answer: Answer, kind: &'static str) -> Response {
    let left = order.request.pictures();
    let state = Streamed {
        app,
        order,
        answer,
        kind,
        left,
        ready: VecDeque::new(),
    };
    // The order lives in the stream: a client that leaves drops it, and the work stops.
    let events = stream::unfold(state, |mut state| async move {
        let event = state.next().await?;
        Some((Ok::<_, Infallible>(event), state))
    });
    let keep_alive = KeepAlive::new().interval(KEEP_ALIVE);
    let mut response = Sse::new(events).keep_alive(keep_alive).into_response();
    // nginx would hold events back otherwise.
    let name = axum::http::HeaderName::from_static("x-accel-buffering");
    let value = axum::http::HeaderValue::from_static("no");
    response.headers_mut().insert(name, value);
    response
}

struct Streamed {
    app: Arc<App>,
    order: Order,
    answer: Answer,
    kind: &'static str,
    /// Pictures to come.
    left: usize,
    ready: VecDeque<sse::Event>,
}

impl Streamed {
    async fn next(&mut self) -> Option<sse::Event> {
        while self.ready.is_empty() && self.left > 0 {
            if let Err(error) = self.advance().await {
                self.left = 0;
                let body = ErrorBody {
                    error: error.detail().clone(),
                };
                self.ready.push_back(event("error", &body));
            }
        }
        self.ready.pop_front()
    }

    /// Turns the order's next event into those of the stream.
    async fn advance(&mut self) -> Result<(), ApiError> {
        let event = self.order.next().await?;
        match event {
            Event::Queued { ahead } => self.progress(&ProgressEvent::Queued { ahead }),
            Event::Started { truncations } => {
                let warnings = truncations.iter().map(warning).collect();
                self.progress(&ProgressEvent::Started { warnings });
            }
            Event::Progress {
                picture,
                step,
                steps,
            } => self.progress(&ProgressEvent::Progress {
                image_index: picture,
                step,
                steps,
            }),
            Event::Preview {
                picture,
                index,
                image,
            } => {
                let Answer {
                    format,
                    jpeg_quality,
                    ..
                } = self.answer;
                let file = encoded(image, None, format, jpeg_quality).await?;
                let mut preview = self.event("partial_image", picture, &file);
                preview.partial_image_index = Some(index);
                self.push(preview);
            }
            Event::Picture {
                picture,
                image,
                steps,
            } => {
                let (format, quality) = (self.answer.format, self.answer.jpeg_quality);
                let made = self
                    .order
                    .picture(&self.app, picture, image, steps, format, quality)
                    .await?;
                let mut completed = self.event("completed", picture, &made.file);
                completed.usage = Some(usage(&self.app, &self.order)?);
                completed.seed = Some(made.seed);
                completed.parameters = Some(made.parameters.to_infotext());
                self.push(completed);
                self.left -= 1;
            }
            Event::Interrupted => self.left = 0,
            // The order has turned it into an error.
            Event::Failed(failure) => return Err(failure.into()),
        }
        Ok(())
    }

    fn event(&self, what: &str, picture: usize, file: &[u8]) -> ImageEvent {
        ImageEvent {
            kind: format!("{}.{what}", self.kind),
            b64_json: BASE64_STANDARD.encode(file),
            created_at: unix_time(),
            size: size(&self.order),
            quality: self.answer.quality.clone(),
            background: "opaque".to_owned(),
            output_format: self.answer.format,
            image_index: picture,
            partial_image_index: None,
            usage: None,
            seed: None,
            parameters: None,
        }
    }

    fn push(&mut self, data: ImageEvent) {
        self.ready.push_back(event(&data.kind, &data));
    }

    /// OpenAI's clients know no such events: only those who ask get them.
    fn progress(&mut self, progress: &ProgressEvent) {
        if self.answer.progress {
            let name = match progress {
                ProgressEvent::Queued { .. } => "nitro.queued",
                ProgressEvent::Started { .. } => "nitro.started",
                ProgressEvent::Progress { .. } => "nitro.progress",
            };
            self.ready.push_back(event(name, progress));
        }
    }
}

fn event(name: &str, data: &impl Serialize) -> sse::Event {
    // Our types are plain data; serialising them cannot fail.
    let data = serde_json::to_string(data).unwrap_or_default();
    sse::Event::default().event(name).data(data)
}
