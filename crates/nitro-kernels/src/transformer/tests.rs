//! Blocks against f64.

use super::*;
use crate::isa::{Isa, Precision};
use crate::packed::Rows;
use crate::testing::{random, rel_l2, to_f64};

/// A layer and its weights as its products see them.
struct Layer {
    packed: PackedLinear,
    weight: Vec<f64>,
    bias: Vec<f64>,
}

impl Layer {
    fn new(isa: Isa, precision: Precision, inputs: usize, outputs: usize, seed: u64) -> Self {
        let weight: Vec<f32> = random(seed, inputs * outputs)
            .iter()
            .map(|w| w / (inputs as f32).sqrt())
            .collect();
        let bias = random(seed + 1, outputs);
        let rows = Rows::from_f32(&weight, outputs, inputs).unwrap();
        let packed = PackedLinear::with_isa(isa, &[rows], Some(bias.clone()), precision).unwrap();
        Layer {
            weight: to_f64(&packed.to_f32()),
            bias: to_f64(&bias),
            packed,
        }
    }

    fn forward(&self, x: &[f64]) -> Vec<f64> {
        let (k, n) = (self.packed.inputs(), self.packed.outputs());
        let rows = x.chunks(k).flat_map(|x| {
            (0..n).map(move |j| {
                let row = &self.weight[j * k..(j + 1) * k];
                self.bias[j] + x.iter().zip(row).map(|(x, w)| x * w).sum::<f64>()
            })
        });
        rows.collect()
    }
}

struct Stream {
    tokens: usize,
    x: Vec<f32>,
    gain: Vec<f32>,
    offset: Vec<f32>,
    modulation: Option<Vec<f32>>,
    head_norms: Option<(Vec<f32>, Vec<f32>)>,
    qkv: Layer,
    tail: Option<[Option<Layer>; 4]>, // out, up, gate, down
}

#[derive(Clone, Copy)]
struct Shape {
    batch: usize,
    heads: usize,
    kv_heads: usize,
    dim: usize,
    groups: usize,
    run: usize,
    hidden: usize,
}

impl Shape {
    fn width(&self) -> usize {
        self.heads * self.dim
    }
}

fn norm(
    kind: NormKind,
    eps: f32,
    x: &[f64],
    gain: impl Fn(usize) -> f64,
    offset: impl Fn(usize) -> f64,
) -> Vec<f64> {
    let n = x.len() as f64;
    let mean = match kind {
        NormKind::Layer => x.iter().sum::<f64>() / n,
        NormKind::Rms => 0.0,
    };
    let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
    let r = 1.0 / (variance + f64::from(eps)).sqrt();
    (0..x.len())
        .map(|i| (x[i] - mean) * r * gain(i) + offset(i))
        .collect()
}

fn activate(activation: Activation, x: f64) -> f64 {
    match activation {
        Activation::Silu => x / (1.0 + (-x).exp()),
        _ => {
            let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
            0.5 * x * (1.0 + u.tanh())
        }
    }
}

