"""Whether a LoRA that EmLoop learned is found, whole and with the same weights, by the programs that people load it with.

    python check_lora_programs.py --host HOST_DEMO [--comfyui FOLDER] [--a1111 FOLDER] [--invokeai FOLDER]

Learns a LoRA for two steps on a made-up checkpoint of Stable Diffusion 1.5's shapes, and asks, each with its own code,

* diffusers   `load_lora_weights`, from the list of requirements
* ComfyUI     `load_lora_for_models` on its own U-Net; FOLDER is its repository
* A1111       `extensions-builtin/Lora/networks.py` on layers of the places and shapes of ComfyUI's U-Net, which are its own;
              FOLDER is its repository, `--comfyui` has to be there too
* InvokeAI    the probe that classifies a file, and the loader of its layers; FOLDER holds its package `invokeai`

what it adds to every weight. They import more packages than requirements.txt has. Each has to find all layers, and add the product of the factors to 1e-6 of its size.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "plugin/crates/sprites/model/tokenizer"
LARGEST_ERROR = 1e-6
PREFIX = "lora_unet_"


def make_checkpoint(folder):
    """Made-up weights of SD 1.5's shapes; pictures of 256 pixels, to be quick."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    attention = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    UNet2DConditionModel(
        sample_size=32, cross_attention_dim=768, attention_head_dim=8, block_out_channels=(320, 640, 1280, 1280),
        down_block_types=attention, up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    ).save_pretrained(folder / "unet")  # fmt: skip
    AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=256,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    ).save_pretrained(folder / "vae")  # fmt: skip
    names = json.loads((TOKENIZER.parent / "text_encoder/config.json").read_text())
    CLIPTextModel(CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        hidden_act="quick_gelu", bos_token_id=names["bos_token_id"], eos_token_id=names["eos_token_id"],
        pad_token_id=names["pad_token_id"],
    )).save_pretrained(folder / "text_encoder")  # fmt: skip
    DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    ).save_pretrained(folder / "scheduler")  # fmt: skip
    (folder / "tokenizer").mkdir()
    for file in TOKENIZER.iterdir():
        (folder / "tokenizer" / file.name).write_bytes(file.read_bytes())


def learn(host, folder):
    """The file that EmLoop's LoRA is saved as."""
    few = {"steps": 1, "steps_per_round": 1, "first_timesteps": 1, "timesteps": 1, "joint_steps": 2, "sample_every": 0}
    list_ = "<bob> man\n<tom> cat\n<desk> table (background)"
    nodes = {
        "1": ("LoadDiffusionModel", {"checkpoint": "checkpoint"}),
        "2": ("LoadImage", {"image": "demo:man-and-cat.png"}),
        "3": ("EmLoop", few | {"model": ["1", 0], "images": ["2", 0], "concept_list": list_, "joint_scope": "lora"}),
        "4": ("SaveConcepts", {"concepts": ["3", 0], "model": ["3", 1]}),
    }
    workflow = {key: {"class_type": name, "inputs": inputs} for key, (name, inputs) in nodes.items()}
    (folder / "workflow.json").write_text(json.dumps(workflow))
    subprocess.run([host, "run", "workflow.json", "--out", "out"], cwd=folder, check=True)
    return folder / "out/concepts/lora.safetensors"


def products(lora):
    """kohya's name without its prefix -> what is added to the weight"""
    found = {}
    for name, up in lora.items():
        if name.endswith(".lora_up.weight"):
            base = name.removesuffix(".lora_up.weight")
            down, alpha = lora[f"{base}.lora_down.weight"], lora[f"{base}.alpha"].item()
            found[base.removeprefix(PREFIX)] = up @ down * (alpha / down.shape[0])
    return found


def in_diffusers(file, checkpoint):
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(checkpoint / "unet")
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    state, alphas = StableDiffusionPipeline.lora_state_dict(file, unet_config=unet.config)
    StableDiffusionPipeline.load_lora_into_unet(state, alphas, unet, adapter_name="default_0")
    added = {}
    for name, layer in unet.named_modules():
        if hasattr(layer, "get_delta_weight"):
            added[name.replace(".", "_")] = layer.get_delta_weight("default_0")
            assert f"{name}.weight" in before, name
    return added


def comfyui_model(folder, checkpoint):
    sys.argv[1:] = ["--cpu"]
    sys.path.insert(0, str(folder))
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.sd

    state = load_file(checkpoint / "unet/diffusion_pytorch_model.safetensors")
    return comfy.sd.load_diffusion_model_state_dict(state, model_options={"dtype": torch.float32})


def in_comfyui(file, model):
    import comfy.lora
    import comfy.sd
    import comfy.utils

    patched, _ = comfy.sd.load_lora_for_models(model, None, load_file(file), 1.0, 0.0)
    weights = model.model.state_dict()
    names = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    names = {f"diffusion_model.{theirs}": ours for ours, theirs in names.items()}
    added = {}
    for key, patches in patched.patches.items():
        zeros = torch.zeros_like(weights[key])
        added[names[key].removesuffix(".weight").replace(".", "_")] = comfy.lora.calculate_weight(patches, zeros, key)
    return added


