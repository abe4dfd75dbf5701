//! Training pairs: a scene and a caption that names everything in it, spread over GenEval's six
//! tasks and some longer captions.

use rand::Rng;
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};

use super::caption::{Facts, Group, Relation};
use super::scene::{Brightness, Kind, Scene, pick};
use super::{Class, Colour};

/// What a caption exercises: GenEval's six tasks, and captions longer than any of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum Task {
    SingleObject,
    TwoObject,
    Counting,
    Colors,
    Position,
    ColorAttr,
    Longer,
}

impl Task {
    /// Every task.
    pub const ALL: [Task; 7] = [
        Task::SingleObject,
        Task::TwoObject,
        Task::Counting,
        Task::Colors,
        Task::Position,
        Task::ColorAttr,
        Task::Longer,
    ];

    /// GenEval's tag ("longer" for the captions GenEval does not have).
    pub fn tag(self) -> &'static str {
        [
            "single_object",
            "two_object",
            "counting",
            "colors",
            "position",
            "color_attr",
            "longer",
        ][self as usize]
    }
}

/// Relative frequency of each task, in the order of [`Task::ALL`].
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct TaskMix(pub [f32; 7]);

impl Default for TaskMix {
    /// More weight where more must be learnt (counts, places, which colour goes where).
    fn default() -> Self {
        TaskMix([0.10, 0.12, 0.18, 0.14, 0.18, 0.18, 0.10])
    }
}

impl TaskMix {
    fn draw<R: Rng + ?Sized>(&self, rng: &mut R) -> Task {
        let weight = |i: usize| {
            if self.0[i].is_finite() {
                self.0[i].max(0.0)
            } else {
                0.0
            }
        };
        let total: f32 = (0..7).map(weight).sum();
        let mut at = rng.random::<f32>() * total;
        for (i, task) in Task::ALL.into_iter().enumerate() {
            at -= weight(i);
            if at < 0.0 {
                return task;
            }
        }
        // All weights zero (or rounding at the very end): any task.
        pick(rng, &Task::ALL)
    }
}

/// One training pair.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Example {
    /// What the picture shows; [`render`](super::render()) paints it.
    pub scene: Scene,
    /// What is said about it: true, and naming every object.
    pub caption: String,
    /// What the caption exercises.
    pub task: Task,
}

impl Example {
    /// The pair of this seed, the same on every machine: example `i` of a dataset without storing it.
    pub fn from_seed(seed: u64) -> Example {
        sample_example(&mut StdRng::seed_from_u64(seed))
    }
}

/// Draws a pair with the default mix of tasks.
pub fn sample_example<R: Rng + ?Sized>(rng: &mut R) -> Example {
    sample_example_with(rng, &TaskMix::default())
}

/// Draws a pair with a mix of tasks of the caller's.
pub fn sample_example_with<R: Rng + ?Sized>(rng: &mut R, mix: &TaskMix) -> Example {
    let task = mix.draw(rng);
    sample_task(rng, task)
}

/// Draws a pair of one task.
pub fn sample_task<R: Rng + ?Sized>(rng: &mut R, task: Task) -> Example {
    let plan = Plan::draw(rng, task);
    let Facts {
        background,
        relation,
        ..
    } = plan.facts;
    let scene = Scene::with_kinds(rng, &plan.kinds, background, relation);
    Example {
        caption: plan.facts.word(rng),
        scene,
        task,
    }
}

/// Captions without end, for language-model training: the words of [`sample_example`], without the
/// cost of placing objects.
pub fn captions(seed: u64) -> impl Iterator<Item = String> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mix = TaskMix::default();
    std::iter::repeat_with(move || {
        let task = mix.draw(&mut rng);
        Plan::draw(&mut rng, task).facts.word(&mut rng)
    })
}

/// Which objects to show (in the order of mention) and what to say about them.
struct Plan {
    kinds: Vec<Kind>,
    facts: Facts,
}

impl Plan {
    fn draw<R: Rng + ?Sized>(rng: &mut R, task: Task) -> Plan {
        let mut background = 0.08;
        let mut relation = None;
        let (kinds, groups) = match task {
            Task::SingleObject | Task::Colors => {
                if task == Task::SingleObject {
                    background = 0.25;
                }
                singles(&[Kind::sample(rng)], task == Task::Colors)
            }
            Task::TwoObject => singles(&two_classes(rng), false),
            Task::ColorAttr => {
                let mut kinds = two_classes(rng);
                if rng.random_bool(0.12) {
                    // "a red circle and a blue circle": colours that tell two of a class apart.
                    kinds[1].class = kinds[0].class;
                }
                different_colours(rng, &mut kinds);
                singles(&kinds, true)
            }
            Task::Position => {
                relation = Some(pick(rng, &Relation::ALL));
                let mut kinds = two_classes(rng);
                let colours = rng.random_bool(0.4);
                if colours && rng.random_bool(0.1) {
                    kinds[1].class = kinds[0].class;
                    different_colours(rng, &mut kinds);
                }
                singles(&kinds, colours)
            }
            Task::Counting => {
                let count = rng.random_range(2..=4);
                let class = pick(rng, &Class::ALL);
                let said = rng.random_bool(0.5);
                several(rng, class, count, said)
            }
            Task::Longer => {
                background = 0.3;
                longer(rng)
            }
        };
        let background = rng
            .random_bool(background)
            .then(|| pick(rng, &[Brightness::Light, Brightness::Dark]));
        Plan {
            kinds,
            facts: Facts {
                groups,
                relation,
                background,
            },
        }
    }
}

