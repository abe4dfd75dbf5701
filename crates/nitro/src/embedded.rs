//! The miniature model, compiled into the program.

use nitro_pipeline::EmbeddedModel;

/// Pairs of a path in the model folder and that file's content.
macro_rules! model_folder {
    ($($path:literal),+ $(,)?) => {
        [$((
            $path,
            include_bytes!(concat!("../../../models/miniature/", $path)) as &[u8],
        )),+]
    };
}

/// An array in a static, not behind a reference: every crate that names [`MINIATURE`] would get a copy of what
/// a constant refers to.
static FILES: [(&str, &[u8]); 12] = model_folder![
    "nitro.json",
    "transformer.safetensors",
    "transformer-dist.safetensors",
    "grpo/adapter_config.json",
    "grpo/adapter_model.safetensors",
    "dc-ae/config.json",
    "dc-ae/diffusion_pytorch_model.safetensors",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "text_encoder/tokenizer.json",
    "text_encoder/tokenizer_config.json",
    "text_encoder/special_tokens_map.json",
];

/// The model that `nitro generate` uses when no other is named: the whole system scaled down, trained
/// on the shapes world (`models/miniature/README.md`).
pub const MINIATURE: EmbeddedModel = EmbeddedModel {
    name: "embedded miniature",
    files: &FILES,
};
