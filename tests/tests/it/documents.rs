//! What documents say is there.

use std::fs;
use std::path::Path;

use crate::support::repository;

/// All source below a folder, as one text.
fn source(folder: &Path, text: &mut String) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let kind = path.extension().and_then(|kind| kind.to_str());
        if path.is_dir() {
            source(&path, text);
        } else if matches!(kind, Some("rs" | "py")) {
            text.push_str(&fs::read_to_string(path).unwrap());
        }
    }
}

#[test]
fn the_tests_that_security_md_names_are_there() {
    let root = repository();
    let mut all = String::new();
    for folder in ["host-demo/src", "plugin", "tests"] {
        source(&root.join(folder), &mut all);
    }
    let document = fs::read_to_string(root.join("SECURITY.md")).unwrap();
    let (_, table) = document.split_once("| tests |").unwrap();
    let names: Vec<&str> = table
        .split("\n## ")
        .next()
        .unwrap()
        .split('`')
        .skip(1)
        .step_by(2)
        .filter(|name| name.contains('_') && !name.contains(['/', '.']))
        .collect();
    assert!(names.len() > 15, "{names:?}");
    for name in names {
        let is_there = all.contains(&format!("fn {name}("))
            || all.contains(&format!("def {name}("))
            || fuzz::target(name).is_some()
            || all.contains(&format!("mod {name};"));
        assert!(is_there, "SECURITY.md names {name}");
    }
}
