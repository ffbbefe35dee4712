"""What the GPU build does on a GPU, in one JSON file and one Markdown table.

    python3 tests/gpu/prove.py PROGRAMS --out FOLDER [--peers FOLDER] [--tiny] [--minutes 8]

PROGRAMS is what unpack.py unpacked. The device is that of CONCEPTLOOM_DEVICE (default cuda). In this order, as far as the
minutes go:

  parity   every recorded tensor of PyTorch and diffusers, on the CPU and on the device; gradients among them
  kernels  our own kernels beside the same operations in candle's: what they differ by, and seconds of both in turn
  wires    tensors between nodes: the very same memory within the library, values, order and addresses of another's
  demo     the bundled workflow from end to end, with the IoU of its masks
  steps    seconds and peak memory of token-learning steps, draws of the E-step, joint LoRA steps, sampling steps and decoding
           of SD 1.5's shapes at 512 pixels with random weights, beside those with candle's kernels alone
           (CONCEPTLOOM_KERNELS=candle) and PyTorch's, in turn (A B A B); and a step without any memory left, which is an
           error, and one after it, which works

PyTorch is that of this Python; PEERS has pure-Python packages that it lacks, as wheels (diffusers). Needs no Rust and no
network. `--tiny` is for a machine without a GPU: the bundled model's shapes and few steps, so that the program is tried. Ends with 0 if
nothing that was tried came out wrong.
"""
import argparse
import glob
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import time
import zipfile

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PROGRAMS = ["host-demo", "libconceptloom.so", "parity", "stage_cost", "kernel_cost", "tensor_bridge-unit-tests"]
WORKS = ["tokens", "e-step", "lora", "sampling", "encode", "decode"]
NAMES = {"tokens": "token-learning step", "e-step": "draw of the E-step", "lora": "joint LoRA step (rank 16)",
         "sampling": "guided sampling step", "encode": "a picture to latents", "decode": "latents to a picture"}
# What stage_cost can be asked for. A precision that it does not have on this device it says so of.
PRECISIONS = ["f32", "bf16", "f16"]
PEERS = ["contiguous", "channels_last"]
# What a kernel's result may differ by from f32 in parts of the largest number, or twice as much as candle's does.
KERNEL_ERRORS = {"f32": 1e-4, "bf16": 2e-2, "f16": 4e-3}
CANDLE = "ours, candle's kernels"
# Of the bundled tokenizer, which the random model has.
VOCABULARY = 930
TINY_DEMO = {"EmLoop.steps": 4, "EmLoop.steps_per_round": 2, "EmLoop.first_timesteps": 2, "EmLoop.timesteps": 2,
             "EmLoop.joint_steps": 2, "New pictures.steps": 2}
PARITY_TABLE = re.compile(r"^(\S+), (\w+) on (\S+), recorded with|^(\S+) on (\S+), recorded with")
PARITY_LINE = re.compile(r"^(\S+)\s+(\[.*?\])\s+(\S+)\s+(\S+)\s+(\S+)(  <- differs)?$")


