//! `nitro generate`: pictures from text.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use nitro::picture;
use nitro::{
    CudaDevice, InitImage, NoiseKind, Output, Pipeline, Request, Seeds, Timings, Truncation,
};
use serde_json::json;

use super::failure::{bad_input, say};
use super::interrupt;
use super::model_args::ModelArgs;
use super::outputs::Outputs;
use super::progress::Progress;

/// Arguments of `nitro generate`.
#[derive(Args)]
pub(super) struct GenerateArgs {
    /// What the picture shows; several prompts make several pictures
    #[arg(required = true, value_name = "PROMPT")]
    prompts: Vec<String>,
    /// What it should not show (used only with guidance)
    #[arg(short, long, alias = "negative", value_name = "TEXT")]
    negative_prompt: Option<String>,
    /// Sampling steps [default: the variant's; Nitro-E's are 20, its distilled one's 4]
    #[arg(long, value_name = "N")]
    steps: Option<usize>,
    /// How strongly the prompt steers; 1 or less means no guidance [default: the variant's;
    /// Nitro-E's is 4.5, its distilled one has none]
    #[arg(short, long, alias = "cfg-scale", value_name = "SCALE")]
    guidance_scale: Option<f64>,
    /// Seed of the first picture, or `random`; picture k of a prompt gets seed + k
    #[arg(short, long, default_value = "0", value_name = "N|random", value_parser = parse_seed)]
    seed: u64,
    /// Draw all pictures' noise from one generator, as diffusers does with a single `generator`
    #[arg(long)]
    one_generator: bool,
    /// Whose random numbers the seed stands for: torch.Generator("cpu") or ("cuda")
    #[arg(long, value_enum, default_value_t = RngName::Cpu)]
    rng: RngName,
    /// Pictures per prompt
    #[arg(short = 'N', long, default_value_t = 1, value_name = "N")]
    num_images: usize,
    /// Side of the (square) pictures in pixels [default: the variant's resolution]
    #[arg(long, value_name = "PIXELS", conflicts_with_all = ["width", "height"])]
    size: Option<usize>,
    /// Width in pixels; must equal the height
    #[arg(short = 'W', long, value_name = "PIXELS")]
    width: Option<usize>,
    /// Height in pixels; must equal the width
    #[arg(short = 'H', long, value_name = "PIXELS")]
    height: Option<usize>,
    /// PNG file or existing folder [default: nitro-NNNN.png in the current folder, next free number]
    #[arg(short, long, value_name = "PATH")]
    output: Option<PathBuf>,
    /// Also write all pictures as one grid (with -o FILE: to FILE, pictures to FILE-1, FILE-2, ...)
    #[arg(long)]
    grid: bool,
    /// Picture to start from (image-to-image)
    #[arg(short, long, value_name = "FILE")]
    init_image: Option<PathBuf>,
    /// How much of the initial image is changed, above 0 to 1
    #[arg(
        long,
        default_value_t = 0.75,
        requires = "init_image",
        value_name = "0..1"
    )]
    strength: f64,
    /// Paint anew only where this picture, as large as the initial image, is white (inpainting)
    #[arg(long, requires = "init_image", value_name = "FILE")]
    mask: Option<PathBuf>,
    /// Take the prompt as it is, without the official caption cleaning
    #[arg(long)]
    no_clean: bool,
    /// Most pictures denoised together; bounds memory
    #[arg(long, default_value_t = 8, value_name = "N")]
    batch: usize,
    /// Leave prompt and settings out of the PNG
    #[arg(long)]
    no_metadata: bool,
    /// Print one JSON object about the run on standard output
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    model: ModelArgs,
}

#[derive(Clone, Copy, ValueEnum)]
enum RngName {
    Cpu,
    Cuda,
}

fn parse_seed(text: &str) -> Result<u64, String> {
    match text {
        // 32 bits, so that the seed means the same to every tool.
        "random" => Ok(RandomState::new().build_hasher().finish() & 0xffff_ffff),
        number => number
            .parse()
            .map_err(|_| "give a whole number of 0 or more, or `random`".into()),
    }
}

/// Runs the command.
pub(super) fn run(args: &GenerateArgs) -> anyhow::Result<()> {
    interrupt::install();
    let quiet = args.model.location.quiet;
    let request = args.request()?;
    let outputs = Outputs::plan(args.output.as_deref())?;

    let progress = Progress::new(quiet);
    let result = args
        .model
        .load_on_demand(request.width.or(request.height), &progress)
        .and_then(|pipeline| {
            let output = interrupt::watched(|| {
                pipeline.generate_observed(&request, &mut |event| progress.follow(event))
            })?;
            Ok((pipeline, output))
        });
    progress.clear();
    let (pipeline, output) = result?;

    for cut in &output.truncations {
        eprintln!("warning: {}", describe(cut, &request));
    }
    let paths = args.write(&outputs, &pipeline, &request, &output)?;
    if args.json {
        say(args.report(&pipeline, &request, &output, &paths));
    } else if !quiet {
        for path in paths.pictures.iter().chain(&paths.grid) {
            say(path.display());
        }
        eprintln!("{}", time_line(&pipeline, &output));
    }
    Ok(())
}

