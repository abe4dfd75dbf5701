//! From coefficients to pixels, in libjpeg-turbo's integer arithmetic.

use rayon::prelude::*;

use super::{AREA, BLOCK, Component, Frame};

/// One component's samples, whole blocks.
pub(super) struct Plane {
    stride: usize,
    samples: Vec<u8>,
}

/// Bits behind the point of the constants, and of the values between the passes.
const CONST_BITS: u32 = 13;
const PASS_BITS: u32 = 2;

/// Loeffler's eight-point inverse transform (`jidctint.c`), scaled by `2^CONST_BITS`. In 64 bits no
/// damaged coefficient overflows.
fn transform(x: [i64; 8]) -> [i64; 8] {
    let z1 = (x[2] + x[6]) * 4433;
    let (even2, even3) = (z1 - x[6] * 15137, z1 + x[2] * 6270);
    let (even0, even1) = ((x[0] + x[4]) << CONST_BITS, (x[0] - x[4]) << CONST_BITS);
    let even = [even0 + even3, even1 + even2, even1 - even2, even0 - even3];

    let z5 = (x[7] + x[3] + x[5] + x[1]) * 9633;
    let z1 = (x[7] + x[1]) * -7373;
    let z2 = (x[5] + x[3]) * -20995;
    let z3 = (x[7] + x[3]) * -16069 + z5;
    let z4 = (x[5] + x[1]) * -3196 + z5;
    let odd = [
        x[1] * 12299 + z1 + z4,
        x[3] * 25172 + z2 + z3,
        x[5] * 16819 + z2 + z4,
        x[7] * 2446 + z1 + z3,
    ];
    std::array::from_fn(|i| match i {
        0..4 => even[i] + odd[i],
        _ => even[7 - i] - odd[7 - i],
    })
}

fn descale(x: i64, bits: u32) -> i64 {
    (x + (1 << (bits - 1))) >> bits
}

/// Dequantises and transforms all blocks of a component.
pub(super) fn inverse_transform(component: &Component) -> Result<Plane, String> {
    let table = component.table.ok_or("a quantizer is missing")?;
    let [across, down] = component.blocks;
    let stride = across * BLOCK;
    let mut samples = vec![0; stride * down * BLOCK];
    samples
        .par_chunks_exact_mut(stride * BLOCK)
        .zip(component.coefficients.par_chunks_exact(across * AREA))
        .for_each(|(rows, blocks)| {
            for (number, block) in blocks.chunks_exact(AREA).enumerate() {
                let value = |k: usize| i64::from(block[k]) * i64::from(table[k]);
                let columns: [[i64; BLOCK]; BLOCK] = std::array::from_fn(|column| {
                    let x = std::array::from_fn(|row| value(row * BLOCK + column));
                    transform(x).map(|y| descale(y, CONST_BITS - PASS_BITS))
                });
                for row in 0..BLOCK {
                    let x = columns.map(|column| column[row]);
                    let out = &mut rows[row * stride + number * BLOCK..][..BLOCK];
                    for (byte, y) in out.iter_mut().zip(transform(x)) {
                        let y = descale(y, CONST_BITS + PASS_BITS + 3);
                        *byte = (y + 128).clamp(0, 255) as u8;
                    }
                }
            }
        });
    Ok(Plane { stride, samples })
}

/// A component's samples at the picture's size.
pub(super) fn upsample(
    plane: &Plane,
    component: &Component,
    frame: &Frame,
) -> Result<Vec<u8>, String> {
    let [width, height] = component.size;
    let [h, v] = component.sampling;
    if !frame.most[0].is_multiple_of(h) || !frame.most[1].is_multiple_of(v) {
        return Err("fractional sampling factors".to_owned());
    }
    let factors = [frame.most[0] / h, frame.most[1] / v];
    // A row of the picture's samples; behind the last comes the last again.
    let row = |y: usize| &plane.samples[y.min(height - 1) * plane.stride..][..width];
    let mut out = vec![0; frame.width * frame.height];
    out.par_chunks_exact_mut(frame.width)
        .enumerate()
        .for_each(|(y, out)| {
            let near = y / factors[1];
            // Of two rows made from one, the upper leans on the row above.
            let far = match y % factors[1] {
                0 => near.saturating_sub(1),
                _ => near + 1,
            };
            let [near, far] = [row(near), row(far)];
            match factors {
                [1, 1] => out.copy_from_slice(&near[..out.len()]),
                [2, 1] if width > 2 => fancy(out, |i| i32::from(near[i]), width, 2, [1, 2]),
                [1, 2] => {
                    let bias = if y % 2 == 0 { 1 } else { 2 };
                    for ((out, near), far) in out.iter_mut().zip(near).zip(far) {
                        *out = ((3 * i32::from(*near) + i32::from(*far) + bias) >> 2) as u8;
                    }
                }
                [2, 2] if width > 2 => {
                    let sum = |i: usize| 3 * i32::from(near[i]) + i32::from(far[i]);
                    fancy(out, sum, width, 4, [8, 7]);
                }
                [across, _] => {
                    for (x, out) in out.iter_mut().enumerate() {
                        *out = near[x / across];
                    }
                }
            }
        });
    Ok(out)
}

/// Doubles a row with weights 3/4 and 1/4; outside of it stands its end again. Sums lose `shift`
/// bits, after `left` or `right` was added for the left or right sample of a pair.
fn fancy(
    out: &mut [u8],
    value: impl Fn(usize) -> i32,
    width: usize,
    shift: u32,
    [left, right]: [i32; 2],
) {
    for (x, out) in out.iter_mut().enumerate() {
        let i = x / 2;
        let here = value(i);
        let sum = match x % 2 {
            0 => 3 * here + value(i.saturating_sub(1)) + left,
            _ => 3 * here + value((i + 1).min(width - 1)) + right,
        };
        *out = (sum >> shift) as u8;
    }
}

/// Planes of one or three components as RGB.
pub(super) fn to_rgb(planes: &[Vec<u8>], is_rgb: bool) -> Vec<u8> {
    let [first, others @ ..] = planes else {
        return Vec::new();
    };
    let [second, third] = others else {
        return first.iter().flat_map(|grey| [*grey; 3]).collect();
    };
    let mut rgb = vec![0; 3 * first.len()];
    let pixels = first.iter().zip(second).zip(third);
    for (out, ((&y, &cb), &cr)) in rgb.chunks_exact_mut(3).zip(pixels) {
        if is_rgb {
            out.copy_from_slice(&[y, cb, cr]);
            continue;
        }
        const HALF: i32 = 1 << 15;
        let (y, cb, cr) = (i32::from(y), i32::from(cb) - 128, i32::from(cr) - 128);
        let red = y + ((91881 * cr + HALF) >> 16);
        let green = y + ((-22554 * cb - 46802 * cr + HALF) >> 16);
        let blue = y + ((116130 * cb + HALF) >> 16);
        for (out, value) in out.iter_mut().zip([red, green, blue]) {
            *out = value.clamp(0, 255) as u8;
        }
    }
    rgb
}
