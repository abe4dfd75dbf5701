//! Undoing mojibake: encoding text back to the bytes it was wrongly decoded from.
//!
//! The order of attempts and the treatment of lost bytes are those of ftfy 6.3.1.

use std::{collections::HashSet, sync::LazyLock};

use regex::bytes::Regex;

use super::{badness::is_bad, charmap::Charmap};

/// Undoes mojibake step by step until nothing changes.
pub(super) fn fix_encoding(text: &[char]) -> Vec<char> {
    let mut text = text.to_vec();
    loop {
        let fixed = fix_once(&text);
        if fixed == text {
            return text;
        }
        text = fixed;
    }
}

fn fix_once(text: &[char]) -> Vec<char> {
    if text.iter().all(char::is_ascii) || !is_bad(text) {
        return text.to_vec();
    }
    let mut latin_1 = None;
    for (i, map) in Charmap::ALL.iter().enumerate() {
        if let Some(bytes) = map.encode(text) {
            if let Some(decoded) = decode_utf8(restore_lost_bytes(map, &bytes)) {
                return decoded.chars().collect();
            }
            if i == 0 {
                latin_1 = Some(bytes);
            }
        }
    }
    let fixed = fix_embedded(text);
    if fixed != text {
        return fixed;
    }
    // C1 controls are Windows-1252 characters misread as Latin-1: all of them if that is possible
    // (the code page leaves five bytes unassigned), else one by one, which comes to the same.
    if latin_1.is_some() || text.iter().any(|c| ('\u{80}'..='\u{9f}').contains(c)) {
        return fix_c1(text);
    }
    text.to_vec()
}

/// Replaces C1 control codes by the Windows-1252 characters of those bytes.
pub(super) fn fix_c1(text: &[char]) -> Vec<char> {
    text.iter()
        .map(|&c| match c {
            '\u{80}'..='\u{9f}' => Charmap::WINDOWS_1252.decode_byte(c as u8),
            _ => c,
        })
        .collect()
}

fn bytes_regex(pattern: &str) -> Regex {
    Regex::new(pattern).unwrap_or_else(|error| panic!("pattern {pattern}: {error}"))
}

/// UTF-8 sequences in which a byte A0 became a space.
static SPACED: LazyLock<Regex> = LazyLock::new(|| {
    bytes_regex(
        r"(?-u)[\xc2\xc3\xc5\xce\xd0\xd9] |[\xe2\xe3] [\x80-\x84\x86-\x9f\xa1-\xbf]|[\xe0-\xe3][\x80-\x84\x86-\x9f\xa1-\xbf] |\xf0 [\x80-\xbf][\x80-\xbf]|\xf0[\x80-\xbf] [\x80-\xbf]|\xf0[\x80-\xbf][\x80-\xbf] ",
    )
});

/// UTF-8 or CESU-8 sequences in which a byte was lost: 1A, once per sequence also a question mark.
static LOSSY: LazyLock<Regex> = LazyLock::new(|| {
    bytes_regex(
        r"(?-u)[\xc2-\xdf]\x1a|[\xc2-\xc3]\?|\xed[\xa0-\xaf][\x1a?]\xed[\xb0-\xbf][\x1a?\x80-\xbf]|\xed[\xa0-\xaf][\x1a?\x80-\xbf]\xed[\xb0-\xbf][\x1a?]|[\xe0-\xef][\x1a?][\x1a\x80-\xbf]|[\xe0-\xef][\x1a\x80-\xbf][\x1a?]|[\xf0-\xf4][\x1a?][\x1a\x80-\xbf][\x1a\x80-\xbf]|[\xf0-\xf4][\x1a\x80-\xbf][\x1a?][\x1a\x80-\xbf]|[\xf0-\xf4][\x1a\x80-\xbf][\x1a\x80-\xbf][\x1a?]|\x1a",
    )
});

/// Puts back bytes that were lost on the way, where the sequence around them shows which.
fn restore_lost_bytes(map: &Charmap, bytes: &[u8]) -> Vec<u8> {
    // In Mac Roman the same bytes are an en dash and a space.
    let mut bytes = if !map.macintosh && SPACED.is_match(bytes) {
        let bytes = restore_a_grave(bytes);
        SPACED
            .replace_all(&bytes, |sequence: &regex::bytes::Captures<'_>| {
                let byte = |&b: &u8| if b == b' ' { 0xa0 } else { b };
                sequence[0].iter().map(byte).collect::<Vec<u8>>()
            })
            .into_owned()
    } else {
        bytes.to_vec()
    };
    if map.sloppy {
        bytes = LOSSY
            .replace_all(&bytes, "\u{fffd}".as_bytes())
            .into_owned();
    }
    bytes
}

/// C3 before a single space is usually the word "à", whose space stays (except in Portuguese
/// words that go on, such as "àquela").
fn restore_a_grave(bytes: &[u8]) -> Vec<u8> {
    let goes_on: [&[u8]; 5] = [b" ", b"quele", b"quela", b"quilo", b"s "];
    let mut out = Vec::with_capacity(bytes.len() + 4);
    let mut rest = bytes;
    while let [byte, tail @ ..] = rest {
        out.push(*byte);
        rest = tail;
        if *byte == 0xc3
            && let [b' ', after @ ..] = tail
            && !goes_on.iter().any(|word| after.starts_with(word))
        {
            out.extend([0xa0, b' ']);
            rest = after;
        }
    }
    out
}

fn decode_utf8(bytes: Vec<u8>) -> Option<String> {
    if bytes.contains(&0xed) || bytes.contains(&0xc0) {
        return decode_utf8_variants(&bytes);
    }
    String::from_utf8(bytes).ok()
}

