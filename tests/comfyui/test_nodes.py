"""The nodes, made from the library's description, at work."""

import contextlib
import errno
import json
import logging
import os
import pathlib
import shutil
import struct
import subprocess
import sys
import types

import numpy as np
import pytest

import folder_paths
import server
from conceptloom import contract, folders
from conceptloom.library import Library
from conceptloom.nodes import ConceptloomError, _run_twice
from conceptloom.work import work
from conftest import BUILT, HERE, ROOT, executed, graph, loaded

LIST = "<a> ball\n<b> wall (background)"


def picture(side=64):
    """A bright disc on a dark ground, [1, side, side, 3], and the masks of both."""
    y, x = np.mgrid[0:side, 0:side]
    disc = ((x - side / 2) ** 2 + (y - side / 2) ** 2 < (side / 3) ** 2).astype(np.float32)
    return np.stack([0.1 + 0.8 * disc] * 3, axis=-1)[None].astype(np.float32), np.stack([disc, 1 - disc])


def learned(nodes, **parameters):
    [model] = executed(nodes["ConceptloomLoadDiffusionModel"]).args
    images, masks = picture()
    learner = nodes["ConceptloomConceptTokenLearner"]
    parameters = {"concept_list": LIST, "steps": 1, "sample_every": 0, **parameters}
    return model, executed(learner, model=model, images=images, masks=masks, **parameters)


def test_schemas_are_the_librarys_description(nodes, comfyui):
    described = Library(BUILT / "libconceptloom.so").nodes
    assert list(nodes) == [f"Conceptloom{node['class']}" for node in described] and len(nodes) == 9
    for node in described:
        schema = nodes[f"Conceptloom{node['class']}"].define_schema()
        assert (schema.display_name, schema.description) == (node["display_name"], node["description"])
        assert [slot.id for slot in schema.inputs] == [slot["name"] for slot in node["inputs"] + node["widgets"]]
        for slot, widget in zip(schema.inputs[len(node["inputs"]) :], node["widgets"], strict=True):
            assert (slot.options["tooltip"], slot.options["default"]) == (widget["tooltip"], widget["kind"]["default"])
        names = [slot.options["display_name"] for slot in schema.outputs]
        assert names[: len(node["outputs"])] == [slot["name"] for slot in node["outputs"]]
    learner = {slot.id: slot for slot in nodes["ConceptloomEmLoop"].define_schema().inputs}
    assert learner["model"].io_type == "CONCEPTLOOM_DIFFUSION_MODEL" and learner["images"].io_type == "IMAGE"
    assert learner["masks"].options["optional"]


def test_what_learns_keeps_its_seed(nodes):
    slots = {name: slot for name, node in nodes.items() for slot in node.define_schema().inputs if slot.id == "seed"}
    # False alone keeps it in every editor; True and nothing are a new one after every run.
    assert {name.removeprefix("Conceptloom"): slot.options.get("control_after_generate") for name, slot in slots.items()} == {
        "EmLoop": False,
        "ConceptTokenLearner": False,
        "PersonalizedSampler": True,
    }


def test_parameters_that_name_files_are_the_librarys():
    known = {
        (node["class"], widget["name"])
        for node in Library(BUILT / "libconceptloom.so").nodes
        for widget in node["widgets"]
    }
    assert set(folders.NAMED) <= known


def test_tensors_are_shared_by_address(comfyui, monkeypatch):
    monkeypatch.setenv("CONCEPTLOOM_PLUGIN", str(BUILT / "libfaulty_plugin.so"))
    images = np.arange(48, dtype=np.float32).reshape(1, 4, 4, 3)
    strided = np.arange(96, dtype=np.float32).reshape(1, 4, 8, 3)[:, :, ::2]
    passthrough = loaded()["ConceptloomPassthrough"]
    for given in (images, strided):
        [passed] = executed(passthrough, images=given).args
        assert np.shares_memory(passed, given) and (passed == given).all()
        assert passed.__array_interface__["data"][0] == given.__array_interface__["data"][0]


