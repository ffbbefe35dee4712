"""Write a checkpoint in the diffusers layout, f16, and put it in place with two renames."""
import json
import os
import pathlib
import shutil

import torch
from safetensors.torch import save_file

PARTS = {"unet": "diffusion_pytorch_model.safetensors", "vae": "diffusion_pytorch_model.safetensors",
         "text_encoder": "model.safetensors"}
SCHEDULER = {
    "_class_name": "DDIMScheduler", "_diffusers_version": "0.42.1", "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "trained_betas": None,
    "prediction_type": "epsilon", "timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False,
    "clip_sample": False, "thresholding": False, "rescale_betas_zero_snr": False}
INDEX = {
    "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.42.1", "requires_safety_checker": False,
    "feature_extractor": [None, None], "image_encoder": [None, None], "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"]}


def _write_json(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n")


def write(target, unet, text_encoder, autoencoder, tokenizer_dir):
    """All but the tokenizer from modules."""
    tmp = _fresh(target)
    for name, module in (("unet", unet), ("text_encoder", text_encoder), ("vae", autoencoder)):
        module.half().save_pretrained(tmp / name)
        config = json.loads((tmp / name / "config.json").read_text())
        config.pop("_name_or_path", None)
        _write_json(tmp / name / "config.json", config)
    shutil.copytree(tokenizer_dir, tmp / "tokenizer")
    (tmp / "scheduler").mkdir()
    _write_json(tmp / "scheduler" / "scheduler_config.json", SCHEDULER)
    _write_json(tmp / "model_index.json", INDEX)
    _replace(tmp, target)


def write_weights(target, base, **states):
    """A copy of ``base`` with the weights of the parts named (``unet=``, ``text_encoder=``) replaced."""
    tmp = _fresh(target)
    shutil.copytree(base, tmp, dirs_exist_ok=True)
    for part, state in states.items():
        half = {k: v.detach().to(torch.float16).contiguous() for k, v in state.items()}
        save_file(half, tmp / part / PARTS[part], metadata={"format": "pt"})
    _replace(tmp, target)


def _fresh(target):
    target = pathlib.Path(target)
    tmp = target.with_name(target.name + ".new")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    return tmp


def _replace(tmp, target):
    target = pathlib.Path(target)
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)
    os.rename(tmp, target)
    shutil.rmtree(old, ignore_errors=True)
