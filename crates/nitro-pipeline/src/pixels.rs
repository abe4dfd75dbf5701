//! Pictures to tensors and back, and the geometry between pixels and latents.

use burn::tensor::{Device, Tensor, TensorData};
use image::imageops::{self, FilterType};
use image::{GrayImage, ImageBuffer, Pixel, Rgb, RgbImage};

use crate::RequestError;
use crate::request::InitImage;

/// The size of a picture and of its latents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Canvas {
    /// Pixels on a side.
    pub(crate) side: usize,
    /// Latent channels.
    pub(crate) channels: usize,
    /// Latent pixels on a side.
    pub(crate) latent: usize,
}

impl Canvas {
    pub(crate) fn pixels(&self) -> usize {
        self.side * self.side
    }

    /// Latent values of one picture.
    pub(crate) fn latent_len(&self) -> usize {
        self.channels * self.latent * self.latent
    }
}

/// Decoded pictures `[n, 3, h, w]`, values about -1 to 1, to 8 bits. Halves are rounded to even, as
/// NumPy does for the official pipeline.
pub fn to_pictures(decoded: &TensorData) -> Vec<RgbImage> {
    let (height, width) = (decoded.shape()[2], decoded.shape()[3]);
    let plane = height * width;
    let byte = |x: f32| ((x / 2.0 + 0.5).clamp(0.0, 1.0) * 255.0).round_ties_even() as u8;
    let values = decoded.as_slice::<f32>().unwrap_or_default();
    values
        .chunks_exact(3 * plane)
        .map(|picture| {
            RgbImage::from_fn(width as u32, height as u32, |x, y| {
                let at = y as usize * width + x as usize;
                Rgb([0, 1, 2].map(|channel| byte(picture[channel * plane + at])))
            })
        })
        .collect()
}

/// The initial image and its mask at the size of the request.
#[derive(Debug)]
pub(crate) struct Original {
    image: RgbImage,
    mask: Option<GrayImage>,
}

impl InitImage {
    /// The same, cut and scaled to pictures of `side` pixels as a request of that size would do itself:
    /// what comes of it is the same, and it takes no more memory than that.
    pub fn fitted(self, side: usize) -> Result<Self, RequestError> {
        self.check()?;
        let Original { image, mask } = Original::fit(&self, side);
        Ok(Self {
            image,
            mask,
            ..self
        })
    }
}

impl Original {
    pub(crate) fn fit(init: &InitImage, side: usize) -> Self {
        Self {
            image: cover(&init.image, side as u32),
            mask: init.mask.as_ref().map(|mask| cover(mask, side as u32)),
        }
    }

    /// A picture without a mask.
    pub(crate) fn of(image: &RgbImage, side: usize) -> Self {
        Self {
            image: cover(image, side as u32),
            mask: None,
        }
    }

    /// `[1, 3, side, side]`, values -1 to 1.
    pub(crate) fn tensor(&self, device: &Device) -> Tensor<4> {
        let (width, height) = (self.image.width() as usize, self.image.height() as usize);
        let values: Vec<f32> = self
            .image
            .as_raw()
            .iter()
            .map(|byte| f32::from(*byte) / 127.5 - 1.0)
            .collect();
        Tensor::<4>::from_data(TensorData::new(values, [1, height, width, 3]), device)
            .permute([0, 3, 1, 2])
    }

    /// Which latents are painted anew, `latent * latent` values of 0 or 1: all under whose square any
    /// pixel is.
    pub(crate) fn latent_mask(&self, latent: usize) -> Option<Vec<f32>> {
        let mask = self.mask.as_ref()?;
        let mut plane = vec![0.0; latent * latent];
        let factor = (mask.width() as usize / latent.max(1)).max(1);
        for (x, y, pixel) in mask.enumerate_pixels() {
            let (row, column) = (y as usize / factor, x as usize / factor);
            if pixel.0[0] > 0 && row < latent && column < latent {
                plane[row * latent + column] = 1.0;
            }
        }
        Some(plane)
    }

