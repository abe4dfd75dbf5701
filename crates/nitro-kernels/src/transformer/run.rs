//! The phases of a block.

use super::phases::timed;
use super::{BlockConfig, BlockStream, BlockTail, NormKind, check};
use crate::attention::{HeadOutput, HeadStream, Heads};
use crate::error::KernelError;
use crate::gemm::{Activation, KernelSet, LANES};
use crate::norm::forward_rows;
use crate::packed::{
    Activations, Format, PACK_ROWS, PackedLinear, Product, Sink, pack_task, pack_tasks,
};
use crate::pool::{Scratch, SharedPtr, par_phases};
use crate::simd::Level;

/// The phases; [`Phase::QuantizeHeads`] and [`Phase::QuantizeHidden`] have tasks with integers only.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Norm1,
    Qkv,
    Attend,
    QuantizeHeads,
    Out,
    Norm2,
    Up,
    QuantizeHidden,
    Down,
}

const PHASES: [Phase; 9] = [
    Phase::Norm1,
    Phase::Qkv,
    Phase::Attend,
    Phase::QuantizeHeads,
    Phase::Out,
    Phase::Norm2,
    Phase::Up,
    Phase::QuantizeHidden,
    Phase::Down,
];

/// Runs a block: every stream's `x` becomes `x + gate * out(attention(norm1(x)))` and then
/// `x + gate * down(activation(up(norm2(x))))`; a stream without a tail is left as it is.
///
/// # Errors
/// If shapes disagree, layers are packed differently, or the attention's kind is not supported.
pub fn transformer_block(
    cfg: &BlockConfig<'_>,
    streams: &mut [BlockStream<'_>],
) -> Result<(), KernelError> {
    let width = check(cfg, streams)?;
    let batch = cfg.attention.batch;
    let set = streams[0].qkv.set();
    let format = streams[0].qkv.format();
    let work: Vec<Work<'_>> = streams
        .iter_mut()
        .map(|stream| Work::new(cfg, stream, width, &set, format))
        .collect();
    let heads: Vec<HeadStream<'_>> = work.iter().map(|work| work.heads()).collect();
    let attention = Heads::new(
        &set,
        cfg.attention,
        &heads,
        cfg.head_eps,
        cfg.rotary,
        cfg.key_mask,
    );
    if batch == 0 || width == 0 {
        return Ok(());
    }

    // A phase is the tasks of the first stream, then those of the second.
    let tasks_of = |phase: Phase, work: &Work<'_>| match phase {
        Phase::Attend => 0,
        _ => work.tasks(phase),
    };
    let counts = PHASES.map(|phase| match phase {
        Phase::Attend => attention.units(),
        _ => work.iter().map(|work| tasks_of(phase, work)).sum(),
    });
    par_phases(&counts, |at, mut task| {
        let phase = PHASES[at];
        timed(at, || {
            if phase == Phase::Attend {
                // SAFETY: the projections are complete; units write disjoint parts of the outputs.
                unsafe { attention.run(task) };
                return;
            }
            for work in &work {
                let count = tasks_of(phase, work);
                if task < count {
                    // SAFETY: all earlier phases are complete, and tasks of a phase write disjoint
                    // parts.
                    unsafe { work.run(phase, task) };
                    return;
                }
                task -= count;
            }
        });
    });
    Ok(())
}

/// A stream with its buffers.
struct Work<'a> {
    x: SharedPtr<f32>,
    width: usize,
    tokens: usize,
    rows: usize,
    norm: NormKind,
    eps: [f32; 2],
    activation: Activation,
    level: Level,
    head_norms: Option<(&'a [f32], &'a [f32])>,
    /// Gain and offset of both norms, modulation included: `[norm][gain or offset][samples, width]`.
    affine: [[Vec<f32>; 2]; 2],
    modulation: Option<&'a [f32]>,
    /// The normalised input of the layers.
    normed: Activations,
    /// Queries, keys and values: `[heads, rows, head_dim]`, so that the attention reads each head's
    /// rows one after the other; `[rows, heads * head_dim]` where heads are no whole vectors.
    qkv: SharedPtr<f32>,
    qkv_product: Product<'a>,
    qkv_width: usize,
    head_dim: usize,
    tail: Option<TailWork<'a>>,
    _memory: Scratch,
}

/// Buffers and products after the attention.
struct TailWork<'a> {
    attended: Activations,
    hidden: Activations,
    /// f32 rows on their way to `attended` or `hidden`, where these are integers.
    raw: SharedPtr<f32>,
    _raw_memory: Scratch,
    out: Product<'a>,
    up: Product<'a>,
    down: Product<'a>,
}

