//! Pictures to the files that clients get.

use image::codecs::jpeg::JpegEncoder;
use image::codecs::webp::WebPEncoder;
use image::{ImageEncoder, RgbImage};
use nitro_api::picture::OutputFormat;
use nitro_pipeline::picture::{self, Parameters};

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

#[cfg(test)]
mod tests {
    use super::*;
    use nitro_api::picture::decode;

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
}
