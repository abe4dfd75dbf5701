//! What the server's parts refuse, as clients are told.

use std::time::Duration;

use axum::http::StatusCode;
use nitro_api::ApiError;
use nitro_pipeline::PipelineError;

use crate::client::Unauthorized;
use crate::engine::{Failure, Refusal};
use crate::shares::Exceeded;

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

/// The model cannot do what was asked for.
fn impossible(error: &PipelineError) -> ApiError {
    if !error.is_bad_request() {
        return ApiError::internal();
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
    let found = ApiError::new(StatusCode::BAD_REQUEST, "invalid_value", message);
    match param {
        Some((_, param)) => found.param(param),
        None => found,
    }
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Impossible(error) => impossible(&error),
            Refusal::Stopping => Self::stopping(),
            Refusal::Full { ahead, retry } => {
                let message = format!("the queue is full, {ahead} requests wait; ask again later");
                Self::new(StatusCode::TOO_MANY_REQUESTS, "queue_full", message)
                    .retry(retry)
                    .queue_position(ahead)
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
