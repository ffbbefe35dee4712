"""Time and memory of one token-learning step beside PyTorch's, in turn, as ratios.

    python compare.py [--model sprites|sd15] [--width 64] [--steps 3] [--rounds 2] [--threads 1] [--precision f32 bf16]

Every program runs alone, ours and PyTorch's variants one after the other, and again (A B A B); the first step of each does
not count. A ratio is our median over that of PyTorch's faster variant at the same precision: processor time on one thread,
time by the clock on more. Ours is measured with a graph that is kept, and `lean`. Both get the allocator settings that host-demo makes for itself. Nothing else may be running.
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
OURS = ROOT / "target/release/examples/step_cost"
PEER = Path(__file__).with_name("step_cost.py")
# As host-demo/src/memory.rs.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str((1 << 63) - 1)}
VARIANTS = ["contiguous", "channels_last"]
STEP = re.compile(r"step (\d+): ([\d.]+) s .* CPU ([\d.]+) s;.* peak ([\d.]+) GiB")
FORWARD = re.compile(r"without gradients: ([\d.]+) s")


class Measured:
    def __init__(self):
        self.clock, self.cpu, self.forward, self.peak = [], [], [], 0.0

    def run(self, command, threads):
        environment = {**os.environ, **ALLOCATOR, "RAYON_NUM_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
        text = subprocess.run(list(map(str, command)), env=environment, check=True, capture_output=True, text=True).stdout
        for step, clock, cpu, peak in STEP.findall(text):
            self.peak = max(self.peak, float(peak))
            if int(step) > 0:
                self.clock.append(float(clock))
                self.cpu.append(float(cpu))
        self.forward += map(float, FORWARD.findall(text))

    def step(self, threads):
        return self.cpu if threads == 1 else self.clock


def spread(values):
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def processor():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    name = next(v.strip() for k, v in fields.items() if k.startswith("model name"))
    flags = next(v.split() for k, v in fields.items() if k.startswith("flags"))
    return name + "".join(f", {flag}" for flag in ["avx512_bf16", "amx_bf16"] if flag in flags)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["sprites", "sd15"], default="sd15")
    parser.add_argument("--width", type=int, default=64, help="of the latent")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", nargs="+", choices=["f32", "bf16"], default=["f32", "bf16"])
    wanted = parser.parse_args()
    what, threads = [wanted.model, wanted.width, wanted.steps], wanted.threads
    import diffusers
    import torch

    print(f"{processor()}; {threads} thread(s); PyTorch {torch.__version__}, diffusers {diffusers.__version__}")
    print(f"{wanted.model}, latents {wanted.width}x{wanted.width}; seconds: median (least to most)\n")
    print("| precision | | step | forward without gradients | peak GiB |\n| --- | --- | --- | --- | --- |")
    for precision in wanted.precision:
        measured = {"ours": Measured(), "ours, lean": Measured()} | {f"PyTorch, {variant}": Measured() for variant in VARIANTS}
        for _ in range(wanted.rounds):
            measured["ours"].run([OURS, *what, precision, "fast"], threads)
            measured["ours, lean"].run([OURS, *what, precision, "lean"], threads)
            for variant in VARIANTS:
                peer = [sys.executable, PEER, *what, threads, precision, variant]
                measured[f"PyTorch, {variant}"].run(peer, threads)
        for name, found in measured.items():
            print(f"| {precision} | {name} | {spread(found.step(threads))} | {spread(found.forward)} | {found.peak:.2f} |")
        ours, lean, *peers = measured.values()
        step = median(ours.step(threads)) / min(median(peer.step(threads)) for peer in peers)
        forward = median(ours.forward) / min(median(peer.forward) for peer in peers)
        peak = ours.peak / min(peer.peak for peer in peers)
        print(f"| {precision} | **ratio** | **{step:.2f}** | **{forward:.2f}** | **{peak:.2f}** |")
        step = median(lean.step(threads)) / median(ours.step(threads))
        print(f"| {precision} | lean over ours | {step:.2f} | | {lean.peak / ours.peak:.2f} |", flush=True)


if __name__ == "__main__":
    main()
