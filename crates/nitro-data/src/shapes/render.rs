//! Paints a [`Scene`] at any size: gradient and noise, shadows, then the shaded objects.

use super::ShapesError;
use super::geometry::{self, Contour};
use super::raster::{self, Coverage};
use super::scene::{Object, Scene};

/// Shading at either end of an object: ±8 %.
const SHADING: f32 = 0.08;

/// Paints `scene` as `side * side * 3` bytes (rows from the top, RGB).
pub fn render(scene: &Scene, side: usize) -> Vec<u8> {
    let mut out = vec![0u8; side * side * 3];
    paint(scene, side, &mut out);
    out
}

/// Like [`render`], into a buffer the caller keeps.
///
/// # Errors
/// When `out` is not `side * side * 3` bytes long.
pub fn render_into(scene: &Scene, side: usize, out: &mut [u8]) -> Result<(), ShapesError> {
    let expected = side * side * 3;
    if out.len() != expected {
        return Err(ShapesError::BufferSize {
            what: "render",
            expected,
            actual: out.len(),
        });
    }
    paint(scene, side, out);
    Ok(())
}

fn paint(scene: &Scene, side: usize, out: &mut [u8]) {
    let outlines: Vec<Vec<Contour>> = scene
        .objects
        .iter()
        .map(|o| geometry::normalised(o.class, o.rotation).0)
        .collect();
    let mut grey = background(scene, side);
    for (object, outline) in scene.objects.iter().zip(&outlines) {
        shadow(&mut grey, side, object, outline);
    }
    for (pixel, &g) in out.chunks_exact_mut(3).zip(&grey) {
        pixel.fill((g + 0.5) as u8);
    }
    for (object, outline) in scene.objects.iter().zip(&outlines) {
        fill(out, &grey, side, object, outline);
    }
}

/// Gradient and noise, one grey level per pixel.
fn background(scene: &Scene, side: usize) -> Vec<f32> {
    let b = &scene.background;
    let (sin, cos) = b.angle.sin_cos();
    let reach = sin.abs() + cos.abs();
    let slope = (b.to - b.from) / (reach * side as f32);
    let middle = (b.from + b.to) / 2.0;
    let half = side as f32 / 2.0;
    let mut noise = Noise::new(b.noise_seed);
    let mut grey = vec![0f32; side * side];
    for (y, row) in grey.chunks_exact_mut(side.max(1)).enumerate() {
        let start = middle + slope * ((y as f32 + 0.5 - half) * sin + (0.5 - half) * cos);
        for (x, block) in row.chunks_mut(8).enumerate() {
            let bits = noise.next();
            for (i, g) in block.iter_mut().enumerate() {
                // A byte scaled to 0..5: the uniform levels -2, -1, 0, 1, 2.
                let level = (((bits >> (8 * i)) & 0xff) * 5) >> 8;
                *g = start + slope * cos * (8 * x + i) as f32 + level as f32 - 2.0;
            }
        }
    }
    grey
}

/// SplitMix64: eight noise bytes per draw, the same on every machine.
struct Noise(u64);

