//! The models of the inference stages, made when first needed and kept while they serve.

use std::cell::Cell;
use std::time::{Duration, Instant};

use burn::tensor::{Bool, Device, Int, Tensor, TensorData};
use nitro_data::image::{
    DINO_BASE, IMAGENET_MEAN, IMAGENET_STD, decode, dino_picture, encode_jpeg, to_planes,
    vae_picture,
};
use nitro_data::mds::Value;
use nitro_diffusion::guidance;
use nitro_diffusion::sampler::Euler;
use nitro_diffusion::schedule::FlowMatchEuler;
use nitro_models::dcae::{Decoder, Encoder};
use nitro_models::dinov2::Dinov2;
use nitro_models::emmdit::Emmdit;
use nitro_models::llama::Llama;
use nitro_models::{
    FormulaWeights, InputError, PackedFile, ParameterSource, ParameterSpec, Params, StoredTable,
    WeightError,
};
use nitro_ops::Precision;
use nitro_pipeline::to_pictures;
use tempfile::TempDir;

use super::machine::resident_memory;
use super::report::{LoadReport, SecondStart};
use super::stage::Stage;
use super::suite::Suite;
use super::{BenchError, Event, Observer, tell};

/// Salt of the weights: that of the full-size reference vectors.
const SALT: &str = "nitro/";
/// Tokens of the measured prompt; the rest of the text is padding.
const PROMPT_TOKENS: usize = 20;
/// Guidance of Nitro-E's base model.
const GUIDANCE: f32 = 4.5;

/// A model of the suite.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    Emmdit,
    LargeEmmdit,
    Llama,
    Decoder,
    Encoder,
    Dino,
}

impl Part {
    const ALL: [Self; 6] = [
        Self::Emmdit,
        Self::LargeEmmdit,
        Self::Llama,
        Self::Decoder,
        Self::Encoder,
        Self::Dino,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Emmdit => "emmdit_512",
            Self::LargeEmmdit => "emmdit_1024",
            Self::Llama => "llama",
            Self::Decoder => "dcae_decoder",
            Self::Encoder => "dcae_encoder",
            Self::Dino => "dinov2",
        }
    }
}

/// The models of one precision.
pub(super) struct Models<'a> {
    suite: &'a Suite,
    precision: Precision,
    device: Device,
    emmdit: Option<Emmdit>,
    large_emmdit: Option<Emmdit>,
    llama: Option<Llama>,
    decoder: Option<Decoder>,
    encoder: Option<Encoder>,
    dino: Option<Dinov2>,
    loads: Vec<LoadReport>,
    /// Memory of the program without models, in MiB.
    bare_memory: Option<u64>,
    /// Memory of the models at hand, in MiB.
    held: Vec<(Part, u64)>,
    /// Where packed weights are kept, if models are to run over weights that were.
    kept: Option<TempDir>,
}

impl<'a> Models<'a> {
    /// None yet. `bare_memory` is what the program held before anything was measured: memory that was
    /// freed since may not have gone back to the system yet. With `keep`, models are as a second start
    /// makes them: over packed weights that a first one kept in a file.
    pub(super) fn new(
        suite: &'a Suite,
        precision: Precision,
        bare_memory: Option<u64>,
        keep: bool,
    ) -> Result<Self, BenchError> {
        let folder = keep.then(tempfile::tempdir).transpose();
        let kept = folder.map_err(|source| WeightError::Io {
            path: std::env::temp_dir(),
            source,
        })?;
        Ok(Self {
            suite,
            precision,
            device: Device::flex(),
            emmdit: None,
            large_emmdit: None,
            llama: None,
            decoder: None,
            encoder: None,
            dino: None,
            loads: Vec::new(),
            bare_memory,
            held: Vec::new(),
            kept,
        })
    }

