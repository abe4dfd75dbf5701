use std::path::PathBuf;
use std::time::Instant;

use burn::tensor::{Device, Tensor, TensorData};
use clap::Args;
use nitro::{EncoderParts, Encoders};
use nitro_data::image::{
    DINO_BASE, IMAGENET_MEAN, IMAGENET_STD, dino_picture, to_planes, vae_picture,
};
use nitro_data::ingest::{CAPTION, JPG};
use nitro_data::job::{Job, Share, Tally};
use nitro_data::mds::{Dataset, DatasetOptions, OnDamage, Schema, Value, Verify};
use nitro_models::Params;
use nitro_models::dinov2::{Dinov2, Dinov2Config};
use nitro_train::null_text;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{Done, OutputArgs, go_on};
use crate::cli::failure::bad_input;
use crate::cli::model_args::{LocationArgs, PrecisionName, use_threads};
use crate::cli::progress::Progress;

/// Arguments of `nitro data precompute`.
#[derive(Args)]
pub(in crate::cli) struct PrecomputeArgs {
    /// Dataset folders with captions and pictures
    #[arg(value_name = "DIR", required = true)]
    dirs: Vec<PathBuf>,
    #[command(flatten)]
    output: OutputArgs,
    /// Side to which pictures are resized and cropped for the autoencoder: 512 or 1024 for Nitro-E
    #[arg(long, default_value_t = 512, value_name = "PIXELS", value_parser = super::positive)]
    size: usize,
    /// Add the autoencoder's latents (latents_SIZE, float16)
    #[arg(long)]
    latents: bool,
    /// Add the text encoder's states and masks (text_feat, float16; text_mask, int64)
    #[arg(long)]
    text: bool,
    /// Add a DINOv2's patch features (dino_feat, float16): its checkpoint, or a folder with
    /// config.json and model.safetensors
    #[arg(long, value_name = "PATH")]
    dino: Option<PathBuf>,
    /// Tokens on a side of the DINOv2 features
    #[arg(long, default_value_t = 16, value_name = "N", value_parser = super::positive)]
    dino_grid: usize,
    /// Keep the pictures (jpg)
    #[arg(long)]
    keep_pictures: bool,
    /// Do not clean captions before they are encoded (the official pipeline cleans them)
    #[arg(long)]
    raw_captions: bool,
    /// Samples encoded together
    #[arg(long, default_value_t = 8, value_name = "N", value_parser = super::positive)]
    batch: usize,
    /// Leave out damaged samples and shards, and count them
    #[arg(long)]
    skip_damaged: bool,
    /// Check all hashes that the index has
    #[arg(long)]
    verify: bool,
    /// Print the summary as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    location: LocationArgs,
    /// CPU threads [default: all cores]
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,
    /// How products are computed: bf16 is faster on CPUs with AVX-512 BF16
    #[arg(long, value_enum, default_value_t = PrecisionName::F32)]
    precision: PrecisionName,
}

/// The next sample, and what was done.
#[derive(Clone, Default, Serialize, Deserialize)]
struct Place {
    next: usize,
    tally: Tally,
}

/// A sample, ready for the encoders.
struct Input {
    caption: String,
    jpg: Option<Vec<u8>>,
    /// `[3, size, size]`, values -1 to 1.
    vae: Vec<f32>,
    /// `[3, 14 grid, 14 grid]`, normalised.
    dino: Vec<f32>,
}

