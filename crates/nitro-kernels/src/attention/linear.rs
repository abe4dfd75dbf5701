//! The ReLU linear attention of DC-AE's EfficientViT blocks, forward and backward.

use super::{Workspace, workspace_len};
use crate::error::{KernelError, check_eq, check_len};
use crate::pool::{Scratch, SharedPtr, par_for};
use crate::simd::{Level, simd_kernel};
use crate::tile::{Left, Out, Right, Size, Start, multiply};

/// Added to the denominator, as in the reference; it only matters where no key responds to a query.
const EPS: f32 = 1e-15;

/// Tokens whose rows are in scratch at one time.
const BLOCK: usize = 96;

/// Shape of [`relu_linear_attention_forward`].
#[derive(Clone, Copy, Debug)]
pub struct LinearAttentionShape {
    /// Samples.
    pub batch: usize,
    /// Tokens (pixels) per sample.
    pub tokens: usize,
    /// Heads.
    pub groups: usize,
    /// Channels per head.
    pub head_dim: usize,
}

/// `out_i = sum_j v_j (relu(k_j) . relu(q_i)) / (sum_j relu(k_j) . relu(q_i) + 1e-15)`, per sample
/// and group.
///
/// `qkv` is `[batch, tokens, groups * 3 * head_dim]`: each group has `head_dim` channels of q, then of
/// k, then of v. `out` is `[batch, tokens, groups * head_dim]`.
///
/// The reference forms the `[tokens, tokens]` scores when there are at most `head_dim` tokens and the
/// `[head_dim, head_dim]` product of values and keys otherwise. The two are the same sum in another
/// order, with the same epsilon added to the same denominator, so that this function always takes the
/// second, whose cost is linear in the tokens.
///
/// # Errors
/// A length that does not follow from `shape`.
pub fn relu_linear_attention_forward(
    shape: LinearAttentionShape,
    qkv: &[f32],
    out: &mut [f32],
) -> Result<(), KernelError> {
    forward(Level::active(), shape, qkv, out)
}

/// Gradient of [`relu_linear_attention_forward`] with respect to `qkv`.
///
/// # Errors
/// A length that does not follow from `shape`.
pub fn relu_linear_attention_backward(
    shape: LinearAttentionShape,
    qkv: &[f32],
    dout: &[f32],
    dqkv: &mut [f32],
) -> Result<(), KernelError> {
    backward(Level::active(), shape, qkv, dout, dqkv)
}

fn check(shape: LinearAttentionShape, qkv: usize, out: usize) -> Result<(), KernelError> {
    let LinearAttentionShape {
        batch,
        tokens,
        groups,
        head_dim,
    } = shape;
    if head_dim == 0 {
        return Err(KernelError::Unsupported {
            what: "linear attention head dimension",
            value: 0,
            help: "give at least one channel per head",
        });
    }
    check_eq(
        "linear attention output length",
        batch * tokens * groups * head_dim,
        out,
    )?;
    check_eq("linear attention input length", 3 * out, qkv)
}

/// The rows of one head in a `[batch, tokens, width]` tensor.
#[derive(Clone, Copy)]
struct Head {
    start: usize,
    width: usize,
    dim: usize,
}

simd_kernel! {
    /// Copies the rows of tokens `first..`, clamped at `floor` from below, to rows of `padded` values.
    /// Padding is zero, but the first padding value is `after`.
    fn gather<S>(
        s,
        src: &[f32],
        head: Head,
        first: usize,
        floor: f32,
        after: f32,
        dst: &mut [f32],
        padded: usize,
    ) {
        let Head { start, width, dim } = head;
        let floor = s.splat(floor);
        for (t, dst) in dst.chunks_exact_mut(padded).enumerate() {
            let src = &src[start + (first + t) * width..][..dim];
            dst[dim..].fill(0.0);
            let mut i = 0;
            while i < dim {
                s.store_at(&mut dst[..dim], i, s.max(floor, s.load_at(src, i)));
                i += S::LANES;
            }
            if let Some(next) = dst.get_mut(dim) {
                *next = after;
            }
        }
    }
}

