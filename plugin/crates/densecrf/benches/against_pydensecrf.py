"""Times this crate and pydensecrf on the same picture, in turns, and prints the ratio.

    cargo build --release -p densecrf --example crf_cost
    python plugin/crates/densecrf/benches/against_pydensecrf.py [--repetitions 9] [--threads 1]

Needs numpy, pydensecrf2 and safetensors. The picture is the recorded photograph, enlarged, with a little grain (an
enlarged photograph alone would be too smooth); the planes are its coarse masks. pydensecrf runs on one thread.
"""
import argparse
import os
import pathlib
import statistics
import subprocess
import tempfile
import time

import numpy as np
from pydensecrf.densecrf import DenseCRF2D
from pydensecrf.utils import unary_from_softmax
from safetensors.numpy import load_file

ROOT = pathlib.Path(__file__).resolve().parents[4]


def scene(size, n_labels):
    recorded = load_file(ROOT / "tests/fixtures/crf/crf_128.safetensors")
    at = np.linspace(0, 127, size)
    low, part = np.minimum(at.astype(int), 126), at - np.minimum(at.astype(int), 126)

    def enlarge(values, axis):
        shape = [1] * values.ndim
        shape[axis] = size
        mix = part.reshape(shape)
        return np.take(values, low, axis) * (1 - mix) + np.take(values, low + 1, axis) * mix

    smooth = enlarge(enlarge(recorded["rgb"].astype(float), 0), 1)
    grain = np.random.default_rng(0).normal(0, 2, smooth.shape) if size > 128 else 0
    rgb = (smooth + grain).round().clip(0, 255).astype(np.uint8)
    index = np.arange(size) * 128 // size
    masks = recorded["degraded"][-(n_labels - 1):][:, index][:, :, index]
    # More labels than recorded masks: the first ones are cut in two, left and right.
    right = np.arange(size) >= size // 2
    for at in range(n_labels - 1 - len(masks)):
        masks = np.concatenate([masks, masks[at : at + 1] * right])
        masks[at] *= ~right
    return np.ascontiguousarray(rgb), np.concatenate([1 - masks.max(0, keepdims=True), masks])


def theirs(rgb, planes):
    """Milliseconds to build (the normalization included, as in ours), to infer; labels."""
    n_labels, height, width = planes.shape
    exponentials = np.exp(planes.astype(np.float32))
    unary = np.ascontiguousarray(unary_from_softmax(exponentials / exponentials.sum(0)))
    start = time.perf_counter()
    crf = DenseCRF2D(width, height, n_labels)
    crf.setUnaryEnergy(unary)
    crf.addPairwiseGaussian(sxy=3, compat=7)
    crf.addPairwiseBilateral(sxy=50, srgb=5, rgbim=rgb, compat=10)
    built = time.perf_counter()
    q = np.array(crf.inference(10))
    done = time.perf_counter()
    return (built - start) * 1e3, (done - built) * 1e3, q.argmax(0)


def measure(size, n_labels, repetitions, threads):
    rgb, planes = scene(size, n_labels)
    with tempfile.TemporaryDirectory() as folder:
        paths = [pathlib.Path(folder) / name for name in ("rgb", "planes")]
        paths[0].write_bytes(rgb.tobytes())
        paths[1].write_bytes(planes.tobytes())
        program = ROOT / "target/release/examples/crf_cost"
        command = [program, str(size), str(size), str(n_labels), *paths]
        environment = os.environ | {"RAYON_NUM_THREADS": str(threads)}
        ours = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        rows = []
        for _ in range(repetitions + 1):
            build, infer, their_labels = theirs(rgb, planes)
            ours.stdin.write("\n")
            ours.stdin.flush()
            rows.append((build, infer, *map(float, ours.stdout.readline().split())))
        ours.stdin.close()
        ours.wait()
        our_labels = np.fromfile(f"{paths[1]}.labels", np.uint8)
    # The first round warms caches. The minimum is what a busy machine disturbs least.
    rows = np.array(rows[1:])
    for name, pick in (("median", statistics.median), ("min", min)):
        build, infer, our_build, our_infer = (pick(column) for column in rows.T)
        print(f"{size}x{size} {n_labels} labels {threads} threads {name:>6}: pydensecrf {build:6.1f} + {infer:6.1f} ms,"
              f" ours {our_build:6.1f} + {our_infer:6.1f} ms; ratio build {build / our_build:.2f} infer {infer / our_infer:.2f}"
              f" total {(build + infer) / (our_build + our_infer):.2f}")
    print(f"    labels equal: {100 * np.mean(our_labels == their_labels):.4f} %")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    for size in (128, 512):
        for n_labels in (2, 5):
            measure(size, n_labels, arguments.repetitions, arguments.threads)
