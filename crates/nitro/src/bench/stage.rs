//! The stages of a bench, and what each costs.

use std::fmt;
use std::str::FromStr;

use nitro_models::WeightError;
use nitro_ops::Precision;

use super::models::Part;
use super::suite::Suite;

/// Something that is run and timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// One forward pass of the E-MMDiT for pictures of 512 or 1024 pixels.
    Emmdit {
        /// Whether it is the model for 1024 pixels.
        large: bool,
        /// Samples in the batch.
        batch: usize,
    },
    /// DC-AE, latent to picture.
    DcaeDecode,
    /// DC-AE, picture to latent.
    DcaeEncode,
    /// Llama over one padded prompt.
    Llama,
    /// Token ids to pixels: text encoder, denoising, decoder.
    Prompt {
        /// Denoising steps: 4 as the distilled model takes them, without guidance, or 20 with.
        steps: usize,
    },
    /// Preparing one picture for training: JPEG and caption to latents, text states and DINOv2 features,
    /// as `nitro data precompute` does.
    Precompute,
    /// Reading pictures so prepared from shards and mixing them with noise, as training's data thread
    /// does.
    Load,
    /// One optimiser step of the miniature E-MMDiT: forward, backward, clipping, AdamW, average.
    TrainStep,
}

/// A name that no stage has.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no stage is called `{name}`; there are {}", names())]
pub struct UnknownStage {
    name: String,
}

fn names() -> String {
    let names: Vec<String> = Stage::ALL.iter().map(Stage::to_string).collect();
    format!("{} (and other batches: emmdit_512_b4)", names.join(", "))
}

/// Pictures that one run of [`Stage::Load`] reads.
pub(super) const LOADED: usize = 32;

/// The largest batch that a name may ask for.
const MAX_BATCH: usize = 64;

impl Stage {
    /// The stages that are run when none are named. Stages of one model stand together, because a
    /// model is kept only while the next stage needs it.
    pub const ALL: [Self; 12] = [
        Self::emmdit(false, 1),
        Self::emmdit(false, 2),
        Self::emmdit(false, 8),
        Self::emmdit(true, 1),
        Self::DcaeDecode,
        Self::DcaeEncode,
        Self::Precompute,
        Self::Llama,
        Self::Prompt { steps: 4 },
        Self::Prompt { steps: 20 },
        Self::Load,
        Self::TrainStep,
    ];

    const fn emmdit(large: bool, batch: usize) -> Self {
        Self::Emmdit { large, batch }
    }

    /// Whether denoising is guided, which doubles each batch: the distilled model is not.
    pub(super) fn is_guided(steps: usize) -> bool {
        steps > 4
    }

    /// Pictures that one run makes or takes, where it is about pictures.
    pub(super) fn pictures(self, suite: &Suite) -> Option<usize> {
        match self {
            Self::Emmdit { .. } | Self::Llama => None,
            Self::DcaeDecode | Self::DcaeEncode | Self::Precompute | Self::Prompt { .. } => Some(1),
            Self::Load => Some(LOADED),
            Self::TrainStep => Some(suite.training.batch),
        }
    }

