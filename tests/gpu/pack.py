"""Packs programs for a GPU machine: `python3 pack.py ARCHIVE REPOSITORY FILE...`; unpack.py is the other side.

The bundled weights, which most of the programs hold, are left out: the repository goes to that machine too.
"""
import io
import json
import lzma
import pathlib
import sys
import tarfile

archive, repository, files = sys.argv[1], pathlib.Path(sys.argv[2]), [pathlib.Path(file) for file in sys.argv[3:]]
weights = sorted((repository / "plugin/crates/sprites/model").rglob("*.safetensors"))
# A dictionary over all programs: each of them holds the same kernels.
filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 256 << 20}]
holes = {}
with lzma.open(archive, "wb", format=lzma.FORMAT_XZ, filters=filters) as xz, tarfile.open(fileobj=xz, mode="w|") as tar:
    def add(name, data):
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(data), 0o755
        tar.addfile(info, io.BytesIO(data))

    for file in files:
        data = file.read_bytes()
        for path in weights:
            part = path.read_bytes()
            at = data.find(part)
            if at >= 0:
                data = data[:at] + bytes(len(part)) + data[at + len(part):]
                holes.setdefault(file.name, []).append((at, str(path.relative_to(repository))))
        add(file.name, data)
    add("holes.json", json.dumps(holes).encode())
