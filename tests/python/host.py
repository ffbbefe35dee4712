"""A host in Python: numpy and ctypes, no binding. Drives a library through plugin-api/include/node_plugin.h.

    python3 tests/python/host.py target/release/libconceptloom.so target/release/libfaulty_plugin.so

Lists the nodes, shares memory with a node by address, refines masks with DenseCrfRefine without a copy of its inputs, and
learns on the bundled checkpoint until it cancels that within one optimizer step. Needs numpy 2.1 or later.
"""

import contextlib
import ctypes as c
import json
import sys

import numpy as np

OK, CANCELED = 0, 4
NONE, TENSOR, OBJECT, JSON = 0, 1, 2, 3
VERSIONED, USED = b"dltensor_versioned", b"used_dltensor_versioned"


class Device(c.Structure):
    _fields_ = [("device_type", c.c_int32), ("device_id", c.c_int32)]


class DataType(c.Structure):
    _fields_ = [("code", c.c_uint8), ("bits", c.c_uint8), ("lanes", c.c_uint16)]


class DlTensor(c.Structure):
    _fields_ = [
        ("data", c.c_void_p),
        ("device", Device),
        ("ndim", c.c_int32),
        ("dtype", DataType),
        ("shape", c.POINTER(c.c_int64)),
        ("strides", c.POINTER(c.c_int64)),
        ("byte_offset", c.c_uint64),
    ]


class Managed(c.Structure):
    pass


DELETER = c.CFUNCTYPE(None, c.POINTER(Managed))
Managed._fields_ = [
    ("major", c.c_uint32),
    ("minor", c.c_uint32),
    ("manager_ctx", c.c_void_p),
    ("deleter", DELETER),
    ("flags", c.c_uint64),
    ("dl_tensor", DlTensor),
]


class Object(c.Structure):
    pass


WRITE = c.CFUNCTYPE(None, c.c_void_p, c.POINTER(c.c_char), c.c_size_t)


class Sink(c.Structure):
    _fields_ = [("context", c.c_void_p), ("write", WRITE)]


class Memory(c.Structure):
    _fields_ = [("id", c.c_uint64), ("bytes", c.c_uint64)]


Object._fields_ = [
    ("struct_size", c.c_uint32),
    ("reserved", c.c_uint32),
    ("maker", c.c_void_p),
    ("type_name", c.c_char_p),
    ("retain", c.CFUNCTYPE(None, c.POINTER(Object))),
    ("release", c.CFUNCTYPE(None, c.POINTER(Object))),
    ("summary", c.CFUNCTYPE(None, c.POINTER(Object), Sink)),
    ("memory", c.CFUNCTYPE(c.c_size_t, c.POINTER(Object), c.POINTER(Memory), c.c_size_t)),
]


class Json(c.Structure):
    pass


Json._fields_ = [
    ("text", c.POINTER(c.c_char)),
    ("length", c.c_size_t),
    ("manager", c.c_void_p),
    ("deleter", c.CFUNCTYPE(None, c.POINTER(Json))),
]


class Value(c.Structure):
    _fields_ = [
        ("kind", c.c_uint32),
        ("reserved", c.c_uint32),
        ("tensor", c.POINTER(Managed)),
        ("object", c.POINTER(Object)),
        ("json", c.POINTER(Json)),
    ]


class Input(c.Structure):
    _fields_ = [("name", c.c_char_p), ("value", Value)]


class Error(c.Structure):
    _fields_ = [("input", c.c_char * 128), ("message", c.c_char * 1920)]


PUSH = c.CFUNCTYPE(None, c.c_void_p, Value)


class ValueSink(c.Structure):
    _fields_ = [("context", c.c_void_p), ("push", PUSH)]


class Extension(c.Structure):
    pass


Extension._fields_ = [
    ("struct_size", c.c_uint32),
    ("reserved", c.c_uint32),
    (
        "call",
        c.CFUNCTYPE(
            c.c_uint32, c.POINTER(Extension), c.POINTER(Value), c.c_size_t, ValueSink, c.POINTER(Error)
        ),
    ),
]

