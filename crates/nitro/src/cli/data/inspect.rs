use std::path::PathBuf;

use clap::Args;
use nitro::picture::{grid, save_png};
use nitro_data::DataError;
use nitro_data::image::{Filter, dimensions, resize_shorter};
use nitro_data::ingest::{CAPTION, JPG};
use nitro_data::mds::{Dataset, DatasetOptions, Encoding, OnDamage, Verify};
use serde_json::json;

use super::go_on;
use crate::cli::failure::{bad_input, say};
use crate::cli::progress::Progress;

/// Arguments of `nitro data inspect`.
#[derive(Args)]
pub(in crate::cli) struct InspectArgs {
    /// Dataset folders
    #[arg(value_name = "DIR", required = true)]
    dirs: Vec<PathBuf>,
    /// Read every shard: structure, and all hashes that the index has
    #[arg(long)]
    verify: bool,
    /// Samples looked at for sizes, evenly spread
    #[arg(long, default_value_t = 1000, value_name = "N")]
    samples: usize,
    /// Write a contact sheet of pictures (PNG)
    #[arg(long, value_name = "FILE")]
    sheet: Option<PathBuf>,
    /// Pictures on the sheet
    #[arg(long, default_value_t = 36, value_name = "N")]
    pictures: usize,
    /// Print as JSON
    #[arg(long)]
    json: bool,
    /// No progress
    #[arg(short, long)]
    quiet: bool,
}

/// Sizes of a column in the samples looked at.
struct Sizes {
    name: String,
    encoding: Encoding,
    least: usize,
    most: usize,
    sum: usize,
    seen: usize,
}

/// Side of a picture on the contact sheet.
const THUMBNAIL: u32 = 160;

/// Runs the command.
pub(super) fn run(args: &InspectArgs) -> anyhow::Result<()> {
    let options = DatasetOptions {
        verify: if args.verify {
            Verify::Hashes
        } else {
            Verify::Structure
        },
        on_damage: OnDamage::Skip,
        scratch: None,
    };
    let dataset = Dataset::open_all(&args.dirs, options)?;
    let progress = Progress::new(args.quiet);
    if args.verify {
        progress.count("shards", dataset.shards().len() as u64);
        dataset.check(|done| progress.set(done as u64))?;
    }
    let sizes = sizes(&dataset, args.samples)?;
    let pictures = picture_sides(&dataset, args.samples)?;
    progress.clear();
    if let Some(path) = &args.sheet {
        sheet(&dataset, args.pictures, path)?;
    }
    let bytes = |of: fn(&nitro_data::mds::ShardInfo) -> u64| dataset.shards().map(of).sum::<u64>();
    let (raw, stored) = (bytes(|s| s.raw_data.bytes), bytes(|s| s.stored().bytes));
    let damage = dataset.damage();
    let lost: usize = damage.iter().map(|damage| damage.samples).sum();
    if args.json {
        let column = |s: &Sizes| {
            json!({"name": s.name, "encoding": s.encoding.to_string(), "least": s.least,
                   "mean": s.mean(), "most": s.most})
        };
        let about = |d: &nitro_data::mds::Damage| json!({"shard": d.shard, "reason": d.reason, "samples": d.samples});
        say(json!({
            "samples": dataset.len(),
            "shards": dataset.shards().len(),
            "bytes": raw,
            "stored_bytes": stored,
            "columns": sizes.iter().map(column).collect::<Vec<_>>(),
            "picture_sides": pictures.map(|(least, most)| json!({"least": least, "most": most})),
            "damage": damage.iter().map(about).collect::<Vec<_>>(),
            "damaged_samples": lost,
            "verified": args.verify,
        }));
    } else {
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        let packed = match stored == raw {
            true => String::new(),
            false => format!(", {:.2} MiB compressed", mib(stored)),
        };
        let shards = dataset.shards().len();
        say(format!(
            "{} samples in {shards} shard(s), {:.2} MiB{packed}",
            dataset.len(),
            mib(raw)
        ));
        for column in &sizes {
            say(format!(
                "  {:16} {:16} {} to {} bytes, {:.0} on average",
                column.name,
                column.encoding.to_string(),
                column.least,
                column.most,
                column.mean()
            ));
        }
        if let Some((least, most)) = pictures {
            say(format!(
                "  shorter sides of pictures: {least} to {most} pixels"
            ));
        }
        for damage in &damage {
            let (shard, reason) = (damage.shard.display(), &damage.reason);
            say(format!(
                "damaged: {shard}: {reason}; {} samples lost",
                damage.samples
            ));
        }
        if args.verify && damage.is_empty() {
            say("every shard is as its index says");
        }
    }
    match damage.is_empty() {
        true => Ok(()),
        false => Err(anyhow::anyhow!(
            "{} damaged shard(s), {lost} samples lost",
            damage.len()
        )),
    }
}

