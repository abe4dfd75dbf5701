//! AUTOMATIC1111's objects, as far as its clients use them. Its clients send dozens of settings;
//! those that mean nothing to this model are ignored, as that server ignores unknown ones.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use nitro_pipeline::InitImage;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use crate::app::Wish;
use crate::error::ApiError;
use crate::images;
use crate::parse;

/// What a client asks of `txt2img`, and with a picture of `img2img`. `null` means the default.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
pub(crate) struct Txt2Img {
    #[serde(default)]
    pub(crate) prompt: Option<String>,
    #[serde(default)]
    pub(crate) negative_prompt: Option<String>,
    /// -1 or absent: drawn.
    #[serde(default)]
    pub(crate) seed: Option<i64>,
    /// The variant's by default.
    #[serde(default)]
    pub(crate) steps: Option<u32>,
    /// The variant's by default.
    #[serde(default)]
    pub(crate) cfg_scale: Option<f64>,
    /// The variant's resolution by default.
    #[serde(default)]
    pub(crate) width: Option<u16>,
    /// The variant's resolution by default.
    #[serde(default)]
    pub(crate) height: Option<u16>,
    /// Pictures are `batch_size` x `n_iter`.
    #[serde(default)]
    pub(crate) batch_size: Option<u32>,
    #[serde(default)]
    pub(crate) n_iter: Option<u32>,
    /// `false` leaves the pictures out of the answer.
    #[serde(default)]
    pub(crate) send_images: Option<bool>,
    /// `sd_model_checkpoint` chooses a model.
    #[serde(default)]
    #[schema(value_type = Option<Object>)]
    pub(crate) override_settings: Option<Value>,
    /// Base64 or data URLs; `img2img` only, one picture.
    #[serde(default)]
    pub(crate) init_images: Option<Vec<String>>,
    /// White where the picture is painted anew; `img2img` only.
    #[serde(default)]
    pub(crate) mask: Option<String>,
    /// 1 turns the mask around.
    #[serde(default)]
    pub(crate) inpainting_mask_invert: Option<u8>,
    /// How much of the picture is changed; 0.75 by default.
    #[serde(default)]
    pub(crate) denoising_strength: Option<f64>,
}

/// Reads a request.
pub(crate) fn request(body: &[u8]) -> Result<Txt2Img, ApiError> {
    parse::json(body)
}

impl Txt2Img {
    /// The model that the request's settings name.
    pub(crate) fn model(&self) -> Option<&str> {
        self.override_settings.as_ref()?["sd_model_checkpoint"].as_str()
    }

    /// What is to be made.
    pub(crate) fn wish(&self, variant: Option<String>) -> Wish {
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
            init: None,
            previews: 0,
        }
    }

    /// Decodes the pictures. Computes: not for threads that serve connections.
    pub(crate) fn init(&self) -> Result<InitImage, ApiError> {
        let image = match self.init_images.as_deref() {
            Some([image]) => image,
            Some([]) | None => {
                let message = "`init_images` holds no picture; img2img needs one";
                return Err(ApiError::bad("init_images", message));
            }
            Some(several) => {
                let message = format!("{} init_images; this model starts from one", several.len());
                return Err(ApiError::bad("init_images", message));
            }
        };
        let image = images::decode("init_images", &base64("init_images", image)?)?;
        let mask = match self.mask.as_deref() {
            None | Some("") => None,
            Some(mask) => {
                let mut mask = images::decode("mask", &base64("mask", mask)?)?.into_luma8();
                if self.inpainting_mask_invert == Some(1) {
                    image::imageops::invert(&mut mask);
                }
                Some(mask)
            }
        };
        Ok(InitImage {
            image: image.into_rgb8(),
            strength: self.denoising_strength.unwrap_or(0.75),
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
pub(crate) struct Pictures {
    /// PNG files in base64.
    pub(crate) images: Vec<String>,
    /// The request's parameters as they were understood.
    #[schema(value_type = Object)]
    pub(crate) parameters: Value,
    /// JSON of what was made: seeds and infotexts.
    pub(crate) info: String,
}

/// What `info` holds, as text.
#[derive(Debug, Serialize)]
pub(crate) struct Info {
    pub(crate) prompt: String,
    pub(crate) all_prompts: Vec<String>,
    pub(crate) negative_prompt: String,
    pub(crate) all_negative_prompts: Vec<String>,
    pub(crate) seed: u64,
    pub(crate) all_seeds: Vec<u64>,
    pub(crate) width: u32,
    pub(crate) height: u32,
    pub(crate) sampler_name: &'static str,
    pub(crate) cfg_scale: f64,
    pub(crate) steps: usize,
    pub(crate) batch_size: usize,
    pub(crate) sd_model_name: String,
    pub(crate) infotexts: Vec<String>,
}

/// How the client's work is going.
#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
pub(crate) struct Progress {
    /// 0 to 1.
    pub(crate) progress: f64,
    /// Seconds to go.
    pub(crate) eta_relative: f64,
    pub(crate) state: ProgressState,
    /// PNG in base64 of what the first unfinished picture is expected to become.
    pub(crate) current_image: Option<String>,
    pub(crate) textinfo: Option<String>,
}

/// Steps and pictures of the work.
#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
pub(crate) struct ProgressState {
    pub(crate) skipped: bool,
    pub(crate) interrupted: bool,
    pub(crate) job: String,
    pub(crate) job_count: usize,
    pub(crate) job_no: usize,
    pub(crate) sampling_step: usize,
    pub(crate) sampling_steps: usize,
}

/// Whether a poll wants the picture.
#[derive(Debug, Deserialize)]
pub(crate) struct ProgressQuery {
    #[serde(default)]
    pub(crate) skip_current_image: bool,
}

/// A sampler.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct Sampler {
    pub(crate) name: String,
    pub(crate) aliases: Vec<String>,
    #[schema(value_type = Object)]
    pub(crate) options: Value,
}

/// A model.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct SdModel {
    pub(crate) title: String,
    pub(crate) model_name: String,
    pub(crate) hash: Option<String>,
    pub(crate) sha256: Option<String>,
    pub(crate) filename: String,
    pub(crate) config: Option<String>,
}

/// The settings that clients look at.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct Options {
    pub(crate) sd_model_checkpoint: String,
    pub(crate) samples_format: String,
}

/// How that server words errors.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct SdError {
    pub(crate) error: String,
    pub(crate) detail: String,
    pub(crate) body: String,
    pub(crate) errors: String,
}
