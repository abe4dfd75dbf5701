//! Pictures inside requests.

use std::io::Cursor;

use image::{DynamicImage, GrayImage, ImageReader, Limits};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::error::ApiError;

/// Longest side of a picture that clients may send.
const LONGEST_SIDE: u32 = 4096;

/// Memory that decoding a client's picture may take.
const DECODE_BYTES: u64 = 128 << 20;

/// File format of an answer's pictures.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum OutputFormat {
    /// Lossless, parameters as text chunk.
    #[default]
    Png,
    /// Lossy, parameters as EXIF comment.
    Jpeg,
    /// Lossless, parameters as EXIF comment.
    Webp,
}

impl OutputFormat {
    /// Its media type.
    pub fn mime(self) -> &'static str {
        match self {
            Self::Png => "image/png",
            Self::Jpeg => "image/jpeg",
            Self::Webp => "image/webp",
        }
    }
}

/// A picture that a client sent as `param`: PNG, JPEG or WebP, of bounded size.
pub fn decode(param: &str, bytes: &[u8]) -> Result<DynamicImage, ApiError> {
    let mut limits = Limits::default();
    limits.max_image_width = Some(LONGEST_SIDE);
    limits.max_image_height = Some(LONGEST_SIDE);
    limits.max_alloc = Some(DECODE_BYTES);
    let mut reader = ImageReader::new(Cursor::new(bytes));
    reader.limits(limits);
    let refuse = |e: &dyn std::fmt::Display| {
        ApiError::bad(
            param,
            format!(
                "`{param}` is no picture this server reads ({e}); send PNG, JPEG or WebP, at most \
                 {LONGEST_SIDE} pixels on a side"
            ),
        )
    };
    let reader = reader.with_guessed_format().map_err(|e| refuse(&e))?;
    let image = reader.decode().map_err(|e| refuse(&e))?;
    match image.width().min(image.height()) {
        0 => Err(refuse(&"it is empty")),
        _ => Ok(image),
    }
}

/// Which part is painted anew, white, from a mask as OpenAI's clients send it: transparent where the
/// picture changes. A mask without transparency is taken as it is, white where it changes.
pub fn mask_of(mask: DynamicImage) -> GrayImage {
    match transparent_part(&mask) {
        Some(mask) => mask,
        None => mask.into_luma8(),
    }
}

/// The transparent part of a picture in white, if it has one.
pub fn transparent_part(image: &DynamicImage) -> Option<GrayImage> {
    if !image.color().has_alpha() {
        return None;
    }
    let rgba = image.to_rgba8();
    if rgba.pixels().all(|p| p.0[3] == 255) {
        return None;
    }
    let (width, height) = rgba.dimensions();
    Some(GrayImage::from_fn(width, height, |x, y| {
        image::Luma([255 - rgba.get_pixel(x, y).0[3]])
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::{Rgba, RgbaImage};

    #[test]
    fn masks_are_read_by_transparency_or_by_white() {
        let rgba = RgbaImage::from_fn(2, 1, |x, _| {
            Rgba([255, 255, 255, if x == 0 { 0 } else { 255 }])
        });
        assert_eq!(mask_of(rgba.into()).into_raw(), [255, 0]);
        let gray = GrayImage::from_fn(2, 1, |x, _| image::Luma([if x == 0 { 255 } else { 0 }]));
        assert_eq!(mask_of(gray.into()).into_raw(), [255, 0]);
    }

    #[test]
    fn rubbish_is_no_picture() {
        let error = decode("image", b"GIF89a nothing").unwrap_err();
        assert_eq!(error.detail().param.as_deref(), Some("image"));
        assert!(error.detail().message.contains("PNG, JPEG or WebP"));
    }
}
