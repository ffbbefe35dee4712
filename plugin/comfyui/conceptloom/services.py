"""What a node of the library hears of ComfyUI while it runs, and the other way round."""

import contextvars
import ctypes as c
import logging

import comfy.model_management
import comfy.utils

from . import contract, folders, tensors
from .contract import Host, Value
from .library import Text, let_go

_LEVELS = [logging.DEBUG, logging.INFO, logging.WARNING]

log = logging.getLogger("conceptloom")


class Services:
    """ComfyUI's services for one run of one node."""

    def __init__(self, node_id, output_dir, work_dir, metadata):
        self.saved = []
        self.output_dir = output_dir
        # The user's Cancel, if ComfyUI raised it in a callback: it cannot leave there, and its flag is gone.
        self._stop = None
        self._node_id = node_id
        # The library calls from threads of its own too, which know nothing of the node that ComfyUI runs.
        self._context = contextvars.copy_context()
        self._bar = comfy.utils.ProgressBar(1, node_id=node_id)
        self._metadata = Text(metadata)
        self._extension = contract.Extension(
            struct_size=c.sizeof(contract.Extension), call=contract.ExtensionCall(self._answer)
        )
        self.table = Host(
            struct_size=c.sizeof(Host),
            node_id=str(node_id).encode(),
            output_dir=output_dir.encode(),
            work_dir=work_dir.encode(),
            is_canceled=Host.IS_CANCELED(self._guarded(self._is_canceled, 0)),
            progress=Host.PROGRESS(self._guarded(self._progress)),
            preview=Host.PREVIEW(self._guarded(self._preview)),
            metric=Host.METRIC(self._guarded(self._metric)),
            log=Host.LOG(self._guarded(self._log)),
            saved=Host.SAVED(self._guarded(self._has_saved)),
            extension=Host.EXTENSION(self._guarded(self._find)),
        )

    def raise_cancellation(self):
        """Raises what stopped the node, as ComfyUI knows it."""
        if self._stop is not None:
            raise self._stop
        comfy.model_management.throw_exception_if_processing_interrupted()
        raise comfy.model_management.InterruptProcessingException()

    def pass_cancellation_on(self):
        """Sets ComfyUI's flag again if the node was done before it saw that: what comes next is stopped."""
        if self._stop is not None:
            comfy.model_management.interrupt_current_processing()

    def show(self, text):
        """Shows text under the node, in editors that can."""
        try:
            from server import PromptServer

            PromptServer.instance.send_progress_text(text, self._node_id)
        except (ImportError, AttributeError):
            log.debug("%s", text)

    def _guarded(self, function, default=None):
        def call(_, *arguments):
            try:
                return self._context.copy().run(function, *arguments)
            except comfy.model_management.InterruptProcessingException as stop:
                self._stop = stop
            except Exception:
                # Nobody loses what was learned because something could not be shown.
                log.exception("ComfyUI was not told something")
            return default

        return call

    def _is_canceled(self):
        return int(self._stop is not None or comfy.model_management.processing_interrupted())

    def _progress(self, stage, done, total, text):
        self._bar.update_absolute(done, max(total, 1))
        self.show(folders.readable(f"{stage.decode()}: {text.decode()}" if text else stage.decode()))

    def _preview(self, picture, _series, _label):
        from PIL import Image

        shown = Image.fromarray(tensors.picture(picture))
        self._bar.update_absolute(self._bar.current, preview=("JPEG", shown, 512))

    def _metric(self, series, x, y):
        log.debug("%s %g: %g", series.decode(), x, y)

    def _log(self, level, text):
        log.log(_LEVELS[min(level, len(_LEVELS) - 1)], "%s", text.decode())

    def _has_saved(self, path):
        self.saved.append(path.decode())

    def _find(self, extension_id):
        return c.addressof(self._extension) if extension_id == b"metadata/1" else None

    def _answer(self, _extension, request, n_request, answer, _error):
        for i in range(n_request):
            let_go(request[i])
            request[i].kind = 0
        answer.push(answer.context, Value.from_buffer_copy(self._metadata.value()))
        return contract.OK
