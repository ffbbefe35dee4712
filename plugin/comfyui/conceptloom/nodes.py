"""ComfyUI's node classes, made from the library's description when ComfyUI starts."""

import dataclasses
import hashlib
import inspect
import json
import logging

import comfy.cli_args
import comfy.model_management
import folder_paths
from comfy_api.latest import ComfyExtension, io

from . import contract, folders, tensors
from .library import Failed, Library, Reference, Unusable, path
from .services import Services
from .work import work

PREFIX = "Conceptloom"

# Socket types that are ComfyUI's own; all others are the library's.
STOCK = {"IMAGE": io.Image, "MASK": io.Mask}


class ConceptloomError(Exception):
    """What a node says when it fails: one sentence."""


class Extension(ComfyExtension):
    """All nodes of the library; one that says why where there is no library."""

    async def get_node_list(self):
        try:
            library = Library(path())
        except Unusable as error:
            logging.getLogger("conceptloom").error("%s", error)
            return [unavailable(str(error))]
        return [node_class(library, described) for described in library.nodes]


def unavailable(sentence):
    """A node that can only say why there are no others."""

    class Unavailable(io.ComfyNode):
        @classmethod
        def define_schema(cls):
            return io.Schema(
                node_id=f"{PREFIX}Unavailable",
                display_name="Conceptloom cannot run",
                category=PREFIX,
                description=sentence,
                inputs=[],
                outputs=[],
                is_output_node=True,
            )

        @classmethod
        def execute(cls):
            raise ConceptloomError(sentence)

    return Unavailable


def node_class(library, described):
    """The class of a node of the library."""
    class_name = described["class"]
    widgets = {widget["name"]: widget["kind"] for widget in described["widgets"]}
    texts = [name for name, kind in widgets.items() if _is_checked_here(class_name, name, kind)]

    def parameters_of(values):
        given = {name: _current(widgets[name], values[name]) for name in widgets if name in values}
        return folders.resolved(class_name, given)

    class Node(io.ComfyNode):
        @classmethod
        def define_schema(cls):
            return schema(described)

        @classmethod
        def fingerprint_inputs(cls, **values):
            if any(values[name] is None for name in widgets if name in values):
                return ""  # Linked: it has no value yet, and its own node tells when it changes.
            return library.fingerprint(class_name, parameters_of(values))

        @classmethod
        def execute(cls, **values):
            return run(library, described, parameters_of(values), values, cls.hidden)

    def validate_inputs(cls, **values):
        if any(value is None for value in values.values()):
            return True
        for name, value in values.items():
            kind = widgets[name]
            if kind["type"] == "choice" and value not in kind["options"] and value not in kind["former"]:
                return f'{name}: there is no "{value}"; choose one of {", ".join(kind["options"])}'
        try:
            library.validate(class_name, parameters_of(values))
        except Failed as error:
            return folders.readable(str(error))
        return True

    if texts:
        # ComfyUI checks choices and bounds of what is not named here, and repeats the sentence for all that is: those are
        # the texts, about which the library knows more.
        names = ["cls", *texts]
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        validate_inputs.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])
        Node.validate_inputs = classmethod(validate_inputs)
    Node.__name__ = Node.__qualname__ = f"{PREFIX}{class_name}"
    return Node


def _is_checked_here(class_name, name, kind):
    return kind["type"] == "text" or bool(kind.get("former")) or (class_name, name) in folders.NAMED


def _current(kind, value):
    """A choice that a saved workflow holds under its former name has its name of now."""
    return kind["former"].get(value, value) if kind.get("former") else value


def schema(described):
    """What ComfyUI shows of a node."""
    class_name = described["class"]
    saves = described["output_node"]
    inputs = [
        _socket_type(socket["port"]).Input(socket["name"], optional=socket["optional"], tooltip=socket["tooltip"])
        for socket in described["inputs"]
    ]
    # Pictures are wanted anew. What is learned goes on after a cancel with the same seed only, and an editor that offers to change
    # it does so from the first run on; newer ones than 1.27 can be told otherwise, that one cannot. So there it is not offered.
    paints = all(socket["port"] in STOCK for socket in described["outputs"])
    inputs += [_widget(class_name, widget, changes_seed=paints) for widget in described["widgets"]]
    # ComfyUI wants ids of inputs and outputs to differ; names may be the same.
    outputs = [
        _socket_type(socket["port"]).Output(
            f"{socket['name']}_output", display_name=socket["name"], tooltip=socket["tooltip"]
        )
        for socket in described["outputs"]
    ]
    if saves:
        outputs += [
            io.String.Output(
                "embeddings_output",
                display_name="embeddings",
                tooltip="What prompts of ComfyUI call every saved token: embedding:NAME",
                is_output_list=True,
            ),
            io.AnyType.Output(
                "lora_output", display_name="lora_name", tooltip="The saved LoRA, for the lora_name of Load LoRA"
            ),
        ]
    known = {field.name for field in dataclasses.fields(io.Schema)}
    aliases = {"search_aliases": described["search_aliases"]} if "search_aliases" in known else {}
    return io.Schema(
        node_id=f"{PREFIX}{class_name}",
        display_name=described["display_name"],
        category=described["category"],
        description=described["description"],
        inputs=inputs,
        outputs=outputs,
        hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
        is_output_node=saves,
        **aliases,
    )