    pub(super) fn suite(&self) -> &'a Suite {
        self.suite
    }

    pub(super) fn precision(&self) -> Precision {
        self.precision
    }

    /// How long the first making of each model took.
    pub(super) fn into_loads(self) -> Vec<LoadReport> {
        self.loads
    }

    /// Drops what `stage` does not need and makes what it does.
    pub(super) fn prepare(
        &mut self,
        stage: Stage,
        observer: Observer<'_>,
    ) -> Result<(), BenchError> {
        let parts = stage.parts();
        let keep = |part| parts.contains(&part);
        for part in Part::ALL {
            if !keep(part) {
                self.drop_part(part);
            }
        }
        self.held.retain(|(part, _)| keep(*part));
        for &part in parts {
            if !self.has(part) {
                tell(observer, &Event::Loading(part.name()))?;
                self.make(part)?;
            }
        }
        Ok(())
    }

    fn has(&self, part: Part) -> bool {
        match part {
            Part::Emmdit => self.emmdit.is_some(),
            Part::LargeEmmdit => self.large_emmdit.is_some(),
            Part::Llama => self.llama.is_some(),
            Part::Decoder => self.decoder.is_some(),
            Part::Encoder => self.encoder.is_some(),
            Part::Dino => self.dino.is_some(),
        }
    }

    fn make(&mut self, part: Part) -> Result<(), BenchError> {
        let first = self.kept_file(part);
        let (load, parameters) = self.build(part, first.as_ref())?;
        let second = match first {
            Some(first) => Some(self.start_again(part, first)?),
            None => None,
        };
        let others: u64 = self.held.iter().map(|(_, mib)| mib).sum();
        let resident_mib = resident_memory()
            .zip(self.bare_memory)
            .map(|(now, bare)| now.saturating_sub(bare + others));
        self.held.push((part, resident_mib.unwrap_or(0)));
        if self.loads.iter().all(|load| load.model != part.name()) {
            self.loads.push(LoadReport {
                model: part.name(),
                precision: self.precision.name(),
                parameters,
                load_ms: load.as_secs_f64() * 1e3,
                second,
                resident_mib,
            });
        }
        Ok(())
    }

    /// Makes a model of weights by formula; how long that took without the formula, and its parameters.
    fn build(
        &mut self,
        part: Part,
        packed: Option<&PackedFile>,
    ) -> Result<(Duration, usize), BenchError> {
        let source = Formula::new();
        // As the pipeline loads them.
        let params = Params::new(&source, &self.device, self.precision);
        let params = params.for_inference().with_packed(packed);
        let begun = Instant::now();
        match part {
            Part::Emmdit => self.emmdit = Some(Emmdit::new(&self.suite.emmdit, &params)?),
            Part::LargeEmmdit => {
                self.large_emmdit = Some(Emmdit::new(&self.suite.large_emmdit, &params)?);
            }
            Part::Llama => self.llama = Some(Llama::new(&self.suite.llama, &params)?),
            Part::Decoder => self.decoder = Some(Decoder::new(&self.suite.dcae, &params)?),
            Part::Encoder => self.encoder = Some(Encoder::new(&self.suite.dcae, &params)?),
            Part::Dino => {
                let grid = self.suite.emmdit.sample_size;
                let model = Dinov2::new(&self.suite.dino, &params)?;
                self.dino = Some(model.resampled([grid; 2]));
            }
        }
        let own = begun.elapsed().saturating_sub(source.time.get());
        Ok((own, source.parameters.get()))
    }

    fn kept_file(&self, part: Part) -> Option<PackedFile> {
        let folder = self.kept.as_ref()?;
        let path = folder.path().join(part.name());
        Some(PackedFile::open(path, self.precision.name()))
    }

    /// Writes what was packed for the model into its file, and makes the model again from there.
    fn start_again(&mut self, part: Part, first: PackedFile) -> Result<SecondStart, BenchError> {
        let begun = Instant::now();
        first.save()?;
        let save = begun.elapsed();
        // The old ones go first: weights are never there twice.
        drop(first);
        self.drop_part(part);
        let begun = Instant::now();
        let second = self.kept_file(part);
        let opened = begun.elapsed();
        let (load, _) = self.build(part, second.as_ref())?;
        Ok(SecondStart {
            save_ms: save.as_secs_f64() * 1e3,
            file_mib: second.map_or(0, |file| file.bytes() >> 20),
            load_ms: (opened + load).as_secs_f64() * 1e3,
        })
    }

    fn drop_part(&mut self, part: Part) {
        match part {
            Part::Emmdit => self.emmdit = None,
            Part::LargeEmmdit => self.large_emmdit = None,
            Part::Llama => self.llama = None,
            Part::Decoder => self.decoder = None,
            Part::Encoder => self.encoder = None,
            Part::Dino => self.dino = None,
        }
    }

    /// What one run of `stage` does. Its models must have been made.
    pub(super) fn work(
        &self,
        stage: Stage,
    ) -> Result<Box<dyn FnMut() -> Result<(), BenchError> + '_>, BenchError> {
        let config = &self.suite.emmdit;
        Ok(match stage {
            Stage::Emmdit { large, batch } => {
                let model = match large {
                    false => made(&self.emmdit),
                    true => made(&self.large_emmdit),
                };
                let config = model.config();
                let side = config.sample_size;
                let latents = self.normal("latents", [batch, config.in_channels, side, side]);
                let shape = [batch, self.suite.text_tokens, config.caption_channels];
                let text = self.normal("text", shape);
                let times = vec![500.0; batch];
                Box::new(move || {
                    let velocity = model.forward(latents.clone(), text.clone(), &times)?;
                    finish(velocity);
                    Ok(())
                })
            }
            Stage::DcaeDecode => {
                let (model, side) = (made(&self.decoder), config.sample_size);
                let latent = self.normal("latents", [1, config.in_channels, side, side]);
                Box::new(move || {
                    finish(model.decode(latent.clone())?);
                    Ok(())
                })
            }
            Stage::DcaeEncode => {
                let (model, side) = (made(&self.encoder), self.suite.pixels());
                let image = self.normal("image", [1, self.suite.dcae.in_channels, side, side]);
                Box::new(move || {
                    finish(model.encode(image.clone())?);
                    Ok(())
                })
            }
            Stage::Llama => {
                let (ids, mask) = self.prompt(1);
                Box::new(move || {
                    finish(made(&self.llama).forward(ids.clone(), mask.clone())?);
                    Ok(())
                })
            }
            Stage::Prompt { steps } => {
                let rows = if Stage::is_guided(steps) { 2 } else { 1 };
                let (ids, mask) = self.prompt(rows);
                Box::new(move || self.prompt_to_picture(ids.clone(), mask.clone(), steps))
            }
            Stage::Precompute => {
                let jpeg = self.photograph()?;
                let (ids, mask) = self.prompt(1);
                Box::new(move || self.precompute(&jpeg, ids.clone(), mask.clone()))
            }
            // Training keeps no model between its steps.
            Stage::Load | Stage::TrainStep => Box::new(|| Ok(())),
        })
    }

    /// A JPEG file larger than the pictures that the models see.
    fn photograph(&self) -> Result<Vec<u8>, BenchError> {
        let (width, height) = (768, 640);
        let values = FormulaWeights::new(SALT).uniform("photograph", 3 * width * height);
        let bytes = values.iter().map(|u| (255.0 * u) as u8).collect();
        image::RgbImage::from_raw(width as u32, height as u32, bytes)
            .ok_or_else(|| "no picture".to_owned())
            .and_then(|picture| encode_jpeg(&picture, 95))
            .map_err(BenchError::Picture)
    }

    /// A picture and its caption to the columns of the official pipeline.
    fn precompute(
        &self,
        jpeg: &[u8],
        ids: Tensor<2, Int>,
        mask: Tensor<2, Bool>,
    ) -> Result<(), BenchError> {
        let picture = decode(jpeg).map_err(BenchError::Picture)?;
        let side = self.suite.pixels();
        let planes = to_planes(&vae_picture(&picture, side as u32), [0.5; 3], [0.5; 3]);
        let planes = TensorData::new(planes, [1, 3, side, side]);
        let planes = Tensor::from_data(planes, &self.device);
        let latents = made(&self.encoder).encode(planes)?;
        let text = made(&self.llama).forward(ids, mask)?;
        let dino = made(&self.dino);
        let side = self.suite.emmdit.sample_size * dino.config().patch_size;
        let small = dino_picture(&picture, DINO_BASE, side as u32);
        let small = to_planes(&small, IMAGENET_MEAN, IMAGENET_STD);
        let small = TensorData::new(small, [1, 3, side, side]);
        let patches = dino
            .forward_features(Tensor::from_data(small, &self.device))?
            .patches;
        for values in [finish(latents), finish(text), finish(patches)] {
            std::hint::black_box(Value::f16s(&values));
        }
        Ok(())
    }

    /// Token ids to a picture, as a pipeline makes it.
    fn prompt_to_picture(
        &self,
        ids: Tensor<2, Int>,
        mask: Tensor<2, Bool>,
        steps: usize,
    ) -> Result<(), BenchError> {
        let [rows, _] = ids.dims();
        let (side, channels) = (self.suite.emmdit.sample_size, self.suite.emmdit.in_channels);
        let text = made(&self.llama).forward(ids, mask)?; // [rows, L, D]
        let denoise = |x: &[f32], timestep: f32| -> Result<Vec<f32>, InputError> {
            let x = TensorData::new(x.to_vec(), [rows, channels, side, side]);
            let x = Tensor::<4>::from_data(x, &self.device);
            let velocity = made(&self.emmdit).forward(x, text.clone(), &vec![timestep; rows])?;
            Ok(finish(velocity))
        };
        let noise = finish(self.normal("latents", [1, channels, side, side]));
        let sampling = |error: String| BenchError::Sampling(error);
        let timetable = FlowMatchEuler::nitro_e()
            .timetable(steps)
            .map_err(|e| sampling(e.to_string()))?;
        let sampler = Euler::new(&timetable);
        let go_on = |_: &nitro_diffusion::sampler::Step<'_>| std::ops::ControlFlow::Continue(());
        let latents = match rows {
            1 => sampler.run(noise, 1, denoise, go_on),
            _ => sampler.run(
                noise,
                1,
                guidance::classifier_free(GUIDANCE, denoise),
                go_on,
            ),
        };
        let latents = latents.map_err(|e| sampling(e.to_string()))?;
        let scale = self.suite.dcae.scaling_factor as f32;
        let latents = latents.into_iter().map(|x| x / scale).collect();
        let latents = TensorData::new::<f32, _>(latents, [1, channels, side, side]);
        let decoded = made(&self.decoder).decode(Tensor::from_data(latents, &self.device))?;
        to_pictures(&decoded.into_data());
        Ok(())
    }

    /// Values of unit variance that follow from `name`.
    fn normal<const D: usize>(&self, name: &str, shape: [usize; D]) -> Tensor<D> {
        let count = shape.iter().product();
        let mut values = FormulaWeights::new(SALT).uniform(name, count);
        let spread = 12_f32.sqrt();
        values.iter_mut().for_each(|u| *u = spread * (*u - 0.5));
        Tensor::from_data(TensorData::new(values, shape), &self.device)
    }

    /// Token ids and mask of `rows` padded prompts, each other ids.
    fn prompt(&self, rows: usize) -> (Tensor<2, Int>, Tensor<2, Bool>) {
        let tokens = self.suite.text_tokens;
        let shape = [rows, tokens];
        let id = |place: usize| (place * 7919 % self.suite.llama.vocab_size) as i32;
        let ids = (1..=rows * tokens).map(id).collect::<Vec<_>>();
        let mask = (0..rows * tokens).map(|place| place % tokens < PROMPT_TOKENS);
        (
            Tensor::from_data(TensorData::new(ids, shape), &self.device),
            Tensor::from_data(
                TensorData::new(mask.collect::<Vec<bool>>(), shape),
                &self.device,
            ),
        )
    }
}

