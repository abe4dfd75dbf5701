//! `nitro model info`: what a model is made of.

use clap::Args;
use nitro::{ModelFiles, ModelInfo, ModelLocation, PartInfo, VariantInfo};

use super::failure::say;
use super::interrupt;
use super::model_args::{EMBEDDED, LocationArgs};

/// Arguments of `nitro model info`.
#[derive(Args)]
pub(super) struct InfoArgs {
    /// `embedded`, a model folder, or a Hub name (whose files are downloaded) [default: --model]
    #[arg(value_name = "PATH")]
    path: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    location: LocationArgs,
}

/// Runs the command.
pub(super) fn run(args: &InfoArgs) -> anyhow::Result<()> {
    interrupt::install();
    let location = match args.path.as_deref() {
        None => args.location.location(),
        Some(EMBEDDED) => nitro::MINIATURE.into(),
        Some(path) => ModelLocation::from(path),
    };
    let info = ModelInfo::read(&ModelFiles::open(location, args.location.hub())?)?;
    if args.json {
        say(serde_json::to_string_pretty(&info)?);
    } else {
        say(describe(&info).trim_end());
    }
    Ok(())
}

fn describe(info: &ModelInfo) -> String {
    let mut text = format!("{} ({})\n", info.name, info.place);
    for variant in &info.variants {
        text += &describe_variant(variant, info.text_tokens);
    }
    text += "\nother parts\n";
    for (name, part) in [
        ("text encoder", &info.text_encoder),
        ("image encoder", &info.image_encoder),
        ("image decoder", &info.image_decoder),
    ] {
        text += &part_line(name, part);
    }
    text
}

fn describe_variant(info: &VariantInfo, text_tokens: usize) -> String {
    let VariantInfo {
        variant,
        config,
        part,
        ..
    } = info;
    let guidance = match variant.guidance > 1.0 {
        true => format!("guidance {}", variant.guidance),
        false => "no guidance".to_owned(),
    };
    let mut text = format!(
        "\n{} at {1}x{1} px: {2} steps, {guidance}, {3} subregion attention\n",
        variant.name,
        variant.resolution,
        variant.steps,
        if config.use_sub_attn {
            "with"
        } else {
            "without"
        },
    );
    text += &part_line("transformer", part);
    if let Some(lora) = &variant.lora {
        text += &format!("  {:<24} {lora}\n", "adapter");
    }
    for (name, parameters) in &info.parameters {
        text += &format!("    {name:<22} {:>10}\n", millions(*parameters));
    }
    text += &format!(
        "  {:<24} {:>7} {:>12} {:>14}\n",
        "image tokens", "blocks", "compressed", "uncompressed"
    );
    for (i, name) in ["first group", "middle group", "last group"]
        .into_iter()
        .enumerate()
    {
        text += &format!(
            "    {name:<22} {:>7} {:>12} {:>14}\n",
            info.blocks[i], info.tokens[i], info.tokens_uncompressed[i]
        );
    }
    text += &format!(
        "  a forward pass of one sample with {text_tokens} text tokens: {:.2} GFLOP ({:.2} \
         uncompressed)\n",
        part.gflop, info.gflop_uncompressed
    );
    text
}

fn part_line(name: &str, part: &PartInfo) -> String {
    let PartInfo {
        file,
        parameters,
        gflop,
    } = part;
    format!(
        "  {name:<24} {:>10} {gflop:>10.2} GFLOP  {file}\n",
        millions(*parameters)
    )
}

fn millions(count: usize) -> String {
    match count {
        1_000_000.. => format!("{:.1} M", count as f64 / 1e6),
        _ => format!("{:.1} k", count as f64 / 1e3),
    }
}
