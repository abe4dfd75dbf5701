//! Bicubic resampling of position tables, as `torch.nn.functional.interpolate` does it with and
//! without `antialias`.

/// Where output positions lie in the input, and how they are read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sampling {
    /// Input rows and columns per output row and column.
    pub(super) scale: [f64; 2],
    /// Cubic of `a = -0.5` widened by the scale and cut at the border, instead of four taps of
    /// `a = -0.75` on a repeated border.
    pub(super) antialias: bool,
}

/// `table [from.0, from.1, d]` at `to` positions.
pub(super) fn resample(
    table: &[f32],
    from: [usize; 2],
    to: [usize; 2],
    d: usize,
    sampling: Sampling,
) -> Vec<f32> {
    let axis = |i: usize| {
        (0..to[i])
            .map(|out| taps(out, from[i], sampling.scale[i], sampling.antialias))
            .collect::<Vec<_>>()
    };
    let (rows, columns) = (axis(0), axis(1));
    let mut result = Vec::with_capacity(to[0] * to[1] * d);
    for row in &rows {
        for column in &columns {
            let mut sum = vec![0f64; d];
            for &(y, wy) in row {
                for &(x, wx) in column {
                    let place = (y * from[1] + x) * d;
                    for (sum, value) in sum.iter_mut().zip(&table[place..place + d]) {
                        *sum += wy * wx * f64::from(*value);
                    }
                }
            }
            result.extend(sum.into_iter().map(|value| value as f32));
        }
    }
    result
}

/// Input positions that output position `out` is a sum of, with their weights.
fn taps(out: usize, count: usize, scale: f64, antialias: bool) -> Vec<(usize, f64)> {
    let centre = (out as f64 + 0.5) * scale;
    if antialias {
        let widen = scale.max(1.0);
        let support = 2.0 * widen;
        let first = ((centre - support + 0.5) as i64).max(0) as usize;
        let end = ((centre + support + 0.5) as i64).clamp(0, count as i64) as usize;
        let weight = |i: usize| cubic((i as f64 + 0.5 - centre) / widen, -0.5);
        let total: f64 = (first..end).map(weight).sum();
        return (first..end).map(|i| (i, weight(i) / total)).collect();
    }
    let place = centre - 0.5;
    let left = place.floor();
    let tap = |k: i64| {
        let index = (left as i64 + k).clamp(0, count as i64 - 1);
        (index as usize, cubic(place - (left + k as f64), -0.75))
    };
    (-1..=2).map(tap).collect()
}

/// Keys' cubic convolution kernel.
fn cubic(x: f64, a: f64) -> f64 {
    let x = x.abs();
    if x <= 1.0 {
        ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        ((a * x - 5.0 * a) * x + 8.0 * a) * x - 4.0 * a
    } else {
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_sum_to_one_and_the_identity_is_exact() {
        for (count, out, antialias) in [(7, 4, true), (7, 4, false), (5, 12, true), (37, 16, true)]
        {
            let scale = count as f64 / out as f64;
            for i in 0..out {
                let sum: f64 = taps(i, count, scale, antialias).iter().map(|t| t.1).sum();
                assert!((sum - 1.0).abs() < 1e-12);
            }
        }
        let table: Vec<f32> = (0..24).map(|i| (i as f32).sin()).collect();
        for antialias in [false, true] {
            let sampling = Sampling {
                scale: [1.0; 2],
                antialias,
            };
            assert_eq!(resample(&table, [3, 4], [3, 4], 2, sampling), table);
        }
    }
}
