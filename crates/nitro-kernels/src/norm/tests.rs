use super::*;
use crate::testing::{assert_close, dot, gradient, random, to_f64};

/// All operands of one layer norm in f64; empty parameters are absent.
#[derive(Clone)]
struct Reference {
    shape: LayerNormShape,
    center: bool,
    x: Vec<f64>,
    weight: Vec<f64>,
    bias: Vec<f64>,
    scale: Vec<f64>,
    shift: Vec<f64>,
}

const EPS: f32 = 1e-3;

impl Reference {
    fn forward(&self) -> Vec<f64> {
        let LayerNormShape {
            tokens, channels, ..
        } = self.shape;
        let or = |v: &Vec<f64>, i: usize, default: f64| if v.is_empty() { default } else { v[i] };
        let mut y = Vec::new();
        for (r, row) in self.x.chunks(channels).enumerate() {
            let mean = if self.center {
                row.iter().sum::<f64>() / channels as f64
            } else {
                0.0
            };
            let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / channels as f64;
            for (c, x) in row.iter().enumerate() {
                let normed = (x - mean) / (variance + f64::from(EPS)).sqrt();
                let i = r / tokens * channels + c;
                let affine = normed * or(&self.weight, c, 1.0) + or(&self.bias, c, 0.0);
                y.push(affine * (1.0 + or(&self.scale, i, 0.0)) + or(&self.shift, i, 0.0));
            }
        }
        y
    }

    /// Gradient of `dot(dy, forward)` with respect to the operand that `field` names.
    fn gradient(&self, dy: &[f32], field: impl Fn(&mut Self) -> &mut Vec<f64>) -> Vec<f64> {
        let mut at = self.clone();
        let start = field(&mut at).clone();
        gradient(&start, |value| {
            let mut moved = self.clone();
            field(&mut moved).copy_from_slice(value);
            dot(dy, &moved.forward())
        })
    }
}

fn opt(v: &[f32]) -> Option<&[f32]> {
    (!v.is_empty()).then_some(v)
}

/// Checks forward and backward of one shape; `which` says which of weight, bias, scale, shift exist.
fn check(level: Level, shape: LayerNormShape, center: bool, which: [bool; 4], all_of_x: bool) {
    let LayerNormShape {
        batch,
        tokens,
        channels,
    } = shape;
    let rows = batch * tokens;
    let maybe = |on: bool, seed, len| if on { random(seed, len) } else { Vec::new() };
    // An offset far from zero, which a one-pass variance would not survive.
    let x: Vec<f32> = random(1, rows * channels)
        .iter()
        .map(|x| x * 0.7 + 5.0)
        .collect();
    let weight = maybe(which[0], 2, channels);
    let bias = maybe(which[1], 3, channels);
    let scale = maybe(which[2], 4, batch * channels);
    let shift = maybe(which[3], 5, batch * channels);
    let dy = random(6, rows * channels);
    let params = LayerNormParams {
        weight: opt(&weight),
        bias: opt(&bias),
        scale: opt(&scale),
        shift: opt(&shift),
    };
    let reference = Reference {
        shape,
        center,
        x: to_f64(&x),
        weight: to_f64(&weight),
        bias: to_f64(&bias),
        scale: to_f64(&scale),
        shift: to_f64(&shift),
    };

    let mut y = vec![f32::NAN; x.len()];
    let mut mean = vec![f32::NAN; rows];
    let mut rstd = vec![f32::NAN; rows];
    let mean_out = center.then_some(mean.as_mut_slice());
    forward(level, shape, &x, params, EPS, &mut y, mean_out, &mut rstd).unwrap();
    let what = format!("{level:?} {shape:?} center {center} params {which:?}");
    assert_close(&format!("{what}: y"), &y, &reference.forward());

    let mut dx = vec![f32::NAN; x.len()];
    let mut dweight = vec![f32::NAN; channels];
    let mut dbias = vec![f32::NAN; channels];
    let mut dscale = vec![f32::NAN; batch * channels];
    let mut dshift = vec![f32::NAN; batch * channels];
    let grads = LayerNormParamGrads {
        weight: Some(&mut dweight),
        bias: Some(&mut dbias),
        scale: Some(&mut dscale),
        shift: Some(&mut dshift),
    };
    let mean_in = center.then_some(mean.as_slice());
    backward(
        level, shape, &dy, &x, params, mean_in, &rstd, &mut dx, grads,
    )
    .unwrap();
    if all_of_x {
        assert_close(
            &format!("{what}: dx"),
            &dx,
            &reference.gradient(&dy, |r| &mut r.x),
        );
    }
    let check_param =
        |name, present: bool, grad: &[f32], field: fn(&mut Reference) -> &mut Vec<f64>| {
            if present {
                assert_close(
                    &format!("{what}: {name}"),
                    grad,
                    &reference.gradient(&dy, field),
                );
            }
        };
    check_param("dweight", which[0], &dweight, |r| &mut r.weight);
    check_param("dbias", which[1], &dbias, |r| &mut r.bias);
    check_param("dscale", which[2], &dscale, |r| &mut r.scale);
    check_param("dshift", which[3], &dshift, |r| &mut r.shift);
}

