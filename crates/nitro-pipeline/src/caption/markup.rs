//! The text of possibly marked-up captions, as Beautiful Soup's `html.parser` tree gives it.
//!
//! Captions are rarely real HTML. What matters is how a stray `<` or `&` is treated, so the
//! tokenizer keeps the quirks of Python 3.11's `HTMLParser` (character references not converted by
//! itself, two passes: one as if more input could follow, one to the end).

use std::sync::LazyLock;

use fancy_regex::Regex;

use super::{
    entities,
    python::{is_space, regex},
};

/// The visible text of a caption.
pub(super) fn text(markup: &str) -> String {
    let mut parser = Parser {
        text: markup,
        at: 0,
        raw_text_element: None,
        tree: Tree::default(),
    };
    parser.advance(false);
    parser.advance(true);
    parser.tree.end_text(TextKind::Plain);
    parser.tree.visible
}

/// What a piece of text is part of.
#[derive(Clone, Copy, PartialEq)]
enum TextKind {
    Plain,
    CData,
    /// Comments, declarations, processing instructions.
    Hidden,
}

/// The part of the tree that decides which text is visible: the open elements.
#[derive(Default)]
struct Tree {
    open: Vec<String>,
    /// Empty elements such as `br` that were closed when opened and may still meet an end tag.
    closed_early: Vec<String>,
    /// Text since the last tag, if any was seen (even if empty).
    pending: Option<String>,
    visible: String,
}

impl Tree {
    const EMPTY_ELEMENTS: [&str; 24] = [
        "area", "base", "basefont", "bgsound", "br", "col", "command", "embed", "frame", "hr",
        "image", "img", "input", "isindex", "keygen", "link", "menuitem", "meta", "nextid",
        "param", "source", "spacer", "track", "wbr",
    ];

    fn text(&mut self, text: &str) {
        self.pending.get_or_insert_default().push_str(text);
    }

    fn end_text(&mut self, kind: TextKind) {
        let Some(mut text) = self.pending.take() else {
            return;
        };
        let open = |names: &[&str]| self.open.iter().any(|tag| names.contains(&tag.as_str()));
        // Blank text shrinks to one space or line break, except where white space counts.
        let blank = |c: char| matches!(c, ' ' | '\n' | '\t' | '\x0c' | '\r');
        if text.chars().all(blank) && !open(&["pre", "textarea"]) {
            text = if text.contains('\n') { "\n" } else { " " }.into();
        }
        let visible = match kind {
            TextKind::Plain => !open(&["rt", "rp", "style", "script", "template"]),
            TextKind::CData => true,
            TextKind::Hidden => false,
        };
        if visible {
            self.visible.push_str(&text);
        }
    }

    fn special(&mut self, text: &str, kind: TextKind) {
        self.end_text(TextKind::Plain);
        self.text(text);
        self.end_text(kind);
    }

    fn start(&mut self, tag: String) {
        self.end_text(TextKind::Plain);
        if Self::EMPTY_ELEMENTS.contains(&tag.as_str()) {
            self.closed_early.push(tag);
        } else {
            self.open.push(tag);
        }
    }

    /// `<tag/>`: any element written so is closed at once.
    fn start_and_end(&mut self, tag: String) {
        self.end_text(TextKind::Plain);
        self.open.push(tag.clone());
        self.close(&tag);
    }

    fn end(&mut self, tag: &str) {
        if let Some(i) = self.closed_early.iter().position(|closed| closed == tag) {
            self.closed_early.remove(i);
        } else {
            self.end_text(TextKind::Plain);
            self.close(tag);
        }
    }

    /// Closes the innermost open `tag` and all within it; an unopened tag closes nothing.
    fn close(&mut self, tag: &str) {
        if let Some(i) = self.open.iter().rposition(|open| open == tag) {
            self.open.truncate(i);
        }
    }
}

/// Patterns of the tokenizer. `\G` ties a match to the position it is asked for.
struct Patterns {
    start_tag: Regex,
    attribute: Regex,
    tag_name: Regex,
    end_tag: Regex,
    comment_end: Regex,
    section_end: Regex,
    office_section_end: Regex,
    declaration_name: Regex,
    number: Regex,
    entity: Regex,
}

