//! Starting a run from trained weights.

use std::path::Path;

use burn::tensor::{Device, Tensor};
use nitro_models::{
    ParameterSource, ParameterSpec, Params, RandomInit, TensorMap, WeightError, WeightFiles,
};

use crate::TrainError;
use crate::checkpoint::Checkpoint;
use crate::store::ParameterStore;

/// The parameters that `build` asks for, with the weights of `path`: a run's folder or a checkpoint
/// (whose average is taken), or exported weights.
///
/// Only REPA's projectors may be missing, and are then initialised from `seed`: a stage without
/// REPA may follow one with it and the other way round.
pub(crate) fn initial_from(
    path: &Path,
    seed: u64,
    build: impl FnOnce(&Params<'_>) -> Result<(), TrainError>,
) -> Result<ParameterStore, TrainError> {
    let wrong = |reason: &str| TrainError::Config {
        origin: format!("run.init_from: {}", path.display()),
        reason: reason.to_owned(),
    };
    let weights = if path.is_dir() {
        let (_, checkpoint) = Checkpoint::latest(path)?.ok_or_else(|| {
            wrong("the folder holds no checkpoints/step-*.safetensors; train that run first")
        })?;
        Weights::Averaged(checkpoint.store.averaged())
    } else if path.exists() {
        let files = WeightFiles::open(path)?;
        match files.metadata().contains_key("nitro.step") {
            true => Weights::Averaged(Checkpoint::load(path)?.store.averaged()),
            false => Weights::Files(files),
        }
    } else {
        return Err(wrong("there is no such file or folder"));
    };
    let source = Trained {
        weights,
        fresh: RandomInit::new(seed),
    };
    ParameterStore::from_source(&source, build)
}

enum Weights {
    Averaged(TensorMap),
    Files(WeightFiles),
}

struct Trained {
    weights: Weights,
    fresh: RandomInit,
}

impl Trained {
    fn source(&self) -> &dyn ParameterSource {
        match &self.weights {
            Weights::Averaged(map) => map,
            Weights::Files(files) => files,
        }
    }
}

impl ParameterSource for Trained {
    fn parameter(&self, spec: &ParameterSpec, device: &Device) -> Result<Tensor<1>, WeightError> {
        let projector = spec.name.starts_with("projectors.");
        if projector && !self.source().contains(&spec.name) {
            return self.fresh.parameter(spec, device);
        }
        self.source().parameter(spec, device)
    }

    fn contains(&self, name: &str) -> bool {
        self.source().contains(name)
    }
}
