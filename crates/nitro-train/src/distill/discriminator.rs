//! The discriminator: the frozen teacher's features at some blocks, a small trained head on each.

use burn::tensor::{Tensor, activation};
use nitro_models::emmdit::Emmdit;
use nitro_models::layers::Linear;
use nitro_models::{Params, WeightError};
use nitro_ops::layer_norm_modulate;

use super::config::{AdversarialLoss, DiscriminatorConfig};
use crate::TrainError;

/// What its parameters' names begin with.
pub(crate) const PREFIX: &str = "discriminator.";

/// The heads. Each normalises a block's image tokens and judges every token: `D -> hidden`, leaky
/// ReLU, `-> 1`.
///
/// AMD says of its own only "frozen E-MMDiT and random heads" (Nitro-E) and "a light MLP head"
/// (Nitro-AR); heads over single tokens fit the middle blocks, whose tokens are of two grids one after
/// the other, so that a convolution along them would cross a seam.
pub(crate) struct Heads {
    heads: Vec<[Linear; 2]>,
}

impl Heads {
    /// The heads with parameters `discriminator.BLOCK.{0,2}`.
    pub(crate) fn new(
        config: &DiscriminatorConfig,
        width: usize,
        p: &Params<'_>,
    ) -> Result<Self, WeightError> {
        let head = |block: &usize| -> Result<[Linear; 2], WeightError> {
            let p = p.sub(format_args!("{PREFIX}{block}"));
            Ok([
                Linear::new(&p.sub(0), width, config.hidden)?,
                Linear::new(&p.sub(2), config.hidden, 1)?,
            ])
        };
        Ok(Self {
            heads: config.blocks.iter().map(head).collect::<Result<_, _>>()?,
        })
    }

    /// Each head's logits `[B, T]` for its block's features `[B, T, D]`.
    pub(crate) fn judge(&self, features: &[Tensor<3>]) -> Vec<Tensor<2>> {
        self.heads
            .iter()
            .zip(features)
            .map(|([first, second], features)| {
                let [batch, tokens, _] = features.dims();
                let x = layer_norm_modulate(features.clone(), None, None, 1e-6);
                let x = activation::leaky_relu(first.forward(x), 0.2);
                second.forward(x).reshape([batch, tokens])
            })
            .collect()
    }
}

/// The image tokens after the blocks that the discriminator looks at.
pub(crate) fn features(
    teacher: &Emmdit,
    blocks: &[usize],
    latents: Tensor<4>,
    text: Tensor<3>,
    times: &[f32],
) -> Result<Vec<Tensor<3>>, TrainError> {
    let names: Vec<String> = blocks
        .iter()
        .map(|b| format!("block.{b:02}.hidden"))
        .collect();
    let mut found: Vec<Option<Tensor<3>>> = vec![None; names.len()];
    let mut see = |name: &str, value: Tensor<3>| {
        if let Some(i) = names.iter().position(|n| n == name) {
            found[i] = Some(value);
        }
    };
    teacher.forward_observed(latents, text, times, Some(&mut see))?;
    Ok(found.into_iter().flatten().collect())
}

/// `log(1 + exp(x))` without overflow.
fn softplus(x: Tensor<2>) -> Tensor<2> {
    activation::relu(x.clone()) + (x.abs().neg().exp() + 1.0).log()
}

/// Means over heads of the mean over tokens.
fn mean(per_head: Vec<Tensor<2>>) -> Tensor<1> {
    let count = per_head.len().max(1) as f64;
    let means: Vec<Tensor<1>> = per_head.into_iter().map(|x| x.mean()).collect();
    Tensor::cat(means, 0).sum() / count
}

impl AdversarialLoss {
    /// The student's loss: its pictures are to be judged real.
    pub(crate) fn student(self, fake: &[Tensor<2>]) -> Tensor<1> {
        let term = |x: &Tensor<2>| match self {
            Self::Bce => softplus(x.clone().neg()),
            Self::Hinge => x.clone().neg(),
        };
        mean(fake.iter().map(term).collect())
    }

    /// The discriminator's loss on pictures of one kind.
    pub(crate) fn discriminator(self, logits: &[Tensor<2>], real: bool) -> Tensor<1> {
        let term = |x: &Tensor<2>| {
            let x = if real { x.clone().neg() } else { x.clone() };
            match self {
                Self::Bce => softplus(x),
                Self::Hinge => activation::relu(x + 1.0),
            }
        };
        mean(logits.iter().map(term).collect())
    }
}

/// How often the discriminator is right about pictures of one kind, and its mean logit.
pub(crate) fn accuracy(logits: &[Tensor<2>], real: bool) -> (f64, f64) {
    let (mut right, mut sum, mut count) = (0_usize, 0.0, 0_usize);
    for logits in logits {
        for x in crate::frozen::values(logits.clone()) {
            right += usize::from((x > 0.0) == real);
            sum += f64::from(x);
            count += 1;
        }
    }
    let count = count.max(1) as f64;
    (right as f64 / count, sum / count)
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Device, TensorData};

    fn logits(values: &[f32]) -> Vec<Tensor<2>> {
        let data = TensorData::new(values.to_vec(), [1, values.len()]);
        vec![Tensor::from_data(data, &Device::flex())]
    }

    fn value(x: Tensor<1>) -> f32 {
        x.into_scalar::<f32>()
    }

    #[test]
    fn losses_are_their_formulas_also_far_out() {
        let x = logits(&[2.0, -100.0, 100.0]);
        let bce = value(AdversarialLoss::Bce.discriminator(&x, true));
        let expected = ((1.0_f32 + (-2.0_f32).exp()).ln() + 100.0 + 0.0) / 3.0;
        assert!((bce - expected).abs() < 1e-3, "{bce} {expected}");
        assert_eq!(value(AdversarialLoss::Bce.student(&x)), bce);
        let hinge = value(AdversarialLoss::Hinge.discriminator(&x, false));
        assert!((hinge - (3.0 + 0.0 + 101.0) / 3.0).abs() < 1e-3);
        let (right, mean) = accuracy(&x, true);
        assert!((right - 2.0 / 3.0).abs() < 1e-9 && (mean - 2.0 / 3.0).abs() < 1e-5);
    }
}
