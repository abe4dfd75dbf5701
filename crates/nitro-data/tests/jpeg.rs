//! JPEG decoding against PIL (Pillow with libjpeg-turbo): `tests/jpeg/NAME.png` holds the pixels that
//! PIL gave for `NAME.jpg`.

use std::fs;
use std::path::{Path, PathBuf};

use nitro_data::image::{decode, encode_jpeg};
use proptest::prelude::*;

fn files() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/jpeg");
    let entries = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let mut files: Vec<PathBuf> = entries
        .filter(|p| p.extension().unwrap() == "jpg")
        .collect();
    files.sort();
    assert!(files.len() >= 12);
    files
}

#[test]
fn pixels_are_those_of_pil() {
    for file in files() {
        let found = decode(&fs::read(&file).unwrap()).unwrap();
        let expected = decode(&fs::read(file.with_extension("png")).unwrap()).unwrap();
        assert_eq!(found.dimensions(), expected.dimensions());
        let pairs = found.as_raw().iter().zip(expected.as_raw());
        let worst = pairs.map(|(a, b)| a.abs_diff(*b)).max().unwrap();
        assert_eq!(worst, 0, "{}", file.display());
    }
}

#[test]
fn a_file_that_ends_early_is_an_error() {
    for file in files() {
        let bytes = fs::read(&file).unwrap();
        for part in [3, 20, bytes.len() / 2, bytes.len() - 30] {
            assert!(
                decode(&bytes[..part]).is_err(),
                "{} cut at {part}",
                file.display()
            );
        }
    }
}

#[test]
fn what_is_encoded_here_is_decoded_here() {
    let picture =
        image::RgbImage::from_fn(21, 34, |x, y| image::Rgb([x as u8 * 12, y as u8 * 7, 90]));
    let again = decode(&encode_jpeg(&picture, 100).unwrap()).unwrap();
    let pairs = again.as_raw().iter().zip(picture.as_raw());
    assert!(pairs.map(|(a, b)| a.abs_diff(*b)).max().unwrap() < 12);
}

proptest! {
    #[test]
    fn damaged_files_never_panic(
        which in 0usize..12,
        harm in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let mut bytes = fs::read(&files()[which]).unwrap();
        for (at, value) in harm {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        // A forged size would only cost memory and time.
        let size = nitro_data::image::dimensions(&bytes);
        prop_assume!(size.is_ok_and(|(w, h)| w * h < 1 << 20));
        let _ = decode(&bytes);
    }
}
