"""Bring the weights that ``convert`` would choose for int8 back into the unfolded model.

``convert`` folds batch norms, then picks each layer's integers and corrects its bias
(``rewrites/rounding.py``). Here the same result is written as weights of the module as its
source builds it: with s = g / sqrt(v + e) of the batch norm behind a layer, W = W' / s and
h = b' - (b - m) s. The module then answers as the folded one, and its weights lie on the
int8 grid already, so a later conversion keeps them as they are.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from converters.restore.tape import record
from converters.rewrites.fold import check_equal, fold_batch_norm
from converters.rewrites.rounding import round_weights

__all__ = ["round_unfolded"]

_LEAST_GAIN = 1e-6
"""A channel whose batch norm multiplies by less is dead: its weight stays as it is."""


def round_unfolded(module: nn.Module, samples: torch.Tensor) -> int:
    """Choose int8 weights on ``samples`` ``[N, C, H, W]`` and put them in, in place.

    Corrections of a bias that the module has not (no bias, no batch norm) are left out.
    Returns how many layers were rounded.
    """
    with torch.no_grad():
        tape = record(module, samples[:1])
        norms = {
            call.layer: after.norm
            for call in tape.calls
            if call.layer is not None and (after := tape.norm_after(call.index)) is not None
        }
        chosen = copy.deepcopy(module)
        fold_batch_norm(chosen, samples[:2])
        rounded = round_weights(chosen, samples)
        wanted = chosen(samples[:2])
        state = module.state_dict()
        layers = {name: layer for name, layer in chosen.named_modules() if name in tape.layers}
        exact = True
        for name, layer in layers.items():
            norm = norms.get(name)
            folded = norm is not None and _is_folded(chosen, str(norm["running_mean"]))
            exact &= _write_back(state, name, layer, norm, folded)
        if exact:
            check_equal("round_unfolded", wanted, module(samples[:2]), tolerance=1e-3)
    return rounded


def _is_folded(model: nn.Module, tensor: str) -> bool:
    return isinstance(model.get_submodule(tensor.rpartition(".")[0]), nn.Identity)


def _write_back(
    state: dict[str, torch.Tensor],
    name: str,
    layer: nn.Module,
    norm: object,
    folded: bool,
) -> bool:
    """Whether all of ``layer`` could be written into ``state``, whose tensors are the model's."""
    weight, bias = layer.get_parameter("weight"), layer.bias
    own_bias = state.get(f"{name}.bias")
    if not isinstance(norm, dict) or "bias" not in norm:
        if own_bias is not None and bias is not None:
            own_bias.copy_(bias)
        state[f"{name}.weight"].copy_(weight)
        return bias is None or own_bias is not None
    mean, variance = state[str(norm["running_mean"])], state[str(norm["running_var"])]
    gain = torch.rsqrt(variance.double() + float(norm["eps"]))
    if "weight" in norm:
        gain = gain * state[str(norm["weight"])].double()
    alive = gain.abs() > _LEAST_GAIN
    shape = (-1,) + (1,) * (weight.dim() - 1)
    before = own_bias.double() if own_bias is not None else torch.zeros_like(gain)
    shift = state[str(norm["bias"])]
    if folded:
        unfolded = weight.double() / torch.where(alive, gain, 1.0).reshape(shape)
        kept = state[f"{name}.weight"].double()
        state[f"{name}.weight"].copy_(torch.where(alive.reshape(shape), unfolded, kept))
        corrected = bias.double() - (before - mean.double()) * gain
        shift.copy_(torch.where(alive, corrected, shift.double()))
    else:
        state[f"{name}.weight"].copy_(weight)
        after = bias.double() if bias is not None else before
        shift.copy_(shift.double() + (after - before) * gain)
    return True
