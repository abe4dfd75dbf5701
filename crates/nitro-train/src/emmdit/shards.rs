//! MDS shards in the official pipeline's columns as training examples.
//!
//! Order: `StreamingDataset`'s with the shuffle `py1s`, over global batches
//! ([`nitro_data::batches`]), so a step's examples follow from its number. Source of names, types and
//! shapes: the official `core/dataset.py` and `datasets/prepare/precompute.py`.

use std::ops::Range;

use nitro_data::DataError;
use nitro_data::batches::Batches;
use nitro_data::image::{DINO_BASE, IMAGENET_MEAN, IMAGENET_STD, dino_picture, to_planes};
use nitro_data::ingest::{CAPTION, JPG};
use nitro_data::mds::order::Order;
use nitro_data::mds::{Damage, Dataset, DatasetOptions, INDEX, OnDamage, Sample, Verify};

use super::source::{Example, Source, Text, Wanted, WantedRepa};
use crate::TrainError;
use crate::config::{CommonConfig, MdsData};
use crate::data::example_seed;

/// Captions that serve as prompts of sample pictures.
const SAMPLES: usize = 16;
/// Damaged samples in a row after which no other is looked for.
const MOST_DAMAGED: u64 = 1000;

const TEXT_FEAT: &str = "text_feat";
const TEXT_MASK: &str = "text_mask";
const DINO_FEAT: &str = "dino_feat";

/// A dataset of one or several folders.
pub(super) struct Shards {
    dataset: Dataset,
    batches: Batches,
    /// How many samples of each folder an epoch has, where weights say so.
    weights: String,
    layout: Layout,
    seed: u64,
    workers: usize,
}

/// Which columns are read, and what they hold.
struct Layout {
    latents: String,
    wanted: Wanted,
    states: bool,
}

impl Shards {
    /// Opens the datasets that `data` names.
    pub(super) fn open(
        data: &MdsData,
        run: &CommonConfig,
        wanted: Wanted,
    ) -> Result<Self, TrainError> {
        let options = DatasetOptions {
            verify: match data.verify {
                true => Verify::Hashes,
                false => Verify::Structure,
            },
            on_damage: match data.skip_damaged {
                true => OnDamage::Skip,
                false => OnDamage::Fail,
            },
            scratch: None,
        };
        let dataset = Dataset::open_all(&data.folders(), options)?;
        let layout = Layout {
            latents: latents_column(&dataset, data.latents.as_deref())?,
            wanted,
            states: data.precompute_txt_emb,
        };
        dataset.require(&layout.columns())?;
        layout.check_first(&dataset)?;
        let order = Order {
            seed: data.shuffle_seed,
            streams: data.streams()?,
            ..Order::shuffled(run.batch_size)
        };
        let weights = match order.streams.is_plain() {
            true => String::new(),
            false => format!(", epochs of {:?}", order.choose(&dataset.shard_sizes())?),
        };
        Ok(Self {
            batches: Batches::new(dataset.shard_sizes(), order)?,
            weights,
            dataset,
            layout,
            seed: run.seed,
            workers: data.num_workers.max(1),
        })
    }

    /// The example at place `index`; in the place of a damaged one another, drawn for this step.
    fn example(&self, index: usize, step: u64, place: usize) -> Result<Example, TrainError> {
        let mut index = index;
        for attempt in 0..MOST_DAMAGED {
            let decoded = self
                .dataset
                .decoded(index, |sample| self.layout.decode(sample))?;
            if let Some(example) = decoded {
                return Ok(example);
            }
            let draw = example_seed(self.seed ^ attempt, step, place);
            index = (draw % self.dataset.len() as u64) as usize;
        }
        Err(TrainError::Config {
            origin: "data".into(),
            reason: format!("{MOST_DAMAGED} samples in a row are damaged"),
        })
    }
}

impl Source for Shards {
    fn size(&self) -> (usize, u64) {
        (self.dataset.len(), self.batches.per_epoch())
    }

    fn read(&self, step: u64, examples: Range<usize>) -> Result<Vec<Example>, TrainError> {
        let batch = self.batches.get(step)?;
        let places: Vec<usize> = examples.collect();
        let each = places.len().div_ceil(self.workers).max(1);
        // Threads of their own: waiting for a disk must not stop those that compute.
        let read = |places: &[usize]| -> Result<Vec<Example>, TrainError> {
            let one = |place: &usize| self.example(batch[*place], step, *place);
            places.iter().map(one).collect()
        };
        std::thread::scope(|scope| {
            let parts: Vec<_> = places
                .chunks(each)
                .map(|some| scope.spawn(move || read(some)))
                .collect();
            let mut all = Vec::with_capacity(places.len());
            for part in parts {
                all.extend(part.join().map_err(|_| TrainError::DataThread)??);
            }
            Ok(all)
        })
    }

    fn gives_captions(&self) -> bool {
        !self.layout.states
    }

    fn sample_prompts(&self) -> Result<Vec<String>, TrainError> {
        let mut prompts = Vec::new();
        for index in 0..self.dataset.len().min(SAMPLES) {
            let caption = |sample: &Sample| sample.text(CAPTION).map(str::to_owned);
            prompts.extend(self.dataset.decoded(index, caption)?);
        }
        Ok(prompts)
    }