def test_masks_are_refined(nodes, comfyui):
    images, masks = picture()
    noise = np.random.default_rng(0).random((64, 64)) < 0.1
    noisy = np.abs(masks - noise).astype(np.float32)
    refined, overlay = executed(nodes["ConceptloomDenseCrfRefine"], images=images, masks=noisy).args
    assert refined.shape == (2, 64, 64) and overlay.shape == (1, 64, 64, 3)
    assert (refined[0] != masks[0]).sum() < (noisy[0] != masks[0]).sum() / 4
    assert {node_id for node_id, *_ in comfyui.utils.shown} == {"7"}
    previews = [preview for *_, preview in comfyui.utils.shown if preview]
    assert previews and all(kind == "JPEG" and shown.size == (64, 64) for kind, shown, _ in previews)


def test_what_cannot_be_shown_stops_nothing(nodes, comfyui, monkeypatch, caplog):
    from conceptloom import tensors

    monkeypatch.setattr(tensors, "picture", lambda managed: 1 / 0)
    images, masks = picture()
    refined, _ = executed(nodes["ConceptloomDenseCrfRefine"], images=images, masks=masks).args
    assert refined.shape == masks.shape and "ZeroDivisionError" in caplog.text


def test_cancel_stops_within_one_step(nodes, comfyui):
    steps = []

    def cancel(bar):
        if bar.total == 50:
            steps.append(bar.current)
        if len(steps) == 3:
            comfyui.management.interrupted = True

    comfyui.utils.on_update = cancel
    with pytest.raises(comfyui.management.InterruptProcessingException):
        learned(nodes, steps=50)
    assert len(steps) <= 4, steps
    assert not comfyui.management.interrupted, "the flag is taken back, as ComfyUI does"


def test_cancel_at_the_end_of_a_node_stops_the_next(nodes, comfyui):
    def cancel(bar):
        comfyui.management.interrupted = bar.current == bar.total

    comfyui.utils.on_update = cancel
    images, masks = picture()
    assert len(executed(nodes["ConceptloomDenseCrfRefine"], images=images, masks=masks).args) == 2
    assert comfyui.management.interrupted


def test_cancel_between_two_steps_is_seen_by_the_node(nodes, comfyui, monkeypatch):
    steps = []
    # This bar does not look at the flag.
    monkeypatch.setattr(
        comfyui.utils.ProgressBar,
        "update_absolute",
        lambda bar, value, total=None, preview=None: total == 50 and steps.append(value),
    )
    monkeypatch.setattr(comfyui.management, "processing_interrupted", lambda: len(steps) >= 3)
    with pytest.raises(comfyui.management.InterruptProcessingException):
        learned(nodes, steps=50)
    assert len(steps) <= 4, steps


def test_a_canceled_loop_goes_on_where_it_was(nodes, comfyui, caplog):
    [model] = executed(nodes["ConceptloomLoadDiffusionModel"]).args
    images, _ = picture()
    loop = {"model": model, "images": images, "concept_list": LIST, "steps": 4, "steps_per_round": 2}
    loop |= {"first_timesteps": 1, "timesteps": 1, "joint_steps": 0, "sample_every": 0}

    def cancel(bar):
        comfyui.management.interrupted = (bar.current, bar.total) == (3, 4)

    comfyui.utils.on_update = cancel
    with pytest.raises(comfyui.management.InterruptProcessingException):
        executed(nodes["ConceptloomEmLoop"], **loop)
    comfyui.utils.on_update = None
    with caplog.at_level(logging.INFO, "conceptloom"):
        executed(nodes["ConceptloomEmLoop"], **loop)
    assert "going on after step 3" in caplog.text
    assert not kept(comfyui), "nothing is kept of what is done"
    caplog.clear()
    with caplog.at_level(logging.INFO, "conceptloom"):
        executed(nodes["ConceptloomEmLoop"], **loop | {"images": images * np.float32(0.5)})
    assert "going on" not in caplog.text


