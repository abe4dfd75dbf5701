//! Adapters that are trained, kept beside the weights, written and read again: every way to apply
//! one gives the same model, and Python's PEFT reads what we write.

use std::collections::HashMap;
use std::path::Path;
use std::process::Command;

use burn::tensor::{Device, Tensor, TensorData};
use nitro_models::emmdit::{Emmdit, EmmditConfig};
use nitro_models::layers::Linear;
use nitro_models::{
    Adapted, DType, Init, LiveAdapter, LoraAdapter, LoraLayer, LoraSpec, Merged, ParameterSource,
    ParameterSpec, Params, RandomInit, TensorMap, WeightFiles, save_comfy, save_peft,
    save_safetensors,
};
use nitro_ops::Precision;

const RANK: usize = 3;
const MODULES: [&str; 6] = [
    "block_groups.0.0.attn.to_q",
    "block_groups.0.0.attn.add_v_proj",
    "block_groups.1.1.attn.to_out.0",
    "block_groups.1.0.ff.net.0.proj",
    "block_groups.1.0.ff_context.net.2",
    "context_embedder",
];

fn config() -> EmmditConfig {
    EmmditConfig {
        sample_size: 8,
        in_channels: 4,
        out_channels: 4,
        heads: 2,
        head_dim: 8,
        caption_channels: 6,
        pos_embed_max_size: 12,
        block_groups: [1, 2, 1],
        use_sub_attn: false,
        ..EmmditConfig::nitro_e_512()
    }
}

fn base() -> TensorMap {
    let build = |p: &Params<'_>| Emmdit::new(&config(), p).map(drop);
    TensorMap::collect(&RandomInit::new(1), &Device::flex(), build).unwrap()
}

/// Normal values that depend on `name` alone.
fn random(name: &str, count: usize) -> Vec<f32> {
    let spec = ParameterSpec {
        name: name.to_owned(),
        shape: vec![count],
        init: Init::Normal(0.3),
        trainable: true,
    };
    let values = RandomInit::new(0).parameter(&spec, &Device::flex());
    values.unwrap().into_data().try_into_vec().unwrap()
}

fn spec(alpha: f64) -> LoraSpec {
    LoraSpec {
        rank: RANK,
        alpha,
        targets: MODULES.iter().map(|m| (*m).to_owned()).collect(),
        base_model: "models/miniature".into(),
    }
}

/// Writes an adapter of random values for `MODULES` and reads it back.
fn adapter(folder: &Path, alpha: f64) -> LoraAdapter {
    let shapes = base();
    let values: Vec<(Vec<f32>, Vec<f32>)> = MODULES
        .iter()
        .map(|module| {
            let name = format!("{module}.weight");
            let (spec, _) = shapes.iter().find(|(spec, _)| spec.name == name).unwrap();
            (
                random(&format!("{name} down {alpha}"), RANK * spec.shape[1]),
                random(&format!("{name} up {alpha}"), spec.shape[0] * RANK),
            )
        })
        .collect();
    let layers: Vec<LoraLayer<'_>> = MODULES
        .iter()
        .zip(&values)
        .map(|(module, (down, up))| LoraLayer { module, down, up })
        .collect();
    save_peft(folder, &spec(alpha), &layers, DType::F32).unwrap();
    LoraAdapter::open(folder).unwrap()
}

fn velocity(source: &dyn ParameterSource) -> Vec<f32> {
    let device = Device::flex();
    let model = Emmdit::new(&config(), &Params::new(source, &device, Precision::F32)).unwrap();
    let ramp = |count: usize| -> Vec<f32> { (0..count).map(|i| (i as f32 * 0.37).sin()).collect() };
    let latents = Tensor::from_data(TensorData::new(ramp(2 * 4 * 64), [2, 4, 8, 8]), &device);
    let text = Tensor::from_data(TensorData::new(ramp(2 * 5 * 6), [2, 5, 6]), &device);
    let velocity = model.forward(latents, text, &[900.0, 100.0]).unwrap();
    velocity.into_data().try_into_vec().unwrap()
}

