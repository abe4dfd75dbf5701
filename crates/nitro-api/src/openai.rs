//! The OpenAI Images API's objects, with what we add at top level.

use axum::body::Bytes;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::error::ApiError;
use crate::parse;
use crate::picture::{self, OutputFormat};
use crate::wish::{Start, Wish};

/// Previews of one picture that OpenAI's API allows are 3; our page asks for more.
const MOST_PREVIEWS: u32 = 20;

/// What a client asks of `/v1/images/generations`, and besides pictures of `/v1/images/edits`.
///
/// Names and meanings are OpenAI's; `seed`, `num_inference_steps`, `guidance_scale`,
/// `negative_prompt`, `variant`, `strength` and `progress` are ours.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ImageParameters {
    /// What the picture shows.
    #[schema(example = "a red circle left of a blue square")]
    pub prompt: String,
    /// A name from `/v1/models`; the server's model by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Number of pictures; picture k has seed + k.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub n: Option<u32>,
    /// `WIDTHxHEIGHT` or `auto`, the model's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<String>,
    /// `b64_json` (default), or `url` for a data URL.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub response_format: Option<ResponseFormat>,
    /// File format; PNG by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output_format: Option<OutputFormat>,
    /// JPEG quality, 0 to 100; PNG and WebP are lossless.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output_compression: Option<u8>,
    /// Accepted and repeated in the answer; number of steps is what sets quality here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quality: Option<String>,
    /// Accepted, without effect.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub style: Option<String>,
    /// `auto` or `opaque`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub background: Option<String>,
    /// Accepted, without effect.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moderation: Option<String>,
    /// Accepted, without effect.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input_fidelity: Option<String>,
    /// Accepted, without effect.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Answer with server-sent events.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stream: Option<bool>,
    /// Previews of each picture while it is made; needs `stream`. OpenAI allows 3, we 20.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub partial_images: Option<u32>,
    /// Seed of the first picture; drawn if absent. The answer tells it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Denoising steps; the variant's by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_inference_steps: Option<u32>,
    /// How strongly the prompt steers; no guidance at 1 or less; the variant's by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guidance_scale: Option<f64>,
    /// What the picture should not show; used with guidance.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub negative_prompt: Option<String>,
    /// One of the variants the server has loaded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
    /// How much of an edited picture is changed, above 0 to 1 (default 0.75).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub strength: Option<f64>,
    /// With `stream`: also send `nitro.queued` and `nitro.progress` events.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<bool>,
}

/// How pictures come back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ResponseFormat {
    /// Base64 of the file.
    #[default]
    B64Json,
    /// A `data:` URL: the server keeps no pictures that another URL could name.
    Url,
}

/// A form for `/v1/images/edits`.
#[derive(ToSchema)]
#[allow(dead_code)] // describes the form; it is read part by part
pub struct EditForm {
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
    pub fn answer(&self) -> Result<Answer, ApiError> {
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
    pub fn wish(self, variant: Option<String>) -> Result<Wish, ApiError> {
        Ok(Wish {
            size: self.size.as_deref().map_or(Ok(None), parse::size)?,
            prompt: self.prompt,
            negative_prompt: self.negative_prompt.unwrap_or_default(),
            variant: self.variant.or(variant),
            pictures: self.n.unwrap_or(1) as usize,
            steps: self.num_inference_steps.map(|steps| steps as usize),
            guidance: self.guidance_scale,
            seed: self.seed,
            start: None,
            previews: self.partial_images.unwrap_or(0) as usize,
        })
    }
}

/// The form of an answer.
#[derive(Clone, Debug)]
pub struct Answer {
    /// As server-sent events.
    pub stream: bool,
    /// With our own events among them.
    pub progress: bool,
    /// Of the files.
    pub format: OutputFormat,
    /// Of JPEG files, 0 to 100.
    pub jpeg_quality: u8,
    /// How files come.
    pub response_format: ResponseFormat,
    /// What the client called its quality.
    pub quality: String,
}

/// Reads the body of a generation.
pub fn generation(body: &[u8]) -> Result<ImageParameters, ApiError> {
    let parameters: ImageParameters = parse::json(body)?;
    if parameters.strength.is_some() {
        let message = "strength belongs to /v1/images/edits, where there is a picture to change";
        return Err(ApiError::bad("strength", message));
    }
    Ok(parameters)
}

/// An edit's parameters and the files of its picture and mask.
#[derive(Debug)]
pub struct Edit {
    /// Everything but the files.
    pub parameters: ImageParameters,
    image: Bytes,
    mask: Option<Bytes>,
}

/// Reads the form of an edit.
pub fn edit(kind: &str, body: Bytes) -> Result<Edit, ApiError> {
    let form = parse::form(kind, body, &["image", "mask"])?;
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
    pub fn start(&self) -> Result<Start, ApiError> {
        let image = picture::decode("image", &self.image)?;
        let mask = match &self.mask {
            Some(mask) => Some(picture::mask_of(picture::decode("mask", mask)?)),
            None => picture::transparent_part(&image),
        };
        Ok(Start {
            image: image.into_rgb8(),
            strength: self.parameters.strength.unwrap_or(0.75),
            mask,
        })
    }
}

/// The pictures of a request.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct ImagesResponse {
    /// Unix time.
    pub created: u64,
    /// In order of their seeds.
    pub data: Vec<Image>,
    /// `opaque`.
    pub background: String,
    /// Of the files.
    pub output_format: OutputFormat,
    /// As the request had it, or `auto`.
    pub quality: String,
    /// `WIDTHxHEIGHT`.
    pub size: String,
    /// In tokens.
    pub usage: Usage,
    /// What did not go as the request may have meant: prompts longer than the text encoder reads.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// One picture.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Image {
    /// The file in base64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub b64_json: Option<String>,
    /// The file as a `data:` URL.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// The seed that gives this picture again, alone or in any batch.
    pub seed: u64,
    /// All parameters in AUTOMATIC1111's form, as the file carries them.
    pub parameters: String,
}

