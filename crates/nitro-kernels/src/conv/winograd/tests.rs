//! Against convolutions computed in f64 from their definition, on every instruction set.

use super::*;
use crate::testing::{random, rel_l2};

/// The convolution in f64, without bias.
fn reference(
    form: WinogradForm,
    [h, w]: [usize; 2],
    x: &[f32],
    [o, i]: [usize; 2],
    g: &[f32],
) -> Vec<f64> {
    let scale = if form == WinogradForm::Same { 1 } else { 2 };
    let (oh, ow) = (scale * h, scale * w);
    let mut y = vec![0.0; oh * ow * o];
    for at in 0..oh * ow {
        for tap in 0..9 {
            let row = (at / ow + tap / 3).wrapping_sub(1);
            let col = (at % ow + tap % 3).wrapping_sub(1);
            if row >= oh || col >= ow {
                continue;
            }
            let pixel = &x[(row / scale * w + col / scale) * i..][..i];
            for (out, y) in y[at * o..][..o].iter_mut().enumerate() {
                for (c, &x) in pixel.iter().enumerate() {
                    *y += f64::from(x) * f64::from(g[(out * i + c) * 9 + tap]);
                }
            }
        }
    }
    y
}

const FORMS: [WinogradForm; 2] = [WinogradForm::Same, WinogradForm::Doubled];

/// What each precision may lose.
fn tolerance(precision: Precision) -> f64 {
    match precision {
        Precision::F32 => 2e-6,
        Precision::Bf16 | Precision::Int8 => 2e-3,
    }
}

#[test]
fn both_forms_match_f64_for_odd_sizes() {
    for isa in Isa::supported() {
        for form in FORMS {
            for precision in [Precision::F32, Precision::Bf16] {
                for (h, w, i, o) in [
                    (1, 1, 1, 1),
                    (4, 8, 16, 16),
                    (5, 7, 3, 70),
                    (9, 14, 33, 20),
                    (2, 37, 40, 130),
                    (13, 3, 128, 49),
                ] {
                    let x = random(1, h * w * i);
                    let g = random(2, o * i * 9);
                    let bias = random(3, o);
                    let conv = WinogradConv::with_isa(isa, form, [o, i], &g, precision).unwrap();
                    let mut expected = reference(form, [h, w], &x, [o, i], &g);
                    let about = format!("{isa:?} {form:?} {precision:?} {h}x{w} {i}->{o}");
                    let rows = 0..conv.scale() * h;
                    let input = ImageRows { data: &x, first: 0 };
                    let before = random(4, expected.len());
                    let run = |finish| {
                        let mut y = before.clone();
                        conv.forward([h, w], input, rows.clone(), &mut y, finish)
                            .unwrap();
                        y
                    };
                    let check = |what: &str, y: &[f32], expected: &[f64]| {
                        let error = rel_l2(y, expected);
                        assert!(error < tolerance(precision), "{about} {what}: {error:.2e}");
                    };

                    let y = run(Finish::Add { bias: None });
                    let sum: Vec<f64> = expected
                        .iter()
                        .zip(&before)
                        .map(|(e, &b)| e + f64::from(b))
                        .collect();
                    check("added", &y, &sum);

                    let norms = random(5, o);
                    let y = run(Finish::AddNorm {
                        weight: &norms,
                        bias: &bias,
                        eps: 1e-5,
                    });
                    let normed: Vec<f64> = (0..expected.len())
                        .map(|at| {
                            let pixel = &expected[at / o * o..][..o];
                            let square = pixel.iter().map(|v| v * v).sum::<f64>() / o as f64;
                            expected[at] / (square + 1e-5).sqrt() * f64::from(norms[at % o])
                                + f64::from(bias[at % o])
                                + f64::from(before[at])
                        })
                        .collect();
                    check("normed", &y, &normed);

                    for (at, e) in expected.iter_mut().enumerate() {
                        *e += f64::from(bias[at % o]);
                    }
                    for activation in [Activation::None, Activation::Silu, Activation::Relu] {
                        let y = run(Finish::Store {
                            bias: Some(&bias),
                            activation,
                        });
                        let activated: Vec<f64> = expected
                            .iter()
                            .map(|&e| match activation {
                                Activation::Silu => e / (1.0 + (-e).exp()),
                                Activation::Relu => e.max(0.0),
                                _ => e,
                            })
                            .collect();
                        check(&format!("{activation:?}"), &y, &activated);
                    }
                }
            }
        }
    }
}

