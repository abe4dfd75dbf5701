//! The optimiser's passes over parameters: AdamW with an optional EMA, and the gradient norm.

use crate::error::{KernelError, check_eq};
use crate::parallel::{for_ranges, part};
use crate::pool::SharedPtr;
use crate::simd::{Level, simd_kernel};
use std::sync::Mutex;

/// Hyperparameters of AdamW, with the meaning (and arithmetic) of `torch.optim.AdamW`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate of this step.
    pub lr: f64,
    /// Decay of the mean of gradients.
    pub beta1: f64,
    /// Decay of the mean of squared gradients.
    pub beta2: f64,
    /// Added to the root of the corrected mean of squares.
    pub eps: f64,
    /// Decoupled decay: parameters shrink by `lr * weight_decay` per step.
    pub weight_decay: f64,
}

/// An exponential moving average of the parameters: `average = decay * average + (1 - decay) * p`.
#[derive(Debug)]
pub struct Ema<'a> {
    /// Weight of the old average.
    pub decay: f64,
    /// The average, as long as the parameters.
    pub average: &'a mut [f32],
}

/// One AdamW step on one parameter tensor, in a single pass over memory.
///
/// `step` counts from 1. The gradient is multiplied by `grad_scale` as it is read (the factor of
/// gradient clipping or of loss scaling; 1 for none). `mean` and `square` are the optimiser's state,
/// zero before the first step. `ema` is updated with the new parameters.
///
/// # Errors
/// The slices differ in length, or `step` is 0.
pub fn adamw_step(
    cfg: &AdamW,
    step: u64,
    grad_scale: f32,
    param: &mut [f32],
    grad: &[f32],
    mean: &mut [f32],
    square: &mut [f32],
    ema: Option<Ema<'_>>,
) -> Result<(), KernelError> {
    adamw_step_on(
        Level::active(),
        cfg,
        step,
        grad_scale,
        param,
        grad,
        mean,
        square,
        ema,
    )
}

/// Sum of squares, accumulated in f64. The same bits come out for any number of threads and any
/// instruction set.
pub fn sum_of_squares(x: &[f32]) -> f64 {
    sum_of_squares_on(Level::active(), x)
}

/// The factors of one step, rounded to f32 once.
#[derive(Clone, Copy)]
struct Factors {
    grad_scale: f32,
    keep: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    correction: f32,
    eps: f32,
    step_size: f32,
    ema_decay: f32,
    ema_rate: f32,
}

fn adamw_step_on(
    level: Level,
    cfg: &AdamW,
    step: u64,
    grad_scale: f32,
    param: &mut [f32],
    grad: &[f32],
    mean: &mut [f32],
    square: &mut [f32],
    ema: Option<Ema<'_>>,
) -> Result<(), KernelError> {
    check_eq("AdamW gradient length", param.len(), grad.len())?;
    check_eq("AdamW mean length", param.len(), mean.len())?;
    check_eq("AdamW square length", param.len(), square.len())?;
    if let Some(ema) = &ema {
        check_eq("EMA length", param.len(), ema.average.len())?;
    }
    if step == 0 {
        return Err(KernelError::Unsupported {
            what: "AdamW step",
            value: 0,
            help: "steps count from 1, because the bias correction divides by 1 - beta^step",
        });
    }
    let correction = |beta: f64| 1.0 - beta.powf(step as f64);
    let ema_decay = ema.as_ref().map_or(0.0, |ema| ema.decay);
    let factors = Factors {
        grad_scale,
        keep: (1.0 - cfg.lr * cfg.weight_decay) as f32,
        one_minus_beta1: (1.0 - cfg.beta1) as f32,
        beta2: cfg.beta2 as f32,
        one_minus_beta2: (1.0 - cfg.beta2) as f32,
        correction: correction(cfg.beta2).sqrt() as f32,
        eps: cfg.eps as f32,
        step_size: (cfg.lr / correction(cfg.beta1)) as f32,
        ema_decay: ema_decay as f32,
        ema_rate: (1.0 - ema_decay) as f32,
    };
    let len = param.len();
    let param = SharedPtr(param.as_mut_ptr());
    let mean = SharedPtr(mean.as_mut_ptr());
    let square = SharedPtr(square.as_mut_ptr());
    let ema = ema.map(|ema| SharedPtr(ema.average.as_mut_ptr()));
    for_ranges(len, |range| {
        // SAFETY: all slices have `len` values, and ranges are disjoint.
        let (param, mean, square, ema) = unsafe {
            (
                part(param, range.clone()),
                part(mean, range.clone()),
                part(square, range.clone()),
                ema.map_or(&mut [][..], |ema| part(ema, range.clone())),
            )
        };
        update(level, factors, param, &grad[range], mean, square, ema);
    });
    Ok(())
}

simd_kernel! {
    fn update<S>(
        s,
        f: Factors,
        param: &mut [f32],
        grad: &[f32],
        mean: &mut [f32],
        square: &mut [f32],
        ema: &mut [f32],
    ) {
        let mut i = 0;
        while i < param.len() {
            let g = s.mul(s.load_at(grad, i), s.splat(f.grad_scale));
            let m = s.load_at(mean, i);
            let m = s.fma(s.sub(g, m), s.splat(f.one_minus_beta1), m);
            let v = s.mul(s.load_at(square, i), s.splat(f.beta2));
            let v = s.fma(s.mul(g, g), s.splat(f.one_minus_beta2), v);
            s.store_at(mean, i, m);
            s.store_at(square, i, v);
            let root = s.div(s.sqrt(v), s.splat(f.correction));
            let ratio = s.div(m, s.add(root, s.splat(f.eps)));
            let p = s.mul(s.load_at(param, i), s.splat(f.keep));
            let p = s.fnma(ratio, s.splat(f.step_size), p);
            s.store_at(param, i, p);
            if !ema.is_empty() {
                let old = s.mul(s.load_at(ema, i), s.splat(f.ema_decay));
                s.store_at(ema, i, s.fma(p, s.splat(f.ema_rate), old));
            }
            i += S::LANES;
        }
    }
}

