//! Bodies of `/v1/images/generations`.
#![no_main]

libfuzzer_sys::fuzz_target!(|body: &[u8]| {
    nitro_api::readers::generation(body);
});
