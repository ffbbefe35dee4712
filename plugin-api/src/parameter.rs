//! Widgets: what a parameter struct looks like to a person, and whether values fit.

use std::collections::BTreeMap;

use schemars::{JsonSchema, generate::SchemaSettings};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

/// Largest integer that a browser keeps exact; the bound of seeds.
pub const MAX_SAFE_INTEGER: i64 = 9_007_199_254_740_991;

/// One parameter of a node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Widget {
    /// The field's name: stable.
    pub name: String,
    /// The field's doc comment.
    #[serde(default)]
    pub tooltip: String,
    /// What it edits.
    pub kind: WidgetKind,
}

/// What a widget edits, with its default and bounds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum WidgetKind {
    /// A whole number in `min..=max`.
    Integer {
        /// Value of a new node.
        default: i64,
        /// Smallest value.
        min: i64,
        /// Largest value.
        max: i64,
        /// Whether the editor may change it after every run: a seed.
        seed: bool,
    },
    /// A number in `min..=max`.
    Float {
        /// Value of a new node.
        default: f64,
        /// Smallest value.
        min: f64,
        /// Largest value.
        max: f64,
        /// Step of the editor's arrows.
        step: f64,
    },
    /// Text.
    Text {
        /// Value of a new node.
        default: String,
        /// Several lines.
        multiline: bool,
    },
    /// A switch.
    Boolean {
        /// Value of a new node.
        default: bool,
    },
    /// One of several names.
    Choice {
        /// Value of a new node.
        default: String,
        /// All names, in the order to show.
        options: Vec<String>,
        /// Names that options once had, which saved workflows may still hold, with their names now.
        #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
        former: BTreeMap<String, String>,
    },
}

/// In what a value does not fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProblemKind {
    /// It is no number, text, switch or name, as the widget takes it.
    WrongType,
    /// It is below the smallest value.
    TooSmall,
    /// It is above the largest value.
    TooLarge,
    /// It is none of the names.
    NotAnOption,
}

/// A value that does not fit its widget.
#[derive(Debug, Clone, PartialEq)]
pub struct ParameterProblem {
    /// In what.
    pub kind: ProblemKind,
    /// The parameter.
    pub parameter: String,
    /// One sentence.
    pub message: String,
    /// What was given.
    pub received: Value,
}

/// The widgets of a parameter struct, in the order of its fields.
///
/// Keywords of the schema that are read: `type`, `default`, `minimum`, `maximum`, `enum`/`oneOf`, `description`, and the
/// extensions `x-multiline`, `x-seed`, `x-step`, and `x-former` (names that options once had, with their names now).
#[must_use]
pub fn widgets_of<P: JsonSchema>() -> Vec<Widget> {
    let settings =
        SchemaSettings::draft2020_12().with(|settings| settings.inline_subschemas = true);
    let schema = settings.into_generator().into_root_schema_for::<P>();
    let Some(properties) = schema.get("properties").and_then(Value::as_object) else {
        return Vec::new();
    };
    properties
        .iter()
        .map(|(name, schema)| widget(name, schema))
        .collect()
}

