//! One request on its way through a pipeline: encode the prompts, denoise, decode.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use burn::tensor::{Int, Tensor, TensorData};
use image::RgbImage;
use nitro_diffusion::guidance;
use nitro_diffusion::sampler::{
    Euler, Inpaint, SampleError, Step, expand_mask, image_to_image_start,
};
use nitro_diffusion::schedule::{FlowMatchEuler, Timetable};
use nitro_models::InputError;

use crate::pipeline::{Pipeline, misfit, values};
use crate::pixels::{Canvas, Original};
use crate::request::{Generated, Output, Request, Seeds, Stage, Timings, Truncation};
use crate::{PipelineError, RequestError};

/// What an observer of a generation hears; it answers whether to go on.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// A stage begins.
    Stage(Stage),
    /// A denoising step has been made.
    Step(StepEvent<'a>),
}

/// A denoising step that has been made.
#[derive(Debug)]
pub struct StepEvent<'a> {
    /// Steps made so far, over all batches of the request.
    pub done: usize,
    /// Steps of the whole request.
    pub total: usize,
    /// First picture of the batch being denoised.
    pub first_picture: usize,
    /// The sampler's view: timestep, noise levels, latents, estimate of the clean latents.
    pub sampler: &'a Step<'a>,
    pipeline: &'a Pipeline,
    canvas: Canvas,
}

impl StepEvent<'_> {
    /// The pictures of this batch as the denoiser now expects them to become. Costs a decoding.
    pub fn preview(&self) -> Result<Vec<RgbImage>, PipelineError> {
        self.pipeline
            .decode_pictures(self.sampler.denoised, self.canvas)
    }
}

impl Pipeline {
    /// The pictures that `request` asks for.
    pub fn generate(&self, request: &Request) -> Result<Output, PipelineError> {
        self.generate_observed(request, &mut |_| ControlFlow::Continue(()))
    }

    /// [`Pipeline::generate`], telling `observer` how it goes. Where the observer answers
    /// `ControlFlow::Break`, the work ends with [`PipelineError::Cancelled`].
    pub fn generate_observed(
        &self,
        request: &Request,
        observer: &mut dyn FnMut(&Event<'_>) -> ControlFlow<()>,
    ) -> Result<Output, PipelineError> {
        let plan = self.plan(request)?;
        let mut run = Run {
            pipeline: self,
            request,
            plan,
            observer,
            done: 0,
        };
        let mut timings = Timings::default();

        let text = run.timed(Stage::Text, &mut timings.text, Run::encode_text)?;
        let start = run.timed(Stage::Encode, &mut timings.encode, Run::start)?;
        let latents = run.timed(Stage::Denoise, &mut timings.denoise, |run| {
            run.denoise(&text, &start)
        })?;
        let mut pictures = run.timed(Stage::Decode, &mut timings.decode, |run| {
            run.decode(&latents)
        })?;
        if let Some(original) = &start.original {
            pictures
                .iter_mut()
                .for_each(|picture| original.put_back(picture));
        }
        let images = pictures
            .into_iter()
            .enumerate()
            .map(|(i, image)| Generated {
                image,
                prompt: i / request.images_per_prompt,
                seed: request
                    .latents
                    .is_none()
                    .then(|| request.seed_of(i))
                    .flatten(),
            });
        Ok(Output {
            images: images.collect(),
            latents,
            steps: run.plan.timetable.len(),
            guidance_scale: run.plan.guidance,
            truncations: text.truncations,
            timings,
        })
    }

    fn plan(&self, request: &Request) -> Result<Plan, PipelineError> {
        request.check()?;
        let canvas = self.canvas(request)?;
        let steps = request.steps.unwrap_or(self.variant.steps);
        let mut timetable = FlowMatchEuler::nitro_e().timetable(steps)?;
        if let Some(init) = &request.init {
            timetable = timetable.for_strength(init.strength)?;
        }
        let expected = request.pictures() * canvas.latent_len();
        if let Some(latents) = &request.latents
            && latents.len() != expected
        {
            return Err(RequestError::Latents {
                found: latents.len(),
                expected,
                images: request.pictures(),
            }
            .into());
        }
        let guidance = request.guidance_scale.unwrap_or(self.variant.guidance);
        Ok(Plan {
            canvas,
            timetable,
            guidance,
        })
    }

    /// The size of a request's pictures, if this model can make them.
    fn canvas(&self, request: &Request) -> Result<Canvas, RequestError> {
        let side = self.variant.resolution;
        let width = request.width.or(request.height).unwrap_or(side);
        let height = request.height.unwrap_or(width);
        let refuse = |reason: String| {
            Err(RequestError::Size {
                width,
                height,
                reason,
            })
        };
        if width != height {
            // The official code derives both sides of the compressed grid from the height.
            return refuse(
                "Nitro-E makes square pictures only; give one side, or equal ones".into(),
            );
        }
        let factor = self.autoencoder.spatial_factor();
        let fits = |side: usize| -> Result<(), String> {
            let config = self.transformer.config();
            let compression = if config.token_compression { 4 } else { 1 };
            let unit = config.patch_size * compression;
            if side == 0 || !side.is_multiple_of(factor * unit) {
                return Err(format!(
                    "each side must be a multiple of {} (the autoencoder's {factor} x the \
                     transformer's {unit})",
                    factor * unit
                ));
            }
            config.check_input(side / factor, side / factor, self.tokenizer.text_tokens())
        };
        if let Err(reason) = fits(width) {
            let possible = (1..=4096 / factor)
                .map(|n| n * factor)
                .filter(|side| fits(*side).is_ok());
            return refuse(match possible.min_by_key(|side| side.abs_diff(width)) {
                Some(nearest) => format!("{reason}; the nearest possible size is {nearest}"),
                None => reason,
            });
        }
        let channels = self.autoencoder.latent_channels;
        Ok(Canvas {
            side: width,
            channels,
            latent: width / factor,
        })
    }
}

/// What a request comes down to on this model.
struct Plan {
    canvas: Canvas,
    timetable: Timetable,
    guidance: f64,
}

/// One request being worked on.
struct Run<'a> {
    pipeline: &'a Pipeline,
    request: &'a Request,
    plan: Plan,
    observer: &'a mut dyn FnMut(&Event<'_>) -> ControlFlow<()>,
    done: usize,
}

