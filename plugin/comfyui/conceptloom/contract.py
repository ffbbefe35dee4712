"""plugin-api/include/node_plugin.h for ctypes; what each field means is said there."""

import ctypes as c

MAJOR = 1
MAGIC = b"NODEPLUGINTABLE"

OK = 0
CANCELED = 4
OUT_OF_MEMORY = 5

TENSOR, OBJECT, JSON = 1, 2, 3

READ_ONLY = 1

CPU, CUDA, CUDA_PINNED, METAL = 1, 2, 3, 8


class Device(c.Structure):
    _fields_ = [("device_type", c.c_int32), ("device_id", c.c_int32)]


class DataType(c.Structure):
    _fields_ = [("code", c.c_uint8), ("bits", c.c_uint8), ("lanes", c.c_uint16)]


class Tensor(c.Structure):
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
    """DLPack 1.x."""


ManagedDeleter = c.CFUNCTYPE(None, c.POINTER(Managed))
Managed._fields_ = [
    ("major", c.c_uint32),
    ("minor", c.c_uint32),
    ("manager_ctx", c.c_void_p),
    ("deleter", ManagedDeleter),
    ("flags", c.c_uint64),
    ("dl_tensor", Tensor),
]


class Unversioned(c.Structure):
    """DLPack 0.x, which older PyTorch speaks; it never crosses the contract."""


UnversionedDeleter = c.CFUNCTYPE(None, c.POINTER(Unversioned))
Unversioned._fields_ = [("dl_tensor", Tensor), ("manager_ctx", c.c_void_p), ("deleter", UnversionedDeleter)]


class Sink(c.Structure):
    WRITE = c.CFUNCTYPE(None, c.c_void_p, c.POINTER(c.c_char), c.c_size_t)
    _fields_ = [("context", c.c_void_p), ("write", WRITE)]


class Memory(c.Structure):
    _fields_ = [("id", c.c_uint64), ("bytes", c.c_uint64)]


class Object(c.Structure):
    pass


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


JsonDeleter = c.CFUNCTYPE(None, c.POINTER(Json))
Json._fields_ = [
    ("text", c.POINTER(c.c_char)),
    ("length", c.c_size_t),
    ("manager", c.c_void_p),
    ("deleter", JsonDeleter),
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


class ValueSink(c.Structure):
    PUSH = c.CFUNCTYPE(None, c.c_void_p, Value)
    _fields_ = [("context", c.c_void_p), ("push", PUSH)]


class Extension(c.Structure):
    pass


ExtensionCall = c.CFUNCTYPE(c.c_uint32, c.POINTER(Extension), c.POINTER(Value), c.c_size_t, ValueSink, c.POINTER(Error))
Extension._fields_ = [("struct_size", c.c_uint32), ("reserved", c.c_uint32), ("call", ExtensionCall)]


class Host(c.Structure):
    IS_CANCELED = c.CFUNCTYPE(c.c_int32, c.c_void_p)
    PROGRESS = c.CFUNCTYPE(None, c.c_void_p, c.c_char_p, c.c_uint64, c.c_uint64, c.c_char_p)
    PREVIEW = c.CFUNCTYPE(None, c.c_void_p, c.POINTER(Managed), c.c_char_p, c.c_char_p)
    METRIC = c.CFUNCTYPE(None, c.c_void_p, c.c_char_p, c.c_double, c.c_double)
    LOG = c.CFUNCTYPE(None, c.c_void_p, c.c_uint32, c.c_char_p)
    SAVED = c.CFUNCTYPE(None, c.c_void_p, c.c_char_p)
    EXTENSION = c.CFUNCTYPE(c.c_void_p, c.c_void_p, c.c_char_p)
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
        ("extension", EXTENSION),
    ]


class Head(c.Structure):
    """What stands first in the table of every version."""

    _fields_ = [
        ("magic", c.c_char * 16),
        ("struct_size", c.c_uint32),
        ("major", c.c_uint32),
        ("minor", c.c_uint32),
        ("reserved", c.c_uint32),
        ("name", c.c_char * 64),
        ("version", c.c_char * 32),
    ]


class Table(c.Structure):
    _fields_ = [
        *Head._fields_,
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
                c.POINTER(Host),
                ValueSink,
                c.POINTER(Error),
            ),
        ),
        ("node_extension", c.CFUNCTYPE(c.POINTER(Extension), c.c_void_p, c.c_char_p)),
    ]