fn widget(name: &str, schema: &Value) -> Widget {
    let text = |key: &str| {
        schema
            .get(key)
            .and_then(Value::as_str)
            .unwrap_or_default()
            .replace('\n', " ")
    };
    let default = schema.get("default").cloned().unwrap_or(Value::Null);
    let bound = |key: &str| schema.get(key).and_then(Value::as_f64);
    let flag = |key: &str| schema.get(key).and_then(Value::as_bool).unwrap_or(false);
    let options = options(schema);
    let kind = if !options.is_empty() {
        WidgetKind::Choice {
            default: default.as_str().unwrap_or(&options[0]).to_owned(),
            former: schema
                .get("x-former")
                .and_then(|former| serde_json::from_value(former.clone()).ok())
                .unwrap_or_default(),
            options,
        }
    } else {
        match schema.get("type").and_then(Value::as_str) {
            Some("integer") => WidgetKind::Integer {
                default: default.as_i64().unwrap_or(0),
                min: bound("minimum").map_or(0, |v| v as i64),
                max: bound("maximum")
                    .map_or(MAX_SAFE_INTEGER, |v| (v as i64).min(MAX_SAFE_INTEGER)),
                seed: flag("x-seed"),
            },
            Some("number") => WidgetKind::Float {
                default: default.as_f64().unwrap_or(0.0),
                min: bound("minimum").unwrap_or(0.0),
                max: bound("maximum").unwrap_or(f64::from(f32::MAX)),
                step: schema.get("x-step").and_then(Value::as_f64).unwrap_or(0.01),
            },
            Some("boolean") => WidgetKind::Boolean {
                default: default.as_bool().unwrap_or(false),
            },
            _ => WidgetKind::Text {
                default: default.as_str().unwrap_or_default().to_owned(),
                multiline: flag("x-multiline"),
            },
        }
    };
    Widget {
        name: name.to_owned(),
        tooltip: text("description"),
        kind,
    }
}

fn options(schema: &Value) -> Vec<String> {
    let listed = |values: &Vec<Value>| {
        values
            .iter()
            .filter_map(Value::as_str)
            .map(str::to_owned)
            .collect()
    };
    if let Some(values) = schema.get("enum").and_then(Value::as_array) {
        return listed(values);
    }
    let Some(variants) = schema.get("oneOf").and_then(Value::as_array) else {
        return Vec::new();
    };
    let names = |variant: &Value| -> Vec<String> {
        match (
            variant.get("const"),
            variant.get("enum").and_then(Value::as_array),
        ) {
            (Some(Value::String(name)), _) => vec![name.clone()],
            (_, Some(values)) => listed(values),
            _ => Vec::new(),
        }
    };
    variants.iter().flat_map(names).collect()
}

impl Widget {
    /// The value of a new node.
    #[must_use]
    pub fn default_value(&self) -> Value {
        match &self.kind {
            WidgetKind::Integer { default, .. } => json!(default),
            WidgetKind::Float { default, .. } => json!(default),
            WidgetKind::Text { default, .. } | WidgetKind::Choice { default, .. } => json!(default),
            WidgetKind::Boolean { default } => json!(default),
        }
    }

    /// The value as the widget's kind, as editors and files may hold it: numbers written as text, text that is a number, whole
    /// numbers that JavaScript wrote as 3.0; and options by the names that they once had. What cannot be converted stays as
    /// it is, for [`check`](Self::check) to name.
    #[must_use]
    pub fn converted(&self, value: &Value) -> Value {
        let text = value.as_str().map(str::trim);
        let flag = value.as_bool();
        let converted = match &self.kind {
            WidgetKind::Integer { .. } => match text {
                Some(text) => text.parse().map(Value::Number).ok(),
                None => flag.map(|flag| json!(u8::from(flag))),
            }
            .or_else(|| Some(value.clone()))
            .map(whole),
            WidgetKind::Float { .. } => match text {
                Some(text) => text.parse::<f64>().ok().map(|number| json!(number)),
                None => flag.map(|flag| json!(f64::from(u8::from(flag)))),
            },
            WidgetKind::Text { .. } => value.is_number().then(|| json!(value.to_string())),
            WidgetKind::Boolean { .. } => match (text, value.as_f64()) {
                (Some(text), _) => text.to_lowercase().parse().map(Value::Bool).ok(),
                (None, number) => number.map(|number| json!(number != 0.0)),
            },
            WidgetKind::Choice { former, .. } => text
                .and_then(|text| former.get(text))
                .map(|name| json!(name)),
        };
        // Text that says infinity or nan is a float to Rust and nothing to JSON.
        converted
            .filter(|converted| !converted.is_null())
            .unwrap_or_else(|| value.clone())
    }

