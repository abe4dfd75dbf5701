//! Pictures as bytes: decoding, JPEG encoding, and torchvision's geometry on 8-bit RGB.
//!
//! [`resize`] computes what Pillow computes, bit by bit, so the transforms of the official pipeline
//! (`Resize`, `CenterCrop`, `ToTensor`, `Normalize` on PIL pictures) have their exact pixels here.

mod jpeg;
mod resize;
mod transform;

use std::io::Cursor;

use image::codecs::jpeg::JpegEncoder;
use image::{ImageReader, RgbImage};

pub use resize::{Contribution, Filter, contributions, resize};
pub use transform::{
    DINO_BASE, IMAGENET_MEAN, IMAGENET_STD, center_crop, dino_picture, resize_shorter, to_planes,
    vae_picture,
};

use crate::mds::Pixels;

/// Pixels that a picture may have at most; a larger one is taken for damaged or hostile.
const MOST_PIXELS: u64 = 1 << 27;

/// Width and height of an encoded picture, from its head alone.
pub fn dimensions(bytes: &[u8]) -> Result<(u32, u32), String> {
    let reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format();
    let reader = reader.map_err(|e| e.to_string())?;
    let size = reader.into_dimensions().map_err(|e| e.to_string())?;
    match u64::from(size.0) * u64::from(size.1) {
        0 => Err("no pixels".to_owned()),
        pixels if pixels > MOST_PIXELS => Err(format!("{} x {} pixels", size.0, size.1)),
        _ => Ok(size),
    }
}

/// Decodes JPEG, PNG or WebP to RGB, with PIL's pixels. Transparency is dropped, as PIL's
/// `convert("RGB")` does.
pub fn decode(bytes: &[u8]) -> Result<RgbImage, String> {
    dimensions(bytes)?;
    if is_jpeg(bytes)
        && let Some(picture) = jpeg::decode(bytes)?
    {
        return Ok(picture);
    }
    let picture = image::load_from_memory(bytes).map_err(|e| e.to_string())?;
    Ok(picture.into_rgb8())
}

/// Whether the bytes are a JPEG file.
pub fn is_jpeg(bytes: &[u8]) -> bool {
    bytes.starts_with(&[0xff, 0xd8, 0xff])
}

/// Encodes a JPEG of quality 1 to 100.
pub fn encode_jpeg(picture: &RgbImage, quality: u8) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    JpegEncoder::new_with_quality(&mut bytes, quality)
        .encode_image(picture)
        .map_err(|e| e.to_string())?;
    Ok(bytes)
}

/// PIL's raw pixels as RGB.
pub fn from_pixels(pixels: Pixels) -> Result<RgbImage, String> {
    let Pixels {
        width,
        height,
        mode,
        data,
    } = pixels;
    let rgb = match mode.as_str() {
        "RGB" => data,
        "L" => data.iter().flat_map(|grey| [*grey; 3]).collect(),
        "LA" => data.chunks_exact(2).flat_map(|p| [p[0]; 3]).collect(),
        "RGBA" | "RGBX" => data
            .chunks_exact(4)
            .flat_map(|p| [p[0], p[1], p[2]])
            .collect(),
        other => {
            return Err(format!(
                "pixels of PIL mode {other:?}; expected RGB, RGBA, L or LA"
            ));
        }
    };
    RgbImage::from_raw(width, height, rgb).ok_or_else(|| "too few pixels".to_owned())
}
