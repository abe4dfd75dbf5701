//! The fine stages of a convolutional autoencoder, run in bands of rows.
//!
//! A picture at full resolution has more values than any cache, and a dozen layers over it would read
//! and write main memory a dozen times. Here each layer runs a band of rows as soon as the layer before
//! it has finished enough of them, and rows are dropped when nothing needs them any more. Memory is
//! bounded by the width of the picture, and the result is the same to the last bit for bands of any
//! height: every layer computes the same tiles.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Mutex;

use super::norm::{Norm, norm_rows};
use super::winograd::{Finish, ImageRows, WinogradConv, WinogradForm};
use super::{Conv2d, PackedConv2d, shortcut};
use crate::error::{KernelError, check_eq};
use crate::gemm::{Activation, Epilogue};
use crate::packed::memory::Floats;
use crate::pool::num_threads;
use crate::simd::Level;

/// Rows of outputs are computed in multiples of this many: the larger tile of [`WinogradConv`].
const BAND: usize = 4;

/// `x + norm(conv2(activation(conv1(x))))`, both convolutions 3x3.
#[derive(Debug)]
pub struct ResidualBlock {
    /// The first convolution.
    pub conv1: WinogradConv,
    /// Its bias.
    pub bias1: Vec<f32>,
    /// Between the convolutions.
    pub activation: Activation,
    /// The second convolution, without bias.
    pub conv2: WinogradConv,
    /// The RMS norm.
    pub norm: Norm,
}

/// How a stage gets its image from the one before.
#[derive(Debug)]
pub enum Entry {
    /// As it is, with this many channels.
    Same(usize),
    /// A dense convolution with stride 1 or 2 and its bias. With a shortcut, the input is added: each
    /// 2 x 2 block of pixels moved to channels, and runs of channels averaged.
    Conv {
        /// The convolution.
        conv: PackedConv2d,
        /// Its bias.
        bias: Vec<f32>,
        /// Whether the input is added.
        shortcut: bool,
    },
    /// Doubled by repeating pixels, then a 3x3 convolution. With a shortcut, the input is added:
    /// channels repeated, and moved to 2 x 2 blocks of pixels.
    Doubled {
        /// The convolution, of the form [`WinogradForm::Doubled`].
        conv: WinogradConv,
        /// Its bias.
        bias: Vec<f32>,
        /// Whether the input is added.
        shortcut: bool,
    },
}

/// An entry and residual blocks at one resolution.
#[derive(Debug)]
pub struct Stage {
    /// How the image gets here.
    pub entry: Entry,
    /// What is done to it.
    pub blocks: Vec<ResidualBlock>,
}

/// The end of a decoder: `conv(activation(norm(x)))`.
#[derive(Debug)]
pub struct Head {
    /// The RMS norm.
    pub norm: Norm,
    /// After the norm.
    pub activation: Activation,
    /// A dense convolution of stride 1.
    pub conv: PackedConv2d,
    /// Its bias.
    pub bias: Vec<f32>,
}

/// Stages one after the other, and perhaps a head.
#[derive(Debug)]
pub struct Stages {
    stages: Vec<Stage>,
    head: Option<Head>,
    /// Memory of earlier runs, in the order in which it is taken.
    spare: Mutex<VecDeque<Floats>>,
}

impl Entry {
    fn inputs(&self) -> usize {
        match self {
            Self::Same(channels) => *channels,
            Self::Conv { conv, .. } => conv.conv.in_channels,
            Self::Doubled { conv, .. } => conv.inputs(),
        }
    }

    fn outputs(&self) -> usize {
        match self {
            Self::Same(channels) => *channels,
            Self::Conv { conv, .. } => conv.conv.out_channels,
            Self::Doubled { conv, .. } => conv.outputs(),
        }
    }

