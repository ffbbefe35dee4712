"""The tables and sections of docs/figures.md from the reports of the runs."""

import re
from statistics import mean, stdev

import figure_plots
from figure_runs import (
    ABLATION, HARD_ABLATION, HARD_ABLATION_KINDS, INDEXES, JOINT_STEPS, LEARNED, METHODS, REFERENCE, SECTIONS, SEEDS, SOME_SCENES,
    STARTED, STARTS, configuration, hard_configuration, method, painting, seeds_of, started,
)  # fmt: skip
from PIL import Image, ImageDraw, ImageFont

# of the range of a figure over all pictures that are compared: a smaller difference is level
LEVEL = 0.02
# the section of figures.md that no run writes
NOTES = "notes"
# of em over baseline, in mean IoU, that the hard scenes are asked for
LEAD = 0.1
MASKS = {"objects, first masks": "iou_initial", "objects, last masks": "iou_final", "background": "background"}
TOKENS = {"objects, learned token": "extraction_iou", "masked error": "masked_error", "leak": "leak"}
# what the means of a report call the columns
MEANS = ["object_iou_initial", "object_iou_final", "background_iou_final"]


def table(head, rows):
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in [head, ["---"] * len(head), *rows])


# ---------------------------------------------------------------- means over pairs of picture and concept


def scenes(report, kind=None, ids=None):
    return [s for s in report["scenes"] if kind in (None, s["kind"]) and (ids is None or s["id"] in ids)]


def value(report, column, **which):
    """The mean of a column over the objects of these scenes, or of their backgrounds' last masks; None if there are none."""
    part, field = ("backgrounds", "iou_final") if column == "background" else ("concepts", column)
    values = [concept[field] for scene in scenes(report, **which) for concept in scene[part]]
    return mean(values) if values else None


def over_seeds(reports, column, **which):
    """Mean and deviation of the means of runs that differ in their seed; 0 for one run."""
    values = [value(report, column, **which) for report in reports]
    if None in values:
        return None
    return mean(values), stdev(values) if len(values) > 1 else 0.0


def cell(found, digits=3):
    if found is None:
        return ""
    middle, deviation = found
    return f"{middle:.{digits}f}" + (f" ± {deviation:.{digits}f}" if deviation else "")


def by_round(report, field, ids=None):
    """Steps and means of a list by round; every scene has the same rounds."""
    chosen = scenes(report, ids=ids)
    steps = chosen[0]["steps_by_round"]
    if field == "energy_by_round":
        lists = [scene[field] for scene in chosen]
    else:
        lists = [concept[field] for scene in chosen for concept in scene["concepts"]]
    return steps, [mean(values) for values in zip(*lists)]


# ---------------------------------------------------------------- sections


def masks(docs, reports):
    seeds = {
        label: [reports[method(label, "evaluation", seed=seed)] for seed in seeds_of(label)] for label in METHODS
    }
    rows = [[label] + [cell(over_seeds(runs, column)) for column in MASKS.values()] for label, runs in seeds.items()]
    for mode in REFERENCE:
        label = f"{mode}, PyTorch reference"
        if label in reports:
            rows.append([label] + [f"{reports[label]['mean'][key]:.3f}" for key in MEANS])
    curves = {label: by_round(runs[0], "iou_by_round") for label, runs in seeds.items()}
    figure_plots.curves(docs / "iou-by-round.svg", {"": curves}, "steps", "mean IoU of the objects")
    energies = {f"seed {seed}": by_round(report, "energy_by_round") for seed, report in zip(SEEDS, seeds["em"])}
    figure_plots.curves(docs / "energy-by-round.svg", {"": energies}, "steps", "energy, nats per pixel")
    lowest = {seed: min(c["iou_final"] for s in report["scenes"] for c in s["concepts"]) for seed, report in zip(SEEDS, seeds["em"])}
    rounds = zip(*by_round(seeds["em"][0], "iou_by_round"), by_round(seeds["em"][0], "energy_by_round")[1])
    return f"""## Masks

The {len(seeds["em"][0]["scenes"])} evaluation scenes with several concepts; mean and deviation of {len(SEEDS)} seeds, or seed
{SEEDS[0]} where there is no deviation.

{table(["", *MASKS], rows)}

`em` starts from the masks of the class words and re-estimates them; `baseline` keeps the first masks of attention alone.
The worst object of `em` has at last, seed by seed, {", ".join(f"{v:.2f}" for v in lowest.values())}.

![Mean IoU after every round](iou-by-round.svg)

Seed {SEEDS[0]}, `em`:

{table(["steps", "objects", "energy, nats per pixel"], [[n, f"{iou:.3f}", f"{energy:.4f}"] for n, iou, energy in rounds])}

![Mean energy after every round](energy-by-round.svg)
"""


