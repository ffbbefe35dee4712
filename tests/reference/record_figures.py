"""Measures anew every figure and picture of the documents that hangs on the bundled checkpoint.

    python record_figures.py [--steps 120] [--reference DIR] [--only NAME ...]

* localization   training/evaluate.py on the evaluation scenes: the table of the model card
* sheet          its contact sheet
* demo           `cargo run --release`: docs/demo.png
* em             the example `evaluate` in its three modes and with the paper's literal reading: docs/figures.md, where
                 the PyTorch reference stands beside it if --reference names its folder (see evaluate_reference.py)

Some 40 minutes on two cores. The figures of every run are left in target/figures.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

from PIL import Image, ImageDraw, ImageFont

ROOT = pathlib.Path(__file__).resolve().parents[2]
SPRITES = ROOT / "plugin/crates/sprites"
WORK = ROOT / "target/figures"
DEMO_SIDE = 256
# file of the run's folder, what it shows
DEMO_PICTURES = [
    ("input", "the picture"),
    ("previews/7-masks-of-every-round/*-start.png", "masks at the start"),
    ("previews/7-masks-of-every-round/*", "masks after EM"),
    ("samples/picture_00001.png", "<rex> on grass"),
    ("samples/picture_00002.png", "<vw> on a beach"),
    ("samples/picture_00003.png", "<rex> on a beach"),
    ("samples/picture_00004.png", "<rex> and <vw> in a city"),
]
EM_RUNS = {
    "em": ["--mode", "em"],
    "baseline": ["--mode", "baseline"],
    "given": ["--mode", "given"],
    "em, the paper read literally": ["--mode", "em", "--config", "paper"],
}


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
        scene = ROOT / "host-demo/workflows/pictures/dog-and-car.png"
        file = scene if pattern == "input" else max(folder.glob(pattern))
        picture = Image.open(file).convert("RGB").resize((DEMO_SIDE, DEMO_SIDE), Image.BICUBIC)
        out.paste(picture, (k * (DEMO_SIDE + gap), 0))
        at = (k * (DEMO_SIDE + gap) + 2, DEMO_SIDE + 4)
        ImageDraw.Draw(out).text(at, label, fill="black", font=font)
    return out


def em(steps, reference):
    index, model = SPRITES / "scenes/index.json", SPRITES / "model"
    run("cargo", "build", "--release", "--locked", "-p", "personalization", "--example", "evaluate")
    ours = [ROOT / "target/release/examples/evaluate"]
    theirs = [sys.executable, ROOT / "tests/reference/evaluate_reference.py", "--reference", reference]
    jobs = {label: [*ours, *arguments] for label, arguments in EM_RUNS.items()}
    if reference:
        jobs |= {f"{mode}, PyTorch reference": [*theirs, "--mode", mode] for mode in ["em", "baseline"]}
    files = {label: WORK / (re.sub("[^a-z]+", "-", label.lower()) + ".json") for label in jobs}

    def evaluate(label):
        common = ["--model", model, "--scenes", index, "--steps", steps, "--out", files[label]]
        log = files[label].with_suffix(".log").open("w")
        run(*jobs[label], *common, stdout=log, env={**os.environ, "RAYON_NUM_THREADS": "1"})
        return json.loads(files[label].read_text())

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        reports = dict(zip(jobs, pool.map(evaluate, jobs)))
    means = {label: report["mean"] for label, report in reports.items()}
    (ROOT / "docs/figures.md").write_text(em_document(reports["em"], means, steps))


def em_document(report, means, steps):
    columns = {
        "objects, first masks": "object_iou_initial", "objects, last masks": "object_iou_final",
        "background": "background_iou_final", "objects, learned token": "object_extraction_iou",
        "masked error": "masked_error", "leak": "leak",
    }  # fmt: skip
    rows = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for label, mean in means.items():
        cells = [f"{mean[key]:.{4 if key == 'masked_error' else 3}f}" for key in columns.values()]
        rows.append(f"| {label} | " + " | ".join(cells) + " |")
    scenes = ["| scene | concept: IoU of the first masks → of the last |", "|---|---|"]
    for scene in report["scenes"]:
        parts = [f"{c['class_word']} {c['iou_initial']:.2f} → {c['iou_final']:.2f}"
                 for c in [*scene["concepts"], scene["background"]]]  # fmt: skip
        scenes.append(f"| {scene['id']} | {', '.join(parts)} |")
    return f"""# Figures

Masks and tokens of the {len(report["scenes"])} evaluation scenes with several concepts, drawings that the bundled checkpoint
has never seen; {steps} steps on the tokens, seed {report["seed"]}, the recommended configuration unless it says otherwise.
Written by `tests/reference/record_figures.py`; the metrics are defined in `plugin/crates/personalization/src/metrics.rs`.

Mean IoU with the true masks; the squared error of the noise inside of the true mask, prompted with the learned token
alone; the share of a token's attention outside of its true mask.

{chr(10).join(rows)}

`em` starts from the masks of the class words and re-estimates them, `baseline` keeps those first masks, `given` gets the true
ones.

## `em`, scene by scene

{chr(10).join(scenes)}
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--reference", type=pathlib.Path)
    parser.add_argument("--only", nargs="+", choices=["localization", "sheet", "demo", "em"])
    arguments = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    steps = {
        "localization": localization, "sheet": sheet, "demo": demo,
        "em": lambda: em(arguments.steps, arguments.reference),
    }  # fmt: skip
    for name in arguments.only or steps:
        print("==", name, flush=True)
        steps[name]()


if __name__ == "__main__":
    main()
