//! Texts to the token ids that CLIP and ImageReward were trained on; both vocabularies are built in.

mod bert;
mod clip;

pub use bert::BertTokenizer;
pub use clip::ClipTokenizer;
