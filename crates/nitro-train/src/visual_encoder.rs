//! Training the miniature's REPA teacher: a DINOv2 on pictures of the shapes world.
//!
//! DINOv2 learns from many millions of pictures without labels. The shapes world is too small for
//! that and knows its labels, so the teacher learns what DINOv2's patch features are prized for
//! directly: small heads, dropped after training, must read from each patch's feature what it is a
//! part of (class and colour of the object whose box holds the patch's centre) and which part (the
//! way to the object's centre, and the object's size), and from the class token how many objects
//! there are and of which classes and colours. Features of parts of one object are then alike
//! wherever it stands, and tell what a caption speaks of.

use std::ops::Range;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Int, Tensor, TensorData};
use nitro_data::shapes::{Class, Colour, Example, Scene, render, scene::MAX_OBJECTS};
use nitro_models::dinov2::{Dinov2, Dinov2Features};
use nitro_models::layers::Linear;
use nitro_models::{Params, TensorMap};
use nitro_ops::Precision;
use rayon::prelude::*;

use crate::TrainError;
use crate::config::{CommonConfig, VisualEncoderTask};
use crate::data::{HELD_OUT, example_seed};
use crate::losses::{accuracy, binary_cross_entropy, cross_entropy};
use crate::pictures::{from_bytes, normalised, sample_path, write_grid};
use crate::trainer::{Losses, Task};

/// Prefix of the heads' parameters, which are not part of the encoder.
pub(crate) const HEADS: &str = "heads";
/// Weight of the squared error of an object's place and size, whose values are below one.
const PLACE_WEIGHT: f64 = 4.0;

/// A DINOv2, its pictures and their labels.
pub struct VisualEncoder<'a> {
    common: &'a CommonConfig,
    task: &'a VisualEncoderTask,
}

/// Pictures of one step and what is true of them; `P` is the number of all their patches.
pub struct Labelled {
    pixels: Vec<f32>,   // [B, 3, side, side]
    classes: Vec<i32>,  // [P], 0 where no object is
    colours: Vec<i32>,  // [P], likewise
    places: Vec<f32>,   // [P, 3]: to the object's centre in x and y, and its half size
    covered: Vec<f32>,  // [P], 1 where an object is
    counts: Vec<i32>,   // [B], one less than the number of objects
    presence: Vec<f32>, // [B, classes + colours]
}

impl Labelled {
    fn new(scenes: &[Scene], side: usize, grid: usize) -> Self {
        let pixels = scenes
            .par_iter()
            .flat_map_iter(|scene| {
                let picture = render(scene, side);
                normalised(from_bytes(&picture, side, (0, 0), side))
            })
            .collect();
        let mut all = Self {
            pixels,
            classes: Vec::new(),
            colours: Vec::new(),
            places: Vec::new(),
            covered: Vec::new(),
            counts: Vec::new(),
            presence: Vec::new(),
        };
        for scene in scenes {
            all.label(scene, grid);
        }
        all
    }

    fn label(&mut self, scene: &Scene, grid: usize) {
        for place in 0..grid * grid {
            let x = ((place % grid) as f32 + 0.5) / grid as f32;
            let y = ((place / grid) as f32 + 0.5) / grid as f32;
            // Boxes do not overlap.
            let object = scene.objects.iter().find(|object| {
                let [x0, y0, x1, y1] = object.bbox();
                (x0..x1).contains(&x) && (y0..y1).contains(&y)
            });
            self.classes.push(object.map_or(0, |o| 1 + o.class as i32));
            self.colours.push(object.map_or(0, |o| 1 + o.colour as i32));
            self.covered.push(object.map_or(0.0, |_| 1.0));
            let part = object.map(|o| [o.cx - x, o.cy - y, o.half_size]);
            self.places.extend(part.unwrap_or_default());
        }
        self.counts.push(scene.objects.len() as i32 - 1);
        let seen = |any: bool| if any { 1.0 } else { 0.0 };
        let objects = &scene.objects;
        for class in Class::ALL {
            self.presence
                .push(seen(objects.iter().any(|o| o.class == class)));
        }
        for colour in Colour::ALL {
            self.presence
                .push(seen(objects.iter().any(|o| o.colour == colour)));
        }
    }
}

/// What the heads say.
struct Answers {
    class: Tensor<2>,    // [P, 1 + classes]
    colour: Tensor<2>,   // [P, 1 + colours]
    place: Tensor<2>,    // [P, 3]
    count: Tensor<2>,    // [B, MAX_OBJECTS]
    presence: Tensor<2>, // [B, classes + colours]
}

impl<'a> VisualEncoder<'a> {
    /// The task that `task` describes.
    pub fn new(common: &'a CommonConfig, task: &'a VisualEncoderTask) -> Self {
        Self { common, task }
    }

    fn scenes(&self, seeds: impl Iterator<Item = u64>) -> Vec<Scene> {
        seeds.map(|seed| Example::from_seed(seed).scene).collect()
    }

    fn answers(&self, p: &Params<'_>, features: Dinov2Features) -> Result<Answers, TrainError> {
        let d = self.task.model.embed_dim;
        let head = |name: &str, outputs: usize| {
            Linear::new(&p.sub(format_args!("{HEADS}.{name}")), d, outputs)
        };
        let [batch, patches, _] = features.patches.dims();
        let each = features.patches.reshape([batch * patches, d]);
        let whole = features.class;
        let (classes, colours) = (Class::ALL.len(), Colour::ALL.len());
        Ok(Answers {
            class: head("class", 1 + classes)?.forward(each.clone()),
            colour: head("colour", 1 + colours)?.forward(each.clone()),
            place: head("place", 3)?.forward(each),
            count: head("count", MAX_OBJECTS)?.forward(whole.clone()),
            presence: head("presence", classes + colours)?.forward(whole),
        })
    }

