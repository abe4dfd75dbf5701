//! What a caller asks of a pipeline, and what it gets.

use std::time::Duration;

use image::{GrayImage, RgbImage};
pub use nitro_diffusion::noise::{CudaDevice, NoiseKind};

use crate::RequestError;

/// Which starting noise a request's pictures get.
///
/// Pictures are counted prompt by prompt: all pictures of the first prompt, then those of the second.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seeds {
    /// Picture `k` of every prompt gets its own generator with seed `first + k`, so any picture can
    /// be made again alone, whatever it was made with. In diffusers:
    /// `generator=[torch.Generator().manual_seed(first + k) for k in range(n)]` per prompt.
    PerImage(u64),
    /// One generator draws the noise of all pictures in one go. In diffusers:
    /// `generator=torch.Generator().manual_seed(seed)`. For a single picture both forms agree.
    Shared(u64),
    /// A seed for each picture.
    Each(Vec<u64>),
}

impl Default for Seeds {
    fn default() -> Self {
        Self::PerImage(0)
    }
}

/// A picture to start from.
#[derive(Clone, Debug)]
pub struct InitImage {
    /// The picture. It is scaled to cover the requested size and cut to it around its centre.
    pub image: RgbImage,
    /// How much of the schedule is run: 1 forgets the picture, values near 0 hardly change it.
    pub strength: f64,
    /// Which part to paint anew (white) and which to keep (black); as large as `image`. What is
    /// kept is kept pixel by pixel.
    pub mask: Option<GrayImage>,
}

/// What to generate. `Request::new("a red circle")` is complete; everything else has the defaults
/// that the model's card names.
#[derive(Clone, Debug)]
pub struct Request {
    /// What the pictures show.
    pub prompts: Vec<String>,
    /// What they should not show: none, one for all prompts, or one per prompt. Used only with
    /// guidance.
    pub negative_prompts: Vec<String>,
    /// Pictures per prompt.
    pub images_per_prompt: usize,
    /// Sampling steps; the variant's by default.
    pub steps: Option<usize>,
    /// Classifier-free guidance scale; the variant's by default, no guidance at 1 or less.
    pub guidance_scale: Option<f64>,
    /// Pixels; the variant's resolution by default.
    pub width: Option<usize>,
    /// Pixels; the variant's resolution by default.
    pub height: Option<usize>,
    /// Starting noise.
    pub seeds: Seeds,
    /// Which tool's random numbers a seed stands for.
    pub noise: NoiseKind,
    /// Image-to-image and inpainting.
    pub init: Option<InitImage>,
    /// Noise in place of drawn one: pictures x channels x rows x columns of latents.
    pub latents: Option<Vec<f32>>,
    /// Cleans prompts as the official pipeline does (lower case, no addresses, no markup, ...).
    pub clean_captions: bool,
    /// Most pictures denoised together; it bounds memory and changes nothing else.
    pub batch: usize,
}

impl Default for Request {
    fn default() -> Self {
        Self {
            prompts: Vec::new(),
            negative_prompts: Vec::new(),
            images_per_prompt: 1,
            steps: None,
            guidance_scale: None,
            width: None,
            height: None,
            seeds: Seeds::default(),
            noise: NoiseKind::TorchCpu,
            init: None,
            latents: None,
            clean_captions: true,
            batch: 8,
        }
    }
}

impl Request {
    /// One picture of `prompt`.
    pub fn new(prompt: impl Into<String>) -> Self {
        Self::of([prompt])
    }

    /// One picture of each prompt.
    pub fn of<S: Into<String>>(prompts: impl IntoIterator<Item = S>) -> Self {
        Self {
            prompts: prompts.into_iter().map(Into::into).collect(),
            ..Self::default()
        }
    }

    /// Says what the pictures should not show.
    pub fn negative(mut self, prompt: impl Into<String>) -> Self {
        self.negative_prompts = vec![prompt.into()];
        self
    }

    /// Seed of the first picture; see [`Seeds::PerImage`].
    pub fn seed(mut self, seed: u64) -> Self {
        self.seeds = Seeds::PerImage(seed);
        self
    }