def starts(docs, reports):
    ids = SOME_SCENES["evaluation"]
    panels, rows = {}, []
    for start, title in STARTS.items():
        runs = {label: reports[started(label, start)] for label in STARTED}
        panels[f"from {title}"] = {label: by_round(report, "iou_by_round", ids) for label, report in runs.items()}
        for label, report in runs.items():
            figures = [value(report, column, ids=ids) for column in MASKS.values()]
            rows.append([f"{label}, from {title}"] + [f"{figure:.3f}" for figure in figures])
    figure_plots.curves(docs / "starts.svg", panels, "steps", "mean IoU of the objects")
    return f"""## Starts

Every other one of the evaluation scenes, seed {SEEDS[0]}. From no word names are arbitrary: masks are matched with the true ones by
the last round's.

{table(["", *MASKS], rows)}

![Mean IoU after every round, by start](starts.svg)
"""


def hard(docs, reports):
    runs = {label: reports[method(label, "hard")] for label in STARTED}
    kinds = list(dict.fromkeys(scene["kind"] for scene in runs["em"]["scenes"]))
    columns = {"baseline": ("baseline", "iou_final"), "em, first masks": ("em", "iou_initial"), "em, last masks": ("em", "iou_final")}
    rows = [
        [name] + [f"{value(runs[label], field, kind=kind):.3f}" for label, field in columns.values()]
        for name, kind in [*((f"`{kind}`", kind) for kind in kinds), ("all", None)]
    ]
    series = {
        name: ([value(runs[label], field, kind=kind) for kind in kinds], None) for name, (label, field) in columns.items()
    }
    worst = [min(scenes(runs["em"], kind=kind), key=last_masks)["id"] for kind in kinds]
    worst_scenes(worst).save(docs / "worst-scenes.png")
    figure_plots.bars(docs / "kinds.svg", [kind.replace("_", " ") for kind in kinds], series, "mean IoU of the objects")
    return f"""## Hard scenes

Mean IoU of the objects in the scenes of `plugin/crates/sprites/training/hard_scenes.py`, seed {SEEDS[0]}: the half that nobody tuned
to. Constants were chosen on the other one, on further scenes of the same make, and on the evaluation scenes.

{table(["", *columns], rows)}

![Mean IoU by kind of scene](kinds.svg)

{leads(columns, runs, kinds)}

The worst scene of each kind by the last masks of `em`, its first picture if it has several:

![Pictures and masks of the worst scene of each kind](worst-scenes.png)

{scenes_table(runs["em"])}
"""


def leads(columns, runs, kinds):
    """Where em is ahead by as much as was hoped for, and where it is not."""
    def figures(kind):
        return [value(runs[label], field, kind=kind) for label, field in columns.values()]

    leads = {kind: figures(kind)[2] - figures(kind)[0] for kind in kinds}
    far = [f"`{kind}`" for kind in kinds if leads[kind] >= LEAD]
    near = [f"`{kind}` ({leads[kind]:+.3f})" for kind in kinds if 0 <= leads[kind] < LEAD]
    behind = [f"`{kind}` ({leads[kind]:+.3f})" for kind in kinds if leads[kind] < 0]
    text = f"The last masks of `em` are ahead of `baseline` by {LEAD:.2f} or more in {', '.join(far)}"
    text += f", by less in {', '.join(near)}" if near else ""
    return text + (f", and behind in {', '.join(behind)}." if behind else ".")


def last_masks(scene):
    return mean(concept["iou_final"] for concept in scene["concepts"])