class Proof:
    def __init__(self, wanted):
        self.wanted = wanted
        self.out = wanted.out.resolve()
        self.programs = wanted.programs.resolve()
        self.end = time.monotonic() + 60 * wanted.minutes
        self.results = {"not_run": {}}

    def left(self):
        return self.end - time.monotonic()

    def environment(self, device):
        environment = os.environ | {"CONCEPTLOOM_DEVICE": device, "CARGO_MANIFEST_DIR": str(ROOT / "plugin/crates/stable-diffusion"),
                                    "CONCEPTLOOM_PLUGIN": str(self.programs / "libconceptloom.so"), "RUST_BACKTRACE": "0"}
        paths = [*nvidia_folders(), *filter(None, [environment.get("LD_LIBRARY_PATH")])]
        return environment | {"LD_LIBRARY_PATH": ":".join(paths)}

    def run(self, command, device, **more):
        """Seconds and the finished process; it is stopped when the time is up."""
        start = time.monotonic()
        done = subprocess.run(list(map(str, command)), env=self.environment(device) | more.pop("extra", {}), capture_output=True,
                              text=True, timeout=max(self.left(), 1), **more)
        return time.monotonic() - start, done

    def stage(self, name, work):
        """Runs a part; what keeps it from running is kept, and the rest goes on."""
        print(f"{name} …", flush=True)
        try:
            if self.left() <= 0:
                raise TimeoutError("no time was left")
            work()
        except (subprocess.TimeoutExpired, TimeoutError) as error:
            self.results["not_run"][name] = "no time was left" if isinstance(error, TimeoutError) else "it ran out of time"
        except Failed as error:
            self.results["not_run"][name] = str(error)

    # The parts.

    def device(self):
        command = [self.programs / "stage_cost", "--sprites", SPRITES, "--shapes", "sprites", "--work", "decode", "--steps", 1]
        _, done = self.run(command, self.wanted.device)
        if done.returncode != 0:
            sys.exit(last_line(done.stderr))
        self.results["device"] = json.loads(done.stdout.splitlines()[0])
        print("on", self.results["device"], flush=True)

    def parity(self):
        devices = list(dict.fromkeys(["cpu", self.wanted.device]))
        tables = {}
        for device in devices:
            seconds, done = self.run([self.programs / "parity", "--nocapture", "--test-threads=1"], device)
            tables[device] = parity_tables(done.stdout)
            if not tables[device]:
                raise Failed(f"no table came of it on {device}: {last_line(done.stderr)}")
            self.results.setdefault("parity", {})[device] = {
                "passed": done.returncode == 0, "seconds": seconds, "tensors": tables[device]}

    def wires(self):
        _, done = self.run([self.programs / "tensor_bridge-unit-tests"], self.wanted.device)
        n_passed = re.search(r"(\d+) passed", done.stdout)
        if not n_passed or n_passed[1] == "0":
            raise Failed(f"no test of the wires ran: {last_line(done.stderr)}")
        self.results["wires"] = {"passed": done.returncode == 0, "tests": int(n_passed[1])}

    def kernels(self):
        shapes, times, precisions = ("sprites", 1, "f32") if self.wanted.tiny else ("sd15", 10, ",".join(PRECISIONS))
        _, done = self.run([self.programs / "kernel_cost", shapes, times, precisions], self.wanted.device)
        self.results["kernels"] = lines_of(done)
        for line in self.results["kernels"]:
            # JSON has no other word for what is not a number.
            for side in line["own"], line["candle"]:
                side["error"] = float("inf") if side["error"] is None else side["error"]
            allowed = max(KERNEL_ERRORS[line["precision"]], 2 * line["candle"]["error"])
            line["differs"] = not line["own"]["error"] <= allowed

    def steps(self):
        has_own = any(line["has_own"] for line in self.results.get("kernels", []))
        shapes = "sprites" if self.wanted.tiny else "sd15"
        steps = 2 if self.wanted.tiny else 10
        measured = self.results["steps"] = {}
        for more in ["--exhaust"], []:
            command = [self.programs / "stage_cost", "--sprites", SPRITES, "--shapes", shapes, "--steps", steps,
                       "--precision", ",".join(PRECISIONS), *more]
            _, done = self.run(command, self.wanted.device)
            self.add(measured, "ours", lines_of(done))
            if has_own:
                command = [part for part in command if part != "--exhaust"]
                _, done = self.run(command, self.wanted.device, extra={"CONCEPTLOOM_KERNELS": "candle"})
                self.add(measured, CANDLE, lines_of(done))
            for precision in PRECISIONS:
                for layout in PEERS:
                    # The same threads as ours where the processor computes.
                    command = [sys.executable, ROOT / "tests/reference/step_cost.py", *WORKS, "--shapes", shapes, "--steps", steps,
                               "--threads", os.cpu_count(), "--precision", precision, "--layout", layout,
                               "--device", self.wanted.device, "--vocabulary", VOCABULARY]
                    self.peer(measured, f"PyTorch, {layout}", command)

    def peer(self, measured, name, command):
        _, done = self.run(command, self.wanted.device, extra={"PYTHONPATH": os.pathsep.join(peers(self.wanted.peers, self.out))})
        try:
            self.add(measured, name, lines_of(done))
        except Failed as error:
            self.results["not_run"][name] = str(error)

    def add(self, measured, name, lines):
        for line in lines:
            if "not_run" in line:
                self.results["not_run"][f"{name}, {line.get('precision') or line['work']}"] = line["not_run"]
            elif "survived" in line:
                self.results["memory"] = line
            elif "work" in line:
                there = measured.setdefault(line["precision"], {}).setdefault(line["work"], {})
                one = there.setdefault(name, {"seconds": [], "peak_bytes": 0})
                one["seconds"] += line["seconds"]
                one["peak_bytes"] = max(one["peak_bytes"], line["peak_bytes"])

    def demo(self):
        folder = self.out / "demo"
        sets = [f"--set={key}={value}" for key, value in (TINY_DEMO if self.wanted.tiny else {}).items()]
        seconds, done = self.run([self.programs / "host-demo", "run", "--out", folder, *sets], self.wanted.device, cwd=self.out)
        if done.returncode != 0:
            raise Failed(last_line(done.stderr))
        run = json.loads((folder / "run.json").read_text())
        curves = {curve["series"]: curve["points"] for curve in run["metrics"] if curve["series"].startswith("mask IoU of ")}
        self.results["demo"] = {
            "seconds": seconds, "devices": run["plugins"][0]["devices"],
            "mask_iou": {name.removeprefix("mask IoU of "): {"first": points[0][1], "last": points[-1][1]}
                         for name, points in curves.items()}}

    def holds(self):
        """Nothing that was tried came out wrong."""
        tried = [*self.results.get("parity", {}).values(), self.results.get("wires", {"passed": True})]
        kernels = self.results.get("kernels", [])
        return all(found["passed"] for found in tried) and not any(line["differs"] for line in kernels) and self.results.get("memory", {"survived": True})["survived"]

    # What is written.

    def write(self):
        (self.out / "proof.json").write_text(json.dumps(self.results, indent=1) + "\n")
        (self.out / "proof.md").write_text("\n".join(self.markdown()) + "\n")
        print((self.out / "proof.md").read_text())

    def markdown(self):
        results, device = self.results, self.results["device"]
        memory = f", {device['memory'] / 2**30:.0f} GiB" if device["memory"] else ""
        yield f"Computed on **{device['device']}**: {device['product']}{memory}" + (", tiny sizes" if self.wanted.tiny else "")
        if "parity" in results:
            yield "\n| recorded tensors | on | greatest relative error | tensors | |\n| --- | --- | --- | --- | --- |"
            for on, found in results["parity"].items():
                for name in sorted({line["file"] for line in found["tensors"]}):
                    lines = [line for line in found["tensors"] if line["file"] == name]
                    worst = max(lines, key=lambda line: line["relative"])
                    verdict = f"{sum(line['differs'] for line in lines)} differ" if any(line["differs"] for line in lines) else "agree"
                    yield f"| {name} | {on} | {worst['relative']:.1e} ({worst['tensor']}) | {len(lines)} | {verdict} |"
                if not found["passed"]:
                    yield f"| all | {on} | | | **the test failed** |"
        if "wires" in results:
            verdict = "passed" if results["wires"]["passed"] else "**not all passed**"
            yield f"\nTensors between nodes: {results['wires']['tests']} tests, {verdict}"
        if results.get("kernels"):
            own = "our own" if results["kernels"][0]["has_own"] else "candle's too: none of our own are here"
            yield f"\nKernels, {own}, beside candle's: median milliseconds forward, and forward and backward; greatest error beside f32."
            yield "\n| precision | operation | forward | candle's | and backward | candle's | error | candle's |"
            yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
            for line in results["kernels"]:
                yield kernel_row(line)
        if results.get("steps"):
            yield "\nSeconds: median (least to most); memory: the most."
            yield "\n| precision | work | | seconds | GiB | ratio of time | of memory |\n| --- | --- | --- | --- | --- | --- | --- |"
            for precision, works in results["steps"].items():
                for work, found in works.items():
                    yield from rows(precision, work, found)
        if "demo" in results:
            demo = results["demo"]
            ious = ", ".join(f"{name} {iou['last']:.3f} (from {iou['first']:.3f})" for name, iou in demo["mask_iou"].items())
            where = ", ".join(f"{one['kind']} {one['product']}" for one in demo["devices"])
            yield f"\nDemo: {demo['seconds']:.0f} s on {where}; mask IoU: {ious}"
        if "memory" in results:
            memory = results["memory"]
            verdict = "survived" if memory["survived"] else "**another loss afterwards**"
            yield f"\nOut of memory with {memory['held_bytes'] / 2**30:.1f} GiB taken: \"{memory['said']}\"; {verdict}"
        for name, reason in results["not_run"].items():
            yield f"\nNot run: {name}: {reason}"


