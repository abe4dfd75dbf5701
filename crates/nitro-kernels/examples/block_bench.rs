//! Time of the blocks of E-MMDiT and Llama 1B at full size, and of their phases.
//!
//! `cargo run --release -p nitro-kernels --example block_bench [f32|bf16|int8]`

use std::time::Instant;

use nitro_kernels::attention::AttentionConfig;
use nitro_kernels::gemm::Activation;
use nitro_kernels::isa::Precision;
use nitro_kernels::packed::{PackedLinear, Rows};
use nitro_kernels::pool;
use nitro_kernels::transformer::{
    BlockConfig, BlockStream, BlockTail, NormKind, Rotary, phases, transformer_block,
};

/// Layers of one stream of one block.
struct Weights {
    qkv: PackedLinear,
    out: PackedLinear,
    up: PackedLinear,
    gate: Option<PackedLinear>,
    down: PackedLinear,
}

fn layer(inputs: usize, outputs: usize, precision: Precision) -> PackedLinear {
    let weight: Vec<f32> = (0..inputs * outputs)
        .map(|i| ((i * 7919 % 1009) as f32 / 1009.0 - 0.5) / (inputs as f32).sqrt())
        .collect();
    let rows = Rows::from_f32(&weight, outputs, inputs).expect("the shape is its own");
    PackedLinear::new(&[rows], Some(vec![0.01; outputs]), precision).expect("one layer")
}

struct Shape {
    name: &'static str,
    tokens: &'static [usize],
    attention: AttentionConfig,
    hidden: usize,
    gated: bool,
    blocks: usize,
}

fn main() {
    let precision = match std::env::args().nth(1).as_deref() {
        Some("f32") => Precision::F32,
        Some("int8") => Precision::Int8,
        _ => Precision::Bf16,
    };
    let joint = AttentionConfig::joint(1, 24, 32);
    let asa = AttentionConfig {
        groups: 4,
        run: 4,
        ..joint
    };
    let llama = AttentionConfig {
        kv_heads: 8,
        causal: true,
        ..AttentionConfig::joint(1, 32, 64)
    };
    let emmdit = |name, tokens, attention| Shape {
        name,
        tokens,
        attention,
        hidden: 2304,
        gated: false,
        blocks: 24,
    };
    let shapes = [
        emmdit("outer block, full attention", &[256, 128], joint),
        emmdit("outer block, subregions", &[256, 128], asa),
        emmdit("inner block, full attention", &[80, 128], joint),
        emmdit("inner block, subregions", &[80, 128], asa),
        emmdit(
            "outer block, batch 2",
            &[256, 128],
            AttentionConfig { batch: 2, ..joint },
        ),
        emmdit(
            "inner block, batch 8",
            &[80, 128],
            AttentionConfig { batch: 8, ..joint },
        ),
        Shape {
            name: "Llama layer",
            tokens: &[128],
            attention: llama,
            hidden: 8192,
            gated: true,
            blocks: 4,
        },
    ];
    pool::install(|| {
        println!("{precision:?}, {} threads", pool::num_threads());
        for shape in &shapes {
            measure(shape, precision);
        }
    });
}

fn measure(shape: &Shape, precision: Precision) {
    let AttentionConfig {
        batch,
        heads,
        kv_heads,
        head_dim,
        ..
    } = shape.attention;
    let width = heads * head_dim;
    let streams = shape.tokens.len();
    let weights: Vec<Weights> = (0..shape.blocks * streams)
        .map(|_| Weights {
            qkv: layer(width, (heads + 2 * kv_heads) * head_dim, precision),
            out: layer(width, width, precision),
            up: layer(width, shape.hidden, precision),
            gate: shape.gated.then(|| layer(width, shape.hidden, precision)),
            down: layer(shape.hidden, width, precision),
        })
        .collect();
    let norm = vec![1.0; head_dim];
    let table = vec![0.5; shape.tokens[0] * head_dim / 2];
    let modulation = vec![0.1; batch * 6 * width];
    let cfg = BlockConfig {
        attention: shape.attention,
        norm: if shape.gated {
            NormKind::Rms
        } else {
            NormKind::Layer
        },
        eps: [1e-5; 2],
        head_eps: 1e-6,
        activation: if shape.gated {
            Activation::Silu
        } else {
            Activation::GeluTanh
        },
        rotary: shape.gated.then_some(Rotary {
            cos: &table,
            sin: &table,
        }),
        key_mask: None,
    };
    let inputs: Vec<Vec<f32>> = shape
        .tokens
        .iter()
        .map(|tokens| {
            (0..batch * tokens * width)
                .map(|i| (i * 31 % 97) as f32 / 97.0 - 0.5)
                .collect()
        })
        .collect();
    let run = || {
        let mut x = inputs.clone();
        for block in weights.chunks(streams) {
            let mut views: Vec<BlockStream<'_>> = x
                .iter_mut()
                .zip(block)
                .zip(shape.tokens)
                .map(|((x, weights), &tokens)| BlockStream {
                    x,
                    tokens,
                    norm1: [None, None],
                    modulation: (!shape.gated).then_some(&modulation[..]),
                    qkv: &weights.qkv,
                    head_norms: (!shape.gated).then_some((&norm[..], &norm[..])),
                    tail: Some(BlockTail {
                        out: &weights.out,
                        norm2: [None, None],
                        up: &weights.up,
                        gate: weights.gate.as_ref(),
                        down: &weights.down,
                    }),
                })
                .collect();
            transformer_block(&cfg, &mut views).expect("shapes fit");
        }
    };
    run();
    let mut best = f64::INFINITY;
    for _ in 0..5 {
        let begun = Instant::now();
        run();
        best = best.min(begun.elapsed().as_secs_f64() / shape.blocks as f64);
    }
    phases::start();
    run();
    let times = phases::stop();
    let rows: usize = shape.tokens.iter().sum::<usize>() * batch;
    let layers = width
        * ((2 * heads + 2 * kv_heads) * head_dim + shape.hidden * (2 + usize::from(shape.gated)));
    let operations = 2.0 * rows as f64 * layers as f64;
    println!(
        "{:28} {:8.0} us per block, {:6.1} GFLOP/s in its layers",
        shape.name,
        best * 1e6,
        operations / best / 1e9
    );
    let scale = 1e6 / shape.blocks as f64 / pool::num_threads() as f64;
    for (name, time) in phases::PHASE_NAMES.iter().zip(times) {
        if !time.is_zero() {
            println!("    {name:10} {:8.1} us", time.as_secs_f64() * scale);
        }
    }
}
