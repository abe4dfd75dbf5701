//! Linear layers' weights in packed form.

use super::PackedForm;
use super::activations::{Format, ZERO, quantize_row};
use super::memory::{PackedBytes, Piece};
use super::rows::{Rows, read_row};
use crate::error::{KernelError, check_eq};
use crate::gemm::{KernelSet, LANES, convert_run, transpose16};
use crate::isa::{Isa, Precision};
use crate::pool::{Scratch, SharedPtr, par_for};

/// Units of K that a panel's sums run over before they go to memory: 1152 units of bf16 are a panel
/// of 216 KiB, a fifth of the second-level cache, which leaves room for the rows it is multiplied
/// with.
const BLOCK_UNITS: usize = 1152;

/// Counts changes of the order of packed weights that their [`PackedForm`] would not tell.
const LAYOUT: u32 = 1;

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
    /// Panels, then for integers the scales and the starts.
    bytes: PackedBytes,
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
        let k = layers.first().map_or(0, Rows::columns);
        for layer in layers {
            check_eq("inputs of stacked linear layers", k, layer.columns())?;
        }
        let n = layers.iter().map(Rows::rows).sum();
        let mut packed = Self::empty(isa, [n, k], precision).with_bias(bias)?;
        packed.bytes = packed.pack(layers);
        Ok(packed)
    }

    /// The layers whose weights were packed before, from [`PackedLinear::packed`]: `outputs` of all of
    /// them, over `inputs`.
    ///
    /// # Errors
    /// If `bytes` are not as long as [`PackedLinear::form`] says, or the bias is not as long as the
    /// outputs.
    pub fn from_packed(
        [outputs, inputs]: [usize; 2],
        bias: Option<Vec<f32>>,
        precision: Precision,
        bytes: PackedBytes,
    ) -> Result<Self, KernelError> {
        Self::from_packed_with_isa(Isa::current(), [outputs, inputs], bias, precision, bytes)
    }

    /// [`PackedLinear::from_packed`] for a given instruction set.
    ///
    /// # Errors
    /// As [`PackedLinear::from_packed`].
    pub fn from_packed_with_isa(
        isa: Isa,
        [outputs, inputs]: [usize; 2],
        bias: Option<Vec<f32>>,
        precision: Precision,
        bytes: PackedBytes,
    ) -> Result<Self, KernelError> {
        let mut packed = Self::empty(isa, [outputs, inputs], precision).with_bias(bias)?;
        check_eq("bytes of packed weights", packed.len(), bytes.len())?;
        packed.bytes = bytes;
        Ok(packed)
    }

    /// In what form this machine packs `[outputs, inputs]`.
    pub fn form([outputs, inputs]: [usize; 2], precision: Precision) -> PackedForm {
        let empty = Self::empty(Isa::current(), [outputs, inputs], precision);
        let isa = empty.set.isa.name();
        let (units, panel) = (empty.block_units, empty.panel_vectors);
        PackedForm {
            name: format!(
                "linear {LAYOUT} {isa} {precision:?} {outputs}x{inputs} blocks {units} panels {panel}"
            ),
            len: empty.len(),
        }
    }

    /// Everything but the weights.
    fn empty(isa: Isa, [n, k]: [usize; 2], precision: Precision) -> Self {
        let set = KernelSet::new(isa, precision);
        let format = match precision {
            Precision::Int8 => Format::Int8,
            Precision::F32 | Precision::Bf16 => Format::Float,
        };
        let units = k.div_ceil(format.depth(&set));
        let blocks = units.div_ceil(BLOCK_UNITS).max(1);
        PackedLinear {
            set,
            format,
            precision,
            k,
            n,
            units,
            block_units: units.div_ceil(blocks),
            panel_vectors: set.vectors,
            bias: None,
            bytes: PackedBytes::default(),
        }
    }

    fn with_bias(mut self, bias: Option<Vec<f32>>) -> Result<Self, KernelError> {
        if let Some(bias) = &bias {
            check_eq("bias values of a linear layer", self.n, bias.len())?;
        }
        self.bias = bias;
        Ok(self)
    }

    /// Integers: columns to whole vectors, each with a scale.
    pub(super) fn scaled(&self) -> usize {
        match self.format {
            Format::Int8 => self.n.next_multiple_of(LANES),
            Format::Float => 0,
        }
    }

    /// Bytes of the panels.
    fn panels_len(&self) -> usize {
        self.units * self.n.next_multiple_of(LANES) * 4
    }

    /// Bytes of the panels, scales and starts.
    fn len(&self) -> usize {
        self.panels_len() + self.scaled() * 4 * (1 + self.blocks())
    }

    /// Integers: the scale of each column, to whole vectors.
    pub(super) fn scales(&self) -> &[f32] {
        self.bytes.numbers(self.panels_len(), self.scaled())
    }

    /// Integers: where sums start, `[block][column]`: minus what the offset of the activations adds.
    pub(super) fn starts(&self) -> &[i32] {
        let at = self.panels_len() + self.scaled() * 4;
        self.bytes.numbers(at, self.scaled() * self.blocks())
    }

    fn pack(&self, layers: &[Rows<'_>]) -> PackedBytes {
        let vectors = self.n.div_ceil(LANES);
        let mut piece = Piece::new(self.len());
        let start = piece.as_mut_ptr();
        let memory = SharedPtr(start.cast::<u32>());
        // Both begin on a cache line: panels and scales are whole vectors of sixteen.
        let scales = SharedPtr(start.wrapping_add(self.panels_len()).cast::<f32>());
        let starts = SharedPtr(scales.get().wrapping_add(self.scaled()).cast::<i32>());
        let this = self;
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
        piece.freeze()
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
        let panels = self.bytes.as_ptr().cast::<u32>();
        panels.wrapping_add(self.panel_start(panel))
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
        self.bytes.len()
    }

    /// The packed weights, to be kept for [`PackedLinear::from_packed`].
    pub fn packed(&self) -> &PackedBytes {
        &self.bytes
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
                    4 => f32::from(part as u8 as i8) * self.scales()[column],
                    2 => f32::from_bits(part << 16),
                    _ => f32::from_bits(unit),
                };
            }
        }
        out
    }
}
