//! Torch's bicubic resize of float pictures, as HPSv2's `ResizeMaxSize` calls it.

use nitro_data::image::{Contribution, Filter, contributions};

use super::Planes;

/// Whether shrinking averages over all old pixels. torchvision does so for tensors since 0.17.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Antialias {
    /// Weights as Pillow's.
    On,
    /// Four neighbours with `a = -0.75`, as older versions had it.
    Off,
}

/// The longer side to `side`, black bars around the rest (left and above get the smaller half).
pub fn fit_square(image: &Planes, side: usize, antialias: Antialias) -> Planes {
    let longest = image.height.max(image.width);
    if longest == 0 || [image.height, image.width] == [side; 2] {
        return image.clone();
    }
    let scale = side as f64 / longest as f64;
    // Python rounds halves to even.
    let scaled = |n: usize| ((n as f64 * scale).round_ties_even() as usize).max(1);
    // The official code forgets the bars of a picture whose longer side fits as it is, and then cannot
    // use it.
    let resized = match longest == side {
        true => image.clone(),
        false => resize(image, scaled(image.height), scaled(image.width), antialias),
    };
    let (left, top) = ((side - resized.width) / 2, (side - resized.height) / 2);
    let mut values = vec![0.0; 3 * side * side];
    for (row, line) in resized.values.chunks_exact(resized.width).enumerate() {
        let (plane, y) = (row / resized.height, row % resized.height + top);
        let start = (plane * side + y) * side + left;
        values[start..start + resized.width].copy_from_slice(line);
    }
    Planes {
        height: side,
        width: side,
        values,
    }
}

/// Resizes without clamping to 0..1, as torch does.
fn resize(image: &Planes, height: usize, width: usize, antialias: Antialias) -> Planes {
    let weights = |from, to| match antialias {
        Antialias::On => contributions(from, to, Filter::Bicubic),
        Antialias::Off => neighbours(from, to),
    };
    let (columns, rows) = (weights(image.width, width), weights(image.height, height));
    let mut across = Vec::with_capacity(3 * image.height * width);
    for line in image.values.chunks_exact(image.width) {
        across.extend(columns.iter().map(|Contribution { first, weights }| {
            let old = &line[*first..];
            weights
                .iter()
                .zip(old)
                .map(|(w, x)| *w as f32 * x)
                .sum::<f32>()
        }));
    }
    let mut values = Vec::with_capacity(3 * height * width);
    for plane in across.chunks_exact(image.height * width) {
        for Contribution { first, weights } in &rows {
            values.extend((0..width).map(|x| {
                let old = plane[first * width + x..].iter().step_by(width);
                weights
                    .iter()
                    .zip(old)
                    .map(|(w, x)| *w as f32 * x)
                    .sum::<f32>()
            }));
        }
    }
    Planes {
        height,
        width,
        values,
    }
}

/// Four neighbours per value; beyond the edge the last value is repeated.
fn neighbours(from: usize, to: usize) -> Vec<Contribution> {
    const A: f64 = -0.75;
    let near = |x: f64| ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0;
    let far = |x: f64| ((A * x - 5.0 * A) * x + 8.0 * A) * x - 4.0 * A;
    let scale = from as f64 / to as f64;
    (0..to)
        .map(|i| {
            let at = (i as f64 + 0.5) * scale - 0.5;
            let low = at.floor();
            let t = at - low;
            let place = |k: i64| (low as i64 + k).clamp(0, from as i64 - 1) as usize;
            let first = place(-1);
            let mut weights = vec![0.0; place(2) - first + 1];
            for (k, weight) in [
                (-1, far(t + 1.0)),
                (0, near(t)),
                (1, near(1.0 - t)),
                (2, far(2.0 - t)),
            ] {
                weights[place(k) - first] += weight;
            }
            Contribution { first, weights }
        })
        .collect()
}
