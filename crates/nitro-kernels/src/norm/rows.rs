//! The row loops of layer norm and RMS norm, for rows that share one gain and one offset.

use crate::simd::{Simd, simd_kernel};

/// Sum of `f` over the vectors of a row, in four independent chains. `f` gets zeros past the end.
#[inline(always)]
fn sum_over<S: Simd>(s: S, len: usize, f: impl Fn(usize) -> S::V) -> f32 {
    let zero = s.splat(0.0);
    let mut acc = [zero; 4];
    let step = S::LANES;
    let mut i = 0;
    while i + 4 * step <= len {
        for (j, acc) in acc.iter_mut().enumerate() {
            *acc = s.add(*acc, f(i + j * step));
        }
        i += 4 * step;
    }
    while i < len {
        acc[0] = s.add(acc[0], f(i));
        i += step;
    }
    s.sum(s.add(s.add(acc[0], acc[1]), s.add(acc[2], acc[3])))
}

simd_kernel! {
    /// `y = norm(x) * gain + offset` for consecutive rows of `gain.len()` channels. Writes one
    /// reciprocal deviation per row and, if `mean` is not empty, subtracts and writes the mean.
    pub(crate) fn forward_rows<S>(
        s,
        x: &[f32],
        gain: &[f32],
        offset: &[f32],
        eps: f32,
        y: &mut [f32],
        mean: &mut [f32],
        rstd: &mut [f32],
    ) {
        let channels = gain.len();
        let per_channel = 1.0 / channels as f32;
        let center = !mean.is_empty();
        let full = channels - channels % S::LANES;
        for (r, rstd) in rstd.iter_mut().enumerate() {
            let x = &x[r * channels..][..channels];
            let y = &mut y[r * channels..][..channels];
            let mu = if center {
                sum_over(s, channels, #[inline(always)] |i| s.load_at(x, i)) * per_channel
            } else {
                0.0
            };
            let mu_v = s.splat(mu);
            // Two passes (the row is in cache): the one-pass formula cancels when |mean| >> deviation.
            let mut squares = sum_over(s, full, #[inline(always)] |i| {
                let d = s.sub(s.load_at(x, i), mu_v);
                s.mul(d, d)
            });
            for &x in &x[full..] {
                squares += (x - mu) * (x - mu);
            }
            *rstd = 1.0 / (squares * per_channel + eps).sqrt();
            if center {
                mean[r] = mu;
            }
            let rstd_v = s.splat(*rstd);
            let mut i = 0;
            while i < channels {
                let normed = s.mul(s.sub(s.load_at(x, i), mu_v), rstd_v);
                s.store_at(y, i, s.fma(normed, s.load_at(gain, i), s.load_at(offset, i)));
                i += S::LANES;
            }
        }
    }
}

simd_kernel! {
    /// Gradients of [`forward_rows`]: writes `dx`, and adds the sums over rows of `dy * norm(x)`
    /// and of `dy` to `dgain` and `doffset`.
    pub(crate) fn backward_rows<S>(
        s,
        dy: &[f32],
        x: &[f32],
        gain: &[f32],
        mean: &[f32],
        rstd: &[f32],
        dx: &mut [f32],
        dgain: &mut [f32],
        doffset: &mut [f32],
    ) {
        let channels = gain.len();
        let per_channel = 1.0 / channels as f32;
        let center = !mean.is_empty();
        let zero = s.splat(0.0);
        for (r, &rstd) in rstd.iter().enumerate() {
            let x = &x[r * channels..][..channels];
            let dy = &dy[r * channels..][..channels];
            let dx = &mut dx[r * channels..][..channels];
            let mu = s.splat(if center { mean[r] } else { 0.0 });
            let rstd = s.splat(rstd);
            // With g = dy * gain: sums of g and of g * norm(x). Lanes past the end have dy = 0.
            let (mut sum_g, mut sum_gx) = ([zero; 2], [zero; 2]);
            let mut i = 0;
            let mut chain = 0;
            while i < channels {
                let dy = s.load_at(dy, i);
                let normed = s.mul(s.sub(s.load_at(x, i), mu), rstd);
                let g = s.mul(dy, s.load_at(gain, i));
                sum_g[chain] = s.add(sum_g[chain], g);
                sum_gx[chain] = s.fma(g, normed, sum_gx[chain]);
                s.store_at(dgain, i, s.fma(dy, normed, s.load_at(dgain, i)));
                s.store_at(doffset, i, s.add(dy, s.load_at(doffset, i)));
                i += S::LANES;
                chain ^= 1;
            }
            let mean_g = if center { s.sum(s.add(sum_g[0], sum_g[1])) * per_channel } else { 0.0 };
            let mean_g = s.splat(mean_g);
            let mean_gx = s.splat(s.sum(s.add(sum_gx[0], sum_gx[1])) * per_channel);
            let mut i = 0;
            while i < channels {
                let normed = s.mul(s.sub(s.load_at(x, i), mu), rstd);
                let g = s.mul(s.load_at(dy, i), s.load_at(gain, i));
                let d = s.fnma(normed, mean_gx, s.sub(g, mean_g));
                s.store_at(dx, i, s.mul(d, rstd));
                i += S::LANES;
            }
        }
    }
}
