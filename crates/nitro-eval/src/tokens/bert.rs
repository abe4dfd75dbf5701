//! BERT's WordPiece, uncased, as ImageReward tokenises prompts.

use tokenizers::models::wordpiece::WordPiece;
use tokenizers::normalizers::BertNormalizer;
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;
use tokenizers::{AddedToken, Tokenizer};

use crate::EvalError;

/// `vocab.txt` of `bert-base-uncased`.
const VOCABULARY: &str = include_str!("../../data/bert_uncased_vocab.txt");
const CLS: u32 = 101;
const SEP: u32 = 102;
/// Tokens that BLIP added to the vocabulary.
const BLIP_TOKENS: [&str; 2] = ["[DEC]", "[ENC]"];

/// BERT's tokenizer with BLIP's two further tokens.
pub struct BertTokenizer {
    inner: Tokenizer,
}

impl std::fmt::Debug for BertTokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BertTokenizer").finish_non_exhaustive()
    }
}

impl BertTokenizer {
    /// Builds the tables.
    ///
    /// # Errors
    /// Never with the vocabulary that is built in.
    pub fn new() -> Result<Self, EvalError> {
        let failed = |e: tokenizers::Error| EvalError::Tokenizer {
            reason: e.to_string(),
        };
        let vocabulary = WordPiece::read_bytes(VOCABULARY.as_bytes()).map_err(failed)?;
        let model = WordPiece::builder()
            .vocab(vocabulary)
            .unk_token("[UNK]".to_owned())
            .build()
            .map_err(failed)?;
        let mut inner = Tokenizer::new(model);
        inner.with_normalizer(Some(BertNormalizer::default()));
        inner.with_pre_tokenizer(Some(BertPreTokenizer));
        let own = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"];
        let special: Vec<AddedToken> = own
            .iter()
            .chain(&BLIP_TOKENS)
            .map(|token| AddedToken::from(*token, true))
            .collect();
        inner.add_special_tokens(&special);
        Ok(Self { inner })
    }

    /// The ids of `text`, `[CLS]` first and `[SEP]` last, cut and padded to `length`, and how many of
    /// them are not padding.
    ///
    /// # Errors
    /// When the tokenizer fails, which no text is known to cause.
    pub fn encode(&self, text: &str, length: usize) -> Result<(Vec<u32>, usize), EvalError> {
        let encoding = self
            .inner
            .encode(text, false)
            .map_err(|e| EvalError::Tokenizer {
                reason: format!("{text:?}: {e}"),
            })?;
        let words = encoding.get_ids();
        let mut ids = vec![CLS];
        ids.extend(&words[..words.len().min(length.saturating_sub(2))]);
        ids.push(SEP);
        let used = ids.len();
        ids.resize(length.max(used), 0);
        Ok((ids, used))
    }
}
