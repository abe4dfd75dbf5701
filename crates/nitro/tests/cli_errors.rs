//! Bad input to the command: one clear line on standard error, the right exit code, nothing written.

mod support;

use std::path::{Path, PathBuf};
use std::process::Output;

use image::{GrayImage, RgbImage};
use support::{copy_folder, files_below, golden_model, nitro, said, stderr};

/// The model, disk or network failed.
const FAILED: i32 = 1;
/// The request cannot be carried out as given.
const BAD_INPUT: i32 = 2;

/// A workplace with a copy of the golden model that may be damaged.
struct Workplace {
    home: tempfile::TempDir,
}

impl Workplace {
    fn new() -> Self {
        let home = tempfile::tempdir().unwrap();
        copy_folder(&golden_model(), &home.path().join("model"));
        Self { home }
    }

    fn model(&self, file: &str) -> PathBuf {
        self.home.path().join("model").join(file)
    }

    /// Changes a file of the model.
    fn damage(&self, file: &str, change: impl FnOnce(Vec<u8>) -> Vec<u8>) -> &Self {
        let path = self.model(file);
        std::fs::write(&path, change(std::fs::read(&path).unwrap())).unwrap();
        self
    }

    /// Changes the JSON header of a safetensors file.
    fn damage_header(&self, file: &str, change: impl FnOnce(String) -> String) -> &Self {
        self.damage(file, |bytes| {
            let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            let header = String::from_utf8(bytes[8..8 + length].to_vec()).unwrap();
            let header = change(header);
            let mut damaged = (header.len() as u64).to_le_bytes().to_vec();
            damaged.extend(header.as_bytes());
            damaged.extend(&bytes[8 + length..]);
            damaged
        })
    }

    /// `nitro generate` on the copy: 4 steps at most, into `pictures/`.
    fn generate(&self, arguments: &[&str]) -> Output {
        let pictures = self.home.path().join("pictures");
        std::fs::create_dir_all(&pictures).unwrap();
        nitro(self.home.path())
            .args(["generate", "--offline", "--model", "model"])
            .args(arguments)
            .output()
            .unwrap()
    }

    /// The arguments fail with this code and one line that holds all of `says`; no file appears.
    #[track_caller]
    fn refuses(&self, arguments: &[&str], code: i32, says: &[&str]) {
        let before = files_below(self.home.path());
        let output = self.generate(arguments);
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(code), "{}", said(&output));
        assert!(!text.contains("panicked"), "{text}");
        assert_eq!(text.lines().count(), 1, "one line was expected: {text}");
        assert!(text.starts_with("error: "), "{text}");
        for part in says {
            assert!(text.contains(part), "{part:?} is missing in: {text}");
        }
        assert!(output.stdout.is_empty(), "{}", said(&output));
        assert_eq!(
            files_below(self.home.path()),
            before,
            "files were left behind"
        );
    }

    /// A plain request fails.
    #[track_caller]
    fn fails(&self, says: &[&str]) {
        self.refuses(&["a fox", "--steps", "1", "-o", "pictures"], FAILED, says);
    }
}

const TRANSFORMER: &str = "Nitro-E-512px.safetensors";
const DECODER: &str = "dc-ae/diffusion_pytorch_model.safetensors";
const LLAMA: &str = "text_encoder/model.safetensors";
const TOKENIZER: &str = "text_encoder/tokenizer.json";

#[test]
fn a_model_that_is_not_there() {
    let place = Workplace::new();
    let model = |path| ["a fox", "-o", "pictures", "--model", path];
    let fails = |path, says: &[&str]| {
        let mut command = nitro(place.home.path());
        let output = command
            .args(["generate", "--offline"])
            .args(model(path))
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(FAILED), "{}", said(&output));
        assert_eq!(stderr(&output).lines().count(), 1, "{}", said(&output));
        says.iter()
            .for_each(|part| assert!(stderr(&output).contains(part), "{}", said(&output)));
    };
    std::fs::create_dir(place.home.path().join("pictures")).unwrap();
    fails("./no-such-folder", &["./no-such-folder", "no such folder"]);
    fails(
        "pictures",
        &["pictures", "nitro.json", "Nitro-E-512px.safetensors"],
    );
}

#[test]
fn missing_weights_are_named() {
    for file in [DECODER, LLAMA, TOKENIZER, "dc-ae/config.json"] {
        let place = Workplace::new();
        std::fs::remove_file(place.model(file)).unwrap();
        place.fails(&[file, "No such file"]);
    }
    // Without its weights a variant is not there to be chosen.
    let place = Workplace::new();
    std::fs::remove_file(place.model("Nitro-E-512px-dist.safetensors")).unwrap();
    place.refuses(
        &["a fox", "--variant", "dist"],
        BAD_INPUT,
        &["`dist`", "base, grpo"],
    );
}

