"""Compose scenes: up to three drawings on a procedural background, with exact masks and a caption.

    python compose.py --settings released --set first --drawings DIR/drawings.pkl --out DIR/first

writes, per shard, ``pictures_*.npy`` (uint8), ``masks_*.npy`` (the visible part of each object, averaged over 4x4
pixels, uint8) and ``contents_*.pkl`` (classes, groups and background of each scene).
"""
import argparse
import multiprocessing
import os
import pickle

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from settings import NAMED

SIDE, CELL = 128, 4
Y, X = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) / SIDE

# word -> (what follows the objects, captions of the bare background)
BACKGROUNDS = {
    "beach": (("on a beach", "on the beach"), ("a beach", "an empty beach")),
    "grass": (("on grass", "on the grass"), ("grass", "green grass")),
    "sky": (("in the night sky", "in a night sky"), ("the night sky", "a night sky")),
    "forest": (("in a forest", "in the forest"), ("a forest", "a green forest")),
    "sea": (("in the sea", "on the sea"), ("the sea", "the blue sea")),
    "desert": (("in a desert", "in the desert"), ("a desert", "an empty desert")),
    "snow": (("in snow", "in the snow"), ("snow", "a field of snow")),
    "wall": (("against a brick wall", "in front of a brick wall"), ("a brick wall",)),
    "table": (("on a wooden table", "on a table"), ("a wooden table", "a table")),
    "city": (("in a city", "in the city"), ("a city", "a city skyline")),
    "mountain": (("on a mountain", "in front of a mountain"), ("a mountain", "a mountain landscape")),
    "room": (("in a room", "in the room"), ("a room", "an empty room")),
}
OPENINGS = ("a photo of {}", "a picture of {}", "an image of {}", "{}", "{}", "a photo showing {}")


# ---------------------------------------------------------------- painting

class Painter:
    """A canvas with the few strokes the backgrounds are made of. Colors are 0..255 triples, masks 0..1 arrays."""

    def __init__(self, rng):
        self.rng = rng
        self.canvas = np.zeros((SIDE, SIDE, 3), np.float32)

    def color(self, rgb, spread=12):
        return np.clip(np.asarray(rgb, np.float32) + self.rng.normal(0, spread, 3), 0, 255)

    def noise(self, *cells, gain=0.55, wide=1.0):
        """Sum of smooth random fields of so many cells a side; ``wide`` below one stretches them sideways."""
        field, weight, total = np.zeros((SIDE, SIDE), np.float32), 1.0, 0.0
        for n in cells:
            grid = self.rng.standard_normal((n, max(2, round(n * wide)))).astype(np.float32)
            field += weight * np.asarray(Image.fromarray(grid).resize((SIDE, SIDE), Image.BICUBIC))
            total, weight = total + weight, weight * gain
        return field / total

    def grain(self, amount, *cells, **options):
        return self.noise(*cells, **options)[..., None] * np.asarray(amount, np.float32)

    def fill(self, value):
        self.canvas = np.zeros((SIDE, SIDE, 3), np.float32) + value

    def lay(self, mask, value):
        m = np.clip(mask, 0, 1)[..., None]
        self.canvas = self.canvas * (1 - m) + value * m

    def speckle(self, share, blur, strength, low=1.0):
        dots = (self.rng.random((SIDE, SIDE)) < share) * self.rng.uniform(low, 1, (SIDE, SIDE))
        self.canvas = self.canvas + np.clip(gaussian_filter(dots, blur)[..., None] * strength, 0, 230)

    def wave(self, low, high):
        return np.sin(X * self.rng.uniform(low, high) + self.rng.uniform(0, 6))

    def day_sky(self):
        self.fill(blend(self.color((120, 180, 235)), self.color((205, 228, 245)), Y * 2))
        self.lay(np.clip(self.noise(3, 6, 12, wide=0.6) * 1.5 - 0.3, 0, 0.9), np.array((250, 250, 252)))


def blend(first, second, t):
    t = np.clip(t, 0, 1)[..., None]
    return first * (1 - t) + second * t


