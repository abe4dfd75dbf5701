//! Caption cleaning: what the official pipeline does to a prompt before the tokenizer sees it.
//!
//! The model was trained on captions cleaned this way, so a prompt must go through the same steps
//! to the letter: URL and markup removal, entity decoding, repair of wrongly decoded text,
//! punctuation and "web shop" rules, lower case. The steps follow the official
//! `_text_preprocessing` (which runs the cleaning twice) together with the behaviour of its
//! helpers: Python 3.11 `re`, `html` and `html.parser`, Beautiful Soup 4.15 and ftfy 6.3.1.
//!
//! Known differences: characters younger than Unicode 14, and markup declarations that make the
//! reference raise an error, which are treated as comments here.

mod badness;
mod charmap;
mod entities;
mod markup;
mod mojibake;
mod python;
mod repair;
mod rules;

/// Characters of a caption that are looked at; later ones are dropped.
///
/// The model reads 128 tokens. Like the reference, the cleaning needs time quadratic in the length
/// of hostile input (an endless unfinished tag), which this bounds to a few seconds.
pub const MAX_CHARS: usize = 8192;

/// Prepares a caption for the tokenizer.
///
/// With `clean` (the pipeline's default) the caption is cleaned twice, as the official code does;
/// without, it is only lower-cased and stripped.
///
/// ```
/// # use nitro_pipeline::caption::preprocess;
/// assert_eq!(preprocess("A <b>Red</b> Fox -- see www.fox.com", true), "a red fox - see");
/// assert_eq!(preprocess(" A <b>Red</b> Fox ", false), "a <b>red</b> fox");
/// ```
pub fn preprocess(caption: &str, clean: bool) -> String {
    let caption = head(caption);
    if clean {
        clean_once(&clean_once(caption))
    } else {
        python::strip(&caption.to_lowercase()).to_owned()
    }
}

/// One pass of the official `_clean_caption`. [`preprocess`] makes two.
pub fn clean_once(caption: &str) -> String {
    let rules = rules::rules();
    let decoded = python::unquote_plus(head(caption));
    let mut text = python::strip(&decoded).to_lowercase();
    rules.links.apply(&mut text);
    text = markup::text(&text);
    rules.symbols.apply(&mut text);
    rules.break_up_slugs(&mut text);
    text = repair::fix_text(&text);
    text = entities::unescape(&entities::unescape(&text));
    rules.phrases.apply(&mut text);
    python::strip(&text).to_owned()
}

/// What CLIP's tokenizer does to a text first: ftfy's repair of wrongly decoded characters, then HTML
/// entities, decoded twice.
pub fn repair(text: &str) -> String {
    entities::unescape(&entities::unescape(&repair::fix_text(head(text))))
}

/// The first [`MAX_CHARS`] characters.
fn head(caption: &str) -> &str {
    match caption.char_indices().nth(MAX_CHARS) {
        Some((end, _)) => &caption[..end],
        None => caption,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_caption_of_any_length_is_accepted() {
        let long = "red fox ".repeat(5000);
        assert_eq!(preprocess(&long, false).chars().count(), MAX_CHARS - 1);
        assert_eq!(preprocess(&long, true).chars().count(), MAX_CHARS - 1);
    }

    #[test]
    fn the_second_pass_starts_from_the_first_ones_result() {
        let caption = "fish &amp;amp; chips";
        assert_eq!(clean_once(caption), "fish ; chips");
        assert_eq!(preprocess(caption, true), "fish ; chips");
        let slug = "%2562old";
        assert_eq!(clean_once(slug), "%62old");
        assert_eq!(preprocess(slug, true), "bold");
    }
}
