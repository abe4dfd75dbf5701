//! From a model's files to a pipeline.

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use burn::tensor::Device;
use nitro_models::dcae::{DcaeConfig, Decoder, Encoder};
use nitro_models::emmdit::{Emmdit, EmmditConfig};
use nitro_models::llama::{Llama, LlamaConfig};
use nitro_models::{
    LoraAdapter, Merged, PackedFile, ParameterSource, Params, TensorMap, WeightFiles,
};
use nitro_ops::Precision;
use serde::de::DeserializeOwned;

use crate::PipelineError;
use crate::card::{ModelCard, Variant};
use crate::files::{ModelFile, ModelFiles, ModelLocation};
use crate::hub::HubOptions;
use crate::packed_cache::PackedCache;
use crate::part::Part;
use crate::pipeline::{Pipeline, Sources};
use crate::prompt_cache::{self, PromptCache};
use crate::tokenizer::TextTokenizer;

/// Metadata key under which our own transformer files carry their [`EmmditConfig`] as JSON.
pub const CONFIG_KEY: &str = "nitro.config";

/// Chooses how a model is loaded.
pub struct PipelineBuilder {
    location: ModelLocation,
    variant: Option<String>,
    resolution: Option<usize>,
    precision: Precision,
    device: Device,
    loras: Vec<(PathBuf, f64)>,
    hub: HubOptions,
    tile: Option<usize>,
    prompt_cache: usize,
    packed_cache: PackedCache,
    on_demand: bool,
    on_part: Box<dyn Fn(&str)>,
}

impl std::fmt::Debug for PipelineBuilder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PipelineBuilder")
            .field("location", &self.location)
            .field("variant", &self.variant)
            .field("resolution", &self.resolution)
            .finish_non_exhaustive()
    }
}

impl PipelineBuilder {
    pub(crate) fn new(location: ModelLocation) -> Self {
        Self {
            location,
            variant: None,
            resolution: None,
            precision: Precision::F32,
            device: Device::default(),
            loras: Vec::new(),
            hub: HubOptions::from_env(),
            tile: None,
            prompt_cache: prompt_cache::MEMORY,
            packed_cache: PackedCache::from_env(),
            on_demand: false,
            on_part: Box::new(|_| {}),
        }
    }

    /// The variant, such as `base`, `grpo` or `dist`; the model's first one by default.
    pub fn variant(mut self, name: impl Into<String>) -> Self {
        self.variant = Some(name.into());
        self
    }

    /// Side in pixels the pictures will have; chooses between variants of several resolutions.
    pub fn resolution(mut self, side: usize) -> Self {
        self.resolution = Some(side);
        self
    }

    /// How products are computed; `f32` by default.
    pub fn precision(mut self, precision: Precision) -> Self {
        self.precision = precision;
        self
    }

    /// The device the model runs on; the CPU by default.
    pub fn device(mut self, device: Device) -> Self {
        self.device = device;
        self
    }

    /// Merges a PEFT adapter folder into the transformer, on top of what the variant brings.
    pub fn lora(mut self, folder: impl Into<PathBuf>, scale: f64) -> Self {
        self.loras.push((folder.into(), scale));
        self
    }

    /// How the Hub is spoken to; by default as the environment says.
    pub fn hub(mut self, options: HubOptions) -> Self {
        self.hub = options;
        self
    }

    /// How many rows of a picture the image decoder works on at a time; by default as many as run
    /// fastest. Fewer take less memory; the picture is the same to the last bit.
    pub fn tile(mut self, rows: usize) -> Self {
        self.tile = Some(rows);
        self
    }

    /// Most bytes of text features that stay in memory, so that a text that comes again is not encoded
    /// again; 64 MiB by default, 0 for none.
    pub fn prompt_cache(mut self, bytes: usize) -> Self {
        self.prompt_cache = bytes;
        self
    }

    /// Where packed weights of large models are kept, so that the next start need not pack them; by
    /// default as the environment says.
    pub fn packed_cache(mut self, cache: PackedCache) -> Self {
        self.packed_cache = cache;
        self
    }

    /// Keeps parts of a large model in memory only while they are needed: the text encoder goes when the
    /// texts are encoded, and the image decoder comes with the first latents. For a single request: of
    /// several, each would load the text encoder again for texts whose features are not known.
    pub fn on_demand(mut self, on_demand: bool) -> Self {
        self.on_demand = on_demand;
        self
    }

    /// Hears which part is being loaded.
    pub fn on_part(mut self, hear: impl Fn(&str) + 'static) -> Self {
        self.on_part = Box::new(hear);
        self
    }

