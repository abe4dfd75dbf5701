//! Which models are measured.

use nitro_models::dcae::DcaeConfig;
use nitro_models::dinov2::Dinov2Config;
use nitro_models::emmdit::EmmditConfig;
use nitro_models::llama::LlamaConfig;
use nitro_train::TrainError;
use nitro_train::config::{OptimizerConfig, RunConfig, TaskConfig};

/// The models that the stages run.
#[derive(Clone, Debug)]
pub struct Suite {
    /// Tokens that a prompt is padded to.
    pub text_tokens: usize,
    /// The text encoder.
    pub llama: LlamaConfig,
    /// The transformer of the `emmdit_512` stages.
    pub emmdit: EmmditConfig,
    /// The transformer of the `emmdit_1024` stages.
    pub large_emmdit: EmmditConfig,
    /// The autoencoder.
    pub dcae: DcaeConfig,
    /// REPA's encoder, one patch for each token of `emmdit`.
    pub dino: Dinov2Config,
    /// What is trained.
    pub training: TrainingStep,
}

/// The training step that is measured.
#[derive(Clone, Debug)]
pub struct TrainingStep {
    /// The model.
    pub model: EmmditConfig,
    /// Tokens of a caption.
    pub text_tokens: usize,
    /// Pictures per step.
    pub batch: usize,
    /// AdamW.
    pub optimizer: OptimizerConfig,
    /// Largest norm of the gradient.
    pub gradient_clip: f64,
    /// Decay of the weights' average.
    pub ema_rate: f64,
}

/// The run whose step is measured: the one without REPA, whose teacher would be measured as well.
const MINIATURE: &str = "miniature-stage2";
/// Pictures in the measured step, which the comparison with other frameworks fixes.
const MINIATURE_BATCH: usize = 32;

impl Suite {
    /// Nitro-E with its text encoder and autoencoder, and the training step of the miniature.
    pub fn nitro_e() -> Result<Self, TrainError> {
        let config = RunConfig::shipped(MINIATURE, &[])?;
        let TaskConfig::Emmdit(task) = config.task else {
            return Err(TrainError::Config {
                origin: format!("configs/{MINIATURE}.yaml"),
                reason: format!("task kind is {}, expected emmdit", config.task.kind()),
            });
        };
        Ok(Self {
            text_tokens: 128,
            llama: LlamaConfig::llama_3_2_1b(),
            emmdit: EmmditConfig::nitro_e_512(),
            large_emmdit: EmmditConfig::nitro_e_1024(),
            dcae: DcaeConfig::sana_f32c32(),
            dino: Dinov2Config::vit_b14(),
            training: TrainingStep {
                model: task.model,
                text_tokens: task.text_tokens,
                batch: MINIATURE_BATCH,
                optimizer: config.run.optimizer,
                gradient_clip: config.run.gradient_clip,
                ema_rate: config.run.ema_rate,
            },
        })
    }

    /// The transformer of either size.
    pub(super) fn emmdit(&self, large: bool) -> &EmmditConfig {
        match large {
            false => &self.emmdit,
            true => &self.large_emmdit,
        }
    }

    /// Side of the pictures of the autoencoder's and the pipeline's stages.
    pub(super) fn pixels(&self) -> usize {
        self.emmdit.sample_size * self.dcae.spatial_factor()
    }
}
