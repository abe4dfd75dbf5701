//! The element-wise steps of attention, over rows of scores.

use crate::math::exp2;
use crate::simd::simd_kernel;

simd_kernel! {
    /// Turns rows of base-2 scores into unnormalised probabilities `2^(score - max)`.
    ///
    /// `scores` has `max.len()` rows of `width` (a multiple of the lanes). Row `i` sees its first
    /// `first_limit + i` columns; the others become 0. `max` and `sum` receive each row's largest
    /// score (0 if it sees none) and its sum of probabilities.
    pub(super) fn softmax_rows<S>(
        s,
        scores: &mut [f32],
        width: usize,
        first_limit: usize,
        max: &mut [f32],
        sum: &mut [f32],
    ) {
        let infinite = s.splat(f32::NEG_INFINITY);
        for (i, row) in scores.chunks_exact_mut(width).enumerate() {
            hide(row, first_limit.saturating_add(i));
            let mut largest = [infinite; 2];
            let mut pairs = row.chunks_exact(2 * S::LANES);
            for pair in &mut pairs {
                largest[0] = s.max(largest[0], s.load(pair));
                largest[1] = s.max(largest[1], s.load(&pair[S::LANES..]));
            }
            if !pairs.remainder().is_empty() {
                largest[0] = s.max(largest[0], s.load(pairs.remainder()));
            }
            let mut m = s.hmax(s.max(largest[0], largest[1]));
            if m == f32::NEG_INFINITY {
                // No visible key: all probabilities are then 2^-inf = 0 rather than NaN.
                m = 0.0;
            }
            let shift = s.splat(m);
            let mut total = [s.splat(0.0); 2];
            let mut pairs = row.chunks_exact_mut(2 * S::LANES);
            for pair in &mut pairs {
                let (lo, hi) = pair.split_at_mut(S::LANES);
                let p0 = exp2(s, s.sub(s.load(lo), shift));
                let p1 = exp2(s, s.sub(s.load(hi), shift));
                s.store(lo, p0);
                s.store(hi, p1);
                total[0] = s.add(total[0], p0);
                total[1] = s.add(total[1], p1);
            }
            let rest = pairs.into_remainder();
            if !rest.is_empty() {
                let p = exp2(s, s.sub(s.load(rest), shift));
                s.store(rest, p);
                total[0] = s.add(total[0], p);
            }
            max[i] = m;
            sum[i] = s.sum(s.add(total[0], total[1]));
        }
    }
}

/// Makes the columns from `limit` on invisible.
#[inline(always)]
fn hide(row: &mut [f32], limit: usize) {
    if limit < row.len() {
        row[limit..].fill(f32::NEG_INFINITY);
    }
}

simd_kernel! {
    /// Recomputes probabilities and forms the gradient of the scores, in place:
    /// `scores` becomes `p = 2^(score - lse)` and `dp` becomes `p * (dp - delta)`.
    ///
    /// Both have `lse.len()` rows of `width`; visibility is as in [`softmax_rows`].
    pub(super) fn score_gradients<S>(
        s,
        scores: &mut [f32],
        dp: &mut [f32],
        width: usize,
        first_limit: usize,
        lse: &[f32],
        delta: &[f32],
    ) {
        let rows = scores.chunks_exact_mut(width).zip(dp.chunks_exact_mut(width)).enumerate();
        for (i, (row, dp)) in rows {
            hide(row, first_limit.saturating_add(i));
            let (lse, delta) = (s.splat(lse[i]), s.splat(delta[i]));
            for (p, dp) in row.chunks_exact_mut(S::LANES).zip(dp.chunks_exact_mut(S::LANES)) {
                let probability = exp2(s, s.sub(s.load(p), lse));
                s.store(p, probability);
                s.store(dp, s.mul(probability, s.sub(s.load(dp), delta)));
            }
        }
    }
}

simd_kernel! {
    /// `out[i] = sum(a[i] * b[i])` over rows of `width` (a multiple of the lanes).
    pub(super) fn row_dots<S>(s, a: &[f32], b: &[f32], width: usize, out: &mut [f32]) {
        let rows = a.chunks_exact(width).zip(b.chunks_exact(width));
        for (out, (a, b)) in out.iter_mut().zip(rows) {
            let mut sum = s.splat(0.0);
            for (a, b) in a.chunks_exact(S::LANES).zip(b.chunks_exact(S::LANES)) {
                sum = s.fma(s.load(a), s.load(b), sum);
            }
            *out = s.sum(sum);
        }
    }
}
