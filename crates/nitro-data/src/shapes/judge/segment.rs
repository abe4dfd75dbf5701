//! Pixels to components.
//!
//! A pixel of an object's edge, or of a slightly blurred picture, is a mixture of the background
//! and a colour. So a pixel is compared with the ten lines from the background's grey to the palette
//! colours rather than with the colours themselves: the nearest line names the colour, the place on
//! it says how much of the pixel is object. On an object's inside this is the nearest palette
//! colour; near the grey axis it is background, since every line starts there.

use super::super::Colour;
use super::MIN_AREA;
use super::template::Silhouette;

/// A picture as the judge reads it.
pub(super) struct View<'a> {
    pub(super) rgb: &'a [u8],
    pub(super) width: usize,
    pub(super) height: usize,
}

impl View<'_> {
    fn pixel(&self, i: usize) -> [f32; 3] {
        [0, 1, 2].map(|c| f32::from(self.rgb[3 * i + c]))
    }
}

/// A grey level linear in the position: the specification's background.
#[derive(Clone, Copy)]
struct Plane {
    base: f32,
    per_x: f32,
    per_y: f32,
}

impl Plane {
    fn at(&self, x: usize, y: usize) -> f32 {
        // Clamped so that a bad fit in a bad picture still leaves room for black and white.
        (self.base + self.per_x * x as f32 + self.per_y * y as f32).clamp(70.0, 235.0)
    }

    /// Fits the grey pixels: first those around the commonest level, then those near the plane, so
    /// that black and white objects, shadows and soft edges drop out.
    fn fit(view: &View<'_>) -> Plane {
        let mut grey = Vec::with_capacity(view.width * view.height);
        let mut histogram = [0usize; 256];
        for i in 0..view.width * view.height {
            let [r, g, b] = view.pixel(i);
            let spread = r.max(g).max(b) - r.min(g).min(b);
            if spread <= 20.0 {
                let level = (r + g + b) / 3.0;
                histogram[level as usize] += 1;
                grey.push(((i % view.width) as f32, (i / view.width) as f32, level));
            }
        }
        // White's shaded end is at 228 and black's at 17, so the search for the commonest level
        // stays between; a window of 13 evens out the noise.
        let window = |l: &usize| histogram[l - 6..=l + 6].iter().sum::<usize>();
        let mode = (100..=218).max_by_key(window).unwrap_or(172) as f32;
        let mut plane = Plane {
            base: mode,
            per_x: 0.0,
            per_y: 0.0,
        };
        for tolerance in [45.0, 25.0, 12.0, 8.0] {
            let near = grey.iter().filter(|&&(x, y, l)| {
                let p = plane.base + plane.per_x * x + plane.per_y * y;
                (l - p).abs() <= tolerance && l < 224.0
            });
            match least_squares(near) {
                Some(better) => plane = better,
                None => break,
            }
        }
        plane
    }
}

/// Least squares plane through `(x, y, level)`; `None` when the points do not fix one.
fn least_squares<'a>(points: impl Iterator<Item = &'a (f32, f32, f32)>) -> Option<Plane> {
    let (mut n, mut s) = (0f64, [0f64; 8]);
    for &(x, y, l) in points {
        let (x, y, l) = (f64::from(x), f64::from(y), f64::from(l));
        n += 1.0;
        for (s, v) in s
            .iter_mut()
            .zip([x, y, l, x * x, x * y, y * y, x * l, y * l])
        {
            *s += v;
        }
    }
    if n < 30.0 {
        return None;
    }
    let [mx, my, ml] = [s[0] / n, s[1] / n, s[2] / n];
    let (xx, xy, yy) = (s[3] / n - mx * mx, s[4] / n - mx * my, s[5] / n - my * my);
    let (xl, yl) = (s[6] / n - mx * ml, s[7] / n - my * ml);
    let det = xx * yy - xy * xy;
    if det <= 1e-3 * (xx + yy) {
        return None;
    }
    let per_x = (xl * yy - yl * xy) / det;
    let per_y = (yl * xx - xl * xy) / det;
    Some(Plane {
        base: (ml - per_x * mx - per_y * my) as f32,
        per_x: per_x as f32,
        per_y: per_y as f32,
    })
}

