//! The one mechanism by which a fused operation reaches our CPU kernels.
//!
//! A [`FusedOp`] is a forward and a hand-written backward over plain `f32` arrays. [`apply`] runs it
//! when every input lives on Burn's CPU backend (Flex), with or without autodiff, and registers the
//! backward in Burn's graph; on any other device it returns the inputs, and the caller computes the
//! same thing from composed Burn operations. An operation is thereby declared once, in one file:
//! its kernel form, its gradient, and its composed form.

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::ops::FloatTensorOps;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, AutodiffBackend, Flex, TensorMetadata};
use burn::tensor::{DType, Tensor, TensorData};

use crate::profile;

/// A contiguous `f32` array on the host: what a kernel reads and writes. Cloning shares the data.
#[derive(Clone, Debug)]
pub(crate) struct Array(FloatTensor<Flex>);

impl Array {
    /// Wraps `data` of `shape` without copying it.
    pub(crate) fn new(data: Vec<f32>, shape: &[usize]) -> Self {
        debug_assert_eq!(data.len(), shape.iter().product::<usize>());
        let data = TensorData::new(data, shape.to_vec());
        Self(Flex::float_from_data(data, &Default::default()))
    }

    fn from_primitive(primitive: FloatTensor<Flex>) -> Self {
        Self(if primitive.is_contiguous() {
            primitive
        } else {
            primitive.to_contiguous()
        })
    }

    /// As a tensor of rank `D`.
    pub(crate) fn into_tensor<const D: usize>(self) -> Tensor<D> {
        Tensor::from_primitive::<Flex>(self.0)
    }

    /// The elements in row-major order.
    pub(crate) fn data(&self) -> &[f32] {
        let layout = self.0.layout();
        &self.0.storage::<f32>()[layout.start_offset()..][..layout.num_elements()]
    }

    /// The elements to change, copied first if others share them.
    pub(crate) fn data_mut(&mut self) -> &mut [f32] {
        let (start, len) = (self.0.layout().start_offset(), self.len());
        &mut self.0.storage_mut::<f32>()[start..][..len]
    }

    /// The dimensions.
    pub(crate) fn dims(&self) -> Vec<usize> {
        self.0.shape().to_vec()
    }

    /// The number of elements.
    pub(crate) fn len(&self) -> usize {
        self.0.layout().num_elements()
    }

    /// The elements, or `None` for the placeholder of an absent optional input.
    pub(crate) fn optional(&self) -> Option<&[f32]> {
        (self.len() > 0).then(|| self.data())
    }
}

/// A forward pass with a hand-written backward pass over host arrays.
///
/// An absent optional input is an array of zero elements ([`absent`]).
pub(crate) trait FusedOp<const N: usize>: Clone + core::fmt::Debug + Send + 'static {
    /// What the backward pass needs besides the inputs.
    type Saved: Clone + core::fmt::Debug + Send + 'static;

    /// The output, and what the backward pass will need (`keep` is false when there will be none).
    fn forward(&self, inputs: &[Array; N], keep: bool) -> (Array, Self::Saved);

    /// The gradient of each input that `needed` asks for, from the gradient of the output.
    fn backward(
        &self,
        inputs: &[Array; N],
        saved: &Self::Saved,
        grad: &Array,
        needed: [bool; N],
    ) -> [Option<Array>; N];

    /// Floating-point operations (two per multiply-add) of the forward pass, for profiles; 0 where
    /// they are not worth counting.
    fn operations(&self, _inputs: &[Array; N]) -> f64 {
        0.0
    }
}

/// Names `op` in profiles: its type and the shapes of its first two inputs. Its products are counted
/// `passes` times.
fn describe<O: FusedOp<N>, const N: usize>(
    op: &O,
    inputs: &[Array; N],
    suffix: &str,
    passes: f64,
) -> (String, f64) {
    let path = core::any::type_name::<O>();
    let name = path.rsplit("::").next().unwrap_or(path);
    let mut name = name.strip_suffix("Op").unwrap_or(name).to_owned();
    for input in inputs.iter().take(2) {
        name += &format!(" {:?}", input.dims());
    }
    (name + suffix, passes * op.operations(inputs))
}

/// An input or output of [`apply`], its rank erased.
pub(crate) enum Handle {
    Plain(FloatTensor<Flex>),
    Tracked(FloatTensor<Autodiff<Flex>>),
}

impl Handle {
    /// The CPU primitive behind `tensor`, or `None` when it lives elsewhere, is not `f32`, or uses
    /// Burn's gradient checkpointing (whose recomputation our operations do not take part in).
    pub(crate) fn of<const D: usize>(tensor: &Tensor<D>) -> Option<Self> {
        Self::from_tensor(tensor.clone())
    }

