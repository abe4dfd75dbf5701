//! Exact rearrangements of channel-last images: nearest upsampling, pixel shuffle and unshuffle.

use crate::error::{KernelError, check_eq};
use crate::parallel::{RowTasks, part};
use crate::pool::{SharedPtr, par_for};

/// Shape of a channel-last image batch, `[batch, height, width, channels]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageShape {
    /// Images.
    pub batch: usize,
    /// Rows.
    pub height: usize,
    /// Pixels per row.
    pub width: usize,
    /// Values per pixel.
    pub channels: usize,
}

impl ImageShape {
    fn len(&self) -> usize {
        self.batch * self.height * self.width * self.channels
    }
}

/// Calls `f(row, values of the row)` for all rows of `row_len` values, in parallel.
fn for_rows(data: &mut [f32], row_len: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
    if row_len == 0 {
        return;
    }
    let tasks = RowTasks::new(1, data.len() / row_len, row_len);
    let data = SharedPtr(data.as_mut_ptr());
    par_for(tasks.count(), |task| {
        let task = tasks.get(task);
        // SAFETY: the rows lie in `data`, and tasks have disjoint rows.
        let rows = unsafe { part(data, task.elements(row_len)) };
        for (row, values) in task.rows.zip(rows.chunks_exact_mut(row_len)) {
            f(row, values);
        }
    });
}

/// Repeats every pixel 2 x 2 times: `x` has `shape`, `y` is `[batch, 2 height, 2 width, channels]`.
///
/// # Errors
/// A length that does not follow from `shape`.
pub fn upsample2x_forward(shape: ImageShape, x: &[f32], y: &mut [f32]) -> Result<(), KernelError> {
    check_eq("upsample input length", shape.len(), x.len())?;
    check_eq("upsample output length", 4 * shape.len(), y.len())?;
    let (channels, row_len) = (shape.channels, shape.width * shape.channels);
    for_rows(y, 2 * row_len, |row, y| {
        // Output rows 2i and 2i + 1 are both input row i, over all images.
        let x = &x[row / 2 * row_len..][..row_len];
        for (x, y) in x
            .chunks_exact(channels)
            .zip(y.chunks_exact_mut(2 * channels))
        {
            let (left, right) = y.split_at_mut(channels);
            left.copy_from_slice(x);
            right.copy_from_slice(x);
        }
    });
    Ok(())
}

/// Gradient of [`upsample2x_forward`]: `dx` (of `shape`) is the sum of each 2 x 2 block of `dy`.
///
/// # Errors
/// A length that does not follow from `shape`.
pub fn upsample2x_backward(
    shape: ImageShape,
    dy: &[f32],
    dx: &mut [f32],
) -> Result<(), KernelError> {
    check_eq("upsample output gradient length", 4 * shape.len(), dy.len())?;
    check_eq("upsample input gradient length", shape.len(), dx.len())?;
    let (channels, row_len) = (shape.channels, shape.width * shape.channels);
    for_rows(dx, row_len, |row, dx| {
        let (top, bottom) = dy[row * 4 * row_len..][..4 * row_len].split_at(2 * row_len);
        let pairs = top
            .chunks_exact(2 * channels)
            .zip(bottom.chunks_exact(2 * channels));
        for (dx, (top, bottom)) in dx.chunks_exact_mut(channels).zip(pairs) {
            for (c, dx) in dx.iter_mut().enumerate() {
                *dx = (top[c] + top[channels + c]) + (bottom[c] + bottom[channels + c]);
            }
        }
    });
    Ok(())
}

/// Moves `factor` x `factor` blocks of pixels into channels: `x` has `shape`, `y` is
/// `[batch, height / factor, width / factor, channels * factor^2]`. Output channel
/// `(c * factor + dy) * factor + dx` is channel `c` of the pixel at offset `(dy, dx)` in the block, the
/// order of PyTorch's `PixelUnshuffle`. Its gradient is [`pixel_shuffle`].
///
/// # Errors
/// A length that does not follow from `shape`, or sides that `factor` does not divide.
pub fn pixel_unshuffle(
    shape: ImageShape,
    factor: usize,
    x: &[f32],
    y: &mut [f32],
) -> Result<(), KernelError> {
    check_eq("pixel unshuffle input length", shape.len(), x.len())?;
    check_eq("pixel unshuffle output length", shape.len(), y.len())?;
    check_sides(shape, factor)?;
    let ImageShape {
        width, channels, ..
    } = shape;
    let row_len = width * channels;
    for_rows(y, factor * row_len, |row, y| {
        let x = &x[row * factor * row_len..][..factor * row_len];
        for (block, y) in y.chunks_exact_mut(factor * factor * channels).enumerate() {
            for dy in 0..factor {
                for dx in 0..factor {
                    let pixel = &x[dy * row_len + (block * factor + dx) * channels..][..channels];
                    let to = y[dy * factor + dx..].iter_mut().step_by(factor * factor);
                    to.zip(pixel).for_each(|(to, &value)| *to = value);
                }
            }
        }
    });
    Ok(())
}

