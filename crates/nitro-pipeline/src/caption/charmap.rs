//! The single-byte encodings that text is most often wrongly decoded with.
//!
//! "Sloppy" encodings follow ftfy: bytes a code page leaves unassigned stand for the Latin-1
//! character, and byte 0x1A stands for U+FFFD, a character already lost.

use encoding_rs::Encoding;

/// Code page 437, upper half. The other tables come from `encoding_rs`, which lacks this one.
const CP437: &str = "ÇüéâäàåçêëèïîìÄÅÉæÆôöòûùÿÖÜ¢£¥₧ƒáíóúñÑªº¿⌐¬½¼¡«»░▒▓│┤╡╢╖╕╣║╗╝╜╛┐└┴┬├─┼╞╟╚╔╩╦╠═╬╧╨╤╥╙╘╒╓╫╪┘┌█▄▌▐▀αßΓπΣσµτΦΘΩδ∞φε∩≡±≥≤⌠⌡÷≈°∙·√ⁿ²■\u{a0}";

/// A reversible table of the bytes from 0x80, with ASCII below.
pub(super) struct Charmap {
    name: Name,
    pub(super) sloppy: bool,
    pub(super) macintosh: bool,
}

#[derive(Clone, Copy)]
enum Name {
    Latin1,
    Cp437,
    Web(&'static Encoding),
}

const fn sloppy(encoding: &'static Encoding) -> Charmap {
    Charmap {
        name: Name::Web(encoding),
        sloppy: true,
        macintosh: false,
    }
}

impl Charmap {
    pub(super) const WINDOWS_1252: Self = sloppy(encoding_rs::WINDOWS_1252);

    /// The encodings that repair tries, in order of likelihood.
    pub(super) const ALL: [Self; 10] = [
        Self {
            name: Name::Latin1,
            sloppy: false,
            macintosh: false,
        },
        Self::WINDOWS_1252,
        sloppy(encoding_rs::WINDOWS_1251),
        sloppy(encoding_rs::WINDOWS_1250),
        sloppy(encoding_rs::WINDOWS_1253),
        sloppy(encoding_rs::WINDOWS_1254),
        sloppy(encoding_rs::WINDOWS_1257),
        Self {
            name: Name::Web(encoding_rs::ISO_8859_2),
            sloppy: false,
            macintosh: false,
        },
        Self {
            name: Name::Web(encoding_rs::MACINTOSH),
            sloppy: false,
            macintosh: true,
        },
        Self {
            name: Name::Cp437,
            sloppy: false,
            macintosh: false,
        },
    ];

    /// The first seven: those whose letters the detector of embedded mojibake knows.
    pub(super) fn detected() -> &'static [Self] {
        const DETECTED: &[Charmap] = Charmap::ALL.split_at(7).0;
        DETECTED
    }

    /// The character of a byte.
    pub(super) fn decode_byte(&self, byte: u8) -> char {
        if byte == 0x1a && self.sloppy {
            return '\u{fffd}';
        }
        if byte.is_ascii() {
            return byte.into();
        }
        let assigned = match self.name {
            Name::Latin1 => None,
            Name::Cp437 => CP437.chars().nth(usize::from(byte - 0x80)),
            Name::Web(encoding) => encoding
                .decode_without_bom_handling_and_without_replacement(&[byte])
                .and_then(|text| text.chars().next()),
        };
        assigned.unwrap_or(char::from(byte))
    }

    /// The characters of bytes 0x80 to 0xFF.
    fn upper_half(&self) -> Vec<char> {
        (0x80..=0xff).map(|byte| self.decode_byte(byte)).collect()
    }

    /// The bytes this text would have been decoded from, if all its characters exist here.
    pub(super) fn encode(&self, text: &[char]) -> Option<Vec<u8>> {
        let upper = self.upper_half();
        text.iter()
            .map(|&c| match c {
                '\x1a' if self.sloppy => None,
                '\u{fffd}' if self.sloppy => Some(0x1a),
                _ if c.is_ascii() => Some(c as u8),
                _ => upper
                    .iter()
                    .position(|&known| known == c)
                    .map(|i| 0x80 + i as u8),
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_survives_a_round_trip() {
        for map in &Charmap::ALL {
            let bytes: Vec<u8> = (0..=255).collect();
            let text: Vec<char> = bytes.iter().map(|&b| map.decode_byte(b)).collect();
            assert_eq!(map.encode(&text), Some(bytes));
        }
    }

    #[test]
    fn known_bytes() {
        let decode = |i: usize, byte| Charmap::ALL[i].decode_byte(byte);
        assert_eq!(decode(0, 0x93), '\u{93}');
        assert_eq!(decode(1, 0x93), '\u{201c}');
        assert_eq!(decode(1, 0x81), '\u{81}');
        assert_eq!(decode(2, 0xe9), 'й');
        // Unassigned in the code page itself: the Latin-1 character.
        assert_eq!(decode(4, 0xaa), '\u{aa}');
        assert_eq!(decode(6, 0xa1), '\u{a1}');
        assert_eq!(decode(8, 0xdb), '€');
        assert_eq!(decode(9, 0xff), '\u{a0}');
    }
}
