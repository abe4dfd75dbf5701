//! Trained weights as files: the small ones that ship, and the official layout.

use std::collections::HashMap;
use std::path::Path;

use nitro_models::emmdit::EmmditConfig;
use nitro_models::{DType, save_safetensors};

use crate::TrainError;
use crate::checkpoint::Checkpoint;
use crate::config::{RunConfig, TaskConfig};
use crate::language_model::RECALL;
use crate::store::ParameterStore;
use crate::visual_encoder::HEADS;

/// A tensor on its way into a file: name, shape, elements.
type Named<'a> = (String, Vec<usize>, &'a [f32]);

/// Which weights of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// The moving average.
    Averaged,
    /// The weights as the last step left them.
    Raw,
}

/// The trained tensors of a run, without the heads that only training needs.
fn trained(store: &ParameterStore, which: Which) -> Vec<Named<'_>> {
    let head = |name: &str| name.starts_with(RECALL) || name.starts_with(HEADS);
    store
        .iter()
        .filter(|(name, entry)| entry.trainable && !head(name))
        .map(|(name, entry)| {
            let values = match which {
                Which::Averaged => entry.averaged(),
                Which::Raw => &entry.value,
            };
            (name.to_owned(), entry.shape.clone(), values)
        })
        .collect()
}

/// Writes the averaged weights in half precision, which is how models ship.
pub(crate) fn save_shipped(
    store: &ParameterStore,
    path: &Path,
    metadata: HashMap<String, String>,
) -> Result<(), TrainError> {
    let tensors = trained(store, Which::Averaged);
    save(path, &tensors, &metadata, DType::F16)
}

/// The state dict of the official `EMMDiTTransformer`: the trained tensors, projectors included if
/// the run had REPA, and the position table, which is a buffer there.
pub fn official_state_dict(
    store: &ParameterStore,
    model: &EmmditConfig,
    which: Which,
) -> Vec<(String, Vec<usize>, Vec<f32>)> {
    let mut tensors: Vec<_> = trained(store, which)
        .into_iter()
        .map(|(name, shape, values)| (name, shape, values.to_vec()))
        .collect();
    let side = model.pos_embed_max_size;
    let table = "pos_embed.pos_embed";
    if store.get(table).is_none_or(|entry| !entry.trainable) {
        let shape = vec![1, side * side, model.width()];
        tensors.push((table.to_owned(), shape, model.positions().whole()));
    }
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    tensors
}

/// Writes the newest checkpoint of an E-MMDiT run as the official code loads it
/// (`training.transformer_ckpt`, `load_state_dict` with all keys present): `f32` unless asked
/// otherwise.
pub fn export_official(
    run_dir: &Path,
    out: &Path,
    which: Which,
    dtype: DType,
) -> Result<u64, TrainError> {
    let wrong = |reason: String| TrainError::Config {
        origin: run_dir.display().to_string(),
        reason,
    };
    let (_, checkpoint) = Checkpoint::latest(run_dir)?
        .ok_or_else(|| wrong("it holds no checkpoints/step-*.safetensors".to_owned()))?;
    let config: RunConfig = serde_json::from_str(&checkpoint.config).map_err(|e| {
        wrong(format!(
            "the checkpoint's configuration cannot be read ({e})"
        ))
    })?;
    let TaskConfig::Emmdit(task) = &config.task else {
        let kind = config.task.kind();
        return Err(wrong(format!("it trained a {kind}, expected an emmdit")));
    };
    let tensors = official_state_dict(&checkpoint.store, &task.model, which);
    let tensors: Vec<Named<'_>> = tensors
        .iter()
        .map(|(name, shape, values)| (name.clone(), shape.clone(), values.as_slice()))
        .collect();
    let metadata = HashMap::from([
        ("format".to_owned(), "pt".to_owned()),
        (
            "nitro.trained_steps".to_owned(),
            checkpoint.step.to_string(),
        ),
    ]);
    save(out, &tensors, &metadata, dtype)?;
    Ok(checkpoint.step)
}

fn save(
    path: &Path,
    tensors: &[Named<'_>],
    metadata: &HashMap<String, String>,
    dtype: DType,
) -> Result<(), TrainError> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(|source| TrainError::Io {
            path: parent.to_owned(),
            source,
        })?;
    }
    Ok(save_safetensors(path, tensors, metadata, dtype)?)
}