    /// Size of the image it makes.
    fn size(&self, [height, width]: [usize; 2]) -> [usize; 2] {
        match self {
            Self::Same(_) => [height, width],
            Self::Conv { conv, .. } => {
                let conv = Conv2d {
                    height,
                    width,
                    ..conv.conv
                };
                [conv.out_height(), conv.out_width()]
            }
            Self::Doubled { .. } => [2 * height, 2 * width],
        }
    }

    /// Input rows that output rows need, of an input of `height` rows.
    fn needed(&self, rows: Range<usize>, height: usize) -> Range<usize> {
        match self {
            Self::Same(_) => rows,
            Self::Conv { conv, .. } => conv.rows_needed(rows, height),
            Self::Doubled { conv, .. } => conv.rows_needed(rows, height),
        }
    }

    /// Output rows `rows`, from an input of `size`.
    fn run(
        &self,
        size: [usize; 2],
        input: ImageRows<'_>,
        rows: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), KernelError> {
        match self {
            Self::Same(channels) => {
                let row = size[1] * channels;
                let from = (rows.start - input.first) * row;
                out.copy_from_slice(&input.data[from..from + out.len()]);
                Ok(())
            }
            Self::Conv {
                conv,
                bias,
                shortcut,
            } => {
                if *shortcut {
                    let channels = [conv.conv.in_channels, conv.conv.out_channels];
                    shortcut::averaged(size[1], channels, input, rows.clone(), out);
                }
                let epilogue = Epilogue::bias(Some(bias));
                conv.forward_rows(size, input, rows, out, *shortcut, epilogue)
            }
            Self::Doubled {
                conv,
                bias,
                shortcut,
            } => {
                let finish = if *shortcut {
                    let channels = [conv.inputs(), conv.outputs()];
                    shortcut::repeated(size[1], channels, input, rows.clone(), out);
                    Finish::Add { bias: Some(bias) }
                } else {
                    Finish::Store {
                        bias: Some(bias),
                        activation: Activation::None,
                    }
                };
                conv.forward(size, input, rows, out, finish)
            }
        }
    }

    fn check(&self) -> Result<(), KernelError> {
        match self {
            Self::Same(_) => Ok(()),
            Self::Conv {
                conv,
                bias,
                shortcut,
            } => {
                let Conv2d {
                    in_channels,
                    out_channels,
                    stride,
                    ..
                } = conv.conv;
                check_eq("stage entry: bias values", out_channels, bias.len())?;
                if *shortcut {
                    check_eq("stage entry: stride with a shortcut", 2, stride)?;
                    let rest = 4 * in_channels % out_channels;
                    check_eq("stage entry: shortcut channels left over", 0, rest)?;
                }
                Ok(())
            }
            Self::Doubled {
                conv,
                bias,
                shortcut,
            } => {
                let doubled = usize::from(conv.form() == WinogradForm::Doubled);
                check_eq("stage entry: doubled form", 1, doubled)?;
                check_eq("stage entry: bias values", conv.outputs(), bias.len())?;
                if *shortcut {
                    let rest = 4 * conv.outputs() % conv.inputs();
                    check_eq("stage entry: shortcut channels left over", 0, rest)?;
                }
                Ok(())
            }
        }
    }
}

impl ResidualBlock {
    fn check(&self, channels: usize) -> Result<(), KernelError> {
        for conv in [&self.conv1, &self.conv2] {
            let same = usize::from(conv.form() == WinogradForm::Same);
            check_eq("residual block: form of the same size", 1, same)?;
            check_eq("residual block: input channels", channels, conv.inputs())?;
            check_eq("residual block: output channels", channels, conv.outputs())?;
        }
        check_eq("residual block: bias values", channels, self.bias1.len())?;
        self.norm.check(channels)
    }
}

