//! The micro-kernels of packed products: up to eight rows by one panel.
//!
//! They differ from the general ones ([`crate::gemm`]) in what few rows and large weights need: rows
//! are evenly spaced, the result goes to a small buffer that an epilogue finishes while it is in the
//! first-level cache, and the next panel is fetched on the way.

use super::activations::Format;
#[cfg(target_arch = "x86_64")]
use crate::gemm::Unit;
use crate::gemm::{KernelSet, LANES, MAX_ROWS, Tile};
#[cfg(target_arch = "x86_64")]
use crate::isa::Isa;

/// Rows of a full tile.
pub(crate) const TILE_ROWS: usize = MAX_ROWS;

/// `C[rows, width] (+)= A[rows, K] B[K, width]` with `width = vectors * 16`.
pub(crate) struct PanelTile {
    /// First unit of the first row.
    pub(crate) a: *const u8,
    /// Bytes between rows of A.
    pub(crate) pitch: usize,
    /// 1 to [`TILE_ROWS`].
    pub(crate) rows: usize,
    /// Packed panel, `[unit][width]` of four bytes.
    pub(crate) b: *const u32,
    pub(crate) units: usize,
    pub(crate) vectors: usize,
    /// Integers only: where sums start, one value per column.
    pub(crate) start: *const i32,
    /// Rows of `width` values, `c_pitch` values apart.
    pub(crate) c: *mut f32,
    pub(crate) c_pitch: usize,
    pub(crate) accumulate: bool,
    /// What to fetch into the second-level cache meanwhile, and how many bytes to advance every two
    /// units. Any address will do.
    #[cfg_attr(
        not(target_arch = "x86_64"),
        expect(dead_code, reason = "only the kernel for x86 fetches ahead")
    )]
    pub(crate) prefetch: *const u8,
    #[cfg_attr(
        not(target_arch = "x86_64"),
        expect(dead_code, reason = "only the kernel for x86 fetches ahead")
    )]
    pub(crate) prefetch_step: usize,
}

/// A micro-kernel.
///
/// # Safety
/// The machine must support its instruction set; A, B, C and (for integers) `start` must be valid for
/// the extents stated, and C be used by nobody else.
pub(crate) type PanelFn = unsafe fn(&KernelSet, &PanelTile);

/// The kernel for `format` on the instruction set of `set`.
pub(crate) fn kernel(set: &KernelSet, format: Format) -> PanelFn {
    match (set.isa, format) {
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512Bf16, Format::Float) if set.unit == Unit::Bf16Pair => x86::bf16_panel,
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512Bf16 | Isa::Avx512, Format::Float) => x86::f32_panel,
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512Bf16 | Isa::Avx512, Format::Int8) if is_x86_feature_detected!("avx512vnni") => {
            x86::int8_panel
        }
        (_, Format::Float) => general_panel,
        (_, Format::Int8) => portable_int8_panel,
    }
}

/// Any float kernel, through the general micro-kernels.
///
/// # Safety
/// As [`PanelFn`].
unsafe fn general_panel(set: &KernelSet, tile: &PanelTile) {
    let width = tile.vectors * LANES;
    let mut row = 0;
    while row < tile.rows {
        let rows = set.rows.min(tile.rows - row);
        let at = |i: usize| (row + i.min(rows - 1)) * tile.pitch;
        let general = Tile {
            a: std::array::from_fn(|i| tile.a.wrapping_add(at(i))),
            a_step: 4,
            segments: 1,
            segment_units: tile.units,
            a_segment_step: 0,
            b: tile.b.cast(),
            c: std::array::from_fn(|i| tile.c.wrapping_add((row + i.min(rows - 1)) * tile.c_pitch)),
            rows,
            vectors: tile.vectors,
            cols: width,
            bias: std::ptr::null(),
            accumulate: tile.accumulate,
        };
        // SAFETY: the caller's contract, for these rows.
        unsafe { (set.tile)(&general) };
        row += rows;
    }
}

