//! What happens to a tile of the product before it leaves the cache: bias, activation.

use crate::isa::multiversion;

/// An elementwise activation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Activation {
    /// The value itself.
    #[default]
    None,
    /// GELU with the tanh approximation: `0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`.
    GeluTanh,
    /// SiLU: `x / (1 + exp(-x))`.
    Silu,
    /// `max(x, 0)`.
    Relu,
}

/// What to do with the product: `C = act((C if accumulating) + A B + bias)`.
#[derive(Debug, Default)]
pub struct Epilogue<'a> {
    /// Added to every row; one value per column of C.
    pub bias: Option<&'a [f32]>,
    /// Applied last.
    pub activation: Activation,
    /// Receives the value before the activation, in the layout of C (for the backward pass).
    pub pre_activation: Option<&'a mut [f32]>,
}

impl<'a> Epilogue<'a> {
    /// Nothing but an optional bias.
    pub fn bias(bias: Option<&'a [f32]>) -> Self {
        Epilogue {
            bias,
            ..Epilogue::default()
        }
    }
}

/// `a * b + c`, fused where `FUSED`: without hardware support `mul_add` is a slow library call.
#[inline(always)]
pub(crate) fn fma<const FUSED: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FUSED { a.mul_add(b, c) } else { a * b + c }
}

/// `exp(x)` to about 1e-7 relative, clamped to the normal range of f32. Written so that it vectorises.
#[inline(always)]
fn exp<const FUSED: bool>(x: f32) -> f32 {
    let x = x.clamp(-87.0, 88.0);
    // 2^n * exp(r), |r| <= ln(2)/2. Adding 1.5 * 2^23 rounds to the nearest integer.
    const ROUND: f32 = 12_582_912.0;
    let shifted = fma::<FUSED>(x, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    // ln(2) in two parts (Cody-Waite), so that r keeps its low bits.
    let r = fma::<FUSED>(n, -0.693_145_75, x);
    let r = fma::<FUSED>(n, -1.428_606_8e-6, r);
    // Taylor polynomial of degree 6; the remainder is below 1e-7 on this interval.
    let mut p = 1.0 / 720.0;
    p = fma::<FUSED>(r, p, 1.0 / 120.0);
    p = fma::<FUSED>(r, p, 1.0 / 24.0);
    p = fma::<FUSED>(r, p, 1.0 / 6.0);
    p = fma::<FUSED>(r, p, 0.5);
    p = fma::<FUSED>(r, p, 1.0);
    p = fma::<FUSED>(r, p, 1.0);
    let scale = f32::from_bits(
        (shifted
            .to_bits()
            .wrapping_sub(ROUND.to_bits())
            .wrapping_add(127))
            << 23,
    );
    p * scale
}

#[inline(always)]
fn sigmoid<const FUSED: bool>(x: f32) -> f32 {
    1.0 / (1.0 + exp::<FUSED>(-x))
}

#[inline(always)]
fn gelu_tanh<const FUSED: bool>(x: f32) -> f32 {
    // 0.5 (1 + tanh(u)) = sigmoid(2u)
    const TWICE_SQRT_2_OVER_PI: f32 = 1.595_769;
    let u = TWICE_SQRT_2_OVER_PI * fma::<FUSED>(x * x * x, 0.044_715, x);
    x * sigmoid::<FUSED>(u)
}

#[inline(always)]
fn apply<const FUSED: bool>(activation: Activation, values: &mut [f32]) {
    match activation {
        Activation::None => {}
        Activation::GeluTanh => values.iter_mut().for_each(|x| *x = gelu_tanh::<FUSED>(*x)),
        Activation::Silu => values.iter_mut().for_each(|x| *x *= sigmoid::<FUSED>(*x)),
        Activation::Relu => values.iter_mut().for_each(|x| *x = x.max(0.0)),
    }
}

multiversion! {
    /// Applies `activation` in place.
    pub(crate) fn apply_with_isa = apply(activation: Activation, values: &mut [f32])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Isa;

    #[test]
    fn activations_agree_with_f64_on_every_instruction_set() {
        let inputs: Vec<f32> = (-4000..4000).map(|i| i as f32 * 0.025).collect();
        for isa in Isa::supported() {
            for activation in [Activation::GeluTanh, Activation::Silu, Activation::Relu] {
                let mut values = inputs.clone();
                apply_with_isa(isa, activation, &mut values);
                for (&x, &y) in inputs.iter().zip(&values) {
                    let x64 = f64::from(x);
                    let expected = match activation {
                        Activation::None => x64,
                        Activation::Relu => x64.max(0.0),
                        Activation::Silu => x64 / (1.0 + (-x64).exp()),
                        Activation::GeluTanh => {
                            let u = (2.0 / std::f64::consts::PI).sqrt()
                                * (x64 + 0.044715 * x64.powi(3));
                            0.5 * x64 * (1.0 + u.tanh())
                        }
                    };
                    let error = (f64::from(y) - expected).abs();
                    assert!(
                        error <= 2e-6 * expected.abs() + 1e-6,
                        "{isa:?} {activation:?} x={x} got {y} expected {expected}"
                    );
                }
            }
        }
    }

    #[test]
    fn extreme_inputs_stay_finite_or_infinite_never_nan() {
        for activation in [Activation::GeluTanh, Activation::Silu, Activation::Relu] {
            let mut values = [-1e30_f32, 1e30, -200.0, 200.0, 0.0];
            apply_with_isa(Isa::current(), activation, &mut values);
            assert!(
                values.iter().all(|v| !v.is_nan()),
                "{activation:?} {values:?}"
            );
        }
    }
}
