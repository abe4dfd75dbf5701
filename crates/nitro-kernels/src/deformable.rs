//! Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159): each query and head reads a
//! few points of each level of a feature pyramid, bilinearly, and sums them under weights.

use crate::error::{KernelError, check_eq};
use crate::parallel::{RowTasks, part};
use crate::pool::{SharedPtr, par_for};

/// Sizes of a deformable attention.
#[derive(Clone, Copy, Debug)]
pub struct DeformableShape<'a> {
    /// Samples.
    pub batch: usize,
    /// Queries of a sample.
    pub queries: usize,
    /// Heads.
    pub heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Points per query, head and level.
    pub points: usize,
    /// Height and width of each level; a sample's values are the levels one after the other.
    pub levels: &'a [[usize; 2]],
}

impl DeformableShape<'_> {
    fn tokens(&self) -> usize {
        self.levels.iter().map(|[h, w]| h * w).sum()
    }

    fn channels(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Points of one query and head over all levels.
    fn samples(&self) -> usize {
        self.levels.len() * self.points
    }

    fn check(&self, value: usize, locations: usize, weights: usize) -> Result<(), KernelError> {
        let all = self.batch * self.queries * self.heads * self.samples();
        let values = self.batch * self.tokens() * self.channels();
        check_eq("deformable attention values", values, value)?;
        check_eq("deformable attention locations", 2 * all, locations)?;
        check_eq("deformable attention weights", all, weights)
    }
}

/// One of the four pixels around a point.
struct Corner {
    /// Where the head's channels of that pixel begin.
    at: usize,
    /// Its bilinear weight, and the derivatives of that by the point's coordinates in pixels.
    weight: f32,
    by_x: f32,
    by_y: f32,
}

impl DeformableShape<'_> {
    /// The pixels around point `(x, y)`, in units of the level's width and height; those outside the
    /// level, which count as zeros, are left out. Pixel `i` is centred at `(i + 0.5) / size`
    /// (`grid_sample` with `align_corners=False`).
    fn corners(
        &self,
        base: usize,
        head: usize,
        level: [usize; 2],
        (x, y): (f32, f32),
    ) -> impl Iterator<Item = Corner> {
        let [height, width] = level;
        let (channels, head_at) = (self.channels(), head * self.head_dim);
        let (px, py) = (x * width as f32 - 0.5, y * height as f32 - 0.5);
        let (left, top) = (px.floor(), py.floor());
        let (fx, fy) = (px - left, py - top);
        [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)]
            .into_iter()
            .filter_map(move |(dx, dy)| {
                let (column, row) = (left + dx, top + dy);
                let inside =
                    column >= 0.0 && row >= 0.0 && column < width as f32 && row < height as f32;
                let (wx, wy) = (
                    if dx > 0.0 { fx } else { 1.0 - fx },
                    if dy > 0.0 { fy } else { 1.0 - fy },
                );
                inside.then(|| Corner {
                    at: (base + row as usize * width + column as usize) * channels + head_at,
                    weight: wx * wy,
                    by_x: (2.0 * dx - 1.0) * wy,
                    by_y: (2.0 * dy - 1.0) * wx,
                })
            })
    }

    /// Calls `f(sample, corner)` for all points of a query and head that fall on pixels.
    fn for_corners(
        &self,
        sample_in_batch: usize,
        head: usize,
        locations: &[f32],
        mut f: impl FnMut(usize, [usize; 2], Corner),
    ) {
        let mut base = sample_in_batch * self.tokens();
        for (l, &level) in self.levels.iter().enumerate() {
            for p in 0..self.points {
                let sample = l * self.points + p;
                let point = (locations[2 * sample], locations[2 * sample + 1]);
                for corner in self.corners(base, head, level, point) {
                    f(sample, level, corner);
                }
            }
            base += level[0] * level[1];
        }
    }
}

/// `y[b, q, h] = sum over levels and points of weight * value at the location`.
///
/// `value [batch, tokens, heads, head_dim]`, `locations [batch, queries, heads, levels, points, 2]`
/// (x then y, 0 to 1 across the level), `weights [batch, queries, heads, levels, points]`,
/// `y [batch, queries, heads, head_dim]`.
///
/// # Errors
/// A length that does not follow from `shape`.
pub fn deformable_forward(
    shape: DeformableShape<'_>,
    value: &[f32],
    locations: &[f32],
    weights: &[f32],
    y: &mut [f32],
) -> Result<(), KernelError> {
    shape.check(value.len(), locations.len(), weights.len())?;
    let channels = shape.channels();
    let rows = shape.batch * shape.queries;
    check_eq("deformable attention output", rows * channels, y.len())?;
    if y.is_empty() {
        return Ok(());
    }
    let (samples, dim) = (shape.samples(), shape.head_dim);
    let tasks = RowTasks::new(1, rows, channels);
    let y = SharedPtr(y.as_mut_ptr());
    par_for(tasks.count(), |task| {
        let task = tasks.get(task);
        // SAFETY: the rows lie in `y`, whose length was checked, and tasks have disjoint rows.
        let out = unsafe { part(y, task.elements(channels)) };
        out.fill(0.0);
        for (row, out) in task.rows.zip(out.chunks_exact_mut(channels)) {
            for (head, out) in out.chunks_exact_mut(dim).enumerate() {
                let first = (row * shape.heads + head) * samples;
                let weights = &weights[first..][..samples];
                let locations = &locations[2 * first..][..2 * samples];
                shape.for_corners(row / shape.queries, head, locations, |sample, _, corner| {
                    let scale = weights[sample] * corner.weight;
                    for (out, value) in out.iter_mut().zip(&value[corner.at..][..dim]) {
                        *out += scale * value;
                    }
                });
            }
        }
    });
    Ok(())
}