    /// The transformer's configuration and parameters, with the adapters merged in, on the builder's
    /// device: what training on from a model, or adapting it, starts with.
    pub fn read_transformer(&self) -> Result<(EmmditConfig, TensorMap), PipelineError> {
        let files = ModelFiles::open(self.location.clone(), self.hub.clone())?;
        let variant = files
            .card()
            .variant(self.variant.as_deref(), self.resolution)?
            .clone();
        let autoencoder = autoencoder_config(&files)?;
        let weights = open_weights(&files.file(&variant.transformer)?)?;
        let config = transformer_config(&weights, &variant, &autoencoder)?;
        let adapters = adapters(&files, &variant, &self.loras)?;
        let merged = Merged::new(
            &weights,
            adapters.iter().map(|(adapter, scale)| (adapter, *scale)),
        )?;
        let parameters =
            TensorMap::collect(&merged, &self.device, |p| Emmdit::new(&config, p).map(drop))?;
        weights.finish(&["projectors."])?;
        Ok((config, parameters))
    }

    /// Finds, downloads if need be, checks and loads all parts.
    pub fn load(self) -> Result<Pipeline, PipelineError> {
        // One variant is asked for, so one comes.
        let mut loaded = self.load_with(&[])?;
        Ok(loaded.swap_remove(0))
    }

    /// Loads the chosen variant and further ones of the same model, which share text encoder and
    /// autoencoder with it.
    pub fn load_with(self, further: &[String]) -> Result<Vec<Pipeline>, PipelineError> {
        let began = Instant::now();
        let files = ModelFiles::open(self.location.clone(), self.hub.clone())?;
        let card = files.card();
        let mut variants = vec![card.variant(self.variant.as_deref(), self.resolution)?];
        for name in further {
            variants.push(card.variant(Some(name), self.resolution)?);
        }
        let (device, precision, packed) = (&self.device, self.precision, &self.packed_cache);

        // The transformer comes first: it is the part a user chooses, and errors in it are likeliest.
        (self.on_part)("transformer");
        let autoencoder = autoencoder_config(&files)?;
        let transformers = variants
            .iter()
            .map(|variant| self.transformer(&files, variant, &autoencoder))
            .collect::<Result<Vec<_>, _>>()?;

        (self.on_part)("text encoder");
        let (text_config, text_file) = text_encoder_files(&files)?;
        let tokenizer = Arc::new(TextTokenizer::load(
            &files.part_file(&card.text_encoder, "tokenizer.json")?,
            &files.part_file(&card.text_encoder, "tokenizer_config.json")?,
            card.text_tokens,
            text_config.vocab_size,
        )?);
        for transformer in &transformers {
            check_fit(card, transformer.config(), &text_config, &autoencoder)?;
        }
        let prompt_cache = Arc::new(PromptCache::new(&text_file, precision, self.prompt_cache));
        let text_encoder = Arc::new(Part::new());
        // A large encoder may not be needed at all: its features of a text are kept on disk.
        if !prompt_cache.is_on_disk() {
            text_encoder
                .get(|| load_text_encoder(&text_file, &text_config, device, precision, packed))?;
        }

        (self.on_part)("image decoder");
        let autoencoder_file = files.part_file(&card.dc_ae, AUTOENCODER_WEIGHTS)?;
        let decoder = Arc::new(Part::new());
        let on_demand = self.on_demand && prompt_cache.is_on_disk();
        if on_demand {
            // A damaged file is told of at once in any case.
            open_weights(&autoencoder_file)?;
        } else {
            decoder.get(|| {
                load_decoder(
                    &autoencoder_file,
                    &autoencoder,
                    device,
                    precision,
                    self.tile,
                    packed,
                )
            })?;
        }
        let encoder = Arc::new(OnceLock::new());
        let load_time = began.elapsed();

        let pipelines = variants.into_iter().zip(transformers);
        pipelines
            .map(|(variant, transformer)| {
                Ok(Pipeline {
                    sources: Sources {
                        transformer: files.file(&variant.transformer)?,
                        text_encoder: text_file.clone(),
                        autoencoder: autoencoder_file.clone(),
                        adapters: self.adapter_files(&files, variant)?,
                    },
                    name: card.name.clone(),
                    variant: variant.clone(),
                    tokenizer: tokenizer.clone(),
                    text_encoder: text_encoder.clone(),
                    text_config: text_config.clone(),
                    prompt_cache: prompt_cache.clone(),
                    transformer,
                    autoencoder: autoencoder.clone(),
                    decoder: decoder.clone(),
                    encoder: encoder.clone(),
                    on_demand,
                    tile: self.tile,
                    device: self.device.clone(),
                    precision,
                    packed_cache: self.packed_cache.clone(),
                    load_time,
                })
            })
            .collect()
    }

