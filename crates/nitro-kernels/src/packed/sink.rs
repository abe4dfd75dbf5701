//! Where a product goes: what is done to a tile of sums while it is in the first-level cache.

use super::activations::{Activations, Format};
use super::tile::TILE_ROWS;
use super::weight::PackedLinear;
use crate::gemm::Activation;
use crate::math::activate;
use crate::pool::SharedPtr;
use crate::simd::{Level, Simd, simd_kernel};

/// The epilogue of a product, shared by its tasks.
pub(crate) enum Sink<'a> {
    /// `out = activation(sum + bias)`, rows `pitch` values apart.
    Store {
        out: SharedPtr<f32>,
        pitch: usize,
        activation: Activation,
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

/// The widest panel.
const MAX_WIDTH: usize = 48;

impl Sink<'_> {
    /// Finishes a tile of sums.
    ///
    /// # Safety
    /// `sums` (and the gate's) must hold `target.rows` rows of `target.width` values that nobody else
    /// uses; what the sink refers to must be valid for the target, which this call owns.
    pub(super) unsafe fn finish(
        &self,
        weight: &PackedLinear,
        acts: &Activations,
        target: &Target,
        sums: *mut f32,
        gate: Option<(&PackedLinear, *mut f32)>,
    ) {
        let level = Level::of(weight.set.isa);
        let columns = target.columns;
        // SAFETY: the caller vouches for the sums; scales exist for every row of integers.
        let row_scales = unsafe {
            match acts.format {
                Format::Int8 => {
                    std::slice::from_raw_parts(acts.scale(target.row).cast_const(), target.rows)
                }
                Format::Float => &[],
            }
        };
        let tile_of = |layer, sums: *mut f32| Tile {
            // SAFETY: as above.
            sums: unsafe { std::slice::from_raw_parts(sums, target.rows * target.width) },
            width: target.width,
            affine: Affine::new(layer, target.column, columns, row_scales),
        };
        let tile = tile_of(weight, sums);
        let gate_tile = gate.map(|(layer, gates)| tile_of(layer, gates));
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
                };
                // SAFETY: the caller vouches for the target.
                unsafe { activated(level, &tile, gate_tile.as_ref(), *activation, &out) };
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
                    };
                    // SAFETY: the caller vouches for the target.
                    unsafe { add(level, &tile.from(i), gate, &x) };
                    i = end;
                }
            }
            Sink::Pack { to, activation } => {
                let mut finished = [0.0_f32; TILE_ROWS * MAX_WIDTH];
                let out = Lines {
                    first: finished.as_mut_ptr(),
                    pitch: MAX_WIDTH,
                    rows: target.rows,
                    columns,
                };
                // SAFETY: the buffer holds a tile; the caller vouches for the target.
                unsafe {
                    activated(level, &tile, gate_tile.as_ref(), *activation, &out);
                    for (i, row) in finished
                        .chunks_exact(MAX_WIDTH)
                        .take(target.rows)
                        .enumerate()
                    {
                        to.write_part(target.row + i, target.column, &row[..columns]);
                    }
                }
            }
        }
    }
}

/// The sums of a tile and what turns them into a layer's output.
struct Tile<'a> {
    /// Rows of `width` values.
    sums: &'a [f32],
    width: usize,
    affine: Affine<'a>,
}

impl Tile<'_> {
    /// The rows from `row` on.
    fn from(&self, row: usize) -> Self {
        let scales = self.affine.row_scales;
        Tile {
            sums: &self.sums[row * self.width..],
            width: self.width,
            affine: Affine {
                row_scales: scales.get(row..).unwrap_or(&[]),
                ..self.affine
            },
        }
    }
}

/// Rows of results.
struct Lines {
    first: *mut f32,
    /// Values between rows.
    pitch: usize,
    rows: usize,
    columns: usize,
}

impl Lines {
    /// Row `row`.
    ///
    /// # Safety
    /// The rows must be valid and nobody else use them.
    unsafe fn row<'a>(&self, row: usize) -> &'a mut [f32] {
        // SAFETY: the caller's contract.
        unsafe { std::slice::from_raw_parts_mut(self.first.add(row * self.pitch), self.columns) }
    }
}

/// `activation(sums)`, or with a gate `activation(gate) * sums`.
///
/// # Safety
/// As [`Lines::row`].
unsafe fn activated(
    level: Level,
    tile: &Tile<'_>,
    gate: Option<&Tile<'_>>,
    activation: Activation,
    out: &Lines,
) {
    match gate {
        Some(gate) => {
            store(level, gate, activation, out);
            multiply(level, tile, out);
        }
        None => store(level, tile, activation, out),
    }
}

/// `x += gate * sums`.
///
/// # Safety
/// As [`Lines::row`].
unsafe fn add(level: Level, tile: &Tile<'_>, gate: Option<&[f32]>, x: &Lines) {
    add_raw(level, tile, gate, x);
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
            scales: part(&weight.scales),
            row_scales,
            bias: weight.bias.as_deref().map_or(&[], part),
        }
    }

    #[inline(always)]
    fn apply<S: Simd>(&self, s: S, row: usize, sum: S::V, at: usize) -> S::V {
        let mut y = sum;
        if let Some(&scale) = self.row_scales.get(row) {
            y = s.mul(y, s.mul(s.load_at(self.scales, at), s.splat(scale)));
        }
        if !self.bias.is_empty() {
            y = s.add(y, s.load_at(self.bias, at));
        }
        y
    }
}

simd_kernel! {
    /// The caller has the contract of [`Lines::row`].
    fn store<S>(s, tile: &Tile<'_>, activation: Activation, out: &Lines) {
        for row in 0..out.rows {
            let sums = &tile.sums[row * tile.width..][..out.columns];
            // SAFETY: the caller's contract.
            let out = unsafe { out.row(row) };
            for at in (0..sums.len()).step_by(S::LANES) {
                let y = tile.affine.apply(s, row, s.load_at(sums, at), at);
                s.store_at(out, at, activate(s, activation, y));
            }
        }
    }
}

simd_kernel! {
    /// The caller has the contract of [`Lines::row`].
    fn add_raw<S>(s, tile: &Tile<'_>, gate: Option<&[f32]>, x: &Lines) {
        for row in 0..x.rows {
            let sums = &tile.sums[row * tile.width..][..x.columns];
            // SAFETY: the caller's contract.
            let x = unsafe { x.row(row) };
            for at in (0..sums.len()).step_by(S::LANES) {
                let y = tile.affine.apply(s, row, s.load_at(sums, at), at);
                let old = s.load_at(x, at);
                let new = match gate {
                    Some(gate) => s.fma(s.load_at(gate, at), y, old),
                    None => s.add(old, y),
                };
                s.store_at(x, at, new);
            }
        }
    }
}

simd_kernel! {
    /// `out *= sums * scale + bias`. The caller has the contract of [`Lines::row`].
    fn multiply<S>(s, tile: &Tile<'_>, out: &Lines) {
        for row in 0..out.rows {
            let sums = &tile.sums[row * tile.width..][..out.columns];
            // SAFETY: the caller's contract.
            let out = unsafe { out.row(row) };
            for at in (0..sums.len()).step_by(S::LANES) {
                let y = tile.affine.apply(s, row, s.load_at(sums, at), at);
                s.store_at(out, at, s.mul(s.load_at(out, at), y));
            }
        }
    }
}
