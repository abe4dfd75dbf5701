//! A thin vector abstraction: each kernel is written once over [`Simd`] and compiled once per
//! instruction set by [`simd_kernel!`], which also picks the version at run time.
//!
//! A value of a type that implements [`Simd`] is a proof that the processor has the instructions
//! (it is made only after detection), so that its methods can be safe functions.

mod portable;
#[cfg(target_arch = "x86_64")]
mod x86;

pub(crate) use portable::Portable;
#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512};

use crate::isa::Isa;

/// The vector width that a kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Level {
    /// 16 lanes, 32 registers, masked loads and stores.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// 8 lanes with fused multiply-add.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// 4 lanes of plain Rust that the compiler maps to the target's baseline (SSE2, NEON).
    Portable,
}

impl Level {
    /// The level of [`Isa::current`].
    pub(crate) fn active() -> Self {
        Self::of(Isa::current())
    }

    /// The level that serves `isa` on this machine.
    pub(crate) fn of(isa: Isa) -> Self {
        match isa.or_portable() {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 | Isa::Avx512 => Self::Avx512,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => Self::Avx2,
            _ => Self::Portable,
        }
    }

    /// Number of `f32` in one vector.
    pub(crate) fn lanes(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => Avx512::LANES,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => Avx2::LANES,
            Self::Portable => Portable::LANES,
        }
    }

    /// Every level this processor can run, for tests.
    #[cfg(test)]
    pub(crate) fn available() -> Vec<Self> {
        let mut all: Vec<Self> = Isa::supported().into_iter().map(Self::of).collect();
        all.dedup();
        all
    }
}

/// Vectors of `f32` of one instruction set.
///
/// `max` and `min` return their **second** operand when either is NaN (the x86 rule); kernels put
/// the data second where a NaN must survive.
pub(crate) trait Simd: Copy + Send + Sync + 'static {
    /// One register.
    type V: Copy;
    /// Number of `f32` in one register.
    const LANES: usize;
    /// Architectural vector registers, which bounds the size of a register tile.
    const REGISTERS: usize;

    /// All lanes `x`.
    fn splat(self, x: f32) -> Self::V;
    /// Reads `LANES` values.
    ///
    /// # Safety
    /// `p` must be readable for `LANES` values.
    unsafe fn load_ptr(self, p: *const f32) -> Self::V;
    /// Writes `LANES` values.
    ///
    /// # Safety
    /// `p` must be writable for `LANES` values.
    unsafe fn store_ptr(self, p: *mut f32, v: Self::V);
    /// Reads the first `s.len()` lanes (at most `LANES`); the others are zero.
    fn load_part(self, s: &[f32]) -> Self::V;
    /// Writes the first `s.len()` lanes (at most `LANES`).
    fn store_part(self, s: &mut [f32], v: Self::V);
    /// `a + b`
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a - b`
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b`
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a / b`
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `1 / a` to about one unit in the last place, for `a` and `1 / a` in the normal range.
    fn reciprocal(self, a: Self::V) -> Self::V {
        self.div(self.splat(1.0), a)
    }
    /// `a * b + c`, fused where the hardware has it.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `c - a * b`, fused where the hardware has it.
    fn fnma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `a > b ? a : b`
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a < b ? a : b`
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// Square root.
    fn sqrt(self, a: Self::V) -> Self::V;
    /// Nearest integer, ties to even, for `|a| < 2^22`.
    fn round(self, a: Self::V) -> Self::V;
    /// `a * 2^n` for integral `n` in `[-300, 300]`, with gradual underflow and overflow to infinity.
    fn ldexp(self, a: Self::V, n: Self::V) -> Self::V;
    /// `a > b ? x : y` per lane.
    fn select_gt(self, a: Self::V, b: Self::V, x: Self::V, y: Self::V) -> Self::V;
    /// Reads `LANES` integers as `f32`.
    ///
    /// # Safety
    /// `p` must be readable for `LANES` integers.
    #[inline(always)]
    unsafe fn load_i32_ptr(self, p: *const i32) -> Self::V {
        let mut lanes = [0.0_f32; 16];
        for (i, lane) in lanes.iter_mut().enumerate().take(Self::LANES) {
            // SAFETY: the caller vouches for the integers.
            *lane = unsafe { p.add(i).read_unaligned() } as f32;
        }
        self.load(&lanes)
    }
    /// Writes the lanes rounded to the nearest 16-bit integer (ties to even), saturating.
    ///
    /// # Safety
    /// `p` must be writable for `LANES` integers.
    #[inline(always)]
    unsafe fn store_i16_ptr(self, p: *mut i16, v: Self::V) {
        let mut lanes = [0.0_f32; 16];
        self.store(&mut lanes, v);
        for (i, lane) in lanes.iter().enumerate().take(Self::LANES) {
            // SAFETY: the caller vouches for the integers.
            unsafe { p.add(i).write_unaligned(lane.round_ties_even() as i16) };
        }
    }
    /// Sum of all lanes.
    fn sum(self, a: Self::V) -> f32;
    /// Largest lane.
    fn hmax(self, a: Self::V) -> f32;

    /// `dst[c][r] = src[r][c]` for a block of `LANES` x `LANES`.
    ///
    /// # Safety
    /// `src` must be readable and `dst` writable for `LANES` rows of `LANES` values at the given
    /// strides (in values), without overlap.
    #[inline(always)]
    unsafe fn transpose_block(
        self,
        src: *const f32,
        src_stride: usize,
        dst: *mut f32,
        dst_stride: usize,
    ) {
        for r in 0..Self::LANES {
            for c in 0..Self::LANES {
                // SAFETY: within the block that the caller vouches for.
                unsafe { *dst.add(c * dst_stride + r) = *src.add(r * src_stride + c) };
            }
        }
    }

    /// Reads `LANES` values from the front of `s`, which must have as many.
    #[inline(always)]
    fn load(self, s: &[f32]) -> Self::V {
        assert!(s.len() >= Self::LANES);
        // SAFETY: the length was checked.
        unsafe { self.load_ptr(s.as_ptr()) }
    }

    /// Writes `LANES` values to the front of `s`, which must have as many.
    #[inline(always)]
    fn store(self, s: &mut [f32], v: Self::V) {
        assert!(s.len() >= Self::LANES);
        // SAFETY: the length was checked.
        unsafe { self.store_ptr(s.as_mut_ptr(), v) }
    }

    /// Reads `min(LANES, s.len() - at)` values from `at` on; missing lanes are zero.
    #[inline(always)]
    fn load_at(self, s: &[f32], at: usize) -> Self::V {
        if at + Self::LANES <= s.len() {
            // SAFETY: the length was checked.
            unsafe { self.load_ptr(s.as_ptr().add(at)) }
        } else {
            self.load_part(&s[at..])
        }
    }

    /// Writes `min(LANES, s.len() - at)` values from `at` on.
    #[inline(always)]
    fn store_at(self, s: &mut [f32], at: usize, v: Self::V) {
        if at + Self::LANES <= s.len() {
            // SAFETY: the length was checked.
            unsafe { self.store_ptr(s.as_mut_ptr().add(at), v) }
        } else {
            self.store_part(&mut s[at..], v);
        }
    }
}