fn distance(a: &[f32], b: &[f32]) -> f32 {
    let norm = |x: &mut dyn Iterator<Item = f32>| x.map(|x| x * x).sum::<f32>().sqrt();
    norm(&mut a.iter().zip(b).map(|(a, b)| a - b)) / norm(&mut a.iter().copied())
}

#[test]
fn merged_and_live_adapters_give_the_same_model() {
    let (base, folder) = (base(), tempfile::tempdir().unwrap());
    let first = adapter(&folder.path().join("first"), 6.0);
    let second = adapter(&folder.path().join("second"), 1.5);
    let device = Device::flex();
    let live = [&first, &second].map(|adapter| LiveAdapter::load(adapter, &device));

    for scales in [[1.0, 0.0], [0.5, -1.0], [1.0, 1.0]] {
        let merged = Merged::new(&base, [(&first, scales[0]), (&second, scales[1])]).unwrap();
        let beside = Adapted::new(&base, live.iter().zip(scales)).unwrap();
        let (merged, beside) = (velocity(&merged), velocity(&beside));
        assert!(distance(&merged, &beside) < 1e-5, "{scales:?}");
        assert!(
            distance(&velocity(&base), &beside) > 1e-2,
            "it does something"
        );
    }
    let off = Adapted::new(&base, [(&live[0], 0.0)]).unwrap();
    assert_eq!(
        velocity(&off),
        velocity(&base),
        "switched off, it is not there"
    );
}

#[test]
fn adapters_beside_what_they_do_not_fit_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let adapter = adapter(folder.path(), 1.0);
    let live = LiveAdapter::load(&adapter, &Device::flex());
    let other = TensorMap::default();
    let error = Adapted::new(&other, [(&live, 1.0)]).unwrap_err();
    let first = "block_groups.0.0.attn.add_v_proj.weight";
    assert!(error.to_string().contains(first), "{error}");

    // Another width under the same names.
    let wide = EmmditConfig {
        heads: 4,
        ..config()
    };
    let build = |p: &Params<'_>| Emmdit::new(&wide, p).map(drop);
    let base = TensorMap::collect(&RandomInit::new(1), &Device::flex(), build).unwrap();
    let adapted = Adapted::new(&base, [(&live, 1.0)]).unwrap();
    let params = Params::new(&adapted, &Device::flex(), Precision::F32);
    let error = Emmdit::new(&wide, &params).unwrap_err().to_string();
    assert!(error.contains("linear layers only"), "{error}");
}

#[test]
fn comfy_keys_carry_the_same_update() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("comfy.safetensors");
    let (down, up) = (random("down", RANK * 4), random("up", 2 * RANK));
    let layer = LoraLayer {
        module: "a.to_q",
        down: &down,
        up: &up,
    };
    save_comfy(&path, &spec(6.0), &[layer], DType::F32).unwrap();
    let files = WeightFiles::open(&path).unwrap();
    let names: Vec<&str> = files.names().collect();
    assert_eq!(
        names,
        [
            "diffusion_model.a.to_q.alpha",
            "diffusion_model.a.to_q.lora_down.weight",
            "diffusion_model.a.to_q.lora_up.weight"
        ]
    );
    assert_eq!(files.read(names[0]).unwrap(), (vec![], vec![6.0]));
    assert_eq!(files.read(names[1]).unwrap(), (vec![RANK, 4], down));
    assert_eq!(files.read(names[2]).unwrap(), (vec![2, RANK], up));
    assert_eq!(files.metadata()["ss_network_dim"], RANK.to_string());
}

const PYTHON: &str = r#"
import sys, torch, peft
from safetensors.torch import load_file, save_file
folder = sys.argv[1]
base = load_file(folder + "/base.safetensors")
class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q = torch.nn.Linear(5, 4)
        self.to_out = torch.nn.ModuleList([torch.nn.Linear(4, 3)])
    def forward(self, x):
        return self.to_out[0](self.to_q(x))
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = Attention()
    def forward(self, x):
        return self.attn(x)
