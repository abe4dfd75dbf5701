use super::{COLORS, Clause, Metadata};
use crate::EvalError;

/// The thresholds of `evaluate_images.py --options`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Options {
    /// A detection counts above this confidence ...
    pub threshold: f32,
    /// ... or above this one when the tag is "counting".
    pub counting_threshold: f32,
    /// At most so many objects of a class.
    pub max_objects: usize,
    /// A box is dropped when it overlaps a better one of its class by this IoU; 1 drops none.
    pub max_overlap: f32,
    /// Share of both objects' sizes that an offset must exceed to count as one.
    pub position_threshold: f32,
}

impl Options {
    /// IoU from which on two boxes of a class are taken for the same object.
    const DUPLICATE: f32 = 0.9;

    /// GenEval's settings, but an object that the detector reports twice counts once. GenEval leaves
    /// duplicates in, and its detector does not suppress them either.
    pub fn without_duplicates() -> Self {
        Self {
            max_overlap: Self::DUPLICATE,
            ..Self::default()
        }
    }
}

impl Default for Options {
    fn default() -> Self {
        Options {
            threshold: 0.3,
            counting_threshold: 0.9,
            max_objects: 16,
            max_overlap: 1.0,
            position_threshold: 0.1,
        }
    }
}

/// What a detector found: for each class its boxes `[x0, y0, x1, y1, confidence]`, in the
/// detector's order.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Detections(pub Vec<(String, Vec<[f32; 5]>)>);

impl Detections {
    /// Adds one box; classes keep the order of their first box.
    pub fn push(&mut self, class: &str, scored: [f32; 5]) {
        match self.0.iter_mut().find(|(c, _)| c == class) {
            Some((_, boxes)) => boxes.push(scored),
            None => self.0.push((class.to_owned(), vec![scored])),
        }
    }
}

/// A box that survived the thresholds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Kept {
    /// Its place among the detector's boxes of its class.
    pub index: usize,
    /// `[x0, y0, x1, y1, confidence]`.
    pub scored: [f32; 5],
}

/// Whether a picture shows what it should, and if not, why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// All clauses hold.
    pub correct: bool,
    /// One line for each clause that does not.
    pub reason: String,
}

type KeptObjects = Vec<(String, Vec<Kept>)>;

/// The boxes that count for a prompt of this tag: best first, classes without any left out.
pub fn keep(detections: &Detections, tag: &str, options: &Options) -> KeptObjects {
    let threshold = if tag == "counting" {
        options.counting_threshold
    } else {
        options.threshold
    };
    let classes = detections.0.iter().map(|(class, boxes)| {
        let mut order: Vec<usize> = (0..boxes.len()).collect();
        // An ascending stable sort read backwards: among equals the later box comes first.
        order.sort_by(|&a, &b| boxes[a][4].total_cmp(&boxes[b][4]));
        order.reverse();
        order.retain(|&i| boxes[i][4] > threshold);
        order.truncate(options.max_objects);
        let mut kept: Vec<Kept> = Vec::new();
        for index in order {
            let scored = boxes[index];
            let free = options.max_overlap == 1.0
                || kept
                    .iter()
                    .all(|k| iou(&k.scored, &scored) < options.max_overlap);
            if free {
                kept.push(Kept { index, scored });
            }
        }
        (class.clone(), kept)
    });
    classes.filter(|(_, kept)| !kept.is_empty()).collect()
}

/// Intersection over union of pixel boxes whose last pixel belongs to them.
fn iou(a: &[f32; 5], b: &[f32; 5]) -> f32 {
    let area =
        |x0: f32, y0: f32, x1: f32, y1: f32| (x1 - x0 + 1.0).max(0.0) * (y1 - y0 + 1.0).max(0.0);
    let both = area(
        a[0].max(b[0]),
        a[1].max(b[1]),
        a[2].min(b[2]),
        a[3].min(b[3]),
    );
    let either = area(a[0], a[1], a[2], a[3]) + area(b[0], b[1], b[2], b[3]) - both;
    if either == 0.0 { 0.0 } else { both / either }
}

