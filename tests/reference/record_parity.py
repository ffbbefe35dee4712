"""Records what diffusers and transformers compute, for the parity tests of the crate stable-diffusion.

    python record_parity.py            everything, into tests/fixtures/parity

* sprites.safetensors      the bundled checkpoint (plugin/crates/sprites/model)
* sd2-small/, .safetensors a small SD 2.x-like model with made-up weights, and what it computes
* sd15-width.safetensors   a one-level U-Net of SD 1.5's true widths, weights from hash_noise
"""
import argparse
import json
import pathlib
import shutil

import blake3
import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTokenizer

import hash_noise
import record_samplers
import small_model
from observe import Observer, encode

ROOT = pathlib.Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests/fixtures/parity"
PROMPT = "a photo of <v1> and <v2>"
PLAIN_PROMPT = "A photo of a dog and a house!"
GUIDANCE = 5.0
STEPS = 10
LAMBDA = 0.01
VERSIONS = f"torch {torch.__version__}, diffusers {diffusers.__version__}, transformers {transformers.__version__}"


def fingerprint(folder):
    """blake3 over the weight files in the order in which the Rust loader hashes them."""
    hasher = blake3.blake3()
    for file in ["text_encoder/model", "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model"]:
        hasher.update((folder / f"{file}.safetensors").read_bytes())
    return hasher.hexdigest()


def tokenize(folder, prompt, placeholders):
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    assert tokenizer.add_tokens(placeholders) == len(placeholders)
    return tokenizer(prompt, padding="max_length", max_length=77).input_ids


def noise(name, shape):
    """Hash noise of unit variance."""
    return hash_noise.uniform(name, shape) * 3**0.5


def mask(height, width, cy, cx, radius):
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return ((y / height - cy) ** 2 + (x / width - cx) ** 2 < radius**2).float()


def picture(size):
    """Smooth stripes and some noise, [1, 3, size, size] in [-1, 1]."""
    y, x = torch.meshgrid(torch.arange(size) / size, torch.arange(size) / size, indexing="ij")
    waves = torch.stack([(6 * x + 2 * y).sin(), (5 * y).cos() * x, (9 * x * y).sin()])[None]
    return (0.8 * waves + 0.2 * hash_noise.uniform("picture", waves.shape)).clamp(-1, 1)


def losses(prediction, target, union, maps, masks, positions):
    """Masked diffusion loss, and attention loss over the up and down layers at the finest resolution."""
    masked = (((prediction - target) * union) ** 2).mean()
    sides = {name: p for name, p in maps.items() if not name.startswith("mid_block")}
    finest = max(p.shape[2] for p in sides.values())
    layers = [p.mean(1) for p in sides.values() if p.shape[2] == finest]
    mean = torch.stack(layers).mean(0)[0][:, positions].T
    normalized = mean / mean.amax(1, keepdim=True)
    attention = ((normalized - masks.flatten(1)) ** 2).mean(1).sum()
    return masked, attention


def record_text(model, out):
    out["text.rows"] = model["rows"].detach()
    out["text.plain"] = encode(model["text_encoder"], torch.tensor([model["plain_ids"]]))
    out["text.learned"] = encode(model["text_encoder"], torch.tensor([model["ids"]]), model["rows"])


def record_unet(model, out):
    unet, size = model["unet"], model["unet"].config.sample_size
    latents = noise("unet.latents", (2, 4, size, size))
    context = out["text.learned"].expand(2, -1, -1)
    prediction = unet(latents, torch.tensor(model["timesteps"]), context).sample
    out["unet.latents"], out["unet.prediction"] = latents, prediction
    for name, probabilities in model["observer"].maps.items():
        out[f"attention.{name}"] = probabilities[..., model["positions"]]


