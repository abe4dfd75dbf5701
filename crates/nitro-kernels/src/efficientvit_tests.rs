//! Against the same block computed in f64 from its definition.

use super::*;
use crate::conv::Conv2d;
use crate::isa::Precision;
use crate::packed::Rows;
use crate::testing::{random, rel_l2, to_f64};

/// A convolution without bias over `[h, w, i]`, groups of equal size, zero padding.
fn conv(
    x: &[f64],
    [h, w]: [usize; 2],
    i: usize,
    g: &[f32],
    o: usize,
    k: usize,
    groups: usize,
) -> Vec<f64> {
    let (per, outs) = (i / groups, o / groups);
    let mut y = vec![0.0; h * w * o];
    for (at, pixel) in y.chunks_exact_mut(o).enumerate() {
        for tap in 0..k * k {
            let row = (at / w + tap / k).wrapping_sub(k / 2);
            let col = (at % w + tap % k).wrapping_sub(k / 2);
            if row >= h || col >= w {
                continue;
            }
            for (out, y) in pixel.iter_mut().enumerate() {
                for c in 0..per {
                    let x = x[(row * w + col) * i + out / outs * per + c];
                    *y += x * f64::from(g[(out * per + c) * k * k + tap]);
                }
            }
        }
    }
    y
}

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

fn add_normed(x: &mut [f64], y: &[f64], norm: &Norm) {
    let c = norm.weight.len();
    for (x, y) in x.chunks_exact_mut(c).zip(y.chunks_exact(c)) {
        let square = y.iter().map(|v| v * v).sum::<f64>() / c as f64;
        let scale = (square + f64::from(norm.eps)).sqrt().recip();
        for i in 0..c {
            x[i] += y[i] * scale * f64::from(norm.weight[i]) + f64::from(norm.bias[i]);
        }
    }
}

/// Heads of `qkv` (`[pixels, 3 dim]` each), by the definition.
fn attention(qkv: &[f64], pixels: usize, dim: usize) -> Vec<f64> {
    let width = qkv.len() / pixels;
    let mut out = vec![0.0; pixels * width / 3];
    for head in 0..width / (3 * dim) {
        let at =
            |pixel: usize, part: usize, c: usize| qkv[pixel * width + (3 * head + part) * dim + c];
        for i in 0..pixels {
            let mut sums = vec![0.0; dim + 1];
            for j in 0..pixels {
                let score: f64 = (0..dim)
                    .map(|c| at(i, 0, c).max(0.0) * at(j, 1, c).max(0.0))
                    .sum();
                (0..dim).for_each(|c| sums[c] += score * at(j, 2, c));
                sums[dim] += score;
            }
            for c in 0..dim {
                out[i * width / 3 + head * dim + c] = sums[c] / (sums[dim] + 1e-15);
            }
        }
    }
    out
}

#[test]
fn a_block_is_what_its_definition_says() {
    for (size, c, dim, hidden, kernels) in [
        ([5, 7], 8, 4, 12, &[5][..]),
        ([3, 2], 12, 6, 10, &[]),
        ([90, 9], 8, 8, 32, &[3, 5]),
    ] {
        let [h, w] = size;
        let scaled = |seed, count: usize, inputs: usize| -> Vec<f32> {
            let scale = (inputs as f32).powf(-0.5);
            random(seed, count).iter().map(|v| v * scale).collect()
        };
        let wide = c * (1 + kernels.len());
        let qkv = scaled(1, 3 * c * c, c);
        let out = scaled(2, c * wide, wide);
        let inverted = scaled(3, 2 * hidden * c, c);
        let inverted_bias = random(4, 2 * hidden);
        let depthwise = scaled(5, 18 * hidden, 9);
        let depthwise_bias = random(6, 2 * hidden);
        let point = scaled(7, c * hidden, hidden);
        let norm = |seed| Norm {
            weight: random(seed, c),
            bias: random(seed + 1, c),
            eps: 1e-5,
        };
        let scales: Vec<_> = kernels
            .iter()
            .map(|&k| {
                (
                    k,
                    scaled(20, 3 * c * k * k, k * k),
                    scaled(21, 3 * c * dim, dim),
                )
            })
            .collect();

        let x = random(8, h * w * c);
        let mut expected = to_f64(&x);
        let plain = conv(&expected, size, c, &qkv, 3 * c, 1, 1);
        let mut heads = vec![attention(&plain, h * w, dim)];
        for (k, near, mix) in &scales {
            let seen = conv(&plain, size, 3 * c, near, 3 * c, *k, 3 * c);
            let mixed = conv(&seen, size, 3 * c, mix, 3 * c, 1, 3 * c / dim);
            heads.push(attention(&mixed, h * w, dim));
        }
        let joined: Vec<f64> = (0..h * w)
            .flat_map(|p| {
                heads
                    .iter()
                    .flat_map(move |head| head[p * c..][..c].to_vec())
            })
            .collect();
        add_normed(
            &mut expected,
            &conv(&joined, size, wide, &out, c, 1, 1),
            &norm(10),
        );
        let mut y = conv(&expected, size, c, &inverted, 2 * hidden, 1, 1);
        for (i, y) in y.iter_mut().enumerate() {
            *y = silu(*y + f64::from(inverted_bias[i % (2 * hidden)]));
        }
        let mut y = conv(&y, size, 2 * hidden, &depthwise, 2 * hidden, 3, 2 * hidden);
        for (i, y) in y.iter_mut().enumerate() {
            *y += f64::from(depthwise_bias[i % (2 * hidden)]);
        }
        let gated: Vec<f64> = y
            .chunks_exact(2 * hidden)
            .flat_map(|p| (0..hidden).map(|i| p[i] * silu(p[hidden + i])))
            .collect();
        add_normed(
            &mut expected,
            &conv(&gated, size, hidden, &point, c, 1, 1),
            &norm(12),
        );

        for (precision, tolerance) in [(Precision::F32, 2e-6), (Precision::Bf16, 5e-2)] {
            let linear = |weight: &[f32], outputs, inputs, bias| {
                let rows = Rows::from_f32(weight, outputs, inputs).unwrap();
                PackedLinear::new(&[rows], bias, precision).unwrap()
            };
            let packed = |kernel: usize, groups, weight: &[f32]| {
                let conv = Conv2d {
                    batch: 1,
                    height: 0,
                    width: 0,
                    in_channels: 3 * c,
                    out_channels: 3 * c,
                    kernel: [kernel; 2],
                    stride: 1,
                    padding: kernel / 2,
                    groups,
                };
                PackedConv2d::new(&conv, weight, precision).unwrap()
            };
            let block = EfficientVit::new(EfficientVitWeights {
                head_dim: dim,
                qkv: linear(&qkv, 3 * c, c, None),
                scales: scales
                    .iter()
                    .map(|(k, near, mix)| MixedScale {
                        depthwise: packed(*k, 3 * c, near),
                        grouped: packed(1, 3 * c / dim, mix),
                    })
                    .collect(),
                out: linear(&out, c, wide, None),
                out_norm: norm(10),
                inverted: linear(&inverted, 2 * hidden, c, Some(inverted_bias.clone())),
                depthwise: depthwise.clone(),
                depthwise_bias: depthwise_bias.clone(),
                point: linear(&point, c, hidden, None),
                norm: norm(12),
            })
            .unwrap();
            let mut y = x.clone();
            block.run(size, &mut y).unwrap();
            let error = rel_l2(&y, &expected);
            assert!(error < tolerance, "{size:?} {c} {precision:?}: {error:.2e}");
            assert!(block.run([h + 1, w], &mut y).is_err());
        }
    }
}
