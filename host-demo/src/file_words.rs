//! Words between percent signs in names of files, as ComfyUI and its editor replace them.
//!
//! | word | replaced by |
//! | --- | --- |
//! | `%year%` `%month%` `%day%` `%hour%` `%minute%` `%second%` | the local time, two digits, the year four |
//! | `%date:yyyy-MM-dd hh.mm.ss%` | the same, by its pattern of `yyyy`, `yy`, `MM`, `dd`, `hh`, `mm`, `ss` (one letter: no zeros) |
//! | `%Node.parameter%` | a parameter of the node of this title or class |
//! | `%width%` `%height%` | pixels of the picture, by SaveImage |
//!
//! Other words stay as they are. Of values that make a part of the name too long the first bytes are taken.

use jiff::ZonedDateTime;
use plugin_api::NodeError;
use serde_json::{Map, Value};

use crate::graph::{Graph, GraphNode, Input};

/// Bytes of the longest name that any system has.
const LONGEST: usize = 4096;
/// Bytes of a part between slashes: systems have names of 255, and a number and an ending follow.
pub(crate) const LONGEST_PART: usize = 200;
/// Bytes of a value, the first that make no part too long: a long one should not cost a short one.
const LONGEST_VALUES: [usize; 5] = [LONGEST_PART, 100, 60, 40, 20];
/// The parameter that names files.
pub(crate) const PARAMETER: &str = "filename_prefix";

/// Replaces the words of a node's parameters that need no picture.
pub(crate) fn replace(parameters: &mut Map<String, Value>, graph: &Graph, now: &ZonedDateTime) {
    if let Some(Value::String(name)) = parameters.get_mut(PARAMETER)
        && name.contains('%')
    {
        let of_values = |longest: usize| {
            replaced(name, |word| {
                let value = date(word, now).or_else(|| value_of(word, graph))?;
                Some(value[..value.floor_char_boundary(longest)].to_owned())
            })
        };
        let mut fitting = LONGEST_VALUES.into_iter().map(of_values);
        // Too long without its values it stays.
        if let Some(short) = fitting.find(|name| is_short(name)) {
            *name = short;
        }
    }
}

fn is_short(name: &str) -> bool {
    name.split('/').all(|part| part.len() <= LONGEST_PART)
}

/// Whether a part of the name is longer than systems have them.
///
/// # Errors
/// It is.
pub(crate) fn check_length(name: &str) -> Result<(), NodeError> {
    if is_short(name) {
        return Ok(());
    }
    Err(NodeError::invalid_input(
        PARAMETER,
        format!(
            "the prefix \"{name}\" has a part of more than {LONGEST_PART} bytes; choose a shorter one"
        ),
    ))
}

/// Replaces `%width%` and `%height%`.
pub(crate) fn sized(name: &str, [width, height]: [usize; 2]) -> String {
    replaced(name, |word| match word {
        "width" => Some(width.to_string()),
        "height" => Some(height.to_string()),
        _ => None,
    })
}

fn replaced(name: &str, meaning: impl Fn(&str) -> Option<String>) -> String {
    let mut text = String::new();
    let mut rest = name;
    while let Some((before, behind)) = rest.split_once('%') {
        text.push_str(before);
        let word = behind.split_once('%');
        match word.and_then(|(word, rest)| Some((meaning(word)?, rest))) {
            // Longer than any system's names: a word may stand for a whole text.
            Some((value, behind)) if text.len() + value.len() <= LONGEST => {
                text.push_str(&value);
                rest = behind;
            }
            _ => {
                text.push('%');
                rest = behind;
            }
        }
    }
    text + rest
}

fn date(word: &str, now: &ZonedDateTime) -> Option<String> {
    let pattern = match word {
        "year" => "yyyy",
        "month" => "MM",
        "day" => "dd",
        "hour" => "hh",
        "minute" => "mm",
        "second" => "ss",
        _ => word.strip_prefix("date:")?,
    };
    let mut text = String::new();
    let mut rest = pattern;
    while let Some(letter) = rest.chars().next() {
        let most = if letter == 'y' { 4 } else { 2 };
        let same = rest.chars().take_while(|c| *c == letter).take(most).count();
        let number = match letter {
            'y' if same == 4 => i32::from(now.year()),
            'y' if same == 2 => i32::from(now.year()) % 100,
            'M' => i32::from(now.month()),
            'd' => i32::from(now.day()),
            'h' | 'H' => i32::from(now.hour()),
            'm' => i32::from(now.minute()),
            's' => i32::from(now.second()),
            _ => {
                text.push(letter);
                rest = &rest[letter.len_utf8()..];
                continue;
            }
        };
        text.push_str(&format!("{number:0same$}"));
        rest = &rest[same..];
    }
    Some(in_a_name(&text))
}

