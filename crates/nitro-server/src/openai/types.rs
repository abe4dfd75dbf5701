//! The OpenAI Images API's objects, with what we add at top level.

use axum::body::Bytes;
use nitro_pipeline::InitImage;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::app::Wish;
use crate::error::ApiError;
use crate::images::{self, OutputFormat};
use crate::parse;

/// Previews of one picture that OpenAI's API allows are 3; our page asks for more.
const MOST_PREVIEWS: u32 = 20;

/// What a client asks of `/v1/images/generations`, and besides pictures of `/v1/images/edits`.
///
/// Names and meanings are OpenAI's; `seed`, `num_inference_steps`, `guidance_scale`,
/// `negative_prompt`, `variant`, `strength` and `progress` are ours.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct ImageParameters {
    /// What the picture shows.
    #[schema(example = "a red circle left of a blue square")]
    pub(crate) prompt: String,
    /// A name from `/v1/models`; the server's model by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) model: Option<String>,
    /// Number of pictures; picture k has seed + k.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) n: Option<u32>,
    /// `WIDTHxHEIGHT` or `auto`, the model's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) size: Option<String>,
    /// `b64_json` (default), or `url` for a data URL.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) response_format: Option<ResponseFormat>,
    /// File format; PNG by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) output_format: Option<OutputFormat>,
    /// JPEG quality, 0 to 100; PNG and WebP are lossless.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) output_compression: Option<u8>,
    /// Accepted and repeated in the answer; number of steps is what sets quality here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) quality: Option<String>,
    /// Accepted, without effect.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) style: Option<String>,
    /// `auto` or `opaque`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) background: Option<String>,
    /// Accepted, without effect.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) moderation: Option<String>,
    /// Accepted, without effect.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) input_fidelity: Option<String>,
    /// Accepted, without effect.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) user: Option<String>,
    /// Answer with server-sent events.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) stream: Option<bool>,
    /// Previews of each picture while it is made; needs `stream`. OpenAI allows 3, we 20.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) partial_images: Option<u32>,
    /// Seed of the first picture; drawn if absent. The answer tells it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) seed: Option<u64>,
    /// Denoising steps; the variant's by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) num_inference_steps: Option<u32>,
    /// How strongly the prompt steers; no guidance at 1 or less; the variant's by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) guidance_scale: Option<f64>,
    /// What the picture should not show; used with guidance.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) negative_prompt: Option<String>,
    /// One of the variants the server has loaded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) variant: Option<String>,
    /// How much of an edited picture is changed, above 0 to 1 (default 0.75).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) strength: Option<f64>,
    /// With `stream`: also send `nitro.queued` and `nitro.progress` events.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) progress: Option<bool>,
}

/// How pictures come back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ResponseFormat {
    /// Base64 of the file.
    #[default]
    B64Json,
    /// A `data:` URL: the server keeps no pictures that another URL could name.
    Url,
}

/// A form for `/v1/images/edits`.
#[derive(ToSchema)]
#[allow(dead_code)] // describes the form; it is read part by part
pub(crate) struct EditForm {
    /// The picture to start from: PNG, JPEG or WebP.
    #[schema(value_type = String, format = Binary)]
    image: Vec<u8>,
    /// As large as the picture: transparent (or, without transparency, white) where it is painted
    /// anew. Without a mask, the picture's own transparent part.
    #[schema(value_type = Option<String>, format = Binary)]
    mask: Option<Vec<u8>>,
    #[schema(inline)]
    #[serde(flatten)]
    parameters: ImageParameters,
}

