//! What a client wants, whatever API it speaks.

use image::{GrayImage, RgbImage};

/// Pictures as a client wants them; what is absent is up to the model.
#[derive(Debug, Default)]
pub struct Wish {
    /// What the pictures show.
    pub prompt: String,
    /// What they should not show; empty for nothing.
    pub negative_prompt: String,
    /// A variant by name; the first one otherwise.
    pub variant: Option<String>,
    /// How many.
    pub pictures: usize,
    /// Width and height in pixels.
    pub size: Option<(usize, usize)>,
    /// Denoising steps.
    pub steps: Option<usize>,
    /// How strongly the prompt steers.
    pub guidance: Option<f64>,
    /// Drawn if absent.
    pub seed: Option<u64>,
    /// Where to start from, instead of noise alone.
    pub start: Option<Start>,
    /// Previews of each picture on its way.
    pub previews: usize,
}

/// A picture to start from.
#[derive(Clone, Debug)]
pub struct Start {
    /// The picture.
    pub image: RgbImage,
    /// How much of it is changed, above 0 to 1.
    pub strength: f64,
    /// White where it is painted anew.
    pub mask: Option<GrayImage>,
}
