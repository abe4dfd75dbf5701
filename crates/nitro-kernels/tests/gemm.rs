//! Products agree with f64 on every instruction set, for odd sizes, any strides and all epilogues.

use nitro_kernels::gemm::{
    Activation, Epilogue, MatRef, PackedB, column_sum, gemm_by_rows, gemm_packed, gemm_with_isa,
};
use nitro_kernels::isa::{Isa, Precision};
use proptest::prelude::*;

/// Deterministic values in [-1, 1), without a dependency.
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

fn rounded(x: f32, precision: Precision) -> f64 {
    match precision {
        Precision::F32 => f64::from(x),
        Precision::Bf16 | Precision::Int8 => half::bf16::from_f32(x).to_f64(),
    }
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

fn relative_error(got: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(got.len(), expected.len());
    let difference: f64 = got
        .iter()
        .zip(expected)
        .map(|(&g, e)| (f64::from(g) - e).powi(2))
        .sum();
    let norm: f64 = expected.iter().map(|e| e * e).sum();
    (difference / norm.max(1e-30)).sqrt()
}

/// How an operand lies in memory.
#[derive(Debug, Clone, Copy)]
enum Order {
    RowMajor,
    Transposed,
    Strided,
}

struct Operand {
    data: Vec<f32>,
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl Operand {
    fn new(rows: usize, cols: usize, order: Order, seed: u64) -> Self {
        let (row_stride, col_stride) = match order {
            Order::RowMajor => (cols + 3, 1),
            Order::Transposed => (1, rows + 5),
            Order::Strided => (2 * cols + 1, 2),
        };
        let count = rows * row_stride + cols * col_stride + 1;
        Operand {
            data: values(count, seed),
            rows,
            cols,
            row_stride,
            col_stride,
        }
    }

    fn view(&self) -> MatRef<'_> {
        MatRef::new(
            &self.data,
            self.rows,
            self.cols,
            self.row_stride,
            self.col_stride,
        )
        .unwrap()
    }

    fn get(&self, i: usize, j: usize) -> f32 {
        self.data[i * self.row_stride + j * self.col_stride]
    }
}

#[derive(Debug, Clone, Copy)]
struct Case {
    m: usize,
    n: usize,
    k: usize,
    a: Order,
    b: Order,
    ldc_extra: usize,
    accumulate: bool,
    bias: bool,
    activation: Activation,
    pre_activation: bool,
    precision: Precision,
}

fn check(case: Case) {
    let Case {
        m, n, k, precision, ..
    } = case;
    let a = Operand::new(m, k, case.a, 1);
    let b = Operand::new(k, n, case.b, 2);
    let bias = values(n, 3);
    let ldc = n + case.ldc_extra;
    let before = values(m * ldc, 4);
    let mut pre_expected = vec![0.0; m * n];
    for i in 0..m {
        for j in 0..n {
            let mut sum = 0.0;
            for p in 0..k {
                sum += rounded(a.get(i, p), precision) * rounded(b.get(p, j), precision);
            }
            if case.accumulate {
                sum += f64::from(before[i * ldc + j]);
            }
            if case.bias {
                sum += f64::from(bias[j]);
            }
            pre_expected[i * n + j] = sum;
        }
    }
    let expected: Vec<f64> = pre_expected
        .iter()
        .map(|&x| activate(case.activation, x))
        .collect();
    let inner = |c: &[f32]| -> Vec<f32> {
        (0..m)
            .flat_map(|i| c[i * ldc..i * ldc + n].to_vec())
            .collect()
    };
    for isa in Isa::supported() {
        for packed in [false, true] {
            let mut c = before.clone();
            let mut pre = vec![0.0; m * ldc];
            let epilogue = Epilogue {
                bias: case.bias.then_some(&bias[..]),
                activation: case.activation,
                pre_activation: case.pre_activation.then_some(&mut pre[..]),
            };
            if packed {
                let packed = PackedB::with_isa(isa, b.view(), precision);
                gemm_packed(a.view(), &packed, &mut c, ldc, case.accumulate, epilogue).unwrap();
            } else {
                let (a, b) = (a.view(), b.view());
                gemm_with_isa(isa, a, b, &mut c, ldc, case.accumulate, epilogue, precision)
                    .unwrap();
            }
            let error = relative_error(&inner(&c), &expected);
            assert!(error <= 1e-5, "{isa:?} packed={packed} {case:?}: {error:e}");
            if case.pre_activation {
                let error = relative_error(&inner(&pre), &pre_expected);
                assert!(
                    error <= 1e-5,
                    "{isa:?} packed={packed} {case:?} before activation: {error:e}"
                );
            }
            for i in 0..m {
                let gap = i * ldc + n..(i + 1) * ldc;
                assert_eq!(c[gap.clone()], before[gap], "wrote between the rows of C");
            }
        }
    }
}

fn order() -> impl Strategy<Value = Order> {
    prop_oneof![
        Just(Order::RowMajor),
        Just(Order::Transposed),
        Just(Order::Strided)
    ]
}

fn activation() -> impl Strategy<Value = Activation> {
    prop_oneof![
        Just(Activation::None),
        Just(Activation::GeluTanh),
        Just(Activation::Silu),
        Just(Activation::Relu)
    ]
}

fn precision() -> impl Strategy<Value = Precision> {
    prop_oneof![Just(Precision::F32), Just(Precision::Bf16)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn any_product_agrees_with_f64(
        (m, n, k) in (1_usize..70, 1_usize..120, 1_usize..90),
        (a, b) in (order(), order()),
        ldc_extra in 0_usize..3,
        accumulate: bool,
        bias: bool,
        activation in activation(),
        pre_activation: bool,
        precision in precision(),
    ) {
        check(Case { m, n, k, a, b, ldc_extra, accumulate, bias, activation, pre_activation, precision });
    }
}

/// The shapes of linear layers: several K blocks, several row blocks, K splits.
#[test]
fn model_shapes_agree_with_f64() {
    let shapes = [
        (300, 192, 576, Order::RowMajor, Order::Transposed),
        (130, 97, 1153, Order::RowMajor, Order::RowMajor),
        (192, 64, 2304, Order::Transposed, Order::RowMajor),
        (27, 16, 5001, Order::Transposed, Order::RowMajor),
        (1000, 8, 8, Order::RowMajor, Order::Transposed),
        (3, 1152, 192, Order::RowMajor, Order::Transposed),
    ];
    for (m, n, k, a, b) in shapes {
        for precision in [Precision::F32, Precision::Bf16] {
            for (bias, accumulate, activation) in [
                (false, false, Activation::None),
                (true, true, Activation::GeluTanh),
            ] {
                check(Case {
                    m,
                    n,
                    k,
                    a,
                    b,
                    bias,
                    accumulate,
                    activation,
                    precision,
                    ldc_extra: 0,
                    pre_activation: bias,
                });
            }
        }
    }
}

#[test]
fn a_row_does_not_depend_on_how_many_there_are() {
    // Narrow layers with long rows: those that `gemm` shares out by ranges of the rows.
    for (n, k) in [(32, 600), (64, 2304), (768, 3072), (5, 1025)] {
        for precision in [Precision::F32, Precision::Bf16] {
            let (a, b, bias) = (values(97 * k, 1), values(n * k, 2), values(n, 3));
            let product = |first: usize, rows: usize| {
                let mut c = vec![0.0; rows * n];
                let a = MatRef::row_major(&a[first * k..], rows, k).unwrap();
                let b = MatRef::row_major(&b, n, k).unwrap().t();
                let epilogue = Epilogue {
                    bias: Some(&bias),
                    activation: Activation::Silu,
                    pre_activation: None,
                };
                gemm_by_rows(a, b, &mut c, n, epilogue, precision).unwrap();
                c
            };
            let all = product(0, 97);
            for (first, rows) in [(0, 1), (3, 2), (5, 13), (40, 57), (96, 1)] {
                let some = &all[first * n..(first + rows) * n];
                assert!(product(first, rows) == some, "{rows} rows of {k} to {n}");
            }
        }
    }
}

#[test]
fn an_empty_sum_is_the_bias() {
    let bias = [1.0, 2.0];
    let a = MatRef::row_major(&[], 3, 0).unwrap();
    let b = MatRef::row_major(&[], 0, 2).unwrap();
    for isa in Isa::supported() {
        let mut c = [9.0; 6];
        let epilogue = Epilogue::bias(Some(&bias));
        gemm_with_isa(isa, a, b, &mut c, 2, false, epilogue, Precision::F32).unwrap();
        assert_eq!(c, [1.0, 2.0, 1.0, 2.0, 1.0, 2.0]);
    }
}

#[test]
fn wrong_shapes_are_refused_with_the_sizes() {
    let data = [0.0; 12];
    let message = MatRef::new(&data, 4, 4, 4, 1).unwrap_err().to_string();
    assert!(
        message.contains("16") && message.contains("12"),
        "{message}"
    );
    assert!(MatRef::new(&data, usize::MAX, 2, usize::MAX, 1).is_err());
    let a = MatRef::row_major(&data, 3, 4).unwrap();
    let b = MatRef::row_major(&data, 3, 4).unwrap();
    let run = |a, b, c: &mut [f32], ldc, bias: Option<&[f32]>| {
        gemm_with_isa(
            Isa::Portable,
            a,
            b,
            c,
            ldc,
            false,
            Epilogue::bias(bias),
            Precision::F32,
        )
    };
    assert!(
        run(a, b, &mut [0.0; 12], 4, None).is_err(),
        "inner sizes differ"
    );
    assert!(
        run(a, b.t(), &mut [0.0; 8], 3, None).is_err(),
        "C too short"
    );
    assert!(
        run(a, b.t(), &mut [0.0; 9], 2, None).is_err(),
        "rows of C overlap"
    );
    assert!(
        run(a, b.t(), &mut [0.0; 9], 3, Some(&[0.0; 2])).is_err(),
        "bias too short"
    );
    assert!(run(a, b.t(), &mut [0.0; 9], 3, Some(&[0.0; 3])).is_ok());
}

#[test]
fn column_sums_agree_with_f64() {
    for (rows, cols, order) in [
        (1, 1, Order::RowMajor),
        (1025, 33, Order::RowMajor),
        (700, 7, Order::Transposed),
    ] {
        let x = Operand::new(rows, cols, order, 5);
        let expected: Vec<f64> = (0..cols)
            .map(|j| (0..rows).map(|i| f64::from(x.get(i, j))).sum())
            .collect();
        let mut out = vec![7.0; cols];
        column_sum(x.view(), &mut out, false).unwrap();
        assert!(relative_error(&out, &expected) <= 1e-5);
        column_sum(x.view(), &mut out, true).unwrap();
        let twice: Vec<f64> = expected.iter().map(|e| 2.0 * e).collect();
        assert!(relative_error(&out, &twice) <= 1e-5);
        assert!(column_sum(x.view(), &mut vec![0.0; cols + 1], false).is_err());
    }
}
