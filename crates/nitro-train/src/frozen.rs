//! A trained model with everything around it, frozen: what post-training starts from.

use std::path::Path;

use burn::tensor::{Device, Tensor, TensorData};
use image::RgbImage;
use nitro_diffusion::guidance;
use nitro_diffusion::noise::NoiseKind;
use nitro_diffusion::sampler::{Euler, SampleError};
use nitro_diffusion::schedule::FlowMatchEuler;
use nitro_models::emmdit::{Emmdit, EmmditConfig};
use nitro_models::{Adapted, LiveAdapter, ParameterSource, Params, TensorMap};
use nitro_ops::Precision;
use nitro_pipeline::card::CARD_FILE;
use nitro_pipeline::{ModelCard, Pipeline, Variant};

use crate::TrainError;
use crate::files::write_json;
use crate::pictures::to_bytes;

/// A model folder or Hub repository, loaded to be trained on from.
pub(crate) struct Frozen {
    /// Text encoder, autoencoder, and the transformer as it is.
    pub(crate) pipeline: Pipeline,
    /// The transformer's shape.
    pub(crate) config: EmmditConfig,
    /// Its parameters.
    pub(crate) parameters: TensorMap,
    /// The same as constants of the autodiff graph.
    constants: TensorMap,
    precision: Precision,
}

impl Frozen {
    /// Loads the model at `location`; its first variant if none is named.
    pub(crate) fn open(
        location: &str,
        variant: Option<&str>,
        precision: Precision,
    ) -> Result<Self, TrainError> {
        let builder = || {
            let builder = Pipeline::builder(location).precision(precision);
            match variant {
                Some(name) => builder.variant(name),
                None => builder,
            }
        };
        let (config, parameters) = builder().device(Device::flex()).read_transformer()?;
        let pipeline = builder().device(Device::flex()).load()?;
        Ok(Self {
            pipeline,
            config,
            constants: parameters.map(|_, tensor| tensor.autodiff()),
            parameters,
            precision,
        })
    }

    /// Channels, height and width of a latent at the model's resolution.
    pub(crate) fn latent_shape(&self) -> [usize; 3] {
        let side = self.config.sample_size;
        [self.config.in_channels, side, side]
    }

    /// Values of a latent.
    pub(crate) fn latent_len(&self) -> usize {
        self.latent_shape().iter().product()
    }

    /// The text encoder's states of prompts, `[prompts, text_tokens, width]`.
    pub(crate) fn text(&self, prompts: &[&str]) -> Result<Tensor<3>, TrainError> {
        // Equal prompts, as those of a group, are encoded once.
        let mut distinct: Vec<&str> = Vec::new();
        let rows: Vec<i32> = prompts
            .iter()
            .map(|prompt| {
                let known = distinct.iter().position(|p| p == prompt);
                known.unwrap_or_else(|| {
                    distinct.push(prompt);
                    distinct.len() - 1
                }) as i32
            })
            .collect();
        let states = self.pipeline.encode_texts(&distinct, true)?.features;
        let count = rows.len();
        let rows = Tensor::from_data(TensorData::new(rows, [count]), &Device::flex());
        Ok(states.select(0, rows))
    }

    /// The states a denoiser of this guidance needs: those of empty negative prompts come first.
    pub(crate) fn guided_text(
        &self,
        prompts: &[&str],
        scale: f32,
    ) -> Result<Tensor<3>, TrainError> {
        match guidance::is_active(scale) {
            false => self.text(prompts),
            true => self.text(&[vec![""; prompts.len()].as_slice(), prompts].concat()),
        }
    }

    /// The transformer with other parameters, without gradients.
    pub(crate) fn with(&self, source: &dyn ParameterSource) -> Result<Emmdit, TrainError> {
        let params = Params::new(source, &Device::flex(), self.precision);
        Ok(Emmdit::new(&self.config, &params)?)
    }

    /// The transformer with an adapter beside its weights, without gradients.
    pub(crate) fn adapted(&self, adapter: &LiveAdapter) -> Result<Emmdit, TrainError> {
        self.with(&Adapted::new(&self.parameters, [(adapter, 1.0)])?)
    }

    /// The same with gradients for what the adapter's tensors track.
    pub(crate) fn adapted_tracked(&self, adapter: &LiveAdapter) -> Result<Emmdit, TrainError> {
        self.tracked(&Adapted::new(&self.constants, [(adapter, 1.0)])?)
    }

    /// The transformer with parameters of the autodiff graph.
    pub(crate) fn tracked(&self, source: &dyn ParameterSource) -> Result<Emmdit, TrainError> {
        let device = Device::flex().autodiff();
        let params = Params::new(source, &device, self.precision);
        Ok(Emmdit::new(&self.config, &params)?)
    }

    /// The transformer as it is, constants of the autodiff graph: gradients pass through it.
    pub(crate) fn constant(&self) -> Result<Emmdit, TrainError> {
        self.tracked(&self.constants)
    }

