//! The OpenAI Images API over real HTTP.

mod support;

use image::{GrayImage, Luma, Rgb, RgbImage, Rgba, RgbaImage};
use nitro_pipeline::picture::{self, Parameters};
use nitro_pipeline::{InitImage, Pipeline, Request};
use serde_json::{Value, json};
use support::schema::{check_response, check_schema};
use support::{TestServer, decode, load, options, quick};

/// The file that the library, and so the command line, makes for a request.
fn file(pipeline: &Pipeline, request: &Request, seed: u64) -> Vec<u8> {
    let output = pipeline.generate(request).unwrap();
    let parameters = pipeline.parameters(request, &pipeline.plan(request).unwrap(), 0, seed);
    picture::encode_png(&output.images[0].image, Some(&parameters)).unwrap()
}

#[test]
fn a_picture_is_the_same_alone_in_a_batch_and_from_the_library() {
    let server = TestServer::start(options());
    let pipelines = load().unwrap();
    // Different prompts, seeds, guidance, steps, sizes and variants, all at once.
    let wanted = [
        (0, Request::new("a red fox").seed(1).steps(3)),
        (
            0,
            Request::new("a red fox").seed(2).steps(5).negative("snow"),
        ),
        (0, Request::new("a whale").seed(3).steps(2).guidance(1.0)),
        (1, Request::new("a harbor").seed(4)),
        (2, Request::new("a harbor").seed(4).steps(3).guidance(7.5)),
        (0, Request::new("a bicycle").seed(5).steps(2).size(1024)),
    ];
    let body = |variant: usize, request: &Request| {
        let side = request.width.unwrap_or(512);
        json!({
            "prompt": request.prompts[0],
            "negative_prompt": request.negative_prompts.first(),
            "variant": (["base", "dist", "grpo"][variant]),
            "num_inference_steps": request.steps,
            "guidance_scale": request.guidance_scale,
            "size": format!("{side}x{side}"),
            "seed": match request.seeds { nitro_pipeline::Seeds::PerImage(seed) => seed, _ => 0 },
        })
    };
    let bodies: Vec<Value> = wanted.iter().map(|(v, r)| body(*v, r)).collect();
    let together: Vec<Vec<u8>> = std::thread::scope(|scope| {
        let answers: Vec<_> = bodies
            .iter()
            .map(|body| scope.spawn(|| server.generate(body).ok().files().remove(0)))
            .collect();
        answers.into_iter().map(|a| a.join().unwrap()).collect()
    });
    for (((variant, request), body), together) in wanted.iter().zip(&bodies).zip(together) {
        let seed = body["seed"].as_u64().unwrap();
        let expected = file(&pipelines[*variant], request, seed);
        assert!(together == expected, "in a batch: {body}");
        assert!(
            server.generate(body).ok().files()[0] == expected,
            "alone: {body}"
        );
    }
}

