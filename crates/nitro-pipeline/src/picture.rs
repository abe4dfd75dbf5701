//! Pictures as files: PNG with the settings that made it, grids, atomic writing.
//!
//! The settings go into the text chunk `parameters`, in the form introduced by AUTOMATIC1111's
//! Stable Diffusion web UI, so that other tools show and reuse them:
//!
//! ```text
//! a red fox
//! Negative prompt: blurry
//! Steps: 20, Sampler: Euler, CFG scale: 4.5, Seed: 7, Size: 512x512, Model: Nitro-E base, RNG: CPU
//! ```

use std::{
    borrow::Cow,
    io::Cursor,
    path::{Path, PathBuf},
};

use image::{DynamicImage, ImageReader, RgbImage, imageops};

/// Key of the text chunk that holds the settings.
const KEYWORD: &str = "parameters";
const NEGATIVE: &str = "Negative prompt: ";

/// What went wrong with a picture file or its settings.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PictureError {
    /// A picture that cannot be a PNG, such as one without pixels.
    #[error("cannot encode a picture of {width}x{height} pixels as PNG: {source}")]
    Encode {
        /// Width in pixels.
        width: u32,
        /// Height in pixels.
        height: u32,
        /// The encoder's reason.
        source: png::EncodingError,
    },
    /// Bytes that are no PNG.
    #[error("not a readable PNG: {0}")]
    Decode(#[from] png::DecodingError),
    /// A file that is no picture this program reads, or cannot be opened.
    #[error("cannot read picture {path}: {reason}; give a PNG or JPEG file")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// A file that cannot be written.
    #[error("cannot write {path}: {source}; give a folder that exists and can be written to")]
    Write {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// A settings text without one of the settings.
    #[error("the picture's settings do not say `{name}` as expected: {found}")]
    Setting {
        /// Name of the setting.
        name: &'static str,
        /// What stands there instead.
        found: String,
    },
}

/// The settings a picture was made with.
#[derive(Debug, Clone, PartialEq)]
pub struct Parameters {
    /// The prompt as the user gave it.
    pub prompt: String,
    /// What the picture should not show; empty for none.
    pub negative_prompt: String,
    /// Sampling steps.
    pub steps: usize,
    /// Classifier-free guidance scale.
    pub guidance_scale: f64,
    /// Seed of the starting noise.
    pub seed: u64,
    /// Width in pixels.
    pub width: u32,
    /// Height in pixels.
    pub height: u32,
    /// Name of the model.
    pub model: String,
    /// Whose random numbers the seed stands for: `cpu` (torch CPU) or `cuda` (torch CUDA).
    pub rng: String,
}

impl Parameters {
    /// The settings as text.
    pub fn to_infotext(&self) -> String {
        let mut text = self.prompt.clone();
        if !self.negative_prompt.is_empty() {
            text += &format!("\n{NEGATIVE}{}", self.negative_prompt);
        }
        // The web UI's names for the generators.
        let rng = match self.rng.as_str() {
            "cpu" => "CPU",
            "cuda" => "NV",
            other => other,
        };
        text += &format!(
            "\nSteps: {}, Sampler: Euler, CFG scale: {}, Seed: {}, Size: {}x{}, Model: {}, RNG: {}",
            self.steps,
            self.guidance_scale,
            self.seed,
            self.width,
            self.height,
            quote(&self.model),
            quote(rng)
        );
        text
    }

    /// Reads the settings back from text, also of other tools.
    ///
    /// The form has limits: a line of the prompt that starts with `Negative prompt:` is taken for
    /// what it says. A missing generator means CUDA, as in the web UI.
    pub fn from_infotext(text: &str) -> Result<Self, PictureError> {
        let text = text.trim_end();
        let (prompts, settings) = match text.rsplit_once('\n') {
            Some((prompts, last)) => (prompts, last),
            None => ("", text),
        };
        let settings = Settings::parse(settings);
        let negative = NEGATIVE.trim_end();
        let (prompt, negative_prompt) = match prompts.strip_prefix(negative) {
            Some(rest) => ("", rest),
            None => prompts
                .split_once(&format!("\n{negative}"))
                .unwrap_or((prompts, "")),
        };
        let size = settings.required("Size")?;
        let (width, height) = size
            .split_once('x')
            .and_then(|(width, height)| Some((width.parse().ok()?, height.parse().ok()?)))
            .ok_or_else(|| PictureError::Setting {
                name: "Size",
                found: size.to_owned(),
            })?;
        Ok(Self {
            prompt: prompt.to_owned(),
            negative_prompt: negative_prompt
                .strip_prefix(' ')
                .unwrap_or(negative_prompt)
                .into(),
            steps: settings.number("Steps")?,
            guidance_scale: settings.number("CFG scale")?,
            seed: settings.number("Seed")?,
            width,
            height,
            model: settings.get("Model").unwrap_or("").to_owned(),
            rng: match settings.get("RNG") {
                Some("CPU") => "cpu".into(),
                Some("NV" | "GPU") | None => "cuda".into(),
                Some(other) => other.into(),
            },
        })
    }
}

/// Values that hold a separator are written as JSON strings.
fn quote(value: &str) -> Cow<'_, str> {
    if value.contains([',', ':', '\n', '"']) || value.trim() != value {
        serde_json::Value::from(value).to_string().into()
    } else {
        value.into()
    }
}