fn value_of(word: &str, graph: &Graph) -> Option<String> {
    let (name, parameter) = word.rsplit_once('.')?;
    let value = |of: fn(&GraphNode) -> &String| {
        let mut named = graph.nodes.values().filter(|node| of(node) == name);
        named.find_map(|node| match node.inputs.get(parameter)? {
            Input::Value(Value::String(text)) => Some(text.clone()),
            Input::Value(value) => Some(value.to_string()),
            Input::Link { .. } => None,
        })
    };
    let found = value(|node| &node.title).or_else(|| value(|node| &node.class))?;
    Some(in_a_name(&found))
}

/// Without what no file name may have.
fn in_a_name(text: &str) -> String {
    let is_wrong = |c: char| c.is_control() || "/?<>\\:*|\"".contains(c);
    text.replace(is_wrong, "_")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn after(name: &str) -> String {
        let graph = json!({
            "1": {"class_type": "PersonalizedSampler", "inputs": {"seed": 7, "prompts": "a/b: c", "model": ["2", 0]},
                "_meta": {"title": "My painter"}},
            "2": {"class_type": "LoadDiffusionModel", "inputs": {"checkpoint": "sprites"}},
        });
        let graph = Graph::from_api(graph.as_object().unwrap()).unwrap();
        let now = jiff::civil::date(2026, 3, 9)
            .at(4, 5, 6, 0)
            .in_tz("UTC")
            .unwrap();
        let mut parameters = Map::from_iter([("filename_prefix".to_owned(), json!(name))]);
        replace(&mut parameters, &graph, &now);
        parameters["filename_prefix"].as_str().unwrap().to_owned()
    }

    #[test]
    fn words_are_replaced_and_others_stay() {
        for (name, expected) in [
            ("%year%/%month%-%day%", "2026/03-09"),
            ("%hour%%minute%%second%", "040506"),
            ("%date:yyyy-MM-dd%/x", "2026-03-09/x"),
            ("%date:yy M d hh:mm:ss%", "26 3 9 04_05_06"),
            (
                "%My painter.seed%_%LoadDiffusionModel.checkpoint%",
                "7_sprites",
            ),
            ("%PersonalizedSampler.prompts%", "a_b_ c"),
            ("%My painter.model%", "%My painter.model%"),
            ("100 % %nobody.x% %width%", "100 % %nobody.x% %width%"),
            ("plain", "plain"),
            ("%%year%%", "%2026%"),
        ] {
            assert_eq!(after(name), expected);
        }
        assert_eq!(sized("%width%x%height%_%year", [192, 128]), "192x128_%year");
    }

    #[test]
    fn a_long_value_makes_no_name_that_systems_do_not_have_and_costs_no_short_one() {
        let graph = json!({
            "1": {"class_type": "Painter", "inputs": {"seed": 1_234_567_890_123_u64, "prompts": "猫".repeat(300)}},
        });
        let graph = Graph::from_api(graph.as_object().unwrap()).unwrap();
        let after = |name: &str| {
            let mut parameters = Map::from_iter([("filename_prefix".to_owned(), json!(name))]);
            replace(&mut parameters, &graph, &ZonedDateTime::now());
            parameters["filename_prefix"].as_str().unwrap().to_owned()
        };
        let name = after("cats/%Painter.prompts%_%Painter.seed%");
        assert!(
            is_short(&name) && name.starts_with("cats/猫") && name.ends_with("猫_1234567890123"),
            "{name}"
        );
        assert!(name.len() > 90, "{name}");
        // Not ours to cut.
        let own = "x".repeat(LONGEST_PART);
        for name in [format!("{own}/100%"), format!("{own}x%Painter.seed%")] {
            assert_eq!(after(&name), name);
        }
        assert!(check_length(&own).is_ok() && check_length(&format!("a/{own}x")).is_err());
    }
}
