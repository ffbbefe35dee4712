"""Measures anew every figure and picture of the documents that hangs on the bundled checkpoint.

    python record_figures.py [--steps 80] [--reference DIR] [--only NAME ...] [--sections NAME ...]
        [--limit N --docs DIR]

* localization   training/evaluate.py on the evaluation scenes: the table of the model card
* sheet          its contact sheet
* demo           `cargo run --release`: docs/demo.png
* em             the example `evaluate` on the evaluation scenes and the hard ones: docs/figures.md and its plots, where
                 the PyTorch reference stands beside it if --reference names its folder (see evaluate_reference.py)

Some hours on two cores, most of them for `em`. Its runs are those of figure_runs.py; what they find is left in
target/figures, and a run whose program, arguments, weights and scenes are the same is not made again.
"""

import argparse
import pathlib
import subprocess
import sys
import tempfile

from figure_document import write_document
from figure_runs import ROOT, SECTIONS, SPRITES, WORK, make, planned
from PIL import Image, ImageDraw, ImageFont

DEMO_SIDE = 256
# file of the run's folder, what it shows
DEMO_PICTURES = [
    ("input", "the picture"),
    ("previews/7-masks-of-every-round/*-attention-alone.png", "masks by attention alone"),
    ("previews/7-masks-of-every-round/*", "masks after EM"),
    ("samples/picture_00001.png", "<bob> on grass"),
    ("samples/picture_00002.png", "<tom> in a room"),
    ("samples/picture_00003.png", "<tom> in snow"),
    ("samples/picture_00004.png", "<bob> and <tom> in a city"),
]


def run(*command, **options):
    print("$", *command, flush=True)
    return subprocess.run([str(c) for c in command], cwd=ROOT, check=True, **options)


def replace_between(file, name, text):
    """Puts text between `<!-- name -->` and `<!-- /name -->`."""
    before, rest = file.read_text().split(f"<!-- {name} -->\n")
    _, after = rest.split(f"<!-- /{name} -->")
    file.write_text(f"{before}<!-- {name} -->\n{text}<!-- /{name} -->{after}")


def localization():
    sys.path.insert(0, str(SPRITES / "training"))
    import evaluate

    scores = evaluate.localization(SPRITES / "model", SPRITES / "scenes", 50)
    kinds = {"the drawing": ["sprite"], "its whole class (named by the group's word)": ["class"],
             "both": ["sprite", "class"], "background word": ["background"]}  # fmt: skip
    shown = [0.45, 0.5]
    rows = ["| held out | objects | " + " | ".join(f"at {t}" for t in shown) + " |", "|---|---|" + "---|" * len(shown)]
    for label, parts in kinds.items():
        ious = [row for part in parts for row in scores[part]]
        means = [sum(row[evaluate.SWEEP.index(t)] for row in ious) / len(ious) for t in shown]
        rows.append(f"| {label} | {len(ious)} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |")
    print("\n".join(rows), flush=True)
    replace_between(SPRITES / "README.md", "localization", "\n".join(rows) + "\n")


def sheet():
    run(sys.executable, SPRITES / "training/evaluate.py", "--model", SPRITES / "model",
        "--sheet", SPRITES / "contact-sheet.png")  # fmt: skip


def demo():
    folder = tempfile.mkdtemp(prefix="demo-", dir=WORK)
    run("cargo", "run", "--release", "--locked", "--", "run", "--out", folder)
    strip(pathlib.Path(folder)).save(ROOT / "docs/demo.png")


def strip(folder):
    """The pictures of a run of the demo in a row, each above what it shows."""
    font, gap, foot = ImageFont.load_default(15), 8, 26
    width = len(DEMO_PICTURES) * (DEMO_SIDE + gap) - gap
    out = Image.new("RGB", (width, DEMO_SIDE + foot), "white")
    for k, (pattern, label) in enumerate(DEMO_PICTURES):
        scene = ROOT / "host-demo/workflows/pictures/man-and-cat.png"
        file = scene if pattern == "input" else max(folder.glob(pattern))
        picture = Image.open(file).convert("RGB").resize((DEMO_SIDE, DEMO_SIDE), Image.BICUBIC)
        out.paste(picture, (k * (DEMO_SIDE + gap), 0))
        at = (k * (DEMO_SIDE + gap) + 2, DEMO_SIDE + 4)
        ImageDraw.Draw(out).text(at, label, fill="black", font=font)
    return out


def em(arguments):
    sections = arguments.sections or SECTIONS
    reports = make(planned(sections), arguments.steps, arguments.limit, arguments.reference)
    write_document(arguments.docs, reports, sections, arguments.steps)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--reference", type=pathlib.Path)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, help="of figures.md; the others stay as they are")
    parser.add_argument("--limit", type=int, help="only so many scenes a run, to see whether all of this works")
    parser.add_argument("--docs", type=pathlib.Path, default=ROOT / "docs", help="where figures.md and its plots go")
    parser.add_argument("--only", nargs="+", choices=["localization", "sheet", "demo", "em"])
    arguments = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    steps = {"localization": localization, "sheet": sheet, "demo": demo, "em": lambda: em(arguments)}
    for name in arguments.only or steps:
        print("==", name, flush=True)
        steps[name]()


if __name__ == "__main__":
    main()
