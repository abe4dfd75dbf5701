//! The row loops of layer norm and RMS norm, for rows that share one gain and one offset.
//!
//! Rows are taken four at a time where the registers allow: their sums are independent chains, and
//! gains and their gradients are read and written once for all four.

use crate::simd::{Simd, prefetch_line, simd_kernel};

/// Reads the vector at `i` of `row`, or what is left of the row if `TAIL`.
///
/// # Safety
/// Unless `TAIL`, the row must have a whole vector at `i`.
#[inline(always)]
unsafe fn load<S: Simd, const TAIL: bool>(s: S, row: &[f32], i: usize) -> S::V {
    if TAIL {
        s.load_part(&row[i..])
    } else {
        // SAFETY: the caller vouches for the vector.
        unsafe { s.load_ptr(row.as_ptr().add(i)) }
    }
}

/// Writes the vector at `i` of `row`, or what is left of the row if `TAIL`.
///
/// # Safety
/// Unless `TAIL`, the row must have a whole vector at `i`.
#[inline(always)]
unsafe fn store<S: Simd, const TAIL: bool>(s: S, row: &mut [f32], i: usize, v: S::V) {
    if TAIL {
        s.store_part(&mut row[i..], v);
    } else {
        // SAFETY: the caller vouches for the vector.
        unsafe { s.store_ptr(row.as_mut_ptr().add(i), v) }
    }
}

/// As many ones as any vector has lanes.
const ONES: [f32; 16] = [1.0; 16];

/// Runs `$step::<S, R, TAIL>($args, i)` for every vector of `$len` channels.
macro_rules! for_vectors {
    ($simd:ty, $rows:expr, $len:expr, $step:ident($($arg:expr),*)) => {
        let full = $len - $len % <$simd>::LANES;
        for i in (0..full).step_by(<$simd>::LANES) {
            // SAFETY: a whole vector lies at `i` of every row, all of which have `$len` values.
            unsafe { $step::<$simd, { $rows }, false>($($arg,)* i) };
        }
        if full < $len {
            // SAFETY: nothing is asked of a tail.
            unsafe { $step::<$simd, { $rows }, true>($($arg,)* full) };
        }
    };
}

/// The `R` rows of `len` values from the front of `x`.
#[inline(always)]
fn split<const R: usize>(x: &[f32], len: usize) -> [&[f32]; R] {
    core::array::from_fn(|r| &x[r * len..][..len])
}

#[inline(always)]
fn split_mut<const R: usize>(x: &mut [f32], len: usize) -> [&mut [f32]; R] {
    let mut rows = x.chunks_exact_mut(len);
    core::array::from_fn(|_| rows.next().expect("the block has R rows"))
}

/// # Safety
/// As [`load`].
#[inline(always)]
unsafe fn add_sum<S: Simd, const R: usize, const TAIL: bool>(
    s: S,
    x: &[&[f32]; R],
    sums: &mut [S::V; R],
    i: usize,
) {
    for (x, sum) in x.iter().zip(sums) {
        // SAFETY: as the caller's.
        *sum = s.add(*sum, unsafe { load::<S, TAIL>(s, x, i) });
    }
}

/// # Safety
/// As [`load`].
#[inline(always)]
unsafe fn add_squares<S: Simd, const R: usize, const TAIL: bool>(
    s: S,
    x: &[&[f32]; R],
    mu: &[S::V; R],
    sums: &mut [S::V; R],
    i: usize,
) {
    for r in 0..R {
        prefetch_line(x[r].as_ptr().wrapping_add(R * x[r].len() + i));
        // Lanes past the end of the row read 0, which must not count as deviation.
        let mu = if TAIL {
            s.mul(mu[r], s.load_part(&ONES[..x[r].len() - i]))
        } else {
            mu[r]
        };
        // SAFETY: as the caller's.
        let d = s.sub(unsafe { load::<S, TAIL>(s, x[r], i) }, mu);
        sums[r] = s.fma(d, d, sums[r]);
    }
}

/// # Safety
/// As [`load`].
#[inline(always)]
unsafe fn write_normed<S: Simd, const R: usize, const TAIL: bool>(
    s: S,
    x: &[&[f32]; R],
    (mu, rstd): (&[S::V; R], &[S::V; R]),
    (gain, offset): (&[f32], &[f32]),
    y: &mut [&mut [f32]; R],
    i: usize,
) {
    // SAFETY: as the caller's.
    unsafe {
        let (gain, offset) = (load::<S, TAIL>(s, gain, i), load::<S, TAIL>(s, offset, i));
        for r in 0..R {
            prefetch_line(y[r].as_ptr().wrapping_add(R * y[r].len() + i));
            let normed = s.mul(s.sub(load::<S, TAIL>(s, x[r], i), mu[r]), rstd[r]);
            store::<S, TAIL>(s, y[r], i, s.fma(normed, gain, offset));
        }
    }
}

