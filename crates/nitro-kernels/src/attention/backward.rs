//! Attention backward: probabilities are recomputed from the scores and the log-sum-exp.

use super::layout::{Rows, gather, prefetch, scatter};
use super::{
    AttentionConfig, Inputs, Problem, Segment, SegmentGrads, Unit, Workspace, block_rows, rows,
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
    outs: &[&[f32]],
    lse: &[f32],
    douts: &[&[f32]],
    grads: &mut [SegmentGrads<'_>],
) -> Result<(), KernelError> {
    let problem = Problem::new(cfg, segments, key_mask, lse.len())?;
    check_eq(
        "attention outputs (one per segment)",
        segments.len(),
        outs.len(),
    )?;
    check_eq(
        "attention output gradients (one per segment)",
        segments.len(),
        douts.len(),
    )?;
    check_eq(
        "attention input gradients (one per segment)",
        segments.len(),
        grads.len(),
    )?;
    for (i, segment) in segments.iter().enumerate() {
        check_eq("attention output length", segment.q.len(), outs[i].len())?;
        check_eq(
            "attention output gradient length",
            segment.q.len(),
            douts[i].len(),
        )?;
        check_eq(
            "attention query gradient length",
            segment.q.len(),
            grads[i].dq.len(),
        )?;
        check_eq(
            "attention key gradient length",
            segment.k.len(),
            grads[i].dk.len(),
        )?;
        check_eq(
            "attention value gradient length",
            segment.v.len(),
            grads[i].dv.len(),
        )?;
    }
    let unit = Backward {
        level,
        problem: &problem,
        inputs: Inputs::of(segments),
        outs,
        douts,
        lse,
        dq: grads
            .iter_mut()
            .map(|g| SharedPtr(g.dq.as_mut_ptr()))
            .collect(),
        dk: grads
            .iter_mut()
            .map(|g| SharedPtr(g.dk.as_mut_ptr()))
            .collect(),
        dv: grads
            .iter_mut()
            .map(|g| SharedPtr(g.dv.as_mut_ptr()))
            .collect(),
    };
    problem.for_units(|this, next| unit.run(this, next));
    Ok(())
}

struct Backward<'a> {
    level: Level,
    problem: &'a Problem<'a>,
    inputs: Inputs<'a>,
    outs: &'a [&'a [f32]],
    douts: &'a [&'a [f32]],
    lse: &'a [f32],
    dq: Vec<SharedPtr<f32>>,
    dk: Vec<SharedPtr<f32>>,
    dv: Vec<SharedPtr<f32>>,
}

