//! The official cleaning rules, as patterns in order.

use std::sync::LazyLock;

use fancy_regex::Regex;

use super::python;

/// Before markup is removed.
const LINKS: &[(&str, &str)] = &[
    ("<person>", "person"),
    // Web addresses with a scheme, or of well-known domains; then the same for a mistyped "www:".
    (
        r"\b((?:https?:(?:/{1,3}|[a-zA-Z0-9%])|[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)))",
        "",
    ),
    (
        r"\b((?:www:(?:/{1,3}|[a-zA-Z0-9%])|[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)))",
        "",
    ),
];

/// After markup is removed, before wrongly decoded text is repaired.
const SYMBOLS: &[(&str, &str)] = &[
    // Nicknames.
    (r"@[\w\d]+\b", ""),
    // CJK: strokes, phonetic extensions, enclosed, compatibility, ideographs, hexagrams.
    ("[\u{31c0}-\u{31ef}]+", ""),
    ("[\u{31f0}-\u{31ff}]+", ""),
    ("[\u{3200}-\u{32ff}]+", ""),
    ("[\u{3300}-\u{33ff}]+", ""),
    ("[\u{3400}-\u{4dbf}]+", ""),
    ("[\u{4dc0}-\u{4dff}]+", ""),
    ("[\u{4e00}-\u{9fff}]+", ""),
    // Every dash of Unicode.
    (
        "[\\-\u{58a}\u{5be}\u{1400}\u{1806}\u{2010}-\u{2015}\u{2e17}\u{2e1a}\u{2e3a}\u{2e3b}\u{2e40}\u{301c}\u{3030}\u{30a0}\u{fe31}\u{fe32}\u{fe58}\u{fe63}\u{ff0d}]+",
        "-",
    ),
    // Quotation marks.
    ("[`\u{b4}\u{ab}\u{bb}\u{201c}\u{201d}\u{a8}]", "\""),
    ("[\u{2018}\u{2019}]", "'"),
    ("&quot;?", ""),
    ("&amp", ""),
    // Addresses, times at the end, line breaks written as backslash n, numbered items.
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    // File names.
    (r"[\S]+\.(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)", ""),
    // Repeated quotes and dots, decorative punctuation.
    (r#"["']{2,}"#, "\""),
    (r"[\.]{2,}", " "),
    (
        "[#\u{ae}\u{2022}\u{a9}\u{2122}&@\u{b7}\u{ba}\u{bd}\u{be}\u{bf}\u{a1}\u{a7}~)(\\]\\[}{|\\\\/*]{1,}",
        " ",
    ),
    (r"\s+\.\s+", " "),
];

/// After entities are decoded for good.
const PHRASES: &[(&str, &str)] = &[
    // Article numbers.
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    // Phrases of web shops and file listings.
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (
        r"\b(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)(\simage[s]?)?",
        "",
    ),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    // Sizes such as 10x20, with a Latin x, a Cyrillic one or a multiplication sign.
    ("\\b\\d+\\.?\\d*[x\u{445}\u{d7}]\\d+\\.?\\d*\\b", ""),
    // Spaces around punctuation.
    (r"\b\s+:\s+", ": "),
    (r"(\D[,\./])\b", "${1} "),
    (r"\s+", " "),
    // Quotes around the whole, punctuation left at either end, a lone file extension.
    (r#"^["']([\w\W]+)["']$"#, "${1}"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
];

/// Substitutions applied one after the other.
pub(super) struct Stage(Vec<(Regex, &'static str)>);

impl Stage {
    fn new(rules: &[(&str, &'static str)]) -> Self {
        Self(
            rules
                .iter()
                .map(|(pattern, replacement)| (python::regex(pattern), *replacement))
                .collect(),
        )
    }

    pub(super) fn apply(&self, text: &mut String) {
        for (regex, replacement) in &self.0 {
            if let std::borrow::Cow::Owned(changed) = python::replace(regex, text, replacement) {
                *text = changed;
            }
        }
    }
}

/// All stages, compiled.
pub(super) struct Rules {
    pub(super) links: Stage,
    pub(super) symbols: Stage,
    pub(super) phrases: Stage,
}

impl Rules {
    /// `this-is-my-cute-cat`: with more than three joints in the text, every joint is a space.
    pub(super) fn break_up_slugs(&self, text: &mut String) {
        if text.matches(['-', '_']).count() > 3 {
            *text = text.replace(['-', '_'], " ");
        }
    }
}

/// The rules, compiled on first use.
pub(super) fn rules() -> &'static Rules {
    static RULES: LazyLock<Rules> = LazyLock::new(|| Rules {
        links: Stage::new(LINKS),
        symbols: Stage::new(SYMBOLS),
        phrases: Stage::new(PHRASES),
    });
    &RULES
}