IS_CANCELED = c.CFUNCTYPE(c.c_int32, c.c_void_p)
PROGRESS = c.CFUNCTYPE(None, c.c_void_p, c.c_char_p, c.c_uint64, c.c_uint64, c.c_char_p)
PREVIEW = c.CFUNCTYPE(None, c.c_void_p, c.POINTER(Managed), c.c_char_p, c.c_char_p)
METRIC = c.CFUNCTYPE(None, c.c_void_p, c.c_char_p, c.c_double, c.c_double)
LOG = c.CFUNCTYPE(None, c.c_void_p, c.c_uint32, c.c_char_p)
SAVED = c.CFUNCTYPE(None, c.c_void_p, c.c_char_p)
HOST_EXTENSION = c.CFUNCTYPE(c.c_void_p, c.c_void_p, c.c_char_p)


class HostTable(c.Structure):
    _fields_ = [
        ("struct_size", c.c_uint32),
        ("minor", c.c_uint32),
        ("context", c.c_void_p),
        ("node_id", c.c_char_p),
        ("output_dir", c.c_char_p),
        ("work_dir", c.c_char_p),
        ("is_canceled", IS_CANCELED),
        ("progress", PROGRESS),
        ("preview", PREVIEW),
        ("metric", METRIC),
        ("log", LOG),
        ("saved", SAVED),
        ("extension", HOST_EXTENSION),
    ]


class Table(c.Structure):
    _fields_ = [
        ("magic", c.c_char * 16),
        ("struct_size", c.c_uint32),
        ("major", c.c_uint32),
        ("minor", c.c_uint32),
        ("reserved", c.c_uint32),
        ("name", c.c_char * 64),
        ("version", c.c_char * 32),
        ("describe", c.CFUNCTYPE(c.c_uint32, Sink, c.POINTER(Error))),
        ("extension", c.CFUNCTYPE(c.POINTER(Extension), c.c_char_p)),
        ("node_new", c.CFUNCTYPE(c.c_void_p, c.c_char_p, c.POINTER(Error))),
        ("node_free", c.CFUNCTYPE(None, c.c_void_p)),
        ("node_validate", c.CFUNCTYPE(c.c_uint32, c.c_void_p, c.c_char_p, c.POINTER(Error))),
        ("node_fingerprint", c.CFUNCTYPE(c.c_uint32, c.c_void_p, c.c_char_p, Sink, c.POINTER(Error))),
        (
            "node_run",
            c.CFUNCTYPE(
                c.c_uint32,
                c.c_void_p,
                c.POINTER(Input),
                c.c_size_t,
                c.c_char_p,
                c.POINTER(HostTable),
                ValueSink,
                c.POINTER(Error),
            ),
        ),
        ("node_extension", c.CFUNCTYPE(c.POINTER(Extension), c.c_void_p, c.c_char_p)),
    ]


capsule_new = c.pythonapi.PyCapsule_New
capsule_new.restype, capsule_new.argtypes = c.py_object, [c.c_void_p, c.c_char_p, c.c_void_p]
capsule_pointer = c.pythonapi.PyCapsule_GetPointer
capsule_pointer.restype, capsule_pointer.argtypes = c.c_void_p, [c.py_object, c.c_char_p]
capsule_rename = c.pythonapi.PyCapsule_SetName
capsule_rename.restype, capsule_rename.argtypes = c.c_int, [c.py_object, c.c_char_p]


class NodeError(Exception):
    def __init__(self, code, error):
        self.code, self.input = code, error.input.decode()
        super().__init__(error.message.decode())


def checked(code, error):
    if code != OK:
        raise NodeError(code, error)


def collecting():
    """A sink for text, and where the text ends up."""
    pieces = []
    return Sink(None, WRITE(lambda _, text, length: pieces.append(c.string_at(text, length)))), pieces


def exported(array):
    """An array as a tensor: read-only ones are shared, the library copies others."""
    capsule = array.__dlpack__(max_version=(1, 1))
    pointer = capsule_pointer(capsule, VERSIONED)
    capsule_rename(capsule, USED)
    return Value(kind=TENSOR, tensor=c.cast(pointer, c.POINTER(Managed)))


class Exporter:
    """A tensor as numpy takes it over."""

    def __init__(self, managed):
        self.managed = managed

    def __dlpack__(self, **_):
        return capsule_new(c.cast(self.managed, c.c_void_p), VERSIONED, None)

    def __dlpack_device__(self):
        device = self.managed.contents.dl_tensor.device
        return device.device_type, device.device_id


