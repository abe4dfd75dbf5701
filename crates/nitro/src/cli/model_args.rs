//! Arguments that choose a model and how it runs, shared by all commands that load one.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;
use burn::tensor::Device;
use clap::{Args, ValueEnum};
use nitro::{HubOptions, MINIATURE, ModelLocation, Pipeline, PipelineBuilder};
use nitro_ops::Precision;

use super::failure::bad_input;
use super::progress::{Downloads, Progress};

/// The name under which `--model` knows the model compiled into the program.
pub(super) const EMBEDDED: &str = "embedded";

/// Which model.
#[derive(Args)]
pub(super) struct LocationArgs {
    /// `embedded` (the miniature in this program), a model folder, or a Hub name: amd/Nitro-E
    #[arg(short, long, env = "NITRO_MODEL", default_value = EMBEDDED, value_name = "MODEL")]
    pub(super) model: String,
    /// Use only what the Hub cache holds, never the network
    #[arg(long)]
    pub(super) offline: bool,
    /// Print errors and warnings only
    #[arg(short, long)]
    pub(super) quiet: bool,
}

/// Which model, and how it runs.
#[derive(Args)]
pub(super) struct ModelArgs {
    #[command(flatten)]
    pub(super) location: LocationArgs,
    /// Variant of the model: base, grpo or dist where it has them [default: its first]
    #[arg(long, value_name = "NAME")]
    variant: Option<String>,
    /// Merge a PEFT LoRA folder, optionally with a scale (repeatable)
    #[arg(long, value_name = "FOLDER[:SCALE]", value_parser = parse_lora)]
    lora: Vec<(PathBuf, f64)>,
    /// Device to run on
    #[arg(long, value_enum, default_value_t = DeviceName::Cpu)]
    device: DeviceName,
    /// CPU threads [default: all cores]
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub(super) threads: Option<u16>,
    /// How products are computed: bf16 and int8 are faster on CPUs with AVX-512, int8 takes half the
    /// memory (8-bit weights in transformer and text encoder)
    #[arg(long, value_enum, default_value_t = PrecisionName::F32)]
    precision: PrecisionName,
    /// Rows of a picture that are decoded at a time [default: as many as run fastest]; fewer take less
    /// memory, and the picture is the same
    #[arg(long, value_name = "ROWS", value_parser = clap::value_parser!(u16).range(1..))]
    tile: Option<u16>,
}

#[derive(Clone, Copy, ValueEnum)]
enum DeviceName {
    Cpu,
}

/// A precision, as the command line names it.
#[derive(Clone, Copy, ValueEnum)]
pub(super) enum PrecisionName {
    F32,
    Bf16,
    Int8,
}

impl PrecisionName {
    pub(super) fn precision(self) -> Precision {
        match self {
            Self::F32 => Precision::F32,
            Self::Bf16 => Precision::Bf16,
            Self::Int8 => Precision::Int8,
        }
    }
}

/// Sets how many threads the kernels use, where the user says so. The first call counts.
pub(super) fn use_threads(threads: Option<u16>) -> anyhow::Result<()> {
    static SET: AtomicBool = AtomicBool::new(false);
    match threads {
        Some(threads) if !SET.swap(true, Ordering::SeqCst) => rayon::ThreadPoolBuilder::new()
            .num_threads(usize::from(threads))
            .build_global()
            .context("cannot set the number of threads"),
        _ => Ok(()),
    }
}

/// `FOLDER` or `FOLDER:SCALE`.
fn parse_lora(text: &str) -> Result<(PathBuf, f64), String> {
    match text
        .rsplit_once(':')
        .map(|(folder, scale)| (folder, scale.parse::<f64>()))
    {
        Some((folder, Ok(scale))) if scale.is_finite() => Ok((PathBuf::from(folder), scale)),
        Some((_, Ok(scale))) => Err(format!("the scale {scale} is not finite")),
        // A colon may belong to the folder's name.
        _ => Ok((PathBuf::from(text), 1.0)),
    }
}

