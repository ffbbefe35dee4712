"""A loop in a process of its own, which may die in the middle: learn.py ROOT STEP, where 0 is no step and 5 is after the loop; of 6
nothing can be saved."""

import logging
import os
import pathlib
import signal
import sys

from conftest import executed, graph, loaded
from test_nodes import LIST, picture

import comfy.utils
import folder_paths

root, dies_at = pathlib.Path(sys.argv[1]), int(sys.argv[2])
logging.basicConfig(level=logging.INFO, stream=sys.stdout)
folder_paths.ROOT = root


def on_update(bar):
    if (bar.current, bar.total) == (dies_at, 4):
        os.kill(os.getpid(), signal.SIGKILL)


comfy.utils.on_update = on_update
nodes = loaded()
loop = {"steps": 4, "steps_per_round": 2, "first_timesteps": 1, "timesteps": 1, "joint_steps": 0, "sample_every": 0}
with graph():
    [model] = executed(nodes["ConceptloomLoadDiffusionModel"]).args
    loop |= {"model": model, "images": picture()[0], "concept_list": LIST}
    concepts, *_ = executed(nodes["ConceptloomEmLoop"], **loop).args
    if dies_at == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    if dies_at == 6:
        pathlib.Path(folder_paths.get_folder_paths("embeddings")[0], "concepts").write_text("in the way")
    executed(nodes["ConceptloomSaveConcepts"], concepts=concepts)
