//! `nitro eval shapes`: makes the bench's pictures and scores them.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use nitro::{Pipeline, Request, Seeds};
use nitro_eval::geneval::{Manifest, PromptFolder, read_metadata, write_prompt_folder};
use nitro_eval::shapes::{IMAGES_PER_PROMPT, held_out_bench, options, score_folder, shapes_bench};
use nitro_eval::{Metadata, Results, Summary};

use super::failure::{bad_input, say};
use super::interrupt;
use super::model_args::ModelArgs;
use super::progress::Progress;

/// Arguments of `nitro eval shapes`.
#[derive(Args)]
pub(super) struct ShapesArgs {
    /// Prompts in GenEval's metadata format, one JSON object per line [default: the built-in bench]
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// 240 other prompts of the same grammar, which no training has seen, instead of the bench
    #[arg(long, conflicts_with = "prompts")]
    held_out: bool,
    /// Folder for pictures (GenEval's layout), manifest.json and results.jsonl; an interrupted run
    /// goes on where it stopped
    #[arg(long, default_value = "shapes-bench", value_name = "DIR")]
    out: PathBuf,
    /// Only the first N prompts
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Sampling steps [default: the variant's]
    #[arg(long, value_name = "N")]
    steps: Option<usize>,
    /// Guidance scale [default: the variant's]
    #[arg(short, long, alias = "cfg-scale", value_name = "SCALE")]
    guidance_scale: Option<f64>,
    /// Pictures denoised together
    #[arg(long, default_value_t = 32, value_name = "N")]
    batch: usize,
    /// Print the summary as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    model: ModelArgs,
}

/// Runs the command.
pub(super) fn run(args: &ShapesArgs) -> anyhow::Result<()> {
    interrupt::install();
    let prompts = args.read_prompts()?;
    let progress = Progress::new(args.model.location.quiet);
    let result = args.score(&prompts, &progress);
    progress.clear();
    let summary = result?;
    if args.json {
        let mut json = serde_json::to_value(&summary)?;
        json["overall"] = summary.overall().into();
        say(json);
    } else {
        say(summary);
    }
    Ok(())
}

impl ShapesArgs {
    fn read_prompts(&self) -> anyhow::Result<Vec<Metadata>> {
        let mut prompts = match &self.prompts {
            None if self.held_out => held_out_bench().into_iter().map(|p| p.metadata).collect(),
            None => shapes_bench().into_iter().map(|p| p.metadata).collect(),
            Some(file) => {
                let place = file.display().to_string();
                let text = std::fs::read_to_string(file)
                    .map_err(|e| bad_input(format!("cannot read prompts {place}: {e}")))?;
                read_metadata(&text, &place).map_err(|e| bad_input(e.to_string()))?
            }
        };
        prompts.truncate(self.limit.unwrap_or(usize::MAX));
        match prompts.is_empty() {
            true => Err(bad_input("there are no prompts to score")),
            false => Ok(prompts),
        }
    }

    fn score(&self, prompts: &[Metadata], progress: &Progress) -> anyhow::Result<Summary> {
        let pipeline = self.model.load(None, progress)?;
        let bench = Bench {
            out: &self.out,
            steps: self.steps,
            guidance: self.guidance_scale,
            batch: self.batch,
        };
        bench.score(&pipeline, prompts, progress)
    }
}

/// How a bench is run.
pub(super) struct Bench<'a> {
    /// Folder for pictures, `manifest.json` and `results.jsonl`.
    pub(super) out: &'a Path,
    /// Sampling steps, if not the variant's.
    pub(super) steps: Option<usize>,
    /// Guidance scale, if not the variant's.
    pub(super) guidance: Option<f64>,
    /// Pictures denoised together.
    pub(super) batch: usize,
}

impl Bench<'_> {
    /// Makes the pictures that are missing, and scores all.
    pub(super) fn score(
        &self,
        pipeline: &Pipeline,
        prompts: &[Metadata],
        progress: &Progress,
    ) -> anyhow::Result<Summary> {
        progress.stage("hashing the weights");
        let seeds: Vec<u64> = (0..IMAGES_PER_PROMPT as u64).collect();
        Manifest {
            checkpoint: pipeline.fingerprint()?,
            steps: self.steps.unwrap_or(pipeline.variant().steps),
            guidance: self.guidance.unwrap_or(pipeline.variant().guidance),
            seeds,
        }
        .claim(self.out)?;

        self.make_pictures(pipeline, prompts, progress)?;
        progress.stage("judging");
        let mut results = Results::open(&self.out.join("results.jsonl"))?;
        score_folder(self.out, &options(), &mut results)?;
        // A folder may hold more prompts than this run was limited to.
        let asked: Vec<String> = prompts.iter().map(Metadata::to_json).collect();
        let records: Vec<_> = results
            .records()
            .iter()
            .filter(|r| asked.contains(&r.metadata))
            .cloned()
            .collect();
        Ok(Summary::of(&records))
    }

    /// Prompts without pictures, several in each forward pass.
    fn make_pictures(
        &self,
        pipeline: &Pipeline,
        prompts: &[Metadata],
        progress: &Progress,
    ) -> anyhow::Result<()> {
        let open: Vec<(usize, &Metadata)> = prompts
            .iter()
            .enumerate()
            .filter(|(i, p)| !PromptFolder::is_complete(self.out, *i, p, IMAGES_PER_PROMPT))
            .collect();
        progress.count("prompts", prompts.len() as u64);
        let mut done = prompts.len() - open.len();
        progress.set(done as u64);
        for group in open.chunks((self.batch / IMAGES_PER_PROMPT).max(1)) {
            let request = Request {
                images_per_prompt: IMAGES_PER_PROMPT,
                steps: self.steps,
                guidance_scale: self.guidance,
                seeds: Seeds::PerImage(0),
                batch: self.batch,
                ..Request::of(group.iter().map(|(_, p)| p.prompt.as_str()))
            };
            let output = interrupt::watched(|| {
                pipeline.generate_observed(&request, &mut |_| interrupt::check())
            })?;
            for ((index, metadata), images) in
                group.iter().zip(output.images.chunks(IMAGES_PER_PROMPT))
            {
                let (width, height) = images[0].image.dimensions();
                let samples: Vec<Vec<u8>> =
                    images.iter().map(|g| g.image.as_raw().clone()).collect();
                let size = (width as usize, height as usize);
                write_prompt_folder(self.out, *index, metadata, &samples, size, true)
                    .with_context(|| format!("cannot write to {}", self.out.display()))?;
                done += 1;
                progress.set(done as u64);
            }
        }
        Ok(())
    }
}
