"""How good a checkpoint is: localization on the evaluation scenes, and a contact sheet of sampled pictures.

Localization. A scene's latent is noised at 50 timesteps, one drawn from each fiftieth of the schedule; the cross-attention
maps of the class word are averaged over heads, the three 16x16 layers and the timesteps, enlarged to 128x128, min-max
normalized and thresholded. The mean intersection over union with the true mask is printed for the drawings held out
singly, for the classes held out whole (their word is the group's), and for the background word. One threshold serves
all; ``--sweep`` shows the others.

Contact sheet. Ten prompts with one object and ten with two, with seeds fixed beforehand.

    python evaluate.py --model ../model --scenes ../scenes --sheet ../contact-sheet.png
"""
import argparse
import json
import pathlib
import textwrap
import zlib

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import networks

THRESHOLD = 0.45
SWEEP = [round(0.05 * k, 2) for k in range(5, 15)]
SINGLES = [
    "a photo of a dog on grass", "a photo of a cat in a room", "a photo of a penguin in snow",
    "a photo of a woman in a city", "a photo of a car in a desert", "a photo of a boat in the sea",
    "a photo of a burger on a wooden table", "a photo of a strawberry against a brick wall",
    "a photo of a robot in the night sky", "a photo of a tree on a mountain"]
PAIRS = [
    "a photo of a dog and a car on a beach", "a photo of a burger and a donut on a wooden table",
    "a photo of a man and a woman in a city", "a photo of a robot and a rocket in the night sky",
    "a photo of a lion and an elephant in a desert", "a photo of a frog and a mushroom in a forest",
    "a photo of a house and a tree on a mountain", "a photo of a penguin and a snowman in snow",
    "a photo of a girl and a cat in a room", "a photo of a guitar and a clock against a brick wall"]


class Localizer:
    def __init__(self, model, timesteps):
        self.tokenizer, self.timesteps = networks.load_tokenizer(model), timesteps
        self.autoencoder = networks.load_autoencoder(model).eval()
        self.text, self.unet = networks.load_text_encoder(model).eval(), networks.load_unet(model).eval()
        self.keep = networks.KeepMaps()
        self.unet.set_attn_processor(self.keep)
        self.signal = networks.alphas_cumprod()

    @torch.no_grad()
    def maps(self, name, picture, prompt, words):
        """{word: min-max normalized map, 128x128}"""
        source = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        latent = self.autoencoder.encode(networks.image_tensor(picture[None])).latent_dist.mean * networks.SCALE
        n = self.timesteps
        t = ((torch.arange(n) + torch.rand(n, generator=source)) * networks.STEPS / n).long()
        signal = self.signal[t].view(-1, 1, 1, 1)
        noisy = signal.sqrt() * latent + (1 - signal).sqrt() * torch.randn(n, *latent.shape[1:], generator=source)
        ids = self.tokenizer(prompt, padding="max_length", max_length=networks.CONTEXT, truncation=True,
                             return_tensors="pt").input_ids
        context = self.text(ids).last_hidden_state
        total, count = 0.0, 0
        for k in range(0, n, 10):
            x = noisy[k:k + 10]
            self.keep.take()
            self.unet(x, t[k:k + 10], context.expand(len(x), -1, -1))
            fine = [m for m in self.keep.take() if m.shape[1] == 256]
            total = total + torch.stack(fine).mean(0).sum(0)
            count += len(x)
        return {w: self.enlarge(total[:, self.column(ids[0], w)] / count) for w in words}

    def column(self, ids, word):
        return (ids == self.tokenizer(word).input_ids[1]).nonzero()[0].item()

    @staticmethod
    def enlarge(values):
        m = F.interpolate(values.view(1, 1, 16, 16), size=networks.SIDE, mode="bilinear", align_corners=False)[0, 0]
        return ((m - m.min()) / (m.max() - m.min() + 1e-9)).numpy()


def overlap(found, truth):
    return (found & truth).sum() / max(1, (found | truth).sum())


