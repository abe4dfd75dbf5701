//! More prompts than the bench has, from the same grammar: to train on, and to check that a score on
//! the bench is no accident of its 240 prompts.

use std::collections::HashSet;
use std::sync::OnceLock;

use nitro_data::shapes::{Example, Facts, Task};
use serde_json::{Value, json};

use super::{BenchPrompt, shapes_bench};
use crate::geneval::Metadata;

/// GenEval's tasks, in the order of its papers' tables.
pub const TASKS: [Task; 6] = [
    Task::SingleObject,
    Task::TwoObject,
    Task::Counting,
    Task::Colors,
    Task::Position,
    Task::ColorAttr,
];

/// One caption in eight is never trained on after the first training.
const HELD_OUT: u64 = 8;

/// The prompt of a caption with what GenEval's rules need to judge it, or nothing if the rules
/// cannot: they cannot tell two groups of one class apart.
pub fn metadata_of(caption: &str, task: Task) -> Option<Metadata> {
    let facts = Facts::parse(caption)?;
    let classes: HashSet<_> = facts.groups.iter().map(|g| g.class).collect();
    if classes.len() < facts.groups.len() {
        return None;
    }
    let clause = |i: usize| -> Value {
        let group = &facts.groups[i];
        let mut clause = json!({ "class": group.class.name(), "count": group.count });
        // As the bench: where counting is asked for, counts decide.
        if let Some(colour) = group.colour.filter(|_| task != Task::Counting) {
            clause["color"] = colour.name().into();
        }
        clause
    };
    let include: Vec<Value> = match facts.relation {
        // The first group stands in a relation to the second: the target comes first.
        Some(relation) if facts.groups.len() == 2 => {
            let mut placed = clause(0);
            placed["position"] = json!([relation.name(), 0]);
            vec![clause(1), placed]
        }
        _ => (0..facts.groups.len()).map(clause).collect(),
    };
    let mut line = json!({ "tag": task.tag(), "include": include });
    if task == Task::Counting {
        let more = facts.groups.iter();
        let more = more.map(|g| json!({ "class": g.class.name(), "count": g.count + 1 }));
        line["exclude"] = more.collect();
    }
    line["prompt"] = caption.into();
    Metadata::parse(&line.to_string(), "the grammar").ok()
}

/// Whether a caption is kept for evaluation: it is a prompt of the bench, or falls among one in
/// eight by its hash (FNV-1a).
pub fn is_held_out(caption: &str) -> bool {
    static BENCH: OnceLock<HashSet<String>> = OnceLock::new();
    let bench = BENCH.get_or_init(|| {
        let prompts = shapes_bench().into_iter();
        prompts.map(|p| p.metadata.prompt).collect()
    });
    let hash = caption
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
    (hash >> 32) % HELD_OUT == 0 || bench.contains(caption)
}

/// A prompt of `task` that is not held out: a function of its arguments.
pub fn training_prompt(task: Task, seed: u64) -> Metadata {
    draw(task, seed, |caption| !is_held_out(caption))
}

/// 240 prompts of the grammar, 40 for each task, none of which is in the bench or trained on.
///
/// The grammar has few ways to name a single object, so prompts of that task may repeat.
pub fn held_out_bench() -> Vec<BenchPrompt> {
    let bench: HashSet<String> = shapes_bench()
        .into_iter()
        .map(|p| p.metadata.prompt)
        .collect();
    let mut seen = HashSet::new();
    let mut prompts = Vec::new();
    for task in TASKS {
        for i in 0..40 {
            let mut metadata = None;
            // New captions while there are any to be found soon.
            for attempt in 0..40 {
                let seed = 0x0E1D_0000 + i * 64 + attempt;
                let drawn = draw(task, seed, |c| is_held_out(c) && !bench.contains(c));
                let new = seen.insert(drawn.prompt.clone());
                metadata = Some(drawn);
                if new {
                    break;
                }
            }
            prompts.extend(metadata.map(|metadata| BenchPrompt {
                index: prompts.len(),
                metadata,
            }));
        }
    }
    prompts
}

/// The first caption of `task` that `accept` takes, in the examples that follow from `seed`.
fn draw(task: Task, seed: u64, accept: impl Fn(&str) -> bool) -> Metadata {
    let start = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (task as u64) << 56;
    (0..)
        .map(|i| Example::from_seed(start.wrapping_add(i)))
        .filter(|example| example.task == task && accept(&example.caption))
        .find_map(|example| metadata_of(&example.caption, task))
        .expect("the grammar is without end")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metadata_are_those_of_the_bench() {
        for prompt in shapes_bench() {
            let tag = prompt.metadata.tag.as_str();
            let task = TASKS.into_iter().find(|t| t.tag() == tag).unwrap();
            let ours = metadata_of(prompt.prompt(), task).unwrap();
            assert_eq!(ours.include, prompt.metadata.include, "{}", prompt.prompt());
            assert_eq!(ours.exclude, prompt.metadata.exclude);
            assert!(is_held_out(prompt.prompt()));
        }
    }

    #[test]
    fn prompts_to_train_on_and_to_check_with_do_not_meet() {
        let bench: HashSet<String> = shapes_bench()
            .into_iter()
            .map(|p| p.metadata.prompt)
            .collect();
        let held_out = held_out_bench();
        assert_eq!(held_out.len(), 240);
        for task in TASKS {
            let of = held_out.iter().filter(|p| p.metadata.tag == task.tag());
            assert_eq!(of.count(), 40);
        }
        let held_out: HashSet<_> = held_out.iter().map(|p| p.prompt().to_owned()).collect();
        assert!(held_out.len() > 180, "{} different prompts", held_out.len());
        assert!(held_out.is_disjoint(&bench));
        for i in 0..600 {
            let prompt = training_prompt(TASKS[i as usize % 6], 1000 + i).prompt;
            assert!(
                !bench.contains(&prompt) && !held_out.contains(&prompt),
                "{prompt}"
            );
        }
        let again = || training_prompt(Task::Colors, 5);
        assert_eq!(again(), again());
        assert_eq!(again().tag, "colors");
    }

    #[test]
    fn what_the_rules_cannot_judge_is_left_out() {
        assert!(metadata_of("a red circle and a blue circle", Task::ColorAttr).is_none());
        let m = metadata_of("a star to the left of a red ring", Task::Position).unwrap();
        assert_eq!(m.include[0].class, "ring");
        assert_eq!(m.include[1].position, Some(("left of".to_owned(), 0)));
    }
}
