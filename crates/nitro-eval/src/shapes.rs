//! The shapes bench: 240 prompts in GenEval's schema, judged by the exact judge of the shapes world
//! under GenEval's rules.

mod grammar;

use std::path::Path;

use nitro_data::shapes::{BENCH_JSONL, judge};

pub use self::grammar::{TASKS, held_out_bench, is_held_out, metadata_of, training_prompt};
use crate::EvalError;
use crate::geneval::{
    self, Detections, ImageResult, Kept, Metadata, Options, Results, evaluate, keep,
};

/// One prompt of the bench.
#[derive(Debug, Clone, PartialEq)]
pub struct BenchPrompt {
    /// Its place in the bench, from 0: the number of its folder.
    pub index: usize,
    /// What its pictures must show.
    pub metadata: Metadata,
}

impl BenchPrompt {
    /// The prompt's text.
    pub fn prompt(&self) -> &str {
        &self.metadata.prompt
    }
}

/// Pictures per prompt; picture `i` is made with seed `i`.
pub const IMAGES_PER_PROMPT: usize = 4;

/// The 240 prompts, 40 for each of GenEval's tasks.
pub fn shapes_bench() -> Vec<BenchPrompt> {
    geneval::read_metadata(BENCH_JSONL, "shapes_bench.jsonl (built in)")
        .expect("the built-in bench is read by this crate's tests")
        .into_iter()
        .enumerate()
        .map(|(index, metadata)| BenchPrompt { index, metadata })
        .collect()
}

/// The bench's thresholds: GenEval's, but for counting. GenEval asks its neural detector for 0.9
/// there to suppress doubtful boxes; the judge's confidence is the IoU of a silhouette, every object
/// it reports is there, and the bench counts exactly.
pub fn options() -> Options {
    Options {
        counting_threshold: Options::default().threshold,
        ..Options::default()
    }
}

/// Judges one picture (`height * width * 3` RGB bytes) of a prompt. `filename` names it in the
/// record.
///
/// # Errors
/// When the bytes do not fit the dimensions, or the picture is below 32 pixels a side.
pub fn score_image(
    prompt: &BenchPrompt,
    filename: &str,
    rgb: &[u8],
    width: usize,
    height: usize,
) -> Result<ImageResult, EvalError> {
    score_with(&prompt.metadata, filename, (rgb, width, height), &options())
}

/// Judges one picture against any metadata of the shapes world, with thresholds of the caller's.
///
/// # Errors
/// As [`score_image`]; also when a position clause refers to no earlier clause.
pub fn score_with(
    metadata: &Metadata,
    filename: &str,
    (rgb, width, height): (&[u8], usize, usize),
    options: &Options,
) -> Result<ImageResult, EvalError> {
    let found = judge(rgb, width, height).map_err(|source| EvalError::Judge {
        what: filename.to_owned(),
        source,
    })?;
    let mut detections = Detections::default();
    for d in &found {
        let [x0, y0, x1, y1] = d.bbox;
        detections.push(d.class.name(), [x0, y0, x1, y1, d.confidence]);
    }
    let kept = keep(&detections, &metadata.tag, options);
    // The n-th box of a class is the n-th detection of that class.
    let colours = |class: &str, objects: &[Kept]| {
        let of_class: Vec<&str> = found
            .iter()
            .filter(|d| d.class.name() == class)
            .map(|d| d.colour.name())
            .collect();
        Ok(objects
            .iter()
            .map(|k| of_class[k.index].to_owned())
            .collect())
    };
    let verdict = evaluate(&kept, metadata, options, colours)?;
    Ok(ImageResult::new(filename, metadata, verdict, &kept))
}

/// Judges every picture of a folder in GenEval's layout. With `results`, pictures already in that
/// file are passed over and each prompt's records are written as soon as they are known.
///
/// # Errors
/// When the folder is not in GenEval's layout, a picture cannot be read or judged, or the results
/// cannot be written.
pub fn score_folder(
    images: &Path,
    options: &Options,
    results: &mut Results,
) -> Result<(), EvalError> {
    for folder in geneval::prompt_folders(images)? {
        let mut records = Vec::new();
        for sample in &folder.samples {
            let filename = sample.display().to_string();
            if results.contains(&filename) {
                continue;
            }
            let (rgb, width, height) = geneval::read_rgb(sample)?;
            records.push(score_with(
                &folder.metadata,
                &filename,
                (&rgb, width, height),
                options,
            )?);
        }
        if !records.is_empty() {
            results.add(records)?;
        }
    }
    Ok(())
}