    /// The models it needs.
    pub(super) fn parts(self) -> &'static [Part] {
        match self {
            Self::Emmdit { large: false, .. } => &[Part::Emmdit],
            Self::Emmdit { large: true, .. } => &[Part::LargeEmmdit],
            Self::DcaeDecode => &[Part::Decoder],
            Self::DcaeEncode => &[Part::Encoder],
            Self::Precompute => &[Part::Encoder, Part::Llama, Part::Dino],
            Self::Llama => &[Part::Llama],
            Self::Prompt { .. } => &[Part::Llama, Part::Emmdit, Part::Decoder],
            Self::Load | Self::TrainStep => &[],
        }
    }

    /// Why it is not run in this precision, if it is not.
    pub(super) fn refusal(self, precision: Precision) -> Option<&'static str> {
        let trains = matches!(precision, Precision::F32 | Precision::Bf16);
        (self == Self::TrainStep && !trains).then_some("training runs in f32 or bf16")
    }

    /// Floating-point operations of one run in units of 10^9, counted from the configuration: two per
    /// multiply-add, convolutions as direct ones, a backward pass as two forward passes.
    pub fn gflop(self, suite: &Suite) -> Result<f64, WeightError> {
        let text = suite.text_tokens;
        Ok(match self {
            Self::Emmdit { large, batch } => batch as f64 * suite.emmdit(large).gflop(text),
            Self::DcaeDecode => suite.dcae.decoder_gflop(suite.pixels())?,
            Self::DcaeEncode => suite.dcae.encoder_gflop(suite.pixels())?,
            Self::Llama => suite.llama.gflop(text),
            Self::Precompute => {
                suite.dcae.encoder_gflop(suite.pixels())?
                    + suite.llama.gflop(text)
                    + suite.dino.gflop(suite.emmdit.sample_size)
            }
            Self::Load => 0.0,
            Self::Prompt { steps } => {
                let rows = if Self::is_guided(steps) { 2.0 } else { 1.0 };
                rows * (suite.llama.gflop(text) + steps as f64 * suite.emmdit.gflop(text))
                    + suite.dcae.decoder_gflop(suite.pixels())?
            }
            Self::TrainStep => {
                let step = &suite.training;
                3.0 * step.batch as f64 * step.model.gflop(step.text_tokens)
            }
        })
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Emmdit { large, batch } => {
                write!(f, "emmdit_{}_b{batch}", if *large { 1024 } else { 512 })
            }
            Self::DcaeDecode => f.write_str("dcae_decode_512"),
            Self::DcaeEncode => f.write_str("dcae_encode_512"),
            Self::Precompute => f.write_str("precompute_512"),
            Self::Load => f.write_str("load_512"),
            Self::Llama => f.write_str("llama_128"),
            Self::Prompt { steps } => write!(f, "prompt_to_512_{steps}steps"),
            Self::TrainStep => f.write_str("train_step_mini"),
        }
    }
}

impl FromStr for Stage {
    type Err = UnknownStage;

    fn from_str(name: &str) -> Result<Self, UnknownStage> {
        let listed = Self::ALL
            .into_iter()
            .find(|stage| stage.to_string() == name);
        let batch = |large: bool, prefix: &str| {
            let batch = name.strip_prefix(prefix)?.parse().ok()?;
            (1..=MAX_BATCH)
                .contains(&batch)
                .then_some(Self::emmdit(large, batch))
        };
        listed
            .or_else(|| batch(false, "emmdit_512_b"))
            .or_else(|| batch(true, "emmdit_1024_b"))
            .ok_or_else(|| UnknownStage {
                name: name.to_owned(),
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_are_known_by_their_names() {
        for stage in Stage::ALL {
            assert_eq!(stage.to_string().parse(), Ok(stage));
        }
        let batch_of_four = Stage::emmdit(true, 4);
        assert_eq!("emmdit_1024_b4".parse(), Ok(batch_of_four));
        for name in [
            "",
            "emmdit_512_b0",
            "emmdit_512_b65",
            "emmdit_256_b1",
            "llama",
        ] {
            let error = name.parse::<Stage>().unwrap_err();
            assert!(error.to_string().contains("dcae_decode_512"), "{error}");
        }
    }

    #[test]
    fn costs_are_those_of_the_published_models() {
        let suite = Suite::nitro_e().unwrap();
        let gflop = |name: &str| name.parse::<Stage>().unwrap().gflop(&suite).unwrap();
        for (name, counted) in [
            ("emmdit_512_b1", 80.4),
            ("emmdit_512_b8", 643.2),
            ("dcae_decode_512", 2092.0),
            ("dcae_encode_512", 1295.0),
            ("llama_128", 250.0),
            ("precompute_512", 1295.0 + 250.0 + 46.0),
            ("prompt_to_512_4steps", 250.0 + 4.0 * 80.4 + 2092.0),
            (
                "prompt_to_512_20steps",
                2.0 * (250.0 + 20.0 * 80.4) + 2092.0,
            ),
        ] {
            let found = gflop(name);
            assert!(
                (found / counted - 1.0).abs() < 0.02,
                "{name}: {found}, not {counted}"
            );
        }
    }
}