type Shown = (Vec<Kind>, Vec<Group>);

/// One group for each object.
fn singles(kinds: &[Kind], say_colours: bool) -> Shown {
    let group = |k: &Kind| Group {
        count: 1,
        colour: say_colours.then_some(k.colour),
        class: k.class,
    };
    (kinds.to_vec(), kinds.iter().map(group).collect())
}

/// `count` objects of one class. Where the colour is not said, they mostly share one all the same:
/// both are true, and a set of equal things is what people expect.
fn several<R: Rng + ?Sized>(rng: &mut R, class: Class, count: usize, say_colour: bool) -> Shown {
    let colour = pick(rng, &Colour::ALL);
    let shared = say_colour || rng.random_bool(0.7);
    let kinds = (0..count)
        .map(|_| Kind {
            class,
            colour: if shared {
                colour
            } else {
                pick(rng, &Colour::ALL)
            },
        })
        .collect();
    (
        kinds,
        vec![Group {
            count,
            colour: say_colour.then_some(colour),
            class,
        }],
    )
}

fn two_classes<R: Rng + ?Sized>(rng: &mut R) -> Vec<Kind> {
    some_classes(rng, 2)
}

/// `count` objects of different classes.
fn some_classes<R: Rng + ?Sized>(rng: &mut R, count: usize) -> Vec<Kind> {
    let mut classes = Class::ALL;
    classes.shuffle(rng);
    classes[..count]
        .iter()
        .map(|&class| Kind {
            class,
            colour: pick(rng, &Colour::ALL),
        })
        .collect()
}

fn different_colours<R: Rng + ?Sized>(rng: &mut R, kinds: &mut [Kind]) {
    let mut colours = Colour::ALL;
    colours.shuffle(rng);
    for (kind, colour) in kinds.iter_mut().zip(colours) {
        kind.colour = colour;
    }
}

/// Three different objects, or two groups of three or four objects together.
fn longer<R: Rng + ?Sized>(rng: &mut R) -> Shown {
    let say_colours = rng.random_bool(0.7);
    if rng.random_bool(0.6) {
        return singles(&some_classes(rng, 3), say_colours);
    }
    let (a, b) = pick(rng, &[(2, 1), (1, 2), (2, 2), (3, 1), (1, 3)]);
    let classes = two_classes(rng);
    let mut shown = several(rng, classes[0].class, a, say_colours);
    let (kinds, groups) = several(rng, classes[1].class, b, say_colours);
    shown.0.extend(kinds);
    shown.1.extend(groups);
    shown
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::{HashMap, HashSet};

    #[test]
    fn captions_name_everything_in_the_picture() {
        let mut rng = StdRng::seed_from_u64(21);
        for _ in 0..4000 {
            let e = sample_example(&mut rng);
            let facts =
                Facts::parse(&e.caption).unwrap_or_else(|| panic!("not parsed: {}", e.caption));
            assert!(facts.describes(&e.scene), "{e:?}");
            let counts: Vec<usize> = facts.groups.iter().map(|g| g.count).collect();
            let coloured = facts.groups.iter().filter(|g| g.colour.is_some()).count();
            match e.task {
                Task::SingleObject => assert_eq!((&counts[..], coloured), (&[1][..], 0)),
                Task::Colors => assert_eq!((&counts[..], coloured), (&[1][..], 1)),
                Task::TwoObject => assert_eq!((&counts[..], coloured), (&[1, 1][..], 0)),
                Task::ColorAttr => assert_eq!((&counts[..], coloured), (&[1, 1][..], 2)),
                Task::Position => assert!(counts == [1, 1] && facts.relation.is_some()),
                Task::Counting => assert!(counts.len() == 1 && (2..=4).contains(&counts[0])),
                Task::Longer => assert!((3..=4).contains(&counts.iter().sum::<usize>())),
            }
        }
    }

    #[test]
    fn the_mix_is_what_it_says() {
        let mut rng = StdRng::seed_from_u64(22);
        let mut seen: HashMap<Task, usize> = HashMap::new();
        for _ in 0..7000 {
            *seen.entry(TaskMix::default().draw(&mut rng)).or_default() += 1;
        }
        for (task, weight) in Task::ALL.iter().zip(TaskMix::default().0) {
            let share = seen[task] as f32 / 7000.0;
            assert!((share - weight).abs() < 0.02, "{task:?} {share} {weight}");
        }
        let only = TaskMix([0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]);
        assert!((0..50).all(|_| only.draw(&mut rng) == Task::Counting));
    }

    #[test]
    fn a_seed_is_one_example() {
        assert_eq!(Example::from_seed(5), Example::from_seed(5));
        assert_ne!(Example::from_seed(5).scene, Example::from_seed(6).scene);
        let different: HashSet<String> = captions(1).take(2000).collect();
        assert!(different.len() > 1000, "{}", different.len());
        assert!(captions(1).take(500).all(|c| Facts::parse(&c).is_some()));
    }
}
