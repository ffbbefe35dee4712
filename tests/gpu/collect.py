"""Puts the programs that cargo has built into a folder; with `--link` nothing is copied.

    cargo build … --message-format=json-render-diagnostics | python3 collect.py FOLDER [--link]
"""
import json
import pathlib
import shutil
import sys

folder, is_linked = pathlib.Path(sys.argv[1]), sys.argv[2:] == ["--link"]
shutil.rmtree(folder, ignore_errors=True)
folder.mkdir(parents=True)
for line in sys.stdin:
    message = json.loads(line)
    if message["reason"] != "compiler-artifact":
        continue
    target, files = message["target"], [message.get("executable")]
    name = target["name"] + ("-unit-tests" if message["profile"]["test"] and target["kind"] != ["test"] else "")
    if name == "conceptloom":
        files += [file for file in message["filenames"] if file.endswith(".so")]
    for file in filter(None, files):
        place = folder / ("libconceptloom.so" if file.endswith(".so") else name)
        if is_linked:
            place.symlink_to(file)
        else:
            shutil.copy(file, place)
