//! Pillow's resampling of 8-bit pictures, in its fixed-point arithmetic.

use image::RgbImage;
use rayon::prelude::*;

/// An interpolation, widened when shrinking (antialiased), as Pillow always does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filter {
    /// Triangle.
    Bilinear,
    /// Keys' cubic with a = -0.5.
    Bicubic,
}

impl Filter {
    fn support(self) -> f64 {
        match self {
            Filter::Bilinear => 1.0,
            Filter::Bicubic => 2.0,
        }
    }

    fn weight(self, x: f64) -> f64 {
        let x = x.abs();
        match self {
            Filter::Bilinear if x < 1.0 => 1.0 - x,
            Filter::Bicubic if x < 1.0 => (1.5 * x - 2.5) * x * x + 1.0,
            Filter::Bicubic if x < 2.0 => (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5,
            _ => 0.0,
        }
    }
}

/// Bits behind the point of the weights: 32 less 8 for the value and 2 for overshoot.
const PRECISION: u32 = 22;

/// The first of the source positions that make one output position, and the weights of it and those
/// behind it, which sum to 1.
#[derive(Debug, Clone, PartialEq)]
pub struct Contribution {
    /// The first source position.
    pub first: usize,
    /// Weights.
    pub weights: Vec<f64>,
}

/// What each of `output` positions is made of, of `input` ones.
pub fn contributions(input: usize, output: usize, filter: Filter) -> Vec<Contribution> {
    let scale = input as f64 / output as f64;
    let stretch = scale.max(1.0);
    let support = filter.support() * stretch;
    (0..output)
        .map(|position| {
            let center = (position as f64 + 0.5) * scale;
            let first = (center - support + 0.5).max(0.0) as usize;
            let end = ((center + support + 0.5) as usize).min(input);
            let weight = |x: usize| filter.weight((x as f64 - center + 0.5) / stretch);
            let mut weights: Vec<f64> = (first..end).map(weight).collect();
            let sum: f64 = weights.iter().sum();
            if sum != 0.0 {
                weights.iter_mut().for_each(|weight| *weight /= sum);
            }
            Contribution { first, weights }
        })
        .collect()
}

/// A contribution with weights of [`PRECISION`] bits.
struct Taps {
    first: usize,
    weights: Vec<i32>,
}

fn taps(input: usize, output: usize, filter: Filter) -> Vec<Taps> {
    // Halves away from zero, by truncation.
    let fixed = |weight: f64| (weight * f64::from(1 << PRECISION) + 0.5f64.copysign(weight)) as i32;
    contributions(input, output, filter)
        .into_iter()
        .map(|Contribution { first, weights }| Taps {
            first,
            weights: weights.into_iter().map(fixed).collect(),
        })
        .collect()
}

fn to_byte(sum: i32) -> u8 {
    (sum >> PRECISION).clamp(0, 255) as u8
}

const HALF: i32 = 1 << (PRECISION - 1);

/// `picture` at `width` x `height`: rows first, then columns, each rounded to 8 bits.
/// Sides of zero are taken for one.
pub fn resize(picture: &RgbImage, width: u32, height: u32, filter: Filter) -> RgbImage {
    let (width, height) = (width.max(1) as usize, height.max(1) as usize);
    let (old_width, old_height) = (picture.width() as usize, picture.height() as usize);
    if old_width == 0 || old_height == 0 {
        return RgbImage::new(width as u32, height as u32);
    }
    let mut data = picture.as_raw().clone();
    if width != old_width {
        data = resize_rows(&data, old_width, &taps(old_width, width, filter));
    }
    if height != old_height {
        data = resize_columns(&data, 3 * width, &taps(old_height, height, filter));
    }
    RgbImage::from_raw(width as u32, height as u32, data).unwrap_or_default()
}

fn resize_rows(data: &[u8], old_width: usize, taps: &[Taps]) -> Vec<u8> {
    let mut out = vec![0; data.len() / old_width * taps.len()];
    out.par_chunks_exact_mut(3 * taps.len())
        .zip(data.par_chunks_exact(3 * old_width))
        .for_each(|(out, row)| {
            for (pixel, tap) in out.chunks_exact_mut(3).zip(taps) {
                let mut sums = [HALF; 3];
                let source = row[3 * tap.first..].chunks_exact(3);
                for (weight, source) in tap.weights.iter().zip(source) {
                    for (sum, value) in sums.iter_mut().zip(source) {
                        *sum += weight * i32::from(*value);
                    }
                }
                for (byte, sum) in pixel.iter_mut().zip(sums) {
                    *byte = to_byte(sum);
                }
            }
        });
    out
}

fn resize_columns(data: &[u8], row_len: usize, taps: &[Taps]) -> Vec<u8> {
    let mut out = vec![0; taps.len() * row_len];
    out.par_chunks_exact_mut(row_len)
        .zip(taps)
        .for_each(|(out, tap)| {
            let mut sums = vec![HALF; row_len];
            let source = data[tap.first * row_len..].chunks_exact(row_len);
            for (weight, row) in tap.weights.iter().zip(source) {
                for (sum, value) in sums.iter_mut().zip(row) {
                    *sum += weight * i32::from(*value);
                }
            }
            for (byte, sum) in out.iter_mut().zip(sums) {
                *byte = to_byte(sum);
            }
        });
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn weights_sum_to_one_within_the_source() {
        for (from, to) in [(7, 3), (3, 7), (5, 5), (100, 1), (1, 9)] {
            for Contribution { first, weights } in contributions(from, to, Filter::Bicubic) {
                assert!((weights.iter().sum::<f64>() - 1.0).abs() < 1e-12);
                assert!(first + weights.len() <= from);
            }
        }
    }

    proptest! {
        #[test]
        fn a_flat_picture_stays_flat(
            (w, h, new_w, new_h) in (1u32..40, 1u32..40, 1u32..60, 1u32..60),
            colour: [u8; 3],
        ) {
            let picture = RgbImage::from_pixel(w, h, image::Rgb(colour));
            for filter in [Filter::Bilinear, Filter::Bicubic] {
                let resized = resize(&picture, new_w, new_h, filter);
                prop_assert_eq!(resized.dimensions(), (new_w, new_h));
                prop_assert!(resized.pixels().all(|pixel| pixel.0 == colour));
            }
        }
    }
}
