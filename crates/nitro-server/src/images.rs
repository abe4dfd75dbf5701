//! Pictures from and to the bytes that clients send and get.

use std::io::Cursor;

use image::codecs::jpeg::JpegEncoder;
use image::codecs::webp::WebPEncoder;
use image::{DynamicImage, GrayImage, ImageEncoder, ImageReader, Limits, RgbImage};
use nitro_pipeline::picture::{self, Parameters};
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
pub(crate) enum OutputFormat {
    /// Lossless, parameters as text chunk.
    #[default]
    Png,
    /// Lossy, parameters as EXIF comment.
    Jpeg,
    /// Lossless, parameters as EXIF comment.
    Webp,
}

impl OutputFormat {
    pub(crate) fn mime(self) -> &'static str {
        match self {
            Self::Png => "image/png",
            Self::Jpeg => "image/jpeg",
            Self::Webp => "image/webp",
        }
    }
}

/// A file of `image` that carries its parameters. `quality` (1 to 100) is JPEG's.
pub(crate) fn encode(
    image: &RgbImage,
    parameters: Option<&Parameters>,
    format: OutputFormat,
    quality: u8,
) -> Result<Vec<u8>, String> {
    if format == OutputFormat::Png {
        return picture::encode_png(image, parameters).map_err(|e| e.to_string());
    }
    let exif = parameters.map(|parameters| exif_comment(&parameters.to_infotext()));
    let mut bytes = Vec::new();
    match format {
        OutputFormat::Webp => write(WebPEncoder::new_lossless(&mut bytes), image, exif),
        _ => write(
            JpegEncoder::new_with_quality(&mut bytes, quality.clamp(1, 100)),
            image,
            exif,
        ),
    }
    .map_err(|e| e.to_string())?;
    Ok(bytes)
}

fn write(
    mut encoder: impl ImageEncoder,
    image: &RgbImage,
    exif: Option<Vec<u8>>,
) -> image::ImageResult<()> {
    if let Some(exif) = exif {
        encoder
            .set_exif_metadata(exif)
            .map_err(image::ImageError::Unsupported)?;
    }
    let (width, height) = image.dimensions();
    encoder.write_image(
        image.as_raw(),
        width,
        height,
        image::ExtendedColorType::Rgb8,
    )
}

/// An EXIF block whose only entry is a `UserComment` in UTF-16, which is where AUTOMATIC1111 writes
/// the parameters of pictures that are no PNGs. TIFF 6.0 layout, big-endian.
fn exif_comment(text: &str) -> Vec<u8> {
    const EXIF_IFD: u16 = 0x8769;
    const USER_COMMENT: u16 = 0x9286;
    const LONG: u16 = 4;
    const UNDEFINED: u16 = 7;
    const HEADER: u32 = 8;
    /// A directory of one entry: count, entry, offset of the next directory.
    const DIRECTORY: u32 = 2 + 12 + 4;
    let mut comment = b"UNICODE\0".to_vec();
    comment.extend(text.encode_utf16().flat_map(u16::to_be_bytes));

    let directory = |tag: u16, kind: u16, count: u32, value: u32| {
        let mut bytes = 1_u16.to_be_bytes().to_vec();
        bytes.extend(tag.to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend(count.to_be_bytes());
        bytes.extend(value.to_be_bytes());
        bytes.extend(0_u32.to_be_bytes());
        bytes
    };
    let mut exif = b"MM\0\x2a".to_vec();
    exif.extend(HEADER.to_be_bytes());
    exif.extend(directory(EXIF_IFD, LONG, 1, HEADER + DIRECTORY));
    let length = comment.len() as u32;
    exif.extend(directory(
        USER_COMMENT,
        UNDEFINED,
        length,
        HEADER + 2 * DIRECTORY,
    ));
    exif.extend(comment);
    exif
}

/// A picture that a client sent as `param`: PNG, JPEG or WebP, of bounded size.
pub(crate) fn decode(param: &str, bytes: &[u8]) -> Result<DynamicImage, ApiError> {
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
pub(crate) fn mask_of(mask: DynamicImage) -> GrayImage {
    match transparent_part(&mask) {
        Some(mask) => mask,
        None => mask.into_luma8(),
    }
}

/// The transparent part of a picture in white, if it has one.
pub(crate) fn transparent_part(image: &DynamicImage) -> Option<GrayImage> {
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

    fn parameters() -> Parameters {
        Parameters {
            prompt: "a rød circle".into(),
            negative_prompt: String::new(),
            steps: 4,
            guidance_scale: 4.5,
            seed: 7,
            width: 16,
            height: 16,
            model: "m base".into(),
            rng: "cpu".into(),
        }
    }

    #[test]
    fn every_format_carries_the_parameters() {
        let image = RgbImage::from_fn(16, 16, |x, y| image::Rgb([x as u8 * 15, y as u8 * 15, 9]));
        for format in [OutputFormat::Png, OutputFormat::Jpeg, OutputFormat::Webp] {
            let bytes = encode(&image, Some(&parameters()), format, 90).unwrap();
            let back = decode("image", &bytes).unwrap().into_rgb8();
            assert_eq!(back.dimensions(), (16, 16), "{format:?}");
            if format != OutputFormat::Jpeg {
                assert_eq!(back, image);
            }
            let text = parameters().to_infotext();
            let wanted: Vec<u8> = match format {
                OutputFormat::Png => text.chars().map(|c| c as u8).collect(),
                _ => text.encode_utf16().flat_map(u16::to_be_bytes).collect(),
            };
            let holds = bytes.windows(wanted.len()).any(|w| w == wanted);
            assert!(holds, "{format:?}");
            let plain = encode(&image, None, format, 90).unwrap();
            assert!(plain.len() < bytes.len());
        }
    }

    #[test]
    fn exif_comment_is_where_readers_look() {
        let bytes = exif_comment("hi");
        // The second directory's offset, and the comment's.
        assert_eq!(bytes[18..22], 26_u32.to_be_bytes());
        assert_eq!(bytes[36..40], 44_u32.to_be_bytes());
        assert_eq!(&bytes[44..], b"UNICODE\0\0h\0i");
    }

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
