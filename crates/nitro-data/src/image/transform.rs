use image::{RgbImage, imageops};

use super::{Filter, resize};

/// ImageNet's channel means, by which DINOv2's input is normalised.
pub const IMAGENET_MEAN: [f32; 3] = [0.485, 0.456, 0.406];
/// ImageNet's channel deviations.
pub const IMAGENET_STD: [f32; 3] = [0.229, 0.224, 0.225];

/// Side to which the official pipeline brings a picture before it makes the one for DINOv2.
pub const DINO_BASE: u32 = 512;

/// torchvision's `Resize(size)`: the shorter side becomes `size`, the longer keeps the ratio, rounded
/// down.
pub fn resize_shorter(picture: &RgbImage, size: u32, filter: Filter) -> RgbImage {
    let (width, height) = picture.dimensions();
    let long = |long: u32, short: u32| {
        let long = u64::from(size) * u64::from(long) / u64::from(short.max(1));
        u32::try_from(long).unwrap_or(u32::MAX)
    };
    if width <= height {
        resize(picture, size, long(height, width), filter)
    } else {
        resize(picture, long(width, height), size, filter)
    }
}

/// torchvision's `CenterCrop(size)`; what lies outside of a smaller picture is black.
pub fn center_crop(picture: &RgbImage, size: u32) -> RgbImage {
    let (width, height) = picture.dimensions();
    if width < size || height < size {
        let mut canvas = RgbImage::new(width.max(size), height.max(size));
        let margin = |side: u32| i64::from(size.saturating_sub(side) / 2);
        imageops::replace(&mut canvas, picture, margin(width), margin(height));
        return center_crop(&canvas, size);
    }
    // Python's round: halves to even.
    let offset = |side: u32| (f64::from(side - size) / 2.0).round_ties_even() as u32;
    imageops::crop_imm(picture, offset(width), offset(height), size, size).to_image()
}

/// The official preparation for DC-AE: bicubic to `size`, centre crop.
pub fn vae_picture(picture: &RgbImage, size: u32) -> RgbImage {
    center_crop(&resize_shorter(picture, size, Filter::Bicubic), size)
}

/// The official preparation for DINOv2: bilinear to `base` (512), centre crop, bicubic to `size`
/// (224).
pub fn dino_picture(picture: &RgbImage, base: u32, size: u32) -> RgbImage {
    let square = center_crop(&resize_shorter(picture, base, Filter::Bilinear), base);
    resize_shorter(&square, size, Filter::Bicubic)
}

/// `ToTensor` and `Normalize`: values `(byte / 255 - mean) / std`, shape `[3, height, width]`.
pub fn to_planes(picture: &RgbImage, mean: [f32; 3], std: [f32; 3]) -> Vec<f32> {
    let bytes = picture.as_raw();
    let mut planes = Vec::with_capacity(bytes.len());
    for channel in 0..3 {
        let values = bytes.iter().skip(channel).step_by(3);
        planes.extend(values.map(|v| (f32::from(*v) / 255.0 - mean[channel]) / std[channel]));
    }
    planes
}