def record_vae(model, out):
    vae, size = model["vae"], model["unet"].config.sample_size
    image = picture(size * 2 ** (len(vae.config.block_out_channels) - 1))
    posterior = vae.encode(image).latent_dist
    out["vae.image"], out["vae.mean"], out["vae.std"] = image, posterior.mean, posterior.std
    latents = posterior.mean * vae.config.scaling_factor
    out["vae.latents"], out["vae.decoded"] = latents, vae.decode(latents / vae.config.scaling_factor).sample


def record_sampling(model, out):
    """Every sampler and schedule of record_samplers.py with this U-Net, from noise and from the middle."""
    unet, size = model["unet"], model["unet"].config.sample_size
    unconditional = encode(model["text_encoder"], torch.tensor([model["empty_ids"]]))
    context = torch.cat([unconditional, out["text.plain"]])
    out["sampling.start"], out["text.empty"] = noise("sampling.start", (1, 4, size, size)), unconditional
    out["sampling.noise"] = noise("sampling.noise", (STEPS, 4, size, size))

    def guided(x, t):
        empty, full = unet(x.repeat(2, 1, 1, 1), t, context).sample.chunk(2)
        return empty + GUIDANCE * (full - empty)

    ddim = DDIMScheduler.from_pretrained(model["folder"] / "scheduler")
    samplers = record_samplers.Samplers(guided, ddim.alphas_cumprod, ddim.config.prediction_type, out["sampling.noise"])
    for sampler in record_samplers.NAMES:
        for schedule in record_samplers.SCHEDULES:
            for denoise in record_samplers.DENOISE:
                name = f"{sampler}.{schedule}.{denoise}"
                sigmas = samplers.sigmas(sampler, schedule, STEPS, denoise)
                out[f"sampling.sigmas.{name}"] = sigmas
                out[f"sampling.end.{name}"] = samplers.sample(sampler, out["sampling.start"], sigmas)


def record_step(model, out):
    """One training step of the concepts' rows: both losses, their gradients, AdamW."""
    unet, size, t = model["unet"], model["unet"].config.sample_size, model["timesteps"][0]
    schedule = DDIMScheduler.from_pretrained(model["folder"] / "scheduler")
    z, eps = noise("step.latents", (1, 4, size, size)), noise("step.noise", (1, 4, size, size))
    steps = torch.tensor([t])
    z_t = schedule.add_noise(z, eps, steps)
    velocity = schedule.config.prediction_type == "v_prediction"
    target = schedule.get_velocity(z, eps, steps) if velocity else eps
    shapes = [(0.35, 0.3, 0.25), (0.65, 0.7, 0.2)]
    union = torch.stack([mask(size, size, *s) for s in shapes]).amax(0)[None, None]
    rows = model["rows"].clone().requires_grad_(True)
    context = encode(model["text_encoder"], torch.tensor([model["ids"]]), rows)
    prediction = unet(z_t, steps, context).sample
    maps = model["observer"].maps
    side = max(p.shape[2] for n, p in maps.items() if not n.startswith("mid_block"))
    side = int(side**0.5)
    masks = torch.stack([mask(side, side, *s) for s in shapes])
    masked, attention = losses(prediction, target, union, maps, masks, model["positions"])
    out["step.latents"], out["step.noise"], out["step.noisy"], out["step.target"] = z, eps, z_t, target
    out["step.union"], out["step.masks"] = union, masks
    out["step.masked_loss"], out["step.attention_loss"] = masked, attention
    out["step.masked_gradient"], = torch.autograd.grad(masked, rows, retain_graph=True)
    out["step.attention_gradient"], = torch.autograd.grad(attention, rows, retain_graph=True)
    optimizer = torch.optim.AdamW([rows], lr=5e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2)
    (masked + LAMBDA * attention).backward()
    out["step.gradient"] = rows.grad.clone()
    torch.nn.utils.clip_grad_norm_([rows], 1.0)
    optimizer.step()
    out["step.update"] = rows.detach() - model["rows"]


