//! The text states of the empty prompt beside a dataset, for training without a text encoder.
//!
//! A dropped caption is replaced by them; the official trainer computes them when it starts.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use burn::tensor::Tensor;
use nitro_models::{DType, WeightFiles, save_safetensors};

use crate::TrainError;
use crate::frozen::values;

/// Name of the file in a dataset folder.
pub const FILE: &str = "null_emb.safetensors";
/// The tensor in it, `[text_tokens, channels]`, named like the column of all other states.
const TENSOR: &str = "text_feat";

/// Writes `states [1, text_tokens, channels]` into `folder`, in the precision of the columns.
pub fn write(folder: &Path, states: Tensor<3>) -> Result<(), TrainError> {
    let [_, tokens, channels] = states.dims();
    write_values(folder, &values(states), [tokens, channels])
}

/// The same for states `[text_tokens, channels]` as values.
pub fn write_values(folder: &Path, states: &[f32], shape: [usize; 2]) -> Result<(), TrainError> {
    std::fs::create_dir_all(folder).map_err(|source| TrainError::Io {
        path: folder.to_owned(),
        source,
    })?;
    let tensors = [(TENSOR.to_owned(), shape.to_vec(), states)];
    let path = folder.join(FILE);
    Ok(save_safetensors(
        &path,
        &tensors,
        &HashMap::new(),
        DType::F16,
    )?)
}

/// The states that `path` holds, which must be `[text_tokens, channels]`.
fn read(path: &Path, shape: [usize; 2]) -> Result<Vec<f32>, TrainError> {
    let (found, values) = WeightFiles::open(path)?.read(TENSOR)?;
    if found != shape {
        return Err(TrainError::Data {
            path: path.to_owned(),
            reason: format!(
                "the empty prompt's states are {found:?}, expected {shape:?} (text_tokens, \
                 caption_channels)"
            ),
        });
    }
    Ok(values)
}

/// The states from `path` or, without one, from the dataset folders that have them, which must agree.
/// `None` if none has.
pub(crate) fn find(
    path: Option<&Path>,
    folders: &[PathBuf],
    shape: [usize; 2],
) -> Result<Option<Vec<f32>>, TrainError> {
    if let Some(path) = path {
        return read(path, shape).map(Some);
    }
    let mut found: Option<(PathBuf, Vec<f32>)> = None;
    for path in folders.iter().map(|folder| folder.join(FILE)) {
        if !path.exists() {
            continue;
        }
        let states = read(&path, shape)?;
        match &found {
            Some((first, others)) if *others != states => {
                return Err(TrainError::Data {
                    path,
                    reason: format!(
                        "the empty prompt's states differ from those of {}: the datasets were made \
                         with different text encoders",
                        first.display()
                    ),
                });
            }
            Some(_) => {}
            None => found = Some((path, states)),
        }
    }
    Ok(found.map(|(_, states)| states))
}
