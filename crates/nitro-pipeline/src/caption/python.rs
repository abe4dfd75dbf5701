//! Python's notions of white space, word characters and regular expressions.

use std::borrow::Cow;

use fancy_regex::{Regex, RegexBuilder};
use unicode_normalization::char::is_combining_mark;

/// `str.isspace` for one character: Unicode white space and four ASCII separators.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

/// `\w`: letters and numbers of any script, and the underscore, but not combining marks.
pub(super) fn is_word(c: char) -> bool {
    c == '_'
        || c.is_alphanumeric()
            && (c.is_ascii()
                || !is_combining_mark(c)
                    // Circled and squared letters: alphabetic symbols, not letters.
                    && !matches!(c, '\u{24b6}'..='\u{24e9}' | '\u{1f130}'..='\u{1f149}'
                        | '\u{1f150}'..='\u{1f169}' | '\u{1f170}'..='\u{1f189}'))
}

/// `str.strip()`.
pub(super) fn strip(text: &str) -> &str {
    text.trim_matches(is_space)
}

/// `urllib.parse.unquote_plus`: `+` is a space, `%XX` bytes are UTF-8.
pub(super) fn unquote_plus(text: &str) -> String {
    let text = text.replace('+', " ");
    if !text.contains('%') {
        return text;
    }
    // Bytes are joined only within a run of ASCII: an escape never completes a literal character.
    let mut decoded = String::with_capacity(text.len());
    let mut rest = text.as_str();
    while !rest.is_empty() {
        let ascii = rest.find(|c: char| !c.is_ascii()).unwrap_or(rest.len());
        decoded.push_str(&String::from_utf8_lossy(&percent_decode(
            &rest.as_bytes()[..ascii],
        )));
        rest = &rest[ascii..];
        let other = rest.find(|c: char| c.is_ascii()).unwrap_or(rest.len());
        decoded.push_str(&rest[..other]);
        rest = &rest[other..];
    }
    decoded
}

fn percent_decode(ascii: &[u8]) -> Vec<u8> {
    let hex = |byte: Option<&u8>| byte.and_then(|&b| char::from(b).to_digit(16));
    let mut bytes = Vec::with_capacity(ascii.len());
    let mut i = 0;
    while let Some(&byte) = ascii.get(i) {
        match (byte, hex(ascii.get(i + 1)), hex(ascii.get(i + 2))) {
            (b'%', Some(high), Some(low)) => {
                bytes.push((high * 16 + low) as u8);
                i += 3;
            }
            _ => {
                bytes.push(byte);
                i += 1;
            }
        }
    }
    bytes
}

/// Steps of backtracking after which a pattern gives up on a text: bounds the time a hostile
/// prompt can cost. No natural caption comes near it.
const BACKTRACK_LIMIT: usize = 5_000_000;

/// Compiles a pattern in Python's notation and with Python's meaning of `\w`, `\s`, `\b` and `$`.
///
/// # Panics
///
/// If the pattern is invalid: patterns are constants of this module's siblings.
pub(super) fn regex(pattern: &str) -> Regex {
    RegexBuilder::new(&translate(pattern))
        .backtrack_limit(BACKTRACK_LIMIT)
        .build()
        .unwrap_or_else(|error| panic!("pattern {pattern}: {error}"))
}

/// Python's escapes spelled out for the regex crates, whose own differ outside ASCII.
fn translate(pattern: &str) -> String {
    const WORD: &str = r"\p{L}\p{N}_";
    const SPACE: &str = r"\s\x1c-\x1f";
    let mut out = String::with_capacity(pattern.len() * 2);
    let mut in_class = false;
    let mut chars = pattern.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => match (chars.next(), in_class) {
                (Some('w'), true) => out.push_str(WORD),
                (Some('w'), false) => out.push_str(&format!("[{WORD}]")),
                (Some('W'), _) => out.push_str(&format!("[^{WORD}]")),
                (Some('s'), true) => out.push_str(SPACE),
                (Some('s'), false) => out.push_str(&format!("[{SPACE}]")),
                (Some('S'), _) => out.push_str(&format!("[^{SPACE}]")),
                (Some('b'), false) => out.push_str(&format!(
                    "(?:(?<=[{WORD}])(?![{WORD}])|(?<![{WORD}])(?=[{WORD}]))"
                )),
                (Some(other), _) => out.extend(['\\', other]),
                (None, _) => out.push('\\'),
            },
            '$' if !in_class => out.push_str(r"(?=\n?\z)"),
            _ => {
                match c {
                    '[' => in_class = true,
                    ']' => in_class = false,
                    _ => {}
                }
                out.push(c);
            }
        }
    }
    out
}

/// `re.sub`. A text on which the pattern gives up is left alone.
pub(super) fn replace<'t>(regex: &Regex, text: &'t str, replacement: &str) -> Cow<'t, str> {
    regex
        .try_replacen(text, 0, replacement)
        .unwrap_or(Cow::Borrowed(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_decode_within_ascii_runs() {
        assert_eq!(unquote_plus("a+b%20c"), "a b c");
        assert_eq!(unquote_plus("caf%C3%A9 100% %zz"), "caf\u{e9} 100% %zz");
        assert_eq!(unquote_plus("%C3\u{e9}%A9"), "\u{fffd}\u{e9}\u{fffd}");
    }

    #[test]
    fn word_characters_are_pythons() {
        for c in [
            'a', '7', '_', '\u{e9}', '\u{4e2d}', '\u{b2}', '\u{bd}', '\u{2160}',
        ] {
            assert!(is_word(c), "{c:?}");
        }
        for c in [
            ' ',
            '-',
            '\u{301}',
            '\u{93f}',
            '\u{24b6}',
            '\u{1f600}',
            '\u{200d}',
        ] {
            assert!(!is_word(c), "{c:?}");
        }
    }

    #[test]
    fn patterns_keep_pythons_meaning() {
        // A combining mark ends a word in Python.
        let word_end = regex(r"i\b");
        assert!(word_end.is_match("i\u{307}").unwrap());
        let end = regex("a$");
        assert!(end.is_match("ba\n").unwrap());
        assert!(!end.is_match("a\n\n").unwrap());
        assert_eq!(replace(&regex(r"\s+"), "a\x1c\u{a0}b", " "), "a b");
    }
}
