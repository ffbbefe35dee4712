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

from comfy_execution.utils import get_executing_context

from . import folders

try:
    import fcntl
except ImportError:  # Not Unix.
    fcntl = None

# What nobody went on with for this long is not kept: a fortnight, in seconds.
KEPT = 14 * 24 * 3600

# Work that is done and may be needed yet, by folder.
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
                    # A killed process's lock is as old as that.
                    os.utime(self._file)
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

    def __init__(self):
        # The graphs that made or took them, by ComfyUI's ids.
        self.prompts = {_prompt()}


class Work:
    """One run of a node."""

    def __init__(self, folder):
        self.folder = folder
        self._holder = _Holder()

    def keep_for(self, results):
        """Until these results are gone nobody may have saved them: the same run again is short as long as the folder is there."""
        for result in results:
            # Numbers and texts take nothing.
            with contextlib.suppress(AttributeError, TypeError):
                result.conceptloom_work = self._holder

    def end(self, claim):
        """Without an exception."""
        if _is_empty(claim.folder):
            claim.remove()
        else:
            _done[claim.folder] = _Done(claim, self._holder)


class _Done:
    """Work that is done, until its results are gone and the graphs that had them have ended."""

    def __init__(self, claim, holder):
        self.claim, self._prompts = claim, holder.prompts
        self.results = weakref.finalize(holder, self.settle)
        # At the end of ComfyUI all results go, saved or not.
        self.results.atexit = False

    def settle(self):
        """Removes it where all those graphs ended well, and put the results in their places; else it stays, as of a failed run."""
        queue = _queue()
        # What still runs may fail.
        if queue is None or self._prompts & {prompt for _, prompt, *_ in list(queue.currently_running.values())}:
            return
        if _done.get(self.claim.folder) is not self:
            return
        del _done[self.claim.folder]
        if all(_ended_well(queue, prompt) for prompt in self._prompts):
            self.claim.remove()
        else:
            self.claim.give_back()


@contextlib.contextmanager
def work(key, inputs=()):
    """A folder that stays if what is done in it ends with an exception, or with ComfyUI: the same key goes on there."""
    for value in inputs:
        # Who fails with them may want them again.
        if holder := getattr(value, "conceptloom_work", None):
            holder.prompts.add(_prompt())
    for done in list(_done.values()):
        # Its results may have been gone before their graph had ended.
        if not done.results.alive:
            done.settle()
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
    """The claim of the same work, if it is still this process's; its results remove nothing any more when they go."""
    done = _done.pop(folder, None)
    if done:
        done.results.detach()
    return done and done.claim


def _queue():
    server = getattr(sys.modules.get("server"), "PromptServer", None)
    return getattr(getattr(server, "instance", None), "prompt_queue", None)


def _prompt():
    """The graph that runs, where ComfyUI says which."""
    context = get_executing_context()
    return context and context.prompt_id


def _ended_well(queue, prompt):
    """Whether every node of a graph is done; of what is in no history any more that is not known."""
    status = queue.history.get(prompt, {}).get("status")
    return bool(status) and status["completed"]


def _forget_what_is_old(root):
    newest = {}
    for name in os.listdir(root):
        key, path = name.removesuffix(".lock"), os.path.join(root, name)
        files = (os.path.join(folder, file) for folder, _, files in os.walk(path) for file in files)
        for one in (path, *files):
            # Another process may be done with it now.
            with contextlib.suppress(FileNotFoundError):
                newest[key] = max(newest.get(key, 0), os.stat(one).st_mtime)
    for key in (key for key, changed in newest.items() if time.time() - changed > KEPT):
        # Somebody may be at it.
        with contextlib.suppress(OSError):
            _Claim(root, key).remove()


@atexit.register
def _end():
    """What was not interrupted is where its graph put it."""
    queue = _queue()
    if queue is None or queue.currently_running:
        return
    for done in list(_done.values()):
        done.settle()