/// The block, in f64 and one token at a time.
fn reference(cfg: &BlockConfig<'_>, shape: Shape, streams: &[Stream]) -> Vec<Vec<f64>> {
    let (width, dim) = (shape.width(), shape.dim);
    let part = |s: &Stream, b: usize, p: usize, i: usize| {
        s.modulation
            .as_ref()
            .map(|m| f64::from(m[(b * 6 + p) * width + i]))
    };
    let normed = |s: &Stream, x: &[f64], row: usize, which: usize| {
        let b = row / s.tokens;
        let (w, o): (Vec<f64>, Vec<f64>) = if which == 0 {
            (to_f64(&s.gain), to_f64(&s.offset))
        } else {
            (vec![1.0; width], vec![0.0; width])
        };
        let scale = |i| 1.0 + part(s, b, 3 * which + 1, i).unwrap_or(0.0);
        let shift = |i| part(s, b, 3 * which, i).unwrap_or(0.0);
        norm(
            cfg.norm,
            cfg.eps[which],
            x,
            |i| w[i] * scale(i),
            |i| o[i] * scale(i) + shift(i),
        )
    };
    let qkv: Vec<Vec<f64>> = streams
        .iter()
        .map(|s| {
            let x = to_f64(&s.x);
            let rows = x.chunks(width).enumerate();
            s.qkv.forward(
                &rows
                    .flat_map(|(r, x)| normed(s, x, r, 0))
                    .collect::<Vec<_>>(),
            )
        })
        .collect();
    let qkv_width = (shape.heads + 2 * shape.kv_heads) * dim;
    let head = |s: usize, row: usize, at: usize, which: usize| -> Vec<f64> {
        let x = &qkv[s][row * qkv_width + at * dim..][..dim];
        let mut x = match (&streams[s].head_norms, which) {
            (Some((q, _)), 0) => norm(NormKind::Rms, cfg.head_eps, x, |i| f64::from(q[i]), |_| 0.0),
            (Some((_, k)), 1) => norm(NormKind::Rms, cfg.head_eps, x, |i| f64::from(k[i]), |_| 0.0),
            _ => x.to_vec(),
        };
        if let (Some(rotary), 0 | 1) = (cfg.rotary, which) {
            let (token, half) = (row % streams[s].tokens, dim / 2);
            for i in 0..half {
                let (c, d) = (
                    f64::from(rotary.cos[token * half + i]),
                    f64::from(rotary.sin[token * half + i]),
                );
                let (a, b) = (x[i], x[i + half]);
                (x[i], x[i + half]) = (a * c - b * d, b * c + a * d);
            }
        }
        x
    };
    let group = |token: usize| token / shape.run % shape.groups;
    streams
        .iter()
        .enumerate()
        .map(|(si, s)| {
            let mut x = to_f64(&s.x);
            let Some([out, up, gate, down]) = &s.tail else {
                return x;
            };
            let mut attended = vec![0.0; s.x.len()];
            for row in 0..shape.batch * s.tokens {
                let (b, token) = (row / s.tokens, row % s.tokens);
                for h in 0..shape.heads {
                    let kv = h / (shape.heads / shape.kv_heads);
                    let q = head(si, row, h, 0);
                    let mut scores = Vec::new();
                    for (sj, other) in streams.iter().enumerate() {
                        for j in 0..other.tokens {
                            let key_row = b * other.tokens + j;
                            let seen = group(j) == group(token)
                                && (!cfg.attention.causal || j <= token)
                                && cfg.key_mask.is_none_or(|m| m[key_row]);
                            if seen {
                                let k = head(sj, key_row, shape.heads + kv, 1);
                                let dot: f64 = q.iter().zip(&k).map(|(a, b)| a * b).sum();
                                let score = dot * f64::from(cfg.attention.scale);
                                let v = head(sj, key_row, shape.heads + shape.kv_heads + kv, 2);
                                scores.push((score, v));
                            }
                        }
                    }
                    let max = scores.iter().fold(f64::NEG_INFINITY, |a, s| a.max(s.0));
                    let total: f64 = scores.iter().map(|s| (s.0 - max).exp()).sum();
                    for (score, v) in &scores {
                        let p = (score - max).exp() / total;
                        for (i, v) in v.iter().enumerate() {
                            attended[row * width + h * dim + i] += p * v;
                        }
                    }
                }
            }
            let gated = |x: &mut [f64], y: &[f64], p: usize| {
                for (at, (x, y)) in x.iter_mut().zip(y).enumerate() {
                    let b = at / width / s.tokens;
                    *x += part(s, b, p, at % width).unwrap_or(1.0) * y;
                }
            };
            gated(&mut x, &out.as_ref().unwrap().forward(&attended), 2);
            let rows = x.chunks(width).enumerate();
            let y: Vec<f64> = rows.flat_map(|(r, x)| normed(s, x, r, 1)).collect();
            let mut wide = up.as_ref().unwrap().forward(&y);
            match gate {
                Some(gate) => {
                    for (w, g) in wide.iter_mut().zip(gate.forward(&y)) {
                        *w *= activate(cfg.activation, g);
                    }
                }
                None => wide
                    .iter_mut()
                    .for_each(|w| *w = activate(cfg.activation, *w)),
            }
            gated(&mut x, &down.as_ref().unwrap().forward(&wide), 5);
            x
        })
        .collect()
}