def _socket_type(port):
    return STOCK.get(port) or io.Custom(f"{PREFIX.upper()}_{port}")


def _widget(class_name, widget, changes_seed):
    name, kind = widget["name"], widget["kind"]
    shown = {"tooltip": widget["tooltip"], "default": kind["default"]}
    named = folders.NAMED.get((class_name, name))
    if isinstance(named, folders.Choice):
        return io.Combo.Input(name, options=[kind["default"], *named.options()], **shown)
    if kind["type"] == "integer":
        # Said in any case: where nothing is said, what is called seed is changed.
        seed = {"control_after_generate": changes_seed} if kind["seed"] else {}
        return io.Int.Input(name, min=kind["min"], max=kind["max"], **seed, **shown)
    if kind["type"] == "float":
        return io.Float.Input(name, min=kind["min"], max=kind["max"], step=kind["step"], round=False, **shown)
    if kind["type"] == "text":
        return io.String.Input(name, multiline=kind["multiline"], **shown)
    if kind["type"] == "boolean":
        return io.Boolean.Input(name, **shown)
    return io.Combo.Input(name, options=kind["options"], **shown)


def run(library, described, parameters, values, hidden):
    """Runs a node of the library as one of ComfyUI's."""
    try:
        return _run(library, described, parameters, values, hidden)
    except OSError as error:
        # Of the folders around it: the library tells of its own files itself.
        reason = error.strerror or str(error)
        place = error.filename2 or error.filename or "what the node writes"
        raise ConceptloomError(
            f"{place} cannot be written: {reason}; make room there, and queue the same graph again: what was learned so far is kept"
        ) from error


def _run(library, described, parameters, values, hidden):
    inputs = {socket["name"]: values.get(socket["name"]) for socket in described["inputs"]}
    inputs = {name: value for name, value in inputs.items() if value is not None}
    key = _key(library, described["class"], parameters, inputs)
    with work(key, inputs.values()) as own, folders.staging() as staged:
        output_dir = staged if described["output_node"] else folder_paths.get_output_directory()
        services = Services(hidden.unique_id, output_dir, own.folder, _metadata(hidden))
        outputs = _run_twice(library, described, inputs, parameters, services)
        for index, value in enumerate(outputs):
            if isinstance(value, Reference):
                value.key = f"{key}.{index}"
        outputs = [_where_comfyui_keeps_it(value) for value in outputs]
        if not described["output_node"]:
            own.keep_for(outputs)
            return io.NodeOutput(*outputs)
        saved = folders.put_in_place(services.saved, staged)
        embeddings = [f"embedding:{name}" for name in saved.embeddings]
        text = "\n".join(saved.lines())
        services.show(text)
        return io.NodeOutput(*outputs, embeddings, _lora(saved), ui={"text": [text]})


def _run_twice(library, described, inputs, parameters, services):
    """Once more without ComfyUI's own models if memory runs out."""
    for attempt in (1, 2):
        try:
            outputs = library.run(described["class"], inputs, parameters, services.table)
            services.pass_cancellation_on()
            return outputs
        except Failed as error:
            if error.code == contract.CANCELED:
                services.raise_cancellation()
            # What a node saved is only a draft if it is an output node, and would be there twice otherwise.
            is_final = attempt == 2 or (services.saved and not described["output_node"])
            if error.code != contract.OUT_OF_MEMORY or is_final:
                raise ConceptloomError(folders.readable(str(error))) from None
            if services.saved:
                folders.empty(services.output_dir)
                services.saved.clear()
            comfy.model_management.unload_all_models()
            comfy.model_management.soft_empty_cache()


def _where_comfyui_keeps_it(value):
    """Values between nodes are on one device, which stock nodes count on: no copy if it is this one."""
    return value.to(comfy.model_management.intermediate_device()) if hasattr(value, "to") else value


def _lora(saved):
    if saved.loras:
        return saved.loras[0]
    from comfy_execution.graph_utils import ExecutionBlocker

    return ExecutionBlocker("no LoRA was saved: link a model that was tuned as one")


def _metadata(hidden):
    """What files carry so that an editor restores their graph."""
    if comfy.cli_args.args.disable_metadata:
        return {}
    texts = {"prompt": hidden.prompt, **(hidden.extra_pnginfo or {})}
    return {name: json.dumps(value) for name, value in texts.items() if value}


def _key(library, class_name, parameters, inputs):
    """Differs where a run would be another one, and is the same in another process: of the library, of what the parameters name,
    and of how the inputs came about."""
    values = {name: value.key if isinstance(value, Reference) else _digest(value) for name, value in inputs.items()}
    files = library.fingerprint(class_name, parameters)
    text = json.dumps([library.build, class_name, parameters, files, values], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _digest(value):
    return tensors.digest(value) if hasattr(value, "__dlpack__") else repr(value)
