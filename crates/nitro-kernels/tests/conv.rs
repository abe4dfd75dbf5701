//! Convolutions and their gradients agree with f64 on every instruction set, for all kinds of groups.

use nitro_kernels::conv::{
    Conv2d, PackedConv2d, conv2d_backward_input_with_isa, conv2d_backward_weight_with_isa,
    conv2d_forward_with_isa,
};
use nitro_kernels::gemm::{Activation, Epilogue};
use nitro_kernels::isa::{Isa, Precision};
use proptest::prelude::*;

/// Deterministic values in [-1, 1), without a dependency.
fn values(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..count)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

/// The value as the products see it. Depthwise convolutions always compute in f32.
fn seen(x: f32, conv: &Conv2d, precision: Precision) -> f64 {
    let depthwise = conv.groups > 1 && conv.groups == conv.in_channels.max(conv.out_channels);
    match precision {
        Precision::Bf16 if !depthwise => half::bf16::from_f32(x).to_f64(),
        _ => f64::from(x),
    }
}

fn relative_error(got: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(got.len(), expected.len());
    let difference: f64 = got
        .iter()
        .zip(expected)
        .map(|(&g, e)| (f64::from(g) - e).powi(2))
        .sum();
    let norm: f64 = expected.iter().map(|e| e * e).sum();
    (difference / norm.max(1e-30)).sqrt()
}

/// Calls `f(input index, output index, weight index)` for every product of the convolution, written
/// from its definition.
fn every_product(conv: &Conv2d, mut f: impl FnMut(usize, usize, usize)) {
    let [kh, kw] = conv.kernel;
    let (oh, ow) = (conv.out_height(), conv.out_width());
    let (inputs, outputs) = (
        conv.in_channels / conv.groups,
        conv.out_channels / conv.groups,
    );
    for image in 0..conv.batch {
        for oy in 0..oh {
            for ox in 0..ow {
                for ky in 0..kh {
                    for kx in 0..kw {
                        let y = (oy * conv.stride + ky) as isize - conv.padding as isize;
                        let x = (ox * conv.stride + kx) as isize - conv.padding as isize;
                        let (height, width) = (conv.height as isize, conv.width as isize);
                        if y < 0 || x < 0 || y >= height || x >= width {
                            continue;
                        }
                        let from = (image * conv.height + y as usize) * conv.width + x as usize;
                        let to = (image * oh + oy) * ow + ox;
                        for o in 0..conv.out_channels {
                            for i in 0..inputs {
                                f(
                                    from * conv.in_channels + o / outputs * inputs + i,
                                    to * conv.out_channels + o,
                                    ((o * inputs + i) * kh + ky) * kw + kx,
                                );
                            }
                        }
                    }
                }
            }
        }
    }
}

fn check(conv: Conv2d, precision: Precision, accumulate: bool, activation: Activation) {
    let x = values(conv.input_len(), 1);
    let weight = values(conv.weight_len(), 2);
    let bias = values(conv.out_channels, 3);
    let grad_out = values(conv.output_len(), 4);
    let out_before = values(conv.output_len(), 5);
    let weight_before = values(conv.weight_len(), 6);
    let seen = |values: &[f32]| -> Vec<f64> {
        values.iter().map(|&x| seen(x, &conv, precision)).collect()
    };
    let (x64, weight64, grad64) = (seen(&x), seen(&weight), seen(&grad_out));
    let start = |values: &[f32]| -> Vec<f64> {
        values
            .iter()
            .map(|&x| if accumulate { f64::from(x) } else { 0.0 })
            .collect()
    };
    let mut pre_expected = start(&out_before);
    for (i, value) in pre_expected.iter_mut().enumerate() {
        *value += f64::from(bias[i % conv.out_channels]);
    }
    let mut grad_x_expected = vec![0.0; conv.input_len()];
    let mut grad_weight_expected = start(&weight_before);
    every_product(&conv, |i, o, w| {
        pre_expected[o] += x64[i] * weight64[w];
        grad_x_expected[i] += grad64[o] * weight64[w];
        grad_weight_expected[w] += grad64[o] * x64[i];
    });
    let expected: Vec<f64> = pre_expected
        .iter()
        .map(|&x| match activation {
            Activation::Relu => x.max(0.0),
            Activation::Silu => x / (1.0 + (-x).exp()),
            _ => x,
        })
        .collect();

    for isa in Isa::supported() {
        let about = format!("{isa:?} {precision:?} {conv:?}");
        let close = |what: &str, got: &[f32], expected: &[f64]| {
            let error = relative_error(got, expected);
            assert!(error <= 1e-5, "{what}: {error:e} {about}");
        };
        for packed in [false, true] {
            let mut out = out_before.clone();
            let mut pre = vec![0.0; conv.output_len()];
            let epilogue = Epilogue {
                bias: Some(&bias),
                activation,
                pre_activation: Some(&mut pre),
            };
            if packed {
                // Packed for another image size: weights serve any.
                let any = Conv2d {
                    batch: 1,
                    height: 9,
                    width: 9,
                    ..conv
                };
                let weights = PackedConv2d::with_isa(isa, &any, &weight, precision).unwrap();
                let size = [conv.batch, conv.height, conv.width];
                weights
                    .forward(&x, size, &mut out, accumulate, epilogue)
                    .unwrap();
            } else {
                conv2d_forward_with_isa(
                    isa, &conv, &x, &weight, &mut out, accumulate, epilogue, precision,
                )
                .unwrap();
            }
            close("forward", &out, &expected);
            close("before activation", &pre, &pre_expected);
        }
        let mut grad_x = vec![f32::NAN; conv.input_len()];
        conv2d_backward_input_with_isa(isa, &conv, &grad_out, &weight, &mut grad_x, precision)
            .unwrap();
        close("input gradient", &grad_x, &grad_x_expected);
        let mut grad_weight = weight_before.clone();
        conv2d_backward_weight_with_isa(
            isa,
            &conv,
            &x,
            &grad_out,
            &mut grad_weight,
            accumulate,
            precision,
        )
        .unwrap();
        close("weight gradient", &grad_weight, &grad_weight_expected);
    }
}

