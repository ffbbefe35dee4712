"""Loads what a run saved into diffusers and paints the same picture with it.

    python tests/reference/check_diffusers.py RUN_DIRECTORY MODEL_DIRECTORY --noise NOISE.safetensors \\
        --prompt "a photo of <rex> on grass" --picture RUN_DIRECTORY/sample_00001.png

`load_textual_inversion` reads every concept, `load_lora_weights` the LoRA if there is one, `from_pretrained` the tuned U-Net
(an f16 one is as far from the run's f32 as f16 is); the prompt is sampled from the same noise
(`cargo run --example initial_noise`) with DPM-Solver++ (2M) at Karras' noise levels: the run's sampler has to be
`dpmpp_2m` with the scheduler `karras`, whose arithmetic is k-diffusion's. Fails if the pictures differ by more than
a rounding of colors.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

LARGEST_MEAN_DIFFERENCE = 1.0  # of 255


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--noise", type=Path, required=True)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--picture", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance", type=float, default=5.0)
    arguments = parser.parse_args()

    pipeline = StableDiffusionPipeline.from_pretrained(arguments.model, safety_checker=None, torch_dtype=torch.float32)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, use_karras_sigmas=True)
    tuned = arguments.run / "concepts" / "unet"
    if tuned.is_dir():
        pipeline.unet = UNet2DConditionModel.from_pretrained(tuned, torch_dtype=torch.float32)
        print("tuned U-Net", tuned)
    for path in sorted((arguments.run / "concepts").glob("*.safetensors")):
        if path.name.startswith("lora"):
            pipeline.load_lora_weights(path.parent, weight_name=path.name)
            print("LoRA", path.name)
            continue
        with safe_open(path, "pt") as file:
            metadata, names = file.metadata(), list(file.keys())
        pipeline.load_textual_inversion(str(path), token=metadata["token"])
        print("concept", metadata["token"], names, "class word", metadata["class_word"])

    picture = pipeline(
        arguments.prompt,
        num_inference_steps=arguments.steps,
        guidance_scale=arguments.guidance,
        latents=load_file(arguments.noise)["latents"],
        output_type="np",
    ).images[0]
    ours = np.asarray(Image.open(arguments.picture).convert("RGB"), dtype=np.float32)
    difference = np.abs(picture * 255 - ours)
    print(f"difference of 255: mean {difference.mean():.3f}, largest {difference.max():.1f}")
    if difference.mean() > LARGEST_MEAN_DIFFERENCE:
        raise SystemExit("the pictures differ")


if __name__ == "__main__":
    main()
