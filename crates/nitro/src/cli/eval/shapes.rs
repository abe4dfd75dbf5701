//! `nitro eval shapes`: makes the bench's pictures and scores them.

use std::path::{Path, PathBuf};

use clap::Args;
use nitro::{Pipeline, Seeds};
use nitro_eval::geneval::{PromptFolder, read_metadata};
use nitro_eval::shapes::{IMAGES_PER_PROMPT, held_out_bench, options, score_folder, shapes_bench};
use nitro_eval::{Metadata, Results, Summary};

use super::super::failure::{bad_input, say};
use super::super::interrupt;
use super::super::progress::Progress;
use super::super::ranks;
use super::geneval::wanted;
use super::pictures::{PictureArgs, Settings, Wanted};

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
    /// Print the summary as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    pictures: PictureArgs,
}

/// Runs the command.
pub(super) fn run(args: &ShapesArgs) -> anyhow::Result<()> {
    interrupt::install();
    let prompts = args.read_prompts()?;
    let progress = args.pictures.begin()?;
    let result = args.score(&prompts, &progress);
    progress.clear();
    let Some(summary) = result? else {
        return Ok(());
    };
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

    /// The summary; of several processes, the first has it.
    fn score(&self, prompts: &[Metadata], progress: &Progress) -> anyhow::Result<Option<Summary>> {
        let pipeline = self.pictures.load(progress)?;
        let Settings {
            steps,
            guidance,
            batch,
        } = self.pictures.settings();
        let bench = Bench {
            out: &self.out,
            steps,
            guidance,
            batch,
        };
        bench.make(&pipeline, prompts, progress)?;
        match ranks::is_first() {
            true => bench.judge(prompts, progress).map(Some),
            false => Ok(None),
        }
    }
}

/// How a bench is run.
pub(in super::super) struct Bench<'a> {
    /// Folder for pictures, `manifest.json` and `results.jsonl`.
    pub(in super::super) out: &'a Path,
    /// Sampling steps, if not the variant's.
    pub(in super::super) steps: Option<usize>,
    /// Guidance scale, if not the variant's.
    pub(in super::super) guidance: Option<f64>,
    /// Pictures denoised together.
    pub(in super::super) batch: usize,
}

impl Bench<'_> {
    /// Makes the pictures that are missing.
    pub(in super::super) fn make(
        &self,
        pipeline: &Pipeline,
        prompts: &[Metadata],
        progress: &Progress,
    ) -> anyhow::Result<()> {
        let settings = Settings {
            steps: self.steps,
            guidance: self.guidance,
            batch: self.batch,
        };
        let numbers = (0..IMAGES_PER_PROMPT as u64).collect();
        let manifest = settings.manifest(pipeline, numbers, progress)?;
        manifest.claim(self.out)?;
        let open: Vec<Wanted<'_>> = prompts
            .iter()
            .enumerate()
            .filter(|(i, p)| !PromptFolder::is_complete(self.out, *i, p, IMAGES_PER_PROMPT))
            .map(|(i, p)| wanted(self.out, i, p))
            .collect();
        let (total, each, seeds) = (prompts.len(), IMAGES_PER_PROMPT, Seeds::PerImage(0));
        settings.make(pipeline, &open, total, each, &seeds, progress)
    }

    /// Scores the pictures.
    pub(in super::super) fn judge(
        &self,
        prompts: &[Metadata],
        progress: &Progress,
    ) -> anyhow::Result<Summary> {
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
}
