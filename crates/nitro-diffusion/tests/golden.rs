//! Golden vectors made by the official PyTorch code: every case of the suites this crate covers.
//!
//! The directory is `NITRO_GOLDEN` or the project's own; other cases placed there are run too.

use std::{
    fs,
    path::{Path, PathBuf},
};

use nitro_diffusion::{
    noise::{
        CpuGenerator, NumpyGenerator,
        replay::{Draw, NumpyOp, TorchOp},
    },
    sampler::Euler,
    schedule::{FlowMatchEuler, sigmoid},
};
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;
use serde_json::Value;

fn golden() -> PathBuf {
    std::env::var_os("NITRO_GOLDEN").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden"),
        PathBuf::from,
    )
}

fn cases(suite: &str) -> Vec<PathBuf> {
    let folder = golden().join(suite);
    let mut cases: Vec<PathBuf> = fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.join("case.json").is_file())
        .collect();
    cases.sort();
    assert!(!cases.is_empty(), "no cases in {}", folder.display());
    cases
}

fn json<T: for<'a> Deserialize<'a>>(path: PathBuf) -> T {
    serde_json::from_slice(&fs::read(&path).unwrap())
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn tensor(file: &SafeTensors<'_>, name: &str) -> Draw {
    let view = file.tensor(name).unwrap();
    let bytes = view.data();
    match view.dtype() {
        Dtype::F32 => Draw::F32(numbers(bytes, f32::from_le_bytes)),
        Dtype::F64 => Draw::F64(numbers(bytes, f64::from_le_bytes)),
        Dtype::I64 => Draw::I64(numbers(bytes, i64::from_le_bytes)),
        Dtype::BF16 => Draw::Bf16(numbers(bytes, half::bf16::from_le_bytes)),
        Dtype::F16 => Draw::F16(numbers(bytes, half::f16::from_le_bytes)),
        other => panic!("{name}: unexpected dtype {other:?}"),
    }
}

fn numbers<const N: usize, T>(bytes: &[u8], read: fn([u8; N]) -> T) -> Vec<T> {
    bytes
        .chunks_exact(N)
        .map(|chunk| read(chunk.try_into().unwrap()))
        .collect()
}

fn f32s(file: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    match tensor(file, name) {
        Draw::F32(values) => values,
        other => panic!("{name}: expected float32, found {other:?}"),
    }
}

fn rel_l2(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let square = |x: f64| x * x;
    let error: f64 = got
        .iter()
        .zip(want)
        .map(|(a, b)| square(f64::from(*a) - f64::from(*b)))
        .sum();
    let norm: f64 = want.iter().map(|x| square(f64::from(*x))).sum();
    (error / norm.max(f64::MIN_POSITIVE)).sqrt()
}

#[test]
fn flow_match_euler() {
    for case in cases("flow_match_euler") {
        let meta: Value = json(case.join("case.json"));
        let tolerance = meta["tolerance"]["rel_l2"].as_f64().unwrap();
        let config = &meta["config"];
        let schedule = FlowMatchEuler::new(
            config["num_train_timesteps"].as_u64().unwrap() as usize,
            config["shift"].as_f64().unwrap(),
        )
        .unwrap();
        let inputs = fs::read(case.join("inputs.safetensors")).unwrap();
        let inputs = SafeTensors::deserialize(&inputs).unwrap();
        let outputs = fs::read(case.join("outputs.safetensors")).unwrap();
        let outputs = SafeTensors::deserialize(&outputs).unwrap();
        let check = |name: &str, got: &[f32]| {
            let error = rel_l2(got, &f32s(&outputs, name));
            assert!(
                error <= tolerance,
                "{} {name}: rel L2 {error:e}",
                case.display()
            );
        };

        check("init.sigmas", schedule.sigmas());
        check("init.timesteps", schedule.timesteps());
        for n in meta["inputs"]["n_list"].as_array().unwrap() {
            let n = n.as_u64().unwrap() as usize;
            let timetable = schedule.timetable(n).unwrap();
            check(&format!("n{n}.sigmas"), timetable.sigmas());
            check(&format!("n{n}.timesteps"), timetable.timesteps());
        }

        let steps = meta["inputs"]["trajectory_steps"].as_u64().unwrap() as usize;
        let model = f32s(&inputs, "model_outputs");
        let mut velocities = model.chunks(model.len() / steps);
        let mut trajectory = Vec::new();
        Euler::new(&schedule.timetable(steps).unwrap())
            .run(
                f32s(&inputs, "x0"),
                1,
                |_: &[f32], _| {
                    Ok::<_, std::convert::Infallible>(velocities.next().unwrap().to_vec())
                },
                |step| {
                    trajectory.extend_from_slice(step.latents);
                    std::ops::ControlFlow::Continue(())
                },
            )
            .unwrap();
        check("trajectory", &trajectory);

        let levels: Vec<_> = f32s(&inputs, "density.u")
            .into_iter()
            .map(|u| schedule.level(u))
            .collect();
        let indices: Vec<i64> = levels.iter().map(|level| level.index as i64).collect();
        assert_eq!(tensor(&outputs, "density.indices"), Draw::I64(indices));
        let timesteps: Vec<f32> = levels.iter().map(|level| level.timestep).collect();
        let sigmas: Vec<f32> = timesteps
            .iter()
            .map(|&timestep| schedule.sigma_of(timestep).unwrap())
            .collect();
        check("density.timesteps", &timesteps);
        check("density.sigmas", &sigmas);
        let u: Vec<f32> = f32s(&inputs, "density.normals")
            .into_iter()
            .map(sigmoid)
            .collect();
        check("density.u_from_normals", &u);
    }
}

#[derive(Deserialize)]
struct TorchCall {
    seed: u64,
    steps: Vec<TorchOp>,
    outputs: Vec<String>,
}

#[derive(Deserialize)]
struct NumpyCall {
    seed: u64,
    pcg64_state: String,
    pcg64_inc: String,
    steps: Vec<NumpyStep>,
}

#[derive(Deserialize)]
struct NumpyStep {
    output: String,
    #[serde(flatten)]
    op: NumpyOp,
}

/// Distance in representable values between two 16-bit floats given by their bits.
fn ulps(a: u16, b: u16) -> u16 {
    let order = |bits: u16| {
        let magnitude = (bits & 0x7fff) as i32;
        if bits & 0x8000 == 0 {
            magnitude
        } else {
            -magnitude
        }
    };
    order(a).abs_diff(order(b)) as u16
}

#[test]
fn torch_cpu_generator() {
    let case = golden().join("torch_rng/cpu_generator");
    let meta: Value = json(case.join("case.json"));
    let tolerance = |name: &str| meta["tolerance"][name].as_f64().unwrap();
    let outputs = fs::read(case.join("outputs.safetensors")).unwrap();
    let outputs = SafeTensors::deserialize(&outputs).unwrap();
    let calls: Vec<TorchCall> = json(case.join("calls.json"));
    assert!(!calls.is_empty());
    for call in calls {
        let mut rng = CpuGenerator::new(call.seed);
        for (op, name) in call.steps.iter().zip(&call.outputs) {
            let got = op.run(&mut rng).unwrap();
            let want = tensor(&outputs, name);
            let agrees = match (&got, &want) {
                (Draw::F32(got), Draw::F32(want)) => {
                    got.len() == want.len()
                        && got
                            .iter()
                            .zip(want)
                            .all(|(a, b)| f64::from((a - b).abs()) <= tolerance("float32_abs"))
                }
                (Draw::F64(got), Draw::F64(want)) => {
                    got.len() == want.len()
                        && got
                            .iter()
                            .zip(want)
                            .all(|(a, b)| (a - b).abs() <= tolerance("float64_abs"))
                }
                (Draw::Bf16(got), Draw::Bf16(want)) => {
                    got.len() == want.len()
                        && got
                            .iter()
                            .zip(want)
                            .all(|(a, b)| ulps(a.to_bits(), b.to_bits()) <= 1)
                }
                (Draw::F16(got), Draw::F16(want)) => {
                    got.len() == want.len()
                        && got
                            .iter()
                            .zip(want)
                            .all(|(a, b)| ulps(a.to_bits(), b.to_bits()) <= 1)
                }
                (got, want) => got == want,
            };
            assert!(agrees, "{name} ({op:?}): got {got:?}, want {want:?}");
        }
    }
}

#[test]
fn numpy_default_rng() {
    let case = golden().join("torch_rng/numpy_default_rng");
    let outputs = fs::read(case.join("outputs.safetensors")).unwrap();
    let outputs = SafeTensors::deserialize(&outputs).unwrap();
    let calls: Vec<NumpyCall> = json(case.join("calls.json"));
    assert!(!calls.is_empty());
    for call in calls {
        let mut rng = NumpyGenerator::new(call.seed);
        assert_eq!(
            rng.state(),
            (
                call.pcg64_state.parse().unwrap(),
                call.pcg64_inc.parse().unwrap()
            )
        );
        for step in call.steps {
            let want = tensor(&outputs, &step.output);
            let length = outputs.tensor(&step.output).unwrap().shape()[0];
            let got = step.op.run(&mut rng, length).unwrap();
            assert_eq!(got, want, "{}", step.output);
        }
    }
}