    /// Number of sampling steps.
    pub fn steps(mut self, steps: usize) -> Self {
        self.steps = Some(steps);
        self
    }

    /// Guidance scale.
    pub fn guidance(mut self, scale: f64) -> Self {
        self.guidance_scale = Some(scale);
        self
    }

    /// Pictures per prompt.
    pub fn images(mut self, count: usize) -> Self {
        self.images_per_prompt = count;
        self
    }

    /// Side of the pictures in pixels.
    pub fn size(mut self, side: usize) -> Self {
        (self.width, self.height) = (Some(side), Some(side));
        self
    }

    /// Pictures of the whole request.
    pub fn pictures(&self) -> usize {
        self.prompts.len() * self.images_per_prompt
    }

    /// The negative prompt of prompt `i`.
    pub(crate) fn negative_of(&self, i: usize) -> &str {
        match self.negative_prompts.as_slice() {
            [] => "",
            [one] => one,
            several => &several[i],
        }
    }

    /// The seed of each picture, where each has one of its own.
    pub(crate) fn seed_of(&self, picture: usize) -> Option<u64> {
        match &self.seeds {
            Seeds::PerImage(first) => {
                Some(first.wrapping_add((picture % self.images_per_prompt) as u64))
            }
            Seeds::Shared(seed) => (self.pictures() == 1).then_some(*seed),
            Seeds::Each(seeds) => seeds.get(picture).copied(),
        }
    }

    /// Checks everything that does not depend on the model.
    pub(crate) fn check(&self) -> Result<(), RequestError> {
        let setting = |name, value: String, expected| {
            Err(RequestError::Setting {
                name,
                value,
                expected,
            })
        };
        if self.prompts.is_empty() {
            return Err(RequestError::NoPrompt);
        }
        if let Some(i) = self.prompts.iter().position(|p| p.trim().is_empty()) {
            return Err(RequestError::EmptyPrompt {
                number: i + 1,
                cleaned: "",
            });
        }
        let negatives = self.negative_prompts.len();
        if negatives > 1 && negatives != self.prompts.len() {
            return Err(RequestError::NegativePrompts {
                given: negatives,
                prompts: self.prompts.len(),
            });
        }
        if self.images_per_prompt == 0 {
            return setting("number of images", "0".to_owned(), "at least 1");
        }
        if self.batch == 0 {
            return setting("batch", "0".to_owned(), "at least 1");
        }
        if let Some(steps @ (0 | 1001..)) = self.steps {
            return setting("steps", steps.to_string(), "between 1 and 1000");
        }
        if let Some(scale) = self.guidance_scale
            && !(scale.is_finite() && scale >= 0.0)
        {
            return setting(
                "guidance scale",
                scale.to_string(),
                "a finite number, 0 or more",
            );
        }
        if let Seeds::Each(seeds) = &self.seeds
            && seeds.len() != self.pictures()
        {
            return Err(RequestError::Seeds {
                found: seeds.len(),
                images: self.pictures(),
            });
        }
        self.init.as_ref().map_or(Ok(()), InitImage::check)
    }
}

impl From<&str> for Request {
    fn from(prompt: &str) -> Self {
        Self::new(prompt)
    }
}

impl InitImage {
    pub(crate) fn check(&self) -> Result<(), RequestError> {
        if !(self.strength > 0.0 && self.strength <= 1.0) {
            return Err(RequestError::Setting {
                name: "strength",
                value: self.strength.to_string(),
                expected: "above 0 and at most 1",
            });
        }
        let (width, height) = (self.image.width() as usize, self.image.height() as usize);
        match &self.mask {
            Some(mask) if mask.dimensions() != self.image.dimensions() => {
                Err(RequestError::MaskSize {
                    mask_width: mask.width() as usize,
                    mask_height: mask.height() as usize,
                    width,
                    height,
                })
            }
            _ => Ok(()),
        }
    }
}

