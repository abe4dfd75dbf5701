//! OpenCV's `resize` with `INTER_LINEAR` of 8-bit pictures, with which mmdet prepares them.

use image::RgbImage;

/// Weights have 11 bits behind the point.
const ONE: f32 = 2048.0;

/// `cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)`: two neighbours per axis, no
/// antialiasing, integer weights.
pub fn resize_bilinear(image: &RgbImage, width: u32, height: u32) -> RgbImage {
    if image.dimensions() == (width, height) || image.width() == 0 || image.height() == 0 {
        return image.clone();
    }
    let columns = weights(image.width(), width);
    let rows = weights(image.height(), height);
    let row_len = 3 * image.width() as usize;
    // Every old row at the new width, its values times 2048.
    let across: Vec<Vec<i32>> = (image.as_raw().chunks_exact(row_len))
        .map(|row| {
            let value = |x: usize, c: usize| i32::from(row[3 * x + c]);
            (columns.iter())
                .flat_map(|&(low, high, [a, b])| (0..3).map(move |c| (low, high, a, b, c)))
                .map(|(low, high, a, b, c)| value(low, c) * a + value(high, c) * b)
                .collect()
        })
        .collect();
    let mut bytes = Vec::with_capacity(3 * (width * height) as usize);
    for (low, high, [a, b]) in rows {
        bytes.extend(across[low].iter().zip(&across[high]).map(|(x, y)| {
            let sum = ((a * (x >> 4)) >> 16) + ((b * (y >> 4)) >> 16);
            ((sum + 2) >> 2).clamp(0, 255) as u8
        }));
    }
    RgbImage::from_raw(width, height, bytes).unwrap_or_default()
}

/// Of each new value: the two old ones and their weights.
fn weights(from: u32, to: u32) -> Vec<(usize, usize, [i32; 2])> {
    let scale = f64::from(from) / f64::from(to);
    (0..to)
        .map(|i| {
            let at = ((f64::from(i) + 0.5) * scale - 0.5) as f32;
            let (mut low, mut part) = (at.floor(), at - at.floor());
            if low < 0.0 {
                (low, part) = (0.0, 0.0);
            }
            let last = from as usize - 1;
            if low as usize >= last {
                (low, part) = (last as f32, 0.0);
            }
            let low = low as usize;
            let fixed = |x: f32| (x * ONE).round_ties_even() as i32;
            (low, (low + 1).min(last), [fixed(1.0 - part), fixed(part)])
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::Rgb;

    #[test]
    fn a_ramp_is_interpolated_between_pixel_centres() {
        let ramp = RgbImage::from_fn(4, 1, |x, _| Rgb([(x * 40) as u8; 3]));
        let wide = resize_bilinear(&ramp, 8, 2);
        let row: Vec<u8> = wide.rows().next().unwrap().map(|p| p.0[0]).collect();
        assert_eq!(row, [0, 10, 30, 50, 70, 90, 110, 120]);
        assert_eq!(resize_bilinear(&ramp, 4, 1), ramp);
    }
}
