//! A model's encoders without its denoiser: texts to features, pictures to latents. What preparing
//! training data needs.

use burn::tensor::{Device, Tensor, TensorData};
use nitro_models::Params;
use nitro_models::dcae::{DcaeConfig, Encoder};
use nitro_models::llama::Llama;
use nitro_ops::Precision;

use crate::PipelineError;
use crate::files::{ModelFile, ModelFiles, ModelLocation};
use crate::hub::HubOptions;
use crate::load::{autoencoder_config, autoencoder_weights, load_text_encoder, text_encoder_files};
use crate::pipeline::{TextFeatures, misfit, text_features, tokenise};
use crate::tokenizer::{TextTokenizer, Tokens};

/// Which encoders are loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EncoderParts {
    /// The text encoder.
    pub texts: bool,
    /// The autoencoder's encoder.
    pub pictures: bool,
}

/// A model's encoders.
#[derive(Debug)]
pub struct Encoders {
    texts: Option<(TextTokenizer, Llama, ModelFile)>,
    pictures: Option<Encoder>,
    autoencoder: DcaeConfig,
    device: Device,
}

impl Encoders {
    /// Finds, downloads if need be, and loads the encoders of the model at `location`.
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
        let files = ModelFiles::open(location, hub)?;
        let card = files.card();
        let autoencoder = autoencoder_config(&files)?;
        let mut this = Self {
            texts: None,
            pictures: None,
            autoencoder,
            device,
        };
        if parts.texts {
            let (config, file) = text_encoder_files(&files)?;
            let tokenizer = TextTokenizer::load(
                &files.part_file(&card.text_encoder, "tokenizer.json")?,
                &files.part_file(&card.text_encoder, "tokenizer_config.json")?,
                card.text_tokens,
                config.vocab_size,
            )?;
            let model = load_text_encoder(&file, &config, &this.device, precision)?;
            this.texts = Some((tokenizer, model, file));
        }
        if parts.pictures {
            let weights = autoencoder_weights(&files)?;
            let params = Params::new(&weights, &this.device, precision);
            this.pictures = Some(Encoder::new(&this.autoencoder, &params)?);
        }
        Ok(this)
    }

    /// The autoencoder's configuration; training multiplies latents by its scaling factor.
    pub fn autoencoder(&self) -> &DcaeConfig {
        &self.autoencoder
    }

    /// Cleans (if asked to), tokenises and encodes texts, all of one length.
    pub fn encode_texts(
        &self,
        texts: &[&str],
        clean_captions: bool,
    ) -> Result<TextFeatures, PipelineError> {
        let (tokenizer, model, file) = self.texts.as_ref().ok_or_else(|| missing("text"))?;
        let (texts, tokens) = tokenise(tokenizer, texts, clean_captions)?;
        let all: Vec<&Tokens> = tokens.iter().collect();
        let features = text_features(model, file, &all, &self.device)?;
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
        let encoder = self.pictures.as_ref().ok_or_else(|| missing("picture"))?;
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
}

fn missing(part: &str) -> PipelineError {
    PipelineError::Mismatch {
        reason: format!("the {part} encoder was not loaded"),
    }
}