static PATTERNS: LazyLock<Patterns> = LazyLock::new(|| {
    // After an attribute name: its value, quoted or bare.
    let value = r#"(?:'[^']*'|"[^"]*"|(?!['"])[^>\s]*)"#;
    let name = r#"(?<=['"\s/])[^\s/>][^\s/=>]*"#;
    let gap = r"(?:\s|/(?!>))*";
    let tag = r"[a-zA-Z][^\t\n\r\f />\x00]*";
    Patterns {
        start_tag: regex(&format!(
            r"\G<{tag}(?:[\s/]*(?:{name}(?:\s*=+\s*{value}\s*)?{gap})*)?\s*"
        )),
        attribute: regex(&format!(r"\G{name}(?:\s*=+\s*{value})?{gap}")),
        tag_name: regex(&format!(r"\G({tag}){gap}")),
        end_tag: regex(r"\G</\s*([a-zA-Z][-.a-zA-Z0-9:_]*)\s*>"),
        comment_end: regex(r"--\s*>"),
        section_end: regex(r"\]\s*\]\s*>"),
        office_section_end: regex(r"\]\s*>"),
        declaration_name: regex(r"\G([a-zA-Z][-_.a-zA-Z0-9]*)\s*"),
        number: regex(r"\G&#([0-9]+|[xX][0-9a-fA-F]+)[^0-9a-fA-F]"),
        entity: regex(r"\G&([a-zA-Z][-.a-zA-Z0-9]*)[^a-zA-Z0-9]"),
    }
});

/// Byte range of a pattern's match from `at` on, and of its first group.
fn find(pattern: &Regex, text: &str, at: usize) -> Option<(std::ops::Range<usize>, String)> {
    let captures = pattern.captures_from_pos(text, at).ok()??;
    let group = captures
        .get(1)
        .map_or("", |group| group.as_str())
        .to_owned();
    captures.get(0).map(|whole| (whole.range(), group))
}

struct Parser<'t> {
    text: &'t str,
    at: usize,
    /// `script` or `style` while inside one.
    raw_text_element: Option<&'static str>,
    tree: Tree,
}