/// Declares a kernel over `S: Simd`: a function that takes a [`Level`] first and runs the version
/// compiled for it. Inside the body the first parameter is the instruction-set token.
macro_rules! simd_kernel {
    ($(#[$meta:meta])* $vis:vis fn $name:ident<$simd:ident>($token:ident $(, $arg:ident : $ty:ty)* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        $vis fn $name(level: $crate::simd::Level $(, $arg: $ty)*) $(-> $ret)? {
            #[inline(always)]
            fn body<$simd: $crate::simd::Simd>($token: $simd $(, $arg: $ty)*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
            fn avx512(token: $crate::simd::Avx512 $(, $arg: $ty)*) $(-> $ret)? {
                body(token $(, $arg)*)
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2(token: $crate::simd::Avx2 $(, $arg: $ty)*) $(-> $ret)? {
                body(token $(, $arg)*)
            }

            match level {
                #[cfg(target_arch = "x86_64")]
                $crate::simd::Level::Avx512 => {
                    let token = $crate::simd::Avx512::detect()
                        .expect("a level is chosen after detection");
                    // SAFETY: the token exists, so the processor has these features.
                    unsafe { avx512(token $(, $arg)*) }
                }
                #[cfg(target_arch = "x86_64")]
                $crate::simd::Level::Avx2 => {
                    let token = $crate::simd::Avx2::detect()
                        .expect("a level is chosen after detection");
                    // SAFETY: the token exists, so the processor has these features.
                    unsafe { avx2(token $(, $arg)*) }
                }
                $crate::simd::Level::Portable => body($crate::simd::Portable $(, $arg)*),
            }
        }
    };
}
pub(crate) use simd_kernel;

/// Asks the processor to bring the cache line at `p`, which need not be a valid address, into its
/// first-level cache.
#[inline(always)]
pub(crate) fn prefetch_line(p: *const f32) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint that does not access memory, part of every x86-64 processor.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(p.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}
