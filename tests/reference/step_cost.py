"""Seconds and memory of the method's kinds of work in PyTorch and diffusers: what the example `stage_cost` is compared with.

U-Net and text encoder are frozen, weights random. Self-attention and unwatched cross-attention use torch's fused attention;
layers that are watched compute their map.

    python step_cost.py WORK [WORK ..] [--shapes sprites|sd15] [--side N] [--steps 3] [--threads N] [--precision f32|bf16|f16]
        [--layout contiguous|channels_last] [--openvino | --stable-diffusion-cpp] [--device cuda] [--vocabulary 49408]

WORK is tokens, e-step, lora, sampling, encode or decode. For each it prints a JSON object, as `stage_cost` does: seconds and
seconds of the processor of every time but the first, and the most memory that torch had in tensors, or on a CPU the process.
f32 is never TF32. With --openvino a sampling step is done by OpenVINO, which takes the network over; with
--stable-diffusion-cpp by that, from files of sd15's shapes.
"""

import argparse
import functools
import gc
import json
import tempfile
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

WORKS = ["tokens", "e-step", "lora", "sampling", "encode", "decode"]
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("work", nargs="+", choices=WORKS)
parser.add_argument("--shapes", choices=["sprites", "sd15"], default="sd15")
parser.add_argument("--side", type=int, help="of the picture [default: 128 or 512]")
parser.add_argument("--steps", type=int, default=3)
parser.add_argument("--threads", type=int)
parser.add_argument("--precision", choices=["f32", "bf16", "f16"], default="f32")
parser.add_argument("--layout", choices=["contiguous", "channels_last"], default="contiguous")
parser.add_argument("--openvino", action="store_true")
parser.add_argument("--stable-diffusion-cpp", action="store_true")
parser.add_argument("--device", default="cpu")
parser.add_argument("--vocabulary", type=int, default=49408, help="of sd15")
wanted = parser.parse_args()
name, n_steps = wanted.shapes, wanted.steps
side = wanted.side or {"sprites": 128, "sd15": 512}[name]
size = side // {"sprites": 4, "sd15": 8}[name]
if wanted.threads:
    torch.set_num_threads(wanted.threads)
dtype = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[wanted.precision]
memory_format = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}[wanted.layout]
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
torch.manual_seed(0)
torch.set_default_device(wanted.device)

if name == "sprites":
    down, up = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
    unet = UNet2DConditionModel(sample_size=32, block_out_channels=(64, 128, 192), layers_per_block=1, down_block_types=down,
                                up_block_types=up, cross_attention_dim=128, attention_head_dim=4)
    text = CLIPTextConfig(vocab_size=930, hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4)
    resolution = size // 2
