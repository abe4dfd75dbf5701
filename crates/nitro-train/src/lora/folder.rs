//! A user's folder of pictures with captions, as latents and text states.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use nitro_models::{DType, WeightFiles, save_safetensors};

use crate::TrainError;
use crate::frozen::{Frozen, values};

/// File endings of pictures.
const PICTURES: [&str; 4] = ["png", "jpg", "jpeg", "webp"];

/// Pairs of latents and captions.
pub(crate) struct Pairs {
    pub(crate) latents: Vec<Vec<f32>>,
    pub(crate) captions: Vec<String>,
}

impl Pairs {
    /// The pictures of `folder`, in the order of their names, with the captions beside them
    /// (`NAME.txt`), encoded by the model's autoencoder. `cache` keeps the latents; it is made anew when
    /// pictures were added, removed or changed.
    pub(crate) fn open(
        folder: &Path,
        trigger: &str,
        frozen: &Frozen,
        cache: &Path,
    ) -> Result<Self, TrainError> {
        let files = list(folder)?;
        let mut captions = Vec::new();
        for picture in &files {
            let path = picture.with_extension("txt");
            let text = std::fs::read_to_string(&path).map_err(|error| TrainError::Data {
                path: path.clone(),
                reason: format!(
                    "{error}; every picture needs its caption in a text file of the same name"
                ),
            })?;
            let caption = [trigger.trim(), text.trim()].join(" ").trim().to_owned();
            if caption.is_empty() {
                return Err(TrainError::Data {
                    path,
                    reason: "the caption is empty".into(),
                });
            }
            captions.push(caption);
        }
        let side = frozen.pipeline.variant().resolution;
        let stamp = stamp(&files, side)?;
        if let Some(latents) = read_cache(cache, &stamp, frozen.latent_len()) {
            return Ok(Self { latents, captions });
        }
        let mut latents = Vec::new();
        for path in &files {
            let picture = image::open(path).map_err(|error| TrainError::Data {
                path: path.clone(),
                reason: format!("cannot be read as a picture: {error}"),
            })?;
            let latent = frozen.pipeline.encode_picture(&picture.to_rgb8(), side)?;
            latents.push(values(latent));
        }
        let all = latents.concat();
        let shape = vec![latents.len(), frozen.latent_len()];
        let metadata = HashMap::from([("nitro.pictures".to_owned(), stamp)]);
        let tensors = [("latents".to_owned(), shape, all.as_slice())];
        save_safetensors(cache, &tensors, &metadata, DType::F32)?;
        Ok(Self { latents, captions })
    }
}

fn list(folder: &Path) -> Result<Vec<PathBuf>, TrainError> {
    let io = |source| TrainError::Io {
        path: folder.to_owned(),
        source,
    };
    let mut files = Vec::new();
    for item in std::fs::read_dir(folder).map_err(io)? {
        let path = item.map_err(io)?.path();
        let ending = path.extension().unwrap_or_default().to_string_lossy();
        if PICTURES.contains(&ending.to_ascii_lowercase().as_str()) {
            files.push(path);
        }
    }
    files.sort();
    match files.is_empty() {
        false => Ok(files),
        true => Err(TrainError::Data {
            path: folder.to_owned(),
            reason: format!("holds no pictures; expected files ending in {PICTURES:?}"),
        }),
    }
}

/// Names, sizes and times of the pictures, and the side they are scaled to.
fn stamp(files: &[PathBuf], side: usize) -> Result<String, TrainError> {
    let mut stamp = format!("{side}");
    for path in files {
        let io = |source| TrainError::Io {
            path: path.clone(),
            source,
        };
        let metadata = std::fs::metadata(path).map_err(io)?;
        let modified = metadata.modified().map_err(io)?;
        let modified = modified.duration_since(std::time::UNIX_EPOCH);
        stamp += &format!(
            "\n{} {} {}",
            path.display(),
            metadata.len(),
            modified.map_or(0, |t| t.as_nanos())
        );
    }
    Ok(stamp)
}

/// The cached latents, if they are of the same pictures.
fn read_cache(path: &Path, stamp: &str, each: usize) -> Option<Vec<Vec<f32>>> {
    let files = path.exists().then(|| WeightFiles::open(path).ok())??;
    if files.metadata().get("nitro.pictures").map(String::as_str) != Some(stamp) {
        return None;
    }
    let (_, values) = files.read("latents").ok()?;
    let latents = values.chunks_exact(each).map(<[f32]>::to_vec);
    Some(latents.collect())
}