    /// Why `value` does not fit, once it is [converted](Self::converted); `None` if it does. A seed may have 64 bits,
    /// though its widget ends where browsers stop being exact.
    #[must_use]
    pub fn check(&self, value: &Value) -> Option<ParameterProblem> {
        let name = &self.name;
        let value = &self.converted(value);
        let problem = |kind, message| {
            Some(ParameterProblem {
                kind,
                parameter: name.clone(),
                message,
                received: value.clone(),
            })
        };
        let wrong_type = |expected: &str| {
            problem(
                ProblemKind::WrongType,
                format!("{name} takes {expected}, got {value}"),
            )
        };
        let bounds = |v: f64, min: f64, max: f64| {
            if v < min {
                problem(
                    ProblemKind::TooSmall,
                    format!("{name} is {value}, the smallest value is {min}"),
                )
            } else if v > max {
                problem(
                    ProblemKind::TooLarge,
                    format!("{name} is {value}, the largest value is {max}"),
                )
            } else {
                None
            }
        };
        match &self.kind {
            WidgetKind::Integer { seed: true, .. } if value.is_u64() => None,
            WidgetKind::Integer { min, max, .. } => match value.as_f64() {
                Some(v) if v.fract() == 0.0 => bounds(v, *min as f64, *max as f64),
                _ => wrong_type("a whole number"),
            },
            WidgetKind::Float { min, max, .. } => match value.as_f64() {
                Some(v) => bounds(v, *min, *max),
                None => wrong_type("a number"),
            },
            WidgetKind::Text { .. } => value.as_str().map_or_else(|| wrong_type("text"), |_| None),
            WidgetKind::Boolean { .. } => value
                .as_bool()
                .map_or_else(|| wrong_type("true or false"), |_| None),
            WidgetKind::Choice { options, .. } => match value.as_str() {
                Some(v) if options.iter().any(|option| option == v) => None,
                Some(_) => problem(
                    ProblemKind::NotAnOption,
                    format!(
                        "{name} is {value}, it can be one of: {}",
                        options.join(", ")
                    ),
                ),
                None => wrong_type("a name"),
            },
        }
    }
}

/// 3.0 as 3; everything else as it is.
fn whole(value: Value) -> Value {
    match value.as_f64() {
        Some(number) if value.is_f64() && number.fract() == 0.0 && number.abs() < 1e18 => {
            json!(number as i64)
        }
        _ => value,
    }
}

