//! Training the Llama text encoder as a language model on captions.
//!
//! A language model of so small a grammar has no use for much of what it reads: which colour was named
//! says nothing about the next word, and its last hidden states, which the E-MMDiT sees, forget it (a
//! first model's states for "a red circle" and "a blue circle" differed by 2 %). Real captions do not
//! allow that. So small heads, dropped after training, must recall the token at each position and the
//! ones before it from the last hidden state.

use std::ops::Range;
use std::path::{Path, PathBuf};

use burn::tensor::{Bool, Int, Tensor};
use nitro_data::shapes::captions;
use nitro_models::layers::Linear;
use nitro_models::llama::{Llama, LlamaConfig};
use nitro_models::{Params, TensorMap};
use nitro_pipeline::tokenizer::{TextTokenizer, token_tensors};
use tokenizers::Tokenizer;

use crate::TrainError;
use crate::config::{CommonConfig, LanguageModelTask};
use crate::data::example_seed;
use crate::losses::cross_entropy;
use crate::tokenizer::padded;
use crate::trainer::{Losses, Task};

/// Positions each recall head looks back.
const RECALLED: [usize; 3] = [0, 1, 3];
/// Prefix of the recall heads' parameters, which are not part of the text encoder.
pub(crate) const RECALL: &str = "recall";

/// A Llama, its tokenizer and its captions.
pub struct LanguageModel<'a> {
    common: &'a CommonConfig,
    model: LlamaConfig,
    tokenizer: TextTokenizer,
}

impl<'a> LanguageModel<'a> {
    /// The task that `task` describes, with the vocabulary of `tokenizer`.
    pub fn new(
        common: &'a CommonConfig,
        task: &'a LanguageModelTask,
        tokenizer: &Tokenizer,
    ) -> Result<Self, TrainError> {
        Ok(Self {
            common,
            model: shipped_config(&task.model, tokenizer),
            tokenizer: padded(tokenizer, task.text_tokens)?,
        })
    }

    /// The configuration to ship with trained weights.
    pub fn model(&self) -> &LlamaConfig {
        &self.model
    }

    fn recall_heads(&self, p: &Params<'_>) -> Result<Vec<Linear>, TrainError> {
        let head = |back: &usize| {
            let p = p.sub(format_args!("{RECALL}.{back}"));
            Ok(Linear::new(
                &p,
                self.model.hidden_size,
                self.model.vocab_size,
            )?)
        };
        RECALLED.iter().map(head).collect()
    }
}

/// `config` with the vocabulary of `tokenizer`.
pub fn shipped_config(config: &LlamaConfig, tokenizer: &Tokenizer) -> LlamaConfig {
    LlamaConfig {
        vocab_size: tokenizer.get_vocab_size(true),
        ..config.clone()
    }
}

/// Mean cross entropy of `logits [B, T, vocab]` at `targets [B, T]` where `counted [B, T]`.
fn token_loss(logits: Tensor<3>, targets: Tensor<2, Int>, counted: Tensor<2, Bool>) -> Tensor<1> {
    let [batch, tokens, vocab] = logits.dims();
    let rows = batch * tokens;
    cross_entropy(
        logits.reshape([rows, vocab]),
        targets.reshape([rows]),
        Some(counted.reshape([rows])),
    )
}

impl Task for LanguageModel<'_> {
    type Batch = Vec<String>;

    fn build(&self, p: &Params<'_>) -> Result<(), TrainError> {
        Llama::new(&self.model, p)?;
        self.recall_heads(p)?;
        Ok(())
    }

    fn batch(&self, step: u64, examples: Range<usize>) -> Result<Vec<String>, TrainError> {
        Ok(captions(example_seed(self.common.seed, step, 0))
            .skip(examples.start)
            .take(examples.len())
            .collect())
    }

    fn loss(&self, p: &Params<'_>, batch: Vec<String>) -> Result<Losses, TrainError> {
        let model = Llama::new(&self.model, p)?;
        let tokens = batch.iter().map(|caption| self.tokenizer.encode(caption));
        let tokens = tokens.collect::<Result<Vec<_>, _>>()?;
        let (ids, mask) = token_tensors(&tokens.iter().collect::<Vec<_>>(), p.device());
        let hidden = model.forward(ids.clone(), mask.clone())?;
        let length = self.tokenizer.text_tokens();
        // Position t predicts token t + 1: the first padding token (the end of the text) included.
        let logits = model.logits(hidden.clone())?; // [B, T, vocab]
        let ahead = mask.clone().slice_dim(1, 0..length - 1);
        let next = token_loss(
            logits.slice_dim(1, 0..length - 1),
            ids.clone().slice_dim(1, 1..length),
            ahead,
        );
        let mut recall = Vec::new();
        for (head, back) in self.recall_heads(p)?.iter().zip(RECALLED) {
            let logits = head.forward(hidden.clone().slice_dim(1, back..length));
            let targets = ids.clone().slice_dim(1, 0..length - back);
            recall.push(token_loss(
                logits,
                targets,
                mask.clone().slice_dim(1, back..length),
            ));
        }
        let recall = Tensor::cat(recall, 0).mean();
        let value = |loss: &Tensor<1>| f64::from(loss.clone().into_scalar::<f32>());
        let parts = vec![("next_token", value(&next)), ("recall", value(&recall))];
        Ok(Losses {
            total: next + recall,
            parts,
        })
    }

    fn sample(&self, _: &TensorMap, _: u64, _: &Path) -> Result<Option<PathBuf>, TrainError> {
        Ok(None)
    }
}
