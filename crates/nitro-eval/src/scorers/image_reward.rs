use burn::tensor::Device;
use image::RgbImage;
use nitro_models::Params;
use nitro_models::blip::{ImageReward, ImageRewardConfig};

use super::{id_batch, image_batch, mask_batch, refused, values};
use crate::EvalError;
use crate::pixels::clip_pixels;
use crate::tokens::BertTokenizer;

/// Tokens that ImageReward pads and cuts prompts to.
pub const IMAGE_REWARD_TOKENS: usize = 35;

/// ImageReward with its tokenizer and its way of preparing pictures.
#[derive(Debug)]
pub struct ImageRewardScorer {
    model: ImageReward,
    tokenizer: BertTokenizer,
    side: usize,
    tokens: usize,
    device: Device,
}

impl ImageRewardScorer {
    /// The model of `config`.
    ///
    /// # Errors
    /// When the weights are not those of this model.
    pub fn new(config: &ImageRewardConfig, p: &Params<'_>) -> Result<Self, EvalError> {
        Ok(Self {
            model: ImageReward::new(config, p)?,
            tokenizer: BertTokenizer::new()?,
            side: config.vit.img_size,
            tokens: IMAGE_REWARD_TOKENS.min(config.med_config.max_position_embeddings),
            device: p.device().clone(),
        })
    }

    /// Rewards of pictures, each for its own prompt.
    ///
    /// # Errors
    /// When the model refuses its input.
    pub fn score(&self, pairs: &[(&RgbImage, &str)]) -> Result<Vec<f32>, EvalError> {
        if pairs.is_empty() {
            return Ok(Vec::new());
        }
        let (mut pixels, mut ids, mut used) = (Vec::new(), Vec::new(), Vec::new());
        for (image, text) in pairs {
            pixels.push(clip_pixels(image, self.side as u32));
            let (tokens, length) = self.tokenizer.encode(text, self.tokens)?;
            ids.push(tokens);
            used.push(length);
        }
        let rewards = self.model.forward(
            image_batch(&pixels, &self.device),
            id_batch(&ids, &self.device),
            mask_batch(&used, self.tokens, &self.device),
        );
        Ok(values(rewards.map_err(refused)?))
    }
}