/// The inverse of [`pixel_unshuffle`], PyTorch's `PixelShuffle`: `shape` is that of the larger
/// **output** `y`; `x` is `[batch, height / factor, width / factor, channels * factor^2]`.
///
/// # Errors
/// A length that does not follow from `shape`, or sides that `factor` does not divide.
pub fn pixel_shuffle(
    shape: ImageShape,
    factor: usize,
    x: &[f32],
    y: &mut [f32],
) -> Result<(), KernelError> {
    check_eq("pixel shuffle input length", shape.len(), x.len())?;
    check_eq("pixel shuffle output length", shape.len(), y.len())?;
    check_sides(shape, factor)?;
    let ImageShape {
        width, channels, ..
    } = shape;
    let row_len = width * channels;
    for_rows(y, factor * row_len, |row, y| {
        let x = &x[row * factor * row_len..][..factor * row_len];
        for (block, x) in x.chunks_exact(factor * factor * channels).enumerate() {
            for dy in 0..factor {
                for dx in 0..factor {
                    let at = dy * row_len + (block * factor + dx) * channels;
                    let from = x[dy * factor + dx..].iter().step_by(factor * factor);
                    let pixel = y[at..at + channels].iter_mut();
                    pixel.zip(from).for_each(|(pixel, &value)| *pixel = value);
                }
            }
        }
    });
    Ok(())
}

fn check_sides(shape: ImageShape, factor: usize) -> Result<(), KernelError> {
    for side in [shape.height, shape.width] {
        if factor == 0 || !side.is_multiple_of(factor) {
            return Err(KernelError::Unsupported {
                what: "image side for pixel (un)shuffle",
                value: side,
                help: "the factor must divide height and width",
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{dot, random, to_f64};

    /// Index of a value in a channel-last image.
    fn at(shape: ImageShape, b: usize, y: usize, x: usize, c: usize) -> usize {
        ((b * shape.height + y) * shape.width + x) * shape.channels + c
    }

    const SHAPE: ImageShape = ImageShape {
        batch: 2,
        height: 6,
        width: 4,
        channels: 3,
    };

    #[test]
    fn upsampling_repeats_pixels_and_its_gradient_is_the_adjoint() {
        let x = random(1, SHAPE.len());
        let mut y = vec![f32::NAN; 4 * x.len()];
        upsample2x_forward(SHAPE, &x, &mut y).unwrap();
        let big = ImageShape {
            height: 12,
            width: 8,
            ..SHAPE
        };
        for b in 0..2 {
            for (row, col) in (0..12).flat_map(|row| (0..8).map(move |col| (row, col))) {
                for c in 0..3 {
                    let expected = x[at(SHAPE, b, row / 2, col / 2, c)];
                    assert_eq!(y[at(big, b, row, col, c)], expected);
                }
            }
        }
        // <dy, up(x)> = <backward(dy), x>
        let dy = random(2, y.len());
        let mut dx = vec![f32::NAN; x.len()];
        upsample2x_backward(SHAPE, &dy, &mut dx).unwrap();
        let (left, right) = (dot(&dy, &to_f64(&y)), dot(&dx, &to_f64(&x)));
        assert!((left - right).abs() < 1e-4, "{left} {right}");
    }

    #[test]
    fn unshuffle_has_the_channel_order_of_pytorch_and_shuffle_undoes_it() {
        let x = random(1, SHAPE.len());
        let mut y = vec![f32::NAN; x.len()];
        pixel_unshuffle(SHAPE, 2, &x, &mut y).unwrap();
        let small = ImageShape {
            height: 3,
            width: 2,
            channels: 12,
            ..SHAPE
        };
        for b in 0..2 {
            for (row, col) in (0..6).flat_map(|row| (0..4).map(move |col| (row, col))) {
                for c in 0..3 {
                    let channel = c * 4 + row % 2 * 2 + col % 2;
                    let got = y[at(small, b, row / 2, col / 2, channel)];
                    assert_eq!(got, x[at(SHAPE, b, row, col, c)]);
                }
            }
        }
        let mut back = vec![f32::NAN; x.len()];
        pixel_shuffle(SHAPE, 2, &y, &mut back).unwrap();
        assert_eq!(back, x);
    }

    #[test]
    fn sides_that_the_factor_does_not_divide_are_errors() {
        let (x, mut y) = (vec![0.0; SHAPE.len()], vec![0.0; SHAPE.len()]);
        for factor in [0, 4, 5] {
            assert!(pixel_unshuffle(SHAPE, factor, &x, &mut y).is_err());
            assert!(pixel_shuffle(SHAPE, factor, &x, &mut y).is_err());
        }
    }
}
