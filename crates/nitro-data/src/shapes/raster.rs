//! Exact-area polygon coverage: every edge leaves, in each pixel it crosses, the change of covered
//! area to its right; a running sum along the row turns the changes into coverage.

use super::geometry::Contour;

/// Coverage of a rectangle of pixels.
pub(super) struct Coverage {
    /// Left column and top row in the picture (may be negative).
    pub(super) x0: i32,
    pub(super) y0: i32,
    pub(super) width: usize,
    pub(super) height: usize,
    /// Row-major, 0 (outside) to 1 (inside).
    pub(super) values: Vec<f32>,
}

/// Rasterises contours whose points are `p * scale + centre` in pixels, with `pad` empty pixels
/// around the shape (room for a blur).
pub(super) fn coverage(contours: &[Contour], centre: [f32; 2], scale: f32, pad: i32) -> Coverage {
    let place = |p: [f32; 2]| [p[0] * scale + centre[0], p[1] * scale + centre[1]];
    let (mut lo, mut hi) = ([f32::MAX; 2], [f32::MIN; 2]);
    for p in contours.iter().flatten() {
        let p = place(*p);
        for i in 0..2 {
            lo[i] = lo[i].min(p[i]);
            hi[i] = hi[i].max(p[i]);
        }
    }
    let x0 = lo[0].floor() as i32 - pad;
    let y0 = lo[1].floor() as i32 - pad;
    let width = (hi[0].ceil() as i32 - x0 + pad).max(1) as usize;
    let height = (hi[1].ceil() as i32 - y0 + pad).max(1) as usize;
    // Two spare columns take the change to the right of the last pixel.
    let stride = width + 2;
    let mut delta = vec![0f32; stride * height];
    let origin = [x0 as f32, y0 as f32];
    for contour in contours {
        let mut previous = contour.last().map(|&p| place(p)).unwrap_or_default();
        for &p in contour {
            let p = place(p);
            edge(
                &mut delta,
                stride,
                height,
                [previous[0] - origin[0], previous[1] - origin[1]],
                [p[0] - origin[0], p[1] - origin[1]],
            );
            previous = p;
        }
    }
    let mut values = Vec::with_capacity(width * height);
    for row in delta.chunks_exact(stride) {
        let mut sum = 0f32;
        values.extend(row[..width].iter().map(|d| {
            sum += d;
            sum.abs().min(1.0)
        }));
    }
    Coverage {
        x0,
        y0,
        width,
        height,
        values,
    }
}

/// Adds one edge to the change buffer.
fn edge(delta: &mut [f32], stride: usize, height: usize, a: [f32; 2], b: [f32; 2]) {
    let (sign, a, b) = if a[1] <= b[1] {
        (1.0, a, b)
    } else {
        (-1.0, b, a)
    };
    let dy = b[1] - a[1];
    if dy <= 0.0 {
        return;
    }
    let slope = (b[0] - a[0]) / dy;
    let last = (b[1].ceil() as usize).min(height);
    for row in a[1] as usize..last {
        let top = a[1].max(row as f32);
        let bottom = b[1].min(row as f32 + 1.0);
        if bottom <= top {
            continue;
        }
        let xa = a[0] + slope * (top - a[1]);
        let xb = a[0] + slope * (bottom - a[1]);
        let (xl, xr) = if xa <= xb { (xa, xb) } else { (xb, xa) };
        let line = &mut delta[row * stride..(row + 1) * stride];
        let area = sign * (bottom - top);
        let (first, end) = (xl.max(0.0) as usize, xr.max(0.0) as usize);
        if first == end || xr - xl < 1e-6 {
            spread(line, first, area, (xl + xr) / 2.0);
            continue;
        }
        // The edge crosses several pixels of this row: each takes its share of the height.
        let per_x = area / (xr - xl);
        let mut x = xl;
        for cell in first..=end {
            let next = xr.min(cell as f32 + 1.0);
            if next > x {
                spread(line, cell, per_x * (next - x), (x + next) / 2.0);
            }
            x = next;
        }
    }
}