impl Parser<'_> {
    fn find_byte(&self, needle: char, from: usize) -> Option<usize> {
        self.text.get(from..)?.find(needle).map(|i| from + i)
    }

    /// Parses as far as possible. `last` is false while more input could follow.
    fn advance(&mut self, last: bool) {
        let text = self.text;
        while self.at < text.len() {
            let rest = &text[self.at..];
            let skip = match self.raw_text_element {
                None => rest.find(['&', '<']).unwrap_or(rest.len()),
                Some(element) => match raw_text_end(rest, element) {
                    Some(end) => end,
                    None => break,
                },
            };
            if skip > 0 {
                self.tree.text(&rest[..skip]);
                self.at += skip;
            }
            let rest = &text[self.at..];
            let understood = match rest.as_bytes() {
                [] => break,
                [b'<', ..] => self.markup(rest, last),
                [b'&', b'#', ..] => self.number(rest),
                _ => self.entity(rest, last),
            };
            if !understood {
                break;
            }
        }
        if last && self.at < text.len() && self.raw_text_element.is_none() {
            self.tree.text(&text[self.at..]);
            self.at = text.len();
        }
    }

    /// Something that starts with `<`. False if it must wait for more input.
    fn markup(&mut self, rest: &str, last: bool) -> bool {
        let start = self.at;
        let end = if rest[1..].starts_with(|c: char| c.is_ascii_alphabetic()) {
            self.start_tag()
        } else if rest.starts_with("</") {
            self.end_tag()
        } else if rest.starts_with("<!--") {
            self.comment()
        } else if rest.starts_with("<?") {
            self.hidden_until_bracket(start + 2)
        } else if rest.starts_with("<![") {
            self.marked_section()
        } else if rest.starts_with("<!") {
            self.declaration()
        } else if rest.len() > 1 {
            self.tree.text("<");
            Some(start + 1)
        } else {
            return false;
        };
        self.at = match end {
            Some(end) => end,
            None if !last => return false,
            // Unfinished for good: plain text up to the next bracket.
            None => {
                let end = self
                    .find_byte('>', start + 1)
                    .map(|end| end + 1)
                    .or_else(|| self.find_byte('<', start + 1))
                    .unwrap_or(start + 1);
                self.tree.text(&self.text[start..end]);
                end
            }
        };
        true
    }

    /// Each of these returns the end of the construct at `self.at`, or `None` if it has none.
    fn start_tag(&mut self) -> Option<usize> {
        let (text, start) = (self.text, self.at);
        let (matched, _) = find(&PATTERNS.start_tag, text, start)?;
        let j = matched.end;
        let end = match text[j..].chars().next()? {
            '>' => j + 1,
            '/' if text[j..].starts_with("/>") => j + 2,
            c if c == '/' || c == '=' || c.is_ascii_alphabetic() => return None,
            _ => j,
        };
        let (name, tag) = find(&PATTERNS.tag_name, text, start + 1)?;
        let tag = tag.to_lowercase();
        let mut k = name.end;
        while k < end
            && let Some((attribute, _)) = find(&PATTERNS.attribute, text, k)
        {
            k = attribute.end;
        }
        match text.get(k..end).unwrap_or("").trim_matches(is_space) {
            "/>" => self.tree.start_and_end(tag),
            ">" => {
                self.raw_text_element = ["script", "style"].into_iter().find(|raw| *raw == tag);
                self.tree.start(tag);
            }
            _ => self.tree.text(&text[start..end]),
        }
        Some(end)
    }

    fn end_tag(&mut self) -> Option<usize> {
        let (text, start) = (self.text, self.at);
        let bracket = self.find_byte('>', start + 1)? + 1;
        let regular = find(&PATTERNS.end_tag, text, start);
        if let Some(element) = self.raw_text_element {
            match &regular {
                Some((_, tag)) if tag.to_lowercase() == element => {}
                _ => {
                    self.tree.text(&text[start..bracket]);
                    return Some(bracket);
                }
            }
        }
        if let Some((_, tag)) = regular {
            self.tree.end(&tag.to_lowercase());
            self.raw_text_element = None;
            return Some(bracket);
        }
        if let Some((name, tag)) = find(&PATTERNS.tag_name, text, start + 2) {
            self.tree.end(&tag.to_lowercase());
            return Some(self.find_byte('>', name.end)? + 1);
        }
        if text[start..].starts_with("</>") {
            return Some(start + 3);
        }
        self.hidden_until_bracket(start + 2)
    }

    fn comment(&mut self) -> Option<usize> {
        let (end, _) = find(&PATTERNS.comment_end, self.text, self.at + 4)?;
        self.tree
            .special(&self.text[self.at + 4..end.start], TextKind::Hidden);
        Some(end.end)
    }

    fn hidden_until_bracket(&mut self, from: usize) -> Option<usize> {
        let end = self.find_byte('>', from)?;
        self.tree.special(&self.text[from..end], TextKind::Hidden);
        Some(end + 1)
    }

    fn declaration(&mut self) -> Option<usize> {
        let (start, text) = (self.at, self.text);
        let doctype = "<!doctype";
        let is_doctype = text
            .get(start..start + doctype.len())
            .is_some_and(|head| head.eq_ignore_ascii_case(doctype));
        let searched_from = start + if is_doctype { doctype.len() } else { 2 };
        let end = self.find_byte('>', searched_from)?;
        self.tree.special(&text[start + 2..end], TextKind::Hidden);
        Some(end + 1)
    }

    /// `<![CDATA[...]]>` and the conditional sections of office programs.
    fn marked_section(&mut self) -> Option<usize> {
        let (start, text) = (self.at, self.text);
        let content = start + 3;
        if content == text.len() {
            return None;
        }
        let Some((name, keyword)) = find(&PATTERNS.declaration_name, text, content) else {
            return self.hidden_until_bracket(start + 2);
        };
        if name.end == text.len() {
            return None;
        }
        let ending = match keyword.to_lowercase().as_str() {
            "temp" | "cdata" | "ignore" | "include" | "rcdata" => &PATTERNS.section_end,
            "if" | "else" | "endif" => &PATTERNS.office_section_end,
            _ => return self.hidden_until_bracket(start + 2),
        };
        let (end, _) = find(ending, text, content)?;
        let section = &text[content..end.start];
        match section.get(..6) {
            Some(head) if head.eq_ignore_ascii_case("cdata[") => {
                self.tree.special(&section[6..], TextKind::CData);
            }
            _ => self.tree.special(section, TextKind::Hidden),
        }
        Some(end.end)
    }

    /// `&#...`. False if parsing cannot go on here.
    fn number(&mut self, rest: &str) -> bool {
        if let Some((matched, digits)) = find(&PATTERNS.number, self.text, self.at) {
            let code = match digits.strip_prefix(['x', 'X']) {
                Some(hex) => entities::parse_saturating(hex, 16),
                None => entities::parse_saturating(&digits, 10),
            };
            let decoded = entities::windows_1252(code)
                .or_else(|| char::from_u32(code).filter(|&c| c != '\0'))
                .unwrap_or(char::REPLACEMENT_CHARACTER);
            self.tree.text(decoded.encode_utf8(&mut [0; 4]));
            self.at = reference_end(self.text, matched);
            return true;
        }
        if rest.contains(';') {
            self.tree.text("&#");
            self.at += 2;
        }
        false
    }

    /// `&...` without a number. False if parsing cannot go on here.
    fn entity(&mut self, rest: &str, last: bool) -> bool {
        if let Some((matched, name)) = find(&PATTERNS.entity, self.text, self.at) {
            match entities::named(&name).or_else(|| entities::named(&format!("{name};"))) {
                Some(decoded) => self.tree.text(decoded),
                None => self.tree.text(&format!("&{name}")),
            }
            self.at = reference_end(self.text, matched);
            return true;
        }
        if rest[1..].starts_with(|c: char| c.is_ascii_alphabetic()) {
            // The reference drops the ampersand of a final "&x".
            if last && rest.len() == 2 {
                self.at += 1;
            }
            return false;
        }
        if rest.len() > 1 {
            self.tree.text("&");
            self.at += 1;
        }
        rest.len() > 1
    }
}

