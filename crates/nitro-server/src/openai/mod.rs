//! `/v1`: the OpenAI Images API.

mod stream;

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use nitro_api::openai::{
    self as api, Answer, EditForm, Image, ImageEvent, ImageParameters, ImagesResponse, InputTokens,
    Model, ModelDefaults, ModelList, ResponseFormat, Usage,
};
use nitro_api::{ApiError, Wish};
use nitro_pipeline::{Pipeline, Truncation};

use crate::app::{App, Order, Picture, unix_time};
use crate::client::Client;
use crate::engine::Source;
use crate::http::body::content_type;

/// Makes pictures from text.
#[utoipa::path(
    post,
    path = "/v1/images/generations",
    tag = "OpenAI",
    request_body = ImageParameters,
    responses(
        (
            status = 200,
            description = "The pictures; with `stream`, server-sent events",
            content((ImagesResponse = "application/json"), (ImageEvent = "text/event-stream")),
        ),
    )
)]
pub(crate) async fn generations(
    State(app): State<Arc<App>>,
    Extension(client): Extension<Client>,
    request: Request,
) -> Result<Response, ApiError> {
    let body = app.bodies.read_json(request).await?;
    let parameters = api::generation(&body.bytes)?;
    drop(body);
    let variant = variant_of(&app, parameters.model.as_deref())?;
    let answer = parameters.answer()?;
    let wish = parameters.wish(variant)?;
    respond(app, client, wish, answer, "image_generation").await
}

/// Makes pictures from a picture and text.
#[utoipa::path(
    post,
    path = "/v1/images/edits",
    tag = "OpenAI",
    request_body(content = EditForm, content_type = "multipart/form-data"),
    responses(
        (
            status = 200,
            description = "The pictures; with `stream`, server-sent events",
            content((ImagesResponse = "application/json"), (ImageEvent = "text/event-stream")),
        ),
    )
)]
pub(crate) async fn edits(
    State(app): State<Arc<App>>,
    Extension(client): Extension<Client>,
    request: Request,
) -> Result<Response, ApiError> {
    let kind = content_type(&request);
    let body = app.bodies.read(request).await?;
    let edit = api::edit(&kind, body.bytes.clone())?;
    let variant = variant_of(&app, edit.parameters.model.as_deref())?;
    let answer = edit.parameters.answer()?;
    let wish = edit.parameters.clone().wish(variant)?;
    let decode = move || {
        let start = edit.start();
        drop((edit, body));
        start
    };
    let start = Some(app.start(&wish, decode).await?);
    let wish = Wish { start, ..wish };
    respond(app, client, wish, answer, "image_edit").await
}

/// Lists the models.
#[utoipa::path(
    get,
    path = "/v1/models",
    tag = "OpenAI",
    responses((status = 200, description = "The models, the default one first", body = ModelList))
)]
pub(crate) async fn models(State(app): State<Arc<App>>) -> Result<Json<ModelList>, ApiError> {
    let engine = app.engine()?;
    let mut data = Vec::new();
    for (i, pipeline) in engine.pipelines().iter().enumerate() {
        let names = match i {
            0 => names(&app, pipeline),
            _ => vec![variant_name(&app, pipeline)],
        };
        data.extend(names.into_iter().map(|id| model(&app, pipeline, id)));
    }
    Ok(Json(ModelList {
        object: "list".to_owned(),
        data,
    }))
}

fn model(app: &App, pipeline: &Pipeline, id: String) -> Model {
    let (variant, limits) = (pipeline.variant(), &app.options.limits);
    Model {
        id,
        object: "model".to_owned(),
        created: app.started,
        owned_by: "nitro".to_owned(),
        nitro: ModelDefaults {
            model: pipeline.name().to_owned(),
            variant: variant.name.clone(),
            steps: variant.steps,
            guidance_scale: variant.guidance,
            resolution: variant.resolution,
            max_steps: limits.steps,
            max_images: limits.pictures,
            max_side: limits.side,
            max_prompt_bytes: limits.prompt_bytes,
            command_line: app.options.command_line.clone(),
        },
    }
}

/// The names of the default model.
fn names(app: &App, pipeline: &Pipeline) -> Vec<String> {
    let own = app.options.model_name.clone();
    let own = own.unwrap_or_else(|| pipeline.name().to_owned());
    std::iter::once(own)
        .chain(app.options.aliases.iter().cloned())
        .collect()
}

