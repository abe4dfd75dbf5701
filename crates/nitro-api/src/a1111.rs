//! AUTOMATIC1111's objects, as far as its clients use them. Its clients send dozens of settings;
//! those that mean nothing to this model are ignored, as that server ignores unknown ones.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use crate::error::ApiError;
use crate::parse;
use crate::picture;
use crate::wish::{Start, Wish};

/// What a client asks of `txt2img`, and with a picture of `img2img`. `null` means the default.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
pub struct Txt2Img {
    /// What the pictures show.
    #[serde(default)]
    pub prompt: Option<String>,
    /// What they should not show.
    #[serde(default)]
    pub negative_prompt: Option<String>,
    /// -1 or absent: drawn.
    #[serde(default)]
    pub seed: Option<i64>,
    /// The variant's by default.
    #[serde(default)]
    pub steps: Option<u32>,
    /// The variant's by default.
    #[serde(default)]
    pub cfg_scale: Option<f64>,
    /// The variant's resolution by default.
    #[serde(default)]
    pub width: Option<u16>,
    /// The variant's resolution by default.
    #[serde(default)]
    pub height: Option<u16>,
    /// Pictures are `batch_size` x `n_iter`.
    #[serde(default)]
    pub batch_size: Option<u32>,
    /// See `batch_size`.
    #[serde(default)]
    pub n_iter: Option<u32>,
    /// `false` leaves the pictures out of the answer.
    #[serde(default)]
    pub send_images: Option<bool>,
    /// `sd_model_checkpoint` chooses a model.
    #[serde(default)]
    #[schema(value_type = Option<Object>)]
    pub override_settings: Option<Value>,
    /// Base64 or data URLs; `img2img` only, one picture.
    #[serde(default)]
    pub init_images: Option<Vec<String>>,
    /// White where the picture is painted anew; `img2img` only.
    #[serde(default)]
    pub mask: Option<String>,
    /// 1 turns the mask around.
    #[serde(default)]
    pub inpainting_mask_invert: Option<u8>,
    /// How much of the picture is changed; 0.75 by default.
    #[serde(default)]
    pub denoising_strength: Option<f64>,
}

/// Reads a request.
pub fn request(body: &[u8]) -> Result<Txt2Img, ApiError> {
    parse::json(body)
}

impl Txt2Img {
    /// The model that the request's settings name.
    pub fn model(&self) -> Option<&str> {
        self.override_settings.as_ref()?["sd_model_checkpoint"].as_str()
    }

    /// What is to be made.
    pub fn wish(&self, variant: Option<String>) -> Wish {
        let size = self.width.or(self.height).map(|side| {
            let (width, height) = (self.width.unwrap_or(side), self.height.unwrap_or(side));
            (width.into(), height.into())
        });
        let count = |count: Option<u32>| count.unwrap_or(1) as usize;
        Wish {
            prompt: self.prompt.clone().unwrap_or_default(),
            negative_prompt: self.negative_prompt.clone().unwrap_or_default(),
            variant,
            pictures: count(self.batch_size).saturating_mul(count(self.n_iter)),
            size,
            steps: self.steps.map(|steps| steps as usize),
            guidance: self.cfg_scale,
            seed: self.seed.and_then(|seed| u64::try_from(seed).ok()),
            start: None,
            previews: 0,
        }
    }

    /// Takes the pictures out, which are large.
    pub fn take_pictures(&mut self) -> StartPictures {
        StartPictures {
            images: self.init_images.take().unwrap_or_default(),
            mask: self.mask.take(),
            invert: self.inpainting_mask_invert == Some(1),
            strength: self.denoising_strength.unwrap_or(0.75),
        }
    }
}

/// What `img2img` starts from, not decoded yet.
#[derive(Debug)]
pub struct StartPictures {
    images: Vec<String>,
    mask: Option<String>,
    invert: bool,
    strength: f64,
}

impl StartPictures {
    /// Decodes the pictures. Computes: not for threads that serve connections.
    pub fn start(&self) -> Result<Start, ApiError> {
        let image = match self.images.as_slice() {
            [image] => image,
            [] => {
                let message = "`init_images` holds no picture; img2img needs one";
                return Err(ApiError::bad("init_images", message));
            }
            several => {
                let message = format!("{} init_images; this model starts from one", several.len());
                return Err(ApiError::bad("init_images", message));
            }
        };
        let image = picture::decode("init_images", &base64("init_images", image)?)?;
        let mask = match self.mask.as_deref() {
            None | Some("") => None,
            Some(mask) => {
                let mut mask = picture::decode("mask", &base64("mask", mask)?)?.into_luma8();
                if self.invert {
                    image::imageops::invert(&mut mask);
                }
                Some(mask)
            }
        };
        Ok(Start {
            image: image.into_rgb8(),
            strength: self.strength,
            mask,
        })
    }
}

