//! GELU in its exact form, `x Phi(x)` with the normal distribution function `Phi`, forward and
//! backward: what vision transformers such as DINOv2 and CLIP use. The tanh form is in
//! [`elementwise`](crate::elementwise).

use crate::elementwise::{binary, unary};
use crate::error::KernelError;
use crate::math::{exp, map1, map2};
use crate::simd::{Level, Simd, simd_kernel};

/// `1 / sqrt(2 pi)`.
const DENSITY_AT_ZERO: f32 = 0.398_942_3;

/// `y = x Phi(x)`, any shape. Within `2e-7 (1 + |x|)` of the exact value.
///
/// # Errors
/// `y` is not as long as `x`.
pub fn gelu_forward(x: &[f32], y: &mut [f32]) -> Result<(), KernelError> {
    unary(Level::active(), gelu_rows, x, y)
}

/// `dx = dy (Phi(x) + x phi(x))` where `x` is the input of [`gelu_forward`].
///
/// # Errors
/// The slices differ in length.
pub fn gelu_backward(x: &[f32], dy: &[f32], dx: &mut [f32]) -> Result<(), KernelError> {
    binary(Level::active(), gelu_gradient_rows, x, dy, dx)
}

/// `Phi(x)` and `e^(-x^2 / 2)`.
///
/// The tail is formula 7.1.26 of Abramowitz and Stegun for `erfc`, whose absolute error is below
/// 1.5e-7.
#[inline(always)]
fn distribution<S: Simd>(s: S, x: S::V) -> (S::V, S::V) {
    let zero = s.splat(0.0);
    let one = s.splat(1.0);
    let size = s.max(s.sub(zero, x), x);
    let z = s.mul(size, s.splat(std::f32::consts::FRAC_1_SQRT_2));
    let e = exp(s, s.fnma(z, z, zero));
    let t = s.div(one, s.fma(s.splat(0.327_591_1), z, one));
    let mut p = s.splat(1.061_405_4);
    p = s.fma(p, t, s.splat(-1.453_152));
    p = s.fma(p, t, s.splat(1.421_413_8));
    p = s.fma(p, t, s.splat(-0.284_496_72));
    p = s.fma(p, t, s.splat(0.254_829_6));
    let tail = s.mul(s.mul(s.splat(0.5), s.mul(p, t)), e);
    (s.select_gt(x, zero, s.sub(one, tail), tail), e)
}

simd_kernel! {
    fn gelu_rows<S>(s, x: &[f32], y: &mut [f32]) {
        map1(s, x, y, #[inline(always)] |x| s.mul(x, distribution(s, x).0));
    }
}

simd_kernel! {
    fn gelu_gradient_rows<S>(s, x: &[f32], dy: &[f32], dx: &mut [f32]) {
        map2(s, x, dy, dx, #[inline(always)] |x, dy| {
            let (p, e) = distribution(s, x);
            s.mul(dy, s.fma(s.mul(x, s.splat(DENSITY_AT_ZERO)), e, p))
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `erf` by its Taylor series, which converges everywhere and is exact enough in `f64` here.
    fn erf(x: f64) -> f64 {
        let (mut term, mut sum) = (x, x);
        for n in 1..200 {
            let n = f64::from(n);
            term *= -x * x / n;
            sum += term / (2.0 * n + 1.0);
        }
        sum * std::f64::consts::FRAC_2_SQRT_PI
    }

    #[test]
    fn values_and_slopes_match_the_definition() {
        let x: Vec<f32> = (-450..=450).map(|i| i as f32 * 0.0101).collect();
        let dy: Vec<f32> = (0..x.len()).map(|i| 1.0 - (i % 5) as f32).collect();
        let (mut y, mut dx) = (vec![0.0; x.len()], vec![0.0; x.len()]);
        for level in Level::available() {
            gelu_rows(level, &x, &mut y);
            gelu_gradient_rows(level, &x, &dy, &mut dx);
            for i in 0..x.len() {
                let v = f64::from(x[i]);
                let phi = 0.5 * (1.0 + erf(v / std::f64::consts::SQRT_2));
                let slope = phi + v * (-v * v / 2.0).exp() * 0.398_942_280_401_432_7;
                let bound = 2e-7 * (1.0 + v.abs());
                assert!((f64::from(y[i]) - v * phi).abs() < bound, "{level:?} {v}");
                let expected = f64::from(dy[i]) * slope;
                assert!(
                    (f64::from(dx[i]) - expected).abs() < 4.0 * bound,
                    "{level:?} {v}"
                );
            }
        }
    }

    #[test]
    fn a_diverged_value_is_noticed_and_lengths_are_checked() {
        let mut y = [0.0; 3];
        gelu_forward(&[f32::NAN, 30.0, -30.0], &mut y).unwrap();
        assert!(y[0].is_nan());
        assert_eq!(y[1..], [30.0, 0.0]);
        assert!(gelu_forward(&[0.0; 2], &mut y).is_err());
        assert!(gelu_backward(&[0.0; 3], &[0.0; 2], &mut y).is_err());
    }
}
