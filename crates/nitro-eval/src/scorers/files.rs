//! Where scorers' weights come from: a file, a folder, or the Hub.

use std::path::Path;

use burn::tensor::Device;
use nitro_models::blip::{ImageReward, ImageRewardConfig, MedConfig, VitConfig};
use nitro_models::clip::ClipConfig;
use nitro_models::mask2former::{Mask2Former, Mask2FormerConfig};
use nitro_models::{Params, WeightFiles};
use nitro_ops::Precision;
use nitro_pipeline::{Hub, HubError, HubOptions, ModelFile, ModelLocation, PipelineError};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{ColorClassifier, Detector, Hps, ImageRewardScorer};
use crate::EvalError;

/// Where the official weights of each scorer are.
pub mod official {
    /// HPSv2.1.
    pub const HPS: &str = "xswu/HPSv2";
    /// ImageReward.
    pub const IMAGE_REWARD: &str = "THUDM/ImageReward";
    /// GenEval's detector with Hugging Face's names.
    pub const DETECTOR: &str = "facebook/mask2former-swin-small-coco-instance";
    /// OpenAI's ViT-L/14 with open_clip's names.
    pub const CLIP: &str = "timm/vit_large_patch14_clip_224.openai";
}

/// Names that open_clip and HPSv2 give their weights.
const CLIP_WEIGHTS: [&str; 4] = [
    "HPS_v2.1_compressed.pt",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors",
];
/// A buffer that some versions of open_clip stored.
const CLIP_UNUSED: [&str; 1] = ["attn_mask"];
const REWARD_WEIGHTS: [&str; 2] = ["ImageReward.pt", "model.safetensors"];
const DETECTOR_WEIGHTS: [&str; 2] = ["model.safetensors", "pytorch_model.bin"];

/// A scorer, and the SHA-256 of its weights.
#[derive(Debug)]
pub struct Loaded<T> {
    /// The scorer.
    pub scorer: T,
    /// Hash of the weight file.
    pub sha256: String,
}

/// One scorer's files.
#[derive(Debug)]
pub struct ScorerFiles {
    location: ModelLocation,
    hub: HubOptions,
}

impl ScorerFiles {
    /// The files at `location`: a weight file, a folder, or `org/name` on the Hub.
    pub fn new(location: &str, hub: HubOptions) -> Self {
        Self {
            location: location.into(),
            hub,
        }
    }

    /// How messages call the place.
    pub fn place(&self) -> String {
        match &self.location {
            ModelLocation::Folder(path) => path.display().to_string(),
            ModelLocation::Hub(repo) => repo.clone(),
            ModelLocation::Embedded(model) => model.name.to_owned(),
        }
    }

    /// The first of `names` that is there.
    fn find(&self, names: &[&str]) -> Result<Option<ModelFile>, EvalError> {
        match &self.location {
            ModelLocation::Folder(folder) => {
                let file = names
                    .iter()
                    .map(|name| folder.join(name))
                    .find(|f| f.is_file());
                Ok(file.map(ModelFile::Disk))
            }
            ModelLocation::Hub(repo) => {
                let hub = Hub::new(self.hub.clone()).map_err(PipelineError::Hub)?;
                for name in names {
                    match hub.file(repo, name) {
                        Ok(path) => return Ok(Some(ModelFile::Disk(path))),
                        // Without the network nothing but the cache can say what there is.
                        Err(HubError::NotFound { .. } | HubError::Offline { .. }) => {}
                        Err(e) => return Err(PipelineError::Hub(e).into()),
                    }
                }
                Ok(None)
            }
            ModelLocation::Embedded(_) => Ok(None),
        }
    }

    /// The weight file: the location itself if it is a file, else the first of `names`.
    fn weights(&self, names: &[&str]) -> Result<ModelFile, EvalError> {
        if let ModelLocation::Folder(file) = &self.location
            && file.is_file()
        {
            return Ok(ModelFile::Disk(file.clone()));
        }
        self.find(names)?.ok_or_else(|| EvalError::NoScorer {
            place: self.place(),
            names: names.join(", "),
        })
    }

    /// The JSON file `name`, if it is there.
    fn config(&self, name: &str) -> Result<Option<(Value, String)>, EvalError> {
        let file = match &self.location {
            ModelLocation::Folder(path) if path.is_file() => {
                let beside = path.parent().unwrap_or(Path::new("")).join(name);
                beside.is_file().then_some(ModelFile::Disk(beside))
            }
            _ => self.find(&[name])?,
        };
        let Some(file) = file else {
            return Ok(None);
        };
        let value = serde_json::from_slice(&file.read()?).map_err(|source| EvalError::Json {
            expected: "a model configuration",
            path: file.name(),
            source,
        })?;
        Ok(Some((value, file.name())))
    }