simd_kernel! {
    /// Divides numerators by the denominator that follows them: `[u; d]` becomes `u / (d + eps)`.
    fn normalise<S>(s, rows: &mut [f32], padded: usize, dim: usize) {
        for row in rows.chunks_exact_mut(padded) {
            let scale = s.splat(1.0 / (row[dim] + EPS));
            for v in row.chunks_exact_mut(S::LANES) {
                s.store(v, s.mul(s.load(v), scale));
            }
        }
    }
}

simd_kernel! {
    /// Gradient of [`normalise`]: replaces `[u; d]` by `[dout / (d + eps); -dout . u / (d + eps)^2]`,
    /// the padding after it by zero.
    fn normalise_gradient<S>(s, rows: &mut [f32], padded: usize, dim: usize, dout: &[f32]) {
        for (row, dout) in rows.chunks_exact_mut(padded).zip(dout.chunks_exact(padded)) {
            let scale = 1.0 / (row[dim] + EPS);
            let scale_v = s.splat(scale);
            let mut dot = s.splat(0.0);
            // `dout` is zero from `dim` on.
            for (row, dout) in row.chunks_exact_mut(S::LANES).zip(dout.chunks_exact(S::LANES)) {
                let du = s.mul(s.load(dout), scale_v);
                dot = s.fma(du, s.load(row), dot);
                s.store(row, du);
            }
            row[dim] = -s.sum(dot) * scale;
        }
    }
}

simd_kernel! {
    fn scatter_raw<S>(
        s,
        dst: SharedPtr<f32>,
        head: Head,
        first: usize,
        src: &[f32],
        padded: usize,
        gate: &[f32],
        gate_padded: usize,
    ) {
        let Head { start, width, dim } = head;
        let zero = s.splat(0.0);
        for (t, src) in src.chunks_exact(padded).enumerate() {
            // SAFETY: `scatter`, the only caller, has the same contract.
            let dst = unsafe {
                std::slice::from_raw_parts_mut(dst.get().add(start + (first + t) * width), dim)
            };
            let mut i = 0;
            while i < dim {
                let mut v = s.load(&src[i..]);
                if !gate.is_empty() {
                    v = s.select_gt(s.load(&gate[t * gate_padded + i..]), zero, v, zero);
                }
                s.store_at(dst, i, v);
                i += S::LANES;
            }
        }
    }
}

/// Writes rows of `padded` values to the rows of tokens `first..`; where `gate` (rows of
/// `gate_padded` values, or empty for none) is not positive, zero is written.
///
/// # Safety
/// The rows must lie in `dst`, and no one else may access them meanwhile.
unsafe fn scatter(
    level: Level,
    dst: SharedPtr<f32>,
    head: Head,
    first: usize,
    (src, padded): (&[f32], usize),
    (gate, gate_padded): (&[f32], usize),
) {
    scatter_raw(level, dst, head, first, src, padded, gate, gate_padded);
}

/// One head of one sample: where its parts are and how its scratch is laid out.
#[derive(Clone, Copy)]
struct Unit {
    level: Level,
    tokens: usize,
    dim: usize,
    /// Rows of q and k: `dim` padded to whole vectors.
    padded: usize,
    /// Rows of `[v; 1]`: `dim + 1` padded to whole vectors.
    extended: usize,
    q: Head,
    k: Head,
    v: Head,
    out: Head,
}

impl Unit {
    fn new(level: Level, shape: LinearAttentionShape, unit: usize) -> Self {
        let LinearAttentionShape {
            tokens,
            groups,
            head_dim: dim,
            ..
        } = shape;
        let (sample, group) = (unit / groups, unit % groups);
        let width = groups * dim;
        let at = |part: usize| Head {
            start: sample * tokens * 3 * width + (3 * group + part) * dim,
            width: 3 * width,
            dim,
        };
        Self {
            level,
            tokens,
            dim,
            padded: dim.next_multiple_of(level.lanes()),
            extended: (dim + 1).next_multiple_of(level.lanes()),
            q: at(0),
            k: at(1),
            v: at(2),
            out: Head {
                start: sample * tokens * width + group * dim,
                width,
                dim,
            },
        }
    }

