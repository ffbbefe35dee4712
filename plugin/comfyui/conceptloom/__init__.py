"""Conceptloom's nodes in ComfyUI.

ComfyUI imports a folder in custom_nodes that imports this (`conceptloom install-nodes` makes it), and calls
`comfy_entrypoint`.

`nodes` makes ComfyUI's node classes from the library's description, `services` is what a node hears of ComfyUI while it
runs, `folders` where its files are. Below them, and knowing nothing of ComfyUI: `library` drives libconceptloom through
`contract`, which is plugin-api/include/node_plugin.h, and `tensors` hands tensors over.
"""


async def comfy_entrypoint():
    """The extension, as ComfyUI wants it."""
    try:
        import comfy_api.latest  # noqa: F401
    except ImportError as error:
        message = "Conceptloom's nodes need a ComfyUI that has comfy_api.latest; update ComfyUI"
        raise ImportError(message) from error
    from .nodes import Extension

    return Extension()