def worst_scenes(ids):
    """A row for every scene: what its run left, and the masks of the baseline before those of em."""
    columns = [("em", 0, "the picture"), ("em", 1, "true masks"), ("baseline", 3, "attention alone"),
               ("em", 2, "em, first masks"), ("em", 3, "em, last masks")]  # fmt: skip
    font, gap, side, foot = ImageFont.load_default(13), 6, 128, 20
    width = len(columns) * (side + gap) - gap
    sheet = Image.new("RGB", (width, len(ids) * (side + foot) + foot), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (label, part, name) in enumerate(columns):
        draw.text((column * (side + gap), 2), name, fill="black", font=font)
        for row, scene in enumerate(ids):
            overlay = Image.open(method(label, "hard").overlays / f"{scene}_0.png")
            own = overlay.crop((part * overlay.width // 4, 0, (part + 1) * overlay.width // 4, overlay.height))
            sheet.paste(own.resize((side, side)), (column * (side + gap), foot + row * (side + foot)))
    for row, scene in enumerate(ids):
        draw.text((0, foot + row * (side + foot) + side + 2), scene, fill="black", font=font)
    return sheet


def ablation(reports):
    rows = []
    for label in ABLATION:
        report = reports[configuration(label)]
        columns = [value(report, column, ids=SOME_SCENES["evaluation"]) for column in MASKS.values()]
        rows.append([label] + [f"{figure:.3f}" for figure in columns])
    hard_rows = []
    for label in HARD_ABLATION:
        runs = [(kind, reports[hard_configuration(label, kind)]) for kind in HARD_ABLATION_KINDS]
        hard_rows.append([label] + [f"{value(report, 'iou_final', kind=kind):.3f}" for kind, report in runs])
    return f"""## What each part brings

`em` on every other one of the evaluation scenes, seed {SEEDS[0]}. Every row but the first changes the configuration `likelihood`
as it says.

{table(["", *MASKS], rows)}

On these scenes either cue says which is which. On hard ones, the half that nobody tuned to, objects by the last masks:

{table(["", *(f"`{kind}`" for kind in HARD_ABLATION_KINDS)], hard_rows)}
"""


def no_words(reports):
    report = reports[method("em", "evaluation", start="random")]
    row = [f"{value(report, column):.3f}" for column in MASKS.values()]
    return f"""## Without words

The evaluation scenes, seed {SEEDS[0]}. Tokens start at random and no word is used; masks are matched with the true ones by the
last round's.

{table(list(MASKS), [row])}
"""


def tokens(reports):
    digits = {"masked_error": 4}
    rows = []
    for label in LEARNED:
        found = {"scenes": [scene for index in INDEXES for scene in reports[painting(label, index)]["scenes"]]}
        rows.append([label] + [f"{value(found, column):.{digits.get(column, 3)}f}" for column in TOKENS.values()])
    n_scenes = sum(map(len, SOME_SCENES.values()))
    return f"""## Tokens

The {n_scenes} scenes of the pictures below, seed {SEEDS[0]}; `given` learns under the true masks. What a token finds by itself, read as the first masks
are; the squared error of the noise inside of the true mask, prompted with the token alone; the share of its attention
outside of its true mask.

{table(["", *TOKENS], rows)}
"""


# ---------------------------------------------------------------- pictures


def painted(report):
    """(scene, file) -> the figures of a picture"""
    return {(scene["id"], p["file"]): p for scene in report["scenes"] for p in scene["pictures"]}


def prompt_margin(picture):
    """How far the right words are ahead of all others; None where there are no others."""
    margins = [m for m in (picture["objects_margin"], picture["background_margin"]) if m is not None]
    return min(margins) if margins else None


def share(values):
    values = list(values)
    return f"{mean(map(float, values)):.3f}" if values else ""


def compared(figures, ours, theirs):
    """Shares of the pictures in which `ours` is ahead, level and behind; level is within LEVEL of the range."""
    everything = [v for values in figures.values() for v in values.values() if v is not None]
    level = LEVEL * (max(everything) - min(everything))
    both = [key for key, v in figures[ours].items() if v is not None and figures[theirs].get(key) is not None]
    differences = [figures[ours][key] - figures[theirs][key] for key in both]
    shares = [sum(d > level for d in differences), sum(abs(d) <= level for d in differences), sum(d < -level for d in differences)]
    return [f"{100 * n / max(len(both), 1):.0f} %" for n in shares]


def pictures(reports):
    by_label = {}
    for label in LEARNED:
        by_label[label] = {}
        for index in INDEXES:
            by_label[label] |= painted(reports[painting(label, index)])
    rows = []
    for label, found in by_label.items():
        margins = [p["identity_margin"] for p in found.values() if p["identity_margin"] is not None]
        prompts = [m for m in map(prompt_margin, found.values()) if m is not None]
        rows.append([
            label, share(p["identity"] for p in found.values()), share(margins), share(m > 0 for m in margins),
            share(p["objects_margin"] > 0 for p in found.values() if p["objects_margin"] is not None),
            share(p["background_margin"] > 0 for p in found.values() if p["background_margin"] is not None),
            share(m > 0 for m in prompts),
        ])  # fmt: skip
    head = ["", "identity", "ahead of the other objects by", "recognized", "right objects", "right background", "right prompt"]
    identity = {label: {key: p["identity"] for key, p in found.items()} for label, found in by_label.items()}
    prompt = {label: {key: prompt_margin(p) for key, p in found.items()} for label, found in by_label.items()}
    # What true masks bring is the most that any could.
    pairs = [("em", "baseline"), ("em", "given"), ("given", "baseline")]
    against = [
        [f"{ours} against {theirs}, {name}", *compared(figures, ours, theirs)]
        for name, figures in [("identity", identity), ("prompt", prompt)]
        for ours, theirs in pairs
    ]  # fmt: skip
    n_scenes = len({scene for scene, _ in by_label["em"]})
    return f"""## Pictures

Tokens and weights after {JOINT_STEPS} steps of the joint stage; every object of {n_scenes} scenes alone on two backgrounds, and all of
a scene together on a third one, {len(by_label["em"])} pictures with the same prompts and seeds for all. *Identity* is the likeness of
the painted thing to the pixels of the concept, *recognized* the share of the pictures of single objects that are more like
that object than like any other of the scene. *Right* is the share of the pictures that the right words explain better
than those of the scene's other objects (or with one object left out), than other backgrounds, and than both; the judge is
the model before it was tuned. Defined, and checked where the truth is known, in `plugin/crates/personalization/src/picture_metrics.rs`.

{table(head, rows)}

The same prompt and seed, picture by picture; level is a difference within {100 * LEVEL:.0f} % of the figure's range over all of these pictures.

{table(["", "ahead", "level", "behind"], against)}
"""


def scenes_table(report):
    rows = []
    for scene in report["scenes"]:
        parts = [f"{c['class_word']} {c['iou_initial']:.2f} → {c['iou_final']:.2f}"
                 for c in [*scene["concepts"], *scene["backgrounds"]]]  # fmt: skip
        rows.append([scene["id"], ", ".join(parts)])
    head = ["scene", "concept: IoU of the first masks → of the last"]
    return table(head, rows)


def scene_by_scene(reports):
    return f"## `em`, scene by scene\n\nSeed {SEEDS[0]}.\n\n{scenes_table(reports[method('em', 'evaluation')])}\n"


def write_document(docs, reports, sections, steps):
    """Writes these sections of figures.md and their plots; the others stay as they are. A comment names each one; the
    section NOTES is written by hand and kept."""
    makers = {
        "masks": lambda: masks(docs, reports), "hard": lambda: hard(docs, reports),
        "starts": lambda: starts(docs, reports),
        "no-words": lambda: no_words(reports), "ablation": lambda: ablation(reports),
        "tokens": lambda: tokens(reports), "pictures": lambda: pictures(reports), "scenes": lambda: scene_by_scene(reports),
    }  # fmt: skip
    docs.mkdir(parents=True, exist_ok=True)
    file = docs / "figures.md"
    _, *parts = re.split(r"<!-- (.*) -->\n", file.read_text() if file.exists() else "")
    texts = dict(zip(parts[::2], parts[1::2]))
    for name in sections:
        texts[name] = makers[name]() + "\n"
    head = f"""# Figures

Masks, tokens and pictures of scenes with true masks, drawings that the bundled checkpoint has never seen unless it says
otherwise; {steps} steps on the tokens, the configuration `likelihood` unless it says otherwise. Written by
`tests/reference/record_figures.py`; the metrics are defined in `plugin/crates/personalization/src/metrics.rs` and
`picture_metrics.rs` beside it. Means are over all pairs of a picture and an object in it.

"""
    text = head + "".join(f"<!-- {name} -->\n{texts[name]}" for name in [NOTES, *SECTIONS] if name in texts)
    file.write_text(text.rstrip() + "\n")
