//! `nitro serve` as its users meet it: as a process, from other people's clients, in a browser.

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;

use nitro_data::shapes::{Class, judge};
use serde_json::json;
use support::browser::Browser;
use support::service::Service;
use support::{base64, nitro, said, stderr};

#[test]
fn a_picture_is_the_one_that_the_command_makes() {
    let home = tempfile::tempdir().unwrap();
    let service = Service::start(home.path(), &[]);
    let mut files = service.generate(&json!({
        "prompt": "a red circle left of a blue square", "negative_prompt": "blurry",
        "seed": 7, "n": 2, "num_inference_steps": 3, "guidance_scale": 3.5,
    }));
    let output = nitro(home.path())
        .args([
            "generate",
            "a red circle left of a blue square",
            "-n",
            "blurry",
            "-s",
            "8",
        ])
        .args(["--steps", "3", "-g", "3.5", "-o", "out.png"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", said(&output));
    let made = std::fs::read(home.path().join("out.png")).unwrap();
    assert!(
        files.remove(1) == made,
        "the same bytes, parameters included"
    );
}

#[test]
#[cfg(unix)]
fn it_stops_cleanly_when_asked_to() {
    let home = tempfile::tempdir().unwrap();
    let mut service = Service::start(home.path(), &[]);
    let files = std::thread::scope(|scope| {
        let url = service.url.clone();
        let files = scope.spawn(move || {
            let body = json!({"prompt": "a ring", "num_inference_steps": 40, "seed": 1});
            ureq::post(format!("{url}/v1/images/generations"))
                .header("content-type", "application/json")
                .send(body.to_string())
                .map(|response| response.status().as_u16())
        });
        let running = || {
            let metrics = ureq::get(format!("{}/metrics", service.url))
                .call()
                .unwrap();
            metrics
                .into_body()
                .read_to_string()
                .unwrap()
                .contains("nitro_pictures_running 1")
        };
        while !running() {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        let status = service.terminate();
        assert!(status.success(), "{status}");
        files.join().unwrap()
    });
    assert_eq!(files.unwrap(), 200, "what ran was finished");
}

#[test]
fn it_does_not_start_where_it_should_not() {
    let home = tempfile::tempdir().unwrap();
    let serve = |arguments: &[&str]| {
        let output = nitro(home.path())
            .arg("serve")
            .args(arguments)
            .output()
            .unwrap();
        (output.status.code(), stderr(&output))
    };
    let (code, said) = serve(&["--host", "0.0.0.0", "--port", "0"]);
    assert_eq!(code, Some(2), "{said}");
    assert!(
        said.contains("--keys") && said.contains("--allow-anonymous"),
        "{said}"
    );
    let (code, said) = serve(&["--keys", "missing", "--port", "0"]);
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("cannot read the key file missing"), "{said}");
    let (code, said) = serve(&["--port", "0", "--model", "./no-such-model"]);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("no-such-model"), "{said}");
}

/// A Python that has `package`: that of `NITRO_CLIENTS_PYTHON`, or the system's.
fn python_with(package: &str) -> Option<PathBuf> {
    let named = std::env::var_os("NITRO_CLIENTS_PYTHON").map(PathBuf::from);
    let python = named.unwrap_or_else(|| "python3".into());
    let has = Command::new(&python)
        .args(["-c", &format!("import {package}")])
        .output();
    if has.is_ok_and(|output| output.status.success()) {
        return Some(python);
    }
    eprintln!("skipped: no Python with the package `{package}` (NITRO_CLIENTS_PYTHON names one)");
    None
}

const KEY: &str = "sk-0123456789abcdef";

/// Runs a client's script against a server with a key; `to` makes its first argument from the URL.
fn client_works(package: &str, script: &str, to: impl Fn(&str) -> String) {
    let Some(python) = python_with(package) else {
        return;
    };
    let home = tempfile::tempdir().unwrap();
    std::fs::write(home.path().join("keys"), format!("test {KEY}\n")).unwrap();
    let service = Service::start(home.path(), &["--keys", "keys"]);
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let output = Command::new(python)
        .arg(tests.join(script))
        .args([&to(&service.url), KEY])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", said(&output));
}

#[test]
fn the_official_openai_client_works() {
    client_works("openai", "openai_client.py", str::to_owned);
}

#[test]
fn a_client_of_automatic1111_works() {
    let port = |url: &str| url.rsplit(':').next().unwrap().to_owned();
    client_works("webuiapi", "webui_client.py", port);
}

/// Whether a picture shows one object of this class.
fn shows(png: &[u8], class: Class) -> bool {
    let image = image::load_from_memory(png).unwrap().into_rgb8();
    let (width, height) = (image.width() as usize, image.height() as usize);
    let found = judge(image.as_raw(), width, height).unwrap();
    matches!(found.as_slice(), [one] if one.class == class && one.confidence > 0.8)
}

#[test]
fn the_page_in_a_browser() {
    let home = tempfile::tempdir().unwrap();
    let Some(browser) = Browser::start(&home.path().join("profile")) else {
        return;
    };
    let service = Service::start(home.path(), &[]);
    browser.open(&service.url);
    browser.until("document.getElementById('steps').value === '20'");

    // Nothing comes from elsewhere, and everything that takes input has a label.
    assert_eq!(
        browser.eval(
            "performance.getEntriesByType('resource').every(r => r.name.startsWith(location.origin))"
        ),
        true
    );
    assert_eq!(
        browser.eval(
            "[...document.querySelectorAll('input, textarea, select')].filter(e => !e.labels.length).map(e => e.id)"
        ),
        json!([])
    );

    // Words can be read in both themes: WCAG's contrast of 4.5 everywhere.
    for theme in ["light", "dark"] {
        browser.until(&format!(
            "(document.documentElement.dataset.theme === '{theme}') || (document.getElementById('theme').click(), false)"
        ));
        assert_eq!(browser.eval(FAINT), json!([]), "{theme}");
    }
    browser.click("#theme");

    // `?` lists the keys, Escape closes the list, `/` goes to the prompt.
    browser.type_into("body", "?");
    browser.until("document.getElementById('help').open");
    assert_eq!(browser.eval(FAINT), json!([]));
    browser.type_into("#help", "\u{e00c}");
    browser.until("!document.getElementById('help').open");
    browser.type_into("body", "/");
    browser.until("document.activeElement.id === 'prompt'");

    // Type a prompt, paint with the keyboard, see previews, get four pictures.
    browser.type_into("#prompt", "a picture of a heart");
    browser.fill("#seed", "0");
    browser.fill("#count", "4");
    browser.eval(
        "(window.seen = 0, new MutationObserver(() => { \
        window.seen += document.querySelectorAll('.previews img').length; \
    }).observe(document.getElementById('jobs'), {childList: true, subtree: true}))",
    );
    browser.type_into("#prompt", "\u{e009}\u{e007}\u{e000}"); // Ctrl+Enter
    browser.until("document.querySelectorAll('.previews img').length > 0 || window.seen > 0");
    browser.until("document.querySelectorAll('#gallery img').length === 4");
    browser.until("document.querySelectorAll('.job').length === 0");
    assert!(
        browser.eval("window.seen").as_u64().unwrap() > 0,
        "previews were shown"
    );

    // The judge finds what was asked for; the first model got 61 of 100 single objects right.
    let pictures = stored(&browser);
    let files: Vec<Vec<u8>> = pictures
        .iter()
        .map(|p| base64(p.as_str().unwrap()))
        .collect();
    assert_eq!(files.len(), 4);
    assert!(
        files.iter().any(|file| shows(file, Class::Heart)),
        "none of four shows a heart"
    );

    // One picture large: its settings, and the command that makes it.
    browser.click("#gallery li:last-child button");
    browser.until("document.getElementById('viewer').open");
    let settings = browser.eval("document.getElementById('viewer-settings').textContent");
    assert!(
        settings.as_str().unwrap().contains("a picture of a heart"),
        "{settings}"
    );
    browser.eval("navigator.clipboard.writeText = text => { window.copied = text; return Promise.resolve(); }");
    browser.click("#copy");
    let copied = browser.eval("window.copied");
    let copied = copied.as_str().unwrap();
    assert!(
        copied.starts_with("nitro generate 'a picture of a heart' --seed "),
        "{copied}"
    );

    // Image to image from it, by its key; the focus goes where one writes on.
    browser.type_into("#viewer", "i");
    browser.until("document.activeElement.id === 'prompt'");
    browser.until("!document.getElementById('init').hidden");
    browser.fill("#count", "1");
    browser.click("#go");
    browser.until("document.querySelectorAll('#gallery img').length === 5");
    browser.click("#init-clear");

    // Cancel one.
    browser.fill("#steps", "100");
    browser.fill("#count", "10");
    browser.click("#go");
    browser.until("document.querySelector('.note')?.textContent.startsWith('step')");
    browser.click(".cancel");
    browser.until("document.getElementById('status').textContent === 'Cancelled'");
    browser.until("document.querySelectorAll('.job').length === 0");
    let metrics = || {
        let answer = ureq::get(format!("{}/metrics", service.url))
            .call()
            .unwrap();
        answer.into_body().read_to_string().unwrap()
    };
    while !metrics().contains("nitro_cancelled_total 1") {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }

    // The gallery is still there after a reload; so are the settings.
    browser.reload();
    browser.until("document.querySelectorAll('#gallery img').length === 5");
    browser.until("document.getElementById('prompt').value === 'a picture of a heart'");

    // On a phone nothing sticks out.
    browser.resize(390, 800);
    assert_eq!(
        browser.eval("document.documentElement.scrollWidth <= innerWidth"),
        true
    );
    if let Some(folder) = std::env::var_os("NITRO_SCREENSHOTS") {
        let save = |name: &str| {
            std::fs::write(Path::new(&folder).join(name), browser.screenshot()).unwrap();
        };
        save("phone.png");
        browser.resize(1280, 900);
        browser.fill("#steps", "20");
        save("page.png");
    }
}

/// What is written in too little contrast to what is behind it.
const FAINT: &str = "(() => { \
    const light = colour => { \
        const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map(Number) \
            .map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); \
        return 0.2126 * r + 0.7152 * g + 0.0722 * b; }; \
    const behind = e => { \
        for (; e; e = e.parentElement) { \
            const colour = getComputedStyle(e).backgroundColor; \
            if (!colour.endsWith(', 0)')) return colour; } \
        return 'rgb(255, 255, 255)'; }; \
    return [...document.querySelectorAll('h1, h2, p, label, button, input, textarea, select, dt, dd, kbd')] \
        .filter(e => e.checkVisibility()) \
        .filter(e => { \
            const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort((x, y) => y - x); \
            return (a + 0.05) / (b + 0.05) < 4.5; }) \
        .map(e => e.id || e.textContent); })()";

#[test]
fn those_who_wait_see_their_place_on_the_page() {
    let home = tempfile::tempdir().unwrap();
    let Some(browser) = Browser::start(&home.path().join("profile")) else {
        return;
    };
    let service = Service::start(home.path(), &["--max-batch", "1"]);
    browser.open(&service.url);
    browser.until("document.getElementById('steps').value === '20'");
    browser.type_into("#prompt", "a ring");
    browser.fill("#steps", "100");
    browser.fill("#count", "10");
    browser.click("#go");
    browser.until("document.querySelector('.note')?.textContent.startsWith('step')");
    browser.fill("#count", "1");
    // The newest is on top. Fair queueing lets single pictures in between those of the large request, so
    // only the last two wait for sure.
    browser.click("#go");
    browser.click("#go");
    browser.click("#go");
    browser.until(
        "[...document.querySelectorAll('.note')].some(n => /^waiting, [12] before you$/.test(n.textContent))",
    );
    // Escape takes back the newest, again and again.
    browser.until("document.querySelectorAll('.job').length <= 4");
    let jobs = "document.querySelectorAll('.job').length";
    while browser.eval(jobs) != 0 {
        browser.type_into("body", "\u{e00c}");
    }
    browser.until("document.getElementById('message').textContent === ''");
}

/// The gallery's pictures from the browser's database, newest first, in base64.
fn stored(browser: &Browser) -> Vec<serde_json::Value> {
    let read = "import('/gallery.js').then(async gallery => { \
        const text = bytes => btoa(bytes.reduce((t, b) => t + String.fromCharCode(b), '')); \
        const files = []; \
        for (const { blob } of await gallery.all()) files.push(text(new Uint8Array(await blob.arrayBuffer()))); \
        return files; })";
    browser.wait_eval(read).as_array().unwrap().clone()
}
