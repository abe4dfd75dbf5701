//! Activations, gates and the gated residual, forward and backward. Every output is overwritten.

use crate::error::{KernelError, check_eq};
use crate::math::{map1, map2, sigmoid};
use crate::parallel::{RowTasks, for_ranges, part};
use crate::pool::{SharedPtr, par_for};
use crate::simd::{Level, Simd, simd_kernel};

/// `sqrt(2 / pi)` and the cubic's coefficient of the tanh form of GELU.
const GELU_SLOPE: f32 = 0.797_884_6;
const GELU_CUBIC: f32 = 0.044_715;

/// `y = 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`, any shape.
///
/// # Errors
/// `y` is not as long as `x`.
pub fn gelu_tanh_forward(x: &[f32], y: &mut [f32]) -> Result<(), KernelError> {
    unary(Level::active(), gelu_rows, x, y)
}

/// `dx = dy * gelu'(x)` where `x` is the input of [`gelu_tanh_forward`].
///
/// # Errors
/// The slices differ in length.
pub fn gelu_tanh_backward(x: &[f32], dy: &[f32], dx: &mut [f32]) -> Result<(), KernelError> {
    binary(Level::active(), gelu_gradient_rows, x, dy, dx)
}

/// `y = x * sigmoid(x)`, any shape.
///
/// # Errors
/// `y` is not as long as `x`.
pub fn silu_forward(x: &[f32], y: &mut [f32]) -> Result<(), KernelError> {
    unary(Level::active(), silu_rows, x, y)
}

/// `dx = dy * silu'(x)` where `x` is the input of [`silu_forward`].
///
/// # Errors
/// The slices differ in length.
pub fn silu_backward(x: &[f32], dy: &[f32], dx: &mut [f32]) -> Result<(), KernelError> {
    binary(Level::active(), silu_gradient_rows, x, dy, dx)
}

/// `y = silu(gate) * up`, any shape.
///
/// # Errors
/// The slices differ in length.
pub fn swiglu_forward(gate: &[f32], up: &[f32], y: &mut [f32]) -> Result<(), KernelError> {
    binary(Level::active(), swiglu_rows, gate, up, y)
}

/// Gradients of [`swiglu_forward`]: `dgate = dy * up * silu'(gate)`, `dup = dy * silu(gate)`.
///
/// # Errors
/// The slices differ in length.
pub fn swiglu_backward(
    gate: &[f32],
    up: &[f32],
    dy: &[f32],
    dgate: &mut [f32],
    dup: &mut [f32],
) -> Result<(), KernelError> {
    swiglu_backward_on(Level::active(), gate, up, dy, dgate, dup)
}

/// `y = x * silu(gate)` where `x` and `gate` are the first and second half of each row of `input`
/// `[rows, 2 * channels]`; `y` is `[rows, channels]`. The gated unit of DC-AE's GLUMBConv.
///
/// # Errors
/// Lengths that are no whole number of rows, or do not match.
pub fn silu_glu_forward(channels: usize, input: &[f32], y: &mut [f32]) -> Result<(), KernelError> {
    silu_glu_forward_on(Level::active(), channels, input, y)
}

/// Gradient of [`silu_glu_forward`] with respect to `input`.
///
/// # Errors
/// As [`silu_glu_forward`].
pub fn silu_glu_backward(
    channels: usize,
    input: &[f32],
    dy: &[f32],
    dinput: &mut [f32],
) -> Result<(), KernelError> {
    silu_glu_backward_on(Level::active(), channels, input, dy, dinput)
}

/// `y = x + gate * f` where `x`, `f` and `y` are `[batch, tokens, channels]` and `gate` is
/// `[batch, channels]`; batch and tokens follow from the lengths.
///
/// # Errors
/// Lengths that do not fit each other.
pub fn gate_residual_forward(
    channels: usize,
    x: &[f32],
    gate: &[f32],
    f: &[f32],
    y: &mut [f32],
) -> Result<(), KernelError> {
    gate_residual_forward_on(Level::active(), channels, x, gate, f, y)
}