#[inline(always)]
fn forward_block<S: Simd, const R: usize>(
    s: S,
    x: &[f32],
    (gain, offset): (&[f32], &[f32]),
    eps: f32,
    y: &mut [f32],
    mean: &mut [f32],
    rstd: &mut [f32],
) {
    let channels = gain.len();
    let per_channel = 1.0 / channels as f32;
    assert!(offset.len() == channels);
    let x = split::<R>(x, channels);
    let mut y = split_mut::<R>(y, channels);
    let zero = [s.splat(0.0); R];
    let mut mu = zero;
    if !mean.is_empty() {
        let mut sums = zero;
        for_vectors!(S, R, channels, add_sum(s, &x, &mut sums));
        for r in 0..R {
            mean[r] = s.sum(sums[r]) * per_channel;
            mu[r] = s.splat(mean[r]);
        }
    }
    // Two passes (the rows are in cache): the one-pass formula cancels when |mean| >> deviation.
    let mut squares = zero;
    for_vectors!(S, R, channels, add_squares(s, &x, &mu, &mut squares));
    let mut rstd_v = zero;
    for r in 0..R {
        rstd[r] = 1.0 / (s.sum(squares[r]) * per_channel + eps).sqrt();
        rstd_v[r] = s.splat(rstd[r]);
    }
    for_vectors!(
        S,
        R,
        channels,
        write_normed(s, &x, (&mu, &rstd_v), (gain, offset), &mut y)
    );
}

simd_kernel! {
    /// `y = norm(x) * gain + offset` for consecutive rows of `gain.len()` channels. Writes one
    /// reciprocal deviation per row and, if `mean` is not empty, subtracts and writes the mean.
    pub(crate) fn forward_rows<S>(
        s,
        x: &[f32],
        gain: &[f32],
        offset: &[f32],
        eps: f32,
        y: &mut [f32],
        mean: &mut [f32],
        rstd: &mut [f32],
    ) {
        let (rows, channels) = (rstd.len(), gain.len());
        let block = if S::REGISTERS >= 32 { 4 } else { 2 };
        let mut r = 0;
        while r < rows {
            let count = if r + block <= rows { block } else { 1 };
            let span = r * channels..(r + count) * channels;
            let (x, y) = (&x[span.clone()], &mut y[span]);
            let mean = if mean.is_empty() { &mut [][..] } else { &mut mean[r..r + count] };
            let rstd = &mut rstd[r..r + count];
            match count {
                4 => forward_block::<S, 4>(s, x, (gain, offset), eps, y, mean, rstd),
                2 => forward_block::<S, 2>(s, x, (gain, offset), eps, y, mean, rstd),
                _ => forward_block::<S, 1>(s, x, (gain, offset), eps, y, mean, rstd),
            }
            r += count;
        }
    }
}

/// Sums of `g` and of `g * norm(x)` over a row, where `g = dy * gain`.
#[derive(Clone, Copy)]
struct Sums<V> {
    g: V,
    gx: V,
}

/// # Safety
/// As [`load`].
#[inline(always)]
unsafe fn add_gradients<S: Simd, const R: usize, const TAIL: bool>(
    s: S,
    (dy, x): (&[&[f32]; R], &[&[f32]; R]),
    (mu, rstd): (&[S::V; R], &[S::V; R]),
    gain: &[f32],
    sums: &mut [Sums<S::V>; R],
    (dgain, doffset): (&mut [f32], &mut [f32]),
    i: usize,
) {
    // SAFETY: as the caller's.
    unsafe {
        let gain = load::<S, TAIL>(s, gain, i);
        let mut sum_gain = load::<S, TAIL>(s, dgain, i);
        let mut sum_offset = load::<S, TAIL>(s, doffset, i);
        for r in 0..R {
            // The block after this one: two passes over four rows are no pattern that the hardware
            // follows well.
            prefetch_line(dy[r].as_ptr().wrapping_add(R * dy[r].len() + i));
            prefetch_line(x[r].as_ptr().wrapping_add(R * x[r].len() + i));
            // Lanes past the end have dy = 0 and add nothing.
            let dy = load::<S, TAIL>(s, dy[r], i);
            let normed = s.mul(s.sub(load::<S, TAIL>(s, x[r], i), mu[r]), rstd[r]);
            let g = s.mul(dy, gain);
            sums[r].g = s.add(sums[r].g, g);
            sums[r].gx = s.fma(g, normed, sums[r].gx);
            sum_gain = s.fma(dy, normed, sum_gain);
            sum_offset = s.add(dy, sum_offset);
        }
        store::<S, TAIL>(s, dgain, i, sum_gain);
        store::<S, TAIL>(s, doffset, i, sum_offset);
    }
}

