//! What users of the E-MMDiT rely on beyond the reference vectors: sizes told from a configuration,
//! configurations told from a checkpoint, the ablation switches, and clear refusals.

use std::collections::HashMap;

use burn::tensor::{Device, Distribution, Tensor};
use nitro_models::emmdit::{Adaln, Emmdit, EmmditConfig, RepaConfig};
use nitro_models::{DType, Params, RandomInit, TensorMap, WeightFiles, save_safetensors};
use nitro_ops::Precision;

fn small() -> EmmditConfig {
    EmmditConfig {
        sample_size: 8,
        in_channels: 4,
        out_channels: 4,
        heads: 2,
        head_dim: 8,
        caption_channels: 6,
        pos_embed_max_size: 12,
        block_groups: [1, 2, 1],
        use_sub_attn: false,
        ..EmmditConfig::nitro_e_512()
    }
}

fn variants() -> Vec<EmmditConfig> {
    let repa = Some(RepaConfig {
        projector_dim: 10,
        z_dims: vec![5, 7],
    });
    vec![
        small(),
        EmmditConfig { repa, ..small() },
        EmmditConfig {
            adaln: Adaln::Single,
            ..small()
        },
        EmmditConfig {
            token_compression: false,
            ..small()
        },
        EmmditConfig {
            patch_size: 2,
            sample_size: 16,
            out_channels: 3,
            ..small()
        },
        EmmditConfig {
            sample_size: 16,
            pos_embed_max_size: 16,
            use_sub_attn: true,
            ..small()
        },
    ]
}

fn parameters(config: &EmmditConfig) -> TensorMap {
    let build = |p: &Params<'_>| Emmdit::new(config, p).map(drop);
    TensorMap::collect(&RandomInit::new(1), &Device::flex(), build).unwrap()
}

fn model(config: &EmmditConfig) -> Emmdit {
    let source = RandomInit::new(1);
    Emmdit::new(
        config,
        &Params::new(&source, &Device::flex(), Precision::F32),
    )
    .unwrap()
}

fn noise<const D: usize>(shape: [usize; D]) -> Tensor<D> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), &Device::flex())
}

#[test]
fn nitro_e_has_its_published_size() {
    let config = EmmditConfig::nitro_e_512();
    let parameters: usize = config
        .parameter_counts()
        .iter()
        .map(|(_, count)| count)
        .sum();
    assert_eq!(parameters, 302_449_952);
    assert_eq!(config.tokens_per_group(), [256, 80, 256]);
    assert!(
        (config.gflop(128) - 80.4).abs() < 0.5,
        "{}",
        config.gflop(128)
    );
    assert_eq!(
        EmmditConfig::nitro_e_1024().tokens_per_group(),
        [1024, 320, 1024]
    );
}

#[test]
fn counted_parameters_are_those_the_model_asks_for() {
    for config in variants() {
        let counted: usize = config
            .parameter_counts()
            .iter()
            .map(|(_, count)| count)
            .sum();
        let asked: usize = parameters(&config)
            .iter()
            .map(|(spec, _)| spec.numel())
            .sum();
        assert_eq!(counted, asked, "{config:?}");
    }
}

#[test]
fn a_checkpoint_tells_its_configuration() {
    let dir = tempfile::tempdir().unwrap();
    for (i, config) in variants().into_iter().enumerate() {
        let map = parameters(&config);
        let mut tensors: Vec<(String, Vec<usize>, Vec<f32>)> = map
            .iter()
            .map(|(spec, tensor)| {
                let values = tensor.clone().into_data().try_into_vec().unwrap();
                (spec.name.clone(), spec.shape.clone(), values)
            })
            .collect();
        let table = config.positions().whole();
        let shape = vec![1, config.pos_embed_max_size.pow(2), config.width()];
        tensors.push(("pos_embed.pos_embed".to_owned(), shape, table));
        let path = dir.path().join(format!("{i}.safetensors"));
        let borrowed: Vec<_> = tensors
            .iter()
            .map(|(name, shape, values)| (name.clone(), shape.clone(), values.as_slice()))
            .collect();
        save_safetensors(&path, &borrowed, &HashMap::new(), DType::F32).unwrap();

        let weights = WeightFiles::open(&path).unwrap();
        let variant = EmmditConfig {
            sample_size: config.sample_size,
            use_sub_attn: config.use_sub_attn,
            ..EmmditConfig::nitro_e_512()
        };
        let inferred = EmmditConfig::from_weights(&weights, &variant).unwrap();
        assert_eq!(inferred, config);
        let params = Params::new(&weights, &Device::flex(), Precision::F32);
        Emmdit::new(&inferred, &params).unwrap();
        weights.finish(&[]).unwrap();
    }
}