impl Stages {
    /// Puts stages together, the first one first.
    ///
    /// # Errors
    /// If channels of one do not fit the next, or biases and norms have other lengths.
    pub fn new(stages: Vec<Stage>, head: Option<Head>) -> Result<Self, KernelError> {
        let mut channels = stages.first().map_or(0, |stage| stage.entry.inputs());
        for stage in &stages {
            check_eq("stages: channels", channels, stage.entry.inputs())?;
            stage.entry.check()?;
            channels = stage.entry.outputs();
            stage
                .blocks
                .iter()
                .try_for_each(|block| block.check(channels))?;
        }
        if let Some(head) = &head {
            check_eq("head: channels", channels, head.conv.conv.in_channels)?;
            check_eq("head: stride", 1, head.conv.conv.stride)?;
            head.norm.check(channels)?;
            check_eq("head: bias", head.conv.conv.out_channels, head.bias.len())?;
        }
        Ok(Self {
            stages,
            head,
            spare: Mutex::default(),
        })
    }

    /// Channels of the image that the first stage takes.
    pub fn inputs(&self) -> usize {
        self.stages.first().map_or(0, |stage| stage.entry.inputs())
    }

    /// Channels of the result.
    pub fn outputs(&self) -> usize {
        match (&self.head, self.stages.last()) {
            (Some(head), _) => head.conv.conv.out_channels,
            (None, Some(stage)) => stage.entry.outputs(),
            (None, None) => 0,
        }
    }

    /// Height and width of the result for an input of `size`.
    pub fn output_size(&self, size: [usize; 2]) -> [usize; 2] {
        self.stages
            .iter()
            .fold(size, |size, stage| stage.entry.size(size))
    }

    /// Floating-point operations of one run over an image of this size, all convolutions counted as
    /// direct ones (two per multiply-add).
    pub fn flop(&self, size: [usize; 2]) -> f64 {
        let (mut size, mut total) = (size, 0.0);
        for stage in &self.stages {
            let [height, width] = size;
            total += match &stage.entry {
                Entry::Same(_) => 0.0,
                Entry::Conv { conv, .. } => conv.flop([1, height, width]),
                Entry::Doubled { conv, .. } => conv.flop(size),
            };
            size = stage.entry.size(size);
            let blocks = stage.blocks.iter();
            total += blocks
                .map(|b| b.conv1.flop(size) + b.conv2.flop(size))
                .sum::<f64>();
        }
        let head = self.head.as_ref();
        total + head.map_or(0.0, |head| head.conv.flop([1, size[0], size[1]]))
    }

    /// Runs all stages over one image `x` (`[height, width, channels]`); `out` has
    /// [`output_size`](Self::output_size) times [`outputs`](Self::outputs) values. Bands of `rows` rows
    /// are kept in memory at a time, or as many as run fastest.
    ///
    /// # Errors
    /// If a slice has another length than its shape.
    pub fn run(
        &self,
        size: [usize; 2],
        x: &[f32],
        rows: Option<usize>,
        out: &mut [f32],
    ) -> Result<(), KernelError> {
        let [height, width] = size;
        let count = height.saturating_mul(width).saturating_mul(self.inputs());
        check_eq("stages: input elements", count, x.len())?;
        let [out_height, out_width] = self.output_size(size);
        let out_row = out_width * self.outputs();
        check_eq("stages: output elements", out_height * out_row, out.len())?;
        if x.is_empty() || out.is_empty() {
            return Ok(());
        }
        let mut running = Vec::with_capacity(self.stages.len());
        let mut at = size;
        for stage in &self.stages {
            let from = at;
            at = stage.entry.size(at);
            running.push(Running::new(stage, from, at, rows, &self.spare));
        }
        let mut head = self
            .head
            .as_ref()
            .map(|_| Window::new(out_width * self.channels(), &self.spare));
        let mut done = 0;
        while done < out_height {
            let chunk = running.last().map_or(BAND, |last| last.chunk);
            let next = (done + chunk).min(out_height);
            let band = &mut out[done * out_row..next * out_row];
            match (&self.head, &mut head) {
                (Some(head), Some(normed)) => {
                    let needed = head.conv.rows_needed(done..next, out_height);
                    advance(&mut running, x, needed.end)?;
                    if let Some(last) = running.last_mut() {
                        let from = normed.end;
                        let source = last.x.rows(from..needed.end);
                        normed.drop_before(needed.start);
                        let target = normed.append(needed.end - from);
                        norm_rows(Level::active(), &head.norm, head.activation, source, target);
                        last.release(needed.end);
                    }
                    let input = normed.image();
                    let epilogue = Epilogue::bias(Some(&head.bias));
                    let size = [out_height, out_width];
                    head.conv
                        .forward_rows(size, input, done..next, band, false, epilogue)?;
                }
                _ => {
                    advance(&mut running, x, next)?;
                    if let Some(last) = running.last_mut() {
                        band.copy_from_slice(last.x.rows(done..next));
                        last.release(next);
                    }
                }
            }
            done = next;
        }
        let windows = running.into_iter().flat_map(|running| {
            let Running { x, ys, .. } = running;
            std::iter::once(x).chain(ys)
        });
        if let Ok(mut spare) = self.spare.lock() {
            spare.extend(windows.chain(head).map(|window| window.data));
        }
        Ok(())
    }

