"""libconceptloom through its contract in C. Nothing here knows of ComfyUI."""

import contextlib
import ctypes as c
import json
import os
import pathlib
import sys
import uuid

from . import contract, tensors
from .contract import Error, Input, Sink, Table, Value, ValueSink

NAME = {"win32": "conceptloom.dll", "darwin": "libconceptloom.dylib"}.get(sys.platform, "libconceptloom.so")


class Unusable(Exception):
    """The library is not there, or speaks another version; one sentence."""


class Failed(Exception):
    """A node failed; one sentence."""

    def __init__(self, code, input_name, message):
        super().__init__(message)
        self.code, self.input = code, input_name


class Reference:
    """A value of the library's own type: immutable, counted."""

    def __init__(self, pointer):
        self._pointer = pointer
        # Of how it came about; of no other value, as long as nobody says so.
        self.key = uuid.uuid4().hex

    @property
    def type_name(self):
        """The socket type."""
        return self._pointer.contents.type_name.decode()

    def exported(self):
        """One reference more, as the contract has it."""
        self._pointer.contents.retain(self._pointer)
        return Value(kind=contract.OBJECT, object=self._pointer)

    def __repr__(self):
        sink, text = collecting()
        self._pointer.contents.summary(self._pointer, sink)
        return f"<{self.type_name}: {text()}>"

    def __del__(self):
        self._pointer.contents.release(self._pointer)


class Text:
    """JSON that goes over the contract; it must outlive the call."""

    def __init__(self, value):
        text = json.dumps(value).encode()
        buffer = c.create_string_buffer(text, len(text))
        # The cast keeps the buffer.
        self._json = contract.Json(text=c.cast(buffer, c.POINTER(c.c_char)), length=len(text))

    def value(self):
        """As the contract has it: nothing to let go."""
        return Value(kind=contract.JSON, json=c.pointer(self._json))


def collecting():
    """A sink for text, and a function that gives what came."""
    pieces = []
    write = Sink.WRITE(lambda _, text, length: pieces.append(c.string_at(text, length)))
    return Sink(None, write), lambda: b"".join(pieces).decode()


def imported(value):
    """A value of the library, taken over."""
    if value.kind == contract.TENSOR:
        # A struct that came as an argument is gone after the call; what it points to is not.
        return tensors.imported(value.tensor)
    if value.kind == contract.OBJECT:
        return Reference(value.object)
    if value.kind == contract.JSON:
        held = value.json.contents
        text = c.string_at(held.text, held.length)
        if held.deleter:
            held.deleter(value.json)
        return json.loads(text)
    return None


def let_go(value):
    """Lets a value go that nobody took."""
    if value.kind == contract.TENSOR:
        tensors.delete(value.tensor)
    elif value.kind == contract.OBJECT:
        value.object.contents.release(value.object)


def path():
    """Where the library is: $CONCEPTLOOM_PLUGIN, or in this package.

    Raises Unusable if it is in neither.
    """
    named = os.environ.get("CONCEPTLOOM_PLUGIN")
    found = pathlib.Path(named) if named else pathlib.Path(__file__).parent / "bin" / NAME
    if not found.is_file():
        if named:
            raise Unusable(f"CONCEPTLOOM_PLUGIN names {found}, and there is no such file; correct the variable")
        remedy = "install Conceptloom's wheel, or name a library in CONCEPTLOOM_PLUGIN"
        raise Unusable(f"Conceptloom's library should be {found}, and there is no such file; {remedy}")
    return found


class Library:
    """A loaded library."""

    def __init__(self, library_path):
        """Raises Unusable."""
        try:
            entry = c.CDLL(str(library_path)).node_plugin
        except OSError as error:
            raise Unusable(f"{library_path} cannot be loaded: {error}") from error
        except AttributeError as error:
            raise Unusable(f"{library_path} is no library of nodes: it has no node_plugin") from error
        entry.restype = c.c_void_p
        address = entry()
        if not address or c.cast(address, c.POINTER(contract.Head)).contents.magic != contract.MAGIC:
            raise Unusable(f"{library_path} is no library of nodes: what its node_plugin gives is no table")
        head = c.cast(address, c.POINTER(contract.Head)).contents
        self.name, self.version = head.name.decode(), head.version.decode()
        stat = os.stat(library_path)
        # Differs where the code does.
        self.build = f"{self.version} {stat.st_size} {stat.st_mtime_ns}"
        if head.major != contract.MAJOR or head.struct_size < c.sizeof(Table):
            raise Unusable(
                f"{library_path} is {self.name} {self.version} and speaks version {head.major}.{head.minor} of the "
                f"contract, these nodes version {contract.MAJOR}; install both from one wheel"
            )
        self._table = c.cast(address, c.POINTER(Table)).contents
        sink, text = collecting()
        try:
            self._checked(lambda error: self._table.describe(sink, error))
        except Failed as error:
            raise Unusable(f"{library_path} does not describe its nodes: {error}") from error
        self.nodes = json.loads(text())["nodes"]

    @staticmethod
    def _checked(call):
        error = Error()
        code = call(error)
        if code != contract.OK:
            raise Failed(code, error.input.decode(), error.message.decode())

    @contextlib.contextmanager
    def _node(self, class_name):
        error = Error()
        node = self._table.node_new(class_name.encode(), error)
        if not node:
            raise Failed(0, error.input.decode(), error.message.decode())
        try:
            yield node
        finally:
            self._table.node_free(node)

    def validate(self, class_name, parameters):
        """Raises Failed for parameters that the node does not take."""
        text = json.dumps(parameters).encode()
        with self._node(class_name) as node:
            self._checked(lambda error: self._table.node_validate(node, text, error))

    def fingerprint(self, class_name, parameters):
        """Text that changes when the same parameters mean something else, because a file changed."""
        text = json.dumps(parameters).encode()
        sink, answer = collecting()
        with self._node(class_name) as node:
            self._checked(lambda error: self._table.node_fingerprint(node, text, sink, error))
        return answer()

    def run(self, class_name, inputs, parameters, host):
        """Runs a node; gives its outputs in the order of its description.

        Inputs are tensors and references by socket. Raises Failed.
        """
        text = json.dumps(parameters).encode()
        outputs, failures, kept = [], [], []

        def push(_, value):
            try:
                outputs.append(imported(value))
            except BaseException as failure:  # It must not leave a callback.
                failures.append(failure)

        with self._node(class_name) as node, contextlib.ExitStack() as stack:
            self._checked(lambda error: self._table.node_validate(node, text, error))
            given = (Input * len(inputs))()
            # What the node has not taken is still there.
            stack.callback(lambda: [let_go(slot.value) for slot in given])
            for slot, (name, value) in zip(given, inputs.items(), strict=True):
                slot.name = name.encode()
                slot.value = _exported(name, value, kept)
            sink = ValueSink(None, ValueSink.PUSH(push))
            self._checked(lambda error: self._table.node_run(node, given, len(given), text, c.byref(host), sink, error))
        if failures:
            raise failures[0]
        return outputs


def _exported(name, value, kept):
    if isinstance(value, Reference):
        return value.exported()
    if isinstance(value, (str, int, float, bool)):
        kept.append(Text(value))
        return kept[-1].value()
    try:
        return Value(kind=contract.TENSOR, tensor=tensors.exported(value))
    except TypeError as error:
        raise Failed(1, name, f"{name}: {error}") from error