def kept(comfyui):
    return [path.name for path in (comfyui.root / "user/__conceptloom/work").iterdir()]


@pytest.mark.parametrize(
    ("dies_at", "code"),
    [(3, -9), (5, -9), (6, 1)],
    ids=["killed in the loop", "killed before anything is saved", "stopped when nothing could be saved"],
)
def test_a_loop_goes_on_in_the_next_comfyui(comfyui, tmp_path, dies_at, code):
    def run(dies_at):
        # Every state is kept.
        environment = os.environ | {"CONCEPTLOOM_TESTS_PACE": "0", "CONCEPTLOOM_TESTS_TRACE": str(tmp_path / "trace")}
        command = [sys.executable, HERE / "learn.py", comfyui.root, str(dies_at)]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    def learned():
        return {path.name: path.read_bytes() for path in (comfyui.models / "embeddings").rglob("*.safetensors")}

    whole = run(dies_at=0)
    assert whole.returncode == 0, whole.stderr
    expected = learned()
    shutil.rmtree(comfyui.models)
    assert run(dies_at).returncode == code and not learned()
    # Somebody has made room.
    shutil.rmtree(comfyui.models, ignore_errors=True)
    # ComfyUI empties this when it starts.
    shutil.rmtree(comfyui.root / "temp")
    last = run(dies_at=0)
    assert last.returncode == 0 and "going on after step" in last.stdout, last.stdout + last.stderr
    assert learned() == expected and not kept(comfyui)


class Result:
    pass


def done(step, n_results=2):
    """What was there before, and results."""
    with work("mine") as own:
        path = pathlib.Path(own.folder, "state")
        before = path.read_text() if path.exists() else None
        path.write_text(step)
        results = [Result() for _ in range(n_results)]
        own.keep_for([1, "text", *results])
        return before, results


def done_in_a_graph(step, n_results=2):
    with graph():
        return done(step, n_results)


def test_work_is_kept_until_its_results_are_gone(comfyui):
    before, first = done_in_a_graph("1")
    assert before is None and sorted(kept(comfyui)) == ["mine", "mine.lock"]
    # The same again goes on; results of before have no say any more.
    before, second = done_in_a_graph("2")
    assert before == "1"
    del first
    second.pop()
    assert sorted(kept(comfyui)) == ["mine", "mine.lock"]
    del second
    assert not kept(comfyui)
    # They may be gone before their graph has ended.
    before, _ = done_in_a_graph("3", n_results=0)
    assert before is None and sorted(kept(comfyui)) == ["mine", "mine.lock"]
    with work("other"):
        assert sorted(kept(comfyui)) == ["other", "other.lock"]
    with work("empty") as own:
        result = Result()
        own.keep_for([result])
    assert not kept(comfyui), "a node that keeps nothing leaves no folder"
    # Somebody has tidied up meanwhile.
    with work("mine") as own:
        shutil.rmtree(pathlib.Path(own.folder).parent)
        own.keep_for([result])


def test_work_of_a_graph_that_did_not_end_well_is_kept(comfyui):
    history = server.PromptServer.instance.prompt_queue.history

    def of_a_later_node_that_fails():
        with graph():
            results = done("1")
            raise ZeroDivisionError

    def of_a_later_graph_that_fails():
        _, results = done_in_a_graph("1")
        with graph(), work("saves", results):
            raise ZeroDivisionError

    def of_a_graph_that_is_in_no_history_any_more():
        results = done_in_a_graph("1")
        history.clear()

    for of_what in [
        of_a_later_node_that_fails,
        of_a_later_graph_that_fails,
        of_a_graph_that_is_in_no_history_any_more,
        lambda: done("1"),
    ]:
        with contextlib.suppress(ZeroDivisionError):
            of_what()
        assert "mine" in kept(comfyui), of_what
        # Nobody has it: the next one goes on, and what ends well goes.
        with work("other"):
            assert "mine.lock" not in kept(comfyui), of_what
        before, results = done_in_a_graph("2")
        assert before == "1"
        del results
        assert "mine" not in kept(comfyui), of_what


