//! The E-MMDiT's gradient with little memory: gradient checkpointing.
//!
//! A forward pass without autodiff keeps what passes from block to block. Then, from the last block to
//! the first, each is computed once more under autodiff, and its gradient taken, from the gradient of
//! what it gave: memory for one block's intermediate results instead of all, for one more forward pass.
//! Burn's own checkpointing recomputes single operations, in which fused ones take no part.

use burn::tensor::{Device, Gradients, Tensor};
use nitro_models::Params;
use nitro_models::emmdit::{Emmdit, EmmditConfig, EmmditState};
use nitro_ops::Precision;

use crate::TrainError;
use crate::losses::{alignment, flow_matching};
use crate::optimizer::{NamedGradients, add_gradients, named_gradients};
use crate::store::ParameterStore;

/// What a step computes its loss from.
pub(crate) struct Inputs {
    /// Noisy latents, `[B, C, H, W]`.
    pub(crate) noisy: Tensor<4>,
    /// The velocity as tokens, `[B, T, C]`.
    pub(crate) target: Tensor<3>,
    /// Text states, `[B, L, caption_channels]`.
    pub(crate) text: Tensor<3>,
    /// Diffusion times.
    pub(crate) times: Vec<f32>,
    /// REPA's targets and their weight, if there are any.
    pub(crate) features: Option<(Tensor<3>, f64)>,
}

/// Flow-matching loss, alignment loss, and the gradient of the whole.
pub(crate) type LossesAndGradients = (f64, Option<f64>, NamedGradients);

/// The losses and the gradient of their sum, block by block.
pub(crate) fn gradients(
    config: &EmmditConfig,
    store: &ParameterStore,
    precision: Precision,
    inputs: &Inputs,
) -> Result<LossesAndGradients, TrainError> {
    let plain = store.current();
    let plain = Emmdit::new(config, &Params::new(&plain, &Device::flex(), precision))?;
    let begin = |model: &Emmdit, lift: fn(Tensor<3>) -> Tensor<3>| {
        let noisy = inputs.noisy.clone();
        let [b, c, h, w] = noisy.dims();
        let noisy = lift(noisy.reshape([b, c, h * w])).reshape([b, c, h, w]);
        model.begin(noisy, lift(inputs.text.clone()), &inputs.times)
    };
    let mut states = vec![begin(&plain, |x| x)?];
    for index in 0..config.blocks() {
        let next = plain.advance(index, states[index].clone());
        states.push(next);
    }
    drop(plain);

    let tensors = store.tracked();
    let device = Device::flex().autodiff();
    let mut all = NamedGradients::new();
    let model = || Emmdit::new(config, &Params::new(&tensors, &device, precision));
    let mut take = |grads: Gradients| {
        add_gradients(&mut all, named_gradients(&tensors, store, grads), 1.0);
    };

    // After the last block: the velocity and its loss.
    let last = Leaves::new(&states[config.blocks()]);
    let velocity = model()?.end(last.state());
    let difference = flow_matching(velocity, Tensor::from_inner(inputs.target.clone()));
    let loss = value(&difference);
    let mut grads = difference.backward();
    let mut upstream = last.gradients(&mut grads);
    take(grads);

    let mut aligned = None;
    for boundary in (0..=config.blocks()).rev() {
        let Some(state) = states.pop() else { break };
        if let (true, Some((features, weight))) =
            (boundary == config.block_groups[0], &inputs.features)
        {
            let image = leaf(&state.image);
            let projections = model()?.project(&image);
            let features = [Tensor::from_inner(features.clone())];
            if let Some(loss) = alignment(projections, &features) {
                aligned = Some(value(&loss));
                let mut grads = (loss * *weight).backward();
                upstream.image = sum(upstream.image, image.grad_remove(&mut grads));
                take(grads);
            }
        }
        let grads = match states.last() {
            Some(before) => {
                let leaves = Leaves::new(before);
                let after = model()?.advance(boundary - 1, leaves.state());
                upstream.dot(after).map(|product| {
                    let mut grads = product.backward();
                    upstream = leaves.gradients(&mut grads);
                    grads
                })
            }
            None => {
                let first = begin(&model()?, Tensor::from_inner)?;
                upstream.dot(first).map(|product| product.backward())
            }
        };
        if let Some(grads) = grads {
            take(grads);
        }
    }
    Ok((loss, aligned, all))
}

fn value(loss: &Tensor<1>) -> f64 {
    f64::from(loss.clone().into_scalar::<f32>())
}

/// A tensor as the beginning of a graph.
fn leaf(tensor: &Tensor<3>) -> Tensor<3> {
    Tensor::from_inner(tensor.clone()).require_grad()
}

