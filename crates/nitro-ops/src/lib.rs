//! Fused tensor operations of the models, each declared once.
//!
//! An operation is a function over Burn tensors with a *composed* form, written in Burn's own
//! operations, that runs on every device and is differentiated by Burn; most have a *fused* form as
//! well, a `FusedOp` over the kernels of `nitro-kernels` with a hand-written backward pass, that
//! is taken whenever the tensors live on the CPU. Models call the function and know of neither.
//!
//! Layout is channel-last everywhere: tokens `[batch, tokens, channels]`, images
//! `[batch, height, width, channels]`. Weights keep their official PyTorch shapes.

mod attention;
mod conv;
mod cross_attention;
mod deformable;
mod elementwise;
mod fused;
mod linear;
mod norm;
mod packed;
pub mod profile;
mod resample;
mod stages;

pub use attention::{AttentionShape, Qkv, attention, joint_attention, relu_linear_attention};
pub use conv::{ConvGeometry, conv2d, conv2d_packed};
pub use cross_attention::cross_attention;
pub use deformable::deformable_attention;
pub use elementwise::{gate_residual, gelu, gelu_tanh, quick_gelu, silu, silu_gated};
pub use linear::{Activation, activate, linear};
pub use norm::{layer_norm_modulate, rms_norm};
pub use packed::{
    Adaln, ElementType, NormKind, PackedBlock, PackedBytes, PackedForm, PackedLinear, PackedStream,
    PackedTail, Rows, can_pack, linear_packed, mask_values, packed_block,
};
pub use resample::{pixel_shuffle, pixel_unshuffle, upsample_nearest_2x};
pub use stages::{
    Conv2d, EfficientVit, EfficientVitWeights, Entry, Head, KernelError, MixedScale, Norm,
    PackedConv2d, ResidualBlock, Stage, Stages, WinogradConv, WinogradForm, run_efficient_vit,
    run_stages,
};

/// How products are computed; accumulation is always `f32`.
pub use nitro_kernels::isa::Precision;
