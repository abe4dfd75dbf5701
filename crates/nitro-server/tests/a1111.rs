//! AUTOMATIC1111's API, as its clients use it.

mod support;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use nitro_pipeline::picture::{Parameters, infotext};
use serde_json::{Value, json};
use support::schema::check_response;
use support::{TestServer, decode, options, quick};

/// What the web UI's clients send: mostly settings that mean nothing here.
fn txt2img() -> Value {
    json!({
        "prompt": "a ring", "negative_prompt": "", "seed": 5, "steps": 3, "cfg_scale": 4.5,
        "width": 512, "height": 512, "batch_size": 2, "n_iter": 1, "sampler_name": "Euler a",
        "scheduler": "karras", "restore_faces": false, "tiling": null, "eta": 0.0,
        "enable_hr": false, "alwayson_scripts": {}, "override_settings": {"CLIP_stop_at_last_layers": 2},
        "save_images": true, "send_images": true, "subseed": -1
    })
}

#[test]
fn txt2img_gives_the_pictures_of_the_other_api() {
    let server = TestServer::start(options());
    let api = server.get("/openapi.json").ok().json();
    let answer = server.post("/sdapi/v1/txt2img", &txt2img()).ok().json();
    check_response(&api, "post", "/sdapi/v1/txt2img", 200, &answer);
    let info: Value = serde_json::from_str(answer["info"].as_str().unwrap()).unwrap();
    assert_eq!(info["all_seeds"], json!([5, 6]));
    let files: Vec<Vec<u8>> = answer["images"]
        .as_array()
        .unwrap()
        .iter()
        .map(decode)
        .collect();
    let body = json!({"prompt": "a ring", "seed": 5, "num_inference_steps": 3, "n": 2});
    assert!(files == server.generate(&body).ok().files());
    let text = infotext(&files[1]).unwrap().unwrap();
    assert_eq!(text, info["infotexts"][1].as_str().unwrap());
    assert_eq!(Parameters::from_infotext(&text).unwrap().seed, 6);
    // Everything else has defaults, and a seed is drawn.
    let mut body = txt2img();
    body["seed"] = json!(-1);
    body["send_images"] = json!(false);
    let answer = server.post("/sdapi/v1/txt2img", &body).ok().json();
    assert_eq!(answer["images"], json!([]));
    assert!(answer["parameters"]["seed"].as_u64().is_some());
}

#[test]
fn img2img_starts_from_a_picture() {
    let server = TestServer::start(options());
    let api = server.get("/openapi.json").ok().json();
    let picture = server.generate(&quick("a ring", 1)).ok().files().remove(0);
    let base64 = BASE64_STANDARD.encode(&picture);
    let mut body = txt2img();
    body["batch_size"] = json!(1);
    body["denoising_strength"] = json!(0.4);
    let img2img = |body: &Value| server.post("/sdapi/v1/img2img", body);
    let missing = img2img(&body);
    assert_eq!(missing.status, 400);
    check_response(&api, "post", "/sdapi/v1/img2img", 400, &missing.json());
    body["init_images"] = json!([format!("data:image/png;base64,{base64}")]);
    let plain = img2img(&body).ok().json();
    check_response(&api, "post", "/sdapi/v1/img2img", 200, &plain);
    body["init_images"] = json!([base64]);
    assert_eq!(img2img(&body).ok().json()["images"], plain["images"]);
    body["init_images"] = json!(["%%%"]);
    assert!(
        img2img(&body).json()["detail"]
            .as_str()
            .unwrap()
            .contains("base64")
    );
}