/// Gradients of [`gate_residual_forward`] with respect to `f` and `gate`; that with respect to `x`
/// is `dy` itself.
///
/// # Errors
/// Lengths that do not fit each other.
pub fn gate_residual_backward(
    channels: usize,
    dy: &[f32],
    gate: &[f32],
    f: &[f32],
    df: &mut [f32],
    dgate: &mut [f32],
) -> Result<(), KernelError> {
    gate_residual_backward_on(Level::active(), channels, dy, gate, f, df, dgate)
}

/// Runs a one-input kernel over ranges in parallel.
pub(crate) fn unary(
    level: Level,
    rows: fn(Level, &[f32], &mut [f32]),
    x: &[f32],
    y: &mut [f32],
) -> Result<(), KernelError> {
    check_eq("element-wise output length", x.len(), y.len())?;
    let y = SharedPtr(y.as_mut_ptr());
    for_ranges(x.len(), |range| {
        // SAFETY: the lengths are equal, and ranges are disjoint.
        rows(level, &x[range.clone()], unsafe { part(y, range) });
    });
    Ok(())
}

/// Runs a two-input kernel over ranges in parallel.
pub(crate) fn binary(
    level: Level,
    rows: fn(Level, &[f32], &[f32], &mut [f32]),
    a: &[f32],
    b: &[f32],
    y: &mut [f32],
) -> Result<(), KernelError> {
    check_eq("element-wise second input length", a.len(), b.len())?;
    check_eq("element-wise output length", a.len(), y.len())?;
    let y = SharedPtr(y.as_mut_ptr());
    for_ranges(a.len(), |range| {
        // SAFETY: the lengths are equal, and ranges are disjoint.
        rows(level, &a[range.clone()], &b[range.clone()], unsafe {
            part(y, range)
        });
    });
    Ok(())
}

/// `sigmoid(2u)` with GELU's `u = sqrt(2/pi) (x + 0.044715 x^3)`; note `(1 + tanh u) / 2 = sigmoid(2u)`.
#[inline(always)]
fn gelu_gate<S: Simd>(s: S, x: S::V) -> S::V {
    let cubic = s.fma(s.mul(x, x), s.splat(GELU_CUBIC), s.splat(1.0));
    sigmoid(s, s.mul(s.mul(x, s.splat(2.0 * GELU_SLOPE)), cubic))
}

/// `silu'(x) = g + x g (1 - g)` with `g = sigmoid(x)`.
#[inline(always)]
fn silu_slope<S: Simd>(s: S, x: S::V, g: S::V) -> S::V {
    s.fma(s.mul(x, g), s.sub(s.splat(1.0), g), g)
}

simd_kernel! {
    fn gelu_rows<S>(s, x: &[f32], y: &mut [f32]) {
        map1(s, x, y, #[inline(always)] |x| s.mul(x, gelu_gate(s, x)));
    }
}

simd_kernel! {
    fn gelu_gradient_rows<S>(s, x: &[f32], dy: &[f32], dx: &mut [f32]) {
        map2(s, x, dy, dx, #[inline(always)] |x, dy| {
            let g = gelu_gate(s, x);
            // d(2u)/dx
            let slope = s.fma(
                s.mul(x, x),
                s.splat(6.0 * GELU_SLOPE * GELU_CUBIC),
                s.splat(2.0 * GELU_SLOPE),
            );
            let rest = s.mul(s.mul(x, slope), s.mul(g, s.sub(s.splat(1.0), g)));
            s.mul(dy, s.add(g, rest))
        });
    }
}

simd_kernel! {
    fn silu_rows<S>(s, x: &[f32], y: &mut [f32]) {
        map1(s, x, y, #[inline(always)] |x| s.mul(x, sigmoid(s, x)));
    }
}

simd_kernel! {
    fn silu_gradient_rows<S>(s, x: &[f32], dy: &[f32], dx: &mut [f32]) {
        map2(s, x, dy, dx, #[inline(always)] |x, dy| {
            s.mul(dy, silu_slope(s, x, sigmoid(s, x)))
        });
    }
}

