//! Pictures inside requests.
#![no_main]

libfuzzer_sys::fuzz_target!(|body: &[u8]| {
    nitro_server::readers::picture(body);
});