    /// Channels of the last stage.
    fn channels(&self) -> usize {
        self.stages.last().map_or(0, |stage| stage.entry.outputs())
    }
}

/// Consecutive rows of an image.
#[derive(Debug)]
struct Window {
    data: Floats,
    /// Values of a row.
    row: usize,
    /// The image's row at the front of `data`; those before `first` are no longer needed.
    start: usize,
    first: usize,
    end: usize,
}

impl Window {
    fn new(row: usize, spare: &Mutex<VecDeque<Floats>>) -> Self {
        let data = spare.lock().ok().and_then(|mut spare| spare.pop_front());
        Self {
            data: data.unwrap_or_default(),
            row,
            start: 0,
            first: 0,
            end: 0,
        }
    }

    fn drop_before(&mut self, row: usize) {
        self.first = row.clamp(self.first, self.end);
    }

    /// `count` more rows, with arbitrary values.
    fn append(&mut self, count: usize) -> &mut [f32] {
        let held = (self.end - self.start) * self.row;
        if held + count * self.row > self.data.len() {
            let (from, kept) = (self.first - self.start, self.end - self.first);
            let kept = kept * self.row;
            let wanted = kept + count * self.row;
            // Moved to the front, or, where that would soon have to be done again, to more room.
            if 2 * wanted > self.data.len() + kept {
                let mut data = Floats::new(2 * wanted);
                data[..kept].copy_from_slice(&self.data[from * self.row..][..kept]);
                self.data = data;
            } else {
                self.data.copy_within(from * self.row..held, 0);
            }
            self.start = self.first;
        }
        let from = (self.end - self.start) * self.row;
        self.end += count;
        &mut self.data[from..from + count * self.row]
    }

    fn rows(&self, rows: Range<usize>) -> &[f32] {
        &self.data[(rows.start - self.start) * self.row..(rows.end - self.start) * self.row]
    }

    fn rows_mut(&mut self, rows: Range<usize>) -> &mut [f32] {
        &mut self.data[(rows.start - self.start) * self.row..(rows.end - self.start) * self.row]
    }

    fn image(&self) -> ImageRows<'_> {
        ImageRows {
            data: &self.data[..(self.end - self.start) * self.row],
            first: self.start,
        }
    }
}

/// A stage at work.
struct Running<'a> {
    stage: &'a Stage,
    /// Size of the entry's input, and of the stage's image.
    from: [usize; 2],
    size: [usize; 2],
    /// Rows taken in at a time.
    chunk: usize,
    /// The stage's image: rows are entered at the end and changed in place by one block after the
    /// other, each some rows behind the one before.
    x: Window,
    /// For each block, the image between its convolutions.
    ys: Vec<Window>,
    /// For each block, how many rows of `x` it has finished.
    finished: Vec<usize>,
}

