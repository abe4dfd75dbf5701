//! A picture is the same, to the last bit, whatever it is made with: alone, in a batch of other
//! prompts, joining late, beside others with other guidance and schedules.

use std::path::Path;

use nitro_pipeline::{Pipeline, Request, Sample};

fn miniature() -> Pipeline {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/miniature");
    Pipeline::from_pretrained(folder).unwrap()
}

/// Narrow layers with long rows, for which products are shared out in other ways.
fn golden() -> Pipeline {
    let model = "../../tests/golden/pipeline/model";
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(model);
    Pipeline::from_pretrained(folder).unwrap()
}

fn requests() -> [Request; 4] {
    [
        Request::new("a red circle")
            .negative("blurry")
            .seed(7)
            .steps(5),
        Request::new("two blue squares")
            .seed(1)
            .steps(3)
            .guidance(1.0),
        Request::new("a green star above a ring")
            .seed(2)
            .steps(6)
            .guidance(7.5),
        Request::new("a red circle").seed(9).steps(2).guidance(2.0),
    ]
}

/// Latents and pixels of one request by itself.
fn alone(pipeline: &Pipeline, request: &Request) -> (Vec<f32>, Vec<u8>) {
    let output = pipeline.generate(request).unwrap();
    (output.latents, output.images[0].image.as_raw().clone())
}

#[test]
fn a_picture_does_not_depend_on_its_company() {
    in_company(&miniature(), &miniature());
}

#[test]
fn nor_does_it_in_a_model_of_other_widths() {
    in_company(&golden(), &golden());
}

/// `by_itself` is the same model, loaded once more: it knows no text that `pipeline` has encoded.
fn in_company(pipeline: &Pipeline, by_itself: &Pipeline) {
    let mut waiting: Vec<(usize, Sample)> = requests()
        .iter()
        .enumerate()
        .map(|(i, request)| {
            let mut prepared = pipeline.prepare(request).unwrap();
            (i, prepared.samples.remove(0))
        })
        .collect();
    // "a red circle" and the empty negative prompt were known the second time.
    let cache = pipeline.prompt_cache();
    assert_eq!((cache.hits(), cache.misses()), (2, 5));

    // One more joins before every step; who is done leaves.
    let mut batch: Vec<(usize, Sample)> = Vec::new();
    let mut done = Vec::new();
    while !(waiting.is_empty() && batch.is_empty()) {
        batch.extend(waiting.pop());
        let mut samples: Vec<&mut Sample> = batch.iter_mut().map(|(_, s)| s).collect();
        pipeline.step(&mut samples).unwrap();
        done.extend(batch.extract_if(.., |(_, sample)| sample.is_done()));
    }
    let pixels = pipeline
        .pictures(&done.iter().map(|(_, s)| s).collect::<Vec<_>>())
        .unwrap();
    let requests = requests();
    for ((i, sample), pixels) in done.iter().zip(pixels) {
        let (latents, alone) = alone(by_itself, &requests[*i]);
        assert!(
            sample.trajectory().latents() == latents,
            "request {i}: the latents depend on the batch"
        );
        assert!(
            *pixels.as_raw() == alone,
            "request {i}: the pixels depend on the batch"
        );
    }
}

#[test]
fn pictures_of_one_request_are_those_of_single_requests() {
    let pipeline = miniature();
    let request = Request::new("three pink hearts")
        .steps(3)
        .images(9)
        .seed(40);
    let together = pipeline.generate(&request).unwrap();
    for (picture, seed) in together.images.iter().zip(40..) {
        let (_, alone) = alone(&pipeline, &request.clone().images(1).seed(seed));
        assert!(*picture.image.as_raw() == alone, "seed {seed}");
    }
}

#[test]
fn finished_samples_rest_while_others_go_on() {
    let pipeline = miniature();
    let prepare = |request: Request| pipeline.prepare(&request).unwrap().samples;
    let mut short = prepare(Request::new("a ring").steps(1));
    let mut long = prepare(Request::new("a ring").steps(2));
    pipeline.step(&mut [&mut short[0], &mut long[0]]).unwrap();
    assert!(short[0].is_done() && !long[0].is_done());
    let latents = short[0].trajectory().latents().to_vec();
    pipeline.step(&mut [&mut short[0], &mut long[0]]).unwrap();
    assert_eq!(short[0].trajectory().latents(), latents);
    assert!(long[0].is_done());
}