def test_work_of_a_fortnight_ago_and_of_another_process(comfyui):
    with work("old"), contextlib.suppress(ZeroDivisionError), work("older"):
        raise ZeroDivisionError
    root = comfyui.root / "user/__conceptloom/work"
    assert kept(comfyui) == ["older"]
    (root / "lost.lock").write_text("")
    # A state of today, beside the lock of a process that was killed long ago or in a folder of that time.
    (root / "of today").mkdir()
    (root / "of today.lock").write_text("")
    (root / "with today's").mkdir()
    (root / "with today's/state").write_text("")
    with work("mine") as mine:
        for name in ("older", "lost.lock", "mine", "of today.lock", "with today's"):
            os.utime(root / name, (0, 0))
        # As another process would find it: what is old goes, but for what somebody is at.
        with work("mine") as other:
            assert pathlib.Path(mine.folder) == root / "mine" and pathlib.Path(other.folder).parent != root
        assert sorted(kept(comfyui)) == ["mine", "mine.lock", "of today", "of today.lock", "with today's"]
    with work("of today"):
        assert (root / "of today.lock").stat().st_mtime > 0, "who goes on with it renews its time"
    assert kept(comfyui) == ["with today's"]
    # Where the claim cannot be made, work is done elsewhere.
    (root / "mine.lock").mkdir()
    with work("mine") as elsewhere:
        assert pathlib.Path(elsewhere.folder).parent != root


def test_what_is_learned_lies_where_stock_nodes_look(nodes, comfyui):
    [model] = executed(nodes["ConceptloomLoadDiffusionModel"]).args
    images, masks = picture()
    loop = {"mode": "given", "steps": 1, "steps_per_round": 1, "joint_steps": 1, "sample_every": 0}
    concepts, tuned, *_ = executed(
        nodes["ConceptloomEmLoop"], model=model, images=images, masks=masks, concept_list=LIST, **loop
    ).args
    save = nodes["ConceptloomSaveConcepts"]
    result = executed(save, concepts=concepts, model=tuned, filename_prefix="mine/")
    assert result.args == (["embedding:mine/a", "embedding:mine/b"], "mine/lora.safetensors")
    assert folder_paths.get_filename_list("embeddings") == ["mine/a.safetensors", "mine/b.safetensors"]
    assert folder_paths.get_filename_list("loras") == ["mine/lora.safetensors"]
    assert "LoRA mine/lora.safetensors" in result.ui["text"][0]
    # Nothing is overwritten, and what is said is what was written.
    again = executed(save, concepts=concepts, model=tuned, filename_prefix="mine/")
    assert again.args == (["embedding:mine/a-2", "embedding:mine/b-2"], "mine/lora-2.safetensors")
    token = (comfyui.models / "embeddings/mine/a.safetensors").read_bytes()
    head = json.loads(token[8 : 8 + struct.unpack("<Q", token[:8])[0]])
    assert json.loads(head["__metadata__"]["workflow"]) == {"nodes": []}
    assert not list((comfyui.root / "temp/conceptloom/saved").iterdir())
    # Our own loaders find them by the same names.
    [loaded_again] = executed(nodes["ConceptloomLoadConcepts"], files="mine/a.safetensors\nembedding:mine/b").args
    assert loaded_again.type_name == concepts.type_name
    load = nodes["ConceptloomLoadTunedModel"]
    assert "mine/lora.safetensors" in {slot.id: slot for slot in load.define_schema().inputs}["path"].options["options"]
    executed(load, model=model, path="mine/lora.safetensors")
    # Without a LoRA there is no name to hand on.
    alone = executed(save, concepts=concepts, filename_prefix="alone")
    assert "no LoRA" in alone.args[1].message


