//! Repair of glitches in Unicode text: what `ftfy.fix_text` does with its default settings.

use unicode_normalization::UnicodeNormalization;

use super::{entities, mojibake};

/// Longest piece of text repaired at once, in characters.
const MAX_SEGMENT: usize = 1_000_000;

/// Repairs text line by line.
///
/// Entities are decoded too, up to the first line that holds a `<` and so may be real markup.
pub(super) fn fix_text(text: &str) -> String {
    let mut decode_entities = true;
    let mut out = String::with_capacity(text.len());
    for line in text.split_inclusive('\n') {
        let line: Vec<char> = line.chars().collect();
        for segment in line.chunks(MAX_SEGMENT) {
            decode_entities &= !segment.contains(&'<');
            out.push_str(&fix_segment(segment.iter().collect(), decode_entities));
        }
    }
    out
}

fn fix_segment(mut text: String, decode_entities: bool) -> String {
    loop {
        let mut fixed = text.clone();
        if decode_entities {
            fixed = unescape(&fixed);
        }
        let chars: Vec<char> = fixed.chars().collect();
        let chars = mojibake::fix_c1(&mojibake::fix_encoding(&chars));
        let simplified: String = chars.into_iter().flat_map(simple_forms).collect();
        let lines = simplified
            .replace("\r\n", "\n")
            .replace(['\r', '\u{2028}', '\u{2029}', '\u{85}'], "\n");
        let printable: String = remove_terminal_escapes(&lines)
            .chars()
            .filter(|&c| !is_control(c))
            .collect();
        fixed = printable.nfc().collect();
        if fixed == text {
            return text;
        }
        text = fixed;
    }
}

/// Decodes entities that end in a semicolon, also names shouted in capitals (`&EACUTE;`).
fn unescape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find('&') {
        out.push_str(&rest[..start]);
        rest = &rest[start..];
        let hash = usize::from(rest[1..].starts_with('#'));
        let name = rest[1 + hash..]
            .bytes()
            .take_while(u8::is_ascii_alphanumeric)
            .count();
        let end = 1 + hash + name;
        if (1..=24).contains(&name) && rest[end..].starts_with(';') {
            let entity = &rest[..=end];
            out.push_str(&decode_entity(entity, hash == 1));
            rest = &rest[end + 1..];
        } else {
            out.push('&');
            rest = &rest[1..];
        }
    }
    out.push_str(rest);
    out
}

fn decode_entity(entity: &str, numeric: bool) -> String {
    if numeric {
        let decoded = entities::unescape(entity);
        // A semicolon left over means that only part of it was a number.
        return if decoded.contains(';') {
            entity.to_owned()
        } else {
            decoded
        };
    }
    let name = &entity[1..];
    if let Some(decoded) = entities::named(name) {
        return decoded.to_owned();
    }
    let lower = name.to_ascii_lowercase();
    let shouted = lower.to_ascii_uppercase() == name && entities::unescape(entity) == entity;
    match entities::named(&lower) {
        Some(decoded) if shouted => decoded.to_uppercase(),
        _ => entity.to_owned(),
    }
}

/// Takes Latin ligatures apart, gives letters their standard width, straightens quotes.
fn simple_forms(c: char) -> impl Iterator<Item = char> {
    let simple = match c {
        // The Dutch and South Slavic pairs decompose to just these letters.
        '\u{132}' | '\u{133}' | '\u{1f1}'..='\u{1f3}' | '\u{1c4}'..='\u{1cc}' => compatible(c),
        '\u{149}' => "'n".into(),
        '\u{fb05}' => "\u{17f}t".into(),
        '\u{fb00}'..='\u{fb06}' => compatible(c),
        '\u{3000}' => " ".into(),
        '\u{ff01}'..='\u{ffef}' => compatible(c).chars().map(straight).collect(),
        _ => straight(c).into(),
    };
    simple.chars().collect::<Vec<_>>().into_iter()
}

/// The compatibility form of a character, accents composed.
fn compatible(c: char) -> String {
    std::iter::once(c).nfkc().collect()
}

fn straight(c: char) -> char {
    match c {
        '\u{2bc}' | '\u{2018}'..='\u{201b}' => '\'',
        '\u{201c}'..='\u{201f}' => '"',
        _ => c,
    }
}

/// Removes colour codes and the like: `ESC [ digits letter`.
fn remove_terminal_escapes(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find("\x1b[") {
        out.push_str(&rest[..start]);
        let code = rest[start + 2..].trim_start_matches(|c: char| c == ';' || is_digit(c));
        match code.chars().next() {
            Some(letter) if letter.is_ascii_alphabetic() => rest = &code[1..],
            _ => {
                out.push_str("\x1b[");
                rest = &rest[start + 2..];
            }
        }
    }
    out.push_str(rest);
    out
}

/// A decimal digit. Others than ASCII never occur in escapes of real terminals.
fn is_digit(c: char) -> bool {
    c.is_ascii_digit()
}

/// Control characters without use in text.
fn is_control(c: char) -> bool {
    matches!(c, '\0'..='\x08' | '\x0b' | '\x0e'..='\x1f' | '\x7f'
        | '\u{206a}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffc}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_glitch_is_repaired() {
        for (broken, sound) in [
            ("&macr;\\_(ã\u{83}\u{84})_/&macr;", "¯\\_(ツ)_/¯"),
            (
                "Broken text&hellip; it&#x2019;s ﬂubberiﬁc!",
                "Broken text… it's flubberific!",
            ),
            ("ＬＯＵＤ　ＮＯＩＳＥＳ", "LOUD NOISES"),
            ("Ｕﾀｰﾝ", "Uターン"),
            (
                "P&EACUTE;REZ &ntilde; &NTILDE; &nTILDE;",
                "PÉREZ ñ Ñ &nTILDE;",
            ),
            ("BUNDESSTRA&SZLIG;E", "BUNDESSTRASSE"),
            ("\x1b[36;44mblue\x1b[0m\u{feff}\x07", "blue"),
            ("e\u{301}\u{2028}a\r\nb\rc", "é\na\nb\nc"),
            ("ĳs ŉ ǆ ﬅ", "ijs 'n dž ſt"),
        ] {
            assert_eq!(fix_text(broken), sound);
        }
    }

    #[test]
    fn markup_keeps_its_entities_from_there_on() {
        assert_eq!(fix_text("&lt;a\n<b>&lt;\n&lt;c"), "<a\n<b>&lt;\n&lt;c");
    }
}
