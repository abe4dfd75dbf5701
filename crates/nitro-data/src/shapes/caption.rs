//! The caption grammar: facts to words, and words back to facts.
//!
//! A caption names every object of its picture (classes always, colours sometimes), may say how two
//! objects stand to each other, and may say how bright the background is. What it does not mention
//! is free. [`Facts::word`] picks a paraphrase; [`Facts::parse`] understands every one of them.

use rand::Rng;
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};

use super::scene::{Brightness, Object, Scene, pick};
use super::{Class, Colour};

/// How one object stands to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[allow(missing_docs)]
pub enum Relation {
    #[serde(rename = "left of")]
    LeftOf,
    #[serde(rename = "right of")]
    RightOf,
    #[serde(rename = "above")]
    Above,
    #[serde(rename = "below")]
    Below,
}

impl Relation {
    /// All four.
    pub const ALL: [Relation; 4] = [
        Relation::LeftOf,
        Relation::RightOf,
        Relation::Above,
        Relation::Below,
    ];

    /// GenEval's words for it.
    pub fn name(self) -> &'static str {
        ["left of", "right of", "above", "below"][self as usize]
    }

    /// The relation of `a` to `b` when one is clear: by GenEval's measure (offset of the centres,
    /// less a tenth of both sizes, over its length) at least 0.6 along one axis and below GenEval's
    /// own 0.5 along the other, so that only one relation holds and with some room.
    pub fn between(a: &Object, b: &Object) -> Option<Relation> {
        let offset = [a.cx - b.cx, a.cy - b.cy];
        let norm = offset[0].hypot(offset[1]);
        let (ha, hb) = (a.half_extents(), b.half_extents());
        let part = |i: usize| {
            (offset[i].abs() - 0.1 * 2.0 * (ha[i] + hb[i])).max(0.0) / norm.max(f32::MIN_POSITIVE)
        };
        let (x, y) = (part(0), part(1));
        if x >= 0.6 && y < 0.5 {
            Some(if offset[0] < 0.0 {
                Relation::LeftOf
            } else {
                Relation::RightOf
            })
        } else if y >= 0.6 && x < 0.5 {
            Some(if offset[1] < 0.0 {
                Relation::Above
            } else {
                Relation::Below
            })
        } else {
            None
        }
    }

    fn phrases(self) -> &'static [&'static str] {
        match self {
            Relation::LeftOf => &["left of", "to the left of"],
            Relation::RightOf => &["right of", "to the right of"],
            Relation::Above => &["above", "over"],
            Relation::Below => &["below", "under"],
        }
    }
}

/// Some objects of one class, and of one colour if that is mentioned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Group {
    /// How many, 1 to 4.
    pub count: usize,
    /// Their colour, if the caption says it.
    pub colour: Option<Colour>,
    /// Their class.
    pub class: Class,
}

impl Group {
    fn fits(&self, object: &Object) -> bool {
        self.class == object.class && self.colour.is_none_or(|c| c == object.colour)
    }
}

/// What a caption says.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Facts {
    /// Every object of the picture, in the order of mention.
    pub groups: Vec<Group>,
    /// How the first group (one object) stands to the second (one object).
    pub relation: Option<Relation>,
    /// How bright the background is.
    pub background: Option<Brightness>,
}

const NUMBERS: [&str; 3] = ["two", "three", "four"];
const PICTURES: [&str; 2] = ["a picture of ", "an image of "];

impl Facts {
    /// Words the facts, choosing among the paraphrases. About half the captions are the plainest
    /// form, which is what people type.
    pub fn word<R: Rng + ?Sized>(&self, rng: &mut R) -> String {
        let single = self.groups.len() == 1 && self.groups[0].count == 1;
        let plain = if single { 0.4 } else { 0.65 };
        let (mut prefix, mut one) = ("", One::Article);
        if !rng.random_bool(plain) {
            let singular = self.groups.first().is_some_and(|g| g.count == 1);
            match rng.random_range(0..5) {
                0 | 1 => prefix = pick(rng, &PICTURES),
                2 => prefix = if singular { "there is " } else { "there are " },
                _ if single => one = pick(rng, &[One::Number, One::Single]),
                3 => one = One::Number,
                _ => prefix = pick(rng, &PICTURES),
            }
        }
        let phrases: Vec<String> = self.groups.iter().map(|g| phrase(g, one)).collect();
        let mut text = prefix.to_owned();
        match (self.relation, &phrases[..]) {
            (Some(relation), [a, b, ..]) => {
                let plain = rng.random_bool(0.8);
                let words = relation.phrases()[if plain { 0 } else { 1 }];
                text += &format!("{a} {words} {b}");
            }
            (_, [a, b]) => {
                let joint = if rng.random_bool(0.9) { "and" } else { "with" };
                text += &format!("{a} {joint} {b}");
            }
            (_, [first @ .., last]) if !first.is_empty() => {
                text += &format!("{} and {last}", first.join(", "));
            }
            _ => text += &phrases.concat(),
        }
        match self.background {
            Some(Brightness::Light) => text += " on a light background",
            Some(Brightness::Dark) => text += " on a dark background",
            None => {}
        }
        text
    }

