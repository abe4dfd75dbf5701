use std::path::PathBuf;
use std::time::Instant;

use clap::{Args, Subcommand};
use nitro_data::ingest::{
    Folder, IngestOptions, Ingested, JourneyDb, ParquetPictures, ParquetRows, PictureRules, Source,
    Tars, ingest,
};

use super::{Done, OutputArgs};
use crate::cli::failure::bad_input;
use crate::cli::interrupt;
use crate::cli::progress::Progress;

/// What to ingest.
#[derive(Subcommand)]
pub(in crate::cli) enum IngestCommand {
    /// A folder of pictures, at any depth, with NAME.txt beside each
    Folder {
        /// The folder
        #[arg(value_name = "DIR")]
        dir: PathBuf,
        /// Extension of the caption files
        #[arg(long, default_value = "txt", value_name = "EXT")]
        caption_extension: String,
        #[command(flatten)]
        common: CommonArgs,
    },
    /// SA-1B: tars, or folders of jpg, with one NAME.txt for each picture in the captions' folder
    Sa1b {
        /// Folder with sa_*.tar files or with pictures
        #[arg(value_name = "IMAGES")]
        images: PathBuf,
        /// Folder of the captions, such as SAM-LLaVA's [default: beside the pictures]
        #[arg(long, value_name = "DIR")]
        captions: Option<PathBuf>,
        #[command(flatten)]
        common: CommonArgs,
    },
    /// JourneyDB: annotations (jsonl) and folders of pictures
    Journeydb {
        /// train_anno_realease_repath.jsonl
        #[arg(value_name = "ANNOTATIONS")]
        annotations: PathBuf,
        /// Folder that the annotations' img_path starts from
        #[arg(long, value_name = "DIR")]
        images: PathBuf,
        /// Field with the caption
        #[arg(long, default_value = "prompt", value_name = "NAME")]
        caption_field: String,
        #[command(flatten)]
        common: CommonArgs,
    },
    /// DiffusionDB: prompts of its metadata (parquet), with its pictures where --images is given
    Diffusiondb {
        /// metadata-large.parquet, or a folder of parquet files
        #[arg(value_name = "PARQUET")]
        parquet: PathBuf,
        /// Folder with part-000001/... [default: prompts only]
        #[arg(long, value_name = "DIR")]
        images: Option<PathBuf>,
        #[command(flatten)]
        common: CommonArgs,
    },
    /// Recap-DataComp-1B: captions (parquet); pictures come from `nitro data synthesize`
    RecapDatacomp {
        /// A parquet file, or a folder of them
        #[arg(value_name = "PARQUET")]
        parquet: PathBuf,
        /// Column with the caption
        #[arg(long, default_value = "re_caption", value_name = "NAME")]
        caption_column: String,
        #[command(flatten)]
        common: CommonArgs,
    },
    /// WebDataset tars: KEY.jpg with KEY.txt or KEY.json
    Webdataset {
        /// A tar, or a folder of them
        #[arg(value_name = "TARS")]
        tars: PathBuf,
        /// Field of the json with the caption
        #[arg(long, default_value = "caption", value_name = "NAME")]
        caption_field: String,
        #[command(flatten)]
        common: CommonArgs,
    },
    /// Parquet with a column of pictures, as Hugging Face's datasets have it
    Parquet {
        /// A parquet file, or a folder of them
        #[arg(value_name = "PARQUET")]
        parquet: PathBuf,
        /// Column with the pictures: bytes, or {bytes, path}
        #[arg(long, default_value = "image", value_name = "NAME")]
        image_column: String,
        /// Column with the captions
        #[arg(long, default_value = "text", value_name = "NAME")]
        caption_column: String,
        #[command(flatten)]
        common: CommonArgs,
    },
}

