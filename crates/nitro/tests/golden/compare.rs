//! Comparing and reporting.

/// One comparison.
struct Row {
    name: String,
    error: f64,
    tolerance: f64,
    note: String,
}

impl Row {
    fn ok(&self) -> bool {
        self.error <= self.tolerance // false for NaN
    }
}

/// All comparisons of a case.
#[derive(Default)]
pub(crate) struct Report {
    rows: Vec<Row>,
}

impl Report {
    /// Compares by relative L2 error.
    pub(crate) fn close(&mut self, name: &str, found: &[f32], expected: &[f32], tolerance: f64) {
        if found.len() != expected.len() {
            let what = format!("{} elements, expected {}", found.len(), expected.len());
            return self.failure(name, what);
        }
        self.at_most(name, rel_l2(found, expected), tolerance);
    }

    /// Compares a measured error with what is tolerated.
    pub(crate) fn at_most(&mut self, name: &str, error: f64, tolerance: f64) {
        self.rows.push(Row {
            name: name.to_owned(),
            error,
            tolerance,
            note: String::new(),
        });
    }

    /// Compares for equality.
    pub(crate) fn equal<T: PartialEq + std::fmt::Debug>(
        &mut self,
        name: &str,
        found: &T,
        expected: &T,
    ) {
        if found == expected {
            self.at_most(name, 0.0, 0.0);
        } else {
            let mut what = format!("found {found:?}, expected {expected:?}");
            if let Some((end, _)) = what.char_indices().nth(300) {
                what.replace_range(end.., " ...");
            }
            self.failure(name, what);
        }
    }

    /// A comparison that cannot be made or was lost.
    pub(crate) fn failure(&mut self, name: &str, note: String) {
        let name = name.to_owned();
        self.rows.push(Row {
            name,
            error: f64::INFINITY,
            tolerance: 0.0,
            note,
        });
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    pub(crate) fn failures(&self) -> usize {
        self.rows.iter().filter(|row| !row.ok()).count()
    }

    pub(crate) fn print(&self) {
        for row in &self.rows {
            let Row {
                name,
                error,
                tolerance,
                note,
            } = row;
            let verdict = if row.ok() { "ok" } else { "FAILED" };
            println!("  {name:58} {error:9.2e}  <= {tolerance:7.1e}  {verdict} {note}");
        }
    }

    /// One line: how many comparisons, how many failed, and the worst.
    pub(crate) fn summary(&self) -> String {
        let share = |row: &&Row| {
            if row.tolerance > 0.0 {
                row.error / row.tolerance
            } else {
                0.0
            }
        };
        let worst = self
            .rows
            .iter()
            .max_by(|a, b| share(a).total_cmp(&share(b)));
        let worst = worst.map_or(String::new(), |row| {
            format!(
                "worst {:.1e} of {:.0e} ({})",
                row.error, row.tolerance, row.name
            )
        });
        format!(
            "{:4} compared, {} failed, {worst}",
            self.rows.len(),
            self.failures()
        )
    }
}

/// `|found - expected| / |expected|`, and `|found|` where nothing is expected.
pub(crate) fn rel_l2(found: &[f32], expected: &[f32]) -> f64 {
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let error = norm(
        &mut found
            .iter()
            .zip(expected)
            .map(|(&a, &b)| f64::from(a) - f64::from(b)),
    );
    let size = norm(&mut expected.iter().map(|&x| f64::from(x)));
    if size == 0.0 { error } else { error / size }
}