    /// Calls `f(first token, tokens)` for each block of tokens.
    fn blocks(&self, mut f: impl FnMut(usize, usize)) {
        for first in (0..self.tokens).step_by(BLOCK) {
            f(first, BLOCK.min(self.tokens - first));
        }
    }

    fn gather_relu(&self, src: &[f32], head: Head, first: usize, dst: &mut [f32]) {
        gather(self.level, src, head, first, 0.0, 0.0, dst, self.padded);
    }

    /// `out[c][e] += sum over rows of a[t][c] * b[t][e]`; `a` has rows of `padded`, `b` and `out` of
    /// `extended` values.
    fn add_outer(&self, rows: usize, a: &[f32], b: &[f32], out: &mut [f32]) {
        let (padded, extended) = (self.padded, self.extended);
        multiply(
            self.level,
            Size {
                m: self.dim,
                vectors: extended / self.level.lanes(),
                k: rows,
            },
            Left::columns(a, padded),
            Right::rows(self.level, b, extended),
            Start::Out,
            Out {
                data: out,
                row: extended,
            },
        );
    }

    /// `out = a b` where `a` is `[rows, terms]` in rows of `a_row`, and `b` and `out` have rows of
    /// `width` values.
    fn apply(
        &self,
        rows: usize,
        (a, a_row): (&[f32], usize),
        terms: usize,
        b: &[f32],
        out: &mut [f32],
        width: usize,
    ) {
        multiply(
            self.level,
            Size {
                m: rows,
                vectors: width / self.level.lanes(),
                k: terms,
            },
            Left::rows(a, a_row),
            Right::rows(self.level, b, width),
            Start::Zero,
            Out {
                data: out,
                row: width,
            },
        );
    }

    /// `state[c] = sum over tokens of relu(k[c]) * [v; 1]`, `dim` rows of `extended` values.
    fn state(&self, qkv: &[f32], k: &mut [f32], v: &mut [f32], state: &mut [f32]) {
        state.fill(0.0);
        self.blocks(|first, rows| {
            let (k, v) = (&mut k[..rows * self.padded], &mut v[..rows * self.extended]);
            self.gather_relu(qkv, self.k, first, k);
            self.gather_values(qkv, first, v);
            self.add_outer(rows, k, v, state);
        });
    }

    /// Rows of `[v; 1]`.
    fn gather_values(&self, qkv: &[f32], first: usize, dst: &mut [f32]) {
        gather(
            self.level,
            qkv,
            self.v,
            first,
            f32::NEG_INFINITY,
            1.0,
            dst,
            self.extended,
        );
    }

    /// `dst[e][c] = src[c][e]`, `dim + 1` rows of `padded` values.
    fn transpose(&self, src: &[f32], dst: &mut [f32]) {
        dst.fill(0.0);
        for e in 0..=self.dim {
            for c in 0..self.dim {
                dst[e * self.padded + c] = src[c * self.extended + e];
            }
        }
    }
}

fn forward(
    level: Level,
    shape: LinearAttentionShape,
    qkv: &[f32],
    out: &mut [f32],
) -> Result<(), KernelError> {
    linear_attention_columns(level, shape, qkv, out, shape.groups * shape.head_dim, 0)
}

/// [`relu_linear_attention_forward`] into columns `column..` of rows of `width` values.
pub(crate) fn linear_attention_columns(
    level: Level,
    shape: LinearAttentionShape,
    qkv: &[f32],
    out: &mut [f32],
    width: usize,
    column: usize,
) -> Result<(), KernelError> {
    let narrow = shape.groups * shape.head_dim;
    let rows = shape.batch * shape.tokens;
    check(shape, qkv.len(), rows * narrow)?;
    check_eq("linear attention output length", rows * width, out.len())?;
    check_len("linear attention output columns", column + narrow, width)?;
    let out = SharedPtr(out.as_mut_ptr());
    par_for(shape.batch * shape.groups, |index| {
        let mut unit = Unit::new(level, shape, index);
        unit.out = Head {
            start: index / shape.groups * shape.tokens * width
                + column
                + index % shape.groups * shape.head_dim,
            width,
            dim: shape.head_dim,
        };
        let Unit {
            dim,
            padded,
            extended,
            ..
        } = unit;
        let sizes = [dim * extended, BLOCK * padded, BLOCK * extended];
        let len = workspace_len(&sizes);
        let mut scratch = Scratch::take(len * size_of::<f32>());
        let mut workspace = Workspace::new(&mut scratch, len);
        let [state, narrow, wide] = sizes.map(|n| workspace.take(n));
        unit.state(qkv, narrow, wide, state);
        unit.blocks(|first, rows| {
            let (q, result) = (&mut narrow[..rows * padded], &mut wide[..rows * extended]);
            unit.gather_relu(qkv, unit.q, first, q);
            unit.apply(rows, (q, padded), dim, state, result, extended);
            normalise(level, result, extended, dim);
            // SAFETY: the rows lie in `out`, whose length was checked; units have disjoint rows.
            unsafe { scatter(level, out, unit.out, first, (result, extended), (&[], 0)) };
        });
    });
    Ok(())
}

