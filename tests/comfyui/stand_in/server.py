"""ComfyUI's server, as far as nodes ask it."""

import types


class PromptServer:
    instance = types.SimpleNamespace(prompt_queue=types.SimpleNamespace(currently_running={}, history={}))