def test_of_what_cannot_be_saved_whole_nothing_is_there(nodes, comfyui):
    _, result = learned(nodes)
    concepts = result.args[0]
    save = nodes["ConceptloomSaveConcepts"]
    embeddings = comfyui.models / "embeddings"
    real = shutil.move

    def moved(source, near):
        if source.name == "b.safetensors":
            assert (embeddings / "mine/a.safetensors").is_file()
            raise OSError(28, "No space left on device", str(near))
        return real(source, near)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(shutil, "move", moved)
        with pytest.raises(ConceptloomError) as told:
            executed(save, concepts=concepts, filename_prefix="mine/")
    assert str(told.value).startswith(f"{embeddings / 'mine/b.safetensors'} cannot be written: No space left on device; make")
    assert not list(embeddings.rglob("*.safetensors"))
    (embeddings / "in the way").write_text("")
    with pytest.raises(ConceptloomError, match="in the way/a.safetensors cannot be written: File exists"):
        executed(save, concepts=concepts, filename_prefix="in the way/")
    assert executed(save, concepts=concepts, filename_prefix="mine/").args[0] == ["embedding:mine/a", "embedding:mine/b"]


def test_a_whole_network_stays_a_folder(nodes, comfyui):
    [model] = executed(nodes["ConceptloomLoadDiffusionModel"]).args
    images, masks = picture()
    loop = {
        "mode": "given",
        "steps": 1,
        "steps_per_round": 1,
        "joint_steps": 1,
        "joint_scope": "key_value",
        "sample_every": 0,
    }
    concepts, tuned, *_ = executed(
        nodes["ConceptloomEmLoop"], model=model, images=images, masks=masks, concept_list=LIST, **loop
    ).args
    before = set(comfyui.root.iterdir())
    places = {"mine/": ("mine", "mine-2"), "v1.5/": ("v1.5", "v1.5-2"), "": ("", "unet-2", "unet-3")}
    for prefix, names in places.items():
        for name in names:
            saved = executed(nodes["ConceptloomSaveConcepts"], concepts=concepts, model=tuned, filename_prefix=prefix)
            assert (comfyui.root / "output" / name / "unet/config.json").is_file()
            line = "/".join(filter(None, ["output", name, "unet"]))
            assert line in saved.ui["text"][0].splitlines()
    assert set(comfyui.root.iterdir()) == before, "nothing is put beside the output folder"
    listed = folders.NAMED["LoadTunedModel", "path"].options()
    assert listed == ["mine", "mine-2", "unet", "unet-2", "unet-3", "v1.5", "v1.5-2"]
    for path in ("mine-2", "unet", "unet-3"):
        executed(nodes["ConceptloomLoadTunedModel"], model=model, path=path)


def test_a_token_with_lora_in_its_name_is_no_lora(nodes, comfyui):
    _, result = learned(nodes, concept_list="<flora> ball\n<b> wall")
    saved = executed(
        nodes["ConceptloomSaveConcepts"], concepts=result.args[0], format="diffusers", filename_prefix="mine/"
    )
    assert saved.args[0] == ["embedding:mine/flora", "embedding:mine/b"]
    assert not folder_paths.get_filename_list("loras")


