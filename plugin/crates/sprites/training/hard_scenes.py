"""Compose the hard evaluation scenes: what the plain ones leave out, one kind at a time.

    python hard_scenes.py --drawings DIR/drawings.pkl --out DIR/hard

writes ``index.json``, ``scenes/*.png`` and ``masks/*.png`` like the plain evaluation scenes, and reads them back to check
that every scene is what its kind says. A scene depends on nothing but the seed, its kind and its number, so that
``--per-kind 2`` writes the first two of each.
"""
import argparse
import json
import pathlib
import pickle
import re
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from PIL import Image
from scipy.ndimage import binary_dilation

from compose import BACKGROUNDS, SIDE, article, choose, covered, enumerate_words, paint, place, vary
from settings import RELEASED

SEED = 2025
FIRST = replace(RELEASED.compose["first"], hue=0.0)     # the colors stay the drawing's own
SPLITS = ("tuning", "test")
LEAST_BORDER = 8        # pixels of one visible mask next to another, for objects that touch
LEAST_VISIBLE = 0.55    # of an object's own area, under those in front of it
LEAST_DIFFERENCE = 35   # gray levels, between two drawings of one class


@dataclass(frozen=True)
class Kind:
    """What a kind of scene asks for; ``counts`` alternate between scenes."""
    counts: tuple = (2, 3)              # objects
    sizes: tuple = None                 # longest side over the picture's side; None: as in training
    overlap: tuple = (0.0, FIRST.overlap)   # of the smaller box; an object reaches the lower bound with some other

    def range(self, count):
        low, high = self.sizes or FIRST.sizes[count]
        return int(np.ceil(low * SIDE)), int(high * SIDE)


KINDS = {
    "plain": Kind(),
    "overlapping": Kind(overlap=(0.05, 0.40)),
    "same_class": Kind(counts=(2, 2)),
    "many": Kind(counts=(4, 5), sizes=(0.24, 0.36)),
    "small": Kind(sizes=(0.16, 0.24)),
    "several": Kind(counts=(2, 2)),
    "no_background": Kind(),
}
# which of three concepts each picture shows
SEVERAL = (((0, 1), (1, 2)), ((0, 1), (1, 2), (0, 2)))

SOURCES = {  # style -> whose, where the license stands
    "noto": ("Noto Emoji (c) Google", "https://www.apache.org/licenses/LICENSE-2.0"),
    "twemoji": ("Twemoji (c) Twitter, Inc and other contributors", "https://creativecommons.org/licenses/by/4.0/"),
    "fluent-emoji": ("Fluent Emoji (c) Microsoft", "https://opensource.org/license/mit"),
    "fluent-emoji-flat": ("Fluent Emoji flat (c) Microsoft", "https://opensource.org/license/mit")}
HELD_OUT = {"held_drawing": "sprite", "held_class": "class", "train": None}


# ---------------------------------------------------------------- who appears

def class_word(drawing):
    return drawing["group"] if drawing["split"] == "held_class" else drawing["class"]


def cast(rng, drawings, count):
    """So many drawings, one of them held out; its word names none of the others, nor the group of one."""
    held, = choose(rng, [d for d in drawings if d["split"] != "train"], 1, 0)
    others = [d for d in drawings if d["split"] == "train" and class_word(held) not in (d["class"], d["group"])]
    chosen = [held, *choose(rng, others, count - 1, 0)]
    return [chosen[k] for k in rng.permutation(count)]


def look(drawing, side=24):
    """The drawing in the middle of a gray square."""
    image = Image.fromarray(drawing["rgba"])
    image.thumbnail((side, side))
    canvas = Image.new("RGB", (side, side), (128, 128, 128))
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2), image)
    return np.asarray(canvas, np.float32)


def difference(one, other):
    one, other = look(one), look(other)
    return min(abs(one - other).mean(), abs(one[:, ::-1] - other).mean())


def motif(drawing):
    """The drawing's name without style and skin tone."""
    return re.sub("(-medium)?(-light|-dark)?-skin-tone$", "", drawing["id"].split(":")[1])


