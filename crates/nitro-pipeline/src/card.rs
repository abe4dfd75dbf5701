//! The model card `nitro.json`: which files make up a model, and how it is meant to be sampled.
//!
//! A folder of the official Hub layout carries no card; [`ModelCard::official`] makes up the one it
//! would have, so that a single loader serves both.

use serde::{Deserialize, Serialize};

use crate::PipelineError;

/// File name of the card in a model folder.
pub const CARD_FILE: &str = "nitro.json";

/// Version of the card's schema that this crate reads and writes.
pub const CARD_FORMAT: u32 = 1;

/// What a model folder holds. Paths are relative to the folder; `hf:org/name` names a repository of
/// the Hub instead.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelCard {
    /// Schema version, [`CARD_FORMAT`].
    pub format: u32,
    /// Name for people and for picture metadata.
    pub name: String,
    /// Tokens every prompt is padded or cut to.
    pub text_tokens: usize,
    /// Folder with `config.json` and `diffusion_pytorch_model.safetensors`.
    #[serde(default = "default_dc_ae")]
    pub dc_ae: String,
    /// Folder with `config.json`, `model.safetensors` and the tokenizer files.
    #[serde(default = "default_text_encoder")]
    pub text_encoder: String,
    /// The transformers, the default one first.
    pub variants: Vec<Variant>,
}

/// One transformer of a model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Variant {
    /// What users call it: `base`, `grpo`, `dist`.
    pub name: String,
    /// Side in pixels it was trained for.
    pub resolution: usize,
    /// Its weights.
    pub transformer: String,
    /// A PEFT adapter folder merged into the weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora: Option<String>,
    /// Sampling steps if the user names none.
    pub steps: usize,
    /// Guidance scale if the user names none; 1 or less means no guidance.
    pub guidance: f64,
    /// Alternating sub-region attention, for weights that carry no configuration of their own.
    #[serde(default)]
    pub asa: bool,
}

/// Sampling of the base and GRPO models (AMD-AGI/Nitro-E README).
const FULL: (usize, f64) = (20, 4.5);
/// Sampling of the step-distilled models (same source).
const DISTILLED: (usize, f64) = (4, 0.0);
/// Text length of the official pipeline.
const OFFICIAL_TEXT_TOKENS: usize = 128;

fn default_dc_ae() -> String {
    "dc-ae".to_owned()
}

fn default_text_encoder() -> String {
    "text_encoder".to_owned()
}

impl ModelCard {
    /// The card of the official release. `has` tells whether a file or folder exists beside the
    /// transformers; parts that do not are taken from their own Hub repositories. Variants whose
    /// weights `has` denies are left out.
    pub fn official(name: &str, has: impl Fn(&str) -> bool) -> Self {
        let local_or = |folder: String, repository: &str| match has(&folder) {
            true => folder,
            false => format!("hf:{repository}"),
        };
        let variants = [512, 1024]
            .into_iter()
            .flat_map(|side| {
                let variant =
                    |name: &str, suffix: &str, lora: Option<String>, how: (usize, f64)| {
                        Variant {
                            name: name.to_owned(),
                            resolution: side,
                            transformer: format!("Nitro-E-{side}px{suffix}.safetensors"),
                            lora,
                            steps: how.0,
                            guidance: how.1,
                            // The official inference script switches ASA off at 1024 px.
                            asa: side < 1024,
                        }
                    };
                [
                    variant("base", "", None, FULL),
                    variant("grpo", "", Some(format!("ckpt_grpo_{side}px")), FULL),
                    variant("dist", "-dist", None, DISTILLED),
                ]
            })
            .filter(|v| has(&v.transformer) && v.lora.as_deref().is_none_or(&has))
            .collect();
        Self {
            format: CARD_FORMAT,
            name: name.to_owned(),
            text_tokens: OFFICIAL_TEXT_TOKENS,
            dc_ae: local_or(
                default_dc_ae(),
                "mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers",
            ),
            text_encoder: local_or(default_text_encoder(), "meta-llama/Llama-3.2-1B"),
            variants,
        }
    }

