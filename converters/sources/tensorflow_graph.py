"""A frozen TensorFlow graph as a torch graph.

Values stay in TensorFlow's channels-last order; each convolution or pool permutes its input
to channels first and its output back. The passes of ``graphs/`` then move the whole graph
to channels first and give it its layers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import fx

from converters.sources.graphs.flat import Flat
from converters.sources.tensorflow_ops import OPERATORS, Node, Unsupported
from converters.tasks import OUTPUT_NAMES
from edge_runtime.contract.errors import SourceError
from edge_runtime.contract.tasks import TaskName

__all__ = ["read_frozen"]

_ALIASES = frozenset({"CheckNumerics", "Identity", "PreventGradient", "Snapshot", "StopGradient"})


def read_frozen(folder: Path, task: TaskName) -> tuple[Flat, tuple[int, int] | None]:
    """``graph.json`` and ``constants.safetensors`` as a graph, images channels first.

    Outputs come in the order of ``OUTPUT_NAMES`` where the model uses those names. Returns
    the input's height and width too. Raises ``SourceError`` for an operator that is not
    known.
    """
    from safetensors.torch import load_file

    document = json.loads((folder / "graph.json").read_text())
    constants = load_file(str(folder / "constants.safetensors"))
    importer = _Importer(document, constants)
    try:
        flat = importer.run(task)
    except Unsupported as error:
        raise SourceError(
            f"this SavedModel has {error}, which nearfar does not know: save the model as "
            ".keras instead, or leave that step out"
        ) from None
    shape = document["input_shape"]
    return flat, ((shape[1], shape[2]) if len(shape) == 4 else None)


class _Importer:
    def __init__(self, document: dict[str, Any], constants: dict[str, torch.Tensor]) -> None:
        self.document = document
        self.constants = constants
        self.nodes = {node["name"]: node for node in document["nodes"]}
        self.flat = Flat(graph=fx.Graph(), tensors={}, origins={})
        self.values: dict[str, Any] = {}

    def run(self, task: TaskName) -> Flat:
        graph = self.flat.graph
        image = graph.placeholder("image")
        rank = len(self.document["input_shape"])
        name = _tensor(self.document["input"])
        self.values[name] = self._permute(image, [0, 2, 3, 1]) if rank == 4 else image
        outputs = list(zip(self.document["output_names"], self.document["outputs"], strict=True))
        wanted = OUTPUT_NAMES[task]
        if {key for key, _ in outputs} == set(wanted):
            outputs.sort(key=lambda pair: wanted.index(pair[0]))
        answers = [self._answer(tensor) for _, tensor in outputs]
        graph.output(answers[0] if len(answers) == 1 else tuple(answers))
        self.flat.clean()
        return self.flat

    def _permute(self, source: Any, order: list[int]) -> Any:
        return self.flat.graph.call_function(torch.ops.aten.permute.default, (source, order))

    def _answer(self, tensor: str) -> Any:
        value = self._value(tensor)
        if not isinstance(value, fx.Node):
            raise SourceError("the SavedModel answers a constant")
        return self._permute(value, [0, 3, 1, 2]) if len(self._shape(tensor) or ()) == 4 else value

    def _shape(self, tensor: str) -> list[int | None] | None:
        name = _tensor(tensor)
        operation, _, index = name.partition(":")
        shapes: list[list[int | None] | None] = self.nodes[operation]["shapes"]
        return shapes[int(index)]

    def _value(self, tensor: str) -> Any:
        """The torch node of a tensor; built from the inputs on, without recursion."""
        name = _tensor(tensor)
        stack = [name]
        while stack:
            current = stack[-1]
            if current in self.values:
                stack.pop()
                continue
            record = self.nodes[current.partition(":")[0]]
            missing = [key for key in self._needed(record) if key not in self.values]
            if missing:
                stack.extend(missing)
                continue
            self._build(record)
            stack.pop()
        return self.values[name]

    def _needed(self, record: dict[str, Any]) -> list[str]:
        """Inputs that are computed; shapes and axes are read from constants instead."""
        if record["op"] in _ALIASES:
            return [_tensor(record["inputs"][0])]
        rule = OPERATORS.get(record["op"])
        count = rule.inputs if rule is not None else ()
        keys = [_tensor(tensor) for tensor in record["inputs"]]
        return keys if count is None else [keys[index] for index in count]

    def _build(self, record: dict[str, Any]) -> None:
        name, operation = record["name"], record["op"]
        if operation == "Const":
            self.values[f"{name}:0"] = self._constant(name)
            return
        if operation in _ALIASES:
            self.values[f"{name}:0"] = self.values[_tensor(record["inputs"][0])]
            return
        rule = OPERATORS.get(operation)
        if rule is None:
            raise Unsupported(f"the operator {operation} ({name})")
        inputs = [self.values.get(_tensor(tensor)) for tensor in record["inputs"]]
        node = Node(
            name=name,
            flat=self.flat,
            inputs=inputs,
            input_shapes=[self._shape(tensor) for tensor in record["inputs"]],
            shapes=record["shapes"],
            attributes=record["attributes"],
            constants=[self._known(tensor) for tensor in record["inputs"]],
        )
        answer = rule.build(node)
        answers = answer if isinstance(answer, list) else [answer]
        for index, value in enumerate(answers):
            self.values[f"{name}:{index}"] = value

    def _constant(self, name: str) -> Any:
        value = self.constants.get(name)
        if value is None:
            raise Unsupported(f"a constant that is no number ({name})")
        if value.dtype in (torch.float16, torch.float64, torch.bfloat16):
            value = value.float()
        self.flat.tensors[f"c{len(self.flat.tensors)}"] = value
        target = f"c{len(self.flat.tensors) - 1}"
        self.flat.origins[target] = name
        return self.flat.graph.create_node("get_attr", target)

    def _known(self, tensor: str) -> torch.Tensor | None:
        """The value behind an input, where it is constant."""
        record = self.nodes[_tensor(tensor).partition(":")[0]]
        while record["op"] in _ALIASES:
            record = self.nodes[_tensor(record["inputs"][0]).partition(":")[0]]
        return self.constants.get(record["name"]) if record["op"] == "Const" else None


def _tensor(name: str) -> str:
    return name if ":" in name else f"{name}:0"