    /// As [`Handle::of`], without keeping the tensor: its memory may then be written.
    pub(crate) fn from_tensor<const D: usize>(tensor: Tensor<D>) -> Option<Self> {
        if tensor.dtype() != DType::F32 {
            return None;
        }
        if tensor.is_autodiff() {
            let primitive = tensor.try_into_primitive::<Autodiff<Flex>>();
            primitive.ok().map(Self::Tracked)
        } else {
            tensor.try_into_primitive::<Flex>().ok().map(Self::Plain)
        }
    }

    /// The placeholder for an optional input that is not there.
    pub(crate) fn absent() -> Self {
        let data = TensorData::new(Vec::<f32>::new(), [0]);
        Self::Plain(Flex::float_from_data(data, &Default::default()))
    }

    /// The handle of an optional tensor; the outer `None` means "not on this CPU".
    pub(crate) fn optional<const D: usize>(tensor: &Option<Tensor<D>>) -> Option<Self> {
        match tensor {
            Some(tensor) => Self::of(tensor),
            None => Some(Self::absent()),
        }
    }

    /// The array behind it, without its gradient.
    pub(crate) fn into_array(self) -> Array {
        Array::from_primitive(match self {
            Self::Plain(primitive) => primitive,
            Self::Tracked(primitive) => primitive.into_primitive(),
        })
    }

    /// Back to a tensor of rank `D`.
    pub(crate) fn into_tensor<const D: usize>(self) -> Tensor<D> {
        match self {
            Self::Plain(primitive) => Tensor::from_primitive::<Flex>(primitive),
            Self::Tracked(primitive) => Tensor::from_primitive::<Autodiff<Flex>>(primitive),
        }
    }
}

/// Runs `op` on CPU inputs, recording its backward pass if any input is under autodiff.
pub(crate) fn apply<O: FusedOp<N>, const N: usize>(op: O, inputs: [Handle; N]) -> Handle {
    if inputs.iter().all(|input| matches!(input, Handle::Plain(_))) {
        let arrays = inputs.map(|input| match input {
            Handle::Plain(primitive) => Array::from_primitive(primitive),
            Handle::Tracked(_) => unreachable!("all inputs were just checked to be plain"),
        });
        let _scope = profile::scope(|| describe(&op, &arrays, "", 1.0));
        return Handle::Plain(op.forward(&arrays, false).0.0);
    }
    // Constants mixed into a recorded computation become untracked nodes of it.
    let tracked = inputs.map(|input| match input {
        Handle::Plain(primitive) => <Autodiff<Flex> as AutodiffBackend>::from_inner(primitive),
        Handle::Tracked(primitive) => primitive,
    });
    let guards = tracked.each_ref().map(|tensor| tensor.node());
    let keep = tracked.iter().any(|tensor| tensor.is_tracked());
    let arrays = tracked.map(|tensor| Array::from_primitive(tensor.into_primitive()));
    let (output, saved) = {
        let _scope = profile::scope(|| describe(&op, &arrays, "", 1.0));
        op.forward(&arrays, keep)
    };
    let step = Step(core::marker::PhantomData::<O>);
    let primitive = match step
        .prepare::<NoCheckpointing>(guards)
        .compute_bound()
        .stateful()
    {
        OpsKind::Tracked(prep) => prep.finish(State { op, arrays, saved }, output.0),
        OpsKind::UnTracked(prep) => prep.finish(output.0),
    };
    Handle::Tracked(primitive)
}

#[derive(Clone, Debug)]
struct State<O: FusedOp<N>, const N: usize> {
    op: O,
    arrays: [Array; N],
    saved: O::Saved,
}

struct Step<O>(core::marker::PhantomData<O>);

impl<O> core::fmt::Debug for Step<O> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(core::any::type_name::<O>())
    }
}

impl<O: FusedOp<N>, const N: usize> Backward<Flex, N> for Step<O> {
    type State = State<O, N>;

    fn backward(self, ops: Ops<Self::State, N>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = Array::from_primitive(grads.consume::<Flex>(&ops.node));
        let State { op, arrays, saved } = ops.state;
        let needed = ops.parents.each_ref().map(Option::is_some);
        let results = {
            // One product for each of the two inputs of a product that a gradient is wanted for.
            let passes = needed.iter().take(2).filter(|needed| **needed).count() as f64;
            let _scope = profile::scope(|| describe(&op, &arrays, " backward", passes));
            op.backward(&arrays, &saved, &grad, needed)
        };
        for (parent, result) in ops.parents.into_iter().zip(results) {
            if let (Some(parent), Some(result)) = (parent, result) {
                grads.register::<Flex>(parent.id, result.0);
            }
        }
    }
}
