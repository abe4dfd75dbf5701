//! Stages in bands against the same layers one after the other over whole images.

use super::*;
use crate::conv::conv2d_forward;
use crate::isa::Precision;
use crate::testing::{random, rel_l2, to_f64};

/// One convolution of a test, kept as plain weights too.
fn dense(i: usize, o: usize, stride: usize) -> Conv2d {
    Conv2d {
        batch: 1,
        height: 0,
        width: 0,
        in_channels: i,
        out_channels: o,
        kernel: [3, 3],
        stride,
        padding: 1,
        groups: 1,
    }
}

fn plain(
    conv: Conv2d,
    [height, width]: [usize; 2],
    x: &[f32],
    g: &[f32],
    bias: Option<&[f32]>,
    activation: Activation,
) -> Vec<f32> {
    let conv = Conv2d {
        height,
        width,
        ..conv
    };
    let mut y = vec![0.0; conv.output_len()];
    let epilogue = Epilogue {
        bias,
        activation,
        pre_activation: None,
    };
    conv2d_forward(&conv, x, g, &mut y, false, epilogue, Precision::F32).unwrap();
    y
}

fn normed(x: &[f32], weight: &[f32], bias: &[f32], eps: f32) -> Vec<f32> {
    let c = weight.len();
    let mut y = Vec::with_capacity(x.len());
    for pixel in x.chunks_exact(c) {
        let square = pixel.iter().map(|v| v * v).sum::<f32>() / c as f32;
        let scale = 1.0 / (square + eps).sqrt();
        y.extend((0..c).map(|i| pixel[i] * scale * weight[i] + bias[i]));
    }
    y
}

fn block(c: usize, seed: u64) -> ResidualBlock {
    let same = |seed| {
        let g = scaled(seed, 9 * c * c, c);
        WinogradConv::new(WinogradForm::Same, [c, c], &g, Precision::F32).unwrap()
    };
    ResidualBlock {
        conv1: same(seed),
        bias1: random(seed + 1, c),
        activation: Activation::Silu,
        conv2: same(seed + 2),
        norm: Norm {
            weight: random(seed + 3, c),
            bias: random(seed + 4, c),
            eps: 1e-5,
        },
    }
}

fn scaled(seed: u64, count: usize, inputs: usize) -> Vec<f32> {
    let scale = (9.0 * inputs as f32).powf(-0.5);
    random(seed, count).iter().map(|v| v * scale).collect()
}

/// What [`block`] does, from plain layers.
fn plain_block(c: usize, seed: u64, size: [usize; 2], x: &[f32]) -> Vec<f32> {
    let conv = dense(c, c, 1);
    let g = |seed| scaled(seed, 9 * c * c, c);
    let y = plain(
        conv,
        size,
        x,
        &g(seed),
        Some(&random(seed + 1, c)),
        Activation::Silu,
    );
    let y = plain(conv, size, &y, &g(seed + 2), None, Activation::None);
    let y = normed(&y, &random(seed + 3, c), &random(seed + 4, c), 1e-5);
    x.iter().zip(&y).map(|(x, y)| x + y).collect()
}

fn check(what: &str, stages: &Stages, size: [usize; 2], x: &[f32], expected: &[f32]) {
    let mut first: Option<Vec<f32>> = None;
    for rows in [None, Some(1), Some(8), Some(12), Some(1000)] {
        let mut out = vec![f32::NAN; expected.len()];
        stages.run(size, x, rows, &mut out).unwrap();
        let error = rel_l2(&out, &to_f64(expected));
        assert!(error < 1e-5, "{what}, bands of {rows:?}: {error:.2e}");
        let first = first.get_or_insert_with(|| out.clone());
        assert!(*first == out, "{what}: bands of {rows:?} give other bits");
    }
}

/// An image of 9 x 7 and one large enough for many bands.
const SIZES: [[usize; 2]; 2] = [[9, 7], [38, 10]];

