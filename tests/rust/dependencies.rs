//! Modules depend on each other in one direction only.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// What each module may use of the others, from the leaves up. A module stands below all that use it.
const ALLOWED: &[(&str, &[&str])] = &[
    ("error", &[]),
    ("json", &[]),
    ("prefetch", &[]),
    ("routing", &["prefetch"]),
    ("sim", &[]),
    ("replay", &["routing", "sim"]),
    ("request", &["json"]),
    ("upstream", &["error", "json"]),
    ("telemetry", &[]),
    ("tracking", &["prefetch", "routing"]),
    ("workers", &["routing", "upstream"]),
    ("server", &["error", "request", "routing", "telemetry", "tracking", "upstream", "workers"]),
    ("options", &["routing", "server", "telemetry", "tracking", "upstream", "workers"]),
    ("running", &["options", "routing", "server", "telemetry", "tracking", "upstream", "workers"]),
    ("simulation", &["options", "routing", "running", "server", "upstream", "workers"]),
    ("cli", &["options", "replay", "routing", "running", "sim"]),
    (
        "python",
        &["cli", "error", "options", "routing", "running", "server", "telemetry", "tracking"],
    ),
];

#[test]
fn dependencies_point_one_way() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("rust");
    let mut found = BTreeSet::new();
    for path in sources(&root) {
        let module = module_of(&root, &path);
        let text = fs::read_to_string(&path).expect("a readable source");
        found.extend(used(&text).into_iter().map(|used| (module.clone(), used)));
    }
    assert!(found.len() > 10, "the sources were not understood: {found:?}");
    for (module, used) in &found {
        if module == used || ["lib", "main"].contains(&module.as_str()) {
            continue;
        }
        let allowed = ALLOWED.iter().find(|(name, _)| name == module);
        let (_, allowed) = allowed.unwrap_or_else(|| panic!("{module} is not in the table"));
        assert!(allowed.contains(&used.as_str()), "{module} uses {used}, which it may not");
    }
}

#[test]
fn the_table_is_one_way() {
    for (place, (module, allowed)) in ALLOWED.iter().enumerate() {
        for used in *allowed {
            let is_below = ALLOWED[..place].iter().any(|(name, _)| name == used);
            assert!(is_below, "{module} stands below {used}");
        }
    }
}

fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut sources = Vec::new();
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            sources.extend(self::sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            sources.push(path);
        }
    }
    sources
}

/// The top module that a source file belongs to.
fn module_of(root: &Path, path: &Path) -> String {
    let path = path.strip_prefix(root).expect("a source below the root").with_extension("");
    let first = path.components().next().expect("a name");
    first.as_os_str().to_string_lossy().into_owned()
}

/// The top modules that a source names after `crate::`.
fn used(text: &str) -> BTreeSet<String> {
    let mut used = BTreeSet::new();
    for line in text.lines().filter(|line| !line.trim_start().starts_with("//")) {
        for (place, _) in line.match_indices("crate::") {
            let rest = &line[place + "crate::".len()..];
            let names = match rest.strip_prefix('{') {
                Some(list) => list.split('}').next().unwrap_or_default().split(',').collect(),
                None => vec![rest],
            };
            let is_part = |letter: char| letter.is_ascii_alphanumeric() || letter == '_';
            used.extend(names.into_iter().filter_map(|name| {
                let name = name.trim().split(|letter| !is_part(letter)).next()?;
                (!name.is_empty()).then(|| name.to_owned())
            }));
        }
    }
    used
}
