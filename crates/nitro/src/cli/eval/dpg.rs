//! `nitro eval dpg`: DPG-Bench's pictures, for its own scorer.

use std::path::PathBuf;

use clap::Args;
use nitro::Seeds;
use nitro_eval::dpg::{PICTURES, picture, prompts, write_pictures};

use super::super::failure::say;
use super::super::interrupt;
use super::pictures::{PictureArgs, Wanted};

/// Arguments of `nitro eval dpg`.
#[derive(Args)]
pub(super) struct DpgArgs {
    /// Folder for manifest.json and images/<id>.png; an interrupted run goes on where it stopped
    #[arg(long, default_value = "dpg", value_name = "DIR")]
    out: PathBuf,
    /// Only the first N prompts
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Seed of a prompt's first picture; the next ones have the seeds after it
    #[arg(short, long, default_value_t = 0, value_name = "SEED")]
    seed: u64,
    #[command(flatten)]
    pictures: PictureArgs,
}

/// Runs the command.
pub(super) fn run(args: &DpgArgs) -> anyhow::Result<()> {
    interrupt::install();
    let mut prompts = prompts();
    prompts.truncate(args.limit.unwrap_or(usize::MAX));
    let progress = args.pictures.begin()?;
    let pipeline = args.pictures.load(&progress)?;
    let seeds = (0..PICTURES as u64).map(|i| args.seed.wrapping_add(i));
    let manifest = args
        .pictures
        .settings()
        .manifest(&pipeline, seeds.collect(), &progress)?;
    manifest.claim(&args.out)?;
    // A folder with nothing else in it: the official script reads every file.
    let images = args.out.join("images");
    let open: Vec<Wanted<'_>> = prompts
        .iter()
        .filter(|prompt| !picture(&images, prompt).is_file())
        .map(|prompt| Wanted {
            prompt: &prompt.prompt,
            save: Box::new(|images_of_prompt| {
                Ok(write_pictures(&images, prompt, images_of_prompt)?)
            }),
        })
        .collect();
    let (total, seeds) = (prompts.len(), Seeds::PerImage(args.seed));
    args.pictures
        .settings()
        .make(&pipeline, &open, total, PICTURES, &seeds, &progress)?;
    progress.clear();
    say(format_args!(
        "{total} prompts in {}; score them with the official compute_dpg_bench.py \
         (--pic-num {PICTURES} --resolution {})",
        images.display(),
        pipeline.variant().resolution
    ));
    Ok(())
}
