use super::*;
use crate::testing::{assert_close, dot, gradient, random, to_f64};

/// One case: shapes, and which segments have queries and keys.
#[derive(Clone)]
struct Case {
    cfg: AttentionConfig,
    tokens: Vec<usize>,
    has_q: Vec<bool>,
    has_k: Vec<bool>,
    mask: Option<Vec<bool>>,
}

impl Case {
    fn new(cfg: AttentionConfig, tokens: &[usize]) -> Self {
        let all = vec![true; tokens.len()];
        Self {
            cfg,
            tokens: tokens.to_vec(),
            has_q: all.clone(),
            has_k: all,
            mask: None,
        }
    }
}

/// f64 attention that follows the definition: group by group, query by query. `q`, `k`, `v` are the
/// segments' values one after the other (absent segments contribute nothing).
fn reference(case: &Case, q: &[f64], k: &[f64], v: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let cfg = &case.cfg;
    let total: usize = case.tokens.iter().sum();
    let dim = cfg.head_dim;
    let start = |present: &[bool], heads: usize, segment: usize| -> usize {
        (0..segment)
            .filter(|&s| present[s])
            .map(|s| cfg.batch * case.tokens[s] * heads * dim)
            .sum()
    };
    let group_of = |token: usize| token / cfg.run % cfg.groups;
    let mut out = vec![0.0; q.len()];
    let mut lse = vec![f64::NAN; cfg.batch * cfg.heads * total];
    for b in 0..cfg.batch {
        for h in 0..cfg.heads {
            let kv = h / (cfg.heads / cfg.kv_heads);
            let mut q_offset = 0;
            for (qs, &q_tokens) in case.tokens.iter().enumerate() {
                for qt in 0..q_tokens {
                    if !case.has_q[qs] {
                        continue;
                    }
                    let q_at = start(&case.has_q, cfg.heads, qs)
                        + ((b * q_tokens + qt) * cfg.heads + h) * dim;
                    let mut terms = Vec::new();
                    let mut k_offset = 0;
                    for (ks, &k_tokens) in case.tokens.iter().enumerate() {
                        for kt in 0..k_tokens {
                            let visible = case.has_k[ks]
                                && group_of(kt) == group_of(qt)
                                && !(cfg.causal && kt > qt)
                                && case
                                    .mask
                                    .as_ref()
                                    .is_none_or(|m| m[b * total + k_offset + kt]);
                            if visible {
                                let at = start(&case.has_k, cfg.kv_heads, ks)
                                    + ((b * k_tokens + kt) * cfg.kv_heads + kv) * dim;
                                let score: f64 = (0..dim).map(|c| q[q_at + c] * k[at + c]).sum();
                                terms.push((score * f64::from(cfg.scale), at));
                            }
                        }
                        k_offset += k_tokens;
                    }
                    let sum: f64 = terms.iter().map(|(score, _)| score.exp()).sum();
                    lse[(b * cfg.heads + h) * total + q_offset + qt] = sum.ln();
                    for (score, at) in terms {
                        for c in 0..dim {
                            out[q_at + c] += score.exp() / sum * v[at + c];
                        }
                    }
                }
                q_offset += q_tokens;
            }
        }
    }
    (out, lse)
}

/// Splits the concatenated values into one slice per segment.
fn split<'a>(case: &Case, present: &[bool], heads: usize, all: &'a [f32]) -> Vec<&'a [f32]> {
    let mut rest = all;
    let mut parts = Vec::new();
    for (&tokens, &present) in case.tokens.iter().zip(present) {
        let len = if present {
            case.cfg.batch * tokens * heads * case.cfg.head_dim
        } else {
            0
        };
        let (part, left) = rest.split_at(len);
        parts.push(part);
        rest = left;
    }
    parts
}

fn split_mut<'a>(
    case: &Case,
    present: &[bool],
    heads: usize,
    all: &'a mut [f32],
) -> Vec<&'a mut [f32]> {
    let mut rest = all;
    let mut parts = Vec::new();
    for (&tokens, &present) in case.tokens.iter().zip(present) {
        let len = if present {
            case.cfg.batch * tokens * heads * case.cfg.head_dim
        } else {
            0
        };
        let (part, left) = rest.split_at_mut(len);
        parts.push(part);
        rest = left;
    }
    parts
}

