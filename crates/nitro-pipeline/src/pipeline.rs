//! A loaded model: its parts, and what each does alone.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use burn::tensor::{Device, Tensor, TensorData};
use image::RgbImage;
use nitro_models::InputError;
use nitro_models::dcae::{DcaeConfig, Decoder, Encoder};
use nitro_models::emmdit::Emmdit;
use nitro_models::llama::{Llama, LlamaConfig};
use nitro_ops::Precision;
use sha2::{Digest, Sha256};

use crate::PipelineError;
use crate::caption::preprocess;
use crate::card::Variant;
use crate::files::{ModelFile, ModelLocation, hex};
use crate::load::{PipelineBuilder, load_decoder, load_encoder, load_text_encoder};
use crate::packed_cache::PackedCache;
use crate::part::Part;
use crate::pixels::{self, Canvas, Original};
use crate::prompt_cache::PromptCache;
use crate::tokenizer::{TextTokenizer, Tokens, token_tensors};

/// Pixels decoded together at most; a decoder's activations are its largest memory.
pub(crate) const DECODE_PIXELS: usize = 512 * 512;

/// A loaded model: prompts in, pictures out.
#[derive(Debug)]
pub struct Pipeline {
    pub(crate) name: String,
    pub(crate) variant: Variant,
    pub(crate) tokenizer: Arc<TextTokenizer>,
    /// Loaded with the rest where it is small, else when a text comes whose features are not known.
    pub(crate) text_encoder: Arc<Part<Llama>>,
    pub(crate) text_config: LlamaConfig,
    pub(crate) prompt_cache: Arc<PromptCache>,
    pub(crate) transformer: Emmdit,
    pub(crate) autoencoder: DcaeConfig,
    /// Variants share it.
    pub(crate) decoder: Arc<Part<Decoder>>,
    /// Loaded when a request first brings an image; variants share it.
    pub(crate) encoder: Arc<OnceLock<Encoder>>,
    pub(crate) sources: Sources,
    /// See [`PipelineBuilder::on_demand`].
    pub(crate) on_demand: bool,
    /// See [`PipelineBuilder::tile`].
    pub(crate) tile: Option<usize>,
    pub(crate) device: Device,
    pub(crate) precision: Precision,
    pub(crate) packed_cache: PackedCache,
    pub(crate) load_time: Duration,
}

/// The weight files a pipeline was loaded from.
#[derive(Debug)]
pub(crate) struct Sources {
    pub(crate) transformer: ModelFile,
    pub(crate) text_encoder: ModelFile,
    pub(crate) autoencoder: ModelFile,
    /// With the scales they were merged at.
    pub(crate) adapters: Vec<(ModelFile, f64)>,
}

impl Pipeline {
    /// Loads the default variant of the model at `location`: a folder, `org/name` on the Hub, or an
    /// embedded model. [`Pipeline::builder`] has more choices.
    pub fn from_pretrained(location: impl Into<ModelLocation>) -> Result<Self, PipelineError> {
        Self::builder(location).load()
    }

    /// Chooses variant, resolution, precision, device, LoRA adapters before loading.
    pub fn builder(location: impl Into<ModelLocation>) -> PipelineBuilder {
        PipelineBuilder::new(location.into())
    }

    /// Name of the model.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The variant that is loaded, with its sampling defaults.
    pub fn variant(&self) -> &Variant {
        &self.variant
    }

    /// How long loading took.
    pub fn load_time(&self) -> Duration {
        self.load_time
    }

    /// A SHA-256 over everything that decides what the model paints: transformer, adapters and their
    /// scales, text encoder, autoencoder. Reads all weight files.
    pub fn fingerprint(&self) -> Result<String, PipelineError> {
        let mut sha256 = Sha256::new();
        let parts = &self.sources;
        for file in [&parts.transformer, &parts.text_encoder, &parts.autoencoder] {
            file.hash_into(&mut sha256)?;
        }
        for (file, scale) in &parts.adapters {
            file.hash_into(&mut sha256)?;
            sha256.update(scale.to_le_bytes());
        }
        Ok(hex(&sha256.finalize()))
    }

    /// The denoiser.
    pub fn transformer(&self) -> &Emmdit {
        &self.transformer
    }

    /// Tokens every prompt is padded or cut to.
    pub fn text_tokens(&self) -> usize {
        self.tokenizer.text_tokens()
    }

    /// How products are computed.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// The autoencoder's configuration.
    pub fn autoencoder(&self) -> &DcaeConfig {
        &self.autoencoder
    }

    pub(crate) fn text_encoder(&self) -> Result<Arc<Llama>, PipelineError> {
        self.text_encoder.get(|| {
            load_text_encoder(
                &self.sources.text_encoder,
                &self.text_config,
                &self.device,
                self.precision,
                &self.packed_cache,
            )
        })
    }

