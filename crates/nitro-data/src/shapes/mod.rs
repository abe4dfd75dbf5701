//! The shapes world: a synthetic text-to-image dataset that two CPU cores can learn and a program
//! can judge exactly. It mirrors GenEval's six tasks.
//!
//! The flow: [`example`] plans what a picture shows and what its caption says, [`scene`] places the
//! objects, [`render`](mod@render) paints them, [`caption`](mod@caption) words the facts, and
//! [`judge`](mod@judge) reads class, colour and box back from pixels.
//!
//! ```
//! use nitro_data::shapes::{self, Example};
//!
//! let example = Example::from_seed(7);
//! let rgb = shapes::render(&example.scene, 128); // 128 * 128 * 3 bytes
//! let found = shapes::judge(&rgb, 128, 128).unwrap();
//! assert_eq!(found.len(), example.scene.objects.len());
//! ```

pub mod caption;
pub mod example;
pub mod geometry;
pub mod judge;
mod raster;
pub mod render;
pub mod scene;

use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use caption::{Facts, Group, Relation, caption};
pub use example::{Example, Task, TaskMix, captions, sample_example};
pub use judge::{Detection, judge};
pub use render::{render, render_into};
pub use scene::{Background, Brightness, Kind, Object, Scene, Shadow};

/// The bench: one JSON object per line in GenEval's metadata schema, 40 prompts for each of the six
/// tasks. Training draws captions from the grammar, never from this text.
pub const BENCH_JSONL: &str = include_str!("../../data/shapes_bench.jsonl");

/// What can be wrong with a request to the shapes world.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ShapesError {
    /// The pixel buffer does not have the size its dimensions ask for.
    #[error("{what}: expected {expected} bytes (height * width * 3, RGB), got {actual}")]
    BufferSize {
        /// The operation that was asked for.
        what: &'static str,
        /// Bytes needed.
        expected: usize,
        /// Bytes given.
        actual: usize,
    },
    /// The picture is too small for an object to be told from noise.
    #[error("judge: a picture of {width}x{height} is too small; give at least 32 pixels a side")]
    TooSmall {
        /// Width in pixels.
        width: usize,
        /// Height in pixels.
        height: usize,
    },
    /// A word is neither a class nor a colour of this world.
    #[error("unknown {what} \"{word}\"; the known ones are {known}")]
    UnknownWord {
        /// "class" or "colour".
        what: &'static str,
        /// The word that was given.
        word: String,
        /// All words that would have been accepted.
        known: String,
    },
}

/// The eight object classes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum Class {
    Circle,
    Square,
    Triangle,
    Star,
    Heart,
    Cross,
    Ring,
    Crescent,
}

impl Class {
    /// Every class, in the order of the specification.
    pub const ALL: [Class; 8] = [
        Class::Circle,
        Class::Square,
        Class::Triangle,
        Class::Star,
        Class::Heart,
        Class::Cross,
        Class::Ring,
        Class::Crescent,
    ];

    /// The class as captions and metadata write it.
    pub fn name(self) -> &'static str {
        [
            "circle", "square", "triangle", "star", "heart", "cross", "ring", "crescent",
        ][self as usize]
    }

    /// More than one of it.
    pub fn plural(self) -> &'static str {
        [
            "circles",
            "squares",
            "triangles",
            "stars",
            "hearts",
            "crosses",
            "rings",
            "crescents",
        ][self as usize]
    }
}

/// The ten fill colours: GenEval's colour words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum Colour {
    Red,
    Orange,
    Yellow,
    Green,
    Blue,
    Purple,
    Pink,
    Brown,
    Black,
    White,
}

impl Colour {
    /// Every colour, in GenEval's order.
    pub const ALL: [Colour; 10] = [
        Colour::Red,
        Colour::Orange,
        Colour::Yellow,
        Colour::Green,
        Colour::Blue,
        Colour::Purple,
        Colour::Pink,
        Colour::Brown,
        Colour::Black,
        Colour::White,
    ];

    /// The colour as captions and metadata write it.
    pub fn name(self) -> &'static str {
        [
            "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white",
        ][self as usize]
    }

    /// sRGB levels.
    pub fn rgb(self) -> [u8; 3] {
        [
            [224, 32, 32],
            [240, 128, 16],
            [240, 208, 32],
            [32, 160, 64],
            [32, 80, 224],
            [128, 48, 192],
            [240, 128, 192],
            [128, 64, 32],
            [16, 16, 16],
            [248, 248, 248],
        ][self as usize]
    }

    /// sRGB levels as floats in 0..=255.
    pub fn rgb_f32(self) -> [f32; 3] {
        self.rgb().map(f32::from)
    }
}

fn parse_word<T: Copy>(
    what: &'static str,
    word: &str,
    all: &[T],
    name: impl Fn(T) -> &'static str,
) -> Result<T, ShapesError> {
    all.iter()
        .copied()
        .find(|&t| name(t) == word)
        .ok_or_else(|| ShapesError::UnknownWord {
            what,
            word: word.to_owned(),
            known: all.iter().map(|&t| name(t)).collect::<Vec<_>>().join(", "),
        })
}

impl std::str::FromStr for Class {
    type Err = ShapesError;

    fn from_str(word: &str) -> Result<Self, ShapesError> {
        parse_word("class", word, &Class::ALL, Class::name)
    }
}

impl std::str::FromStr for Colour {
    type Err = ShapesError;

    fn from_str(word: &str) -> Result<Self, ShapesError> {
        parse_word("colour", word, &Colour::ALL, Colour::name)
    }
}

impl std::fmt::Display for Class {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::fmt::Display for Colour {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
