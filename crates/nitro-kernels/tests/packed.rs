//! Packed linear layers agree with f64 on every instruction set, for odd sizes and file formats.

use std::sync::Arc;

use nitro_kernels::gemm::Activation;
use nitro_kernels::isa::{Isa, Precision};
use nitro_kernels::mapped_file::MappedFile;
use nitro_kernels::packed::{ElementType, PackedBytes, PackedLinear, Rows, packed_linear};

fn values(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..count)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

fn relative_error(got: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(got.len(), expected.len());
    let error: f64 = got
        .iter()
        .zip(expected)
        .map(|(&g, e)| (f64::from(g) - e).powi(2))
        .sum();
    let norm: f64 = expected.iter().map(|e| e * e).sum();
    (error / norm.max(1e-30)).sqrt()
}

/// `x` as a product of this precision sees it.
fn seen(x: &[f32], k: usize, precision: Precision) -> Vec<f64> {
    let rows = x.chunks(k.max(1)).flat_map(|row| {
        let largest = row.iter().fold(0.0_f32, |a, x| a.max(x.abs()));
        let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
        row.iter().map(move |&x| match precision {
            Precision::F32 => f64::from(x),
            Precision::Bf16 => half::bf16::from_f32(x).to_f64(),
            Precision::Int8 => {
                f64::from((x * inverse).round_ties_even()) * f64::from(largest / 127.0)
            }
        })
    });
    rows.collect()
}

fn activate(activation: Activation, x: f64) -> f64 {
    match activation {
        Activation::None => x,
        Activation::Relu => x.max(0.0),
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::GeluTanh => {
            let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
            0.5 * x * (1.0 + u.tanh())
        }
    }
}

#[test]
fn products_agree_with_f64_for_every_shape_and_precision() {
    let shapes = [
        (1, 1, 1),
        (3, 17, 5),
        (8, 48, 32),
        (9, 49, 33),
        (23, 100, 77),
        (80, 96, 130),
        (5, 33, 2500),
        (37, 65, 5000),
        (1030, 3, 5000),
    ];
    for isa in Isa::supported() {
        for precision in [Precision::F32, Precision::Bf16, Precision::Int8] {
            for (m, n, k) in shapes {
                let (x, w, bias) = (values(m * k, 1), values(n * k, 2), values(n, 3));
                let (xs, ws) = (seen(&x, k, precision), seen(&w, k, precision));
                for activation in [Activation::None, Activation::GeluTanh, Activation::Silu] {
                    let rows = Rows::from_f32(&w, n, k).unwrap();
                    let bias_used = (activation != Activation::Silu).then(|| bias.clone());
                    let packed =
                        PackedLinear::with_isa(isa, &[rows], bias_used.clone(), precision).unwrap();
                    let mut out = vec![f32::NAN; m * n];
                    packed_linear(&packed, &x, activation, &mut out).unwrap();
                    let expected: Vec<f64> = (0..m * n)
                        .map(|i| {
                            let (row, col) = (i / n, i % n);
                            let dot: f64 = (0..k).map(|t| xs[row * k + t] * ws[col * k + t]).sum();
                            let bias = bias_used.as_ref().map_or(0.0, |b| f64::from(b[col]));
                            activate(activation, dot + bias)
                        })
                        .collect();
                    let error = relative_error(&out, &expected);
                    assert!(
                        error < 3e-6,
                        "{isa:?} {precision:?} {m}x{n}x{k} {activation:?}: {error:.1e}"
                    );
                }
            }
        }
    }
}

#[test]
fn stacked_layers_are_read_from_any_file_format() {
    let (k, first, second) = (37, 20, 31);
    let all = values((first + second) * k, 5);
    for element in [ElementType::F32, ElementType::F16, ElementType::Bf16] {
        // One byte in front: files promise no alignment.
        let mut bytes = vec![0_u8];
        let mut exact = Vec::new();
        for &x in &all {
            match element {
                ElementType::F32 => {
                    bytes.extend(x.to_le_bytes());
                    exact.push(x);
                }
                ElementType::F16 => {
                    let x = half::f16::from_f32(x);
                    bytes.extend(x.to_le_bytes());
                    exact.push(x.to_f32());
                }
                ElementType::Bf16 => {
                    let x = half::bf16::from_f32(x);
                    bytes.extend(x.to_le_bytes());
                    exact.push(x.to_f32());
                }
            }
        }
        let (a, b) = bytes[1..].split_at(first * k * element.bytes());
        let layers = [
            Rows::new(a, element, first, k).unwrap(),
            Rows::new(b, element, second, k).unwrap(),
        ];
        let packed = PackedLinear::new(&layers, None, Precision::F32).unwrap();
        assert_eq!((packed.inputs(), packed.outputs()), (k, first + second));
        assert_eq!(packed.to_f32(), exact);
        let packed = PackedLinear::new(&layers, None, Precision::Int8).unwrap();
        for (back, row) in packed.to_f32().chunks(k).zip(exact.chunks(k)) {
            let step = row.iter().fold(0.0_f32, |a, x| a.max(x.abs())) / 127.0;
            assert!(
                back.iter()
                    .zip(row)
                    .all(|(b, x)| (b - x).abs() <= 0.5001 * step)
            );
        }
    }
}

