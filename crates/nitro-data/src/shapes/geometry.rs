//! The outlines of the eight classes. Units: the unrotated shape lies in about [-1, 1]², y down.

use std::f32::consts::{PI, TAU};
use std::sync::LazyLock;

use super::Class;

/// A closed polygon; the last point joins the first.
pub type Contour = Vec<[f32; 2]>;

/// Inner radius of a ring as a fraction of its outer radius.
pub const RING_INNER: f32 = 0.55;
/// Inner radius of a star as a fraction of its outer radius.
const STAR_INNER: f32 = 0.42;
/// Half the width of a cross's arm.
const CROSS_ARM: f32 = 0.35;
/// A crescent is the unit disc without a disc of this radius ...
const BITE_RADIUS: f32 = 0.85;
/// ... whose centre lies this far to the right.
const BITE_OFFSET: f32 = 0.5;
/// Points per full turn: at 256 pixels a side the largest circle's chord error is below 0.03 pixel.
const TURN: usize = 128;

static OUTLINES: LazyLock<[Vec<Contour>; 8]> = LazyLock::new(|| Class::ALL.map(outline));

fn arc(radius: f32, centre: [f32; 2], from: f32, to: f32, points: usize) -> Contour {
    (0..points)
        .map(|i| {
            let a = from + (to - from) * i as f32 / points as f32;
            [centre[0] + radius * a.cos(), centre[1] + radius * a.sin()]
        })
        .collect()
}

fn outline(class: Class) -> Vec<Contour> {
    match class {
        Class::Circle => vec![arc(1.0, [0.0; 2], 0.0, TAU, TURN)],
        Class::Square => vec![vec![[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]]],
        Class::Triangle => {
            let h = 3f32.sqrt() / 2.0;
            vec![vec![[0.0, -h], [1.0, h], [-1.0, h]]]
        }
        Class::Star => vec![
            (0..10)
                .map(|i| {
                    let r = if i % 2 == 0 { 1.0 } else { STAR_INNER };
                    let a = -PI / 2.0 + PI * i as f32 / 5.0;
                    [r * a.cos(), r * a.sin()]
                })
                .collect(),
        ],
        Class::Heart => vec![
            (0..TURN)
                .map(|i| {
                    let t = TAU * i as f32 / TURN as f32;
                    let y = 13.0 * t.cos()
                        - 5.0 * (2.0 * t).cos()
                        - 2.0 * (3.0 * t).cos()
                        - (4.0 * t).cos();
                    [t.sin().powi(3), -y / 16.0]
                })
                .collect(),
        ],
        Class::Cross => {
            let a = CROSS_ARM;
            vec![vec![
                [-a, -1.0],
                [a, -1.0],
                [a, -a],
                [1.0, -a],
                [1.0, a],
                [a, a],
                [a, 1.0],
                [-a, 1.0],
                [-a, a],
                [-1.0, a],
                [-1.0, -a],
                [-a, -a],
            ]]
        }
        // The hole runs the other way round, so its signed area cancels the disc's.
        Class::Ring => vec![
            arc(1.0, [0.0; 2], 0.0, TAU, TURN),
            arc(RING_INNER, [0.0; 2], TAU, 0.0, TURN),
        ],
        Class::Crescent => {
            // The two circles meet at angle ±tip on the disc and ±bite on the bite.
            let x =
                (1.0 - BITE_RADIUS * BITE_RADIUS + BITE_OFFSET * BITE_OFFSET) / (2.0 * BITE_OFFSET);
            let y = (1.0 - x * x).sqrt();
            let tip = y.atan2(x);
            let bite = y.atan2(x - BITE_OFFSET);
            let mut c = arc(1.0, [0.0; 2], tip, TAU - tip, TURN);
            c.extend(arc(BITE_RADIUS, [BITE_OFFSET, 0.0], TAU - bite, bite, TURN));
            vec![c]
        }
    }
}

/// A class's outline rotated by `degrees` (clockwise as seen), centred on its bounding box and
/// scaled so that the longer side of that box is 2. Returns the contours and half the box's width
/// and height.
pub fn normalised(class: Class, degrees: f32) -> (Vec<Contour>, [f32; 2]) {
    let (s, c) = degrees.to_radians().sin_cos();
    let mut contours: Vec<Contour> = OUTLINES[class as usize]
        .iter()
        .map(|contour| {
            contour
                .iter()
                .map(|&[x, y]| [c * x - s * y, s * x + c * y])
                .collect::<Contour>()
        })
        .collect();
    let (mut lo, mut hi) = ([f32::MAX; 2], [f32::MIN; 2]);
    for p in contours.iter().flatten() {
        for i in 0..2 {
            lo[i] = lo[i].min(p[i]);
            hi[i] = hi[i].max(p[i]);
        }
    }
    let half = [(hi[0] - lo[0]) / 2.0, (hi[1] - lo[1]) / 2.0];
    let scale = 1.0 / half[0].max(half[1]);
    for p in contours.iter_mut().flatten() {
        for i in 0..2 {
            p[i] = (p[i] - (lo[i] + hi[i]) / 2.0) * scale;
        }
    }
    (contours, half.map(|h| h * scale))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normalised_outlines_touch_the_unit_box() {
        for class in Class::ALL {
            for degrees in [-12.0, -3.5, 0.0, 12.0] {
                let (contours, half) = normalised(class, degrees);
                assert!((half[0].max(half[1]) - 1.0).abs() < 1e-5);
                let reach = contours.iter().flatten().fold([0f32; 2], |m, p| {
                    [m[0].max(p[0].abs()), m[1].max(p[1].abs())]
                });
                assert!((reach[0] - half[0]).abs() < 1e-5, "{class} {degrees}");
                assert!((reach[1] - half[1]).abs() < 1e-5, "{class} {degrees}");
            }
        }
    }
}