/// `Name: value` pairs between commas; values may be JSON strings.
struct Settings(Vec<(String, String)>);

impl Settings {
    fn parse(line: &str) -> Self {
        let mut settings = Vec::new();
        let mut rest = line;
        while let Some((name, value)) = rest.split_once(':') {
            let value = value.trim_start();
            let quoted = value.starts_with('"').then(|| {
                let mut json = serde_json::Deserializer::from_str(value).into_iter::<String>();
                let text = json.next()?.ok()?;
                Some((text, &value[json.byte_offset()..]))
            });
            let (value, after) = quoted.flatten().unwrap_or_else(|| {
                let end = value.find(',').unwrap_or(value.len());
                (value[..end].trim().to_owned(), &value[end..])
            });
            settings.push((name.trim_matches([',', ' ']).to_owned(), value));
            rest = after;
        }
        Self(settings)
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.0
            .iter()
            .find(|(known, _)| known == name)
            .map(|(_, value)| value.as_str())
    }

    fn required(&self, name: &'static str) -> Result<&str, PictureError> {
        self.get(name).ok_or_else(|| PictureError::Setting {
            name,
            found: "it is missing".into(),
        })
    }

    fn number<T: std::str::FromStr>(&self, name: &'static str) -> Result<T, PictureError> {
        let value = self.required(name)?;
        value.parse().map_err(|_| PictureError::Setting {
            name,
            found: value.to_owned(),
        })
    }
}

/// A picture as PNG, with its settings if given.
pub fn encode_png(
    picture: &RgbImage,
    parameters: Option<&Parameters>,
) -> Result<Vec<u8>, PictureError> {
    let (width, height) = picture.dimensions();
    let mut bytes = Vec::new();
    encode_into(&mut bytes, picture, parameters).map_err(|source| PictureError::Encode {
        width,
        height,
        source,
    })?;
    Ok(bytes)
}

fn encode_into(
    bytes: &mut Vec<u8>,
    picture: &RgbImage,
    parameters: Option<&Parameters>,
) -> Result<(), png::EncodingError> {
    let mut encoder = png::Encoder::new(bytes, picture.width(), picture.height());
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    if let Some(parameters) = parameters {
        // No text chunk can hold the character that ends its parts.
        let text = parameters.to_infotext().replace('\0', "\u{fffd}");
        // tEXt is Latin-1 and what every reader knows; the rest needs iTXt.
        if text
            .chars()
            .all(|c| matches!(c, '\n' | ' '..='~' | '\u{a1}'..='\u{ff}'))
        {
            encoder.add_text_chunk(KEYWORD.into(), text)?;
        } else {
            encoder.add_itxt_chunk(KEYWORD.into(), text)?;
        }
    }
    let mut writer = encoder.write_header()?;
    writer.write_image_data(picture.as_raw())?;
    writer.finish()
}

