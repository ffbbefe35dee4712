"""A loop in a process of its own, which may die in the middle: learn.py ROOT STEP, where 0 is no step and 5 is after the loop."""

import logging
import os
import pathlib
import signal
import sys

from conftest import executed, loaded
from test_nodes import LIST, picture

import comfy.utils
import folder_paths
import server  # noqa: F401

root, dies_at = pathlib.Path(sys.argv[1]), int(sys.argv[2])
logging.basicConfig(level=logging.INFO, stream=sys.stdout)
folder_paths.ROOT = root


def on_update(bar):
    if (bar.current, bar.total) == (dies_at, 4):
        os.kill(os.getpid(), signal.SIGKILL)


comfy.utils.on_update = on_update
nodes = loaded()
[model] = executed(nodes["ConceptloomLoadDiffusionModel"]).args
loop = {"steps": 4, "steps_per_round": 2, "first_timesteps": 1, "timesteps": 1, "joint_steps": 0, "sample_every": 0}
loop |= {"model": model, "images": picture()[0], "concept_list": LIST}
concepts, *_ = executed(nodes["ConceptloomEmLoop"], **loop).args
if dies_at == 5:
    os.kill(os.getpid(), signal.SIGKILL)
executed(nodes["ConceptloomSaveConcepts"], concepts=concepts)
