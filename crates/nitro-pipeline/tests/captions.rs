//! Caption cleaning must equal the official pipeline's, character for character.

use std::{fs, path::Path};

use nitro_pipeline::caption::{clean_once, preprocess};

/// One line of a file of pairs: the caption and what the official functions made of it.
#[derive(serde::Deserialize)]
struct Pair {
    raw: String,
    cleaned: String,
    plain: String,
    clean_once: String,
}

fn check(file: &Path) {
    let lines =
        fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    let mut count = 0;
    for line in lines.split('\n').filter(|line| !line.is_empty()) {
        let pair: Pair = serde_json::from_str(line).unwrap();
        assert_eq!(clean_once(&pair.raw), pair.clean_once, "{:?}", pair.raw);
        assert_eq!(preprocess(&pair.raw, true), pair.cleaned, "{:?}", pair.raw);
        assert_eq!(preprocess(&pair.raw, false), pair.plain, "{:?}", pair.raw);
        count += 1;
    }
    assert!(count > 0, "{} holds no pairs", file.display());
}

#[test]
fn golden_captions() {
    let golden = std::env::var_os("NITRO_GOLDEN").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden"),
        Into::into,
    );
    for case in fs::read_dir(golden.join("text_clean")).unwrap() {
        check(&case.unwrap().path().join("pairs.jsonl"));
    }
}

/// Random mixtures of everything the rules, the markup parser and the text repair react to.
#[test]
fn fuzzed_captions() {
    check(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/fuzzed_captions.jsonl"));
}
