//! Where a product goes: what is done to a tile of sums while it is in the first-level cache.

use super::activations::{Activations, Format};
use super::weight::PackedLinear;
use crate::gemm::Activation;
use crate::math::activate;
use crate::pool::SharedPtr;
use crate::simd::{Level, Simd, prefetch_line, simd_kernel};

/// The epilogue of a product, shared by its tasks.
pub(crate) enum Sink<'a> {
    /// `out = activation(sum + bias)`, rows `pitch` values apart.
    Store {
        out: SharedPtr<f32>,
        pitch: usize,
        activation: Activation,
    },
    /// `out = sum + bias`, the columns of each head together: `[heads][rows][dim]`, `head_pitch` values
    /// apart, for `dim` a multiple of 16.
    Heads {
        out: SharedPtr<f32>,
        dim: usize,
        head_pitch: usize,
    },
    /// `x += gate * (sum + bias)`, rows `pitch` values apart; sample `row / tokens` has the gate at
    /// `gate[sample * gate_pitch ..]` (without a gate: 1).
    Residual {
        x: SharedPtr<f32>,
        pitch: usize,
        gate: Option<&'a [f32]>,
        gate_pitch: usize,
        tokens: usize,
    },
    /// The input of the next product: `activation(sum + bias)`, or with a gate
    /// `activation(gate) * (sum + bias)`.
    Pack {
        to: &'a Activations,
        activation: Activation,
    },
}

/// The rectangle of a tile.
pub(crate) struct Target {
    pub(crate) row: usize,
    pub(crate) rows: usize,
    pub(crate) column: usize,
    pub(crate) columns: usize,
    /// Values between rows of the sums.
    pub(crate) width: usize,
}

impl Sink<'_> {
    /// Asks for what [`Sink::finish`] will read, some thousand cycles ahead of it.
    #[inline]
    pub(super) fn fetch(&self, target: &Target) {
        let Sink::Residual { x, pitch, .. } = self else {
            return;
        };
        for row in target.row..target.row + target.rows {
            let line = x.get().wrapping_add(row * pitch + target.column);
            // A panel need not begin on a cache line.
            for at in (0..target.columns).step_by(16).chain([target.columns - 1]) {
                prefetch_line(line.wrapping_add(at).cast_const());
            }
        }
    }

    /// Finishes a tile of sums.
    ///
    /// # Safety
    /// `sums` (and the gate's) must hold `target.rows` rows of `target.width` values that nobody else
    /// uses; what the sink refers to must be valid for the target, which this call owns.
    pub(super) unsafe fn finish(
        &self,
        level: Level,
        weight: &PackedLinear,
        acts: &Activations,
        target: &Target,
        sums: *mut f32,
        gate: Option<(&PackedLinear, *mut f32)>,
    ) {
        let columns = target.columns;
        // SAFETY: the caller vouches for the rows; scales exist for every row of integers.
        let row_scales = unsafe {
            match acts.format {
                Format::Int8 => {
                    std::slice::from_raw_parts(acts.scale(target.row).cast_const(), target.rows)
                }
                Format::Float => &[],
            }
        };
        let tile_of = |layer, sums: *mut f32| Tile {
            sums: Lines {
                first: sums,
                pitch: target.width,
                rows: target.rows,
                columns,
                heads: None,
            },
            affine: Affine::new(layer, target.column, columns, row_scales),
        };
        let tile = tile_of(weight, sums);
        let gate = gate.map(|(layer, gates)| tile_of(layer, gates));
        match self {
            Sink::Store {
                out,
                pitch,
                activation,
            } => {
                let out = Lines {
                    first: out.get().wrapping_add(target.row * pitch + target.column),
                    pitch: *pitch,
                    rows: target.rows,
                    columns,
                    heads: None,
                };
                activated(level, &tile, gate.as_ref(), *activation, &out);
            }
            Sink::Heads {
                out,
                dim,
                head_pitch,
            } => {
                let out = Lines {
                    first: out.get().wrapping_add(target.row * dim),
                    pitch: *dim,
                    rows: target.rows,
                    columns,
                    heads: Some((target.column, *head_pitch)),
                };
                activated(level, &tile, gate.as_ref(), Activation::None, &out);
            }
            Sink::Residual {
                x,
                pitch,
                gate,
                gate_pitch,
                tokens,
            } => {
                // Rows of one sample share a gate.
                let mut i = 0;
                while i < target.rows {
                    let row = target.row + i;
                    let sample = row / tokens;
                    let end = target.rows.min((sample + 1) * tokens - target.row);
                    let gate =
                        gate.map(|gate| &gate[sample * gate_pitch + target.column..][..columns]);
                    let x = Lines {
                        first: x.get().wrapping_add(row * pitch + target.column),
                        pitch: *pitch,
                        rows: end - i,
                        columns,
                        heads: None,
                    };
                    add(level, &tile.part(i, end - i), gate, &x);
                    i = end;
                }
            }
            Sink::Pack { to, activation } => {
                // Finished where the sums are, then converted.
                activated(level, &tile, gate.as_ref(), *activation, &tile.sums);
                // SAFETY: the sums hold these rows; the caller vouches for the target.
                unsafe {
                    to.write_parts(target.row, target.column, &tile.sums);
                }
            }
        }
    }
}