/// # Safety
/// As [`load`].
#[inline(always)]
unsafe fn write_gradient<S: Simd, const R: usize, const TAIL: bool>(
    s: S,
    (dy, x): (&[&[f32]; R], &[&[f32]; R]),
    (mu, rstd): (&[S::V; R], &[S::V; R]),
    gain: &[f32],
    means: &[Sums<S::V>; R],
    dx: &mut [&mut [f32]; R],
    i: usize,
) {
    // SAFETY: as the caller's.
    unsafe {
        let gain = load::<S, TAIL>(s, gain, i);
        for r in 0..R {
            prefetch_line(dx[r].as_ptr().wrapping_add(R * dx[r].len() + i));
            let normed = s.mul(s.sub(load::<S, TAIL>(s, x[r], i), mu[r]), rstd[r]);
            let g = s.mul(load::<S, TAIL>(s, dy[r], i), gain);
            let d = s.fnma(normed, means[r].gx, s.sub(g, means[r].g));
            store::<S, TAIL>(s, dx[r], i, s.mul(d, rstd[r]));
        }
    }
}

#[inline(always)]
fn backward_block<S: Simd, const R: usize>(
    s: S,
    (dy, x): (&[f32], &[f32]),
    gain: &[f32],
    (mean, rstd): (&[f32], &[f32]),
    dx: &mut [f32],
    (dgain, doffset): (&mut [f32], &mut [f32]),
) {
    let channels = gain.len();
    let per_channel = 1.0 / channels as f32;
    assert!(dgain.len() == channels && doffset.len() == channels);
    let rows = (&split::<R>(dy, channels), &split::<R>(x, channels));
    let mut dx = split_mut::<R>(dx, channels);
    let center = !mean.is_empty();
    let zero = s.splat(0.0);
    let mu: [S::V; R] = core::array::from_fn(
        #[inline(always)]
        |r| if center { s.splat(mean[r]) } else { zero },
    );
    let rstd: [S::V; R] = core::array::from_fn(
        #[inline(always)]
        |r| s.splat(rstd[r]),
    );
    let stats = (&mu, &rstd);
    let mut sums = [Sums { g: zero, gx: zero }; R];
    for_vectors!(
        S,
        R,
        channels,
        add_gradients(
            s,
            rows,
            stats,
            gain,
            &mut sums,
            (&mut *dgain, &mut *doffset)
        )
    );
    for sums in &mut sums {
        sums.gx = s.splat(s.sum(sums.gx) * per_channel);
        sums.g = if center {
            s.splat(s.sum(sums.g) * per_channel)
        } else {
            zero
        };
    }
    for_vectors!(
        S,
        R,
        channels,
        write_gradient(s, rows, stats, gain, &sums, &mut dx)
    );
}

simd_kernel! {
    /// Gradients of [`forward_rows`]: writes `dx`, and adds the sums over rows of `dy * norm(x)`
    /// and of `dy` to `dgain` and `doffset`.
    pub(crate) fn backward_rows<S>(
        s,
        dy: &[f32],
        x: &[f32],
        gain: &[f32],
        mean: &[f32],
        rstd: &[f32],
        dx: &mut [f32],
        dgain: &mut [f32],
        doffset: &mut [f32],
    ) {
        let (rows, channels) = (rstd.len(), gain.len());
        let block = if S::REGISTERS >= 32 { 4 } else { 2 };
        let mut r = 0;
        while r < rows {
            let count = if r + block <= rows { block } else { 1 };
            let span = r * channels..(r + count) * channels;
            let (rows, dx) = ((&dy[span.clone()], &x[span.clone()]), &mut dx[span]);
            let mean = if mean.is_empty() { &[][..] } else { &mean[r..r + count] };
            let stats = (mean, &rstd[r..r + count]);
            let sums = (&mut *dgain, &mut *doffset);
            match count {
                4 => backward_block::<S, 4>(s, rows, gain, stats, dx, sums),
                2 => backward_block::<S, 2>(s, rows, gain, stats, dx, sums),
                _ => backward_block::<S, 1>(s, rows, gain, stats, dx, sums),
            }
            r += count;
        }
    }
}
