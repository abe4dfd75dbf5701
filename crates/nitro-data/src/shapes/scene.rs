//! What a picture shows, in numbers: sampled here, painted by [`render`](mod@super::render), worded by
//! [`caption`](mod@super::caption). All lengths are fractions of the picture's side.

use std::f32::consts::TAU;

use rand::Rng;
use rand::seq::IndexedRandom;
use serde::{Deserialize, Serialize};

use super::geometry;
use super::{Class, Colour, Relation};

/// Least distance of two boxes, and of a box and the border.
pub const GAP: f32 = 0.02;
/// Largest rotation either way, in degrees.
pub const MAX_ROTATION: f32 = 12.0;
/// A picture holds at most this many objects.
pub const MAX_OBJECTS: usize = 4;
/// Grey levels of the background.
pub const LEVELS: std::ops::RangeInclusive<f32> = 140.0..=205.0;
/// Highest background level beside a white object. The palest background the specification allows
/// there is 199; at 186 even the white's shaded end (0.92 * 248 = 228) keeps its 40 levels.
pub const MAX_LEVEL_WITH_WHITE: f32 = 186.0;
/// A background is called light from this mean level on.
pub const LIGHT_FROM: f32 = 178.0;
/// A background is called dark up to this mean level.
pub const DARK_TO: f32 = 167.0;
/// Largest darkening by a shadow.
pub const MAX_SHADOW: f32 = 0.15;

/// The grey gradient behind the objects.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Background {
    /// Level (0..=255) where the gradient starts.
    pub from: f32,
    /// Level where it ends.
    pub to: f32,
    /// Direction in radians.
    pub angle: f32,
    /// Seed of the ±2 levels of noise.
    pub noise_seed: u64,
}

/// How captions speak of the background.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum Brightness {
    Light,
    Dark,
}

impl Background {
    /// "light", "dark", or neither clearly.
    pub fn brightness(&self) -> Option<Brightness> {
        let mean = (self.from + self.to) / 2.0;
        if mean >= LIGHT_FROM {
            Some(Brightness::Light)
        } else if mean <= DARK_TO {
            Some(Brightness::Dark)
        } else {
            None
        }
    }

    /// Draws a background; `with_white` keeps it dark enough for a white object.
    pub fn sample<R: Rng + ?Sized>(
        rng: &mut R,
        with_white: bool,
        brightness: Option<Brightness>,
    ) -> Background {
        let lo = *LEVELS.start();
        let hi = if with_white {
            MAX_LEVEL_WITH_WHITE
        } else {
            *LEVELS.end()
        };
        let mut background = Background {
            from: lo,
            to: lo,
            angle: 0.0,
            noise_seed: 0,
        };
        // Rejection, with an end: the last resort is a narrower range that cannot miss.
        for attempt in 0..64 {
            let (lo, hi) = match brightness {
                Some(Brightness::Light) if attempt == 63 => (LIGHT_FROM, hi),
                Some(Brightness::Dark) if attempt == 63 => (lo, DARK_TO),
                _ => (lo, hi),
            };
            background.from = rng.random_range(lo..=hi);
            background.to = rng.random_range(lo..=hi);
            if brightness.is_none() || background.brightness() == brightness {
                break;
            }
        }
        background.angle = rng.random_range(0.0..TAU);
        background.noise_seed = rng.random();
        background
    }
}

/// A soft shadow under one object.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Shadow {
    /// Offset from the object.
    pub dx: f32,
    /// Offset from the object, y down.
    pub dy: f32,
    /// Radius of the blur.
    pub blur: f32,
    /// Darkening where the shadow is full, at most [`MAX_SHADOW`].
    pub strength: f32,
}

/// A class in a colour: what a caption may say about one object by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Kind {
    pub class: Class,
    pub colour: Colour,
}

impl Kind {
    /// Any class in any colour.
    pub fn sample<R: Rng + ?Sized>(rng: &mut R) -> Kind {
        Kind {
            class: pick(rng, &Class::ALL),
            colour: pick(rng, &Colour::ALL),
        }
    }
}

/// A random element of a non-empty constant list.
pub(super) fn pick<T: Copy, R: Rng + ?Sized>(rng: &mut R, list: &[T]) -> T {
    *list
        .choose(rng)
        .expect("the lists of this module are constants and not empty")
}

