//! Pictures to tensors and back.

use std::path::Path;

use burn::tensor::Tensor;

use crate::TrainError;

/// A square crop of an RGB picture of side `whole`, as `[3, side, side]` in `-1..=1`.
pub(crate) fn from_bytes(
    rgb: &[u8],
    whole: usize,
    (left, top): (usize, usize),
    side: usize,
) -> Vec<f32> {
    let mut out = Vec::with_capacity(3 * side * side);
    for channel in 0..3 {
        for y in top..top + side {
            let row = &rgb[(y * whole + left) * 3..(y * whole + left + side) * 3];
            out.extend(
                row.iter()
                    .skip(channel)
                    .step_by(3)
                    .map(|v| f32::from(*v) / 127.5 - 1.0),
            );
        }
    }
    out
}

/// ImageNet's mean and deviation of each channel, of pixels in `0..=1`.
const IMAGENET: [(f32, f32); 3] = [(0.485, 0.229), (0.456, 0.224), (0.406, 0.225)];

/// A picture `[3, side, side]` in `-1..=1` as DINOv2 takes it: normalised with ImageNet's mean and
/// deviation.
pub(crate) fn normalised(mut picture: Vec<f32>) -> Vec<f32> {
    let plane = (picture.len() / 3).max(1);
    for (values, (mean, deviation)) in picture.chunks_exact_mut(plane).zip(IMAGENET) {
        for value in values {
            *value = (*value * 0.5 + 0.5 - mean) / deviation;
        }
    }
    picture
}

/// Pictures `[n, 3, h, w]` in `-1..=1` as RGB bytes, one buffer each.
pub(crate) fn to_bytes(pictures: Tensor<4>) -> Vec<Vec<u8>> {
    let [count, _, h, w] = pictures.dims();
    let data = pictures.permute([0, 2, 3, 1]).into_data();
    let Ok(values) = data.try_into_vec::<f32>() else {
        return Vec::new();
    };
    let byte = |v: &f32| ((v * 0.5 + 0.5).clamp(0.0, 1.0) * 255.0).round_ties_even() as u8;
    values
        .chunks_exact(h * w * 3)
        .take(count)
        .map(|p| p.iter().map(byte).collect())
        .collect()
}

/// Writes pictures `[n, 3, h, w]` in `-1..=1` as one PNG, `columns` in a row.
pub(crate) fn write_grid(
    path: &Path,
    pictures: Tensor<4>,
    columns: usize,
) -> Result<(), TrainError> {
    let [count, _, h, w] = pictures.dims();
    let rows = count.div_ceil(columns);
    let mut grid = image::RgbImage::new((columns * w) as u32, (rows * h) as u32);
    for (i, picture) in to_bytes(pictures).into_iter().enumerate() {
        let Some(picture) = image::RgbImage::from_raw(w as u32, h as u32, picture) else {
            continue;
        };
        let (x, y) = (i % columns * w, i / columns * h);
        image::imageops::replace(&mut grid, &picture, x as i64, y as i64);
    }
    nitro_pipeline::picture::save_png(path, &grid, None).map_err(|error| TrainError::Picture {
        path: path.to_owned(),
        reason: error.to_string(),
    })
}