    fn fingerprint(&self) -> Result<String, TrainError> {
        // The indexes name every shard with its size, samples and hashes.
        let mut sum = 0;
        for folder in self.dataset.folders() {
            let path = folder.join(INDEX);
            let text = std::fs::read(&path).map_err(|source| TrainError::Io { path, source })?;
            sum = crc32c::crc32c_append(sum, &text);
        }
        let samples = self.dataset.len();
        Ok(format!("{samples} samples {sum:08x}{}", self.weights))
    }

    fn damage(&self) -> Vec<Damage> {
        self.dataset.damage()
    }
}

/// The column of latents: the one named, else the only one that looks like it.
fn latents_column(dataset: &Dataset, named: Option<&str>) -> Result<String, TrainError> {
    if let Some(name) = named {
        return Ok(name.to_owned());
    }
    let columns = dataset.schema().columns().iter();
    let found: Vec<&str> = columns
        .map(|column| column.name.as_str())
        .filter(|name| name.starts_with("latents_"))
        .collect();
    match found.as_slice() {
        [one] => Ok((*one).to_owned()),
        [] => Err(wrong(
            "the datasets have no column latents_*; add one with `nitro data precompute --latents`",
        )),
        many => Err(wrong(format!(
            "the datasets have {}; say which with `data.latents`",
            many.join(" and ")
        ))),
    }
}

fn wrong(reason: impl Into<String>) -> TrainError {
    TrainError::Config {
        origin: "data".into(),
        reason: reason.into(),
    }
}

impl Layout {
    /// Columns that every shard must have.
    fn columns(&self) -> Vec<&str> {
        let mut columns = vec![self.latents.as_str()];
        columns.push(if self.states { TEXT_FEAT } else { CAPTION });
        match self.wanted.repa {
            WantedRepa::Nothing => {}
            WantedRepa::Picture(_) => columns.push(JPG),
            WantedRepa::Features(_) => columns.push(DINO_FEAT),
        }
        columns
    }

    /// Columns of numbers that are read, and their shapes.
    fn shapes(&self) -> Vec<(&str, Vec<usize>, usize)> {
        const F16: usize = 2;
        const I64: usize = 8;
        let mut shapes = vec![(self.latents.as_str(), self.wanted.latent.to_vec(), F16)];
        if self.states {
            shapes.push((TEXT_FEAT, self.wanted.text.to_vec(), F16));
            // The model attends to padding; masks only tell whether the lengths agree.
            shapes.push((TEXT_MASK, vec![self.wanted.text[0]], I64));
        }
        if let WantedRepa::Features(shape) = self.wanted.repa {
            shapes.push((DINO_FEAT, shape.to_vec(), F16));
        }
        shapes
    }

    /// Tells at the start what does not fit the model: of each dataset, the first sample that can be
    /// read.
    fn check_first(&self, dataset: &Dataset) -> Result<(), TrainError> {
        let mut first = 0;
        for (folder, sizes) in dataset.folders().iter().zip(dataset.shard_sizes()) {
            for size in sizes {
                let begin = first;
                first += size;
                if size == 0 {
                    continue;
                }
                match dataset.sample(begin) {
                    Ok(sample) => {
                        self.check(&sample).map_err(|reason| TrainError::Data {
                            path: folder.clone(),
                            reason,
                        })?;
                        break;
                    }
                    Err(DataError::Damaged { .. }) => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
        // Folders whose first shards are all damaged are told by the samples themselves.
        Ok(())
    }

    fn check(&self, sample: &Sample) -> Result<(), String> {
        for (name, shape, width) in self.shapes() {
            let Ok(bytes) = sample.bytes(name) else {
                continue; // only masks may be missing
            };
            let expected = width * shape.iter().product::<usize>();
            if bytes.len() != expected {
                let hint = match name {
                    DINO_FEAT => {
                        "; `--dino-grid` of `nitro data precompute` sets the tokens on a side"
                    }
                    TEXT_FEAT | TEXT_MASK => "; `text_tokens` must be what they were encoded with",
                    _ => "; the model's `sample_size` must be that of the pictures",
                };
                return Err(format!(
                    "column {name:?} holds {} bytes a sample, expected {expected} ({shape:?} values \
                     of {width} bytes){hint}",
                    bytes.len()
                ));
            }
        }
        Ok(())
    }

    fn decode(&self, sample: &Sample) -> nitro_data::Result<Example> {
        let numbers = |name: &str, count: usize| -> nitro_data::Result<Vec<f32>> {
            let values = sample.f16s(name)?;
            let reason = match values.len() == count {
                false => format!("{} values, expected {count}", values.len()),
                true if values.iter().all(|v| v.is_finite()) => return Ok(values),
                true => "values that are no numbers".to_owned(),
            };
            Err(DataError::Column {
                column: name.to_owned(),
                reason,
            })
        };
        let Wanted { latent, text, repa } = self.wanted;
        Ok(Example {
            latent: numbers(&self.latents, latent.iter().product())?,
            text: match self.states {
                true => Text::States(numbers(TEXT_FEAT, text[0] * text[1])?),
                false => Text::Caption(sample.text(CAPTION)?.to_owned()),
            },
            repa: match repa {
                WantedRepa::Nothing => Vec::new(),
                WantedRepa::Features([tokens, width]) => numbers(DINO_FEAT, tokens * width)?,
                WantedRepa::Picture(side) => {
                    let picture = sample.picture(JPG)?;
                    let picture = dino_picture(&picture, DINO_BASE, side as u32);
                    to_planes(&picture, IMAGENET_MEAN, IMAGENET_STD)
                }
            },
        })
    }
}