fn sum_of_squares_on(level: Level, x: &[f32]) -> f64 {
    let parts = Mutex::new(Vec::new());
    for_ranges(x.len(), |range| {
        let start = range.start;
        let sum = squares(level, &x[range]);
        parts
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .push((start, sum));
    });
    let mut parts = parts.into_inner().unwrap_or_else(|e| e.into_inner());
    // In the order of the data, whichever thread was first.
    parts.sort_unstable_by_key(|&(start, _)| start);
    parts.iter().map(|(_, sum)| sum).sum()
}

simd_kernel! {
    fn squares<S>(_s, x: &[f32]) -> f64 {
        // Plain Rust: sixteen fixed chains, which the compiler maps to each instruction set without
        // changing the result.
        let mut sums = [0.0f64; 16];
        let mut chunks = x.chunks_exact(16);
        for chunk in &mut chunks {
            for (sum, &x) in sums.iter_mut().zip(chunk) {
                let x = f64::from(x);
                *sum += x * x;
            }
        }
        for (sum, &x) in sums.iter_mut().zip(chunks.remainder()) {
            let x = f64::from(x);
            *sum += x * x;
        }
        sums.iter().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, random, to_f64};

    #[test]
    fn several_steps_match_torch_arithmetic_in_f64() {
        let cfg = AdamW {
            lr: 0.02,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
        };
        let (decay, scale) = (0.8, 0.5);
        for level in Level::available() {
            for len in [5, 16, 40_001] {
                let start = random(1, len);
                let (mut p, mut m, mut v) = (start.clone(), vec![0.0; len], vec![0.0; len]);
                let mut average = start.clone();
                let (mut rp, mut ra) = (to_f64(&start), to_f64(&start));
                let (mut rm, mut rv) = (vec![0.0; len], vec![0.0; len]);
                for step in 1..=4 {
                    let grad = random(10 + step, len);
                    let ema = Ema {
                        decay,
                        average: &mut average,
                    };
                    adamw_step_on(
                        level,
                        &cfg,
                        step,
                        scale,
                        &mut p,
                        &grad,
                        &mut m,
                        &mut v,
                        Some(ema),
                    )
                    .unwrap();
                    let correct = |beta: f64| 1.0 - beta.powi(step as i32);
                    for i in 0..len {
                        let g = f64::from(grad[i]) * f64::from(scale);
                        rp[i] *= 1.0 - cfg.lr * cfg.weight_decay;
                        rm[i] = cfg.beta1 * rm[i] + (1.0 - cfg.beta1) * g;
                        rv[i] = cfg.beta2 * rv[i] + (1.0 - cfg.beta2) * g * g;
                        let denominator = rv[i].sqrt() / correct(cfg.beta2).sqrt() + cfg.eps;
                        rp[i] -= cfg.lr / correct(cfg.beta1) * rm[i] / denominator;
                        ra[i] = decay * ra[i] + (1.0 - decay) * rp[i];
                    }
                }
                assert_close(&format!("{level:?} parameters"), &p, &rp);
                assert_close(&format!("{level:?} mean"), &m, &rm);
                assert_close(&format!("{level:?} square"), &v, &rv);
                assert_close(&format!("{level:?} average"), &average, &ra);
            }
        }
    }

    #[test]
    fn without_an_average_the_parameters_are_the_same() {
        let cfg = AdamW {
            lr: 0.1,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.0,
        };
        let (start, grad) = (random(1, 33), random(2, 33));
        let run = |ema: bool| {
            let (mut p, mut m, mut v) = (start.clone(), vec![0.0; 33], vec![0.0; 33]);
            let mut average = start.clone();
            let ema = ema.then_some(Ema {
                decay: 0.9,
                average: &mut average,
            });
            adamw_step(&cfg, 1, 1.0, &mut p, &grad, &mut m, &mut v, ema).unwrap();
            p
        };
        assert_eq!(run(true), run(false));
    }

    #[test]
    fn the_sum_of_squares_is_accurate_and_the_same_everywhere() {
        let x = random(1, 100_003);
        let exact: f64 = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
        let first = sum_of_squares(&x);
        assert!((first / exact - 1.0).abs() < 1e-13);
        for level in Level::available() {
            for _ in 0..3 {
                assert_eq!(
                    sum_of_squares_on(level, &x).to_bits(),
                    first.to_bits(),
                    "{level:?}"
                );
            }
        }
        assert_eq!(sum_of_squares(&[]), 0.0);
    }

    #[test]
    fn step_zero_and_wrong_lengths_are_errors() {
        let cfg = AdamW {
            lr: 0.1,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.0,
        };
        let (mut p, mut m, mut v) = ([0.0; 4], [0.0; 4], [0.0; 4]);
        let error = adamw_step(&cfg, 0, 1.0, &mut p, &[0.0; 4], &mut m, &mut v, None).unwrap_err();
        assert!(error.to_string().contains("count from 1"));
        assert!(adamw_step(&cfg, 1, 1.0, &mut p, &[0.0; 3], &mut m, &mut v, None).is_err());
    }
}
