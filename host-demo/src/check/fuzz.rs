//! Random parameters.

use std::time::{Duration, Instant};

use plugin_api::{NodeDescriptor, Widget, WidgetKind};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng as _, SeedableRng as _};
use serde_json::{Map, Value as Json, json};

use super::given::{Feeder, Place};
use super::listener::Behavior;
use super::memory::Held;
use super::node_cases::check_values;
use super::subject::{Outcome, Subject, failed};

/// Most rounds, and most time for them; the first is always played.
const N_ROUNDS: u64 = 200;
const LONGEST: Duration = Duration::from_secs(3);
/// A run is stopped after this.
const SHORT: Duration = Duration::from_millis(50);

/// Round `i` draws from the seed `seed + i`, so that the seed of a round that failed plays that round first.
pub(crate) fn parameter_fuzz(subject: &Subject<'_>, node: &NodeDescriptor) -> Outcome {
    let mut feeder = Feeder::default();
    let (place, held) = (Place::Heap, Held::default());
    let inputs = feeder
        .inputs(subject, node, false, place, &held)
        .unwrap_or_default();
    let started = Instant::now();
    for seed in (0..N_ROUNDS).map(|i| subject.seed.wrapping_add(i)) {
        let parameters = random_parameters(node, seed);
        let text = Json::Object(parameters.clone()).to_string();
        let short: String = text.chars().take(200).collect();
        let when = format!("with --seed {seed} (the parameters {short})");
        let mut made = subject.create_for(&node.class, &text, &when)?;
        let stop = Behavior::CancelsAfter(SHORT);
        let ran = subject.run(&mut made, inputs.clone(), &parameters, stop);
        subject.no_panic(&when, &ran.result)?;
        if let Ok(outputs) = &ran.result
            && let Err(problem) = check_values(node, outputs)
        {
            return failed(format!("{when}: {problem}"));
        }
        if started.elapsed() > LONGEST {
            break;
        }
    }
    Ok(())
}

fn random_parameters(node: &NodeDescriptor, seed: u64) -> Map<String, Json> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let widgets = node.widgets.iter();
    widgets
        .map(|widget| (widget.name.clone(), random_value(widget, &mut rng)))
        .collect()
}

/// In [0, 1).
fn unit(rng: &mut ChaCha8Rng) -> f64 {
    (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

/// Mostly what fits; small numbers are as likely as large ones.
fn random_value(widget: &Widget, rng: &mut ChaCha8Rng) -> Json {
    let choice = rng.next_u64() % 16;
    if choice < 4 {
        return widget.default_value();
    }
    let within = |min: f64, max: f64, rng: &mut ChaCha8Rng| {
        let span = max - min;
        min + (unit(rng) * (1.0 + span).ln()).exp_m1().clamp(0.0, span)
    };
    match &widget.kind {
        WidgetKind::Integer { min, max, .. } => match choice {
            4 => json!(min),
            5 => json!(max),
            6 => json!(min.wrapping_sub(1)),
            7 => json!(max.wrapping_add(1)),
            _ => json!((within(*min as f64, *max as f64, rng) as i64).clamp(*min, *max)),
        },
        WidgetKind::Float { min, max, .. } => match choice {
            4 => json!(min),
            5 => json!(max),
            6 => json!(min - 1.0),
            7 => json!(f64::MAX),
            _ => json!(within(*min, *max, rng).clamp(*min, *max)),
        },
        WidgetKind::Boolean { .. } => json!(choice.is_multiple_of(2)),
        WidgetKind::Choice { options, .. } => {
            let i = rng.next_u64() as usize % options.len().max(1);
            options.get(i).map_or(Json::Null, |option| json!(option))
        }
        WidgetKind::Text { .. } => {
            let length = rng.next_u64() % 40;
            let pieces = [
                "<a>", " ", "\n", "%", "\u{0}", "é", "𝕏", "../", "\"", "{", ",", "7", "word",
            ];
            let text: String = (0..length)
                .map(|_| pieces[rng.next_u64() as usize % pieces.len()])
                .collect();
            json!(text)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_seed_gives_the_same_parameters_and_most_of_them_fit() {
        let widget = |name: &str, kind| Widget {
            name: name.to_owned(),
            tooltip: String::new(),
            kind,
        };
        let (min, max) = (1, 100_000);
        let number = widget(
            "n",
            WidgetKind::Integer {
                default: 7,
                min,
                max,
                seed: false,
            },
        );
        let text = widget(
            "t",
            WidgetKind::Text {
                default: String::new(),
                multiline: true,
            },
        );
        let node: NodeDescriptor = serde_json::from_value(json!({"class": "X"})).unwrap();
        let node = NodeDescriptor {
            widgets: vec![number, text],
            ..node
        };
        let drawn: Vec<_> = (0..200)
            .map(|seed| random_parameters(&node, seed))
            .collect();
        assert_eq!(drawn[3], random_parameters(&node, 3));
        let n_fit = drawn
            .iter()
            .filter(|one| node.check_parameters(one).is_empty())
            .count();
        assert!((150..200).contains(&n_fit), "{n_fit}");
        let small = drawn
            .iter()
            .filter(|one| one["n"].as_i64().is_some_and(|n| n < 300));
        assert!(small.count() > 60);
    }
}
