"""Find the classifier layer of a net, and put one for other classes in its place."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from edge_runtime.contract.errors import SourceError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["find_head", "replace_head", "with_new_head"]


def find_head(module: nn.Module, example: Any) -> tuple[str, int]:
    """Name of the ``Linear`` or ``Conv2d`` whose outputs are the classes, and their number.

    ``module``: in eval mode; ``example``: an input batch. The layers that ran and have as
    many outputs as the answer has classes are tried, the last one first: a head is one
    whose replacement by a layer with another number of outputs changes the answer's width
    to that number. Raises ``SourceError`` when none is found, or the answer is no
    ``[B, classes]``.
    """
    import torch
    from torch import nn

    ran: list[str] = []
    hooks = [
        layer.register_forward_hook(lambda _m, _i, _o, name=name: ran.append(name))
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    ]
    try:
        with torch.no_grad():
            answer = module(example)
    finally:
        for hook in hooks:
            hook.remove()
    if not isinstance(answer, torch.Tensor) or answer.dim() != 2:
        shape = list(answer.shape) if isinstance(answer, torch.Tensor) else type(answer).__name__
        raise SourceError(f"a classifier answers [batch, classes], this model {shape}")
    classes = int(answer.shape[1])
    for name in dict.fromkeys(reversed(ran)):
        layer = module.get_submodule(name)
        if _outputs(layer) == classes and _is_head(module, name, example, classes):
            return name, classes
    raise SourceError(
        f"no Linear or Conv2d layer of the model gives its {classes} classes: end it with "
        "one, or pass a callable that builds it with the wanted number of classes"
    )


def _outputs(layer: nn.Module) -> int:
    return int(getattr(layer, "out_features", 0) or getattr(layer, "out_channels", 0))


def _is_head(module: nn.Module, name: str, example: Any, classes: int) -> bool:
    import torch

    original = module.get_submodule(name)
    replace_head(module, name, classes + 1)
    try:
        with torch.no_grad():
            answer = module(example)
    except Exception:  # something behind this layer wants the old width
        return False
    else:
        return isinstance(answer, torch.Tensor) and answer.shape[1:] == (classes + 1,)
    finally:
        _set_child(module, name, original)


def replace_head(module: nn.Module, name: str, classes: int) -> None:
    """Put a fresh layer of the same kind with ``classes`` outputs in the place of ``name``.

    Weights are drawn from torch's global generator; the bias starts at zero. Raises
    ``SourceError`` for a layer that is neither ``Linear`` nor an ungrouped ``Conv2d``.
    """
    import torch
    from torch import nn

    old = module.get_submodule(name)
    if isinstance(old, nn.Linear):
        new: nn.Module = nn.Linear(old.in_features, classes, bias=old.bias is not None)
    elif isinstance(old, nn.Conv2d) and old.groups == 1:
        new = nn.Conv2d(
            old.in_channels,
            classes,
            old.kernel_size,
            old.stride,
            old.padding,
            old.dilation,
            bias=old.bias is not None,
            padding_mode=old.padding_mode,
        )
    else:
        raise SourceError(f"{name} is a {type(old).__name__}: no head that can be replaced")
    weight = new.get_parameter("weight")
    with torch.no_grad():
        weight.normal_(0.0, 0.01)
        if new.bias is not None:
            new.get_parameter("bias").zero_()
    _set_child(module, name, new.train(old.training))


def _set_child(root: nn.Module, path: str, child: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, child)


def with_new_head(
    source: str | os.PathLike[str], factory: str, *, head: str, classes: int
) -> nn.Module:
    """The net of ``FILE.py:CALLABLE`` or ``zoo:NAME`` with ``head`` for ``classes`` classes.

    What the ``model.py`` beside fine-tuned weights calls; the weights file fills it.
    ``source``: the Python file and ``factory`` its callable, or ``"zoo"`` and the net's
    name. Raises ``SourceError``.
    """
    if os.fspath(source) == "zoo":
        from converters.zoo import ZOO

        if factory not in ZOO:
            raise SourceError(f"the zoo has no model {factory!r}; it has {', '.join(sorted(ZOO))}")
        module: Any = ZOO[factory].build()
    else:
        from converters.jobs import SourceRequest
        from converters.sources.python_file import build_python_file

        module = build_python_file(
            SourceRequest(source=f"{os.path.abspath(source)}:{factory}")  # noqa: PTH100
        ).module
    replace_head(module, head, classes)
    return module