/// One object.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Object {
    /// Its class.
    pub class: Class,
    /// Its fill colour.
    pub colour: Colour,
    /// Centre of its bounding box, from the left.
    pub cx: f32,
    /// Centre of its bounding box, from the top.
    pub cy: f32,
    /// Half the longer side of its (rotated) bounding box.
    pub half_size: f32,
    /// Clockwise rotation in degrees.
    pub rotation: f32,
    /// Direction of the ±8 % shading, in radians.
    pub shade_angle: f32,
    /// Its shadow, if it casts one.
    pub shadow: Option<Shadow>,
}

impl Object {
    /// Half the width and half the height of the bounding box.
    pub fn half_extents(&self) -> [f32; 2] {
        geometry::normalised(self.class, self.rotation)
            .1
            .map(|h| h * self.half_size)
    }

    /// Bounding box `[x0, y0, x1, y1]`.
    pub fn bbox(&self) -> [f32; 4] {
        let [hx, hy] = self.half_extents();
        [self.cx - hx, self.cy - hy, self.cx + hx, self.cy + hy]
    }

    fn sample<R: Rng + ?Sized>(rng: &mut R, kind: Kind, count: usize) -> Object {
        Object {
            class: kind.class,
            colour: kind.colour,
            cx: 0.5,
            cy: 0.5,
            half_size: rng.random_range(size_range(count)),
            rotation: rng.random_range(-MAX_ROTATION..=MAX_ROTATION),
            shade_angle: rng.random_range(0.0..TAU),
            shadow: rng.random_bool(0.5).then(|| {
                let angle = rng.random_range(0.0..TAU);
                let distance = rng.random_range(0.005..0.03);
                Shadow {
                    dx: distance * angle.cos(),
                    dy: distance * angle.sin(),
                    blur: rng.random_range(0.01..0.03),
                    strength: rng.random_range(0.04..MAX_SHADOW),
                }
            }),
        }
    }
}

/// Range of half sizes when a picture holds `count` objects.
pub fn size_range(count: usize) -> std::ops::RangeInclusive<f32> {
    match count {
        0 | 1 => 0.16..=0.32,
        2 => 0.12..=0.20,
        _ => 0.10..=0.15,
    }
}

/// A whole picture.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Scene {
    /// The grey behind.
    pub background: Background,
    /// One to four objects.
    pub objects: Vec<Object>,
}

impl Scene {
    /// A scene of one to four objects of any kind.
    pub fn sample<R: Rng + ?Sized>(rng: &mut R) -> Scene {
        let count = rng.random_range(1..=MAX_OBJECTS);
        let kinds: Vec<Kind> = (0..count).map(|_| Kind::sample(rng)).collect();
        Scene::with_kinds(rng, &kinds, None, None)
    }

    /// A scene showing exactly these kinds (one to [`MAX_OBJECTS`]; further ones are dropped), in
    /// this order. `relation` asks that the first object clearly stand so to the second.
    pub fn with_kinds<R: Rng + ?Sized>(
        rng: &mut R,
        kinds: &[Kind],
        brightness: Option<Brightness>,
        relation: Option<Relation>,
    ) -> Scene {
        let kinds = &kinds[..kinds.len().min(MAX_OBJECTS)];
        let with_white = kinds.iter().any(|k| k.colour == Colour::White);
        let background = Background::sample(rng, with_white, brightness);
        let mut objects = Vec::new();
        // Rejection with an end: a layout that cannot fail follows the last attempt.
        for _ in 0..64 {
            objects = kinds
                .iter()
                .map(|&k| Object::sample(rng, k, kinds.len()))
                .collect();
            if scatter(rng, &mut objects) && relation_ok(&objects, relation) {
                return Scene {
                    background,
                    objects,
                };
            }
        }
        arrange(&mut objects, relation);
        Scene {
            background,
            objects,
        }
    }
}

fn relation_ok(objects: &[Object], relation: Option<Relation>) -> bool {
    match (relation, objects) {
        (None, _) => true,
        (Some(r), [a, b, ..]) => Relation::between(a, b) == Some(r),
        (Some(_), _) => false,
    }
}

/// Places objects at random; false when one finds no room in 40 throws.
fn scatter<R: Rng + ?Sized>(rng: &mut R, objects: &mut [Object]) -> bool {
    let halves: Vec<[f32; 2]> = objects.iter().map(Object::half_extents).collect();
    for i in 0..objects.len() {
        let [hx, hy] = halves[i];
        let placed = (0..40).any(|_| {
            let x = rng.random_range(hx + GAP..=1.0 - hx - GAP);
            let y = rng.random_range(hy + GAP..=1.0 - hy - GAP);
            let free = (0..i).all(|j| {
                let [ox, oy] = halves[j];
                (x - objects[j].cx).abs() >= hx + ox + GAP
                    || (y - objects[j].cy).abs() >= hy + oy + GAP
            });
            if free {
                (objects[i].cx, objects[i].cy) = (x, y);
            }
            free
        });
        if !placed {
            return false;
        }
    }
    true
}