def in_a1111(file, folder, model):
    import comfy.utils

    sys.path.insert(0, str(folder / "extensions-builtin/Lora"))
    modules = mock.MagicMock()
    modules.models.sd3.mmdit.QkvLinear = type("QkvLinear", (torch.nn.Module,), {})
    modules.sd_models.read_state_dict = load_file
    modules.shared.cmd_opts.lora_dir = str(file.parent)  # it makes the folder that is named here
    modules.devices.cpu, modules.devices.dtype = torch.device("cpu"), torch.float32
    parts = ["shared", "devices", "sd_models", "errors", "scripts", "sd_hijack", "cache", "hashes", "patches", "models",
             "models.sd3", "models.sd3.mmdit", "textual_inversion", "textual_inversion.textual_inversion"]  # fmt: skip
    stubs = {"gradio": mock.MagicMock(), "modules": modules}
    for part in parts:
        stub = modules
        for name in part.split("."):
            stub = getattr(stub, name)
        stubs[f"modules.{part}"] = stub
    sys.modules |= stubs
    import network
    import networks

    # Layers are known by their places and shapes; A1111's U-Net and ComfyUI's are both CompVis'.
    sd_model = types.SimpleNamespace(is_sdxl=False, cond_stage_model=torch.nn.Module(), model=torch.nn.Module())
    for key, weight in model.model.state_dict().items():
        *path, leaf = key.split(".")
        if leaf != "weight" or weight.ndim not in (2, 4):
            continue
        *path, name = path
        place = sd_model.model
        for step in path:
            if step not in dict(place.named_children()):
                place.add_module(step, torch.nn.Module())
            place = getattr(place, step)
        kind = torch.nn.Linear if weight.ndim == 2 else torch.nn.Conv2d
        shape = (weight.shape[1], weight.shape[0], *weight.shape[2:3])
        place.add_module(name, kind(*shape, bias=False, device="meta"))
    modules.shared.sd_model = sd_model
    on_disk = network.NetworkOnDisk("lora", str(file))
    loaded = networks.load_network("lora", on_disk)
    names = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    names = {f"diffusion_model_{theirs.removesuffix('.weight').replace('.', '_')}": ours for ours, theirs in names.items()}
    added = {}
    for key, layer in loaded.modules.items():
        updown, _ = layer.calc_updown(torch.zeros(layer.sd_module.weight.shape))
        added[names[key].removesuffix(".weight").replace(".", "_")] = updown
    return added


def in_invokeai(file, folder):
    sys.path.insert(0, str(folder))
    # Its modules import each other in a circle that has to be entered here.
    import invokeai.backend.patches.layer_patcher  # noqa: F401
    from invokeai.backend.model_manager.configs.factory import ModelConfigFactory
    from invokeai.backend.patches.lora_conversions.sd_lora_conversion_utils import lora_model_from_sd_state_dict

    config = ModelConfigFactory.from_model_on_disk(file).config
    print("InvokeAI says", type(config).__name__, config.type.value, config.base.value, config.format.value)
    assert (config.type.value, config.base.value) == ("lora", "sd-1"), config
    layers = lora_model_from_sd_state_dict(load_file(file)).layers
    return {name.removeprefix(PREFIX): layer.get_weight(None) * layer.scale() for name, layer in layers.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", type=Path, required=True)
    for program in ["comfyui", "a1111", "invokeai"]:
        parser.add_argument(f"--{program}", type=Path)
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        checkpoint = folder / "checkpoint"
        make_checkpoint(checkpoint)
        file = learn(arguments.host.resolve(), folder)
        wanted = products(load_file(file))
        found = {"diffusers": in_diffusers(file, checkpoint)}
        if arguments.comfyui:
            model = comfyui_model(arguments.comfyui, checkpoint)
            found["ComfyUI"] = in_comfyui(file, model)
            if arguments.a1111:
                found["A1111"] = in_a1111(file, arguments.a1111, model)
        if arguments.invokeai:
            found["InvokeAI"] = in_invokeai(file, arguments.invokeai)
    largest = max(value.abs().max().item() for value in wanted.values())
    print(f"{len(wanted)} layers, the largest change {largest:.2e}")
    is_right = largest > 0
    for program, added in found.items():
        n_found = len(added.keys() & wanted.keys())
        errors = [(added[k].float() - wanted[k]).abs().max().item() / largest for k in added.keys() & wanted.keys()]
        worst = max(errors, default=float("inf"))
        print(f"{program}: {n_found} of {len(wanted)} layers, {len(added.keys() - wanted.keys())} others, error {worst:.1e}")
        is_right &= n_found == len(wanted) and added.keys() == wanted.keys() and worst <= LARGEST_ERROR
    sys.exit(0 if is_right else "a program does not find what was learned")


if __name__ == "__main__":
    main()