#[test]
fn progress_shows_the_picture_and_interrupt_ends_it() {
    let server = TestServer::start(options());
    let api = server.get("/openapi.json").ok().json();
    let idle = server.get("/sdapi/v1/progress").ok().json();
    check_response(&api, "get", "/sdapi/v1/progress", 200, &idle);
    assert_eq!(idle["progress"], 0.0);
    let mut body = txt2img();
    body["steps"] = json!(1000);
    std::thread::scope(|scope| {
        let answer = scope.spawn(|| server.post("/sdapi/v1/txt2img", &body));
        let progress = loop {
            let progress = server.get("/sdapi/v1/progress").ok().json();
            check_response(&api, "get", "/sdapi/v1/progress", 200, &progress);
            if progress["current_image"].is_string() {
                break progress;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        };
        assert!(progress["progress"].as_f64().unwrap() > 0.0);
        assert_eq!(progress["state"]["sampling_steps"], 1000);
        let preview = image::load_from_memory(&decode(&progress["current_image"])).unwrap();
        assert_eq!(preview.width(), 512);
        let skipped = server
            .get("/sdapi/v1/progress?skip_current_image=true")
            .ok()
            .json();
        assert!(skipped["current_image"].is_null());

        // Interrupting another API's client is not possible from here; ours gets what there is.
        server.post("/sdapi/v1/interrupt", &json!({})).ok();
        let answer = answer.join().unwrap().ok().json();
        let info: Value = serde_json::from_str(answer["info"].as_str().unwrap()).unwrap();
        assert_eq!(answer["images"].as_array().unwrap().len(), 2);
        assert!(info["steps"].as_u64().unwrap() < 1000, "{info}");
    });
    assert_eq!(server.get("/sdapi/v1/progress").json()["progress"], 0.0);
}

#[test]
fn a_picture_tells_its_parameters() {
    let server = TestServer::start(options());
    let api = server.get("/openapi.json").ok().json();
    let picture = server.generate(&quick("a ring", 11)).ok().files().remove(0);
    let ask = |image: &str| server.post("/sdapi/v1/png-info", &json!({"image": image}));
    let answer = ask(&BASE64_STANDARD.encode(&picture)).ok().json();
    check_response(&api, "post", "/sdapi/v1/png-info", 200, &answer);
    assert_eq!(
        answer["info"].as_str(),
        infotext(&picture).unwrap().as_deref()
    );
    assert_eq!(answer["parameters"]["Seed"], 11);
    for bad in ["%", "bm90IGEgcGljdHVyZQ=="] {
        let answer = ask(bad);
        assert_eq!(answer.status, 400, "{}", answer.text());
        check_response(&api, "post", "/sdapi/v1/png-info", 400, &answer.json());
    }
}

#[test]
fn menus_are_filled() {
    let server = TestServer::start(options());
    let api = server.get("/openapi.json").ok().json();
    for path in [
        "/sdapi/v1/samplers",
        "/sdapi/v1/sd-models",
        "/sdapi/v1/options",
    ] {
        let answer = server.get(path).ok().json();
        check_response(&api, "get", path, 200, &answer);
    }
    for path in [
        "schedulers",
        "upscalers",
        "latent-upscale-modes",
        "loras",
        "hypernetworks",
        "face-restorers",
        "realesrgan-models",
        "sd-vae",
        "prompt-styles",
    ] {
        assert!(
            server
                .get(&format!("/sdapi/v1/{path}"))
                .ok()
                .json()
                .is_array()
        );
    }
    let models = server.get("/sdapi/v1/sd-models").json();
    let title = models[1]["title"].clone();
    server
        .post("/sdapi/v1/options", &json!({"sd_model_checkpoint": title}))
        .ok();
    let unknown = server.post("/sdapi/v1/options", &json!({"sd_model_checkpoint": "x"}));
    assert_eq!(unknown.status, 404);
    check_response(&api, "post", "/sdapi/v1/options", 404, &unknown.json());
    let mut body = txt2img();
    body["override_settings"] = json!({"sd_model_checkpoint": title});
    let answer = server.post("/sdapi/v1/txt2img", &body).ok().json();
    assert!(
        answer["info"].as_str().unwrap().contains(" dist"),
        "{}",
        answer["info"]
    );
}
