//! Readers of request bodies meet whatever bytes there are, and answer: property tests that run
//! everywhere. `fuzz/` has the same readers for cargo-fuzz.

use nitro_api::readers;
use proptest::prelude::*;
use serde_json::{Map, Value, json};

/// JSON values of the kinds that could be taken for parameters, and of others.
fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "\\PC{0,40}".prop_map(Value::from),
        prop_oneof![
            Just("auto"),
            Just("512x512"),
            Just("png"),
            Just("x"),
            Just("65536x1")
        ]
        .prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 16, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec(("[a-z_]{1,12}", inner), 0..4)
                .prop_map(|pairs| Value::Object(Map::from_iter(pairs))),
        ]
    })
}

const NAMES: [&str; 24] = [
    "prompt",
    "model",
    "n",
    "size",
    "response_format",
    "output_format",
    "output_compression",
    "quality",
    "background",
    "stream",
    "partial_images",
    "seed",
    "num_inference_steps",
    "guidance_scale",
    "negative_prompt",
    "variant",
    "strength",
    "progress",
    "steps",
    "width",
    "init_images",
    "mask",
    "override_settings",
    "batch_size",
];

/// Objects whose names are mostly known.
fn request() -> impl Strategy<Value = Value> {
    let name = prop::sample::select(&NAMES[..]).prop_map(str::to_owned);
    prop::collection::vec((name, value()), 0..10).prop_map(|pairs| {
        let mut object = json!({"prompt": "a ring"});
        pairs
            .into_iter()
            .for_each(|(name, value)| object[name] = value);
        object
    })
}

proptest! {
    #[test]
    fn any_bytes_are_answered(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        readers::generation(&bytes);
        readers::a1111(&bytes);
        readers::picture(&bytes);
        readers::edit("multipart/form-data; boundary=x", &bytes);
    }

    #[test]
    fn any_object_is_answered(request in request()) {
        let body = request.to_string();
        readers::generation(body.as_bytes());
        readers::a1111(body.as_bytes());
    }

    #[test]
    fn any_form_is_answered(
        kind in prop_oneof![Just("multipart/form-data; boundary=x".to_owned()), "\\PC{0,60}"],
        parts in prop::collection::vec((prop::sample::select(&NAMES[..]), "\\PC{0,30}"), 0..8),
        cut in 0..2000_usize,
    ) {
        let mut body = String::new();
        for (name, text) in parts {
            body += &format!("--x\r\ncontent-disposition: form-data; name=\"{name}\"\r\n\r\n{text}\r\n");
        }
        body += "--x--\r\n";
        let body = body.as_bytes();
        readers::edit(&kind, &body[..body.len().min(cut)]);
    }

    #[test]
    fn damaged_pictures_are_answered(at in any::<prop::sample::Index>(), byte: u8, length: prop::sample::Index) {
        let image = image::RgbImage::from_fn(9, 7, |x, y| image::Rgb([x as u8 * 20, y as u8 * 30, 5]));
        for format in [image::ImageFormat::Png, image::ImageFormat::Jpeg, image::ImageFormat::WebP] {
            let mut bytes = std::io::Cursor::new(Vec::new());
            image.write_to(&mut bytes, format).unwrap();
            let mut bytes = bytes.into_inner();
            prop_assert!(readers::picture(&bytes));
            let place = at.index(bytes.len());
            bytes[place] = byte;
            readers::picture(&bytes);
            let keep = length.index(bytes.len());
            readers::picture(&bytes[..keep]);
        }
    }
}

#[test]
fn what_is_meant_is_read() {
    assert!(readers::generation(
        br#"{"prompt": "a ring", "size": "512x512", "n": 2}"#
    ));
    assert!(!readers::generation(
        br#"{"prompt": "a ring", "size": "large"}"#
    ));
    assert!(
        !readers::a1111(br#"{"prompt": "a ring"}"#),
        "no picture to start from"
    );
}