/// Places objects where they always fit: quarter centres (half size <= 0.20 < 0.25 - GAP), the first
/// two along the relation's axis.
fn arrange(objects: &mut [Object], relation: Option<Relation>) {
    let spots = match relation {
        Some(Relation::LeftOf) => [(0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)],
        Some(Relation::RightOf) => [(0.75, 0.25), (0.25, 0.25), (0.25, 0.75), (0.75, 0.75)],
        Some(Relation::Above) => [(0.25, 0.25), (0.25, 0.75), (0.75, 0.25), (0.75, 0.75)],
        Some(Relation::Below) => [(0.25, 0.75), (0.25, 0.25), (0.75, 0.25), (0.75, 0.75)],
        None => [(0.25, 0.25), (0.75, 0.75), (0.25, 0.75), (0.75, 0.25)],
    };
    if let [only] = objects {
        (only.cx, only.cy) = (0.5, 0.5);
        return;
    }
    for (object, spot) in objects.iter_mut().zip(spots) {
        (object.cx, object.cy) = spot;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    fn assert_legal(scene: &Scene) {
        let range = size_range(scene.objects.len());
        let boxes: Vec<[f32; 4]> = scene.objects.iter().map(Object::bbox).collect();
        let eps = 1e-5;
        for (i, (o, b)) in scene.objects.iter().zip(&boxes).enumerate() {
            assert!(range.contains(&o.half_size), "{o:?}");
            let longer = (b[2] - b[0]).max(b[3] - b[1]) / 2.0;
            assert!(
                (longer - o.half_size).abs() < eps,
                "half size is half the box: {o:?}"
            );
            assert!(
                b[0].min(b[1]) >= GAP - eps && b[2].max(b[3]) <= 1.0 - GAP + eps,
                "{b:?}"
            );
            for c in &boxes[..i] {
                let gap_x = (b[0] - c[2]).max(c[0] - b[2]);
                let gap_y = (b[1] - c[3]).max(c[1] - b[3]);
                assert!(gap_x.max(gap_y) >= GAP - eps, "{b:?} {c:?}");
            }
            if o.colour == Colour::White {
                let top = scene.background.from.max(scene.background.to);
                assert!(top < 200.0 && 248.0 * 0.92 - top >= 40.0);
            }
        }
    }

    #[test]
    fn sampled_scenes_follow_the_specification() {
        let mut rng = StdRng::seed_from_u64(1);
        for _ in 0..3000 {
            let scene = Scene::sample(&mut rng);
            assert!((1..=MAX_OBJECTS).contains(&scene.objects.len()));
            assert_legal(&scene);
            assert!(LEVELS.contains(&scene.background.from));
            assert!(LEVELS.contains(&scene.background.to));
        }
    }

    #[test]
    fn brightness_and_relation_are_honoured() {
        let mut rng = StdRng::seed_from_u64(2);
        let white = Kind {
            class: Class::Square,
            colour: Colour::White,
        };
        for relation in Relation::ALL {
            for brightness in [Brightness::Light, Brightness::Dark] {
                for _ in 0..50 {
                    let scene = Scene::with_kinds(
                        &mut rng,
                        &[white, white],
                        Some(brightness),
                        Some(relation),
                    );
                    assert_legal(&scene);
                    assert_eq!(scene.background.brightness(), Some(brightness));
                    let [a, b] = &scene.objects[..] else {
                        panic!("two objects")
                    };
                    assert_eq!(Relation::between(a, b), Some(relation));
                }
            }
        }
    }

    #[test]
    fn the_last_resort_layout_is_legal_too() {
        let mut rng = StdRng::seed_from_u64(3);
        for count in 1..=MAX_OBJECTS {
            for relation in Relation::ALL {
                let mut objects: Vec<Object> = (0..count)
                    .map(|_| {
                        let kind = Kind::sample(&mut rng);
                        let mut o = Object::sample(&mut rng, kind, count);
                        o.half_size = *size_range(count).end();
                        o
                    })
                    .collect();
                let relation = (count >= 2).then_some(relation);
                arrange(&mut objects, relation);
                assert!(relation_ok(&objects, relation));
                let background = Background {
                    from: 150.,
                    to: 150.,
                    angle: 0.,
                    noise_seed: 0,
                };
                assert_legal(&Scene {
                    background,
                    objects,
                });
            }
        }
    }
}
