//! DC-AE configurations: what they build, and what is refused.

use burn::tensor::{Device, Tensor};
use nitro_models::dcae::{Dcae, DcaeConfig, Decoder, Downsample, Upsample};
use nitro_models::{Params, RandomInit, TensorMap, WeightError};
use nitro_ops::Precision;
use serde_json::{Value, json};

fn build(config: &DcaeConfig) -> Result<Dcae, WeightError> {
    Dcae::new(
        config,
        &Params::new(&RandomInit::new(0), &Device::flex(), Precision::F32),
    )
}

fn parameters(config: &DcaeConfig) -> TensorMap {
    let build = |p: &Params<'_>| Dcae::new(config, p).map(drop);
    TensorMap::collect(&RandomInit::new(0), &Device::flex(), build).unwrap()
}

/// The smallest configuration with both kinds of blocks, with `changes` made to its JSON.
fn small(changes: Value) -> Value {
    let mut config = json!({
        "latent_channels": 4,
        "attention_head_dim": 4,
        "encoder_block_types": ["ResBlock", "EfficientViTBlock"],
        "decoder_block_types": ["ResBlock", "EfficientViTBlock"],
        "encoder_block_out_channels": [8, 8],
        "decoder_block_out_channels": [8, 8],
        "encoder_layers_per_block": [1, 1],
        "decoder_layers_per_block": [1, 1],
        "encoder_qkv_multiscales": [[], [5]],
        "decoder_qkv_multiscales": [[], [5]],
        "_class_name": "AutoencoderDC",
    });
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

#[test]
fn the_miniature_maps_128_pixels_to_16_and_back() {
    let config = DcaeConfig::miniature();
    assert_eq!(config.spatial_factor(), 8);
    let count: usize = parameters(&config)
        .iter()
        .map(|(spec, _)| spec.numel())
        .sum();
    assert_eq!(count, 1_325_707);
    let model = build(&config).unwrap();
    let image = Tensor::zeros([2, 3, 128, 128], &Device::flex());
    let latent = model.encode(image).unwrap();
    assert_eq!(latent.dims(), [2, 8, 16, 16]);
    assert_eq!(model.decode(latent).unwrap().dims(), [2, 3, 128, 128]);
}

#[test]
fn the_miniature_survives_its_json() {
    let config = DcaeConfig::miniature();
    let json = serde_json::to_value(&config).unwrap();
    assert_eq!(serde_json::from_value::<DcaeConfig>(json).unwrap(), config);
}

#[test]
fn pixel_shuffling_variants_and_an_empty_first_stage_have_the_official_shapes() {
    let config: DcaeConfig = serde_json::from_value(small(json!({
        "upsample_block_type": "pixel_shuffle",
        "downsample_block_type": "pixel_unshuffle",
        "encoder_block_out_channels": [8, 8, 16],
        "decoder_block_out_channels": [8, 8, 16],
        "encoder_block_types": "ResBlock",
        "decoder_block_types": "ResBlock",
        "decoder_act_fns": ["relu", "relu", "silu"],
        "encoder_layers_per_block": [0, 1, 1],
        "decoder_layers_per_block": [0, 1, 1],
        "encoder_qkv_multiscales": [[], [], []],
        "decoder_qkv_multiscales": [[], [], []],
    })))
    .unwrap();
    assert_eq!(config.upsample_block_type, Upsample::PixelShuffle);
    assert_eq!(config.downsample_block_type, Downsample::PixelUnshuffle);
    let map = parameters(&config);
    let shape = |name: &str| {
        let found = map.iter().find(|(spec, _)| spec.name == name);
        found.unwrap_or_else(|| panic!("no {name}")).0.shape.clone()
    };
    // As diffusers names and shapes them: the first stage leaves only its resampling.
    assert_eq!(shape("encoder.conv_in.conv.weight"), [2, 3, 3, 3]);
    assert_eq!(shape("encoder.down_blocks.1.1.conv.weight"), [4, 8, 3, 3]);
    assert_eq!(shape("decoder.up_blocks.1.0.conv.weight"), [32, 16, 3, 3]);
    assert_eq!(shape("decoder.conv_out.conv.weight"), [12, 8, 3, 3]);
    assert!(map.get("encoder.down_blocks.0.0.conv1.weight").is_none());

    let model = build(&config).unwrap();
    let latent = model
        .encode(Tensor::zeros([1, 3, 16, 24], &Device::flex()))
        .unwrap();
    assert_eq!(latent.dims(), [1, 4, 4, 6]);
    assert_eq!(model.decode(latent).unwrap().dims(), [1, 3, 16, 24]);
}

#[test]
fn a_decoder_needs_no_encoder_weights() {
    let config: DcaeConfig = serde_json::from_value(small(json!({}))).unwrap();
    let device = Device::flex();
    let decoder = |p: &Params<'_>| Decoder::new(&config, p).map(drop);
    let map = TensorMap::collect(&RandomInit::new(0), &device, decoder).unwrap();
    assert!(
        map.iter()
            .all(|(spec, _)| spec.name.starts_with("decoder."))
    );
    let alone = Decoder::new(&config, &Params::new(&map, &device, Precision::F32)).unwrap();
    let latent = Tensor::ones([1, 4, 2, 2], &device);
    let whole = build(&config).unwrap().decode(latent.clone()).unwrap();
    assert_eq!(alone.decode(latent).unwrap().into_data(), whole.into_data());
}

#[test]
fn configurations_that_cannot_be_built_are_named() {
    for (changes, told) in [
        (
            json!({ "decoder_layers_per_block": [1] }),
            "decoder_layers_per_block has 1 entries",
        ),
        (
            json!({ "encoder_block_out_channels": [8, 12] }),
            "needs 4 x 8 to be a multiple of 12",
        ),
        (
            json!({ "decoder_norm_types": "batch_norm" }),
            "only rms_norm",
        ),
        (
            json!({ "latent_channels": 3 }),
            "no multiple of latent_channels 3",
        ),
        (
            json!({ "attention_head_dim": 3 }),
            "no multiple of attention_head_dim 3",
        ),
        (
            json!({ "encoder_layers_per_block": [1, 0] }),
            "only the first stage may be empty",
        ),
        (
            json!({ "encoder_qkv_multiscales": [[], [4]] }),
            "must be odd",
        ),
    ] {
        let config = serde_json::from_value(small(changes)).unwrap();
        let error = build(&config).unwrap_err().to_string();
        assert!(error.contains(told), "{error}");
    }
}

#[test]
fn images_and_latents_of_the_wrong_size_are_refused() {
    let model = build(&serde_json::from_value(small(json!({}))).unwrap()).unwrap();
    let odd = model.encode(Tensor::zeros([1, 3, 15, 16], &Device::flex()));
    assert!(odd.unwrap_err().to_string().contains("15 x 16 pixels"));
    let channels = model.decode(Tensor::zeros([1, 5, 2, 2], &Device::flex()));
    assert!(
        channels
            .unwrap_err()
            .to_string()
            .contains("5 channels; 4 are expected")
    );
}
