//! CLIP's byte-pair encoding, open_clip's `SimpleTokenizer`.

use std::collections::HashMap;

use nitro_pipeline::caption::repair;
use regex::Regex;

/// The merges that the vocabulary has, best first: lines 2 to 48895 of OpenAI's
/// `bpe_simple_vocab_16e6.txt`.
const MERGES: &str = include_str!("../../data/clip_merges.txt");
/// Ids of single bytes inside a word; those of bytes that end one follow.
const BYTES: u32 = 256;
/// Pairs of tokens to the merged one; the lowest id is merged first.
type Merges = HashMap<(u32, u32), u32>;

/// CLIP's tokenizer.
#[derive(Debug)]
pub struct ClipTokenizer {
    merges: Merges,
    /// Of each byte, its id inside a word.
    bytes: [u32; 256],
    start: u32,
    end: u32,
    words: Regex,
}

impl Default for ClipTokenizer {
    fn default() -> Self {
        Self::new()
    }
}

impl ClipTokenizer {
    /// Ids that the tokenizer knows.
    pub const VOCABULARY: usize = 49408;

    /// Builds the tables.
    pub fn new() -> Self {
        let (bytes, names) = byte_symbols();
        let mut ids: HashMap<String, u32> = HashMap::new();
        for (id, name) in names.iter().enumerate() {
            ids.insert(name.to_string(), id as u32);
            ids.insert(format!("{name}</w>"), id as u32 + BYTES);
        }
        let mut merges = Merges::new();
        for (i, line) in MERGES.lines().enumerate() {
            // Every line is a pair of known tokens; a test reads them all.
            let Some((left, right)) = line.split_once(' ') else {
                continue;
            };
            let id = 2 * BYTES + i as u32;
            if let (Some(&a), Some(&b)) = (ids.get(left), ids.get(right)) {
                merges.insert((a, b), id);
            }
            ids.insert(format!("{left}{right}"), id);
        }
        let start = 2 * BYTES + MERGES.lines().count() as u32;
        Self {
            merges,
            bytes,
            start,
            end: start + 1,
            words: Regex::new(
                r"(?i)<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+",
            )
            .expect("the pattern is constant and tested"),
        }
    }

    /// The ids of `text`, begin and end included, padded with zeros to `length`; what does not fit is
    /// cut, and the end put last.
    pub fn encode(&self, text: &str, length: usize) -> Vec<u32> {
        let text = clean(text);
        let mut ids = vec![self.start];
        for word in self.words.find_iter(&text) {
            match word.as_str() {
                "<start_of_text>" => ids.push(self.start),
                "<end_of_text>" => ids.push(self.end),
                word => self.push_word(word, &mut ids),
            }
        }
        ids.push(self.end);
        if ids.len() > length {
            ids.truncate(length);
            if let Some(last) = ids.last_mut() {
                *last = self.end;
            }
        }
        ids.resize(length, 0);
        ids
    }

    /// Merges the pair with the lowest id, everywhere in the word, until there is none.
    fn push_word(&self, word: &str, ids: &mut Vec<u32>) {
        let mut tokens: Vec<u32> = word.bytes().map(|b| self.bytes[usize::from(b)]).collect();
        if let Some(last) = tokens.last_mut() {
            *last += BYTES;
        }
        let merged = |pair: &[u32]| self.merges.get(&(pair[0], pair[1])).copied();
        while let Some(best) = tokens.windows(2).filter_map(merged).min() {
            let mut joined = Vec::with_capacity(tokens.len());
            let mut rest = tokens.as_slice();
            while let [first, tail @ ..] = rest {
                if rest.len() > 1 && merged(rest) == Some(best) {
                    joined.push(best);
                    rest = &rest[2..];
                } else {
                    joined.push(*first);
                    rest = tail;
                }
            }
            tokens = joined;
        }
        ids.extend(tokens);
    }
}

/// Repaired, white space to single spaces, lower case.
fn clean(text: &str) -> String {
    let repaired = repair(text);
    let words: Vec<&str> = repaired.split_whitespace().collect();
    words.join(" ").to_lowercase()
}

/// GPT-2's printable stand-ins for bytes: of each byte its place among them, and the characters in
/// order. Printable Latin-1 stands for itself and comes first; the other bytes follow from U+0100 on.
fn byte_symbols() -> ([u32; 256], Vec<char>) {
    let printable = |b: u32| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let (mut places, mut names) = ([0; 256], Vec::new());
    for b in (0..256).filter(|b| printable(*b)) {
        places[b as usize] = names.len() as u32;
        names.extend(char::from_u32(b));
    }
    for (i, b) in (0..256).filter(|b| !printable(*b)).enumerate() {
        places[b as usize] = names.len() as u32;
        names.extend(char::from_u32(256 + i as u32));
    }
    (places, names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_of_the_vocabulary_is_a_merge() {
        let tokenizer = ClipTokenizer::new();
        assert_eq!(tokenizer.merges.len(), MERGES.lines().count());
        assert_eq!((tokenizer.start, tokenizer.end), (49406, 49407));
        assert_eq!(tokenizer.end as usize + 1, ClipTokenizer::VOCABULARY);
    }

    #[test]
    fn a_text_that_is_too_long_still_ends() {
        let ids = ClipTokenizer::new().encode(&"a photo of a cat ".repeat(40), 77);
        assert_eq!((ids.len(), ids[76]), (77, 49407));
        assert_eq!(ClipTokenizer::new().encode("", 4), [49406, 49407, 0, 0]);
    }
}
