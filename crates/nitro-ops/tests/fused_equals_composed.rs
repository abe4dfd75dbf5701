//! Every operation's fused form against its composed form, values and gradients.
//!
//! `f64` tensors always take the composed form, so it serves as the reference, and a more exact one.

use burn::tensor::{Bool, DType, Device, Distribution, Tensor, TensorData};
use nitro_ops::{
    Activation, AttentionShape, ConvGeometry, Precision, Qkv, attention, conv2d,
    deformable_attention, gate_residual, gelu, gelu_tanh, joint_attention, layer_norm_modulate,
    linear, pixel_shuffle, pixel_unshuffle, relu_linear_attention, rms_norm, silu, silu_gated,
    upsample_nearest_2x,
};

/// Inputs of any rank, flattened; each case gives them their shapes.
type Inputs = Vec<Tensor<1>>;

/// Checks `op` on random inputs of these sizes: output and the gradient of every input.
fn check(sizes: &[usize], op: impl Fn(&Inputs) -> Tensor<1>) {
    let device = Device::flex().autodiff();
    device.seed(7);
    let values: Inputs = sizes
        .iter()
        .map(|n| Tensor::random([*n], Distribution::Normal(0.0, 1.0), &device))
        .collect();
    let run = |dtype: DType| {
        let inputs: Inputs = values
            .iter()
            .map(|v| v.clone().cast(dtype).detach().require_grad())
            .collect();
        let y = op(&inputs);
        // Weights that differ from element to element, so that no gradient cancels.
        let weights = Tensor::<1>::from_data(
            TensorData::new(
                (0..y.dims()[0]).map(|i| (i as f32).sin()).collect(),
                y.dims(),
            ),
            &device,
        );
        let gradients = (y.clone() * weights.cast(dtype)).sum().backward();
        let mut all = vec![read(y)];
        for (i, input) in inputs.iter().enumerate() {
            let gradient = input.grad(&gradients);
            all.push(read(
                gradient.unwrap_or_else(|| panic!("input {i} has no gradient")),
            ));
        }
        all
    };
    for (i, (fused, composed)) in run(DType::F32).iter().zip(run(DType::F64)).enumerate() {
        let error = relative_l2(fused, &composed);
        assert!(
            error < 1e-5,
            "result {i} (0 is the output) is off by {error:e}"
        );
    }
}

fn read(tensor: Tensor<1>) -> Vec<f64> {
    tensor.into_data().iter::<f64>().collect()
}

fn relative_l2(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let square = |sum: f64, x: f64| sum + x * x;
    let difference = a.iter().zip(b).map(|(a, b)| a - b).fold(0.0, square);
    (difference / b.iter().copied().fold(1e-30, square)).sqrt()
}

fn flat<const D: usize>(tensor: Tensor<D>) -> Tensor<1> {
    tensor.flatten(0, D - 1)
}

#[test]
fn linear_layers() {
    for activation in [
        Activation::None,
        Activation::GeluTanh,
        Activation::Silu,
        Activation::Relu,
    ] {
        check(&[2 * 7 * 5, 3 * 5, 3], |x| {
            let bias = x[2].clone();
            let y = linear(
                x[0].clone().reshape([2, 7, 5]),
                &x[1].clone().reshape([3, 5]),
                Some(&bias),
                activation,
                Precision::F32,
            );
            flat(y)
        });
    }
    check(&[9 * 4, 6 * 4], |x| {
        let weight = x[1].clone().reshape([6, 4]);
        let x = x[0].clone().reshape([9, 4]);
        flat(linear(x, &weight, None, Activation::None, Precision::F32))
    });
}

#[test]
fn norms() {
    check(&[2 * 5 * 12, 12, 12, 2 * 12, 2 * 12], |x| {
        let modulation = (x[3].clone().reshape([2, 12]), x[4].clone().reshape([2, 12]));
        let affine = Some((&x[1], &x[2]));
        flat(layer_norm_modulate(
            x[0].clone().reshape([2, 5, 12]),
            affine,
            Some(modulation),
            1e-5,
        ))
    });
    check(&[3 * 4 * 7], |x| {
        flat(layer_norm_modulate(
            x[0].clone().reshape([3, 4, 7]),
            None,
            None,
            1e-6,
        ))
    });
    // Three heads of eight channels share the weight.
    check(&[2 * 5 * 24, 8], |x| {
        flat(rms_norm(
            x[0].clone().reshape([2, 5, 24]),
            &x[1],
            None,
            1e-6,
        ))
    });
    check(&[6 * 10, 10, 10], |x| {
        flat(rms_norm(
            x[0].clone().reshape([6, 10]),
            &x[1],
            Some(&x[2]),
            1e-5,
        ))
    });
}