#[test]
fn bands_of_rows_are_the_rows_of_the_whole_image() {
    let ([h, w], [o, i]) = ([23, 19], [20, 18]);
    let (x, g) = (random(1, h * w * i), random(2, o * i * 9));
    for form in FORMS {
        for precision in [Precision::F32, Precision::Bf16] {
            let conv = WinogradConv::new(form, [o, i], &g, precision).unwrap();
            let height = conv.scale() * h;
            let row = conv.scale() * w * o;
            let finish = Finish::Store {
                bias: None,
                activation: Activation::None,
            };
            let mut whole = vec![0.0; height * row];
            let input = ImageRows { data: &x, first: 0 };
            conv.forward([h, w], input, 0..height, &mut whole, finish)
                .unwrap();
            let mut from = 0;
            for bands in [1, 3, 2, 9] {
                let to = (from + bands * conv.band()).min(height);
                let needed = conv.rows_needed(from..to, h);
                let input = ImageRows {
                    data: &x[needed.start * w * i..needed.end * w * i],
                    first: needed.start,
                };
                let mut part = vec![0.0; (to - from) * row];
                conv.forward([h, w], input, from..to, &mut part, finish)
                    .unwrap();
                assert!(
                    part == whole[from * row..to * row],
                    "{form:?} rows {from}..{to}"
                );
                from = to;
            }
        }
    }
}

#[test]
fn weights_transformed_before_give_the_same_bits() {
    let ([h, w], shape) = ([9, 11], [20, 18]);
    let (x, g) = (random(1, h * w * 18), random(2, 20 * 18 * 9));
    for form in FORMS {
        for precision in [Precision::F32, Precision::Bf16] {
            let conv = WinogradConv::new(form, shape, &g, precision).unwrap();
            let bytes = conv.packed().clone();
            let described = WinogradConv::packed_form(form, shape, precision).unwrap();
            assert_eq!(described.len, bytes.as_bytes().len());
            let again = WinogradConv::from_packed(form, shape, precision, bytes.clone()).unwrap();
            let run = |conv: &WinogradConv| {
                let mut y = vec![0.0; conv.scale().pow(2) * h * w * 20];
                let input = ImageRows { data: &x, first: 0 };
                let finish = Finish::Add { bias: None };
                conv.forward([h, w], input, 0..conv.scale() * h, &mut y, finish)
                    .unwrap();
                y
            };
            assert_eq!(run(&again), run(&conv));
            assert!(WinogradConv::from_packed(form, [60, 18], precision, bytes).is_err());
        }
    }
}

/// The sums of 16-bit products come closest to their limit where one input and one weight carry all.
#[test]
fn integers_neither_overflow_nor_saturate() {
    for (i, o) in [(1, 16), (512, 16)] {
        let ([h, w], mut x) = ([6, 6], vec![0.0; 36 * i]);
        let mut g = vec![0.0; o * i * 9];
        x.iter_mut().step_by(i).for_each(|x| *x = 3e4);
        g.iter_mut().step_by(i * 9).for_each(|g| *g = -7e3);
        for (x, g) in [(x, g), (vec![1e-12; 36 * i], vec![1e9; o * i * 9])] {
            let expected = reference(WinogradForm::Same, [h, w], &x, [o, i], &g);
            let conv = WinogradConv::new(WinogradForm::Same, [o, i], &g, Precision::Bf16).unwrap();
            let mut y = vec![0.0; 36 * o];
            let input = ImageRows { data: &x, first: 0 };
            conv.forward(
                [h, w],
                input,
                0..h,
                &mut y,
                Finish::Store {
                    bias: None,
                    activation: Activation::None,
                },
            )
            .unwrap();
            let error = rel_l2(&y, &expected);
            assert!(error < 2e-3, "{i}->{o}: {error:.2e}");
        }
    }
}

#[test]
fn wrong_arguments_are_errors() {
    let form = WinogradForm::Same;
    assert!(WinogradConv::new(form, [2, 2], &[0.0; 35], Precision::F32).is_err());
    assert!(WinogradConv::new(form, [0, 2], &[], Precision::F32).is_err());
    let conv = WinogradConv::new(form, [2, 2], &[0.0; 36], Precision::F32).unwrap();
    let x = [0.0; 8 * 8 * 2];
    let store = Finish::Store {
        bias: None,
        activation: Activation::None,
    };
    let run = |first, data, rows: std::ops::Range<usize>, out: usize, finish| {
        conv.forward(
            [8, 8],
            ImageRows { data, first },
            rows,
            &mut vec![0.0; out],
            finish,
        )
    };
    assert!(run(0, &x[..], 0..8, 128, store).is_ok());
    assert!(run(0, &x[..], 0..8, 127, store).is_err());
    assert!(run(0, &x[..100], 0..8, 128, store).is_err());
    assert!(run(1, &x[..], 0..8, 128, store).is_err());
    assert!(run(4, &x[..64], 4..8, 64, store).is_err());
    assert!(run(0, &x[..], 2..8, 96, store).is_err());
    assert!(run(0, &x[..], 0..9, 144, store).is_err());
    assert!(run(0, &x[..], 0..8, 128, Finish::Add { bias: Some(&[0.0]) }).is_err());
}
