//! Whether text looks like mojibake: UTF-8 that was decoded as something else.
//!
//! The heuristic is that of ftfy 6.3.1: some 400 characters occur in such text, fall into
//! categories, and betray it by unlikely neighbours (an accented capital before a currency sign).

use super::python::{is_space, is_word};

/// A set of character categories, one bit each.
type Kinds = u32;

/// Frequent anywhere: no sign of mojibake by themselves.
const COMMON: Kinds = 1;
/// C1 control codes.
const C1: Kinds = 1 << 1;
/// Hardly ever meant.
const BAD: Kinds = 1 << 2;
const LAW: Kinds = 1 << 3;
const CURRENCY: Kinds = 1 << 4;
/// Punctuation that opens.
const START: Kinds = 1 << 5;
/// Punctuation that closes.
const END: Kinds = 1 << 6;
const NUMERIC: Kinds = 1 << 7;
/// Letters that occur in faces such as (°ω°).
const FACE: Kinds = 1 << 8;
const UPPER_ACCENTED: Kinds = 1 << 9;
const LOWER_ACCENTED: Kinds = 1 << 10;
const UPPER_COMMON: Kinds = 1 << 11;
const LOWER_COMMON: Kinds = 1 << 12;
const BOX: Kinds = 1 << 13;
const ASCII_UPPER: Kinds = 1 << 14;
const ASCII_LOWER: Kinds = 1 << 15;
const WORD: Kinds = 1 << 16;
const SPACE: Kinds = 1 << 17;

const ASCII_LETTER: Kinds = ASCII_UPPER | ASCII_LOWER;
const ACCENTED: Kinds = UPPER_ACCENTED | LOWER_ACCENTED;