impl<'a> Running<'a> {
    fn new(
        stage: &'a Stage,
        from: [usize; 2],
        size: [usize; 2],
        rows: Option<usize>,
        spare: &Mutex<VecDeque<Floats>>,
    ) -> Self {
        let row = size[1] * stage.entry.outputs();
        let chunk = rows.unwrap_or_else(|| {
            // Transformed weights are read once per band; bands large enough to outweigh them.
            let weights = stage.blocks.iter().map(|block| block.conv1.weight_bytes());
            let weights = weights.max().unwrap_or(0);
            let outweighing = weights.div_ceil(2 * 4 * row);
            // And four tasks for every thread.
            let tiles = 4 * 32 * num_threads();
            outweighing.max(BAND * tiles.div_ceil(size[1].div_ceil(BAND)))
        });
        Self {
            stage,
            from,
            size,
            chunk: chunk.max(1).next_multiple_of(BAND),
            x: Window::new(row, spare),
            ys: stage
                .blocks
                .iter()
                .map(|_| Window::new(row, spare))
                .collect(),
            finished: vec![0; stage.blocks.len()],
        }
    }

    /// Rows of the image that all blocks have finished.
    fn done(&self) -> usize {
        self.finished.last().copied().unwrap_or(self.x.end)
    }

    /// Drops rows before `row` that no block needs.
    fn release(&mut self, row: usize) {
        // The last block is behind all others, and the row before its next one is still read.
        let done = self.done();
        let needed = if done == self.size[0] {
            done
        } else {
            done.saturating_sub(1)
        };
        self.x.drop_before(row.min(needed));
    }

    /// Runs the blocks as far as rows allow.
    fn blocks(&mut self) -> Result<(), KernelError> {
        let [height, _] = self.size;
        // A band of output rows needs one more row of input, unless the image ends there.
        let reach = |have: usize| {
            if have == height {
                height
            } else {
                have.saturating_sub(1) / BAND * BAND
            }
        };
        let mut have = self.x.end;
        for (i, block) in self.stage.blocks.iter().enumerate() {
            let y = &mut self.ys[i];
            let to = reach(have);
            if to > y.end {
                let rows = y.end..to;
                let out = y.append(rows.len());
                let finish = Finish::Store {
                    bias: Some(&block.bias1),
                    activation: block.activation,
                };
                let input = self.x.image();
                block.conv1.forward(self.size, input, rows, out, finish)?;
            }
            let (from, to) = (self.finished[i], reach(y.end));
            if to > from {
                let finish = Finish::AddNorm {
                    weight: &block.norm.weight,
                    bias: &block.norm.bias,
                    eps: block.norm.eps,
                };
                // The next rows of `conv1` begin behind these, so they may change now.
                let out = self.x.rows_mut(from..to);
                block
                    .conv2
                    .forward(self.size, y.image(), from..to, out, finish)?;
                self.finished[i] = to;
                y.drop_before(to.saturating_sub(1));
            }
            have = self.finished[i];
        }
        Ok(())
    }
}

/// Runs stages until the last one has finished `target` rows.
fn advance(stages: &mut [Running<'_>], x: &[f32], target: usize) -> Result<(), KernelError> {
    let Some((last, before)) = stages.split_last_mut() else {
        return Ok(());
    };
    while last.done() < target {
        let to = (last.x.end + last.chunk).min(last.size[0]);
        let rows = last.x.end..to;
        let entry = &last.stage.entry;
        let needed = entry.needed(rows.clone(), last.from[0]);
        if !before.is_empty() {
            advance(before, x, needed.end)?;
        }
        let input = match before.last() {
            Some(before) => before.x.image(),
            None => ImageRows { data: x, first: 0 },
        };
        let out = last.x.append(rows.len());
        entry.run(last.from, input, rows.clone(), out)?;
        if let Some(before) = before.last_mut() {
            let next = entry.needed(rows.end..rows.end, last.from[0]).start;
            before.release(next);
        }
        last.blocks()?;
    }
    Ok(())
}

#[cfg(test)]
#[path = "stages_tests.rs"]
mod tests;
