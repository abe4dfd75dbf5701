//! Vector elementary functions, each within a few units in the last place of the exact value.
//!
//! NaN stays NaN, so that a diverging run is noticed; overflow goes to infinity and underflow to
//! zero as in IEEE arithmetic.

use crate::gemm::Activation;
use crate::simd::Simd;

/// `2^x`.
#[inline(always)]
pub(crate) fn exp2<S: Simd>(s: S, x: S::V) -> S::V {
    // The clamp keeps the exponent arithmetic in range: 2^-160 is zero, 2^129 infinite.
    let x = s.max(s.splat(-160.0), s.min(s.splat(129.0), x));
    let n = s.round(x);
    let r = s.sub(x, n);
    // Interpolates 2^r at the Chebyshev nodes of [-1/2, 1/2]; relative error 5e-9.
    let mut p = s.splat(0.000_154_531_63);
    p = s.fma(p, r, s.splat(0.001_339_086_3));
    p = s.fma(p, r, s.splat(0.009_618_083));
    p = s.fma(p, r, s.splat(0.055_503_57));
    p = s.fma(p, r, s.splat(0.240_226_5));
    p = s.fma(p, r, s.splat(std::f32::consts::LN_2));
    p = s.fma(p, r, s.splat(1.0));
    s.ldexp(p, n)
}