#[test]
fn layer_norm_and_its_gradients_match_f64_at_every_level_and_tail_length() {
    for level in Level::available() {
        for channels in [3, 16, 37] {
            let shape = LayerNormShape {
                batch: 2,
                tokens: 3,
                channels,
            };
            check(level, shape, true, [true, true, true, true], true);
            check(level, shape, true, [false, false, true, true], true);
            check(level, shape, true, [true, true, false, false], true);
            check(level, shape, true, [false; 4], true);
        }
    }
}

#[test]
fn rms_norm_and_its_gradients_match_f64_at_every_level_and_tail_length() {
    for level in Level::available() {
        for channels in [5, 16, 32, 67] {
            let shape = LayerNormShape {
                batch: 1,
                tokens: 4,
                channels,
            };
            check(level, shape, false, [true, true, false, false], true);
            check(level, shape, false, [true, false, false, false], true);
            check(level, shape, false, [false; 4], true);
        }
    }
}

#[test]
fn parameter_gradients_sum_over_every_task() {
    for level in Level::available() {
        let shape = LayerNormShape {
            batch: 2,
            tokens: 5000,
            channels: 7,
        };
        check(level, shape, true, [true; 4], false);
        let shape = LayerNormShape {
            batch: 1,
            tokens: 9001,
            channels: 5,
        };
        check(level, shape, false, [true, true, false, false], false);
    }
}

#[test]
fn a_wrong_length_is_an_error_that_names_both_lengths() {
    let (x, mut y, mut rstd) = (vec![1.0; 12], vec![0.0; 12], vec![0.0; 3]);
    let weight = [1.0; 5];
    let error = rms_norm_forward(4, &x, Some(&weight), None, 1e-6, &mut y, &mut rstd).unwrap_err();
    let message = error.to_string();
    assert!(
        message.contains("weight") && message.contains('4') && message.contains('5'),
        "{message}"
    );
}

#[test]
fn rows_of_no_channels_are_an_error_and_no_rows_are_none() {
    let (mut rstd, mut y) = ([0.0; 3], [0.0; 0]);
    assert!(rms_norm_forward(0, &[], None, None, 1e-6, &mut y, &mut rstd).is_err());
    rms_norm_forward(8, &[], None, None, 1e-6, &mut y, &mut []).unwrap();
    let mut dweight = [f32::NAN; 8];
    rms_norm_backward(8, &[], &[], None, &[], &mut y, Some(&mut dweight), None).unwrap();
    assert_eq!(dweight, [0.0; 8]);
}

#[test]
fn nan_reaches_the_output() {
    for level in Level::available() {
        let mut x = random(1, 40);
        x[7] = f32::NAN;
        let shape = LayerNormShape {
            batch: 1,
            tokens: 2,
            channels: 20,
        };
        let (mut y, mut mean, mut rstd) = (vec![0.0; 40], vec![0.0; 2], vec![0.0; 2]);
        let params = LayerNormParams::default();
        forward(
            level,
            shape,
            &x,
            params,
            EPS,
            &mut y,
            Some(&mut mean),
            &mut rstd,
        )
        .unwrap();
        assert!(y[..20].iter().all(|y| y.is_nan()));
        assert!(y[20..].iter().all(|y| y.is_finite()));
    }
}
