use burn::tensor::Device;
use image::RgbImage;
use nitro_models::clip::{Clip, ClipConfig, normalize};
use nitro_models::{Params, WeightError};

use super::{id_batch, image_batch, refused, values};
use crate::EvalError;
use crate::pixels::hps_pixels;
use crate::tokens::ClipTokenizer;

/// HPSv2 and HPSv2.1 (arXiv 2306.09341): a CLIP fine-tuned on which of two pictures people prefer for
/// a text. The score is the cosine of both features; its benchmark multiplies by 100.
#[derive(Debug)]
pub struct Hps {
    clip: Clip,
    tokenizer: ClipTokenizer,
    side: usize,
    tokens: usize,
    device: Device,
}

impl Hps {
    /// The model of `config`, whose text tower must know CLIP's vocabulary.
    ///
    /// # Errors
    /// When the weights are not those of this model.
    pub fn new(config: &ClipConfig, p: &Params<'_>) -> Result<Self, WeightError> {
        check_vocabulary(config)?;
        Ok(Self {
            clip: Clip::new(config, p)?,
            tokenizer: ClipTokenizer::new(),
            side: config.vision_cfg.image_size,
            tokens: config.text_cfg.context_length,
            device: p.device().clone(),
        })
    }

    /// Scores of pictures, each for its own text.
    ///
    /// # Errors
    /// When the model refuses its input.
    pub fn score(&self, pairs: &[(&RgbImage, &str)]) -> Result<Vec<f32>, EvalError> {
        if pairs.is_empty() {
            return Ok(Vec::new());
        }
        let pixels: Vec<_> = pairs
            .iter()
            .map(|(i, _)| hps_pixels(i, self.side))
            .collect();
        let ids: Vec<_> = (pairs.iter())
            .map(|(_, text)| self.tokenizer.encode(text, self.tokens))
            .collect();
        let images = self.clip.encode_image(image_batch(&pixels, &self.device));
        let texts = self.clip.encode_text(id_batch(&ids, &self.device));
        let images = normalize(images.map_err(refused)?); // [n, embed_dim]
        let texts = normalize(texts.map_err(refused)?); // [n, embed_dim]
        Ok(values((images * texts).sum_dim(1)))
    }
}

/// The built-in tokenizer must suit the text tower.
pub(super) fn check_vocabulary(config: &ClipConfig) -> Result<(), WeightError> {
    let known = config.text_cfg.vocab_size;
    match known >= ClipTokenizer::VOCABULARY {
        true => Ok(()),
        false => Err(WeightError::Config {
            origin: "CLIP configuration".to_owned(),
            reason: format!(
                "the text tower knows {known} ids, CLIP's tokenizer makes {}",
                ClipTokenizer::VOCABULARY
            ),
        }),
    }
}