/// The share of `colour` in a pixel over `grey`, and the squared distance to their line.
fn mixture(pixel: [f32; 3], grey: f32, colour: [f32; 3]) -> (f32, f32) {
    let (mut dv, mut vv) = (0f32, 0f32);
    for i in 0..3 {
        let v = colour[i] - grey;
        dv += (pixel[i] - grey) * v;
        vv += v * v;
    }
    let share = (dv / vv.max(1.0)).clamp(0.0, 1.0);
    let mut distance = 0f32;
    for i in 0..3 {
        let e = pixel[i] - grey - share * (colour[i] - grey);
        distance += e * e;
    }
    (share, distance)
}

const NONE: u8 = u8::MAX;
const UNSEEN: u32 = u32::MAX;
/// No palette colour lies nearer than 60 to a grey of 140..=205, so a pixel within 28 of the
/// background has less than half a colour in it.
const SURELY_BACKGROUND: f32 = 28.0 * 28.0;

/// A connected component of one colour.
pub(super) struct Component {
    colour: Colour,
    plane: Plane,
    /// Pixel indices.
    pixels: Vec<u32>,
    /// Left, top, right, bottom; the last two exclusive.
    bounds: [usize; 4],
}

/// The components of at least [`MIN_AREA`] of the picture, largest first.
pub(super) fn components(view: &View<'_>) -> Vec<Component> {
    let plane = Plane::fit(view);
    let colours = label_colours(view, plane);
    let (mut parts, owner) = connect(&colours, view.width, view.height);
    let least = (MIN_AREA * (view.width * view.height) as f32).ceil() as usize;
    absorb_specks(&mut parts, &owner, view.width, view.height, least);
    parts.retain(|p| p.len() >= least);
    parts.sort_by_key(|p| std::cmp::Reverse(p.len()));
    parts
        .into_iter()
        .map(|pixels| {
            // Absorbed specks were appended: the first pixel is of the component's own colour.
            let colour = Colour::ALL[usize::from(colours[pixels[0] as usize])];
            let mut bounds = [usize::MAX, usize::MAX, 0, 0];
            for &i in &pixels {
                let (x, y) = (i as usize % view.width, i as usize / view.width);
                bounds = [
                    bounds[0].min(x),
                    bounds[1].min(y),
                    bounds[2].max(x + 1),
                    bounds[3].max(y + 1),
                ];
            }
            Component {
                colour,
                plane,
                pixels,
                bounds,
            }
        })
        .collect()
}

/// The palette index of every pixel that is at least half object.
fn label_colours(view: &View<'_>, plane: Plane) -> Vec<u8> {
    let palette = Colour::ALL.map(Colour::rgb_f32);
    let mut labels = vec![NONE; view.width * view.height];
    for (i, label) in labels.iter_mut().enumerate() {
        let grey = plane.at(i % view.width, i / view.width);
        let pixel = view.pixel(i);
        if pixel.iter().map(|p| (p - grey) * (p - grey)).sum::<f32>() < SURELY_BACKGROUND {
            continue;
        }
        let mut best = (0.0, f32::MAX);
        for (c, &colour) in palette.iter().enumerate() {
            let found = mixture(pixel, grey, colour);
            if found.1 < best.1 {
                best = found;
                *label = c as u8;
            }
        }
        if best.0 < 0.5 {
            *label = NONE;
        }
    }
    labels
}

/// 8-connected parts of equal label, and the part that owns each pixel.
fn connect(labels: &[u8], width: usize, height: usize) -> (Vec<Vec<u32>>, Vec<u32>) {
    let mut owner = vec![UNSEEN; labels.len()];
    let mut parts: Vec<Vec<u32>> = Vec::new();
    for start in 0..labels.len() {
        if labels[start] == NONE || owner[start] != UNSEEN {
            continue;
        }
        let id = parts.len() as u32;
        owner[start] = id;
        let mut pixels = vec![start as u32];
        let mut next = 0;
        while next < pixels.len() {
            let at = pixels[next] as usize;
            next += 1;
            for j in neighbours(at, width, height) {
                if labels[j] == labels[start] && owner[j] == UNSEEN {
                    owner[j] = id;
                    pixels.push(j as u32);
                }
            }
        }
        parts.push(pixels);
    }
    (parts, owner)
}