class Failed(Exception):
    pass


SPRITES = ROOT / "plugin/crates/sprites/model"


def kernel_row(line):
    def milliseconds(times):
        return f"{1e3 * statistics.median(times):.3f}"

    own, candle = line["own"], line["candle"]
    times = [milliseconds(side[what]) for what in ("forward", "both") for side in (own, candle)]
    verdict = " **differs**" if line["differs"] else ""
    return f"| {line['precision']} | {line['operation']} | {' | '.join(times)} | {own['error']:.1e}{verdict} | {candle['error']:.1e} |"


def rows(precision, work, found):
    def cells(one):
        times = one["seconds"]
        return f"{statistics.median(times):.4f} ({min(times):.4f} to {max(times):.4f}) | {one['peak_bytes'] / 2**30:.2f}"

    others = [one for name, one in found.items() if name not in ("ours", CANDLE)]
    ratios = "|  | "
    if "ours" in found and others:
        time_ratio = statistics.median(found["ours"]["seconds"]) / min(statistics.median(one["seconds"]) for one in others)
        ratios = f"| **{time_ratio:.2f}** | **{found['ours']['peak_bytes'] / min(one['peak_bytes'] for one in others):.2f}** "
    for name, one in found.items():
        yield f"| {precision} | {NAMES[work]} | {name} | {cells(one)} {ratios if name == 'ours' else '|  | '}|"


