//! Helpers for unit tests: random data, and gradients of f64 reference functions.

/// Reproducible values, roughly normal with deviation 1.
pub(crate) fn random(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0x1234_5678_9ABC_DEF0;
    let mut uniform = || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 40) as f32 / (1u64 << 24) as f32
    };
    // A sum of four uniforms, scaled to deviation 1.
    (0..len)
        .map(|_| (uniform() + uniform() + uniform() + uniform() - 2.0) * 1.732)
        .collect()
}

pub(crate) fn to_f64(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

/// `|actual - expected| / |expected|` in the L2 norm.
pub(crate) fn rel_l2(actual: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(actual.len(), expected.len());
    let (mut error, mut norm) = (0.0, 0.0);
    for (&a, &e) in actual.iter().zip(expected) {
        error += (f64::from(a) - e).powi(2);
        norm += e * e;
    }
    if norm == 0.0 {
        error.sqrt()
    } else {
        (error / norm).sqrt()
    }
}

/// Asserts that `actual` is within `1e-5` of `expected` in relative L2.
#[track_caller]
pub(crate) fn assert_close(what: &str, actual: &[f32], expected: &[f64]) {
    let error = rel_l2(actual, expected);
    assert!(error <= 1e-5, "{what}: relative L2 error {error:.2e}");
}

/// Gradient of `f` at `x` by central differences; accurate to about 1e-9 in f64.
pub(crate) fn gradient(x: &[f64], f: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    let mut x = x.to_vec();
    (0..x.len())
        .map(|i| {
            let (keep, h) = (x[i], 1e-5);
            x[i] = keep + h;
            let up = f(&x);
            x[i] = keep - h;
            let down = f(&x);
            x[i] = keep;
            (up - down) / (2.0 * h)
        })
        .collect()
}

/// `sum(a * b)` with a random cotangent `a`, the scalar whose gradient tests compare.
pub(crate) fn dot(a: &[f32], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * b).sum()
}
