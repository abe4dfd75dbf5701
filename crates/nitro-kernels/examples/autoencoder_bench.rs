//! Milliseconds and GFLOP/s of the layers, blocks and halves of DC-AE f32c32 at 512 pixels, with weights
//! from a formula. GFLOP are those of the direct convolution, so that Winograd's minimal filtering shows
//! as a rate beyond the machine's peak.
//!
//! `cargo run --release -p nitro-kernels --example autoencoder_bench [filter]`: a filter keeps the lines
//! that contain it, such as `Bf16`, `layer`, `block` or `decode`. The first run of each line, which also
//! gets its memory from the system, is shown beside the best of the others.

use std::time::Instant;

use nitro_kernels::conv::{
    Conv2d, Entry, Finish, Head, ImageRows, Norm, PackedConv2d, ResidualBlock, Stage, Stages,
    WinogradConv, WinogradForm,
};
use nitro_kernels::efficientvit::{EfficientVit, EfficientVitWeights, MixedScale};
use nitro_kernels::error::KernelError;
use nitro_kernels::gemm::{Activation, Epilogue};
use nitro_kernels::isa::{Isa, Precision};
use nitro_kernels::packed::{PackedLinear, Rows};
use nitro_kernels::pool::install;

/// Channels and blocks of each stage, the finest first.
const CHANNELS: [usize; 6] = [128, 256, 512, 512, 1024, 1024];
const DECODER_BLOCKS: [usize; 6] = [3; 6];
const ENCODER_BLOCKS: [usize; 6] = [2, 2, 2, 3, 3, 3];
const SIDE: usize = 512;
/// Stages of residual blocks.
const FINE: usize = 3;

/// Values of deviation about `scale`.
fn values(count: usize, scale: f32) -> Vec<f32> {
    let value = |i: usize| ((i.wrapping_mul(2_654_435_761) >> 7) % 2048) as f32 / 1024.0 - 1.0;
    (0..count).map(|i| 1.7 * scale * value(i)).collect()
}

fn weights(count: usize, inputs: usize) -> Vec<f32> {
    values(count, (inputs as f32).powf(-0.5))
}

fn gflop(pixels: usize, inputs: usize, outputs: usize, taps: usize) -> f64 {
    2e-9 * (pixels * inputs * outputs * taps) as f64
}

struct Bench {
    filter: String,
    precision: Precision,
}

impl Bench {
    /// Runs `run` five times and prints the line `name`, if it is asked for.
    fn line(
        &self,
        name: &str,
        gflop: f64,
        make: impl FnOnce() -> Result<Box<dyn FnMut() -> Result<(), KernelError> + Send>, KernelError>,
    ) -> Result<(), KernelError> {
        let name = format!("{:?} {name}", self.precision);
        if !name.contains(&self.filter) {
            return Ok(());
        }
        let begun = Instant::now();
        let mut run = make()?;
        let packing = begun.elapsed().as_secs_f64();
        let mut times = Vec::new();
        install(|| {
            for _ in 0..5 {
                let begun = Instant::now();
                run()?;
                times.push(begun.elapsed().as_secs_f64());
            }
            Ok(())
        })?;
        let best = times[1..].iter().fold(f64::INFINITY, |a, &b| a.min(b));
        println!(
            "{name:48} {:8.1} ms {:6.0} GFLOP/s   (first {:.1} ms, made in {:.0} ms)",
            best * 1e3,
            gflop / best,
            times[0] * 1e3,
            packing * 1e3
        );
        Ok(())
    }

    fn winograd(
        &self,
        form: WinogradForm,
        inputs: usize,
        outputs: usize,
    ) -> Result<WinogradConv, KernelError> {
        let weight = weights(9 * inputs * outputs, 9 * inputs);
        WinogradConv::new(form, [outputs, inputs], &weight, self.precision)
    }

    fn dense(&self, i: usize, o: usize, stride: usize) -> Result<PackedConv2d, KernelError> {
        let conv = convolution(i, o, 3, stride, 1);
        PackedConv2d::new(&conv, &weights(9 * i * o, 9 * i), self.precision)
    }

    fn residual_block(&self, c: usize) -> Result<ResidualBlock, KernelError> {
        Ok(ResidualBlock {
            conv1: self.winograd(WinogradForm::Same, c, c)?,
            bias1: values(c, 0.1),
            activation: Activation::Silu,
            conv2: self.winograd(WinogradForm::Same, c, c)?,
            norm: norm(c),
        })
    }

    fn linear(
        &self,
        inputs: usize,
        outputs: usize,
        bias: bool,
    ) -> Result<PackedLinear, KernelError> {
        let weight = weights(inputs * outputs, inputs);
        let rows = Rows::from_f32(&weight, outputs, inputs)?;
        PackedLinear::new(&[rows], bias.then(|| values(outputs, 0.1)), self.precision)
    }

