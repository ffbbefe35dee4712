"""As much of ComfyUI's documented interface for nodes (version 3 of the schema) as a pack touches."""

import dataclasses
import types


class ComfyExtension:
    pass


def _of(io_type):
    class Slot:
        def __init__(self, id, **options):
            self.id, self.io_type, self.options = id, io_type, options

    return types.SimpleNamespace(Input=type("Input", (Slot,), {}), Output=type("Output", (Slot,), {}), io_type=io_type)


@dataclasses.dataclass
class Schema:
    node_id: str
    display_name: str = None
    category: str = "sd"
    inputs: list = None
    outputs: list = None
    hidden: list = None
    description: str = ""
    is_output_node: bool = False

    def __post_init__(self):
        ids = [slot.id for slot in self.inputs + self.outputs]
        assert len(set(ids)) == len(ids), f"ids of inputs and outputs must differ: {ids}"


class ComfyNode:
    hidden = types.SimpleNamespace(unique_id="7", prompt={"7": {}}, extra_pnginfo={"workflow": {"nodes": []}})


class NodeOutput:
    def __init__(self, *args, ui=None):
        self.args, self.ui = args, ui


io = types.SimpleNamespace(
    **{
        name: _of(io_type)
        for name, io_type in {
            "Image": "IMAGE",
            "Mask": "MASK",
            "Int": "INT",
            "Float": "FLOAT",
            "String": "STRING",
            "Boolean": "BOOLEAN",
            "Combo": "COMBO",
            "AnyType": "*",
        }.items()
    },
    Custom=_of,
    Schema=Schema,
    ComfyNode=ComfyNode,
    NodeOutput=NodeOutput,
    Hidden=types.SimpleNamespace(unique_id="UNIQUE_ID", prompt="PROMPT", extra_pnginfo="EXTRA_PNGINFO"),
)