fn stream(
    isa: Isa,
    precision: Precision,
    shape: Shape,
    tokens: usize,
    seed: u64,
    joint: bool,
    tail: bool,
) -> Stream {
    let (width, rows) = (shape.width(), shape.batch * tokens);
    let layer = |i, o, s| Layer::new(isa, precision, i, o, seed + s);
    let near_one = |n, s| {
        random(seed + s, n)
            .iter()
            .map(|x| 1.0 + 0.1 * x)
            .collect::<Vec<f32>>()
    };
    Stream {
        tokens,
        x: random(seed, rows * width),
        gain: near_one(width, 1),
        offset: if joint {
            random(seed + 2, width)
        } else {
            vec![0.0; width]
        },
        modulation: (joint && tail).then(|| random(seed + 3, shape.batch * 6 * width)),
        head_norms: joint.then(|| (near_one(shape.dim, 4), near_one(shape.dim, 5))),
        qkv: layer(width, (shape.heads + 2 * shape.kv_heads) * shape.dim, 10),
        tail: tail.then(|| {
            [
                Some(layer(width, width, 20)),
                Some(layer(width, shape.hidden, 30)),
                (!joint).then(|| layer(width, shape.hidden, 40)),
                Some(layer(shape.hidden, width, 50)),
            ]
        }),
    }
}

fn check_block(
    cfg: &BlockConfig<'_>,
    shape: Shape,
    mut streams: Vec<Stream>,
    tolerance: f64,
    what: &str,
) {
    let expected = reference(cfg, shape, &streams);
    let mut views: Vec<BlockStream<'_>> = streams
        .iter_mut()
        .map(|s| BlockStream {
            x: &mut s.x,
            tokens: s.tokens,
            norm1: [Some(&s.gain), Some(&s.offset)],
            modulation: s.modulation.as_deref(),
            qkv: &s.qkv.packed,
            head_norms: s.head_norms.as_ref().map(|(q, k)| (&q[..], &k[..])),
            tail: s.tail.as_ref().map(|[out, up, gate, down]| BlockTail {
                out: &out.as_ref().unwrap().packed,
                norm2: [None, None],
                up: &up.as_ref().unwrap().packed,
                gate: gate.as_ref().map(|g| &g.packed),
                down: &down.as_ref().unwrap().packed,
            }),
        })
        .collect();
    transformer_block(cfg, &mut views).unwrap();
    for (i, (stream, expected)) in streams.iter().zip(&expected).enumerate() {
        let error = rel_l2(&stream.x, expected);
        assert!(error <= tolerance, "{what}, stream {i}: {error:.2e}");
    }
}

fn precisions() -> impl Iterator<Item = (Isa, Precision, f64)> {
    Isa::supported().into_iter().flat_map(|isa| {
        [
            (Precision::F32, 1e-5),
            (Precision::Bf16, 1e-2),
            (Precision::Int8, 3e-2),
        ]
        .map(|(precision, tolerance)| (isa, precision, tolerance))
    })
}

#[test]
fn joint_blocks_agree_with_f64_with_and_without_subregions_and_tails() {
    let cases = [
        // heads, dim, groups, run, image tokens, text tokens, hidden, gain of queries and keys
        (3, 32, 1, 1, 21, 13, 50, 1.0),
        (2, 32, 4, 4, 80, 48, 40, 2.7), // scores too large to leave out their maximum
        (2, 64, 1, 1, 61, 39, 20, 1.0),
        (2, 24, 2, 1, 30, 14, 33, 1.0),
        (2, 16, 4, 4, 64, 32, 100, 1.0),
        (1, 7, 1, 1, 5, 3, 9, 1.0),
    ];
    for (isa, precision, tolerance) in precisions() {
        for (heads, dim, groups, run, image, text, hidden, gain) in cases {
            for batch in [1, 2] {
                let shape = Shape {
                    batch,
                    heads,
                    kv_heads: heads,
                    dim,
                    groups,
                    run,
                    hidden,
                };
                let cfg = BlockConfig {
                    attention: AttentionConfig {
                        groups,
                        run,
                        ..AttentionConfig::joint(batch, heads, dim)
                    },
                    norm: NormKind::Layer,
                    eps: [1e-5, 1e-6],
                    head_eps: 1e-6,
                    activation: Activation::GeluTanh,
                    rotary: None,
                    key_mask: None,
                };
                for tail in [true, false] {
                    let mut streams = vec![
                        stream(isa, precision, shape, image, 100, true, true),
                        stream(isa, precision, shape, text, 200, true, tail),
                    ];
                    for (q, k) in streams.iter_mut().flat_map(|s| &mut s.head_norms) {
                        q.iter_mut().chain(k).for_each(|w| *w *= gain);
                    }
                    let what = format!(
                        "{isa:?} {precision:?} {heads}x{dim} {groups},{run} batch {batch} tail {tail}"
                    );
                    check_block(&cfg, shape, streams, tolerance, &what);
                }
            }
        }
    }
}

