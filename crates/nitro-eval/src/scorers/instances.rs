//! What mmdet 2 makes of Mask2Former's answers: a list of objects with boxes and masks.

use rayon::prelude::*;

/// The sizes that a picture had on its way to the detector, each height then width.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Canvas {
    /// With padding, as the detector saw it.
    pub padded: [usize; 2],
    /// After resizing, without padding.
    pub resized: [usize; 2],
    /// Of the file.
    pub original: [usize; 2],
}

/// An object.
#[derive(Clone, Debug, PartialEq)]
pub struct Instance {
    /// Class.
    pub label: usize,
    /// `[x0, y0, x1, y1, confidence]` in pixels of the file; `x1` and `y1` are one past the last pixel.
    pub scored: [f32; 5],
    /// Of the file's size, row by row.
    pub mask: Vec<bool>,
}

/// The `at_most` likeliest pairs of query and class as objects, best first (mmdet's
/// `MaskFormerFusionHead.instance_postprocess`).
///
/// `classes [queries, labels + 1]` and `masks [queries, mask_size]` are logits. A query may appear under
/// several classes. An object's confidence is its class's probability times the mean probability of
/// its mask's pixels.
pub fn instances(
    classes: &[f32],
    labels: usize,
    masks: &[f32],
    mask_size: [usize; 2],
    canvas: Canvas,
    at_most: usize,
) -> Vec<Instance> {
    let mut pairs: Vec<(f32, usize, usize)> = (classes.chunks_exact(labels + 1).enumerate())
        .flat_map(|(query, logits)| {
            let scores = softmax(logits);
            (0..labels).map(move |label| (scores[label], query, label))
        })
        .collect();
    pairs.sort_by(|a, b| b.0.total_cmp(&a.0));
    pairs.truncate(at_most);

    let mut queries: Vec<usize> = pairs.iter().map(|(_, query, _)| *query).collect();
    queries.sort_unstable();
    queries.dedup();
    let size = mask_size[0] * mask_size[1];
    let found: Vec<Shape> = queries
        .par_iter()
        .map(|query| Shape::of(&masks[query * size..][..size], mask_size, canvas))
        .collect();
    let mut objects: Vec<Instance> = pairs
        .into_iter()
        .filter_map(|(score, query, label)| {
            let shape = &found[queries.binary_search(&query).ok()?];
            let [x0, y0, x1, y1] = shape.bbox;
            Some(Instance {
                label,
                scored: [x0, y0, x1, y1, score * shape.score],
                mask: shape.mask.clone(),
            })
        })
        .collect();
    objects.sort_by(|a, b| b.scored[4].total_cmp(&a.scored[4]));
    objects
}

/// A query's mask in the file's size.
struct Shape {
    mask: Vec<bool>,
    bbox: [f32; 4],
    score: f32,
}

impl Shape {
    fn of(logits: &[f32], size: [usize; 2], canvas: Canvas) -> Self {
        let padded = interpolate(logits, size, canvas.padded);
        let [height, width] = canvas.resized;
        let cut: Vec<f32> = padded
            .chunks_exact(canvas.padded[1])
            .take(height)
            .flat_map(|row| &row[..width])
            .copied()
            .collect();
        let logits = interpolate(&cut, canvas.resized, canvas.original);
        let mask: Vec<bool> = logits.iter().map(|x| *x > 0.0).collect();
        let inside = logits.iter().filter(|x| **x > 0.0);
        let sum: f64 = inside.map(|x| 1.0 / (1.0 + f64::from(-x).exp())).sum();
        let count = mask.iter().filter(|seen| **seen).count();
        Self {
            bbox: bounds(&mask, canvas.original[1]),
            score: (sum / (count as f64 + 1e-6)) as f32,
            mask,
        }
    }
}

/// The smallest box around a mask; all zeros around none.
fn bounds(mask: &[bool], width: usize) -> [f32; 4] {
    let seen = mask.iter().enumerate().filter(|(_, seen)| **seen);
    let corners = seen.map(|(i, _)| (i % width, i / width)).fold(
        None,
        |corners: Option<[usize; 4]>, (x, y)| {
            let [x0, y0, x1, y1] = corners.unwrap_or([x, y, x, y]);
            Some([x0.min(x), y0.min(y), x1.max(x), y1.max(y)])
        },
    );
    corners.map_or([0.0; 4], |[x0, y0, x1, y1]| {
        [x0, y0, x1 + 1, y1 + 1].map(|x| x as f32)
    })
}

fn softmax(logits: &[f32]) -> Vec<f32> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let powers: Vec<f32> = logits.iter().map(|x| (x - largest).exp()).collect();
    let sum: f32 = powers.iter().sum();
    powers.into_iter().map(|x| x / sum).collect()
}

/// Torch's bilinear `interpolate` of one plane (`align_corners=False`).
fn interpolate(plane: &[f32], from: [usize; 2], to: [usize; 2]) -> Vec<f32> {
    let places = |from: usize, to: usize| -> Vec<(usize, usize, f32)> {
        let scale = from as f32 / to as f32;
        (0..to)
            .map(|i| {
                let at = ((i as f32 + 0.5) * scale - 0.5).max(0.0);
                let low = (at as usize).min(from - 1);
                (low, (low + 1).min(from - 1), at - low as f32)
            })
            .collect()
    };
    let columns = places(from[1], to[1]);
    let mut values = Vec::with_capacity(to[0] * to[1]);
    for (top, bottom, down) in places(from[0], to[0]) {
        let (top, bottom) = (&plane[top * from[1]..], &plane[bottom * from[1]..]);
        values.extend(columns.iter().map(|&(left, right, across)| {
            let mix = |row: &[f32]| row[left] * (1.0 - across) + row[right] * across;
            mix(top) * (1.0 - down) + mix(bottom) * down
        }));
    }
    values
}
