//! Pictures on their way, denoised step by step in batches that they join and leave.
//!
//! [`Pipeline::generate`] and servers go the same way: [`Pipeline::prepare`] turns a request into one
//! [`Sample`] per picture, [`Pipeline::step`] moves any samples of one size a step forward together,
//! each with its own prompt, guidance and schedule, and [`Pipeline::pictures`] decodes what is
//! finished. A sample's picture does not depend on which others it was stepped with.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use burn::tensor::{Tensor, TensorData};
use image::RgbImage;
use nitro_diffusion::guidance;
use nitro_diffusion::sampler::{Kept, Trajectory, expand_mask, image_to_image_start};
use nitro_diffusion::schedule::{FlowMatchEuler, Timetable};
use nitro_kernels::pool;
use nitro_ops::can_pack;

use crate::picture::Parameters;
use crate::pipeline::{Pipeline, misfit, values};
use crate::pixels::{Canvas, Original};
use crate::request::{Request, Seeds, Timings, Truncation};
use crate::text::EncodedText;
use crate::{PipelineError, RequestError};

/// What a request comes down to on a model.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Steps that will be run: fewer than asked for when an initial image is kept in part.
    pub steps: usize,
    /// Guidance scale.
    pub guidance: f64,
    pub(crate) canvas: Canvas,
    pub(crate) timetable: Timetable,
}

impl Plan {
    /// Side of the pictures in pixels.
    pub fn side(&self) -> usize {
        self.canvas.side
    }

    /// How often the denoiser looks at one picture: once per step, twice under guidance.
    pub fn evaluations(&self) -> usize {
        match guidance::is_active(self.guidance as f32) {
            true => 2 * self.steps,
            false => self.steps,
        }
    }
}

/// One picture being denoised.
#[derive(Clone, Debug)]
pub struct Sample {
    trajectory: Trajectory,
    guidance: f32,
    prompt: Arc<EncodedText>,
    /// Absent without guidance.
    negative: Option<Arc<EncodedText>>,
    canvas: Canvas,
    original: Option<Arc<Original>>,
}

impl Sample {
    /// Steps made.
    pub fn completed(&self) -> usize {
        self.trajectory.completed()
    }

    /// Steps of the whole run.
    pub fn steps(&self) -> usize {
        self.trajectory.total()
    }

    /// Whether all steps are made.
    pub fn is_done(&self) -> bool {
        self.trajectory.timestep().is_none()
    }

    /// Side of the picture in pixels; samples of one batch must agree in it.
    pub fn side(&self) -> usize {
        self.canvas.side
    }

    /// Whether the denoiser runs twice per step.
    pub fn is_guided(&self) -> bool {
        self.negative.is_some()
    }

    /// The sampler's view.
    pub fn trajectory(&self) -> &Trajectory {
        &self.trajectory
    }
}

/// A request's pictures, ready to be denoised.
#[derive(Debug)]
pub struct Prepared {
    /// One per picture, prompt by prompt.
    pub samples: Vec<Sample>,
    /// Prompts that did not fit.
    pub truncations: Vec<Truncation>,
    /// Time spent on texts and on the initial image; nothing is denoised yet.
    pub timings: Timings,
}

/// Texts of a request's prompts.
pub(crate) struct Conditions {
    /// One per prompt.
    prompts: Vec<Arc<EncodedText>>,
    /// One per prompt; empty without guidance.
    negatives: Vec<Arc<EncodedText>>,
    pub(crate) truncations: Vec<Truncation>,
}

/// Which latents of a sample are decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum View {
    Latents,
    Denoised,
}

impl Pipeline {
    /// Checks `request` against this model, computing nothing.
    pub fn plan(&self, request: &Request) -> Result<Plan, PipelineError> {
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
        Ok(Plan {
            steps: timetable.len(),
            guidance: request.guidance_scale.unwrap_or(self.variant.guidance),
            canvas,
            timetable,
        })
    }

