"""The zoo's small net with what converters get wrong, as SOURCE: ``padded_digits.py:net``."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from converters.zoo.nets import DigitsSmall

__all__ = ["net", "save_weights"]

_STRIDED = 8
_CAPPED = (2, 6)


def net() -> nn.Module:
    """The first two ReLUs are ReLU6, and the strided convolution pads one pixel at the right
    and the bottom only, as TensorFlow's "SAME" does. ``[N, 3, 32, 32]`` to ``[N, 10]``."""
    module = DigitsSmall()
    for index in _CAPPED:
        module.features[index] = nn.ReLU6()
    strided = nn.Conv2d(24, 48, 3, stride=2, bias=False)
    module.features[_STRIDED] = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), strided)
    return module.eval()


def save_weights(path: Path) -> None:
    """The zoo's trained weights under this net's names, as safetensors."""
    from safetensors.torch import save_file

    from converters.jobs import SourceRequest
    from converters.sources import load_source

    trained = load_source(SourceRequest(source="zoo:digits-small")).module.state_dict()
    old, new = f"features.{_STRIDED}.", f"features.{_STRIDED}.1."
    save_file({name.replace(old, new): value for name, value in trained.items()}, str(path))
