//! How neural scorers run, and pairs of a picture and a prompt given on the command line.

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use clap::{Args, ValueEnum};
use image::RgbImage;
use nitro_eval::EvalError;
use nitro_eval::scorers::ScorerFiles;
use nitro_ops::Precision;

use super::super::failure::{bad_input, say};
use super::super::model_args::LocationArgs;

/// How scorers compute products.
#[derive(Clone, Copy, ValueEnum)]
enum ScorerPrecision {
    F32,
    Bf16,
}

/// How scorers run.
#[derive(Args)]
pub(super) struct ScorerArgs {
    /// How scorers compute products; bf16 is faster, and changes scores a little
    #[arg(long, value_enum, default_value_t = ScorerPrecision::F32)]
    scorer_precision: ScorerPrecision,
}

impl ScorerArgs {
    pub(super) fn device(&self) -> Device {
        Device::flex()
    }

    pub(super) fn precision(&self) -> Precision {
        match self.scorer_precision {
            ScorerPrecision::F32 => Precision::F32,
            ScorerPrecision::Bf16 => Precision::Bf16,
        }
    }

    /// For manifests.
    pub(super) fn precision_name(&self) -> String {
        match self.scorer_precision {
            ScorerPrecision::F32 => "f32".to_owned(),
            ScorerPrecision::Bf16 => "bf16".to_owned(),
        }
    }

    /// A scorer's files, downloaded as the other arguments say.
    pub(super) fn files(&self, location: &str, hub: &LocationArgs) -> ScorerFiles {
        ScorerFiles::new(location, hub.hub())
    }
}

/// Pictures to score by themselves.
#[derive(Args)]
pub(super) struct PairArgs {
    /// Score this picture for --prompt and nothing else (repeatable)
    #[arg(long, value_name = "FILE", requires = "prompt")]
    image: Vec<PathBuf>,
    /// The prompt of --image
    #[arg(long, value_name = "TEXT", requires = "image")]
    prompt: Option<String>,
}

impl PairArgs {
    /// Whether pictures are given.
    pub(super) fn given(&self) -> bool {
        !self.image.is_empty()
    }

    /// Prints a score and the file for each picture.
    pub(super) fn print(
        &self,
        score: impl Fn(&[(&RgbImage, &str)]) -> Result<Vec<f32>, EvalError>,
    ) -> anyhow::Result<()> {
        let prompt = self.prompt.as_deref().unwrap_or_default();
        for file in &self.image {
            let image = open(file)?;
            let scores = score(&[(&image, prompt)])?;
            for score in scores {
                say(format_args!("{score:.6}\t{}", file.display()));
            }
        }
        Ok(())
    }
}

/// Reads a picture as RGB.
pub(super) fn open(path: &Path) -> anyhow::Result<RgbImage> {
    match image::open(path) {
        Ok(image) => Ok(image.into_rgb8()),
        Err(e) => Err(bad_input(format!(
            "cannot read picture {}: {e}",
            path.display()
        ))),
    }
}
