"""Train the U-Net and the text encoder together on the encoded scenes.

The loss is the noise's squared error with a min-SNR weight, plus two terms that teach a word's attention map where the
thing it names is: the divergence of every layer's map from the true mask, and one minus a soft intersection over union
of the averaged 16x16 map, min-max normalized and softly thresholded the way an extractor uses it.

    python denoiser.py --settings released --stage larger --data DIR/larger --base MODEL --out MODEL

``--base`` gives the tokenizer, the autoencoder and, where it has them, the weights to start from.
"""
import argparse
import datetime
import glob
import os
import pickle
import time

import numpy as np
import torch
import torch.nn.functional as F

import checkpoint
import compose
import groupnorm
import networks
import parallel
from settings import NAMED


class Scenes:
    """Latents, masks (at latent resolution) and contents of the composed scenes."""

    def __init__(self, folder):
        files = sorted(glob.glob(f"{folder}/latents_*.npy"))
        side = lambda f, what: f.replace("latents_", what + "_")
        self.latents = np.concatenate([np.load(f) for f in files])
        self.masks = np.concatenate([np.load(side(f, "masks")) for f in files])
        self.contents = sum((pickle.load(open(side(f, "contents")[:-3] + "pkl", "rb")) for f in files), [])

    def __len__(self):
        return len(self.latents)

    def background_mask(self, i):
        return 255 - np.minimum(255, self.masks[i].astype(np.int32).sum(0)).astype(np.uint8)


class Batches:
    """Endless shuffled batches: latents, where objects are, captions, and the words that name something, with its mask."""

    def __init__(self, scenes, size, rng, settings):
        self.scenes, self.size, self.rng, self.settings = scenes, size, rng, settings
        self.order = np.array([], int)

    def next(self):
        if len(self.order) < self.size:
            self.order = self.rng.permutation(len(self.scenes))
        chosen, self.order = self.order[:self.size], self.order[self.size:]
        captions, named = [], []
        for row, i in enumerate(chosen):
            classes, groups, background = self.scenes.contents[i]
            text, words = compose.caption(self.rng, classes, groups, background, self.settings.caption)
            captions.append(text)
            for k, word in enumerate(words):
                if word is not None and words.count(word) == 1:
                    named.append((row, word, self.scenes.masks[i, k]))
            if background in text.replace(",", " ").split():
                named.append((row, background, self.scenes.background_mask(i)))
        objects = np.minimum(255, self.scenes.masks[chosen].astype(np.int32).sum(1, keepdims=True)) / 255
        return torch.from_numpy(self.scenes.latents[chosen]).float(), torch.from_numpy(objects).float(), captions, named


def spread_loss(maps, rows, columns, masks):
    """Mean divergence of the true mask from each layer's map, both taken as distributions over the pixels."""
    total = 0.0
    for m in maps:
        side = int(m.shape[1] ** 0.5)
        share = m[rows, :, columns].float()
        share = share / (share.sum(1, keepdim=True) + 1e-8)
        truth = F.adaptive_avg_pool2d(masks[:, None], side).flatten(1)
        truth = truth / (truth.sum(1, keepdim=True) + 1e-6)
        total = total + (truth * ((truth + 1e-8).log() - (share + 1e-6).log())).sum(1).mean()
    return total / len(maps)


def overlap_loss(maps, rows, columns, masks, usable, threshold, steep=12.0):
    """One minus the soft IoU of the averaged 16x16 map, enlarged to the masks' resolution."""
    fine = torch.stack([m[rows, :, columns].float() for m in maps if m.shape[1] == 256]).mean(0)
    low, high = fine.amin(1, keepdim=True), fine.amax(1, keepdim=True)
    normal = ((fine - low) / (high - low + 1e-8)).view(-1, 1, 16, 16)
    normal = F.interpolate(normal, size=masks.shape[-1], mode="bilinear", align_corners=False)[:, 0]
    inside = torch.sigmoid(steep * (normal - threshold)).flatten(1)
    truth = masks.flatten(1)
    both = (inside * truth).sum(1)
    loss = 1 - both / (inside.sum(1) + truth.sum(1) - both + 1e-6)
    return (loss * usable).sum() / usable.sum().clamp(min=1)