/// Inclusive ranges of code points per category.
#[rustfmt::skip]
const RANGES: &[(Kinds, &[(u16, u16)])] = &[
    (COMMON, &[
        (0xa0, 0xa0), (0xad, 0xad), (0xb4, 0xb4), (0xb7, 0xb7), (0x2013, 0x2015),
        (0x2019, 0x2019), (0x2026, 0x2026),
    ]),
    (C1, &[(0x80, 0x9f)]),
    (BAD, &[
        (0xa4, 0xa4), (0xa6, 0xa6), (0xa8, 0xa8), (0xaa, 0xaa), (0xac, 0xac), (0xaf, 0xaf),
        (0xb8, 0xb8), (0xba, 0xba), (0x192, 0x192), (0x2c6, 0x2c7), (0x2d8, 0x2d8),
        (0x2db, 0x2dc), (0x2020, 0x2021), (0x2030, 0x2030), (0x2310, 0x2310), (0x25ca, 0x25ca),
        (0xfffd, 0xfffd),
    ]),
    (LAW, &[(0xa7, 0xa7), (0xb6, 0xb6)]),
    (CURRENCY, &[(0xa2, 0xa3), (0xa5, 0xa5), (0x20a7, 0x20a7), (0x20ac, 0x20ac)]),
    (START, &[
        (0xa1, 0xa1), (0xa9, 0xa9), (0xab, 0xab), (0xbf, 0xbf), (0x384, 0x385), (0x2018, 0x2018),
        (0x201a, 0x201a), (0x201c, 0x201c), (0x201e, 0x201e), (0x2022, 0x2022), (0x2039, 0x2039),
        (0xf8ff, 0xf8ff),
    ]),
    (END, &[
        (0xae, 0xae), (0xbb, 0xbb), (0x2dd, 0x2dd), (0x201d, 0x201d), (0x203a, 0x203a),
        (0x2122, 0x2122),
    ]),
    (NUMERIC, &[
        (0xb1, 0xb3), (0xb5, 0xb5), (0xb9, 0xb9), (0xbc, 0xbe), (0xd7, 0xd7), (0xf7, 0xf7),
        (0x2044, 0x2044), (0x2116, 0x2116), (0x2202, 0x2202), (0x2206, 0x2206), (0x220f, 0x220f),
        (0x2211, 0x2211), (0x221a, 0x221a), (0x221e, 0x221e), (0x2229, 0x2229), (0x222b, 0x222b),
        (0x2248, 0x2248), (0x2260, 0x2261), (0x2264, 0x2265),
    ]),
    (FACE, &[
        (0xb0, 0xb0), (0xd2, 0xd6), (0xd9, 0xdc), (0xf2, 0xf6), (0xf8, 0xfc), (0x14c, 0x14c),
        (0x150, 0x150), (0x16a, 0x16a), (0x172, 0x172),
    ]),
    (UPPER_ACCENTED, &[
        (0xc0, 0xd1), (0xd8, 0xd8), (0xdc, 0xdd), (0x100, 0x100), (0x102, 0x102), (0x104, 0x104),
        (0x106, 0x106), (0x10c, 0x10c), (0x10e, 0x10e), (0x110, 0x110), (0x112, 0x112),
        (0x116, 0x116), (0x118, 0x118), (0x11a, 0x11a), (0x11e, 0x11e), (0x122, 0x122),
        (0x12a, 0x12a), (0x130, 0x130), (0x136, 0x136), (0x139, 0x139), (0x13b, 0x13b),
        (0x13d, 0x13d), (0x141, 0x141), (0x143, 0x143), (0x145, 0x145), (0x147, 0x147),
        (0x152, 0x152), (0x158, 0x158), (0x15a, 0x15a), (0x15e, 0x15e), (0x160, 0x160),
        (0x162, 0x162), (0x164, 0x164), (0x16e, 0x16e), (0x170, 0x170), (0x178, 0x179),
        (0x17b, 0x17b), (0x17d, 0x17d), (0x490, 0x490),
    ]),
    (LOWER_ACCENTED, &[
        (0xdf, 0xf1), (0xfc, 0xfc), (0x101, 0x101), (0x103, 0x103), (0x105, 0x105),
        (0x107, 0x107), (0x10d, 0x10d), (0x10f, 0x10f), (0x111, 0x111), (0x113, 0x113),
        (0x117, 0x117), (0x119, 0x119), (0x11b, 0x11b), (0x11f, 0x11f), (0x123, 0x123),
        (0x12b, 0x12b), (0x12f, 0x12f), (0x137, 0x137), (0x13a, 0x13a), (0x13c, 0x13c),
        (0x13e, 0x13e), (0x142, 0x142), (0x153, 0x153), (0x155, 0x155), (0x15b, 0x15b),
        (0x15f, 0x15f), (0x161, 0x161), (0x165, 0x165), (0x17a, 0x17a), (0x17c, 0x17c),
        (0x17e, 0x17e), (0x491, 0x491), (0xfb01, 0xfb02),
    ]),
    (UPPER_COMMON, &[
        (0xde, 0xde), (0x386, 0x386), (0x388, 0x38a), (0x38c, 0x38c), (0x38e, 0x38f),
        (0x391, 0x3ab), (0x401, 0x42f),
    ]),
    (LOWER_COMMON, &[(0x3ac, 0x3c9), (0x430, 0x45f)]),
    (BOX, &[
        (0x2502, 0x2502), (0x250c, 0x250c), (0x2510, 0x2510), (0x2518, 0x2518), (0x251c, 0x251c),
        (0x2524, 0x2524), (0x252c, 0x252c), (0x253c, 0x253c), (0x2550, 0x256c), (0x2580, 0x2580),
        (0x2584, 0x2584), (0x2588, 0x2588), (0x258c, 0x258c), (0x2590, 0x2593),
    ]),
];

fn kinds(c: char) -> Kinds {
    let mut kinds = match c {
        'A'..='Z' => ASCII_UPPER,
        'a'..='z' => ASCII_LOWER,
        _ => 0,
    };
    if is_word(c) {
        kinds |= WORD;
    }
    if is_space(c) {
        kinds |= SPACE;
    }
    if !c.is_ascii()
        && let Ok(code) = u16::try_from(u32::from(c))
    {
        for (kind, ranges) in RANGES {
            if ranges
                .iter()
                .any(|&(low, high)| (low..=high).contains(&code))
            {
                kinds |= kind;
            }
        }
    }
    kinds
}

/// Neighbours that betray mojibake.
const PAIRS: &[(Kinds, Kinds)] = &[
    (
        ACCENTED | BAD | BOX | START | END | CURRENCY | NUMERIC | LAW,
        BAD,
    ),
    (BAD, ACCENTED | BOX | START | END | CURRENCY | NUMERIC | LAW),
    (
        LOWER_ACCENTED | LOWER_COMMON | BOX | END | CURRENCY | NUMERIC,
        UPPER_ACCENTED,
    ),
    (BOX | END | CURRENCY | NUMERIC, LOWER_ACCENTED),
    (LOWER_ACCENTED | BOX | END, CURRENCY),
    (UPPER_ACCENTED | BOX, NUMERIC | LAW),
    (CURRENCY | NUMERIC | BOX, START),
    (BOX, FACE),
    (ACCENTED | CURRENCY | NUMERIC | START | END | LAW, BOX),
    (BOX, END),
];

