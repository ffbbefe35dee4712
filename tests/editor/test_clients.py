"""Programs that were written for ComfyUI and do not know that it is not there."""
import http.client
import io
import json
import subprocess
import sys
import urllib.parse

import pytest
import websocket
from PIL import Image
from support import PATIENCE, WORK, pixels, png, quick, small_demo, small_prompt, wait_until


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
    # it would take any binary frame, and the first `executed`, for the result
    assert not socket.binary and "7" not in {p["node"] for p in socket.of("executed")}
    socket.close()


def test_previews_and_text_go_to_those_who_ask(server):
    seeds = iter(range(100, 200))

    def heard(extra_data=None, features=None):
        socket = server.socket()
        if features is not None:
            socket.socket.send(json.dumps({"type": "feature_flags", "data": features}))
            wait_until(lambda: socket.of("feature_flags"))
        body = {"prompt": small_prompt(seed=next(seeds)), "client_id": socket.client_id}
        reply = server.post("/prompt", body | {"extra_data": extra_data or {}}).json
        assert server.finished(reply["prompt_id"])["status"]["completed"]
        wait_until(lambda: socket.of("execution_success"))
        socket.close()
        return {message[3] for message in socket.binary}, "7" in {p["node"] for p in socket.of("executed")}

    assert heard() == (set(), False)
    assert heard({"preview_method": "auto"}) == ({1}, False)
    assert heard(features={}) == ({3}, True)
    assert heard(features={"supports_preview_metadata": True}) == ({3, 4}, True)
    assert heard({"preview_method": "none"}, {"supports_preview_metadata": True}) == ({3}, True)


def test_what_was_learned_can_be_downloaded(server):
    entry = server.finished(server.queue_prompt(small_prompt()))
    files = [file for output in entry["outputs"].values() for file in output.get("files", [])]
    learned = [file for file in files if file["filename"].endswith(".safetensors")]
    assert learned
    for file in learned:
        reply = server.get("/view?" + urllib.parse.urlencode(file))
        there = server.data / "output" / file["subfolder"] / file["filename"]
        assert reply.body == there.read_bytes()
        assert reply.headers["content-disposition"].startswith("attachment")
        assert reply.headers["content-type"] == "application/octet-stream"
        assert "sandbox" in reply.headers["content-security-policy"]


