"""All passes in order, each checked against the module it started from."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from converters.sources.graphs.capture import capture
from converters.sources.graphs.flat import Flat, record_shapes
from converters.sources.graphs.layers import with_layers
from converters.sources.graphs.layout import to_channels_first
from converters.sources.graphs.patterns import find_patterns
from converters.sources.graphs.simplify import drop_identities, fold_constants
from edge_runtime.contract.errors import SourceError
from edge_runtime.contract.tasks.classification import Activation

__all__ = ["as_layers", "flat_as_layers", "without_final_activation"]

_TOLERANCE = 1e-4


def as_layers(module: Any, example: torch.Tensor, original: Any = None) -> fx.GraphModule:
    """``module`` as ``nn`` layers, channels first, for any batch size.

    ``example``: a batch of two of its input, not blank. The result answers as ``original``
    (default: ``module``) within 1e-4 of the answer's range, in batches of one and two.
    Raises ``SourceError``.
    """
    return flat_as_layers(capture(module, example), example, original or module)


def flat_as_layers(flat: Flat, example: torch.Tensor, original: Any) -> fx.GraphModule:
    """The same from a captured graph; ``original`` says what is right."""
    record_shapes(flat, example)
    drop_identities(flat)
    fold_constants(flat)
    record_shapes(flat, example)
    to_channels_first(flat)
    record_shapes(flat, example)
    drop_identities(flat)
    find_patterns(flat)
    record_shapes(flat, example)
    layers = with_layers(flat)
    with torch.no_grad():
        _check(original(example), layers(example))
        _check(layers(example[:1]), layers(example), rows=1)
    return layers


def _leaves(answer: Any) -> list[torch.Tensor]:
    if isinstance(answer, torch.Tensor):
        return [answer]
    values = answer.values() if isinstance(answer, dict) else answer
    return [leaf for value in values for leaf in _leaves(value)]


def _check(before: Any, after: Any, rows: int | None = None) -> None:
    for one, two in zip(_leaves(before), _leaves(after), strict=True):
        if rows is not None:
            two = two[:rows]
        if one.shape != two.shape:
            raise SourceError(f"the program answers {list(two.shape)}, its model {list(one.shape)}")
        scale = float(one.abs().max()) or 1.0
        error = float((one - two).abs().max()) / scale
        if not error <= _TOLERANCE:  # catches NaN
            raise SourceError(
                f"turning the program into layers changed its answer by {error:.1e} of its "
                "range: report this model"
            )


def without_final_activation(layers: fx.GraphModule) -> Activation | None:
    """Take a last softmax or sigmoid off a classifier, in place, and say which it was.

    Probabilities in int8 lose all but a few classes: a step is 1/256; logits do not.
    """
    output = next(node for node in layers.graph.nodes if node.op == "output")
    last = output.args[0]
    if not isinstance(last, fx.Node):
        return None
    activation: Activation
    if last.op == "call_function" and last.target is torch.softmax:
        if last.kwargs.get("dim") not in (1, -1):
            return None
        activation = "softmax"
    elif last.op == "call_module" and isinstance(
        layers.get_submodule(str(last.target)), torch.nn.Sigmoid
    ):
        activation = "sigmoid"
    else:
        return None
    last.replace_all_uses_with(last.args[0])
    layers.graph.erase_node(last)
    layers.delete_all_unused_submodules()
    layers.recompile()
    return activation
