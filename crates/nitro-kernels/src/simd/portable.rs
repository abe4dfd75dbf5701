//! Four lanes of plain Rust, laid out so that the compiler vectorises them for any target.

use super::Simd;

/// The instruction set every target has.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

const LANES: usize = 4;
type V = [f32; LANES];

/// Adding and subtracting this rounds a small f32 to an integer, and leaves that integer in the
/// low bits of the sum.
const ROUND_MAGIC: f32 = 12_582_912.0; // 1.5 * 2^23

#[inline(always)]
fn zip(a: V, b: V, f: impl Fn(f32, f32) -> f32) -> V {
    [f(a[0], b[0]), f(a[1], b[1]), f(a[2], b[2]), f(a[3], b[3])]
}

#[inline(always)]
fn multiply_add(a: f32, b: f32, c: f32) -> f32 {
    // `mul_add` without hardware support is a slow library call.
    if cfg!(any(target_arch = "aarch64", target_feature = "fma")) {
        a.mul_add(b, c)
    } else {
        a * b + c
    }
}

/// `2^n` for integral `n` in `[-126, 127]`.
#[inline(always)]
fn power_of_two(n: f32) -> f32 {
    let bits = (n + ROUND_MAGIC).to_bits();
    f32::from_bits(bits.wrapping_add(127) << 23)
}

impl Simd for Portable {
    type V = V;
    const LANES: usize = LANES;
    const REGISTERS: usize = 16;

    #[inline(always)]
    fn splat(self, x: f32) -> V {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load_ptr(self, p: *const f32) -> V {
        // SAFETY: the caller vouches for `LANES` readable values; no alignment is assumed.
        unsafe { p.cast::<V>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store_ptr(self, p: *mut f32, v: V) {
        // SAFETY: the caller vouches for `LANES` writable values; no alignment is assumed.
        unsafe { p.cast::<V>().write_unaligned(v) }
    }
    #[inline(always)]
    fn load_part(self, s: &[f32]) -> V {
        let mut v = [0.0; LANES];
        for (lane, &x) in v.iter_mut().zip(s) {
            *lane = x;
        }
        v
    }
    #[inline(always)]
    fn store_part(self, s: &mut [f32], v: V) {
        for (x, &lane) in s.iter_mut().zip(&v) {
            *x = lane;
        }
    }
    #[inline(always)]
    fn add(self, a: V, b: V) -> V {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: V, b: V) -> V {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: V, b: V) -> V {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: V, b: V) -> V {
        zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn fma(self, a: V, b: V, c: V) -> V {
        core::array::from_fn(|i| multiply_add(a[i], b[i], c[i]))
    }
    #[inline(always)]
    fn fnma(self, a: V, b: V, c: V) -> V {
        core::array::from_fn(|i| multiply_add(-a[i], b[i], c[i]))
    }
    #[inline(always)]
    fn max(self, a: V, b: V) -> V {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, a: V, b: V) -> V {
        zip(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn sqrt(self, a: V) -> V {
        a.map(f32::sqrt)
    }
    #[inline(always)]
    fn round(self, a: V) -> V {
        a.map(|x| (x + ROUND_MAGIC) - ROUND_MAGIC)
    }
    #[inline(always)]
    fn ldexp(self, a: V, n: V) -> V {
        // Three factors, because 2^n itself leaves the range of normal numbers before the product
        // does.
        let third = self.round(self.mul(n, self.splat(1.0 / 3.0)));
        let rest = self.sub(n, self.add(third, third));
        let (t, r) = (third.map(power_of_two), rest.map(power_of_two));
        self.mul(self.mul(self.mul(a, t), t), r)
    }
    #[inline(always)]
    fn select_gt(self, a: V, b: V, x: V, y: V) -> V {
        core::array::from_fn(|i| if a[i] > b[i] { x[i] } else { y[i] })
    }
    #[inline(always)]
    fn sum(self, a: V) -> f32 {
        (a[0] + a[2]) + (a[1] + a[3])
    }
    #[inline(always)]
    fn hmax(self, a: V) -> f32 {
        let pick = |a: f32, b: f32| if a > b { a } else { b };
        pick(pick(a[0], a[2]), pick(a[1], a[3]))
    }
}