/// All values that do not fit.
pub(crate) fn check_all(widgets: &[Widget], given: &Map<String, Value>) -> Vec<ParameterProblem> {
    widgets
        .iter()
        .filter_map(|widget| {
            given
                .get(&widget.name)
                .and_then(|value| widget.check(value))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seven() -> u32 {
        7
    }

    #[derive(Deserialize, JsonSchema)]
    #[serde(rename_all = "snake_case")]
    enum Start {
        /// From the word.
        Class,
        /// From nothing.
        Random,
    }

    fn class() -> Start {
        Start::Class
    }

    impl Serialize for Start {
        fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            serializer.serialize_str("class")
        }
    }

    #[derive(Deserialize, JsonSchema)]
    #[expect(dead_code, reason = "only its schema is read")]
    struct Demo {
        /// How many.
        #[serde(default = "seven")]
        #[schemars(range(min = 1, max = 9))]
        steps: u32,
        /// How it starts.
        #[serde(default = "class")]
        #[schemars(extend("x-former" = {"word": "class"}))]
        start: Start,
        /// A prompt.
        #[serde(default)]
        #[schemars(extend("x-multiline" = true))]
        text: String,
    }

    #[test]
    fn a_struct_becomes_widgets_in_field_order() {
        let widgets = widgets_of::<Demo>();
        let names: Vec<_> = widgets.iter().map(|w| w.name.as_str()).collect();
        assert_eq!(names, ["steps", "start", "text"]);
        assert_eq!(
            widgets[0].kind,
            WidgetKind::Integer {
                default: 7,
                min: 1,
                max: 9,
                seed: false
            }
        );
        assert_eq!(widgets[0].tooltip, "How many.");
        let options = vec!["class".to_owned(), "random".to_owned()];
        assert_eq!(
            widgets[1].kind,
            WidgetKind::Choice {
                default: "class".to_owned(),
                former: BTreeMap::from([("word".to_owned(), "class".to_owned())]),
                options
            }
        );
        assert_eq!(
            widgets[2].kind,
            WidgetKind::Text {
                default: String::new(),
                multiline: true
            }
        );
    }

    #[test]
    fn values_are_converted_to_what_the_widget_takes() {
        let widget = |kind| Widget {
            name: "v".to_owned(),
            tooltip: String::new(),
            kind,
        };
        let whole = |seed| {
            widget(WidgetKind::Integer {
                default: 0,
                min: 0,
                max: MAX_SAFE_INTEGER,
                seed,
            })
        };
        let float = widget(WidgetKind::Float {
            default: 0.0,
            min: 0.0,
            max: 2.0,
            step: 0.1,
        });
        let text = widget(WidgetKind::Text {
            default: String::new(),
            multiline: false,
        });
        let switch = widget(WidgetKind::Boolean { default: false });
        let choice = widget(widgets_of::<Demo>().remove(1).kind);
        for (widget, given, expected) in [
            (&whole(false), json!("20"), json!(20)),
            (&whole(false), json!(" 20 "), json!(20)),
            (&whole(false), json!(20.0), json!(20)),
            (&whole(false), json!("20.0"), json!(20)),
            (&whole(false), json!(true), json!(1)),
            (&whole(true), json!("18446744073709551615"), json!(u64::MAX)),
            (&whole(true), json!(u64::MAX), json!(u64::MAX)),
            (&float, json!("1.5"), json!(1.5)),
            (&float, json!("1"), json!(1.0)),
            (&float, json!(1), json!(1)),
            (&text, json!(1.5), json!("1.5")),
            (&switch, json!("True"), json!(true)),
            (&switch, json!(0), json!(false)),
            (&choice, json!("word"), json!("class")),
            (&choice, json!("random"), json!("random")),
        ] {
            assert_eq!(widget.converted(&given), expected, "{given}");
            assert_eq!(widget.check(&given), None, "{given}");
        }
        for (widget, given, kind) in [
            (&whole(false), json!(u64::MAX), ProblemKind::TooLarge),
            (&whole(true), json!(1e20), ProblemKind::TooLarge),
            (&whole(true), json!(-1), ProblemKind::TooSmall),
            (&whole(false), json!("1.5"), ProblemKind::WrongType),
            (&whole(false), json!("many"), ProblemKind::WrongType),
            (&whole(false), json!(null), ProblemKind::WrongType),
            (&float, json!("nan"), ProblemKind::WrongType),
            (&float, json!("3"), ProblemKind::TooLarge),
            (&switch, json!("perhaps"), ProblemKind::WrongType),
        ] {
            assert_eq!(widget.check(&given).unwrap().kind, kind, "{given}");
        }
    }

    #[test]
    fn values_that_do_not_fit_are_named_with_what_is_wrong() {
        let widgets = widgets_of::<Demo>();
        let given = json!({"steps": 0, "start": "warm", "text": ["3"]});
        let kinds: Vec<_> = check_all(&widgets, given.as_object().unwrap())
            .into_iter()
            .map(|p| (p.parameter, p.kind))
            .collect();
        assert_eq!(
            kinds,
            [
                ("steps".to_owned(), ProblemKind::TooSmall),
                ("start".to_owned(), ProblemKind::NotAnOption),
                ("text".to_owned(), ProblemKind::WrongType)
            ]
        );
        assert!(check_all(&widgets, json!({"steps": 9.0}).as_object().unwrap()).is_empty());
        assert_eq!(
            widgets[0].check(&json!(1.5)).unwrap().kind,
            ProblemKind::WrongType
        );
    }
}