impl ImageParameters {
    /// Everything that decides about the answer's form, checked.
    pub(crate) fn answer(&self) -> Result<Answer, ApiError> {
        let one_of = |param: &str, value: &Option<String>, known: &[&str]| match value {
            Some(value) if !known.contains(&value.as_str()) => Err(ApiError::bad(
                param,
                format!("{param} {value:?}: expected one of {}", known.join(", ")),
            )),
            _ => Ok(()),
        };
        one_of("background", &self.background, &["auto", "opaque"])?;
        let qualities = ["auto", "low", "medium", "high", "standard", "hd"];
        one_of("quality", &self.quality, &qualities)?;
        one_of("style", &self.style, &["vivid", "natural"])?;
        one_of("moderation", &self.moderation, &["auto", "low"])?;
        one_of("input_fidelity", &self.input_fidelity, &["low", "high"])?;
        let stream = self.stream.unwrap_or(false);
        let previews = self.partial_images.unwrap_or(0);
        if previews > MOST_PREVIEWS {
            let message = format!("partial_images is {previews}; at most {MOST_PREVIEWS} are sent");
            return Err(ApiError::bad("partial_images", message));
        }
        if previews > 0 && !stream {
            let message = "partial_images needs `stream: true`";
            return Err(ApiError::bad("partial_images", message));
        }
        let compression = self.output_compression.unwrap_or(90);
        if compression > 100 {
            let message = format!("output_compression is {compression}; it goes from 0 to 100");
            return Err(ApiError::bad("output_compression", message));
        }
        Ok(Answer {
            stream,
            progress: self.progress.unwrap_or(false),
            format: self.output_format.unwrap_or_default(),
            jpeg_quality: compression,
            response_format: self.response_format.unwrap_or_default(),
            quality: self.quality.clone().unwrap_or_else(|| "auto".to_owned()),
        })
    }

    /// What is to be made.
    pub(crate) fn wish(self, variant: Option<String>) -> Result<Wish, ApiError> {
        Ok(Wish {
            size: self.size.as_deref().map_or(Ok(None), parse::size)?,
            prompt: self.prompt,
            negative_prompt: self.negative_prompt.unwrap_or_default(),
            variant: self.variant.or(variant),
            pictures: self.n.unwrap_or(1) as usize,
            steps: self.num_inference_steps.map(|steps| steps as usize),
            guidance: self.guidance_scale,
            seed: self.seed,
            init: None,
            previews: self.partial_images.unwrap_or(0) as usize,
        })
    }
}

/// The form of an answer.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    pub(crate) stream: bool,
    pub(crate) progress: bool,
    pub(crate) format: OutputFormat,
    pub(crate) jpeg_quality: u8,
    pub(crate) response_format: ResponseFormat,
    pub(crate) quality: String,
}

/// Reads the body of a generation.
pub(crate) fn generation(body: &[u8]) -> Result<ImageParameters, ApiError> {
    let parameters: ImageParameters = parse::json(body)?;
    if parameters.strength.is_some() {
        let message = "strength belongs to /v1/images/edits, where there is a picture to change";
        return Err(ApiError::bad("strength", message));
    }
    Ok(parameters)
}

/// An edit's parameters and the files of its picture and mask.
pub(crate) struct Edit {
    pub(crate) parameters: ImageParameters,
    image: Bytes,
    mask: Option<Bytes>,
}

/// Reads the form of an edit.
pub(crate) async fn edit(kind: &str, body: Bytes) -> Result<Edit, ApiError> {
    let form = parse::form(kind, body, &["image", "mask"]).await?;
    let (mut image, mut mask) = (None, None);
    for (name, bytes) in form.files {
        let place = match name.as_str() {
            "image" => &mut image,
            _ => &mut mask,
        };
        if place.replace(bytes).is_some() {
            let message = format!("more than one `{name}`; this model starts from one picture");
            return Err(ApiError::bad(&name, message));
        }
    }
    let parameters = parse::object(form.fields)?;
    let Some(image) = image else {
        let message = "`image` is missing: the picture to edit";
        return Err(ApiError::bad("image", message));
    };
    Ok(Edit {
        parameters,
        image,
        mask,
    })
}

