"""Programs that were written for ComfyUI and do not know that it is not there."""
import json
import subprocess
import sys

import pytest
from support import PATIENCE, WORK, pixels, quick, small_demo, small_prompt, wait_until


def comfy(*arguments, home):
    """The official command line, unmodified, with a home of its own."""
    program = str(WORK / "venv/bin/comfy") if (WORK / "venv/bin/comfy").exists() else sys.prefix + "/bin/comfy"
    environment = {"HOME": str(home), "PATH": "/usr/local/bin:/usr/bin:/bin", "DO_NOT_TRACK": "1"}
    return subprocess.run([program, "--skip-prompt", "--no-enable-telemetry", *arguments], capture_output=True,
                          text=True, env=environment, timeout=PATIENCE * 2)


@pytest.mark.parametrize("form", ["editor", "api"])
def test_comfy_cli_runs_both_forms_of_a_workflow(server, tmp_path, form):
    file = tmp_path / "workflow.json"
    file.write_text(json.dumps(small_demo() if form == "editor" else small_prompt()))
    home = tmp_path / "home"
    home.mkdir()
    done = comfy("run", "--workflow", str(file), "--host", "127.0.0.1", "--port", str(server.port), "--wait",
                 "--timeout", str(PATIENCE), home=home)
    assert done.returncode == 0, done.stdout + done.stderr
    entries = list(server.get("/history").json.values())
    assert [entry["status"]["status_str"] for entry in entries] == ["success"]
    assert list((server.data / "output/samples").glob("*.png"))


def test_a_plain_websocket_client_gets_progress_and_pictures(server):
    """The way of the script that ComfyUI publishes: queue, listen until `executing` names no node, fetch."""
    socket = server.socket()
    wait_until(lambda: socket.of("status"))
    assert socket.of("status")[0]["sid"] == socket.client_id
    prompt_id = server.queue_prompt(small_prompt(), socket.client_id)
    wait_until(lambda: {"node": None, "display_node": None, "prompt_id": prompt_id} in socket.of("executing"))
    order = [event["type"] for event in socket.events if event["data"].get("prompt_id") == prompt_id]
    assert order[:2] == ["execution_start", "execution_cached"] and order[-2:] == ["execution_success", "executing"]
    steps = [p for p in socket.of("progress") if p["node"] == "7"]
    assert steps and all(0 <= p["value"] <= p["max"] for p in steps)
    entry = server.history(prompt_id)
    images = entry["outputs"]["9"]["images"]
    assert [len(images), pixels(server.view(images[0]))[0]] == [1, (128, 128)]
    # without the feature, previews carry no name, and lines no prompt
    kinds = {message[:4] for message in socket.binary}
    assert kinds == {b"\0\0\0\1", b"\0\0\0\3"}
    socket.close()


def test_a_client_that_comes_back_goes_on_hearing(server):
    first = server.socket("me")
    prompt_id = server.queue_prompt(small_prompt(steps=40, steps_per_round=10), "me")
    wait_until(lambda: first.of("progress"))
    first.close()
    again = server.socket("me")
    wait_until(lambda: again.of("executing"))
    assert again.of("executing")[0]["prompt_id"] == prompt_id
    assert server.finished(prompt_id)["status"]["completed"]
    wait_until(lambda: again.of("execution_success"))
    again.close()


def test_an_unchanged_learner_does_not_learn_again(server):
    prompt = small_prompt()
    server.finished(server.queue_prompt(prompt))
    prompt["8"]["inputs"]["seed"] = 99
    entry = server.finished(server.queue_prompt(prompt))
    cached = {node for kind, data in entry["status"]["messages"] if kind == "execution_cached" for node in data["nodes"]}
    assert {"6", "7"} <= cached and "8" not in cached
    # what it showed is shown again
    assert entry["outputs"]["7"]["images"]


def test_problems_are_told_in_comfyui_s_form(server):
    prompt = quick()
    prompt["2"]["inputs"]["images"] = ["1", 9]
    prompt["3"] = {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "quick/other"}}
    reply = server.post("/prompt", {"prompt": prompt}).json
    [error] = reply["node_errors"]["2"]["errors"]
    assert (error["type"], error["extra_info"]["input_name"]) == ("bad_linked_input", "images")
    assert reply["node_errors"]["2"]["dependent_outputs"] == ["2"]
    # what can run does
    assert list(server.finished(reply["prompt_id"])["outputs"]) == ["3"]
    del prompt["3"]
    refused = server.post("/prompt", {"prompt": prompt})
    assert (refused.status, refused.json["error"]["type"]) == (400, "prompt_outputs_failed_validation")
    for body, kind in [({}, "no_prompt"), ({"prompt": {}}, "prompt_no_outputs"), ({"prompt": 3}, "invalid_prompt"),
                       ({"prompt": {"1": {"class_type": "KSampler"}}}, "invalid_prompt"),
                       ({"prompt": quick(), "prompt_id": "ABC"}, "invalid_prompt_id")]:
        refused = server.post("/prompt", body)
        assert (refused.status, refused.json["error"]["type"]) == (400, kind)


def test_a_painted_mask_reaches_the_given_mode(server):
    """The mask editor uploads a picture whose transparency is the mask; LoadImage gives it as MASK."""
    from support import png
    uploaded = server.upload("clipspace-mask.png", png((255, 0, 0, 0), (128, 128), "RGBA"), subfolder="clipspace")
    assert uploaded.json == {"name": "clipspace-mask.png", "subfolder": "clipspace", "type": "input"}
    prompt = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "clipspace/clipspace-mask.png [input]"}},
        "2": {"class_type": "MaskToImage", "inputs": {"mask": ["1", 1]}},
        "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0]}},
    }
    [image] = server.finished(server.queue_prompt(prompt))["outputs"]["3"]["images"]
    assert set(pixels(server.view(image))[1]) == {255}
    prompt = small_prompt(mode="given")
    prompt["7"]["inputs"]["masks"] = ["5", 0]
    prompt["2"]["inputs"] = {"image": "clipspace/clipspace-mask.png [input]", "channel": "alpha"}
    entry = server.finished(server.queue_prompt(prompt))
    assert entry["status"]["completed"], entry["status"]