def pairs(drawings):
    """class -> pairs of its drawings that nobody takes for one another: not one motif in two styles or skin tones"""
    found = {}
    for one, other in combinations(drawings, 2):
        if one["class"] == other["class"] and motif(one) != motif(other) and difference(one, other) >= LEAST_DIFFERENCE:
            found.setdefault(one["class"], []).append((one, other))
    return found


# ---------------------------------------------------------------- a picture

def touch(a, b):
    return (binary_dilation(a, np.ones((3, 3))) & b).sum() >= LEAST_BORDER


def fits(kind, boxes, visible, shares):
    """Whether objects with these boxes, visible masks and visible shares make a picture of this kind."""
    low, high = KINDS[kind].overlap
    overlap = {pair: covered(boxes[pair[0]], boxes[pair[1]]) for pair in combinations(range(len(boxes)), 2)}
    if max(overlap.values()) > high:
        return False
    if low == 0:
        return True
    together = [pair for pair, o in overlap.items() if o >= low and touch(visible[pair[0]], visible[pair[1]])]
    return {k for pair in together for k in pair} == set(range(len(boxes))) and min(shares) >= LEAST_VISIBLE


def arrange(rng, kind, drawings):
    """-> premultiplied colors, alphas, boxes, visible masks [objects, 128, 128] in 0..1, visible shares"""
    low, high = KINDS[kind].range(len(drawings))
    while True:
        varied = [vary(rng, d["rgba"], int(rng.integers(low, high + 1)), FIRST) for d in drawings]
        boxes, masks, areas = [], [], []
        for _, alpha in varied:
            apart_from = [] if kind == "overlapping" else boxes
            box = place(rng, alpha.shape, apart_from, FIRST.overlap)
            here = np.s_[box[1]:box[3], box[0]:box[2]]
            for m in masks:
                m[here] *= 1 - alpha
            masks.append(np.zeros((SIDE, SIDE), np.float32))
            masks[-1][here] = alpha
            areas.append((as_bytes(alpha) > 127).sum())
            boxes.append(box)
        visible = [as_bytes(m) > 127 for m in masks]
        shares = [float(v.sum() / a) for v, a in zip(visible, areas)]
        if fits(kind, boxes, visible, shares):
            return varied, boxes, masks, shares


def as_bytes(mask):
    return np.round(mask * 255).astype(np.uint8)


def write_picture(rng, out, name, kind, concepts, word):
    """Compose one picture of the concepts (number -> drawing) and write it and its masks; -> its path, its objects"""
    varied, boxes, masks, shares = arrange(rng, kind, list(concepts.values()))
    canvas = paint(rng, word)
    for (color, alpha), box in zip(varied, boxes):
        here = np.s_[box[1]:box[3], box[0]:box[2]]
        canvas[here] = canvas[here] * (1 - alpha[..., None]) + color
    image = f"scenes/{name}.png"
    Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8)).save(out / image)
    objects = []
    for (k, drawing), box, mask, share in zip(concepts.items(), boxes, masks, shares):
        path = f"masks/{name}_{k}_{concept_name(drawing)}.png"
        Image.fromarray(as_bytes(mask)).save(out / path)
        objects.append({"concept": k, "mask": path, "box_xyxy": list(box), "area": int((as_bytes(mask) > 127).sum()),
                        "visible": round(share, 3)})
    return image, objects


# ---------------------------------------------------------------- a scene

def concept_name(drawing):
    return drawing["id"].replace(":", "_").replace("-", "_")


def describe(drawing):
    source, url = SOURCES[drawing["id"].split(":")[0]]
    return {"concept": concept_name(drawing), "class_word": class_word(drawing), "sprite": drawing["id"],
            "true_class": drawing["class"], "held_out": HELD_OUT[drawing["split"]], "source": source,
            "licence": drawing["license"], "licence_url": url}


def prompt(drawings, background):
    text = "a photo of " + enumerate_words([article(class_word(d)) for d in drawings])
    return f"{text} {BACKGROUNDS[background][0][0]}" if background else text