impl<'a> Work<'a> {
    fn new(
        cfg: &BlockConfig<'_>,
        stream: &mut BlockStream<'a>,
        width: usize,
        set: &KernelSet,
        format: Format,
    ) -> Self {
        let batch = cfg.attention.batch;
        let rows = batch * stream.tokens;
        let qkv_width = stream.qkv.outputs();
        let mut memory = Scratch::take(rows * qkv_width * 4);
        let norm2 = stream.tail.map_or([None, None], |tail| tail.norm2);
        let affine = |norm, part| affine(norm, stream.modulation, part, batch, width);
        Work {
            x: SharedPtr(stream.x.as_mut_ptr()),
            width,
            tokens: stream.tokens,
            rows,
            norm: cfg.norm,
            eps: cfg.eps,
            activation: cfg.activation,
            level: Level::of(set.isa),
            head_norms: stream.head_norms,
            affine: [affine(stream.norm1, 0), affine(norm2, 3)],
            modulation: stream.modulation,
            normed: Activations::take(set, format, rows, width),
            qkv: SharedPtr(memory.as_mut_ptr().cast()),
            qkv_product: Product::new(stream.qkv, rows).before(stream.tail.map(|tail| tail.out)),
            qkv_width,
            head_dim: cfg.attention.head_dim,
            tail: stream.tail.map(|tail| TailWork::new(&tail, rows, set)),
            _memory: memory,
        }
    }

    fn heads(&self) -> HeadStream<'_> {
        let (pitch, head_pitch) = match self.has_split_heads() {
            true => (self.head_dim, self.rows * self.head_dim),
            false => (self.qkv_width, self.head_dim),
        };
        HeadStream {
            qkv: self.qkv,
            pitch,
            head_pitch,
            tokens: self.tokens,
            norms: self.head_norms,
            out: match &self.tail {
                None => HeadOutput::Nowhere,
                Some(tail) => match tail.raw_for(&tail.attended) {
                    Some(raw) => HeadOutput::Store(raw),
                    None => HeadOutput::Pack(&tail.attended),
                },
            },
        }
    }

    fn has_split_heads(&self) -> bool {
        self.head_dim.is_multiple_of(LANES)
    }

    fn tasks(&self, phase: Phase) -> usize {
        let pack = pack_tasks(self.rows);
        match (phase, &self.tail) {
            (Phase::Norm1, _) => pack,
            (Phase::Qkv, _) => self.qkv_product.tasks(),
            (_, None) | (Phase::Attend, _) => 0,
            (Phase::QuantizeHeads, Some(tail)) => tail.raw_for(&tail.attended).map_or(0, |_| pack),
            (Phase::QuantizeHidden, Some(tail)) => tail.raw_for(&tail.hidden).map_or(0, |_| pack),
            (Phase::Norm2, Some(_)) => pack,
            (Phase::Out, Some(tail)) => tail.out.tasks(),
            (Phase::Up, Some(tail)) => tail.up.tasks(),
            (Phase::Down, Some(tail)) => tail.down.tasks(),
        }
    }

    /// # Safety
    /// All earlier phases must be complete; each task of a phase may run once.
    unsafe fn run(&self, phase: Phase, task: usize) {
        // SAFETY: the caller's contract; buffers hold `rows` rows of the widths they are used with,
        // since the shapes were checked.
        unsafe {
            match (phase, &self.tail) {
                (Phase::Norm1, _) => self.normalise(0, task),
                (Phase::Qkv, _) => {
                    let sink = match self.has_split_heads() {
                        true => Sink::Heads {
                            out: self.qkv,
                            dim: self.head_dim,
                            head_pitch: self.rows * self.head_dim,
                        },
                        false => Sink::Store {
                            out: self.qkv,
                            pitch: self.qkv_width,
                            activation: Activation::None,
                        },
                    };
                    self.qkv_product.run(task, &self.normed, &sink);
                }
                (Phase::Norm2, Some(_)) => self.normalise(1, task),
                (Phase::Out, Some(tail)) => {
                    tail.out.run(task, &tail.attended, &self.residual(2));
                }
                (Phase::Down, Some(tail)) => {
                    tail.down.run(task, &tail.hidden, &self.residual(5));
                }
                (Phase::Up, Some(tail)) => match tail.raw_for(&tail.hidden) {
                    Some(raw) => {
                        let sink = Sink::Store {
                            out: raw,
                            pitch: tail.hidden.k,
                            activation: self.activation,
                        };
                        tail.up.run(task, &self.normed, &sink);
                    }
                    None => {
                        let sink = Sink::Pack {
                            to: &tail.hidden,
                            activation: self.activation,
                        };
                        tail.up.run(task, &self.normed, &sink);
                    }
                },
                (Phase::QuantizeHeads, Some(tail)) => self.quantize(tail, &tail.attended, task),
                (Phase::QuantizeHidden, Some(tail)) => self.quantize(tail, &tail.hidden, task),
                (Phase::Attend, _) | (_, None) => {}
            }
        }
    }

    /// Adds a layer's output to the stream, through the gate at place `part` of the modulation.
    fn residual(&self, part: usize) -> Sink<'_> {
        Sink::Residual {
            x: self.x,
            pitch: self.width,
            gate: self.modulation.map(|m| &m[part * self.width..]),
            gate_pitch: 6 * self.width,
            tokens: self.tokens,
        }
    }

    /// # Safety
    /// As [`Work::run`]: rows of `x` must be complete.
    unsafe fn normalise(&self, which: usize, task: usize) {
        let [gain, offset] = &self.affine[which];
        let task = pack_task(task, self.rows);
        let mut normed = Scratch::take(task.len() * self.width * 4);
        let (mut mean, mut deviation) = ([0.0; PACK_ROWS], [0.0; PACK_ROWS]);
        let mut first = task.start;
        while first < task.end {
            // Rows of one sample share a gain.
            let sample = first / self.tokens;
            let end = task.end.min((sample + 1) * self.tokens);
            let count = end - first;
            // Without modulation all samples do.
            let at = (sample * self.width) % gain.len().max(1);
            // SAFETY: `x` holds all rows, and nobody writes them in this phase; the scratch holds the
            // task's rows.
            let (x, normed) = unsafe {
                let x = self.x.get().add(first * self.width).cast_const();
                (
                    std::slice::from_raw_parts(x, count * self.width),
                    std::slice::from_raw_parts_mut(
                        normed.as_mut_ptr().cast::<f32>(),
                        count * self.width,
                    ),
                )
            };
            let mean = match self.norm {
                NormKind::Layer => &mut mean[..count],
                NormKind::Rms => &mut [],
            };
            forward_rows(
                self.level,
                x,
                &gain[at..][..self.width],
                &offset[at..][..self.width],
                self.eps[which],
                normed,
                mean,
                &mut deviation[..count],
            );
            for (row, normed) in (first..end).zip(normed.chunks_exact(self.width)) {
                // SAFETY: each task packs its own rows.
                unsafe { self.normed.write_row(row, normed) };
            }
            first = end;
        }
    }

    /// # Safety
    /// As [`Work::run`]: the raw rows must be complete.
    unsafe fn quantize(&self, tail: &TailWork<'_>, to: &Activations, task: usize) {
        let Some(raw) = tail.raw_for(to) else { return };
        for row in pack_task(task, self.rows) {
            // SAFETY: the raw buffer holds rows of the wider of both layers' inputs.
            unsafe {
                let at = raw.get().add(row * to.k).cast_const();
                to.write_row(row, std::slice::from_raw_parts(at, to.k));
            }
        }
    }
}