    fn forward(&self, p: &Params<'_>, pixels: Vec<f32>) -> Result<Answers, TrainError> {
        let side = self.task.model.img_size;
        let count = pixels.len() / (3 * side * side);
        let model = Dinov2::new(&self.task.model, p)?;
        let pictures = TensorData::new(pixels, [count, 3, side, side]);
        let features = model.forward_features(Tensor::from_data(pictures, &Device::flex()))?;
        self.answers(p, features)
    }
}

impl Task for VisualEncoder<'_> {
    type Batch = Labelled;

    fn build(&self, p: &Params<'_>) -> Result<(), TrainError> {
        let side = self.task.model.img_size;
        self.forward(p, vec![0.0; 3 * side * side])?;
        Ok(())
    }

    fn batch(&self, step: u64, examples: Range<usize>) -> Result<Labelled, TrainError> {
        let seeds = examples.map(|i| example_seed(self.common.seed, step, i));
        let model = &self.task.model;
        Ok(Labelled::new(
            &self.scenes(seeds),
            model.img_size,
            model.grid(),
        ))
    }

    fn loss(&self, p: &Params<'_>, batch: Labelled) -> Result<Losses, TrainError> {
        let device = Device::flex();
        let answers = self.forward(p, batch.pixels)?;
        let [patches, _] = answers.place.dims();
        let [_, kinds] = answers.presence.dims();
        let labels = |values: Vec<i32>| {
            let count = values.len();
            Tensor::<1, Int>::from_data(TensorData::new(values, [count]), &device)
        };
        let (classes, colours) = (labels(batch.classes), labels(batch.colours));
        let class_accuracy = accuracy(answers.class.clone(), classes.clone());
        let colour_accuracy = accuracy(answers.colour.clone(), colours.clone());
        let class = cross_entropy(answers.class, classes, None);
        let colour = cross_entropy(answers.colour, colours, None);
        let places = Tensor::<2>::from_data(TensorData::new(batch.places, [patches, 3]), &device);
        let covered = TensorData::new(batch.covered, [patches, 1]);
        let covered = Tensor::<2>::from_data(covered, &device);
        let place = ((answers.place - places).powi_scalar(2) * covered.clone()).sum()
            / (covered.sum() + 1.0);
        let counts = labels(batch.counts);
        let count_accuracy = accuracy(answers.count.clone(), counts.clone());
        let count = cross_entropy(answers.count, counts, None);
        let pictures = batch.presence.len() / kinds;
        let presence = TensorData::new(batch.presence, [pictures, kinds]);
        let presence = binary_cross_entropy(answers.presence, Tensor::from_data(presence, &device));
        let value = |loss: &Tensor<1>| f64::from(loss.clone().into_scalar::<f32>());
        let parts = vec![
            ("class_accuracy", class_accuracy),
            ("colour_accuracy", colour_accuracy),
            ("place_error", value(&place)),
            ("count_accuracy", count_accuracy),
            ("presence", value(&presence)),
        ];
        Ok(Losses {
            total: class + colour + place * PLACE_WEIGHT + count * 0.5 + presence,
            parts,
        })
    }

    /// Held-out pictures, and under each the classes (as grey levels) and colours read off it.
    fn sample(
        &self,
        averaged: &TensorMap,
        step: u64,
        dir: &Path,
    ) -> Result<Option<PathBuf>, TrainError> {
        let device = Device::flex();
        let params = Params::new(averaged, &device, Precision::F32);
        let (side, grid) = (self.task.model.img_size, self.task.model.grid());
        let scenes = self.scenes((0..8).map(|i| HELD_OUT + i));
        let batch = Labelled::new(&scenes, side, grid);
        let answers = self.forward(&params, batch.pixels)?;
        let pictures: Vec<f32> = scenes
            .iter()
            .flat_map(|scene| from_bytes(&render(scene, side), side, (0, 0), side))
            .collect();
        let pictures = Tensor::from_data(TensorData::new(pictures, [8, 3, side, side]), &device);
        let grey = [172.0; 3];
        let level = |class: usize| [255.0 * class as f32 / Class::ALL.len() as f32; 3];
        let colour = |colour: usize| match colour {
            0 => grey,
            colour => Colour::ALL[colour - 1].rgb_f32(),
        };
        let classes = paint(answers.class, side, grid, level);
        let colours = paint(answers.colour, side, grid, colour);
        let path = sample_path(dir, step);
        write_grid(&path, Tensor::cat(vec![pictures, classes, colours], 0), 8)?;
        Ok(Some(path))
    }
}

/// Each patch in the colour of its largest logit, `[B, 3, side, side]` in `-1..=1`.
fn paint(
    logits: Tensor<2>,
    side: usize,
    grid: usize,
    colour: impl Fn(usize) -> [f32; 3],
) -> Tensor<4> {
    let device = logits.device();
    let kinds: Vec<usize> = logits
        .argmax(1)
        .into_data()
        .iter::<i64>()
        .map(|kind| kind as usize)
        .collect();
    let count = kinds.len() / (grid * grid);
    let mut pixels = Vec::with_capacity(count * 3 * side * side);
    for picture in kinds.chunks_exact(grid * grid) {
        for channel in 0..3 {
            for place in 0..side * side {
                let (x, y) = (place % side * grid / side, place / side * grid / side);
                pixels.push(colour(picture[y * grid + x])[channel] / 127.5 - 1.0);
            }
        }
    }
    Tensor::from_data(TensorData::new(pixels, [count, 3, side, side]), &device)
}
