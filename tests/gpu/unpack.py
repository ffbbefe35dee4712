"""Unpacks what build.sh packed: `python3 unpack.py ARCHIVE REPOSITORY FOLDER`.

The bundled weights, which were left out, are put back from the repository, which has to be of the same commit.
"""
import json
import lzma
import pathlib
import sys
import tarfile

archive, repository, folder = sys.argv[1], pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3])
folder.mkdir(parents=True, exist_ok=True)
with lzma.open(archive) as xz, tarfile.open(fileobj=xz, mode="r|") as tar:
    tar.extractall(folder, filter="data")
for name, parts in json.loads((folder / "holes.json").read_text()).items():
    with open(folder / name, "r+b") as file:
        for at, path in parts:
            file.seek(at)
            file.write((repository / path).read_bytes())
