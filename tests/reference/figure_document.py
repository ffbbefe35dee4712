"""The tables and sections of docs/figures.md from the reports of the runs."""

import re
from statistics import mean, stdev

import figure_plots
from figure_runs import (
    ABLATION, INDEXES, METHODS, PAINTED, REFERENCE, SECTIONS, SEEDS, STARTED, STARTS, configuration, method,
)  # fmt: skip

# of the range of a figure over all pictures that are compared: a smaller difference is level
LEVEL = 0.02
COLUMNS = {
    "objects, first masks": "iou_initial", "objects, last masks": "iou_final", "background": "background",
    "objects, learned token": "extraction_iou", "masked error": "masked_error", "leak": "leak",
}  # fmt: skip
# what the means of a report call the columns
MEANS = ["object_iou_initial", "object_iou_final", "background_iou_final", "object_extraction_iou", "masked_error", "leak"]


def table(head, rows):
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in [head, ["---"] * len(head), *rows])


# ---------------------------------------------------------------- means over pairs of picture and concept


def scenes(report, kind=None, split=None):
    return [s for s in report["scenes"] if kind in (None, s["kind"]) and split in (None, s["split"])]


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


def by_round(report, field):
    """Steps and means of a list by round; every scene has the same rounds."""
    steps = report["scenes"][0]["steps_by_round"]
    if field == "energy_by_round":
        lists = [scene[field] for scene in report["scenes"]]
    else:
        lists = [concept[field] for scene in report["scenes"] for concept in scene["concepts"]]
    return steps, [mean(values) for values in zip(*lists)]


# ---------------------------------------------------------------- sections


def masks(docs, reports, steps):
    seeds = {label: [reports[method(label, "evaluation", seed=seed)] for seed in SEEDS] for label in METHODS}
    digits = {"masked_error": 4}
    rows = [
        [label] + [cell(over_seeds(runs, column), digits.get(column, 3)) for column in COLUMNS.values()]
        for label, runs in seeds.items()
    ]
    for mode in REFERENCE:
        label = f"{mode}, PyTorch reference"
        if label in reports:
            rows.append([label] + [f"{reports[label]['mean'][key]:.{digits.get(key, 3)}f}" for key in MEANS])
    panels = {}
    for start, title in STARTS.items():
        started = METHODS if start == "class" else STARTED
        runs = {label: reports[method(label, "evaluation", start=start)] for label in started}
        lines = {label: by_round(report, "iou_by_round") for label, report in runs.items() if label != "given"}
        if "given" in runs:
            lines["given: what its tokens find"] = [steps], [value(runs["given"], "extraction_iou")]
        panels[f"from {title}"] = lines
    figure_plots.curves(docs / "iou-by-round.svg", panels, "steps", "mean IoU of the objects")
    n_scenes = len(seeds["em"][0]["scenes"])
    return f"""## Masks

The {n_scenes} evaluation scenes with several concepts; mean and deviation of {len(SEEDS)} seeds.

{table(["", *COLUMNS], rows)}

`em` starts from the masks of the class words and re-estimates them, `baseline` keeps the first masks of attention alone, `given` gets the true
ones. IoU is with the true masks; the masked error is the squared error of the noise inside of the true mask, prompted with
the learned token alone; the leak is the share of a token's attention outside of its true mask.

![Mean IoU after every round, by start](iou-by-round.svg)

Seed {SEEDS[0]}. From no word, and from one word for two objects, names are arbitrary: masks are matched with the true ones by the last
round's.
"""


def hard(docs, reports):
    runs = {label: [reports[method(label, "hard", seed=seed)] for seed in SEEDS] for label in STARTED}
    runs["given"] = [reports[method("given", "hard")]]
    kinds = list(dict.fromkeys(scene["kind"] for scene in runs["em"][0]["scenes"]))
    columns = {
        "first masks": ("em", "iou_initial"), "em, last masks": ("em", "iou_final"),
        "baseline, learned token": ("baseline", "extraction_iou"), "em, learned token": ("em", "extraction_iou"),
        "given, learned token": ("given", "extraction_iou"),
    }  # fmt: skip
    tables = {}
    for split in ["test", "tuning"]:
        rows = [
            [name] + [cell(over_seeds(runs[label], field, kind=kind, split=split)) for label, field in columns.values()]
            for name, kind in [*((f"`{kind}`", kind) for kind in kinds), ("all", None)]
        ]
        tables[split] = table([split, *columns], rows)
    series = {}
    for name, (label, field) in columns.items():
        found = [over_seeds(runs[label], field, kind=kind, split="test") for kind in kinds]
        series[name] = [middle for middle, _ in found], [deviation for _, deviation in found]
    figure_plots.bars(docs / "kinds.svg", [kind.replace("_", " ") for kind in kinds], series, "mean IoU of the objects")
    text = f"""## Hard scenes

Mean IoU of the objects in the scenes of `plugin/crates/sprites/training/hard_scenes.py`, {len(SEEDS)} seeds (`given`: one). Configurations were chosen
on the tuning half; the test half says how good they are.

![Mean IoU by kind of scene, test half](kinds.svg)

{tables["test"]}

{tables["tuning"]}
"""
    if all("energy_by_round" in scene for scene in runs["em"][0]["scenes"]):
        lines = {"em": by_round(runs["em"][0], "energy_by_round")}
        figure_plots.curves(docs / "energy-by-round.svg", {"": lines}, "steps", "mean energy")
        text += "\n![Mean energy of the labeling after every round](energy-by-round.svg)\n"
    return text