/// Compares forward with the reference and, if `full` is set, every gradient with finite differences.
fn check(case: &Case, full: bool) {
    let cfg = &case.cfg;
    let count = |present: &[bool], heads: usize| -> usize {
        let tokens: usize = case
            .tokens
            .iter()
            .zip(present)
            .map(|(t, &p)| if p { *t } else { 0 })
            .sum();
        cfg.batch * tokens * heads * cfg.head_dim
    };
    let q = random(1, count(&case.has_q, cfg.heads));
    let k = random(2, count(&case.has_k, cfg.kv_heads));
    let v = random(3, k.len());
    let dout = random(4, q.len());
    let total: usize = case.tokens.iter().sum();
    let (expected, expected_lse) = reference(case, &to_f64(&q), &to_f64(&k), &to_f64(&v));

    for level in Level::available() {
        let what = format!("{level:?} {cfg:?} tokens {:?}", case.tokens);
        let (qs, ks) = (
            split(case, &case.has_q, cfg.heads, &q),
            split(case, &case.has_k, cfg.kv_heads, &k),
        );
        let vs = split(case, &case.has_k, cfg.kv_heads, &v);
        let segments: Vec<Segment<'_>> = (0..case.tokens.len())
            .map(|i| Segment {
                q: qs[i],
                k: ks[i],
                v: vs[i],
                tokens: case.tokens[i],
            })
            .collect();
        let mask = case.mask.as_deref();
        let mut out = vec![f32::NAN; q.len()];
        let mut lse = vec![f32::NAN; cfg.batch * cfg.heads * total];
        forward::run(
            level,
            cfg,
            &segments,
            mask,
            &mut split_mut(case, &case.has_q, cfg.heads, &mut out),
            &mut lse,
        )
        .unwrap();
        assert_close(&format!("{what}: out"), &out, &expected);
        for (got, expected) in lse.iter().zip(&expected_lse) {
            let same = f64::from(*got) == *expected // both -inf
                || got.is_nan() && expected.is_nan() // not computed
                || (f64::from(*got) - expected).abs() < 1e-6 * (1.0 + expected.abs());
            assert!(same, "{what}: lse {got} {expected}");
        }
        if !full {
            continue;
        }

        let mut dq = vec![f32::NAN; q.len()];
        let mut dk = vec![f32::NAN; k.len()];
        let mut dv = vec![f32::NAN; v.len()];
        let mut grads: Vec<SegmentGrads<'_>> = split_mut(case, &case.has_q, cfg.heads, &mut dq)
            .into_iter()
            .zip(split_mut(case, &case.has_k, cfg.kv_heads, &mut dk))
            .zip(split_mut(case, &case.has_k, cfg.kv_heads, &mut dv))
            .map(|((dq, dk), dv)| SegmentGrads { dq, dk, dv })
            .collect();
        backward::run(
            level,
            cfg,
            &segments,
            mask,
            &split(case, &case.has_q, cfg.heads, &out),
            &lse,
            &split(case, &case.has_q, cfg.heads, &dout),
            &mut grads,
        )
        .unwrap();
        let (q, k, v) = (to_f64(&q), to_f64(&k), to_f64(&v));
        let expected = gradient(&q, |q| dot(&dout, &reference(case, q, &k, &v).0));
        assert_close(&format!("{what}: dq"), &dq, &expected);
        let expected = gradient(&k, |k| dot(&dout, &reference(case, &q, k, &v).0));
        assert_close(&format!("{what}: dk"), &dk, &expected);
        let expected = gradient(&v, |v| dot(&dout, &reference(case, &q, &k, v).0));
        assert_close(&format!("{what}: dv"), &dv, &expected);
    }
}

#[test]
fn joint_attention_matches_f64() {
    check(&Case::new(AttentionConfig::joint(2, 2, 5), &[7, 3]), true);
    check(&Case::new(AttentionConfig::joint(1, 1, 16), &[9]), true);
    check(&Case::new(AttentionConfig::joint(1, 2, 19), &[5, 1]), true);
    // The miniature's and Nitro-E's head sizes over several query blocks and odd lengths.
    for dim in [16, 24, 32, 64] {
        check(
            &Case::new(AttentionConfig::joint(1, 2, dim), &[80, 32]),
            false,
        );
        check(
            &Case::new(AttentionConfig::joint(1, 1, dim), &[257, 30]),
            false,
        );
    }
}

