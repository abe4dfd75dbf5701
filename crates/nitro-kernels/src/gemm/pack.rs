//! Packing of whole operands: B into panels, blocks of A into rows the micro-kernel can broadcast.

use super::convert::{Interleave, convert_run, interleave, interleave_rows, transpose16};
use super::kernel::{KernelSet, LANES, MAX_ROWS, MAX_VECTORS};
use super::matrix::MatRef;
use crate::pool::{SharedPtr, par_for};

/// Units along K in one block: a panel of 48 columns is then 36 KiB at most, and stays in L1.
pub(crate) const MAX_BLOCK_UNITS: usize = 192;

/// How B is cut: K into blocks, columns into panels of one to three vectors.
///
/// Packed memory is `[block][panel][unit][panel vectors * 16]`, four bytes per entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Layout {
    pub(crate) k: usize,
    pub(crate) n: usize,
    /// Units along K in all.
    units: usize,
    /// Units in every block but the last.
    block_units: usize,
    /// Columns in vectors, rounded up.
    vectors: usize,
    /// Vectors of a full panel.
    panel_vectors: usize,
    /// Elements per unit.
    depth: usize,
}

impl Layout {
    pub(crate) fn new(set: &KernelSet, k: usize, n: usize) -> Layout {
        let units = k.div_ceil(set.unit.depth());
        let blocks = units.div_ceil(MAX_BLOCK_UNITS).max(1);
        Layout::with_block(set, k, n, units.div_ceil(blocks))
    }

    /// A layout whose blocks have a given number of units.
    pub(crate) fn with_block(set: &KernelSet, k: usize, n: usize, block_units: usize) -> Layout {
        let depth = set.unit.depth();
        Layout {
            k,
            n,
            units: k.div_ceil(depth),
            block_units,
            vectors: n.div_ceil(LANES),
            panel_vectors: set.vectors.min(MAX_VECTORS),
            depth,
        }
    }

    pub(crate) fn blocks(&self) -> usize {
        if self.units == 0 {
            1
        } else {
            self.units.div_ceil(self.block_units)
        }
    }

    /// Units of block `block`.
    pub(crate) fn units_of(&self, block: usize) -> usize {
        self.block_units.min(self.units - block * self.block_units)
    }

    /// The range of K (in elements) of a block.
    pub(crate) fn k_range(&self, block: usize) -> (usize, usize) {
        let start = block * self.block_units * self.depth;
        (
            start,
            (start + self.units_of(block) * self.depth).min(self.k),
        )
    }

    pub(crate) fn panels(&self) -> usize {
        self.vectors.div_ceil(self.panel_vectors)
    }

    /// The first vector and the number of vectors of a panel. A last panel of one vector would leave
    /// the multipliers idle, so with three vectors per panel it takes one from its neighbour.
    pub(crate) fn panel(&self, panel: usize) -> (usize, usize) {
        let full = self.panel_vectors;
        let start = panel * full;
        let lone = full == MAX_VECTORS && self.vectors % full == 1 && self.vectors > full;
        let count = self.panels();
        if lone && panel + 2 == count {
            (start, 2)
        } else if lone && panel + 1 == count {
            (start - 1, 2)
        } else {
            (start, full.min(self.vectors - start))
        }
    }

    /// Bytes of the whole packed operand.
    pub(crate) fn bytes(&self) -> usize {
        self.units * self.vectors * LANES * 4
    }

    /// Position, in four-byte units, of a panel.
    pub(crate) fn offset(&self, block: usize, first_vector: usize) -> usize {
        (block * self.block_units * self.vectors + first_vector * self.units_of(block)) * LANES
    }
}

/// Packs all of B, in parallel where it is large enough to pay.
///
/// # Safety
/// `target` must be valid for `layout.bytes()` bytes, aligned to four, and used by no one else.
pub(crate) unsafe fn pack_b(set: &KernelSet, layout: &Layout, b: &MatRef<'_>, target: *mut u32) {
    let panels = layout.panels();
    let target = SharedPtr(target);
    let one = |task: usize| {
        let (block, panel) = (task / panels, task % panels);
        let (first, vectors) = layout.panel(panel);
        // SAFETY: panels are disjoint parts of the target.
        unsafe {
            let target = target.get().add(layout.offset(block, first));
            pack_panel(set, layout, b, block, first, vectors, target);
        }
    };
    let tasks = panels * layout.blocks();
    if layout.k * layout.n < 16 * 1024 {
        (0..tasks).for_each(one);
    } else {
        par_for(tasks, one);
    }
}