impl Edit {
    /// Decodes the pictures. Computes: not for threads that serve connections.
    pub(crate) fn init(&self) -> Result<InitImage, ApiError> {
        let image = images::decode("image", &self.image)?;
        let mask = match &self.mask {
            Some(mask) => Some(images::mask_of(images::decode("mask", mask)?)),
            None => images::transparent_part(&image),
        };
        Ok(InitImage {
            image: image.into_rgb8(),
            strength: self.parameters.strength.unwrap_or(0.75),
            mask,
        })
    }
}

/// The pictures of a request.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct ImagesResponse {
    /// Unix time.
    pub(crate) created: u64,
    pub(crate) data: Vec<Image>,
    pub(crate) background: String,
    pub(crate) output_format: OutputFormat,
    pub(crate) quality: String,
    pub(crate) size: String,
    pub(crate) usage: Usage,
    /// What did not go as the request may have meant: prompts longer than the text encoder reads.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) warnings: Vec<String>,
}

/// One picture.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct Image {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) b64_json: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) url: Option<String>,
    /// The seed that gives this picture again, alone or in any batch.
    pub(crate) seed: u64,
    /// All parameters in AUTOMATIC1111's form, as the file carries them.
    pub(crate) parameters: String,
}

/// What a request cost, in tokens as OpenAI counts them.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, ToSchema)]
pub(crate) struct Usage {
    pub(crate) input_tokens: u64,
    pub(crate) input_tokens_details: InputTokens,
    /// Image tokens that the transformer denoised.
    pub(crate) output_tokens: u64,
    pub(crate) total_tokens: u64,
}

/// Parts of the input.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, ToSchema)]
pub(crate) struct InputTokens {
    pub(crate) text_tokens: u64,
    pub(crate) image_tokens: u64,
}

/// A server-sent event of a streamed request.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct ImageEvent {
    /// `image_generation.partial_image`, `image_generation.completed`, `image_edit.partial_image` or
    /// `image_edit.completed`.
    #[serde(rename = "type")]
    pub(crate) kind: String,
    pub(crate) b64_json: String,
    /// Unix time.
    pub(crate) created_at: u64,
    pub(crate) size: String,
    pub(crate) quality: String,
    pub(crate) background: String,
    pub(crate) output_format: OutputFormat,
    /// Which picture of the request.
    pub(crate) image_index: usize,
    /// Which preview of it, from 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) partial_image_index: Option<usize>,
    /// Of a finished picture.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) usage: Option<Usage>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) seed: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) parameters: Option<String>,
}

/// A server-sent event for requests with `progress: true`.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(tag = "type")]
pub(crate) enum ProgressEvent {
    /// Requests that come before this one.
    #[serde(rename = "nitro.queued")]
    Queued { ahead: usize },
    /// Work has begun.
    #[serde(rename = "nitro.started")]
    Started { warnings: Vec<String> },
    /// A picture made a step.
    #[serde(rename = "nitro.progress")]
    Progress {
        image_index: usize,
        step: usize,
        steps: usize,
    },
}

/// The models of `/v1/models`.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct ModelList {
    /// `list`.
    pub(crate) object: String,
    pub(crate) data: Vec<Model>,
}

/// One model: the server's, or one of its variants.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct Model {
    pub(crate) id: String,
    /// `model`.
    pub(crate) object: String,
    /// Unix time.
    pub(crate) created: u64,
    pub(crate) owned_by: String,
    /// What the model does when a request does not say.
    pub(crate) nitro: ModelDefaults,
}

/// A variant's defaults, and this server's limits.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct ModelDefaults {
    /// Name of the model, as pictures carry it and the command line knows it.
    pub(crate) model: String,
    pub(crate) variant: String,
    pub(crate) steps: usize,
    pub(crate) guidance_scale: f64,
    /// Side of its pictures in pixels.
    pub(crate) resolution: usize,
    pub(crate) max_steps: usize,
    pub(crate) max_images: usize,
    pub(crate) max_side: usize,
    pub(crate) max_prompt_bytes: usize,
    /// Further arguments with which `nitro generate` uses this model in the same way.
    pub(crate) command_line: String,
}