/// What all sources share.
#[derive(Args)]
pub(in crate::cli) struct CommonArgs {
    #[command(flatten)]
    output: OutputArgs,
    /// Leave out pictures whose shorter side is below this
    #[arg(long, default_value_t = 1, value_name = "PIXELS")]
    min_side: u32,
    /// Shrink pictures whose shorter side is above this (bicubic)
    #[arg(long, value_name = "PIXELS", value_parser = clap::value_parser!(u32).range(1..))]
    max_side: Option<u32>,
    /// Quality of pictures that are not copied byte for byte
    #[arg(long, default_value_t = 95, value_name = "1-100", value_parser = clap::value_parser!(u8).range(1..=100))]
    jpeg_quality: u8,
    /// Do not decode JPEG files that are only copied: faster, and damaged ones get in
    #[arg(long)]
    trust: bool,
    /// Stop after this many samples (of each process)
    #[arg(long, value_name = "N")]
    limit: Option<u64>,
    /// Print the summary as JSON
    #[arg(long)]
    json: bool,
    /// No progress
    #[arg(short, long)]
    quiet: bool,
}

/// Runs the command.
pub(super) fn run(command: &IngestCommand) -> anyhow::Result<()> {
    let common = command.common();
    let share = common.output.share()?;
    let source = open(command)?;
    let options = IngestOptions {
        pictures: PictureRules {
            min_side: common.min_side,
            max_side: common.max_side,
            jpeg_quality: common.jpeg_quality,
            trust: common.trust,
        },
        writer: common.output.writer(),
        limit: common.limit,
        share,
    };
    let progress = Progress::new(common.quiet);
    progress.stage("ingesting");
    let begun = Instant::now();
    let result = ingest(&*source, &common.output.out, &options, &mut |tally| {
        let (written, skipped) = (tally.written, tally.skipped());
        progress.tell(&format!("ingesting: {written} samples, {skipped} left out"));
        interrupt::check().is_continue()
    });
    progress.clear();
    let ingested = result?;
    let Ingested {
        index,
        tally,
        before,
        complete,
    } = ingested;
    Done::of(&index, tally, &before, begun, complete).report("samples", share, common.json)
}

impl IngestCommand {
    fn common(&self) -> &CommonArgs {
        match self {
            Self::Folder { common, .. }
            | Self::Sa1b { common, .. }
            | Self::Journeydb { common, .. }
            | Self::Diffusiondb { common, .. }
            | Self::RecapDatacomp { common, .. }
            | Self::Webdataset { common, .. }
            | Self::Parquet { common, .. } => common,
        }
    }
}

fn open(command: &IngestCommand) -> anyhow::Result<Box<dyn Source>> {
    let there = |path: &PathBuf| match path.exists() {
        true => Ok(()),
        false => Err(bad_input(format!(
            "{}: there is no such file or folder",
            path.display()
        ))),
    };
    Ok(match command {
        IngestCommand::Folder {
            dir,
            caption_extension,
            ..
        } => {
            there(dir)?;
            Box::new(Folder::open(dir, None, caption_extension)?)
        }
        IngestCommand::Sa1b {
            images, captions, ..
        } => {
            there(images)?;
            captions.iter().try_for_each(there)?;
            // Tars if there are any, else pictures.
            let captions = captions.as_deref();
            match Tars::open(images, captions, "caption") {
                Ok(tars) => Box::new(tars),
                Err(_) => Box::new(Folder::open(images, captions, "txt")?),
            }
        }
        IngestCommand::Journeydb {
            annotations,
            images,
            caption_field,
            ..
        } => {
            there(annotations)?;
            Box::new(JourneyDb::open(annotations, images, caption_field)?)
        }
        IngestCommand::Diffusiondb {
            parquet, images, ..
        } => {
            there(parquet)?;
            let pictures = match images {
                None => ParquetPictures::None,
                Some(images) => {
                    there(images)?;
                    ParquetPictures::DiffusionDb(images.clone())
                }
            };
            Box::new(ParquetRows::open(parquet, "prompt", pictures)?)
        }
        IngestCommand::RecapDatacomp {
            parquet,
            caption_column,
            ..
        } => {
            there(parquet)?;
            let pictures = ParquetPictures::None;
            Box::new(ParquetRows::open(parquet, caption_column, pictures)?)
        }
        IngestCommand::Webdataset {
            tars,
            caption_field,
            ..
        } => {
            there(tars)?;
            Box::new(Tars::open(tars, None, caption_field)?)
        }
        IngestCommand::Parquet {
            parquet,
            image_column,
            caption_column,
            ..
        } => {
            there(parquet)?;
            let pictures = ParquetPictures::Column(image_column.clone());
            Box::new(ParquetRows::open(parquet, caption_column, pictures)?)
        }
    })
}
