"""Folders under ROOT, laid out as ComfyUI documents them."""

import pathlib

ROOT = pathlib.Path()

# Ends of the names that lists of models have.
EXTENSIONS = {".ckpt", ".pt", ".pt2", ".bin", ".pth", ".safetensors", ".pkl", ".sft"}


def _folder(*parts):
    folder = ROOT.joinpath(*parts)
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder)


def get_output_directory():
    return _folder("output")


def get_temp_directory():
    return _folder("temp")


def get_user_directory():
    return _folder("user")


def get_folder_paths(kind):
    return [_folder("models", kind)]


def get_filename_list(kind):
    root = pathlib.Path(_folder("models", kind))
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.suffix in EXTENSIONS and path.is_file())


def get_full_path(kind, name):
    path = ROOT / "models" / kind / name
    return str(path) if path.is_file() else None
