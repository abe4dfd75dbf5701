//! Where the rows of one attention problem lie in the segments, and copies from and to them.

use super::AttentionConfig;
use crate::pool::SharedPtr;
use crate::simd::{prefetch_line, simd_kernel};

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
        assert!(dst.len() >= rows.tokens.len() * padded);
        assert!(padded == dim.next_multiple_of(S::LANES));
        let factor = s.splat(factor);
        let full = dim - dim % S::LANES;
        let mut dst = dst.as_mut_ptr();
        for t in rows.tokens {
            let segment = t.segment as usize;
            let start = rows.bases[segment] + t.token as usize * rows.width;
            let src = &sources[segment][start..start + dim];
            // SAFETY: `src` has `dim` values; `dst` has `padded` values for each token, by the
            // assertion above, and `padded` holds the last, partial vector.
            unsafe {
                for i in (0..full).step_by(S::LANES) {
                    s.store_ptr(dst.add(i), s.mul(s.load_ptr(src.as_ptr().add(i)), factor));
                }
                if full < padded {
                    s.store_ptr(dst.add(full), s.mul(s.load_part(&src[full..]), factor));
                }
                dst = dst.add(padded);
            }
        }
    }
}

simd_kernel! {
    fn scatter_raw<S>(
        s,
        targets: &[SharedPtr<f32>],
        rows: &Rows<'_>,
        dim: usize,
        factors: &[f32],
        src: &[f32],
        padded: usize,
    ) {
        assert!(src.len() >= rows.tokens.len() * padded);
        assert!(padded == dim.next_multiple_of(S::LANES));
        let full = dim - dim % S::LANES;
        let mut src = src.as_ptr();
        for (r, t) in rows.tokens.iter().enumerate() {
            let factor = s.splat(factors[if factors.len() == 1 { 0 } else { r }]);
            let segment = t.segment as usize;
            let start = rows.bases[segment] + t.token as usize * rows.width;
            // SAFETY: `src` has `padded` values for each token, by the assertion above. `scatter`,
            // the only caller, has this function's contract for the targets.
            unsafe {
                let dst = targets[segment].get().add(start);
                for i in (0..full).step_by(S::LANES) {
                    s.store_ptr(dst.add(i), s.mul(s.load_ptr(src.add(i)), factor));
                }
                if full < dim {
                    let rest = std::slice::from_raw_parts_mut(dst.add(full), dim - full);
                    s.store_part(rest, s.mul(s.load_ptr(src.add(full)), factor));
                }
                src = src.add(padded);
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

/// Asks the processor to bring rows of `dim` values into its cache. A head's rows are short and far
/// apart, which hardware prefetchers do not follow.
pub(super) fn prefetch(bases_of_segments: &[*const f32], rows: &Rows<'_>, dim: usize) {
    for t in rows.tokens {
        let segment = t.segment as usize;
        let start = rows.bases[segment] + t.token as usize * rows.width;
        let row = bases_of_segments[segment].wrapping_add(start);
        for i in (0..dim).step_by(16) {
            prefetch_line(row.wrapping_add(i));
        }
    }
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
