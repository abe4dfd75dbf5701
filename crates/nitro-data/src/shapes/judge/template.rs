//! Silhouettes to classes: best IoU with the templates after normalising position (centroid) and
//! scale (square root of the area).

use std::sync::LazyLock;

use super::super::Class;
use super::super::geometry;
use super::super::raster;

/// Cells a side of the grid on which silhouettes are compared.
const GRID: usize = 128;
/// Half the grid's width in units of the square root of the area: every template fits.
const REACH: f32 = 1.5;
/// Rotations tried, in degrees.
const MAX_ROTATION: i32 = 15;
/// Twice a degree, so that 2.5 is whole.
const STEP_HALVES: i32 = 5;
const WORDS: usize = GRID * GRID / 64;

type Bits = [u64; WORDS];

/// A component cut out of its picture.
pub(super) struct Silhouette {
    pub(super) width: usize,
    pub(super) height: usize,
    /// Share of the pixel that is object, row-major.
    pub(super) values: Vec<f32>,
    /// Pixels of the component.
    pub(super) area: f32,
    /// In pixels of this cut-out; the first pixel's centre is (0.5, 0.5).
    pub(super) centroid: [f32; 2],
}

struct Template {
    class: Class,
    bits: Bits,
    cells: u32,
}

static TEMPLATES: LazyLock<Vec<Template>> = LazyLock::new(|| {
    let steps = 2 * MAX_ROTATION / STEP_HALVES;
    Class::ALL
        .into_iter()
        .flat_map(|class| (-steps..=steps).map(move |k| template(class, k * STEP_HALVES)))
        .collect()
});

/// Paints a class large, then reads it as any other silhouette.
fn template(class: Class, half_degrees: i32) -> Template {
    let (contours, _) = geometry::normalised(class, half_degrees as f32 / 2.0);
    let mask = raster::coverage(&contours, [0.0; 2], 100.0, 2);
    let (mut area, mut centroid) = (0f32, [0f32; 2]);
    for (i, v) in mask.values.iter().enumerate() {
        area += v;
        centroid[0] += v * ((i % mask.width) as f32 + 0.5);
        centroid[1] += v * ((i / mask.width) as f32 + 0.5);
    }
    let bits = normalise(&Silhouette {
        width: mask.width,
        height: mask.height,
        values: mask.values,
        area,
        centroid: centroid.map(|c| c / area),
    });
    Template {
        class,
        bits,
        cells: count(&bits),
    }
}

fn count(bits: &Bits) -> u32 {
    bits.iter().map(|w| w.count_ones()).sum()
}

/// Samples the silhouette on the grid.
fn normalise(s: &Silhouette) -> Bits {
    let cell = 2.0 * REACH * s.area.sqrt() / GRID as f32;
    let start = |i: usize| s.centroid[i] - cell * (GRID as f32 - 1.0) / 2.0 - 0.5;
    let value = |x: i32, y: i32| {
        let inside = x >= 0 && y >= 0 && (x as usize) < s.width && (y as usize) < s.height;
        if inside {
            s.values[y as usize * s.width + x as usize]
        } else {
            0.0
        }
    };
    let mut bits = [0u64; WORDS];
    for row in 0..GRID {
        let y = start(1) + cell * row as f32;
        if y < -1.0 || y > s.height as f32 {
            continue;
        }
        for column in 0..GRID {
            let x = start(0) + cell * column as f32;
            if x < -1.0 || x > s.width as f32 {
                continue;
            }
            let (x0, y0) = (x.floor(), y.floor());
            let (fx, fy) = (x - x0, y - y0);
            let (x0, y0) = (x0 as i32, y0 as i32);
            let top = value(x0, y0) * (1.0 - fx) + value(x0 + 1, y0) * fx;
            let bottom = value(x0, y0 + 1) * (1.0 - fx) + value(x0 + 1, y0 + 1) * fx;
            if top * (1.0 - fy) + bottom * fy >= 0.5 {
                let i = row * GRID + column;
                bits[i / 64] |= 1 << (i % 64);
            }
        }
    }
    bits
}

/// The class with the best IoU, and that IoU.
pub(super) fn classify(silhouette: &Silhouette) -> (Class, f32) {
    let bits = normalise(silhouette);
    // What a sprawling component has beyond the grid counts against it too.
    let whole = ((GRID * GRID) as f32 / (2.0 * REACH).powi(2)) as u32;
    let cells = count(&bits).max(whole * 9 / 10);
    let mut best = (Class::Circle, 0f32);
    for t in TEMPLATES.iter() {
        let both: u32 = bits
            .iter()
            .zip(&t.bits)
            .map(|(a, b)| (a & b).count_ones())
            .sum();
        let iou = both as f32 / (cells + t.cells - both).max(1) as f32;
        if iou > best.1 {
            best = (t.class, iou);
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every template lies within the grid: its cells number what its area asks for.
    #[test]
    fn templates_fit_the_grid() {
        let expected = (GRID * GRID) as f32 / (2.0 * REACH).powi(2);
        for t in TEMPLATES.iter() {
            assert!(
                (t.cells as f32 / expected - 1.0).abs() < 0.05,
                "{} {}",
                t.class,
                t.cells
            );
            let edge = (0..GRID).any(|i| {
                let bit = |k: usize| t.bits[k / 64] >> (k % 64) & 1 == 1;
                bit(i) || bit(GRID * (GRID - 1) + i) || bit(i * GRID) || bit(i * GRID + GRID - 1)
            });
            assert!(!edge, "{} touches the border of the grid", t.class);
        }
    }

    /// No class is close to another's rotation.
    #[test]
    fn classes_are_far_apart() {
        for a in TEMPLATES.iter() {
            for b in TEMPLATES.iter().filter(|b| b.class != a.class) {
                let both: u32 = a
                    .bits
                    .iter()
                    .zip(&b.bits)
                    .map(|(a, b)| (a & b).count_ones())
                    .sum();
                let iou = both as f32 / (a.cells + b.cells - both) as f32;
                assert!(iou < 0.88, "{} {} {iou}", a.class, b.class);
            }
        }
    }
}
