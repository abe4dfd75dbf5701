//! Losses, as functions over tensors.

use burn::tensor::{Bool, Int, Tensor, activation};

/// The velocity as tokens, `[B, H W / p^2, p p C]` from `[B, C, H, W]`, in the order in which the
/// model gives it.
pub fn velocity_tokens(velocity: Tensor<4>, patch: usize) -> Tensor<3> {
    let [b, c, h, w] = velocity.dims();
    velocity
        .reshape([b, c, h / patch, patch, w / patch, patch])
        .permute([0, 2, 4, 3, 5, 1])
        .reshape([b, h * w / (patch * patch), patch * patch * c])
}

/// Flow matching: the mean squared error of the velocity, both `[B, T, C]`.
pub fn flow_matching(velocity: Tensor<3>, target: Tensor<3>) -> Tensor<1> {
    (velocity - target).powi_scalar(2).mean()
}

/// REPA: minus the mean cosine between projections and features of a frozen encoder, one pair of
/// `[B, T, z]` per encoder; `None` without encoders.
///
/// As the official `calc_proj_loss`, of several encoders only the last one's term stays, divided
/// by their number. Nitro-E has one.
pub fn alignment(projections: Vec<Tensor<3>>, features: &[Tensor<3>]) -> Option<Tensor<1>> {
    let unit = |x: Tensor<3>| {
        let norm = x.clone().powi_scalar(2).sum_dim(2).sqrt();
        x / norm.clamp_min(1e-12)
    };
    let (projection, feature) = projections.into_iter().zip(features).next_back()?;
    let cosine = (unit(projection) * unit(feature.clone())).sum_dim(2);
    Some(-cosine.mean() / features.len() as f64)
}

/// Mean cross entropy of `logits [N, classes]` at `targets [N]`, over those counted.
pub(crate) fn cross_entropy(
    logits: Tensor<2>,
    targets: Tensor<1, Int>,
    counted: Option<Tensor<1, Bool>>,
) -> Tensor<1> {
    let [rows, _] = logits.dims();
    let log_probs = activation::log_softmax(logits, 1);
    let picked = log_probs
        .gather(1, targets.reshape([rows, 1]))
        .reshape([rows]);
    match counted {
        Some(counted) => {
            let weights = counted.float();
            (picked * weights.clone()).sum().neg() / weights.sum()
        }
        None => picked.mean().neg(),
    }
}

/// Mean binary cross entropy of `logits` at `targets`, which are 0 or 1.
pub(crate) fn binary_cross_entropy(logits: Tensor<2>, targets: Tensor<2>) -> Tensor<1> {
    let yes = activation::log_sigmoid(logits.clone()) * targets.clone();
    let no = activation::log_sigmoid(logits.neg()) * (targets.neg() + 1.0);
    (yes + no).mean().neg()
}

/// The share of rows whose largest logit is at the target.
pub(crate) fn accuracy(logits: Tensor<2>, targets: Tensor<1, Int>) -> f64 {
    let [rows, _] = logits.dims();
    let hits = logits.argmax(1).reshape([rows]).equal(targets).float();
    f64::from(hits.mean().into_scalar::<f32>())
}
