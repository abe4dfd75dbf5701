//! Making the pictures that a benchmark asks for, several prompts in each forward pass.

use clap::Args;
use image::RgbImage;
use nitro::{Pipeline, Request, Seeds};
use nitro_eval::Manifest;

use super::super::interrupt;
use super::super::model_args::{ModelArgs, use_threads};
use super::super::progress::Progress;
use super::super::ranks;

/// Which model makes the pictures, and how.
#[derive(Args)]
pub(super) struct PictureArgs {
    /// Sampling steps [default: the variant's]
    #[arg(long, value_name = "N")]
    steps: Option<usize>,
    /// Guidance scale [default: the variant's]
    #[arg(short, long, alias = "cfg-scale", value_name = "SCALE")]
    guidance_scale: Option<f64>,
    /// Pictures denoised together
    #[arg(long, default_value_t = 32, value_name = "N")]
    batch: usize,
    #[command(flatten)]
    pub(super) model: ModelArgs,
}

/// How pictures are made.
#[derive(Clone, Copy)]
pub(super) struct Settings {
    /// Sampling steps, if not the variant's.
    pub(super) steps: Option<usize>,
    /// Guidance scale, if not the variant's.
    pub(super) guidance: Option<f64>,
    /// Pictures denoised together.
    pub(super) batch: usize,
}

/// Puts one prompt's pictures where they belong.
type Save<'a> = Box<dyn Fn(&[RgbImage]) -> anyhow::Result<()> + 'a>;

/// A prompt whose pictures are to be made.
pub(super) struct Wanted<'a> {
    /// The prompt.
    pub(super) prompt: &'a str,
    /// Stores its pictures; after that the prompt is done.
    pub(super) save: Save<'a>,
}

impl PictureArgs {
    /// Before anything is computed: the number of threads, and a progress line for this command.
    pub(super) fn begin(&self) -> anyhow::Result<Progress> {
        use_threads(self.model.threads)?;
        Ok(Progress::new(self.model.location.quiet))
    }

    /// Loads the model.
    pub(super) fn load(&self, progress: &Progress) -> anyhow::Result<Pipeline> {
        self.model.load(None, progress)
    }

    /// How the pictures are made.
    pub(super) fn settings(&self) -> Settings {
        Settings {
            steps: self.steps,
            guidance: self.guidance_scale,
            batch: self.batch,
        }
    }
}

impl Settings {
    /// What the pictures are made with.
    pub(super) fn manifest(
        &self,
        pipeline: &Pipeline,
        seeds: Vec<u64>,
        progress: &Progress,
    ) -> anyhow::Result<Manifest> {
        progress.stage("hashing the weights");
        Ok(Manifest {
            checkpoint: pipeline.fingerprint()?,
            steps: self.steps.unwrap_or(pipeline.variant().steps),
            guidance: self.guidance.unwrap_or(pipeline.variant().guidance),
            seeds,
        })
    }

    /// Makes `each` pictures of every prompt of `open`; `total` counts those that are done as well.
    /// Several processes share the prompts, and wait for each other at the end.
    pub(super) fn make(
        &self,
        pipeline: &Pipeline,
        open: &[Wanted<'_>],
        total: usize,
        each: usize,
        seeds: &Seeds,
        progress: &Progress,
    ) -> anyhow::Result<()> {
        // A shared generator draws for all pictures of a request, which must then be one prompt's.
        let together = match seeds {
            Seeds::PerImage(_) => (self.batch / each).max(1),
            _ => 1,
        };
        let comm = ranks::comm();
        // Nobody adds pictures while another still looks which are there.
        comm.wait()?;
        let mine = &open[nitro_comm::part(&*comm, open.len())];
        let total = total - open.len() + mine.len();
        progress.count("prompts", total as u64);
        let mut done = total - mine.len();
        progress.set(done as u64);
        for group in mine.chunks(together) {
            let request = Request {
                images_per_prompt: each,
                steps: self.steps,
                guidance_scale: self.guidance,
                seeds: seeds.clone(),
                batch: self.batch,
                ..Request::of(group.iter().map(|wanted| wanted.prompt))
            };
            let output = interrupt::watched(|| {
                pipeline.generate_observed(&request, &mut |_| interrupt::check())
            })?;
            let mut images = output.images.into_iter().map(|generated| generated.image);
            for wanted in group {
                let own: Vec<RgbImage> = images.by_ref().take(each).collect();
                (wanted.save)(&own)?;
                done += 1;
                progress.set(done as u64);
            }
        }
        Ok(comm.wait()?)
    }
}