/// The sums of a tile and what turns them into a layer's output.
#[derive(Clone, Copy)]
struct Tile<'a> {
    /// Whole vectors may be read of each row.
    sums: Lines,
    affine: Affine<'a>,
}

impl Tile<'_> {
    /// `rows` rows from `row` on.
    fn part(&self, row: usize, rows: usize) -> Self {
        let scales = self.affine.row_scales;
        Tile {
            sums: Lines {
                first: self.sums.first.wrapping_add(row * self.sums.pitch),
                rows,
                ..self.sums
            },
            affine: Affine {
                row_scales: scales.get(row..).unwrap_or(&[]),
                ..self.affine
            },
        }
    }
}

/// Rows of values in memory that whoever made this vouches for.
#[derive(Clone, Copy)]
pub(crate) struct Lines {
    pub(crate) first: *mut f32,
    /// Values between rows.
    pub(crate) pitch: usize,
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    /// The first column's number, and values between heads of `pitch` columns, where the columns of
    /// each head lie apart from those of the others.
    pub(crate) heads: Option<(usize, usize)>,
}

impl Lines {
    /// Where a row's values from `column` on are.
    #[inline(always)]
    fn at(&self, row: usize, column: usize) -> *mut f32 {
        let column = match self.heads {
            None => column,
            Some((first, head_pitch)) => {
                let column = first + column;
                column / self.pitch * head_pitch + column % self.pitch
            }
        };
        self.first.wrapping_add(row * self.pitch + column)
    }

    /// Reads a vector, or what the row has left.
    ///
    /// # Safety
    /// The row must be valid.
    #[inline(always)]
    unsafe fn load<S: Simd>(&self, s: S, row: usize, column: usize) -> S::V {
        // SAFETY: the caller's contract; only values of the row are read.
        unsafe {
            if column + S::LANES <= self.columns {
                s.load_ptr(self.at(row, column))
            } else {
                let rest = self.columns - column;
                s.load_part(std::slice::from_raw_parts(self.at(row, column), rest))
            }
        }
    }

    /// Writes a vector, or what the row has left.
    ///
    /// # Safety
    /// The row must be valid and nobody else use it.
    #[inline(always)]
    unsafe fn store<S: Simd>(&self, s: S, row: usize, column: usize, y: S::V) {
        // SAFETY: the caller's contract; only values of the row are written.
        unsafe {
            if column + S::LANES <= self.columns {
                s.store_ptr(self.at(row, column), y);
            } else {
                let rest = self.columns - column;
                s.store_part(
                    std::slice::from_raw_parts_mut(self.at(row, column), rest),
                    y,
                );
            }
        }
    }
}

/// `activation(sums)`, or with a gate `activation(gate) * sums`. The output may be the sums.
fn activated(
    level: Level,
    tile: &Tile<'_>,
    gate: Option<&Tile<'_>>,
    activation: Activation,
    out: &Lines,
) {
    match gate {
        Some(gate) => {
            activate_tile(level, gate, activation, &gate.sums);
            multiply_tile(level, tile, &gate.sums, out);
        }
        None => activate_tile(level, tile, activation, out),
    }
}

