//! The shapes bench end to end: pictures that show a prompt score, pictures that do not fail, and a
//! folder of them is scored the same, also after an interruption.

use nitro_data::shapes::{self, Colour, Facts, Kind, Scene};
use nitro_eval::Manifest;
use nitro_eval::geneval::{self, PromptFolder};
use nitro_eval::shapes::{options, score_folder, score_with};
use nitro_eval::{BenchPrompt, EvalError, Results, Summary, score_image, shapes_bench};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const SIDE: usize = 128;

/// A picture of what the prompt says, wherever and in whatever free colours.
fn picture(prompt: &str, rng: &mut StdRng) -> Vec<u8> {
    let facts = Facts::parse(prompt).unwrap();
    let kinds: Vec<Kind> = facts
        .groups
        .iter()
        .flat_map(|g| {
            let any = Colour::ALL[rng.random_range(0..10)];
            let kind = Kind {
                class: g.class,
                colour: g.colour.unwrap_or(any),
            };
            std::iter::repeat_n(kind, g.count)
        })
        .collect();
    let scene = Scene::with_kinds(rng, &kinds, facts.background, facts.relation);
    shapes::render(&scene, SIDE)
}

fn score(prompt: &BenchPrompt, rgb: &[u8]) -> bool {
    score_image(prompt, "x.png", rgb, SIDE, SIDE)
        .unwrap()
        .correct
}

#[test]
fn the_bench_has_forty_prompts_of_each_task() {
    let bench = shapes_bench();
    assert_eq!(bench.len(), 240);
    for tag in [
        "single_object",
        "two_object",
        "counting",
        "colors",
        "position",
        "color_attr",
    ] {
        assert_eq!(
            bench.iter().filter(|p| p.metadata.tag == tag).count(),
            40,
            "{tag}"
        );
    }
}

#[test]
fn a_true_picture_is_correct_and_another_prompts_picture_mostly_not() {
    let mut rng = StdRng::seed_from_u64(31);
    let bench = shapes_bench();
    let (mut right, mut wrong) = (0, 0);
    for (i, prompt) in bench.iter().enumerate() {
        right += usize::from(score(prompt, &picture(prompt.prompt(), &mut rng)));
        let other = &bench[(i + 97) % bench.len()];
        wrong += usize::from(score(prompt, &picture(other.prompt(), &mut rng)));
    }
    assert_eq!(right, 240);
    assert!(
        wrong < 48,
        "{wrong} of 240 pictures of another prompt passed"
    );
}

#[test]
fn what_a_prompt_forbids_is_wrong() {
    let mut rng = StdRng::seed_from_u64(32);
    let bench = shapes_bench();
    let find = |text: &str| bench.iter().find(|p| p.prompt() == text).unwrap();
    let cases = [
        ("two squares", "three squares"),
        ("two squares", "a square"),
        ("four circles", "three circles"),
        (
            "a circle left of a crescent",
            "a circle right of a crescent",
        ),
        ("a circle left of a crescent", "a circle above a crescent"),
        (
            "a red circle and a blue square",
            "a blue circle and a red square",
        ),
        ("a green square", "a blue square"),
    ];
    for (asked, shown) in cases {
        // Not every pair is in the bench; the metadata of the others is written here.
        let rgb = picture(shown, &mut rng);
        if asked == "a red circle and a blue square" {
            let metadata = geneval::Metadata::parse(
                r#"{"tag": "color_attr", "include": [{"class": "circle", "count": 1, "color": "red"}, {"class": "square", "count": 1, "color": "blue"}], "prompt": "a red circle and a blue square"}"#,
                "test",
            )
            .unwrap();
            let result = score_with(&metadata, "x", (&rgb, SIDE, SIDE), &options()).unwrap();
            assert!(!result.correct);
            assert_eq!(
                result.reason,
                "expected red circle>=1, found 0 red; and 1 blue\n\
                 expected blue square>=1, found 0 blue; and 1 red"
            );
        } else {
            assert!(!score(find(asked), &rgb), "asked {asked}, shown {shown}");
        }
    }
}

