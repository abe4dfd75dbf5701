//! Prompts to train on after the first training, with what it takes to judge their pictures.

use std::path::PathBuf;

use nitro_eval::geneval::{Metadata, read_metadata};
use nitro_eval::shapes::{held_out_bench, training_prompt};
use serde::{Deserialize, Serialize};

use crate::TrainError;
use crate::data::example_seed;

/// Where prompts come from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind", deny_unknown_fields)]
pub enum PromptConfig {
    /// The grammar of the shapes world: GenEval's six tasks in turn, without the bench's prompts and
    /// without those held out to check its scores.
    Shapes,
    /// A file of GenEval metadata, one JSON object per line; `{"tag": "", "prompt": "..."}` is enough
    /// for scorers that look at nothing else.
    File {
        /// The file.
        path: PathBuf,
    },
}

/// Prompts by number.
#[derive(Clone, Debug)]
pub struct Prompts {
    file: Option<Vec<Metadata>>,
}

impl Prompts {
    /// Opens what `config` names.
    pub fn open(config: &PromptConfig) -> Result<Self, TrainError> {
        let PromptConfig::File { path } = config else {
            return Ok(Self { file: None });
        };
        let text = std::fs::read_to_string(path).map_err(|source| TrainError::Io {
            path: path.clone(),
            source,
        })?;
        let prompts = read_metadata(&text, &path.display().to_string())?;
        if prompts.is_empty() {
            return Err(TrainError::Data {
                path: path.clone(),
                reason: "holds no prompts; expected one JSON object per line".into(),
            });
        }
        Ok(Self {
            file: Some(prompts),
        })
    }

    /// Prompt `index` of the run with this seed.
    pub fn get(&self, seed: u64, index: u64) -> Metadata {
        let draw = example_seed(seed ^ 0x7072_6F6D_7074, index, 0);
        match &self.file {
            None => training_prompt(index, draw),
            Some(prompts) => {
                // Epochs, each beginning at another place.
                let count = prompts.len() as u64;
                let offset = example_seed(seed, index / count, 1) % count;
                prompts[((index + offset) % count) as usize].clone()
            }
        }
    }

    /// `count` prompts to watch a training with: held out of it where the source can tell.
    pub fn held_out(&self, count: usize) -> Vec<Metadata> {
        let all: Vec<Metadata> = match &self.file {
            None => held_out_bench().into_iter().map(|p| p.metadata).collect(),
            Some(prompts) => prompts.clone(),
        };
        // Evenly over the tasks, which follow one another.
        let count = count.min(all.len());
        (0..count)
            .map(|i| all[i * all.len() / count].clone())
            .collect()
    }
}
