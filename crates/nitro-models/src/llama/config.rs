//! What a Llama is made of, as in the `config.json` of a Hugging Face folder.

use std::f32::consts::TAU;

use serde::{Deserialize, Serialize};

use crate::WeightError;

/// The configuration of a [`crate::llama::Llama`]: Hugging Face's keys and defaults. Keys that are
/// not listed here are ignored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LlamaConfig {
    /// Tokens of the vocabulary.
    pub vocab_size: usize,
    /// Width.
    pub hidden_size: usize,
    /// Inner width of the MLPs.
    pub intermediate_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; as many as query heads if absent.
    #[serde(default)]
    pub num_key_value_heads: Option<usize>,
    /// Channels of a head; the width over the number of heads if absent.
    #[serde(default)]
    pub head_dim: Option<usize>,
    /// Activation of the MLPs; `silu` is the only one.
    #[serde(default = "silu")]
    pub hidden_act: String,
    /// Epsilon of the RMS norms.
    #[serde(default = "default_eps")]
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    #[serde(default = "default_theta")]
    pub rope_theta: f64,
    /// How rotary frequencies are stretched for long contexts.
    #[serde(default)]
    pub rope_scaling: Option<RopeScaling>,
    /// Whether attention projections have biases.
    #[serde(default)]
    pub attention_bias: bool,
    /// Whether MLP projections have biases.
    #[serde(default)]
    pub mlp_bias: bool,
    /// Whether the head's weights are the embeddings.
    #[serde(default)]
    pub tie_word_embeddings: bool,
}

/// A stretch of the rotary frequencies.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "rope_type", rename_all = "snake_case")]
pub enum RopeScaling {
    /// None.
    Default,
    /// Llama 3.1's: long wavelengths are divided by `factor`, short ones kept, those between
    /// interpolated.
    Llama3 {
        /// The stretch.
        factor: f64,
        /// Wavelengths above `original_max_position_embeddings / low_freq_factor` are stretched.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_position_embeddings / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context length before the stretch.
        original_max_position_embeddings: f64,
    },
}

impl LlamaConfig {
    /// The language model of the miniature, for a vocabulary of `vocab_size` tokens: 0.79M
    /// parameters besides the embeddings.
    pub fn miniature(vocab_size: usize) -> Self {
        Self {
            vocab_size,
            hidden_size: 128,
            intermediate_size: 384,
            num_hidden_layers: 4,
            num_attention_heads: 4,
            num_key_value_heads: Some(2),
            head_dim: None,
            hidden_act: silu(),
            rms_norm_eps: 1e-5,
            rope_theta: default_theta(),
            rope_scaling: None,
            attention_bias: false,
            mlp_bias: false,
            tie_word_embeddings: true,
        }
    }

    /// Nitro-E's text encoder, as its published `config.json` has it: 1.24B parameters.
    pub fn llama_3_2_1b() -> Self {
        Self {
            vocab_size: 128_256,
            hidden_size: 2048,
            intermediate_size: 8192,
            num_hidden_layers: 16,
            num_attention_heads: 32,
            num_key_value_heads: Some(8),
            head_dim: Some(64),
            hidden_act: silu(),
            rms_norm_eps: 1e-5,
            rope_theta: 500_000.0,
            rope_scaling: Some(RopeScaling::Llama3 {
                factor: 32.0,
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original_max_position_embeddings: 8192.0,
            }),
            attention_bias: false,
            mlp_bias: false,
            tie_word_embeddings: true,
        }
    }

    /// Floating-point operations (two per multiply-add) of encoding `tokens` tokens, without the
    /// language-model head: all matrix products, in units of 10^9. Attention is counted over all
    /// pairs of tokens, although half of them are masked.
    pub fn gflop(&self, tokens: usize) -> f64 {
        let width = self.num_attention_heads * self.head_dim();
        let kv_width = self.kv_heads() * self.head_dim();
        let matrices = self.hidden_size * (2 * width + 2 * kv_width + 3 * self.intermediate_size);
        let layer = tokens * matrices + 2 * tokens * tokens * width;
        2.0 * (self.num_hidden_layers * layer) as f64 / 1e9
    }

    /// Key and value heads.
    pub fn kv_heads(&self) -> usize {
        self.num_key_value_heads.unwrap_or(self.num_attention_heads)
    }

    /// Channels of a head.
    pub fn head_dim(&self) -> usize {
        self.head_dim
            .unwrap_or(self.hidden_size / self.num_attention_heads.max(1))
    }

    /// Rotations per position, in radians, of a head's channel pairs: `[head_dim / 2]`.
    /// Computed in `f32`, as the reference does.
    pub fn inverse_frequencies(&self) -> Vec<f32> {
        let width = self.head_dim() as f32;
        let plain = (0..self.head_dim() / 2)
            .map(|i| 1.0 / (self.rope_theta as f32).powf((2 * i) as f32 / width));
        match self.rope_scaling {
            None | Some(RopeScaling::Default) => plain.collect(),
            Some(RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            }) => {
                let (low, high) = (low_freq_factor as f32, high_freq_factor as f32);
                let context = original_max_position_embeddings as f32;
                let factor = factor as f32;
                let stretch = |frequency: f32| {
                    let wavelength = TAU / frequency;
                    if wavelength < context / high {
                        frequency
                    } else if wavelength > context / low {
                        frequency / factor
                    } else {
                        let kept = (context / wavelength - low) / (high - low);
                        (1.0 - kept) * (frequency / factor) + kept * frequency
                    }
                };
                plain.map(stretch).collect()
            }
        }
    }

    pub(super) fn check(&self) -> Result<(), WeightError> {
        let (heads, kv_heads, head_dim) =
            (self.num_attention_heads, self.kv_heads(), self.head_dim());
        let reason = if self.hidden_act != "silu" {
            format!(
                "hidden_act is {:?}; Llama's MLPs use \"silu\"",
                self.hidden_act
            )
        } else if heads == 0 || !heads.is_multiple_of(kv_heads) {
            format!("{heads} attention heads cannot share {kv_heads} key-value heads evenly")
        } else if head_dim == 0 || head_dim % 2 != 0 {
            format!("a head of {head_dim} channels cannot be rotated; an even number is needed")
        } else if self.head_dim.is_none() && !self.hidden_size.is_multiple_of(heads) {
            format!(
                "hidden_size {} is no multiple of {heads} heads",
                self.hidden_size
            )
        } else {
            return Ok(());
        };
        Err(WeightError::Config {
            origin: "Llama config".into(),
            reason,
        })
    }
}

fn silu() -> String {
    "silu".into()
}

fn default_eps() -> f64 {
    1e-6
}

fn default_theta() -> f64 {
    10_000.0
}
