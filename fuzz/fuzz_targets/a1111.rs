//! Bodies of `/sdapi/v1/txt2img` and `img2img`.
#![no_main]

libfuzzer_sys::fuzz_target!(|body: &[u8]| {
    nitro_api::readers::a1111(body);
});
