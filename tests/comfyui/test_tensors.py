"""Tensors of libraries of other ages, and on devices that this machine has not."""

import ctypes
import gc

import numpy as np
import pytest

from conceptloom import tensors
from conceptloom.contract import READ_ONLY


class Old:
    """As PyTorch before DLPack 1.x."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, stream=None):
        return self.array.__dlpack__()

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class Capsule:
    def __init__(self, capsule):
        self.capsule = capsule

    def __dlpack__(self, **_):
        return self.capsule

    def __dlpack_device__(self):
        return 1, 0


class OldLibrary:
    @staticmethod
    def from_dlpack(producer):
        return np.from_dlpack(Capsule(producer.__dlpack__()))


@pytest.fixture
def array():
    return np.arange(12, dtype=np.float32).reshape(3, 4)


def data(managed):
    tensor = managed.contents.dl_tensor
    return tensor.data + tensor.byte_offset


@pytest.mark.parametrize("kind", [lambda array: array, Old])
def test_what_is_handed_over_is_shared_and_read_only(array, kind):
    managed = tensors.exported(kind(array))
    assert data(managed) == array.ctypes.data
    assert managed.contents.major == 1 and managed.contents.flags & READ_ONLY
    tensors.delete(managed)
    assert not tensors._held


@pytest.mark.parametrize("library", [np, OldLibrary])
def test_what_is_taken_over_is_shared_and_let_go(array, library, monkeypatch):
    monkeypatch.setattr(tensors, "_library", lambda: library)
    taken = tensors.imported(tensors.exported(Old(array)))
    assert np.shares_memory(taken, array) and len(tensors._held) >= 1
    del taken
    gc.collect()
    assert not tensors._held


def test_what_cannot_be_taken_over_is_let_go(array, monkeypatch):
    class Refuses:
        @staticmethod
        def from_dlpack(producer):
            producer.__dlpack__(max_version=(1, 0))
            raise BufferError("no")

    monkeypatch.setattr(tensors, "_library", lambda: Refuses)
    with pytest.raises(BufferError):
        tensors.imported(tensors.exported(Old(array)))
    assert not tensors._held


def test_devices_are_waited_for_before_a_tensor_changes_hands(array, monkeypatch):
    happened = []
    # The processor's memory goes for that of a device here.
    monkeypatch.setattr(tensors, "CPU", -1)
    monkeypatch.setattr(tensors, "wait", lambda *device: happened.append(("waited", device)))
    managed = tensors.exported(Old(array))
    assert happened == [("waited", (1, 0))]
    delete = tensors.delete
    monkeypatch.setattr(tensors, "delete", lambda inner: (happened.append("let go"), delete(inner)))
    taken = tensors.imported(managed)
    assert np.shares_memory(taken, array)
    del taken
    gc.collect()
    assert happened[1:3] == [("waited", (1, 0)), "let go"]
    assert not tensors._held


def test_pictures_differ_by_elements_shape_and_type(array):
    same = tensors.digest(array.copy())
    assert tensors.digest(array) == same
    assert (
        len(
            {same, tensors.digest(array + 1), tensors.digest(array.reshape(4, 3)), tensors.digest(array.view(np.int32))}
        )
        == 4
    )


def test_contract_is_laid_out_as_the_header_has_it():
    from conceptloom import contract

    assert ctypes.sizeof(contract.Managed) == 80 and ctypes.sizeof(contract.Value) == 32
    assert ctypes.sizeof(contract.Error) == 2048 and ctypes.sizeof(contract.Head) == 128