fn backward(
    level: Level,
    shape: LinearAttentionShape,
    qkv: &[f32],
    dout: &[f32],
    dqkv: &mut [f32],
) -> Result<(), KernelError> {
    check(shape, qkv.len(), dout.len())?;
    check_eq(
        "linear attention input gradient length",
        qkv.len(),
        dqkv.len(),
    )?;
    let dqkv = SharedPtr(dqkv.as_mut_ptr());
    par_for(shape.batch * shape.groups, |index| {
        let unit = Unit::new(level, shape, index);
        let Unit {
            dim,
            padded,
            extended,
            ..
        } = unit;
        let (narrow, wide) = (BLOCK * padded, BLOCK * extended);
        let sizes = [
            dim * extended,
            dim * extended,
            (dim + 1) * padded,
            narrow,
            narrow,
            wide,
            wide,
        ];
        let len = workspace_len(&sizes);
        let mut scratch = Scratch::take(len * size_of::<f32>());
        let mut workspace = Workspace::new(&mut scratch, len);
        let [state, dstate, transposed, a, b, c, d] = sizes.map(|n| workspace.take(n));

        unit.state(qkv, a, c, state);
        unit.transpose(state, transposed);
        dstate.fill(0.0);
        unit.blocks(|first, rows| {
            let (q, dq) = (&mut a[..rows * padded], &mut b[..rows * padded]);
            let (du, dout_rows) = (&mut c[..rows * extended], &mut d[..rows * extended]);
            unit.gather_relu(qkv, unit.q, first, q);
            let all = f32::NEG_INFINITY;
            gather(level, dout, unit.out, first, all, 0.0, dout_rows, extended);
            unit.apply(rows, (q, padded), dim, state, du, extended);
            normalise_gradient(level, du, extended, dim, dout_rows);
            unit.add_outer(rows, q, du, dstate);
            unit.apply(rows, (du, extended), dim + 1, transposed, dq, padded);
            // SAFETY: the rows lie in `dqkv`, whose length was checked; units have disjoint rows,
            // and q, k and v disjoint channels.
            unsafe { scatter(level, dqkv, unit.q, first, (dq, padded), (q, padded)) };
        });
        unit.transpose(dstate, transposed);
        unit.blocks(|first, rows| {
            let (k, dk) = (&mut a[..rows * padded], &mut b[..rows * padded]);
            let (v, dv) = (&mut c[..rows * extended], &mut d[..rows * extended]);
            unit.gather_relu(qkv, unit.k, first, k);
            unit.gather_values(qkv, first, v);
            unit.apply(rows, (v, extended), dim + 1, transposed, dk, padded);
            unit.apply(rows, (k, padded), dim, dstate, dv, extended);
            // SAFETY: as above.
            unsafe {
                scatter(level, dqkv, unit.k, first, (dk, padded), (k, padded));
                scatter(level, dqkv, unit.v, first, (dv, extended), (&[], 0));
            }
        });
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, dot, gradient, random, to_f64};

    /// The definition, in the quadratic form.
    fn reference(shape: LinearAttentionShape, qkv: &[f64]) -> Vec<f64> {
        let LinearAttentionShape {
            batch,
            tokens,
            groups,
            head_dim: dim,
        } = shape;
        let mut out = vec![0.0; batch * tokens * groups * dim];
        for b in 0..batch {
            for g in 0..groups {
                let row = |t: usize, part: usize| {
                    &qkv[((b * tokens + t) * groups + g) * 3 * dim + part * dim..][..dim]
                };
                for i in 0..tokens {
                    let scores: Vec<f64> = (0..tokens)
                        .map(|j| {
                            let pairs = row(i, 0).iter().zip(row(j, 1));
                            pairs.map(|(q, k)| q.max(0.0) * k.max(0.0)).sum()
                        })
                        .collect();
                    let total = scores.iter().sum::<f64>() + f64::from(EPS);
                    for (j, score) in scores.iter().enumerate() {
                        for c in 0..dim {
                            out[((b * tokens + i) * groups + g) * dim + c] +=
                                row(j, 2)[c] * score / total;
                        }
                    }
                }
            }
        }
        out
    }

    fn run(shape: LinearAttentionShape, qkv: &[f32], gradients: bool) {
        let out_len = qkv.len() / 3;
        let expected = reference(shape, &to_f64(qkv));
        let dout = random(2, out_len);
        for level in Level::available() {
            let mut out = vec![f32::NAN; out_len];
            forward(level, shape, qkv, &mut out).unwrap();
            assert_close(&format!("{level:?} {shape:?} out"), &out, &expected);
            let mut dqkv = vec![f32::NAN; qkv.len()];
            backward(level, shape, qkv, &dout, &mut dqkv).unwrap();
            assert!(dqkv.iter().all(|d| d.is_finite()), "{level:?} {shape:?}");
            if gradients {
                let expected = gradient(&to_f64(qkv), |x| dot(&dout, &reference(shape, x)));
                assert_close(&format!("{level:?} {shape:?} dqkv"), &dqkv, &expected);
            }
        }
    }

    #[test]
    fn both_forms_and_the_gradient_match_f64() {
        // Fewer and more tokens than channels per head, and more than one block of tokens.
        for (batch, tokens, groups, head_dim) in [(2, 3, 2, 5), (1, 9, 2, 4), (1, 4, 1, 16)] {
            let shape = LinearAttentionShape {
                batch,
                tokens,
                groups,
                head_dim,
            };
            // Shifted so that each query meets a key; the empty case has its own test.
            let len = batch * tokens * groups * 3 * head_dim;
            let qkv: Vec<f32> = random(1, len).iter().map(|x| x + 0.5).collect();
            run(shape, &qkv, true);
        }
        for (tokens, head_dim) in [(256, 32), (97, 31)] {
            let shape = LinearAttentionShape {
                batch: 1,
                tokens,
                groups: 2,
                head_dim,
            };
            run(shape, &random(1, tokens * 6 * head_dim), false);
        }
        let shape = LinearAttentionShape {
            batch: 1,
            tokens: 120,
            groups: 1,
            head_dim: 2,
        };
        let qkv: Vec<f32> = random(1, 720).iter().map(|x| x + 1.0).collect();
        run(shape, &qkv, true);
    }

    #[test]
    fn a_query_without_response_gives_zero_and_no_gradient() {
        let shape = LinearAttentionShape {
            batch: 1,
            tokens: 3,
            groups: 1,
            head_dim: 4,
        };
        let mut qkv: Vec<f32> = random(1, 36).iter().map(|x| x.abs() + 0.1).collect();
        qkv[..4].fill(-1.0);
        run(shape, &qkv, true);
        let mut out = vec![f32::NAN; 12];
        relu_linear_attention_forward(shape, &qkv, &mut out).unwrap();
        assert_eq!(out[..4], [0.0; 4]);
    }

    #[test]
    fn a_wrong_length_is_an_error() {
        let shape = LinearAttentionShape {
            batch: 1,
            tokens: 3,
            groups: 1,
            head_dim: 4,
        };
        assert!(relu_linear_attention_forward(shape, &[0.0; 35], &mut [0.0; 12]).is_err());
        assert!(relu_linear_attention_forward(shape, &[0.0; 36], &mut [0.0; 11]).is_err());
    }
}