def ablation(reports):
    rows = []
    for label in ABLATION:
        evaluation, hard_scenes = (reports[configuration(label, index)] for index in INDEXES)
        found = [value(evaluation, "iou_final"), value(evaluation, "extraction_iou")]
        for split in ["test", "tuning"]:
            found += [value(hard_scenes, column, split=split) for column in ["iou_final", "extraction_iou"]]
        rows.append([label, *(f"{v:.3f}" for v in found)])
    sets = ["evaluation", "hard, test", "hard, tuning"]
    head = [""] + [f"{name}: {what}" for name in sets for what in ["last masks", "learned token"]]
    return f"""## What each part brings

Mean IoU of the objects with `em`, seed 0. Every row but the first changes the configuration `likelihood` as it says.

{table(head, rows)}
"""


def no_words(reports):
    rows = []
    for label in STARTED:
        evaluation = reports[method(label, "evaluation", start="random")]
        hard_scenes = reports[method(label, "hard", start="random")]
        found = [value(evaluation, column) for column in ["iou_initial", "iou_final", "extraction_iou"]]
        found += [value(hard_scenes, column, split="test") for column in ["iou_initial", "iou_final", "extraction_iou"]]
        rows.append([label, *(f"{v:.3f}" for v in found)])
    what = ["first masks", "last masks", "learned token"]
    return f"""## Without words

Tokens start at random, seed 0; no class word is used. Mean IoU of the objects.

{table(["", *(f"evaluation: {w}" for w in what), *(f"hard, test: {w}" for w in what)], rows)}
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
    for label in PAINTED:
        by_label[label] = {}
        for index in INDEXES:
            by_label[label] |= painted(reports[method(label, index, painted=True)])
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
    against = [
        [f"em against {other}, {name}", *compared(figures, "em", other)]
        for name, figures in [("identity", identity), ("prompt", prompt)]
        for other in PAINTED if other != "em"
    ]  # fmt: skip
    n_scenes = len({scene for scene, _ in by_label["em"]})
    joint = reports[method("em", "evaluation", painted=True)]["joint"]
    return f"""## Pictures

Tokens and weights after {joint["steps"]} steps of the joint stage; every object of {n_scenes} scenes alone on two backgrounds, and all of
a scene together on a third one, {len(by_label["em"])} pictures with the same prompts and seeds for all. *Identity* is the likeness of
the painted thing to the pixels of the concept, *recognized* the share of the pictures of single objects that are more like
that object than like any other of the scene. *Right* is the share of the pictures that the right words explain better
than those of the scene's other objects (or with one object left out), than other backgrounds, and than both; the judge is
the model before it was tuned. Defined, and checked where the truth is known, in `plugin/crates/personalization/src/picture_metrics.rs`.

{table(head, rows)}

The same prompt and seed, picture by picture; level is a difference within {100 * LEVEL:.0f} % of the figure's range over all of these pictures.

{table(["", "ahead", "level", "behind"], against)}
"""


def scene_by_scene(reports):
    rows = []
    for scene in reports[method("em", "evaluation")]["scenes"]:
        parts = [f"{c['class_word']} {c['iou_initial']:.2f} → {c['iou_final']:.2f}"
                 for c in [*scene["concepts"], *scene["backgrounds"]]]  # fmt: skip
        rows.append([scene["id"], ", ".join(parts)])
    head = ["scene", "concept: IoU of the first masks → of the last"]
    return f"## `em`, scene by scene\n\nSeed {SEEDS[0]}.\n\n{table(head, rows)}\n"


def write_document(docs, reports, sections, steps):
    """Writes these sections of figures.md and their plots; the others stay as they are. A comment names each one."""
    makers = {
        "masks": lambda: masks(docs, reports, steps), "hard": lambda: hard(docs, reports),
        "ablation": lambda: ablation(reports), "no-words": lambda: no_words(reports),
        "pictures": lambda: pictures(reports), "scenes": lambda: scene_by_scene(reports),
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
    text = head + "".join(f"<!-- {name} -->\n{texts[name]}" for name in SECTIONS if name in texts)
    file.write_text(text.rstrip() + "\n")
