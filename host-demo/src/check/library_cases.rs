//! Cases of a library as a whole.

use std::cmp::Ordering;
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use plugin_api::extension::{DEVICES, METADATA};
use plugin_api::{ErrorCode, NodeDescriptor, Widget, WidgetKind};

use super::subject::{Outcome, Subject, failed};

/// Most time that opening and describing may take.
const LOAD_LIMIT: Duration = Duration::from_secs(5);

/// The library was opened and described since `started`.
pub(crate) fn load_time(started: Instant) -> Outcome {
    let took = started.elapsed();
    if took <= LOAD_LIMIT {
        return Ok(());
    }
    failed(format!(
        "opening and describing took {:.1} s, at most {} s are good: what takes long belongs into the first run",
        took.as_secs_f64(),
        LOAD_LIMIT.as_secs()
    ))
}

pub(crate) fn descriptor(subject: &Subject<'_>) -> Outcome {
    let plugin = subject.plugin;
    let mut problems = Vec::new();
    subject.trail.at("was asked for its description again");
    match subject.exports.describe() {
        Err(error) => problems.push(format!("the second description is an error: {error}")),
        Ok(again) => {
            if again.nodes != plugin.nodes || again.name != plugin.name {
                problems.push("its second description is another than its first".to_owned());
            }
        }
    }
    if plugin.name.is_empty() || plugin.version.is_empty() {
        problems.push("the plugin has no name or no version".to_owned());
    }
    problems.extend(repeated(
        "class",
        plugin.nodes.iter().map(|node| &node.class),
    ));
    for node in &plugin.nodes {
        let found = node_problems(node);
        problems.extend(
            found
                .into_iter()
                .map(|problem| format!("{}: {problem}", node.class)),
        );
    }
    if problems.is_empty() {
        Ok(())
    } else {
        failed(problems.join("; "))
    }
}

fn repeated<'a>(what: &str, names: impl Iterator<Item = &'a String>) -> Vec<String> {
    let mut seen = BTreeSet::new();
    names
        .filter(|name| !seen.insert(name.as_str()))
        .map(|name| format!("the {what} {name} is there twice"))
        .collect()
}

fn node_problems(node: &NodeDescriptor) -> Vec<String> {
    let mut problems = Vec::new();
    let mut demand = |text: &str, what: &str| {
        if text.trim().is_empty() {
            problems.push(format!("{what} is empty"));
        }
    };
    demand(&node.class, "its class");
    demand(&node.display_name, "its display name");
    demand(&node.description, "its description");
    demand(&node.category, "its category");
    for input in &node.inputs {
        demand(&input.name, "the name of an input");
        demand(
            &input.port,
            &format!("the type of the input {}", input.name),
        );
        let what = format!("the explanation of the input {}", input.name);
        demand(&input.tooltip, &what);
    }
    for output in &node.outputs {
        demand(&output.name, "the name of an output");
        let what = format!("the type of the output {}", output.name);
        demand(&output.port, &what);
        let what = format!("the explanation of the output {}", output.name);
        demand(&output.tooltip, &what);
    }
    for widget in &node.widgets {
        demand(&widget.name, "the name of a parameter");
        let what = format!("the explanation of the parameter {}", widget.name);
        demand(&widget.tooltip, &what);
    }
    let sockets = node.inputs.iter().map(|input| &input.name);
    let given = sockets.chain(node.widgets.iter().map(|widget| &widget.name));
    problems.extend(repeated("input or parameter", given));
    let outputs = node.outputs.iter().map(|output| &output.name);
    problems.extend(repeated("output", outputs));
    problems.extend(node.widgets.iter().flat_map(widget_problems));
    if node.outputs.is_empty() && !node.output_node {
        let text = "it has no output and is no output node, so nothing can ever run it";
        problems.push(text.to_owned());
    }
    problems
}

fn widget_problems(widget: &Widget) -> Vec<String> {
    let name = &widget.name;
    let mut problems = Vec::new();
    match &widget.kind {
        WidgetKind::Integer { min, max, .. } if min > max => {
            problems.push(format!("the bounds of {name} are {min} and {max}"));
        }
        WidgetKind::Float { min, max, step, .. } => {
            // Written so that NaN is a problem too.
            if min.partial_cmp(max).is_none_or(Ordering::is_gt) {
                problems.push(format!("the bounds of {name} are {min} and {max}"));
            }
            if step.partial_cmp(&0.0).is_none_or(Ordering::is_le) {
                problems.push(format!("the step of {name} is {step}"));
            }
        }
        WidgetKind::Choice {
            options, former, ..
        } => {
            problems.extend(repeated("option", options.iter()));
            let gone = former.values().filter(|now| !options.contains(now));
            problems
                .extend(gone.map(|now| format!("{name} once had {now}, which is no option now")));
        }
        _ => {}
    }
    let default = widget.check(&widget.default_value());
    problems
        .extend(default.map(|problem| format!("its default does not fit: {}", problem.message)));
    problems
}

pub(crate) fn unknown_names(subject: &Subject<'_>) -> Outcome {
    let exports = &subject.exports;
    let mut classes = vec![String::new(), "NoSuchClass".to_owned(), "x".repeat(1 << 16)];
    let known = subject.plugin.nodes.iter().map(|node| node.class.as_str());
    let is_known = |name: &str| subject.plugin.nodes.iter().any(|node| node.class == name);
    classes.extend(known.flat_map(around));
    for class in classes.iter().filter(|class| !is_known(class)) {
        let named: String = class.chars().take(40).collect();
        subject
            .trail
            .at(&format!("was asked for the class {named:?}"));
        match exports.create(class) {
            Ok(_) => {
                return failed(format!(
                    "it makes a node of the class {named:?}, which it does not list"
                ));
            }
            Err(error) if error.error_code() == ErrorCode::Panicked => {
                return failed(format!("asked for the class {named:?}: {error}"));
            }
            Err(_) => {}
        }
    }
    let mut ids = vec![String::new(), "no-such-extension/1".to_owned()];
    ids.extend([DEVICES, METADATA].into_iter().flat_map(around));
    for id in &ids {
        subject
            .trail
            .at(&format!("was asked for the extension {id:?}"));
        if exports.extension(id).is_some() {
            return failed(format!(
                "it has an extension {id:?}, which nobody describes"
            ));
        }
        for node in &subject.plugin.nodes {
            let made = exports.create(&node.class);
            if made.is_ok_and(|made| made.extension(id).is_some()) {
                return failed(format!(
                    "a node of the class {} has an extension {id:?}, which nobody describes",
                    node.class
                ));
            }
        }
    }
    Ok(())
}

/// Names that contain a known one.
fn around(name: &str) -> Vec<String> {
    vec![
        format!("{name} "),
        format!(" {name}"),
        format!("{name}0"),
        format!("{name}\n"),
        name.chars().take(name.chars().count() - 1).collect(),
    ]
}