    pub(crate) fn decoder(&self) -> Result<Arc<Decoder>, PipelineError> {
        self.decoder.get(|| {
            load_decoder(
                &self.sources.autoencoder,
                &self.autoencoder,
                &self.device,
                self.precision,
                self.tile,
                &self.packed_cache,
            )
        })
    }

    /// Latents of `count` pictures, as the denoiser sees them, to decoded pictures
    /// `[count, 3, height, width]` with values about -1 to 1.
    pub fn decode_latents(
        &self,
        latents: &[f32],
        count: usize,
    ) -> Result<Tensor<4>, PipelineError> {
        let decoder = self.decoder()?;
        decode(&decoder, &self.autoencoder, latents, count, &self.device)
    }

    /// A picture, cut and scaled to a square of `side` pixels, to latents as the denoiser sees them,
    /// `[1, channels, side / f, side / f]`.
    pub fn encode_picture(
        &self,
        picture: &RgbImage,
        side: usize,
    ) -> Result<Tensor<4>, PipelineError> {
        let pixels = Original::of(picture, side).tensor(&self.device);
        let latents = self.encoder()?.encode(pixels).map_err(misfit)?;
        Ok(latents * self.autoencoder.scaling_factor)
    }

    pub(crate) fn decode_pictures(
        &self,
        latents: &[f32],
        canvas: Canvas,
    ) -> Result<Vec<RgbImage>, PipelineError> {
        let together = (DECODE_PIXELS / canvas.pixels()).max(1);
        let mut pictures = Vec::new();
        for some in latents.chunks(together * canvas.latent_len()) {
            let decoded = self.decode_latents(some, some.len() / canvas.latent_len())?;
            pictures.extend(pixels::to_pictures(&finite(
                decoded,
                &self.sources.autoencoder,
            )?));
        }
        Ok(pictures)
    }

    pub(crate) fn encoder(&self) -> Result<&Encoder, PipelineError> {
        match self.encoder.get() {
            Some(encoder) => Ok(encoder),
            None => {
                let encoder = load_encoder(
                    &self.sources.autoencoder,
                    &self.autoencoder,
                    &self.device,
                    self.precision,
                    &self.packed_cache,
                )?;
                Ok(self.encoder.get_or_init(|| encoder))
            }
        }
    }
}

/// Latents of `count` square pictures, as the denoiser sees them, to decoded pictures.
pub(crate) fn decode(
    decoder: &Decoder,
    config: &DcaeConfig,
    latents: &[f32],
    count: usize,
    device: &Device,
) -> Result<Tensor<4>, PipelineError> {
    let channels = config.latent_channels;
    let side = (latents.len() / (count * channels).max(1)).isqrt();
    let scale = config.scaling_factor as f32;
    let values: Vec<f32> = latents.iter().map(|x| x / scale).collect();
    let shape = [count, channels, side, side];
    let latents = Tensor::from_data(TensorData::new(values, shape), device);
    decoder.decode(latents).map_err(misfit)
}

/// The texts as they are tokenised (cleaned if asked to), and their tokens.
pub(crate) fn tokenise(
    tokenizer: &TextTokenizer,
    texts: &[&str],
    clean_captions: bool,
) -> Result<(Vec<String>, Vec<Tokens>), PipelineError> {
    let texts: Vec<String> = texts
        .iter()
        .map(|t| preprocess(t, clean_captions))
        .collect();
    let tokens = texts
        .iter()
        .map(|t| tokenizer.encode(t))
        .collect::<Result<_, _>>()?;
    Ok((texts, tokens))
}

/// The features `[texts, length, channels]` of texts of one length; the encoder's weights are of
/// `file`.
pub(crate) fn text_features(
    encoder: &Llama,
    file: &ModelFile,
    tokens: &[&Tokens],
    device: &Device,
) -> Result<TensorData, PipelineError> {
    let (ids, mask) = token_tensors(tokens, device);
    let features = encoder.forward(ids, mask).map_err(misfit)?;
    finite(features, file)
}

/// A model refused what another part of the pipeline made for it.
pub(crate) fn misfit(error: InputError) -> PipelineError {
    PipelineError::Mismatch {
        reason: error.to_string(),
    }
}

/// A tensor as data, if it holds no infinities and no NaN: those come from damaged weights in `file`.
pub(crate) fn finite<const D: usize>(
    tensor: Tensor<D>,
    file: &ModelFile,
) -> Result<TensorData, PipelineError> {
    let data = tensor.into_data().convert::<f32>();
    match data.as_slice::<f32>() {
        Ok(values) if values.iter().all(|x| x.is_finite()) => Ok(data),
        _ => Err(PipelineError::NotFinite { file: file.name() }),
    }
}

/// A tensor's elements in row-major order.
pub(crate) fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor
        .into_data()
        .convert::<f32>()
        .try_into_vec()
        .unwrap_or_default()
}