    /// Reads `nitro.json`; `file` names it in errors.
    pub fn parse(json: &[u8], file: &str) -> Result<Self, PipelineError> {
        let bad = |reason: String| PipelineError::BadFile {
            file: file.to_owned(),
            reason,
        };
        let card: Self = serde_json::from_slice(json)
            .map_err(|e| bad(format!("not a model card of format {CARD_FORMAT}: {e}")))?;
        if card.format != CARD_FORMAT {
            return Err(bad(format!(
                "card format {} is not known here (this program reads {CARD_FORMAT}); update nitro",
                card.format
            )));
        }
        if card.variants.is_empty() {
            return Err(bad("the card lists no variants".to_owned()));
        }
        if card.text_tokens == 0 {
            return Err(bad("text_tokens must be at least 1".to_owned()));
        }
        if let Some(v) = card
            .variants
            .iter()
            .find(|v| v.steps == 0 || v.resolution == 0)
        {
            return Err(bad(format!(
                "variant `{}` has no steps or no resolution",
                v.name
            )));
        }
        Ok(card)
    }

    /// The variant called `name` (the first one without a name) whose resolution is nearest to
    /// `resolution` (its first one without a resolution).
    pub fn variant(
        &self,
        name: Option<&str>,
        resolution: Option<usize>,
    ) -> Result<&Variant, PipelineError> {
        let wanted = name.unwrap_or(&self.variants[0].name);
        let distance = |v: &&Variant| {
            resolution.map_or(0.0, |side| (side as f64 / v.resolution as f64).log2().abs())
        };
        self.variants
            .iter()
            .filter(|v| v.name == wanted)
            .min_by(|a, b| distance(a).total_cmp(&distance(b)))
            .ok_or_else(|| PipelineError::UnknownVariant {
                model: self.name.clone(),
                wanted: wanted.to_owned(),
                known: self.variant_names().join(", "),
            })
    }

    /// The distinct variant names, in the card's order.
    pub fn variant_names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = Vec::new();
        for v in &self.variants {
            if !names.contains(&v.name.as_str()) {
                names.push(&v.name);
            }
        }
        names
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_official_release_is_described_in_full() {
        let card = ModelCard::official("amd/Nitro-E", |f| !["dc-ae", "text_encoder"].contains(&f));
        assert_eq!(card.variant_names(), ["base", "grpo", "dist"]);
        assert_eq!(card.variants.len(), 6);
        assert_eq!(card.text_encoder, "hf:meta-llama/Llama-3.2-1B");
        let v = card.variant(Some("grpo"), Some(1024)).unwrap();
        assert_eq!(v.transformer, "Nitro-E-1024px.safetensors");
        assert_eq!(v.lora.as_deref(), Some("ckpt_grpo_1024px"));
        assert!(!v.asa);
        let v = card.variant(Some("dist"), None).unwrap();
        assert_eq!(
            (v.resolution, v.steps, v.guidance, v.asa),
            (512, 4, 0.0, true)
        );
    }

    #[test]
    fn a_partial_folder_offers_only_what_it_has() {
        let has = ["Nitro-E-512px.safetensors", "dc-ae"];
        let card = ModelCard::official("folder", |f| has.contains(&f));
        assert_eq!(card.variant_names(), ["base"]);
        assert_eq!(card.dc_ae, "dc-ae");
        let error = card.variant(Some("turbo"), None).unwrap_err().to_string();
        assert_eq!(error, "folder has no variant `turbo`; it has base");
    }

    #[test]
    fn the_nearest_resolution_is_chosen() {
        let card = ModelCard::official("amd/Nitro-E", |_| true);
        for (side, expected) in [(256, 512), (640, 512), (768, 1024), (1024, 1024)] {
            assert_eq!(card.variant(None, Some(side)).unwrap().resolution, expected);
        }
    }

    #[test]
    fn a_card_survives_its_own_json_and_bad_cards_are_explained() {
        let card = ModelCard::official("x", |_| true);
        let json = serde_json::to_vec(&card).unwrap();
        assert_eq!(ModelCard::parse(&json, "nitro.json").unwrap(), card);
        for (bad, says) in [
            ("{", "not a model card"),
            (
                r#"{"format":1,"name":"x","text_tokens":32,"variants":[]}"#,
                "no variants",
            ),
            (
                r#"{"format":9,"name":"x","text_tokens":32,"variants":[]}"#,
                "update nitro",
            ),
        ] {
            let error = ModelCard::parse(bad.as_bytes(), "m/nitro.json")
                .unwrap_err()
                .to_string();
            assert!(
                error.starts_with("m/nitro.json: ") && error.contains(says),
                "{error}"
            );
        }
    }
}