/// An edge piece of signed height `area` at mean position `x` inside pixel `cell`.
fn spread(line: &mut [f32], cell: usize, area: f32, x: f32) {
    let cell = cell.min(line.len() - 2);
    let right = (cell as f32 + 1.0 - x).clamp(0.0, 1.0);
    line[cell] += area * right;
    line[cell + 1] += area * (1.0 - right);
}

/// Two box blurs of the given radius in each direction: close to a Gaussian, cost independent of
/// the radius.
pub(super) fn blur(mask: &mut Coverage, radius: usize) {
    if radius == 0 {
        return;
    }
    let (w, h) = (mask.width, mask.height);
    let mut scratch = vec![0f32; w * h];
    for _ in 0..2 {
        box_rows(&mask.values, &mut scratch, w, radius);
        box_columns(&scratch, &mut mask.values, w, h, radius);
    }
}

fn box_rows(input: &[f32], out: &mut [f32], w: usize, r: usize) {
    let norm = 1.0 / (2 * r + 1) as f32;
    for (line, out) in input.chunks_exact(w).zip(out.chunks_exact_mut(w)) {
        let mut sum: f32 = line[..r.min(w)].iter().sum();
        for x in 0..w {
            if x + r < w {
                sum += line[x + r];
            }
            if x > r {
                sum -= line[x - r - 1];
            }
            out[x] = sum * norm;
        }
    }
}

fn box_columns(input: &[f32], out: &mut [f32], w: usize, h: usize, r: usize) {
    let norm = 1.0 / (2 * r + 1) as f32;
    let mut sums = vec![0f32; w];
    for y in 0..r.min(h) {
        for (s, v) in sums.iter_mut().zip(&input[y * w..]) {
            *s += v;
        }
    }
    for y in 0..h {
        if y + r < h {
            for (s, v) in sums.iter_mut().zip(&input[(y + r) * w..]) {
                *s += v;
            }
        }
        if y > r {
            for (s, v) in sums.iter_mut().zip(&input[(y - r - 1) * w..]) {
                *s -= v;
            }
        }
        for (o, s) in out[y * w..(y + 1) * w].iter_mut().zip(&sums) {
            *o = (s * norm).max(0.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Class;
    use super::super::geometry::{RING_INNER, normalised};
    use super::*;

    fn area(class: Class, degrees: f32, scale: f32) -> f32 {
        let (contours, _) = normalised(class, degrees);
        coverage(&contours, [40.3, 37.8], scale, 2)
            .values
            .iter()
            .sum()
    }

    #[test]
    fn covered_area_is_the_shapes_area() {
        let r = 20.0f32;
        let disc = std::f32::consts::PI * r * r;
        assert!((area(Class::Circle, 0.0, r) / disc - 1.0).abs() < 2e-3);
        let ring = disc * (1.0 - RING_INNER * RING_INNER);
        assert!((area(Class::Ring, 5.0, r) / ring - 1.0).abs() < 2e-3);
        assert!((area(Class::Square, 0.0, r) - 4.0 * r * r).abs() < 0.1);
        // Rotated, the square of the same bounding box is smaller by (cos + sin)^2.
        let (s, c) = 10f32.to_radians().sin_cos();
        let side = 2.0 * r / (s + c);
        assert!((area(Class::Square, 10.0, r) - side * side).abs() < 0.2);
    }

    #[test]
    fn blur_keeps_the_mass() {
        let (contours, _) = normalised(Class::Heart, 0.0);
        let mut mask = coverage(&contours, [20.0, 20.0], 10.0, 8);
        let before: f32 = mask.values.iter().sum();
        blur(&mut mask, 3);
        let after: f32 = mask.values.iter().sum();
        assert!((after / before - 1.0).abs() < 1e-3, "{before} {after}");
        assert!(mask.values.iter().all(|&v| (0.0..=1.001).contains(&v)));
    }
}
