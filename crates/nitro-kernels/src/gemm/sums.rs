//! Column sums: the bias gradient of a linear layer or a convolution.

use super::matrix::MatRef;
use crate::error::{KernelError, check_eq};
use crate::pool::{SharedPtr, num_threads, par_for};

/// Partial sums are this many rows at least; below, a second thread does not pay.
const MIN_ROWS: usize = 256;

/// `out[j] (+)= sum over i of x[i, j]`.
///
/// # Errors
/// If `out` does not hold one value per column.
pub fn column_sum(x: MatRef<'_>, out: &mut [f32], accumulate: bool) -> Result<(), KernelError> {
    check_eq("column_sum: values of the result", x.cols(), out.len())?;
    let cols = x.cols();
    let parts = (x.rows() / MIN_ROWS).clamp(1, num_threads());
    let mut partial = vec![0.0_f32; parts * cols];
    let shared = SharedPtr(partial.as_mut_ptr());
    par_for(parts, |part| {
        // SAFETY: each part owns its own `cols` sums.
        let sums = unsafe { std::slice::from_raw_parts_mut(shared.get().add(part * cols), cols) };
        for row in x.rows() * part / parts..x.rows() * (part + 1) / parts {
            if x.col_stride() == 1 {
                let run = x.row_run(row, 0, cols);
                sums.iter_mut()
                    .zip(run)
                    .for_each(|(sum, value)| *sum += value);
            } else {
                sums.iter_mut()
                    .enumerate()
                    .for_each(|(j, sum)| *sum += x.get(row, j));
            }
        }
    });
    if !accumulate {
        out.fill(0.0);
    }
    for sums in partial.chunks_exact(cols.max(1)) {
        out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum);
    }
    Ok(())
}
