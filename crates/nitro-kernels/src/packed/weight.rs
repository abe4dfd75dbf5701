//! Weights in packed form.

use half::{bf16, f16};

use super::activations::{Format, ZERO, quantize_row};
use super::memory::Piece;
use crate::error::{KernelError, check_eq};
use crate::gemm::{KernelSet, LANES, convert_run, transpose16};
use crate::isa::{Isa, Precision};
use crate::pool::{Scratch, SharedPtr, par_for};

/// How a file stores an element, little-endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ElementType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of a single.
    Bf16,
}

impl ElementType {
    /// Bytes of an element.
    pub fn bytes(self) -> usize {
        match self {
            ElementType::F32 => 4,
            ElementType::F16 | ElementType::Bf16 => 2,
        }
    }
}

/// A `[rows, columns]` matrix in the bytes of a file, at any alignment.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    bytes: &'a [u8],
    element: ElementType,
    rows: usize,
    columns: usize,
}

impl<'a> Rows<'a> {
    /// The matrix whose elements `bytes` holds row by row.
    ///
    /// # Errors
    /// If `bytes` is not as long as the shape says.
    pub fn new(
        bytes: &'a [u8],
        element: ElementType,
        rows: usize,
        columns: usize,
    ) -> Result<Self, KernelError> {
        let needed = rows.saturating_mul(columns).saturating_mul(element.bytes());
        check_eq("bytes of a matrix", needed, bytes.len())?;
        Ok(Rows {
            bytes,
            element,
            rows,
            columns,
        })
    }

    /// A matrix in memory.
    ///
    /// # Errors
    /// As [`Rows::new`].
    pub fn from_f32(values: &'a [f32], rows: usize, columns: usize) -> Result<Self, KernelError> {
        // SAFETY: any f32 is four plain bytes; the slice covers the same memory.
        let bytes = unsafe {
            std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), size_of_val(values))
        };
        Rows::new(bytes, ElementType::F32, rows, columns)
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Elements of a row.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Writes row `row` as f32.
    ///
    /// # Panics
    /// If there is no such row, or `to` does not hold one row.
    pub fn read(&self, row: usize, to: &mut [f32]) {
        assert_eq!(to.len(), self.columns, "room for one row");
        let size = self.columns * self.element.bytes();
        let bytes = &self.bytes[row * size..(row + 1) * size];
        match self.element {
            ElementType::F32 => {
                for (to, b) in to.iter_mut().zip(bytes.as_chunks::<4>().0) {
                    *to = f32::from_le_bytes(*b);
                }
            }
            ElementType::Bf16 => {
                for (to, b) in to.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *to = bf16::from_le_bytes(*b).to_f32();
                }
            }
            ElementType::F16 => {
                for (to, b) in to.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *to = f16::from_le_bytes(*b).to_f32();
                }
            }
        }
    }
}

/// Units of K that a panel's sums run over before they go to memory: 1152 units of bf16 are a panel
/// of 216 KiB, a fifth of the second-level cache, which leaves room for the rows it is multiplied
/// with.
const BLOCK_UNITS: usize = 1152;

/// One or more linear layers over the same input, `y = x W^T + b`, packed for one precision.
pub struct PackedLinear {
    pub(super) set: KernelSet,
    pub(super) format: Format,
    precision: Precision,
    /// Inputs.
    pub(super) k: usize,
    /// Outputs of all layers.
    pub(super) n: usize,
    pub(super) units: usize,
    /// Units in every block of K but the last.
    pub(super) block_units: usize,
    /// Vectors of a full panel.
    panel_vectors: usize,
    pub(super) bias: Option<Vec<f32>>,
    /// Integers: the scale of each column, to whole vectors.
    pub(super) scales: Vec<f32>,
    /// Integers: where sums start, `[block][column]`: minus what the offset of the activations adds.
    pub(super) starts: Vec<i32>,
    memory: Piece,
}

impl std::fmt::Debug for PackedLinear {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PackedLinear")
            .field("inputs", &self.k)
            .field("outputs", &self.n)
            .field("precision", &self.precision)
            .field("isa", &self.set.isa)
            .finish_non_exhaustive()
    }
}