/// What a request cost, in tokens as OpenAI counts them.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct Usage {
    /// Text tokens, and image tokens of a picture to start from.
    pub input_tokens: u64,
    /// Their parts.
    pub input_tokens_details: InputTokens,
    /// Image tokens that the transformer denoised.
    pub output_tokens: u64,
    /// Both.
    pub total_tokens: u64,
}

/// Parts of the input.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct InputTokens {
    /// Tokens the prompt is padded or cut to.
    pub text_tokens: u64,
    /// Of a picture to start from.
    pub image_tokens: u64,
}

/// A server-sent event of a streamed request.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct ImageEvent {
    /// `image_generation.partial_image`, `image_generation.completed`, `image_edit.partial_image` or
    /// `image_edit.completed`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The file in base64.
    pub b64_json: String,
    /// Unix time.
    pub created_at: u64,
    /// `WIDTHxHEIGHT`.
    pub size: String,
    /// As the request had it, or `auto`.
    pub quality: String,
    /// `opaque`.
    pub background: String,
    /// Of the file.
    pub output_format: OutputFormat,
    /// Which picture of the request.
    pub image_index: usize,
    /// Which preview of it, from 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub partial_image_index: Option<usize>,
    /// Of a finished picture.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
    /// Of a finished picture: the seed that gives it again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Of a finished picture: all parameters in AUTOMATIC1111's form.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parameters: Option<String>,
}

/// A server-sent event for requests with `progress: true`.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(tag = "type")]
pub enum ProgressEvent {
    /// The request waits.
    #[serde(rename = "nitro.queued")]
    Queued {
        /// Requests that come before this one.
        ahead: usize,
    },
    /// Work has begun.
    #[serde(rename = "nitro.started")]
    Started {
        /// Prompts longer than the text encoder reads.
        warnings: Vec<String>,
    },
    /// A picture made a step.
    #[serde(rename = "nitro.progress")]
    Progress {
        /// Which picture of the request.
        image_index: usize,
        /// Steps made.
        step: usize,
        /// Steps in all.
        steps: usize,
    },
}

/// The models of `/v1/models`.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct ModelList {
    /// `list`.
    pub object: String,
    /// The default one first.
    pub data: Vec<Model>,
}

/// One model: the server's, or one of its variants.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Model {
    /// The name to ask for it by.
    pub id: String,
    /// `model`.
    pub object: String,
    /// Unix time.
    pub created: u64,
    /// `nitro`.
    pub owned_by: String,
    /// What the model does when a request does not say.
    pub nitro: ModelDefaults,
}

/// A variant's defaults, and this server's limits.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct ModelDefaults {
    /// Name of the model, as pictures carry it and the command line knows it.
    pub model: String,
    /// Its variant.
    pub variant: String,
    /// Denoising steps.
    pub steps: usize,
    /// How strongly the prompt steers.
    pub guidance_scale: f64,
    /// Side of its pictures in pixels.
    pub resolution: usize,
    /// Most steps of a request here.
    pub max_steps: usize,
    /// Most pictures of a request here.
    pub max_images: usize,
    /// Longest side here.
    pub max_side: usize,
    /// Longest prompt here.
    pub max_prompt_bytes: usize,
    /// Further arguments with which `nitro generate` uses this model in the same way.
    pub command_line: String,
}
