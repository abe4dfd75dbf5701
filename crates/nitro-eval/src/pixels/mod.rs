//! Pictures to the pixels that each reference's own code makes of them, to the last bit where it
//! computes in bytes: Pillow and torchvision for CLIP and ImageReward, torch for HPSv2, OpenCV for
//! mmdet.

mod opencv;
mod torch;

pub use opencv::resize_bilinear;
pub use torch::{Antialias, fit_square};

use image::{Rgb, RgbImage};
use nitro_data::image::{Filter, center_crop, resize_shorter};

/// Mean and deviation of each channel that OpenAI's CLIP was trained with; HPSv2 and ImageReward have
/// the same.
pub const CLIP_MEAN: [f32; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
/// See [`CLIP_MEAN`].
pub const CLIP_STD: [f32; 3] = [0.268_629_54, 0.261_302_6, 0.275_777_1];

/// Planes of `f32`, `[3, height, width]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Planes {
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
    /// The values, plane by plane.
    pub values: Vec<f32>,
}

impl Planes {
    /// A picture's bytes as planes from 0 to 1 (torchvision's `ToTensor`).
    pub fn of(image: &RgbImage) -> Self {
        let pixels = image.as_raw();
        let plane = |c: usize| pixels.iter().skip(c).step_by(3);
        Self {
            height: image.height() as usize,
            width: image.width() as usize,
            values: (0..3)
                .flat_map(plane)
                .map(|b| f32::from(*b) / 255.0)
                .collect(),
        }
    }

    /// `(x - mean) / std` of each plane.
    pub fn normalize(mut self, mean: [f32; 3], std: [f32; 3]) -> Self {
        let size = (self.height * self.width).max(1);
        for (plane, (mean, std)) in self
            .values
            .chunks_exact_mut(size)
            .zip(mean.into_iter().zip(std))
        {
            for x in plane {
                *x = (*x - mean) / std;
            }
        }
        self
    }
}

/// open_clip's and ImageReward's picture: the shorter side bicubically to `side`, the middle square,
/// normalised.
pub fn clip_pixels(image: &RgbImage, side: u32) -> Planes {
    let square = center_crop(&resize_shorter(image, side, Filter::Bicubic), side);
    Planes::of(&square).normalize(CLIP_MEAN, CLIP_STD)
}

/// The rectangle of `size` that begins at `(left, top)`; black where there is no picture.
pub(crate) fn crop(image: &RgbImage, [left, top]: [i64; 2], [width, height]: [u32; 2]) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| {
        let at = |start: i64, i: u32| u32::try_from(start + i64::from(i)).ok();
        let pixel = at(left, x).zip(at(top, y));
        pixel
            .and_then(|(x, y)| image.get_pixel_checked(x, y))
            .copied()
            .unwrap_or(Rgb([0, 0, 0]))
    })
}

/// HPSv2's picture: to values first, then the longer side bicubically to `side`, black bars, normalised.
pub fn hps_pixels(image: &RgbImage, side: usize) -> Planes {
    fit_square(&Planes::of(image), side, Antialias::On).normalize(CLIP_MEAN, CLIP_STD)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crop_may_reach_beyond_the_picture() {
        let image = RgbImage::from_pixel(2, 2, Rgb([7, 7, 7]));
        let cut = crop(&image, [-1, 1], [3, 2]);
        let row = |y| (0..3).map(|x| cut.get_pixel(x, y).0[0]).collect::<Vec<_>>();
        assert_eq!((row(0), row(1)), (vec![0, 7, 7], vec![0, 0, 0]));
    }
}
