//! HTML character references, as Python's `html` module, Beautiful Soup and ftfy decode them.

/// The character sequence of a named entity; `name` includes its semicolon if it has one.
pub(super) fn named(name: &str) -> Option<&'static str> {
    let key = format!("&{name}");
    htmlize::ENTITIES
        .get(key.as_bytes())
        .and_then(|bytes| std::str::from_utf8(bytes).ok())
}

/// `html.unescape`: named references by longest match, with or without semicolon, and numeric ones.
pub(super) fn unescape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find('&') {
        out.push_str(&rest[..start]);
        rest = &rest[start + 1..];
        let (decoded, used) = reference(rest);
        out.push_str(&decoded);
        rest = &rest[used..];
    }
    out.push_str(rest);
    out
}

/// Decodes the reference after an ampersand; returns the text and the bytes used.
fn reference(rest: &str) -> (String, usize) {
    if let Some(digits) = rest.strip_prefix('#') {
        let (digits, base, prefix) = match digits.strip_prefix(['x', 'X']) {
            Some(hex) => (hex, 16, 2),
            None => (digits, 10, 1),
        };
        let len = digits
            .find(|c: char| !c.is_digit(base))
            .unwrap_or(digits.len());
        if len == 0 {
            return ("&".into(), 0);
        }
        let used = prefix + len + usize::from(digits[len..].starts_with(';'));
        return (numeric(parse_saturating(&digits[..len], base)), used);
    }
    let stop = |c: char| matches!(c, '\t' | '\n' | '\x0c' | ' ' | '<' | '&' | '#' | ';');
    let len: usize = rest
        .chars()
        .take(32)
        .take_while(|&c| !stop(c))
        .map(char::len_utf8)
        .sum();
    if len == 0 {
        return ("&".into(), 0);
    }
    let with_semicolon = len + usize::from(rest[len..].starts_with(';'));
    if let Some(decoded) = named(&rest[..with_semicolon]) {
        return (decoded.into(), with_semicolon);
    }
    // The longest known name that the text starts with, of at least two characters.
    let ends = rest[..with_semicolon].char_indices().map(|(end, _)| end);
    ends.skip(2)
        .filter_map(|end| named(&rest[..end]).map(|decoded| (decoded.to_owned(), end)))
        .last()
        .unwrap_or_else(|| ("&".into(), 0))
}

/// A number, or `u32::MAX` if it does not fit.
pub(super) fn parse_saturating(digits: &str, base: u32) -> u32 {
    u32::from_str_radix(digits, base).unwrap_or(u32::MAX)
}

/// The Windows-1252 meaning of a C1 code, which HTML gives to such references.
pub(super) fn windows_1252(code: u32) -> Option<char> {
    let byte = u8::try_from(code).ok()?;
    let c = super::charmap::Charmap::WINDOWS_1252.decode_byte(byte);
    (0x80..=0x9f).contains(&code).then_some(c)
}

/// The text of a numeric reference by the rules of HTML 5; controls and non-characters vanish.
fn numeric(code: u32) -> String {
    if code == 0 {
        return "\u{fffd}".into();
    }
    if code == 0x0d {
        return "\r".into();
    }
    if let Some(c) = windows_1252(code) {
        return c.into();
    }
    let Some(c) = char::from_u32(code) else {
        return "\u{fffd}".into();
    };
    let control = matches!(code, 0x01..=0x08 | 0x0b | 0x0e..=0x1f | 0x7f);
    let non_character = matches!(code, 0xfdd0..=0xfdef) || code & 0xfffe == 0xfffe;
    if control || non_character {
        String::new()
    } else {
        c.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_decode_as_in_html_5() {
        for (escaped, plain) in [
            (
                "&lt;b&gt; &amp;amp; &ampx &notit; &notin;",
                "<b> &amp; &x \u{ac}it; \u{2209}",
            ),
            (
                "&#65;&#x42;&#67 &#0; &#x110000; &#xd800;",
                "ABC \u{fffd} \u{fffd} \u{fffd}",
            ),
            ("&#150;&#x99; &#1; &#13;", "\u{2013}\u{2122}  \r"),
            ("& &; &# &#x; &unknown; &a", "& &; &# &#x; &unknown; &a"),
            ("&#99999999999999999999;", "\u{fffd}"),
        ] {
            assert_eq!(unescape(escaped), plain);
        }
    }
}
