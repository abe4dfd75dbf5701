//! Llama as a text encoder: token ids to the last hidden state (Hugging Face's `LlamaModel`).
//!
//! Pre-norm blocks of grouped-query attention with rotary positions and a SwiGLU MLP. Nitro-E feeds
//! the whole padded sequence to its denoiser, so padded positions are computed as the reference
//! computes them: position `i` sees the tokens `j <= i` that are not padding.

mod config;
mod embedding;
mod rotary;

use std::sync::Arc;

use burn::tensor::{Bool, Int, Tensor};
use nitro_kernels::pool::install;
use nitro_ops::{
    Activation, AttentionShape, NormKind, PackedBlock, PackedStream, PackedTail, Precision, Qkv,
    attention, mask_values, packed_block, silu_gated,
};

pub use config::{LlamaConfig, RopeScaling};

use crate::layers::{Fan, Linear, RmsNorm};
use crate::{InputError, Params, WeightError};
use embedding::TokenTable;
use rotary::Rotary;

/// Receives intermediate results: `layer_out.i`, and `hidden_states.i` as Hugging Face numbers them
/// (0 is the embeddings; the last comes after the final norm).
pub type Observer<'a> = &'a mut dyn FnMut(&str, Tensor<3>);

/// The decoder, without or with its language-model head.
#[derive(Clone, Debug)]
pub struct Llama {
    embed_tokens: TokenTable, // [vocabulary, hidden]
    layers: Vec<Layer>,
    norm: RmsNorm,
    lm_head: Option<TokenTable>, // [vocabulary, hidden]; the embeddings where they are tied
    inverse_frequencies: Vec<f32>,
    head_dim: usize,
    precision: Precision,
}

impl Llama {
    /// The model of `config`, from a file with a language-model head (`model.layers.0...`) or one
    /// without (`layers.0...`), as `LlamaForCausalLM` and `LlamaModel` save them.
    pub fn new(config: &LlamaConfig, p: &Params<'_>) -> Result<Self, WeightError> {
        config.check()?;
        let (vocabulary, hidden) = (config.vocab_size, config.hidden_size);
        let bare = p.contains("embed_tokens.weight");
        let model = if bare { p.clone() } else { p.sub("model") };
        let embed_tokens = TokenTable::new(&model.sub("embed_tokens"), vocabulary, hidden)?;
        let layers = (0..config.num_hidden_layers)
            .map(|i| Layer::new(&model.sub("layers").sub(i), config))
            .collect::<Result<Vec<_>, _>>()?;
        let lm_head = match (config.tie_word_embeddings, bare) {
            (true, _) => Some(embed_tokens.clone()),
            (false, false) => Some(TokenTable::new(&p.sub("lm_head"), vocabulary, hidden)?),
            (false, true) => None,
        };
        Ok(Self {
            embed_tokens,
            layers,
            norm: RmsNorm::new(&model.sub("norm"), hidden, config.rms_norm_eps)?,
            lm_head,
            inverse_frequencies: config.inverse_frequencies(),
            head_dim: config.head_dim(),
            precision: p.precision(),
        })
    }

    /// Token ids `[b, t]` and `mask [b, t]`, true where there is a token and false where there is
    /// padding, to the hidden state after the final norm, `[b, t, hidden]`.
    pub fn forward(
        &self,
        ids: Tensor<2, Int>,
        mask: Tensor<2, Bool>,
    ) -> Result<Tensor<3>, InputError> {
        // On a thread of the pool, the kernels need no hand-over each.
        install(|| self.forward_observed(ids, mask, &mut |_, _| {}))
    }

    /// [`Llama::forward`], showing intermediate results.
    pub fn forward_observed(
        &self,
        ids: Tensor<2, Int>,
        mask: Tensor<2, Bool>,
        observe: Observer<'_>,
    ) -> Result<Tensor<3>, InputError> {
        let [_, tokens] = ids.dims();
        if ids.dims() != mask.dims() {
            return Err(InputError {
                model: "Llama",
                reason: format!("ids are {:?}, their mask is {:?}", ids.dims(), mask.dims()),
            });
        }
        let rotary = Rotary::new(
            &self.inverse_frequencies,
            tokens,
            self.head_dim,
            &mask.device(),
        );
        let mut x = self.embed_tokens.rows(ids)?; // [b, t, hidden]
        let seen = Seen::new(mask);
        for (i, layer) in self.layers.iter().enumerate() {
            observe(&format!("hidden_states.{i}"), x.clone());
            x = layer.forward(x, &rotary, &seen);
            observe(&format!("layer_out.{i}"), x.clone());
        }
        let x = self.norm.forward(x);
        observe(&format!("hidden_states.{}", self.layers.len()), x.clone());
        Ok(x)
    }

    /// Logits over the vocabulary, `[b, t, vocabulary]`, of hidden states `[b, t, hidden]`.
    /// Fails where the weights were saved without a head.
    pub fn logits(&self, hidden: Tensor<3>) -> Result<Tensor<3>, InputError> {
        let head = self.lm_head.as_ref().ok_or_else(|| InputError {
            model: "Llama",
            reason: "these weights have no lm_head.weight; logits need a LlamaForCausalLM file"
                .into(),
        })?;
        Ok(head.logits(hidden, self.precision))
    }
}

/// Which keys may be seen, as a tensor and as plain values.
struct Seen {
    mask: Tensor<2, Bool>,
    values: Arc<[bool]>,
}