/// What a request gave.
#[derive(Clone, Debug)]
pub struct Output {
    /// The pictures, prompt by prompt.
    pub images: Vec<Generated>,
    /// Their final latents, scaled as the denoiser sees them: pictures x channels x rows x columns.
    pub latents: Vec<f32>,
    /// Steps that were run.
    pub steps: usize,
    /// Guidance scale that was used.
    pub guidance_scale: f64,
    /// Prompts that did not fit.
    pub truncations: Vec<Truncation>,
    /// Where the time went.
    pub timings: Timings,
}

/// One picture.
#[derive(Clone, Debug)]
pub struct Generated {
    /// Pixels.
    pub image: RgbImage,
    /// Which prompt of the request it shows.
    pub prompt: usize,
    /// Its seed; absent where several pictures share a generator or the noise was given.
    pub seed: Option<u64>,
}

/// A prompt that was longer than the text encoder reads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Truncation {
    /// Which prompt of the request.
    pub prompt: usize,
    /// Whether it is that prompt's negative prompt.
    pub negative: bool,
    /// Tokens that were kept.
    pub tokens: usize,
    /// The text that was dropped.
    pub dropped: String,
}

/// Time spent in each stage.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Timings {
    /// Cleaning, tokenising and encoding prompts.
    pub text: Duration,
    /// Encoding the initial image.
    pub encode: Duration,
    /// All denoising steps.
    pub denoise: Duration,
    /// Latents to pixels.
    pub decode: Duration,
}

impl Timings {
    /// Each stage's name and time, in order.
    pub fn stages(&self) -> [(&'static str, Duration); 4] {
        [
            (Stage::Text.name(), self.text),
            (Stage::Encode.name(), self.encode),
            (Stage::Denoise.name(), self.denoise),
            (Stage::Decode.name(), self.decode),
        ]
    }

    /// The sum of all stages.
    pub fn total(&self) -> Duration {
        self.stages().iter().map(|(_, time)| *time).sum()
    }
}

/// A part of the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Prompts to features.
    Text,
    /// Initial image to latents.
    Encode,
    /// Noise to latents.
    Denoise,
    /// Latents to pixels.
    Decode,
}

impl Stage {
    /// What reports call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Encode => "encode",
            Self::Denoise => "denoise",
            Self::Decode => "decode",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_count_up_within_each_prompt() {
        let request = Request {
            images_per_prompt: 2,
            ..Request::of(["a", "b"])
        }
        .seed(7);
        let seeds: Vec<_> = (0..4).filter_map(|i| request.seed_of(i)).collect();
        assert_eq!(seeds, [7, 8, 7, 8]);
        let shared = Request {
            seeds: Seeds::Shared(7),
            ..request
        };
        assert_eq!(shared.seed_of(1), None);
        assert_eq!(
            Request {
                seeds: Seeds::Shared(7),
                ..Request::new("a")
            }
            .seed_of(0),
            Some(7)
        );
    }

    #[test]
    fn impossible_requests_are_refused_with_the_reason() {
        let ok = Request::new("a circle");
        assert_eq!(ok.check(), Ok(()));
        let image = RgbImage::new(8, 8);
        let init = |strength, mask| {
            Some(InitImage {
                image: image.clone(),
                strength,
                mask,
            })
        };
        for (request, says) in [
            (Request::default(), "no prompt"),
            (Request::of(["a", " \t"]), "prompt 2 is empty"),
            (ok.clone().steps(0), "steps 0"),
            (ok.clone().guidance(f64::NAN), "guidance scale NaN"),
            (ok.clone().images(0), "number of images 0"),
            (
                Request {
                    seeds: Seeds::Each(vec![1, 2]),
                    ..ok.clone()
                },
                "2 seeds for 1 pictures",
            ),
            (
                Request {
                    negative_prompts: vec!["x".into(), "y".into()],
                    ..Request::of(["a", "b", "c"])
                },
                "2 negative prompts for 3 prompts",
            ),
            (
                Request {
                    init: init(0.0, None),
                    ..ok.clone()
                },
                "strength 0",
            ),
            (
                Request {
                    init: init(0.5, Some(GrayImage::new(4, 8))),
                    ..ok.clone()
                },
                "the mask is 4x8 but the initial image is 8x8",
            ),
        ] {
            let error = request.check().unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }
}