#[test]
fn alternating_subregions_match_f64() {
    for (groups, run) in [(2, 1), (2, 3), (4, 2)] {
        let tokens = [2 * groups * run, groups * run];
        let cfg = AttentionConfig {
            groups,
            run,
            ..AttentionConfig::joint(2, 2, 3)
        };
        check(&Case::new(cfg, &tokens), true);
    }
    let cfg = AttentionConfig {
        groups: 4,
        run: 4,
        ..AttentionConfig::joint(2, 3, 32)
    };
    check(&Case::new(cfg, &[256, 32]), false);
}

#[test]
fn causal_grouped_queries_with_padding_match_f64() {
    let cfg = AttentionConfig {
        kv_heads: 2,
        causal: true,
        ..AttentionConfig::joint(2, 4, 6)
    };
    let mut case = Case::new(cfg, &[9]);
    check(&case, true);
    // Sample 0 is padded on the right; sample 1 on the left, so that its first queries see nothing.
    case.mask = Some(
        (0..18)
            .map(|i| if i < 9 { i < 6 } else { i >= 12 })
            .collect(),
    );
    check(&case, true);
    let cfg = AttentionConfig {
        kv_heads: 1,
        causal: true,
        ..AttentionConfig::joint(1, 2, 64)
    };
    check(&Case::new(cfg, &[130]), false);
}

#[test]
fn a_query_that_sees_no_key_gives_zeros_and_zero_gradients() {
    let mut case = Case::new(AttentionConfig::joint(2, 1, 4), &[3, 2]);
    case.mask = Some(vec![
        false, false, false, false, false, true, false, true, true, false,
    ]);
    check(&case, true);
}

#[test]
fn segments_may_lack_queries_or_keys() {
    // The last block of E-MMDiT needs no text outputs.
    let mut case = Case::new(AttentionConfig::joint(2, 2, 5), &[6, 4]);
    case.has_q = vec![true, false];
    check(&case, true);
    // Cross attention: queries of one sequence, keys of another.
    case.has_k = vec![false, true];
    check(&case, true);
}

#[test]
fn no_keys_or_no_tokens_at_all_are_no_special_case() {
    let mut case = Case::new(AttentionConfig::joint(1, 2, 5), &[4]);
    case.has_k = vec![false];
    check(&case, true);
    check(&Case::new(AttentionConfig::joint(2, 2, 5), &[0, 3]), true);
    check(&Case::new(AttentionConfig::joint(2, 2, 5), &[0]), true);
    check(
        &Case::new(
            AttentionConfig {
                causal: true,
                ..AttentionConfig::joint(1, 1, 5)
            },
            &[0],
        ),
        true,
    );
}

#[test]
fn large_scores_do_not_overflow() {
    let mut cfg = AttentionConfig::joint(1, 1, 8);
    cfg.scale = 40.0;
    check(&Case::new(cfg, &[12]), false);
}

#[test]
fn bad_shapes_are_errors_that_say_what_to_do() {
    let x = vec![0.0; 6 * 4];
    let segment = Segment {
        q: &x,
        k: &x,
        v: &x,
        tokens: 6,
    };
    let mut out = vec![0.0; 24];
    let mut lse = vec![0.0; 6];
    let mut run = |cfg: AttentionConfig, segments: &[Segment<'_>]| {
        attention_forward(&cfg, segments, None, &mut [&mut out], &mut lse)
            .unwrap_err()
            .to_string()
    };
    let cfg = AttentionConfig::joint(1, 1, 4);
    assert!(run(AttentionConfig { groups: 4, ..cfg }, &[segment]).contains("groups * run"));
    assert!(
        run(
            AttentionConfig {
                heads: 3,
                kv_heads: 2,
                ..cfg
            },
            &[segment]
        )
        .contains("divide")
    );
    assert!(
        run(
            AttentionConfig {
                causal: true,
                groups: 2,
                ..cfg
            },
            &[segment]
        )
        .contains("one segment")
    );
    assert!(
        run(
            cfg,
            &[Segment {
                q: &x[1..],
                ..segment
            }]
        )
        .contains("query length")
    );
}
