//! Several workers' Prometheus texts as one: families kept together, each sample labelled with its worker.

use std::collections::HashMap;
use std::fmt::Write;

/// The label that says which worker a sample is from, as `sglang-router` names it.
const LABEL: &str = "worker_addr";

/// Families in order of first appearance.
#[derive(Debug, Default)]
pub(super) struct Merge {
    families: Vec<Family>,
    by_name: HashMap<String, usize>,
}

#[derive(Debug, Default)]
struct Family {
    /// `# HELP` and `# TYPE` lines of the first worker that has them.
    comments: Vec<String>,
    samples: Vec<String>,
}

impl Merge {
    pub(super) fn add(&mut self, worker: &str, text: &str) {
        let mut current = None;
        for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
            if let Some(comment) = line.strip_prefix('#') {
                let mut words = comment.split_ascii_whitespace();
                if let (Some("HELP" | "TYPE"), Some(name)) = (words.next(), words.next()) {
                    let family = self.family(name);
                    let comments = &mut self.families[family].comments;
                    if !comments.iter().any(|known| same_kind(known, line)) {
                        comments.push(line.to_owned());
                    }
                    current = Some((name.to_owned(), family));
                }
                continue;
            }
            let Some(sample) = labelled(line, worker) else {
                continue;
            };
            let name = &line[..line.find(['{', ' ', '\t']).unwrap_or(line.len())];
            // `x_bucket`, `x_sum`, `x_count` and `x_total` belong to the family `x` they follow.
            let family = match &current {
                Some((family_name, family)) if name.starts_with(family_name.as_str()) => *family,
                _ => self.family(name),
            };
            self.families[family].samples.push(sample);
        }
    }

    pub(super) fn render(&self) -> String {
        let mut text = String::new();
        for line in
            self.families.iter().flat_map(|family| family.comments.iter().chain(&family.samples))
        {
            // Writing into a String does not fail.
            let _ = writeln!(text, "{line}");
        }
        text
    }

    fn family(&mut self, name: &str) -> usize {
        if let Some(index) = self.by_name.get(name) {
            return *index;
        }
        self.families.push(Family::default());
        self.by_name.insert(name.to_owned(), self.families.len() - 1);
        self.families.len() - 1
    }
}

/// Whether both lines are HELP, or both TYPE.
fn same_kind(one: &str, other: &str) -> bool {
    one.split_ascii_whitespace().nth(1) == other.split_ascii_whitespace().nth(1)
}

/// A sample line with the worker's label in front of its own; None where the line is no sample.
fn labelled(line: &str, worker: &str) -> Option<String> {
    let worker = worker.replace('\\', r"\\").replace('"', "\\\"");
    let name_ends = line.find(['{', ' ', '\t'])?;
    let (name, rest) = line.split_at(name_ends);
    match rest.strip_prefix('{') {
        Some(labels) if labels.trim_start().starts_with('}') => {
            Some(format!("{name}{{{LABEL}=\"{worker}\"{labels}"))
        }
        Some(labels) => Some(format!("{name}{{{LABEL}=\"{worker}\",{labels}")),
        None => Some(format!("{name}{{{LABEL}=\"{worker}\"}}{rest}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_stay_together_and_samples_say_their_worker() {
        let mut merge = Merge::default();
        let text = "# HELP a_b Help\n# TYPE a_b histogram\na_b_bucket{le=\"1\"} 2\na_b_sum 3\n\n# TYPE c gauge\nc{} 4\n";
        merge.add("http://x:1", text);
        merge.add("http://y:2", text);
        let merged = merge.render();
        let expected = "# HELP a_b Help\n# TYPE a_b histogram\n\
            a_b_bucket{worker_addr=\"http://x:1\",le=\"1\"} 2\na_b_sum{worker_addr=\"http://x:1\"} 3\n\
            a_b_bucket{worker_addr=\"http://y:2\",le=\"1\"} 2\na_b_sum{worker_addr=\"http://y:2\"} 3\n\
            # TYPE c gauge\nc{worker_addr=\"http://x:1\"} 4\nc{worker_addr=\"http://y:2\"} 4\n";
        assert_eq!(merged, expected);
    }

    #[test]
    fn what_is_no_sample_is_left_out() {
        let mut merge = Merge::default();
        merge.add("w", "garbage\n# EOF\n#\n");
        assert_eq!(merge.render(), "");
    }
}
