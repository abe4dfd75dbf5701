//! The miniature's tokenizer: byte-level BPE trained on captions, in Hugging Face's files.

use std::path::Path;

use nitro_data::shapes::captions;
use nitro_pipeline::tokenizer::TextTokenizer;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, Tokenizer};

use crate::TrainError;

/// Llama 3's first and last special token, so that the miniature's files read like the real ones.
pub const BOS: &str = "<|begin_of_text|>";
/// End of text; also pads.
pub const EOS: &str = "<|end_of_text|>";

/// Trains a tokenizer of at most `vocab_size` tokens on `count` captions drawn from `seed`.
pub fn train(seed: u64, count: usize, vocab_size: usize) -> Result<Tokenizer, TrainError> {
    let fail = |e: Box<dyn std::error::Error + Send + Sync>| TrainError::Tokenizer(e.to_string());
    let mut tokenizer = Tokenizer::new(BPE::default());
    tokenizer.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
    tokenizer.with_decoder(Some(ByteLevel::default()));
    let mut trainer: TrainerWrapper = BpeTrainer::builder()
        .vocab_size(vocab_size)
        .show_progress(false)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(vec![
            AddedToken::from(BOS, true),
            AddedToken::from(EOS, true),
        ])
        .build()
        .into();
    tokenizer
        .train(&mut trainer, captions(seed).take(count))
        .map_err(fail)?;
    let id = |token: &str| {
        tokenizer
            .token_to_id(token)
            .ok_or_else(|| TrainError::Tokenizer(format!("no {token}")))
    };
    let special = vec![(BOS.to_owned(), id(BOS)?)];
    let template = TemplateProcessing::builder()
        .try_single(format!("{BOS} $A"))
        .and_then(|b| b.try_pair(format!("{BOS} $A {BOS} $B")))
        .map_err(TrainError::Tokenizer)?
        .special_tokens(special)
        .build()
        .map_err(|e| TrainError::Tokenizer(e.to_string()))?;
    tokenizer.with_post_processor(Some(template));
    Ok(tokenizer)
}

/// Writes `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json` into `dir`.
pub fn save(tokenizer: &Tokenizer, dir: &Path) -> Result<(), TrainError> {
    let json = tokenizer
        .to_string(true)
        .map_err(|e| TrainError::Tokenizer(e.to_string()))?;
    let config = serde_json::json!({
        "bos_token": BOS, "eos_token": EOS, "model_max_length": 131_072,
        "model_input_names": ["input_ids", "attention_mask"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    });
    let map = serde_json::json!({ "bos_token": BOS, "eos_token": EOS });
    crate::files::write_whole(&dir.join("tokenizer.json"), json.as_bytes())?;
    crate::files::write_json(&dir.join("tokenizer_config.json"), &config)?;
    crate::files::write_json(&dir.join("special_tokens_map.json"), &map)
}

/// The same tokenizer, giving `length` ids for every text, as a trained model's does.
pub fn padded(tokenizer: &Tokenizer, length: usize) -> Result<TextTokenizer, TrainError> {
    let origin = "the trained tokenizer".to_owned();
    Ok(TextTokenizer::new(tokenizer.clone(), origin, EOS, length)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn captions_come_back_from_their_tokens() {
        let tokenizer = train(1, 2000, 400).unwrap();
        for caption in captions(2).take(50) {
            let ids = tokenizer.encode(caption.as_str(), true).unwrap();
            assert_eq!(ids.get_tokens()[0], BOS);
            assert_eq!(tokenizer.decode(ids.get_ids(), true).unwrap(), caption);
        }
        let tokens = padded(&tokenizer, 32)
            .unwrap()
            .encode("a red circle")
            .unwrap();
        let mask = tokens.mask();
        assert_eq!((tokens.ids.len(), mask.len()), (32, 32));
        assert!(mask[0] && !mask[31]);
    }
}