/// The settings text of a PNG, if it has one.
pub fn infotext(png: &[u8]) -> Result<Option<String>, PictureError> {
    let mut reader = png::Decoder::new(Cursor::new(png)).read_info()?;
    // Other tools may put text after the pixels.
    reader.finish()?;
    let info = reader.info();
    if let Some(chunk) = info.utf8_text.iter().find(|chunk| chunk.keyword == KEYWORD) {
        return Ok(Some(chunk.get_text()?));
    }
    if let Some(chunk) = info
        .uncompressed_latin1_text
        .iter()
        .find(|c| c.keyword == KEYWORD)
    {
        return Ok(Some(chunk.text.clone()));
    }
    let compressed = info
        .compressed_latin1_text
        .iter()
        .find(|chunk| chunk.keyword == KEYWORD);
    Ok(compressed.map(|chunk| chunk.get_text()).transpose()?)
}

/// Reads a PNG or JPEG file, by its content and whatever its name.
pub fn open(path: &Path) -> Result<DynamicImage, PictureError> {
    let failed = |reason: String| PictureError::Read {
        path: path.to_owned(),
        reason,
    };
    ImageReader::open(path)
        .and_then(ImageReader::with_guessed_format)
        .map_err(|error| failed(error.to_string()))?
        .decode()
        .map_err(|error| failed(error.to_string()))
}

/// Pictures side by side, about as many columns as rows, on black. Cells are as large as the
/// largest picture; no pictures make an empty one.
pub fn grid(pictures: &[&RgbImage]) -> RgbImage {
    let cell = |side: fn(&RgbImage) -> u32| pictures.iter().map(|p| side(p)).max().unwrap_or(0);
    let (width, height) = (cell(RgbImage::width), cell(RgbImage::height));
    let columns = (1..=pictures.len())
        .find(|n| n * n >= pictures.len())
        .unwrap_or(1);
    let rows = pictures.len().div_ceil(columns);
    let mut sheet = RgbImage::new(columns as u32 * width, rows as u32 * height);
    for (i, picture) in pictures.iter().enumerate() {
        let (x, y) = ((i % columns) as i64, (i / columns) as i64);
        imageops::replace(
            &mut sheet,
            *picture,
            x * i64::from(width),
            y * i64::from(height),
        );
    }
    sheet
}

