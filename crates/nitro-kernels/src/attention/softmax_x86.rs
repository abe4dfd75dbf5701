//! One row of scores to bf16 probabilities, with AVX-512 BF16.

use std::arch::x86_64::*;

/// `2^x` of scores: a fifth-order remainder of 4e-5, a hundredth of what rounding to bf16 leaves. NaN
/// stays NaN; what is below 2^-126 becomes zero or next to it.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) fn exp2(x: __m512) -> __m512 {
    // The data come second: `max` returns its second operand where either is NaN.
    let x = _mm512_max_ps(_mm512_set1_ps(-150.0), x);
    let n = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x);
    let r = _mm512_sub_ps(x, n);
    let mut p = _mm512_set1_ps(0.009_618_129);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.055_504_11));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.240_226_5));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(std::f32::consts::LN_2));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0));
    _mm512_scalef_ps(p, n)
}

/// The low `count` lanes.
fn lanes(count: usize) -> __mmask16 {
    if count >= 16 {
        0xffff
    } else {
        (1 << count) - 1
    }
}

/// Writes `2^(score - max)` of the first `limit` scores in bf16, then zeros up to `total` values, and
/// returns the sum. With `bounded` scores the maximum is taken as zero. Nothing visible gives zero.
///
/// # Safety
/// The machine must have AVX-512 BF16. `scores` must hold `limit` values rounded up to whole vectors,
/// `to` as many as `total` rounded up to 32, and `limit` be at most `total`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
pub(super) unsafe fn probabilities(
    scores: *const f32,
    limit: usize,
    total: usize,
    bounded: bool,
    to: *mut u16,
) -> f32 {
    // SAFETY: the caller's contract; masked lanes of a last vector are not used.
    unsafe {
        let mut shift = _mm512_setzero_ps();
        if !bounded {
            let hidden = _mm512_set1_ps(f32::NEG_INFINITY);
            let mut largest = hidden;
            let mut at = 0;
            while at < limit {
                let x = _mm512_mask_loadu_ps(hidden, lanes(limit - at), scores.add(at));
                largest = _mm512_max_ps(largest, x);
                at += 16;
            }
            let largest = _mm512_reduce_max_ps(largest);
            if largest > f32::NEG_INFINITY {
                shift = _mm512_set1_ps(largest);
            }
        }
        let mut sums = [_mm512_setzero_ps(); 2];
        let mut at = 0;
        while at < total {
            let mut both = [_mm512_setzero_ps(); 2];
            for half in 0..2 {
                let first = at + 16 * half;
                if first < limit {
                    let x = _mm512_loadu_ps(scores.add(first));
                    let p = exp2(_mm512_sub_ps(x, shift));
                    let p = _mm512_maskz_mov_ps(lanes(limit - first), p);
                    sums[half] = _mm512_add_ps(sums[half], p);
                    both[half] = p;
                }
            }
            let packed = _mm512_cvtne2ps_pbh(both[1], both[0]);
            _mm512_storeu_si512(
                to.add(at).cast(),
                std::mem::transmute::<__m512bh, __m512i>(packed),
            );
            at += 32;
        }
        _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1]))
    }
}