impl Backward<'_> {
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
        let padded = dim.next_multiple_of(lanes);
        // At least one (hidden) key, so that rows of scores exist even where there is nothing to see.
        let width = keys.len().max(1).next_multiple_of(lanes);
        let block = block_rows(width, 2).min(queries.len());

        let (per_key, per_query) = (width * padded, block * padded);
        let sizes = [
            per_key,
            per_key,
            per_key,
            per_key,
            per_key,
            width,
            per_query,
            per_query,
            per_query,
            block * width,
            block * width,
            block,
            block,
        ];
        let len = workspace_len(&sizes);
        let mut scratch = Scratch::take(len * size_of::<f32>());
        let mut workspace = Workspace::new(&mut scratch, len);
        let [
            key,
            packed_keys,
            packed_values,
            dkey,
            dvalue,
            bias,
            query,
            output,
            doutput,
            scores,
            dscores,
            lse,
            delta,
        ] = sizes.map(|n| workspace.take(n));

        let key_bases = problem.key_bases(unit);
        let kv_rows = Rows {
            tokens: keys,
            bases: &key_bases,
            width: problem.key_width(),
        };
        // `key` serves as the unpacked values first.
        key[keys.len() * padded..].fill(0.0);
        gather(level, &self.inputs.v, &kv_rows, dim, 1.0, key, padded);
        pack_transposed(level, padded, key, packed_values);
        gather(level, &self.inputs.k, &kv_rows, dim, 1.0, key, padded);
        pack_transposed(level, padded, key, packed_keys);
        problem.fill_bias(sample, keys, bias);
        dkey.fill(0.0);
        dvalue.fill(0.0);
        let zeros = vec![0.0f32; width];

        prefetch(&starts_of(&self.dk), &kv_rows, dim);
        prefetch(&starts_of(&self.dv), &kv_rows, dim);
        let dq_starts = starts_of(&self.dq);
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
                gather(level, self.outs, &q_rows, dim, 1.0, output, padded);
                gather(level, self.douts, &q_rows, dim, 1.0, doutput, padded);
                prefetch(&dq_starts, &q_rows, dim);
                rows::row_dots(level, output, doutput, padded, &mut delta[..m]);
                let lse_row = problem.lse_row(sample, head);
                for (lse, &t) in lse.iter_mut().zip(tokens) {
                    let value = self.lse[lse_row + problem.position(t)];
                    // A query that saw no key: +inf makes all its probabilities 0.
                    *lse = if value == f32::NEG_INFINITY {
                        f32::INFINITY
                    } else {
                        value * LOG2_E
                    };
                }
                let (seen, first_limit) = problem.seen(first, m, lanes, width);
                let real = seen.min(keys.len());
                let by_key = Size {
                    m,
                    vectors: seen / lanes,
                    k: dim,
                };
                multiply(
                    level,
                    by_key,
                    Left::rows(query, padded),
                    Right::packed(level, packed_keys, padded),
                    Start::Row(bias),
                    Out {
                        data: &mut *scores,
                        row: seen,
                    },
                );
                multiply(
                    level,
                    by_key,
                    Left::rows(doutput, padded),
                    Right::packed(level, packed_values, padded),
                    Start::Row(&zeros),
                    Out {
                        data: &mut *dscores,
                        row: seen,
                    },
                );
                let (p, ds) = (&mut scores[..m * seen], &mut dscores[..m * seen]);
                if let Some(next) = next.filter(|_| i == 0) {
                    let more = [self.outs, self.douts];
                    self.inputs.prefetch(problem, &more, next, first..first + m);
                }
                rows::score_gradients(level, p, ds, seen, first_limit, &lse[..m], &delta[..m]);
                // dV += P^T dO and dK += dS^T Q, reading P and dS by columns.
                let by_value = Size {
                    m: real,
                    vectors: padded / lanes,
                    k: m,
                };
                let accumulate = |left: &[f32], right: &[f32], out: &mut [f32]| {
                    multiply(
                        level,
                        by_value,
                        Left::columns(left, seen),
                        Right::rows(level, right, padded),
                        Start::Out,
                        Out {
                            data: out,
                            row: padded,
                        },
                    );
                };
                accumulate(p, doutput, dvalue);
                accumulate(ds, query, dkey);
                // dQ = dS K; the outputs are used up, their scratch takes it.
                let dquery = &mut *output;
                // The terms are the real keys that are seen.
                multiply(
                    level,
                    Size {
                        m,
                        vectors: padded / lanes,
                        k: real,
                    },
                    Left::rows(ds, seen),
                    Right::rows(level, key, padded),
                    Start::Zero,
                    Out {
                        data: &mut *dquery,
                        row: padded,
                    },
                );
                unsafe {
                    // SAFETY: the rows lie in the gradients, whose lengths were checked; units have
                    // disjoint rows.
                    scatter(level, &self.dq, &q_rows, dim, &[cfg.scale], dquery, padded);
                }
            }
        }
        // The gathered queries carry scale * log2(e); scores and so their gradient are natural.
        // SAFETY: as for dQ; the key head is this unit's alone.
        unsafe {
            scatter(level, &self.dk, &kv_rows, dim, &[LN_2], dkey, padded);
            scatter(level, &self.dv, &kv_rows, dim, &[1.0], dvalue, padded);
        }
    }
}