    /// The transformer of a variant, with all adapters merged.
    fn transformer(
        &self,
        files: &ModelFiles,
        variant: &Variant,
        autoencoder: &DcaeConfig,
    ) -> Result<Emmdit, PipelineError> {
        let file = files.file(&variant.transformer)?;
        let weights = open_weights(&file)?;
        let config = transformer_config(&weights, variant, autoencoder)?;
        let adapters = adapters(files, variant, &self.loras)?;
        let merged = Merged::new(
            &weights,
            adapters.iter().map(|(adapter, scale)| (adapter, *scale)),
        )?;
        let cache = match self.loras.is_empty() {
            true => self.packed_cache.clone(),
            // Each adapter and scale that a user tries would leave a file behind.
            false => PackedCache::off(),
        };
        let own = self.adapter_files(files, variant)?;
        let mut parts = vec![(&file, 1.0)];
        parts.extend(own.iter().map(|(file, scale)| (file, *scale)));
        let transformer = cache.around("transformer", self.precision, &parts, |packed| {
            let params = inference(&merged, &self.device, self.precision, packed);
            Ok(Emmdit::new(&config, &params)?)
        })?;
        // Projectors serve training only.
        weights.finish(&["projectors."])?;
        Ok(transformer)
    }

    /// Weight files of the adapters merged into a variant, with their scales.
    fn adapter_files(
        &self,
        files: &ModelFiles,
        variant: &Variant,
    ) -> Result<Vec<(ModelFile, f64)>, PipelineError> {
        let mut adapters = Vec::new();
        if let Some(folder) = &variant.lora {
            adapters.push((files.part_file(folder, ADAPTER_WEIGHTS)?, 1.0));
        }
        let own = self.loras.iter();
        adapters.extend(
            own.map(|(folder, scale)| (ModelFile::Disk(folder.join(ADAPTER_WEIGHTS)), *scale)),
        );
        Ok(adapters)
    }
}

/// File name of an autoencoder's weights in the diffusers layout.
const AUTOENCODER_WEIGHTS: &str = "diffusion_pytorch_model.safetensors";

/// File name of an adapter's weights in a PEFT folder.
const ADAPTER_WEIGHTS: &str = "adapter_model.safetensors";

/// Maps a weight file.
pub(crate) fn open_weights(file: &ModelFile) -> Result<WeightFiles, PipelineError> {
    Ok(match file {
        ModelFile::Disk(path) => WeightFiles::open(path)?,
        ModelFile::Embedded { name, bytes } => WeightFiles::from_bytes(name, *bytes)?,
    })
}

/// Reads a JSON configuration.
pub(crate) fn read_config<T: DeserializeOwned>(file: &ModelFile) -> Result<T, PipelineError> {
    // Serde would also fill a structure from a list, by position.
    serde_json::from_slice::<serde_json::Map<String, serde_json::Value>>(&file.read()?)
        .and_then(|object| serde_json::from_value(object.into()))
        .map_err(|e| PipelineError::BadFile {
            file: file.name(),
            reason: format!("not the configuration that was expected here: {e}"),
        })
}

pub(crate) fn autoencoder_config(files: &ModelFiles) -> Result<DcaeConfig, PipelineError> {
    let file = files.part_file(&files.card().dc_ae, "config.json")?;
    let config: DcaeConfig = read_config(&file)?;
    if !(config.scaling_factor.is_finite() && config.scaling_factor > 0.0) {
        return Err(PipelineError::BadFile {
            file: file.name(),
            reason: format!(
                "scaling_factor is {}; it must be positive",
                config.scaling_factor
            ),
        });
    }
    Ok(config)
}

pub(crate) fn autoencoder_weights(files: &ModelFiles) -> Result<WeightFiles, PipelineError> {
    open_weights(&files.part_file(&files.card().dc_ae, AUTOENCODER_WEIGHTS)?)
}

pub(crate) fn text_encoder_files(
    files: &ModelFiles,
) -> Result<(LlamaConfig, ModelFile), PipelineError> {
    let folder = &files.card().text_encoder;
    let config = read_config(&files.part_file(folder, "config.json")?)?;
    Ok((config, files.part_file(folder, "model.safetensors")?))
}

