//! What a run would be, without running it: the check before a long training is queued.

use nitro_models::emmdit::EmmditConfig;
use serde::Serialize;

use crate::TrainError;
use crate::config::{EmmditTask, RunConfig, TaskConfig};
use crate::emmdit::data_size;

/// What a run would be.
#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    /// The configuration with all defaults and overrides.
    pub config: RunConfig,
    /// What the model and the data come to, of an E-MMDiT.
    pub emmdit: Option<EmmditPlan>,
}

/// What an E-MMDiT run would be.
#[derive(Clone, Debug, Serialize)]
pub struct EmmditPlan {
    /// Trainable parameters, projectors included.
    pub parameters: usize,
    /// Those of them that are REPA's projectors.
    pub projector_parameters: usize,
    /// Arithmetic of one forward pass of one picture, in units of 10^9 operations.
    pub gflop: f64,
    /// Examples in the data.
    pub examples: usize,
    /// Whole batches in an epoch.
    pub steps_per_epoch: u64,
    /// Epochs the run has.
    pub epochs: f64,
    /// Size of a checkpoint: weights, two moments and the average, in f32.
    pub checkpoint_megabytes: u64,
}

/// Resolves `config` for `processes`, opens its data and checks them against the model. Frozen models
/// are not loaded, and nothing is written.
pub fn plan(config: &RunConfig, processes: usize) -> Result<Plan, TrainError> {
    config.check(processes)?;
    let emmdit = match &config.task {
        TaskConfig::Emmdit(task) => Some(plan_emmdit(config, task)?),
        _ => None,
    };
    Ok(Plan {
        config: config.clone(),
        emmdit,
    })
}

fn plan_emmdit(config: &RunConfig, task: &EmmditTask) -> Result<EmmditPlan, TrainError> {
    let run = &config.run;
    let (examples, steps_per_epoch) = data_size(run, task)?;
    let (parameters, projector_parameters) = parameters(&task.model);
    Ok(EmmditPlan {
        parameters,
        projector_parameters,
        gflop: task.model.gflop(task.text_tokens),
        examples,
        steps_per_epoch,
        epochs: run.max_steps as f64 / steps_per_epoch as f64,
        checkpoint_megabytes: (16 * parameters) as u64 / 1_000_000,
    })
}

/// Trainable parameters, and those of them that only training needs.
fn parameters(model: &EmmditConfig) -> (usize, usize) {
    let sum = |model: &EmmditConfig| {
        model
            .parameter_counts()
            .iter()
            .map(|(_, count)| count)
            .sum()
    };
    let all: usize = sum(model);
    let plain: usize = sum(&EmmditConfig {
        repa: None,
        ..model.clone()
    });
    (all, all - plain)
}
