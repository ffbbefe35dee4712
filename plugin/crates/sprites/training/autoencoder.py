"""Train the autoencoder (four times smaller each way, four channels) on crops of the scenes; encode the scenes.

    python autoencoder.py train  --settings released --data DIR/first --out MODEL/vae
    python autoencoder.py encode --data DIR/first --model MODEL

After training the latents' means and deviations are folded into the two 1x1 convolutions at the bottleneck, so that
Stable Diffusion's scaling factor 0.18215 gives latents of unit variance.
"""
import argparse
import glob
import math
import os
import time

import numpy as np
import torch
import torch.nn.functional as F

import groupnorm
import networks
import parallel
from settings import NAMED

PIXELS = "pictures_*.npy"


# ---------------------------------------------------------------- initialization

class OpenChannels:
    """Start from an autoencoder that already passes a low-pass RGB picture through.

    GroupNorm removes absolute levels, so that from a random start hues stay wrong for long. Here the residual stream
    keeps channels 2..4 for +RGB and 5..7 for -RGB; channels 0 and 1 are constants (+LEVEL, -LEVEL) that make the last
    norm of each half the identity on their groups, and silu(x) - silu(-x) = x undoes the last activation. It only sets
    initial values; everything trains.
    """
    LEVEL = 6.0
    KEPT = list(range(8))
    SOURCE = [None, None, 2, 3, 4, 5, 6, 7]
    # the decoder's narrow blocks have three groups of four channels: two constants, then +c and -c
    NARROW = list(range(12))

    def __init__(self, vae):
        self.vae = vae

    def apply(self):
        with torch.no_grad():
            self.encoder()
            self.bottleneck()
            self.decoder()
        return self.vae

    @staticmethod
    def clear(conv, rows):
        conv.weight[rows] = 0
        conv.bias[rows] = 0

    def carry(self, conv, rows, sources, taps):
        """Each of ``rows`` becomes the source channel filtered by ``taps``, or nothing."""
        self.clear(conv, rows)
        for row, source in zip(rows, sources):
            if source is not None:
                conv.weight[row, source] = taps

    def quiet(self, resnet, rows):
        self.clear(resnet.conv2, rows)

    def middle(self, half):
        for r in half.mid_block.resnets:
            self.quiet(r, self.KEPT)
        for a in half.mid_block.attentions:
            self.clear(a.to_out[0], self.KEPT)

    def constants(self, conv, firsts):
        for k in firsts:
            conv.bias[k], conv.bias[k + 1] = self.LEVEL, -self.LEVEL

    def encoder(self):
        half = self.vae.encoder
        self.clear(half.conv_in, self.KEPT)
        for c in range(3):
            half.conv_in.weight[2 + c, c, 1, 1], half.conv_in.weight[5 + c, c, 1, 1] = 1, -1
        box = torch.zeros(3, 3)
        box[:2, :2] = 0.25
        for block in half.down_blocks:
            for r in block.resnets:
                self.quiet(r, self.KEPT)
                if r.conv_shortcut is not None:
                    self.carry(r.conv_shortcut, self.KEPT, self.SOURCE, torch.ones(1, 1))
            for d in block.downsamplers or []:
                self.carry(d.conv, self.KEPT, self.SOURCE, box)
        self.middle(half)
        self.constants(half.mid_block.resnets[-1].conv2, [0])
        half.conv_norm_out.weight[self.KEPT], half.conv_norm_out.bias[self.KEPT] = self.LEVEL / 2, 0

    def bottleneck(self):
        half, q = self.vae.encoder, self.vae.quant_conv
        mix = q.weight[3, :, 0, 0].clone()
        fourth = torch.einsum("j,jchw->chw", mix, half.conv_out.weight)
        fourth_bias = mix @ half.conv_out.bias + q.bias[3]
        fourth[self.KEPT] = 0
        for c in range(3):
            self.clear(half.conv_out, [c])
            half.conv_out.weight[c, 2 + c, 1, 1], half.conv_out.weight[c, 5 + c, 1, 1] = 2, -2
        half.conv_out.weight[3], half.conv_out.bias[3] = fourth, fourth_bias
        q.weight.zero_()
        q.bias.zero_()
        for c in range(4):
            q.weight[c, c], q.bias[4 + c] = 1, -5.0

    def decoder(self):
        half, p = self.vae.decoder, self.vae.post_quant_conv
        undo = torch.linalg.inv(p.weight[:, :, 0, 0])
        shift = undo @ p.bias
        self.clear(half.conv_in, self.KEPT)
        for c in range(3):
            for sign, first in ((0.5, 2), (-0.5, 5)):
                half.conv_in.weight[first + c, :, 1, 1], half.conv_in.bias[first + c] = sign * undo[c], -sign * shift[c]
        tent = torch.tensor([1.0, 2.0, 1.0]) / 4
        narrow = {2: 2, 3: 5, 6: 3, 7: 6, 10: 4, 11: 7}        # output channel <- channel of the wide stream
        for block in half.up_blocks:
            for r in block.resnets:
                rows = self.NARROW if r.conv2.out_channels == 32 else self.KEPT
                self.quiet(r, rows)
                if r.conv_shortcut is not None:
                    sources = [narrow.get(k) for k in rows] if rows is self.NARROW else self.SOURCE
                    self.carry(r.conv_shortcut, rows, sources, torch.ones(1, 1))
            for u in block.upsamplers or []:
                self.carry(u.conv, self.KEPT, self.SOURCE, tent[:, None] * tent[None])
        self.middle(half)
        self.constants(half.up_blocks[-1].resnets[-1].conv2, [0, 4, 8])
        half.conv_norm_out.weight[self.NARROW], half.conv_norm_out.bias[self.NARROW] = self.LEVEL / 2 ** 0.5, 0
        half.conv_out.weight.zero_()
        half.conv_out.bias.zero_()
        for c, plus in enumerate((2, 6, 10)):
            half.conv_out.weight[c, plus, 1, 1], half.conv_out.weight[c, plus + 1, 1, 1] = 1, -1