/// The end of a reference whose match includes the character after it: a semicolon belongs to it.
fn reference_end(text: &str, matched: std::ops::Range<usize>) -> usize {
    let after = text[matched.clone()].chars().next_back();
    match after {
        Some(';') | None => matched.end,
        Some(c) => matched.end - c.len_utf8(),
    }
}

/// Where the end tag of a `script` or `style` element starts.
fn raw_text_end(rest: &str, element: &str) -> Option<usize> {
    rest.match_indices("</").map(|(i, _)| i).find(|&i| {
        let inner = rest[i + 2..].trim_start_matches(is_space);
        inner
            .get(..element.len())
            .is_some_and(|name| name.eq_ignore_ascii_case(element))
            && inner[element.len()..]
                .trim_start_matches(is_space)
                .starts_with('>')
    })
}

#[cfg(test)]
mod tests {
    use super::text;

    #[test]
    fn tags_go_and_text_stays() {
        for (markup, visible) in [
            ("a <b>red</b> fox<br/>runs", "a red foxruns"),
            ("5 < 6 and 7 > 3", "5 < 6 and 7 > 3"),
            ("a<!-- no -->b<?no?>c<!doctype html>d", "abcd"),
            (
                "x<script>var a = '<b>';</script>y<style>p{}</style>z",
                "xyz",
            ),
            ("<ruby>kan<rt>read</rt></ruby>ji", "kanji"),
            ("<![cdata[raw <b>]]> text", "raw <b> text"),
            (
                "caf&eacute; &lt;3 &#233;&#xe9; &unknown; &amp",
                "caf\u{e9} <3 \u{e9}\u{e9} &unknown &amp",
            ),
            ("unfinished <b", "unfinished <b"),
            ("a </ b> c </> d", "a  c  d"),
        ] {
            assert_eq!(text(markup), visible, "{markup}");
        }
    }

    #[test]
    fn declarations_the_reference_rejects_are_hidden() {
        assert_eq!(text("a <![foo[bar]]> b"), "a  b");
    }
}
