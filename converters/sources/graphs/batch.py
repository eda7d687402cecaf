"""Programs that somebody else exported: often for a batch of one, which is then set free."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from converters.sources.graphs.build import as_layers
from converters.sources.graphs.capture import flatten_program
from converters.sources.graphs.flat import Flat, opname
from edge_runtime.contract.errors import SourceError

__all__ = ["ProgramModule", "saved_as_layers"]

_RESHAPES = frozenset({"_unsafe_view", "expand", "reshape", "view"})


class ProgramModule(nn.Module):
    """An ``ExportedProgram`` as a module, without the guards on its input's shape."""

    def __init__(self, program: Any) -> None:
        super().__init__()
        self._program = [program]  # hidden from nn.Module: its tensors are not ours to move
        self.flat = flatten_program(program)
        self.graph_module = self.flat.module()

    def forward(self, image: torch.Tensor) -> Any:
        """The program's own answer."""
        return self.graph_module(image)


def saved_as_layers(module: Any, example: torch.Tensor) -> fx.GraphModule:
    """A ``ProgramModule`` or ``ScriptModule`` as ``nn`` layers for any batch size.

    A program for a batch of one is changed wherever it names that one, and must then answer
    each image of ``example`` as it answers it alone. Raises ``SourceError``.
    """
    alone = _answers_alone(module, example)
    if isinstance(module, torch.jit.ScriptModule):
        flat = _from_script(module, example)
    else:
        flat = module.flat
    failures = []
    for freed in (False, True):
        if freed:
            _free_batch(flat)
        candidate = _Checked(flat.module(), alone)
        try:
            return as_layers(candidate.inner, example, candidate)
        except SourceError as error:
            failures.append(error)
    raise SourceError(
        f"the program works for a batch of one only ({failures[-1].detail}): export it with a "
        "dynamic batch axis"
    )


class _Checked(nn.Module):
    """Gives the answers known beforehand, to compare with."""

    def __init__(self, inner: nn.Module, answer: Any) -> None:
        super().__init__()
        self.inner = inner
        self.answer = answer

    def forward(self, image: torch.Tensor) -> Any:
        return self.answer


def _answers_alone(module: Any, example: torch.Tensor) -> Any:
    """The answer for each image by itself, put together again."""
    with torch.no_grad():
        answers = [module(example[row : row + 1]) for row in range(example.shape[0])]
    return _join(answers)


def _join(answers: list[Any]) -> Any:
    first = answers[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(answers)
    if isinstance(first, dict):
        return {str(key): _join([answer[key] for answer in answers]) for key in first}
    if isinstance(first, tuple | list):
        return tuple(_join([answer[k] for answer in answers]) for k in range(len(first)))
    raise SourceError(f"the program answers a {type(first).__name__}: tensors are needed")


def _from_script(module: Any, example: torch.Tensor) -> Flat:
    from torch._export.converter import TS2EPConverter

    failure: Exception | None = None
    for rows in (example.shape[0], 1):
        try:
            with torch.no_grad():
                program = TS2EPConverter(module, (example[:rows],)).convert()
            return flatten_program(program)
        except SourceError:
            raise
        except Exception as error:  # torch raises many types
            failure = error
    text = (str(failure).strip() or type(failure).__name__).splitlines()[0][:300]
    raise SourceError(
        f"torch cannot turn this TorchScript into a graph ({type(failure).__name__}: {text}): "
        "pass the model's code as FILE.py:CALLABLE instead"
    )


def _free_batch(flat: Flat) -> None:
    """Let every reshape that names batch 1 take the batch from the image."""
    for node in list(flat.graph.nodes):
        if opname(node) not in _RESHAPES:
            continue
        sizes = list(node.args[1])
        if not sizes or sizes[0] != 1:
            continue
        source = node.args[0]
        if flat.constant(source) is not None:
            continue
        image = next(other for other in flat.graph.nodes if other.op == "placeholder")
        batch: Any = -1
        if -1 in sizes or opname(node) == "expand":
            batch = flat.call(node, torch.ops.aten.sym_size.int, image, 0)
        node.update_arg(1, [batch, *sizes[1:]])
