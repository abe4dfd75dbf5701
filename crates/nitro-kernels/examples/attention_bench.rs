//! Times the norms, the element-wise passes and attention at the miniature's and Nitro-E's shapes.
//!
//! `cargo run --release -p nitro-kernels --example attention_bench`
//!
//! Each line is the best of many runs, so that other work on the machine disturbs little.
//! `RAYON_NUM_THREADS` and `NITRO_ISA` choose threads and instruction set.

use nitro_kernels::attention::{
    AttentionConfig, Segment, SegmentGrads, attention_backward, attention_forward,
};
use nitro_kernels::elementwise::{gelu_tanh_backward, gelu_tanh_forward};
use nitro_kernels::norm::{
    LayerNormParamGrads, LayerNormParams, LayerNormShape, layer_norm_modulate_backward,
    layer_norm_modulate_forward, rms_norm_backward, rms_norm_forward,
};
use nitro_kernels::optim::{AdamW, Ema, adamw_step, sum_of_squares};
use std::time::{Duration, Instant};

/// Shortest time of `f` in seconds.
fn best(mut f: impl FnMut()) -> f64 {
    f();
    let start = Instant::now();
    let mut best = f64::INFINITY;
    while start.elapsed() < Duration::from_millis(500) {
        let run = Instant::now();
        f();
        best = best.min(run.elapsed().as_secs_f64());
    }
    best
}

/// Reproducible values in `[-1, 1)`.
fn random(len: usize) -> Vec<f32> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

fn report(what: &str, seconds: f64, tensors: usize, len: usize) {
    let gigabytes = (tensors * len * size_of::<f32>()) as f64 / 1e9;
    println!(
        "{what:<34} {:8.3} ms {:7.1} GB/s",
        seconds * 1e3,
        gigabytes / seconds
    );
}

fn rows() {
    let shape = LayerNormShape {
        batch: 32,
        tokens: 288,
        channels: 192,
    };
    let rows = shape.batch * shape.tokens;
    let len = rows * shape.channels;
    println!("[{}, {}, {}]", shape.batch, shape.tokens, shape.channels);
    let (x, dy, mut y) = (random(len), random(len), vec![0.0; len]);
    let (mut mean, mut rstd) = (vec![0.0; rows], vec![0.0; rows]);
    let modulation = random(shape.batch * shape.channels);
    let params = LayerNormParams {
        scale: Some(&modulation),
        shift: Some(&modulation),
        ..Default::default()
    };
    let seconds = best(|| {
        layer_norm_modulate_forward(shape, &x, params, 1e-6, &mut y, &mut mean, &mut rstd).unwrap();
    });
    report("layer norm + modulation forward", seconds, 2, len);
    let (mut dscale, mut dshift) = (modulation.clone(), modulation.clone());
    let seconds = best(|| {
        let grads = LayerNormParamGrads {
            scale: Some(&mut dscale),
            shift: Some(&mut dshift),
            ..Default::default()
        };
        layer_norm_modulate_backward(shape, &dy, &x, params, &mean, &rstd, &mut y, grads).unwrap();
    });
    report("layer norm + modulation backward", seconds, 3, len);

    let weight = random(32);
    let (mut rstd, mut dweight) = (vec![0.0; len / 32], vec![0.0; 32]);
    let seconds =
        best(|| rms_norm_forward(32, &x, Some(&weight), None, 1e-6, &mut y, &mut rstd).unwrap());
    report("RMS norm of heads of 32 forward", seconds, 2, len);
    let seconds = best(|| {
        let dweight = Some(dweight.as_mut_slice());
        rms_norm_backward(32, &dy, &x, Some(&weight), &rstd, &mut y, dweight, None).unwrap();
    });
    report("RMS norm of heads of 32 backward", seconds, 3, len);

    report(
        "GELU forward",
        best(|| gelu_tanh_forward(&x, &mut y).unwrap()),
        2,
        len,
    );
    report(
        "GELU backward",
        best(|| gelu_tanh_backward(&x, &dy, &mut y).unwrap()),
        3,
        len,
    );

    let (mut m, mut v, mut average) = (vec![0.0; len], vec![0.0; len], x.clone());
    let cfg = AdamW {
        lr: 1e-3,
        beta1: 0.9,
        beta2: 0.99,
        eps: 1e-8,
        weight_decay: 0.01,
    };
    let seconds = best(|| {
        let ema = Ema {
            decay: 0.999,
            average: &mut average,
        };
        adamw_step(&cfg, 1, 1.0, &mut y, &dy, &mut m, &mut v, Some(ema)).unwrap();
    });
    report("AdamW + EMA", seconds, 9, len);
    let seconds = best(|| {
        std::hint::black_box(sum_of_squares(&x));
    });
    report("sum of squares", seconds, 1, len);
}

/// Attention over image and text tokens.
fn attention(cfg: AttentionConfig, image: usize, text: usize) {
    let len = |tokens: usize| cfg.batch * tokens * cfg.heads * cfg.head_dim;
    let inputs = |tokens| {
        (
            random(len(tokens)),
            random(len(tokens)),
            random(len(tokens)),
        )
    };
    let ((qi, ki, vi), (qt, kt, vt)) = (inputs(image), inputs(text));
    let segments = [
        Segment {
            q: &qi,
            k: &ki,
            v: &vi,
            tokens: image,
        },
        Segment {
            q: &qt,
            k: &kt,
            v: &vt,
            tokens: text,
        },
    ];
    let (mut oi, mut ot) = (vec![0.0; len(image)], vec![0.0; len(text)]);
    let mut lse = vec![0.0; cfg.batch * cfg.heads * (image + text)];
    let forward = best(|| {
        attention_forward(&cfg, &segments, None, &mut [&mut oi, &mut ot], &mut lse).unwrap();
    });
    let (di, dt) = (random(len(image)), random(len(text)));
    let (mut gi, mut gt) = (inputs(image), inputs(text));
    let backward = best(|| {
        let mut grads = [
            SegmentGrads {
                dq: &mut gi.0,
                dk: &mut gi.1,
                dv: &mut gi.2,
            },
            SegmentGrads {
                dq: &mut gt.0,
                dk: &mut gt.1,
                dv: &mut gt.2,
            },
        ];
        let (outs, douts) = ([&oi[..], &ot[..]], [&di[..], &dt[..]]);
        attention_backward(&cfg, &segments, None, &outs, &lse, &douts, &mut grads).unwrap();
    });
    let tokens = (image + text) / cfg.groups;
    let pairs = (cfg.batch * cfg.heads * cfg.groups * tokens * tokens) as f64;
    // Two products forward, five backward.
    let product = 2.0 * pairs * cfg.head_dim as f64 / 1e9;
    println!(
        "batch {:2} heads {:2}x{} tokens {image}+{text} groups {}: forward {:7.3} ms {:4.0} GFLOP/s, \
         backward {:7.3} ms {:4.0} GFLOP/s",
        cfg.batch,
        cfg.heads,
        cfg.head_dim,
        cfg.groups,
        forward * 1e3,
        2.0 * product / forward,
        backward * 1e3,
        5.0 * product / backward,
    );
}

fn main() {
    rows();
    let miniature = AttentionConfig::joint(32, 6, 32);
    attention(miniature, 256, 32);
    attention(miniature, 80, 32);
    attention(
        AttentionConfig {
            groups: 4,
            ..miniature
        },
        256,
        32,
    );
    attention(
        AttentionConfig {
            groups: 4,
            run: 4,
            ..miniature
        },
        80,
        32,
    );
    attention(AttentionConfig::joint(1, 24, 32), 1024, 128);
}
