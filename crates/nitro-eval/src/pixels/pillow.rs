//! Pillow's `resize` of 8-bit pictures, and torchvision's crop around the middle.
//!
//! Pillow computes each axis with integer weights of 22 bits and rounds to bytes in between.

use image::{Rgb, RgbImage};

/// Bits behind the point of a weight.
const PRECISION: u32 = 32 - 8 - 2;

/// The cubic with `a = -0.5`, which Pillow and antialiasing torch use.
pub(super) fn cubic(x: f64) -> f64 {
    const A: f64 = -0.5;
    let x = x.abs();
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * A
    } else {
        0.0
    }
}

/// The first old value that a new one is made of, and its weights in `f64`, which sum to 1.
pub(super) fn contributions(from: usize, to: usize) -> Vec<(usize, Vec<f64>)> {
    let scale = from as f64 / to as f64;
    // Widened where values are merged: antialiasing.
    let stretch = scale.max(1.0);
    let support = 2.0 * stretch;
    (0..to)
        .map(|i| {
            let center = (i as f64 + 0.5) * scale;
            let first = (center - support + 0.5).max(0.0) as usize;
            let end = ((center + support + 0.5) as usize).min(from);
            let weights: Vec<f64> = (first..end)
                .map(|x| cubic((x as f64 - center + 0.5) / stretch))
                .collect();
            let sum: f64 = weights.iter().sum();
            (first, weights.iter().map(|w| w / sum).collect())
        })
        .collect()
}

/// `image.resize((width, height), BICUBIC)`.
pub fn resize_bicubic(image: &RgbImage, width: u32, height: u32) -> RgbImage {
    let across = along_rows(image, width);
    transpose(&along_rows(&transpose(&across), height))
}

/// Resizes every row to `width`.
fn along_rows(image: &RgbImage, width: u32) -> RgbImage {
    if image.width() == width {
        return image.clone();
    }
    let fixed: Vec<(usize, Vec<i64>)> = contributions(image.width() as usize, width as usize)
        .into_iter()
        .map(|(first, weights)| {
            let fixed = |w: f64| {
                let w = w * f64::from(1 << PRECISION);
                // Halves away from zero; the cast cuts towards zero.
                (if w < 0.0 { w - 0.5 } else { w + 0.5 }) as i64
            };
            (first, weights.into_iter().map(fixed).collect())
        })
        .collect();
    let row_len = 3 * image.width() as usize;
    let mut bytes = Vec::with_capacity(3 * (width * image.height()) as usize);
    for row in image.as_raw().chunks_exact(row_len.max(1)) {
        for (first, weights) in &fixed {
            for c in 0..3 {
                let values = row[3 * first + c..].iter().step_by(3);
                let sum: i64 = weights
                    .iter()
                    .zip(values)
                    .map(|(w, v)| w * i64::from(*v))
                    .sum();
                let rounded = (sum + (1 << (PRECISION - 1))) >> PRECISION;
                bytes.push(rounded.clamp(0, 255) as u8);
            }
        }
    }
    RgbImage::from_raw(width, image.height(), bytes).unwrap_or_default()
}

fn transpose(image: &RgbImage) -> RgbImage {
    RgbImage::from_fn(image.height(), image.width(), |x, y| *image.get_pixel(y, x))
}

/// torchvision's `CenterCrop(side)` of a picture that is at least as large.
pub fn center_crop(image: &RgbImage, side: u32) -> RgbImage {
    // Python rounds halves to even.
    let start = |size: u32| (f64::from(size.saturating_sub(side)) / 2.0).round_ties_even() as u32;
    crop(
        image,
        [start(image.width()).into(), start(image.height()).into()],
        [side, side],
    )
}

/// The rectangle of `size` that begins at `(left, top)`; black where there is no picture.
pub(crate) fn crop(image: &RgbImage, [left, top]: [i64; 2], [width, height]: [u32; 2]) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| {
        let at = |start: i64, i: u32| u32::try_from(start + i64::from(i)).ok();
        let pixel = at(left, x).zip(at(top, y));
        pixel
            .and_then(|(x, y)| image.get_pixel_checked(x, y))
            .copied()
            .unwrap_or(Rgb([0, 0, 0]))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_sum_to_one_and_a_flat_picture_stays_flat() {
        for (from, to) in [(7, 3), (3, 7), (5, 5), (100, 1), (1, 9)] {
            for (first, weights) in contributions(from, to) {
                assert!((weights.iter().sum::<f64>() - 1.0).abs() < 1e-12);
                assert!(first + weights.len() <= from);
            }
        }
        let flat = RgbImage::from_pixel(13, 7, Rgb([9, 200, 255]));
        let resized = resize_bicubic(&flat, 5, 20);
        assert_eq!(resized.dimensions(), (5, 20));
        assert!(resized.pixels().all(|p| p.0 == [9, 200, 255]));
    }

    #[test]
    fn a_crop_may_reach_beyond_the_picture() {
        let image = RgbImage::from_pixel(2, 2, Rgb([7, 7, 7]));
        let cut = crop(&image, [-1, 1], [3, 2]);
        let row = |y| (0..3).map(|x| cut.get_pixel(x, y).0[0]).collect::<Vec<_>>();
        assert_eq!((row(0), row(1)), (vec![0, 7, 7], vec![0, 0, 0]));
        let middle = center_crop(&RgbImage::from_fn(5, 2, |x, _| Rgb([x as u8; 3])), 2);
        assert_eq!(middle.get_pixel(0, 0).0[0], 2, "1.5 rounds to 2");
    }
}