# ---------------------------------------------------------------- training

def shards(folder, limit=20):
    return [np.load(f, mmap_mode="r") for f in sorted(glob.glob(f"{folder}/{PIXELS}"))[:limit]]


def crops(rng, shard, side, count):
    """Random crops, half of them mirrored."""
    out = np.empty((count, side, side, 3), np.uint8)
    for k, i in enumerate(rng.integers(0, len(shard), count)):
        y, x = rng.integers(0, networks.SIDE - side + 1, 2)
        crop = shard[i, y:y + side, x:x + side]
        out[k] = crop[:, ::-1] if rng.random() < 0.5 else crop
    return networks.image_tensor(out)


def fidelity(y, x):
    """Pixels, edges and (most of all) the colors of 4x4 and 16x16 patches."""
    apart = lambda a, b: (a - b).abs().mean()
    edges = apart(y.diff(dim=-1), x.diff(dim=-1)) + apart(y.diff(dim=-2), x.diff(dim=-2))
    pooled = lambda n: apart(F.avg_pool2d(y, n), F.avg_pool2d(x, n))
    return apart(y, x) + 0.5 * edges + 1.5 * pooled(4) + 0.5 * pooled(16) + 2 * (y - x).pow(2).mean()


def train(rank, world, s, data, out):
    torch.manual_seed(0)
    vae = OpenChannels(networks.new_autoencoder().to(memory_format=torch.channels_last)).apply()
    groupnorm.install(vae)
    params = list(vae.parameters())
    torch.manual_seed(1000 + rank)
    rng = np.random.default_rng([0, rank])
    adam = torch.optim.AdamW(params, lr=s.rate, betas=(0.9, 0.99), weight_decay=1e-3)
    pictures, start, step = shards(data), time.time(), 0
    while (done := parallel.from_first((time.time() - start) / (60 * s.minutes))) < 1:
        for group in adam.param_groups:
            group["lr"] = s.rate * min(1, (step + 1) / 50) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * done)))
        # whole pictures towards the end, for the attention in the middle
        side, count = (networks.SIDE, max(2, s.batch // 4)) if done > 0.85 else (64, s.batch)
        x = crops(rng, pictures[rng.integers(len(pictures))], side, count)
        with torch.autocast("cpu", torch.bfloat16):
            code = vae.encode(x).latent_dist
            mean, log_variance = code.mean.float(), code.logvar.float()
            y = vae.decode(mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)).sample
        divergence = 0.5 * (mean ** 2 + log_variance.exp() - 1 - log_variance).mean()
        loss = fidelity(y.float(), x) + s.kl * divergence
        adam.zero_grad(set_to_none=True)
        loss.backward()
        parallel.average_gradients(params, world)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        adam.step()
        step += 1
        if rank == 0 and step % 50 == 0:
            print(f"step {step} loss {loss.item():.4f} done {done:.2f}", flush=True)
    if rank == 0:
        vae.eval()
        fold(vae, pictures[0][:128])
        vae.save_pretrained(out)
        print(f"PSNR {psnr(vae, pictures[0][:64]):.2f} dB after {step} steps")


@torch.no_grad()
def fold(vae, pictures):
    """Latents of zero mean and of deviation 1 / 0.18215, by rewriting the two 1x1 convolutions."""
    z = torch.cat([vae.encode(networks.image_tensor(np.array(pictures[i:i + 32]))).latent_dist.mean for i in range(0, len(pictures), 32)])
    mean, scale = z.mean((0, 2, 3)), z.std((0, 2, 3)) * networks.SCALE
    q, p = vae.quant_conv, vae.post_quant_conv
    q.weight[:4] /= scale.view(4, 1, 1, 1)
    q.bias[:4] = (q.bias[:4] - mean) / scale
    q.bias[4:] -= 2 * scale.log()
    weight = p.weight[:, :, 0, 0].clone()
    p.bias += weight @ mean
    p.weight[:, :, 0, 0] = weight * scale


@torch.no_grad()
def psnr(vae, pictures):
    x = networks.image_tensor(np.array(pictures))
    y = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
    return (-10 * ((y - x) / 2).pow(2).mean((1, 2, 3)).log10()).mean().item()


# ---------------------------------------------------------------- encoding

@torch.no_grad()
def encode(rank, world, data, model):
    vae = networks.load_autoencoder(model).eval().to(memory_format=torch.channels_last)
    groupnorm.install(vae)
    for source in sorted(glob.glob(f"{data}/{PIXELS}"))[rank::world]:
        target, pictures = source.replace("pictures_", "latents_"), np.load(source, mmap_mode="r")
        if os.path.exists(target):
            continue
        latents = np.empty((len(pictures), 4, networks.SIDE // 4, networks.SIDE // 4), np.float16)
        for i in range(0, len(pictures), 50):
            with torch.autocast("cpu", torch.bfloat16):
                mean = vae.encode(networks.image_tensor(np.array(pictures[i:i + 50]))).latent_dist.mean
            latents[i:i + 50] = (mean.float() * networks.SCALE).numpy()
        np.save(target + ".new.npy", latents)
        os.rename(target + ".new.npy", target)
        print(target, flush=True)


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("what", choices=("train", "encode"))
    ap.add_argument("--settings", default="released", choices=NAMED)
    ap.add_argument("--data", required=True)
    ap.add_argument("--out", default="")
    ap.add_argument("--model", default="")
    a = ap.parse_args()
    if a.what == "train":
        parallel.launch(train, NAMED[a.settings].autoencoder, a.data, a.out)
    else:
        parallel.launch(encode, a.data, a.model)


if __name__ == "__main__":
    main()