impl Sizes {
    fn mean(&self) -> f64 {
        self.sum as f64 / self.seen.max(1) as f64
    }
}

/// Numbers of `count` samples, evenly spread.
fn spread(dataset: &Dataset, count: usize) -> impl Iterator<Item = usize> {
    let (all, count) = (dataset.len(), count.min(dataset.len()));
    (0..count).map(move |i| i * all / count)
}

/// Sizes by column over samples that are not damaged.
fn sizes(dataset: &Dataset, count: usize) -> anyhow::Result<Vec<Sizes>> {
    let mut all: Vec<Sizes> = Vec::new();
    for index in spread(dataset, count) {
        go_on()?;
        let found = dataset.decoded(index, |sample| {
            let columns = sample.schema().columns().iter();
            columns
                .map(|c| {
                    Ok((
                        c.name.clone(),
                        c.encoding.clone(),
                        sample.bytes(&c.name)?.len(),
                    ))
                })
                .collect::<Result<Vec<_>, DataError>>()
        })?;
        for (name, encoding, size) in found.into_iter().flatten() {
            let place = all
                .iter()
                .position(|s| s.name == name && s.encoding == encoding);
            let place = place.unwrap_or_else(|| {
                all.push(Sizes {
                    name,
                    encoding,
                    least: size,
                    most: size,
                    sum: 0,
                    seen: 0,
                });
                all.len() - 1
            });
            let column = &mut all[place];
            column.least = column.least.min(size);
            column.most = column.most.max(size);
            column.sum += size;
            column.seen += 1;
        }
    }
    Ok(all)
}

/// Smallest and largest shorter side of the pictures.
fn picture_sides(dataset: &Dataset, count: usize) -> anyhow::Result<Option<(u32, u32)>> {
    let mut sides: Option<(u32, u32)> = None;
    for index in spread(dataset, count) {
        go_on()?;
        let side = dataset.decoded(index, |sample| match sample.has(JPG) {
            false => Ok(None),
            true => Ok(dimensions(sample.bytes(JPG)?).ok().map(|(w, h)| w.min(h))),
        })?;
        if let Some(side) = side.flatten() {
            let (least, most) = sides.unwrap_or((side, side));
            sides = Some((least.min(side), most.max(side)));
        }
    }
    Ok(sides)
}

fn sheet(dataset: &Dataset, count: usize, path: &std::path::Path) -> anyhow::Result<()> {
    if dataset.schema().position(JPG).is_none() {
        return Err(bad_input(format!(
            "--sheet: the dataset has no column {JPG:?} with pictures"
        )));
    }
    let (mut pictures, mut captions) = (Vec::new(), Vec::new());
    for index in spread(dataset, count) {
        go_on()?;
        let found = dataset.decoded(index, |sample| {
            let caption = sample.text(CAPTION).unwrap_or_default().to_owned();
            Ok((sample.picture(JPG)?, caption))
        })?;
        if let Some((picture, caption)) = found {
            pictures.push(thumbnail(&picture));
            captions.push(caption);
        }
    }
    let sheet = grid(&pictures.iter().collect::<Vec<_>>());
    save_png(path, &sheet, None)?;
    for caption in captions {
        say(caption);
    }
    Ok(())
}

/// The middle of a picture, small.
fn thumbnail(picture: &image::RgbImage) -> image::RgbImage {
    let small = resize_shorter(picture, THUMBNAIL, Filter::Bilinear);
    nitro_data::image::center_crop(&small, THUMBNAIL)
}