const TRIPLES: &[(Kinds, Kinds, Kinds)] = &[
    (ASCII_LETTER, LOWER_COMMON | UPPER_COMMON, BAD),
    (SPACE, UPPER_ACCENTED, CURRENCY),
    (ACCENTED | BOX | CURRENCY | END, START, NUMERIC),
    (ACCENTED | CURRENCY | NUMERIC | BOX | LAW, END, START),
    (ASCII_LOWER, UPPER_ACCENTED, START | CURRENCY),
    (ACCENTED, START | END, WORD),
];

/// Whether the text looks like it holds mojibake.
pub(super) fn is_bad(text: &[char]) -> bool {
    let kinds: Vec<Kinds> = text.iter().map(|&c| kinds(c)).collect();
    (0..text.len()).any(|i| bad_by_kind(&kinds[i..]) || bad_by_letters(&text[i..], &kinds[i..], i))
}

fn bad_by_kind(kinds: &[Kinds]) -> bool {
    let at = |i: usize, set: Kinds| kinds.get(i).is_some_and(|kind| kind & set != 0);
    at(0, C1)
        || PAIRS.iter().any(|&(a, b)| at(0, a) && at(1, b))
        || TRIPLES
            .iter()
            .any(|&(a, b, c)| at(0, a) && at(1, b) && at(2, c))
}

/// Sequences known from particular encodings. `position` is that of `text` in the whole.
fn bad_by_letters(text: &[char], kinds: &[Kinds], position: usize) -> bool {
    let is = |i: usize, set: &str| text.get(i).is_some_and(|&c| set.contains(c));
    let kind = |i: usize, set: Kinds| kinds.get(i).is_some_and(|kind| kind & set != 0);
    let either = |i: usize, letters: &str, set: Kinds| is(i, letters) || kind(i, set);
    // Windows-1251 and -1253: a letter, something odd, a letter again.
    let odd = C1 | BAD | START | END | CURRENCY;
    let arabic = COMMON | CURRENCY | BAD | NUMERIC | START;
    let first = text[0];
    match first {
        'Œ' | 'œ' if text.len() > 1 && !kind(1, ASCII_LETTER) => return true,
        'Â' | 'Ã' | 'Î' | 'Ð' if either(1, "€œŠš¢£Ÿž\u{a0}\u{ad}®©°·»–—´", START | END) =>
        {
            return true;
        }
        '×' if is(1, "²³") => return true,
        'Ø' | 'Ù' if either(1, "ŸŠ®°µ»", arabic) && is(2, "ØÙ") && either(3, "ŸŠ®°µ»", arabic) =>
        {
            return true;
        }
        'à' if is(1, "²µ¹¼½¾") => return true,
        '√' if is(1, "±∂†≠®™´≤≥¥µø") => return true,
        '≈' if is(1, "°¢") => return true,
        '‚' if is(1, "Ä") && is(2, "ìîïòôúùû†°¢π") => return true,
        '‚' if is(1, "âó") && is(2, "àä°ê") => return true,
        'в' if is(1, "Ђ") => return true,
        'В' | 'Г' | 'Р' | 'С' if either(1, "°µ", odd) && is(2, "ВГРС") => return true,
        'Г' if text.starts_with(&['Г', 'ў', 'В', 'Ђ', 'В'])
            && text.get(5).is_some_and(|&c| c != '\n')
            && either(6, " ", ASCII_LETTER) =>
        {
            return true;
        }
        'β' if is(1, "€") && is(2, "™\u{a0}Ά\u{ad}®°") => return true,
        'Β' | 'Γ' | 'Ξ' | 'Ο' if either(1, "°", odd) && is(2, "ΒΓΞΟ") => return true,
        'ā' if is(1, "€") => return true,
        _ => {}
    }
    // A capital before a degree sign; accented A before a space, where it hides a lost byte A0.
    kind(0, UPPER_ACCENTED) && is(1, "°")
        || first == 'Ã' && is(1, "\u{a0}¡")
        || position == 0 && is(0, "ÃÂ") && is(1, " ")
        || kind(0, ASCII_LOWER)
            && (is(1, "ÃÂ") && is(2, " ") || kind(1, SPACE) && is(2, "ÃÂ") && is(3, " "))
        || either(0, ".,?!", ASCII_LOWER | END) && is(1, "Â") && either(2, " ", START | END)
}
