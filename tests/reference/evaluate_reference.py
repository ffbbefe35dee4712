"""The PyTorch reference of the method on the same checkpoint, scenes and configuration as `examples/evaluate.rs`.

    python tests/reference/evaluate_reference.py --reference DIR --model DIR --scenes INDEX.json \\
        --mode em|baseline|given --out FILE.json [--steps 120] [--limit N] [--seed S]

DIR holds the reference implementation (`em.py`, `crf.py`), which is not part of this project. Prints and writes the means
that evaluate.rs prints. Its noise is PyTorch's, so single scenes differ; means are what to compare.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

# EmConfig::attention() in the reference's words.
RECOMMENDED = {
    "norm": "minmax", "binar": "compete", "tau": 0.4, "em_every": 20, "n_est": 50, "n_est_em": 20,
    "layers": "all", "crf": "multi", "joint": "none", "eval_every": 0, "verbose": 0,
}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--scenes", type=Path, required=True)
    parser.add_argument("--mode", choices=["em", "baseline", "given"], required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--limit", type=int, default=10**6)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    sys.path.insert(0, str(arguments.reference))
    torch.set_num_threads(1)
    import em as reference

    mode = "gt" if arguments.mode == "given" else arguments.mode
    model_size = reference.Model(arguments.model).lat
    config = {**RECOMMENDED, "mask_mode": mode, "steps": arguments.steps, "seed": arguments.seed}
    config["res"] = [model_size // 2]
    index = json.loads(arguments.scenes.read_text())
    scenes = [scene for scene in index["scenes"] if scene["kind"] == "multi"][: arguments.limit]
    rows, seconds = [], []
    for scene in scenes:
        model = reference.Model(arguments.model)
        log = run(reference, model, arguments.scenes.parent, scene, config)
        rows.append(figures(log, scene))
        seconds.append(log["sec_per_step"])
        print(scene["id"], {name: np.round(values, 2).tolist() for name, values in rows[-1].items()}, flush=True)
    mean = {name: float(np.mean(np.concatenate([row[name] for row in rows]))) for name in rows[0]}
    result = {"mode": arguments.mode, "seed": arguments.seed, "steps": arguments.steps, "mean": mean}
    result["seconds_per_step"] = float(np.median(seconds))
    arguments.out.write_text(json.dumps(result, indent=1))
    print(json.dumps(result))


def run(reference, model, root, scene, config):
    concepts = reference.parse_concepts(
        ",".join([f"v{i + 1}:{c['class_word']}" for i, c in enumerate(scene["concepts"])] + [f"bg:{scene['background']}"]),
        bg="bg",
    )
    truth = {i: root / c["mask"] for i, c in enumerate(scene["concepts"])}
    picture = reference.Picture(root / scene["image"], list(range(len(concepts))), model.size, truth)
    rest = 1 - np.maximum.reduce([picture.gt[i] for i in truth])
    picture.gt[len(concepts) - 1] = rest.astype(np.uint8)
    started = time.perf_counter()
    log = reference.run(model, [picture], concepts, config)
    log["seconds"] = time.perf_counter() - started
    return log


def figures(log, scene):
    names = [f"v{i + 1}" for i in range(len(scene["concepts"]))]
    first, last = log["mask_iou"][0]["iou"], log["mask_iou"][-1]["iou"]
    final = log["eval"][-1]["p0"]
    return {
        "object_iou_initial": [first[f"p0_{name}"] for name in names],
        "object_iou_final": [last[f"p0_{name}"] for name in names],
        "background_iou_final": [last["p0_bg"]],
        "object_extraction_iou": [final[f"xiou_{name}"] for name in names],
        "masked_error": [final[f"rec_{name}"] for name in names],
        "leak": [final[f"leak_{name}"] for name in names],
    }


if __name__ == "__main__":
    main()
