"""Where ComfyUI keeps its files: what parameters name is looked up there, and what was learned is put there."""

import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import struct
import tempfile
import time
import uuid

import folder_paths

# Ends of the names of a LoRA's tensors, as the library writes them.
_OF_LORA = (".lora_down.weight", ".lora_up.weight", ".lora_A.weight", ".lora_B.weight")

# What is not in its place yet is called so: no list of ComfyUI's has files that end so.
_UNFINISHED = (".conceptloom-", ".tmp")
# Nobody is at it any more after so many seconds, a day.
_LEFT = 24 * 3600


def _files(kind):
    """Names of the files of a folder that are read at all: no pickles."""
    return [name for name in folder_paths.get_filename_list(kind) if name.endswith(".safetensors")]


def _diffusers():
    roots = [pathlib.Path(root) for root in folder_paths.get_folder_paths("diffusers")]
    found = ((root, path.parent) for root in roots for path in root.glob("**/model_index.json"))
    return [str(path.relative_to(root)) for root, path in found]


def _tuned():
    root = pathlib.Path(folder_paths.get_output_directory())
    found = [path.parent.parent for path in root.glob("*/unet/config.json")]
    # Saved without a folder's name.
    found += [path.parent for path in root.glob("unet/config.json")]
    return sorted({str(path.relative_to(root)) for path in found})


# Folders that checkpoints are linked in, and where they are.
_linked = {}


def readable(text):
    """A sentence with the paths that the user knows."""
    for linked, folder in _linked.items():
        text = text.replace(linked, folder)
    return text


def _checkpoint(name):
    path = folder_paths.get_full_path("checkpoints", name)
    return _beside_tokenizer(path) if path else _below("diffusers", name)


def _below(kind, name):
    paths = (os.path.join(root, name) for root in folder_paths.get_folder_paths(kind))
    return next(filter(os.path.exists, paths), None)


def _beside_tokenizer(checkpoint):
    """The checkpoint, linked beside ComfyUI's own vocabulary of CLIP if none is beside it: the file holds none."""
    folder = os.path.dirname(checkpoint)
    if any(os.path.exists(os.path.join(folder, name)) for name in ("tokenizer", "tokenizer.json", "vocab.json")):
        return checkpoint
    import comfy.sd1_clip

    vocabulary = os.path.join(os.path.dirname(comfy.sd1_clip.__file__), "sd1_tokenizer")
    if not os.path.isdir(vocabulary):
        return checkpoint
    stat = os.stat(checkpoint)
    key = hashlib.blake2b(f"{checkpoint} {stat.st_mtime_ns} {stat.st_size}".encode(), digest_size=8).hexdigest()
    linked = os.path.join(own("checkpoints"), key)
    os.makedirs(linked, exist_ok=True)
    # Whatever else the library reads beside it; a link that leads nowhere is nothing.
    beside = [os.path.basename(checkpoint), "scheduler_config.json", "scheduler"]
    links = {name: os.path.join(folder, name) for name in beside} | {"tokenizer": vocabulary}
    for name, source in links.items():
        with contextlib.suppress(FileExistsError):
            os.symlink(source, os.path.join(linked, name))
    _linked[linked] = folder
    return os.path.join(linked, os.path.basename(checkpoint))


def _output(name):
    path = os.path.join(folder_paths.get_output_directory(), name)
    return path if os.path.exists(path) else None


class Choice:
    """A parameter that names one file or folder of ComfyUI's."""

    def __init__(self, options, find):
        self.options, self._find = options, find

    def resolved(self, value):
        """The path; what is none of ComfyUI's stays as it is."""
        return (self._find(value) if value else None) or value


class Lines:
    """A text that names a file per line."""

    def __init__(self, kind):
        self._kind = kind

    def _line(self, line):
        name = line.strip().removeprefix("embedding:")
        names = (name, f"{name}.safetensors")
        return next(filter(None, (folder_paths.get_full_path(self._kind, name) for name in names if name)), line)

    def resolved(self, value):
        """Every line's path; lines that are none of ComfyUI's stay as they are."""
        return "\n".join(self._line(line) for line in value.split("\n"))


# What ComfyUI has folders for, by node and parameter. The only place that knows parameters of the library by name.
NAMED = {
    ("LoadDiffusionModel", "checkpoint"): Choice(lambda: _files("checkpoints") + _diffusers(), _checkpoint),
    ("LoadDiffusionModel", "vae"): Choice(lambda: _files("vae"), lambda name: folder_paths.get_full_path("vae", name)),
    ("LoadTunedModel", "path"): Choice(
        lambda: _files("loras") + _tuned(), lambda name: folder_paths.get_full_path("loras", name) or _output(name)
    ),
    ("LoadConcepts", "files"): Lines("embeddings"),
}


def resolved(class_name, parameters):
    """Parameters with the paths of what they name."""
    named = {name: NAMED.get((class_name, name)) for name in parameters}
    return {name: named[name].resolved(value) if named[name] else value for name, value in parameters.items()}