/// Runs the command.
pub(super) fn run(args: &PrecomputeArgs) -> anyhow::Result<()> {
    if !(args.latents || args.text || args.dino.is_some()) {
        return Err(bad_input(
            "nothing to add: give --latents, --text or --dino PATH",
        ));
    }
    use_threads(args.threads)?;
    let share = args.output.share()?;
    let options = DatasetOptions {
        verify: if args.verify {
            Verify::Hashes
        } else {
            Verify::Structure
        },
        on_damage: if args.skip_damaged {
            OnDamage::Skip
        } else {
            OnDamage::Fail
        },
        scratch: None,
    };
    let dataset = Dataset::open_all(&args.dirs, options)?;
    let pictures = args.latents || args.dino.is_some() || args.keep_pictures;
    dataset.require(if pictures {
        &[CAPTION, JPG]
    } else {
        &[CAPTION]
    })?;
    let progress = Progress::new(args.location.quiet);
    progress.stage("loading the encoders");
    let features = Features::load(args)?;

    let range = share.range(dataset.len());
    let start = Place {
        next: range.start,
        tally: Tally::default(),
    };
    let columns = args.columns();
    let schema = Schema::new(
        columns
            .iter()
            .map(|(name, encoding)| (name.as_str(), *encoding)),
    )?;
    let folder = share.folder(&args.output.out)?;
    let about = args.describe(&dataset, share);
    features.write_null_text(args)?;
    let mut job = Job::open(&folder, schema, args.output.writer(), about, start)?;
    let mut place = job.progress().clone();
    let (before, begun) = (place.tally.clone(), Instant::now());
    progress.count("samples", range.len() as u64);
    while !job.is_finished() && place.next < range.end {
        go_on()?;
        progress.set((place.next - range.start) as u64);
        let first = place.next;
        let end = (first + args.batch).min(range.end);
        let read = |index| dataset.decoded(index, |sample| args.read(sample, features.dino_side()));
        let inputs = (first..end)
            .into_par_iter()
            .map(read)
            .collect::<Result<Vec<_>, _>>()?;
        let ready: Vec<&Input> = inputs.iter().flatten().collect();
        let mut rows = features.rows(args, &ready)?.into_iter();
        for (index, input) in (first..end).zip(&inputs) {
            place.next = index + 1;
            match input.as_ref().and_then(|_| rows.next()) {
                None => place.tally.skip("damaged", || format!("sample {index}")),
                Some(row) => {
                    place.tally.written += 1;
                    let values: Vec<(&str, Value)> = row
                        .iter()
                        .map(|(name, value)| (name.as_str(), value.clone()))
                        .collect();
                    job.write(&values, place.clone())?;
                }
            }
        }
    }
    progress.clear();
    let index = job.finish(place.clone())?;
    let complete = share.merge(&args.output.out)?;
    Done {
        damage: dataset.damage(),
        ..Done::of(&index, place.tally, &before, begun, complete)
    }
    .report("images", share, args.json)
}

impl PrecomputeArgs {
    fn latents_column(&self) -> String {
        format!("latents_{}", self.size)
    }

    /// The official pipeline's columns.
    fn columns(&self) -> Vec<(String, &'static str)> {
        let mut columns = vec![(CAPTION.to_owned(), "str")];
        if self.keep_pictures {
            columns.push((JPG.to_owned(), "jpeg"));
        }
        if self.latents {
            columns.push((self.latents_column(), "bytes"));
        }
        if self.text {
            columns.push(("text_feat".to_owned(), "bytes"));
            columns.push(("text_mask".to_owned(), "bytes"));
        }
        if self.dino.is_some() {
            columns.push(("dino_feat".to_owned(), "bytes"));
        }
        columns
    }

    fn describe(&self, dataset: &Dataset, share: Share) -> serde_json::Value {
        json!({
            "precompute": self.dirs,
            "samples": dataset.len(),
            "model": self.location.model,
            "size": self.size,
            "dino": self.dino,
            "dino_grid": self.dino_grid,
            "raw_captions": self.raw_captions,
            "skip_damaged": self.skip_damaged,
            "precision": format!("{:?}", self.precision.precision()),
            "rank": share.rank,
            "ranks": share.ranks,
        })
    }

    fn read(&self, sample: &nitro_data::mds::Sample, dino_side: u32) -> nitro_data::Result<Input> {
        let mut input = Input {
            caption: sample.text(CAPTION)?.to_owned(),
            jpg: None,
            vae: Vec::new(),
            dino: Vec::new(),
        };
        if self.keep_pictures {
            input.jpg = Some(sample.bytes(JPG)?.to_vec());
        }
        if self.latents || self.dino.is_some() {
            let picture = sample.picture(JPG)?;
            if self.latents {
                let square = vae_picture(&picture, self.size as u32);
                input.vae = to_planes(&square, [0.5; 3], [0.5; 3]);
            }
            if self.dino.is_some() {
                let small = dino_picture(&picture, DINO_BASE, dino_side);
                input.dino = to_planes(&small, IMAGENET_MEAN, IMAGENET_STD);
            }
        }
        Ok(input)
    }
}

/// The encoders that were asked for.
struct Features {
    encoders: Option<Encoders>,
    dino: Option<Dinov2>,
    dino_grid: usize,
}

/// The columns of a sample.
type Row = Vec<(String, Value)>;