def test_the_questions_of_stock_tools_have_answers(server):
    embeddings = server.data / "models/embeddings"
    embeddings.mkdir(parents=True, exist_ok=True)
    header = json.dumps({"__metadata__": {"token": "<rex>"}}).encode()
    (embeddings / "rex.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    [about] = server.get("/experiment/models/embeddings").json
    assert (about["name"], about["pathIndex"], about["size"]) == ("rex.safetensors", 0, 8 + len(header))
    assert server.get("/view_metadata/embeddings?filename=rex.safetensors").json == {"token": "<rex>"}
    assert server.get("/view_metadata/embeddings?filename=none.safetensors").status == 404
    assert server.get("/view_metadata/embeddings?filename=../../queue.jsonl").status == 404
    assert isinstance(server.get("/internal/logs").json, str)
    assert {"entries", "size"} <= server.get("/internal/logs/raw").json.keys()
    assert server.get("/internal/folder_paths").json["embeddings"] == [str(embeddings.resolve())]
    server.upload("one.png", png(), subfolder="")
    assert server.get("/internal/files/input").json == ["one.png"]
    assert server.get("/internal/files/secret").status == 400
    server.post("/userdata/workflows%2Fmine.json", {"nodes": [], "links": []})
    [folder] = [entry for entry in server.get("/v2/userdata").json if entry["type"] == "directory"]
    assert folder == {"name": "workflows", "path": "workflows", "type": "directory"}
    [file] = server.get("/v2/userdata?path=workflows").json
    assert (file["name"], file["path"], file["type"]) == ("mine.json", "workflows/mine.json", "file")
    assert server.get("/queue").json.keys() == {"queue_running", "queue_pending"}


def test_what_the_editor_saved_can_be_posted(server):
    reply = server.post("/prompt", {"prompt": small_demo()})
    assert reply.status == 200, reply.body
    assert server.finished(reply.json["prompt_id"])["status"]["completed"]


def test_names_of_uploads_in_other_scripts(server):
    for header, name in [
        ("filename=\"my%20dog.png\"; filename*=utf-8''my%20dog.png", "my dog.png"),
        ("filename*=utf-8''%E7%8C%AB.png", "猫.png"),
        ('filename="Füße.png"', "Füße.png"),
        ('filename="Screenshot 10:11:12.png"', "Screenshot 10_11_12.png"),
    ]:
        body = f"--b\r\ncontent-disposition: form-data; name=\"image\"; {header}\r\n\r\n".encode() + png() + b"\r\n--b--\r\n"
        reply = server.request("POST", "/upload/image", body, {"content-type": "multipart/form-data; boundary=b"})
        assert reply.json["name"] == name


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


@pytest.mark.parametrize("who", ["the client", "another one of its name"])
def test_a_connection_that_ends_is_closed_as_such(server, who):
    """Not cut: a client takes that for a network that failed, and tries again."""
    first = websocket.create_connection(f"ws://127.0.0.1:{server.port}/ws?clientId=me", timeout=PATIENCE)
    # Only now has it its name.
    assert json.loads(first.recv())["type"] == "status"
    if who == "the client":
        first.send_close()
    else:
        another = server.socket("me")
    opcode = None
    while opcode != websocket.ABNF.OPCODE_CLOSE:
        opcode, _ = first.recv_data(control_frame=True)
    if who != "the client":
        wait_until(lambda: another.of("status"))
        another.close()


def test_an_unchanged_learner_does_not_learn_again(server):
    prompt = small_prompt()
    server.finished(server.queue_prompt(prompt))
    prompt["8"]["inputs"]["seed"] = 99
    entry = server.finished(server.queue_prompt(prompt))
    cached = {node for kind, data in entry["status"]["messages"] if kind == "execution_cached" for node in data["nodes"]}
    assert {"6", "7"} <= cached and "8" not in cached
    # what it showed is shown again
    assert entry["outputs"]["7"]["images"]


def test_a_node_that_exists_to_show_shows_all(server):
    doubled = {str(n): {"class_type": "ImageBatch", "inputs": {"image1": [str(n - 1), 0], "image2": [str(n - 1), 0]}}
               for n in range(2, 9)}
    prompt = {"1": quick()["1"], **doubled, "9": {"class_type": "PreviewImage", "inputs": {"images": ["8", 0]}}}
    entry = server.finished(server.queue_prompt(prompt))
    assert len(entry["outputs"]["9"]["images"]) == 128


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


def paint(server, reference):
    """As editors before 1.40 save a mask: the paint alone, and on what."""
    paint = png((0, 0, 0, 0), (128, 128), "RGBA")
    reference = json.dumps(reference)
    parts = [("original_ref", "", reference.encode()), ("image", '; filename="mask.png"', paint)]
    body = b"".join(f'--b\r\ncontent-disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + content + b"\r\n"
                    for name, more, content in parts) + b"--b--\r\n"
    reply = server.request("POST", "/upload/mask", body, {"content-type": "multipart/form-data; boundary=b"})
    assert reply.status == 200, reply.body
    return reply.json["name"]


def test_a_mask_is_painted_on_a_picture_that_is_built_in(server):
    name = paint(server, {"filename": "demo:man-and-cat.png", "type": "input"})
    painted = server.view({"filename": name, "type": "input", "channel": "rgb"})
    assert pixels(painted) == pixels(server.view({"filename": "demo:man-and-cat.png"}))


def test_a_picture_with_a_mask_keeps_its_workflow(server):
    prompt = quick()
    entry = server.finished(server.queue_prompt(prompt, extra_data={"extra_pnginfo": {"workflow": {"nodes": [], "é": 1}}}))
    [saved] = entry["outputs"]["2"]["images"]
    name = paint(server, saved)
    with Image.open(io.BytesIO(server.view({"filename": name, "type": "input"}))) as painted:
        assert json.loads(painted.text["workflow"]) == {"nodes": [], "é": 1}
        assert json.loads(painted.text["prompt"]).keys() == prompt.keys()


def test_a_photograph_of_another_ending_can_be_chosen(server):
    content = io.BytesIO()
    Image.new("RGB", (8, 8)).save(content, "JPEG")
    for ending in ("jfif", "jpe"):
        assert server.upload(f"photo.{ending}", content.getvalue()).status == 200
        options = server.get("/object_info/LoadImage").json["LoadImage"]["input"]["required"]["image"]
        assert f"photo.{ending}" in json.dumps(options)


def test_hidden_files_of_the_user_are_not_listed_and_bad_names_are_told(server):
    for name in (".index.json", "a.json", ".hidden%2Fb.json"):
        assert server.request("POST", f"/userdata/workflows%2F{name}", b"{}").status == 200
    listed = server.get("/userdata?dir=workflows&recurse=true&split=false&full_info=true").json
    assert [entry["path"] for entry in listed] == ["a.json"]
    assert server.get("/userdata/workflows%2F.index.json").body == b"{}"
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("POST", "/userdata/workflows%2FPortrait%3A.json", b"{}")
    reply = connection.getresponse()
    assert reply.status == 400 and reply.reason.startswith("No name for a file")
    connection.close()


def test_a_painted_mask_reaches_the_given_mode(server):
    """The mask editor uploads a picture whose transparency is the mask; LoadImage gives it as MASK."""
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