/// `bytes` in a file, mapped; the file is gone when this returns.
fn mapped(bytes: &[u8], name: &str) -> Arc<MappedFile> {
    let path = std::env::temp_dir().join(format!("nitro-{}-{name}", std::process::id()));
    std::fs::write(&path, bytes).unwrap();
    let file = MappedFile::open(&path).unwrap();
    std::fs::remove_file(path).unwrap();
    Arc::new(file)
}

#[test]
fn weights_packed_before_are_used_where_a_file_has_them() {
    for isa in Isa::supported() {
        for precision in [Precision::F32, Precision::Bf16, Precision::Int8] {
            for (m, n, k) in [(3, 17, 5), (9, 49, 33), (5, 33, 2500), (2, 48, 5000)] {
                let (x, w, bias) = (values(m * k, 1), values(n * k, 2), values(n, 3));
                let rows = Rows::from_f32(&w, n, k).unwrap();
                let bias = Some(bias);
                let packed = PackedLinear::with_isa(isa, &[rows], bias.clone(), precision).unwrap();
                let run = |layer: &PackedLinear| {
                    let mut out = vec![f32::NAN; m * n];
                    packed_linear(layer, &x, Activation::None, &mut out).unwrap();
                    out
                };
                let kept = packed.packed().as_bytes();
                assert_eq!(kept.len(), packed.bytes());
                // After a cache line of something else.
                let name = format!("{isa:?}-{precision:?}-{k}");
                let file = mapped(&[&[7; 64], kept].concat(), &name);
                let bytes = PackedBytes::of_file(&file, 64..64 + kept.len()).unwrap();
                drop(file);
                let again = PackedLinear::from_packed_with_isa(isa, [n, k], bias, precision, bytes)
                    .unwrap();
                assert!(again.to_f32() == packed.to_f32());
                assert_eq!(run(&again), run(&packed));
            }
        }
    }
}

#[test]
fn packed_bytes_of_other_places_and_lengths_are_refused() {
    let w = values(48 * 64, 1);
    let rows = Rows::from_f32(&w, 48, 64).unwrap();
    let (shape, precision) = ([48, 64], Precision::F32);
    let packed = PackedLinear::new(&[rows], None, precision).unwrap();
    let form = PackedLinear::form(shape, precision);
    assert_eq!(form.len, packed.bytes());
    assert_ne!(form, PackedLinear::form([64, 48], precision));
    assert_ne!(form, PackedLinear::form(shape, Precision::Int8));

    let kept = packed.packed().as_bytes();
    let file = mapped(kept, "places");
    for range in [1..kept.len() + 1, 32..kept.len(), 0..kept.len() - 4] {
        assert!(PackedBytes::of_file(&file, range).is_none());
    }
    assert!(PackedBytes::of_file(&file, 0..kept.len() + 64).is_none());
    let short = PackedBytes::of_file(&file, 0..kept.len() - 64).unwrap();
    assert!(PackedLinear::from_packed(shape, None, precision, short).is_err());
    let whole = PackedBytes::of_file(&file, 0..kept.len()).unwrap();
    assert!(whole.copied().as_bytes() == kept);
    let large: Vec<u8> = (0..5_u32 << 20).map(|i| ((i * 7) >> 9) as u8).collect();
    let file = mapped(&large, "large");
    let bytes = PackedBytes::of_file(&file, 0..large.len()).unwrap();
    assert!(bytes.copied().as_bytes() == large);
    let bias = Some(vec![0.0; 47]);
    assert!(PackedLinear::from_packed(shape, bias, precision, whole.clone()).is_err());
    assert!(PackedLinear::from_packed(shape, None, precision, whole).is_ok());
}

#[test]
fn wrong_lengths_are_errors_and_values_that_are_no_numbers_stay() {
    let w = values(6, 1);
    assert!(Rows::from_f32(&w, 2, 4).is_err());
    let rows = Rows::from_f32(&w, 2, 3).unwrap();
    assert!(PackedLinear::new(&[rows], Some(vec![0.0; 3]), Precision::F32).is_err());
    let other = Rows::from_f32(&w, 3, 2).unwrap();
    assert!(PackedLinear::new(&[rows, other], None, Precision::F32).is_err());
    for precision in [Precision::F32, Precision::Bf16, Precision::Int8] {
        let packed = PackedLinear::new(&[rows], None, precision).unwrap();
        let mut out = vec![0.0; 4];
        assert!(packed_linear(&packed, &w[..5], Activation::None, &mut out).is_err());
        packed_linear(
            &packed,
            &[f32::NAN, 1.0, 2.0, 1.0, 1.0, 1.0],
            Activation::None,
            &mut out,
        )
        .unwrap();
        assert!(out[..2].iter().all(|x| x.is_nan()) && out[2..].iter().all(|x| x.is_finite()));
    }
}
