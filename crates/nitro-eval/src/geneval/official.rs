//! GenEval's own prompts and class names (djghosh13/geneval, MIT licence).

use super::{Metadata, read_metadata};

/// `prompts/evaluation_metadata.jsonl`.
const PROMPTS: &str = include_str!("../../data/geneval_prompts.jsonl");
/// `evaluation/object_names.txt`: the detector's classes, in its order.
const OBJECTS: &str = include_str!("../../data/geneval_objects.txt");

/// Pictures of each prompt in GenEval's own runs.
pub const SAMPLES: usize = 4;
/// The seed of GenEval's own scripts.
pub const SEED: u64 = 42;

/// The 553 prompts.
pub fn prompts() -> Vec<Metadata> {
    read_metadata(PROMPTS, "GenEval's prompts (built in)")
        .expect("the built-in prompts are read by this crate's tests")
}

/// The names by which prompts call the detector's 80 classes.
pub fn objects() -> Vec<&'static str> {
    OBJECTS.lines().map(str::trim).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_prompt_asks_for_known_classes_and_colours() {
        let (prompts, objects) = (prompts(), objects());
        assert_eq!((prompts.len(), objects.len()), (553, 80));
        for clause in prompts
            .iter()
            .flat_map(|p| p.include.iter().chain(&p.exclude))
        {
            assert!(objects.contains(&clause.class.as_str()), "{}", clause.class);
            let colour = clause.color.as_deref();
            assert!(colour.is_none_or(|c| crate::geneval::COLORS.contains(&c)));
        }
    }
}