/// A model that [`Models::prepare`] made for the stage in hand.
fn made<T>(model: &Option<T>) -> &T {
    match model {
        Some(model) => model,
        None => unreachable!("`Models::prepare` makes the models that `Stage::parts` names"),
    }
}

/// Waits for a result: its values on the host.
fn finish<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_into_vec().unwrap_or_default()
}

/// Weights by formula, with the time that making them up took: what is left of a model's loading is
/// what it would take with weights at hand.
struct Formula {
    weights: FormulaWeights,
    time: Cell<Duration>,
    parameters: Cell<usize>,
}

impl Formula {
    fn new() -> Self {
        Self {
            weights: FormulaWeights::new(SALT),
            time: Cell::default(),
            parameters: Cell::default(),
        }
    }
}

impl ParameterSource for Formula {
    fn parameter(&self, spec: &ParameterSpec, device: &Device) -> Result<Tensor<1>, WeightError> {
        let begun = Instant::now();
        let tensor = self.weights.parameter(spec, device);
        self.time.set(self.time.get() + begun.elapsed());
        self.parameters.set(self.parameters.get() + spec.numel());
        tensor
    }

    fn contains(&self, name: &str) -> bool {
        self.weights.contains(name)
    }

    fn verify(&self, spec: &ParameterSpec) -> Result<(), WeightError> {
        self.weights.verify(spec)
    }

    fn table(&self, spec: &ParameterSpec) -> Result<Option<StoredTable>, WeightError> {
        self.parameters.set(self.parameters.get() + spec.numel());
        self.weights.table(spec)
    }
}
