//! What a client is told when it gets no picture, in OpenAI's form.

use std::time::Duration;

use axum::Json;
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// An error answer.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    /// The error.
    pub error: ErrorDetail,
}

/// What went wrong.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ErrorDetail {
    /// For people: what was wrong and what is expected.
    pub message: String,
    /// Kind of error: `invalid_request_error`, `authentication_error`, `rate_limit_error`,
    /// `server_error`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The parameter at fault, if it is one.
    pub param: Option<String>,
    /// For programs.
    pub code: Option<String>,
    /// Requests before this one, where the queue had no room.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue_position: Option<usize>,
}

/// An error on its way to the client. Boxed: answers are mostly not errors.
#[derive(Clone, Debug)]
pub struct ApiError(Box<Inner>);

#[derive(Clone, Debug)]
struct Inner {
    status: StatusCode,
    detail: ErrorDetail,
    retry: Option<Duration>,
}

/// The position in the queue that a refused request would have had.
const QUEUE_POSITION: HeaderName = HeaderName::from_static("x-queue-position");

impl ApiError {
    /// An error with a code for programs and a message for people.
    pub fn new(status: StatusCode, code: &str, message: impl Into<String>) -> Self {
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
    pub fn bad(param: &str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_value", message).param(param)
    }

    /// Names the parameter at fault.
    pub fn param(mut self, param: &str) -> Self {
        self.0.detail.param = Some(param.to_owned());
        self
    }

    /// Says when to ask again.
    pub fn retry(mut self, after: Duration) -> Self {
        self.0.retry = Some(after);
        self
    }

    /// Says how many requests would have been before this one.
    pub fn queue_position(mut self, ahead: usize) -> Self {
        self.0.detail.queue_position = Some(ahead);
        self
    }

    /// The server failed.
    pub fn internal() -> Self {
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "internal_error",
            "the server failed on this request; the log has more under its x-request-id",
        )
    }

    /// The server is being stopped.
    pub fn stopping() -> Self {
        Self::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "stopping",
            "the server is stopping; ask another one, or again later",
        )
        .retry(Duration::from_secs(5))
    }

    /// There is no room for this request at the moment.
    pub fn busy(message: &str) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "busy", message).retry(Duration::from_secs(2))
    }

    /// The server is not ready yet.
    pub fn loading() -> Self {
        Self::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "loading",
            "the model is being loaded; ask again in a moment",
        )
        .retry(Duration::from_secs(2))
    }

    /// The work took too long.
    pub fn timeout(after: Duration) -> Self {
        Self::new(
            StatusCode::GATEWAY_TIMEOUT,
            "timeout",
            format!(
                "no picture within {} s, the server's limit",
                after.as_secs()
            ),
        )
    }

    /// What the client reads.
    pub fn detail(&self) -> &ErrorDetail {
        &self.0.detail
    }

    /// The code, as a reason for metrics.
    pub fn reason(&self) -> &'static str {
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
    pub fn respond(&self, body: impl IntoResponse) -> Response {
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