impl Features {
    fn load(args: &PrecomputeArgs) -> anyhow::Result<Self> {
        let precision = args.precision.precision();
        let parts = EncoderParts {
            texts: args.text,
            pictures: args.latents,
            ..EncoderParts::default()
        };
        let encoders = match parts.texts || parts.pictures {
            false => None,
            true => {
                let (location, hub) = (args.location.location(), args.location.hub());
                let loaded = Encoders::load(location, hub, parts, Device::flex(), precision)?;
                let factor = loaded.autoencoder().spatial_factor();
                if parts.pictures && !args.size.is_multiple_of(factor) {
                    return Err(bad_input(format!(
                        "--size {}: expected a multiple of {factor}, the autoencoder's factor",
                        args.size
                    )));
                }
                Some(loaded)
            }
        };
        let dino = match &args.dino {
            None => None,
            Some(path) => {
                let (config, weights) = Dinov2Config::open(path)?;
                let params = Params::new(&weights, &Device::flex(), precision);
                let model = Dinov2::new(&config, &params)?;
                Some(match config.grid() == args.dino_grid {
                    true => model,
                    false => model.resampled([args.dino_grid; 2]),
                })
            }
        };
        Ok(Self {
            encoders,
            dino,
            dino_grid: args.dino_grid,
        })
    }

    /// The states of the empty prompt, which training puts in the place of captions it drops.
    fn write_null_text(&self, args: &PrecomputeArgs) -> anyhow::Result<()> {
        if let (true, Some(encoders)) = (args.text, &self.encoders) {
            let states = encoders.encode_texts(&[""], !args.raw_captions)?.features;
            null_text::write(&args.output.out, states)?;
        }
        Ok(())
    }

    /// Side of the pictures that DINOv2 sees.
    fn dino_side(&self) -> u32 {
        let patch = self
            .dino
            .as_ref()
            .map_or(0, |dino| dino.config().patch_size);
        (self.dino_grid * patch) as u32
    }

    /// The columns of all inputs.
    fn rows(&self, args: &PrecomputeArgs, inputs: &[&Input]) -> anyhow::Result<Vec<Row>> {
        let mut rows: Vec<Row> = inputs
            .iter()
            .map(|input| {
                let mut row = vec![(CAPTION.to_owned(), Value::Str(input.caption.clone()))];
                let jpg = input.jpg.clone();
                row.extend(jpg.map(|jpg| (JPG.to_owned(), Value::Image(jpg))));
                row
            })
            .collect();
        if inputs.is_empty() {
            return Ok(rows);
        }
        let count = inputs.len();
        if let Some(encoders) = &self.encoders {
            if args.latents {
                let pixels = inputs
                    .iter()
                    .flat_map(|input| input.vae.iter().copied())
                    .collect();
                let latents = encoders.encode_pictures(pixels, count, args.size)?;
                add(&mut rows, &args.latents_column(), halves(latents)?);
            }
            if args.text {
                let texts: Vec<&str> = inputs.iter().map(|input| input.caption.as_str()).collect();
                let encoded = encoders.encode_texts(&texts, !args.raw_captions)?;
                add(&mut rows, "text_feat", halves(encoded.features)?);
                let mask = |tokens: &nitro::tokenizer::Tokens| {
                    Value::i64s(tokens.mask().into_iter().map(i64::from))
                };
                add(
                    &mut rows,
                    "text_mask",
                    encoded.tokens.iter().map(mask).collect(),
                );
            }
        }
        if let Some(dino) = &self.dino {
            let side = self.dino_side() as usize;
            let pixels: Vec<f32> = inputs.iter().flat_map(|i| i.dino.iter().copied()).collect();
            let data = TensorData::new(pixels, [count, 3, side, side]);
            let features = dino.forward_features(Tensor::from_data(data, &Device::flex()))?;
            add(&mut rows, "dino_feat", halves(features.patches)?);
        }
        Ok(rows)
    }
}

fn add(rows: &mut [Row], column: &str, values: Vec<Value>) {
    for (row, value) in rows.iter_mut().zip(values) {
        row.push((column.to_owned(), value));
    }
}

/// The values of each of a tensor's first dimension as `float16`, C order.
fn halves<const D: usize>(tensor: Tensor<D>) -> anyhow::Result<Vec<Value>> {
    let count = tensor.dims()[0].max(1);
    let values = tensor.into_data().convert::<f32>();
    let values = values
        .as_slice::<f32>()
        .map_err(|e| anyhow::anyhow!("{e:?}"))?;
    if !values.iter().all(|value| value.is_finite()) {
        anyhow::bail!("the encoder computed values that are no numbers; its weights are damaged");
    }
    Ok(values
        .chunks_exact((values.len() / count).max(1))
        .map(Value::f16s)
        .collect())
}