simd_kernel! {
    fn swiglu_rows<S>(s, gate: &[f32], up: &[f32], y: &mut [f32]) {
        map2(s, gate, up, y, #[inline(always)] |gate, up| {
            s.mul(s.mul(gate, sigmoid(s, gate)), up)
        });
    }
}

simd_kernel! {
    fn swiglu_gradient_rows<S>(
        s,
        gate: &[f32],
        up: &[f32],
        dy: &[f32],
        dgate: &mut [f32],
        dup: &mut [f32],
    ) {
        let mut i = 0;
        while i < gate.len() {
            let (gate, up, dy) = (s.load_at(gate, i), s.load_at(up, i), s.load_at(dy, i));
            let g = sigmoid(s, gate);
            s.store_at(dgate, i, s.mul(s.mul(dy, up), silu_slope(s, gate, g)));
            s.store_at(dup, i, s.mul(dy, s.mul(gate, g)));
            i += S::LANES;
        }
    }
}

fn swiglu_backward_on(
    level: Level,
    gate: &[f32],
    up: &[f32],
    dy: &[f32],
    dgate: &mut [f32],
    dup: &mut [f32],
) -> Result<(), KernelError> {
    check_eq("SwiGLU up length", gate.len(), up.len())?;
    check_eq("SwiGLU output gradient length", gate.len(), dy.len())?;
    check_eq("SwiGLU gate gradient length", gate.len(), dgate.len())?;
    check_eq("SwiGLU up gradient length", gate.len(), dup.len())?;
    let (dgate, dup) = (SharedPtr(dgate.as_mut_ptr()), SharedPtr(dup.as_mut_ptr()));
    for_ranges(gate.len(), |range| {
        // SAFETY: the lengths are equal, and ranges are disjoint.
        let (dgate, dup) = unsafe { (part(dgate, range.clone()), part(dup, range.clone())) };
        let (gate, up, dy) = (&gate[range.clone()], &up[range.clone()], &dy[range]);
        swiglu_gradient_rows(level, gate, up, dy, dgate, dup);
    });
    Ok(())
}

fn check_channels(channels: usize) -> Result<(), KernelError> {
    if channels == 0 {
        return Err(KernelError::Unsupported {
            what: "channels",
            value: 0,
            help: "give the length of a row",
        });
    }
    Ok(())
}

fn silu_glu_forward_on(
    level: Level,
    channels: usize,
    input: &[f32],
    y: &mut [f32],
) -> Result<(), KernelError> {
    check_channels(channels)?;
    let rows = y.len() / channels;
    check_eq(
        "gated unit output length (whole rows)",
        rows * channels,
        y.len(),
    )?;
    check_eq("gated unit input length", 2 * y.len(), input.len())?;
    let tasks = RowTasks::new(1, rows, 2 * channels);
    let y = SharedPtr(y.as_mut_ptr());
    par_for(tasks.count(), |task| {
        let task = tasks.get(task);
        let input = &input[task.elements(2 * channels)];
        // SAFETY: the length was checked, and tasks have disjoint rows.
        let y = unsafe { part(y, task.elements(channels)) };
        glu_rows(level, channels, input, y);
    });
    Ok(())
}

simd_kernel! {
    fn glu_rows<S>(s, channels: usize, input: &[f32], y: &mut [f32]) {
        for (input, y) in input.chunks_exact(2 * channels).zip(y.chunks_exact_mut(channels)) {
            let (x, gate) = input.split_at(channels);
            map2(s, x, gate, y, #[inline(always)] |x, gate| {
                s.mul(x, s.mul(gate, sigmoid(s, gate)))
            });
        }
    }
}