    /// What a picture of prompt number `prompt` tells about how it was made.
    pub fn parameters(
        &self,
        request: &Request,
        plan: &Plan,
        prompt: usize,
        seed: u64,
    ) -> Parameters {
        let side = plan.side() as u32;
        Parameters {
            prompt: request.prompts.get(prompt).cloned().unwrap_or_default(),
            negative_prompt: request.negative_of(prompt).to_owned(),
            steps: plan.steps,
            guidance_scale: plan.guidance,
            seed,
            width: side,
            height: side,
            model: format!("{} {}", self.name, self.variant.name),
            rng: request.noise.name().to_owned(),
        }
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

    /// One [`Sample`] per picture of `request`.
    pub fn prepare(&self, request: &Request) -> Result<Prepared, PipelineError> {
        let plan = self.plan(request)?;
        let mut timings = Timings::default();
        let text = timed(&mut timings.text, || self.conditions(request, &plan))?;
        let samples = timed(&mut timings.encode, || self.samples(request, &plan, &text))?;
        Ok(Prepared {
            samples,
            truncations: text.truncations,
            timings,
        })
    }

    /// Encodes the prompts of a request.
    pub(crate) fn conditions(
        &self,
        request: &Request,
        plan: &Plan,
    ) -> Result<Conditions, PipelineError> {
        let mut texts: Vec<&str> = request.prompts.iter().map(String::as_str).collect();
        let count = texts.len();
        if guidance::is_active(plan.guidance as f32) {
            texts.extend((0..count).map(|i| request.negative_of(i)));
        }
        let mut prompts = self.encode(&texts, request.clean_captions)?;
        let negatives = prompts.split_off(count);
        if let Some(i) = prompts.iter().position(|prompt| prompt.text.is_empty()) {
            let cleaned = " after caption cleaning";
            return Err(RequestError::EmptyPrompt {
                number: i + 1,
                cleaned,
            }
            .into());
        }
        let truncations = [(&prompts, false), (&negatives, true)]
            .into_iter()
            .flat_map(|(texts, negative)| texts.iter().enumerate().map(move |t| (t, negative)))
            .filter_map(|((prompt, text), negative)| {
                Some(Truncation {
                    prompt,
                    negative,
                    tokens: text.tokens.length,
                    dropped: text.tokens.cut.clone()?,
                })
            })
            .collect();
        Ok(Conditions {
            prompts,
            negatives,
            truncations,
        })
    }

    /// Where each picture starts: noise, on top of the initial image if there is one.
    pub(crate) fn samples(
        &self,
        request: &Request,
        plan: &Plan,
        text: &Conditions,
    ) -> Result<Vec<Sample>, PipelineError> {
        let canvas = plan.canvas;
        let each = canvas.latent_len();
        let pictures = request.pictures();
        let noise = match (&request.latents, &request.seeds) {
            (Some(latents), _) => latents.clone(),
            (None, Seeds::Shared(seed)) => request.noise.shared(*seed, pictures * each),
            (None, _) => {
                let seeds: Vec<u64> = (0..pictures).filter_map(|i| request.seed_of(i)).collect();
                request.noise.per_sample(&seeds, each)
            }
        };
        let original = request
            .init
            .as_ref()
            .map(|init| Arc::new(Original::fit(init, canvas.side)));
        let encoded = match &original {
            Some(original) => {
                let encoded = self.encoder()?.encode(original.tensor(&self.device));
                let scale = self.autoencoder.scaling_factor as f32;
                let encoded = values(encoded.map_err(misfit)?);
                Some(encoded.into_iter().map(|x| x * scale).collect::<Vec<_>>())
            }
            None => None,
        };
        let mask = original.as_ref().and_then(|o| o.latent_mask(canvas.latent));
        let mask = mask.map(|mask| expand_mask(&mask, canvas.channels, 1));
        noise
            .chunks_exact(each)
            .enumerate()
            .map(|(i, noise)| {
                let latents = match &encoded {
                    Some(image) => image_to_image_start(image, noise, &plan.timetable)?,
                    None => noise.to_vec(),
                };
                let kept = encoded.clone().zip(mask.clone()).map(|(image, mask)| Kept {
                    image,
                    noise: noise.to_vec(),
                    mask,
                });
                let prompt = i / request.images_per_prompt;
                Ok(Sample {
                    trajectory: Trajectory::new(plan.timetable.clone(), latents, kept)?,
                    guidance: plan.guidance as f32,
                    prompt: text.prompts[prompt].clone(),
                    negative: text.negatives.get(prompt).cloned(),
                    canvas,
                    original: original.clone(),
                })
            })
            .collect()
    }

    /// Moves every sample that is not finished one step forward, together.
    /// All must be of one size. After an error no sample has moved.
    pub fn step(&self, samples: &mut [&mut Sample]) -> Result<(), PipelineError> {
        let mut samples: Vec<&mut Sample> = samples
            .iter_mut()
            .map(|sample| &mut **sample)
            .filter(|sample| !sample.is_done())
            .collect();
        let Some(canvas) = samples.first().map(|sample| sample.canvas) else {
            return Ok(());
        };
        if let Some(other) = samples.iter().find(|sample| sample.canvas != canvas) {
            return Err(PipelineError::Mismatch {
                reason: format!(
                    "pictures of {} and {} pixels were put into one batch",
                    canvas.side, other.canvas.side
                ),
            });
        }
        let standing: Vec<&Sample> = samples.iter().map(|sample| &**sample).collect();
        let velocities = self.velocities(&standing, canvas)?;
        for (sample, velocity) in samples.iter_mut().zip(velocities) {
            sample.trajectory.advance(&velocity)?;
        }
        Ok(())
    }

    /// The velocity of each sample where it stands, guided.
    ///
    /// On the CPU, where there are as many samples as threads, each sample is a pass of its own on one
    /// thread: nobody waits for anybody between layers, and a pass's activations stay in its core's
    /// cache. Fewer samples share all threads in one pass.
    fn velocities(
        &self,
        samples: &[&Sample],
        canvas: Canvas,
    ) -> Result<Vec<Vec<f32>>, PipelineError> {
        if samples.len() < pool::num_threads() || !can_pack(&self.device) {
            return self.pass(samples, canvas);
        }
        let results: Vec<OnceLock<_>> = samples.iter().map(|_| OnceLock::new()).collect();
        pool::par_for(samples.len(), |i| {
            let _ = results[i].set(self.pass(&samples[i..=i], canvas));
        });
        let mut velocities = Vec::with_capacity(samples.len());
        for result in results {
            // Every task ran, or the call above did not come back.
            if let Some(result) = result.into_inner() {
                velocities.extend(result?);
            }
        }
        Ok(velocities)
    }

    /// [`Self::velocities`] in one pass of the denoiser.
    fn pass(&self, samples: &[&Sample], canvas: Canvas) -> Result<Vec<Vec<f32>>, PipelineError> {
        // Unconditional rows first, as the official pipeline orders them.
        let unconditional = samples
            .iter()
            .filter_map(|sample| Some((*sample, sample.negative.as_ref()?)));
        let conditional = samples.iter().map(|sample| (*sample, &sample.prompt));
        let rows: Vec<(&Sample, &Arc<EncodedText>)> = unconditional.chain(conditional).collect();
        let count = rows.len();
        let times: Vec<f32> = rows
            .iter()
            .filter_map(|(sample, _)| sample.trajectory.timestep())
            .collect();
        let latents = rows
            .iter()
            .flat_map(|(sample, _)| sample.trajectory.latents().iter().copied())
            .collect::<Vec<f32>>();
        let shape = [count, canvas.channels, canvas.latent, canvas.latent];
        let latents = Tensor::from_data(TensorData::new(latents, shape), &self.device);
        let features = rows.iter().map(|(_, text)| text.features.clone()).collect();
        let features = Tensor::cat(features, 0); // [rows, L, D]
        let velocity = self
            .transformer
            .forward(latents, features, &times)
            .map_err(misfit)?;
        // A model that also predicts variances has them in further channels.
        let velocity = values(velocity.slice_dim(1, 0..canvas.channels));

        let each = canvas.latent_len();
        let (unconditional, conditional) = velocity.split_at((count - samples.len()) * each);
        let mut unconditional = unconditional.chunks_exact(each);
        let guided = samples.iter().zip(conditional.chunks_exact(each));
        guided
            .map(|(sample, conditional)| match sample.is_guided() {
                true => {
                    let unconditional = unconditional.next().unwrap_or_default();
                    guidance::combine(unconditional, conditional, sample.guidance)
                }
                false => Ok(conditional.to_vec()),
            })
            .collect::<Result<_, _>>()
            .map_err(PipelineError::from)
    }

    /// The finished pictures of samples, in order.
    pub fn pictures(&self, samples: &[&Sample]) -> Result<Vec<RgbImage>, PipelineError> {
        let finite = |sample: &&Sample| sample.trajectory.latents().iter().all(|x| x.is_finite());
        if !samples.iter().all(finite) {
            return Err(PipelineError::NotFinite {
                file: self.sources.transformer.name(),
            });
        }
        self.view(samples, View::Latents)
    }

    /// What samples are now expected to become.
    pub fn previews(&self, samples: &[&Sample]) -> Result<Vec<RgbImage>, PipelineError> {
        self.view(samples, View::Denoised)
    }

    fn view(&self, samples: &[&Sample], view: View) -> Result<Vec<RgbImage>, PipelineError> {
        let mut pictures = Vec::with_capacity(samples.len());
        for same in samples.chunk_by(|a, b| a.canvas == b.canvas) {
            let latents: Vec<f32> = same
                .iter()
                .flat_map(|sample| match view {
                    View::Latents => sample.trajectory.latents(),
                    View::Denoised => sample.trajectory.denoised(),
                })
                .copied()
                .collect();
            pictures.extend(self.decode_pictures(&latents, same[0].canvas)?);
        }
        for (picture, sample) in pictures.iter_mut().zip(samples) {
            if let Some(original) = &sample.original {
                original.put_back(picture);
            }
        }
        Ok(pictures)
    }
}

/// The result of `work`, its duration in `time`.
pub(crate) fn timed<T>(
    time: &mut Duration,
    work: impl FnOnce() -> Result<T, PipelineError>,
) -> Result<T, PipelineError> {
    let began = Instant::now();
    let result = work();
    *time = began.elapsed();
    result
}
