//! `nitro eval geneval`: GenEval's prompts, folders, detector, rules and summary.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use nitro::Seeds;
use nitro_eval::geneval::official::{SAMPLES, SEED, prompts};
use nitro_eval::geneval::{
    ImageResult, Judge, Options, PromptFolder, prompt_folders, read_metadata, write_prompt_folder,
};
use nitro_eval::scorers::official;
use nitro_eval::{Metadata, Results, ScorerManifest, Summary};

use super::super::failure::{bad_input, say};
use super::super::interrupt;
use super::super::progress::Progress;
use super::super::ranks;
use super::pictures::{PictureArgs, Wanted};
use super::scorer_args::{ScorerArgs, open};

/// Arguments of `nitro eval geneval`.
#[derive(Args)]
pub(super) struct GenEvalArgs {
    /// Folder for pictures (GenEval's layout), manifest.json, scorer.json and results; an interrupted
    /// run goes on where it stopped
    #[arg(long, default_value = "geneval", value_name = "DIR")]
    out: PathBuf,
    /// Judge the pictures of this folder (GenEval's layout) instead of making some
    #[arg(long, value_name = "DIR")]
    images: Option<PathBuf>,
    /// Prompts in GenEval's metadata format, one JSON object per line [default: the official 553]
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// Only the first N prompts
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// As the official scripts do it, and nothing else: all 553 prompts, four pictures each drawn from
    /// one generator with seed 42, official rules and summary
    #[arg(long, conflicts_with_all = ["prompts", "limit", "seed"])]
    strict_official: bool,
    /// Seed of a prompt's first picture; the next ones have the seeds after it
    #[arg(short, long, default_value_t = SEED, value_name = "SEED")]
    seed: u64,
    /// The detector: a file, a folder, or a Hub name
    #[arg(long, default_value = official::DETECTOR, value_name = "MODEL")]
    detector: String,
    /// The colour classifier: a file, a folder, or a Hub name
    #[arg(long, default_value = official::CLIP, value_name = "MODEL")]
    clip: String,
    /// Print the summary as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    scorer: ScorerArgs,
    #[command(flatten)]
    pictures: PictureArgs,
}

/// Names of the files of records, under the official rules and without duplicates.
const RESULTS: [&str; 2] = ["results.jsonl", "results-without-duplicates.jsonl"];

/// Runs the command.
pub(super) fn run(args: &GenEvalArgs) -> anyhow::Result<()> {
    interrupt::install();
    let progress = args.pictures.begin()?;
    let result = args.score(&progress);
    progress.clear();
    let Some([official, corrected]) = result? else {
        return Ok(());
    };
    if args.json {
        let mut json = serde_json::to_value(&official)?;
        json["overall"] = official.overall().into();
        if !args.strict_official {
            json["overall_without_duplicates"] = corrected.overall().into();
        }
        say(json);
    } else {
        say(&official);
        if !args.strict_official {
            say(format_args!(
                "\nThe same, an object that is detected twice counted once: {:.5}",
                corrected.overall()
            ));
        }
    }
    Ok(())
}

impl GenEvalArgs {
    /// The summaries; of several processes, the first has them.
    fn score(&self, progress: &Progress) -> anyhow::Result<Option<[Summary; 2]>> {
        let prompts = self.read_prompts()?;
        // Scorers first: a missing file is better known before hours of work than after.
        let mut judge = self.judge(progress)?;
        let images = match &self.images {
            Some(images) => images.clone(),
            None => {
                self.make_pictures(&prompts, progress)?;
                self.out.clone()
            }
        };
        if self.strict_official {
            check_complete(&images, &prompts)?;
        }
        let settings = [Options::default(), Options::without_duplicates()];
        let mut results = [
            Results::open(&self.out.join(RESULTS[0]))?,
            Results::open(&self.out.join(RESULTS[1]))?,
        ];
        let wanted: Vec<String> = prompts.iter().map(Metadata::to_json).collect();
        let asked = |metadata: &str| {
            // A folder of one's own is judged whole.
            self.images.is_some() && self.limit.is_none() && self.prompts.is_none()
                || wanted.iter().any(|w| w == metadata)
        };
        let mut folders = prompt_folders(&images)?;
        folders.retain(|folder| asked(&folder.metadata.to_json()));
        let open: Vec<Open<'_>> = folders.iter().map(|f| Open::of(f, &results)).collect();
        progress.count("judging", open.len() as u64);
        let work = |some: &[Open<'_>]| {
            some.iter()
                .map(|open| open.judge(&mut judge, &settings))
                .collect()
        };
        let keep = |new: Vec<[Vec<ImageResult>; 2]>, done: usize| {
            progress.set(done as u64);
            for new in new {
                for (results, records) in results.iter_mut().zip(new) {
                    if !records.is_empty() {
                        results.add(records)?;
                    }
                }
            }
            Ok(())
        };
        ranks::rounds(&open, 1, work, keep)?;
        if !ranks::is_first() {
            return Ok(None);
        }
        Ok(Some(results.map(|results| {
            let records = results.records().iter().filter(|r| asked(&r.metadata));
            Summary::of(&records.cloned().collect::<Vec<_>>())
        })))
    }

