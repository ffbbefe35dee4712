"""The progress bar of a node; what it shows is kept."""

from . import model_management

shown = []
on_update = None


class ProgressBar:
    def __init__(self, total, node_id=None):
        self.total, self.current, self.node_id = total, 0, node_id

    def update_absolute(self, value, total=None, preview=None):
        self.total = self.total if total is None else total
        self.current = value
        if on_update:
            on_update(self)
        # ComfyUI's own looks here too, and takes the flag back as it raises.
        model_management.throw_exception_if_processing_interrupted()
        shown.append((self.node_id, self.current, self.total, preview))