    /// HPSv2 or HPSv2.1: ViT-H/14, or what an `open_clip_config.json` beside the weights says.
    ///
    /// # Errors
    /// When the files cannot be had or are of another model.
    pub fn hps(&self, device: &Device, precision: Precision) -> Result<Loaded<Hps>, EvalError> {
        let config = self.clip_config(ClipConfig::vit_h_14())?;
        let file = self.weights(&CLIP_WEIGHTS)?;
        load(&file, &CLIP_UNUSED, |weights| {
            Ok(Hps::new(&config, &Params::new(weights, device, precision))?)
        })
    }

    /// GenEval's CLIP: ViT-L/14, or what an `open_clip_config.json` says, with OpenAI's GELU.
    ///
    /// # Errors
    /// When the files cannot be had or are of another model.
    pub fn colors(
        &self,
        device: &Device,
        precision: Precision,
    ) -> Result<Loaded<ColorClassifier>, EvalError> {
        let config = ClipConfig {
            quick_gelu: true,
            ..self.clip_config(ClipConfig::vit_l_14_openai())?
        };
        let file = self.weights(&CLIP_WEIGHTS[1..])?;
        load(&file, &CLIP_UNUSED, |weights| {
            let p = Params::new(weights, device, precision);
            Ok(ColorClassifier::new(&config, &p)?)
        })
    }

    fn clip_config(&self, default: ClipConfig) -> Result<ClipConfig, EvalError> {
        match self.config("open_clip_config.json")? {
            None => Ok(default),
            Some((value, name)) => part(&value["model_cfg"], &name),
        }
    }

    /// ImageReward: `med_config.json`, and if it is not ViT-L/16 at 224 pixels a `vit` inside it.
    ///
    /// # Errors
    /// When the files cannot be had or are of another model.
    pub fn image_reward(
        &self,
        device: &Device,
        precision: Precision,
    ) -> Result<Loaded<ImageRewardScorer>, EvalError> {
        let (value, name) = self
            .config("med_config.json")?
            .ok_or_else(|| EvalError::NoScorer {
                place: self.place(),
                names: "med_config.json".to_owned(),
            })?;
        let med_config: MedConfig = part(&value, &name)?;
        let vit = match value.get("vit") {
            Some(vit) if vit.is_object() => part(vit, &name)?,
            _ => VitConfig::default(),
        };
        let config = ImageRewardConfig::new(med_config, vit);
        let file = self.weights(&REWARD_WEIGHTS)?;
        load(&file, &ImageReward::UNUSED, |weights| {
            ImageRewardScorer::new(&config, &Params::new(weights, device, precision))
        })
    }

    /// The detector of `config.json`.
    ///
    /// # Errors
    /// When the files cannot be had or are of another model.
    pub fn detector(
        &self,
        device: &Device,
        precision: Precision,
    ) -> Result<Loaded<Detector>, EvalError> {
        let config: Mask2FormerConfig = match self.config("config.json")? {
            None => Mask2FormerConfig::default(),
            Some((value, name)) => part(&value, &name)?,
        };
        let file = self.weights(&DETECTOR_WEIGHTS)?;
        load(&file, &Mask2Former::UNUSED, |weights| {
            Detector::new(&config, &Params::new(weights, device, precision))
        })
    }
}

fn part<T: DeserializeOwned>(value: &Value, name: &str) -> Result<T, EvalError> {
    serde_json::from_value(value.clone()).map_err(|source| EvalError::Json {
        expected: "the configuration of this scorer's model",
        path: name.to_owned(),
        source,
    })
}

/// Opens the weights, builds the scorer, and checks that it used all of them but `unused`.
fn load<T>(
    file: &ModelFile,
    unused: &[&str],
    build: impl FnOnce(&WeightFiles) -> Result<T, EvalError>,
) -> Result<Loaded<T>, EvalError> {
    let weights = match file {
        ModelFile::Disk(path) => WeightFiles::open(path)?,
        ModelFile::Embedded { name, bytes } => WeightFiles::from_bytes(name, *bytes)?,
    };
    let scorer = build(&weights)?;
    weights.finish(unused)?;
    Ok(Loaded {
        scorer,
        sha256: file.sha256()?,
    })
}