/// Packs one panel of one block: `target[unit][vectors * 16]`, padded with zeros.
///
/// # Safety
/// `target` must be valid for `units * vectors * 16` writes.
pub(crate) unsafe fn pack_panel(
    set: &KernelSet,
    layout: &Layout,
    b: &MatRef<'_>,
    block: usize,
    first_vector: usize,
    vectors: usize,
    target: *mut u32,
) {
    let (k0, k1) = layout.k_range(block);
    let n0 = first_vector * LANES;
    let columns = (layout.n - n0).min(vectors * LANES);
    let units = layout.units_of(block);
    let width = vectors * LANES;
    let depth = set.unit.depth();
    if b.col_stride() == 1 && columns > 1 {
        let shape = Interleave {
            rows: k1 - k0,
            stride: b.row_stride(),
            count: columns,
            unit_pitch: width,
            chunk: LANES,
            chunk_pitch: LANES,
        };
        // SAFETY: rows k0..k1 hold `columns` elements from n0; each row of the target holds `width`
        // units.
        unsafe {
            interleave_rows(set, shape, b.at(k0, n0), target);
            if columns < width {
                for unit in 0..units {
                    let rest = target.add(unit * width + columns);
                    rest.write_bytes(0, width - columns);
                }
            }
        }
    } else if b.row_stride() == 1 {
        let columns_of_b = b.t();
        let mut square = [0_u32; LANES * LANES];
        for vector in 0..vectors {
            let n = n0 + vector * LANES;
            let lanes = columns.saturating_sub(vector * LANES).min(LANES);
            if lanes < LANES {
                square.fill(0);
            }
            for unit in (0..units).step_by(LANES) {
                let k = k0 + unit * depth;
                let count = (k1 - k).min(LANES * depth);
                let chunk = (units - unit).min(LANES);
                if count < chunk * depth {
                    square.fill(0);
                }
                // SAFETY: `count` elements fit in one row of the square; the target holds `chunk`
                // rows of sixteen units from here.
                unsafe {
                    for lane in 0..lanes {
                        let run = columns_of_b.row_run(n + lane, k, count);
                        convert_run(set, run, square.as_mut_ptr().add(lane * LANES).cast());
                    }
                    let to = target.add(unit * width + vector * LANES);
                    transpose16(set, square.as_ptr(), to, width, chunk);
                }
            }
        }
    } else {
        for unit in 0..units {
            for column in 0..width {
                let mut pair = [0.0_f32; 2];
                for (d, value) in pair.iter_mut().enumerate().take(depth) {
                    let k = k0 + unit * depth + d;
                    if column < columns && k < k1 {
                        *value = b.get(k, n0 + column);
                    }
                }
                // SAFETY: the position lies inside the panel.
                unsafe {
                    let to = target.add(unit * width + column);
                    interleave(set, &raw const pair[0], Some(&raw const pair[1]), 1, to);
                }
            }
        }
    }
}

/// Rows of A that lie side by side where A is stored by columns: those of a full tile.
const GROUP: usize = MAX_ROWS;

/// A packed block of A: where each row starts, and the step between its units.
pub(crate) struct ABlock {
    base: *const u8,
    /// Rows are grouped: `group` rows are four bytes apart, groups `group_bytes` apart.
    group: usize,
    group_bytes: usize,
    /// Bytes between the units of a row.
    pub(crate) step: usize,
}

impl ABlock {
    #[inline]
    pub(crate) fn row(&self, row: usize) -> *const u8 {
        self.base
            .wrapping_add(row / self.group * self.group_bytes + row % self.group * 4)
    }

    /// Scratch bytes that [`ABlock::pack`] needs for `rows` rows of any block of `layout`.
    pub(crate) fn bytes(layout: &Layout, rows: usize) -> usize {
        rows.next_multiple_of(LANES) * row_pitch(layout.block_units)
    }

    /// Packs rows `m0..m0 + rows` of one block of K.
    ///
    /// # Safety
    /// `scratch` must be valid for [`ABlock::bytes`] and outlive the block.
    pub(crate) unsafe fn pack(
        set: &KernelSet,
        layout: &Layout,
        a: &MatRef<'_>,
        m0: usize,
        rows: usize,
        block: usize,
        scratch: *mut u8,
    ) -> ABlock {
        let (k0, k1) = layout.k_range(block);
        let units = layout.units_of(block);
        if a.col_stride() == 1 || a.row_stride() != 1 || rows == 1 {
            let pitch = row_pitch(units);
            let size = set.unit.element_bytes();
            for row in 0..rows {
                // SAFETY: `rows * pitch` bytes fit in the scratch; a row holds `units * 4` bytes.
                unsafe {
                    let to = scratch.add(row * pitch);
                    if a.col_stride() == 1 {
                        convert_run(set, a.row_run(m0 + row, k0, k1 - k0), to);
                    } else {
                        for k in k0..k1 {
                            convert_run(set, &[a.get(m0 + row, k)], to.add((k - k0) * size));
                        }
                    }
                    to.add((k1 - k0) * size)
                        .write_bytes(0, units * 4 - (k1 - k0) * size);
                }
            }
            return ABlock {
                base: scratch,
                group: 1,
                group_bytes: pitch,
                step: 4,
            };
        }
        // Neighbouring rows are contiguous: a tile's rows share half a cache line per unit. Groups are
        // one line longer than their units, since groups whole pages apart would share cache sets.
        let group_bytes = units * GROUP * 4 + 64;
        let shape = Interleave {
            rows: k1 - k0,
            stride: a.col_stride(),
            count: rows,
            unit_pitch: GROUP,
            chunk: GROUP,
            chunk_pitch: group_bytes / 4,
        };
        // SAFETY: columns k0..k1 hold `rows` elements from m0; groups fit in the scratch.
        unsafe { interleave_rows(set, shape, a.at(m0, k0), scratch.cast()) };
        ABlock {
            base: scratch,
            group: GROUP,
            group_bytes,
            step: GROUP * 4,
        }
    }
}

/// Bytes between packed rows: whole cache lines, and never a multiple of a page, which would put all
/// rows of a tile into one cache set.
fn row_pitch(units: usize) -> usize {
    units.next_multiple_of(LANES) * 4 + 64
}

// A pair unit is read and written as one `u32`; the order of its halves is part of the layout.
const _: () = assert!(cfg!(target_endian = "little"));
