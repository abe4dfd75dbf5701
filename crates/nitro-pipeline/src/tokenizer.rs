//! Prompts to token ids, as the official pipeline makes them with Hugging Face `tokenizers`.

use burn::tensor::{Bool, Device, Int, Tensor, TensorData};
use tokenizers::{PaddingParams, PaddingStrategy, TruncationParams};

use crate::PipelineError;
use crate::files::ModelFile;

/// Token ids of one text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tokens {
    /// Ids, begin-of-text first, padded on the right with the end-of-text token.
    pub ids: Vec<u32>,
    /// Ids that are text, from the left; the rest is padding.
    pub length: usize,
    /// The end of the text that did not fit, if it was cut.
    pub cut: Option<String>,
}

impl Tokens {
    /// 1 for text, 0 for padding.
    pub fn mask(&self) -> Vec<bool> {
        (0..self.ids.len()).map(|i| i < self.length).collect()
    }
}

/// Ids and masks `[texts, length]` of texts of one length, as the text encoder takes them.
pub fn token_tensors(tokens: &[&Tokens], device: &Device) -> (Tensor<2, Int>, Tensor<2, Bool>) {
    let shape = [tokens.len(), tokens.first().map_or(0, |t| t.ids.len())];
    let ids = tokens.iter().flat_map(|t| t.ids.iter());
    let ids: Vec<i32> = ids.map(|id| *id as i32).collect();
    let mask: Vec<bool> = tokens.iter().flat_map(|t| t.mask()).collect();
    (
        Tensor::from_data(TensorData::new(ids, shape), device),
        Tensor::from_data(TensorData::new(mask, shape), device),
    )
}

/// A tokenizer that makes every text the same length.
pub struct TextTokenizer {
    inner: tokenizers::Tokenizer,
    origin: String,
    text_tokens: usize,
}

impl std::fmt::Debug for TextTokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TextTokenizer")
            .field("origin", &self.origin)
            .finish_non_exhaustive()
    }
}

impl TextTokenizer {
    /// Reads `tokenizer.json`, and the end-of-text token from `tokenizer_config.json`. Texts become
    /// `text_tokens` ids long, `vocabulary` is how many ids the text encoder knows.
    pub fn load(
        tokenizer: &ModelFile,
        config: &ModelFile,
        text_tokens: usize,
        vocabulary: usize,
    ) -> Result<Self, PipelineError> {
        let origin = tokenizer.name();
        let bad = |reason: String| PipelineError::BadFile {
            file: origin.clone(),
            reason,
        };
        let inner = tokenizers::Tokenizer::from_bytes(tokenizer.read()?)
            .map_err(|e| bad(format!("not a Hugging Face tokenizer: {e}")))?;
        let largest = inner.get_vocab(true).into_values().max().unwrap_or(0) as usize;
        if largest >= vocabulary {
            return Err(bad(format!(
                "it makes ids up to {largest}, but the text encoder knows {vocabulary}; they are \
                 not of the same model"
            )));
        }
        Self::new(inner, origin, &end_of_text(config)?, text_tokens)
    }

    /// Makes `inner` give `text_tokens` ids for every text, padded with `end_of_text`; messages call
    /// it `origin`.
    pub fn new(
        mut inner: tokenizers::Tokenizer,
        origin: String,
        end_of_text: &str,
        text_tokens: usize,
    ) -> Result<Self, PipelineError> {
        let bad = |reason: String| PipelineError::BadFile {
            file: origin.clone(),
            reason,
        };
        let pad_id = inner.token_to_id(end_of_text).ok_or_else(|| {
            bad(format!(
                "it has no token {end_of_text:?}, its eos_token, to pad with"
            ))
        })?;
        inner.with_padding(Some(PaddingParams {
            // Nitro-E pads with the end-of-text token.
            strategy: PaddingStrategy::Fixed(text_tokens),
            pad_id,
            pad_token: end_of_text.to_owned(),
            ..Default::default()
        }));
        inner
            .with_truncation(Some(TruncationParams {
                max_length: text_tokens,
                ..Default::default()
            }))
            .map_err(|e| bad(format!("it cannot cut texts to {text_tokens} tokens: {e}")))?;
        Ok(Self {
            inner,
            origin,
            text_tokens,
        })
    }

    /// Ids per text.
    pub fn text_tokens(&self) -> usize {
        self.text_tokens
    }

    /// The ids of `text`.
    pub fn encode(&self, text: &str) -> Result<Tokens, PipelineError> {
        let encoding = self
            .inner
            .encode(text, true)
            .map_err(|e| PipelineError::BadFile {
                file: self.origin.clone(),
                reason: format!("it cannot tokenise {text:?}: {e}"),
            })?;
        // The first overflowing piece begins where the kept text ends.
        let cut = encoding.get_overflowing().first().map(|piece| {
            let start = piece
                .get_offsets()
                .iter()
                .zip(piece.get_special_tokens_mask())
                .find(|(_, special)| **special == 0)
                .map_or(text.len(), |(offsets, _)| offsets.0);
            text.get(start..).unwrap_or_default().trim().to_owned()
        });
        Ok(Tokens {
            ids: encoding.get_ids().to_vec(),
            length: encoding
                .get_attention_mask()
                .iter()
                .filter(|m| **m == 1)
                .count(),
            cut,
        })
    }
}

/// `eos_token` of a `tokenizer_config.json`, which writes it as a string or as an object.
fn end_of_text(config: &ModelFile) -> Result<String, PipelineError> {
    let bad = |reason: String| PipelineError::BadFile {
        file: config.name(),
        reason,
    };
    let json: serde_json::Value = serde_json::from_slice(&config.read()?)
        .map_err(|e| bad(format!("not a tokenizer configuration: {e}")))?;
    let eos = &json["eos_token"];
    eos.as_str()
        .or_else(|| eos["content"].as_str())
        .map(str::to_owned)
        .ok_or_else(|| bad("it names no eos_token, with which texts are padded".to_owned()))
}
