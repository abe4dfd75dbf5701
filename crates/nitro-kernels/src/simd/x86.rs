//! AVX-512 and AVX2 + FMA.
//!
//! SAFETY of every block that only calls an arithmetic intrinsic: the token exists only if
//! `detect` found the features, which is all such an intrinsic asks for.

use super::Simd;
use std::arch::x86_64::*;

/// Token for AVX-512 F/BW/VL/DQ.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(());

impl Avx512 {
    /// The token, if the processor and the operating system support these instructions.
    #[inline]
    pub(crate) fn detect() -> Option<Self> {
        (is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma"))
        .then_some(Self(()))
    }
}

/// Token for AVX2 and FMA.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// The token, if the processor and the operating system support these instructions.
    #[inline]
    pub(crate) fn detect() -> Option<Self> {
        (is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")).then_some(Self(()))
    }

    /// A mask whose first `n` lanes are set.
    #[inline(always)]
    fn mask(self, n: usize) -> __m256i {
        // SAFETY: arithmetic; see the module's comment.
        unsafe {
            let lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
            _mm256_cmpgt_epi32(_mm256_set1_epi32(n as i32), lanes)
        }
    }
}

/// Methods that are one arithmetic intrinsic each.
macro_rules! arithmetic {
    ($($name:ident($($arg:ident),*) = $intrinsic:ident($($given:expr),*);)*) => {$(
        #[inline(always)]
        fn $name(self, $($arg: Self::V),*) -> Self::V {
            // SAFETY: arithmetic; see the module's comment.
            unsafe { $intrinsic($($given),*) }
        }
    )*};
}

impl Simd for Avx512 {
    type V = __m512;
    const LANES: usize = 16;
    const REGISTERS: usize = 32;

    arithmetic! {
        add(a, b) = _mm512_add_ps(a, b);
        sub(a, b) = _mm512_sub_ps(a, b);
        mul(a, b) = _mm512_mul_ps(a, b);
        div(a, b) = _mm512_div_ps(a, b);
        fma(a, b, c) = _mm512_fmadd_ps(a, b, c);
        fnma(a, b, c) = _mm512_fnmadd_ps(a, b, c);
        max(a, b) = _mm512_max_ps(a, b);
        min(a, b) = _mm512_min_ps(a, b);
        sqrt(a) = _mm512_sqrt_ps(a);
        ldexp(a, n) = _mm512_scalef_ps(a, n);
    }

    #[inline(always)]
    fn reciprocal(self, a: __m512) -> __m512 {
        // SAFETY: arithmetic; see the module's comment.
        unsafe {
            // 14 bits, and a Newton step that doubles them.
            let r = _mm512_rcp14_ps(a);
            let error = _mm512_fnmadd_ps(a, r, _mm512_set1_ps(1.0));
            _mm512_fmadd_ps(r, error, r)
        }
    }
    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        // SAFETY: arithmetic; see the module's comment.
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load_ptr(self, p: *const f32) -> __m512 {
        // SAFETY: the caller vouches for 16 readable values.
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn store_ptr(self, p: *mut f32, v: __m512) {
        // SAFETY: the caller vouches for 16 writable values.
        unsafe { _mm512_storeu_ps(p, v) }
    }
    #[inline(always)]
    fn load_part(self, s: &[f32]) -> __m512 {
        let n = s.len().min(16);
        // SAFETY: the mask admits only the first `n` values, which the slice has.
        unsafe { _mm512_maskz_loadu_ps(((1u32 << n) - 1) as __mmask16, s.as_ptr()) }
    }
    #[inline(always)]
    fn store_part(self, s: &mut [f32], v: __m512) {
        let n = s.len().min(16);
        // SAFETY: the mask admits only the first `n` values, which the slice has.
        unsafe { _mm512_mask_storeu_ps(s.as_mut_ptr(), ((1u32 << n) - 1) as __mmask16, v) }
    }
    #[inline(always)]
    fn round(self, a: __m512) -> __m512 {
        // SAFETY: arithmetic; see the module's comment.
        unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
    }
    #[inline(always)]
    fn select_gt(self, a: __m512, b: __m512, x: __m512, y: __m512) -> __m512 {
        // SAFETY: arithmetic; see the module's comment.
        unsafe { _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, b), y, x) }
    }
    #[inline(always)]
    unsafe fn load_i32_ptr(self, p: *const i32) -> __m512 {
        // SAFETY: the caller vouches for 16 readable integers.
        unsafe { _mm512_cvtepi32_ps(_mm512_loadu_si512(p.cast())) }
    }
    #[inline(always)]
    unsafe fn store_i16_ptr(self, p: *mut i16, v: __m512) {
        // SAFETY: the caller vouches for 16 writable integers.
        unsafe {
            let halves = _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(v));
            _mm256_storeu_si256(p.cast(), halves);
        }
    }
    #[inline(always)]
    fn sum(self, a: __m512) -> f32 {
        // SAFETY: arithmetic; see the module's comment.
        unsafe { _mm512_reduce_add_ps(a) }
    }
    #[inline(always)]
    fn hmax(self, a: __m512) -> f32 {
        // SAFETY: arithmetic; see the module's comment.
        unsafe { _mm512_reduce_max_ps(a) }
    }

    #[inline(always)]
    unsafe fn transpose_block(
        self,
        src: *const f32,
        src_stride: usize,
        dst: *mut f32,
        dst_stride: usize,
    ) {
        // SAFETY: the caller vouches for 16 rows of 16 values on both sides; the shuffles are
        // arithmetic.
        unsafe {
            let mut a = [_mm512_setzero_ps(); 16];
            for (i, row) in a.iter_mut().enumerate() {
                *row = _mm512_loadu_ps(src.add(i * src_stride));
            }
            // Pairs of rows, then fours: 4x4 blocks inside each 128-bit lane are transposed.
            let mut b = [_mm512_setzero_ps(); 16];
            for i in 0..8 {
                b[2 * i] = _mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]);
                b[2 * i + 1] = _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]);
            }
            for i in 0..4 {
                let (lo0, hi0) = (b[4 * i], b[4 * i + 1]);
                let (lo1, hi1) = (b[4 * i + 2], b[4 * i + 3]);
                a[4 * i] = _mm512_shuffle_ps::<0x44>(lo0, lo1);
                a[4 * i + 1] = _mm512_shuffle_ps::<0xEE>(lo0, lo1);
                a[4 * i + 2] = _mm512_shuffle_ps::<0x44>(hi0, hi1);
                a[4 * i + 3] = _mm512_shuffle_ps::<0xEE>(hi0, hi1);
            }
            // a[4g + j] holds, in lane l, column 4l + j of rows 4g..4g+4: gather the four lanes.
            for j in 0..4 {
                let (r0, r1, r2, r3) = (a[j], a[4 + j], a[8 + j], a[12 + j]);
                let low01 = _mm512_shuffle_f32x4::<0x88>(r0, r1);
                let high01 = _mm512_shuffle_f32x4::<0xDD>(r0, r1);
                let low23 = _mm512_shuffle_f32x4::<0x88>(r2, r3);
                let high23 = _mm512_shuffle_f32x4::<0xDD>(r2, r3);
                let columns = [
                    _mm512_shuffle_f32x4::<0x88>(low01, low23),
                    _mm512_shuffle_f32x4::<0x88>(high01, high23),
                    _mm512_shuffle_f32x4::<0xDD>(low01, low23),
                    _mm512_shuffle_f32x4::<0xDD>(high01, high23),
                ];
                for (l, column) in columns.into_iter().enumerate() {
                    _mm512_storeu_ps(dst.add((4 * l + j) * dst_stride), column);
                }
            }
        }
    }
}

