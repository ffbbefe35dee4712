"""The command line and the server are one program."""
import json
import subprocess

from support import HOST_DEMO, pixels, small_demo, small_prompt


def test_the_same_workflow_gives_the_same_pixels(server, tmp_path):
    file = tmp_path / "workflow.json"
    file.write_text(json.dumps(small_demo()))
    out = tmp_path / "out"
    subprocess.run([HOST_DEMO, "run", str(file), "--out", str(out)], check=True, capture_output=True)
    entry = server.finished(server.queue_prompt(small_prompt()))
    assert entry["status"]["completed"]
    compared = 0
    for output in entry["outputs"].values():
        for image in output.get("images", []):
            if image["type"] == "output":
                local = out / image["subfolder"] / image["filename"]
                assert pixels(server.view(image)) == pixels(local.read_bytes()), local
                compared += 1
    assert compared == 4
    for file in (out / "concepts").glob("*.safetensors"):
        header = lambda content: int.from_bytes(content[:8], "little") + 8
        local, served = file.read_bytes(), (server.data / "output/concepts" / file.name).read_bytes()
        assert local[header(local):] == served[header(served):]
