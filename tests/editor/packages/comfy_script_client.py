"""ComfyScript: python comfy_script_client.py BASE_URL FOLDER. Wires the demo by itself, from what the server says."""

import sys
from pathlib import Path

from comfy_script.runtime import Workflow, load

base, folder = sys.argv[1], Path(sys.argv[2])
load(base)
import comfy_script.runtime.nodes as nodes  # noqa: E402

FEW = {"steps": 2, "steps_per_round": 2, "first_timesteps": 2, "timesteps": 2, "joint_steps": 0, "sample_every": 0}
LIST = "<bob> man\n<tom> cat\n<desk> table (background)"
with Workflow(wait=True):
    model = nodes.LoadDiffusionModel(checkpoint="sprites")
    picture, _ = nodes.LoadImage(image="demo:man-and-cat.png")
    concepts, tuned, *_ = nodes.EmLoop(model=model, images=picture, concept_list=LIST, **FEW)
    nodes.SaveConcepts(concepts=concepts)
    painted = nodes.PersonalizedSampler(model=tuned, concepts=concepts, prompts="a photo of <bob> on grass", steps=2)
    saved = nodes.SaveImage(images=painted, filename_prefix="script")
saved.wait()[0].save(folder / "picture.png")
