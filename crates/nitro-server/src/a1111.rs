//! `/sdapi/v1`: the API of AUTOMATIC1111's web UI, enough for its clients.

use std::sync::Arc;

use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Json, Router};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use nitro_api::a1111::{
    self as api, Info, Options, Pictures, PngInfo, PngInfoRequest, Progress, ProgressQuery,
    ProgressState, Sampler, SdError, SdModel, Txt2Img,
};
use nitro_api::picture::OutputFormat;
use nitro_api::{ApiError, Wish, parse};
use nitro_pipeline::picture::{Parameters, infotext};
use serde_json::{Value, json};

use crate::app::{App, Finished, encoded};
use crate::client::Client;
use crate::engine::Source;
use crate::openai::{model_names, variant_of};

/// The only sampler there is; the one that flow matching models use.
const SAMPLER: &str = "Euler";

/// Menus in which there is nothing to choose here: clients fill them when they start.
pub(crate) const EMPTY_MENUS: [&str; 8] = [
    "/sdapi/v1/face-restorers",
    "/sdapi/v1/hypernetworks",
    "/sdapi/v1/latent-upscale-modes",
    "/sdapi/v1/loras",
    "/sdapi/v1/prompt-styles",
    "/sdapi/v1/realesrgan-models",
    "/sdapi/v1/sd-vae",
    "/sdapi/v1/upscalers",
];

/// All routes.
pub(crate) fn routes() -> Router<Arc<App>> {
    let nothing = || async { Json(Value::Array(Vec::new())) };
    let menus = EMPTY_MENUS
        .iter()
        .fold(Router::new(), |menus, path| menus.route(path, get(nothing)));
    menus
        .route("/sdapi/v1/txt2img", post(txt2img))
        .route("/sdapi/v1/img2img", post(img2img))
        .route("/sdapi/v1/progress", get(progress))
        .route("/sdapi/v1/interrupt", post(interrupt))
        .route("/sdapi/v1/skip", post(skip))
        .route("/sdapi/v1/samplers", get(samplers))
        .route("/sdapi/v1/schedulers", get(schedulers))
        .route("/sdapi/v1/sd-models", get(sd_models))
        .route("/sdapi/v1/options", get(options).post(set_options))
        .route("/sdapi/v1/png-info", post(png_info))
        .route("/sdapi/v1/scripts", get(scripts))
        .route("/sdapi/v1/embeddings", get(embeddings))
        .route("/sdapi/v1/cmd-flags", get(cmd_flags))
        .route("/sdapi/v1/refresh-checkpoints", post(refresh_checkpoints))
}

/// Errors as clients of that server read them.
pub(crate) async fn reword(response: Response) -> Response {
    let Some(error) = response.extensions().get::<ApiError>().cloned() else {
        return response;
    };
    let detail = error.detail();
    error.respond(Json(SdError {
        error: detail.code.clone().unwrap_or_default(),
        detail: detail.message.clone(),
        body: detail.param.clone().unwrap_or_default(),
        errors: detail.message.clone(),
    }))
}

/// Makes pictures from text.
#[utoipa::path(
    post,
    path = "/sdapi/v1/txt2img",
    tag = "AUTOMATIC1111",
    request_body = Txt2Img,
    responses((status = 200, description = "The pictures", body = Pictures))
)]
pub(crate) async fn txt2img(
    State(app): State<Arc<App>>,
    Extension(client): Extension<Client>,
    request: Request,
) -> Result<Json<Pictures>, ApiError> {
    let body = app.bodies.read_json(request).await?;
    let request = api::request(&body.bytes)?;
    drop(body);
    let variant = variant_of(&app, request.model())?;
    let wish = request.wish(variant);
    make(&app, &client, &request, wish).await
}

/// Makes pictures from a picture and text.
#[utoipa::path(
    post,
    path = "/sdapi/v1/img2img",
    tag = "AUTOMATIC1111",
    request_body = Txt2Img,
    responses((status = 200, description = "The pictures", body = Pictures))
)]
pub(crate) async fn img2img(
    State(app): State<Arc<App>>,
    Extension(client): Extension<Client>,
    request: Request,
) -> Result<Json<Pictures>, ApiError> {
    let body = app.bodies.read_json(request).await?;
    let mut request = api::request(&body.bytes)?;
    let variant = variant_of(&app, request.model())?;
    let wish = request.wish(variant);
    let pictures = request.take_pictures();
    let decode = move || {
        let start = pictures.start();
        drop((pictures, body));
        start
    };
    let start = Some(app.start(&wish, decode).await?);
    make(&app, &client, &request, Wish { start, ..wish }).await
}