#[test]
fn a_decoder_in_bands_is_the_decoder() {
    for size in SIZES {
        for (wide, narrow) in [(16, 8), (8, 8), (16, 4)] {
            let x = random(1, size[0] * size[1] * wide);
            let g = scaled(100, narrow * wide * 9, wide);
            let up = |shortcut| Entry::Doubled {
                conv: WinogradConv::new(WinogradForm::Doubled, [narrow, wide], &g, Precision::F32)
                    .unwrap(),
                bias: random(101, narrow),
                shortcut,
            };
            for shortcut in [false, true] {
                let last = scaled(102, 3 * narrow * 9, narrow);
                let conv = dense(narrow, 3, 1);
                let head = Head {
                    norm: Norm {
                        weight: random(103, narrow),
                        bias: random(104, narrow),
                        eps: 1e-5,
                    },
                    activation: Activation::Relu,
                    conv: PackedConv2d::new(&conv, &last, Precision::F32).unwrap(),
                    bias: random(105, 3),
                };
                let stages = vec![
                    Stage {
                        entry: Entry::Same(wide),
                        blocks: vec![block(wide, 10)],
                    },
                    Stage {
                        entry: up(shortcut),
                        blocks: vec![block(narrow, 20), block(narrow, 30)],
                    },
                ];
                let stages = Stages::new(stages, Some(head)).unwrap();

                let y = plain_block(wide, 10, size, &x);
                let [h, w] = [2 * size[0], 2 * size[1]];
                let mut doubled = vec![0.0; h * w * wide];
                for at in 0..h * w {
                    let from = at / w / 2 * size[1] + at % w / 2;
                    doubled[at * wide..][..wide].copy_from_slice(&y[from * wide..][..wide]);
                }
                let conv_up = dense(wide, narrow, 1);
                let mut z = plain(
                    conv_up,
                    [h, w],
                    &doubled,
                    &g,
                    Some(&random(101, narrow)),
                    Activation::None,
                );
                if shortcut {
                    for (i, z) in z.iter_mut().enumerate() {
                        let (at, c) = (i / narrow, i % narrow);
                        let (row, col) = (at / w, at % w);
                        let from = row / 2 * size[1] + col / 2;
                        let k = 4 * c + 2 * (row % 2) + col % 2;
                        *z += y[from * wide + k / (4 * narrow / wide)];
                    }
                }
                let z = plain_block(narrow, 20, [h, w], &z);
                let z = plain_block(narrow, 30, [h, w], &z);
                let z = normed(&z, &random(103, narrow), &random(104, narrow), 1e-5);
                let z: Vec<f32> = z.iter().map(|v| v.max(0.0)).collect();
                let expected = plain(
                    conv,
                    [h, w],
                    &z,
                    &last,
                    Some(&random(105, 3)),
                    Activation::None,
                );
                check(
                    &format!("{size:?} {wide}->{narrow} {shortcut}"),
                    &stages,
                    size,
                    &x,
                    &expected,
                );
            }
        }
    }
}

#[test]
fn an_encoder_in_bands_is_the_encoder() {
    for [h, w] in [[18, 14], [44, 8]] {
        for (narrow, wide) in [(8, 16), (8, 8), (4, 16)] {
            let x = random(1, h * w * 3);
            let first = scaled(50, narrow * 3 * 9, 3);
            let g = scaled(51, wide * narrow * 9, narrow);
            for shortcut in [false, true] {
                let entry = |conv: Conv2d, g: &[f32], shortcut, seed| Entry::Conv {
                    bias: random(seed, conv.out_channels),
                    conv: PackedConv2d::new(&conv, g, Precision::F32).unwrap(),
                    shortcut,
                };
                let stages = vec![
                    Stage {
                        entry: entry(dense(3, narrow, 1), &first, false, 60),
                        blocks: vec![block(narrow, 10)],
                    },
                    Stage {
                        entry: entry(dense(narrow, wide, 2), &g, shortcut, 61),
                        blocks: vec![block(wide, 20)],
                    },
                ];
                let stages = Stages::new(stages, None).unwrap();
                let y = plain(
                    dense(3, narrow, 1),
                    [h, w],
                    &x,
                    &first,
                    Some(&random(60, narrow)),
                    Activation::None,
                );
                let y = plain_block(narrow, 10, [h, w], &y);
                let mut z = plain(
                    dense(narrow, wide, 2),
                    [h, w],
                    &y,
                    &g,
                    Some(&random(61, wide)),
                    Activation::None,
                );
                if shortcut {
                    let group = 4 * narrow / wide;
                    for (i, z) in z.iter_mut().enumerate() {
                        let (at, c) = (i / wide, i % wide);
                        let (row, col) = (at / (w / 2), at % (w / 2));
                        let sum: f32 = (c * group..(c + 1) * group)
                            .map(|k| {
                                y[((2 * row + k % 4 / 2) * w + 2 * col + k % 2) * narrow + k / 4]
                            })
                            .sum();
                        *z += sum / group as f32;
                    }
                }
                let expected = plain_block(wide, 20, [h / 2, w / 2], &z);
                check(
                    &format!("{h}x{w} {narrow}->{wide} {shortcut}"),
                    &stages,
                    [h, w],
                    &x,
                    &expected,
                );
            }
        }
    }
}

#[test]
fn stages_that_do_not_fit_are_refused() {
    let stage = |c| Stage {
        entry: Entry::Same(c),
        blocks: vec![block(c, 1)],
    };
    assert!(Stages::new(vec![stage(4), stage(8)], None).is_err());
    let wrong = Stage {
        entry: Entry::Same(8),
        blocks: vec![block(4, 1)],
    };
    assert!(Stages::new(vec![wrong], None).is_err());
    let stages = Stages::new(vec![stage(4)], None).unwrap();
    assert!(
        stages
            .run([2, 2], &[0.0; 16], None, &mut [0.0; 15])
            .is_err()
    );
    assert!(
        stages
            .run([2, 2], &[0.0; 15], None, &mut [0.0; 16])
            .is_err()
    );
    assert!(stages.run([0, 2], &[], None, &mut []).is_ok());
}
