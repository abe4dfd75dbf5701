//! The micro-kernel interface: one register tile of C, and the table of kernels per instruction set.
//!
//! Everything a micro-kernel reads is counted in *units* of four bytes along the K dimension: one
//! f32, or two bf16 neighbours in K. The f32 and bf16 kernels therefore share all addressing, and so
//! do GEMM and convolution: a tile names each of its rows of A by a pointer, and walks K in equal
//! segments (one for GEMM; one per kernel row for a convolution that reads a padded image).

use crate::isa::{Isa, Precision};

/// Lanes of a packed B vector, whatever the register width.
pub(crate) const LANES: usize = 16;
/// The most rows a tile can have.
pub(crate) const MAX_ROWS: usize = 8;
/// The most B vectors a panel can have.
pub(crate) const MAX_VECTORS: usize = 3;

/// What one four-byte unit along K holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unit {
    /// One f32.
    F32,
    /// One f32 that was rounded to bf16 while packing.
    F32Rounded,
    /// Two bf16, the lower K index in the lower half.
    Bf16Pair,
}

impl Unit {
    /// Elements along K per unit.
    pub(crate) fn depth(self) -> usize {
        if self == Unit::Bf16Pair { 2 } else { 1 }
    }

    /// Bytes of one element in packed memory.
    pub(crate) fn element_bytes(self) -> usize {
        if self == Unit::Bf16Pair { 2 } else { 4 }
    }
}

/// One register tile: `C[rows, cols] (+)= A[rows, K] B[K, cols] (+ bias)`.
pub(crate) struct Tile {
    /// First unit of each row of A; entries from `rows` on are unused.
    pub(crate) a: [*const u8; MAX_ROWS],
    /// Bytes from one unit of A to the next.
    pub(crate) a_step: usize,
    /// K is `segments * segment_units` units; B is contiguous, A jumps between segments.
    pub(crate) segments: usize,
    pub(crate) segment_units: usize,
    /// Bytes from the start of one segment of A to the start of the next.
    pub(crate) a_segment_step: usize,
    /// Packed panel: `[unit][vectors * LANES]` of four-byte units, aligned to 64 bytes.
    pub(crate) b: *const f32,
    /// First element of each row of C.
    pub(crate) c: [*mut f32; MAX_ROWS],
    pub(crate) rows: usize,
    /// B vectors of the panel, 1 to [`MAX_VECTORS`].
    pub(crate) vectors: usize,
    /// Columns to store, in `(vectors - 1) * LANES + 1 ..= vectors * LANES`.
    pub(crate) cols: usize,
    /// `cols` values, or null.
    pub(crate) bias: *const f32,
    /// Add to C instead of overwriting it.
    pub(crate) accumulate: bool,
}

/// A micro-kernel.
///
/// # Safety
/// The machine must support the kernel's instruction set, and every pointer of the tile must be valid
/// for the extents the tile states; rows of C must not be accessed by anyone else during the call.
pub(crate) type TileFn = unsafe fn(&Tile);

/// The kernels of one instruction set at one precision.
#[derive(Clone, Copy)]
pub(crate) struct KernelSet {
    pub(crate) isa: Isa,
    pub(crate) unit: Unit,
    /// Rows of a full tile.
    pub(crate) rows: usize,
    /// Vectors of a full panel.
    pub(crate) vectors: usize,
    pub(crate) tile: TileFn,
}

impl KernelSet {
    /// The kernels for `isa`, or the portable ones if the machine does not support it.
    pub(crate) fn new(isa: Isa, precision: Precision) -> KernelSet {
        let isa = isa.or_portable();
        let f32_unit = match precision {
            Precision::F32 => Unit::F32,
            Precision::Bf16 | Precision::Int8 => Unit::F32Rounded,
        };
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 if precision != Precision::F32 => KernelSet {
                isa,
                unit: Unit::Bf16Pair,
                rows: 8,
                vectors: 3,
                tile: super::kernel_x86::tile_avx512_bf16,
            },
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 | Isa::Avx512 => KernelSet {
                isa,
                unit: f32_unit,
                rows: 8,
                vectors: 3,
                tile: super::kernel_x86::tile_avx512_f32,
            },
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => KernelSet {
                isa,
                unit: f32_unit,
                rows: 6,
                vectors: 1,
                tile: super::kernel_x86::tile_avx2_f32,
            },
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => KernelSet {
                isa,
                unit: f32_unit,
                rows: 6,
                vectors: 1,
                tile: super::kernel_neon::tile_neon_f32,
            },
            _ => KernelSet {
                isa: Isa::Portable,
                unit: f32_unit,
                rows: 4,
                vectors: 1,
                tile: super::kernel_portable::tile_portable_f32,
            },
        }
    }
}