def save(name, out, metadata):
    tensors = {key: value.detach().float().clone().contiguous() for key, value in out.items()}
    save_file(tensors, FIXTURES / name, {"versions": VERSIONS, **metadata})
    (FIXTURES / name).chmod(0o644)
    print(f"{name}: {len(tensors)} tensors, {(FIXTURES / name).stat().st_size / 1e6:.2f} MB")


def record_model(folder, name):
    """Everything about one checkpoint in diffusers' layout."""
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32).eval()
    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32).eval()
    text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", torch_dtype=torch.float32).eval()
    for module in (unet, vae, text_encoder):
        module.requires_grad_(False)
    table = text_encoder.get_input_embeddings().weight
    n = table.shape[0]
    rows = table[[n // 3, n // 2]] + 0.2 * table.std() * hash_noise.uniform("rows", (2, table.shape[1]))
    ids = tokenize(folder, PROMPT, ["<v1>", "<v2>"])
    assert ids.count(n) == 1 and ids.count(n + 1) == 1, ids
    model = {"folder": folder, "unet": unet, "vae": vae, "text_encoder": text_encoder, "observer": Observer(unet),
             "rows": rows.detach(), "timesteps": [421, 37], "ids": ids, "positions": [ids.index(n), ids.index(n + 1)],
             "plain_ids": tokenize(folder, PLAIN_PROMPT, []), "empty_ids": tokenize(folder, "", [])}
    out = {}
    with torch.no_grad():
        record_text(model, out)
        record_unet(model, out)
        record_vae(model, out)
        record_sampling(model, out)
    record_step(model, out)
    keys = ["timesteps", "ids", "positions", "plain_ids", "empty_ids"]
    metadata = {key: json.dumps(model[key]) for key in keys}
    metadata |= {"fingerprint": fingerprint(folder), "prompt": PROMPT, "plain_prompt": PLAIN_PROMPT}
    save(name, out, metadata)


def record_true_width():
    """SD 1.5's first level alone: 320 channels, 8 heads of 40, context of 768, a latent that is not square."""
    unet = UNet2DConditionModel(
        sample_size=64, block_out_channels=(320,), layers_per_block=1, down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",), cross_attention_dim=768, attention_head_dim=8).eval()
    hash_noise.fill(unet, "unet.")
    unet.requires_grad_(False)
    observer, positions, timestep = Observer(unet), [5, 76], 613
    latents, target = noise("latents", (1, 4, 32, 48)), noise("target", (1, 4, 32, 48))
    context = noise("context", (1, 77, 768)).requires_grad_(True)
    prediction = unet(latents, timestep, context).sample
    out = {f"attention.{name}": p[..., positions] for name, p in observer.maps.items()}
    union = mask(32, 48, 0.4, 0.5, 0.3)[None, None]
    masks = torch.stack([mask(32, 48, 0.4, 0.5, 0.3), mask(32, 48, 0.7, 0.2, 0.2)])
    masked, attention = losses(prediction, target, union, observer.maps, masks, positions)
    out |= {"prediction": prediction, "union": union, "masks": masks}
    out["masked_loss"], out["attention_loss"] = masked, attention
    out["masked_gradient"], = torch.autograd.grad(masked, context, retain_graph=True)
    out["attention_gradient"], = torch.autograd.grad(attention, context)
    config = {key: value for key, value in unet.config.items() if not key.startswith("_")}
    metadata = {"config": json.dumps(config), "positions": json.dumps(positions), "timestep": str(timestep)}
    save("sd15-width.safetensors", out, metadata)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, default=ROOT / "plugin/crates/sprites/model")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    FIXTURES.mkdir(parents=True, exist_ok=True)
    small = FIXTURES / "sd2-small"
    shutil.rmtree(small, ignore_errors=True)
    small_model.write(small)
    record_model(small, "sd2-small.safetensors")
    record_model(arguments.model, "sprites.safetensors")
    record_true_width()


if __name__ == "__main__":
    main()
