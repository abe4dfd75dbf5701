//! Evaluation: GenEval's rules, result layouts, and the shapes bench.
