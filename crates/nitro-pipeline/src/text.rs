//! Texts as the denoiser sees them, encoded once and kept.

use std::collections::HashMap;
use std::sync::Arc;

use burn::tensor::Tensor;

use crate::PipelineError;
use crate::pipeline::Pipeline;
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

/// The texts used last, encoded. A negative prompt is mostly the same, and people try one prompt with
/// many seeds.
#[derive(Debug)]
pub struct TextCache {
    capacity: usize,
    /// By the text as given and whether it is cleaned; the number says when it was last used.
    entries: HashMap<(String, bool), (u64, Arc<EncodedText>)>,
    uses: u64,
    hits: u64,
    misses: u64,
}

impl TextCache {
    /// A cache of at most `capacity` texts; 0 keeps none.
    pub fn new(capacity: usize) -> Self {
        Self {
            capacity,
            entries: HashMap::new(),
            uses: 0,
            hits: 0,
            misses: 0,
        }
    }

    /// Texts found here so far.
    pub fn hits(&self) -> u64 {
        self.hits
    }

    /// Texts that had to be encoded so far.
    pub fn misses(&self) -> u64 {
        self.misses
    }

    fn get(&mut self, key: &(String, bool)) -> Option<Arc<EncodedText>> {
        self.uses += 1;
        let entry = self.entries.get_mut(key)?;
        entry.0 = self.uses;
        self.hits += 1;
        Some(entry.1.clone())
    }

    fn put(&mut self, key: (String, bool), text: Arc<EncodedText>) {
        self.misses += 1;
        if self.capacity == 0 {
            return;
        }
        if self.entries.len() >= self.capacity {
            // Capacities are small: looking at all costs nothing beside encoding a text.
            let oldest = self.entries.iter().min_by_key(|(_, (used, _))| *used);
            if let Some(key) = oldest.map(|(key, _)| key.clone()) {
                self.entries.remove(&key);
            }
        }
        self.uses += 1;
        self.entries.insert(key, (self.uses, text));
    }
}

impl Pipeline {
    /// Encodes `texts`, taking from `cache` what it has and leaving there what it had not. What is
    /// missing is encoded together, every distinct text once.
    pub fn encode_cached(
        &self,
        texts: &[&str],
        clean_captions: bool,
        cache: &mut TextCache,
    ) -> Result<Vec<Arc<EncodedText>>, PipelineError> {
        let mut found: HashMap<&str, Arc<EncodedText>> = HashMap::new();
        let mut missing: Vec<&str> = Vec::new();
        for text in texts {
            if found.contains_key(text) || missing.contains(text) {
                continue;
            }
            match cache.get(&((*text).to_owned(), clean_captions)) {
                Some(encoded) => drop(found.insert(text, encoded)),
                None => missing.push(text),
            }
        }
        if !missing.is_empty() {
            let encoded = self.encode_texts(&missing, clean_captions)?;
            let [_, length, channels] = encoded.features.dims();
            let rows = encoded.texts.into_iter().zip(encoded.tokens);
            for (i, (given, (text, tokens))) in missing.into_iter().zip(rows).enumerate() {
                let features = encoded
                    .features
                    .clone()
                    .slice([i..i + 1, 0..length, 0..channels]);
                let encoded = Arc::new(EncodedText {
                    text,
                    tokens,
                    features,
                });
                cache.put((given.to_owned(), clean_captions), encoded.clone());
                found.insert(given, encoded);
            }
        }
        Ok(texts.iter().map(|text| found[text].clone()).collect())
    }
}
