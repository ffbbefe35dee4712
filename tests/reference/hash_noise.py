"""Numbers that Python and Rust can both make, so that large tensors need not be shipped.

Element i of the tensor `name` is a hash of (name, i), mapped to [-1, 1) with 24 bits: exact in f32.
The Rust side is `hash_noise` in the parity tests of the crate stable-diffusion.
"""
import numpy as np
import torch

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def fnv1a(name: str) -> np.uint64:
    """64-bit FNV-1a of the name's UTF-8 bytes."""
    h = 0xCBF29CE484222325
    for byte in name.encode():
        h = ((h ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return np.uint64(h)


def uniform(name: str, shape) -> torch.Tensor:
    """Values in [-1, 1), f32, row-major: splitmix64's finalizer over name + i * golden ratio."""
    n = int(np.prod(shape))
    with np.errstate(over="ignore"):
        z = fnv1a(name) + np.arange(1, n + 1, dtype=np.uint64) * GOLDEN
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    values = (z >> np.uint64(40)).astype(np.float64) / 2**23 - 1.0
    return torch.from_numpy(values.astype(np.float32)).reshape(list(shape))


def weight(name: str, shape) -> torch.Tensor:
    """A parameter of unit gain: norm weights near 1, biases near 0, matrices of variance 1/fan_in."""
    values = uniform(name, shape)
    if len(shape) > 1:
        fan_in = int(np.prod(shape[1:]))
        return values * float(np.float32((3.0 / fan_in) ** 0.5))
    return values * float(np.float32(0.1)) + (0.0 if name.endswith("bias") else 1.0)


def fill(module: torch.nn.Module, prefix: str) -> None:
    """Replaces every parameter of a module by hash noise."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(weight(prefix + name, parameter.shape))
