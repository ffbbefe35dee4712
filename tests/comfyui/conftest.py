import asyncio
import os
import pathlib
import sys
import types

import pytest

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
BUILT = pathlib.Path(os.environ["BUILT"])
sys.path[:0] = [str(HERE / "stand_in"), str(ROOT / "plugin" / "comfyui")]

import comfy.model_management
import comfy.utils
import conceptloom
import folder_paths


def loaded():
    """The classes that ComfyUI gets, by node id."""

    async def load():
        extension = await conceptloom.comfy_entrypoint()
        return await extension.get_node_list()

    return {node.define_schema().node_id: node for node in asyncio.run(load())}


def executed(node, **values):
    """Runs a node as ComfyUI does; widgets that are not given have their default."""
    schema = node.define_schema()
    defaults = {slot.id: slot.options["default"] for slot in schema.inputs if "default" in slot.options}
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
