//! Long and weighted prompts against ComfyUI: what `tests/reference/record_prompts.py` recorded.

use std::ops::ControlFlow::Continue;

use stable_diffusion::model::{CheckpointSource, DiffusionModel};
use stable_diffusion::prompt::context;

use crate::recording::{Comparison, Recording, device, sprites};

#[test]
fn long_and_weighted_prompts_are_encoded_as_comfyui_encodes_them() {
    let recording = Recording::open("prompts.safetensors");
    let model = DiffusionModel::load(&CheckpointSource::Path(sprites()), device()).unwrap();
    let mut comparison = Comparison::new(&recording);
    for (number, prompt) in recording.json::<Vec<String>>("prompts").iter().enumerate() {
        let found = context(
            &model.text_encoder,
            &model.tokenizer,
            prompt,
            None,
            &mut |_, _| Continue(()),
        )
        .unwrap();
        comparison.check(&number.to_string(), &found);
    }
    comparison.finish("prompts.safetensors");
}
