//! The golden vectors: every case that the official code produced, against this implementation.
//!
//! `NITRO_GOLDEN=DIR cargo test --release -p nitro --test golden -- --nocapture` walks
//! `DIR/<suite>/<case>/case.json` (default: the project's `tests/golden`), takes every dimension
//! from the case, and prints the error of every tensor. It fails on a miss, and when a case of a
//! suite it knows could not be run. `NITRO_GOLDEN_ONLY=text` restricts it to the cases whose
//! `suite/case` contains the text. The largest models take gigabytes and minutes: they run when
//! `NITRO_GOLDEN` names a directory, or with `NITRO_GOLDEN_FULL=1`.

mod compare;
mod dcae;
mod diffusion;
mod dinov2;
mod emmdit;
mod files;
mod full_size;
mod geneval;
mod llama;
mod mds;
mod pipeline;
mod scorers;
mod text;
mod train_steps;
mod transforms;

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use anyhow::{Result, anyhow};

use compare::Report;
use files::{Case, golden_dir};

/// A suite's name, and how one of its cases is run.
type Suite = (&'static str, fn(&Case, &mut Report) -> Result<()>);

const SUITES: &[Suite] = &[
    ("clip_hps", scorers::clip_hps),
    ("dcae", dcae::run),
    ("dinov2", dinov2::run),
    ("emmdit_forward", emmdit::forward),
    ("emmdit_train", emmdit::train),
    ("flow_match_euler", diffusion::flow_match_euler),
    ("full_size", full_size::run),
    ("geneval", geneval::run),
    ("image_reward", scorers::image_reward),
    ("llama", llama::run),
    ("mds", mds::run),
    ("mask2former", scorers::mask2former),
    ("pipeline", pipeline::run),
    ("text_clean", text::clean),
    ("torch_rng", diffusion::torch_rng),
    ("train_steps", train_steps::run),
    ("transforms", transforms::run),
];

#[test]
fn every_case_of_every_known_suite_matches() {
    let dir = golden_dir();
    let only = std::env::var("NITRO_GOLDEN_ONLY").unwrap_or_default();
    let cases = Case::all(&dir).unwrap();
    assert!(!cases.is_empty(), "{} holds no golden cases", dir.display());
    let asked = |name: &str| std::env::var_os(name).is_some();
    let full = asked("NITRO_GOLDEN") || asked("NITRO_GOLDEN_FULL");
    let mut uncovered = BTreeSet::new();
    let mut summary = Vec::new();
    let mut failures = 0;
    for case in cases.iter().filter(|case| case.title().contains(&only)) {
        // The suite of the encoder has the transforms of its pictures, too.
        let suite = match case.suite.as_str() {
            "dinov2" if !dinov2::is_model(case) => "transforms",
            suite => suite,
        };
        let Some((_, run)) = SUITES.iter().find(|(name, _)| *name == suite) else {
            uncovered.insert(case.suite.as_str());
            continue;
        };
        if case.suite == "full_size" && !full && !full_size::is_quick(case) {
            println!("\n{}: not run, NITRO_GOLDEN_FULL is not set", case.title());
            continue;
        }
        println!("\n{}", case.title());
        let begun = Instant::now();
        let mut report = Report::default();
        let outcome = catch_unwind(AssertUnwindSafe(|| run(case, &mut report)))
            .unwrap_or_else(|panic| Err(anyhow!("panicked: {}", message(&*panic))));
        if let Err(error) = outcome {
            report.failure("the case could not be run", format!("{error:#}"));
        }
        if report.is_empty() {
            report.failure("the case", "nothing was compared".to_owned());
        }
        report.print();
        failures += report.failures();
        summary.push((
            case.title(),
            report.summary(),
            begun.elapsed().as_secs_f64(),
        ));
    }
    println!();
    for (title, line, seconds) in summary {
        println!("{title:40} {line} {seconds:7.1} s");
    }
    for suite in uncovered {
        println!("{suite:40} not covered");
    }
    assert_eq!(failures, 0, "golden comparisons failed; see the table");
}

fn message(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("(no message)")
}