class Trainer:
    def __init__(self, rank, world, settings, stage, data, base):
        self.rank, self.world, self.s = rank, world, stage
        torch.manual_seed(0)
        self.tokenizer = networks.load_tokenizer(base)
        fresh = not os.path.exists(f"{base}/unet")
        self.unet = networks.new_unet() if fresh else networks.load_unet(base)
        self.text = networks.new_text_encoder(self.tokenizer) if fresh else networks.load_text_encoder(base)
        self.unet.train(), self.text.train()
        groupnorm.install(self.unet.to(memory_format=torch.channels_last))
        self.keep = networks.KeepMaps()
        self.unet.set_attn_processor(self.keep)
        self.params = list(self.unet.parameters()) + list(self.text.parameters())
        self.adam = torch.optim.AdamW(self.params, lr=stage.rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        self.average = [p.detach().clone() for p in self.params] if rank == 0 else None
        self.signal = networks.alphas_cumprod()
        self.step, self.trace = 0, {}
        seed = sum(map(ord, stage.scenes)) + stage.steps
        torch.manual_seed(seed * 2 + rank)               # the same weights, but other noise in each process
        self.batches = Batches(Scenes(data), stage.batch, np.random.default_rng([seed, rank]), settings)

    def noised(self, latents):
        """Timesteps spread evenly over the batch; noise with a small constant per channel (offset noise)."""
        n = len(latents)
        t = ((torch.arange(n) + torch.rand(n)) * (networks.STEPS / n)).long()[torch.randperm(n)]
        noise = torch.randn_like(latents) + self.s.offset_noise * torch.randn(n, latents.shape[1], 1, 1)
        signal = self.signal[t].view(-1, 1, 1, 1)
        x = signal.sqrt() * latents + (1 - signal).sqrt() * noise
        return x.contiguous(memory_format=torch.channels_last), noise, t

    def loss(self):
        latents, objects, captions, named = self.batches.next()
        ids = self.tokenizer(captions, padding="max_length", max_length=networks.CONTEXT, truncation=True,
                             return_tensors="pt").input_ids
        x, noise, t = self.noised(latents)
        self.keep.take()
        with torch.autocast("cpu", torch.bfloat16):
            guess = self.unet(x, t, self.text(ids).last_hidden_state).sample
        snr = self.signal[t] / (1 - self.signal[t])
        square = (guess.float() - noise).pow(2)
        error = (square * (1 + (self.s.object_weight - 1) * objects)).mean((1, 2, 3))
        loss = (error * snr.clamp(max=self.s.snr_cap) / snr).mean()
        parts, maps = {"error": error.mean().item()}, self.keep.take()
        places = self.places(ids, named) if self.s.spread or self.s.overlap else None
        if places:
            rows, columns, masks = places
            spread = spread_loss(maps, rows, columns, masks)
            overlap = overlap_loss(maps, rows, columns, masks, (t[rows] < 900).float(), self.s.threshold)
            loss = loss + self.s.spread * spread + self.s.overlap * overlap
            parts.update(spread=spread.item(), overlap=overlap.item())
        return loss, parts

    def places(self, ids, named):
        found = []
        for row, word, mask in named:
            at = (ids[row] == self.tokenizer(word).input_ids[1]).nonzero()
            if len(at):
                found.append((row, at[0].item(), mask))
        if not found:
            return None
        rows, columns, masks = zip(*found)
        return torch.tensor(rows), torch.tensor(columns), torch.from_numpy(np.stack(masks)).float() / 255

    def advance(self, rate):
        for group in self.adam.param_groups:
            group["lr"] = rate
        loss, parts = self.loss()
        self.adam.zero_grad(set_to_none=True)
        loss.backward()
        parallel.average_gradients(self.params, self.world)
        norm = torch.nn.utils.clip_grad_norm_(self.params, 1.0).item()
        if np.isfinite(norm):
            self.adam.step()
        self.step += 1
        if self.rank == 0:
            decay = min(self.s.ema, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(self.average, [p.detach() for p in self.params], 1 - decay)
            for k, v in parts.items():
                self.trace[k] = 0.98 * self.trace.get(k, v) + 0.02 * v

    def export(self, out, base):
        """The averaged weights, as a checkpoint."""
        unet, text = dict(self.unet.state_dict()), dict(self.text.state_dict())
        named = [(unet, k) for k, _ in self.unet.named_parameters()] + [(text, k) for k, _ in self.text.named_parameters()]
        for (where, key), value in zip(named, self.average):
            where[key] = value
        text.pop("text_model.embeddings.position_ids", None)
        text.pop("embeddings.position_ids", None)
        if os.path.exists(f"{base}/unet"):
            checkpoint.write_weights(out, base, unet=unet, text_encoder=text)
        else:
            u, t = networks.new_unet(), networks.new_text_encoder(self.tokenizer)
            u.load_state_dict(unet), t.load_state_dict(text, strict=False)
            checkpoint.write(out, u, t, networks.load_autoencoder(base), f"{base}/tokenizer")


def rate_at(stage, step, done):
    rising = min(1.0, (step + 1) / stage.warmup)
    falling = min(1.0, (1 - done) / stage.fall) if stage.fall else 1.0
    return stage.rate * rising * max(0.0, falling)


def run(rank, world, settings, name, data, base, out, end):
    stage = settings.stages[name]
    trainer = Trainer(rank, world, settings, stage, data, base)
    start = exported = time.time()
    done = 0.0
    while True:
        if not end:
            done = trainer.step / stage.steps
        elif trainer.step % 4 == 0:
            done = parallel.from_first((time.time() - start) / (end - start))
        if done >= 1:
            break
        trainer.advance(rate_at(stage, trainer.step, done))
        if rank:
            continue
        if trainer.step % 50 == 0 or trainer.step == 5:
            numbers = " ".join(f"{k} {v:.4f}" for k, v in trainer.trace.items())
            speed = trainer.step * stage.batch * world / (time.time() - start)
            print(f"{datetime.datetime.now():%H:%M:%S} {name} step {trainer.step} {numbers} {speed:.1f} pictures/s", flush=True)
        if time.time() - exported > 60 * stage.export_every:
            exported = time.time()
            trainer.export(out, base)
    if rank == 0:
        trainer.export(out, base)
        print(name, "finished at step", trainer.step, flush=True)


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--settings", default="released", choices=NAMED)
    ap.add_argument("--stage", required=True)
    ap.add_argument("--data", required=True, help="folder of encoded scenes")
    ap.add_argument("--base", required=True, help="model to start from; without a unet/ in it, from scratch")
    ap.add_argument("--out", required=True)
    ap.add_argument("--end", default="", help="HH:MM to stop at, instead of after the stage's steps")
    a = ap.parse_args()
    end = 0.0
    if a.end:
        h, m = map(int, a.end.split(":"))
        end = datetime.datetime.now().replace(hour=h, minute=m, second=0, microsecond=0).timestamp()
    parallel.launch(run, NAMED[a.settings], a.stage, a.data, a.base, a.out, end)


if __name__ == "__main__":
    main()