/// Gradients of [`deformable_forward`], each of the length of its input. One thread: no model that is
/// trained here uses this operation.
///
/// # Errors
/// A length that does not follow from `shape`.
pub fn deformable_backward(
    shape: DeformableShape<'_>,
    (value, locations, weights): (&[f32], &[f32], &[f32]),
    dy: &[f32],
    (dvalue, dlocations, dweights): (&mut [f32], &mut [f32], &mut [f32]),
) -> Result<(), KernelError> {
    shape.check(value.len(), locations.len(), weights.len())?;
    shape.check(dvalue.len(), dlocations.len(), dweights.len())?;
    let (samples, dim) = (shape.samples(), shape.head_dim);
    let rows = shape.batch * shape.queries;
    check_eq(
        "deformable attention output",
        rows * shape.channels(),
        dy.len(),
    )?;
    for gradient in [&mut *dvalue, &mut *dlocations, &mut *dweights] {
        gradient.fill(0.0);
    }
    for index in 0..rows * shape.heads {
        let (row, head) = (index / shape.heads, index % shape.heads);
        let (first, dy) = (index * samples, &dy[index * dim..][..dim]);
        let points = &locations[2 * first..][..2 * samples];
        shape.for_corners(
            row / shape.queries,
            head,
            points,
            |sample, level, corner| {
                let weight = weights[first + sample];
                let pixel = corner.at..corner.at + dim;
                let along: f32 = dy
                    .iter()
                    .zip(&value[pixel.clone()])
                    .map(|(a, b)| a * b)
                    .sum();
                for (d, dy) in dvalue[pixel].iter_mut().zip(dy) {
                    *d += weight * corner.weight * dy;
                }
                dweights[first + sample] += corner.weight * along;
                let [height, width] = level;
                let at = 2 * (first + sample);
                dlocations[at] += weight * along * corner.by_x * width as f32;
                dlocations[at + 1] += weight * along * corner.by_y * height as f32;
            },
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, dot, gradient, random, to_f64};

    const SHAPE: DeformableShape<'static> = DeformableShape {
        batch: 2,
        queries: 3,
        heads: 2,
        head_dim: 3,
        points: 2,
        levels: &[[4, 5], [2, 3]],
    };

    /// The definition, in `f64`, pixel by pixel with a tent around each point.
    fn reference(value: &[f64], locations: &[f64], weights: &[f64]) -> Vec<f64> {
        let s = SHAPE;
        let mut y = vec![0.0; s.batch * s.queries * s.channels()];
        for (i, weight) in weights.iter().enumerate() {
            let (index, sample) = (i / s.samples(), i % s.samples());
            let (row, head) = (index / s.heads, index % s.heads);
            let level = sample / s.points;
            let before: usize = s.levels[..level].iter().map(|[h, w]| h * w).sum();
            let [h, w] = s.levels[level];
            let (px, py) = (
                locations[2 * i] * w as f64 - 0.5,
                locations[2 * i + 1] * h as f64 - 0.5,
            );
            for (r, c) in (0..h).flat_map(|r| (0..w).map(move |c| (r, c))) {
                let tent = |d: f64| (1.0 - d.abs()).max(0.0);
                let share = tent(px - c as f64) * tent(py - r as f64);
                let token = row / s.queries * s.tokens() + before + r * w + c;
                for d in 0..s.head_dim {
                    let v = value[token * s.channels() + head * s.head_dim + d];
                    y[index * s.head_dim + d] += weight * share * v;
                }
            }
        }
        y
    }

    fn inputs() -> (Vec<f32>, Vec<f32>, Vec<f32>) {
        let all = SHAPE.batch * SHAPE.queries * SHAPE.heads * SHAPE.samples();
        let values = SHAPE.batch * SHAPE.tokens() * SHAPE.channels();
        // Some points lie outside, some on the border.
        let locations = random(2, 2 * all).iter().map(|x| 0.5 + 0.4 * x).collect();
        (random(1, values), locations, random(3, all))
    }

    #[test]
    fn points_are_read_bilinearly_with_zeros_outside() {
        let (value, locations, weights) = inputs();
        let mut y = vec![f32::NAN; SHAPE.batch * SHAPE.queries * SHAPE.channels()];
        deformable_forward(SHAPE, &value, &locations, &weights, &mut y).unwrap();
        let expected = reference(&to_f64(&value), &to_f64(&locations), &to_f64(&weights));
        assert_close("y", &y, &expected);
        assert!(deformable_forward(SHAPE, &value[1..], &locations, &weights, &mut y).is_err());
    }

    #[test]
    fn gradients_match_differences() {
        let (value, locations, weights) = inputs();
        let (v, l, w) = (to_f64(&value), to_f64(&locations), to_f64(&weights));
        let dy = random(4, SHAPE.batch * SHAPE.queries * SHAPE.channels());
        let mut dv = vec![f32::NAN; value.len()];
        let mut dl = vec![f32::NAN; locations.len()];
        let mut dw = vec![f32::NAN; weights.len()];
        let given = (&value[..], &locations[..], &weights[..]);
        let wanted = (&mut dv[..], &mut dl[..], &mut dw[..]);
        deformable_backward(SHAPE, given, &dy, wanted).unwrap();
        assert_close(
            "dv",
            &dv,
            &gradient(&v, |v| dot(&dy, &reference(v, &l, &w))),
        );
        assert_close(
            "dl",
            &dl,
            &gradient(&l, |l| dot(&dy, &reference(&v, l, &w))),
        );
        assert_close(
            "dw",
            &dw,
            &gradient(&w, |w| dot(&dy, &reference(&v, &l, w))),
        );
    }
}