def edge(x, steep=60):
    """A soft step: 0 well below zero, 1 well above."""
    return np.clip(x * steep + 0.5, 0, 1)


def beach(p):
    horizon = p.rng.uniform(0.28, 0.42)
    water = horizon + p.rng.uniform(0.1, 0.22)
    p.day_sky()
    depth = (Y - horizon) / (water - horizon)
    p.lay(edge(Y - horizon), blend(p.color((40, 130, 190)), p.color((90, 190, 205)), depth) + p.grain(14, 16, 32, 64, wide=0.25))
    shore = water + 0.02 * p.wave(6, 14)
    p.lay(edge(Y - shore, 40), np.array((240, 245, 245)))
    p.lay(edge(Y - shore - 0.025, 40), p.color((232, 208, 155)) + p.grain(12, 8, 32, 64))


def grass(p):
    light = 0.5 + 0.4 * p.noise(6, 12, 40, 64, gain=0.8)
    p.fill(blend(p.color((120, 185, 70)), p.color((60, 135, 45)), light) + p.grain(16, 64, 100, gain=1.0))


def sky(p):
    p.fill(blend(p.color((12, 16, 50), 6), p.color((45, 40, 100), 8), Y + 0.15 * p.noise(3, 6)))
    p.speckle(0.006, 0.6, 700, low=0.4)
    if p.rng.random() < 0.5:
        away = np.hypot(X - p.rng.uniform(0.1, 0.9), Y - p.rng.uniform(0.05, 0.35))
        p.lay(edge(p.rng.uniform(0.05, 0.1) - away), np.array((245, 240, 205)))


def forest(p):
    p.fill(blend(p.color((70, 120, 80)), p.color((30, 70, 40)), Y) + p.grain(18, 8, 24, 48))
    for row in range(2):
        for _ in range(p.rng.integers(4, 8)):
            at, half = p.rng.uniform(0, 1), p.rng.uniform(0.02, 0.04) * (1 + row * 0.5)
            bark = p.color((75, 55, 38), 8) * (0.75 + 0.3 * row) + p.grain(8, 32, 64)
            p.lay(edge(half - abs(X - at - 0.01 * np.sin(Y * 9 + at * 50))), bark)
    p.lay(edge(0.3 + 0.08 * p.noise(8, 16, 32) - Y, 20), p.color((45, 110, 50)) + p.grain(28, 16, 32, 64))
    p.lay(edge(Y - 0.82 + 0.05 * p.noise(6, 12), 20), p.color((62, 88, 42)) + p.grain(16, 24, 64))


def sea(p):
    horizon = p.rng.uniform(-0.1, 0.3)
    p.day_sky()
    waves = p.noise(20, 40, 64, gain=0.8, wide=0.2)
    depth = (Y - horizon) / (1 - horizon)
    p.lay(edge(Y - horizon), blend(p.color((50, 140, 200)), p.color((15, 75, 140)), depth) + waves[..., None] * 26)
    p.lay(edge(Y - horizon) * np.clip(waves * 2 - 1.6, 0, 0.7), np.array((225, 240, 248)))


def desert(p):
    horizon = p.rng.uniform(0.25, 0.4)
    p.fill(blend(p.color((245, 190, 130)), p.color((250, 225, 175)), Y * 2.5))
    for k in range(3):
        crest = horizon + k * 0.16 + 0.06 * p.wave(3, 7) + 0.02 * p.noise(4, 8)
        sand = p.color((222 - 14 * k, 160 - 12 * k, 85 - 6 * k), 7)
        p.lay(edge(Y - crest, 50), blend(sand + 14, sand - 16, (Y - crest) * 3) + p.grain(8, 32, 64, wide=0.4))


def snow(p):
    horizon = p.rng.uniform(0.0, 0.35)
    p.fill(blend(p.color((185, 200, 220)), p.color((215, 225, 235)), Y * 2))
    drifts = np.clip(p.noise(4, 8, 20), 0, 1)[..., None] * np.array((32, 24, 10))
    p.lay(edge(Y - horizon - 0.05 * p.wave(3, 8), 30), p.color((240, 243, 250), 4) - drifts)
    p.speckle(0.005, 0.8, 500)


