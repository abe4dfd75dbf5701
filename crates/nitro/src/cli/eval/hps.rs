//! `nitro eval hps`: HPSv2's benchmark with the weights of HPSv2.1.

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::Args;
use image::RgbImage;
use nitro::{Hub, PipelineError, Seeds};
use nitro_eval::hps_bench::{
    PROMPTS_DATASET, Record, STYLES, Style, Summary, picture, read_styles, write_picture,
};
use nitro_eval::scorers::{Hps, official};
use nitro_eval::{JsonLines, ScorerManifest};

use super::super::failure::{bad_input, say};
use super::super::interrupt;
use super::super::progress::Progress;
use super::super::ranks;
use super::pictures::{PictureArgs, Wanted};
use super::scorer_args::{PairArgs, ScorerArgs, open};

/// Pictures scored together, and written to the results together.
const TOGETHER: usize = 8;

/// Arguments of `nitro eval hps`.
#[derive(Args)]
pub(super) struct HpsArgs {
    #[command(flatten)]
    pairs: PairArgs,
    /// Folder for pictures (<style>/00000.jpg), manifest.json, scorer.json and hps.jsonl; an interrupted
    /// run goes on where it stopped
    #[arg(long, default_value = "hps", value_name = "DIR")]
    out: PathBuf,
    /// Score the pictures of this folder (<style>/00000.jpg or .png) instead of making some
    #[arg(long, value_name = "DIR")]
    images: Option<PathBuf>,
    /// Folder of anime.json, concept-art.json, paintings.json, photo.json, or some of them
    /// [default: the official ones, from the Hub]
    #[arg(long, value_name = "DIR")]
    prompts: Option<PathBuf>,
    /// Only the first N prompts of each style
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Seed of every picture
    #[arg(short, long, default_value_t = 0, value_name = "SEED")]
    seed: u64,
    /// HPSv2.1's weights: a file, a folder, or a Hub name
    #[arg(long, default_value = official::HPS, value_name = "MODEL")]
    hps: String,
    /// Print the summary as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    scorer: ScorerArgs,
    #[command(flatten)]
    pictures: PictureArgs,
}

/// Runs the command.
pub(super) fn run(args: &HpsArgs) -> anyhow::Result<()> {
    interrupt::install();
    let progress = args.pictures.begin()?;
    let result = args.score(&progress);
    progress.clear();
    if let Some(summary) = result? {
        match args.json {
            true => say(serde_json::to_string(&summary)?),
            false => say(&summary),
        }
    }
    Ok(())
}

impl HpsArgs {
    fn score(&self, progress: &Progress) -> anyhow::Result<Option<Summary>> {
        progress.stage("loading the scorer");
        let files = self.scorer.files(&self.hps, &self.pictures.model.location);
        let loaded = files.hps(&self.scorer.device(), self.scorer.precision())?;
        let hps = loaded.scorer;
        if self.pairs.given() {
            progress.clear();
            self.pairs.print(|pairs| hps.score(pairs))?;
            return Ok(None);
        }
        let styles = self.styles()?;
        ScorerManifest {
            benchmark: "hps".to_owned(),
            weights: BTreeMap::from([("hps".to_owned(), loaded.sha256)]),
            precision: self.scorer.precision_name(),
        }
        .claim(&self.out)?;
        if self.images.is_none() {
            self.make_pictures(&styles, progress)?;
        }
        let path = self.out.join("hps.jsonl");
        let mut records = JsonLines::open(&path, "a record {\"style\", \"index\", ...}")?;
        self.score_pictures(&hps, &styles, &mut records, progress)?;
        if !ranks::is_first() {
            return Ok(None);
        }
        Ok(Some(Summary::of(records.records(), &styles)))
    }

    fn styles(&self) -> anyhow::Result<Vec<Style>> {
        let mut styles = match &self.prompts {
            Some(folder) => read_styles(folder).map_err(|e| bad_input(e.to_string()))?,
            None => {
                let options = self.pictures.model.location.hub();
                let hub = Hub::new(options).map_err(PipelineError::Hub)?;
                let read = |style: &&str| {
                    let file = format!("benchmark/{style}.json");
                    let path = hub
                        .dataset_file(PROMPTS_DATASET, &file)
                        .map_err(PipelineError::Hub)?;
                    anyhow::Ok(Style::read(style, &path)?)
                };
                STYLES.iter().map(read).collect::<Result<_, _>>()?
            }
        };
        for style in &mut styles {
            style.prompts.truncate(self.limit.unwrap_or(usize::MAX));
        }
        Ok(styles)
    }

    fn make_pictures(&self, styles: &[Style], progress: &Progress) -> anyhow::Result<()> {
        let pipeline = self.pictures.load(progress)?;
        let manifest = self
            .pictures
            .settings()
            .manifest(&pipeline, vec![self.seed], progress)?;
        manifest.claim(&self.out)?;
        let all = || {
            let numbered = |style: &Style| 0..style.prompts.len();
            styles
                .iter()
                .flat_map(move |style| numbered(style).map(move |index| (style, index)))
        };
        let open: Vec<Wanted<'_>> = all()
            .filter(|(style, index)| picture(&self.out, &style.name, *index).is_none())
            .map(|(style, index)| Wanted {
                prompt: &style.prompts[index],
                save: Box::new(move |images| {
                    for image in images {
                        write_picture(&self.out, &style.name, index, image)?;
                    }
                    Ok(())
                }),
            })
            .collect();
        let seeds = Seeds::PerImage(self.seed);
        self.pictures
            .settings()
            .make(&pipeline, &open, all().count(), 1, &seeds, progress)
    }

    fn score_pictures(
        &self,
        hps: &Hps,
        styles: &[Style],
        records: &mut JsonLines<Record>,
        progress: &Progress,
    ) -> anyhow::Result<()> {
        let images = self.images.as_ref().unwrap_or(&self.out);
        let mut todo = Vec::new();
        for style in styles {
            for (index, prompt) in style.prompts.iter().enumerate() {
                let known =
                    |r: &Record| r.style == style.name && r.index == index && r.prompt == *prompt;
                if !records.records().iter().any(known) {
                    todo.push((style, index, prompt));
                }
            }
        }
        progress.count("scoring", todo.len() as u64);
        let work = |some: &[(&Style, usize, &String)]| {
            let mut loaded: Vec<RgbImage> = Vec::new();
            for (style, index, _) in some {
                let file = picture(images, &style.name, *index).ok_or_else(|| {
                    bad_input(format!(
                        "{}: picture {index:05} of {} is missing (.jpg or .png)",
                        images.display(),
                        style.name
                    ))
                })?;
                loaded.push(open(&file)?);
            }
            let prompts = some.iter().map(|(_, _, prompt)| prompt.as_str());
            let pairs: Vec<(&RgbImage, &str)> = loaded.iter().zip(prompts).collect();
            let scores = hps.score(&pairs)?;
            let record =
                |((style, index, prompt), score): (&(&Style, usize, &String), f32)| Record {
                    style: style.name.clone(),
                    index: *index,
                    prompt: (*prompt).clone(),
                    score,
                };
            Ok(some.iter().zip(scores).map(record).collect())
        };
        let keep = |new: Vec<Record>, done: usize| {
            progress.set(done as u64);
            Ok(records.add(new, |a, b| a.style == b.style && a.index == b.index)?)
        };
        ranks::rounds(&todo, TOGETHER, work, keep)
    }
}
