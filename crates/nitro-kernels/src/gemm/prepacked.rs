//! Products with an operand packed in advance.

use super::driver::{Target, shared_b};
use super::epilogue::Epilogue;
use super::kernel::{KernelSet, LANES};
use super::matrix::MatRef;
use super::pack::{Layout, pack_b};
use crate::error::{KernelError, check_eq};
use crate::isa::{Isa, Precision};
use crate::pool::Line;

/// B packed once, for weights used in many products.
pub struct PackedB {
    set: KernelSet,
    precision: Precision,
    layout: Layout,
    lines: Vec<Line>,
}

impl std::fmt::Debug for PackedB {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PackedB")
            .field("isa", &self.set.isa)
            .field("precision", &self.precision)
            .field("k", &self.layout.k)
            .field("n", &self.layout.n)
            .finish()
    }
}

impl PackedB {
    /// Packs a K x N matrix for products at `precision` (for a linear layer's weight `[N, K]`, pass
    /// its transposed view).
    pub fn new(b: MatRef<'_>, precision: Precision) -> Self {
        PackedB::with_isa(Isa::current(), b, precision)
    }

    /// [`PackedB::new`] for a given instruction set.
    pub fn with_isa(isa: Isa, b: MatRef<'_>, precision: Precision) -> Self {
        let set = KernelSet::new(isa, precision);
        let layout = Layout::new(&set, b.rows(), b.cols());
        let mut lines = vec![Line([0; LANES]); layout.bytes().div_ceil(64)];
        // SAFETY: the lines hold `layout.bytes()` bytes.
        unsafe { pack_b(&set, &layout, &b, lines.as_mut_ptr().cast()) };
        PackedB {
            set,
            precision,
            layout,
            lines,
        }
    }

    /// K, the rows of the matrix.
    pub fn rows(&self) -> usize {
        self.layout.k
    }

    /// N, the columns of the matrix.
    pub fn cols(&self) -> usize {
        self.layout.n
    }

    /// The precision of products with this matrix.
    pub fn precision(&self) -> Precision {
        self.precision
    }
}

/// [`gemm`] with a prepacked B.
///
/// # Errors
/// As [`gemm`].
pub fn gemm_packed(
    a: MatRef<'_>,
    b: &PackedB,
    c: &mut [f32],
    ldc: usize,
    accumulate: bool,
    epilogue: Epilogue<'_>,
) -> Result<(), KernelError> {
    check_eq("gemm: rows of B against columns of A", a.cols(), b.rows())?;
    let target = Target::new(a.rows(), b.cols(), c, ldc, accumulate, epilogue)?;
    if a.rows() == 0 || b.cols() == 0 {
        return Ok(());
    }
    // SAFETY: `b.lines` was packed with this layout and set.
    unsafe { shared_b(&b.set, &b.layout, b.lines.as_ptr().cast(), &a, &target) };
    Ok(())
}