/// `e^x`.
#[inline(always)]
pub(crate) fn exp<S: Simd>(s: S, x: S::V) -> S::V {
    // e^-110 is zero, e^89 infinite.
    let x = s.max(s.splat(-110.0), s.min(s.splat(89.0), x));
    let n = s.round(s.mul(x, s.splat(std::f32::consts::LOG2_E)));
    // ln 2 in two parts, so that n * ln 2 is exact to more than f32 precision.
    let r = s.fnma(n, s.splat(355.0 / 512.0), x);
    let r = s.fnma(n, s.splat(-2.121_944_4e-4), r);
    // Interpolates e^r at the Chebyshev nodes of [-ln2/2, ln2/2]; relative error 1e-8.
    let mut p = s.splat(0.001_392_617_6);
    p = s.fma(p, r, s.splat(0.008_363_173));
    p = s.fma(p, r, s.splat(0.041_666_556));
    p = s.fma(p, r, s.splat(0.166_665_77));
    p = s.fma(p, r, s.splat(0.5));
    p = s.fma(p, r, s.splat(1.0));
    p = s.fma(p, r, s.splat(1.0));
    s.ldexp(p, n)
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub(crate) fn sigmoid<S: Simd>(s: S, x: S::V) -> S::V {
    let one = s.splat(1.0);
    let e = exp(s, s.sub(s.splat(0.0), x));
    s.div(one, s.add(one, e))
}

/// `x / (1 + 2^t)`; far out it stays finite, and NaN stays NaN.
#[inline(always)]
fn over_one_plus_exp2<S: Simd>(s: S, x: S::V, t: S::V) -> S::V {
    let t = s.max(s.splat(-115.0), s.min(s.splat(115.0), t));
    let n = s.round(t);
    let r = s.sub(t, n);
    // As in `exp2`.
    let mut p = s.splat(0.000_154_531_63);
    p = s.fma(p, r, s.splat(0.001_339_086_3));
    p = s.fma(p, r, s.splat(0.009_618_083));
    p = s.fma(p, r, s.splat(0.055_503_57));
    p = s.fma(p, r, s.splat(0.240_226_5));
    p = s.fma(p, r, s.splat(std::f32::consts::LN_2));
    p = s.fma(p, r, s.splat(1.0));
    let one = s.splat(1.0);
    s.mul(x, s.reciprocal(s.add(one, s.ldexp(p, n))))
}

/// An activation, with one reciprocal instead of a division.
#[inline(always)]
pub(crate) fn activate<S: Simd>(s: S, activation: Activation, x: S::V) -> S::V {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    match activation {
        Activation::None => x,
        Activation::Relu => s.max(s.splat(0.0), x),
        Activation::Silu => over_one_plus_exp2(s, x, s.mul(x, s.splat(-LOG2_E))),
        Activation::GeluTanh => {
            // 0.5 (1 + tanh(u)) = 1 / (1 + e^(-2 u)) with 2 u = 2 sqrt(2/pi) (x + 0.044715 x^3).
            const TWICE: f32 = 1.595_769 * LOG2_E;
            let inner = s.fma(s.mul(x, x), s.splat(-0.044_715 * TWICE), s.splat(-TWICE));
            over_one_plus_exp2(s, x, s.mul(x, inner))
        }
    }
}

/// Applies `f` to every element of `x`, writing `y`.
#[inline(always)]
pub(crate) fn map1<S: Simd>(s: S, x: &[f32], y: &mut [f32], f: impl Fn(S::V) -> S::V) {
    assert_eq!(x.len(), y.len());
    let full = x.len() - x.len() % S::LANES;
    for i in (0..full).step_by(S::LANES) {
        // SAFETY: `i + LANES <= full`, which both slices have.
        unsafe { s.store_ptr(y.as_mut_ptr().add(i), f(s.load_ptr(x.as_ptr().add(i)))) };
    }
    if full < x.len() {
        s.store_part(&mut y[full..], f(s.load_part(&x[full..])));
    }
}

/// Applies `f` to every pair of elements of `a` and `b`, writing `y`.
#[inline(always)]
pub(crate) fn map2<S: Simd>(
    s: S,
    a: &[f32],
    b: &[f32],
    y: &mut [f32],
    f: impl Fn(S::V, S::V) -> S::V,
) {
    assert!(a.len() == b.len() && a.len() == y.len());
    let full = a.len() - a.len() % S::LANES;
    for i in (0..full).step_by(S::LANES) {
        // SAFETY: `i + LANES <= full`, which all slices have.
        unsafe {
            let v = f(s.load_ptr(a.as_ptr().add(i)), s.load_ptr(b.as_ptr().add(i)));
            s.store_ptr(y.as_mut_ptr().add(i), v);
        }
    }
    if full < a.len() {
        let v = f(s.load_part(&a[full..]), s.load_part(&b[full..]));
        s.store_part(&mut y[full..], v);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{Level, simd_kernel};

    simd_kernel! {
        fn exp_rows<S>(s, x: &[f32], y: &mut [f32]) {
            map1(s, x, y, #[inline(always)] |x| exp(s, x));
        }
    }
    simd_kernel! {
        fn exp2_rows<S>(s, x: &[f32], y: &mut [f32]) {
            map1(s, x, y, #[inline(always)] |x| exp2(s, x));
        }
    }

    #[test]
    fn exponentials_are_within_two_units_in_the_last_place() {
        let x: Vec<f32> = (-8700..8800).map(|i| i as f32 * 0.01 + 0.003).collect();
        let mut y = vec![0.0; x.len()];
        let cases = [
            (
                exp_rows as fn(Level, &[f32], &mut [f32]),
                f64::exp as fn(f64) -> f64,
            ),
            (exp2_rows, f64::exp2),
        ];
        for level in Level::available() {
            for (rows, exact) in cases {
                rows(level, &x, &mut y);
                for (&x, &y) in x.iter().zip(&y) {
                    let exact = exact(f64::from(x));
                    let error = (f64::from(y) / exact - 1.0).abs();
                    assert!(error < 2.4e-7, "{level:?} {x}: {y} {exact}");
                }
            }
        }
    }

    #[test]
    fn the_ends_of_the_range_behave_as_in_ieee_arithmetic() {
        let x = [
            f32::NEG_INFINITY,
            -1e30,
            -200.0,
            0.0,
            200.0,
            1e30,
            f32::INFINITY,
            f32::NAN,
        ];
        for level in Level::available() {
            for rows in [exp_rows, exp2_rows] {
                let mut y = [7.0; 8];
                rows(level, &x, &mut y);
                assert_eq!(y[..4], [0.0, 0.0, 0.0, 1.0], "{level:?}");
                assert!(
                    y[4..7].iter().all(|&y| y == f32::INFINITY),
                    "{level:?} {y:?}"
                );
                assert!(y[7].is_nan(), "{level:?}");
            }
        }
    }
}
