"""The command `conceptloom`: host-demo, and what ties this package to a ComfyUI."""

import os
import pathlib
import shutil
import subprocess
import sys

PACKAGE = pathlib.Path(__file__).parent

STUB = """from conceptloom import comfy_entrypoint

__all__ = ["comfy_entrypoint"]
"""


def install_nodes(comfyui):
    """Makes ComfyUI find the nodes of this package: it imports what lies in its custom_nodes.

    Returns the folder that is made there. Raises ValueError for what is no folder of ComfyUI.
    """
    custom_nodes = pathlib.Path(comfyui) / "custom_nodes"
    if not custom_nodes.is_dir():
        raise ValueError(f"{comfyui} has no custom_nodes; name the folder of a ComfyUI")
    folder = custom_nodes / "conceptloom"
    folder.mkdir(exist_ok=True)
    (folder / "__init__.py").write_text(STUB)
    shutil.copytree(PACKAGE / "example_workflows", folder / "example_workflows", dirs_exist_ok=True)
    return folder


def main():
    """Runs `conceptloom install-nodes COMFYUI`, or host-demo with all arguments."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["install-nodes"]:
        if len(arguments) != 2:
            sys.exit("usage: conceptloom install-nodes COMFYUI_FOLDER")
        try:
            folder = install_nodes(arguments[1])
        except (ValueError, OSError) as error:
            sys.exit(f"error: {error}")
        print(f"ComfyUI finds the nodes by {folder} when it starts with {sys.executable}")
        return
    program = PACKAGE / "bin" / ("host-demo.exe" if sys.platform == "win32" else "host-demo")
    if not program.is_file():
        sys.exit(f"error: {program} is missing; install Conceptloom's wheel")
    if sys.platform == "win32":
        sys.exit(subprocess.call([program, *arguments]))
    os.execv(program, ["conceptloom", *arguments])


if __name__ == "__main__":
    main()