async fn make(
    app: &App,
    client: &Client,
    request: &Txt2Img,
    wish: Wish,
) -> Result<Json<Pictures>, ApiError> {
    let order = app.order(wish, client, Source::A1111)?;
    let side = order.ticket.plan.side();
    let finished = order.finish(app, OutputFormat::Png, 90).await?;
    let info = info(&finished, side as u32);
    let parameters = json!({
        "prompt": info.prompt,
        "negative_prompt": info.negative_prompt,
        "seed": info.seed,
        "steps": info.steps,
        "cfg_scale": info.cfg_scale,
        "width": side,
        "height": side,
        "batch_size": info.batch_size,
        "n_iter": 1,
        "sampler_name": SAMPLER,
        "denoising_strength": request.denoising_strength,
    });
    let send = request.send_images.unwrap_or(true);
    let images = finished.pictures.iter().filter(|_| send);
    Ok(Json(Pictures {
        images: images.map(|p| BASE64_STANDARD.encode(&p.file)).collect(),
        parameters,
        info: serde_json::to_string(&info).map_err(|_| ApiError::internal())?,
    }))
}

fn info(finished: &Finished, side: u32) -> Info {
    let each = || finished.pictures.iter().map(|p| &p.parameters);
    // An interruption before the first step leaves no picture.
    let first = each().next();
    let text = |of: fn(&Parameters) -> &String| first.map(of).cloned().unwrap_or_default();
    Info {
        prompt: text(|p| &p.prompt),
        all_prompts: each().map(|p| p.prompt.clone()).collect(),
        negative_prompt: text(|p| &p.negative_prompt),
        all_negative_prompts: each().map(|p| p.negative_prompt.clone()).collect(),
        seed: first.map_or(0, |p| p.seed),
        all_seeds: each().map(|p| p.seed).collect(),
        width: side,
        height: side,
        sampler_name: SAMPLER,
        cfg_scale: first.map_or(0.0, |p| p.guidance_scale),
        steps: first.map_or(0, |p| p.steps),
        batch_size: finished.pictures.len(),
        sd_model_name: text(|p| &p.model),
        infotexts: each().map(|p| p.to_infotext()).collect(),
    }
}

/// How the work of this client is going, with a preview of it.
#[utoipa::path(
    get,
    path = "/sdapi/v1/progress",
    tag = "AUTOMATIC1111",
    params(("skip_current_image" = Option<bool>, Query, description = "Leave the preview out")),
    responses((status = 200, description = "Progress; all zero when nothing runs", body = Progress))
)]
pub(crate) async fn progress(
    State(app): State<Arc<App>>,
    Extension(client): Extension<Client>,
    query: Result<Query<ProgressQuery>, QueryRejection>,
) -> Result<Json<Progress>, ApiError> {
    let Query(query) = query.map_err(|e| ApiError::bad("skip_current_image", e.body_text()))?;
    let Some(job) = app.engine()?.snapshot(&client, Source::A1111) else {
        return Ok(Json(Progress::default()));
    };
    let of_one = job.step as f64 / job.steps.max(1) as f64;
    let unfinished = job.pictures.saturating_sub(job.done);
    let progress = (job.done as f64 + of_one.min(unfinished as f64)) / job.pictures.max(1) as f64;
    let elapsed = job.since.elapsed().as_secs_f64();
    let current_image = match job.preview {
        Some(image) if !query.skip_current_image => {
            let image = Arc::unwrap_or_clone(image);
            let file = encoded(image, None, OutputFormat::Png, 90).await?;
            Some(BASE64_STANDARD.encode(file))
        }
        _ => None,
    };
    Ok(Json(Progress {
        progress: progress.min(1.0),
        eta_relative: match progress > 0.0 {
            true => elapsed * (1.0 - progress) / progress,
            false => 0.0,
        },
        state: ProgressState {
            job: "nitro".to_owned(),
            job_count: job.pictures,
            job_no: job.done,
            sampling_step: job.step,
            sampling_steps: job.steps,
            ..ProgressState::default()
        },
        current_image,
        textinfo: None,
    }))
}

/// Ends this client's work at the next step; it answers with its pictures as they are by then.
#[utoipa::path(
    post,
    path = "/sdapi/v1/interrupt",
    tag = "AUTOMATIC1111",
    responses((status = 200, description = "Noted", body = Object))
)]
pub(crate) async fn interrupt(
    State(app): State<Arc<App>>,
    Extension(client): Extension<Client>,
) -> Result<Json<Value>, ApiError> {
    app.engine()?
        .interrupt(|owner, source| *owner == client && source == Source::A1111);
    Ok(Json(json!({})))
}

/// The same as `interrupt`: pictures of a request are made together, so none of them comes next.
#[utoipa::path(
    post,
    path = "/sdapi/v1/skip",
    tag = "AUTOMATIC1111",
    responses((status = 200, description = "Noted", body = Object))
)]
pub(crate) async fn skip(
    app: State<Arc<App>>,
    client: Extension<Client>,
) -> Result<Json<Value>, ApiError> {
    interrupt(app, client).await
}

/// The samplers.
#[utoipa::path(
    get,
    path = "/sdapi/v1/samplers",
    tag = "AUTOMATIC1111",
    responses((status = 200, description = "The one sampler", body = Vec<Sampler>))
)]
pub(crate) async fn samplers() -> Json<Vec<Sampler>> {
    Json(vec![Sampler {
        name: SAMPLER.to_owned(),
        aliases: vec!["euler".to_owned(), "k_euler".to_owned()],
        options: json!({}),
    }])
}