/// The transformer's shape: as its file says, else from its tensors and the variant.
pub(crate) fn transformer_config(
    weights: &WeightFiles,
    variant: &Variant,
    autoencoder: &DcaeConfig,
) -> Result<EmmditConfig, PipelineError> {
    if let Some(json) = weights.metadata().get(CONFIG_KEY) {
        return serde_json::from_str(json).map_err(|e| PipelineError::BadFile {
            file: weights.origin().to_owned(),
            reason: format!("its metadata `{CONFIG_KEY}` describes no transformer: {e}"),
        });
    }
    let known = EmmditConfig {
        sample_size: variant.resolution / autoencoder.spatial_factor(),
        use_sub_attn: variant.asa,
        ..EmmditConfig::nitro_e_512()
    };
    Ok(EmmditConfig::from_weights(weights, &known)?)
}

/// The adapter of the variant, then the user's, with their scales.
fn adapters(
    files: &ModelFiles,
    variant: &Variant,
    loras: &[(PathBuf, f64)],
) -> Result<Vec<(LoraAdapter, f64)>, PipelineError> {
    let mut adapters = Vec::new();
    if let Some(folder) = &variant.lora {
        let config = files.part_file(folder, "adapter_config.json")?;
        let weights = open_weights(&files.part_file(folder, ADAPTER_WEIGHTS)?)?;
        adapters.push((
            LoraAdapter::new(&config.read()?, &weights, &config.name())?,
            1.0,
        ));
    }
    for (folder, scale) in loras {
        adapters.push((LoraAdapter::open(folder)?, *scale));
    }
    Ok(adapters)
}

/// Parameters for a model that will only be run.
fn inference<'a>(
    source: &'a dyn ParameterSource,
    device: &Device,
    precision: Precision,
    packed: Option<&'a PackedFile>,
) -> Params<'a> {
    Params::new(source, device, precision)
        .for_inference()
        .with_packed(packed)
}

/// The text encoder, for texts only.
pub(crate) fn load_text_encoder(
    file: &ModelFile,
    config: &LlamaConfig,
    device: &Device,
    precision: Precision,
    cache: &PackedCache,
) -> Result<Llama, PipelineError> {
    let weights = open_weights(file)?;
    cache.around("text-encoder", precision, &[(file, 1.0)], |packed| {
        let params = inference(&weights, device, precision, packed);
        Ok(Llama::new(config, &params)?)
    })
}

/// The half of the autoencoder that makes pictures, in bands of `tile` rows if there is such a wish.
pub(crate) fn load_decoder(
    file: &ModelFile,
    config: &DcaeConfig,
    device: &Device,
    precision: Precision,
    tile: Option<usize>,
    cache: &PackedCache,
) -> Result<Decoder, PipelineError> {
    let weights = open_weights(file)?;
    let mut decoder = cache.around("image-decoder", precision, &[(file, 1.0)], |packed| {
        let params = inference(&weights, device, precision, packed);
        Ok(Decoder::new(config, &params)?)
    })?;
    decoder.set_tile(tile);
    Ok(decoder)
}

/// The autoencoder's other half, for requests that bring an image.
pub(crate) fn load_encoder(
    file: &ModelFile,
    config: &DcaeConfig,
    device: &Device,
    precision: Precision,
    cache: &PackedCache,
) -> Result<Encoder, PipelineError> {
    let weights = open_weights(file)?;
    cache.around("image-encoder", precision, &[(file, 1.0)], |packed| {
        let params = inference(&weights, device, precision, packed);
        Ok(Encoder::new(config, &params)?)
    })
}

fn check_fit(
    card: &ModelCard,
    transformer: &EmmditConfig,
    text: &LlamaConfig,
    autoencoder: &DcaeConfig,
) -> Result<(), PipelineError> {
    let mismatch = |reason: String| Err(PipelineError::Mismatch { reason });
    if text.hidden_size != transformer.caption_channels {
        return mismatch(format!(
            "the text encoder gives features of width {}, the transformer expects {}",
            text.hidden_size, transformer.caption_channels
        ));
    }
    if autoencoder.latent_channels != transformer.in_channels {
        return mismatch(format!(
            "the autoencoder has {} latent channels, the transformer expects {}",
            autoencoder.latent_channels, transformer.in_channels
        ));
    }
    if !card.text_tokens.is_multiple_of(transformer.text_unit()) {
        return mismatch(format!(
            "the model card pads texts to {} tokens, but the transformer's subregion attention needs \
             a multiple of {}",
            card.text_tokens,
            transformer.text_unit()
        ));
    }
    Ok(())
}