def test_what_comes_from_another_file_system_is_whole_and_on_the_disk(nodes, comfyui, monkeypatch):
    _, result = learned(nodes)
    rename, link, fsync = os.rename, os.link, os.fsync
    on_disk, placed = set(), []

    def renamed(source, target):
        if "temp" in pathlib.Path(source).relative_to(comfyui.root).parts:
            raise OSError(errno.EXDEV, "Invalid cross-device link", str(source))
        rename(source, target)

    def synced(file):
        fsync(file)
        on_disk.add(os.fstat(file).st_ino)

    def linked(source, target):
        # A kill now leaves nothing that ComfyUI lists.
        assert folder_paths.get_filename_list("embeddings") == placed
        assert os.stat(source).st_ino in on_disk
        link(source, target)
        placed.append(str(target.relative_to(embeddings)))
        # Its name is not yet.
        on_disk.discard(os.stat(target.parent).st_ino)

    embeddings = pathlib.Path(folder_paths.get_folder_paths("embeddings")[0])
    unfinished = embeddings / "mine/.conceptloom-1.tmp"
    of_today, of_others = embeddings / "mine/.conceptloom-2.tmp", embeddings / "mine/.other.tmp"
    unfinished.mkdir(parents=True)
    for path in (unfinished / "unet", of_today, of_others):
        path.write_text("")
    for path in (unfinished, of_others):
        os.utime(path, (0, 0))
    for name, function in {"rename": renamed, "link": linked, "fsync": synced}.items():
        monkeypatch.setattr(os, name, function)
    saved = executed(nodes["ConceptloomSaveConcepts"], concepts=result.args[0], filename_prefix="mine/")
    assert saved.args[0] == ["embedding:mine/a", "embedding:mine/b"]
    assert os.stat(embeddings / "mine").st_ino in on_disk
    names = {path.name for path in (embeddings / "mine").iterdir()}
    assert names == {"a.safetensors", "b.safetensors", of_today.name, of_others.name}


def test_errors_are_one_sentence(nodes, comfyui):
    with pytest.raises(ConceptloomError, match="^the token <a> is listed twice; every concept needs its own$"):
        learned(nodes, concept_list="<a>\n<a>")
    images, masks = picture()
    with pytest.raises(ConceptloomError, match="^masks: a tensor is needed, and this is a dict$"):
        executed(nodes["ConceptloomDenseCrfRefine"], images=images, masks={})
    with pytest.raises(ConceptloomError, match="model"):
        executed(nodes["ConceptloomConceptTokenLearner"], model=masks, images=images, concept_list=LIST)
    load = nodes["ConceptloomLoadConcepts"]
    assert "does not exist" in load.validate_inputs(files="nowhere.safetensors")
    assert load.validate_inputs(files=None) is True, "a linked text has no value yet"
    assert "leads out of" in nodes["ConceptloomSaveConcepts"].validate_inputs(filename_prefix="../x")


def test_a_checkpoint_without_a_vocabulary_gets_comfyuis(nodes, comfyui, monkeypatch, tmp_path):
    import comfy.sd1_clip

    monkeypatch.setattr(comfy.sd1_clip, "__file__", str(tmp_path / "sd1_clip.py"))
    (tmp_path / "sd1_tokenizer").mkdir()
    (tmp_path / "sd1_tokenizer/vocab.json").write_text("{}")
    checkpoint = pathlib.Path(folder_paths.get_folder_paths("checkpoints")[0]) / "x.safetensors"
    checkpoint.write_bytes(b"nothing")
    (checkpoint.parent / "scheduler").mkdir()
    for name in ("scheduler_config.json", "scheduler/scheduler_config.json"):
        (checkpoint.parent / name).write_text(name)
    load = nodes["ConceptloomLoadDiffusionModel"]
    assert "x.safetensors" in {slot.id: slot for slot in load.define_schema().inputs}["checkpoint"].options["options"]
    for _ in range(2):
        linked = pathlib.Path(folders.resolved("LoadDiffusionModel", {"checkpoint": "x.safetensors"})["checkpoint"])
        assert linked.resolve() == checkpoint and (linked.parent / "tokenizer/vocab.json").is_file()
        for name in ("scheduler_config.json", "scheduler/scheduler_config.json"):
            assert (linked.parent / name).read_text() == name
    with pytest.raises(ConceptloomError) as told:
        executed(load, checkpoint="x.safetensors")
    assert str(checkpoint) in str(told.value) and str(linked.parent) not in str(told.value)
    # One that has a vocabulary is read where it is.
    (checkpoint.parent / "tokenizer").mkdir()
    assert folders.resolved("LoadDiffusionModel", {"checkpoint": "x.safetensors"})["checkpoint"] == str(checkpoint)