model = Model()
model.load_state_dict({k: v for k, v in base.items() if k != "x"})
model = peft.PeftModel.from_pretrained(model, folder + "/adapter")
with torch.no_grad():
    save_file({"y": model(base["x"]).contiguous()}, folder + "/y.safetensors")
"#;

/// Needs a Python with torch and peft: `NITRO_PEFT_PYTHON`, else `python3` if it has them.
#[test]
fn python_peft_reads_what_we_write() {
    let python = std::env::var("NITRO_PEFT_PYTHON").unwrap_or_else(|_| "python3".into());
    let has = Command::new(&python)
        .args(["-c", "import peft, torch, safetensors"])
        .output();
    if !has.is_ok_and(|out| out.status.success()) {
        println!("skipped: {python} has no torch and peft; name one in NITRO_PEFT_PYTHON");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (device, rank) = (Device::flex(), 2);
    let tensors: Vec<(&str, Vec<usize>, Vec<f32>)> = vec![
        ("attn.to_q.weight", vec![4, 5], random("weight 0", 20)),
        ("attn.to_q.bias", vec![4], random("weight 1", 4)),
        ("attn.to_out.0.weight", vec![3, 4], random("weight 2", 12)),
        ("attn.to_out.0.bias", vec![3], random("weight 3", 3)),
        ("x", vec![6, 5], random("weight 4", 30)),
    ];
    let tensors: Vec<_> = tensors
        .iter()
        .map(|(name, shape, values)| ((*name).to_owned(), shape.clone(), values.as_slice()))
        .collect();
    let path = folder.path().join("base.safetensors");
    save_safetensors(&path, &tensors, &HashMap::new(), DType::F32).unwrap();
    let updates = [
        (
            "attn.to_q",
            random("q down", rank * 5),
            random("q up", 4 * rank),
        ),
        (
            "attn.to_out.0",
            random("out down", rank * 4),
            random("out up", 3 * rank),
        ),
    ];
    let layers: Vec<_> = updates
        .iter()
        .map(|(module, down, up)| LoraLayer { module, down, up })
        .collect();
    let spec = LoraSpec {
        rank,
        alpha: 5.0,
        targets: vec!["attn.to_q".into(), "to_out.0".into()],
        base_model: "none".into(),
    };
    save_peft(&folder.path().join("adapter"), &spec, &layers, DType::F32).unwrap();

    let out = Command::new(&python)
        .arg("-c")
        .arg(PYTHON)
        .arg(folder.path())
        .output()
        .unwrap();
    assert!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    let y = WeightFiles::open(folder.path().join("y.safetensors")).unwrap();
    let (_, expected) = y.read("y").unwrap();

    let base = WeightFiles::open(&path).unwrap();
    let adapter = LoraAdapter::open(folder.path().join("adapter")).unwrap();
    let live = LiveAdapter::load(&adapter, &device);
    let adapted = Adapted::new(&base, [(&live, 1.0)]).unwrap();
    let merged = Merged::new(&base, [(&adapter, 1.0)]).unwrap();
    let (_, x) = base.read("x").unwrap();
    for source in [&adapted as &dyn ParameterSource, &merged] {
        let p = Params::new(source, &device, Precision::F32);
        let first = Linear::new(&p.sub("attn.to_q"), 5, 4).unwrap();
        let second = Linear::new(&p.sub("attn.to_out.0"), 4, 3).unwrap();
        let x = Tensor::<2>::from_data(TensorData::new(x.clone(), [6, 5]), &device);
        let y = second.forward(first.forward(x));
        let y: Vec<f32> = y.into_data().try_into_vec().unwrap();
        assert!(distance(&expected, &y) < 1e-5, "{y:?} {expected:?}");
    }
}