#[test]
fn truncated_weights_are_named() {
    for file in [
        TRANSFORMER,
        DECODER,
        LLAMA,
        "ckpt_grpo_512px/adapter_model.safetensors",
    ] {
        for keep in [0, 5, 1000, usize::MAX] {
            let place = Workplace::new();
            place.damage(file, |mut bytes| {
                bytes.truncate(keep.min(bytes.len() - 100));
                bytes
            });
            let arguments = [
                "a fox",
                "--variant",
                "grpo",
                "--steps",
                "1",
                "-o",
                "pictures",
            ];
            place.refuses(
                &arguments,
                FAILED,
                &[file, "not a complete safetensors file"],
            );
        }
    }
}

#[test]
fn corrupted_weights_are_named() {
    let place = Workplace::new();
    place.damage(TRANSFORMER, |bytes| vec![0xff; bytes.len()]);
    place.fails(&[TRANSFORMER, "not a complete safetensors file"]);
    let place = Workplace::new();
    place.damage_header(DECODER, |header| header.replacen('{', "[", 1));
    place.fails(&[DECODER, "not a complete safetensors file"]);
}

#[test]
fn weights_that_are_no_numbers_make_no_picture() {
    for file in [TRANSFORMER, DECODER, LLAMA] {
        let place = Workplace::new();
        place.damage(file, |mut bytes| {
            let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            bytes[8 + length..].fill(0xff);
            bytes
        });
        place.fails(&[file, "not finite", "damaged"]);
    }
}

#[test]
fn mismatching_weights_name_tensor_expectation_and_finding() {
    let tensor = "block_groups.1.3.attn.to_q.weight";
    let place = Workplace::new();
    place.damage_header(TRANSFORMER, |header| {
        header.replace(tensor, "block_groups.1.3.attn.to_x.weight")
    });
    place.fails(&[TRANSFORMER, tensor, "no tensor"]);

    let place = Workplace::new();
    let name = "context_embedder.bias";
    place.damage_header(TRANSFORMER, |header| {
        let at = header.find(&format!("\"{name}\"")).unwrap();
        let (before, after) = header.split_at(at);
        format!("{before}{}", after.replacen("[32]", "[16,2]", 1))
    });
    place.fails(&[TRANSFORMER, name, "[16, 2]", "[32]"]);

    let place = Workplace::new();
    place.damage_header(LLAMA, |header| header.replacen("\"F32\"", "\"I32\"", 1));
    place.fails(&[LLAMA, "I32", "f32, f16 and bf16"]);

    // The weights of another model.
    let place = Workplace::new();
    std::fs::copy(place.model(LLAMA), place.model(TRANSFORMER)).unwrap();
    place.fails(&[TRANSFORMER, "no tensor"]);

    // Parts that do not fit each other.
    let place = Workplace::new();
    place.damage("text_encoder/config.json", |json| {
        String::from_utf8(json)
            .unwrap()
            .replace("\"vocab_size\": 420", "\"vocab_size\": 20")
            .into()
    });
    place.fails(&["tokenizer.json", "419", "20"]);
}

#[test]
fn broken_configurations_and_tokenizers_are_named() {
    for file in [
        TOKENIZER,
        "text_encoder/tokenizer_config.json",
        "text_encoder/config.json",
        "dc-ae/config.json",
    ] {
        for content in [&b"{"[..], b"", b"[1, 2]", b"\xff\xfe"] {
            let place = Workplace::new();
            place.damage(file, |_| content.to_vec());
            place.fails(&[file]);
        }
    }
    let place = Workplace::new();
    place.damage("text_encoder/tokenizer_config.json", |_| b"{}".to_vec());
    place.fails(&["tokenizer_config.json", "eos_token"]);
    let place = Workplace::new();
    std::fs::write(place.model("nitro.json"), "{\"format\": 99}").unwrap();
    place.fails(&["nitro.json"]);
}

#[test]
fn a_size_that_the_model_cannot_make() {
    let place = Workplace::new();
    let refuses = |size: &[&str], says: &[&str]| {
        place.refuses(
            &[&["a fox", "-o", "pictures"], size].concat(),
            BAD_INPUT,
            says,
        );
    };
    refuses(&["--size", "500"], &["500x500", "multiple of 128", "512"]);
    refuses(&["-W", "512", "-H", "1024"], &["512x1024", "square"]);
    refuses(&["--size", "0"], &["0x0", "multiple of 128"]);
    // Divides, but leaves groups of tokens that subregion attention cannot split.
    refuses(&["--size", "640"], &["640x640", "512"]);
}

#[test]
fn settings_out_of_range() {
    let place = Workplace::new();
    let refuses = |setting: &[&str], says: &[&str]| {
        place.refuses(
            &[&["a fox", "-o", "pictures"], setting].concat(),
            BAD_INPUT,
            says,
        );
    };
    refuses(&["--variant", "turbo"], &["`turbo`", "base, grpo, dist"]);
    refuses(&["--steps", "0"], &["steps 0", "between 1 and 1000"]);
    refuses(&["--guidance-scale", "NaN"], &["guidance scale"]);
    refuses(&["--num-images", "0"], &["number of images 0"]);
    refuses(
        &["--lora", "no-such-adapter"],
        &["no-such-adapter", "adapter_config.json"],
    );
}

