//! Bodies of requests, within the server's limits of size, time and memory.

use std::sync::Arc;

use axum::body::{Bytes, to_bytes};
use axum::extract::Request;
use axum::http::{StatusCode, header};
use nitro_api::ApiError;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout_at};

use crate::options::RequestLimits;

/// A place for bodies is counted in these units of bytes.
const UNIT: usize = 1024;

/// Bodies of so many largest requests are in memory at once; others wait for room.
const LARGEST_AT_ONCE: usize = 4;

/// Room for the bodies of all requests together.
#[derive(Debug)]
pub(crate) struct Bodies {
    limits: RequestLimits,
    room: Arc<Semaphore>,
}

/// A body, and the room it takes until it is dropped.
#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) bytes: Bytes,
    _room: OwnedSemaphorePermit,
}

impl Bodies {
    pub(crate) fn new(limits: RequestLimits) -> Self {
        let room = Arc::new(Semaphore::new(
            units(limits.body_bytes) as usize * LARGEST_AT_ONCE,
        ));
        Self { limits, room }
    }

    /// Reads a request's body.
    pub(crate) async fn read(&self, request: Request) -> Result<Held, ApiError> {
        let limit = self.limits.body_bytes;
        let until = Instant::now() + self.limits.body_time;
        let too_large = || {
            ApiError::new(
                StatusCode::PAYLOAD_TOO_LARGE,
                "body_too_large",
                format!("the request's body is larger than {limit} bytes, this server's limit"),
            )
        };
        let announced = request.headers().get(header::CONTENT_LENGTH);
        let announced = announced.and_then(|v| v.to_str().ok()?.parse::<usize>().ok());
        if announced.is_some_and(|length| length > limit) {
            return Err(too_large());
        }
        let wanted = units(announced.unwrap_or(limit));
        let room = self.room.clone().acquire_many_owned(wanted);
        let Ok(Ok(room)) = timeout_at(until, room).await else {
            return Err(ApiError::busy(
                "too many large requests at once; ask again in a moment",
            ));
        };
        match timeout_at(until, to_bytes(request.into_body(), limit)).await {
            Err(_) => Err(ApiError::new(
                StatusCode::REQUEST_TIMEOUT,
                "body_timeout",
                format!(
                    "the request's body did not arrive within {} s",
                    self.limits.body_time.as_secs()
                ),
            )),
            // Either the limit or the connection: only the first has somebody to tell.
            Ok(Err(error)) if announced.is_some() => Err(ApiError::new(
                StatusCode::BAD_REQUEST,
                "incomplete_body",
                format!("the request's body could not be read: {error}"),
            )),
            Ok(Err(_)) => Err(too_large()),
            Ok(Ok(bytes)) => Ok(Held { bytes, _room: room }),
        }
    }

    /// Reads a body that must be announced as JSON. Web pages of other origins can only send other types
    /// without asking first.
    pub(crate) async fn read_json(&self, request: Request) -> Result<Held, ApiError> {
        let kind = content_type(&request).to_ascii_lowercase();
        let kind = kind.split(';').next().unwrap_or_default().trim();
        match kind == "application/json" || kind.ends_with("+json") {
            true => self.read(request).await,
            false => Err(ApiError::new(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "unsupported_media_type",
                "send JSON, with the header `content-type: application/json`",
            )),
        }
    }
}

fn units(bytes: usize) -> u32 {
    u32::try_from(bytes.div_ceil(UNIT)).unwrap_or(u32::MAX >> 4)
}

/// The content type of a request, empty if it has none.
pub(crate) fn content_type(request: &Request) -> String {
    let value = request.headers().get(header::CONTENT_TYPE);
    let value = value.and_then(|value| value.to_str().ok());
    value.unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::body::Body;
    use std::time::Duration;

    #[test]
    fn bodies_wait_for_room_and_not_for_ever() {
        let bodies = Bodies::new(RequestLimits {
            body_bytes: 1000,
            body_time: Duration::from_millis(50),
            ..RequestLimits::default()
        });
        let request = |length: usize| {
            Request::builder()
                .header(header::CONTENT_LENGTH, length)
                .body(Body::from(vec![b'x'; length]))
                .unwrap()
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap();
        runtime.block_on(async {
            let mut held = Vec::new();
            for _ in 0..LARGEST_AT_ONCE {
                held.push(bodies.read(request(1000)).await.unwrap());
            }
            let refused = bodies.read(request(10)).await.unwrap_err();
            assert_eq!(refused.detail().code.as_deref(), Some("busy"));
            drop(held.pop());
            assert_eq!(bodies.read(request(10)).await.unwrap().bytes.len(), 10);
            let error = bodies.read(request(1001)).await.unwrap_err();
            assert_eq!(error.detail().code.as_deref(), Some("body_too_large"));
        });
    }
}