def localization(model, folder, timesteps):
    """{kind: array [objects, thresholds]} over the evaluation scenes."""
    folder, localizer, scores = pathlib.Path(folder), Localizer(model, timesteps), {}
    for scene in json.loads((folder / "index.json").read_text())["scenes"]:
        picture = np.array(Image.open(folder / scene["image"]).convert("RGB"))
        wanted = [(c["class_word"], np.array(Image.open(folder / c["mask"]).convert("L")) > 127, c["held_out"])
                  for c in scene["concepts"]]
        rest = ~np.any([mask for _, mask, _ in wanted], axis=0)
        wanted.append((scene["background"], rest, "background"))
        maps = localizer.maps(scene["id"], picture, scene["prompt"], [word for word, _, _ in wanted])
        for word, mask, kind in wanted:
            scores.setdefault(kind, []).append([overlap(maps[word] > s, mask) for s in SWEEP])
    return {kind: np.array(rows) for kind, rows in scores.items()}


def report(scores, sweep=False):
    scores = dict(scores)
    scores["sprite+class"] = np.concatenate([scores[k] for k in ("sprite", "class") if k in scores])
    for kind in ("sprite", "class", "sprite+class", "background"):
        rows = scores[kind]
        line = f"{kind:13s} n {len(rows):3d}  mean IoU {rows[:, SWEEP.index(THRESHOLD)].mean():.3f} at threshold {THRESHOLD}"
        if sweep:
            line += "  " + " ".join(f"{s}:{v:.3f}" for s, v in zip(SWEEP, rows.mean(0)))
        print(line, flush=True)


def sample(model, prompts, seeds, steps, guidance, solver="ddim"):
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
    pipe = StableDiffusionPipeline.from_pretrained(model, safety_checker=None, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if solver == "dpm":
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pictures = []
    for k in range(0, len(prompts), 10):
        generators = [torch.Generator().manual_seed(s) for s in seeds[k:k + 10]]
        pictures += pipe(prompts[k:k + 10], num_inference_steps=steps, guidance_scale=guidance, height=networks.SIDE,
                         width=networks.SIDE, generator=generators).images
    return pictures


def contact_sheet(pictures, labels, columns=5, side=256):
    font, foot = ImageFont.load_default(15), 46
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (side + 8) + 8, rows * (side + foot) + 8), "white")
    draw = ImageDraw.Draw(sheet)
    for k, (picture, label) in enumerate(zip(pictures, labels)):
        x, y = 8 + k % columns * (side + 8), 8 + k // columns * (side + foot)
        sheet.paste(picture.resize((side, side), Image.BICUBIC), (x, y))
        draw.multiline_text((x + 2, y + side + 3), "\n".join(textwrap.wrap(label, 34)), fill="black", font=font)
    return sheet


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--model", default="../model")
    ap.add_argument("--scenes", default="", help="folder of the evaluation scenes; without it, no localization")
    ap.add_argument("--timesteps", type=int, default=50)
    ap.add_argument("--sweep", action="store_true", help="print other thresholds too")
    ap.add_argument("--sheet", default="", help="PNG to write the contact sheet to")
    ap.add_argument("--seed", type=int, default=1000, help="of the first picture; the others count up")
    ap.add_argument("--steps", type=int, default=50)
    ap.add_argument("--guidance", type=float, default=5.0)
    ap.add_argument("--solver", default="ddim", choices=("ddim", "dpm"))
    ap.add_argument("--blind", action="store_true", help="shuffle the pictures and write numbers, not prompts")
    ap.add_argument("--threads", type=int, default=1)
    a = ap.parse_args()
    torch.set_num_threads(a.threads)
    if a.scenes:
        report(localization(a.model, a.scenes, a.timesteps), a.sweep)
    if a.sheet:
        prompts = SINGLES + PAIRS
        pictures = sample(a.model, prompts, [a.seed + k for k in range(len(prompts))], a.steps, a.guidance, a.solver)
        order = np.random.default_rng().permutation(len(prompts)) if a.blind else range(len(prompts))
        labels = [f"{n + 1}" if a.blind else prompts[k] for n, k in enumerate(order)]
        contact_sheet([pictures[k] for k in order], labels).save(a.sheet)
        if a.blind:
            print("prompts in order:", *[f"{n + 1} {prompts[k]}" for n, k in enumerate(order)], sep="\n")


if __name__ == "__main__":
    main()
