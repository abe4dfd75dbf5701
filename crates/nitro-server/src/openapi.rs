//! The OpenAPI document, from the types and handlers themselves.

use nitro_api::a1111::SdError;
use nitro_api::{ErrorBody, openai as api};
use utoipa::openapi::path::{HttpMethod, Operation, OperationBuilder};
use utoipa::openapi::schema::{ArrayBuilder, ObjectBuilder, Type};
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::openapi::{Content, HeaderBuilder, PathItem, Ref, ResponseBuilder};
use utoipa::{Modify, OpenApi};

use crate::{a1111, http, openai};

/// Describes everything the server answers.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "nitro",
        description = "Text to image with Nitro-E: OpenAI's Images API and AUTOMATIC1111's."
    ),
    modifiers(&Keys, &Menus, &Errors),
    security((), ("key" = [])),
    paths(
        openai::generations,
        openai::edits,
        openai::models,
        a1111::txt2img,
        a1111::img2img,
        a1111::progress,
        a1111::interrupt,
        a1111::skip,
        a1111::samplers,
        a1111::schedulers,
        a1111::sd_models,
        a1111::options,
        a1111::set_options,
        a1111::png_info,
        a1111::scripts,
        a1111::embeddings,
        a1111::cmd_flags,
        a1111::refresh_checkpoints,
        http::health,
        http::live,
        http::metrics,
    ),
    components(schemas(api::ImageEvent, api::ProgressEvent, ErrorBody, SdError))
)]
pub(crate) struct Api;

/// The key, where the server wants one.
struct Keys;

impl Modify for Keys {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        let bearer = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build();
        let components = document.components.get_or_insert_with(Default::default);
        components.add_security_scheme("key", SecurityScheme::Http(bearer));
    }
}

/// Lists that are empty here.
struct Menus;

impl Modify for Menus {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        for path in a1111::EMPTY_MENUS {
            let list = ArrayBuilder::new().items(ObjectBuilder::new()).build();
            let answer = ResponseBuilder::new()
                .description("None")
                .content("application/json", Content::new(Some(list)))
                .build();
            let operation = OperationBuilder::new()
                .tag("AUTOMATIC1111")
                .summary(Some(
                    "Nothing to choose from, for clients that fill a menu.",
                ))
                .response("200", answer)
                .build();
            let item = PathItem::new(HttpMethod::Get, operation);
            document.paths.paths.insert(path.to_owned(), item);
        }
    }
}

/// What any request may be refused with.
struct Errors;

/// Of all requests.
const ALWAYS: [(&str, &str); 4] = [
    ("401", "No or a wrong API key"),
    ("403", "A web page of another origin"),
    ("500", "The server failed on this request"),
    (
        "503",
        "The server is loading, stopping, or has no room for the body",
    ),
];

/// Of requests with a body.
const OF_BODIES: [(&str, &str); 7] = [
    ("400", "The request cannot be carried out"),
    ("404", "There is no such model"),
    ("408", "The body did not arrive in time"),
    ("413", "The body is too large"),
    ("415", "The body is not of the type it should be"),
    (
        "429",
        "The queue is full or a limit of the client is reached",
    ),
    ("504", "No picture in time"),
];

impl Modify for Errors {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        for (path, item) in &mut document.paths.paths {
            let schema = match path {
                path if path.starts_with("/sdapi/") => "SdError",
                path if path.starts_with("/v1/") => "ErrorBody",
                _ => continue,
            };
            if let Some(get) = &mut item.get {
                describe(get, schema, &ALWAYS);
                describe(get, schema, &OF_BODIES[..1]);
            }
            if let Some(post) = &mut item.post {
                describe(post, schema, &ALWAYS);
                describe(post, schema, &OF_BODIES);
            }
        }
    }
}

fn describe(operation: &mut Operation, schema: &str, errors: &[(&str, &str)]) {
    for (status, description) in errors {
        let body = Content::new(Some(Ref::from_schema_name(schema)));
        let mut response = ResponseBuilder::new()
            .description(*description)
            .content("application/json", body);
        let number = ObjectBuilder::new().schema_type(Type::Integer).build();
        if ["429", "503"].contains(status) {
            let seconds = HeaderBuilder::new()
                .schema(Some(number.clone()))
                .description(Some("Seconds after which to ask again"));
            response = response.header("retry-after", seconds.build());
        }
        if *status == "429" {
            let ahead = HeaderBuilder::new()
                .schema(Some(number))
                .description(Some("Requests before this one, where the queue was full"));
            response = response.header("x-queue-position", ahead.build());
        }
        let responses = &mut operation.responses.responses;
        responses.insert((*status).to_owned(), response.build().into());
    }
}