    fn efficient_vit(&self, c: usize) -> Result<EfficientVit, KernelError> {
        let (hidden, head_dim) = (4 * c, 32);
        let grouped = |kernel: usize, groups: usize| {
            let conv = convolution(3 * c, 3 * c, kernel, 1, groups);
            let per = kernel * kernel * 3 * c / groups;
            PackedConv2d::new(&conv, &weights(3 * c * per, per), self.precision)
        };
        EfficientVit::new(EfficientVitWeights {
            head_dim,
            qkv: self.linear(c, 3 * c, false)?,
            scales: vec![MixedScale {
                depthwise: grouped(5, 3 * c)?,
                grouped: grouped(1, 3 * c / head_dim)?,
            }],
            out: self.linear(2 * c, c, false)?,
            out_norm: norm(c),
            inverted: self.linear(c, 2 * hidden, true)?,
            depthwise: weights(18 * hidden, 9),
            depthwise_bias: values(2 * hidden, 0.1),
            point: self.linear(hidden, c, false)?,
            norm: norm(c),
        })
    }
}

fn convolution(
    inputs: usize,
    outputs: usize,
    kernel: usize,
    stride: usize,
    groups: usize,
) -> Conv2d {
    Conv2d {
        batch: 1,
        height: 0,
        width: 0,
        in_channels: inputs,
        out_channels: outputs,
        kernel: [kernel; 2],
        stride,
        padding: kernel / 2,
        groups,
    }
}

fn norm(c: usize) -> Norm {
    Norm {
        weight: vec![1.0; c],
        bias: values(c, 0.1),
        eps: 1e-5,
    }
}

/// Operations of a block of a coarse stage.
fn block_gflop(pixels: usize, c: usize) -> f64 {
    let linears = gflop(pixels, c, 3 * c + 2 * c + 8 * c + 4 * c, 1);
    let depthwise = gflop(pixels, 1, 3 * c, 25 + 32) + gflop(pixels, 1, 8 * c, 9);
    linears + depthwise + gflop(pixels, 2 * 33, 2 * c, 1)
}

/// Operations of the decoder's (or encoder's) fine stages.
fn fine_gflop(blocks: &[usize; 6], resample: impl Fn(usize) -> f64) -> f64 {
    (0..FINE)
        .map(|i| {
            let (pixels, c) = ((SIDE >> i).pow(2), CHANNELS[i]);
            2.0 * blocks[i] as f64 * gflop(pixels, c, c, 9) + resample(i)
        })
        .sum()
}

fn main() -> Result<(), KernelError> {
    let filter = std::env::args().nth(1).unwrap_or_default();
    println!(
        "{}, {} threads",
        Isa::current().name(),
        rayon::current_num_threads()
    );
    for precision in [Precision::Bf16, Precision::F32] {
        let bench = Bench {
            filter: filter.clone(),
            precision,
        };
        layers(&bench)?;
        for (side, c) in [(64, 512), (32, 1024), (16, 1024)] {
            let name = format!("block, attention, {side} px {c}");
            bench.line(&name, block_gflop(side * side, c), || {
                let block = bench.efficient_vit(c)?;
                let mut x = values(side * side * c, 1.0);
                Ok(Box::new(move || block.run([side, side], &mut x)))
            })?;
        }
        for (i, &c) in CHANNELS[..FINE].iter().enumerate() {
            let side = SIDE >> i;
            let name = format!("blocks, residual x 3, {side} px {c}");
            bench.line(&name, 6.0 * gflop(side * side, c, c, 9), || {
                let blocks = (0..3).map(|_| bench.residual_block(c));
                let stage = Stage {
                    entry: Entry::Same(c),
                    blocks: blocks.collect::<Result<_, _>>()?,
                };
                let stages = Stages::new(vec![stage], None)?;
                let x = values(side * side * c, 1.0);
                let mut out = vec![0.0; x.len()];
                Ok(Box::new(move || {
                    stages.run([side, side], &x, None, &mut out)
                }))
            })?;
        }
        halves(&bench)?;
    }
    Ok(())
}

