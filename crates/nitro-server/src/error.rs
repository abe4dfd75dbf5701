//! What a client is told when it gets no picture, in OpenAI's form.

use std::time::Duration;

use axum::Json;
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use nitro_pipeline::PipelineError;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::client::Unauthorized;
use crate::engine::{Failure, Refusal};
use crate::shares::Exceeded;

/// An error answer.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct ErrorBody {
    pub(crate) error: ErrorDetail,
}

/// What went wrong.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct ErrorDetail {
    /// For people: what was wrong and what is expected.
    pub(crate) message: String,
    /// Kind of error: `invalid_request_error`, `authentication_error`, `rate_limit_error`,
    /// `server_error`.
    #[serde(rename = "type")]
    pub(crate) kind: String,
    /// The parameter at fault, if it is one.
    pub(crate) param: Option<String>,
    /// For programs.
    pub(crate) code: Option<String>,
    /// Requests before this one, where the queue had no room.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) queue_position: Option<usize>,
}

/// An error on its way to the client. Boxed: answers are mostly not errors.
#[derive(Clone, Debug)]
pub(crate) struct ApiError(Box<Inner>);

#[derive(Clone, Debug)]
struct Inner {
    status: StatusCode,
    detail: ErrorDetail,
    retry: Option<Duration>,
}

/// The position in the queue that a refused request would have had.
const QUEUE_POSITION: HeaderName = HeaderName::from_static("x-queue-position");

impl ApiError {
    pub(crate) fn new(status: StatusCode, code: &str, message: impl Into<String>) -> Self {
        let kind = match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => "authentication_error",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_client_error() => "invalid_request_error",
            _ => "server_error",
        };
        Self(Box::new(Inner {
            status,
            detail: ErrorDetail {
                message: message.into(),
                kind: kind.to_owned(),
                param: None,
                code: Some(code.to_owned()),
                queue_position: None,
            },
            retry: None,
        }))
    }

    /// A parameter has a value that cannot be used.
    pub(crate) fn bad(param: &str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_value", message).param(param)
    }

    pub(crate) fn param(mut self, param: &str) -> Self {
        self.0.detail.param = Some(param.to_owned());
        self
    }

    fn retry(mut self, after: Duration) -> Self {
        self.0.retry = Some(after);
        self
    }

    pub(crate) fn internal() -> Self {
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "internal_error",
            "the server failed on this request; the log has more under its x-request-id",
        )
    }

    pub(crate) fn stopping() -> Self {
        Self::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "stopping",
            "the server is stopping; ask another one, or again later",
        )
        .retry(Duration::from_secs(5))
    }

    pub(crate) fn loading() -> Self {
        Self::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "loading",
            "the model is being loaded; ask again in a moment",
        )
        .retry(Duration::from_secs(2))
    }

    pub(crate) fn timeout(after: Duration) -> Self {
        Self::new(
            StatusCode::GATEWAY_TIMEOUT,
            "timeout",
            format!(
                "no picture within {} s, the server's limit",
                after.as_secs()
            ),
        )
    }

    pub(crate) fn detail(&self) -> &ErrorDetail {
        &self.0.detail
    }

    /// The code, as a reason for metrics.
    pub(crate) fn reason(&self) -> &'static str {
        match self.0.status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => "key",
            StatusCode::TOO_MANY_REQUESTS if self.0.detail.queue_position.is_some() => "queue",
            StatusCode::TOO_MANY_REQUESTS => "limit",
            StatusCode::SERVICE_UNAVAILABLE => "unavailable",
            StatusCode::PAYLOAD_TOO_LARGE => "size",
            status if status.is_client_error() => "bad_request",
            _ => "server",
        }
    }

    /// The same headers around another body.
    pub(crate) fn respond(&self, body: impl IntoResponse) -> Response {
        let mut response = (self.0.status, body).into_response();
        let headers = response.headers_mut();
        if let Some(retry) = self.0.retry {
            let seconds = retry.as_secs_f64().ceil().max(1.0) as u64;
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if let Some(position) = self.0.detail.queue_position {
            headers.insert(QUEUE_POSITION, HeaderValue::from(position));
        }
        if self.0.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        // For middleware that words errors another way or counts them.
        response.extensions_mut().insert(self.clone());
        response
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let body = ErrorBody {
            error: self.0.detail.clone(),
        };
        self.respond(Json(body))
    }
}

impl From<Unauthorized> for ApiError {
    fn from(why: Unauthorized) -> Self {
        let message = match why {
            Unauthorized::Missing => {
                "this server wants an API key: send it as `Authorization: Bearer KEY`"
            }
            Unauthorized::Wrong => "the API key is not one of this server's",
        };
        Self::new(StatusCode::UNAUTHORIZED, "invalid_api_key", message)
    }
}

impl From<Exceeded> for ApiError {
    fn from(exceeded: Exceeded) -> Self {
        let (message, retry) = match exceeded {
            Exceeded::Requests { limit } => (
                format!("you have {limit} requests under way, your limit"),
                Duration::from_secs(1),
            ),
            Exceeded::Pictures { limit, wait } => (
                format!("more than {limit} pictures in a minute, your limit"),
                wait,
            ),
        };
        Self::new(
            StatusCode::TOO_MANY_REQUESTS,
            "rate_limit_exceeded",
            message,
        )
        .retry(retry)
    }
}

impl From<&PipelineError> for ApiError {
    fn from(error: &PipelineError) -> Self {
        if !error.is_bad_request() {
            return Self::internal();
        }
        let message = error.to_string();
        // The pipeline's messages begin with the setting they are about.
        let param = [
            ("size", "size"),
            ("steps", "num_inference_steps"),
            ("guidance", "guidance_scale"),
            ("prompt", "prompt"),
            ("no prompt", "prompt"),
            ("strength", "strength"),
            ("the mask", "mask"),
            ("number of images", "n"),
        ]
        .into_iter()
        .find(|(start, _)| message.starts_with(start));
        let found = Self::new(StatusCode::BAD_REQUEST, "invalid_value", message);
        match param {
            Some((_, param)) => found.param(param),
            None => found,
        }
    }
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Impossible(error) => Self::from(&error),
            Refusal::Stopping => Self::stopping(),
            Refusal::Full { ahead, retry } => {
                let mut error = Self::new(
                    StatusCode::TOO_MANY_REQUESTS,
                    "queue_full",
                    format!("the queue is full, {ahead} requests wait; ask again later"),
                )
                .retry(retry);
                error.0.detail.queue_position = Some(ahead);
                error
            }
        }
    }
}

impl From<Failure> for ApiError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Pipeline {
                message,
                bad_request: true,
            } => Self::new(StatusCode::BAD_REQUEST, "invalid_value", message),
            Failure::Pipeline { .. } | Failure::Crashed => Self::internal(),
            Failure::Stopped => Self::stopping(),
        }
    }
}