#[test]
fn several_pictures_count_their_seeds_up() {
    let server = TestServer::start(options());
    let body = json!({"prompt": "a ring", "n": 3, "seed": 40, "num_inference_steps": 2});
    let answer = server.generate(&body).ok();
    let api = server.get("/openapi.json").ok().json();
    let path = "/v1/images/generations";
    check_response(&api, "post", path, 200, &answer.json());
    let seeds: Vec<u64> = answer.json()["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|d| d["seed"].as_u64().unwrap())
        .collect();
    assert_eq!(seeds, [40, 41, 42]);
    let files = answer.files();
    assert!(server.generate(&quick("a ring", 42)).files()[0] == files[2]);
    // Without a seed it is drawn, told, and repeatable.
    let drawn = server
        .generate(&json!({"prompt": "a ring", "num_inference_steps": 2}))
        .ok();
    let seed = drawn.json()["data"][0]["seed"].as_u64().unwrap();
    assert!(server.generate(&quick("a ring", seed)).files() == drawn.files());
}

#[test]
fn formats_carry_their_parameters() {
    let server = TestServer::start(options());
    for (format, magic) in [
        ("png", &b"\x89PNG"[..]),
        ("jpeg", b"\xff\xd8"),
        ("webp", b"RIFF"),
    ] {
        let mut body = quick("a ring", 3);
        body["output_format"] = json!(format);
        body["response_format"] = json!("url");
        let answer = server.generate(&body).ok().json();
        let url = answer["data"][0]["url"].as_str().unwrap();
        let data = url
            .strip_prefix(&format!("data:image/{format};base64,"))
            .unwrap();
        let file = decode(&json!(data));
        assert!(file.starts_with(magic));
        let image = image::load_from_memory(&file).unwrap();
        assert_eq!((image.width(), image.height()), (512, 512));
        let text = answer["data"][0]["parameters"].as_str().unwrap();
        let settings = Parameters::from_infotext(text).unwrap();
        assert_eq!((settings.seed, settings.steps), (3, 2));
        assert_eq!(settings.prompt, "a ring");
    }
}

#[test]
fn what_cannot_be_done_is_told_in_openai_form() {
    let server = TestServer::start(options());
    let api = server.get("/openapi.json").ok().json();
    let path = "/v1/images/generations";
    for (body, status, param) in [
        (json!({}), 400, Some("prompt")),
        (json!({"prompt": " "}), 400, Some("prompt")),
        (json!({"prompt": "a", "sed": 1}), 400, Some("sed")),
        (json!({"prompt": "a", "n": 0}), 400, Some("n")),
        (json!({"prompt": "a", "n": 11}), 400, Some("n")),
        (json!({"prompt": "a", "n": -1}), 400, Some("n")),
        (json!({"prompt": "a", "n": "x"}), 400, Some("n")),
        (json!({"prompt": "a", "size": "512"}), 400, Some("size")),
        (json!({"prompt": "a", "size": "512x256"}), 400, Some("size")),
        (json!({"prompt": "a", "size": "500x500"}), 400, Some("size")),
        (
            json!({"prompt": "a", "size": "9000x9000"}),
            400,
            Some("size"),
        ),
        (
            json!({"prompt": "a", "num_inference_steps": 0}),
            400,
            Some("num_inference_steps"),
        ),
        (
            json!({"prompt": "a", "num_inference_steps": 1001}),
            400,
            Some("num_inference_steps"),
        ),
        (
            json!({"prompt": "a", "guidance_scale": -1}),
            400,
            Some("guidance_scale"),
        ),
        (json!({"prompt": "a", "seed": 1.5}), 400, Some("seed")),
        (json!({"prompt": "a", "variant": "x"}), 400, Some("variant")),
        (
            json!({"prompt": "a", "model": "dall-e-9"}),
            404,
            Some("model"),
        ),
        (
            json!({"prompt": "a", "output_format": "gif"}),
            400,
            Some("output_format"),
        ),
        (
            json!({"prompt": "a", "background": "transparent"}),
            400,
            Some("background"),
        ),
        (
            json!({"prompt": "a", "partial_images": 2}),
            400,
            Some("partial_images"),
        ),
        (
            json!({"prompt": "a", "strength": 0.5}),
            400,
            Some("strength"),
        ),
        (json!({"prompt": "a".repeat(9000)}), 400, Some("prompt")),
        (json!([1]), 400, None),
    ] {
        let answer = server.post(path, &body);
        let json = answer.json();
        assert_eq!(answer.status, status, "{body}: {json}");
        assert_eq!(json["error"]["param"].as_str(), param, "{body}: {json}");
        assert_eq!(json["error"]["type"], "invalid_request_error", "{body}");
        check_response(&api, "post", path, status, &json);
    }
    let broken = server.request(
        "POST",
        path,
        &[("content-type", "application/json")],
        b"{\"pro",
    );
    assert_eq!(broken.json()["error"]["code"], "invalid_json");
    let text = server.request("POST", path, &[("content-type", "text/plain")], b"{}");
    assert_eq!(text.status, 415);
    assert_eq!(server.get(path).status, 405);
    assert_eq!(
        server.get("/v1/nothing").json()["error"]["code"],
        "not_found"
    );
    // And the server is none the worse for it.
    server.generate(&quick("a ring", 0)).ok();
}

#[test]
fn a_stream_shows_previews_and_ends_with_the_picture() {
    let server = TestServer::start(options());
    let api = server.get("/openapi.json").ok().json();
    let plain = json!({"prompt": "a ring", "seed": 3, "num_inference_steps": 8});
    let mut body = plain.clone();
    body["stream"] = json!(true);
    body["partial_images"] = json!(3);
    let answer = server.generate(&body).ok();
    assert_eq!(answer.header("content-type"), Some("text/event-stream"));
    let events = answer.events();
    let names: Vec<&str> = events.iter().map(|(name, _)| name.as_str()).collect();
    let partial = "image_generation.partial_image";
    assert_eq!(
        names,
        [partial, partial, partial, "image_generation.completed"]
    );
    for (i, (name, data)) in events.iter().enumerate() {
        check_schema(&api, "ImageEvent", data);
        assert_eq!(data["type"], **name);
        let image = image::load_from_memory(&decode(&data["b64_json"])).unwrap();
        assert_eq!(image.width(), 512);
        assert_eq!(
            data["partial_image_index"].as_u64(),
            (i < 3).then_some(i as u64)
        );
    }
    assert!(events[3].1["usage"]["total_tokens"].as_u64().unwrap() > 0);
    let alone = server.generate(&plain).ok().files();
    assert!(
        decode(&events[3].1["b64_json"]) == alone[0],
        "watching changes nothing"
    );

    // Our own events come to those who ask for them, and tell every step.
    body["progress"] = json!(true);
    body["n"] = json!(2);
    let events = server.generate(&body).ok().events();
    // A listener that is slow misses some; the picture does not wait for it.
    let steps = events
        .iter()
        .filter(|(name, _)| name == "nitro.progress")
        .count();
    assert!((2..=16).contains(&steps), "{steps} of 16 steps were told");
    for (_, data) in events.iter().filter(|(name, _)| name.starts_with("nitro.")) {
        check_schema(&api, "ProgressEvent", data);
    }
    let completed = |e: &&(String, Value)| e.0 == "image_generation.completed";
    assert_eq!(events.iter().filter(completed).count(), 2);
}

#[test]
fn edits_change_what_the_mask_shows_and_nothing_else() {
    let server = TestServer::start(options());
    let api = server.get("/openapi.json").ok().json();
    let original = RgbImage::from_fn(512, 512, |x, y| Rgb([(x / 2) as u8, (y / 2) as u8, 99]));
    let png = |image: &image::DynamicImage| {
        let mut bytes = std::io::Cursor::new(Vec::new());
        image.write_to(&mut bytes, image::ImageFormat::Png).unwrap();
        bytes.into_inner()
    };
    let picture = png(&original.clone().into());
    let left = |x: u32| x < 256;
    let alpha = RgbaImage::from_fn(512, 512, |x, _| {
        Rgba([0, 0, 0, if left(x) { 0 } else { 255 }])
    });
    let white = GrayImage::from_fn(512, 512, |x, _| Luma([if left(x) { 255 } else { 0 }]));
    let fields = [
        ("prompt", "a ring"),
        ("num_inference_steps", "4"),
        ("seed", "1"),
    ];
    let path = "/v1/images/edits";
    let mut results = Vec::new();
    for mask in [png(&alpha.into()), png(&white.into())] {
        let files: [(&str, &[u8]); 2] = [("image", &picture), ("mask", &mask)];
        let answer = server.form(path, &fields, &files).ok();
        check_response(&api, "post", path, 200, &answer.json());
        let edited = image::load_from_memory(&answer.files()[0])
            .unwrap()
            .into_rgb8();
        let changed = |x: u32, y: u32| edited.get_pixel(x, y) != original.get_pixel(x, y);
        assert!(
            (0..512).all(|y| (256..512).all(|x| !changed(x, y))),
            "kept pixel by pixel"
        );
        assert!((0..512).any(|y| (0..256).any(|x| changed(x, y))));
        results.push(edited);
    }
    assert!(
        results[0] == results[1],
        "both forms of a mask mean the same"
    );

    let small = png(&GrayImage::new(8, 8).into());
    let files: [(&str, &[u8]); 2] = [("image", &picture), ("mask", &small)];
    let answer = server.form(path, &fields, &files);
    assert_eq!(
        (answer.status, answer.json()["error"]["param"].as_str()),
        (400, Some("mask"))
    );

    let without: [(&str, &[u8]); 1] = [("image[]", &picture)];
    server
        .form(path, &[fields[0], fields[1], ("stream", "true")], &without)
        .ok();
    for (fields, files, param) in [
        (&fields[..], vec![], "image"),
        (&fields[..], vec![("image", &b"rubbish"[..])], "image"),
        (
            &fields[..],
            vec![("image", &picture[..]), ("image", &picture[..])],
            "image",
        ),
        (&fields[1..], vec![("image", &picture[..])], "prompt"),
        (
            &[fields[0], ("strength", "7")],
            vec![("image", &picture[..])],
            "strength",
        ),
        (
            &[fields[0], ("n", "many")],
            vec![("image", &picture[..])],
            "n",
        ),
    ] {
        let answer = server.form(path, fields, &files);
        assert_eq!(answer.status, 400, "{}", answer.text());
        assert_eq!(answer.json()["error"]["param"], param, "{}", answer.text());
    }
}

#[test]
fn an_edit_is_the_picture_that_the_library_makes() {
    let server = TestServer::start(options());
    // Neither square nor of the model's size: the server cuts it before it waits in the queue.
    let image = RgbImage::from_fn(700, 610, |x, y| {
        Rgb([(x % 251) as u8, (y % 241) as u8, (x / 3) as u8])
    });
    let mut png = std::io::Cursor::new(Vec::new());
    image.write_to(&mut png, image::ImageFormat::Png).unwrap();
    let fields = [
        ("prompt", "a ring"),
        ("seed", "5"),
        ("num_inference_steps", "4"),
        ("strength", "0.6"),
    ];
    let files: [(&str, &[u8]); 1] = [("image", png.get_ref())];
    let answer = server.form("/v1/images/edits", &fields, &files).ok();
    let mut request = Request::new("a ring").seed(5).steps(4);
    request.init = Some(InitImage {
        image,
        strength: 0.6,
        mask: None,
    });
    assert!(answer.files()[0] == file(&load().unwrap()[0], &request, 5));
}

#[test]
fn everything_that_is_described_is_there() {
    let server = TestServer::start(options());
    let api = server.get("/openapi.json").ok().json();
    let paths = api["paths"].as_object().unwrap();
    for (path, methods) in paths {
        for (method, operation) in methods.as_object().unwrap() {
            let sent = match method.as_str() {
                "get" => server.get(path),
                "post" => server.post(path, &json!({})),
                other => panic!("{other} {path}"),
            };
            // Some want more than `{}`: then they say so in a way that is described, too.
            assert!(![404, 405, 500].contains(&sent.status), "{method} {path}");
            let described = operation["responses"][sent.status.to_string()].is_object();
            assert!(described, "{method} {path}: {}", sent.status);
            let picture = path.starts_with("/v1/images") || path.ends_with("2img");
            for status in [400, 401, 403, 408, 413, 415, 429, 500, 503, 504] {
                let described = &operation["responses"][status.to_string()];
                assert!(described.is_object() || !picture, "{path}: {status}");
            }
        }
    }
    let retry = "/paths/~1v1~1images~1generations/post/responses/429/headers/retry-after";
    assert!(api.pointer(retry).is_some());
    let events = "/paths/~1v1~1images~1edits/post/responses/200/content/text~1event-stream/schema";
    assert!(api.pointer(events).is_some());
    assert!(paths.len() > 25, "{} paths", paths.len());
}

#[test]
fn models_and_their_names() {
    let mut options = options();
    options.model_name = Some("painter".into());
    options.aliases = vec!["dall-e-3".into()];
    let server = TestServer::start(options);
    let api = server.get("/openapi.json").ok().json();
    let list = server.get("/v1/models").ok().json();
    check_response(&api, "get", "/v1/models", 200, &list);
    let ids: Vec<&str> = list["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| m["id"].as_str().unwrap())
        .collect();
    assert_eq!(ids, ["painter", "dall-e-3", "painter:dist", "painter:grpo"]);
    let dist = |body: Value| {
        let text = server.generate(&body).ok().json()["data"][0]["parameters"].to_string();
        text.contains(" dist")
    };
    assert!(!dist(
        json!({"prompt": "a", "model": "dall-e-3", "num_inference_steps": 1})
    ));
    assert!(dist(json!({"prompt": "a", "model": "painter:dist"})));
    assert!(dist(
        json!({"prompt": "a", "model": "painter", "variant": "dist"})
    ));
}

#[test]
fn a_prompt_that_is_cut_is_told() {
    let server = TestServer::start(options());
    let mut body = quick("", 1);
    body["prompt"] = json!("a very long story of many words ".repeat(40));
    let answer = server.generate(&body).ok().json();
    assert!(
        answer["warnings"][0]
            .as_str()
            .unwrap()
            .contains("longer than"),
        "{answer}"
    );
}