else:
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    text = CLIPTextConfig(vocab_size=wanted.vocabulary, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    resolution = size // 4
text = CLIPTextModel(text)
unet.requires_grad_(False).eval().to(dtype)
unet.to(memory_format=memory_format)
text.requires_grad_(False).eval()

maps = []


class Watched:
    """diffusers' plain processor, keeping the map."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, **kwargs):
        q = attn.head_to_batch_dim(attn.to_q(hidden_states))
        k = attn.head_to_batch_dim(attn.to_k(encoder_hidden_states))
        v = attn.head_to_batch_dim(attn.to_v(encoder_hidden_states))
        p = attn.get_attention_scores(q, k, None)
        if p.shape[1] == resolution**2:
            maps.append(p[..., [4, 6]].unflatten(0, (len(hidden_states), -1)).mean(1))
        return attn.to_out[0](attn.batch_to_head_dim(torch.bmm(p, v)))


plain = unet.attn_processors


def watch():
    watched = Watched()
    unet.set_attn_processor({key: watched if key.endswith("attn2.processor") and "mid" not in key else processor
                             for key, processor in plain.items()})


watch()
tokens = text.get_input_embeddings()
rows = torch.randn(2, tokens.weight.shape[1]).requires_grad_(True)


class Embedding(torch.nn.Module):
    def forward(self, ids):
        return torch.nn.functional.embedding(ids, torch.cat([tokens.weight, rows]))


vocab = tokens.weight.shape[0]
text.set_input_embeddings(Embedding())
ids = torch.ones(1, 77, dtype=torch.long)
ids[0, 4], ids[0, 6] = vocab, vocab + 1
noisy, noise = torch.randn(1, 4, size, size), torch.randn(1, 4, size, size)
mask = (torch.arange(size) < size / 2).float().view(1, 1, 1, size)
target = (torch.arange(resolution) < resolution / 2).float().expand(resolution, resolution).reshape(-1, 1)


def context_of():
    return text(ids)[0].to(dtype)


def observed(latents, context):
    maps.clear()
    prediction = unet(latents.to(dtype), torch.tensor([421]), context).sample.float()
    return prediction, torch.stack(maps).float().mean(0)


def loss_of():
    prediction, a = observed(noisy, context_of())
    a = a[0] / a[0].amax(0, keepdim=True)
    return (((prediction - noise) * mask) ** 2).mean() + 0.01 * ((a - target) ** 2).mean(0).sum()


class Adapted(torch.nn.Module):
    """A projection with low-rank factors beside it."""

    def __init__(self, base, rank=16):
        super().__init__()
        self.base = base
        self.down = torch.nn.Parameter(torch.randn(rank, base.in_features) / rank)
        self.up = torch.nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x, *ignored):
        return self.base(x) + (x @ self.down.to(x.dtype).T) @ self.up.to(x.dtype).T


def adapt():
    """Adapts every projection of the attention; the factors."""
    watch()
    factors = []
    for module in list(unet.modules()):
        for key in ["to_q", "to_k", "to_v"]:
            if isinstance(getattr(module, key, None), torch.nn.Linear):
                setattr(module, key, Adapted(getattr(module, key)))
                factors += [getattr(module, key).down, getattr(module, key).up]
        if isinstance(getattr(module, "to_out", None), torch.nn.ModuleList):
            module.to_out[0] = Adapted(module.to_out[0])
            factors += [module.to_out[0].down, module.to_out[0].up]
    return factors


def train(variables, rate):
    """Does one step when it is called. The picture was encoded before."""
    vae_work(True)()
    optimizer = torch.optim.AdamW(variables, lr=rate)

    def step():
        optimizer.zero_grad()
        loss_of().backward()
        torch.nn.utils.clip_grad_norm_(variables, 1.0)
        optimizer.step()
    return step


@torch.no_grad()
def e_step():
    """Two draws: both concepts' prompt is watched, each one's own asked for the noise."""
    context, latents = context_of().expand(2, -1, -1), noisy.expand(2, -1, -1, -1)
    observed(latents, context)[1].cpu()
    for _ in range(2):
        observed(latents, context)[0].cpu()


def sampling():
    """A guided step with a prompt that is there."""
    unet.set_attn_processor(dict(plain))
    with torch.no_grad():
        latents, context = noisy.expand(2, -1, -1, -1).to(dtype), context_of().expand(2, -1, -1)
    if wanted.openvino:
        return by_openvino(latents.float(), torch.tensor([421.0]), context.float())

    @torch.no_grad()
    def step():
        unet(latents, torch.tensor([421]), context).sample.float()
    return step


def by_openvino(*inputs):
    import openvino

    class Prediction(torch.nn.Module):
        def forward(self, latents, timestep, context):
            return unet(latents, timestep, context).sample

    unet.float()
    shapes = [list(tensor.shape) for tensor in inputs]
    network = openvino.convert_model(Prediction(), example_input=inputs, input=shapes)
    hints = {"INFERENCE_PRECISION_HINT": wanted.precision, "PERFORMANCE_HINT": "LATENCY"}
    if wanted.threads:
        hints["INFERENCE_NUM_THREADS"] = wanted.threads
    compiled = openvino.compile_model(network, "CPU", hints)
    arrays = [tensor.numpy() for tensor in inputs]
    return lambda: compiled(arrays)


def by_stable_diffusion_cpp():
    """Seconds and seconds of the processor of its sampling steps, each of which is two passes of one latent."""
    from safetensors.torch import load_file, save_file
    from stable_diffusion_cpp import StableDiffusion

    ends = []
    text.set_input_embeddings(tokens)
    with tempfile.TemporaryDirectory() as folder:
        for part, directory in [(unet, "unet"), (vae(), "vae"), (text, "text_encoder")]:
            part.float().save_pretrained(Path(folder, directory))
        # The prefix that files had before transformers left it out.
        encoder = Path(folder, "text_encoder", "model.safetensors")
        save_file({f"text_model.{key.removeprefix('text_model.')}": value for key, value in load_file(encoder).items()}, encoder)
        engine = StableDiffusion(model_path=folder, wtype=wanted.precision, n_threads=wanted.threads or -1, verbose=False,
                                 diffusion_flash_attn=True)
    engine.generate_image("a", negative_prompt="b", width=side, height=side, sample_method="euler", sample_steps=n_steps + 1,
                          progress_callback=lambda *_: ends.append((time.perf_counter(), time.process_time())))
    return ([b[i] - a[i] for a, b in zip(ends, ends[1:])] for i in range(2))


@functools.cache
def vae():
    """At f32, as ours in any precision."""
    blocks = {"sprites": (32, 64, 64), "sd15": (128, 256, 512, 512)}[name]
    made = AutoencoderKL(block_out_channels=blocks, layers_per_block={"sprites": 1, "sd15": 2}[name], latent_channels=4,
                        down_block_types=("DownEncoderBlock2D",) * len(blocks), up_block_types=("UpDecoderBlock2D",) * len(blocks),
                        norm_num_groups=8 if name == "sprites" else 32)
    return made.requires_grad_(False).eval().to(memory_format=memory_format)


def vae_work(encodes):
    picture = torch.randn(1, 3, side, side).to(memory_format=memory_format)
    z = noisy.contiguous(memory_format=memory_format)

    @torch.no_grad()
    def work():
        if encodes:
            vae().encode(picture)
        else:
            vae().decode(z)
    return work


def on_gpu():
    return wanted.device.startswith("cuda")


def synchronize():
    if on_gpu():
        torch.cuda.synchronize()


def peak_bytes():
    if on_gpu():
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def begin_peak():
    """What is there counts, what the making of it took does not: as in ours."""
    if on_gpu():
        torch.cuda.reset_peak_memory_stats()
    else:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")


def times(work):
    if wanted.stable_diffusion_cpp:
        return by_stable_diffusion_cpp()
    step, parts = {
        "tokens": lambda: (train([rows], 5e-4), 1),
        "e-step": lambda: (e_step, 2),
        "lora": lambda: (train([rows, *adapt()], 2e-6), 1),
        "sampling": lambda: (sampling(), 1),
        "encode": lambda: (vae_work(True), 1),
        "decode": lambda: (vae_work(False), 1),
    }[work]()
    begin_peak()
    seconds, cpu_seconds = [], []
    for _ in range(n_steps + 1):
        start, cpu = time.perf_counter(), time.process_time()
        step()
        synchronize()
        seconds.append((time.perf_counter() - start) / parts)
        cpu_seconds.append((time.process_time() - cpu) / parts)
    return seconds, cpu_seconds


def measure(work):
    seconds, cpu_seconds = times(work)
    print(json.dumps({"precision": wanted.precision, "work": work, "seconds": seconds[1:], "cpu_seconds": cpu_seconds[1:],
                      "peak_bytes": peak_bytes()}), flush=True)


# Adapters stay where they are put, and sampling takes the watching away: see `adapt`.
for work in sorted(wanted.work, key=["tokens", "e-step", "sampling", "encode", "decode", "lora"].index):
    measure(work)
