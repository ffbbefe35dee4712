"""Records what ComfyUI makes of long and weighted prompts, for the test of the crate stable-diffusion.

    python record_prompts.py COMFYUI

COMFYUI is the folder of a ComfyUI: its tokenizer and text encoder are run as they are, with the vocabulary and the
weights of the bundled checkpoint. Needs what ComfyUI's text encoders need: einops and psutil beside requirements.txt.
Leaves tests/fixtures/parity/prompts.safetensors: a context [1, 77 n, 128] for every prompt, by its number, and the
prompts in the metadata.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "plugin/crates/sprites/model"
OUT = ROOT / "tests/fixtures/parity/prompts.safetensors"
SCENERY = "a photo of a dog and a cat and a car on grass in a city by the sea with a house, a tree and a boat, "
PROMPTS = [
    "",
    "a photo of a (dog:1.3) on grass",
    "a ((dog)), a (cat (car:1.4) house:0.6) and \\(a tree\\) with (a boat",
    "(a dog:-0.5) (12:30 at night) a:b (:2) c",
    SCENERY * 4,
    # Parts of 1 to 9 words around the end of the first chunk.
    SCENERY * 2 + "(dog cat:1.2) (car grass city:0.8) (a house and a tree and a boat and a car:1.1) (sea:1.5)" * 2,
    "(" + SCENERY * 3 + ":1.2) dog",
]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comfyui", type=Path)
    arguments = parser.parse_args()
    sys.argv[1:] = ["--cpu"]
    sys.path.insert(0, str(arguments.comfyui))
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfyui_version
    from comfy import sd1_clip

    torch.set_num_threads(1)
    config = json.loads((MODEL / "text_encoder/config.json").read_text())
    tokenizer = sd1_clip.SDTokenizer(str(MODEL / "tokenizer"), embedding_size=config["hidden_size"])
    special = {"start": tokenizer.start_token, "end": tokenizer.end_token, "pad": tokenizer.pad_token}
    encoder = sd1_clip.SDClipModel(textmodel_json_config=config, dtype=torch.float32, special_tokens=special)
    weights = load_file(MODEL / "text_encoder/model.safetensors")
    weights = {key if key.startswith("text_model.") else f"text_model.{key}": value.float() for key, value in weights.items()}
    # ComfyUI's table always has as many rows as CLIP's.
    table = encoder.transformer.get_input_embeddings().weight.detach().clone()
    name = "text_model.embeddings.token_embedding.weight"
    table[: len(weights[name])] = weights[name]
    weights[name] = table
    missing, unexpected = encoder.load_sd(weights)
    assert not unexpected and set(missing) <= {"text_projection.weight"}, (missing, unexpected)
    contexts = {}
    with torch.no_grad():
        for number, prompt in enumerate(PROMPTS):
            context, _ = encoder.encode_token_weights(tokenizer.tokenize_with_weights(prompt))
            contexts[str(number)] = context.float().contiguous()
            print(number, list(context.shape), prompt[:60])
    save_file(contexts, OUT, {"prompts": json.dumps(PROMPTS), "versions": f"ComfyUI {comfyui_version.__version__}"})
    OUT.chmod(0o644)


if __name__ == "__main__":
    main()
