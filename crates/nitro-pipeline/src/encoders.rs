//! A model's frozen parts without its denoiser: texts to features, pictures to latents and back. What
//! preparing training data, and training itself, need.

use burn::tensor::{Device, Tensor, TensorData};
use nitro_models::Params;
use nitro_models::dcae::{DcaeConfig, Decoder, Encoder};
use nitro_models::llama::Llama;
use nitro_ops::Precision;

use crate::PipelineError;
use crate::files::{ModelFile, ModelFiles, ModelLocation};
use crate::hub::HubOptions;
use crate::load::{autoencoder_config, autoencoder_weights, load_text_encoder, text_encoder_files};
use crate::packed_cache::PackedCache;
use crate::pipeline::{DECODE_PIXELS, decode, misfit, text_features, tokenise};
use crate::text::TextFeatures;
use crate::tokenizer::{TextTokenizer, Tokens};

/// Which parts are loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EncoderParts {
    /// The text encoder.
    pub texts: bool,
    /// Tokens a text is padded or cut to; what the model's card says if not given.
    pub text_tokens: Option<usize>,
    /// The autoencoder's encoder.
    pub pictures: bool,
    /// The autoencoder's decoder.
    pub decoder: bool,
}

/// A model's frozen parts.
#[derive(Debug)]
pub struct Encoders {
    texts: Option<TextEncoder>,
    pictures: Option<Encoder>,
    decoder: Option<Decoder>,
    autoencoder: DcaeConfig,
    device: Device,
}

#[derive(Debug)]
struct TextEncoder {
    tokenizer: TextTokenizer,
    model: Llama,
    weights: ModelFile,
    vocabulary: ModelFile,
}

impl Encoders {
    /// Finds, downloads if need be, and loads the asked-for parts of the model at `location`, which
    /// may be a folder without a transformer.
    ///
    /// # Errors
    /// Files that are missing or damaged, as for a whole pipeline.
    pub fn load(
        location: ModelLocation,
        hub: HubOptions,
        parts: EncoderParts,
        device: Device,
        precision: Precision,
    ) -> Result<Self, PipelineError> {
        let files = ModelFiles::open_parts(location, hub)?;
        let card = files.card();
        let autoencoder = autoencoder_config(&files)?;
        let mut this = Self {
            texts: None,
            pictures: None,
            decoder: None,
            autoencoder,
            device,
        };
        if parts.texts {
            let (config, weights) = text_encoder_files(&files)?;
            let vocabulary = files.part_file(&card.text_encoder, "tokenizer.json")?;
            let tokenizer = TextTokenizer::load(
                &vocabulary,
                &files.part_file(&card.text_encoder, "tokenizer_config.json")?,
                parts.text_tokens.unwrap_or(card.text_tokens),
                config.vocab_size,
            )?;
            this.texts = Some(TextEncoder {
                tokenizer,
                model: load_text_encoder(
                    &weights,
                    &config,
                    &this.device,
                    precision,
                    &PackedCache::from_env(),
                )?,
                weights,
                vocabulary,
            });
        }
        if parts.pictures || parts.decoder {
            let weights = autoencoder_weights(&files)?;
            let params = Params::new(&weights, &this.device, precision);
            if parts.pictures {
                this.pictures = Some(Encoder::new(&this.autoencoder, &params)?);
            }
            if parts.decoder {
                this.decoder = Some(Decoder::new(&this.autoencoder, &params.for_inference())?);
            }
        }
        Ok(this)
    }

    /// The autoencoder's configuration; training multiplies latents by its scaling factor.
    pub fn autoencoder(&self) -> &DcaeConfig {
        &self.autoencoder
    }

    /// The text encoder's weights and the tokenizer, where they are loaded.
    pub fn text_files(&self) -> Option<[&ModelFile; 2]> {
        let texts = self.texts.as_ref()?;
        Some([&texts.weights, &texts.vocabulary])
    }

    /// Prepares (see [`preprocess`](crate::caption::preprocess)), tokenises and encodes texts, all of
    /// one length.
    pub fn encode_texts(
        &self,
        texts: &[&str],
        clean_captions: bool,
    ) -> Result<TextFeatures, PipelineError> {
        let encoder = self.text_encoder()?;
        let (texts, tokens) = tokenise(&encoder.tokenizer, texts, clean_captions)?;
        self.encode(encoder, texts, tokens)
    }

    /// Tokenises and encodes texts as they are, as the official training does.
    pub fn encode_raw_texts(&self, texts: &[&str]) -> Result<TextFeatures, PipelineError> {
        let encoder = self.text_encoder()?;
        let tokens = texts.iter().map(|text| encoder.tokenizer.encode(text));
        let tokens = tokens.collect::<Result<_, _>>()?;
        let texts = texts.iter().map(|text| (*text).to_owned()).collect();
        self.encode(encoder, texts, tokens)
    }

    fn text_encoder(&self) -> Result<&TextEncoder, PipelineError> {
        self.texts.as_ref().ok_or_else(|| missing("text encoder"))
    }

    fn encode(
        &self,
        encoder: &TextEncoder,
        texts: Vec<String>,
        tokens: Vec<Tokens>,
    ) -> Result<TextFeatures, PipelineError> {
        let all: Vec<&Tokens> = tokens.iter().collect();
        let features = text_features(&encoder.model, &encoder.weights, &all, &self.device)?;
        Ok(TextFeatures {
            texts,
            features: Tensor::from_data(features, &self.device),
            tokens,
        })
    }

    /// Pictures `[count, 3, side, side]` with values -1 to 1 to latents
    /// `[count, channels, side / factor, side / factor]`, not scaled: as the official pipeline stores
    /// them.
    pub fn encode_pictures(
        &self,
        pixels: Vec<f32>,
        count: usize,
        side: usize,
    ) -> Result<Tensor<4>, PipelineError> {
        let encoder = self.pictures.as_ref();
        let encoder = encoder.ok_or_else(|| missing("picture encoder"))?;
        let shape = [count, 3, side, side];
        if pixels.len() != shape.iter().product::<usize>() {
            return Err(PipelineError::Mismatch {
                reason: format!(
                    "{} values do not make pictures of shape {shape:?}",
                    pixels.len()
                ),
            });
        }
        let pictures = Tensor::from_data(TensorData::new(pixels, shape), &self.device);
        encoder.encode(pictures).map_err(misfit)
    }

    /// Latents of square pictures as the denoiser sees them, `[count, channels, side, side]`, to
    /// pictures `[count, 3, factor side, factor side]` with values about -1 to 1; few at a time.
    pub fn decode_latents(
        &self,
        latents: &[f32],
        count: usize,
    ) -> Result<Tensor<4>, PipelineError> {
        let decoder = self.decoder.as_ref().ok_or_else(|| missing("decoder"))?;
        let each = latents.len() / count.max(1);
        let pixels = each / self.autoencoder.latent_channels.max(1)
            * self.autoencoder.spatial_factor().pow(2);
        let together = (DECODE_PIXELS / pixels.max(1)).max(1);
        let parts = latents.chunks((together * each).max(1)).map(|some| {
            let (config, count) = (&self.autoencoder, some.len() / each);
            decode(decoder, config, some, count, &self.device)
        });
        Ok(Tensor::cat(parts.collect::<Result<Vec<_>, _>>()?, 0))
    }
}

fn missing(part: &str) -> PipelineError {
    PipelineError::Mismatch {
        reason: format!("the {part} was not loaded"),
    }
}
