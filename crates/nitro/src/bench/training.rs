//! The training step that is measured.

use burn::tensor::{Device, Tensor, TensorData};
use nitro_models::emmdit::Emmdit;
use nitro_models::{FormulaWeights, Params};
use nitro_ops::Precision;
use nitro_train::TrainError;
use nitro_train::optimizer::{named_gradients, step};
use nitro_train::store::ParameterStore;

use super::BenchError;
use super::suite::TrainingStep;

/// A model in training, and one batch that is trained on again and again.
pub(super) struct TrainingRun<'a> {
    setup: &'a TrainingStep,
    precision: Precision,
    store: ParameterStore,
    noisy: Tensor<4>,
    text: Tensor<3>,
    target: Tensor<3>, // tokens, [batch, h w, c]
    times: Vec<f32>,
    updates: u64,
}

impl<'a> TrainingRun<'a> {
    pub(super) fn new(setup: &'a TrainingStep, precision: Precision) -> Result<Self, BenchError> {
        let config = &setup.model;
        let store = ParameterStore::initialise(0, |p| Emmdit::new(config, p).map(drop))?;
        let values = FormulaWeights::new("bench/");
        let random = |name: &str, count: usize| -> Vec<f32> {
            let uniform = values.uniform(name, count).into_iter();
            uniform.map(|u| 12_f32.sqrt() * (u - 0.5)).collect()
        };
        let (batch, side, channels) = (setup.batch, config.sample_size, config.in_channels);
        let latents = [batch, channels, side, side];
        let text = [batch, setup.text_tokens, config.caption_channels];
        let patch = config.patch_size * config.patch_size;
        let tokens = [batch, side * side / patch, patch * config.out_channels];
        let device = Device::flex();
        let size = |shape: &[usize]| shape.iter().product::<usize>();
        Ok(Self {
            setup,
            precision,
            store,
            noisy: Tensor::from_data(
                TensorData::new(random("noisy", size(&latents)), latents),
                &device,
            ),
            text: Tensor::from_data(TensorData::new(random("text", size(&text)), text), &device),
            target: Tensor::from_data(
                TensorData::new(random("target", size(&tokens)), tokens),
                &device,
            ),
            times: (0..batch)
                .map(|i| 1000.0 * (i as f32 + 0.5) / batch as f32)
                .collect(),
            updates: 0,
        })
    }

    /// One step of the trainer: forward, backward, clipping, AdamW, moving average.
    pub(super) fn step(&mut self) -> Result<(), BenchError> {
        let device = Device::flex().autodiff();
        let tensors = self.store.tracked();
        let params = Params::new(&tensors, &device, self.precision);
        let model = Emmdit::new(&self.setup.model, &params)?;
        let output = model.forward_train(self.noisy.clone(), self.text.clone(), &self.times)?;
        let loss = (output.tokens - self.target.clone()).powi_scalar(2).mean();
        let gradients = named_gradients(&tensors, &self.store, loss.backward());
        self.updates += 1;
        step(
            &mut self.store,
            &gradients,
            &self.setup.optimizer,
            self.setup.optimizer.lr,
            self.updates,
            self.setup.gradient_clip,
            self.setup.ema_rate,
        )
        .map_err(TrainError::from)?;
        Ok(())
    }
}
