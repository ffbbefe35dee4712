"""A Rust client for ComfyUI, typed and unmodified: every answer has the shape that it deserializes."""
import json
import os
import subprocess

import pytest
from support import DEMO, PATIENCE, ROOT, long_prompt, pixels, png, quick, small_prompt, wait_until


@pytest.fixture
def client(server, tmp_path):
    """``rucomfyui/src/main.rs`` says what can be asked."""
    def ask(what, *arguments):
        files = []
        for i, argument in enumerate(arguments):
            if isinstance(argument, dict):
                file = tmp_path / f"{what}-{i}.json"
                file.write_text(json.dumps(argument))
                argument = file
            files.append(str(argument))
        done = subprocess.run([os.environ["RUCOMFYUI_CLIENT"], what, server.base, *files], capture_output=True,
                              text=True, timeout=PATIENCE * 2, env=os.environ | {"RUST_BACKTRACE": "0"})
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)
    return ask


def test_it_reads_every_node(server, client):
    told = client("describe")
    declared = json.loads((ROOT / "nodes.json").read_text())
    assert set(declared) <= set(told["nodes"])
    for name, node in declared.items():
        inputs = [*node["input"]["required"], *node["input"].get("optional", {})]
        assert sorted(told["nodes"][name]["inputs"]) == sorted(inputs)
        assert told["nodes"][name]["outputs"] == node["output_name"]
    editor_only = {"Note", "MarkdownNote"}
    assert {node["type"] for node in DEMO["nodes"]} - editor_only <= set(told["nodes"])
    assert told["devices"] == 1 and told["ram_total"] > 1 << 28


def test_it_follows_a_run_and_fetches_the_pictures(server, client, tmp_path):
    told = client("run", small_prompt(), tmp_path)
    assert (told["started"], told["completed"], told["status"]) == (1, 1, "success")
    assert told["progress"] > 0 and told["previews"] > 0 and told["foreign"] == 0
    [picture] = (server.data / "output/samples").glob("*.png")
    assert told["outputs"]["9"]["images"] == 1
    assert pixels((tmp_path / "9-0.png").read_bytes()) == pixels(picture.read_bytes())


def test_a_picture_that_it_uploads_can_be_loaded(server, client, tmp_path):
    (tmp_path / "mine.png").write_bytes(png((1, 2, 3)))
    told = client("upload", tmp_path / "mine.png")
    assert told == {"name": "mine.png", "subfolder": "", "type": "input"}
    prompt = quick()
    prompt["1"]["inputs"]["image"] = told["name"]
    client("run", prompt, tmp_path)
    assert pixels((tmp_path / "2-0.png").read_bytes()) == pixels(png((1, 2, 3)))


def test_it_understands_the_problems_of_a_workflow(server, client):
    prompt = small_prompt()
    prompt["7"]["inputs"]["steps"] = -1
    prompt["7"]["inputs"]["mode"] = "guess"
    prompt["7"]["inputs"]["model"] = ["1", 0]
    del prompt["8"]["inputs"]["model"]
    told = client("refused", prompt)
    # each of these is a variant of the client's own error type, with all of its fields; a wrong shape is dropped
    assert told["nodes"]["7"]["class"] == "EmLoop"
    assert sorted(error.split(",")[0] for error in told["nodes"]["7"]["errors"]) == [
        "return type mismatch: model", "value not in list: mode", "value smaller than min: steps"]
    assert told["nodes"]["8"]["errors"] == ["required input missing: model"]


def test_it_interrupts(server, client):
    told = client("stop", long_prompt(), "7")
    assert told == {"listed": True, "node": 7, "message": "execution interrupted"}
    wait_until(lambda: not server.get("/queue").json["queue_running"])
    [job] = server.get("/api/jobs").json["jobs"]
    assert job["status"] == "cancelled"
