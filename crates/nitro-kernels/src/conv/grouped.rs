//! 1 x 1 convolutions in groups: many small products side by side (the multi-scale aggregation of
//! linear attention has `3 * heads` groups of `head_dim x head_dim`).

use super::Conv2d;
use crate::error::KernelError;
use crate::gemm::{Activation, Epilogue, KernelSet, Layout, MatRef, Part, Target};
use crate::gemm::{pack_b, run_part, serial};
use crate::pool::{Line, SharedPtr, num_threads, par_for};

/// Pixels of one task.
const BLOCK_PIXELS: usize = 128;

/// The packed weights of all groups.
pub(super) struct PackedGroups {
    groups: usize,
    layout: Layout,
    /// Cache lines per group.
    pitch: usize,
    lines: Vec<Line>,
}

impl PackedGroups {
    /// For the forward pass.
    pub(super) fn forward(
        set: &KernelSet,
        conv: &Conv2d,
        weight: &[f32],
    ) -> Result<Self, KernelError> {
        PackedGroups::new(set, conv, weight, |view| view.t())
    }

    /// For the input gradient.
    pub(super) fn backward(
        set: &KernelSet,
        conv: &Conv2d,
        weight: &[f32],
    ) -> Result<Self, KernelError> {
        PackedGroups::new(set, conv, weight, |view| view)
    }

    fn new(
        set: &KernelSet,
        conv: &Conv2d,
        weight: &[f32],
        orient: impl for<'a> Fn(MatRef<'a>) -> MatRef<'a>,
    ) -> Result<Self, KernelError> {
        let (inputs, outputs) = (
            conv.in_channels / conv.groups,
            conv.out_channels / conv.groups,
        );
        let first = orient(MatRef::row_major(weight, outputs, inputs)?);
        let layout = Layout::new(set, first.rows(), first.cols());
        let pitch = layout.bytes().div_ceil(64);
        let mut lines = vec![Line([0; 16]); pitch * conv.groups];
        for (group, weight) in weight.chunks_exact(inputs * outputs).enumerate() {
            let view = orient(MatRef::row_major(weight, outputs, inputs)?);
            // SAFETY: each group has `pitch` lines, which hold `layout.bytes()` bytes.
            unsafe {
                pack_b(
                    set,
                    &layout,
                    &view,
                    lines[group * pitch..].as_mut_ptr().cast(),
                )
            };
        }
        Ok(PackedGroups {
            groups: conv.groups,
            layout,
            pitch,
            lines,
        })
    }

    /// Multiplies `pixels` pixels. The caller has checked all lengths.
    pub(super) fn run(
        &self,
        set: &KernelSet,
        x: &[f32],
        pixels: usize,
        out: &mut [f32],
        accumulate: bool,
        epilogue: Epilogue<'_>,
    ) {
        let (inputs, outputs) = (self.layout.k, self.layout.n);
        let (in_pixel, out_pixel) = (inputs * self.groups, outputs * self.groups);
        if pixels == 0 || outputs == 0 {
            return;
        }
        let bias = SharedPtr(
            epilogue
                .bias
                .map_or(std::ptr::null_mut(), |b| b.as_ptr().cast_mut()),
        );
        let activation = epilogue.activation;
        let pre = epilogue
            .pre_activation
            .map_or(std::ptr::null_mut(), |p| p.as_mut_ptr());
        let (out, pre) = (SharedPtr(out.as_mut_ptr()), SharedPtr(pre));
        let blocks = pixels.div_ceil(BLOCK_PIXELS);
        // Where there are few pixels, the groups are shared out too.
        let parts = (2 * num_threads()).div_ceil(blocks).min(self.groups);
        par_for(blocks * parts, |task| {
            let (block, part) = (task / parts, task % parts);
            let rows = block * BLOCK_PIXELS..((block + 1) * BLOCK_PIXELS).min(pixels);
            for group in self.groups * part / parts..self.groups * (part + 1) / parts {
                let x = &x[group * inputs..];
                let Ok(a) = MatRef::new(x, pixels, inputs, in_pixel, 1) else {
                    continue;
                };
                let shift = |p: *mut f32| {
                    if p.is_null() {
                        p
                    } else {
                        p.wrapping_add(group * outputs)
                    }
                };
                let target = Target {
                    m: pixels,
                    n: outputs,
                    c: SharedPtr(shift(out.get())),
                    ldc: out_pixel,
                    accumulate,
                    bias: SharedPtr(shift(bias.get())),
                    activation,
                    pre_activation: SharedPtr(shift(pre.get())),
                };
                let part = Part {
                    rows: rows.clone(),
                    panels: 0..self.layout.panels(),
                };
                let packed = self.lines[group * self.pitch..].as_ptr().cast();
                // SAFETY: `packed` holds the group's weights in `layout`; each task owns its pixels
                // of its groups.
                unsafe { run_part(set, &self.layout, packed, &a, &target, part) };
            }
        });
    }
}

/// The weight gradient: `[outputs, inputs]` for each group.
pub(super) fn backward_weight(
    set: &KernelSet,
    conv: &Conv2d,
    x: &[f32],
    grad_out: &[f32],
    grad_weight: &mut [f32],
    accumulate: bool,
) -> Result<(), KernelError> {
    let (inputs, outputs) = (
        conv.in_channels / conv.groups,
        conv.out_channels / conv.groups,
    );
    let pixels = conv.pixels_in();
    if pixels == 0 {
        if !accumulate {
            grad_weight.fill(0.0);
        }
        return Ok(());
    }
    // Checked once here, so that the tasks below cannot fail.
    MatRef::row_major(x, pixels, conv.in_channels)?;
    MatRef::row_major(grad_out, pixels, conv.out_channels)?;
    let grad = SharedPtr(grad_weight.as_mut_ptr());
    par_for(conv.groups, |group| {
        let x = MatRef::new(&x[group * inputs..], pixels, inputs, conv.in_channels, 1);
        let dy = MatRef::new(
            &grad_out[group * outputs..],
            pixels,
            outputs,
            conv.out_channels,
            1,
        );
        let (Ok(x), Ok(dy)) = (x, dy) else { return };
        let target = Target {
            m: outputs,
            n: inputs,
            c: SharedPtr(grad.get().wrapping_add(group * outputs * inputs)),
            ldc: inputs,
            accumulate,
            bias: SharedPtr(std::ptr::null_mut()),
            activation: Activation::None,
            pre_activation: SharedPtr(std::ptr::null_mut()),
        };
        // SAFETY: each group owns its part of the gradient.
        unsafe { serial(set, dy.t(), x, &target) };
    });
    Ok(())
}
