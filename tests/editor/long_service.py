"""A server under mixed clients for a long time: nothing is lost or doubled, and nothing grows.

    python long_service.py --jobs 10000 [--clients 6] [--curves FILE.svg] [--seed 1] [--minutes 480]

Clients queue small graphs, wait for them over HTTP and a websocket, cancel, reconnect, upload, save, delete, and break off in
the middle of requests. In the middle of it the disk fills up and the folder of outputs becomes read-only (both need the right to
mount a small disk), the server's clock is set back by two days, and later forward by three (Debian's libfaketime), and the machine
sleeps for a moment; what cannot be done here is left out, in a sentence. At the end the server is killed with a full disk behind it
and jobs before it. Needs what `run.sh` prepares; `test_long_service.py` is the short form.

Ctrl-Z (`kill -TSTP`) pauses it between two jobs, server and all, until it is continued (`fg`, `kill -CONT`); the pause is not
counted as running.
"""
import argparse
import collections
import contextlib
import io
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid

from PIL import Image

from support import Server, long_prompt, png, wait_until

# Of the small disk.
DISK_MIB = 128
# What a job of a client may take, however busy the machine is.
JOB_SECONDS = 600


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


class Disk:
    """A folder on a small disk of its own, or, where that is not allowed, an ordinary folder."""

    def __init__(self, parent):
        self.path = pathlib.Path(parent) / "disk"
        self.path.mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(self.path)],
                                 capture_output=True, text=True)
        self.is_small = mounted.returncode == 0
        if not self.is_small:
            print(f"no small disk ({mounted.stderr.strip()}): full and read-only disks are left out", flush=True)

    def close(self):
        if self.is_small:
            subprocess.run(["umount", "--lazy", str(self.path)], check=True)

    @contextlib.contextmanager
    def full(self, leave=0):
        """No room but `leave` bytes."""
        filler = self.path / "filler"
        file = os.open(filler, os.O_CREAT | os.O_WRONLY)
        for block in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while True:
                    os.write(file, bytes(block))
        os.close(file)
        if leave:
            os.truncate(filler, filler.stat().st_size - leave)
        try:
            yield
        finally:
            filler.unlink()

    @contextlib.contextmanager
    def read_only(self, folder):
        """`folder` cannot be written."""
        subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
        try:
            yield
        finally:
            subprocess.run(["umount", str(folder)], check=True)