/// Writes a picture to a PNG file, whole or not at all.
pub fn save_png(
    path: &Path,
    picture: &RgbImage,
    parameters: Option<&Parameters>,
) -> Result<(), PictureError> {
    let bytes = encode_png(picture, parameters)?;
    nitro_files::write_bytes(path, &bytes).map_err(|source| PictureError::Write {
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::Rgb;
    use proptest::prelude::*;
    use std::fs;

    fn parameters() -> Parameters {
        Parameters {
            prompt: "a red fox, 35mm: soft \"light\"\nsecond line".into(),
            negative_prompt: "blurry".into(),
            steps: 20,
            guidance_scale: 4.5,
            seed: u64::MAX,
            width: 512,
            height: 256,
            model: "Nitro-E, base: 512px".into(),
            rng: "cpu".into(),
        }
    }

    #[test]
    fn the_text_is_the_one_other_tools_write() {
        let plain = Parameters {
            prompt: "a red fox".into(),
            model: "Nitro-E dist".into(),
            seed: 7,
            ..parameters()
        };
        assert_eq!(
            plain.to_infotext(),
            "a red fox\nNegative prompt: blurry\nSteps: 20, Sampler: Euler, CFG scale: 4.5, \
             Seed: 7, Size: 512x256, Model: Nitro-E dist, RNG: CPU"
        );
    }

    #[test]
    fn text_of_other_tools_is_understood() {
        let text = "girl with a hat\nNegative prompt: ugly,\nfat\nSteps: 20, Sampler: Euler a, \
                    Schedule type: \"x, y\", CFG scale: 7, Seed: 965400086, Size: 512x768, \
                    Model hash: 45dee52b";
        let read = Parameters::from_infotext(text).unwrap();
        assert_eq!(read.prompt, "girl with a hat");
        assert_eq!(read.negative_prompt, "ugly,\nfat");
        assert_eq!(
            (read.steps, read.seed, read.guidance_scale),
            (20, 965_400_086, 7.0)
        );
        assert_eq!((read.width, read.height), (512, 768));
        assert_eq!((read.model.as_str(), read.rng.as_str()), ("", "cuda"));
        for (text, missing) in [
            ("just a prompt", "Size"),
            ("x\nSteps: many, Size: 1x1", "Steps"),
        ] {
            let error = Parameters::from_infotext(text).unwrap_err();
            assert!(error.to_string().contains(missing), "{error}");
        }
    }

    #[test]
    fn a_png_carries_pixels_and_settings() {
        let picture = RgbImage::from_fn(5, 3, |x, y| Rgb([x as u8, y as u8, 200]));
        let unicode = Parameters {
            prompt: "лиса 🦊".into(),
            ..parameters()
        };
        for (settings, chunk) in [(parameters(), b"tEXt"), (unicode, b"iTXt")] {
            let bytes = encode_png(&picture, Some(&settings)).unwrap();
            assert!(bytes.windows(4).any(|window| window == chunk));
            let text = infotext(&bytes).unwrap().unwrap();
            assert_eq!(Parameters::from_infotext(&text).unwrap(), settings);
            assert_eq!(
                image::load_from_memory(&bytes).unwrap().into_rgb8(),
                picture
            );
        }
        let bare = encode_png(&picture, None).unwrap();
        assert_eq!(infotext(&bare).unwrap(), None);
        assert!(infotext(b"not a png").is_err());
        assert!(matches!(
            encode_png(&RgbImage::new(0, 0), None),
            Err(PictureError::Encode { width: 0, .. })
        ));
    }

    #[test]
    fn a_grid_holds_every_picture_in_reading_order() {
        let pictures: Vec<RgbImage> = (1..=5u8)
            .map(|i| RgbImage::from_pixel(2, 2, Rgb([i, 0, 0])))
            .collect();
        let sheet = grid(&pictures.iter().collect::<Vec<_>>());
        assert_eq!(sheet.dimensions(), (6, 4));
        for (x, y, value) in [
            (0, 0, 1),
            (2, 0, 2),
            (5, 1, 3),
            (0, 2, 4),
            (3, 3, 5),
            (4, 2, 0),
        ] {
            assert_eq!(sheet.get_pixel(x, y).0[0], value);
        }
        assert_eq!(grid(&[]).dimensions(), (0, 0));
    }

    #[test]
    fn files_appear_whole_and_nothing_is_left_behind() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("fox.png");
        let picture = RgbImage::from_pixel(4, 4, Rgb([9, 8, 7]));
        fs::write(&path, b"old").unwrap();
        save_png(&path, &picture, Some(&parameters())).unwrap();
        assert_eq!(open(&path).unwrap().into_rgb8(), picture);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);

        // A folder in the way: the error names the file, and no part file remains.
        let taken = folder.path().join("taken");
        fs::create_dir(&taken).unwrap();
        for bad in [
            taken,
            folder.path().join("missing/fox.png"),
            PathBuf::from("/"),
        ] {
            let error = save_png(&bad, &picture, None).unwrap_err();
            assert!(
                error.to_string().contains(&bad.display().to_string()),
                "{error}"
            );
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[test]
    fn unreadable_pictures_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("text.png");
        fs::write(&path, "no picture").unwrap();
        for bad in [path, folder.path().join("missing.png")] {
            let error = open(&bad).unwrap_err().to_string();
            assert!(error.contains(&bad.display().to_string()), "{error}");
        }
    }

    proptest! {
        #[test]
        fn settings_survive_the_way_through_a_png(
            prompt in "[^\0]{0,80}",
            negative_prompt in "[^\0\\s]([^\0]{0,40}[^\0\\s])?|",
            steps in 1usize..2000,
            guidance_scale in 0.0f64..100.0,
            seed: u64,
            width in 1u32..5000,
            height in 1u32..5000,
            model in "\\PC{0,40}",
            rng in "cpu|cuda",
        ) {
            prop_assume!(!prompt.starts_with("Negative prompt:"));
            prop_assume!(!prompt.contains("\nNegative prompt:"));
            let settings = Parameters {
                prompt, negative_prompt, steps, guidance_scale, seed, width, height, model, rng,
            };
            let bytes = encode_png(&RgbImage::new(1, 1), Some(&settings)).unwrap();
            let text = infotext(&bytes).unwrap().unwrap();
            prop_assert_eq!(Parameters::from_infotext(&text).unwrap(), settings);
        }

        #[test]
        fn any_text_is_read_or_refused(text in "\\PC*|(Steps: [0-9\"x, :]*\n?){0,4}") {
            let _ = Parameters::from_infotext(&text);
        }
    }
}