fn neighbours(at: usize, width: usize, height: usize) -> impl Iterator<Item = usize> {
    let (x, y) = (at % width, at / width);
    let columns = x.saturating_sub(1)..=(x + 1).min(width - 1);
    (y.saturating_sub(1)..=(y + 1).min(height - 1))
        .flat_map(move |j| columns.clone().map(move |i| j * width + i))
        .filter(move |&i| i != at)
}

/// Gives specks of a stray colour to the object they touch most: they are its pixels, misread.
fn absorb_specks(parts: &mut [Vec<u32>], owner: &[u32], width: usize, height: usize, least: usize) {
    let large: Vec<bool> = parts.iter().map(|p| p.len() >= least).collect();
    for speck in 0..parts.len() {
        if large[speck] {
            continue;
        }
        let mut contacts: Vec<(u32, usize)> = Vec::new();
        for &i in &parts[speck] {
            for j in neighbours(i as usize, width, height) {
                let o = owner[j];
                if o != UNSEEN && large[o as usize] {
                    match contacts.iter_mut().find(|c| c.0 == o) {
                        Some(c) => c.1 += 1,
                        None => contacts.push((o, 1)),
                    }
                }
            }
        }
        if let Some(&(host, _)) = contacts.iter().max_by_key(|c| c.1) {
            let pixels = std::mem::take(&mut parts[speck]);
            parts[host as usize].extend(pixels);
        }
    }
}

impl Component {
    pub(super) fn bbox(&self) -> [f32; 4] {
        self.bounds.map(|b| b as f32)
    }

    /// Nearest palette colour of the mean over the pixels that are wholly object.
    pub(super) fn nearest_colour(&self, view: &View<'_>) -> Colour {
        let target = self.colour.rgb_f32();
        let (mut sum, mut n) = ([0f32; 3], 0f32);
        for &i in &self.pixels {
            let i = i as usize;
            let pixel = view.pixel(i);
            let grey = self.plane.at(i % view.width, i / view.width);
            if mixture(pixel, grey, target).0 >= 0.85 {
                for (s, p) in sum.iter_mut().zip(pixel) {
                    *s += p;
                }
                n += 1.0;
            }
        }
        if n < 4.0 {
            return self.colour;
        }
        let distance = |c: &Colour| {
            let d = c.rgb_f32();
            (0..3).map(|i| (sum[i] / n - d[i]).powi(2)).sum::<f32>()
        };
        Colour::ALL
            .into_iter()
            .min_by(|a, b| distance(a).total_cmp(&distance(b)))
            .unwrap_or(self.colour)
    }

    /// The component's soft mask with its area and centroid.
    pub(super) fn silhouette(&self, view: &View<'_>) -> Silhouette {
        const PAD: usize = 2;
        let [left, top, right, bottom] = self.bounds;
        let (width, height) = (right - left + 2 * PAD, bottom - top + 2 * PAD);
        let mut values = vec![0f32; width * height];
        let at = |i: u32| {
            let (x, y) = (i as usize % view.width, i as usize / view.width);
            (y + PAD - top) * width + x + PAD - left
        };
        let share = |i: usize| {
            let grey = self.plane.at(i % view.width, i / view.width);
            mixture(view.pixel(i), grey, self.colour.rgb_f32()).0
        };
        let mut centroid = [0f64; 2];
        for &i in &self.pixels {
            let (x, y) = (i as usize % view.width, i as usize / view.width);
            centroid[0] += x as f64 + 0.5;
            centroid[1] += y as f64 + 0.5;
            values[at(i)] = share(i as usize).max(0.5);
        }
        // The faint outer half of an edge lets the outline run between pixel centres.
        for &i in &self.pixels {
            for j in neighbours(i as usize, view.width, view.height) {
                let v = &mut values[at(j as u32)];
                if *v == 0.0 {
                    *v = share(j).min(0.499);
                }
            }
        }
        let n = self.pixels.len() as f64;
        Silhouette {
            width,
            height,
            values,
            area: n as f32,
            centroid: [
                (centroid[0] / n) as f32 + PAD as f32 - left as f32,
                (centroid[1] / n) as f32 + PAD as f32 - top as f32,
            ],
        }
    }
}