    fn read_prompts(&self) -> anyhow::Result<Vec<Metadata>> {
        let mut all = match &self.prompts {
            None => prompts(),
            Some(file) => {
                let place = file.display().to_string();
                let text = std::fs::read_to_string(file)
                    .map_err(|e| bad_input(format!("cannot read prompts {place}: {e}")))?;
                read_metadata(&text, &place).map_err(|e| bad_input(e.to_string()))?
            }
        };
        all.truncate(self.limit.unwrap_or(usize::MAX));
        match all.is_empty() {
            true => Err(bad_input("there are no prompts to score")),
            false => Ok(all),
        }
    }

    fn judge(&self, progress: &Progress) -> anyhow::Result<Judge> {
        let (device, precision) = (self.scorer.device(), self.scorer.precision());
        let hub = &self.pictures.model.location;
        progress.stage("loading the detector");
        let detector = self.scorer.files(&self.detector, hub);
        let detector = detector.detector(&device, precision)?;
        progress.stage("loading the colour classifier");
        let colors = self
            .scorer
            .files(&self.clip, hub)
            .colors(&device, precision)?;
        let weights = [("detector", detector.sha256), ("clip", colors.sha256)];
        ScorerManifest {
            benchmark: "geneval".to_owned(),
            weights: BTreeMap::from(weights.map(|(name, hash)| (name.to_owned(), hash))),
            precision: self.scorer.precision_name(),
        }
        .claim(&self.out)?;
        Ok(Judge::new(detector.scorer, colors.scorer))
    }

    fn make_pictures(&self, prompts: &[Metadata], progress: &Progress) -> anyhow::Result<()> {
        let pipeline = self.pictures.load(progress)?;
        let (seeds, numbers) = match self.strict_official {
            true => (Seeds::Shared(SEED), vec![SEED]),
            false => {
                let numbers = (0..SAMPLES as u64).map(|i| self.seed.wrapping_add(i));
                (Seeds::PerImage(self.seed), numbers.collect())
            }
        };
        let manifest = self
            .pictures
            .settings()
            .manifest(&pipeline, numbers, progress)?;
        manifest.claim(&self.out)?;
        let open: Vec<Wanted<'_>> = prompts
            .iter()
            .enumerate()
            .filter(|(i, p)| !PromptFolder::is_complete(&self.out, *i, p, SAMPLES))
            .map(|(i, p)| wanted(&self.out, i, p))
            .collect();
        self.pictures
            .settings()
            .make(&pipeline, &open, prompts.len(), SAMPLES, &seeds, progress)
    }
}

/// A prompt of GenEval's layout.
pub(super) fn wanted<'a>(out: &'a Path, index: usize, metadata: &'a Metadata) -> Wanted<'a> {
    Wanted {
        prompt: &metadata.prompt,
        save: Box::new(move |images| {
            let (width, height) = images.first().map_or((0, 0), |image| image.dimensions());
            let samples: Vec<Vec<u8>> = images.iter().map(|i| i.as_raw().clone()).collect();
            let size = (width as usize, height as usize);
            write_prompt_folder(out, index, metadata, &samples, size, true)
                .with_context(|| format!("cannot write to {}", out.display()))
        }),
    }
}

/// The pictures of a prompt that have no record yet.
struct Open<'a> {
    metadata: &'a Metadata,
    pictures: Vec<&'a Path>,
}

impl<'a> Open<'a> {
    fn of(folder: &'a PromptFolder, results: &[Results; 2]) -> Self {
        let judged = |sample: &&PathBuf| {
            let filename = sample.display().to_string();
            results.iter().all(|results| results.contains(&filename))
        };
        let open = folder.samples.iter().filter(|sample| !judged(sample));
        Self {
            metadata: &folder.metadata,
            pictures: open.map(PathBuf::as_path).collect(),
        }
    }

    /// Their records under each of the settings.
    fn judge(
        &self,
        judge: &mut Judge,
        settings: &[Options; 2],
    ) -> anyhow::Result<[Vec<ImageResult>; 2]> {
        let mut records = [Vec::new(), Vec::new()];
        for picture in &self.pictures {
            let filename = picture.display().to_string();
            let judged = judge.judge(&filename, &open(picture)?, self.metadata, settings)?;
            for (records, record) in records.iter_mut().zip(judged) {
                records.push(record);
            }
        }
        Ok(records)
    }
}

/// Every official prompt must be there with its four pictures.
fn check_complete(images: &Path, prompts: &[Metadata]) -> anyhow::Result<()> {
    let folders = prompt_folders(images)?;
    for prompt in prompts {
        let json = prompt.to_json();
        let folder = folders.iter().find(|f| f.metadata.to_json() == json);
        let found = folder.map_or(0, |f| f.samples.len());
        if found != SAMPLES {
            return Err(bad_input(format!(
                "{}: --strict-official needs {SAMPLES} pictures of each of the {} official prompts, \
                 but \"{}\" has {found}",
                images.display(),
                prompts.len(),
                prompt.prompt
            )));
        }
    }
    Ok(())
}