def wall(p):
    high = p.rng.uniform(9, 14)
    long = high * p.rng.uniform(2, 2.6)
    v = Y * SIDE / high
    row = np.floor(v)
    u = X * SIDE / long + 0.5 * (row % 2) + p.rng.uniform(0, 1)
    column = np.floor(u)
    tone = p.rng.normal(0, 14, (64, 64))[row.astype(int) % 64, column.astype(int) % 64]
    joint = np.minimum(np.minimum(v - row, 1 - v + row) * high, np.minimum(u - column, 1 - u + column) * long)
    p.fill(p.color((170, 80, 60), 14) + tone[..., None] + p.grain(12, 24, 64))
    p.lay(1.6 - joint, p.color((195, 185, 175), 8))


def table(p):
    planks = int(p.rng.integers(3, 6))
    v = Y * planks + p.rng.uniform(0, 1)
    row = np.floor(v).astype(int)
    tone = p.rng.normal(0, 9, 16)[row % 16]
    p.fill(p.color((165, 112, 66), 14) + tone[..., None] + p.grain((24, 19, 13), 32, 64, 100, gain=0.9, wide=0.06))
    p.lay(np.clip(1.5 - np.minimum(v - row, 1 - v + row) * SIDE / planks, 0, 0.8), np.array((70, 42, 24)))


