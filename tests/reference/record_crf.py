"""Records what pydensecrf answers, into tests/fixtures/crf (the Rust tests never run Python).

    python tests/reference/record_crf.py

crf_64, crf_128   a photograph and three coarse object masks. They cannot be made here, so `rgb`, `masks` and
                  `degraded` are kept from the file and only the answers are recorded anew.
crf_scene         a drawn picture, wider than high so that a swapped axis shows, with 2, 3 and 9 labels.

Versions: numpy 2.4.6, pydensecrf2 1.1 (which is lucasb-eyer/pydensecrf at 2723c7f; `pydensecrf` itself no longer
builds), safetensors 0.8.0, Python 3.11. Those used are written into each file's metadata.
"""
import importlib.metadata
import pathlib

import numpy as np
from pydensecrf.densecrf import DenseCRF2D
from pydensecrf.utils import unary_from_softmax
from safetensors.numpy import load_file, save_file

FIXTURES = pathlib.Path(__file__).resolve().parents[1] / "fixtures/crf"
VERSIONS = {name: importlib.metadata.version(name) for name in ("numpy", "pydensecrf2", "safetensors")}

# CutLER, maskcut/crf.py: (weight, position std) and (weight, position std, color std).
ITERATIONS, SMOOTHNESS, APPEARANCE = 10, (7, 3), (10, 50, 5)


def variants(width):
    """Name -> (iterations, smoothness, appearance). "scaled128" treats the picture as a small copy of one 512 wide."""
    near = (SMOOTHNESS[0], max(1, SMOOTHNESS[1] * width / 512))
    alike = (APPEARANCE[0], APPEARANCE[1] * width / 512, APPEARANCE[2])
    return {
        "it1": (1, SMOOTHNESS, APPEARANCE),
        "it10": (ITERATIONS, SMOOTHNESS, APPEARANCE),
        "gauss_only": (ITERATIONS, SMOOTHNESS, None),
        "scaled128": (ITERATIONS, near, alike),
    }


def infer(rgb, planes, iterations, smoothness, appearance):
    """[H, W, 3] bytes and [L, H, W] planes -> marginals [L, H, W]."""
    n_labels, height, width = planes.shape
    exponentials = np.exp(planes.astype(np.float32) - planes.max(0))
    crf = DenseCRF2D(width, height, n_labels)
    crf.setUnaryEnergy(np.ascontiguousarray(unary_from_softmax(exponentials / exponentials.sum(0))))
    crf.addPairwiseGaussian(sxy=smoothness[1], compat=smoothness[0])
    if appearance:
        weight, xy_std, rgb_std = appearance
        crf.addPairwiseBilateral(sxy=xy_std, srgb=rgb_std, rgbim=np.ascontiguousarray(rgb), compat=weight)
    # The answer lies in memory label by label within each pixel, and save_file writes memory as it lies.
    return np.ascontiguousarray(np.array(crf.inference(iterations), np.float32).reshape(planes.shape))


def answers(rgb, planes_by_labels):
    return {
        f"q_l{n_labels}_{name}": infer(rgb, planes, *variant)
        for n_labels, planes in planes_by_labels.items()
        for name, variant in variants(rgb.shape[1]).items()
    }


def photograph(path):
    """Two labels: the second mask and the rest. Four: what no mask covers, then all three."""
    recorded = load_file(path)
    kept = {name: np.ascontiguousarray(recorded[name]) for name in ("rgb", "masks", "degraded")}
    rest_and = lambda masks: np.concatenate([1 - masks.max(0, keepdims=True), masks])
    planes = {2: rest_and(kept["degraded"][1:2]), 4: rest_and(kept["degraded"])}
    new = answers(kept["rgb"], planes)
    labels = {f"label_l{n}": new[f"q_l{n}_it10"].argmax(0).astype(np.uint8) for n in planes}
    changed = max(float(np.abs(new[name] - recorded[name]).max()) for name in new if name in recorded)
    return kept | new | labels, f"largest change against the old file {changed:.1e}"


def mixed(counter):
    """Well-mixed 32 bits of a counter: the same drawing with any version of numpy."""
    bits = np.asarray(counter, np.uint64)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor) & np.uint64(0xFFFFFFFF)
    return bits


def drawing(width=66, height=40, label_counts=(2, 3, 9)):
    """Stripes of color under a shading with grain; each plane is a stripe, displaced and with speckles."""
    y, x = np.mgrid[:height, :width]
    grain = mixed(np.arange(width * height * 3)).reshape(height, width, 3) % 13
    stripe = (x + y // 3) // 11
    colors = (mixed(np.arange(100, 148)) % 200).reshape(16, 3)
    rgb = (colors[stripe % 16] + grain + (y[..., None] * 40 // height).astype(np.uint64)).clip(0, 255).astype(np.uint8)
    planes = {}
    for n_labels in label_counts:
        seen = ((x + 3 + y // 3) // 11) % n_labels
        speckles = mixed(np.arange(width * height) + 7_000_000).reshape(height, width)
        seen = np.where(speckles % 12 == 0, speckles // 12 % n_labels, seen)
        planes[n_labels] = np.stack([seen == label for label in range(n_labels)]).astype(np.uint8)
    stored = {f"planes_l{n_labels}": p for n_labels, p in planes.items()}
    return {"rgb": rgb} | stored | answers(rgb, planes), "drawn"


def main():
    for name, (tensors, note) in {
        "crf_64": photograph(FIXTURES / "crf_64.safetensors"),
        "crf_128": photograph(FIXTURES / "crf_128.safetensors"),
        "crf_scene": drawing(),
    }.items():
        path = FIXTURES / f"{name}.safetensors"
        save_file(tensors, path, metadata=VERSIONS)
        path.chmod(0o644)
        written = load_file(path)
        assert all(np.array_equal(written[key], tensors[key]) for key in tensors), f"{path.name} reads back differently"
        print(f"{path.name}: {len(tensors)} tensors, {path.stat().st_size / 1e6:.2f} MB, {note}")


if __name__ == "__main__":
    main()