impl Noise {
    fn new(seed: u64) -> Noise {
        Noise(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

fn shadow(grey: &mut [f32], side: usize, object: &Object, outline: &[Contour]) {
    let Some(s) = object.shadow else { return };
    let px = side as f32;
    let radius = (s.blur * px / 2.0).round() as usize;
    let centre = [(object.cx + s.dx) * px, (object.cy + s.dy) * px];
    let mut mask = raster::coverage(
        outline,
        centre,
        object.half_size * px,
        2 * radius as i32 + 1,
    );
    raster::blur(&mut mask, radius);
    each_row(&mask, side, |start, values| {
        for (g, v) in grey[start..].iter_mut().zip(values) {
            *g *= 1.0 - s.strength * v.min(1.0);
        }
    });
}

fn fill(out: &mut [u8], grey: &[f32], side: usize, object: &Object, outline: &[Contour]) {
    let px = side as f32;
    let centre = [object.cx * px, object.cy * px];
    let mask = raster::coverage(outline, centre, object.half_size * px, 0);
    let colour = object.colour.rgb_f32();
    let (sin, cos) = object.shade_angle.sin_cos();
    // The shade runs from -8 % to +8 % across the square around the object.
    let reach = object.half_size * px * (sin.abs() + cos.abs());
    let per_pixel = SHADING / reach;
    each_row(&mask, side, |start, values| {
        let x = (start % side) as f32 + 0.5 - centre[0];
        let y = (start / side) as f32 + 0.5 - centre[1];
        let shade = 1.0 + per_pixel * (x * cos + y * sin);
        let step = per_pixel * cos;
        let pixels = out[start * 3..].chunks_exact_mut(3).zip(&grey[start..]);
        for (i, ((pixel, &g), &a)) in pixels.zip(values).enumerate() {
            if a <= 0.0 {
                continue;
            }
            let s = (shade + step * i as f32).clamp(1.0 - SHADING, 1.0 + SHADING);
            for (p, c) in pixel.iter_mut().zip(colour) {
                *p = (g + a * ((c * s).min(255.0) - g) + 0.5) as u8;
            }
        }
    });
}

/// Calls `f(index of the row's first pixel, coverage of the row)` for what lies inside the picture.
fn each_row(mask: &Coverage, side: usize, mut f: impl FnMut(usize, &[f32])) {
    let side = side as i32;
    let left = mask.x0.max(0);
    let right = (mask.x0 + mask.width as i32).min(side);
    if left >= right {
        return;
    }
    for y in mask.y0.max(0)..(mask.y0 + mask.height as i32).min(side) {
        let from = (y - mask.y0) as usize * mask.width + (left - mask.x0) as usize;
        f(
            (y * side + left) as usize,
            &mask.values[from..from + (right - left) as usize],
        );
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Background, Class, Colour};
    use super::*;

    fn scene(colour: Colour, shadow: bool) -> Scene {
        Scene {
            background: Background {
                from: 150.0,
                to: 180.0,
                angle: 0.3,
                noise_seed: 9,
            },
            objects: vec![Object {
                class: Class::Ring,
                colour,
                cx: 0.5,
                cy: 0.5,
                half_size: 0.3,
                rotation: 0.0,
                shade_angle: 1.0,
                shadow: shadow.then_some(crate::shapes::Shadow {
                    dx: 0.02,
                    dy: 0.02,
                    blur: 0.02,
                    strength: 0.15,
                }),
            }],
        }
    }

    fn pixel(rgb: &[u8], side: usize, x: f32, y: f32) -> [i32; 3] {
        let i = ((y * side as f32) as usize * side + (x * side as f32) as usize) * 3;
        [rgb[i], rgb[i + 1], rgb[i + 2]].map(i32::from)
    }

    #[test]
    fn any_size_renders_the_same_scene() {
        for side in [16, 64, 128, 257] {
            let rgb = render(&scene(Colour::Red, true), side);
            assert_eq!(rgb.len(), side * side * 3);
            let [r, g, b] = pixel(&rgb, side, 0.26, 0.5);
            assert!((r - 224).abs() <= 18 && (g - 32).abs() <= 3 && (b - 32).abs() <= 3);
            let hole = pixel(&rgb, side, 0.5, 0.5);
            assert!(
                hole[0] == hole[1] && hole[1] == hole[2] && hole[0] > 120,
                "{hole:?}"
            );
        }
    }

    #[test]
    fn background_is_grey_within_two_levels_of_the_gradient() {
        let s = scene(Colour::Blue, false);
        let rgb = render(&s, 128);
        let mut seen = [0usize; 5];
        for y in 0..128 {
            for x in 0..20 {
                let p = &rgb[(y * 128 + x) * 3..][..3];
                assert!(p[0] == p[1] && p[1] == p[2]);
                let (sin, cos) = 0.3f32.sin_cos();
                let t = ((x as f32 + 0.5 - 64.0) * cos + (y as f32 + 0.5 - 64.0) * sin)
                    / (128.0 * (sin + cos));
                let d = p[0] as f32 - (165.0 + 30.0 * t);
                assert!(d.abs() <= 2.51, "{d}");
                seen[(d.round() as i32 + 2).clamp(0, 4) as usize] += 1;
            }
        }
        assert!(seen.iter().all(|&n| n > 300), "uniform noise: {seen:?}");
    }

    #[test]
    fn shadows_darken_by_at_most_fifteen_percent() {
        let (plain, shaded) = (
            render(&scene(Colour::Red, false), 128),
            render(&scene(Colour::Red, true), 128),
        );
        let mut darkest = 1f32;
        for (a, b) in plain.chunks_exact(3).zip(shaded.chunks_exact(3)) {
            if a[0] == a[1] && a[1] == a[2] {
                darkest = darkest.min(b[0] as f32 / a[0] as f32);
            }
        }
        assert!((0.84..0.95).contains(&darkest), "{darkest}");
    }

    #[test]
    fn a_wrong_buffer_is_refused() {
        let error = render_into(&scene(Colour::Red, true), 8, &mut [0; 10]).unwrap_err();
        assert_eq!(
            error,
            ShapesError::BufferSize {
                what: "render",
                expected: 192,
                actual: 10
            }
        );
    }
}