impl Seen {
    fn new(mask: Tensor<2, Bool>) -> Self {
        Self {
            values: mask_values(mask.clone()),
            mask,
        }
    }
}

/// `x + attention(norm(x))`, then `x + mlp(norm(x))`.
#[derive(Clone, Debug)]
struct Layer {
    input_layernorm: RmsNorm,
    self_attn: Attention,
    post_attention_layernorm: RmsNorm,
    mlp: Mlp,
}

impl Layer {
    fn new(p: &Params<'_>, config: &LlamaConfig) -> Result<Self, WeightError> {
        let norm = |name: &str| RmsNorm::new(&p.sub(name), config.hidden_size, config.rms_norm_eps);
        Ok(Self {
            input_layernorm: norm("input_layernorm")?,
            self_attn: Attention::new(&p.sub("self_attn"), config)?,
            post_attention_layernorm: norm("post_attention_layernorm")?,
            mlp: Mlp::new(&p.sub("mlp"), config)?,
        })
    }

    fn forward(&self, x: Tensor<3>, rotary: &Rotary, seen: &Seen) -> Tensor<3> {
        if let Some(stream) = self.packed() {
            return self.forward_packed((x, stream), rotary, seen);
        }
        let y = self.input_layernorm.forward(x.clone());
        let x = x + self.self_attn.forward(y, rotary, seen.mask.clone());
        let y = self.post_attention_layernorm.forward(x.clone());
        x + self.mlp.forward(y)
    }

    /// The layer's weights, where they are packed.
    fn packed(&self) -> Option<PackedStream<'_>> {
        Some(PackedStream {
            norm1: [Some(self.input_layernorm.weight()), None],
            modulation: None,
            qkv: self.self_attn.qkv.packed()?,
            head_norms: None,
            tail: Some(PackedTail {
                out: self.self_attn.o_proj.packed()?,
                norm2: Some(self.post_attention_layernorm.weight()),
                up: self.mlp.up_proj.packed()?,
                gate: Some(self.mlp.gate_proj.packed()?),
                down: self.mlp.down_proj.packed()?,
            }),
        })
    }

    /// [`forward`](Self::forward) as one operation, where the weights are packed.
    fn forward_packed(
        &self,
        stream: (Tensor<3>, PackedStream<'_>),
        rotary: &Rotary,
        seen: &Seen,
    ) -> Tensor<3> {
        let block = PackedBlock {
            attention: self.self_attn.shape,
            head_dim: rotary.head_dim(),
            norm: NormKind::Rms,
            eps: [
                self.input_layernorm.eps(),
                self.post_attention_layernorm.eps(),
            ],
            head_eps: 0.0,
            activation: Activation::Silu,
            rotary: Some(rotary.tables()),
            key_mask: Some(seen.values.clone()),
        };
        let [x] = packed_block(&block, [stream]);
        x
    }
}

/// Causal grouped-query attention.
#[derive(Clone, Debug)]
struct Attention {
    qkv: Fan<3>,
    o_proj: Linear,
    shape: AttentionShape,
}

impl Attention {
    fn new(p: &Params<'_>, config: &LlamaConfig) -> Result<Self, WeightError> {
        let hidden = config.hidden_size;
        let (heads, kv_heads) = (config.num_attention_heads, config.kv_heads());
        let (width, kv_width) = (heads * config.head_dim(), kv_heads * config.head_dim());
        let names = ["q_proj", "k_proj", "v_proj"].map(|name| p.sub(name));
        let widths = [width, kv_width, kv_width];
        Ok(Self {
            qkv: Fan::new(names, hidden, widths, config.attention_bias)?,
            o_proj: dense(&p.sub("o_proj"), width, hidden, config.attention_bias)?,
            shape: AttentionShape {
                kv_heads,
                causal: true,
                ..AttentionShape::full(heads)
            },
        })
    }

    fn forward(&self, x: Tensor<3>, rotary: &Rotary, mask: Tensor<2, Bool>) -> Tensor<3> {
        let [q, k, v] = self.qkv.forward(&x);
        let q = rotary.apply(q); // [b, t, heads head_dim]
        let k = rotary.apply(k); // [b, t, kv_heads head_dim]
        self.o_proj
            .forward(attention(Qkv { q, k, v }, self.shape, Some(mask)))
    }
}

/// `down(silu(gate(x)) * up(x))`.
#[derive(Clone, Debug)]
struct Mlp {
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
}

impl Mlp {
    fn new(p: &Params<'_>, config: &LlamaConfig) -> Result<Self, WeightError> {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let project = |name: &str, i: usize, o: usize| dense(&p.sub(name), i, o, config.mlp_bias);
        Ok(Self {
            gate_proj: project("gate_proj", hidden, inner)?,
            up_proj: project("up_proj", hidden, inner)?,
            down_proj: project("down_proj", inner, hidden)?,
        })
    }

    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let gate = self.gate_proj.forward(x.clone()); // [b, t, inner]
        self.down_proj
            .forward(silu_gated(self.up_proj.forward(x), gate))
    }
}

/// A linear layer with or without a bias, as the configuration says.
fn dense(p: &Params<'_>, i: usize, o: usize, bias: bool) -> Result<Linear, WeightError> {
    if bias {
        Linear::new(p, i, o)
    } else {
        Linear::without_bias(p, i, o)
    }
}