def test_a_changed_file_is_another_input(nodes, comfyui):
    load = nodes["ConceptloomLoadConcepts"]
    file = pathlib.Path(folder_paths.get_folder_paths("embeddings")[0]) / "x.safetensors"
    file.write_bytes(b"1")
    first = load.fingerprint_inputs(files="x")
    assert load.fingerprint_inputs(files="x.safetensors") == first
    file.write_bytes(b"2")
    assert load.fingerprint_inputs(files="x") != first
    assert load.fingerprint_inputs(files=None) == ""


def test_memory_that_runs_out_unloads_comfyuis_models_once(nodes, comfyui, monkeypatch):
    from conceptloom.library import Failed

    def full(*_):
        raise Failed(contract.OUT_OF_MEMORY, "", "memory ran out")

    before = comfyui.management.unloaded
    monkeypatch.setattr(Library, "run", full)
    with pytest.raises(ConceptloomError, match="memory ran out"):
        executed(nodes["ConceptloomLoadDiffusionModel"])
    assert comfyui.management.unloaded == before + 1
    

def test_what_was_saved_before_memory_ran_out_is_not_there_twice(tmp_path):
    from conceptloom.library import Failed

    services = types.SimpleNamespace(saved=[], table=None, output_dir=str(tmp_path), pass_cancellation_on=lambda: None)
    runs = []

    def full_at_first(*_):
        runs.append(sorted(path.name for path in tmp_path.iterdir()))
        (tmp_path / "unet").mkdir()
        (tmp_path / "unet/config.json").touch()
        services.saved.append(str(tmp_path / "unet/config.json"))
        if len(runs) == 1:
            raise Failed(contract.OUT_OF_MEMORY, "", "memory ran out")
        return [1]

    library = types.SimpleNamespace(run=full_at_first)
    assert _run_twice(library, {"class": "SaveConcepts", "output_node": True}, {}, {}, services) == [1]
    assert runs == [[], []] and len(services.saved) == 1
    # Of one that saves at its final place there is no second try.
    runs.clear()
    folders.empty(tmp_path)
    with pytest.raises(ConceptloomError, match="memory ran out"):
        _run_twice(library, {"class": "Other", "output_node": False}, {}, {}, services)
    assert len(runs) == 1


@pytest.mark.parametrize(
    ("library", "sentence"),
    [("nowhere.so", "there is no such file"), ("README.md", "cannot be loaded"), ("libc.so.6", "has no node_plugin")],
)
def test_without_a_library_the_pack_loads_and_says_so(comfyui, monkeypatch, caplog, tmp_path, library, sentence):
    named = {"README.md": ROOT / "README.md", "libc.so.6": libc()}.get(library, tmp_path / library)
    monkeypatch.setenv("CONCEPTLOOM_PLUGIN", str(named))
    says_so(sentence, caplog)


def test_another_version_is_said(comfyui, monkeypatch, caplog):
    monkeypatch.setattr(contract, "MAJOR", 2)
    says_so("speaks version 1.0 of the contract, these nodes version 2", caplog)


def test_a_library_that_the_wheel_should_bring(comfyui, monkeypatch, caplog):
    monkeypatch.delenv("CONCEPTLOOM_PLUGIN")
    says_so("install Conceptloom's wheel", caplog)


def libc():
    maps = pathlib.Path("/proc/self/maps").read_text()
    return next(line.split()[-1] for line in maps.splitlines() if "/libc.so.6" in line or "/libc-" in line)


def says_so(sentence, caplog):
    [(name, node)] = loaded().items()
    schema = node.define_schema()
    assert name == "ConceptloomUnavailable" and sentence in schema.description
    assert sentence in caplog.text
    with pytest.raises(ConceptloomError) as told:
        node.execute()
    assert str(told.value) == schema.description and "\n" not in schema.description