/// `NAME:VARIANT`.
fn variant_name(app: &App, pipeline: &Pipeline) -> String {
    let name = &names(app, pipeline)[0];
    format!("{name}:{}", pipeline.variant().name)
}

/// All names under which models are asked for, the default one first.
pub(crate) fn model_names(app: &App) -> Result<Vec<String>, ApiError> {
    let pipelines = app.engine()?.pipelines();
    let mut all = names(app, &pipelines[0]);
    all.extend(pipelines[1..].iter().map(|p| variant_name(app, p)));
    Ok(all)
}

/// The variant that a model's name asks for, if it asks for one.
pub(crate) fn variant_of(app: &App, model: Option<&str>) -> Result<Option<String>, ApiError> {
    let (engine, Some(wanted)) = (app.engine()?, model) else {
        return Ok(None);
    };
    let pipelines = engine.pipelines();
    if names(app, &pipelines[0]).iter().any(|name| name == wanted) {
        return Ok(None);
    }
    let named = pipelines.iter().find(|p| variant_name(app, p) == wanted);
    if let Some(pipeline) = named {
        return Ok(Some(pipeline.variant().name.clone()));
    }
    let known = model_names(app)?.join(", ");
    Err(ApiError::new(
        StatusCode::NOT_FOUND,
        "model_not_found",
        format!("this server has no model {wanted:?}; it has {known} (see /v1/models)"),
    )
    .param("model"))
}

/// Orders the pictures and answers in the form that was asked for.
async fn respond(
    app: Arc<App>,
    client: Client,
    wish: Wish,
    answer: Answer,
    kind: &'static str,
) -> Result<Response, ApiError> {
    let order = app.order(wish, &client, Source::OpenAi)?;
    if answer.stream {
        return Ok(stream::respond(app, order, answer, kind));
    }
    let usage = usage(&app, &order)?;
    let size = size(&order);
    let finished = order
        .finish(&app, answer.format, answer.jpeg_quality)
        .await?;
    let data = finished.pictures.into_iter();
    Ok(Json(ImagesResponse {
        created: unix_time(),
        data: data.map(|picture| image(picture, &answer)).collect(),
        background: "opaque".to_owned(),
        output_format: answer.format,
        quality: answer.quality,
        size,
        usage,
        warnings: finished.truncations.iter().map(warning).collect(),
    })
    .into_response())
}

fn image(picture: Picture, answer: &Answer) -> Image {
    let base64 = BASE64_STANDARD.encode(&picture.file);
    let mut image = Image {
        b64_json: None,
        url: None,
        seed: picture.seed,
        parameters: picture.parameters.to_infotext(),
    };
    match answer.response_format {
        ResponseFormat::B64Json => image.b64_json = Some(base64),
        ResponseFormat::Url => {
            image.url = Some(format!("data:{};base64,{base64}", answer.format.mime()));
        }
    }
    image
}

/// `WIDTHxHEIGHT` of an order's pictures.
fn size(order: &Order) -> String {
    let side = order.ticket.plan.side();
    format!("{side}x{side}")
}

fn usage(app: &App, order: &Order) -> Result<Usage, ApiError> {
    let pipeline = app.pipeline(order.pipeline)?;
    let tokens = |side: usize| -> u64 {
        let unit =
            pipeline.autoencoder().spatial_factor() * pipeline.transformer().config().patch_size;
        ((side / unit.max(1)) as u64).pow(2)
    };
    let side = order.ticket.plan.side();
    let text_tokens = pipeline.text_tokens() as u64;
    let image_tokens = order.request.init.as_ref().map_or(0, |_| tokens(side));
    let output_tokens = tokens(side) * order.request.pictures() as u64;
    Ok(Usage {
        input_tokens: text_tokens + image_tokens,
        input_tokens_details: InputTokens {
            text_tokens,
            image_tokens,
        },
        output_tokens,
        total_tokens: text_tokens + image_tokens + output_tokens,
    })
}

/// What a client should know about a prompt that was cut.
fn warning(cut: &Truncation) -> String {
    let which = match cut.negative {
        true => "negative prompt",
        false => "prompt",
    };
    format!(
        "the {which} is longer than the {} tokens the text encoder reads; left out: {:?}",
        cut.tokens, cut.dropped
    )
}
