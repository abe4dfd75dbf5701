//! The reading of training data that is measured.

use nitro_data::DataError;
use nitro_data::mds::{Schema, Value, Writer, WriterOptions};
use nitro_models::FormulaWeights;
use nitro_models::emmdit::RepaConfig;
use nitro_train::TrainError;
use nitro_train::config::{
    DataConfig, EmmditTask, MdsData, RepaTask, RunConfig, StreamConfig, TaskConfig,
};
use nitro_train::emmdit::EmmditTraining;
use nitro_train::null_text;
use nitro_train::trainer::Task;

use super::BenchError;
use super::stage::LOADED;
use super::suite::Suite;

/// Samples in the shards: two batches, and so long that each epoch has its own order.
const SAMPLES: usize = 2 * LOADED;

/// The official first stage, whose data are read.
const STAGE_1: &str = "emmdit_512train_step1";

/// A dataset with all columns of the official pipeline, in a temporary folder.
pub(super) struct Shards {
    _folder: tempfile::TempDir,
    config: RunConfig,
    task: EmmditTask,
}

/// What training's data thread does.
pub(super) struct Reader<'a> {
    training: EmmditTraining<'a>,
    step: u64,
}

impl Shards {
    /// Writes the shards that the models of `suite` are trained from.
    pub(super) fn write(suite: &Suite) -> Result<Self, BenchError> {
        let folder = tempfile::tempdir().map_err(|error| DataError::Io {
            action: "make a folder in",
            path: std::env::temp_dir(),
            reason: error.to_string(),
        })?;
        let (model, tokens) = (&suite.emmdit, suite.text_tokens);
        let grid = model.sample_size / model.patch_size;
        let latent = model.in_channels * model.sample_size * model.sample_size;
        let sizes = [
            ("latents_512", latent),
            ("text_feat", tokens * model.caption_channels),
            ("dino_feat", grid * grid * suite.dino.embed_dim),
        ];
        let columns = sizes.iter().map(|(name, _)| (*name, "bytes"));
        let schema = Schema::new(columns.chain([("caption", "str")]))?;
        let mut writer = Writer::create(folder.path(), schema, WriterOptions::default())?;
        let values = FormulaWeights::new("bench/");
        for index in 0..SAMPLES {
            let mut sample = vec![("caption", Value::Str(format!("sample {index}")))];
            for (name, count) in sizes {
                let values = values.uniform(&format!("{name}/{index}"), count);
                sample.push((name, Value::f16s(&values)));
            }
            writer.write(&sample)?;
        }
        writer.finish()?;
        let empty = vec![0.0; tokens * model.caption_channels];
        null_text::write_values(folder.path(), &empty, [tokens, model.caption_channels])?;

        let mut config = RunConfig::shipped(STAGE_1, &[])?;
        config.run.batch_size = LOADED;
        config.run.sample_every = 0;
        let TaskConfig::Emmdit(task) = &config.task else {
            return Err(BenchError::Train(TrainError::Config {
                origin: format!("configs/{STAGE_1}.yaml"),
                reason: format!("task kind is {}, expected emmdit", config.task.kind()),
            }));
        };
        let mut task = task.clone();
        task.model = model.clone();
        task.model.repa = Some(RepaConfig {
            projector_dim: 1,
            z_dims: vec![suite.dino.embed_dim],
        });
        task.repa = Some(RepaTask {
            encoder: None,
            weight: 0.5,
        });
        task.text_tokens = tokens;
        if let DataConfig::Mds(data) = &mut task.data {
            *data = MdsData {
                datasets: vec![StreamConfig::Folder(folder.path().to_owned())],
                precompute_txt_emb: true,
                precompute_dino_feat: true,
                num_workers: 2,
                ..data.clone()
            };
        }
        Ok(Self {
            _folder: folder,
            config,
            task,
        })
    }

    /// Opens them as a run does.
    pub(super) fn reader(&self) -> Result<Reader<'_>, BenchError> {
        Ok(Reader {
            training: EmmditTraining::new(&self.config.run, &self.task)?,
            step: 0,
        })
    }
}

impl Reader<'_> {
    /// The next batch.
    pub(super) fn next(&mut self) -> Result<(), BenchError> {
        let batch = self.training.batch(self.step, 0..LOADED)?;
        std::hint::black_box(&batch);
        self.step += 1;
        Ok(())
    }
}