class Clock:
    """The time of day as the server has it: another where libfaketime is installed."""

    def __init__(self, parent):
        self.file = pathlib.Path(parent) / "clock"
        libraries = sorted(pathlib.Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
        self.file.write_text("+0d")
        self.environment = {}
        if libraries:
            # Not the clock that only counts on, nor the times of files: a clock that is set changes neither.
            self.environment = {"LD_PRELOAD": str(libraries[0]), "FAKETIME_TIMESTAMP_FILE": str(self.file),
                                "FAKETIME_CACHE_DURATION": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1", "NO_FAKE_STAT": "1"}
        else:
            print("no libfaketime: a clock that is set is left out", flush=True)

    def set(self, days):
        self.file.write_text(f"{days:+d}d")
        # How long libfaketime goes by what it read last.
        time.sleep(2)


class Client(threading.Thread):
    """One client with its own dice."""

    def __init__(self, service, number):
        super().__init__(daemon=True)
        self.service, self.server, self.number = service, service.server, number
        self.dice = random.Random(service.seed * 1000 + number)
        self.name = f"client-{number}"
        self.socket = self.server.socket(self.name)
        self.pauses = service.pauses
        self.error = None

    def run(self):
        try:
            self.upload()
            while self.service.take(jobs := self.dice.randint(1, 4)):
                with self.service.turn():
                    if self.pauses != self.service.pauses:
                        # Whoever was away for hours connects anew.
                        self.pauses = self.service.pauses
                        self.reconnect()
                    self.work(jobs)
                self.socket.events.clear()
                self.socket.binary.clear()
        except BaseException as error:  # told by the one who waits for the thread
            self.error = error
            self.service.take(self.service.jobs)
        finally:
            self.leave()

    def leave(self):
        """Goodbye, or not a word."""
        if self.dice.random() < 0.5:
            self.socket.socket.send_close()
        else:
            self.socket.socket.sock.shutdown(socket.SHUT_RDWR)
        self.socket.thread.join(JOB_SECONDS)
        assert not self.socket.thread.is_alive(), "the server holds a connection that its client closed"
        self.socket.socket.shutdown()

    def reconnect(self):
        self.leave()
        self.socket = self.server.socket(self.name)

    def work(self, n_jobs):
        waiting = {}
        for _ in range(n_jobs):
            kind, prompt, saves = self.graph()
            prompt_id = str(uuid.UUID(int=self.dice.getrandbits(128), version=4))
            if saves:
                prompt["save"]["inputs"]["filename_prefix"] = f"{self.name}/{prompt_id}"
            reply = self.server.post("/prompt", {"prompt": prompt, "client_id": self.name, "prompt_id": prompt_id})
            assert reply.status == 200 and reply.json["prompt_id"] == prompt_id, reply.body
            waiting[prompt_id] = (kind, saves)
        canceled = set()
        for _ in range(self.dice.randint(0, 3)):
            canceled |= self.disturb(waiting)
        canceled |= {i for i, (kind, _) in waiting.items() if kind == "long" and self.cancel(i)}
        for prompt_id, (kind, saves) in waiting.items():
            entry = self.server.finished(prompt_id, JOB_SECONDS)
            outcome, said = entry["status"]["messages"][-1] if entry["status"]["messages"] else ("removed", {})
            self.check(prompt_id, kind, saves, outcome, said, prompt_id in canceled)
        self.server.post("/history", {"delete": list(waiting)})

    def check(self, prompt_id, kind, saves, outcome, said, is_canceled):
        """The job ended once, as it had to."""
        expected = {"execution_error"} if kind == "failing" else {"execution_success"}
        if is_canceled:
            expected |= {"execution_interrupted", "removed"}
        assert outcome in expected, (kind, outcome, expected, said)
        starts = [data for data in self.socket.of("execution_start") if data["prompt_id"] == prompt_id]
        assert len(starts) <= 1, f"{prompt_id} was started {len(starts)} times"
        files = list((self.server.data / "output" / self.name).glob(f"{prompt_id}*"))
        if saves and outcome == "execution_success":
            assert len(files) == 1, (prompt_id, outcome, files)
            # People tidy up.
            files[0].unlink()
        else:
            assert not files, (prompt_id, outcome, files)
        self.service.count(outcome)

    def graph(self):
        """Kind, prompt, whether it saves a picture."""
        image = node("LoadImage", image=self.picture)
        kind = self.dice.choices(["save", "preview", "batch", "masks", "failing", "long"], [40, 20, 15, 15, 8, 2])[0]
        save = node("SaveImage", images=["image", 0], filename_prefix=f"{self.name}/x")
        if kind == "save":
            return kind, {"image": image, "save": save}, True
        if kind == "preview":
            return kind, {"image": image, "show": node("PreviewImage", images=["image", 0])}, False
        if kind == "batch":
            batch = node("ImageBatch", image1=["image", 0], image2=["image", 0])
            return kind, {"image": image, "batch": batch, "show": node("PreviewImage", images=["batch", 0])}, False
        if kind == "masks":
            masks = {name: node("LoadImageMask", image=self.picture, channel=name) for name in ("red", "green")}
            refined = node("DenseCrfRefine", images=["image", 0], masks=["both", 0], iterations=self.dice.randint(1, 3))
            both = node("MaskBatch", mask_1=["red", 0], mask_2=["green", 0])
            save["inputs"]["images"] = ["refined", 1]
            return kind, {"image": image, **masks, "both": both, "refined": refined, "save": save}, True
        if kind == "failing":
            # There when it is accepted, no picture when it runs.
            name = f"{self.name}-broken.png"
            (self.server.data / "input" / name).write_bytes(png()[:40])
            return kind, {"image": node("LoadImage", image=name), "save": save}, False
        return kind, self.service.long, False

    def disturb(self, waiting):
        """Something that clients do meanwhile; returns the jobs that may be canceled by it."""
        what = self.dice.choice(["cancel", "reconnect", "upload", "save", "look", "break off", "free"])
        if what == "cancel":
            prompt_id = self.dice.choice(list(waiting))
            self.cancel(prompt_id)
            return {prompt_id}
        if what == "reconnect":
            self.reconnect()
        elif what == "upload":
            self.upload()
        elif what == "save":
            name = f"workflows%2F{self.name}.json"
            assert self.server.request("POST", f"/userdata/{name}", b'{"nodes": []}').status == 200
            assert self.server.get(f"/userdata/{name}").body == b'{"nodes": []}'
            assert self.server.request("DELETE", f"/userdata/{name}").status == 204
        elif what == "look":
            for path in ("/queue", "/api/jobs?limit=5", "/history?max_items=5", "/object_info/LoadImage", "/system_stats",
                         f"/view?filename={self.picture}&type=input"):
                assert self.server.get(path).status == 200, path
        elif what == "break off":
            with socket.create_connection(("127.0.0.1", self.server.port), timeout=60) as connection:
                connection.sendall(b"POST /upload/image HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9000\r\n"
                                   b"content-type: multipart/form-data; boundary=x\r\n\r\n--x\r\n" + bytes(100))
        elif self.dice.random() < 0.05:
            self.server.post("/free", {"free_memory": True})
        return set()

    def cancel(self, prompt_id):
        """A job that takes long is let run for a moment first."""
        if self.dice.random() < 0.5:
            time.sleep(self.dice.random() / 4)
        assert self.server.post(f"/api/jobs/{prompt_id}/cancel").status == 200
        return True

    def upload(self):
        self.picture = f"{self.name}-{self.dice.randint(0, 3)}.png"
        # Red at the left, green at the right: each a mask.
        image = Image.new("RGB", (16, 16), (self.dice.randrange(200, 256), 0, 0))
        image.paste((0, self.dice.randrange(200, 256), 0), (8, 0, 16, 16))
        content = io.BytesIO()
        image.save(content, "PNG")
        reply = self.server.upload(self.picture, content.getvalue(), overwrite="true")
        assert reply.status == 200 and reply.json["name"] == self.picture, reply.body


class Service:
    """The server, its clients, and what is measured of it."""

    def __init__(self, server, jobs, clients, seed, seconds):
        self.server, self.jobs, self.seed = server, jobs, seed
        self.long = long_prompt()
        self.lock, self.left, self.outcomes = threading.Lock(), jobs, collections.Counter()
        self.began, self.seconds = time.monotonic(), seconds
        self.samples = []
        self.gate, self.working, self.is_paused = threading.Condition(), 0, False
        self.pauses, self.pause_is_asked = 0, False
        self.clients = [Client(self, i) for i in range(clients)]

    def take(self, jobs):
        """Whether there are as many jobs left to do; waits until they are due."""
        with self.lock:
            begun = self.jobs - self.left
            self.left -= jobs
            is_left = self.left >= 0
        if is_left:
            time.sleep(max(0, self.began + self.seconds * begun / self.jobs - time.monotonic()))
        return is_left

    @contextlib.contextmanager
    def turn(self):
        """Of a client that works."""
        with self.gate:
            self.gate.wait_for(lambda: not self.is_paused)
            self.working += 1
        try:
            yield
        finally:
            with self.gate:
                self.working -= 1
                self.gate.notify_all()

    @contextlib.contextmanager
    def alone(self):
        """No client works."""
        with self.gate:
            self.is_paused = True
            self.gate.wait_for(lambda: self.working == 0)
        try:
            yield
        finally:
            with self.gate:
                self.is_paused = False
                self.gate.notify_all()

    def ask_for_a_pause(self, *_):
        # A terminal stops the server too, and the clients have to come to an end.
        self.server.process.send_signal(signal.SIGCONT)
        self.pause_is_asked = True

    def pause(self):
        """Nothing runs until this process is continued."""
        self.pause_is_asked = False
        with self.alone():
            print(f"paused, {self.so_far()}", flush=True)
            stopped = time.monotonic()
            self.server.process.send_signal(signal.SIGSTOP)
            os.kill(os.getpid(), signal.SIGSTOP)
            self.server.process.send_signal(signal.SIGCONT)
            away = time.monotonic() - stopped
            self.began += away
            self.pauses += 1
            print(f"continued after {away / 60:.1f} min", flush=True)

    def so_far(self):
        last = self.samples[-1]
        return f"{last['jobs']} jobs in {last['seconds'] / 60:.1f} min: " + ", ".join(
            f"{what} {last[what]:.0f}" for what in ("memory", "files", "sockets", "threads", "disk", "journal"))

    def count(self, outcome):
        with self.lock:
            self.outcomes[outcome] += 1

    @property
    def done(self):
        return sum(self.outcomes.values())

    def sample(self):
        process = pathlib.Path(f"/proc/{self.server.process.pid}")
        links = []
        for link in (process / "fd").iterdir():
            with contextlib.suppress(OSError):
                links.append(os.readlink(link))

        def folder(name):
            return sum(file.stat().st_size for file in list((self.server.data / name).rglob("*")) if file.is_file())

        with contextlib.suppress(FileNotFoundError):  # a file that goes while it is looked at
            self.samples.append({
                "seconds": time.monotonic() - self.began, "jobs": self.done,
                "memory": self.server.resident_bytes() / 2**20, "files": len(links),
                "sockets": sum(link.startswith("socket:") for link in links),
                "threads": len(list((process / "task").iterdir())),
                "disk": sum(folder(name) for name in ("temp", "work", "output", "input", "user")) / 2**20,
                "journal": (self.server.data / "queue.jsonl").stat().st_size / 2**20,
            })

    def run(self, meanwhile, picture=None):
        """Until all jobs are done; of `meanwhile` each is called once, while no client works, when its part of the jobs is done."""
        for client in self.clients:
            client.start()
        signal.signal(signal.SIGTSTP, self.ask_for_a_pause)
        every = 0.25 if self.jobs < 1000 else 2
        left = dict(meanwhile)
        told = 0
        while any(client.is_alive() for client in self.clients):
            time.sleep(every)
            self.sample()
            if self.pause_is_asked:
                self.pause()
            if self.done >= told + 1000:
                told = self.done // 1000 * 1000
                print(self.so_far(), flush=True)
                if picture:
                    curves(self.samples, picture)
            for part in [part for part in left if self.done >= part * self.jobs]:
                with self.alone():
                    left.pop(part)()
        assert not left, f"not done: {list(left)}"
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        for client in self.clients:
            if client.error:
                raise client.error

    def highest(self, what):
        """In the second fifth and in the last: a job that takes memory makes teeth, a leak lifts them."""
        n = len(self.samples)
        return [max(sample[what] for sample in part) for part in (self.samples[n // 5:2 * n // 5 + 1], self.samples[-max(1, n // 5):])]

    def grew(self, what):
        """By more than a tenth, and by more than requests that are under way."""
        before, after = self.highest(what)
        return after > 1.1 * before and after > before + 4

    def probe(self, room=0):
        """A job that is done while nothing is in its way; its entry in the journal takes `room` bytes more."""
        prompt = {"note": prompt_note(room), "image": node("LoadImage", image="demo:man-and-cat.png"),
                  "save": node("SaveImage", images=["image", 0], filename_prefix=f"probe/{uuid.uuid4().hex}")}
        return self.server.post("/prompt", {"prompt": prompt})

    def ends(self, reply, outcome):
        assert reply.status == 200, reply.body
        entry = self.server.finished(reply.json["prompt_id"])
        assert entry["status"]["messages"][-1][0] == outcome, entry["status"]
        return json.dumps(entry["status"])


def refusal(reply):
    assert reply.status == 500 and len(reply.json["error"]["message"]) > 20, (reply.status, reply.body)
    return reply.json["error"]["message"]


def disturb_the_disk(service, disk):
    """Full, nearly full, read-only; and after each as if nothing had been."""
    server = service.server
    if not disk.is_small:
        return
    before = server.get("/settings").json
    with disk.full():
        print("full:", refusal(service.probe(1 << 14)))
        refusal(server.upload("full.png", png()))
        refusal(server.request("POST", "/userdata/full.json", b"{}" * 5000))
        refusal(server.post("/settings", {"a": "b" * 5000}))
        assert server.get("/settings").json == before and server.get("/userdata/full.json").status == 404
        assert server.get("/queue").json["queue_pending"] == []
    service.ends(service.probe(), "execution_success")
    # Room for the journal, none for a picture.
    with disk.full(leave=8 << 10):
        said = service.ends(service.probe(), "execution_error")
        assert "space" in said, said
    service.ends(service.probe(), "execution_success")
    with disk.read_only(server.data / "output"):
        said = service.ends(service.probe(), "execution_error")
        assert "ead-only" in said, said
    service.ends(service.probe(), "execution_success")
    torn = [path for path in server.data.rglob("*") if path.name.startswith(".") and path.name != ".lock"]
    assert not torn, f"half-written: {torn}"


def sleep(service, seconds):
    """The machine sleeps while a job runs and others wait, with clients connected; nobody has to begin again."""
    server = service.server
    listener = server.socket("sleeper")
    ids = [server.queue_prompt(service.long, "sleeper")]
    ids += [service.probe().json["prompt_id"] for _ in range(2)]
    wait_until(lambda: server.get("/queue").json["queue_running"])
    server.process.send_signal(signal.SIGSTOP)
    time.sleep(seconds)
    server.process.send_signal(signal.SIGCONT)
    assert server.post(f"/api/jobs/{ids[0]}/cancel").status == 200
    ended = [server.finished(prompt_id, JOB_SECONDS)["status"]["messages"][-1][0] for prompt_id in ids]
    assert ended == ["execution_interrupted", "execution_success", "execution_success"], ended
    wait_until(lambda: listener.of("execution_interrupted"))
    listener.close()
    server.post("/history", {"delete": ids})


def set_the_clock(service, clock, days):
    """What was accepted before and after is done, and stands in the history in this order, whatever time it is."""
    if not clock.environment:
        return
    ids = [service.probe().json["prompt_id"]]
    clock.set(days)
    ids += [service.probe().json["prompt_id"] for _ in range(2)]
    ended = {prompt_id: service.server.finished(prompt_id)["status"] for prompt_id in ids}
    assert all(status["messages"][-1][0] == "execution_success" for status in ended.values()), ended
    assert [prompt_id for prompt_id in service.server.get("/history").json if prompt_id in ids] == ids
    off = ended[ids[-1]]["messages"][-1][1]["timestamp"] / 1000 - time.time()
    assert abs(off - 86400 * days) < 600, off
    print(f"the server's clock was set: {days:+d} days", flush=True)


def kill_behind_a_full_disk(service, disk, arguments, environment):
    """The journal could not be written to once; what was accepted before and after is there once after a kill."""
    server = service.server
    prompt = service.long
    ids = [server.queue_prompt(prompt)]
    wait_until(lambda: server.get("/queue").json["queue_running"])
    if disk.is_small:
        # Whatever part of a line still fits is written.
        for leave in (0, 4096):
            with disk.full(leave):
                while server.post("/prompt", {"prompt": prompt | {"x": prompt_note(6000)}}).status == 200:
                    pass
    accepted = lambda: [entry[1] for part in ("queue_running", "queue_pending") for entry in server.get("/queue").json[part]]
    ids += [service.probe().json["prompt_id"] for _ in range(3)]
    expected = accepted()
    assert set(ids) <= set(expected)
    server.kill()
    with Server(server.data, *arguments, environment=environment) as again:
        there = [entry[1] for entry in again.get("/queue").json["queue_pending"]]
        assert there == expected, (there, expected)
        again.post("/queue", {"delete": [i for i in there if i not in ids[1:]]})
        again.post("/queue", {"resume": True})
        for prompt_id in ids[1:]:
            assert again.finished(prompt_id)["status"]["completed"]
    return len(expected)


def prompt_note(n):
    """A node that only takes room in the journal."""
    return node("LoadImage", image="demo:man-and-cat.png") | {"_meta": {"title": "x" * n}}


def serve(folder, jobs, clients, seed=1, seconds=0, picture=None):
    """Runs all of it; returns what was measured, and draws it."""
    disk, clock = Disk(folder), Clock(folder)
    arguments, environment = ["--cache-memory", "256"], clock.environment
    try:
        with Server(disk.path / "data", *arguments, environment=environment) as server:
            service = Service(server, jobs, clients, seed, seconds)
            service.run({
                0.3: lambda: set_the_clock(service, clock, -2),
                0.5: lambda: disturb_the_disk(service, disk),
                0.6: lambda: sleep(service, 5),
                0.7: lambda: set_the_clock(service, clock, 3),
            }, picture)
            wait_until(lambda: server.get("/prompt").json["exec_info"]["queue_remaining"] == 0)
            print(f"{service.done} jobs of {clients} clients in {service.samples[-1]['seconds'] / 60:.1f} min:", dict(service.outcomes))
            for what in ("memory", "files", "sockets", "threads", "disk", "journal"):
                values = [sample[what] for sample in service.samples]
                print(f"{what}: {values[0]:.1f} at first, {values[-1]:.1f} at last, {max(values):.1f} at most, "
                      "{:.1f} in the second fifth, {:.1f} in the last".format(*service.highest(what)), flush=True)
            if picture:
                curves(service.samples, picture)
            restored = kill_behind_a_full_disk(service, disk, arguments, environment)
        print(f"{restored} jobs were there again after the kill")
        return service
    finally:
        disk.close()


def curves(samples, path):
    """The curves as an SVG picture."""
    panels = [("memory", "resident memory, MiB", "#1f6f8b"), ("files", "open files", "#99582a"),
              ("sockets", "of them sockets", "#6a4c93"), ("threads", "threads", "#386641"),
              ("disk", "data folder, MiB", "#bc4749"), ("journal", "journal, MiB", "#444444")]
    width, height, left, gap = 760, 110, 70, 46
    most = samples[-1]["jobs"]
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width + left + 20}" height="{len(panels) * (height + gap) + 30}" '
           'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>']
    for i, (key, label, color) in enumerate(panels):
        top = 24 + i * (height + gap)
        high = max(sample[key] for sample in samples) * 1.1 or 1
        points = " ".join(f"{left + width * s['jobs'] / most:.1f},{top + height * (1 - s[key] / high):.1f}" for s in samples)
        out.append(f'<text x="{left}" y="{top - 6}">{label}</text>'
                   f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="none" stroke="#ccc"/>'
                   f'<text x="{left - 6}" y="{top + 10}" text-anchor="end">{high:.3g}</text>'
                   f'<text x="{left - 6}" y="{top + height}" text-anchor="end">0</text>'
                   f'<polyline points="{points}" fill="none" stroke="{color}"/>')
    out.append(f'<text x="{left}" y="{len(panels) * (height + gap) + 6}">jobs, 0 to {most}</text></svg>')
    pathlib.Path(path).write_text("\n".join(out) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=0, help="that the jobs are spread over")
    parser.add_argument("--curves", metavar="FILE.svg")
    arguments = parser.parse_args()
    folder = tempfile.mkdtemp()
    try:
        service = serve(folder, arguments.jobs, arguments.clients, arguments.seed, 60 * arguments.minutes, arguments.curves)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    grown = [what for what in ("memory", "files", "sockets", "threads") if service.grew(what)]
    if grown:
        sys.exit(f"error: {' and '.join(grown)} grew by more than a tenth")


if __name__ == "__main__":
    main()
