"""The wheel: built by its command, installed, found by ComfyUI, and started as a program."""

import json
import os
import pathlib
import platform
import re
import subprocess
import sys

import pytest
from packaging.tags import sys_tags

from conceptloom.command import install_nodes
from conftest import BUILT, HERE, ROOT


BINARIES = [pathlib.Path(BUILT) / name for name in ["libconceptloom.so", "host-demo"]]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder as pip leaves it."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, ROOT / "plugin/comfyui/build_wheel.py", "--built", BUILT, "--out", folder / "dist"]
    wheel = subprocess.run(build, check=True, capture_output=True, text=True).stdout.strip()
    # The name says for which systems it is, and this is one of them.
    name, _, python, abi, system = pathlib.Path(wheel).stem.split("-")
    assert (name, python, abi) == ("conceptloom", "py3", "none")
    assert any(tag.platform == system for tag in sys_tags()), system
    if sys.platform == "linux":
        asked = [re.findall(rb"\0GLIBC_2\.(\d+)", path.read_bytes()) for path in BINARIES]
        newest = max(17, *(int(minor) for minors in asked for minor in minors))
        assert system == f"manylinux_2_{newest}_{platform.machine()}"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder / "site", wheel]
    subprocess.run(pip, check=True)
    return folder / "site"


def in_it(installed, *command):
    environment = {name: value for name, value in os.environ.items() if name != "CONCEPTLOOM_PLUGIN"}
    environment["PYTHONPATH"] = os.pathsep.join([str(installed), str(HERE / "stand_in")])
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_comfyui_finds_the_nodes_and_their_library(installed, tmp_path):
    (tmp_path / "custom_nodes").mkdir()
    done = in_it(installed, installed / "bin/conceptloom", "install-nodes", tmp_path)
    assert done.returncode == 0 and str(tmp_path / "custom_nodes/conceptloom") in done.stdout, done.stderr
    # What ComfyUI does with a folder in custom_nodes.
    load = """
import asyncio, importlib.util, pathlib, sys, folder_paths
folder_paths.ROOT = pathlib.Path(sys.argv[1])
spec = importlib.util.spec_from_file_location("some_name", sys.argv[1] + "/custom_nodes/conceptloom/__init__.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
async def nodes():
    return await (await module.comfy_entrypoint()).get_node_list()
print([node.define_schema().node_id for node in asyncio.run(nodes())])
"""
    done = in_it(installed, sys.executable, "-c", load, str(tmp_path))
    assert "ConceptloomEmLoop" in done.stdout, done.stderr


def test_the_command_is_the_program(installed):
    done = in_it(installed, installed / "bin/conceptloom", "nodes")
    assert done.returncode == 0 and "EmLoop" in done.stdout, done.stderr
    done = in_it(installed, installed / "bin/conceptloom", "install-nodes", "/nowhere")
    assert done.returncode == 1
    assert done.stderr == "error: /nowhere has no custom_nodes; name the folder of a ComfyUI\n"


def test_nodes_are_installed_twice_as_once(tmp_path):
    (tmp_path / "custom_nodes").mkdir()
    folder = install_nodes(tmp_path)
    assert install_nodes(tmp_path) == folder
    assert list((folder / "example_workflows").iterdir())


def test_the_example_fits_the_nodes(nodes):
    [path] = (ROOT / "plugin/comfyui/conceptloom/example_workflows").iterdir()
    workflow = json.loads(path.read_text())
    ours = [node for node in workflow["nodes"] if node["type"].startswith("Conceptloom")]
    assert len(ours) == 3
    for node in ours:
        schema = nodes[node["type"]].define_schema()
        required = [slot for slot in schema.inputs if not slot.options.get("optional")]
        assert {slot.id for slot in required} <= {slot["name"] for slot in node["inputs"]}
        assert [slot["name"] for slot in node["outputs"]] == [slot.options["display_name"] for slot in schema.outputs]
        widgets = [slot for slot in schema.inputs if "default" in slot.options]
        # A seed has a second value: what the editor does with it after a run.
        seeds = [slot for slot in widgets if slot.options.get("control_after_generate")]
        assert len(node["widgets_values"]) == len(widgets) + len(seeds)
    assert {"KSampler", "LoraLoader"} <= {node["type"] for node in workflow["nodes"]}
