//! One optimiser step over a [`ParameterStore`]: clip, AdamW, moving average.

use std::collections::BTreeMap;

use burn::tensor::Gradients;
use nitro_kernels::error::KernelError;
use nitro_kernels::optim::{AdamW, Ema, adamw_step, sum_of_squares};
use nitro_models::TensorMap;

use crate::config::OptimizerConfig;
use crate::store::ParameterStore;

/// Gradients by parameter name. A parameter without one (none reached it) is left out.
pub type NamedGradients = BTreeMap<String, Vec<f32>>;

/// Takes the gradients of `tensors` out of Burn's container.
pub fn named_gradients(
    tensors: &TensorMap,
    store: &ParameterStore,
    mut grads: Gradients,
) -> NamedGradients {
    store
        .iter()
        .filter(|(_, entry)| entry.trainable)
        .filter_map(|(name, _)| {
            let grad = tensors.get(name)?.grad_remove(&mut grads)?;
            let grad = grad.into_data().try_into_vec::<f32>().ok()?;
            Some((name.to_owned(), grad))
        })
        .collect()
}

/// Adds gradients to those of other batches.
pub fn accumulate(total: &mut NamedGradients, more: NamedGradients) {
    add_gradients(total, more, 1.0);
}

/// Adds `weight` times `more` to `total`.
pub(crate) fn add_gradients(total: &mut NamedGradients, more: NamedGradients, weight: f32) {
    for (name, mut grad) in more {
        if weight != 1.0 {
            grad.iter_mut().for_each(|value| *value *= weight);
        }
        match total.get_mut(&name) {
            Some(sum) => {
                for (sum, grad) in sum.iter_mut().zip(&grad) {
                    *sum += grad;
                }
            }
            None => {
                total.insert(name, grad);
            }
        }
    }
}

/// What one step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// L2 norm of the whole gradient before clipping.
    pub grad_norm: f64,
    /// False when the gradient was not finite: nothing was changed.
    pub applied: bool,
}

/// The learning rate in force at `step` (0-based) of `max_steps`: linear from zero over `warmup`
/// steps, constant, then linear to zero over the last `decay` steps.
pub fn learning_rate(base: f64, step: u64, max_steps: u64, warmup: u64, decay: u64) -> f64 {
    if step < warmup {
        return base * step as f64 / warmup as f64;
    }
    let left = max_steps.saturating_sub(step);
    if left < decay {
        base * left as f64 / decay as f64
    } else {
        base
    }
}

/// Clips the gradient to `clip` and applies AdamW with learning rate `lr` as update number
/// `update` (1-based), then moves the average: `ema = rate * ema + (1 - rate) * weight`.
///
/// The order and the arithmetic are those of the official `train.py` with
/// `torch.nn.utils.clip_grad_norm_` and `torch.optim.AdamW`. A gradient that is not finite changes
/// nothing.
pub fn step(
    store: &mut ParameterStore,
    grads: &NamedGradients,
    config: &OptimizerConfig,
    lr: f64,
    update: u64,
    clip: f64,
    ema_rate: f64,
) -> Result<StepReport, KernelError> {
    let norm = grads
        .values()
        .map(|grad| sum_of_squares(grad))
        .sum::<f64>()
        .sqrt();
    if !norm.is_finite() {
        return Ok(StepReport {
            grad_norm: norm,
            applied: false,
        });
    }
    let scale = (clip / (norm + 1e-6)).min(1.0);
    let adamw = AdamW {
        lr,
        beta1: config.betas.0,
        beta2: config.betas.1,
        eps: config.eps,
        weight_decay: config.weight_decay,
    };
    for (name, entry) in store.trainable_mut() {
        if let Some(grad) = grads.get(name) {
            let ema = Ema {
                decay: ema_rate,
                average: &mut entry.ema,
            };
            adamw_step(
                &adamw,
                update,
                scale as f32,
                &mut entry.value,
                grad,
                &mut entry.first,
                &mut entry.second,
                Some(ema),
            )?;
        }
    }
    Ok(StepReport {
        grad_norm: norm,
        applied: true,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn learning_rate_warms_up_holds_and_decays() {
        let lr = |step| learning_rate(1.0, step, 100, 10, 20);
        assert_eq!(lr(0), 0.0);
        assert_eq!(lr(5), 0.5);
        assert_eq!(lr(10), 1.0);
        assert_eq!(lr(80), 1.0);
        assert_eq!(lr(90), 0.5);
        assert_eq!(lr(100), 0.0);
    }
}
