//! GenEval's colour of an object: CLIP's nearest of ten colour words for the object alone on grey.

use std::collections::HashMap;

use burn::tensor::Device;
use image::{Rgb, RgbImage};
use nitro_models::clip::{Clip, ClipConfig};
use nitro_models::{Params, WeightError};

use super::hps::check_vocabulary;
use super::{id_batch, image_batch, refused, values};
use crate::EvalError;
use crate::geneval::COLORS;
use crate::pixels::{clip_pixels, crop};
use crate::tokens::ClipTokenizer;

/// GenEval's `#999`.
const GREY: Rgb<u8> = Rgb([0x99; 3]);
/// Factor of the cosines, clip_benchmark's.
const LOGIT_SCALE: f32 = 100.0;
/// Crops that go through the model together.
const BATCH: usize = 16;

/// What stands behind an object, GenEval's option `bgcolor`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Background {
    /// Grey.
    #[default]
    Grey,
    /// The picture itself.
    Original,
}

/// An object alone: all but `mask` (of the picture's size, true on the object) replaced by the
/// background, and cut to the box `[x0, y0, x1, y1]` if there is one. Coordinates are rounded as
/// Pillow rounds them, halves to even; beyond the picture it is black.
pub fn object_crop(
    image: &RgbImage,
    bbox: Option<[f32; 4]>,
    mask: Option<&[bool]>,
    background: Background,
) -> RgbImage {
    let mut alone = image.clone();
    if let (Some(mask), Background::Grey) = (mask, background) {
        for (pixel, _) in alone.pixels_mut().zip(mask).filter(|(_, seen)| !**seen) {
            *pixel = GREY;
        }
    }
    match bbox {
        None => alone,
        Some(bbox) => {
            let [x0, y0, x1, y1] = bbox.map(|x| x.round_ties_even() as i64);
            // A degenerate box still needs a pixel.
            let size = |from: i64, to: i64| u32::try_from(to - from).unwrap_or(0).max(1);
            crop(&alone, [x0, y0], [size(x0, x1), size(y0, y1)])
        }
    }
}

/// A zero-shot classifier, a unit vector per class, from the text features of each class's templates.
pub fn color_classifier(features: &[Vec<Vec<f32>>]) -> Vec<Vec<f32>> {
    features
        .iter()
        .map(|templates| {
            let mut mean = vec![0.0; templates.first().map_or(0, Vec::len)];
            for template in templates {
                for (sum, x) in mean.iter_mut().zip(unit(template)) {
                    *sum += x / templates.len() as f32;
                }
            }
            unit(&mean)
        })
        .collect()
}

/// The classes' logits for a picture's features.
pub fn color_logits(features: &[f32], classifier: &[Vec<f32>]) -> Vec<f32> {
    let features = unit(features);
    let dot = |class: &Vec<f32>| class.iter().zip(&features).map(|(a, b)| a * b).sum::<f32>();
    classifier
        .iter()
        .map(|class| LOGIT_SCALE * dot(class))
        .collect()
}

fn unit(x: &[f32]) -> Vec<f32> {
    let length = x.iter().map(|x| x * x).sum::<f32>().sqrt().max(1e-12);
    x.iter().map(|x| x / length).collect()
}

/// CLIP ViT-L/14 as GenEval asks it for colours.
#[derive(Debug)]
pub struct ColorClassifier {
    clip: Clip,
    tokenizer: ClipTokenizer,
    side: u32,
    tokens: usize,
    device: Device,
    /// By class of object: the colours' unit vectors.
    classifiers: HashMap<String, Vec<Vec<f32>>>,
}

impl ColorClassifier {
    /// The model of `config`, whose text tower must know CLIP's vocabulary.
    ///
    /// # Errors
    /// When the weights are not those of this model.
    pub fn new(config: &ClipConfig, p: &Params<'_>) -> Result<Self, WeightError> {
        check_vocabulary(config)?;
        Ok(Self {
            clip: Clip::new(config, p)?,
            tokenizer: ClipTokenizer::new(),
            side: config.vision_cfg.image_size as u32,
            tokens: config.text_cfg.context_length,
            device: p.device().clone(),
            classifiers: HashMap::new(),
        })
    }

    /// The colour of each crop, a word of [`COLORS`], if it shows a `class`.
    ///
    /// # Errors
    /// When the model refuses its input.
    pub fn classify(&mut self, crops: &[RgbImage], class: &str) -> Result<Vec<String>, EvalError> {
        let classifier = match self.classifiers.get(class) {
            Some(known) => known.clone(),
            None => {
                let new = self.build(class)?;
                self.classifiers.insert(class.to_owned(), new.clone());
                new
            }
        };
        let mut colours = Vec::with_capacity(crops.len());
        for some in crops.chunks(BATCH) {
            let pixels: Vec<_> = some
                .iter()
                .map(|crop| clip_pixels(crop, self.side))
                .collect();
            let features = self.clip.encode_image(image_batch(&pixels, &self.device));
            let features = features.map_err(refused)?;
            let [_, width] = features.dims();
            for features in values(features).chunks_exact(width) {
                let logits = color_logits(features, &classifier);
                let best =
                    (0..logits.len()).fold(0, |a, b| if logits[b] > logits[a] { b } else { a });
                colours.push(COLORS[best].to_owned());
            }
        }
        Ok(colours)
    }

    fn build(&self, class: &str) -> Result<Vec<Vec<f32>>, EvalError> {
        // The third template names no class: so does the official script.
        let templates = |colour: &str| {
            [
                format!("a photo of a {colour} {class}"),
                format!("a photo of a {colour}-colored {class}"),
                format!("a photo of a {colour} object"),
            ]
        };
        let mut features = Vec::with_capacity(COLORS.len());
        for colour in COLORS {
            let ids = templates(colour).map(|text| self.tokenizer.encode(&text, self.tokens));
            let text = self.clip.encode_text(id_batch(&ids, &self.device));
            let text = text.map_err(refused)?;
            let [_, width] = text.dims();
            features.push(
                values(text)
                    .chunks_exact(width)
                    .map(<[f32]>::to_vec)
                    .collect(),
            );
        }
        Ok(color_classifier(&features))
    }
}