def own(name):
    """A folder of ours in ComfyUI's temporary one, which is emptied when it starts and ends."""
    folder = os.path.join(folder_paths.get_temp_directory(), "conceptloom", name)
    os.makedirs(folder, exist_ok=True)
    return folder


def own_for_good(name):
    """A folder of ours that outlives ComfyUI, among its users' folders; two underscores begin the name of no user."""
    try:
        folder = os.path.join(folder_paths.get_user_directory(), "__conceptloom", name)
        os.makedirs(folder, exist_ok=True)
    except OSError:
        # Nothing can be written there.
        return own(name)
    return folder


@contextlib.contextmanager
def staging():
    """An empty folder for what a node writes, until it is put in its place."""
    with tempfile.TemporaryDirectory(dir=own("saved")) as folder:
        yield folder


def empty(folder):
    """Removes what is in a staging folder."""
    for path in pathlib.Path(folder).iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


class Saved:
    """What a node wrote, in its places."""

    def __init__(self):
        self.embeddings, self.loras, self.others = [], [], []

    def lines(self):
        """A line per file, for a person."""
        return (
            [f"embedding:{name}" for name in self.embeddings]
            + [f"LoRA {name}" for name in self.loras]
            + [f"output/{name}" for name in self.others]
        )


def put_in_place(files, folder):
    """Moves files of a staging folder to where ComfyUI's own nodes look for them: all of them, or none if one cannot be."""
    saved, placed = Saved(), []
    try:
        for path in map(pathlib.Path, files):
            if path.exists():
                placed.append(_put_in_place(path, path.relative_to(folder), saved))
    except BaseException:
        for place in placed:
            _remove(place)
        raise
    return saved


def _put_in_place(path, inside, saved):
    """Where it is then."""
    output = pathlib.Path(folder_paths.get_output_directory())
    if (path.parent / "config.json").exists():
        # A whole network: all of its folder at once, as the library names it.
        stem, leaf = inside.parent.parent, inside.parent.name
        place = _moved(path.parent, (folder / leaf for folder in _folders(output, stem, leaf)), output / stem.parent)
        saved.others.append(place.relative_to(output).as_posix())
        return place
    if path.suffix != ".safetensors":
        place = _moved_file(path, output / inside)
        saved.others.append(place.relative_to(output).as_posix())
        return place
    kind = "loras" if _is_lora(path) else "embeddings"
    root = pathlib.Path(folder_paths.get_folder_paths(kind)[0])
    place = _moved_file(path, root / inside)
    name = place.relative_to(root)
    if kind == "loras":
        # As the list of LoraLoader has it.
        saved.loras.append(str(name))
    else:
        saved.embeddings.append(name.with_suffix("").as_posix())
    return place


def _is_lora(path):
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        names = json.loads(file.read(length))
    return any(name.endswith(_OF_LORA) for name in names)


def _numbered(path, ending=""):
    """The path, and then with -2, -3, … before the ending of its name."""
    stem = path.name.removesuffix(ending)
    return itertools.chain([path], (path.with_name(f"{stem}-{n}{ending}") for n in itertools.count(2)))


def _folders(output, stem, leaf):
    """Where a `leaf` may go: concepts, concepts-2, …; without a name the output folder itself, and then unet-2, … in it."""
    return itertools.chain([output / stem], itertools.islice(_numbered(output / (stem if stem.name else leaf)), 1, None))


@contextlib.contextmanager
def _told_of(place):
    """Errors name where a file was to go, not how it went there."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(place)) from error


def _moved_file(source, target):
    return _moved(source, _numbered(target, target.suffix), target.parent)


def _moved(source, names, folder):
    """By way of this folder, under the first of these names that nobody has: whole and on the disk, or not at all."""
    first = next(names)
    with _told_of(first), _unfinished(source, folder) as near:
        for name in itertools.chain([first], names):
            name.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(near, name)
            except FileExistsError:
                continue
            except OSError:  # A folder, or no hard links here.
                if name.exists():
                    continue
                os.rename(near, name)
            _sync_names(name.parent)
            return name


@contextlib.contextmanager
def _unfinished(source, folder):
    """`source`, moved into this folder: on the disk, and under no name that anybody looks for."""
    folder.mkdir(parents=True, exist_ok=True)
    start, end = _UNFINISHED
    for left in folder.glob(f"{start}*{end}"):
        # What a dead ComfyUI left; another one may be at its own.
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _LEFT:
                _remove(left)
    near = folder / f"{start}{uuid.uuid4().hex}{end}"
    try:
        shutil.move(source, near)
        _sync(near)
        yield near
    finally:
        _remove(near)


def _remove(path):
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path):
    """Waits until a file, or a folder with all that is in it, is on the disk."""
    if path.is_dir():
        for inside in path.iterdir():
            _sync(inside)
        _sync_names(path)
    else:
        with open(path, "rb+") as file:
            os.fsync(file.fileno())


def _sync_names(folder):
    """Waits until the names in a folder are on the disk, where the system can do that."""
    with contextlib.suppress(OSError):
        file = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)
