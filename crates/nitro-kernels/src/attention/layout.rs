//! Where the rows of one attention problem lie in the segments, and copies from and to them.

use super::AttentionConfig;
use crate::pool::SharedPtr;
use crate::simd::simd_kernel;

/// A row of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Token {
    pub(super) segment: u32,
    pub(super) token: u32,
}

/// The tokens of every group, in the order of the joint sequence: all of the first segment's tokens
/// in that group, then the second's. `tokens[i]` is the length of segment `i`, or 0 to leave it out.
pub(super) fn tokens_of_groups(cfg: &AttentionConfig, tokens: &[usize]) -> Vec<Vec<Token>> {
    (0..cfg.groups)
        .map(|group| {
            let mut list = Vec::new();
            for (segment, &count) in tokens.iter().enumerate() {
                // Token (l * groups + group) * run + n, for all l and n.
                for start in (group * cfg.run..count).step_by(cfg.groups * cfg.run) {
                    for token in start..start + cfg.run {
                        list.push(Token {
                            segment: segment as u32,
                            token: token as u32,
                        });
                    }
                }
            }
            list
        })
        .collect()
}

/// How to find a head's row: in segment `i`, token `t` begins at `bases[i] + t * width`.
pub(super) struct Rows<'a> {
    pub(super) tokens: &'a [Token],
    pub(super) bases: &'a [usize],
    /// Values per token: heads times head dimension.
    pub(super) width: usize,
}

/// The position of a head's first row in each segment of one sample.
pub(super) fn bases(lengths: &[usize], sample: usize, width: usize, head_at: usize) -> Vec<usize> {
    lengths
        .iter()
        .map(|tokens| sample * tokens * width + head_at)
        .collect()
}

simd_kernel! {
    /// Copies rows of `dim` values, times `factor`, to consecutive rows of `padded` values (a multiple
    /// of the lanes); the padding becomes zero.
    pub(super) fn gather<S>(
        s,
        sources: &[&[f32]],
        rows: &Rows<'_>,
        dim: usize,
        factor: f32,
        dst: &mut [f32],
        padded: usize,
    ) {
        let factor = s.splat(factor);
        for (t, dst) in rows.tokens.iter().zip(dst.chunks_exact_mut(padded)) {
            let segment = t.segment as usize;
            let start = rows.bases[segment] + t.token as usize * rows.width;
            let src = &sources[segment][start..start + dim];
            for i in (0..padded).step_by(S::LANES) {
                let v = if i + S::LANES <= dim { s.load(&src[i..]) } else { s.load_part(&src[i.min(dim)..]) };
                s.store(&mut dst[i..], s.mul(v, factor));
            }
        }
    }
}

simd_kernel! {
    /// Writes consecutive rows of `padded` values, row `i` times `factor(i)`, to rows of `dim` values.
    fn scatter_raw<S>(
        s,
        targets: &[SharedPtr<f32>],
        rows: &Rows<'_>,
        dim: usize,
        factors: &[f32],
        src: &[f32],
        padded: usize,
    ) {
        for (r, (t, src)) in rows.tokens.iter().zip(src.chunks_exact(padded)).enumerate() {
            let factor = s.splat(factors[if factors.len() == 1 { 0 } else { r }]);
            let segment = t.segment as usize;
            let start = rows.bases[segment] + t.token as usize * rows.width;
            // SAFETY: `scatter`, the only caller, has the same contract.
            let dst = unsafe {
                std::slice::from_raw_parts_mut(targets[segment].get().add(start), dim)
            };
            for i in (0..dim).step_by(S::LANES) {
                s.store_at(dst, i, s.mul(s.load(&src[i..]), factor));
            }
        }
    }
}

/// Writes consecutive rows of `padded` values to the `rows` of the targets, row `i` times
/// `factors[i]` (or all times the only factor).
///
/// # Safety
/// Every row must lie in its target, and no one else may access these rows meanwhile.
pub(super) unsafe fn scatter(
    level: crate::simd::Level,
    targets: &[SharedPtr<f32>],
    rows: &Rows<'_>,
    dim: usize,
    factors: &[f32],
    src: &[f32],
    padded: usize,
) {
    scatter_raw(level, targets, rows, dim, factors, src, padded);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alternating_subregions_follow_the_einops_pattern() {
        // 'b (l s n) c -> (b s) (l n) c' of 12 tokens with s = 2, n = 3, and 6 text tokens after them.
        let cfg = AttentionConfig {
            groups: 2,
            run: 3,
            ..AttentionConfig::joint(1, 1, 1)
        };
        let groups = tokens_of_groups(&cfg, &[12, 6]);
        let plain: Vec<Vec<(u32, u32)>> = groups
            .iter()
            .map(|g| g.iter().map(|t| (t.segment, t.token)).collect())
            .collect();
        let image = |list: [u32; 6]| list.map(|t| (0, t)).to_vec();
        let text = |list: [u32; 3]| list.map(|t| (1, t)).to_vec();
        assert_eq!(
            plain[0],
            [image([0, 1, 2, 6, 7, 8]), text([0, 1, 2])].concat()
        );
        assert_eq!(
            plain[1],
            [image([3, 4, 5, 9, 10, 11]), text([3, 4, 5])].concat()
        );
    }
}
