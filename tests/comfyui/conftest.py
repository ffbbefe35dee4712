import asyncio
import contextlib
import os
import pathlib
import sys
import types
import uuid

import pytest

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
BUILT = pathlib.Path(os.environ["BUILT"])
sys.path[:0] = [str(HERE / "stand_in"), str(ROOT / "plugin" / "comfyui")]

import comfy.model_management
import comfy.utils
import conceptloom
import folder_paths
import server
from comfy_execution.utils import ExecutionContext, current_executing_context, get_executing_context


def loaded():
    """The classes that ComfyUI gets, by node id."""

    async def load():
        extension = await conceptloom.comfy_entrypoint()
        return await extension.get_node_list()

    return {node.define_schema().node_id: node for node in asyncio.run(load())}


@contextlib.contextmanager
def graph():
    """Nodes run here are those of one graph: it is in ComfyUI's queue, and then in its history."""
    queue, prompt_id, completed = server.PromptServer.instance.prompt_queue, uuid.uuid4().hex, False
    queue.currently_running[prompt_id] = (0, prompt_id)
    token = current_executing_context.set(ExecutionContext(prompt_id, "7", 0))
    try:
        yield
        completed = True
    finally:
        current_executing_context.reset(token)
        del queue.currently_running[prompt_id]
        status = {"status_str": "success" if completed else "error", "completed": completed, "messages": []}
        queue.history[prompt_id] = {"status": status}


def executed(node, **values):
    """Runs a node as ComfyUI does, in a graph of its own if it is in none; widgets that are not given have their default."""
    schema = node.define_schema()
    defaults = {slot.id: slot.options["default"] for slot in schema.inputs if "default" in slot.options}
    with contextlib.nullcontext() if get_executing_context() else graph():
        return node.execute(**defaults | values)


@pytest.fixture
def comfyui(tmp_path, monkeypatch):
    """An empty ComfyUI."""
    monkeypatch.setenv("CONCEPTLOOM_PLUGIN", str(BUILT / "libconceptloom.so"))
    monkeypatch.setattr(folder_paths, "ROOT", tmp_path)
    monkeypatch.setattr(comfy.model_management, "interrupted", False)
    monkeypatch.setattr(comfy.utils, "shown", [])
    monkeypatch.setattr(comfy.utils, "on_update", None)
    return types.SimpleNamespace(
        root=tmp_path, models=tmp_path / "models", management=comfy.model_management, utils=comfy.utils
    )


@pytest.fixture
def nodes(comfyui):
    return loaded()
