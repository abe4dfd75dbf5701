//! Training the Llama text encoder as a language model on captions.

use std::path::Path;

use burn::tensor::{Bool, Device, Int, Tensor, TensorData, activation};
use nitro_data::shapes::captions;
use nitro_models::llama::{Llama, LlamaConfig};
use nitro_models::{Params, TensorMap};
use tokenizers::Tokenizer;

use crate::config::{CommonConfig, LanguageModelTask};
use crate::data::example_seed;
use crate::tokenizer::encode;
use crate::trainer::{Losses, Task};
use crate::TrainError;

/// A Llama, its tokenizer and its captions.
pub struct LanguageModel<'a> {
    common: &'a CommonConfig,
    model: LlamaConfig,
    tokenizer: &'a Tokenizer,
    text_tokens: usize,
}

impl<'a> LanguageModel<'a> {
    /// The task that `task` describes, with the vocabulary of `tokenizer`.
    pub fn new(
        common: &'a CommonConfig,
        task: &'a LanguageModelTask,
        tokenizer: &'a Tokenizer,
    ) -> Self {
        let model = shipped_config(&task.model, tokenizer);
        Self { common, model, tokenizer, text_tokens: task.text_tokens }
    }

    /// The configuration to ship with trained weights.
    pub fn model(&self) -> &LlamaConfig {
        &self.model
    }
}

/// `config` with the vocabulary of `tokenizer`.
pub fn shipped_config(config: &LlamaConfig, tokenizer: &Tokenizer) -> LlamaConfig {
    LlamaConfig { vocab_size: tokenizer.get_vocab_size(true), ..config.clone() }
}

/// Token ids and masks of many captions, `[count, length]`.
pub(crate) fn encode_all<S: AsRef<str>>(
    tokenizer: &Tokenizer,
    captions: &[S],
    length: usize,
    device: &Device,
) -> Result<(Tensor<2, Int>, Tensor<2, Bool>), TrainError> {
    let (mut ids, mut mask) = (Vec::new(), Vec::new());
    for caption in captions {
        let (more, real) = encode(tokenizer, caption.as_ref(), length)?;
        ids.extend(more);
        mask.extend(real);
    }
    let shape = [captions.len(), length];
    Ok((
        Tensor::from_data(TensorData::new(ids, shape), device),
        Tensor::from_data(TensorData::new(mask, shape), device),
    ))
}

impl Task for LanguageModel<'_> {
    type Batch = Vec<String>;

    fn build(&self, p: &Params<'_>) -> Result<(), TrainError> {
        Llama::new(&self.model, p)?;
        Ok(())
    }

    fn batch(&self, step: u64) -> Result<Vec<String>, TrainError> {
        Ok(captions(example_seed(self.common.seed, step, 0)).take(self.common.batch_size).collect())
    }

    fn loss(&self, p: &Params<'_>, batch: Vec<String>) -> Result<Losses, TrainError> {
        let model = Llama::new(&self.model, p)?;
        let device = p.device();
        let (ids, mask) = encode_all(self.tokenizer, &batch, self.text_tokens, device)?;
        let [count, length] = ids.dims();
        let hidden = model.forward(ids.clone(), mask.clone())?;
        let logits = model.logits(hidden)?; // [B, T, vocab]
        let vocab = logits.dims()[2];
        // Position t predicts token t + 1: the first padding token (the end of the text) included.
        let logits = logits.slice_dim(1, 0..length - 1).reshape([count * (length - 1), vocab]);
        let targets = ids.slice_dim(1, 1..length).reshape([count * (length - 1), 1]);
        let weights = mask.slice_dim(1, 0..length - 1).float().reshape([count * (length - 1), 1]);
        let log_probs = activation::log_softmax(logits, 1).gather(1, targets);
        let total = (log_probs * weights.clone()).sum().neg() / weights.sum();
        Ok(Losses { total, parts: Vec::new() })
    }

    fn sample(&self, _: &TensorMap, _: u64, _: &Path) -> Result<(), TrainError> {
        Ok(())
    }
}