/// Base64, or a data URL of it.
fn base64(param: &str, text: &str) -> Result<Vec<u8>, ApiError> {
    let text = match text.strip_prefix("data:") {
        Some(url) => url.split_once(";base64,").map_or("", |(_, data)| data),
        None => text,
    };
    BASE64_STANDARD
        .decode(text.trim())
        .map_err(|e| ApiError::bad(param, format!("`{param}` is not base64: {e}")))
}

/// The pictures of a request.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Pictures {
    /// PNG files in base64.
    pub images: Vec<String>,
    /// The request's parameters as they were understood.
    #[schema(value_type = Object)]
    pub parameters: Value,
    /// JSON of what was made: seeds and infotexts.
    pub info: String,
}

/// What `info` holds, as text.
#[derive(Debug, Serialize)]
pub struct Info {
    /// Of the first picture.
    pub prompt: String,
    /// Of each.
    pub all_prompts: Vec<String>,
    /// Of the first picture.
    pub negative_prompt: String,
    /// Of each.
    pub all_negative_prompts: Vec<String>,
    /// Of the first picture.
    pub seed: u64,
    /// Of each.
    pub all_seeds: Vec<u64>,
    /// In pixels.
    pub width: u32,
    /// In pixels.
    pub height: u32,
    /// `Euler`.
    pub sampler_name: &'static str,
    /// Guidance.
    pub cfg_scale: f64,
    /// That were made.
    pub steps: usize,
    /// Pictures.
    pub batch_size: usize,
    /// Model and variant.
    pub sd_model_name: String,
    /// Parameters of each, as its file carries them.
    pub infotexts: Vec<String>,
}

/// How the client's work is going.
#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct Progress {
    /// 0 to 1.
    pub progress: f64,
    /// Seconds to go.
    pub eta_relative: f64,
    /// Where it is.
    pub state: ProgressState,
    /// PNG in base64 of what the first unfinished picture is expected to become.
    pub current_image: Option<String>,
    /// Always absent.
    pub textinfo: Option<String>,
}

/// Steps and pictures of the work.
#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct ProgressState {
    /// Always false.
    pub skipped: bool,
    /// Whether it was told to end.
    pub interrupted: bool,
    /// A name.
    pub job: String,
    /// Pictures.
    pub job_count: usize,
    /// Pictures that are done.
    pub job_no: usize,
    /// Steps made of the picture under way.
    pub sampling_step: usize,
    /// Its steps.
    pub sampling_steps: usize,
}

/// Whether a poll wants the picture.
#[derive(Debug, Deserialize)]
pub struct ProgressQuery {
    /// Leave the preview out.
    #[serde(default)]
    pub skip_current_image: bool,
}

/// A sampler.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Sampler {
    /// What requests call it.
    pub name: String,
    /// Other names.
    pub aliases: Vec<String>,
    /// None.
    #[schema(value_type = Object)]
    pub options: Value,
}

/// A model.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct SdModel {
    /// What settings call it.
    pub title: String,
    /// The same.
    pub model_name: String,
    /// Unknown.
    pub hash: Option<String>,
    /// Unknown.
    pub sha256: Option<String>,
    /// The same name; files are not told.
    pub filename: String,
    /// None.
    pub config: Option<String>,
}

/// The settings that clients look at.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Options {
    /// The default model.
    pub sd_model_checkpoint: String,
    /// `png`.
    pub samples_format: String,
}

/// How that server words errors.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct SdError {
    /// For programs.
    pub error: String,
    /// For people.
    pub detail: String,
    /// The parameter at fault, if it is one.
    pub body: String,
    /// For people, too.
    pub errors: String,
}

/// A request for what a PNG tells about itself.
#[derive(Debug, Deserialize, ToSchema)]
pub struct PngInfoRequest {
    /// Base64 or a data URL.
    pub image: String,
}

/// What a PNG tells about itself.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct PngInfo {
    /// Its parameters as text; empty if it has none.
    pub info: String,
    /// Its texts by name.
    #[schema(value_type = Object)]
    pub items: Value,
    /// Its parameters by name.
    #[schema(value_type = Object)]
    pub parameters: Value,
}

/// Reads a request for what a PNG tells: the file.
pub fn png_info(body: &[u8]) -> Result<Vec<u8>, ApiError> {
    let request: PngInfoRequest = parse::json(body)?;
    base64("image", &request.image)
}