#[test]
fn a_folder_scores_like_its_pictures_and_resumes() {
    let home = tempfile::tempdir().unwrap();
    let images = home.path().join("images");
    let manifest = Manifest {
        checkpoint: "abc".to_owned(),
        steps: 20,
        guidance: 4.5,
        seeds: vec![0, 1],
    };
    manifest.claim(&images).unwrap();
    manifest.claim(&images).unwrap();
    let other = Manifest {
        steps: 4,
        ..manifest.clone()
    };
    assert!(matches!(
        other.claim(&images),
        Err(EvalError::OtherRun { .. })
    ));

    let mut rng = StdRng::seed_from_u64(33);
    let bench = shapes_bench();
    let chosen: Vec<&BenchPrompt> = bench.iter().step_by(30).collect();
    let mut direct = Vec::new();
    for prompt in &chosen {
        let samples = [
            picture(prompt.prompt(), &mut rng),
            picture(chosen[0].prompt(), &mut rng),
        ];
        direct.extend(samples.iter().map(|s| score(prompt, s)));
        let complete = || PromptFolder::is_complete(&images, prompt.index, &prompt.metadata, 2);
        assert!(!complete());
        geneval::write_prompt_folder(
            &images,
            prompt.index,
            &prompt.metadata,
            &samples,
            (SIDE, SIDE),
            true,
        )
        .unwrap();
        assert!(complete());
        assert!(!PromptFolder::is_complete(
            &images,
            prompt.index,
            &prompt.metadata,
            3
        ));
    }
    assert!(images.join("00030/samples/0001.png").is_file());
    let (_, width, height) = geneval::read_rgb(&images.join("00030/grid.png")).unwrap();
    assert_eq!((width, height), (2 * (SIDE + 2) + 2, SIDE + 4));

    let file = home.path().join("out/results.jsonl");
    let mut results = Results::open(&file).unwrap();
    score_folder(&images, &options(), &mut results).unwrap();
    let correct: Vec<bool> = results.records().iter().map(|r| r.correct).collect();
    assert_eq!(correct, direct);
    let summary = Summary::of(results.records());
    assert_eq!(
        (summary.images, summary.prompts),
        (2 * chosen.len(), chosen.len())
    );
    assert_eq!(summary.correct_prompts, chosen.len());

    // Interrupted after three records: only what is missing is judged, and the file ends the same.
    let whole = std::fs::read_to_string(&file).unwrap();
    let part: String = whole.lines().take(3).map(|l| format!("{l}\n")).collect();
    std::fs::write(&file, &part).unwrap();
    let mut results = Results::open(&file).unwrap();
    assert_eq!(results.records().len(), 3);
    score_folder(&images, &options(), &mut results).unwrap();
    assert_eq!(std::fs::read_to_string(&file).unwrap(), whole);
    let first: serde_json::Value = serde_json::from_str(whole.lines().next().unwrap()).unwrap();
    let details: serde_json::Value =
        serde_json::from_str(first["details"].as_str().unwrap()).unwrap();
    assert_eq!(details["triangle"][0].as_array().unwrap().len(), 5);
}

#[test]
fn problems_are_named() {
    let home = tempfile::tempdir().unwrap();
    let mut results = Results::open(&home.path().join("results.jsonl")).unwrap();
    let error = score_folder(home.path(), &options(), &mut results).unwrap_err();
    assert!(matches!(error, EvalError::NoPrompts { .. }), "{error}");
    let prompt = &shapes_bench()[0];
    let error = score_image(prompt, "tiny.png", &[0; 12], 2, 2).unwrap_err();
    assert!(error.to_string().contains("tiny.png"), "{error}");
    let metadata = geneval::Metadata::parse(
        r#"{"tag": "position", "prompt": "p", "include": [{"class": "circle", "count": 0, "position": ["above", 3]}]}"#,
        "test",
    )
    .unwrap();
    let picture = vec![170; 64 * 64 * 3];
    let error = score_with(&metadata, "p.png", (&picture, 64, 64), &options()).unwrap_err();
    assert!(
        matches!(error, EvalError::PositionTarget { target: 3, .. }),
        "{error}"
    );
}
