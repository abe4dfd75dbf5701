use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use nitro::{Pipeline, PipelineError, Request, Seeds};
use nitro_data::DataError;
use nitro_data::image::encode_jpeg;
use nitro_data::ingest::{CAPTION, JPG, text_column};
use nitro_data::job::{Job, Tally};
use nitro_data::mds::{Dataset, Hash, INDEX, Schema, Value};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{Done, OutputArgs};
use crate::cli::failure::bad_input;
use crate::cli::interrupt;
use crate::cli::model_args::ModelArgs;
use crate::cli::progress::Progress;

/// Arguments of `nitro data synthesize`.
#[derive(Args)]
pub(in crate::cli) struct SynthesizeArgs {
    /// Prompts: a text file (one per line), parquet (file or folder), or a dataset folder
    #[arg(value_name = "PROMPTS")]
    prompts: PathBuf,
    /// Column of a parquet file or a dataset with the prompts
    #[arg(long, default_value = CAPTION, value_name = "NAME")]
    column: String,
    #[command(flatten)]
    output: OutputArgs,
    /// Only the first N prompts
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Sampling steps [default: the variant's]
    #[arg(long, value_name = "N")]
    steps: Option<usize>,
    /// Guidance scale [default: the variant's]
    #[arg(short, long, alias = "cfg-scale", value_name = "SCALE")]
    guidance_scale: Option<f64>,
    /// Side of the pictures [default: the variant's]
    #[arg(long, value_name = "PIXELS")]
    size: Option<usize>,
    /// Prompt number i gets seed SEED + i
    #[arg(short, long, default_value_t = 0, value_name = "SEED")]
    seed: u64,
    /// Pictures made together
    #[arg(long, default_value_t = 8, value_name = "N", value_parser = super::positive)]
    batch: usize,
    /// Quality of the JPEG files
    #[arg(long, default_value_t = 95, value_name = "1-100", value_parser = clap::value_parser!(u8).range(1..=100))]
    jpeg_quality: u8,
    /// Print the summary as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    model: ModelArgs,
}

/// The next prompt, and what was done.
#[derive(Clone, Default, Serialize, Deserialize)]
struct Place {
    next: usize,
    tally: Tally,
}

/// Runs the command.
pub(super) fn run(args: &SynthesizeArgs) -> anyhow::Result<()> {
    let share = args.output.share()?;
    let mut prompts = prompts(&args.prompts, &args.column)?;
    prompts.truncate(args.limit.unwrap_or(usize::MAX));
    if prompts.is_empty() {
        return Err(bad_input(format!(
            "{} holds no prompts",
            args.prompts.display()
        )));
    }
    let progress = Progress::new(args.model.location.quiet);
    let pipeline = args.model.load(args.size, &progress)?;
    progress.stage("hashing the weights");
    let listing = Hash::Xxh3_64.digest(prompts.join("\n").as_bytes());
    let about = json!({
        "synthesize": {"prompts": prompts.len(), "listing": listing},
        "model": pipeline.fingerprint()?,
        "steps": args.steps.unwrap_or(pipeline.variant().steps),
        "guidance": args.guidance_scale.unwrap_or(pipeline.variant().guidance),
        "size": args.size.unwrap_or(pipeline.variant().resolution),
        "seed": args.seed,
        "rank": share.rank,
        "ranks": share.ranks,
    });
    let schema = Schema::new([(CAPTION, "str"), (JPG, "jpeg")])?;
    let folder = share.folder(&args.output.out)?;
    let range = share.range(prompts.len());
    let start = Place {
        next: range.start,
        tally: Tally::default(),
    };
    let mut job = Job::open(&folder, schema, args.output.writer(), about, start)?;
    let mut place = job.progress().clone();
    let (before, begun) = (place.tally.clone(), Instant::now());
    progress.count("pictures", range.len() as u64);
    while !job.is_finished() && place.next < range.end {
        progress.set((place.next - range.start) as u64);
        let end = (place.next + args.batch).min(range.end);
        let batch = &prompts[place.next..end];
        let pictures = args.pictures(&pipeline, place.next, batch)?;
        let mut pictures = pictures.into_iter();
        for prompt in batch {
            place.next += 1;
            if prompt.trim().is_empty() {
                let number = place.next;
                place
                    .tally
                    .skip("empty prompt", || format!("prompt {number}"));
                continue;
            }
            place.tally.written += 1;
            let jpg = pictures.next().unwrap_or_default();
            let values = [
                (CAPTION, Value::Str(prompt.clone())),
                (JPG, Value::Image(jpg)),
            ];
            job.write(&values, place.clone())?;
        }
    }
    progress.clear();
    let index = job.finish(place.clone())?;
    let complete = share.merge(&args.output.out)?;
    Done::of(&index, place.tally, &before, begun, complete).report("pictures", share, args.json)
}

impl SynthesizeArgs {
    /// JPEG files for the prompts that are not empty; the first has number `first`.
    fn pictures(
        &self,
        pipeline: &Pipeline,
        first: usize,
        prompts: &[String],
    ) -> anyhow::Result<Vec<Vec<u8>>> {
        let numbered = prompts.iter().zip(first as u64..);
        let wanted: Vec<(&String, u64)> = numbered.filter(|(p, _)| !p.trim().is_empty()).collect();
        if wanted.is_empty() {
            return Ok(Vec::new());
        }
        let request = Request {
            steps: self.steps,
            guidance_scale: self.guidance_scale,
            width: self.size,
            seeds: Seeds::Each(
                wanted
                    .iter()
                    .map(|(_, i)| self.seed.wrapping_add(*i))
                    .collect(),
            ),
            batch: self.batch,
            ..Request::of(wanted.iter().map(|(prompt, _)| prompt.as_str()))
        };
        let output = pipeline.generate_observed(&request, &mut |_| interrupt::check());
        let output = output.map_err(|error| match error {
            // What was made before is kept.
            PipelineError::Cancelled { .. } => anyhow::Error::from(DataError::Stopped),
            other => other.into(),
        })?;
        let encode = |picture| encode_jpeg(picture, self.jpeg_quality).map_err(anyhow::Error::msg);
        output
            .images
            .iter()
            .map(|generated| encode(&generated.image))
            .collect()
    }
}

/// The prompts of a text file, parquet, or a dataset.
fn prompts(path: &Path, column: &str) -> anyhow::Result<Vec<String>> {
    if !path.exists() {
        return Err(bad_input(format!(
            "{}: there is no such file or folder",
            path.display()
        )));
    }
    if path.join(INDEX).is_file() {
        let dataset = Dataset::open(path)?;
        let text = |i| Ok(dataset.sample(i)?.text(column)?.to_owned());
        return (0..dataset.len()).map(text).collect();
    }
    if path.is_dir()
        || path
            .extension()
            .is_some_and(|extension| extension == "parquet")
    {
        return Ok(text_column(path, column)?);
    }
    let text = std::fs::read_to_string(path)
        .map_err(|e| bad_input(format!("cannot read prompts {}: {e}", path.display())))?;
    Ok(text.lines().map(str::to_owned).collect())
}
