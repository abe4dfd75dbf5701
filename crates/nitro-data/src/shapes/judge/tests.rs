//! The judge against pictures whose contents are known.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::super::{Colour, Example, Kind, Scene, ShapesError, render};
use super::{Detection, judge};

/// Objects judged right (class, colour, and a box within `slack` pixels: the last pixels of a
/// crescent's or star's tip are less than half covered), objects shown, detections of nothing; and the mean confidence.
#[derive(Debug, Default)]
struct Tally {
    right: usize,
    objects: usize,
    extra: usize,
    confidence: f64,
}

impl Tally {
    fn add(&mut self, scene: &Scene, found: &[Detection], side: usize, slack: f32) {
        self.objects += scene.objects.len();
        self.extra += found.len().saturating_sub(scene.objects.len());
        for object in &scene.objects {
            let truth = object.bbox().map(|v| v * side as f32);
            let hit = found.iter().find(|d| {
                d.bbox
                    .iter()
                    .zip(truth)
                    .all(|(a, b)| (a - b).abs() <= slack)
                    && (d.class, d.colour) == (object.class, object.colour)
            });
            match hit {
                Some(d) => {
                    self.right += 1;
                    self.confidence += f64::from(d.confidence);
                }
                None if std::env::var_os("NITRO_JUDGE_VERBOSE").is_some() => {
                    eprintln!("missed {object:?}\n  box {truth:?} found {found:?}");
                }
                None => {}
            }
        }
    }

    fn share(&self) -> f64 {
        self.right as f64 / self.objects as f64
    }
}

fn tally(side: usize, scenes: u64, slack: f32, change: impl Fn(&mut Vec<u8>, u64)) -> Tally {
    let mut tally = Tally::default();
    for seed in 0..scenes {
        // Half captioned examples, half free scenes, so that rare mixtures occur too.
        let scene = if seed % 2 == 0 {
            Example::from_seed(seed).scene
        } else {
            Scene::sample(&mut StdRng::seed_from_u64(seed))
        };
        let mut rgb = render(&scene, side);
        change(&mut rgb, seed);
        tally.add(&scene, &judge(&rgb, side, side).unwrap(), side, slack);
    }
    println!(
        "side {side}: {:.4} of {} objects right, {} extra, mean confidence {:.3}",
        tally.share(),
        tally.objects,
        tally.extra,
        tally.confidence / tally.right.max(1) as f64
    );
    tally
}

#[test]
fn rendered_objects_are_read_right() {
    for side in [96, 128, 256] {
        let t = tally(side, 400, 2.5, |_, _| {});
        assert!(t.share() >= 0.995 && t.extra <= 1, "side {side}: {t:?}");
    }
}

/// Something like an autoencoder's reconstruction: a 3x3 binomial blur and ±10 levels of noise per
/// channel.
fn degrade(rgb: &mut [u8], side: usize, seed: u64, passes: usize, noise: f32) {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut a: Vec<f32> = rgb.iter().map(|&v| f32::from(v)).collect();
    for _ in 0..passes {
        for step in [1usize, side] {
            let b = a.clone();
            for i in 0..side * side {
                let along = if step == 1 { i % side } else { i / side };
                let before = if along == 0 { i } else { i - step };
                let after = if along + 1 == side { i } else { i + step };
                for c in 0..3 {
                    a[3 * i + c] =
                        (b[3 * before + c] + 2.0 * b[3 * i + c] + b[3 * after + c]) / 4.0;
                }
            }
        }
    }
    for (o, v) in rgb.iter_mut().zip(a) {
        *o = (v + rng.random_range(-noise..=noise))
            .round()
            .clamp(0.0, 255.0) as u8;
    }
}

#[test]
fn blurred_and_noisy_objects_are_read_right() {
    let t = tally(128, 300, 3.0, |rgb, seed| degrade(rgb, 128, seed, 1, 10.0));
    assert!(t.share() >= 0.99 && t.extra <= 3, "{t:?}");
    let t = tally(128, 300, 4.0, |rgb, seed| degrade(rgb, 128, seed, 4, 16.0));
    assert!(t.share() >= 0.97, "{t:?}");
}

#[test]
fn every_kind_is_read_right_on_light_and_dark() {
    use super::super::{Brightness, Class};
    let mut rng = StdRng::seed_from_u64(4);
    for class in Class::ALL {
        for colour in Colour::ALL {
            for brightness in [Brightness::Light, Brightness::Dark] {
                let kinds = [Kind { class, colour }; 4];
                let scene = Scene::with_kinds(&mut rng, &kinds, Some(brightness), None);
                let found = judge(&render(&scene, 128), 128, 128).unwrap();
                assert_eq!(found.len(), 4, "{colour} {class}");
                let same = found.iter().all(|d| (d.class, d.colour) == (class, colour));
                assert!(same, "{colour} {class}: {found:?}");
            }
        }
    }
}

#[test]
fn an_empty_background_and_flat_pictures_hold_nothing() {
    let mut scene = Example::from_seed(1).scene;
    scene.objects.clear();
    assert_eq!(judge(&render(&scene, 128), 128, 128).unwrap(), []);
    for level in [120, 170, 215] {
        assert_eq!(judge(&[level; 64 * 64 * 3], 64, 64).unwrap(), [], "{level}");
    }
    // Pictures of no world at all are answered, not refused.
    let mut rng = StdRng::seed_from_u64(5);
    let noise: Vec<u8> = (0..64 * 48 * 3).map(|_| rng.random()).collect();
    judge(&noise, 64, 48).unwrap();
    for level in [0, 255] {
        judge(&[level; 64 * 64 * 3], 64, 64).unwrap();
    }
}

#[test]
fn wrong_sizes_are_refused() {
    assert_eq!(
        judge(&[0; 7], 64, 64),
        Err(ShapesError::BufferSize {
            what: "judge",
            expected: 64 * 64 * 3,
            actual: 7
        })
    );
    assert_eq!(
        judge(&[0; 16 * 16 * 3], 16, 16),
        Err(ShapesError::TooSmall {
            width: 16,
            height: 16
        })
    );
}
