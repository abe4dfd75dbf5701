//! Forms for `/v1/images/edits`.
#![no_main]

libfuzzer_sys::fuzz_target!(|body: &[u8]| {
    nitro_api::readers::edit("multipart/form-data; boundary=x", body);
});