/// Features of each picture's prompt and negative prompt, as rows of one tensor.
struct Conditions {
    features: Tensor<3>,
    /// Row of each prompt.
    prompts: Vec<usize>,
    /// Row of each prompt's negative prompt; empty without guidance.
    negatives: Vec<usize>,
    truncations: Vec<Truncation>,
}

/// Where denoising starts.
struct Start {
    latents: Vec<f32>,
    inpaint: Option<Painting>,
    original: Option<Original>,
}

/// What inpainting keeps: clean latents and the mask, for one picture.
struct Painting {
    image: Vec<f32>,
    noise: Vec<f32>,
    mask: Vec<f32>,
}

impl Run<'_> {
    fn total(&self) -> usize {
        self.plan.timetable.len() * self.request.pictures().div_ceil(self.request.batch)
    }

    fn timed<T>(
        &mut self,
        stage: Stage,
        time: &mut Duration,
        work: impl FnOnce(&mut Self) -> Result<T, PipelineError>,
    ) -> Result<T, PipelineError> {
        if (self.observer)(&Event::Stage(stage)).is_break() {
            return Err(PipelineError::Cancelled {
                done: self.done,
                total: self.total(),
            });
        }
        let began = Instant::now();
        let result = work(self);
        *time = began.elapsed();
        result
    }

    /// Every distinct text is encoded once.
    fn encode_text(&mut self) -> Result<Conditions, PipelineError> {
        let request = self.request;
        let mut texts: Vec<&str> = Vec::new();
        let mut row = |text| match texts.iter().position(|t| *t == text) {
            Some(row) => row,
            None => {
                texts.push(text);
                texts.len() - 1
            }
        };
        let prompts: Vec<usize> = request.prompts.iter().map(|p| row(p.as_str())).collect();
        let negatives: Vec<usize> = match guidance::is_active(self.plan.guidance as f32) {
            true => (0..prompts.len())
                .map(|i| row(request.negative_of(i)))
                .collect(),
            false => Vec::new(),
        };
        let encoded = self.pipeline.encode_texts(&texts, request.clean_captions)?;
        if let Some(i) = prompts
            .iter()
            .position(|row| encoded.texts[*row].is_empty())
        {
            let cleaned = " after caption cleaning";
            return Err(RequestError::EmptyPrompt {
                number: i + 1,
                cleaned,
            }
            .into());
        }
        let truncations = [(&prompts, false), (&negatives, true)]
            .into_iter()
            .flat_map(|(rows, negative)| {
                rows.iter()
                    .enumerate()
                    .map(move |(prompt, row)| (prompt, row, negative))
            })
            .filter_map(|(prompt, row, negative)| {
                let tokens = &encoded.tokens[*row];
                let dropped = tokens.cut.clone()?;
                Some(Truncation {
                    prompt,
                    negative,
                    tokens: tokens.length,
                    dropped,
                })
            })
            .collect();
        Ok(Conditions {
            features: encoded.features,
            prompts,
            negatives,
            truncations,
        })
    }

    /// Noise, and the initial image if there is one.
    fn start(&mut self) -> Result<Start, PipelineError> {
        let Canvas {
            side,
            channels,
            latent,
        } = self.plan.canvas;
        let pictures = self.request.pictures();
        let each = self.plan.canvas.latent_len();
        let noise = match (&self.request.latents, &self.request.seeds) {
            (Some(latents), _) => latents.clone(),
            (None, Seeds::Shared(seed)) => self.request.noise.shared(*seed, pictures * each),
            (None, _) => {
                let seeds: Vec<u64> = (0..pictures)
                    .filter_map(|i| self.request.seed_of(i))
                    .collect();
                self.request.noise.per_sample(&seeds, each)
            }
        };
        let Some(init) = &self.request.init else {
            return Ok(Start {
                latents: noise,
                inpaint: None,
                original: None,
            });
        };
        let original = Original::fit(init, side);
        let encoder = self.pipeline.encoder()?;
        let encoded = encoder
            .encode(original.tensor(&self.pipeline.device))
            .map_err(misfit)?;
        let scale = self.pipeline.autoencoder.scaling_factor as f32;
        let image: Vec<f32> = values(encoded).into_iter().map(|x| x * scale).collect();
        let latents = image_to_image_start(&image.repeat(pictures), &noise, &self.plan.timetable)?;
        let inpaint = original.latent_mask(latent).map(|mask| Painting {
            image,
            noise,
            mask: expand_mask(&mask, channels, 1),
        });
        Ok(Start {
            latents,
            inpaint,
            original: Some(original),
        })
    }

    fn denoise(&mut self, text: &Conditions, start: &Start) -> Result<Vec<f32>, PipelineError> {
        let each = self.plan.canvas.latent_len();
        let mut finished = Vec::with_capacity(start.latents.len());
        for (i, latents) in start.latents.chunks(self.request.batch * each).enumerate() {
            let first = i * self.request.batch;
            finished.extend(self.denoise_batch(first, latents, text, start)?);
        }
        match finished.iter().all(|x| x.is_finite()) {
            true => Ok(finished),
            false => Err(PipelineError::NotFinite {
                file: self.pipeline.sources.transformer.name(),
            }),
        }
    }

    fn denoise_batch(
        &mut self,
        first: usize,
        latents: &[f32],
        text: &Conditions,
        start: &Start,
    ) -> Result<Vec<f32>, PipelineError> {
        let Canvas {
            channels, latent, ..
        } = self.plan.canvas;
        let pipeline = self.pipeline;
        let batch = latents.len() / self.plan.canvas.latent_len();
        let prompt_of = |i: usize| (first + i) / self.request.images_per_prompt;
        // Unconditional rows first, as the official pipeline orders them.
        let rows = [&text.negatives, &text.prompts]
            .into_iter()
            .filter(|rows| !rows.is_empty())
            .flat_map(|rows| (0..batch).map(|i| rows[prompt_of(i)] as i32))
            .collect::<Vec<_>>();
        let count = rows.len();
        let rows = Tensor::<1, Int>::from_data(TensorData::new(rows, [count]), &pipeline.device);
        let features = text.features.clone().select(0, rows); // [B or 2B, L, D]

        let mut velocity = |x: &[f32], timestep: f32| -> Result<Vec<f32>, InputError> {
            let shape = [count, channels, latent, latent];
            let x = Tensor::from_data(TensorData::new(x.to_vec(), shape), &pipeline.device);
            let v = pipeline
                .transformer
                .forward(x, features.clone(), &vec![timestep; count])?;
            // A model that also predicts variances has them in further channels.
            Ok(values(v.slice_dim(1, 0..channels)))
        };
        let mut sampler = Euler::new(&self.plan.timetable);
        let painting = start.inpaint.as_ref().map(|p| {
            let from = first * self.plan.canvas.latent_len();
            let noise = &p.noise[from..from + latents.len()];
            (p.image.repeat(batch), noise, p.mask.repeat(batch))
        });
        if let Some((image, noise, mask)) = &painting {
            sampler = sampler.inpaint(Inpaint { image, noise, mask });
        }

        let total = self.total();
        let canvas = self.plan.canvas;
        let (observer, done) = (&mut self.observer, &mut self.done);
        let on_step = |sampler: &Step<'_>| {
            *done += 1;
            let event = StepEvent {
                done: *done,
                total,
                first_picture: first,
                sampler,
                pipeline,
                canvas,
            };
            observer(&Event::Step(event))
        };
        let result = match text.negatives.is_empty() {
            true => sampler.run(latents.to_vec(), batch, &mut velocity, on_step),
            false => {
                let guided = guidance::classifier_free(self.plan.guidance as f32, &mut velocity);
                sampler.run(latents.to_vec(), batch, guided, on_step)
            }
        };
        result.map_err(|error| match error {
            SampleError::Cancelled { .. } => PipelineError::Cancelled {
                done: self.done,
                total,
            },
            SampleError::Denoiser { source, .. } => misfit(source),
            SampleError::Invalid(error) => error.into(),
        })
    }

    fn decode(&mut self, latents: &[f32]) -> Result<Vec<RgbImage>, PipelineError> {
        self.pipeline.decode_pictures(latents, self.plan.canvas)
    }
}
