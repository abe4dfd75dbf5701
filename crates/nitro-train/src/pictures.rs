//! Pictures to tensors and back.

use std::path::{Path, PathBuf};

use burn::tensor::Tensor;
use image::RgbImage;

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

/// Where the sample pictures of `step` lie.
pub(crate) fn sample_path(dir: &Path, step: u64) -> PathBuf {
    dir.join(format!("step-{step:08}.png"))
}

/// Writes pictures `[n, 3, h, w]` in `-1..=1` as one PNG, `columns` in a row.
pub(crate) fn write_grid(
    path: &Path,
    pictures: Tensor<4>,
    columns: usize,
) -> Result<(), TrainError> {
    let [_, _, h, w] = pictures.dims();
    let pictures: Vec<RgbImage> = to_bytes(pictures)
        .into_iter()
        .filter_map(|bytes| RgbImage::from_raw(w as u32, h as u32, bytes))
        .collect();
    write_pictures(path, &pictures.iter().collect::<Vec<_>>(), columns)
}

/// Writes pictures of one size as one PNG, `columns` in a row.
pub(crate) fn write_pictures(
    path: &Path,
    pictures: &[&RgbImage],
    columns: usize,
) -> Result<(), TrainError> {
    let (w, h) = pictures.first().map_or((1, 1), |p| p.dimensions());
    let rows = pictures.len().div_ceil(columns).max(1);
    let mut grid = RgbImage::new(columns as u32 * w, rows as u32 * h);
    for (i, picture) in pictures.iter().enumerate() {
        let (x, y) = (i % columns, i / columns);
        let (x, y) = (x as i64 * i64::from(w), y as i64 * i64::from(h));
        image::imageops::replace(&mut grid, *picture, x, y);
    }
    nitro_pipeline::picture::save_png(path, &grid, None).map_err(|error| TrainError::Picture {
        path: path.to_owned(),
        reason: error.to_string(),
    })
}