/// UTF-8 that may hold CESU-8 surrogate pairs and Java's two-byte form of U+0000.
fn decode_utf8_variants(bytes: &[u8]) -> Option<String> {
    static SPECIAL: LazyLock<Regex> = LazyLock::new(|| {
        // `E` is the reference's `$`: the end, or before a final line break.
        let pattern = r"(?-u)\xc0(?:\x80|E)|\xed(?:[\xa0-\xbf]|E)";
        bytes_regex(&pattern.replace('E', r"(?:\n?\z)"))
    });
    let mut out = String::new();
    let mut rest = bytes;
    while let Some(found) = SPECIAL.find(rest) {
        out.push_str(std::str::from_utf8(&rest[..found.start()]).ok()?);
        rest = &rest[found.start()..];
        match *rest {
            [0xc0, _, ref tail @ ..] => {
                out.push('\0');
                rest = tail;
            }
            [
                0xed,
                a @ 0xa0..=0xaf,
                b @ 0x80..=0xbf,
                0xed,
                c @ 0xb0..=0xbf,
                d @ 0x80..=0xbf,
                ref tail @ ..,
            ] => {
                let bits = |byte: u8, mask: u8| u32::from(byte & mask);
                let code =
                    bits(a, 0x0f) << 16 | bits(b, 0x3f) << 10 | bits(c, 0x0f) << 6 | bits(d, 0x3f);
                out.push(char::from_u32(code + 0x1_0000)?);
                rest = tail;
            }
            // A lone surrogate or a cut sequence: not UTF-8 after all.
            _ => return None,
        }
    }
    out.push_str(std::str::from_utf8(rest).ok()?);
    Some(out)
}

/// Characters that bytes of UTF-8 sequences become in the encodings of [`Charmap::detected`].
struct Clues {
    /// First characters of sequences of two, three and four.
    first: [HashSet<char>; 3],
    /// Continuation bytes, or a space standing for one.
    next: HashSet<char>,
    /// The same without characters that often stand for themselves.
    strict_next: HashSet<char>,
}

static CLUES: LazyLock<Clues> = LazyLock::new(|| {
    let decoded = |bytes: &[u8]| -> HashSet<char> {
        Charmap::detected()
            .iter()
            .flat_map(|map| bytes.iter().map(|&byte| map.decode_byte(byte)))
            .collect()
    };
    let range = |low: u8, high: u8| (low..=high).collect::<Vec<u8>>();
    let next = decoded(&range(0x80, 0xbf));
    // Dashes, quotation marks, bullet and ellipsis.
    let ambiguous =
        "\u{2013}\u{2014}\u{2015}\u{2018}\u{2019}\u{201a}\u{201c}\u{201d}\u{201e}\u{2022}\u{2026}";
    Clues {
        first: [
            decoded(&range(0xc2, 0xdf)),
            decoded(&range(0xe0, 0xef)),
            decoded(&[0xf0, 0xf3]),
        ],
        strict_next: next
            .iter()
            .copied()
            .filter(|&c| !ambiguous.contains(c))
            .collect(),
        next: next.into_iter().chain([' ']).collect(),
    }
});

/// Length of the UTF-8-like sequence at the start of the text, 0 if there is none.
fn sequence_len(text: &[char]) -> usize {
    let Some(first) = text.first() else { return 0 };
    let len = CLUES
        .first
        .iter()
        .position(|set| set.contains(first))
        .map_or(0, |i| i + 2);
    let complete = text.len() >= len && text[..len].iter().skip(1).all(|c| CLUES.next.contains(c));
    if complete { len } else { 0 }
}

/// Repairs runs of UTF-8-like sequences inside text that is otherwise sound.
fn fix_embedded(text: &[char]) -> Vec<char> {
    let mut out = Vec::with_capacity(text.len());
    let mut i = 0;
    while i < text.len() {
        let mut end = i;
        // Not in the middle of a longer garble, which a partial repair would only worsen.
        if i == 0 || !CLUES.strict_next.contains(&text[i - 1]) {
            while let len @ 1.. = sequence_len(&text[end..]) {
                end += len;
            }
        }
        let run = &text[i..end];
        if run.is_empty() {
            out.push(text[i]);
            i += 1;
        } else if run.len() < text.len() && is_bad(run) {
            out.extend(fix_encoding(run));
            i = end;
        } else {
            out.extend(run);
            i = end;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fixed(text: &str) -> String {
        fix_encoding(&text.chars().collect::<Vec<_>>())
            .into_iter()
            .collect()
    }

    #[test]
    fn first_characters_tell_the_length_of_a_sequence() {
        let [two, three, four] = &CLUES.first;
        assert!(two.is_disjoint(three) && two.is_disjoint(four) && three.is_disjoint(four));
    }

    #[test]
    fn well_known_mojibake_is_undone() {
        for (broken, sound) in [
            ("schÃ¶n", "schön"),
            ("âœ” No problems", "✔ No problems"),
            ("l’humanitÃ©", "l’humanité"),
            ("voilÃ le travail", "voilà le travail"),
            ("Ã la mode", "à la mode"),
            ("РџСЂРёРІРµС‚", "Привет"),
            ("â€œquotedâ€\u{9d}", "“quoted”"),
            ("ÃƒÂ©tÃƒÂ©", "été"),
            ("\u{93}curly\u{94}", "“curly”"),
        ] {
            assert_eq!(fixed(broken), sound);
        }
    }

    #[test]
    fn sound_text_is_left_alone() {
        for text in [
            "naïve café",
            "¿Qué?",
            "Ångström",
            "5 € à Paris",
            "(°ω°)",
            "Ü 100 %",
        ] {
            assert_eq!(fixed(text), text);
        }
    }
}