    /// Reads a caption of the grammar; `None` when it is not one.
    pub fn parse(text: &str) -> Option<Facts> {
        let (text, background) = if let Some(t) = text.strip_suffix(" on a light background") {
            (t, Some(Brightness::Light))
        } else if let Some(t) = text.strip_suffix(" on a dark background") {
            (t, Some(Brightness::Dark))
        } else {
            (text, None)
        };
        let text = ["there is ", "there are "]
            .iter()
            .chain(&PICTURES)
            .find_map(|p| text.strip_prefix(p))
            .unwrap_or(text);
        for relation in Relation::ALL {
            // The longer paraphrase contains the shorter one, so it is tried first.
            for words in relation.phrases().iter().rev() {
                if let Some((a, b)) = text.split_once(&format!(" {words} ")) {
                    let groups = vec![parse_phrase(a)?, parse_phrase(b)?];
                    let ones = groups.iter().all(|g| g.count == 1);
                    return ones.then_some(Facts {
                        groups,
                        relation: Some(relation),
                        background,
                    });
                }
            }
        }
        let groups: Vec<Group> = text
            .split(", ")
            .flat_map(|t| t.split(" and "))
            .flat_map(|t| t.split(" with "))
            .map(parse_phrase)
            .collect::<Option<_>>()?;
        Some(Facts {
            groups,
            relation: None,
            background,
        })
    }

    /// Whether the facts are true of the scene and account for each of its objects.
    pub fn describes(&self, scene: &Scene) -> bool {
        let total: usize = self.groups.iter().map(|g| g.count).sum();
        if total != scene.objects.len()
            || self
                .background
                .is_some_and(|b| scene.background.brightness() != Some(b))
        {
            return false;
        }
        let slots: Vec<&Group> = self
            .groups
            .iter()
            .flat_map(|g| std::iter::repeat_n(g, g.count))
            .collect();
        let mut order = Vec::with_capacity(total);
        self.assign(&slots, scene, &mut order)
    }

    /// Tries every assignment of objects to mentions; at most 4! of them.
    fn assign(&self, slots: &[&Group], scene: &Scene, order: &mut Vec<usize>) -> bool {
        if order.len() == slots.len() {
            return match (self.relation, &order[..]) {
                (None, _) => true,
                (Some(r), &[a, b, ..]) => {
                    Relation::between(&scene.objects[a], &scene.objects[b]) == Some(r)
                }
                (Some(_), _) => false,
            };
        }
        (0..scene.objects.len()).any(|i| {
            if order.contains(&i) || !slots[order.len()].fits(&scene.objects[i]) {
                return false;
            }
            order.push(i);
            let ok = self.assign(slots, scene, order);
            order.pop();
            ok
        })
    }

    /// Chooses what to say about a scene: always every object, the rest by chance.
    pub fn about<R: Rng + ?Sized>(scene: &Scene, rng: &mut R) -> Facts {
        let colours = rng.random_bool(0.6);
        let mut groups: Vec<Group> = Vec::new();
        let mut first = Vec::new();
        for (i, object) in scene.objects.iter().enumerate() {
            let colour = colours.then_some(object.colour);
            match groups
                .iter_mut()
                .find(|g| g.class == object.class && g.colour == colour)
            {
                Some(group) => group.count += 1,
                None => {
                    groups.push(Group {
                        count: 1,
                        colour,
                        class: object.class,
                    });
                    first.push(i);
                }
            }
        }
        let mut order: Vec<usize> = (0..groups.len()).collect();
        order.shuffle(rng);
        let groups: Vec<Group> = order.iter().map(|&i| groups[i]).collect();
        let relation = match (&groups[..], &order[..]) {
            ([a, b], &[i, j]) if a.count == 1 && b.count == 1 && rng.random_bool(0.5) => {
                Relation::between(&scene.objects[first[i]], &scene.objects[first[j]])
            }
            _ => None,
        };
        let background = if rng.random_bool(0.2) {
            scene.background.brightness()
        } else {
            None
        };
        Facts {
            groups,
            relation,
            background,
        }
    }
}

/// A true caption of the scene, in lower case.
pub fn caption<R: Rng + ?Sized>(scene: &Scene, rng: &mut R) -> String {
    Facts::about(scene, rng).word(rng)
}

/// How a caption speaks of one object.
#[derive(Clone, Copy)]
enum One {
    Article,
    Number,
    Single,
}

fn phrase(group: &Group, one: One) -> String {
    let colour = group.colour.map(|c| format!("{c} ")).unwrap_or_default();
    if group.count > 1 {
        let number = NUMBERS[(group.count - 2).min(NUMBERS.len() - 1)];
        return format!("{number} {colour}{}", group.class.plural());
    }
    let thing = format!("{colour}{}", group.class);
    match one {
        One::Article if thing.starts_with(['a', 'e', 'i', 'o', 'u']) => format!("an {thing}"),
        One::Article => format!("a {thing}"),
        One::Number => format!("one {thing}"),
        One::Single => format!("a single {thing}"),
    }
}

