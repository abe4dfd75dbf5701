//! Cached pairs of the shapes world as training examples.

use std::ops::Range;
use std::path::Path;

use nitro_data::shapes::{Example as Rendered, render};
use rayon::prelude::*;

use super::source::{Example, Source, Text, Wanted, WantedRepa};
use crate::TrainError;
use crate::config::CommonConfig;
use crate::data::shuffled;
use crate::latents::Latents;
use crate::pictures::{from_bytes, normalised};

/// Prompts of the sample grids: one or two of each kind of task.
pub(super) const PROMPTS: [&str; 16] = [
    "a circle",
    "a star",
    "a red heart",
    "a blue ring",
    "a green triangle",
    "a circle and a star",
    "a cross and a crescent",
    "two squares",
    "three hearts",
    "four rings",
    "a circle left of a square",
    "a star above a ring",
    "a heart below a cross",
    "a red circle and a blue square",
    "a yellow star and a purple ring",
    "a red circle left of a blue square",
];

/// All pairs of a folder, in memory.
pub(super) struct Pairs {
    latents: Latents,
    seed: u64,
    batch_size: usize,
    /// Side of the pictures that REPA's teacher looks at, which are rendered again.
    picture: Option<usize>,
}

impl Pairs {
    pub(super) fn open(
        folder: &Path,
        run: &CommonConfig,
        wanted: Wanted,
    ) -> Result<Self, TrainError> {
        let latents = Latents::open(folder)?;
        let wrong = |reason: String| TrainError::Config {
            origin: folder.display().to_string(),
            reason,
        };
        if latents.shape != wanted.latent {
            return Err(wrong(format!(
                "latents are {:?}, the model takes {:?}",
                latents.shape, wanted.latent
            )));
        }
        let picture = match wanted.repa {
            WantedRepa::Nothing => None,
            WantedRepa::Picture(side) => Some(side),
            WantedRepa::Features(_) => {
                return Err(wrong(
                    "cached pairs hold no DINOv2 features: `repa.encoder` must name an encoder"
                        .to_owned(),
                ));
            }
        };
        if picture.is_some() {
            latents.check_seeds()?;
        }
        Ok(Self {
            latents,
            seed: run.seed,
            batch_size: run.batch_size,
            picture,
        })
    }
}

impl Source for Pairs {
    fn size(&self) -> (usize, u64) {
        let count = self.latents.len();
        (count, (count / self.batch_size).max(1) as u64)
    }

    fn read(&self, step: u64, examples: Range<usize>) -> Result<Vec<Example>, TrainError> {
        let first = step * self.batch_size as u64;
        let read = |i: usize| {
            let index = shuffled(self.seed, first + i as u64, self.latents.len());
            let (latent, caption) = self.latents.pair(index);
            let picture = |side: usize| {
                let scene = Rendered::from_seed(self.latents.seed(index)).scene;
                normalised(from_bytes(&render(&scene, side), side, (0, 0), side))
            };
            Example {
                latent: latent.iter().map(|z| z.to_f32()).collect(),
                text: Text::Caption(caption.to_owned()),
                repa: self.picture.map(picture).unwrap_or_default(),
            }
        };
        Ok(examples.into_par_iter().map(read).collect())
    }

    fn gives_captions(&self) -> bool {
        true
    }

    fn sample_prompts(&self) -> Result<Vec<String>, TrainError> {
        Ok(PROMPTS.map(str::to_owned).to_vec())
    }

    fn fingerprint(&self) -> Result<String, TrainError> {
        let (count, checksum) = (self.latents.len(), self.latents.checksum());
        Ok(format!("{count} pairs {checksum:08x}"))
    }
}