#[test]
fn causal_blocks_with_rotary_positions_agree_with_f64() {
    for (isa, precision, tolerance) in precisions() {
        for (heads, kv_heads, dim, tokens) in [(4, 2, 16, 37), (2, 1, 64, 70), (3, 3, 6, 9)] {
            let (batch, half) = (2, dim / 2);
            let shape = Shape {
                batch,
                heads,
                kv_heads,
                dim,
                groups: 1,
                run: 1,
                hidden: 75,
            };
            let angles = random(7, tokens * half);
            let cos: Vec<f32> = angles.iter().map(|x| x.cos()).collect();
            let sin: Vec<f32> = angles.iter().map(|x| x.sin()).collect();
            // The first tokens of sample 1 are hidden even from themselves.
            let mask: Vec<bool> = (0..batch * tokens)
                .map(|i| {
                    if i < tokens {
                        i % 5 != 3 || i == 3
                    } else {
                        i >= tokens + 2
                    }
                })
                .collect();
            let cfg = BlockConfig {
                attention: AttentionConfig {
                    kv_heads,
                    causal: true,
                    ..AttentionConfig::joint(batch, heads, dim)
                },
                norm: NormKind::Rms,
                eps: [1e-5, 1e-5],
                head_eps: 1e-6,
                activation: Activation::Silu,
                rotary: Some(Rotary {
                    cos: &cos,
                    sin: &sin,
                }),
                key_mask: Some(&mask),
            };
            let streams = vec![stream(isa, precision, shape, tokens, 300, false, true)];
            check_block(
                &cfg,
                shape,
                streams,
                tolerance,
                &format!("{isa:?} {precision:?} {heads}/{kv_heads}x{dim}"),
            );
        }
    }
}

#[test]
fn blocks_that_do_not_fit_together_are_refused() {
    let isa = Isa::Portable;
    let cfg = BlockConfig {
        attention: AttentionConfig::joint(1, 2, 8),
        norm: NormKind::Layer,
        eps: [1e-5; 2],
        head_eps: 1e-6,
        activation: Activation::GeluTanh,
        rotary: None,
        key_mask: None,
    };
    fn view<'a>(x: &'a mut [f32], qkv: &'a Layer) -> BlockStream<'a> {
        BlockStream {
            x,
            tokens: 4,
            norm1: [None, None],
            modulation: None,
            qkv: &qkv.packed,
            head_norms: None,
            tail: None,
        }
    }
    let layer = Layer::new(isa, Precision::F32, 16, 48, 1);
    let narrow = Layer::new(isa, Precision::F32, 8, 24, 1);
    let (mut x, mut y) = (random(1, 64), random(2, 64));
    assert!(transformer_block(&cfg, &mut [view(&mut x[1..], &layer)]).is_err());
    assert!(transformer_block(&cfg, &mut [view(&mut x, &narrow)]).is_err());
    assert!(transformer_block(&cfg, &mut []).is_err());
    let causal = BlockConfig {
        attention: AttentionConfig {
            causal: true,
            ..cfg.attention
        },
        ..cfg
    };
    let mut two = [view(&mut x, &layer), view(&mut y, &layer)];
    assert!(transformer_block(&causal, &mut two).is_err());
    assert!(transformer_block(&cfg, &mut two).is_ok());
}
