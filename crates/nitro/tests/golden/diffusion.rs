//! The schedule and sampler, and the generators of torch and numpy.

use std::convert::Infallible;
use std::fs;
use std::ops::ControlFlow;

use anyhow::{Result, bail};
use half::{bf16, f16};
use nitro_diffusion::noise::replay::{Draw, NumpyOp, TorchOp};
use nitro_diffusion::noise::{CpuGenerator, NumpyGenerator};
use nitro_diffusion::sampler::Euler;
use nitro_diffusion::schedule::{FlowMatchEuler, sigmoid};
use safetensors::Dtype;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::compare::Report;
use crate::files::{Array, Case};

pub(crate) fn flow_match_euler(case: &Case, report: &mut Report) -> Result<()> {
    let tolerance = case.rel_l2()?;
    let schedule = FlowMatchEuler::new(
        case.get("/config/num_train_timesteps")?,
        case.get("/config/shift")?,
    )?;
    let (inputs, outputs) = (case.tensors("inputs")?, case.tensors("outputs")?);
    let mut check = |name: &str, found: &[f32]| outputs.close(report, name, found, tolerance);

    check("init.sigmas", schedule.sigmas())?;
    check("init.timesteps", schedule.timesteps())?;
    for steps in case.get::<Vec<usize>>("/inputs/n_list")? {
        let timetable = schedule.timetable(steps)?;
        check(&format!("n{steps}.sigmas"), timetable.sigmas())?;
        check(&format!("n{steps}.timesteps"), timetable.timesteps())?;
    }

    let steps: usize = case.get("/inputs/trajectory_steps")?;
    let velocities = inputs.f32s("model_outputs")?;
    let start = inputs.f32s("x0")?;
    let batch = inputs.get("x0")?.shape[0];
    let mut velocity = velocities.chunks(start.len());
    let mut trajectory = Vec::new();
    Euler::new(&schedule.timetable(steps)?).run(
        start,
        batch,
        |_: &[f32], _| Ok::<_, Infallible>(velocity.next().unwrap_or_default().to_vec()),
        |step| {
            trajectory.extend_from_slice(step.latents);
            ControlFlow::Continue(())
        },
    )?;
    check("trajectory", &trajectory)?;

    let u = inputs.f32s("density.u")?;
    let levels: Vec<_> = u.iter().map(|&u| schedule.level(u)).collect();
    let timesteps: Vec<f32> = levels.iter().map(|level| level.timestep).collect();
    let sigmas: Vec<f32> = levels.iter().map(|level| level.sigma).collect();
    check("density.timesteps", &timesteps)?;
    check("density.sigmas", &sigmas)?;
    let normals = inputs.f32s("density.normals")?;
    let squashed: Vec<f32> = normals.into_iter().map(sigmoid).collect();
    check("density.u_from_normals", &squashed)?;
    let indices: Vec<i64> = levels.iter().map(|level| level.index as i64).collect();
    report.equal(
        "density.indices",
        &indices,
        &outputs.i64s("density.indices")?,
    );
    outputs.finish(report);
    Ok(())
}

/// One generator's calls of `calls.json`.
#[derive(Deserialize)]
struct Calls {
    seed: u64,
    steps: Vec<Value>,
    /// The outputs' names; numpy's calls have them in the steps.
    #[serde(default)]
    outputs: Vec<String>,
    pcg64_state: Option<String>,
    pcg64_inc: Option<String>,
}

pub(crate) fn torch_rng(case: &Case, report: &mut Report) -> Result<()> {
    let outputs = case.tensors("outputs")?;
    let entries: Vec<Calls> = serde_json::from_slice(&fs::read(case.dir.join("calls.json"))?)?;
    for entry in &entries {
        let state = entry.pcg64_state.as_ref().zip(entry.pcg64_inc.as_ref());
        let mut torch = CpuGenerator::new(entry.seed);
        let mut numpy = NumpyGenerator::new(entry.seed);
        if let Some((state, increment)) = state {
            let expected = (state.parse()?, increment.parse()?);
            report.equal(
                &format!("state of seed {}", entry.seed),
                &numpy.state(),
                &expected,
            );
        }
        for (i, step) in entry.steps.iter().enumerate() {
            let name = match entry.outputs.get(i) {
                Some(name) => name,
                None => step["output"].as_str().unwrap_or_default(),
            };
            let expected = outputs.get(name)?;
            let found = if state.is_some() {
                parse::<NumpyOp>(step)?.run(&mut numpy, expected.shape.iter().product())?
            } else {
                parse::<TorchOp>(step)?.run(&mut torch)?
            };
            compare(case, report, name, &found, expected)?;
        }
    }
    outputs.finish(report);
    Ok(())
}

fn parse<T: DeserializeOwned>(step: &Value) -> Result<T> {
    Ok(serde_json::from_value(step.clone())?)
}

/// Integers exactly, floats within the case's absolute tolerance, halves within so many units in
/// the last place.
fn compare(
    case: &Case,
    report: &mut Report,
    name: &str,
    found: &Draw,
    expected: &Array,
) -> Result<()> {
    let exact = case.json["tolerance"]["exact"].as_bool() == Some(true);
    let limit = |key: &str| {
        if exact {
            Ok(0.0)
        } else {
            case.get(&format!("/tolerance/{key}"))
        }
    };
    match (found, expected.dtype) {
        (Draw::I64(found), Dtype::I64) => {
            report.equal(name, found, &expected.read(i64::from_le_bytes));
        }
        (Draw::F32(found), Dtype::F32) => {
            let expected = expected.read(f32::from_le_bytes);
            let error = worst(found, &expected, |a, b| f64::from((a - b).abs()));
            report.at_most(name, error, limit("float32_abs")?);
        }
        (Draw::F64(found), Dtype::F64) => {
            let expected = expected.read(f64::from_le_bytes);
            let error = worst(found, &expected, |a, b| (a - b).abs());
            report.at_most(name, error, limit("float64_abs")?);
        }
        (Draw::Bf16(found), Dtype::BF16) => {
            let expected = expected.read(bf16::from_le_bytes);
            let error = worst(found, &expected, |a, b| ulps(a.to_bits(), b.to_bits()));
            report.at_most(name, error, limit("half_ulp")?);
        }
        (Draw::F16(found), Dtype::F16) => {
            let expected = expected.read(f16::from_le_bytes);
            let error = worst(found, &expected, |a, b| ulps(a.to_bits(), b.to_bits()));
            report.at_most(name, error, limit("half_ulp")?);
        }
        (_, dtype) => bail!("`{name}` is {dtype}, which its call does not give"),
    }
    Ok(())
}

fn worst<T: Copy>(found: &[T], expected: &[T], error: impl Fn(T, T) -> f64) -> f64 {
    if found.len() != expected.len() {
        return f64::INFINITY;
    }
    found
        .iter()
        .zip(expected)
        .map(|(&a, &b)| error(a, b))
        .fold(0.0, f64::max)
}

/// Steps between two halves in the order of their values.
fn ulps(a: u16, b: u16) -> f64 {
    let order = |bits: u16| {
        let magnitude = i32::from(bits & 0x7fff);
        if bits & 0x8000 == 0 {
            magnitude
        } else {
            -magnitude
        }
    };
    f64::from((order(a) - order(b)).abs())
}