/// 8-bit products in plain Rust.
///
/// # Safety
/// As [`PanelFn`].
unsafe fn portable_int8_panel(_: &KernelSet, tile: &PanelTile) {
    let width = tile.vectors * LANES;
    for row in 0..tile.rows {
        for vector in 0..tile.vectors {
            let mut sums = [0_i32; LANES];
            // SAFETY: within the extents that the caller vouches for.
            unsafe {
                for (lane, sum) in sums.iter_mut().enumerate() {
                    *sum = *tile.start.add(vector * LANES + lane);
                }
                for unit in 0..tile.units {
                    let a = tile.a.add(row * tile.pitch + unit * 4).cast::<[u8; 4]>();
                    let a = a.read_unaligned().map(i32::from);
                    let b = tile.b.add(unit * width + vector * LANES).cast::<[i8; 4]>();
                    for (lane, sum) in sums.iter_mut().enumerate() {
                        let b = b.add(lane).read().map(i32::from);
                        *sum += a[0] * b[0] + a[1] * b[1] + a[2] * b[2] + a[3] * b[3];
                    }
                }
                for (lane, &sum) in sums.iter().enumerate() {
                    let c = tile.c.add(row * tile.c_pitch + vector * LANES + lane);
                    *c = sum as f32 + if tile.accumulate { *c } else { 0.0 };
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{KernelSet, LANES, PanelTile};

    /// One kernel per (rows, vectors) and the dispatcher over them. The formats differ in the type of
    /// the sums, in where these start, in the multiply-add and in how a sum becomes f32.
    macro_rules! panel_kernel {
        (
            $panel:ident, $kernel:ident, $features:literal, $doc:literal, $sum:ty,
            $start:expr, $multiply_add:expr, $to_f32:expr
        ) => {
            #[doc = $doc]
            ///
            /// # Safety
            /// See [`super::PanelFn`].
            pub(super) unsafe fn $panel(_: &KernelSet, tile: &PanelTile) {
                // SAFETY: the caller's contract; row counts are rounded up to a compiled variant,
                // whose surplus rows read the last row and are never stored.
                unsafe {
                    match (tile.vectors, tile.rows) {
                        (3, 5..) => $kernel::<8, 3>(tile),
                        (3, 3..=4) => $kernel::<4, 3>(tile),
                        (3, 2) => $kernel::<2, 3>(tile),
                        (3, _) => $kernel::<1, 3>(tile),
                        (2, 3..) => $kernel::<8, 2>(tile),
                        (2, _) => $kernel::<2, 2>(tile),
                        (_, 3..) => $kernel::<8, 1>(tile),
                        (_, _) => $kernel::<2, 1>(tile),
                    }
                }
            }

            #[target_feature(enable = $features)]
            unsafe fn $kernel<const ROWS: usize, const VECTORS: usize>(tile: &PanelTile) {
                // SAFETY: the caller's contract; see each access.
                unsafe {
                    let mut acc = [[$start(tile, 0); VECTORS]; ROWS];
                    for v in 1..VECTORS {
                        let start = $start(tile, v);
                        for row in 0..ROWS {
                            acc[row][v] = start;
                        }
                    }
                    let a: [*const u8; ROWS] = std::array::from_fn(|row| {
                        tile.a.wrapping_add(row.min(tile.rows - 1) * tile.pitch)
                    });
                    let mut b = tile.b.cast::<f32>();
                    let mut ahead = tile.prefetch;
                    let mut offset = 0;
                    macro_rules! unit {
                        () => {
                            // B holds `VECTORS * LANES` values for each unit of K, and each row of A
                            // a unit; rows may be unaligned.
                            let mut lanes = [_mm512_setzero_ps(); VECTORS];
                            for v in 0..VECTORS {
                                lanes[v] = _mm512_loadu_ps(b.add(v * LANES));
                            }
                            for row in 0..ROWS {
                                let value = a[row].add(offset).cast::<f32>().read_unaligned();
                                let value = _mm512_set1_ps(value);
                                for v in 0..VECTORS {
                                    acc[row][v] = $multiply_add(acc[row][v], value, lanes[v]);
                                }
                            }
                            offset += 4;
                            b = b.add(VECTORS * LANES);
                        };
                    }
                    for _ in 0..tile.units / 2 {
                        unit!();
                        unit!();
                        _mm_prefetch::<_MM_HINT_T1>(ahead.cast());
                        ahead = ahead.wrapping_add(tile.prefetch_step);
                    }
                    if tile.units % 2 == 1 {
                        unit!();
                    }
                    let _ = (b, offset);
                    for row in 0..ROWS {
                        if row < tile.rows {
                            for v in 0..VECTORS {
                                // Each row of C holds `VECTORS * LANES` values.
                                let c = tile.c.add(row * tile.c_pitch + v * LANES);
                                let mut sum = $to_f32(acc[row][v]);
                                if tile.accumulate {
                                    sum = _mm512_add_ps(sum, _mm512_loadu_ps(c));
                                }
                                _mm512_storeu_ps(c, sum);
                            }
                        }
                    }
                }
            }
        };
    }

    #[inline(always)]
    fn as_bf16(value: __m512) -> __m512bh {
        // SAFETY: both are 64 bytes of plain data.
        unsafe { std::mem::transmute::<__m512, __m512bh>(value) }
    }

    panel_kernel!(
        f32_panel,
        f32_kernel,
        "avx512f,avx512bw,avx512vl,avx512dq",
        "f32 products.",
        __m512,
        |_: &PanelTile, _: usize| _mm512_setzero_ps(),
        |acc, a, b| _mm512_fmadd_ps(a, b, acc),
        |sum: __m512| sum
    );

    panel_kernel!(
        bf16_panel,
        bf16_kernel,
        "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16",
        "Products of bf16 pairs.",
        __m512,
        |_: &PanelTile, _: usize| _mm512_setzero_ps(),
        |acc, a, b| _mm512_dpbf16_ps(acc, as_bf16(a), as_bf16(b)),
        |sum: __m512| sum
    );

    panel_kernel!(
        int8_panel,
        int8_kernel,
        "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni",
        "Products of unsigned activations and signed weights, four to a unit.",
        __m512i,
        |tile: &PanelTile, v: usize| _mm512_loadu_si512(tile.start.add(v * LANES).cast()),
        |acc, a, b| _mm512_dpbusd_epi32(acc, _mm512_castps_si512(a), _mm512_castps_si512(b)),
        |sum: __m512i| _mm512_cvtepi32_ps(sum)
    );
}