/// The relations of box `a` to box `b` that hold: none when they nearly coincide, two when `a`
/// stands diagonally.
pub fn relations(a: &[f32; 5], b: &[f32; 5], position_threshold: f32) -> Vec<&'static str> {
    let along = |i: usize| {
        let offset = (a[i] + a[i + 2]) / 2.0 - (b[i] + b[i + 2]) / 2.0;
        let sizes = (a[i + 2] - a[i]).abs() + (b[i + 2] - b[i]).abs();
        let revised = (offset.abs() - position_threshold * sizes).max(0.0);
        (offset, revised * offset.signum())
    };
    let ((x, rx), (y, ry)) = (along(0), along(1));
    let mut found = Vec::new();
    if rx.abs() < 1e-3 && ry.abs() < 1e-3 {
        return found;
    }
    let norm = (x * x + y * y).sqrt();
    let (dx, dy) = (rx / norm, ry / norm);
    if dx < -0.5 {
        found.push("left of");
    }
    if dx > 0.5 {
        found.push("right of");
    }
    if dy < -0.5 {
        found.push("above");
    }
    if dy > 0.5 {
        found.push("below");
    }
    found
}

/// Judges kept objects by the metadata. `colours(class, objects)` names the colour of each object
/// (a word of [`COLORS`]); it is asked only where a clause names a colour.
///
/// # Errors
/// When a position clause refers to a clause that does not come before it, or `colours` fails.
pub fn evaluate<C>(
    objects: &[(String, Vec<Kept>)],
    metadata: &Metadata,
    options: &Options,
    mut colours: C,
) -> Result<Verdict, EvalError>
where
    C: FnMut(&str, &[Kept]) -> Result<Vec<String>, EvalError>,
{
    let of = |class: &str| {
        objects
            .iter()
            .find(|(c, _)| c == class)
            .map_or(&[][..], |(_, kept)| kept.as_slice())
    };
    let mut reasons: Vec<String> = Vec::new();
    let mut groups: Vec<Option<&[Kept]>> = Vec::new();
    for clause in &metadata.include {
        let all = of(&clause.class);
        let found = &all[..all.len().min(clause.count)];
        let problem = if found.len() < clause.count {
            Some(format!(
                "expected {}>={}, found {}",
                clause.class,
                clause.count,
                found.len()
            ))
        } else {
            let colour = match &clause.color {
                Some(wanted) => wrong_colour(clause, wanted, &colours(&clause.class, found)?),
                None => None,
            };
            match (colour, &clause.position) {
                (Some(problem), _) => Some(problem),
                (None, None) => None,
                (None, Some((relation, target))) => {
                    let group = groups
                        .get(*target)
                        .ok_or_else(|| EvalError::PositionTarget {
                            prompt: metadata.prompt.clone(),
                            class: clause.class.clone(),
                            target: *target,
                            earlier: groups.len(),
                        })?;
                    misplaced(clause, relation, found, *group, options.position_threshold)
                }
            }
        };
        groups.push(problem.is_none().then_some(found));
        reasons.extend(problem);
    }
    for clause in &metadata.exclude {
        let found = of(&clause.class).len();
        if found >= clause.count {
            reasons.push(format!(
                "expected {}<{}, found {found}",
                clause.class, clause.count
            ));
        }
    }
    Ok(Verdict {
        correct: reasons.is_empty(),
        reason: reasons.join("\n"),
    })
}

fn wrong_colour(clause: &Clause, wanted: &str, seen: &[String]) -> Option<String> {
    let count = |colour: &str| seen.iter().filter(|s| *s == colour).count();
    let matching = count(wanted);
    if matching >= clause.count {
        return None;
    }
    let others: Vec<String> = COLORS
        .iter()
        .filter(|c| count(c) > 0)
        .map(|c| format!("{} {c}", count(c)))
        .collect();
    Some(format!(
        "expected {wanted} {}>={}, found {matching} {wanted}; and {}",
        clause.class,
        clause.count,
        others.join(", ")
    ))
}

fn misplaced(
    clause: &Clause,
    relation: &str,
    found: &[Kept],
    target: Option<&[Kept]>,
    threshold: f32,
) -> Option<String> {
    let class = &clause.class;
    let Some(target) = target else {
        return Some(format!("no target for {class} to be {relation}"));
    };
    found
        .iter()
        .flat_map(|a| target.iter().map(move |b| (a, b)))
        .find_map(|(a, b)| {
            let actual = relations(&a.scored, &b.scored, threshold);
            (!actual.contains(&relation)).then(|| {
                format!(
                    "expected {class} {relation} target, found {} target",
                    actual.join(" and ")
                )
            })
        })
}

/// [`keep`], then [`evaluate`].
///
/// # Errors
/// As [`evaluate`].
pub fn evaluate_image<C>(
    detections: &Detections,
    metadata: &Metadata,
    options: &Options,
    colours: C,
) -> Result<(Verdict, KeptObjects), EvalError>
where
    C: FnMut(&str, &[Kept]) -> Result<Vec<String>, EvalError>,
{
    let kept = keep(detections, &metadata.tag, options);
    let verdict = evaluate(&kept, metadata, options, colours)?;
    Ok((verdict, kept))
}