/// The schedulers.
#[utoipa::path(
    get,
    path = "/sdapi/v1/schedulers",
    tag = "AUTOMATIC1111",
    responses((status = 200, description = "The one scheduler", body = Vec<Object>))
)]
pub(crate) async fn schedulers() -> Json<Value> {
    Json(
        json!([{"name": "automatic", "label": "Automatic", "aliases": null,
        "default_rho": -1, "need_inner_model": false}]),
    )
}

/// The models.
#[utoipa::path(
    get,
    path = "/sdapi/v1/sd-models",
    tag = "AUTOMATIC1111",
    responses((status = 200, description = "The models", body = Vec<SdModel>))
)]
pub(crate) async fn sd_models(State(app): State<Arc<App>>) -> Result<Json<Vec<SdModel>>, ApiError> {
    let model = |name: String| SdModel {
        title: name.clone(),
        filename: name.clone(),
        model_name: name,
        hash: None,
        sha256: None,
        config: None,
    };
    Ok(Json(model_names(&app)?.into_iter().map(model).collect()))
}

/// The settings that clients look at.
#[utoipa::path(
    get,
    path = "/sdapi/v1/options",
    tag = "AUTOMATIC1111",
    responses((status = 200, description = "The settings", body = Options))
)]
pub(crate) async fn options(State(app): State<Arc<App>>) -> Result<Json<Options>, ApiError> {
    let names = model_names(&app)?;
    Ok(Json(Options {
        sd_model_checkpoint: names.into_iter().next().unwrap_or_default(),
        samples_format: "png".to_owned(),
    }))
}

/// Takes settings, for clients that insist; workers keep no state, so only a model that is there can
/// be "set".
#[utoipa::path(
    post,
    path = "/sdapi/v1/options",
    tag = "AUTOMATIC1111",
    request_body = Object,
    responses((status = 200, description = "Nothing had to change", body = Object))
)]
pub(crate) async fn set_options(
    State(app): State<Arc<App>>,
    request: Request,
) -> Result<Response, ApiError> {
    let body = app.bodies.read_json(request).await?;
    let settings: serde_json::Map<String, Value> = parse::json(&body.bytes)?;
    let model = settings.get("sd_model_checkpoint").and_then(Value::as_str);
    variant_of(&app, model)?;
    Ok(Json(json!({})).into_response())
}

/// The parameters that a PNG carries.
#[utoipa::path(
    post,
    path = "/sdapi/v1/png-info",
    tag = "AUTOMATIC1111",
    request_body = PngInfoRequest,
    responses((status = 200, description = "Its parameters; empty without any", body = PngInfo))
)]
pub(crate) async fn png_info(
    State(app): State<Arc<App>>,
    request: Request,
) -> Result<Json<PngInfo>, ApiError> {
    let body = app.bodies.read_json(request).await?;
    let file = api::png_info(&body.bytes)?;
    let text = infotext(&file).map_err(|error| ApiError::bad("image", error.to_string()))?;
    let text = text.unwrap_or_default();
    let parameters = match Parameters::from_infotext(&text) {
        Ok(p) => json!({
            "Prompt": p.prompt,
            "Negative prompt": p.negative_prompt,
            "Steps": p.steps,
            "CFG scale": p.guidance_scale,
            "Seed": p.seed,
            "Size": format!("{}x{}", p.width, p.height),
            "Model": p.model,
        }),
        Err(_) => json!({}),
    };
    Ok(Json(PngInfo {
        items: json!({"parameters": text}),
        info: text,
        parameters,
    }))
}

/// The scripts.
#[utoipa::path(
    get,
    path = "/sdapi/v1/scripts",
    tag = "AUTOMATIC1111",
    responses((status = 200, description = "None", body = Object))
)]
pub(crate) async fn scripts() -> Json<Value> {
    Json(json!({"txt2img": [], "img2img": []}))
}

/// The embeddings.
#[utoipa::path(
    get,
    path = "/sdapi/v1/embeddings",
    tag = "AUTOMATIC1111",
    responses((status = 200, description = "None", body = Object))
)]
pub(crate) async fn embeddings() -> Json<Value> {
    Json(json!({"loaded": {}, "skipped": {}}))
}

/// The command line's flags; ours are nobody's business.
#[utoipa::path(
    get,
    path = "/sdapi/v1/cmd-flags",
    tag = "AUTOMATIC1111",
    responses((status = 200, description = "None", body = Object))
)]
pub(crate) async fn cmd_flags() -> Json<Value> {
    Json(json!({}))
}

/// Looks for new models; there is the one the server was started with.
#[utoipa::path(
    post,
    path = "/sdapi/v1/refresh-checkpoints",
    tag = "AUTOMATIC1111",
    responses((status = 200, description = "Nothing to do", body = Object))
)]
pub(crate) async fn refresh_checkpoints() -> Json<Value> {
    Json(json!({}))
}
