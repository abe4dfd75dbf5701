//! Products of activations with packed weights, as tasks for a pool of threads.

use super::activations::Activations;
use super::sink::{Sink, Target};
use super::tile::{PanelFn, PanelTile, TILE_ROWS, kernel};
use super::weight::PackedLinear;
use crate::error::{KernelError, check_eq, check_len};
use crate::gemm::Activation;
use crate::pool::{Scratch, SharedPtr, num_threads, par_phases};
use crate::simd::Level;

/// Bytes of activations that a thread multiplies with one panel after the other: they are to stay in
/// the second-level cache beside the panel at hand and the one on its way.
const CHUNK_BYTES: usize = 400 << 10;

/// Bytes of packed input that a linear layer holds at once, and the rows that it takes in any case.
const INPUT_BYTES: usize = 16 << 20;
const MIN_ROWS: usize = 1024;

/// Rows that one packing task writes.
pub(crate) const PACK_ROWS: usize = 8;

/// One product, cut into tasks: a chunk of rows by one panel of columns.
pub(crate) struct Product<'a> {
    weight: &'a PackedLinear,
    /// A second layer over the same input, multiplied along (the gate of a gated unit).
    gate: Option<&'a PackedLinear>,
    rows: usize,
    /// Rows of a chunk; a multiple of the tile's, but for the last.
    chunk: usize,
    chunks: usize,
    /// How many panels of the last chunk are cut into how many pieces of rows.
    last_panels: usize,
    pieces: usize,
    kernel: PanelFn,
    level: Level,
    threads: usize,
    /// The first panel of the product after this one, fetched by the last tasks.
    next: Option<&'a PackedLinear>,
}

impl<'a> Product<'a> {
    pub(crate) fn new(weight: &'a PackedLinear, rows: usize) -> Self {
        let threads = num_threads();
        let fits = CHUNK_BYTES / (weight.block_units * 4).max(1);
        let mut chunks = rows.div_ceil(fits.max(TILE_ROWS)).max(1);
        // Enough tasks for all threads.
        if weight.panels() * chunks < 4 * threads {
            let wanted = (4 * threads).div_ceil(weight.panels().max(1));
            chunks = wanted.min(rows.div_ceil(2 * TILE_ROWS)).max(chunks);
        }
        let chunk = rows.div_ceil(chunks).next_multiple_of(TILE_ROWS);
        let chunks = rows.div_ceil(chunk.max(1));
        // Each thread's last panel is cut into pieces of two tiles and more, so that all finish
        // together.
        let last_rows = rows - chunks.saturating_sub(1) * chunk;
        let pieces = (last_rows / (2 * TILE_ROWS)).clamp(1, 4);
        let cut = threads > 1 && pieces > 1 && weight.panels() >= threads;
        Product {
            weight,
            gate: None,
            rows,
            chunk,
            chunks,
            pieces: if cut { pieces } else { 1 },
            last_panels: if cut { threads } else { 0 },
            kernel: kernel(&weight.set, weight.format),
            level: Level::of(weight.set.isa),
            threads,
            next: None,
        }
    }

    /// With the gate of a gated unit, a layer of the same shape.
    pub(crate) fn gated(mut self, gate: Option<&'a PackedLinear>) -> Self {
        self.gate = gate;
        self
    }

    /// With the weights that are needed next.
    pub(crate) fn before(mut self, next: Option<&'a PackedLinear>) -> Self {
        self.next = next;
        self
    }

    pub(crate) fn tasks(&self) -> usize {
        self.whole_tasks() + self.last_panels * self.pieces
    }

    /// Tasks of a whole chunk by a panel.
    fn whole_tasks(&self) -> usize {
        self.chunks * self.weight.panels() - self.last_panels
    }

    /// The panel and the rows of a task, and whether it is the first of its panel.
    fn place(&self, task: usize) -> (usize, std::ops::Range<usize>, bool) {
        let panels = self.weight.panels();
        if task < self.whole_tasks() {
            let start = task / panels * self.chunk;
            return (
                task % panels,
                start..(start + self.chunk).min(self.rows),
                true,
            );
        }
        let (panel, piece) = {
            let task = task - self.whole_tasks();
            (task / self.pieces, task % self.pieces)
        };
        let chunk = (self.chunks - 1) * self.chunk;
        let tiles = (self.rows - chunk).div_ceil(TILE_ROWS);
        let row = |piece: usize| (chunk + tiles * piece / self.pieces * TILE_ROWS).min(self.rows);
        (
            panels - self.last_panels + panel,
            row(piece)..row(piece + 1),
            piece == 0,
        )
    }