fn layers(bench: &Bench) -> Result<(), KernelError> {
    use WinogradForm::{Doubled, Same};
    for (form, side, i, o) in [
        (Same, 512, 128, 128),
        (Same, 256, 256, 256),
        (Same, 128, 512, 512),
        (Doubled, 256, 256, 128),
        (Doubled, 128, 512, 256),
        (Doubled, 64, 512, 512),
        (Doubled, 32, 1024, 512),
        (Doubled, 16, 1024, 1024),
    ] {
        let rows = if form == Same { side } else { 2 * side };
        for norms in [false, true] {
            if norms && form == Doubled {
                continue;
            }
            let last = if norms { "norm" } else { "silu" };
            let name = format!("layer, {form:?} {side} px {i} -> {o}, {last}");
            bench.line(&name, gflop(rows * rows, i, o, 9), || {
                let conv = bench.winograd(form, i, o)?;
                let x = values(side * side * i, 1.0);
                let mut out = vec![0.0; rows * rows * o];
                let norm = norm(o);
                Ok(Box::new(move || {
                    let finish = if norms {
                        Finish::AddNorm {
                            weight: &norm.weight,
                            bias: &norm.bias,
                            eps: norm.eps,
                        }
                    } else {
                        Finish::Store {
                            bias: Some(&norm.bias),
                            activation: Activation::Silu,
                        }
                    };
                    let input = ImageRows { data: &x, first: 0 };
                    conv.forward([side, side], input, 0..rows, &mut out, finish)
                }))
            })?;
        }
    }
    for (side, i, o, stride) in [
        (512, 3, 128, 1),
        (512, 128, 3, 1),
        (512, 128, 256, 2),
        (256, 256, 512, 2),
        (128, 512, 512, 2),
        (64, 512, 1024, 2),
    ] {
        let out = side / stride;
        let name = format!("layer, direct {side} px {i} -> {o}, stride {stride}");
        bench.line(&name, gflop(out * out, i, o, 9), || {
            let conv = bench.dense(i, o, stride)?;
            let x = values(side * side * i, 1.0);
            let mut y = vec![0.0; out * out * o];
            Ok(Box::new(move || {
                conv.forward(&x, [1, side, side], &mut y, false, Epilogue::default())
            }))
        })?;
    }
    Ok(())
}

/// The fine stages of both halves; the coarse ones are the blocks above.
fn halves(bench: &Bench) -> Result<(), KernelError> {
    let up = |i: usize| gflop((SIDE >> i).pow(2), CHANNELS[i + 1], CHANNELS[i], 9);
    let flop = fine_gflop(&DECODER_BLOCKS, up) + gflop(SIDE * SIDE, CHANNELS[0], 3, 9);
    bench.line("decode, fine stages", flop, || {
        let mut stages = Vec::new();
        for i in (0..FINE).rev() {
            let (coarse, c) = (CHANNELS[i + 1], CHANNELS[i]);
            let blocks = (0..DECODER_BLOCKS[i]).map(|_| bench.residual_block(c));
            stages.push(Stage {
                entry: Entry::Doubled {
                    conv: bench.winograd(WinogradForm::Doubled, coarse, c)?,
                    bias: values(c, 0.1),
                    shortcut: true,
                },
                blocks: blocks.collect::<Result<_, _>>()?,
            });
        }
        let head = Head {
            norm: norm(CHANNELS[0]),
            activation: Activation::Relu,
            conv: bench.dense(CHANNELS[0], 3, 1)?,
            bias: values(3, 0.1),
        };
        let stages = Stages::new(stages, Some(head))?;
        let side = SIDE >> FINE;
        let x = values(side * side * CHANNELS[FINE], 1.0);
        let mut out = vec![0.0; SIDE * SIDE * 3];
        Ok(Box::new(move || {
            stages.run([side, side], &x, None, &mut out)
        }))
    })?;
    let down = |i: usize| gflop((SIDE >> (i + 1)).pow(2), CHANNELS[i], CHANNELS[i + 1], 9);
    let flop = fine_gflop(&ENCODER_BLOCKS, down) + gflop(SIDE * SIDE, 3, CHANNELS[0], 9);
    bench.line("encode, fine stages", flop, || {
        let mut stages = Vec::new();
        for i in 0..=FINE {
            let [from, stride] = if i == 0 { [3, 1] } else { [CHANNELS[i - 1], 2] };
            let blocks = if i < FINE { ENCODER_BLOCKS[i] } else { 0 };
            stages.push(Stage {
                entry: Entry::Conv {
                    conv: bench.dense(from, CHANNELS[i], stride)?,
                    bias: values(CHANNELS[i], 0.1),
                    shortcut: stride == 2,
                },
                blocks: (0..blocks)
                    .map(|_| bench.residual_block(CHANNELS[i]))
                    .collect::<Result<_, _>>()?,
            });
        }
        let stages = Stages::new(stages, None)?;
        let x = values(SIDE * SIDE * 3, 1.0);
        let side = SIDE >> FINE;
        let mut out = vec![0.0; side * side * CHANNELS[FINE]];
        Ok(Box::new(move || {
            stages.run([SIDE, SIDE], &x, None, &mut out)
        }))
    })
}