fn sum(a: Option<Tensor<3>>, b: Option<Tensor<3>>) -> Option<Tensor<3>> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a + b),
        (a, b) => a.or(b),
    }
}

/// A state whose tensors begin a graph.
struct Leaves(EmmditState);

impl Leaves {
    fn new(state: &EmmditState) -> Self {
        Self(EmmditState {
            image: leaf(&state.image),
            text: leaf(&state.text),
            time: leaf(&state.time),
            skip: state.skip.as_ref().map(leaf),
        })
    }

    fn state(&self) -> EmmditState {
        self.0.clone()
    }

    fn gradients(&self, grads: &mut Gradients) -> Upstream {
        let EmmditState {
            image,
            text,
            time,
            skip,
        } = &self.0;
        Upstream {
            image: image.grad_remove(grads),
            text: text.grad_remove(grads),
            time: time.grad_remove(grads),
            skip: skip.as_ref().and_then(|skip| skip.grad_remove(grads)),
        }
    }
}

/// The gradient of the loss by what a stage gave; `None` where nothing later reads it.
struct Upstream {
    image: Option<Tensor<3>>,
    text: Option<Tensor<3>>,
    time: Option<Tensor<3>>,
    skip: Option<Tensor<3>>,
}

impl Upstream {
    /// The inner product with a stage's results, whose gradient is the loss's.
    fn dot(&self, state: EmmditState) -> Option<Tensor<1>> {
        let pairs = [
            (Some(state.image), &self.image),
            (Some(state.text), &self.text),
            (Some(state.time), &self.time),
            (state.skip, &self.skip),
        ];
        let terms = pairs.into_iter().filter_map(|(result, gradient)| {
            let gradient = Tensor::from_inner(gradient.clone()?);
            Some((result? * gradient).sum())
        });
        terms.reduce(|a, b| a + b)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::TensorData;
    use nitro_models::emmdit::RepaConfig;

    fn wave<const D: usize>(shape: [usize; D], speed: f32) -> Tensor<D> {
        let count = shape.iter().product::<usize>();
        let values = (0..count).map(|i| (i as f32 * speed).sin()).collect();
        Tensor::from_data(TensorData::new(values, shape), &Device::flex())
    }

    #[test]
    fn block_by_block_gives_the_whole_gradient() {
        for (token_compression, groups) in [(true, [1, 2, 1]), (false, [2, 1, 2])] {
            let config = EmmditConfig {
                sample_size: 16,
                in_channels: 3,
                out_channels: 3,
                heads: 2,
                head_dim: 16,
                caption_channels: 8,
                pos_embed_max_size: 16,
                block_groups: groups,
                use_sub_attn: true,
                token_compression,
                repa: Some(RepaConfig {
                    projector_dim: 12,
                    z_dims: vec![10],
                }),
                ..EmmditConfig::nitro_e_512()
            };
            let build =
                |p: &Params<'_>| Emmdit::new(&config, p).map(drop).map_err(TrainError::from);
            let store = ParameterStore::initialise(3, build).unwrap();
            let inputs = Inputs {
                noisy: wave([2, 3, 16, 16], 0.31),
                target: wave([2, 256, 3], 0.17),
                text: wave([2, 16, 8], 0.23),
                times: vec![300.0, 700.0],
                features: Some((wave([2, 256, 10], 0.41), 0.5)),
            };
            let (loss, aligned, found) =
                gradients(&config, &store, Precision::F32, &inputs).unwrap();

            let tensors = store.tracked();
            let device = Device::flex().autodiff();
            let params = Params::new(&tensors, &device, Precision::F32);
            let model = Emmdit::new(&config, &params).unwrap();
            let output = model
                .forward_train(inputs.noisy, inputs.text, &inputs.times)
                .unwrap();
            let difference = flow_matching(output.tokens, inputs.target);
            let (features, weight) = inputs.features.unwrap();
            let cosine = alignment(output.projections, &[features]).unwrap();
            assert!((loss - value(&difference)).abs() < 1e-6 * loss);
            assert!((aligned.unwrap() - value(&cosine)).abs() < 1e-6);
            let total = difference + cosine * weight;
            let expected = named_gradients(&tensors, &store, total.backward());
            for (name, expected) in &expected {
                let found = &found[name];
                let square = |sum: f64, x: f64| sum + x * x;
                let pairs = found.iter().zip(expected);
                let error = pairs.map(|(a, b)| f64::from(a - b)).fold(0.0, square);
                let size = expected.iter().map(|x| f64::from(*x)).fold(1e-16, square);
                assert!(error < 1e-9 * size, "{name}: {error:e} of {size:e}");
            }
        }
    }
}