class Shared:
    """A reference to an object of a plugin."""

    def __init__(self, pointer):
        self.pointer = pointer

    def type_name(self):
        return self.pointer.contents.type_name.decode()

    def summary(self):
        sink, pieces = collecting()
        self.pointer.contents.summary(self.pointer, sink)
        return b"".join(pieces).decode()

    def bytes(self):
        n = self.pointer.contents.memory(self.pointer, None, 0)
        blocks = (Memory * n)()
        self.pointer.contents.memory(self.pointer, blocks, n)
        return sum(block.bytes for block in blocks)

    def exported(self):
        self.pointer.contents.retain(self.pointer)
        return Value(kind=OBJECT, object=self.pointer)

    def __del__(self):
        self.pointer.contents.release(self.pointer)


def imported(value):
    if value.kind == TENSOR:
        return np.from_dlpack(Exporter(value.tensor))
    if value.kind == OBJECT:
        return Shared(value.object)
    held = value.json.contents
    text = c.string_at(held.text, held.length)
    if held.deleter:
        held.deleter(value.json)
    return json.loads(text)


class Host:
    """Services of this host; what they hear is kept."""

    def __init__(self, cancel_at=None, on_progress=None):
        self.cancel_at, self.on_progress = cancel_at, on_progress
        self.steps, self.metrics, self.previews, self.logs = [], [], [], []
        self.table = HostTable(
            struct_size=c.sizeof(HostTable),
            node_id=b"1",
            output_dir=b".",
            work_dir=b"",
            is_canceled=IS_CANCELED(lambda _: self.is_canceled()),
            progress=PROGRESS(lambda _, stage, done, total, text: self.progress(stage, done, total, text)),
            preview=PREVIEW(lambda _, picture, series, label: self.preview(picture)),
            metric=METRIC(lambda _, series, x, y: self.metrics.append((series.decode(), x, y))),
            log=LOG(lambda _, level, text: self.logs.append((level, text.decode()))),
            saved=SAVED(lambda _, path: None),
            extension=HOST_EXTENSION(lambda _, id: None),
        )

    def is_canceled(self):
        return self.cancel_at is not None and len(self.steps) >= self.cancel_at

    def progress(self, stage, done, total, text):
        self.steps.append((stage.decode(), done, total, text.decode()))
        if self.on_progress:
            self.on_progress()

    def preview(self, picture):
        self.previews.append(np.from_dlpack(Exporter(picture)))


class Plugin:
    def __init__(self, path):
        library = c.CDLL(path)
        library.node_plugin.restype = c.POINTER(Table)
        self.table = library.node_plugin().contents
        assert self.table.magic == b"NODEPLUGINTABLE" and self.table.major == 1, "a table of version 1"
        assert self.table.struct_size >= c.sizeof(Table)

    def describe(self):
        error, (sink, pieces) = Error(), collecting()
        checked(self.table.describe(sink, error), error)
        return json.loads(b"".join(pieces))

    def extension(self, id, request=()):
        found = self.table.extension(id.encode())
        if not found:
            return None
        error, answer = Error(), []
        values = (Value * len(request))(*request)
        sink = ValueSink(None, PUSH(lambda _, value: answer.append(imported(value))))
        checked(found.contents.call(found, values, len(request), sink, error), error)
        return answer

    def run(self, class_name, inputs, host=None, **parameters):
        error = Error()
        node = self.table.node_new(class_name.encode(), error)
        if not node:
            raise NodeError(1, error)
        with contextlib.ExitStack() as stack:
            stack.callback(self.table.node_free, node)
            text = json.dumps(parameters).encode()
            checked(self.table.node_validate(node, text, error), error)
            values = [
                Input(name.encode(), value.exported() if isinstance(value, Shared) else exported(value))
                for name, value in inputs.items()
            ]
            values = (Input * len(values))(*values)
            outputs, host = [], host or Host()
            sink = ValueSink(None, PUSH(lambda _, value: outputs.append(imported(value))))
            code = self.table.node_run(node, values, len(values), text, host.table, sink, error)
            for given in values:
                if given.value.kind == TENSOR:
                    given.value.tensor.contents.deleter(given.value.tensor)
                elif given.value.kind == OBJECT:
                    given.value.object.contents.release(given.value.object)
            checked(code, error)
            return outputs


def frozen(array):
    """What it holds is shared: nobody writes it any more."""
    array.flags.writeable = False
    return array


