//! The OpenAPI document, from the types and handlers themselves.

use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::{Modify, OpenApi};

use crate::{a1111, error, http, openai};

/// Describes everything the server answers.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "nitro",
        description = "Text to image with Nitro-E: OpenAI's Images API and AUTOMATIC1111's."
    ),
    modifiers(&Keys),
    security((), ("key" = [])),
    paths(
        openai::generations,
        openai::edits,
        openai::models,
        a1111::txt2img,
        a1111::img2img,
        a1111::progress,
        a1111::interrupt,
        a1111::samplers,
        a1111::sd_models,
        a1111::options,
        a1111::set_options,
        http::health,
        http::live,
        http::metrics,
    ),
    components(schemas(
        openai::types::ImageEvent,
        openai::types::ProgressEvent,
        error::ErrorBody,
    ))
)]
pub(crate) struct Api;

/// The key, where the server wants one.
struct Keys;

impl Modify for Keys {
    fn modify(&self, api: &mut utoipa::openapi::OpenApi) {
        let bearer = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build();
        let components = api.components.get_or_insert_with(Default::default);
        components.add_security_scheme("key", SecurityScheme::Http(bearer));
    }
}