def city(p):
    p.fill(blend(p.color((150, 170, 200)), p.color((225, 205, 190)), Y * 1.3))
    for row, stone in enumerate(((120, 125, 140), (80, 84, 100))):
        left = -p.rng.uniform(0, 0.1)
        while left < 1:
            width, top = p.rng.uniform(0.1, 0.2), p.rng.uniform(0.08, 0.45) + 0.12 * row
            house = ((X > left) & (X < left + width) & (Y > top)).astype(np.float32)
            p.lay(house, p.color(stone, 12))
            u, v = (X - left) * SIDE, (Y - top) * SIDE
            lit = p.rng.random((64, 64))[(v // 7).astype(int) % 64, (u // 6).astype(int) % 64] > 0.45
            glass = np.where(lit[..., None], np.array((250, 222, 140)), np.array((50, 55, 75)))
            p.lay(house * ((u % 6 > 2) & (v % 7 > 3)) * 0.85, glass)
            left += width + p.rng.uniform(0, 0.03)
    p.lay(edge(Y - p.rng.uniform(0.8, 0.88)), p.color((85, 85, 90), 6) + p.grain(8, 32, 64))


def mountain(p):
    p.day_sky()
    for row, stone in enumerate(((110, 110, 130), (85, 95, 100))):
        ridge = np.full((SIDE, SIDE), 9, np.float32)
        for _ in range(3 - row):
            at, top, slope = p.rng.uniform(0, 1), p.rng.uniform(0.12, 0.3) + 0.2 * row, p.rng.uniform(0.7, 1.2)
            ridge = np.minimum(ridge, top + slope * abs(X - at))
        rough = p.noise(8, 16, 32)
        ridge = ridge + 0.03 * rough
        p.lay(edge(Y - ridge), p.color(stone, 8) + rough[..., None] * 20)
        if row == 0:
            p.lay(edge(Y - ridge) * edge(ridge + 0.1 + 0.05 * rough - Y, 25), np.array((242, 246, 250)))
    p.lay(edge(Y - p.rng.uniform(0.78, 0.86) - 0.02 * p.noise(4, 8), 30), p.color((95, 140, 75)) + p.grain(14, 24, 64))


def room(p):
    floor = p.rng.uniform(0.66, 0.76)
    paints = ((225, 205, 170), (185, 205, 215), (215, 185, 185), (200, 210, 180))
    stripe = p.rng.uniform(8, 14)
    p.fill(p.color(paints[p.rng.integers(4)], 10) - 14 * Y[..., None] - 9 * ((X * SIDE % stripe) < stripe / 2)[..., None])
    if p.rng.random() < 0.8:
        x, y = p.rng.uniform(0.05, 0.6), p.rng.uniform(0.06, 0.15)
        w, h = p.rng.uniform(0.22, 0.32), p.rng.uniform(0.25, 0.34)
        pane = lambda rim: ((X > x - rim) & (X < x + w + rim) & (Y > y - rim) & (Y < y + h + rim)).astype(np.float32)
        white = np.array((250, 250, 248))
        p.lay(pane(0.02), white)
        p.lay(pane(0), p.color((165, 210, 240)))
        p.lay(pane(0) * ((abs(X - x - w / 2) < 0.01) | (abs(Y - y - h / 2) < 0.01)), white)
    p.lay(edge(Y - floor), p.color((150, 105, 70)) + p.grain(12, 32, 64, wide=0.1))
    p.lay((abs(Y - floor) < 0.012).astype(np.float32), np.array((245, 245, 240)))


PAINT = {f.__name__: f for f in (beach, grass, sky, forest, sea, desert, snow, wall, table, city, mountain, room)}


def paint(rng, word):
    p = Painter(rng)
    PAINT[word](p)
    return np.clip(p.canvas + rng.normal(0, 2.5, (SIDE, SIDE, 1)), 0, 255).astype(np.float32)


# ---------------------------------------------------------------- objects

def turn_hue(rng, rgb, spread):
    """A small random turn about the gray axis, and a gain."""
    angle = rng.normal(0, spread)
    a, b = (1 - np.cos(angle)) / 3, np.sin(angle) / np.sqrt(3)
    c = np.cos(angle) + a
    matrix = np.array([[c, a - b, a + b], [a + b, c, a - b], [a - b, a + b, c]], np.float32)
    return np.clip(rgb.astype(np.float32) @ matrix.T * rng.uniform(0.92, 1.08), 0, 255)


def vary(rng, rgba, longest, s):
    """The drawing flipped, recolored, turned and resized: premultiplied color and alpha."""
    if rng.random() < 0.5:
        rgba = rgba[:, ::-1]
    color = turn_hue(rng, rgba[..., :3], s.hue).astype(np.uint8)
    image = Image.fromarray(np.ascontiguousarray(np.concatenate([color, rgba[..., 3:]], -1)))
    image = image.rotate(rng.normal(0, s.turn), resample=Image.BILINEAR, expand=True)
    image = image.crop(image.getchannel("A").point(lambda v: 255 * (v > 20)).getbbox())
    by = longest / max(image.size)
    size = [max(2, round(n * by)) for n in image.size]
    out = np.asarray(image.resize(size, Image.LANCZOS if by > 1 else Image.BOX)).astype(np.float32)
    alpha = out[..., 3] / 255
    return out[..., :3] * alpha[..., None], alpha


def covered(a, b):
    """The boxes' intersection over the smaller one."""
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    area = lambda box: (box[2] - box[0]) * (box[3] - box[1])
    return w * h / min(area(a), area(b)) if w > 0 and h > 0 else 0.0


def place(rng, shape, taken, limit, tries=60):
    """A random box of that shape that keeps off the others (less strictly in the last tries)."""
    h, w = shape
    for t in range(tries):
        x, y = (int(rng.integers(0, max(1, SIDE - n))) for n in (w, h))
        box = (x, y, x + w, y + h)
        if all(covered(box, b) < (limit if t < tries - 10 else 0.4) for b in taken):
            break
    return box


def most_familiar(drawings):
    """The drawing that stands for its class: flat, and a face where there is one."""
    return min(drawings, key=lambda d: (not d["id"].startswith("twemoji:"), not d["id"].endswith("-face")))


def choose(rng, drawings, count, familiar):
    """So many drawings of different classes; every class is as likely as any other."""
    by_class = {}
    for d in drawings:
        by_class.setdefault(d["class"], []).append(d)
    names = rng.permutation(sorted(by_class))[:count]
    any_of = lambda group: group[rng.integers(len(group))]
    is_familiar = lambda: familiar > 0 and rng.random() < familiar     # older sets draw no number here
    return [most_familiar(by_class[n]) if is_familiar() else any_of(by_class[n]) for n in names]


def scene(rng, drawings, s):
    """-> picture uint8 [128, 128, 3], masks [objects, 128, 128] in 0..1, the drawings, the background's word"""
    chosen = choose(rng, drawings, int(rng.choice(len(s.counts), p=s.counts)), s.familiar)
    word = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    picture, boxes, masks = paint(rng, word), [], []
    for d in chosen:
        low, high = s.sizes[len(chosen)]
        color, alpha = vary(rng, d["rgba"], rng.uniform(low, high) * SIDE, s)
        box = place(rng, alpha.shape, boxes, s.overlap)
        here = np.s_[box[1]:box[3], box[0]:box[2]]
        picture[here] = picture[here] * (1 - alpha[..., None]) + color
        for m in masks:
            m[here] *= 1 - alpha
        masks.append(np.zeros((SIDE, SIDE), np.float32))
        masks[-1][here] = alpha
        boxes.append(box)
    return np.clip(picture, 0, 255).astype(np.uint8), masks, chosen, word


# ---------------------------------------------------------------- captions

def article(word):
    return ("an " if word[0] in "aeiou" else "a ") + word


def enumerate_words(parts):
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def caption(rng, classes, groups, background, s):
    """-> text, and for each object the word that names it (None where nothing does)"""
    silent = [None] * len(classes)
    if rng.random() < s.empty:
        return "", silent
    opening = OPENINGS[rng.integers(len(OPENINGS))]
    follows, alone = BACKGROUNDS[background]
    if not classes or rng.random() < s.no_object:
        bare = alone[rng.integers(len(alone))] if rng.random() < 0.7 else article(background) + " background"
        return opening.format(bare), silent
    words = [g if rng.random() < s.group_word else c for c, g in zip(classes, groups)]
    named = [("the " + w) if rng.random() < 0.05 else article(w) for w in (words[k] for k in rng.permutation(len(words)))]
    text = enumerate_words(named)
    if rng.random() >= s.no_background:
        text += " " + (follows[rng.integers(len(follows))] if rng.random() < 0.85 else f"with {article(background)} background")
    return opening.format(text), words


# ---------------------------------------------------------------- shards

def write_shard(job):
    k, settings, drawings_file, out = job
    rng = np.random.default_rng([settings.seed, k])
    with open(drawings_file, "rb") as f:
        drawings = [d for d in pickle.load(f) if d["split"] == "train"]
    n, cells = min(settings.shard, settings.scenes - k * settings.shard), SIDE // CELL
    pictures, masks = np.zeros((n, SIDE, SIDE, 3), np.uint8), np.zeros((n, 3, cells, cells), np.uint8)
    contents = []
    for i in range(n):
        pictures[i], visible, chosen, word = scene(rng, drawings, settings)
        for j, m in enumerate(visible):
            masks[i, j] = np.round(m.reshape(cells, CELL, cells, CELL).mean((1, 3)) * 255)
        contents.append(([d["class"] for d in chosen], [d["group"] for d in chosen], word))
    np.save(f"{out}/masks_{k:03d}.npy", masks)
    with open(f"{out}/contents_{k:03d}.pkl", "wb") as f:
        pickle.dump(contents, f)
    np.save(f"{out}/pictures_{k:03d}.npy", pictures)
    return k


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--settings", default="released", choices=NAMED)
    ap.add_argument("--set", required=True, help="which of the settings' sets of scenes")
    ap.add_argument("--drawings", required=True)
    ap.add_argument("--out", required=True)
    ap.add_argument("--workers", type=int, default=2)
    a = ap.parse_args()
    os.makedirs(a.out, exist_ok=True)
    s = NAMED[a.settings].compose[a.set]
    jobs = [(k, s, a.drawings, a.out) for k in range(-(-s.scenes // s.shard))]
    with multiprocessing.Pool(a.workers) as pool:
        for k in pool.imap(write_shard, jobs):
            print("shard", k, flush=True)


if __name__ == "__main__":
    main()