    /// Clean latents to pictures.
    pub(crate) fn decode(&self, latents: &[f32]) -> Result<Vec<RgbImage>, TrainError> {
        let each = self.latent_len();
        let mut pictures = Vec::new();
        for some in latents.chunks(16 * each) {
            let decoded = self.pipeline.decode_latents(some, some.len() / each)?;
            let [_, _, h, w] = decoded.dims();
            let bytes = to_bytes(decoded).into_iter();
            pictures.extend(bytes.filter_map(|b| RgbImage::from_raw(w as u32, h as u32, b)));
        }
        Ok(pictures)
    }

    /// Clean latents of `prompts` by `model`, sample `i` from the noise of `seeds[i]`.
    pub(crate) fn sample(
        &self,
        model: &Emmdit,
        prompts: &[&str],
        seeds: &[u64],
        how: Sampling,
    ) -> Result<Vec<f32>, TrainError> {
        let timetable = FlowMatchEuler::nitro_e().timetable(how.steps)?;
        let mut clean = Vec::new();
        for (prompts, seeds) in prompts.chunks(how.batch).zip(seeds.chunks(how.batch)) {
            let noise = NoiseKind::TorchCpu.per_sample(seeds, self.latent_len());
            let denoiser = Denoiser {
                model,
                text: self.guided_text(prompts, how.guidance)?,
                guidance: how.guidance,
                shape: self.latent_shape(),
            };
            let latents = Euler::new(&timetable).run(
                noise,
                prompts.len(),
                |x: &[f32], timestep| denoiser.velocity(x, timestep),
                |_| std::ops::ControlFlow::Continue(()),
            );
            clean.extend(latents.map_err(unwrap_sampling)?);
        }
        Ok(clean)
    }
}

/// How pictures are sampled.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sampling {
    pub(crate) steps: usize,
    pub(crate) guidance: f32,
    pub(crate) batch: usize,
}

/// A transformer with the prompts it denoises for.
pub(crate) struct Denoiser<'a> {
    pub(crate) model: &'a Emmdit,
    /// States of the prompts; under guidance after those of the negative prompts.
    pub(crate) text: Tensor<3>,
    pub(crate) guidance: f32,
    /// Channels, height and width.
    pub(crate) shape: [usize; 3],
}

impl Denoiser<'_> {
    /// The model's own output for latents of one sample per prompt, `[B, C, H, W]`, under guidance
    /// `[2B, C, H, W]` with the unconditional half first.
    pub(crate) fn raw(&self, latents: &[f32], timestep: f32) -> Result<Tensor<4>, TrainError> {
        let [rows, _, _] = self.text.dims();
        let [c, h, w] = self.shape;
        let values = match guidance::is_active(self.guidance) {
            true => [latents, latents].concat(),
            false => latents.to_vec(),
        };
        let latents = TensorData::new(values, [rows, c, h, w]);
        let latents = Tensor::from_data(latents, &Device::flex());
        let out = self
            .model
            .forward(latents, self.text.clone(), &vec![timestep; rows])?;
        // A model that also predicts variances has them in further channels.
        Ok(out.slice_dim(1, 0..c))
    }

    /// The guided velocity of a raw output.
    pub(crate) fn guide(&self, mut raw: Vec<f32>) -> Vec<f32> {
        if guidance::is_active(self.guidance) {
            let half = raw.len() / 2;
            let (uncond, cond) = raw.split_at_mut(half);
            for (uncond, cond) in uncond.iter_mut().zip(cond) {
                *uncond += self.guidance * (*cond - *uncond);
            }
            raw.truncate(half);
        }
        raw
    }

    /// The gradient with respect to the raw output, from that with respect to the guided velocity.
    pub(crate) fn guide_backward(&self, grad: Vec<f32>) -> Vec<f32> {
        if !guidance::is_active(self.guidance) {
            return grad;
        }
        let part = |scale: f32| grad.iter().map(move |g| g * scale);
        part(1.0 - self.guidance)
            .chain(part(self.guidance))
            .collect()
    }

    /// The guided velocity.
    pub(crate) fn velocity(&self, latents: &[f32], timestep: f32) -> Result<Vec<f32>, TrainError> {
        Ok(self.guide(values(self.raw(latents, timestep)?)))
    }
}

/// A tensor's elements in row-major order.
pub(crate) fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    let data = tensor.into_data().convert::<f32>();
    data.try_into_vec().unwrap_or_default()
}

/// What made sampling fail.
pub(crate) fn unwrap_sampling(error: SampleError<TrainError>) -> TrainError {
    match error {
        SampleError::Denoiser { source, .. } => source,
        SampleError::Invalid(error) => error.into(),
        SampleError::Cancelled { completed, .. } => TrainError::Interrupted {
            step: completed as u64,
        },
    }
}

/// Writes `variant` into the card `nitro.json` of a model folder, in place of one of its name. A
/// folder without a card stays without.
pub(crate) fn register(folder: &Path, variant: Variant) -> Result<(), TrainError> {
    let path = folder.join(CARD_FILE);
    let Ok(bytes) = std::fs::read(&path) else {
        return Ok(());
    };
    let mut card = ModelCard::parse(&bytes, &path.display().to_string())?;
    let same = |v: &&mut Variant| (&v.name, v.resolution) == (&variant.name, variant.resolution);
    match card.variants.iter_mut().find(same) {
        Some(old) => *old = variant,
        None => card.variants.push(variant),
    }
    write_json(&path, &card)
}