#[test]
fn pointwise_operations() {
    check(&[37], |x| gelu(x[0].clone()));
    check(&[37], |x| gelu_tanh(x[0].clone()));
    check(&[37], |x| silu(x[0].clone()));
    check(&[37, 37], |x| silu_gated(x[0].clone(), x[1].clone()));
    check(&[2 * 5 * 6, 2 * 6, 2 * 5 * 6], |x| {
        let (a, b) = (
            x[0].clone().reshape([2, 5, 6]),
            x[2].clone().reshape([2, 5, 6]),
        );
        flat(gate_residual(a, x[1].clone().reshape([2, 6]), b))
    });
}

#[test]
fn attention_over_two_streams() {
    let (batch, width) = (2, 24);
    let (image, text) = (32, 16);
    for (groups, run) in [(1, 1), (4, 1), (4, 4)] {
        let shape = AttentionShape {
            groups,
            run,
            ..AttentionShape::full(3)
        };
        let size = |tokens: usize| batch * tokens * width;
        let sizes = [
            size(image),
            size(image),
            size(image),
            size(text),
            size(text),
            size(text),
        ];
        check(&sizes, |x| {
            let part = |i: usize, tokens| x[i].clone().reshape([batch, tokens, width]);
            let stream = |first: usize, tokens| Qkv {
                q: part(first, tokens),
                k: part(first + 1, tokens),
                v: part(first + 2, tokens),
            };
            let (image, text) = joint_attention(stream(0, image), stream(3, text), shape);
            Tensor::cat(vec![flat(image), flat(text)], 0)
        });
    }
}

#[test]
fn causal_attention_with_grouped_heads_and_padding() {
    let (batch, tokens) = (2, 9);
    let shape = AttentionShape {
        kv_heads: 2,
        causal: true,
        ..AttentionShape::full(4)
    };
    let mask: Vec<bool> = (0..batch * tokens)
        .map(|i| i % tokens < 5 + i / tokens)
        .collect();
    check(
        &[
            batch * tokens * 32,
            batch * tokens * 16,
            batch * tokens * 16,
        ],
        |x| {
            let device = x[0].device();
            let mask = TensorData::new(mask.clone(), [batch, tokens]);
            let qkv = Qkv {
                q: x[0].clone().reshape([batch, tokens, 32]),
                k: x[1].clone().reshape([batch, tokens, 16]),
                v: x[2].clone().reshape([batch, tokens, 16]),
            };
            flat(attention(
                qkv,
                shape,
                Some(Tensor::<2, Bool>::from_data(mask, &device)),
            ))
        },
    );
}

#[test]
fn linear_attention() {
    // Fewer and more tokens than channels of a head.
    for tokens in [3, 20] {
        check(&[2 * tokens * 2 * 3 * 8], |x| {
            // Biased upwards: a sum of few rectified products may be next to zero.
            let qkv = x[0].clone().reshape([2, tokens, 48]) + 1.0;
            flat(relu_linear_attention(qkv, 8, 1e-15))
        });
    }
}

#[test]
fn points_of_a_feature_pyramid() {
    let levels = [[4, 5], [2, 3]];
    let (batch, tokens, heads, dim, queries, samples) = (2, 26, 2, 3, 4, 6);
    let points = batch * queries * heads * samples;
    check(&[batch * tokens * heads * dim, 2 * points, points], |x| {
        let value = x[0].clone().reshape([batch, tokens, heads, dim]);
        // Around the middle, some outside.
        let locations = x[1].clone().reshape([batch, queries, heads * samples, 2]) * 0.4 + 0.5;
        let weights = x[2].clone().reshape([batch, queries, heads, samples]);
        flat(deformable_attention(value, locations, weights, &levels))
    });
}

#[test]
fn convolutions() {
    let geometries = [
        (3, 1, 1),
        (3, 2, 1),
        (1, 1, 1),
        (3, 1, 6),
        (5, 1, 6),
        (1, 1, 2),
    ];
    for (kernel, stride, groups) in geometries {
        let per_group = 6 / groups;
        for activation in [Activation::None, Activation::Silu] {
            check(&[2 * 8 * 6 * 6, 6 * per_group * kernel * kernel, 6], |x| {
                let geometry = ConvGeometry {
                    stride,
                    padding: kernel / 2,
                    groups,
                };
                let weight = x[1].clone().reshape([6, per_group, kernel, kernel]);
                let image = x[0].clone().reshape([2, 8, 6, 6]);
                let bias = Some(&x[2]);
                flat(conv2d(
                    image,
                    &weight,
                    bias,
                    geometry,
                    activation,
                    Precision::F32,
                ))
            });
        }
    }
}

#[test]
fn space_to_channels_and_back() {
    check(&[2 * 8 * 4 * 3], |x| {
        flat(pixel_unshuffle(x[0].clone().reshape([2, 8, 4, 3]), 2))
    });
    check(&[2 * 2 * 3 * 32], |x| {
        flat(pixel_shuffle(x[0].clone().reshape([2, 2, 3, 32]), 4))
    });
    check(&[2 * 3 * 4 * 5], |x| {
        flat(upsample_nearest_2x(x[0].clone().reshape([2, 3, 4, 5])))
    });
}
