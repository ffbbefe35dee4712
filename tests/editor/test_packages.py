"""Clients of ComfyUI from their registries, unmodified: each submits the demo with few steps, and gets the right picture's
bytes and the learned files."""
import asyncio
import json
import pathlib
import subprocess
import sys

import pytest
from support import PATIENCE, WORK, pixels, small_prompt

HERE = pathlib.Path(__file__).parent / "packages"
PICTURE, LEARNED = "9", "10"


def saved(server):
    """What the server wrote: the picture, and the learned files by name."""
    [picture] = (server.data / "output/samples").glob("*.png")
    files = (file for file in (server.data / "output").rglob("*") if file.suffix in (".safetensors", ".json"))
    learned = {file.name: file.read_bytes() for file in files}
    assert {"bob.safetensors", "tom.safetensors"} <= learned.keys()
    return picture.read_bytes(), learned


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE * 2)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def prompt(tmp_path):
    prompt = small_prompt()
    assert [prompt[id]["class_type"] for id in (PICTURE, LEARNED)] == ["SaveImage", "SaveConcepts"]
    file = tmp_path / "prompt.json"
    file.write_text(json.dumps(prompt))
    return file


def test_comfy_api_simplified(server, prompt):
    from comfy_api_simplified import ComfyApiWrapper, ComfyWorkflowWrapper

    api, workflow = ComfyApiWrapper(server.base), ComfyWorkflowWrapper(str(prompt))
    found = api.queue_and_wait_images(workflow, workflow[PICTURE]["_meta"]["title"])
    picture, learned = saved(server)
    assert list(found.values()) == [picture]
    [entry] = server.get("/history").json.values()
    files = [file for output in entry["outputs"].values() for file in output.get("files", [])]
    assert {file["filename"] for file in files} <= learned.keys()
    for file in files:
        assert api.get_image(file["filename"], file["subfolder"], file["type"]) == learned[file["filename"]]


@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_comfykit(server, prompt, kind):
    from comfykit import ComfyKit

    # It fills every seed of 0 with one of 63 bits.
    nodes = json.loads(prompt.read_text())
    for node in nodes.values():
        if "seed" in node["inputs"]:
            node["inputs"]["seed"] = 0
    prompt.write_text(json.dumps(nodes))

    async def execute():
        return await ComfyKit(comfyui_url=server.base, executor_type=kind).execute(str(prompt))

    result = asyncio.run(execute())
    assert result.status == "completed", result.msg
    picture, learned = saved(server)
    assert picture in [server.get(url.removeprefix(server.base)).body for url in result.images]
    # One of its ways keeps pictures and text only.
    outputs = server.history(result.prompt_id)["outputs"].values()
    files = [file for output in outputs for file in output.get("files", [])]
    for file in files:
        assert server.view(file) == learned[file["filename"]]
    assert files


def test_comfyui_utils(server, prompt):
    """It knows one output node: the first that is done."""
    from comfyui_utils import comfy

    class Callbacks(comfy.Callbacks):
        outputs, steps = None, 0

        async def queue_position(self, position):
            pass

        async def in_progress(self, node_id, progress, total):
            self.steps += total > 0

        async def completed(self, outputs, cached):
            self.outputs = outputs

    async def submit(nodes):
        api, callbacks, got = comfy.ComfyAPI(f"127.0.0.1:{server.port}"), Callbacks(), []

        async def keep(file):
            got.append(file.read())

        await api.submit(nodes, callbacks)
        for file in callbacks.outputs.get("images") or callbacks.outputs["files"]:
            await api.fetch(file, keep)
        return callbacks, got

    nodes = json.loads(prompt.read_text())
    outputs = [key for key, node in nodes.items() if node["class_type"] in ("SaveConcepts", "SaveImage")]
    for wanted in [LEARNED, PICTURE]:
        only = {key: node for key, node in nodes.items() if key not in outputs or key == wanted}
        callbacks, got = asyncio.run(submit(only))
        if wanted == LEARNED:
            learned = {file.read_bytes() for file in (server.data / "output").rglob("*") if file.is_file()}
            assert callbacks.steps and len(got) > 3 and set(got) <= learned
        else:
            [picture] = (server.data / "output/samples").glob("*.png")
            assert got == [picture.read_bytes()]


@pytest.mark.parametrize("package", ["saintno", "stable-canvas"])
def test_packages_of_npm(server, prompt, package, tmp_path):
    modules = WORK / "packages"
    script = modules / f"{package}.mjs"
    script.write_text((HERE / script.name).read_text())
    folder = tmp_path / "got"
    folder.mkdir()
    nodes = [PICTURE, LEARNED] if package == "saintno" else []
    run("node", str(script), server.base, str(prompt), *nodes, str(folder))
    picture, learned = saved(server)
    got = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert "bob.safetensors" in got and {name: got[name] for name in got.keys() & learned.keys()}.items() <= learned.items()
    assert picture in got.values()


def test_comfy_script(server, tmp_path):
    # It writes the nodes that it finds below its own folder.
    run(sys.executable, str(HERE / "comfy_script_client.py"), server.base, str(tmp_path))
    [picture] = (server.data / "output").glob("script*.png")
    assert pixels((tmp_path / "picture.png").read_bytes()) == pixels(picture.read_bytes())
    names = {file.name for file in (server.data / "output").rglob("*.safetensors")}
    assert {"bob.safetensors", "tom.safetensors"} <= names
