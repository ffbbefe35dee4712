"""Seconds and memory of one token-learning step in PyTorch and diffusers.

The same step as `cargo run --release -p stable-diffusion --example step_cost`: prompt to context, U-Net forward,
both losses, backward to two learned rows of the token table; U-Net and text encoder are frozen, weights random.
Self-attention and unwatched cross-attention use torch's fused attention; watched layers compute their map.

    python step_cost.py [sprites|sd15] [latent width] [steps] [threads] [f32|bf16] [contiguous|channels_last]
"""

import resource
import sys
import time

import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

name = sys.argv[1] if len(sys.argv) > 1 else "sprites"
size = int(sys.argv[2]) if len(sys.argv) > 2 else 32
n_steps = int(sys.argv[3]) if len(sys.argv) > 3 else 3
if len(sys.argv) > 4:
    torch.set_num_threads(int(sys.argv[4]))
dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[sys.argv[5] if len(sys.argv) > 5 else "f32"]
channels_last = sys.argv[6:7] == ["channels_last"]
torch.manual_seed(0)

if name == "sprites":
    down, up = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
    unet = UNet2DConditionModel(sample_size=32, block_out_channels=(64, 128, 192), layers_per_block=1, down_block_types=down,
                                up_block_types=up, cross_attention_dim=128, attention_head_dim=4)
    text = CLIPTextConfig(vocab_size=930, hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4)
    resolution = 16
else:
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    text = CLIPTextConfig(vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    resolution = 16 * size // 64
text = CLIPTextModel(text)
unet.requires_grad_(False).eval().to(dtype)
if channels_last:
    unet.to(memory_format=torch.channels_last)
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
            maps.append(p[..., [4, 6]].mean(0))
        return attn.to_out[0](attn.batch_to_head_dim(torch.bmm(p, v)))


watched = Watched()
unet.set_attn_processor({
    key: watched if key.endswith("attn2.processor") and "mid" not in key else processor
    for key, processor in unet.attn_processors.items()
})

table = text.get_input_embeddings()
rows = torch.randn(2, table.weight.shape[1]).requires_grad_(True)


class Embedding(torch.nn.Module):
    def forward(self, ids):
        return torch.nn.functional.embedding(ids, torch.cat([table.weight, rows]))


vocab = table.weight.shape[0]
text.set_input_embeddings(Embedding())
ids = torch.ones(1, 77, dtype=torch.long)
ids[0, 4], ids[0, 6] = vocab, vocab + 1
noisy, noise = torch.randn(1, 4, size, size), torch.randn(1, 4, size, size)
mask = (torch.arange(size) < size / 2).float().view(1, 1, 1, size)
target = (torch.arange(resolution) < resolution / 2).float().expand(resolution, resolution).reshape(-1, 1)


def loss_of():
    maps.clear()
    context = text(ids)[0].to(dtype)
    prediction = unet(noisy.to(dtype), torch.tensor([421]), context).sample.float()
    a = torch.stack(maps).float().mean(0)
    a = a / a.amax(0, keepdim=True)
    return (((prediction - noise) * mask) ** 2).mean() + 0.01 * ((a - target) ** 2).mean(0).sum()


for step in range(n_steps):
    rows.grad = None
    start, cpu = time.time(), time.process_time()
    loss = loss_of()
    forward = time.time() - start
    loss.backward()
    total = time.time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 / 1024
    print(f"step {step}: {total:.3f} s = forward {forward:.3f} + backward {total - forward:.3f}, CPU {time.process_time() - cpu:.2f} s; "
          f"|gradient| {rows.grad.norm():.3e}; peak {peak:.2f} GiB", flush=True)
with torch.no_grad():
    start = time.time()
    loss_of()
    print(f"without gradients: {time.time() - start:.3f} s")