fn parse_phrase(text: &str) -> Option<Group> {
    let (count, rest) = if let Some(i) = NUMBERS
        .iter()
        .position(|n| text.strip_prefix(n).is_some_and(|t| t.starts_with(' ')))
    {
        (i + 2, &text[NUMBERS[i].len() + 1..])
    } else {
        let rest = ["a single ", "one ", "an ", "a "]
            .iter()
            .find_map(|p| text.strip_prefix(p))?;
        (1, rest)
    };
    let (colour, noun) = match rest.split_once(' ') {
        Some((colour, noun)) => (Some(colour.parse().ok()?), noun),
        None => (None, rest),
    };
    let class = Class::ALL
        .into_iter()
        .find(|c| noun == if count == 1 { c.name() } else { c.plural() })?;
    Some(Group {
        count,
        colour,
        class,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    #[test]
    fn captions_are_true_lower_case_and_understood() {
        let mut rng = StdRng::seed_from_u64(11);
        for _ in 0..3000 {
            let scene = Scene::sample(&mut rng);
            let text = caption(&scene, &mut rng);
            assert!(
                text.chars()
                    .all(|c| c.is_ascii_lowercase() || c == ' ' || c == ','),
                "{text}"
            );
            let facts = Facts::parse(&text).unwrap_or_else(|| panic!("not parsed: {text}"));
            assert!(facts.describes(&scene), "{text}: {scene:?}");
        }
    }

    #[test]
    fn wording_and_parsing_are_inverse() {
        let mut rng = StdRng::seed_from_u64(12);
        for _ in 0..2000 {
            let facts = Facts::about(&Scene::sample(&mut rng), &mut rng);
            let text = facts.word(&mut rng);
            assert_eq!(Facts::parse(&text).as_ref(), Some(&facts), "{text}");
        }
    }

    #[test]
    fn false_captions_are_told_apart() {
        let mut rng = StdRng::seed_from_u64(13);
        let kind = |class, colour| super::super::Kind { class, colour };
        let scene = Scene::with_kinds(
            &mut rng,
            &[
                kind(Class::Circle, Colour::Red),
                kind(Class::Star, Colour::Blue),
            ],
            Some(Brightness::Dark),
            Some(Relation::LeftOf),
        );
        let says = |text: &str| Facts::parse(text).unwrap().describes(&scene);
        assert!(says("a circle and a star"));
        assert!(says(
            "a red circle to the left of a blue star on a dark background"
        ));
        assert!(says("there is a star right of a circle"));
        assert!(!says("a circle right of a star"));
        assert!(!says("a circle above a star"));
        assert!(!says("a blue circle and a red star"));
        assert!(!says("a circle"));
        assert!(!says("two circles"));
        assert!(!says("a circle and a star on a light background"));
        assert_eq!(Facts::parse("a dog and a cat"), None);
        assert_eq!(Facts::parse("two circles left of a star"), None);
    }

    #[test]
    fn every_bench_prompt_is_a_form_of_the_grammar() {
        let mut count = 0;
        for line in super::super::BENCH_JSONL
            .lines()
            .filter(|l| !l.trim().is_empty())
        {
            let entry: serde_json::Value = serde_json::from_str(line).unwrap();
            let prompt = entry["prompt"].as_str().unwrap();
            let facts = Facts::parse(prompt).unwrap_or_else(|| panic!("not parsed: {prompt}"));
            // The facts say what the metadata asks: the same classes, counts and colours
            // (a counting prompt's colour is not asked for), and the same relation.
            let include = entry["include"].as_array().unwrap();
            assert_eq!(include.len(), facts.groups.len(), "{prompt}");
            for clause in include {
                let class: Class = clause["class"].as_str().unwrap().parse().unwrap();
                let group = facts.groups.iter().find(|g| g.class == class).unwrap();
                assert_eq!(
                    clause["count"].as_u64().unwrap() as usize,
                    group.count,
                    "{prompt}"
                );
                if let Some(colour) = clause["color"].as_str() {
                    assert_eq!(group.colour, Some(colour.parse().unwrap()), "{prompt}");
                }
                if let Some(position) = clause["position"][0].as_str() {
                    assert_eq!(
                        facts.relation.map(Relation::name),
                        Some(position),
                        "{prompt}"
                    );
                    assert_eq!(facts.groups[0].class, class, "{prompt}");
                }
            }
            // And the grammar can say it: some paraphrase is the prompt itself.
            let mut rng = StdRng::seed_from_u64(14);
            assert!((0..400).any(|_| facts.word(&mut rng) == prompt), "{prompt}");
            count += 1;
        }
        assert_eq!(count, 240);
    }
}
