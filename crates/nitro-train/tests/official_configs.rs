//! The official configurations: names and values of AMD-AGI/Nitro-E's YAML files.

use std::path::Path;

use nitro_models::emmdit::{EmmditConfig, RepaConfig};
use nitro_train::config::{ComputePrecision, DataConfig, EmmditTask, RunConfig, TaskConfig};
use nitro_train::plan::plan;

fn load(name: &str) -> (RunConfig, EmmditTask) {
    let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs");
    let config = RunConfig::load(&configs.join(name), &[]).unwrap();
    let TaskConfig::Emmdit(task) = config.task.clone() else {
        panic!("{name}: not an emmdit");
    };
    (config, task)
}

#[test]
fn both_stages_at_both_sizes_have_the_official_values() {
    // default_config.yaml, emmdit_512train_step1.yaml, emmdit_512train_step2.yaml: max_iters, lr,
    // gradient_clip, use_ema * ema_rate.
    let stages = [(100_000, 3e-4, 0.5, 0.0), (50_000, 1e-4, 1.0, 0.9999)];
    for (side, plain) in [
        (512, EmmditConfig::nitro_e_512()),
        (1024, EmmditConfig::nitro_e_1024()),
    ] {
        for (stage, (steps, lr, clip, ema)) in stages.into_iter().enumerate() {
            let name = format!("emmdit_{side}train_step{}.yaml", stage + 1);
            let (config, task) = load(&name);
            let run = &config.run;
            assert_eq!(run.max_steps, steps, "{name}");
            assert_eq!((run.optimizer.lr, run.gradient_clip), (lr, clip), "{name}");
            assert_eq!(run.ema_rate, ema, "{name}");
            assert_eq!((run.batch_size, run.warmup_steps), (8 * 256, 500), "{name}");
            let adamw = &run.optimizer;
            assert_eq!((adamw.weight_decay, adamw.eps), (3e-2, 1e-10), "{name}");
            assert_eq!(adamw.betas, (0.9, 0.999), "{name}");
            assert_eq!(run.precision, ComputePrecision::Bf16, "{name}");
            assert_eq!(run.init_from.is_some(), stage == 1, "{name}");
            assert_eq!(
                (task.text_tokens, task.caption_dropout),
                (128, 0.1),
                "{name}"
            );
            assert_eq!((task.logit_mean, task.logit_std), (0.0, 1.0), "{name}");

            let projectors = RepaConfig {
                projector_dim: 2048,
                z_dims: vec![768],
            };
            let model = EmmditConfig {
                repa: (stage == 0).then_some(projectors),
                ..plain.clone()
            };
            assert_eq!(task.model, model, "{name}");
            task.model.check().unwrap();
            assert_eq!(task.repa.map(|repa| repa.weight), model.repa.map(|_| 0.5));
            let DataConfig::Mds(data) = &task.data else {
                panic!("{name}: not from shards");
            };
            assert_eq!(data.datasets.len(), 4, "{name}");
            assert_eq!(data.scaling_factor, Some(0.41407), "{name}");
            assert_eq!(data.latents, Some(format!("latents_{side}")), "{name}");
            assert_eq!(data.shuffle_seed, 9176, "{name}");
            assert!(
                !data.precompute_txt_emb && !data.precompute_dino_feat,
                "{name}"
            );
            // It resolves with overrides, for eight processes, and divides into parts.
            config.check(8).unwrap();
            let error = plan(&config, 8).unwrap_err().to_string();
            assert!(
                error.contains("mds_train") || error.contains("dinov2_vitb14"),
                "{name}: {error}"
            );
        }
    }
}

/// "304M" in AMD's words; counted over the official code's state dict (the goldens of `full_size` have
/// its names and shapes), buffers left out.
#[test]
fn the_full_size_models_have_the_official_number_of_parameters() {
    for name in ["emmdit_512train_step2.yaml", "emmdit_1024train_step2.yaml"] {
        let (_, task) = load(name);
        let counted: usize = task.model.parameter_counts().iter().map(|(_, n)| n).sum();
        assert_eq!(counted, 302_449_952, "{name}");
    }
}