/// `x += gate * sums`.
fn add(level: Level, tile: &Tile<'_>, gate: Option<&[f32]>, x: &Lines) {
    add_tile(level, tile, gate, x);
}

/// What turns sums into a layer's output: `sum * scale + bias` with per-column scales for integers.
#[derive(Clone, Copy)]
struct Affine<'a> {
    /// Empty for floats.
    scales: &'a [f32],
    /// One per row; empty for floats.
    row_scales: &'a [f32],
    /// Empty without a bias.
    bias: &'a [f32],
}

impl<'a> Affine<'a> {
    fn new(weight: &'a PackedLinear, column: usize, columns: usize, row_scales: &'a [f32]) -> Self {
        let part = |all: &'a [f32]| all.get(column..column + columns).unwrap_or(&[]);
        Affine {
            scales: part(weight.scales()),
            row_scales,
            bias: weight.bias.as_deref().map_or(&[], part),
        }
    }
}

/// Evaluates `$body` for each vector `$y` of the layer's output, at `$row` and `$column`; column by
/// column, so that what belongs to a column is read once. A macro, because a closure is not compiled
/// for the kernel's instruction set.
macro_rules! for_each {
    ($s:ident, $tile:ident, $row:ident, $column:ident, $y:ident => $body:expr) => {
        let Tile { sums, affine } = $tile;
        for $column in (0..sums.columns).step_by(S::LANES) {
            let bias = match affine.bias {
                [] => $s.splat(0.0),
                bias => $s.load_at(bias, $column),
            };
            if affine.row_scales.is_empty() {
                for $row in 0..sums.rows {
                    // SAFETY: rows of sums are whole vectors.
                    let $y = $s.add(unsafe { $s.load_ptr(sums.at($row, $column)) }, bias);
                    $body
                }
            } else {
                let scales = $s.load_at(affine.scales, $column);
                for ($row, &scale) in affine.row_scales.iter().enumerate().take(sums.rows) {
                    let scale = $s.mul(scales, $s.splat(scale));
                    // SAFETY: as above.
                    let sum = unsafe { $s.load_ptr(sums.at($row, $column)) };
                    let $y = $s.add($s.mul(sum, scale), bias);
                    $body
                }
            }
        }
    };
}

simd_kernel! {
    fn activate_tile<S>(s, tile: &Tile<'_>, activation: Activation, out: &Lines) {
        macro_rules! apply {
            ($activation:expr) => {{
                for_each!(s, tile, row, column, y => {
                    let y = activate(s, $activation, y);
                    // SAFETY: whoever made the lines vouches for them.
                    unsafe { out.store(s, row, column, y) };
                });
            }};
        }
        // One loop per activation.
        match activation {
            Activation::None => apply!(Activation::None),
            Activation::Relu => apply!(Activation::Relu),
            Activation::Silu => apply!(Activation::Silu),
            Activation::GeluTanh => apply!(Activation::GeluTanh),
        }
    }
}

simd_kernel! {
    fn add_tile<S>(s, tile: &Tile<'_>, gate: Option<&[f32]>, x: &Lines) {
        match gate {
            Some(gate) => {
                for_each!(s, tile, row, column, y => {
                    // SAFETY: whoever made the lines vouches for them.
                    unsafe {
                        let new = s.fma(s.load_at(gate, column), y, x.load(s, row, column));
                        x.store(s, row, column, new);
                    }
                });
            }
            None => {
                for_each!(s, tile, row, column, y => {
                    // SAFETY: as above.
                    unsafe {
                        let new = s.add(x.load(s, row, column), y);
                        x.store(s, row, column, new);
                    }
                });
            }
        }
    }
}

simd_kernel! {
    /// `out = factors * (sums * scale + bias)`.
    fn multiply_tile<S>(s, tile: &Tile<'_>, factors: &Lines, out: &Lines) {
        for_each!(s, tile, row, column, y => {
            // SAFETY: whoever made the lines vouches for them.
            unsafe { out.store(s, row, column, s.mul(factors.load(s, row, column), y)) };
        });
    }
}