def address(array):
    return array.__array_interface__["data"][0]


def picture(side):
    """A bright disc on a dark ground, [1, side, side, 3], and the masks of both."""
    y, x = np.mgrid[0:side, 0:side]
    disc = ((x - side / 2) ** 2 + (y - side / 2) ** 2 < (side / 3) ** 2).astype(np.float32)
    images = np.stack([0.1 + 0.8 * disc] * 3, axis=-1)[None].astype(np.float32)
    return frozen(images), disc


def lists_nodes(plugin):
    described = plugin.describe()
    names = [node["class"] for node in described["nodes"]]
    print(f"{described['name']} {described['version']}: {len(names)} nodes, {', '.join(names)}")
    [devices] = plugin.extension("devices/1")
    print("computes on", devices[0]["kind"])
    assert plugin.extension("devices/1 ") is None and plugin.extension("devices/2") is None


def shares_by_address(plugin):
    given = frozen(np.arange(48, dtype=np.float32).reshape(1, 4, 4, 3))
    [passed] = plugin.run("Passthrough", {"images": given})
    assert address(passed) == address(given) and not passed.flags.writeable
    strided = frozen(np.arange(96, dtype=np.float32).reshape(1, 4, 8, 3))[:, :, ::2]
    [passed] = plugin.run("Passthrough", {"images": strided})
    assert address(passed) == address(strided) and (passed == strided).all()
    for dtype in (np.float16, np.uint8):
        [passed] = plugin.run("Passthrough", {"images": frozen(np.ones((1, 2, 2, 3), dtype))})
        assert passed.dtype == dtype
    writable = np.ones((1, 2, 2, 3), np.float32)
    [passed] = plugin.run("Passthrough", {"images": writable})
    assert address(passed) != address(writable), "what may still be written is copied"
    references = sys.getrefcount(given)
    del passed
    assert sys.getrefcount(given) == references
    print("shared by address with numpy", np.__version__)


def refines_masks(plugin):
    images, disc = picture(64)
    noise = np.random.default_rng(0).random(disc.shape) < 0.1
    noisy = np.abs(disc - noise).astype(np.float32)
    masks = frozen(np.stack([noisy, 1 - noisy]))
    # Who lets go of a tensor at once has copied it; while the node works, the arrays are held.
    before = [sys.getrefcount(images), sys.getrefcount(masks)]
    held = []
    host = Host(on_progress=lambda: held.append([sys.getrefcount(images), sys.getrefcount(masks)]))
    refined, overlay = plugin.run("DenseCrfRefine", {"images": images, "masks": masks}, host)
    # One reference of the inputs' dictionary, one of the tensor.
    assert held and all(now >= then + 2 for now, then in zip(held[0], before, strict=True)), (before, held)
    assert refined.shape == (2, 64, 64) and overlay.shape == (1, 64, 64, 3)
    errors = [int((plane != disc).sum()) for plane in (noisy, refined[0])]
    assert errors[1] < errors[0] / 4, errors
    assert host.previews and host.metrics
    assert [sys.getrefcount(images), sys.getrefcount(masks)] == before, "all of it is let go"
    print(f"refined without a copy: {errors[0]} wrong pixels before, {errors[1]} after")


def learns_until_canceled(plugin):
    [model] = plugin.run("LoadDiffusionModel", {})
    assert model.type_name() == "DIFFUSION_MODEL" and model.bytes() > 1 << 20
    print(model.summary(), f"{model.bytes() >> 20} MiB")
    images, disc = picture(64)
    masks = frozen(np.stack([disc, 1 - disc]))
    inputs = {"model": model, "images": images, "masks": masks}
    host = Host(cancel_at=3)
    try:
        plugin.run("ConceptTokenLearner", inputs, host, concept_list="<a> ball\n<b> wall (background)", steps=50)
    except NodeError as error:
        assert error.code == CANCELED, error
    else:
        raise AssertionError("it should have been canceled")
    assert len(host.steps) <= 4, host.steps
    print(f"canceled within one step: {host.steps[-1][3]}")


def main():
    conceptloom, faulty = (Plugin(path) for path in sys.argv[1:3])
    lists_nodes(conceptloom)
    shares_by_address(faulty)
    refines_masks(conceptloom)
    learns_until_canceled(conceptloom)


main()
