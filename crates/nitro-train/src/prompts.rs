//! Prompts to train on after the first training, with what it takes to judge their pictures.

use std::path::PathBuf;

use nitro_data::shapes::Task;
use nitro_eval::geneval::{Metadata, read_metadata};
use nitro_eval::shapes::{TASKS, held_out_bench, training_prompt};
use serde::{Deserialize, Serialize};

use crate::TrainError;
use crate::data::example_seed;

/// Where prompts come from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind", deny_unknown_fields)]
pub enum PromptConfig {
    /// The grammar of the shapes world, without the bench's prompts and without those held out to
    /// check its scores.
    Shapes {
        /// The prompts' tasks, which take turns: GenEval's six where none are named. Tasks that are
        /// named more often are trained more (Flow-GRPO, arXiv 2505.05470, weights GenEval's by how
        /// hard they are).
        #[serde(default = "every_task")]
        tasks: Vec<Task>,
    },
    /// A file of GenEval metadata, one JSON object per line; `{"tag": "", "prompt": "..."}` is enough
    /// for scorers that look at nothing else.
    File {
        /// The file.
        path: PathBuf,
    },
}

fn every_task() -> Vec<Task> {
    TASKS.to_vec()
}

/// Prompts by number.
#[derive(Clone, Debug)]
pub struct Prompts {
    source: Source,
}

#[derive(Clone, Debug)]
enum Source {
    Grammar(Vec<Task>),
    File(Vec<Metadata>),
}

impl Prompts {
    /// Opens what `config` names.
    pub fn open(config: &PromptConfig) -> Result<Self, TrainError> {
        let path = match config {
            PromptConfig::Shapes { tasks } if tasks.is_empty() => {
                return Err(TrainError::Config {
                    origin: "prompts".into(),
                    reason: "tasks is empty: name at least one, or leave it out for all".into(),
                });
            }
            PromptConfig::Shapes { tasks } => {
                let source = Source::Grammar(tasks.clone());
                return Ok(Self { source });
            }
            PromptConfig::File { path } => path,
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
            source: Source::File(prompts),
        })
    }

    /// Prompt `index` of the run with this seed.
    pub fn get(&self, seed: u64, index: u64) -> Metadata {
        let draw = example_seed(seed ^ 0x7072_6F6D_7074, index, 0);
        match &self.source {
            Source::Grammar(tasks) => {
                training_prompt(tasks[(index % tasks.len() as u64) as usize], draw)
            }
            Source::File(prompts) => {
                // Epochs, each beginning at another place.
                let count = prompts.len() as u64;
                let offset = example_seed(seed, index / count, 1) % count;
                prompts[((index + offset) % count) as usize].clone()
            }
        }
    }

    /// `count` prompts to watch a training with: held out of it where the source can tell.
    pub fn held_out(&self, count: usize) -> Vec<Metadata> {
        let all: Vec<Metadata> = match &self.source {
            Source::Grammar(_) => held_out_bench().into_iter().map(|p| p.metadata).collect(),
            Source::File(prompts) => prompts.clone(),
        };
        // Evenly over the tasks, which follow one another.
        let count = count.min(all.len());
        (0..count)
            .map(|i| all[i * all.len() / count].clone())
            .collect()
    }
}
