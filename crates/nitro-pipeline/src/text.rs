//! Texts as the denoiser sees them: cleaned, tokenised, encoded.

use std::sync::Arc;

use burn::tensor::{Tensor, TensorData};

use crate::PipelineError;
use crate::pipeline::{Pipeline, text_features, tokenise};
use crate::prompt_cache::PromptCache;
use crate::tokenizer::Tokens;

/// One text, cleaned, tokenised and encoded.
#[derive(Clone, Debug)]
pub struct EncodedText {
    /// The text as it was tokenised.
    pub text: String,
    /// Its tokens.
    pub tokens: Tokens,
    /// Features `[1, text_tokens, channels]`.
    pub(crate) features: Tensor<3>,
}

/// Token ids and features of a list of texts.
#[derive(Clone, Debug)]
pub struct TextFeatures {
    /// The texts as they were tokenised.
    pub texts: Vec<String>,
    /// Their tokens.
    pub tokens: Vec<Tokens>,
    /// Features `[texts, text_tokens, channels]`.
    pub features: Tensor<3>,
}

impl Pipeline {
    /// Cleans (if asked to), tokenises and encodes texts, all of one length, into one tensor.
    pub fn encode_texts(
        &self,
        texts: &[&str],
        clean_captions: bool,
    ) -> Result<TextFeatures, PipelineError> {
        let (texts, tokens) = tokenise(&self.tokenizer, texts, clean_captions)?;
        let all = self.features(&tokens)?.concat();
        Ok(TextFeatures {
            features: self.feature_tensor(all, tokens.len()),
            texts,
            tokens,
        })
    }

    /// Cleans (if asked to), tokenises and encodes texts, each by itself. Texts of the same words
    /// share their features.
    pub(crate) fn encode(
        &self,
        texts: &[&str],
        clean_captions: bool,
    ) -> Result<Vec<Arc<EncodedText>>, PipelineError> {
        let (texts, tokens) = tokenise(&self.tokenizer, texts, clean_captions)?;
        let features = self.features(&tokens)?;
        let mut encoded: Vec<Arc<EncodedText>> = Vec::with_capacity(texts.len());
        for ((text, tokens), features) in texts.into_iter().zip(tokens).zip(features) {
            let same = encoded.iter().find(|other| other.text == text);
            encoded.push(match same {
                Some(same) => same.clone(),
                None => Arc::new(EncodedText {
                    text,
                    tokens,
                    features: self.feature_tensor(features.to_vec(), 1),
                }),
            });
        }
        Ok(encoded)
    }

    /// Features of texts encoded before, and how often they were asked for.
    pub fn prompt_cache(&self) -> &PromptCache {
        &self.prompt_cache
    }

    /// `[texts, text_tokens, channels]`
    fn feature_tensor(&self, values: Vec<f32>, texts: usize) -> Tensor<3> {
        let shape = [texts, self.text_tokens(), self.text_config.hidden_size];
        Tensor::from_data(TensorData::new(values, shape), &self.device)
    }

    /// The features `text_tokens * channels` of each text: from the cache, or computed, all that are
    /// missing in one pass and each text once.
    fn features(&self, tokens: &[Tokens]) -> Result<Vec<Arc<[f32]>>, PipelineError> {
        let mut known: Vec<Option<Arc<[f32]>>> = vec![None; tokens.len()];
        let mut missing: Vec<usize> = Vec::new();
        for i in 0..tokens.len() {
            match tokens[..i].iter().position(|earlier| *earlier == tokens[i]) {
                Some(earlier) => known[i] = known[earlier].clone(),
                None => known[i] = self.prompt_cache.get(&tokens[i]),
            }
            if known[i].is_none() && !missing.iter().any(|&j| tokens[j] == tokens[i]) {
                missing.push(i);
            }
        }
        if !missing.is_empty() {
            let of_missing: Vec<&Tokens> = missing.iter().map(|&i| &tokens[i]).collect();
            let file = &self.sources.text_encoder;
            let encoder = self.text_encoder()?;
            let computed = text_features(&encoder, file, &of_missing, &self.device)?;
            drop(encoder);
            if self.on_demand {
                self.text_encoder.release();
            }
            let computed = computed.as_slice::<f32>().unwrap_or_default();
            let each = (computed.len() / missing.len()).max(1);
            for (values, i) in computed.chunks_exact(each).zip(missing) {
                let features: Arc<[f32]> = values.into();
                self.prompt_cache.insert(&tokens[i], features.clone());
                for (known, other) in known.iter_mut().zip(tokens) {
                    if *other == tokens[i] {
                        *known = Some(features.clone());
                    }
                }
            }
        }
        Ok(known.into_iter().flatten().collect())
    }
}