fn silu_glu_backward_on(
    level: Level,
    channels: usize,
    input: &[f32],
    dy: &[f32],
    dinput: &mut [f32],
) -> Result<(), KernelError> {
    check_channels(channels)?;
    let rows = dy.len() / channels;
    check_eq(
        "gated unit output gradient length (whole rows)",
        rows * channels,
        dy.len(),
    )?;
    check_eq("gated unit input length", 2 * dy.len(), input.len())?;
    check_eq(
        "gated unit input gradient length",
        2 * dy.len(),
        dinput.len(),
    )?;
    let tasks = RowTasks::new(1, rows, 2 * channels);
    let dinput = SharedPtr(dinput.as_mut_ptr());
    par_for(tasks.count(), |task| {
        let task = tasks.get(task);
        let span = task.elements(2 * channels);
        // SAFETY: the length was checked, and tasks have disjoint rows.
        let dinput = unsafe { part(dinput, span.clone()) };
        glu_gradient_rows(
            level,
            channels,
            &input[span],
            &dy[task.elements(channels)],
            dinput,
        );
    });
    Ok(())
}

simd_kernel! {
    fn glu_gradient_rows<S>(
        s,
        channels: usize,
        input: &[f32],
        dy: &[f32],
        dinput: &mut [f32],
    ) {
        let rows = input.chunks_exact(2 * channels).zip(dy.chunks_exact(channels));
        for ((input, dy), dinput) in rows.zip(dinput.chunks_exact_mut(2 * channels)) {
            let (x, gate) = input.split_at(channels);
            let (dx, dgate) = dinput.split_at_mut(channels);
            let mut i = 0;
            while i < channels {
                let (x, gate, dy) = (s.load_at(x, i), s.load_at(gate, i), s.load_at(dy, i));
                let g = sigmoid(s, gate);
                s.store_at(dx, i, s.mul(dy, s.mul(gate, g)));
                s.store_at(dgate, i, s.mul(s.mul(dy, x), silu_slope(s, gate, g)));
                i += S::LANES;
            }
        }
    }
}

/// Batch and tokens of a gated residual.
fn gate_shape(channels: usize, len: usize, gate: usize) -> Result<(usize, usize), KernelError> {
    check_channels(channels)?;
    let batch = gate / channels;
    check_eq("residual gate length (whole rows)", batch * channels, gate)?;
    let tokens = len / gate.max(1);
    check_eq("gated residual length (whole samples)", tokens * gate, len)?;
    Ok((batch, tokens))
}

fn gate_residual_forward_on(
    level: Level,
    channels: usize,
    x: &[f32],
    gate: &[f32],
    f: &[f32],
    y: &mut [f32],
) -> Result<(), KernelError> {
    let (batch, tokens) = gate_shape(channels, x.len(), gate.len())?;
    check_eq("gated branch length", x.len(), f.len())?;
    check_eq("gated residual output length", x.len(), y.len())?;
    let tasks = RowTasks::new(batch, tokens, channels);
    let y = SharedPtr(y.as_mut_ptr());
    par_for(tasks.count(), |task| {
        let task = tasks.get(task);
        let span = task.elements(channels);
        let gate = &gate[task.sample * channels..][..channels];
        // SAFETY: the length was checked, and tasks have disjoint rows.
        let y = unsafe { part(y, span.clone()) };
        gate_rows(level, &x[span.clone()], gate, &f[span], y);
    });
    Ok(())
}

simd_kernel! {
    fn gate_rows<S>(s, x: &[f32], gate: &[f32], f: &[f32], y: &mut [f32]) {
        let channels = gate.len();
        let rows = x.chunks_exact(channels).zip(f.chunks_exact(channels));
        for ((x, f), y) in rows.zip(y.chunks_exact_mut(channels)) {
            let mut i = 0;
            while i < channels {
                let v = s.fma(s.load_at(gate, i), s.load_at(f, i), s.load_at(x, i));
                s.store_at(y, i, v);
                i += S::LANES;
            }
        }
    }
}

