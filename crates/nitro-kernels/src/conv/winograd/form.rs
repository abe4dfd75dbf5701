//! The two bilinear forms: their transforms along one direction, applied once per direction.
//!
//! Values of a tile are kept in arrays of [`MAX_SIDE`]; a form uses the first `SIDE` of them.

use crate::simd::Simd;

/// The most values a tile has in one direction.
pub(super) const MAX_SIDE: usize = 6;
/// The most outputs a tile has in one direction.
pub(super) const MAX_OUT: usize = 4;

/// A way to compute a few neighbouring outputs of a three-tap filter with fewer products: transform
/// the inputs, multiply value by value (over all channels), transform the products.
pub(super) trait Form: Copy + Send + Sync + 'static {
    /// Input pixels under a tile, in each direction; as many products.
    const SIDE: usize;
    /// Output pixels of a tile, in each direction.
    const OUT: usize;
    /// Input pixels from one tile to the next; tile `t` begins at input `t * STEP - 1`.
    const STEP: usize;
    /// Output pixels per input pixel, in each direction.
    const SCALE: usize;

    /// Transforms inputs.
    fn input<S: Simd>(s: S, x: [S::V; MAX_SIDE]) -> [S::V; MAX_SIDE];
    /// Transforms products into outputs.
    fn output<S: Simd>(s: S, m: [S::V; MAX_SIDE]) -> [S::V; MAX_OUT];
    /// Transforms the taps.
    fn taps(g: [f64; 3]) -> [f64; MAX_SIDE];
}

/// `F(4, 3)`: four outputs from six inputs with six products instead of twelve. The points of
/// evaluation are 0, +-3/4, +-3/2 and infinity: among points with short fractions these leave the
/// smallest error, half that of the usual 0, +-1, +-2 (measured on white noise).
#[derive(Clone, Copy)]
pub(super) struct Same;

const A: f64 = 0.75;
const B: f64 = 1.5;
const AA: f64 = A * A;
const BB: f64 = B * B;

/// The sum of two weighted vectors.
#[inline(always)]
fn combine<S: Simd>(s: S, (of_a, a): (f64, S::V), (of_b, b): (f64, S::V)) -> S::V {
    s.fma(s.splat(of_a as f32), a, s.mul(s.splat(of_b as f32), b))
}

impl Form for Same {
    const SIDE: usize = 6;
    const OUT: usize = 4;
    const STEP: usize = 4;
    const SCALE: usize = 1;

    #[inline(always)]
    fn input<S: Simd>(s: S, x: [S::V; MAX_SIDE]) -> [S::V; MAX_SIDE] {
        let (aa, bb) = (s.splat(AA as f32), s.splat(BB as f32));
        let (a, b) = (s.splat(A as f32), s.splat(B as f32));
        let (sum, product) = (s.splat((AA + BB) as f32), s.splat((AA * BB) as f32));
        let even_a = s.fnma(bb, x[2], x[4]);
        let odd_a = s.fnma(bb, x[1], x[3]);
        let even_b = s.fnma(aa, x[2], x[4]);
        let odd_b = s.fnma(aa, x[1], x[3]);
        [
            s.fma(product, x[0], s.fnma(sum, x[2], x[4])),
            s.fma(a, odd_a, even_a),
            s.fnma(a, odd_a, even_a),
            s.fma(b, odd_b, even_b),
            s.fnma(b, odd_b, even_b),
            s.fma(product, x[1], s.fnma(sum, x[3], x[5])),
        ]
    }

    #[inline(always)]
    fn output<S: Simd>(s: S, m: [S::V; MAX_SIDE]) -> [S::V; MAX_OUT] {
        let (sum_a, difference_a) = (s.add(m[1], m[2]), s.sub(m[1], m[2]));
        let (sum_b, difference_b) = (s.add(m[3], m[4]), s.sub(m[3], m[4]));
        [
            s.add(m[0], s.add(sum_a, sum_b)),
            combine(s, (A, difference_a), (B, difference_b)),
            combine(s, (AA, sum_a), (BB, sum_b)),
            s.add(
                m[5],
                combine(s, (A * AA, difference_a), (B * BB, difference_b)),
            ),
        ]
    }

    fn taps(g: [f64; 3]) -> [f64; MAX_SIDE] {
        let at = |p: f64, scale: f64| (g[0] + p * g[1] + p * p * g[2]) / scale;
        let (of_a, of_b) = (2.0 * AA * (AA - BB), 2.0 * BB * (BB - AA));
        [
            at(0.0, AA * BB),
            at(A, of_a),
            at(-A, of_a),
            at(B, of_b),
            at(-B, of_b),
            g[2],
        ]
    }
}

/// The filter over an image that is first doubled by repeating its pixels: both outputs of an input
/// pixel, from it and its two neighbours, with three products instead of six. No rounding is
/// amplified: `even = s x + g0 (left - x)` and `odd = s x + g2 (right - x)`, where `s = g0 + g1 + g2`.
#[derive(Clone, Copy)]
pub(super) struct Doubled;

impl Form for Doubled {
    const SIDE: usize = 3;
    const OUT: usize = 2;
    const STEP: usize = 1;
    const SCALE: usize = 2;

    #[inline(always)]
    fn input<S: Simd>(s: S, x: [S::V; MAX_SIDE]) -> [S::V; MAX_SIDE] {
        let mut v = x;
        (v[0], v[1], v[2]) = (s.sub(x[0], x[1]), x[1], s.sub(x[2], x[1]));
        v
    }

    #[inline(always)]
    fn output<S: Simd>(s: S, m: [S::V; MAX_SIDE]) -> [S::V; MAX_OUT] {
        [s.add(m[0], m[1]), s.add(m[1], m[2]), m[1], m[1]]
    }

    fn taps(g: [f64; 3]) -> [f64; MAX_SIDE] {
        [g[0], g[0] + g[1] + g[2], g[2], 0.0, 0.0, 0.0]
    }
}