/// `text` as one word of a POSIX shell.
fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:".contains(c);
    match !text.is_empty() && text.chars().all(plain) {
        true => text.to_owned(),
        false => format!("'{}'", text.replace('\'', r"'\''")),
    }
}

impl LocationArgs {
    /// Where the model is.
    pub(super) fn location(&self) -> ModelLocation {
        match self.model.as_str() {
            EMBEDDED => MINIATURE.into(),
            other => other.into(),
        }
    }

    /// The Hub as environment and `--offline` say, with download progress.
    pub(super) fn hub(&self) -> HubOptions {
        let mut options = HubOptions::from_env();
        options.offline |= self.offline;
        options.progress = Some(Arc::new(Downloads::new(self.quiet)));
        options
    }
}

impl ModelArgs {
    /// Loads the model for pictures of `side` pixels (the variant's own resolution without).
    pub(super) fn load(
        &self,
        side: Option<usize>,
        progress: &Progress,
    ) -> anyhow::Result<Pipeline> {
        Ok(self.builder(side, progress)?.load()?)
    }

    /// [`Self::load`] for a single request: what it needs first makes room for what it needs last.
    pub(super) fn load_on_demand(
        &self,
        side: Option<usize>,
        progress: &Progress,
    ) -> anyhow::Result<Pipeline> {
        Ok(self.builder(side, progress)?.on_demand(true).load()?)
    }

    /// What loads it.
    pub(super) fn builder(
        &self,
        side: Option<usize>,
        progress: &Progress,
    ) -> anyhow::Result<PipelineBuilder> {
        use_threads(self.threads)?;
        let part = progress.clone();
        let mut builder = Pipeline::builder(self.location.location())
            .hub(self.location.hub())
            .device(self.device())
            .precision(self.precision.precision())
            .on_part(move |name| part.stage(&format!("loading {name}")));
        if let Some(variant) = &self.variant {
            builder = builder.variant(variant);
        }
        if let Some(side) = side {
            builder = builder.resolution(side);
        }
        if let Some(rows) = self.tile {
            builder = builder.tile(usize::from(rows));
        }
        self.with_loras(builder)
    }

    /// The arguments with which another command uses the same model in the same way; the variant is
    /// left out.
    pub(super) fn command_line(&self) -> String {
        let mut line = Vec::new();
        if self.location.model != EMBEDDED {
            line.push(format!("--model {}", quoted(&self.location.model)));
        }
        for (folder, scale) in &self.lora {
            let lora = format!("{}:{scale}", folder.display());
            line.push(format!("--lora {}", quoted(&lora)));
        }
        match self.precision {
            PrecisionName::F32 => {}
            PrecisionName::Bf16 => line.push("--precision bf16".to_owned()),
            PrecisionName::Int8 => line.push("--precision int8".to_owned()),
        }
        if let Some(rows) = self.tile {
            line.push(format!("--tile {rows}"));
        }
        line.join(" ")
    }

    fn with_loras(&self, mut builder: PipelineBuilder) -> anyhow::Result<PipelineBuilder> {
        for (folder, scale) in &self.lora {
            if !folder.is_dir() {
                return Err(bad_input(format!(
                    "--lora {}: there is no such folder (a PEFT adapter is a folder with \
                     adapter_config.json and adapter_model.safetensors)",
                    folder.display()
                )));
            }
            builder = builder.lora(folder, *scale);
        }
        Ok(builder)
    }

    fn device(&self) -> Device {
        match self.device {
            DeviceName::Cpu => Device::flex(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lora_folder_may_carry_a_scale() {
        assert_eq!(parse_lora("a/b"), Ok((PathBuf::from("a/b"), 1.0)));
        assert_eq!(parse_lora("a/b:0.5"), Ok((PathBuf::from("a/b"), 0.5)));
        assert_eq!(parse_lora("c:/x"), Ok((PathBuf::from("c:/x"), 1.0)));
        assert!(parse_lora("a:inf").is_err());
    }
}
