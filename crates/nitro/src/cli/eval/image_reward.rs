//! `nitro eval image-reward`: ImageReward's benchmark.

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::Args;
use image::RgbImage;
use nitro::Seeds;
use nitro_eval::reward_bench::{Prompt, Record, picture, read_prompts, score, write_results};
use nitro_eval::scorers::{ImageRewardScorer, official};
use nitro_eval::{JsonLines, ScorerManifest};
use serde_json::json;

use super::super::failure::{bad_input, say};
use super::super::interrupt;
use super::super::progress::Progress;
use super::super::ranks;
use super::pictures::{PictureArgs, Wanted};
use super::scorer_args::{PairArgs, ScorerArgs, open};

/// Arguments of `nitro eval image-reward`.
#[derive(Args)]
pub(super) struct ImageRewardArgs {
    #[command(flatten)]
    pairs: PairArgs,
    /// Folder for pictures (<id>_<k>.png), manifest.json, scorer.json and results; an interrupted run
    /// goes on where it stopped
    #[arg(long, default_value = "image-reward", value_name = "DIR")]
    out: PathBuf,
    /// Score the pictures of this folder (<id>_<k>.png) instead of making some
    #[arg(long, value_name = "DIR")]
    images: Option<PathBuf>,
    /// A list of {"id", "prompt"}, such as the official benchmark-prompts.json
    #[arg(long, value_name = "FILE", required_unless_present = "image")]
    prompts: Option<PathBuf>,
    /// Only the first N prompts
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Pictures of each prompt
    #[arg(short = 'N', long, default_value_t = 10, value_name = "N",
          value_parser = clap::value_parser!(u16).range(1..))]
    images_per_prompt: u16,
    /// Seed of a prompt's first picture; the next ones have the seeds after it
    #[arg(short, long, default_value_t = 0, value_name = "SEED")]
    seed: u64,
    /// ImageReward's weights and med_config.json: a folder, or a Hub name
    #[arg(long, default_value = official::IMAGE_REWARD, value_name = "MODEL")]
    image_reward: String,
    /// Print the score as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    scorer: ScorerArgs,
    #[command(flatten)]
    pictures: PictureArgs,
}

/// Runs the command.
pub(super) fn run(args: &ImageRewardArgs) -> anyhow::Result<()> {
    interrupt::install();
    let progress = args.pictures.begin()?;
    let result = args.score(&progress);
    progress.clear();
    if let Some((prompts, score)) = result? {
        match args.json {
            true => say(json!({ "prompts": prompts, "image_reward": score })),
            false => say(format_args!("ImageReward {score:.4} ({prompts} prompts)")),
        }
    }
    Ok(())
}

impl ImageRewardArgs {
    fn score(&self, progress: &Progress) -> anyhow::Result<Option<(usize, f64)>> {
        progress.stage("loading the scorer");
        let files = self
            .scorer
            .files(&self.image_reward, &self.pictures.model.location);
        let loaded = files.image_reward(&self.scorer.device(), self.scorer.precision())?;
        let scorer = loaded.scorer;
        if self.pairs.given() {
            progress.clear();
            self.pairs.print(|pairs| scorer.score(pairs))?;
            return Ok(None);
        }
        let prompts = self.read_prompts()?;
        ScorerManifest {
            benchmark: "image-reward".to_owned(),
            weights: BTreeMap::from([("image_reward".to_owned(), loaded.sha256)]),
            precision: self.scorer.precision_name(),
        }
        .claim(&self.out)?;
        if self.images.is_none() {
            self.make_pictures(&prompts, progress)?;
        }
        let path = self.out.join("image-reward.jsonl");
        let mut lines = JsonLines::open(&path, "a record {\"id\", \"prompt\", ...}")?;
        self.score_pictures(&scorer, &prompts, &mut lines, progress)?;
        if !ranks::is_first() {
            return Ok(None);
        }
        let asked = |r: &&Record| prompts.iter().any(|p| p.id == r.id);
        let records: Vec<&Record> = lines.records().iter().filter(asked).collect();
        let official = self.out.join("ImageReward-v1.0-benchmark-result.json");
        write_results(&official, &records)?;
        let records: Vec<Record> = records.into_iter().cloned().collect();
        Ok(Some((records.len(), score(&records))))
    }

    fn read_prompts(&self) -> anyhow::Result<Vec<Prompt>> {
        let file = self.prompts.as_deref().unwrap_or("".as_ref());
        let mut prompts = read_prompts(file).map_err(|e| bad_input(e.to_string()))?;
        prompts.truncate(self.limit.unwrap_or(usize::MAX));
        match prompts.is_empty() {
            true => Err(bad_input("there are no prompts to score")),
            false => Ok(prompts),
        }
    }

    fn count(&self) -> usize {
        usize::from(self.images_per_prompt)
    }

    fn make_pictures(&self, prompts: &[Prompt], progress: &Progress) -> anyhow::Result<()> {
        let pipeline = self.pictures.load(progress)?;
        let seeds = (0..self.count() as u64).map(|i| self.seed.wrapping_add(i));
        let manifest = self
            .pictures
            .settings()
            .manifest(&pipeline, seeds.collect(), progress)?;
        manifest.claim(&self.out)?;
        let complete =
            |p: &Prompt| (0..self.count()).all(|k| picture(&self.out, &p.id, k).is_file());
        let open: Vec<Wanted<'_>> = prompts
            .iter()
            .filter(|p| !complete(p))
            .map(|p| Wanted {
                prompt: &p.prompt,
                save: Box::new(move |images| {
                    for (k, image) in images.iter().enumerate() {
                        let path = picture(&self.out, &p.id, k);
                        nitro_files::write_bytes(&path, &nitro::picture::encode_png(image, None)?)?;
                    }
                    Ok(())
                }),
            })
            .collect();
        let seeds = Seeds::PerImage(self.seed);
        self.pictures.settings().make(
            &pipeline,
            &open,
            prompts.len(),
            self.count(),
            &seeds,
            progress,
        )
    }

    fn score_pictures(
        &self,
        scorer: &ImageRewardScorer,
        prompts: &[Prompt],
        lines: &mut JsonLines<Record>,
        progress: &Progress,
    ) -> anyhow::Result<()> {
        let images = self.images.as_ref().unwrap_or(&self.out);
        let known = |p: &Prompt, lines: &JsonLines<Record>| {
            let same = |r: &Record| {
                r.id == p.id && r.prompt == p.prompt && r.rewards.len() == self.count()
            };
            lines.records().iter().any(same)
        };
        let todo: Vec<&Prompt> = prompts.iter().filter(|p| !known(p, lines)).collect();
        progress.count("scoring", todo.len() as u64);
        let judge = |prompt: &&Prompt| {
            let files = (0..self.count()).map(|k| picture(images, &prompt.id, k));
            let loaded: Vec<RgbImage> = files.map(|file| open(&file)).collect::<Result<_, _>>()?;
            let pairs: Vec<(&RgbImage, &str)> = loaded
                .iter()
                .map(|image| (image, prompt.prompt.as_str()))
                .collect();
            Ok(Record::new(prompt, scorer.score(&pairs)?))
        };
        let work = |some: &[&Prompt]| some.iter().map(judge).collect();
        let keep = |new: Vec<Record>, done: usize| {
            progress.set(done as u64);
            Ok(lines.add(new, |a, b| a.id == b.id)?)
        };
        ranks::rounds(&todo, 1, work, keep)
    }
}