def scene(out, kind, k, drawings, alike):
    rng = np.random.default_rng([SEED, list(KINDS).index(kind), k])
    odd = (k // 2 + k) % 2      # so that the counts alternate within each split
    word = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    entry = {"id": f"{kind}_{k:03d}", "kind": kind, "split": SPLITS[k % 2],
             "background": None if kind == "no_background" else word}
    if kind == "no_background":
        entry["painted"] = word
    if kind == "several":
        chosen = cast(rng, drawings, 3)
        entry["pictures"] = []
        for n, shown in enumerate(SEVERAL[odd]):
            image, objects = write_picture(rng, out, f"{entry['id']}_{n}", kind, {c: chosen[c] for c in shown}, word)
            text = prompt([chosen[c] for c in shown], word)
            entry["pictures"].append({"image": image, "prompt": text, "objects": objects})
        entry["concepts"] = [describe(d) for d in chosen]
        return entry
    if kind == "same_class":
        among = alike[sorted(alike)[rng.integers(len(alike))]]
        chosen = list(among[rng.integers(len(among))])
    else:
        chosen = cast(rng, drawings, KINDS[kind].counts[odd])
    entry["image"], objects = write_picture(rng, out, entry["id"], kind, dict(enumerate(chosen)), word)
    entry["prompt"] = prompt(chosen, entry["background"])
    entry["concepts"] = [describe(d) | {key: o[key] for key in ("mask", "box_xyxy", "area", "visible")}
                         for d, o in zip(chosen, objects)]
    return entry


# ---------------------------------------------------------------- checks

def check(folder, entry):
    """Assert that a written scene is what its kind says."""
    kind, concepts = entry["kind"], entry["concepts"]
    words, sprites = [c["class_word"] for c in concepts], [c["sprite"] for c in concepts]
    assert len(set(sprites)) == len(sprites)
    assert (entry["background"] is None) == (kind == "no_background")
    if kind == "same_class":
        assert len(words) == 2 and len(set(words)) == 1
    else:
        assert len(set(words)) == len(words) and any(c["held_out"] for c in concepts)
    if kind == "several":
        shown = [[o["concept"] for o in p["objects"]] for p in entry["pictures"]]
        assert shown in [[list(p) for p in pictures] for pictures in SEVERAL] and len(concepts) == 3
        pictures = [(p["image"], p["objects"]) for p in entry["pictures"]]
    else:
        assert len(concepts) in KINDS[kind].counts
        pictures = [(entry["image"], concepts)]
    for image, objects in pictures:
        assert Image.open(folder / image).size == (SIDE, SIDE)
        visible = [np.asarray(Image.open(folder / o["mask"])) > 127 for o in objects]
        assert [int(v.sum()) for v in visible] == [o["area"] for o in objects]
        assert not (np.sum(visible, axis=0) > 1).any()
        boxes = [o["box_xyxy"] for o in objects]
        low, high = KINDS[kind].range(len(objects))
        assert all(low <= max(b[2] - b[0], b[3] - b[1]) <= high for b in boxes)
        assert fits(kind, boxes, visible, [o["visible"] for o in objects])


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--drawings", required=True)
    ap.add_argument("--out", required=True)
    ap.add_argument("--per-kind", type=int, default=20, help="scenes of each kind")
    a = ap.parse_args()
    out = pathlib.Path(a.out)
    for name in ("scenes", "masks"):
        (out / name).mkdir(parents=True, exist_ok=True)
    with open(a.drawings, "rb") as f:
        drawings = pickle.load(f)
    alike = pairs(drawings)
    scenes = [scene(out, kind, k, drawings, alike) for kind in KINDS for k in range(a.per_kind)]
    attribution = sorted({f"{c['source']}, {c['licence']}" for s in scenes for c in s["concepts"]})
    index = {"size": SIDE, "seed": SEED, "attribution": attribution, "scenes": scenes}
    (out / "index.json").write_text(json.dumps(index, indent=1) + "\n")
    for entry in json.loads((out / "index.json").read_text())["scenes"]:
        check(out, entry)
    for kind in KINDS:
        print(kind, *(f"{s} {sum(e['kind'] == kind and e['split'] == s for e in scenes)}" for s in SPLITS))


if __name__ == "__main__":
    main()
