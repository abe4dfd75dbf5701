//! Where a forward pass of the full-size E-MMDiT or Llama spends its time, stage by stage.
//!
//! `cargo run --release -p nitro -p nitro-models --example forward_time [emmdit|llama] [f32|bf16|int8] [batch]`
//!
//! Weights come from a formula. The first line is the shortest of several passes; the stages are of
//! one more pass with an observer, which costs little.

use std::collections::BTreeMap;
use std::time::Instant;

use burn::tensor::{Bool, Device, Int, Tensor, TensorData};
use nitro_models::emmdit::{Emmdit, EmmditConfig};
use nitro_models::llama::{Llama, LlamaConfig};
use nitro_models::{FormulaWeights, Params};
use nitro_ops::Precision;

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let word = |i: usize| std::env::args().nth(i).unwrap_or_default();
    let precision = match word(2).as_str() {
        "f32" => Precision::F32,
        "int8" => Precision::Int8,
        _ => Precision::Bf16,
    };
    let batch = word(3).parse().unwrap_or(1);
    let weights = FormulaWeights::new("time/");
    let params = Params::new(&weights, &Device::flex(), precision).for_inference();
    match word(1).as_str() {
        "llama" => llama(&params, batch),
        _ => emmdit(&params, batch),
    }
}

fn emmdit(params: &Params<'_>, batch: usize) -> Result<(), Failure> {
    let config = EmmditConfig::nitro_e_512();
    let model = Emmdit::new(&config, params)?;
    let (c, side) = (config.in_channels, config.sample_size);
    let latents = Tensor::<4>::ones([batch, c, side, side], params.device()) * 0.3;
    let text = Tensor::<3>::ones([batch, 128, config.caption_channels], params.device()) * 0.1;
    let times = vec![500.0; batch];
    let forward = || -> Result<(), Failure> {
        model
            .forward(latents.clone(), text.clone(), &times)?
            .into_data();
        Ok(())
    };
    shortest(forward)?;
    let mut stages = Stages::new();
    let sample = model.forward_observed(
        latents.clone(),
        text.clone(),
        &times,
        Some(&mut |name: &str, _: Tensor<3>| stages.end(name)),
    )?;
    sample.into_data();
    stages.end("sample");
    stages.print();
    Ok(())
}

fn llama(params: &Params<'_>, batch: usize) -> Result<(), Failure> {
    let config: LlamaConfig = serde_json::from_value(serde_json::json!({
        "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 64, "rms_norm_eps": 1e-5, "rope_theta": 500_000.0,
        "tie_word_embeddings": true,
    }))?;
    let model = Llama::new(&config, params)?;
    let ids: Vec<i32> = (0..batch as i32 * 128).map(|i| i * 37 % 128_000).collect();
    let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [batch, 128]), params.device());
    let mask = TensorData::new(vec![true; batch * 128], [batch, 128]);
    let mask = Tensor::<2, Bool>::from_data(mask, params.device());
    shortest(|| {
        model.forward(ids.clone(), mask.clone())?.into_data();
        Ok(())
    })?;
    let mut stages = Stages::new();
    model.forward_observed(ids.clone(), mask.clone(), &mut |name, _| stages.end(name))?;
    stages.print();
    Ok(())
}

fn shortest(mut forward: impl FnMut() -> Result<(), Failure>) -> Result<(), Failure> {
    let mut times = Vec::new();
    for _ in 0..7 {
        let begun = Instant::now();
        forward()?;
        times.push(begun.elapsed().as_secs_f64() * 1e3);
    }
    times.sort_by(f64::total_cmp);
    println!("forward: {:.1} ms, median {:.1} ms", times[0], times[3]);
    Ok(())
}

/// Times between the results that an observer sees, blocks of a kind together.
struct Stages {
    last: Instant,
    times: BTreeMap<String, (usize, f64)>,
}

impl Stages {
    fn new() -> Self {
        Self {
            last: Instant::now(),
            times: BTreeMap::new(),
        }
    }

    fn end(&mut self, name: &str) {
        let kind: String = name.chars().filter(|c| !c.is_ascii_digit()).collect();
        let (count, time) = self.times.entry(kind).or_default();
        *count += 1;
        *time += self.last.elapsed().as_secs_f64() * 1e3;
        self.last = Instant::now();
    }

    fn print(&self) {
        for (name, (count, time)) in &self.times {
            println!(
                "  {name:24} {count:4} x {:8.3} ms = {time:8.2} ms",
                time / *count as f64
            );
        }
    }
}
