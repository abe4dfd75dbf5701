//! What a model is made of and what it costs, read from its files without building it.

use nitro_models::WeightFiles;
use nitro_models::dcae::DcaeConfig;
use nitro_models::emmdit::EmmditConfig;
use nitro_models::llama::LlamaConfig;
use serde::Serialize;

use crate::PipelineError;
use crate::card::Variant;
use crate::files::{ModelFile, ModelFiles};
use crate::load;

/// A model: its parts, their parameters, the cost of running them once for one picture.
///
/// One GFLOP is 10^9 floating-point operations, a multiply-add counting two; products of matrices
/// and convolutions are counted.
#[derive(Clone, Debug, Serialize)]
pub struct ModelInfo {
    /// Name in the model's card.
    pub name: String,
    /// Folder, Hub name or embedded model.
    pub place: String,
    /// Tokens that prompts are padded or cut to.
    pub text_tokens: usize,
    /// The transformers.
    pub variants: Vec<VariantInfo>,
    /// Llama.
    pub text_encoder: PartInfo,
    /// Half of the DC-AE that image-to-image needs, at the first variant's resolution.
    pub image_encoder: PartInfo,
    /// Half of the DC-AE that every picture needs, at the first variant's resolution.
    pub image_decoder: PartInfo,
}

/// Size and cost of a part.
#[derive(Clone, Debug, Serialize)]
pub struct PartInfo {
    /// Its weights.
    pub file: String,
    /// Values in them.
    pub parameters: usize,
    /// One pass for one picture, in GFLOP.
    pub gflop: f64,
}

/// One transformer.
#[derive(Clone, Debug, Serialize)]
pub struct VariantInfo {
    /// From the card: name, resolution, files, sampling defaults.
    pub variant: Variant,
    /// Its shape.
    pub config: EmmditConfig,
    /// Size and cost of a forward pass of one sample; guidance doubles it.
    pub part: PartInfo,
    /// Trainable parameters from the latents' side to the velocity's.
    pub parameters: Vec<(&'static str, usize)>,
    /// Blocks in each group.
    pub blocks: [usize; 3],
    /// Image tokens that the blocks of each group see.
    pub tokens: [usize; 3],
    /// The same if the middle group's tokens were not compressed.
    pub tokens_uncompressed: [usize; 3],
    /// Cost of a forward pass if they were not compressed.
    pub gflop_uncompressed: f64,
}

impl ModelInfo {
    /// Reads the model; of a Hub repository all its files are downloaded.
    pub fn read(files: &ModelFiles) -> Result<Self, PipelineError> {
        let card = files.card();
        let autoencoder = load::autoencoder_config(files)?;
        let variants = card
            .variants
            .iter()
            .map(|variant| variant_info(files, variant, &autoencoder))
            .collect::<Result<Vec<_>, _>>()?;
        let (text, file) = load::text_encoder_files(files)?;
        let text_encoder = text_info(&file, &text, card.text_tokens)?;
        let weights = load::autoencoder_weights(files)?;
        let side = card.variants[0].resolution;
        Ok(Self {
            name: card.name.clone(),
            place: files.place(),
            text_tokens: card.text_tokens,
            variants,
            text_encoder,
            image_encoder: autoencoder_info(&weights, "encoder", autoencoder.encoder_gflop(side)?),
            image_decoder: autoencoder_info(&weights, "decoder", autoencoder.decoder_gflop(side)?),
        })
    }
}

fn variant_info(
    files: &ModelFiles,
    variant: &Variant,
    autoencoder: &DcaeConfig,
) -> Result<VariantInfo, PipelineError> {
    let weights = load::open_weights(&files.file(&variant.transformer)?)?;
    let config = load::transformer_config(&weights, variant, autoencoder)?;
    let text = files.card().text_tokens;
    let plain = EmmditConfig {
        token_compression: false,
        ..config.clone()
    };
    Ok(VariantInfo {
        variant: variant.clone(),
        part: PartInfo {
            file: weights.origin().to_owned(),
            parameters: count(&weights, ""),
            gflop: config.gflop(text),
        },
        parameters: config.parameter_counts(),
        blocks: config.block_groups,
        tokens: config.tokens_per_group(),
        tokens_uncompressed: plain.tokens_per_group(),
        gflop_uncompressed: plain.gflop(text),
        config,
    })
}

fn text_info(
    file: &ModelFile,
    config: &LlamaConfig,
    tokens: usize,
) -> Result<PartInfo, PipelineError> {
    let weights = load::open_weights(file)?;
    Ok(PartInfo {
        file: weights.origin().to_owned(),
        parameters: count(&weights, ""),
        gflop: config.gflop(tokens),
    })
}

fn autoencoder_info(weights: &WeightFiles, half: &str, gflop: f64) -> PartInfo {
    PartInfo {
        file: weights.origin().to_owned(),
        parameters: count(weights, &format!("{half}.")),
        gflop,
    }
}

fn shapes<'a>(
    weights: &'a WeightFiles,
    prefix: &'a str,
) -> impl Iterator<Item = (&'a str, &'a [usize])> {
    weights
        .names()
        .filter(move |name| name.starts_with(prefix))
        .filter_map(|name| Some((name, weights.shape(name)?)))
}

fn count(weights: &WeightFiles, prefix: &str) -> usize {
    shapes(weights, prefix)
        .map(|(_, shape)| shape.iter().product::<usize>())
        .sum()
}