#[test]
fn every_variant_gives_velocities_tokens_and_projections_of_the_right_shape() {
    for config in variants() {
        let model = model(&config);
        let side = config.sample_size;
        let latents = noise([2, config.in_channels, side, side]);
        let text = noise([2, 16, config.caption_channels]);
        let velocity = model
            .forward(latents.clone(), text.clone(), &[10.0, 900.0])
            .unwrap();
        assert_eq!(velocity.dims(), [2, config.out_channels, side, side]);
        let output = model.forward_train(latents, text, &[10.0, 900.0]).unwrap();
        let tokens = config.grid() * config.grid();
        let patch = config.patch_size * config.patch_size;
        assert_eq!(
            output.tokens.dims(),
            [2, tokens, patch * config.out_channels]
        );
        let widths: Vec<_> = output.projections.iter().map(|p| p.dims()).collect();
        let expected: Vec<_> = config.repa.iter().flat_map(|repa| &repa.z_dims).collect();
        assert_eq!(
            widths,
            expected
                .iter()
                .map(|&&z| [2, tokens, z])
                .collect::<Vec<_>>()
        );
    }
}

#[test]
fn samples_of_a_batch_do_not_see_each_other() {
    let model = model(&small());
    let (latents, text) = (noise([2, 4, 8, 8]), noise([2, 3, 6]));
    let both = model
        .forward(latents.clone(), text.clone(), &[10.0, 900.0])
        .unwrap();
    let second = model
        .forward(
            latents.slice_dim(0, 1..2),
            text.slice_dim(0, 1..2),
            &[900.0],
        )
        .unwrap();
    let difference = (both.slice_dim(0, 1..2) - second)
        .abs()
        .max()
        .into_scalar::<f32>();
    assert!(difference < 1e-5, "{difference}");
}

#[test]
fn position_reinforcement_and_time_change_the_velocity() {
    let (latents, text) = (noise([1, 4, 8, 8]), noise([1, 3, 6]));
    let velocity = |config: &EmmditConfig, time: f32| {
        model(config)
            .forward(latents.clone(), text.clone(), &[time])
            .unwrap()
    };
    let distance = |a: Tensor<4>, b: Tensor<4>| (a - b).abs().max().into_scalar::<f32>();
    let base = velocity(&small(), 500.0);
    let without = EmmditConfig {
        position_reinforcement: false,
        ..small()
    };
    assert!(distance(base.clone(), velocity(&without, 500.0)) > 1e-3);
    assert!(distance(base, velocity(&small(), 100.0)) > 1e-3);
}

#[test]
fn rectangular_latents_are_understood() {
    let velocity = model(&small())
        .forward(noise([1, 4, 4, 12]), noise([1, 3, 6]), &[1.0])
        .unwrap();
    assert_eq!(velocity.dims(), [1, 4, 4, 12]);
}

#[test]
fn unsuitable_inputs_are_refused_with_the_reason() {
    let asa = EmmditConfig {
        sample_size: 16,
        pos_embed_max_size: 16,
        use_sub_attn: true,
        ..small()
    };
    let refusal = |config: &EmmditConfig, latents: [usize; 4], text: [usize; 3], times: &[f32]| {
        let model = model(config);
        model
            .forward(noise(latents), noise(text), times)
            .unwrap_err()
            .to_string()
    };
    let small = small();
    assert!(refusal(&small, [1, 4, 6, 8], [1, 3, 6], &[1.0]).contains("multiple of 4"));
    assert!(refusal(&small, [1, 5, 8, 8], [1, 3, 6], &[1.0]).contains("5 channels"));
    assert!(refusal(&small, [1, 4, 8, 8], [1, 3, 7], &[1.0]).contains("width 7"));
    assert!(refusal(&small, [1, 4, 8, 8], [1, 3, 6], &[1.0, 2.0]).contains("2 times"));
    assert!(refusal(&small, [1, 4, 16, 16], [1, 3, 6], &[1.0]).contains("positional table"));
    assert!(refusal(&asa, [1, 4, 16, 16], [1, 20, 6], &[1.0]).contains("multiple of 16"));
}

#[test]
fn configurations_that_cannot_be_built_are_refused() {
    let refusal = |config: EmmditConfig| config.check().unwrap_err().to_string();
    assert!(
        refusal(EmmditConfig {
            heads: 0,
            ..small()
        })
        .contains("heads")
    );
    assert!(
        refusal(EmmditConfig {
            heads: 1,
            ..small()
        })
        .contains("width 8")
    );
    assert!(
        refusal(EmmditConfig {
            pos_embed_max_size: 4,
            ..small()
        })
        .contains("pos_embed")
    );
    assert!(
        refusal(EmmditConfig {
            patch_size: 0,
            ..small()
        })
        .contains("patch_size")
    );
    assert!(
        refusal(EmmditConfig {
            block_groups: [1, 1, 0],
            ..small()
        })
        .contains("last group")
    );
}