fn gate_residual_backward_on(
    level: Level,
    channels: usize,
    dy: &[f32],
    gate: &[f32],
    f: &[f32],
    df: &mut [f32],
    dgate: &mut [f32],
) -> Result<(), KernelError> {
    let (batch, tokens) = gate_shape(channels, dy.len(), gate.len())?;
    check_eq("gated branch length", dy.len(), f.len())?;
    check_eq("gated branch gradient length", dy.len(), df.len())?;
    check_eq("residual gate gradient length", gate.len(), dgate.len())?;
    let tasks = RowTasks::new(batch, tokens, channels);
    let mut partial = vec![0.0; tasks.count() * channels];
    let (df, sums) = (SharedPtr(df.as_mut_ptr()), SharedPtr(partial.as_mut_ptr()));
    par_for(tasks.count(), |index| {
        let task = tasks.get(index);
        let span = task.elements(channels);
        let gate = &gate[task.sample * channels..][..channels];
        // SAFETY: the lengths were checked, and tasks have disjoint rows and partial sums.
        let (df, sums) = unsafe {
            (
                part(df, span.clone()),
                part(sums, index * channels..(index + 1) * channels),
            )
        };
        gate_gradient_rows(level, &dy[span.clone()], gate, &f[span], df, sums);
    });
    dgate.fill(0.0);
    for (task, partial) in partial.chunks_exact(channels).enumerate() {
        let dgate = &mut dgate[tasks.sample(task) * channels..][..channels];
        dgate
            .iter_mut()
            .zip(partial)
            .for_each(|(sum, partial)| *sum += partial);
    }
    Ok(())
}

