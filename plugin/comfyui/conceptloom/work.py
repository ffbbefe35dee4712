"""What nodes keep to go on from: after a cancel, a failure, and a ComfyUI that was killed, also after the node and before somebody has
saved its results."""

import atexit
import contextlib
import os
import shutil
import sys
import tempfile
import time
import weakref

from . import folders

try:
    import fcntl
except ImportError:  # Not Unix.
    fcntl = None

# What nobody went on with for this long is not kept: a fortnight, in seconds.
KEPT = 14 * 24 * 3600

# Work that is done, by folder, for as long as its results are there: its claim, and what removes it when they go.
_done = {}


class _Claim:
    """A folder that is this process's, and nobody else's until it is given back or this process is gone."""

    def __init__(self, root, key):
        """Raises OSError: another process is at the very same work, or nothing can be written there."""
        self.folder, self._lock, self._file = os.path.join(root, key), os.path.join(root, f"{key}.lock"), None
        while fcntl is not None:
            self._file = os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(self._file)
                raise
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._file), os.stat(self._lock)):
                    break
            # Whoever had it has removed the file.
            os.close(self._file)

    def give_back(self):
        """What is in the folder stays."""
        if self._file is not None:
            # While it is locked: nobody can have it yet.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._lock)
            os.close(self._file)

    def remove(self):
        """Gives it back with nothing in it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.give_back()


class _Holder:
    """Part of results: it is gone when they are."""


class Work:
    """One run of a node."""

    def __init__(self, folder):
        self.folder = folder
        self._holder = lambda: None

    def keep_for(self, results):
        """Until these results are gone nobody may have saved them: the same run again is short as long as the folder is there."""
        holder = _Holder()
        for result in results:
            # Numbers and texts take nothing.
            with contextlib.suppress(AttributeError, TypeError):
                result.conceptloom_work = holder
        self._holder = weakref.ref(holder)

    def end(self, claim):
        """Without an exception."""
        holder = self._holder()
        if holder is None or _is_empty(claim.folder):
            claim.remove()
            return
        removal = weakref.finalize(holder, _remove_done, claim)
        # At the end of ComfyUI all results go, saved or not.
        removal.atexit = False
        _done[claim.folder] = claim, removal


@contextlib.contextmanager
def work(key):
    """A folder that stays if what is done in it ends with an exception, or with ComfyUI: the same key goes on there."""
    root = folders.own_for_good("work")
    _forget_what_is_old(root)
    try:
        claim = _done_before(os.path.join(root, key)) or _Claim(root, key)
    except OSError:
        with tempfile.TemporaryDirectory(dir=folders.own("work")) as folder:
            yield Work(folder)
        return
    try:
        os.makedirs(claim.folder, exist_ok=True)
        run = Work(claim.folder)
        yield run
    except BaseException:
        claim.give_back()
        raise
    run.end(claim)


def _is_empty(folder):
    try:
        return not os.listdir(folder)
    except OSError:
        return True


def _done_before(folder):
    """The claim of the same work, if its results are there still; they remove nothing any more when they go."""
    claim, removal = _done.pop(folder, (None, None))
    return claim if removal and removal.detach() else None


def _remove_done(claim):
    _done.pop(claim.folder, None)
    claim.remove()


def _forget_what_is_old(root):
    old = set()
    with os.scandir(root) as entries:
        for entry in entries:
            # Another process may be done with it now.
            with contextlib.suppress(FileNotFoundError):
                if time.time() - entry.stat().st_mtime > KEPT:
                    old.add(entry.name.removesuffix(".lock"))
    for key in old:
        # Somebody may be at it.
        with contextlib.suppress(OSError):
            _Claim(root, key).remove()


@atexit.register
def _end():
    """What was not interrupted is where its graph put it."""
    server = getattr(sys.modules.get("server"), "PromptServer", None)
    queue = getattr(getattr(server, "instance", None), "prompt_queue", None)
    if queue is None or queue.currently_running:
        return
    for folder in list(_done):
        if claim := _done_before(folder):
            claim.remove()
