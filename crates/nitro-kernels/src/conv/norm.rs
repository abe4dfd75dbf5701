//! RMS norms over the channels of pixels, as autoencoders apply them: fused with what follows.

use crate::error::{KernelError, check_eq};
use crate::gemm::Activation;
use crate::math::activate;
use crate::pool::{SharedPtr, par_for};
use crate::simd::{Level, simd_kernel};

/// Pixels of one task.
const PIXELS: usize = 128;

/// An RMS norm: `x / rms(x) * weight + bias`, where `rms(x)^2 = mean(x^2) + eps`.
#[derive(Clone, Debug, PartialEq)]
pub struct Norm {
    /// One value per channel.
    pub weight: Vec<f32>,
    /// One value per channel.
    pub bias: Vec<f32>,
    /// Added to the mean square.
    pub eps: f32,
}

impl Norm {
    /// Whether it is one of `channels` channels.
    pub(crate) fn check(&self, channels: usize) -> Result<(), KernelError> {
        check_eq("norm: weights", channels, self.weight.len())?;
        check_eq("norm: biases", channels, self.bias.len())
    }
}

simd_kernel! {
    /// `activation(x / rms(x) * weight + bias)` for each pixel of `x`.
    fn norm_pixels<S>(
        s,
        weight: &[f32],
        bias: &[f32],
        eps: f32,
        activation: Activation,
        x: &[f32],
        y: &mut [f32],
    ) {
        let channels = weight.len();
        for (x, y) in x.chunks_exact(channels).zip(y.chunks_exact_mut(channels)) {
            let mut squares = s.splat(0.0);
            for i in (0..channels).step_by(S::LANES) {
                let v = s.load_at(x, i);
                squares = s.fma(v, v, squares);
            }
            let scale = s.splat(1.0 / (s.sum(squares) / channels as f32 + eps).sqrt());
            for i in (0..channels).step_by(S::LANES) {
                let normed = s.mul(s.load_at(x, i), scale);
                let v = s.fma(normed, s.load_at(weight, i), s.load_at(bias, i));
                s.store_at(y, i, activate(s, activation, v));
            }
        }
    }
}

/// `y = activation(norm(x))` for each pixel.
pub(super) fn norm_rows(
    level: Level,
    norm: &Norm,
    activation: Activation,
    x: &[f32],
    y: &mut [f32],
) {
    for_pixels(norm.weight.len(), x, y, |x, y| {
        norm_pixels(level, &norm.weight, &norm.bias, norm.eps, activation, x, y);
    });
}

/// `y += norm(x)` for each pixel.
pub(crate) fn add_norm_rows(level: Level, norm: &Norm, x: &[f32], y: &mut [f32]) {
    let channels = norm.weight.len();
    for_pixels(channels, x, y, |x, y| {
        for (x, y) in x.chunks_exact(channels).zip(y.chunks_exact_mut(channels)) {
            add_norm(level, x, &norm.weight, &norm.bias, norm.eps, y);
        }
    });
}

/// Calls `f` for blocks of pixels of `x` and `y`, in parallel.
fn for_pixels(channels: usize, x: &[f32], y: &mut [f32], f: impl Fn(&[f32], &mut [f32]) + Sync) {
    let chunk = PIXELS * channels.max(1);
    let len = x.len().min(y.len());
    let y = SharedPtr(y.as_mut_ptr());
    par_for(len.div_ceil(chunk), |task| {
        let range = task * chunk..((task + 1) * chunk).min(len);
        // SAFETY: `y` holds `len` values, and ranges are disjoint.
        let y = unsafe { std::slice::from_raw_parts_mut(y.get().add(range.start), range.len()) };
        f(&x[range], y);
    });
}

simd_kernel! {
    /// `y += x / rms(x) * weight + bias` over one pixel, where `rms(x)^2 = mean(x^2) + eps`.
    pub(super) fn add_norm<S>(s, x: &[f32], weight: &[f32], bias: &[f32], eps: f32, y: &mut [f32]) {
        let mut squares = s.splat(0.0);
        let mut i = 0;
        while i < x.len() {
            let v = s.load_at(x, i);
            squares = s.fma(v, v, squares);
            i += S::LANES;
        }
        let scale = s.splat(1.0 / (s.sum(squares) / x.len() as f32 + eps).sqrt());
        let mut i = 0;
        while i < x.len() {
            let normed = s.mul(s.load_at(x, i), scale);
            let normed = s.fma(normed, s.load_at(weight, i), s.load_at(bias, i));
            s.store_at(y, i, s.add(s.load_at(y, i), normed));
            i += S::LANES;
        }
    }
}
