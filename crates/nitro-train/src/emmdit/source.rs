//! Training examples, wherever they come from.

use std::ops::Range;

use nitro_data::mds::Damage;

use crate::TrainError;

/// One training example.
pub(super) struct Example {
    /// The latent `[c, h, w]`; the run's scale makes it what the model sees.
    pub(super) latent: Vec<f32>,
    /// The caption.
    pub(super) text: Text,
    /// For REPA: the picture `[3, side, side]` as the teacher takes it, or its features `[tokens,
    /// width]`. Empty without.
    pub(super) repa: Vec<f32>,
}

/// A caption, or the text encoder's states `[text_tokens, channels]` of it.
pub(super) enum Text {
    Caption(String),
    States(Vec<f32>),
}

/// What a source must know about the model.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    /// Channels, height and width of a latent.
    pub(super) latent: [usize; 3],
    /// Tokens and channels of the text states.
    pub(super) text: [usize; 2],
    /// What REPA needs.
    pub(super) repa: WantedRepa,
}

/// What REPA needs of an example.
#[derive(Clone, Copy, Debug)]
pub(super) enum WantedRepa {
    Nothing,
    /// A picture of this side for the teacher.
    Picture(usize),
    /// Features of so many tokens and channels.
    Features([usize; 2]),
}

/// Where examples come from. What a step sees is a function of the seed, the step and the example's
/// number alone.
pub(super) trait Source: Send + Sync {
    /// Number of different examples, and of steps in an epoch.
    fn size(&self) -> (usize, u64);

    /// The examples `examples` of the batch of `step`.
    fn read(&self, step: u64, examples: Range<usize>) -> Result<Vec<Example>, TrainError>;

    /// Whether examples carry captions, not states.
    fn gives_captions(&self) -> bool;

    /// Captions for sample pictures.
    fn sample_prompts(&self) -> Result<Vec<String>, TrainError>;

    /// What the data are, as a text that is another one for others.
    fn fingerprint(&self) -> Result<String, TrainError>;

    /// The damage met so far.
    fn damage(&self) -> Vec<Damage> {
        Vec::new()
    }
}
