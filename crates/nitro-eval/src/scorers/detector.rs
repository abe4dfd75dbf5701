use burn::tensor::Device;
use image::{Rgb, RgbImage};
use nitro_models::Params;
use nitro_models::mask2former::{Mask2Former, Mask2FormerConfig};

use super::{Canvas, Instance, image_batch, instances, refused, values};
use crate::EvalError;
use crate::pixels::{Planes, resize_bilinear};

/// The sides that mmdet's test pipeline resizes pictures into, longer and shorter.
const INTO: [f64; 2] = [1333.0, 800.0];
/// The detector's sides are multiples of this.
const UNIT: usize = 32;
/// What is added to the right and below.
const PADDING: Rgb<u8> = Rgb([128; 3]);
/// Mean and deviation of each channel, in bytes.
const MEAN: [f32; 3] = [123.675, 116.28, 103.53];
const STD: [f32; 3] = [58.395, 57.12, 57.375];
/// Objects per picture.
const MAX_PER_IMAGE: usize = 100;

/// GenEval's detector: Mask2Former with a Swin-S, as mmdet 2 runs it.
#[derive(Debug)]
pub struct Detector {
    model: Mask2Former,
    labels: usize,
    device: Device,
}

impl Detector {
    /// The model of `config`.
    ///
    /// # Errors
    /// When the weights are not those of this model.
    pub fn new(config: &Mask2FormerConfig, p: &Params<'_>) -> Result<Self, EvalError> {
        Ok(Self {
            model: Mask2Former::new(config, p)?,
            labels: config.labels(),
            device: p.device().clone(),
        })
    }

    /// The objects of a picture, best first.
    ///
    /// # Errors
    /// When the model refuses its input.
    pub fn detect(&self, image: &RgbImage) -> Result<Vec<Instance>, EvalError> {
        let (pixels, canvas) = detector_pixels(image);
        let segments = self.model.forward(image_batch(&[pixels], &self.device));
        let segments = segments.map_err(refused)?;
        let [_, _, height, width] = segments.masks.dims();
        Ok(instances(
            &values(segments.classes),
            self.labels,
            &values(segments.masks),
            [height, width],
            canvas,
            MAX_PER_IMAGE,
        ))
    }
}

/// A picture as mmdet's test pipeline prepares it: as large as fits into 1333 by 800, padded with grey
/// to multiples of 32, then normalised.
pub fn detector_pixels(image: &RgbImage) -> (Planes, Canvas) {
    let (width, height) = (f64::from(image.width()), f64::from(image.height()));
    let [long, short] = INTO;
    let scale = (long / width.max(height)).min(short / width.min(height));
    let scaled = |n: f64| (n * scale + 0.5) as u32;
    let resized = resize_bilinear(image, scaled(width), scaled(height));
    let [h, w] = [resized.height() as usize, resized.width() as usize];
    let padded = [h, w].map(|n| n.next_multiple_of(UNIT));
    let whole = RgbImage::from_fn(padded[1] as u32, padded[0] as u32, |x, y| {
        *resized.get_pixel_checked(x, y).unwrap_or(&PADDING)
    });
    let in_bytes = Planes::of(&whole);
    let bytes = Planes {
        values: in_bytes.values.iter().map(|x| x * 255.0).collect(),
        ..in_bytes
    };
    let canvas = Canvas {
        padded,
        resized: [h, w],
        original: [image.height() as usize, image.width() as usize],
    };
    (bytes.normalize(MEAN, STD), canvas)
}
