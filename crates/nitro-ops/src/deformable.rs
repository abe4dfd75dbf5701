//! Multi-scale deformable attention.

use burn::tensor::{Int, Tensor};
use nitro_kernels::deformable::{DeformableShape, deformable_backward, deformable_forward};

use crate::fused::{Array, FusedOp, Handle, apply};
use crate::linear::kernel;

/// Each query and head sums a few points of each level of a feature pyramid, read bilinearly with
/// zeros outside (Deformable DETR, arXiv 2010.04159).
///
/// `value [batch, tokens, heads, head_dim]` holds the levels of sizes `levels` (height, width) one
/// after the other; `locations [batch, queries, heads * levels * points, 2]` are `(x, y)` from 0 to 1
/// across the level, `weights [batch, queries, heads, levels * points]` their shares. Gives
/// `[batch, queries, heads * head_dim]`.
pub fn deformable_attention(
    value: Tensor<4>,
    locations: Tensor<4>,
    weights: Tensor<4>,
    levels: &[[usize; 2]],
) -> Tensor<3> {
    let [batch, _, heads, dim] = value.dims();
    let [_, queries, _, samples] = weights.dims();
    let inputs = (
        Handle::of(&value),
        Handle::of(&locations),
        Handle::of(&weights),
    );
    if let (Some(value), Some(locations), Some(weights)) = inputs {
        let op = Deformable {
            levels: levels.to_vec(),
        };
        return apply(op, [value, locations, weights]).into_tensor();
    }
    let points = samples / levels.len();
    let locations = locations.reshape([batch, queries, heads, levels.len(), points, 2]);
    let weights = weights.reshape([batch, queries, heads, levels.len(), points]);
    let mut parts: Vec<Tensor<4>> = Vec::new();
    let mut first = 0;
    for (l, &[height, width]) in levels.iter().enumerate() {
        let tokens = height * width;
        // [b, h, tokens, d]
        let level = value
            .clone()
            .slice_dim(1, first..first + tokens)
            .swap_dims(1, 2);
        // [b, q, h, p] -> [b, h, q p]
        let flat = |x: Tensor<6>| {
            x.reshape([batch, queries, heads, points])
                .swap_dims(1, 2)
                .reshape([batch, heads, queries * points])
        };
        let at = locations.clone().slice_dim(3, l..l + 1);
        let x = flat(at.clone().slice_dim(5, 0..1)) * width as f64 - 0.5;
        let y_ = flat(at.slice_dim(5, 1..2)) * height as f64 - 0.5;
        let share = flat(weights.clone().slice_dim(3, l..l + 1).unsqueeze_dim(5));
        let (left, top) = (x.clone().floor(), y_.clone().floor());
        let (fx, fy) = (x - left.clone(), y_ - top.clone());
        for (dx, dy) in [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)] {
            let (column, row) = (left.clone() + dx, top.clone() + dy);
            let tent = |f: Tensor<3>, d: f64| if d > 0.0 { f } else { -f + 1.0 };
            let (right, bottom) = (width as f64 - 1.0, height as f64 - 1.0);
            let outside = column
                .clone()
                .lower_elem(0.0)
                .bool_or(column.clone().greater_elem(right))
                .bool_or(row.clone().lower_elem(0.0))
                .bool_or(row.clone().greater_elem(bottom));
            let scale = share.clone() * tent(fx.clone(), dx) * tent(fy.clone(), dy);
            let scale = scale.mask_fill(outside, 0.0);
            let index: Tensor<3, Int> =
                (row.clamp(0.0, bottom) * width as f64 + column.clamp(0.0, right)).int();
            let index = index
                .unsqueeze_dim::<4>(3)
                .expand([batch, heads, queries * points, dim]);
            parts.push(level.clone().gather(2, index) * scale.unsqueeze_dim::<4>(3));
        }
        first += tokens;
    }
    let sum = parts.into_iter().reduce(|sum, part| sum + part);
    sum.expect("an attention has a level")
        .reshape([batch, heads, queries, points, dim])
        .sum_dim(3)
        .reshape([batch, heads, queries, dim])
        .swap_dims(1, 2)
        .reshape([batch, queries, heads * dim])
}

#[derive(Clone, Debug)]
struct Deformable {
    levels: Vec<[usize; 2]>,
}

impl Deformable {
    fn shape(&self, value: &Array, weights: &Array) -> DeformableShape<'_> {
        let (value, weights) = (value.dims(), weights.dims());
        DeformableShape {
            batch: value[0],
            queries: weights[1],
            heads: value[2],
            head_dim: value[3],
            points: weights[3] / self.levels.len(),
            levels: &self.levels,
        }
    }
}

impl FusedOp<3> for Deformable {
    type Saved = ();

    fn forward(&self, [value, locations, weights]: &[Array; 3], _: bool) -> (Array, ()) {
        let shape = self.shape(value, weights);
        let dims = [shape.batch, shape.queries, shape.heads * shape.head_dim];
        let mut y = vec![0.0; dims.iter().product()];
        kernel(deformable_forward(
            shape,
            value.data(),
            locations.data(),
            weights.data(),
            &mut y,
        ));
        (Array::new(y, &dims), ())
    }

    fn backward(
        &self,
        [value, locations, weights]: &[Array; 3],
        (): &(),
        grad: &Array,
        _: [bool; 3],
    ) -> [Option<Array>; 3] {
        let mut dvalue = vec![0.0; value.len()];
        let mut dlocations = vec![0.0; locations.len()];
        let mut dweights = vec![0.0; weights.len()];
        kernel(deformable_backward(
            self.shape(value, weights),
            (value.data(), locations.data(), weights.data()),
            grad.data(),
            (&mut dvalue, &mut dlocations, &mut dweights),
        ));
        [
            Some(Array::new(dvalue, &value.dims())),
            Some(Array::new(dlocations, &locations.dims())),
            Some(Array::new(dweights, &weights.dims())),
        ]
    }
}
