"""Tensors over the contract: DLPack, without a copy either way, of whatever library made them."""

import ctypes as c
import hashlib

from .contract import (
    CPU,
    CUDA,
    CUDA_PINNED,
    METAL,
    READ_ONLY,
    Managed,
    ManagedDeleter,
    Unversioned,
    UnversionedDeleter,
)

VERSIONED_NAME, VERSIONED_USED = b"dltensor_versioned", b"used_dltensor_versioned"
UNVERSIONED_NAME, UNVERSIONED_USED = b"dltensor", b"used_dltensor"

_new = c.pythonapi.PyCapsule_New
_new.restype, _new.argtypes = c.py_object, [c.c_void_p, c.c_char_p, c.c_void_p]
_pointer = c.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = c.c_void_p, [c.py_object, c.c_char_p]
_rename = c.pythonapi.PyCapsule_SetName
_rename.restype, _rename.argtypes = c.c_int, [c.py_object, c.c_char_p]
_is_named = c.pythonapi.PyCapsule_IsValid
_is_named.restype, _is_named.argtypes = c.c_int, [c.py_object, c.c_char_p]

# Structs of this module that somebody holds, by address, with what to call when they are let go.
_held = {}


def _let_go(pointer):
    # The struct lives until this returns.
    struct, owner_lets_go = _held.pop(c.cast(pointer, c.c_void_p).value)
    owner_lets_go()
    del struct


_DELETERS = {Managed: ManagedDeleter(_let_go), Unversioned: UnversionedDeleter(_let_go)}


def _around(kind, tensor, owner_lets_go):
    """A struct of another kind, or with more to do at its end, around the same memory."""
    struct = kind(dl_tensor=tensor, deleter=_DELETERS[kind])
    if kind is Managed:
        struct.major, struct.minor = 1, 0
    _held[c.addressof(struct)] = (struct, owner_lets_go)
    return c.pointer(struct)


def delete(managed):
    """Lets a tensor of either version go."""
    if managed.contents.deleter:
        managed.contents.deleter(managed)


def exported(tensor):
    """Hands a tensor over, shared and read-only: values on ComfyUI's wires are not written.

    Raises TypeError for what is no tensor.
    """
    if not hasattr(tensor, "__dlpack__"):
        raise TypeError(f"a tensor is needed, and this is a {type(tensor).__name__}")
    if getattr(tensor, "requires_grad", False):
        tensor = tensor.detach()
    kind, index = tensor.__dlpack_device__()
    kind, index = int(kind), int(index)
    # Who takes it over expects it to be there, so nothing needs a stream.
    stream = {}
    if kind not in (CPU, CUDA_PINNED):
        wait(kind, index)
        stream = {"stream": -1} if kind == CUDA else {}
    try:
        capsule = tensor.__dlpack__(max_version=(1, 1), **stream)
    except TypeError:
        capsule = tensor.__dlpack__(**stream)
    if _is_named(capsule, VERSIONED_NAME):
        managed = c.cast(_pointer(capsule, VERSIONED_NAME), c.POINTER(Managed))
        _rename(capsule, VERSIONED_USED)
    else:
        inner = c.cast(_pointer(capsule, UNVERSIONED_NAME), c.POINTER(Unversioned))
        _rename(capsule, UNVERSIONED_USED)
        managed = _around(Managed, inner.contents.dl_tensor, lambda: delete(inner))
    managed.contents.flags |= READ_ONLY
    return managed


class _Producer:
    """A tensor of the library as `from_dlpack` takes it over."""

    def __init__(self, managed):
        device = managed.contents.dl_tensor.device
        self.device = device.device_type, device.device_id
        if self.device[0] not in (CPU, CUDA_PINNED):
            # Who lets a tensor go has waited for its own work, which PyTorch does not do.
            inner = managed

            def waited():
                wait(*self.device)
                delete(inner)

            flags = inner.contents.flags
            managed = _around(Managed, inner.contents.dl_tensor, waited)
            managed.contents.flags = flags
        self.managed, self.capsule = managed, None

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, *, max_version=None, **_):
        if max_version is None or max_version[0] < 1:
            inner = self.managed
            self.managed = _around(Unversioned, inner.contents.dl_tensor, lambda: delete(inner))
            self.name = UNVERSIONED_NAME
        else:
            self.name = VERSIONED_NAME
        self.capsule = _new(c.cast(self.managed, c.c_void_p), self.name, None)
        return self.capsule

    def close(self):
        """Lets it go if nobody took it."""
        if self.capsule is None or _is_named(self.capsule, self.name):
            delete(self.managed)


def imported(managed):
    """Takes a tensor of the library over: PyTorch's where that is installed, numpy's elsewhere."""
    producer = _Producer(managed)
    try:
        return _library().from_dlpack(producer)
    finally:
        producer.close()


def picture(managed):
    """A copy of a picture of the library, [H, W, 3] of bytes, that lets the picture go."""
    import numpy

    pixels = imported(managed)
    pixels = pixels.cpu().numpy() if hasattr(pixels, "cpu") else pixels
    return (numpy.clip(pixels, 0, 1) * 255 + 0.5).astype(numpy.uint8)


def digest(tensor):
    """Text that differs where shapes, types or elements do."""
    import numpy

    if hasattr(tensor, "cpu"):
        # numpy lacks some of PyTorch's types, but not bytes.
        elements = tensor.detach().cpu().contiguous().flatten().view(_library().uint8).numpy()
    else:
        elements = numpy.ascontiguousarray(tensor).reshape(-1).view(numpy.uint8)
    head = f"{tensor.dtype} {tuple(tensor.shape)}".encode()
    return hashlib.blake2b(elements.data, key=hashlib.blake2b(head).digest()).hexdigest()


def wait(kind, index):
    """Waits for what this thread has asked of a device."""
    torch = _library()
    if kind == CUDA:
        torch.cuda.current_stream(index).synchronize()
    elif kind == METAL:
        torch.mps.synchronize()


def _library():
    try:
        import torch
    except ImportError:
        import numpy

        return numpy
    return torch
