//! The real plugin through the real binary.

mod learning;
mod refusing;

use serde_json::{Value, json};

use crate::support::{Place, node, repository};

const CONCEPTS: &str = "<bob> man\n<tom> cat\n<desk> table (background)";

fn with(mut object: Value, more: Value) -> Value {
    let more = more.as_object().unwrap().clone();
    object.as_object_mut().unwrap().extend(more);
    object
}

/// Loads the model (1) and the demo's picture (2).
fn sources() -> Value {
    json!({
        "1": node("LoadDiffusionModel", json!({"checkpoint": "sprites"})),
        "2": node("LoadImage", json!({"image": "demo:man-and-cat.png"})),
    })
}

/// A loop of 3 steps whose tokens and masks are saved.
fn em_loop(parameters: Value) -> Value {
    let inputs = json!({
        "model": ["1", 0], "images": ["2", 0], "concept_list": CONCEPTS, "steps": 3, "steps_per_round": 3,
        "first_timesteps": 4, "timesteps": 3, "joint_steps": 0, "seed": 11,
    });
    let more = json!({
        "3": node("EmLoop", with(inputs, parameters)),
        "4": node("SaveConcepts", json!({"concepts": ["3", 0]})),
        "5": node("MaskToImage", json!({"mask": ["3", 2]})),
        "6": node("SaveImage", json!({"images": ["5", 0], "filename_prefix": "mask"})),
    });
    with(sources(), more)
}

fn sampler(parameters: Value) -> Value {
    let inputs = json!({"model": ["1", 0], "prompts": "a photo of a cat", "steps": 1});
    let more = json!({
        "3": node("PersonalizedSampler", with(inputs, parameters)),
        "4": node("SaveImage", json!({"images": ["3", 0]})),
    });
    with(sources(), more)
}

/// Fails in one sentence with these parts, and leaves nothing.
#[track_caller]
fn refused(place: &Place, workflow: &Value, parts: &[&str]) {
    let before = place.names(".");
    let done = place.run(workflow, &[]).failed_with(parts);
    let mut after = place.names(".");
    after.retain(|name| name != "workflow.json" || before.contains(name));
    assert_eq!(after, before, "{}", done.stderr);
}

/// The demo's picture between the two halves of a wider one, 192 by 128 pixels: what lies at its sides is learned too.
fn wide_picture(place: &Place) {
    let demo = repository().join("host-demo/workflows/pictures/man-and-cat.png");
    let demo = image::open(demo).unwrap().into_rgb8();
    let (width, height) = demo.dimensions();
    let wide = image::RgbImage::from_fn(width * 3 / 2, height, |x, y| {
        *demo.get_pixel((x + width * 3 / 4) % width, y)
    });
    wide.save(place.path().join("wide.png")).unwrap();
}
