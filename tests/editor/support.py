"""A server of its own for every test, and small workflows."""
import copy
import io
import json
import os
import pathlib
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid

import websocket
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parents[2]
HOST_DEMO = os.environ["HOST_DEMO"]
WORK = pathlib.Path(os.environ["EDITOR_TESTS"])
SCREENSHOTS = WORK / "screenshots"
DEMO = json.loads((ROOT / "host-demo/workflows/demo.json").read_text())
# What a slow machine may need for something that takes a second.
PATIENCE = 180


def wait_until(what, seconds=PATIENCE, every=0.1):
    """The first true value of ``what()``."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = what()
        if value:
            return value
        time.sleep(every)
    raise AssertionError(f"did not happen in {seconds} s")


class Reply:
    def __init__(self, status, headers, body):
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self):
        return json.loads(self.body)


class Server:
    """``host-demo serve`` on a free port."""

    def __init__(self, data, *arguments, environment=None):
        self.data = pathlib.Path(data)
        self.log = open(self.data.parent / (self.data.name + ".log"), "ab")
        self.process = subprocess.Popen(
            [HOST_DEMO, "serve", "--port", "0", "--data", str(data), *arguments],
            stdout=subprocess.PIPE, stderr=self.log, text=True, env=os.environ | (environment or {}))
        self.url = self.process.stdout.readline().strip()
        assert self.url, (self.data.parent / (self.data.name + ".log")).read_text()
        self.base = self.url.split("/?")[0]
        self.port = int(self.base.rsplit(":", 1)[1])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(PATIENCE)
        self.log.close()

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.log.close()

    def request(self, method, path, body=None, headers=None, timeout=60):
        request = urllib.request.Request(self.base + path, data=body, method=method, headers=headers or {})
        try:
            with urllib.request.urlopen(request, timeout=timeout) as reply:
                return Reply(reply.status, reply.headers, reply.read())
        except urllib.error.HTTPError as error:
            return Reply(error.code, error.headers, error.read())

    def get(self, path, **options):
        return self.request("GET", path, **options)

    def post(self, path, value=None, **options):
        headers = {"content-type": "application/json"} | options.pop("headers", {})
        return self.request("POST", path, json.dumps(value or {}).encode(), headers=headers, **options)

    def queue_prompt(self, prompt, client_id="", **more):
        reply = self.post("/prompt", {"prompt": prompt, "client_id": client_id, **more})
        assert reply.status == 200, reply.body
        return reply.json["prompt_id"]

    def history(self, prompt_id):
        return self.get(f"/history/{prompt_id}").json.get(prompt_id)

    def finished(self, prompt_id, seconds=PATIENCE):
        return wait_until(lambda: self.history(prompt_id), seconds)

    def view(self, image):
        reply = self.get("/view?" + urllib.parse.urlencode(image))
        assert reply.status == 200, reply.body
        return reply.body

    def socket(self, client_id=None):
        return Socket(self, client_id or uuid.uuid4().hex)

    def resident_bytes(self):
        return self._memory("VmRSS")

    def peak_bytes(self):
        """The most that was ever resident."""
        return self._memory("VmHWM")

    def _memory(self, entry):
        for line in open(f"/proc/{self.process.pid}/status"):
            if line.startswith(entry + ":"):
                return int(line.split()[1]) * 1024
        raise AssertionError(f"no {entry}")

    def upload(self, name, content, **fields):
        """A form, as the editor's upload button sends it."""
        boundary = uuid.uuid4().hex
        parts = [f'--{boundary}\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n'.encode()
                 for k, v in fields.items()]
        head = (f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n'
                "Content-Type: application/octet-stream\r\n\r\n")
        body = b"".join(parts) + head.encode() + content + f"\r\n--{boundary}--\r\n".encode()
        kind = f"multipart/form-data; boundary={boundary}"
        return self.request("POST", "/upload/image", body, {"content-type": kind})


class Socket:
    """A websocket whose messages are collected by a thread."""

    def __init__(self, server, client_id):
        self.client_id = client_id
        self.events, self.binary = [], []
        url = f"ws://127.0.0.1:{server.port}/ws?clientId={client_id}"
        self.socket = websocket.create_connection(url, timeout=PATIENCE)
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self):
        try:
            while True:
                message = self.socket.recv()
                if isinstance(message, str) and message:
                    self.events.append(json.loads(message))
                elif message:
                    self.binary.append(message)
                else:
                    return
        except (websocket.WebSocketException, OSError):
            pass

    def of(self, kind):
        return [event["data"] for event in list(self.events) if event["type"] == kind]

    def close(self):
        self.socket.close()
        self.thread.join(PATIENCE)


def png(color=(200, 60, 20), size=(8, 8), mode="RGB"):
    file = io.BytesIO()
    Image.new(mode, size, color).save(file, "PNG")
    return file.getvalue()


def pixels(content):
    with Image.open(io.BytesIO(content)) as image:
        return image.size, image.convert("RGB").tobytes()


def quick():
    """A picture in, the same picture out."""
    return {
        "1": {"class_type": "LoadImage", "inputs": {"image": "demo:man-and-cat.png"}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "quick/picture"}},
    }


LEARNING = {"steps": 8, "steps_per_round": 4, "first_timesteps": 2, "timesteps": 2, "joint_steps": 2}
SAMPLING = {"steps": 6, "prompts": "a photo of <bob> on grass"}


def small_demo(**learning):
    """The bundled workflow with few steps, as the editor saves it."""
    document = copy.deepcopy(DEMO)
    for node in document["nodes"]:
        changes = {"EmLoop": LEARNING | learning, "PersonalizedSampler": SAMPLING}.get(node["type"], {})
        named = node.get("widgets_values_named")
        if not changes:
            continue
        for name, value in changes.items():
            old = named[name]
            place = list(named).index(name)
            assert node["widgets_values"][place] == old
            node["widgets_values"][place] = named[name] = value
    return document


def small_prompt(**learning):
    """The same in the API's form."""
    return as_prompt(small_demo(**learning))


def as_prompt(document):
    file = WORK / f"{uuid.uuid4().hex}.json"
    file.write_text(json.dumps(document))
    try:
        text = subprocess.run([HOST_DEMO, "validate", str(file), "--api"], check=True, capture_output=True, text=True)
        return json.loads(text.stdout)
    finally:
        file.unlink()


def long_prompt():
    """One that is still in its EM loop when the test has done what it wants."""
    return small_prompt(steps=5000, steps_per_round=20)