    /// Runs one task.
    ///
    /// # Safety
    /// `acts` must hold all rows, complete, in the weight's format; `sink` must be valid for all rows
    /// and columns, and what it writes be accessed by nobody else during the product.
    pub(crate) unsafe fn run(&self, task: usize, acts: &Activations, sink: &Sink<'_>) {
        let weight = self.weight;
        let (panel, rows, is_first) = self.place(task);
        let (start, end) = (rows.start, rows.end);
        let width = weight.panel_width(panel);
        let column = weight.panel_column(panel);
        let mut target = Target {
            row: start,
            rows: 0,
            column,
            columns: width.min(weight.n - column),
            width,
        };
        // The panel ahead is fetched evenly over all tiles of this one.
        let tiles = (end - start).div_ceil(TILE_ROWS);
        let steps = weight.units.max(2) / 2 * tiles;
        let last_chunk = start >= (self.chunks - 1) * self.chunk;
        let layers = [Some(weight), self.gate].map(|layer| {
            let layer = layer?;
            let (ahead, bytes) = match is_first {
                true => self.ahead(layer, panel, last_chunk),
                false => None,
            }
            .unwrap_or((layer.panel(0).cast(), 0));
            Some((layer, ahead, bytes.div_ceil(steps)))
        });
        // One buffer of sums per layer. Where K has one block, a tile is finished at once and eight
        // rows suffice.
        let blocks = weight.blocks();
        let buffer_rows = if blocks == 1 { TILE_ROWS } else { end - start };
        let size = buffer_rows * width;
        let mut scratch = Scratch::take(2 * size * 4);
        let sums: *mut f32 = scratch.as_mut_ptr().cast();
        for block in 0..blocks {
            let unit_at = block * weight.block_units;
            let units = (weight.units - unit_at).min(weight.block_units);
            let mut done = unit_at / 2 * tiles;
            for first in (start..end).step_by(TILE_ROWS) {
                target.row = first;
                target.rows = TILE_ROWS.min(end - first);
                let buffer_at = if blocks == 1 {
                    0
                } else {
                    (first - start) * width
                };
                if block + 1 == blocks {
                    sink.fetch(&target);
                }
                for (i, layer) in layers.iter().enumerate() {
                    let Some((layer, ahead, step)) = *layer else {
                        continue;
                    };
                    let tile = PanelTile {
                        a: acts.row(first).wrapping_add(unit_at * 4),
                        pitch: acts.pitch,
                        rows: target.rows,
                        b: layer.panel(panel).wrapping_add(unit_at * width),
                        units,
                        vectors: width / crate::gemm::LANES,
                        start: layer
                            .starts()
                            .as_ptr()
                            .wrapping_add(block * layer.scaled() + column),
                        c: sums.wrapping_add(i * size + buffer_at),
                        c_pitch: width,
                        accumulate: block > 0,
                        prefetch: ahead.wrapping_add(done * step),
                        prefetch_step: step,
                    };
                    // SAFETY: rows of `acts` and the panel hold `units` units from `unit_at`; the
                    // buffer holds the tile; integer layers have a start for each column.
                    unsafe { (self.kernel)(&layer.set, &tile) };
                }
                done += units / 2;
                if block + 1 == blocks {
                    // SAFETY: the caller's contract; tasks have disjoint parts of the result.
                    unsafe {
                        let values = sums.add(buffer_at);
                        let gate = self.gate.map(|gate| (gate, values.add(size)));
                        sink.finish(self.level, weight, acts, &target, values, gate);
                    }
                }
            }
        }
    }

    /// The panel that this thread (or another) will need after `panel`, and its bytes.
    fn ahead(
        &self,
        layer: &PackedLinear,
        panel: usize,
        last_chunk: bool,
    ) -> Option<(*const u8, usize)> {
        let (panel, panels) = (panel + self.threads, self.weight.panels());
        let (layer, panel) = match self.next {
            _ if panel < panels => (layer, panel),
            Some(next) if last_chunk => (next, panel - panels),
            _ => return None,
        };
        (panel < layer.panels()).then(|| (layer.panel(panel).cast(), layer.panel_bytes(panel)))
    }
}

/// The number of tasks that [`pack_task`] cuts `rows` rows into.
pub(crate) fn pack_tasks(rows: usize) -> usize {
    rows.div_ceil(PACK_ROWS)
}

/// The rows of a packing task.
pub(crate) fn pack_task(task: usize, rows: usize) -> std::ops::Range<usize> {
    task * PACK_ROWS..((task + 1) * PACK_ROWS).min(rows)
}

/// `out = activation(x W^T + b)` for `rows` rows: `x [rows, inputs]`, `out [rows, outputs]`.
///
/// # Errors
/// If `x` or `out` is not as long as the shapes say.
pub fn packed_linear(
    weight: &PackedLinear,
    x: &[f32],
    activation: Activation,
    out: &mut [f32],
) -> Result<(), KernelError> {
    let (k, n) = (weight.inputs(), weight.outputs());
    let rows = out.len() / n.max(1);
    check_eq("packed linear: values of the output", rows * n, out.len())?;
    check_len("packed linear: input", rows * k, x.len())?;
    check_eq("packed linear: values of the input", rows * k, x.len())?;
    if rows == 0 || n == 0 {
        return Ok(());
    }
    // Images have many rows (pixels): their packed form need not be held all at once.
    let together = (INPUT_BYTES / (k * 4 + 128)).max(MIN_ROWS);
    for start in (0..rows).step_by(together) {
        let end = (start + together).min(rows);
        let out = &mut out[start * n..end * n];
        linear_rows(weight, &x[start * k..end * k], activation, out);
    }
    Ok(())
}

/// [`packed_linear`] of rows whose packed form is held at once.
fn linear_rows(weight: &PackedLinear, x: &[f32], activation: Activation, out: &mut [f32]) {
    let (k, n) = (weight.inputs(), weight.outputs());
    let rows = out.len() / n;
    let acts = Activations::take(&weight.set, weight.format, rows, k);
    let product = Product::new(weight, rows);
    let sink = Sink::Store {
        out: SharedPtr(out.as_mut_ptr()),
        pitch: n,
        activation,
    };
    par_phases(&[pack_tasks(rows), product.tasks()], |phase, task| {
        if phase == 0 {
            for row in pack_task(task, rows) {
                // SAFETY: each task packs its own rows.
                unsafe { acts.write_row(row, &x[row * k..(row + 1) * k]) };
            }
        } else {
            // SAFETY: all rows were packed in the phase before; `out` holds all rows and columns.
            unsafe { product.run(task, &acts, &sink) };
        }
    });
}
