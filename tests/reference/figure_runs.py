"""The runs that docs/figures.md reports, by name, and how they are made.

A run is one call of the example `evaluate`. Its figures are left in target/figures/NAME.json, and what they came from in
NAME.key; a run whose arguments, program, weights and scenes are the same is not made again.
"""

import concurrent.futures
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SPRITES = ROOT / "plugin/crates/sprites"
WORK = ROOT / "target/figures"
MODEL = SPRITES / "model"
INDEXES = {"evaluation": SPRITES / "scenes/index.json", "hard": WORK / "hard/index.json"}
PROGRAM = ROOT / "target/release/examples/evaluate"
PROCESSES = 2

SECTIONS = ["masks", "hard", "starts", "no-words", "ablation", "tokens", "pictures", "scenes"]
SEEDS = [0, 1, 2]
# before pictures are painted; what `evaluate` does unless it is told otherwise
JOINT_STEPS = 400
# label -> arguments; the rows of the first table and the curves of the plot
METHODS = {
    "em": ["--mode", "em"],
    "baseline": ["--mode", "baseline", "--config", "attention"],
    "em, attention alone": ["--mode", "em", "--config", "attention"],
    "em, the paper read literally": ["--mode", "em", "--config", "paper"],
}
# modes of the PyTorch reference
REFERENCE = ["em", "baseline"]
# label -> name of a configuration; the rows of the table of what each part brings
ABLATION = {
    "likelihood": "likelihood",
    "without the likelihood (attention's share alone)": "no-likelihood",
    "without the prior (the noise alone)": "no-prior",
    "foreground where an object's map is high": "object-foreground",
    "parts by the foreground's shape alone": "no-word-parts",
    "pixel by pixel instead of parts": "no-regions",
    "every round forgets the one before": "no-memory",
    "without the dense CRF": "no-crf",
}
# those of which hard scenes are run too, of these kinds: where attention alone confuses names
HARD_ABLATION = ["likelihood", "without the likelihood (attention's share alone)", "without the prior (the noise alone)"]
HARD_ABLATION_KINDS = ["same_class", "small"]
STARTS = {"class": "the class word", "random": "no word", "inversion": "inversion"}
# those of METHODS of which every seed is run, that the plot shows from the other starts too, and of which hard scenes
# are run
STARTED = ["em", "baseline"]
# label -> arguments; whose learned tokens and pictures are compared
LEARNED = METHODS | {"given": ["--mode", "given"]}
# What takes longest is done with some scenes: every other one of the evaluation (the others show the same drawings), and
# of the hard ones the first of three kinds' test half.
SOME_SCENES = {
    "evaluation": [f"multi_{number:03d}" for number in range(0, 44, 4)],
    "hard": [f"{kind}_001" for kind in ["overlapping", "same_class", "small"]],
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One call of `evaluate`."""

    index: str
    arguments: tuple
    seed: int = 0
    start: str = "class"
    some: bool = False
    painted: bool = False
    kind: str = "all"

    @property
    def name(self):
        parts = [self.index, *(a.removeprefix("--") for a in self.arguments), self.start, f"seed-{self.seed}"]
        parts += [self.kind] * (self.kind != "all")
        return "-".join(parts + ["some"] * self.some + ["painted"] * self.painted)

    @property
    def overlays(self):
        return WORK / f"{self.name}-overlays"

    def command(self, steps, limit=None):
        scenes = {"evaluation": ["--kind", "multi"], "hard": ["--kind", self.kind, "--split", "test"]}[self.index]
        # Where masks never change, they are known before the first step.
        steps = 0 if "baseline" in self.arguments and not self.painted else steps
        command = [PROGRAM, "--model", MODEL, "--scenes", INDEXES[self.index], *scenes, *self.arguments,
                   "--seed", self.seed, "--start", self.start, "--steps", steps]  # fmt: skip
        if self.some:
            command += ["--only", ",".join(SOME_SCENES[self.index])]
        command += ["--pictures", WORK / self.name] if self.painted else ["--masks-only", "--overlays", self.overlays]
        if limit:
            command += ["--limit", limit]
        return [str(c) for c in [*command, "--out", WORK / f"{self.name}.json"]]


def method(label, index, **options):
    return Run(index, tuple((METHODS | LEARNED)[label]), **options)


def started(label, start):
    """Runs with all scenes where another section has them."""
    has_all = start == "class" or (start == "random" and label == "em")
    return method(label, "evaluation", start=start, some=not has_all)


def seeds_of(label):
    return SEEDS if label in STARTED else SEEDS[:1]


def configuration(label):
    """A run of the ablation; those that are methods too are made with all scenes."""
    arguments = arguments_of(label)
    return Run("evaluation", arguments, some=list(arguments) not in METHODS.values())


def hard_configuration(label, kind):
    """As `configuration`, of one kind of hard scenes."""
    arguments = arguments_of(label)
    return Run("hard", arguments, kind="all" if list(arguments) in METHODS.values() else kind)


def arguments_of(label):
    name = ABLATION[label]
    return ("--mode", "em") if name == "likelihood" else ("--mode", "em", "--config", name)


def painting(label, index):
    return method(label, index, some=True, painted=True)


def planned(sections):
    """The runs of these sections, each once; what is soonest missed comes first."""
    runs = []
    if "masks" in sections:
        runs += [method(label, "evaluation", seed=seed) for label in METHODS for seed in seeds_of(label)]
    if "hard" in sections:
        runs += [method(label, "hard") for label in STARTED]
    if "no-words" in sections:
        runs += [method("em", "evaluation", start="random")]
    if "ablation" in sections:
        runs += [configuration(label) for label in ABLATION]
        runs += [hard_configuration(label, kind) for label in HARD_ABLATION for kind in HARD_ABLATION_KINDS]
    if "pictures" in sections or "tokens" in sections:
        runs += [painting(label, index) for index in INDEXES for label in LEARNED]
    if "starts" in sections:
        runs += [started(label, start) for label in STARTED for start in STARTS]
    if "scenes" in sections:
        runs += [method("em", "evaluation")]
    return list(dict.fromkeys(runs))


def make(runs, steps, limit=None, reference=None):
    """Makes what is missing, two at a time; -> run -> report. With the folder of the PyTorch reference, also what is
    named in REFERENCE."""
    # As the tests build it, so that neither builds the other's dependencies anew.
    build = ["cargo", "test", "--release", "--locked", "--workspace", "--no-run"]
    subprocess.run(build, cwd=ROOT, check=True)
    if any(run.index == "hard" for run in runs):
        compose_hard_scenes()
    jobs = {run: (run.name, run.command(steps, limit), [PROGRAM, INDEXES[run.index]]) for run in runs}
    if reference:
        program = ROOT / "tests/reference/evaluate_reference.py"
        for mode in REFERENCE:
            name = f"reference-{mode}"
            command = [sys.executable, program, "--reference", reference, "--mode", mode, "--model", MODEL,
                       "--scenes", INDEXES["evaluation"], "--steps", steps, "--out", WORK / f"{name}.json"]  # fmt: skip
            sources = [program, INDEXES["evaluation"], *sorted(reference.glob("*.py"))]
            jobs[f"{mode}, PyTorch reference"] = (name, [str(c) for c in command], sources)
    with concurrent.futures.ThreadPoolExecutor(PROCESSES) as pool:
        return dict(zip(jobs, pool.map(lambda job: made(*job), jobs.values())))


def made(name, command, sources):
    """The report of a run, made unless it is there and came from the same."""
    out, key_file = WORK / f"{name}.json", WORK / f"{name}.key"
    key = digest(*sources, *sorted(MODEL.rglob("*.safetensors"))) + "\n" + " ".join(command)
    if not (out.exists() and key_file.exists() and key_file.read_text() == key):
        key_file.unlink(missing_ok=True)
        print("$", *command, flush=True)
        with open(WORK / f"{name}.log", "w") as log:
            subprocess.run(command, check=True, stdout=log, env={**os.environ, "RAYON_NUM_THREADS": "1"})
        key_file.write_text(key)
    return json.loads(out.read_text())


def digest(*files):
    whole = hashlib.sha256()
    for file in files:
        whole.update(file.read_bytes())
    return whole.hexdigest()


def compose_hard_scenes():
    """The scenes of target/figures/hard; the same seed gives the same files."""
    training = SPRITES / "training"
    subprocess.run(["sh", training / "drawings.sh", WORK, sys.executable], check=True)
    command = [training / "hard_scenes.py", "--drawings", WORK / "drawings.pkl", "--out", WORK / "hard"]
    subprocess.run([sys.executable, *command], check=True)