impl Simd for Avx2 {
    type V = __m256;
    const LANES: usize = 8;
    const REGISTERS: usize = 16;

    arithmetic! {
        add(a, b) = _mm256_add_ps(a, b);
        sub(a, b) = _mm256_sub_ps(a, b);
        mul(a, b) = _mm256_mul_ps(a, b);
        div(a, b) = _mm256_div_ps(a, b);
        fma(a, b, c) = _mm256_fmadd_ps(a, b, c);
        fnma(a, b, c) = _mm256_fnmadd_ps(a, b, c);
        max(a, b) = _mm256_max_ps(a, b);
        min(a, b) = _mm256_min_ps(a, b);
        sqrt(a) = _mm256_sqrt_ps(a);
    }

    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        // SAFETY: arithmetic; see the module's comment.
        unsafe { _mm256_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load_ptr(self, p: *const f32) -> __m256 {
        // SAFETY: the caller vouches for 8 readable values.
        unsafe { _mm256_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn store_ptr(self, p: *mut f32, v: __m256) {
        // SAFETY: the caller vouches for 8 writable values.
        unsafe { _mm256_storeu_ps(p, v) }
    }
    #[inline(always)]
    fn load_part(self, s: &[f32]) -> __m256 {
        let mask = self.mask(s.len().min(8));
        // SAFETY: the mask admits only the values that the slice has.
        unsafe { _mm256_maskload_ps(s.as_ptr(), mask) }
    }
    #[inline(always)]
    fn store_part(self, s: &mut [f32], v: __m256) {
        let mask = self.mask(s.len().min(8));
        // SAFETY: the mask admits only the values that the slice has.
        unsafe { _mm256_maskstore_ps(s.as_mut_ptr(), mask, v) }
    }
    #[inline(always)]
    fn round(self, a: __m256) -> __m256 {
        // SAFETY: arithmetic; see the module's comment.
        unsafe { _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
    }
    #[inline(always)]
    fn ldexp(self, a: __m256, n: __m256) -> __m256 {
        // Three factors, because 2^n itself leaves the range of normal numbers before the product
        // does.
        let third = self.round(self.mul(n, self.splat(1.0 / 3.0)));
        let rest = self.sub(n, self.add(third, third));
        // SAFETY: arithmetic; see the module's comment.
        let power = |n: __m256| unsafe {
            let biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
        };
        let (t, r) = (power(third), power(rest));
        self.mul(self.mul(self.mul(a, t), t), r)
    }
    #[inline(always)]
    fn select_gt(self, a: __m256, b: __m256, x: __m256, y: __m256) -> __m256 {
        // SAFETY: arithmetic; see the module's comment.
        unsafe { _mm256_blendv_ps(y, x, _mm256_cmp_ps::<_CMP_GT_OQ>(a, b)) }
    }
    #[inline(always)]
    fn sum(self, a: __m256) -> f32 {
        // SAFETY: arithmetic; see the module's comment.
        unsafe {
            let four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
    }
    #[inline(always)]
    fn hmax(self, a: __m256) -> f32 {
        // SAFETY: arithmetic; see the module's comment.
        unsafe {
            let four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
    }
}
