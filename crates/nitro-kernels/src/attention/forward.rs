//! Attention forward.

use super::layout::{Rows, bases, gather, scatter};
use super::{
    AttentionConfig, Problem, Segment, Workspace, block_rows, rows, shared, workspace_len,
};
use crate::error::{KernelError, check_eq};
use crate::pool::{Scratch, SharedPtr, par_for};
use crate::simd::Level;
use crate::tile::{Left, Out, Right, Size, Start, multiply, pack_transposed};
use std::f32::consts::{LN_2, LOG2_E};

pub(super) fn run(
    level: Level,
    cfg: &AttentionConfig,
    segments: &[Segment<'_>],
    key_mask: Option<&[bool]>,
    outs: &mut [&mut [f32]],
    lse: &mut [f32],
) -> Result<(), KernelError> {
    let problem = Problem::new(cfg, segments, key_mask, lse.len())?;
    check_eq(
        "attention outputs (one per segment)",
        segments.len(),
        outs.len(),
    )?;
    for (segment, out) in segments.iter().zip(outs.iter()) {
        check_eq("attention output length", segment.q.len(), out.len())?;
    }
    let unit = Forward {
        level,
        problem: &problem,
        q: segments.iter().map(|s| s.q).collect(),
        k: segments.iter().map(|s| s.k).collect(),
        v: segments.iter().map(|s| s.v).collect(),
        outs: shared(outs),
        lse: SharedPtr(lse.as_mut_ptr()),
    };
    par_for(problem.units(), |i| unit.run(i));
    Ok(())
}

struct Forward<'a> {
    level: Level,
    problem: &'a Problem<'a>,
    q: Vec<&'a [f32]>,
    k: Vec<&'a [f32]>,
    v: Vec<&'a [f32]>,
    outs: Vec<SharedPtr<f32>>,
    lse: SharedPtr<f32>,
}

impl Forward<'_> {
    fn run(&self, unit: usize) {
        let (level, problem, cfg) = (self.level, self.problem, &self.problem.cfg);
        let (sample, group, kv_head) = problem.unit(unit);
        let queries = &problem.query_tokens[group];
        let keys = &problem.key_tokens[group];
        let (dim, lanes) = (cfg.head_dim, level.lanes());
        // Rows are padded to whole vectors.
        let padded = dim.next_multiple_of(lanes);
        let width = keys.len().next_multiple_of(lanes);
        let block = block_rows(width, 1).min(queries.len());

        let sizes = [
            width * padded,
            width * padded,
            width,
            block * padded,
            block * width,
            block,
            block,
        ];
        let len = workspace_len(&sizes);
        let mut scratch = Scratch::take(len * size_of::<f32>());
        let mut workspace = Workspace::new(&mut scratch, len);
        let [packed_keys, values, bias, query, scores, max, sum] = sizes.map(|n| workspace.take(n));

        let kv_width = cfg.kv_heads * dim;
        let kv_bases = bases(&problem.lengths, sample, kv_width, kv_head * dim);
        let kv_rows = Rows {
            tokens: keys,
            bases: &kv_bases,
            width: kv_width,
        };
        // `values` serves as the unpacked keys first.
        values[keys.len() * padded..].fill(0.0);
        gather(level, &self.k, &kv_rows, dim, 1.0, values, padded);
        pack_transposed(level, padded, values, packed_keys);
        gather(level, &self.v, &kv_rows, dim, 1.0, values, padded);
        problem.fill_bias(sample, keys, bias);

        let per_kv = cfg.heads / cfg.kv_heads;
        for head in kv_head * per_kv..(kv_head + 1) * per_kv {
            let q_width = cfg.heads * dim;
            let q_bases = bases(&problem.lengths, sample, q_width, head * dim);
            for first in (0..queries.len()).step_by(block.max(1)) {
                let tokens = &queries[first..queries.len().min(first + block)];
                let m = tokens.len();
                let q_rows = Rows {
                    tokens,
                    bases: &q_bases,
                    width: q_width,
                };
                gather(
                    level,
                    &self.q,
                    &q_rows,
                    dim,
                    cfg.scale * LOG2_E,
                    query,
                    padded,
                );
                // Under the causal mask the block sees keys up to its last row only.
                let (seen, first_limit) = if cfg.causal {
                    ((first + m).next_multiple_of(lanes), first + 1)
                } else {
                    (width, usize::MAX)
                };
                // SAFETY: the operands are pieces of the workspace of these very sizes: m <= block
                // rows, `seen` <= width columns, dim <= padded terms.
                unsafe {
                    multiply(
                        level,
                        Size {
                            m,
                            vectors: seen / lanes,
                            k: dim,
                        },
                        Left {
                            ptr: query.as_ptr(),
                            row: padded,
                            col: 1,
                        },
                        Right {
                            ptr: packed_keys.as_ptr(),
                            row: lanes,
                            vector: padded * lanes,
                        },
                        Start {
                            ptr: bias.as_ptr(),
                            row: 0,
                        },
                        Out {
                            ptr: scores.as_mut_ptr(),
                            row: seen,
                        },
                    );
                }
                let scores = &mut scores[..m * seen];
                rows::softmax_rows(level, scores, seen, first_limit, max, sum);
                // The queries are used up; their scratch takes the output.
                let output = &mut *query;
                output[..m * padded].fill(0.0);
                // SAFETY: as above; the terms are the real keys that are seen.
                unsafe {
                    multiply(
                        level,
                        Size {
                            m,
                            vectors: padded / lanes,
                            k: seen.min(keys.len()),
                        },
                        Left {
                            ptr: scores.as_ptr(),
                            row: seen,
                            col: 1,
                        },
                        Right {
                            ptr: values.as_ptr(),
                            row: padded,
                            vector: lanes,
                        },
                        Start {
                            ptr: output.as_ptr(),
                            row: padded,
                        },
                        Out {
                            ptr: output.as_mut_ptr(),
                            row: padded,
                        },
                    );
                }
                let lse_row = problem.lse_row(sample, head);
                for (i, &t) in tokens.iter().enumerate() {
                    // SAFETY: within `lse`, whose length was checked; units write disjoint entries.
                    unsafe {
                        *self.lse.get().add(lse_row + problem.position(t)) =
                            (max[i] + sum[i].log2()) * LN_2;
                    }
                    sum[i] = if sum[i] == 0.0 { 0.0 } else { 1.0 / sum[i] };
                }
                // SAFETY: the rows lie in the outputs, whose lengths were checked; units have
                // disjoint rows.
                unsafe {
                    scatter(level, &self.outs, &q_rows, dim, &sum[..m], output, padded);
                }
            }
        }
    }
}