fn conv(
    (batch, height, width): (usize, usize, usize),
    (in_channels, out_channels, groups): (usize, usize, usize),
    kernel: usize,
    stride: usize,
) -> Conv2d {
    Conv2d {
        batch,
        height,
        width,
        in_channels,
        out_channels,
        kernel: [kernel, kernel],
        stride,
        padding: kernel / 2,
        groups,
    }
}

#[test]
fn the_convolutions_of_the_models_agree_with_f64() {
    let cases = [
        // Image in and out, odd channel counts.
        conv((2, 13, 17), (3, 16, 1), 3, 1),
        conv((1, 16, 16), (16, 3, 1), 3, 1),
        // Body, downsampling, several K blocks and several panels.
        conv((2, 8, 11), (32, 64, 1), 3, 1),
        conv((1, 9, 12), (32, 48, 1), 3, 2),
        conv((1, 8, 8), (16, 32, 1), 3, 2),
        conv((1, 5, 6), (136, 70, 1), 3, 1),
        // Wider than one tile, higher than one tile.
        conv((1, 11, 70), (8, 8, 1), 3, 1),
        conv((3, 40, 33), (4, 5, 1), 3, 1),
        // Pointwise, with and without stride.
        conv((2, 7, 9), (24, 40, 1), 1, 1),
        conv((2, 7, 9), (24, 40, 1), 1, 2),
        // Depthwise.
        conv((2, 9, 14), (48, 48, 48), 3, 1),
        conv((1, 9, 14), (40, 40, 40), 5, 1),
        conv((1, 9, 14), (19, 19, 19), 3, 2),
        // More channels and rows than one task takes.
        conv((1, 20, 9), (150, 150, 150), 3, 1),
        // Groups.
        conv((2, 6, 7), (24, 24, 3), 1, 1),
        conv((2, 6, 7), (24, 36, 6), 1, 1),
        conv((1, 6, 7), (12, 24, 3), 3, 1),
        conv((1, 6, 7), (12, 12, 3), 3, 2),
        // One pixel, and a kernel larger than the image.
        conv((1, 1, 1), (5, 6, 1), 3, 1),
        conv((1, 2, 3), (6, 6, 6), 5, 1),
    ];
    for case in cases {
        check(case, Precision::F32, false, Activation::None);
        check(case, Precision::Bf16, true, Activation::Silu);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_convolution_agrees_with_f64(
        (batch, height, width) in (1_usize..3, 1_usize..12, 1_usize..12),
        (inputs, outputs, groups) in (1_usize..6, 1_usize..6, 1_usize..4),
        [kh, kw] in [1_usize..5, 1_usize..5],
        stride in 1_usize..4,
        padding in 0_usize..3,
        bf16: bool,
        accumulate: bool,
        relu: bool,
    ) {
        let conv = Conv2d {
            batch,
            height,
            width,
            in_channels: inputs * groups,
            out_channels: outputs * groups,
            kernel: [kh, kw],
            stride,
            padding: padding.min(kh.min(kw) - 1),
            groups,
        };
        prop_assume!(conv.out_height() > 0 && conv.out_width() > 0);
        let precision = if bf16 { Precision::Bf16 } else { Precision::F32 };
        let activation = if relu { Activation::Relu } else { Activation::None };
        check(conv, precision, accumulate, activation);
    }
}

#[test]
fn wrong_sizes_are_refused_with_a_reason() {
    let good = conv((1, 4, 4), (4, 4, 2), 3, 1);
    let run = |conv: Conv2d, x: usize, w: usize, out: usize| {
        let (x, w, mut out) = (vec![0.0; x], vec![0.0; w], vec![0.0; out]);
        conv2d_forward_with_isa(
            Isa::Portable,
            &conv,
            &x,
            &w,
            &mut out,
            false,
            Epilogue::default(),
            Precision::F32,
        )
        .map_err(|error| error.to_string())
    };
    assert_eq!(run(good, 64, 72, 64), Ok(()));
    assert!(
        run(good, 63, 72, 64)
            .unwrap_err()
            .contains("input elements")
    );
    assert!(
        run(good, 64, 71, 64)
            .unwrap_err()
            .contains("weight elements")
    );
    assert!(
        run(good, 64, 72, 65)
            .unwrap_err()
            .contains("output elements")
    );
    assert!(
        run(Conv2d { groups: 3, ..good }, 64, 72, 64)
            .unwrap_err()
            .contains("groups")
    );
    assert!(
        run(Conv2d { groups: 0, ..good }, 64, 72, 64)
            .unwrap_err()
            .contains("groups")
    );
    assert!(
        run(Conv2d { stride: 0, ..good }, 64, 72, 64)
            .unwrap_err()
            .contains("stride")
    );
    assert!(
        run(Conv2d { padding: 3, ..good }, 64, 72, 64)
            .unwrap_err()
            .contains("padding")
    );
    let none = Conv2d {
        in_channels: 0,
        groups: 1,
        ..good
    };
    assert!(run(none, 0, 0, 64).unwrap_err().contains("channels"));
    let huge = Conv2d {
        height: usize::MAX / 2,
        ..good
    };
    assert!(run(huge, 64, 72, 64).is_err());
    let small = Conv2d {
        height: 1,
        padding: 0,
        ..good
    };
    assert!(run(small, 16, 72, 0).unwrap_err().contains("does not fit"));
}