#[test]
fn an_empty_prompt() {
    let place = Workplace::new();
    for prompt in ["", "  \t "] {
        place.refuses(
            &[prompt, "-o", "pictures"],
            BAD_INPUT,
            &["prompt 1 is empty"],
        );
    }
    place.refuses(
        &["a fox", " ", "-o", "pictures"],
        BAD_INPUT,
        &["prompt 2 is empty"],
    );
    // Caption cleaning removes addresses, of which this prompt consists.
    let only_address = [
        "https://example.com/",
        "-o",
        "pictures",
        "--variant",
        "dist",
    ];
    place.refuses(&only_address, BAD_INPUT, &["prompt 1 is empty", "cleaning"]);
    // No prompt at all is clap's to refuse.
    let output = place.generate(&[]);
    assert_eq!(output.status.code(), Some(BAD_INPUT), "{}", said(&output));
}

#[test]
fn an_over_long_prompt_is_cut_and_said() {
    let place = Workplace::new();
    let prompt = "a small fox in the snow, ".repeat(60);
    let output = place.generate(&[
        &prompt,
        "--variant",
        "dist",
        "--steps",
        "1",
        "-o",
        "pictures",
        "--quiet",
    ]);
    assert!(output.status.success(), "{}", said(&output));
    let text = stderr(&output);
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(
        text.starts_with("warning: ") && text.contains("128 tokens"),
        "{text}"
    );
    assert!(
        text.contains("left out") && text.contains("in the snow"),
        "{text}"
    );
}

#[test]
fn an_output_that_cannot_be_written() {
    let place = Workplace::new();
    let refuses = |path: &str, code, says: &[&str]| {
        place.refuses(&["a fox", "--steps", "1", "-o", path], code, says);
    };
    refuses("no/such/folder/out.png", FAILED, &["no/such/folder"]);
    refuses("model/nitro/out.png", FAILED, &["model/nitro"]);
    // A file is no folder.
    refuses(
        "model/Nitro-E-512px.safetensors/out.png",
        FAILED,
        &["Nitro-E-512px.safetensors"],
    );
    refuses("out.webp", BAD_INPUT, &["out.webp", ".png"]);
}

#[test]
fn images_and_masks_that_do_not_fit() {
    let place = Workplace::new();
    let save = |name: &str| {
        let path = place.home.path().join(name);
        path.to_str().unwrap().to_owned()
    };
    let (image, mask, broken) = (save("image.png"), save("mask.png"), save("broken.png"));
    RgbImage::new(64, 64).save(&image).unwrap();
    GrayImage::new(32, 64).save(&mask).unwrap();
    let half = std::fs::read(&image).unwrap();
    std::fs::write(&broken, &half[..half.len() / 2]).unwrap();
    let refuses = |arguments: &[&str], says: &[&str]| {
        place.refuses(
            &[&["a fox", "-o", "pictures"], arguments].concat(),
            BAD_INPUT,
            says,
        );
    };
    refuses(
        &["-i", &image, "--mask", &mask],
        &["mask is 32x64", "initial image is 64x64"],
    );
    refuses(&["-i", &image, "--strength", "0"], &["strength 0"]);
    refuses(&["-i", &image, "--strength", "1.5"], &["strength 1.5"]);
    refuses(&["-i", &broken], &["broken.png"]);
    refuses(&["-i", "absent.png"], &["absent.png"]);
    refuses(&["-i", &image, "--mask", "absent.png"], &["absent.png"]);
}

#[test]
fn other_commands_refuse_bad_input_alike() {
    let place = Workplace::new();
    place.damage(TRANSFORMER, |bytes| bytes[..1000].to_vec());
    let run = |arguments: &[&str]| {
        nitro(place.home.path())
            .args(arguments)
            .arg("--offline")
            .output()
            .unwrap()
    };
    let check = |output: &Output, code, says: &str| {
        assert_eq!(output.status.code(), Some(code), "{}", said(output));
        assert_eq!(stderr(output).lines().count(), 1, "{}", said(output));
        assert!(stderr(output).contains(says), "{}", said(output));
    };
    check(&run(&["model", "info", "model"]), FAILED, TRANSFORMER);
    check(&run(&["model", "info", "nowhere"]), FAILED, "nowhere");
    check(
        &run(&["eval", "shapes", "--prompts", "nowhere.jsonl"]),
        BAD_INPUT,
        "nowhere.jsonl",
    );
    let prompts = place.home.path().join("prompts.jsonl");
    std::fs::write(&prompts, "{\"tag\": 3}\n").unwrap();
    let path = prompts.to_str().unwrap();
    check(
        &run(&["eval", "shapes", "--prompts", path]),
        BAD_INPUT,
        "line 1",
    );
    assert!(!Path::new(&place.home.path().join("shapes-bench")).exists());
}
