"""Time and memory of every kind of work beside other programs, in turn, as ratios.

    python compare.py [--work tokens lora sampling encode decode crf] [--shapes sprites|sd15] [--steps 3] [--rounds 2]
        [--threads 1] [--precision f32 bf16]

Programs run alone, ours and the others one after the other, and again (A B A B); the first time of each does not count. A
ratio is our median over that of the fastest other at the same precision: processor time on one thread, time by the clock on
more. Nothing else may be running. The others: PyTorch with diffusers' modules in both memory layouts (`step_cost.py`); for
sampling OpenVINO and stable-diffusion.cpp where they are installed, whose peaks count the network that theirs was made from;
for the CRF pydensecrf, which has one thread. The others get an allocator that keeps what is freed, on large pages, as ours
does by itself; PyTorch also runs as it comes. The VAE computes in f32 whatever the precision.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
OURS = ROOT / "target/release/examples/stage_cost"
SPRITES = ROOT / "plugin/crates/sprites/model"
CRF = ROOT / "plugin/crates/densecrf/benches/against_pydensecrf.py"
# What ours does by itself (plugin/crates/machine-memory/src/heap.rs), for glibc's allocator.
TUNED = {
    "GLIBC_TUNABLES": f"glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold={1 << 30}:glibc.malloc.trim_threshold={(1 << 63) - 1}:glibc.malloc.arena_max=1",
    "THP_MEM_ALLOC_ENABLE": "1",
}
LAYOUTS = ["contiguous", "channels_last"]
OF_THE_VAE = {"encode", "decode"}
NAMES = {"tokens": "token-learning step", "lora": "joint step, LoRA", "sampling": "sampling step", "encode": "VAE, encode", "decode": "VAE, decode"}


class Measured:
    def __init__(self, command, allocator=TUNED):
        self.command, self.clock, self.cpu, self.peak = list(map(str, command)), [], [], 0
        self.allocator = allocator

    def run(self, threads):
        environment = {**os.environ, **self.allocator, "CONCEPTLOOM_DEVICE": "cpu",
                       "RAYON_NUM_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(self.command, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"{' '.join(self.command)}\n{done.stderr}")
        for line in map(json.loads, filter(lambda line: line.startswith("{"), done.stdout.splitlines())):
            if "work" in line:
                self.clock += line["seconds"]
                self.cpu += line["cpu_seconds"]
                self.peak = max(self.peak, line["peak_bytes"])

    def times(self, threads):
        return self.cpu if threads == 1 else self.clock


def programs(work, precision, wanted):
    ours = [OURS, "--sprites", SPRITES, "--shapes", wanted.shapes, "--work", work, "--steps", wanted.steps, "--precision", precision]
    yield "ours", Measured(ours, {})
    if work in ("tokens", "lora"):
        yield "ours, lean", Measured([*ours, "--memory", "lean"], {})
    same = ["--shapes", wanted.shapes, "--steps", wanted.steps, "--threads", wanted.threads, "--precision", precision]
    for layout in LAYOUTS:
        command = [sys.executable, Path(__file__).with_name("step_cost.py"), work, *same, "--layout", layout]
        yield f"PyTorch, {layout}", Measured(command)
        if layout == LAYOUTS[0]:
            yield f"PyTorch, {layout}, as it comes", Measured(command, {})
    if work == "sampling" and importlib.util.find_spec("openvino"):
        yield "OpenVINO", Measured([*command, "--openvino"])
    # It has no other network of this shape than Stable Diffusion's.
    if work == "sampling" and wanted.shapes == "sd15" and importlib.util.find_spec("stable_diffusion_cpp"):
        yield "stable-diffusion.cpp", Measured([*command, "--stable-diffusion-cpp"])


def spread(values):
    digits = 3 if median(values) < 1 else 2
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def processor():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    name = next(v.strip() for k, v in fields.items() if k.startswith("model name"))
    flags = next(v.split() for k, v in fields.items() if k.startswith("flags"))
    return name + "".join(f", {flag}" for flag in ["avx512_bf16", "amx_bf16"] if flag in flags)


def compare(work, precision, wanted):
    measured = dict(programs(work, precision, wanted))
    for _ in range(wanted.rounds):
        for program in measured.values():
            program.run(wanted.threads)
    title = f"{NAMES[work]}, {precision}"
    for name, found in measured.items():
        print(f"| {title} | {name} | {spread(found.times(wanted.threads))} | {found.peak / 2**30:.2f} |")
    ours = measured.pop("ours")
    lean = measured.pop("ours, lean", None)
    fastest = min(measured, key=lambda name: median(measured[name].times(wanted.threads)))
    least = min(other.peak for other in measured.values())
    ratio = median(ours.times(wanted.threads)) / median(measured[fastest].times(wanted.threads))
    print(f"| {title} | **ours / {fastest}** | **{ratio:.2f}** | **{ours.peak / least:.2f}** |")
    if lean:
        ratio = median(lean.times(wanted.threads)) / median(ours.times(wanted.threads))
        print(f"| {title} | lean / ours | {ratio:.2f} | {lean.peak / ours.peak:.2f}; over the others {lean.peak / least:.2f} |")
    sys.stdout.flush()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs="+", choices=[*NAMES, "crf"], default=[*NAMES, "crf"])
    parser.add_argument("--shapes", choices=["sprites", "sd15"], default="sd15")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", nargs="+", choices=["f32", "bf16"], default=["f32", "bf16"])
    wanted = parser.parse_args()
    import diffusers
    import torch

    print(f"{processor()}; {wanted.threads} thread(s); PyTorch {torch.__version__}, diffusers {diffusers.__version__}")
    print(f"{wanted.shapes}; seconds{' of the processor' if wanted.threads == 1 else ''}: median (least to most)\n")
    print("| work | program | seconds | peak GiB |\n| --- | --- | --- | --- |", flush=True)
    for work in wanted.work:
        if work != "crf":
            for precision in wanted.precision if work not in OF_THE_VAE else ["f32"]:
                compare(work, precision, wanted)
    if "crf" in wanted.work:
        print(flush=True)
        subprocess.run([sys.executable, CRF, "--threads", str(wanted.threads)], check=True)


if __name__ == "__main__":
    main()
