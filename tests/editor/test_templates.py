"""Every workflow that ComfyUI's template package ships: none crashes the validator, and unknown nodes are named."""
import importlib.resources
import json
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor

from support import HOST_DEMO

# Nodes that only the editor knows, and how a node is switched off.
OF_THE_EDITOR = {"Note", "MarkdownNote", "Reroute", "PrimitiveNode"}
MUTED, BYPASSED = 2, 4
UNKNOWN = re.compile(r"no node of the class (.+?) is known")


def templates():
    folder = importlib.resources.files("comfyui_workflow_templates_json") / "templates"
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        if file.name.endswith(".json"):
            document = json.loads(file.read_text(encoding="utf-8"))
            if isinstance(document, dict) and "nodes" in document:
                yield file, document


def classes(document):
    """Classes of the nodes that are on, those inside of subgraphs too."""
    subgraphs = {graph["id"]: graph for graph in document.get("definitions", {}).get("subgraphs", [])}
    found, waiting = set(), [document["nodes"]]
    while waiting:
        for node in waiting.pop():
            kind = node["type"]
            if node.get("mode", 0) in (MUTED, BYPASSED) or kind in OF_THE_EDITOR:
                continue
            if kind in subgraphs:
                waiting.append(subgraphs[kind]["nodes"])
            else:
                found.add(kind)
    return found


def validated(file):
    return subprocess.run([HOST_DEMO, "validate", str(file)], capture_output=True, text=True, timeout=60)


def test_templates_are_read_and_their_unknown_nodes_named():
    known = json.loads(subprocess.run([HOST_DEMO, "nodes", "--json"], check=True, capture_output=True, text=True).stdout)
    files, documents = zip(*templates())
    assert len(files) > 500
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(validated, files))
    wrong = {}
    for file, document, done in zip(files, documents, answers):
        named = set(UNKNOWN.findall(done.stderr))
        unknown = classes(document) - known.keys()
        if done.returncode not in (0, 1) or "panicked" in done.stderr or named != unknown:
            wrong[file.name] = (done.returncode, unknown ^ named, done.stderr[-300:])
    assert not wrong, wrong