struct Written {
    pictures: Vec<PathBuf>,
    grid: Option<PathBuf>,
}

impl GenerateArgs {
    fn request(&self) -> anyhow::Result<Request> {
        let init = match &self.init_image {
            Some(path) => Some(InitImage {
                image: open_picture(path)?.into_rgb8(),
                strength: self.strength,
                mask: match &self.mask {
                    Some(mask) => Some(open_picture(mask)?.into_luma8()),
                    None => None,
                },
            }),
            None => None,
        };
        Ok(Request {
            negative_prompts: self.negative_prompt.iter().cloned().collect(),
            images_per_prompt: self.num_images,
            steps: self.steps,
            guidance_scale: self.guidance_scale,
            width: self.size.or(self.width),
            height: self.size.or(self.height),
            seeds: match self.one_generator {
                true => Seeds::Shared(self.seed),
                false => Seeds::PerImage(self.seed),
            },
            noise: match self.rng {
                RngName::Cpu => NoiseKind::TorchCpu,
                RngName::Cuda => NoiseKind::TorchCuda(CudaDevice::UNBOUNDED),
            },
            init,
            clean_captions: !self.no_clean,
            batch: self.batch,
            ..Request::of(self.prompts.iter().cloned())
        })
    }

    fn write(
        &self,
        outputs: &Outputs,
        pipeline: &Pipeline,
        request: &Request,
        output: &Output,
    ) -> anyhow::Result<Written> {
        let (pictures, grid) = outputs.paths(output.images.len(), self.grid)?;
        let plan = pipeline.plan(request)?;
        let text = |prompt, seed: Option<u64>| {
            let seed = seed.unwrap_or(self.seed);
            (!self.no_metadata).then(|| pipeline.parameters(request, &plan, prompt, seed))
        };
        for (generated, path) in output.images.iter().zip(&pictures) {
            let text = text(generated.prompt, generated.seed);
            outputs.write(path, &picture::encode_png(&generated.image, text.as_ref())?)?;
        }
        if let Some(path) = &grid {
            let images: Vec<_> = output.images.iter().map(|g| &g.image).collect();
            outputs.write(
                path,
                &picture::encode_png(&picture::grid(&images), text(0, None).as_ref())?,
            )?;
        }
        Ok(Written { pictures, grid })
    }

    fn report(
        &self,
        pipeline: &Pipeline,
        request: &Request,
        output: &Output,
        paths: &Written,
    ) -> serde_json::Value {
        let (width, height) = output.images[0].image.dimensions();
        let seconds = |timings: &Timings| {
            let stages = timings
                .stages()
                .map(|(name, time)| (name.to_owned(), json!(time.as_secs_f64())));
            let mut map = serde_json::Map::from_iter(stages);
            map.insert("load".to_owned(), json!(pipeline.load_time().as_secs_f64()));
            map
        };
        json!({
            "model": pipeline.name(),
            "variant": pipeline.variant().name,
            "prompts": request.prompts,
            "negative_prompt": self.negative_prompt,
            "steps": output.steps,
            "guidance_scale": output.guidance_scale,
            "width": width,
            "height": height,
            "rng": request.noise.name(),
            "images": output.images.iter().zip(&paths.pictures).map(|(image, path)| json!({
                "path": path,
                "prompt": request.prompts[image.prompt],
                "seed": image.seed.unwrap_or(self.seed),
            })).collect::<Vec<_>>(),
            "grid": paths.grid,
            "truncated": output.truncations.iter().map(|cut| json!({
                "prompt": cut.prompt,
                "negative": cut.negative,
                "tokens": cut.tokens,
                "dropped": cut.dropped,
            })).collect::<Vec<_>>(),
            "seconds": seconds(&output.timings),
        })
    }
}

fn open_picture(path: &Path) -> anyhow::Result<image::DynamicImage> {
    let opened = image::ImageReader::open(path).and_then(|reader| reader.with_guessed_format());
    opened
        .map_err(|e| e.to_string())
        .and_then(|reader| reader.decode().map_err(|e| e.to_string()))
        .map_err(|e| bad_input(format!("cannot read picture {}: {e}", path.display())))
}

fn describe(cut: &Truncation, request: &Request) -> String {
    let which = match (cut.negative, request.prompts.len()) {
        (true, _) => "the negative prompt".to_owned(),
        (false, 1) => "the prompt".to_owned(),
        (false, _) => format!("prompt {}", cut.prompt + 1),
    };
    format!(
        "{which} is longer than the {} tokens the text encoder reads; left out: {:?}",
        cut.tokens, cut.dropped
    )
}

/// Where the time went, in one line.
fn time_line(pipeline: &Pipeline, output: &Output) -> String {
    let mut parts = vec![format!("load {:.2} s", pipeline.load_time().as_secs_f64())];
    for (name, time) in output.timings.stages() {
        if time.as_millis() > 0 {
            parts.push(format!("{name} {:.2} s", time.as_secs_f64()));
        }
    }
    let total = pipeline.load_time() + output.timings.total();
    format!("{} | total {:.2} s", parts.join(" | "), total.as_secs_f64())
}
