//! DC-AE against the reference.

mod common;

use burn::tensor::{Device, Tensor, TensorData};
use common::{Case, data, tensor};
use nitro_models::dcae::{Dcae, DcaeConfig};
use nitro_models::{Params, TensorMap};
use nitro_ops::Precision;

#[test]
fn dcae() {
    for mut case in Case::all("dcae") {
        let config: DcaeConfig = serde_json::from_value(case.json["config"].clone()).unwrap();
        let limit = case.json["tolerance"]["rel_l2"].as_f64().unwrap();
        let weights = case.files("weights");
        let device = Device::flex();
        let model = Dcae::new(&config, &Params::new(&weights, &device, Precision::F32)).unwrap();
        weights.finish(&[]).unwrap();
        let (inputs, outputs) = (case.files("inputs"), case.files("outputs"));
        if case.json["tolerance"].get("grads_rel_l2").is_some() {
            gradients(&mut case, &config, limit);
            case.finish();
            continue;
        }
        for tag in inputs.names().filter_map(|name| name.strip_prefix("x_")) {
            let mut found: Vec<(String, Vec<f32>)> = vec![];
            let x: Tensor<4> = tensor(&inputs, &format!("x_{tag}"));
            let z: Tensor<4> = tensor(&inputs, &format!("z_{tag}"));
            let latent = model.encoder.encode_observed(x, &mut |name, x| {
                found.push((format!("{tag}.enc.{name}"), data(x.permute([0, 3, 1, 2]))));
            });
            let latent = latent.unwrap();
            let decoded = model.decoder.decode_observed(z.clone(), &mut |name, x| {
                let name = if name == "conv_in" {
                    "conv_in_plain"
                } else {
                    name
                };
                found.push((format!("{tag}.dec.{name}"), data(x.permute([0, 3, 1, 2]))));
            });
            found.push((format!("{tag}.decoded"), data(decoded.unwrap())));
            found.push((format!("{tag}.latent"), data(latent.clone())));
            found.push((
                format!("{tag}.reconstruction"),
                data(model.decode(latent).unwrap()),
            ));
            let unscaled = model.decode(z / config.scaling_factor).unwrap();
            found.push((format!("{tag}.decoded_from_scaled"), data(unscaled)));
            for name in outputs
                .names()
                .filter(|name| name.starts_with(&format!("{tag}.")))
            {
                let found = found.iter().find(|(found, _)| found == name);
                let found = found
                    .unwrap_or_else(|| panic!("{name} is not computed"))
                    .1
                    .clone();
                case.check(name, found, &outputs.read(name).unwrap().1, limit);
            }
        }
        case.finish();
    }
}

fn gradients(case: &mut Case, config: &DcaeConfig, limit: f64) {
    let (inputs, outputs) = (case.files("inputs"), case.files("outputs"));
    let (weights, expected) = (case.files("weights"), case.files("grads"));
    let x: Tensor<4> = tensor(&inputs, "x");
    let plain = Device::flex();
    let map = TensorMap::collect(&weights, &plain, |p| Dcae::new(config, p).map(|_| ())).unwrap();
    let device = plain.clone().autodiff();
    let tracked = map.map(|_, tensor| tensor.autodiff().require_grad());
    let run = |map: &TensorMap, device: &Device| {
        let model = Dcae::new(config, &Params::new(map, device, Precision::F32)).unwrap();
        let x = if device == &plain {
            x.clone()
        } else {
            x.clone().autodiff()
        };
        let latent = model.encode(x.clone()).unwrap();
        let decoded = model.decode(latent.clone()).unwrap();
        let loss = (decoded.clone() - x).powi_scalar(2).mean();
        (latent, decoded, loss)
    };
    let (latent, decoded, loss) = run(&tracked, &device);
    let gradients = loss.backward();
    let rate = case.json["inputs"]["sgd_lr"].as_f64().unwrap();
    let grads_limit = case.json["tolerance"]["grads_rel_l2"].as_f64().unwrap();
    let mut compared = 0;
    let mut worst = (0.0, String::new());
    let stepped = tracked.map(|spec, tensor| {
        let gradient = tensor
            .grad(&gradients)
            .expect("every parameter has a gradient");
        let values = data(gradient.clone());
        let before = std::mem::take(&mut case.worst);
        case.check(
            &spec.name,
            values,
            &expected.read(&spec.name).unwrap().1,
            grads_limit,
        );
        if case.worst > worst.0 {
            worst = (case.worst, spec.name.clone());
        }
        case.worst = case.worst.max(before);
        compared += 1;
        let before = data(tensor);
        let after: Vec<f32> = before
            .iter()
            .zip(data(gradient))
            .map(|(p, g)| p - rate as f32 * g)
            .collect();
        let count = after.len();
        Tensor::from_data(TensorData::new(after, [count]), &plain)
    });
    assert_eq!(compared, expected.names().count());
    println!("worst gradient {worst:?}");
    let (_, _, after) = run(&stepped, &plain);
    for (name, found) in [
        ("latent", data(latent)),
        ("decoded", data(decoded)),
        ("loss", data(loss)),
        ("loss_after_sgd", data(after)),
    ] {
        case.check(name, found, &outputs.read(name).unwrap().1, limit);
    }
}
