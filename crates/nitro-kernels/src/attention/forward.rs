//! Attention forward.

use super::layout::{Rows, gather, prefetch, scatter};
use super::{
    AttentionConfig, Inputs, Problem, Segment, Unit, Workspace, block_rows, rows, shared,
    starts_of, workspace_len,
};
use crate::error::{KernelError, check_eq};
use crate::pool::{Scratch, SharedPtr};
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
        inputs: Inputs::of(segments),
        outs: shared(outs),
        lse: SharedPtr(lse.as_mut_ptr()),
    };
    problem.for_units(|this, next| unit.run(this, next));
    Ok(())
}

struct Forward<'a> {
    level: Level,
    problem: &'a Problem<'a>,
    inputs: Inputs<'a>,
    outs: Vec<SharedPtr<f32>>,
    lse: SharedPtr<f32>,
}

impl Forward<'_> {
    fn run(&self, unit: Unit, next: Option<Unit>) {
        let (level, problem, cfg) = (self.level, self.problem, &self.problem.cfg);
        let Unit {
            sample,
            group,
            kv_head,
        } = unit;
        let queries = &problem.query_tokens[group];
        let keys = &problem.key_tokens[group];
        let (dim, lanes) = (cfg.head_dim, level.lanes());
        // Rows are padded to whole vectors.
        let padded = dim.next_multiple_of(lanes);
        // At least one (hidden) key, so that rows of scores exist even where there is nothing to see.
        let width = keys.len().max(1).next_multiple_of(lanes);
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

        let key_bases = problem.key_bases(unit);
        let kv_rows = Rows {
            tokens: keys,
            bases: &key_bases,
            width: problem.key_width(),
        };
        // `values` serves as the unpacked keys first.
        values[keys.len() * padded..].fill(0.0);
        gather(level, &self.inputs.k, &kv_rows, dim, 1.0, values, padded);
        pack_transposed(level, padded, values, packed_keys);
        gather(level, &self.inputs.v, &kv_rows, dim, 1.0, values, padded);
        problem.fill_bias(sample, keys, bias);

        self.prefetch_outputs(unit);
        for i in 0..problem.heads_per_key() {
            let head = kv_head * problem.heads_per_key() + i;
            let q_bases = problem.query_bases(unit, i);
            for first in (0..queries.len()).step_by(block.max(1)) {
                let tokens = &queries[first..queries.len().min(first + block)];
                let m = tokens.len();
                let q_rows = Rows {
                    tokens,
                    bases: &q_bases,
                    width: problem.query_width(),
                };
                gather(
                    level,
                    &self.inputs.q,
                    &q_rows,
                    dim,
                    cfg.scale * LOG2_E,
                    query,
                    padded,
                );
                let (seen, first_limit) = problem.seen(first, m, lanes, width);
                multiply(
                    level,
                    Size {
                        m,
                        vectors: seen / lanes,
                        k: dim,
                    },
                    Left::rows(query, padded),
                    Right::packed(level, packed_keys, padded),
                    Start::Row(bias),
                    Out {
                        data: &mut *scores,
                        row: seen,
                    },
                );
                if let Some(next) = next.filter(|_| i == 0) {
                    self.inputs.prefetch(problem, &[], next, first..first + m);
                }
                let scores = &mut scores[..m * seen];
                rows::softmax_rows(level, scores, seen, first_limit, max, sum);
                // The queries are used up; their scratch takes the output.
                let output = &mut *query;
                // The terms are the real keys that are seen.
                multiply(
                    level,
                    Size {
                        m,
                        vectors: padded / lanes,
                        k: seen.min(keys.len()),
                    },
                    Left::rows(scores, seen),
                    Right::rows(level, values, padded),
                    Start::Zero,
                    Out {
                        data: &mut *output,
                        row: padded,
                    },
                );
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

    /// Prefetches what the unit will write.
    fn prefetch_outputs(&self, unit: Unit) {
        let problem = self.problem;
        let targets = starts_of(&self.outs);
        for i in 0..problem.heads_per_key() {
            let bases = problem.query_bases(unit, i);
            let tokens = &problem.query_tokens[unit.group];
            let rows = Rows {
                tokens,
                bases: &bases,
                width: problem.query_width(),
            };
            prefetch(&targets, &rows, problem.cfg.head_dim);
        }
    }
}