impl<'a> TailWork<'a> {
    /// Where rows on their way to `to` lie meanwhile, if they do not go there at once.
    fn raw_for(&self, to: &Activations) -> Option<SharedPtr<f32>> {
        (to.format == Format::Int8).then_some(self.raw)
    }

    fn new(tail: &BlockTail<'a>, rows: usize, set: &KernelSet) -> Self {
        let take =
            |layer: &PackedLinear| Activations::take(set, layer.format(), rows, layer.inputs());
        let raw = |layer: &PackedLinear| match layer.format() {
            Format::Int8 => layer.inputs(),
            Format::Float => 0,
        };
        let mut memory = Scratch::take(rows * raw(tail.out).max(raw(tail.down)) * 4);
        TailWork {
            attended: take(tail.out),
            hidden: take(tail.down),
            raw: SharedPtr(memory.as_mut_ptr().cast()),
            _raw_memory: memory,
            out: Product::new(tail.out, rows).before(Some(tail.up)),
            up: Product::new(tail.up, rows)
                .gated(tail.gate)
                .before(Some(tail.down)),
            down: Product::new(tail.down, rows),
        }
    }
}

/// Gain and offset of a norm under AdaLN: `weight (1 + scale)` and `bias (1 + scale) + shift`, with
/// shift and scale at places `part` and `part + 1` of the modulation; of each sample where there is
/// modulation, else one for all.
fn affine(
    [weights, biases]: [Option<&[f32]>; 2],
    modulation: Option<&[f32]>,
    part: usize,
    batch: usize,
    width: usize,
) -> [Vec<f32>; 2] {
    let Some(modulation) = modulation else {
        return [
            weights.map_or_else(|| vec![1.0; width], <[f32]>::to_vec),
            biases.map_or_else(|| vec![0.0; width], <[f32]>::to_vec),
        ];
    };
    let (mut gains, mut offsets) = (
        Vec::with_capacity(batch * width),
        Vec::with_capacity(batch * width),
    );
    for sample in modulation.chunks_exact(6 * width) {
        let shift = &sample[part * width..][..width];
        let scale = &sample[(part + 1) * width..][..width];
        match weights {
            Some(weight) => gains.extend(weight.iter().zip(scale).map(|(w, s)| w * (1.0 + s))),
            None => gains.extend(scale.iter().map(|s| 1.0 + s)),
        }
        match biases {
            Some(bias) => offsets.extend(
                (bias.iter().zip(scale).zip(shift)).map(|((b, s), shift)| b * (1.0 + s) + shift),
            ),
            None => offsets.extend_from_slice(shift),
        }
    }
    [gains, offsets]
}
