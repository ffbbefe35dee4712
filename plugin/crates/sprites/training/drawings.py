"""Rasterize the drawings and split them into training and held-out ones.

    python drawings.py --icons DIR --out DIR/drawings.pkl

``--icons`` holds one folder per style with the package's icons.json. Each drawing is cropped to its alpha.
"""
import argparse
import io
import json
import pathlib
import pickle

import numpy as np
import resvg_py
from PIL import Image

STYLES = {  # style -> license
    "noto": "Apache-2.0", "twemoji": "CC-BY-4.0", "fluent-emoji": "MIT", "fluent-emoji-flat": "MIT"}
TONES = ["", "-light-skin-tone", "-medium-light-skin-tone", "-medium-skin-tone", "-medium-dark-skin-tone", "-dark-skin-tone"]


def people(name, *more):
    return [name + t for t in TONES] + list(more)


# group -> class word -> drawings' names
CLASSES = {
    "animal": {
        "dog": "dog dog-face poodle guide-dog service-dog".split(), "cat": "cat cat-face black-cat grinning-cat".split(),
        "horse": "horse horse-face carousel-horse".split(), "cow": "cow cow-face ox".split(),
        "pig": "pig pig-face boar".split(), "rabbit": "rabbit rabbit-face".split(), "bear": "bear polar-bear".split(),
        "fox": ["fox"], "lion": ["lion"], "frog": ["frog"], "monkey": "monkey monkey-face gorilla".split(),
        "elephant": "elephant mammoth".split(), "bird": "bird eagle parrot dove".split(), "duck": "duck swan".split(),
        "penguin": ["penguin"], "turtle": ["turtle"], "fish": "fish tropical-fish blowfish".split(),
        "butterfly": ["butterfly"], "crab": "crab lobster".split()},
    "person": {
        "man": people("man", "man-beard", "old-man", "man-curly-hair", "man-red-hair"),
        "woman": people("woman", "old-woman", "woman-curly-hair", "woman-red-hair", "woman-blond-hair"),
        "boy": people("boy"), "girl": people("girl")},
    "vehicle": {
        "car": "automobile oncoming-automobile sport-utility-vehicle racing-car taxi police-car".split(),
        "bus": "bus oncoming-bus minibus trolleybus".split(),
        "truck": "delivery-truck articulated-lorry fire-engine pickup-truck".split(),
        "train": "locomotive train metro high-speed-train".split(), "bicycle": ["bicycle"],
        "airplane": "airplane small-airplane".split(), "rocket": ["rocket"], "boat": "sailboat ship speedboat ferry".split()},
    "food": {
        "pizza": ["pizza"], "burger": ["hamburger"], "cake": "birthday-cake shortcake cupcake".split(),
        "donut": ["doughnut"], "apple": "red-apple green-apple".split(), "banana": ["banana"],
        "strawberry": ["strawberry"], "watermelon": ["watermelon"]},
    "object": {
        "robot": ["robot"], "ball": "soccer-ball basketball volleyball".split(), "guitar": ["guitar"],
        "clock": "mantelpiece-clock alarm-clock".split(), "camera": "camera camera-with-flash".split(),
        "hat": "top-hat womans-hat".split(), "crown": ["crown"], "shoe": "running-shoe mans-shoe hiking-boot".split(),
        "balloon": ["balloon"], "gift": ["wrapped-gift"], "house": "house house-with-garden".split(),
        "tree": "deciduous-tree evergreen-tree".split(), "flower": "sunflower tulip rose hibiscus".split(),
        "mushroom": ["mushroom"], "umbrella": "umbrella umbrella-with-rain-drops".split(),
        "snowman": "snowman snowman-without-snow".split()},
}
# never trained on, class word known; both Fluent styles share a drawing and go together
HELD_DRAWINGS = {
    "noto": "dog cat automobile robot woman-red-hair".split(),
    "twemoji": "poodle rabbit pickup-truck hamburger man-beard".split(),
    "fluent-emoji": "black-cat elephant house".split(), "fluent-emoji-flat": "black-cat elephant house".split()}
# classes never trained on: in a caption they go by the group's word
HELD_CLASSES = {
    "koala": ("animal", "koala"), "dragon": ("animal", "sauropod"), "helicopter": ("vehicle", "helicopter"),
    "pineapple": ("food", "pineapple"), "toy": ("object", "teddy-bear"), "backpack": ("object", "backpack")}


def listing():
    """(class, group, name of the drawing, whether its class is held out)"""
    for group, classes in CLASSES.items():
        for word, names in classes.items():
            yield from ((word, group, n, False) for n in names)
    for word, (group, name) in HELD_CLASSES.items():
        yield word, group, name, True


def svg(package, name):
    """An icon's SVG, following plain aliases; None where the style lacks it."""
    while name not in package["icons"]:
        alias = package.get("aliases", {}).get(name)
        if alias is None or set(alias) - {"parent", "hidden"}:
            return None
        name = alias["parent"]
    icon = package["icons"][name]
    w, h = (icon.get(k, package.get(k, 16)) for k in ("width", "height"))
    return (f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {w} {h}">{icon["body"]}</svg>')


def rasterize(text, side=160, opaque=25, least=200):
    png = resvg_py.svg_to_bytes(svg_string=text, width=side, height=side, skip_system_fonts=True)
    rgba = np.array(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))
    rows, columns = np.where(rgba[..., 3] > opaque)
    if len(rows) < least:
        return None
    return np.ascontiguousarray(rgba[rows.min():rows.max() + 1, columns.min():columns.max() + 1])


def split_of(style, name, held_class):
    if held_class:
        return "held_class"
    return "held_drawing" if name in HELD_DRAWINGS[style] else "train"


def collect(folder):
    packages = {s: json.loads((pathlib.Path(folder) / s / "icons.json").read_text()) for s in STYLES}
    found = []
    for word, group, name, held in listing():
        for style, package in packages.items():
            text = svg(package, name)
            rgba = rasterize(text) if text else None
            if rgba is not None:
                found.append({"id": f"{style}:{name}", "class": word, "group": group, "license": STYLES[style],
                              "split": split_of(style, name, held), "rgba": rgba})
    return found


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--icons", required=True)
    ap.add_argument("--out", required=True)
    a = ap.parse_args()
    found = collect(a.icons)
    pathlib.Path(a.out).parent.mkdir(parents=True, exist_ok=True)
    with open(a.out, "wb") as f:
        pickle.dump(found, f)
    for split in ("train", "held_drawing", "held_class"):
        print(split, sum(d["split"] == split for d in found))


if __name__ == "__main__":
    main()