simd_kernel! {
    fn gate_gradient_rows<S>(
        s,
        dy: &[f32],
        gate: &[f32],
        f: &[f32],
        df: &mut [f32],
        dgate: &mut [f32],
    ) {
        let channels = gate.len();
        let rows = dy.chunks_exact(channels).zip(f.chunks_exact(channels));
        for ((dy, f), df) in rows.zip(df.chunks_exact_mut(channels)) {
            let mut i = 0;
            while i < channels {
                let dy = s.load_at(dy, i);
                s.store_at(df, i, s.mul(dy, s.load_at(gate, i)));
                s.store_at(dgate, i, s.fma(dy, s.load_at(f, i), s.load_at(dgate, i)));
                i += S::LANES;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, dot, gradient, random, to_f64};

    fn gelu(x: f64) -> f64 {
        let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
        0.5 * x * (1.0 + u.tanh())
    }

    fn silu(x: f64) -> f64 {
        x / (1.0 + (-x).exp())
    }

    fn map(x: &[f64], f: Function) -> Vec<f64> {
        x.iter().map(|&x| f(x)).collect()
    }

    type Function = fn(f64) -> f64;
    type Forward = fn(Level, &[f32], &mut [f32]);
    type Backward = fn(Level, &[f32], &[f32], &mut [f32]);

    #[test]
    fn activations_and_their_gradients_match_f64() {
        let pairs = [
            (
                gelu as Function,
                gelu_rows as Forward,
                gelu_gradient_rows as Backward,
            ),
            (silu, silu_rows, silu_gradient_rows),
        ];
        for level in Level::available() {
            for (f, forward, backward) in pairs {
                // Short, and long enough for several tasks.
                for len in [3, 100, 40_003] {
                    let x: Vec<f32> = random(1, len).iter().map(|x| x * 3.0).collect();
                    let dy = random(2, len);
                    let (mut y, mut dx) = (vec![f32::NAN; len], vec![f32::NAN; len]);
                    unary(level, forward, &x, &mut y).unwrap();
                    binary(level, backward, &x, &dy, &mut dx).unwrap();
                    assert_close(&format!("{level:?} y"), &y, &map(&to_f64(&x), f));
                    let expected: Vec<f64> = x
                        .iter()
                        .zip(&dy)
                        .map(|(&x, &dy)| {
                            let (x, h) = (f64::from(x), 1e-5);
                            f64::from(dy) * (f(x + h) - f(x - h)) / (2.0 * h)
                        })
                        .collect();
                    assert_close(&format!("{level:?} dx"), &dx, &expected);
                }
            }
        }
    }

    #[test]
    fn activations_saturate_and_keep_nan() {
        for level in Level::available() {
            for forward in [gelu_rows as Forward, silu_rows] {
                let x = [-1e4, -200.0, 0.0, 200.0, 1e4, f32::NAN];
                let mut y = [7.0; 6];
                forward(level, &x, &mut y);
                assert_eq!(y[..5], [0.0, 0.0, 0.0, 200.0, 1e4], "{level:?}");
                assert!(y[5].is_nan());
            }
        }
    }

    #[test]
    fn swiglu_and_its_gradients_match_f64() {
        for level in Level::available() {
            let (gate, up, dy) = (random(1, 53), random(2, 53), random(3, 53));
            let f = |gate: &[f64], up: &[f64]| -> Vec<f64> {
                gate.iter().zip(up).map(|(&g, &u)| silu(g) * u).collect()
            };
            let (g, u) = (to_f64(&gate), to_f64(&up));
            let mut y = vec![f32::NAN; 53];
            binary(level, swiglu_rows, &gate, &up, &mut y).unwrap();
            assert_close("y", &y, &f(&g, &u));
            let (mut dgate, mut dup) = (vec![f32::NAN; 53], vec![f32::NAN; 53]);
            swiglu_backward_on(level, &gate, &up, &dy, &mut dgate, &mut dup).unwrap();
            assert_close("dgate", &dgate, &gradient(&g, |g| dot(&dy, &f(g, &u))));
            assert_close("dup", &dup, &gradient(&u, |u| dot(&dy, &f(&g, u))));
        }
    }

    #[test]
    fn gated_unit_and_its_gradient_match_f64() {
        for level in Level::available() {
            for (rows, channels) in [(3, 7), (2, 32), (1, 16)] {
                let (input, dy) = (random(1, rows * 2 * channels), random(2, rows * channels));
                let f = |input: &[f64]| -> Vec<f64> {
                    input
                        .chunks(2 * channels)
                        .flat_map(|row| (0..channels).map(|c| row[c] * silu(row[channels + c])))
                        .collect()
                };
                let x = to_f64(&input);
                let mut y = vec![f32::NAN; rows * channels];
                silu_glu_forward_on(level, channels, &input, &mut y).unwrap();
                assert_close("y", &y, &f(&x));
                let mut dx = vec![f32::NAN; input.len()];
                silu_glu_backward_on(level, channels, &input, &dy, &mut dx).unwrap();
                assert_close("dx", &dx, &gradient(&x, |x| dot(&dy, &f(x))));
            }
        }
    }

    #[test]
    fn gated_residual_and_its_gradients_match_f64() {
        for level in Level::available() {
            // The last has several tasks per sample.
            for (batch, tokens, channels) in [(2, 3, 5), (1, 4, 32), (2, 9000, 3)] {
                let len = batch * tokens * channels;
                let (x, gate) = (random(1, len), random(2, batch * channels));
                let (f, dy) = (random(3, len), random(4, len));
                let reference = |gate: &[f64], f: &[f64]| -> Vec<f64> {
                    (0..len)
                        .map(|i| {
                            let at = i / (tokens * channels) * channels + i % channels;
                            f64::from(x[i]) + gate[at] * f[i]
                        })
                        .collect()
                };
                let (g, b) = (to_f64(&gate), to_f64(&f));
                let mut y = vec![f32::NAN; len];
                gate_residual_forward_on(level, channels, &x, &gate, &f, &mut y).unwrap();
                assert_close("y", &y, &reference(&g, &b));
                let (mut df, mut dgate) = (vec![f32::NAN; len], vec![f32::NAN; gate.len()]);
                gate_residual_backward_on(level, channels, &dy, &gate, &f, &mut df, &mut dgate)
                    .unwrap();
                assert_close(
                    "dgate",
                    &dgate,
                    &gradient(&g, |g| dot(&dy, &reference(g, &b))),
                );
                if len < 200 {
                    assert_close("df", &df, &gradient(&b, |b| dot(&dy, &reference(&g, b))));
                }
            }
        }
    }

    #[test]
    fn mismatched_lengths_are_errors() {
        let mut y = [0.0; 4];
        assert!(gelu_tanh_forward(&[0.0; 5], &mut y).is_err());
        assert!(silu_glu_forward(3, &[0.0; 8], &mut y).is_err());
        assert!(silu_glu_forward(0, &[0.0; 8], &mut y).is_err());
        assert!(gate_residual_forward(2, &[0.0; 4], &[0.0; 3], &[0.0; 4], &mut y).is_err());
    }
}