    /// Restores what the mask keeps, which went through the autoencoder and came back changed. Grey
    /// mask pixels blend.
    pub(crate) fn put_back(&self, picture: &mut RgbImage) {
        let Some(mask) = &self.mask else { return };
        for (x, y, pixel) in picture.enumerate_pixels_mut() {
            let painted = u32::from(mask.get_pixel(x, y).0[0]);
            let kept = self.image.get_pixel(x, y);
            for (new, old) in pixel.0.iter_mut().zip(kept.0) {
                *new = ((u32::from(*new) * painted + u32::from(old) * (255 - painted) + 127) / 255)
                    as u8;
            }
        }
    }
}

/// `image` scaled so that it just covers a square of `side`, cut around its centre.
fn cover<P>(image: &ImageBuffer<P, Vec<u8>>, side: u32) -> ImageBuffer<P, Vec<u8>>
where
    P: Pixel<Subpixel = u8> + 'static,
{
    let (width, height) = image.dimensions();
    if (width, height) == (side, side) {
        return image.clone();
    }
    let square = width.min(height);
    let (left, top) = ((width - square) / 2, (height - square) / 2);
    let cut = imageops::crop_imm(image, left, top, square, square).to_image();
    imageops::resize(&cut, side, side, FilterType::Lanczos3)
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::Luma;

    fn init(image: RgbImage, mask: Option<GrayImage>) -> InitImage {
        InitImage {
            image,
            strength: 0.5,
            mask,
        }
    }

    #[test]
    fn fitting_twice_changes_nothing() {
        let image = RgbImage::from_fn(23, 9, |x, y| Rgb([x as u8 * 9, y as u8 * 20, 7]));
        let mask = GrayImage::from_fn(23, 9, |x, _| Luma([x as u8 * 10]));
        let given = init(image, Some(mask));
        let fitted = given.clone().fitted(8).unwrap();
        assert_eq!(fitted.image.dimensions(), (8, 8));
        let (once, twice) = (Original::fit(&given, 8), Original::fit(&fitted, 8));
        assert!(once.image == twice.image && once.mask == twice.mask);
        let other = Some(GrayImage::new(8, 8));
        assert!(init(given.image, other).fitted(8).is_err());
    }

    #[test]
    fn values_become_bytes_and_are_clamped() {
        let planes = vec![-1.0f32, 1.0, -9.0, 9.0, 0.0, -0.5];
        let picture = &to_pictures(&TensorData::new(planes, [1, 3, 1, 2]))[0];
        assert_eq!(picture.get_pixel(0, 0).0, [0, 0, 128]);
        assert_eq!(picture.get_pixel(1, 0).0, [255, 255, 64]);
    }

    #[test]
    fn a_wide_image_is_cut_around_its_centre() {
        let image = RgbImage::from_fn(40, 20, |x, _| {
            Rgb(if (10..30).contains(&x) {
                [200, 10, 10]
            } else {
                [0, 0, 0]
            })
        });
        let original = Original::fit(&init(image, None), 10);
        assert!(
            original.image.pixels().all(|p| p.0[0] > 150),
            "only the middle is left"
        );
        assert!(original.latent_mask(2).is_none());
    }

    #[test]
    fn the_kept_part_comes_back_pixel_by_pixel() {
        let image = RgbImage::from_fn(8, 8, |x, y| Rgb([x as u8, y as u8, 7]));
        let mask = GrayImage::from_fn(8, 8, |x, y| Luma([if x == 5 && y == 1 { 255 } else { 0 }]));
        let original = Original::fit(&init(image.clone(), Some(mask)), 8);
        // One white pixel opens the whole latent square it lies in.
        assert_eq!(original.latent_mask(2).unwrap(), [0.0, 1.0, 0.0, 0.0]);
        let mut painted = RgbImage::from_pixel(8, 8, Rgb([99, 99, 99]));
        original.put_back(&mut painted);
        for (x, y, pixel) in painted.enumerate_pixels() {
            let expected = if (x, y) == (5, 1) {
                [99; 3]
            } else {
                image.get_pixel(x, y).0
            };
            assert_eq!(pixel.0, expected);
        }
    }
}
