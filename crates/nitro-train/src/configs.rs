//! The configurations that come with the program: it trains wherever it lies, without a checkout.

use std::path::Path;

macro_rules! shipped {
    ($($name:literal),* $(,)?) => {
        [$((
            $name,
            include_str!(concat!("../../../configs/", $name, ".yaml")),
        )),*]
    };
}

/// Name and text of each file of `configs/`.
pub const SHIPPED: [(&str, &str); 15] = shipped![
    "distill-miniature",
    "distill-nitro-e-512",
    "emmdit_1024train_step1",
    "emmdit_1024train_step2",
    "emmdit_512train_step1",
    "emmdit_512train_step2",
    "grpo-miniature",
    "grpo-nitro-e-512",
    "lora",
    "miniature-autoencoder",
    "miniature-preference",
    "miniature-stage1",
    "miniature-stage2",
    "miniature-teacher",
    "miniature-text-encoder",
];

/// The text of `configs/NAME.yaml`.
pub(crate) fn by_name(name: &str) -> Option<&'static str> {
    let mut all = SHIPPED.iter();
    all.find(|(own, _)| *own == name).map(|(_, text)| *text)
}

/// The text of what `path` names, if it names a file of a folder `configs`.
pub(crate) fn by_path(path: &Path) -> Option<&'static str> {
    let inside = path.parent()?.file_name()? == "configs";
    let yaml = path.extension()? == "yaml";
    by_name(path.file_stem()?.to_str().filter(|_| inside && yaml)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::RunConfig;

    #[test]
    fn every_file_of_the_folder_comes_with_the_program() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs");
        let mut there: Vec<String> = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned())
            .collect();
        there.sort();
        let own: Vec<&str> = SHIPPED.iter().map(|(name, _)| *name).collect();
        assert_eq!(own, there);
        for name in own {
            RunConfig::shipped(name, &[]).unwrap();
        }
    }

    #[test]
    fn a_path_that_does_not_exist_means_the_shipped_file_of_its_name() {
        let nowhere = Path::new("/nowhere/configs/miniature-stage1.yaml");
        let config = RunConfig::load(nowhere, &["run.max_steps=7".into()]).unwrap();
        assert_eq!(config.run.max_steps, 7);
        for other in [
            "/nowhere/configs/miniature.yaml",
            "/nowhere/miniature-stage1.yaml",
            "/nowhere/configs/miniature-stage1.json",
            "miniature-stage1",
        ] {
            let error = RunConfig::load(Path::new(other), &[]).unwrap_err();
            assert!(error.to_string().contains(other), "{error}");
        }
    }
}
