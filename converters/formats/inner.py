"""The source's own net inside what is converted: quantizers touch that and nothing around.

Around it may lie the normalization of pixels, and NMS or argmax: their numbers need float.
"""

from __future__ import annotations

import copy
import difflib
from typing import Any

from edge_runtime.contract.errors import ConfigError

__all__ = ["fold_inner", "inner_module", "is_post_processed", "kept_modules", "replace_inner"]


def _is_wrapper(module: Any) -> bool:
    from converters.rewrites.bake import BakedInput
    from converters.rewrites.in_graph import ArgmaxMask, NmsDetector

    return isinstance(module, BakedInput | ArgmaxMask | NmsDetector)


def inner_module(module: Any) -> Any:
    """The net itself; module names below it are those of the source."""
    while _is_wrapper(module):
        module = module.model
    return module


def replace_inner(module: Any, inner: Any) -> Any:
    """``module`` with another net inside; the original stays as it is."""
    if not _is_wrapper(module):
        return inner
    wrapper = copy.copy(module)
    wrapper._modules = dict(module._modules)
    wrapper.model = replace_inner(module.model, inner)
    return wrapper


def kept_modules(inner: Any, keep: tuple[str, ...]) -> tuple[str, ...]:
    """Those of ``keep`` that have weights. Raises ``ConfigError`` for a name there is not."""
    modules = dict(inner.named_modules(remove_duplicate=False))
    for name in keep:
        if name not in modules or not name:
            known = [own for own, one in modules.items() if own and len(list(one.parameters()))]
            near = difflib.get_close_matches(name, known, n=5, cutoff=0.5) or known[:5]
            hint = f"; there are {', '.join(near)}" if near else ""
            raise ConfigError(f"--keep {name}: the model has no module of this name{hint}")
    return tuple(name for name in keep if next(modules[name].parameters(), None) is not None)


def fold_inner(module: Any, shape: tuple[int, ...]) -> int:
    """Fold the batch norms of the net inside ``module``, in place; returns how many.

    ``shape``: of the net's input. Raises ``ConversionError`` when the answer changed.
    """
    import torch

    from converters.rewrites.fold import fold_batch_norm

    generator = torch.Generator().manual_seed(0)
    return fold_batch_norm(inner_module(module), torch.rand(shape, generator=generator))


def is_post_processed(module: Any) -> bool:
    """Whether NMS or argmax follow the net: the file's outputs are not the net's."""
    from converters.rewrites.in_graph import ArgmaxMask, NmsDetector

    while _is_wrapper(module):
        if isinstance(module, ArgmaxMask | NmsDetector):
            return True
        module = module.model
    return False