impl PackedLinear {
    /// Packs the weights `[outputs, inputs]` of layers whose outputs lie one after the other, with
    /// their biases (all layers', or none).
    ///
    /// # Errors
    /// If the layers have different numbers of inputs, or the bias is not as long as the outputs.
    pub fn new(
        layers: &[Rows<'_>],
        bias: Option<Vec<f32>>,
        precision: Precision,
    ) -> Result<Self, KernelError> {
        Self::with_isa(Isa::current(), layers, bias, precision)
    }

    /// [`PackedLinear::new`] for a given instruction set.
    ///
    /// # Errors
    /// As [`PackedLinear::new`].
    pub fn with_isa(
        isa: Isa,
        layers: &[Rows<'_>],
        bias: Option<Vec<f32>>,
        precision: Precision,
    ) -> Result<Self, KernelError> {
        let set = KernelSet::new(isa, precision);
        let format = match precision {
            Precision::Int8 => Format::Int8,
            Precision::F32 | Precision::Bf16 => Format::Float,
        };
        let k = layers.first().map_or(0, Rows::columns);
        for layer in layers {
            check_eq("inputs of stacked linear layers", k, layer.columns())?;
        }
        let n = layers.iter().map(Rows::rows).sum();
        if let Some(bias) = &bias {
            check_eq("bias values of a linear layer", n, bias.len())?;
        }
        let units = k.div_ceil(format.depth(&set));
        let blocks = units.div_ceil(BLOCK_UNITS).max(1);
        let vectors = n.div_ceil(LANES);
        let padded = vectors * LANES;
        let integers = if format == Format::Int8 { padded } else { 0 };
        let mut packed = PackedLinear {
            set,
            format,
            precision,
            k,
            n,
            units,
            block_units: units.div_ceil(blocks),
            panel_vectors: set.vectors,
            bias,
            scales: vec![0.0; integers],
            starts: vec![0; integers * blocks],
            memory: Piece::new(units * padded * 4),
        };
        packed.fill(layers);
        Ok(packed)
    }

    fn fill(&mut self, layers: &[Rows<'_>]) {
        let vectors = self.n.div_ceil(LANES);
        let memory = SharedPtr(self.memory.as_mut_ptr().cast::<u32>());
        let scales = SharedPtr(self.scales.as_mut_ptr());
        let starts = SharedPtr(self.starts.as_mut_ptr());
        let this = &*self;
        par_for(vectors, |vector| {
            let (panel, width) = this.panel_of(vector);
            let lane_at = vector * LANES - panel * this.panel_vectors * LANES;
            let units = this.units.next_multiple_of(LANES);
            let row_bytes = units * 4;
            let mut converted = Scratch::take(LANES * row_bytes);
            let mut row = vec![0.0_f32; this.k];
            let base = converted.as_mut_ptr();
            let mut totals = vec![0_i32; this.blocks() * LANES];
            for lane in 0..LANES {
                // SAFETY: sixteen rows of `row_bytes` fit in the scratch.
                let to = unsafe {
                    std::slice::from_raw_parts_mut(base.add(lane * row_bytes), row_bytes)
                };
                to.fill(0);
                if !read_row(layers, vector * LANES + lane, &mut row) {
                    continue;
                }
                match this.format {
                    // SAFETY: a converted row is at most as long as its units.
                    Format::Float => unsafe { convert_run(&this.set, &row, to.as_mut_ptr()) },
                    Format::Int8 => {
                        let mut scale = 0.0;
                        quantize_row(this.set.isa, &row, &mut to[..row.len()], &mut scale);
                        // Weights are signed.
                        to[..row.len()].iter_mut().for_each(|b| *b ^= 0x80);
                        // SAFETY: each vector owns its sixteen scales.
                        unsafe { *scales.get().add(vector * LANES + lane) = scale };
                        for (block, bytes) in to.chunks(this.block_units.max(1) * 4).enumerate() {
                            if let Some(total) = totals.get_mut(block * LANES + lane) {
                                *total = bytes.iter().map(|&b| i32::from(b as i8)).sum();
                            }
                        }
                    }
                }
            }
            if this.format == Format::Int8 {
                for block in 0..this.blocks() {
                    for lane in 0..LANES {
                        let at = block * vectors * LANES + vector * LANES + lane;
                        // SAFETY: each vector owns sixteen sums of each block.
                        unsafe {
                            *starts.get().add(at) = -(ZERO as i32) * totals[block * LANES + lane];
                        }
                    }
                }
            }
            let mut square = [0_u32; LANES * LANES];
            for unit in (0..this.units).step_by(LANES) {
                for lane in 0..LANES {
                    // SAFETY: rows are padded to whole groups of sixteen units.
                    unsafe {
                        let from = base.add(lane * row_bytes + unit * 4).cast::<u32>();
                        let to = square.as_mut_ptr().add(lane * LANES);
                        std::ptr::copy_nonoverlapping(from, to, LANES);
                    }
                }
                let count = (this.units - unit).min(LANES);
                // SAFETY: the panel holds `width` values per unit; each vector owns its lanes.
                unsafe {
                    let start = this.panel_start(panel);
                    let to = memory.get().add(start + unit * width + lane_at);
                    transpose16(&this.set, square.as_ptr(), to, width, count);
                }
            }
        });
    }

    /// The panel that column vector `vector` lies in, and that panel's width.
    fn panel_of(&self, vector: usize) -> (usize, usize) {
        let panel = vector / self.panel_vectors;
        (panel, self.panel_width(panel))
    }

    /// Columns of a panel, to whole vectors.
    pub(super) fn panel_width(&self, panel: usize) -> usize {
        let vectors = self.n.div_ceil(LANES);
        (vectors - panel * self.panel_vectors).min(self.panel_vectors) * LANES
    }

    /// The first column of a panel.
    pub(super) fn panel_column(&self, panel: usize) -> usize {
        panel * self.panel_vectors * LANES
    }

    pub(super) fn panels(&self) -> usize {
        self.n.div_ceil(LANES).div_ceil(self.panel_vectors)
    }

    pub(super) fn blocks(&self) -> usize {
        self.units.div_ceil(self.block_units.max(1)).max(1)
    }

    /// Where a panel begins, in units of four bytes.
    fn panel_start(&self, panel: usize) -> usize {
        self.panel_column(panel) * self.units
    }

    /// The packed panel, `[unit][width]`.
    pub(super) fn panel(&self, panel: usize) -> *const u32 {
        self.memory
            .as_ptr()
            .cast::<u32>()
            .wrapping_add(self.panel_start(panel))
    }

    /// Bytes of a panel.
    pub(super) fn panel_bytes(&self, panel: usize) -> usize {
        self.panel_width(panel) * self.units * 4
    }

    /// Inputs of every layer.
    pub fn inputs(&self) -> usize {
        self.k
    }

    /// Outputs of all layers together.
    pub fn outputs(&self) -> usize {
        self.n
    }

    /// How products are computed.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Whether float activations of `other` and of this layer have the same form.
    pub(crate) fn is_packed_like(&self, other: &Self) -> bool {
        self.set.isa == other.set.isa && self.set.unit == other.set.unit
    }

    pub(crate) fn set(&self) -> KernelSet {
        self.set
    }

    pub(crate) fn format(&self) -> Format {
        self.format
    }

    /// Bytes of the packed weights.
    pub fn bytes(&self) -> usize {
        self.memory.len()
    }

    /// The weights as the products see them, `[outputs, inputs]`: rounded or quantised. For tests
    /// and for exporting.
    pub fn to_f32(&self) -> Vec<f32> {
        let depth = self.format.depth(&self.set);
        let mut out = vec![0.0; self.n * self.k];
        for column in 0..self.n {
            let (panel, width) = self.panel_of(column / LANES);
            let lane = column - self.panel_column(panel);
            for k in 0..self.k {
                // SAFETY: inside the panel.
                let unit = unsafe { *self.panel(panel).add(k / depth * width + lane) };
                let part = unit >> (k % depth * (32 / depth));
                out[column * self.k + k] = match depth {
                    4 => f32::from(part as u8 as i8) * self.scales[column],
                    2 => f32::from_bits(part << 16),
                    _ => f32::from_bits(unit),
                };
            }
        }
        out
    }
}

/// Row `row` of stacked layers, if there is one.
fn read_row(layers: &[Rows<'_>], mut row: usize, to: &mut [f32]) -> bool {
    for layer in layers {
        if row < layer.rows() {
            layer.read(row, to);
            return true;
        }
        row -= layer.rows();
    }
    false
}