def parity_tables(text):
    tables, file = [], None
    for line in text.splitlines():
        if match := PARITY_TABLE.match(line):
            file = f"{match[1]}, {match[2]}" if match[1] else match[4]
            file = re.sub(r" on .*", "", file)
        elif file and (match := PARITY_LINE.match(line)):
            relative = float(match[5])
            tables.append({"file": file, "tensor": match[1], "error": float(match[4]), "relative": relative, "differs": bool(match[6])})
    return tables


def lines_of(done):
    if done.returncode != 0:
        raise Failed(last_line(done.stderr))
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def last_line(text):
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def nvidia_folders():
    """Where pip puts NVIDIA's libraries, which are on no search path."""
    try:
        import nvidia
    except ImportError:
        return []
    found = (file for folder in nvidia.__path__ for file in glob.glob(folder + "/**/lib*.so.1[0-9]", recursive=True))
    return sorted({os.path.dirname(file) for file in found})


def peers(folder, out):
    """Wheels of a folder, unpacked: parts of some cannot be read from a wheel."""
    if folder is None:
        return []
    place = out / "peers"
    if not place.exists():
        for wheel in folder.glob("*.whl"):
            with zipfile.ZipFile(wheel) as file:
                file.extractall(place)
    return [str(place)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("programs", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--peers", type=pathlib.Path)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--tiny", action="store_true")
    wanted = parser.parse_args()
    wanted.device = os.environ.get("CONCEPTLOOM_DEVICE") or "cuda"
    missing = [name for name in PROGRAMS if not (wanted.programs / name).exists()]
    if missing:
        sys.exit(f"{wanted.programs} has no {', '.join(missing)}; unpack what build.sh packed with unpack.py, and name that folder")
    wanted.out.mkdir(parents=True, exist_ok=True)
    proof = Proof(wanted)
    proof.device()
    for name in ["parity", "kernels", "wires", "demo", "steps"]:
        proof.stage(name, getattr(proof, name))
        proof.write()
    sys.exit(0 if proof.holds() else 1)


main()
