//! Pictures inside requests.
#![no_main]

libfuzzer_sys::fuzz_target!(|body: &[u8]| {
    nitro_api::readers::picture(body);
});
