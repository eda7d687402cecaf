"""Which pre-processing a model wants: declared on the command line, never guessed."""

from __future__ import annotations

from pathlib import Path

import msgspec

from edge_runtime.contract.errors import ConfigError, ContractError
from edge_runtime.contract.preprocess import NAMED, Preprocess, ResizeExact, named

__all__ = ["KERAS_MODES", "declared", "keras_mode"]

# The mode of each keras.applications family's preprocess_input; "raw": it takes 0..255 and
# scales inside the model. Longest prefix wins.
KERAS_MODES: dict[str, str] = {
    "ConvNeXt": "raw",
    "DenseNet": "torchvision",
    "EfficientNet": "raw",
    "EfficientNetV2": "raw",
    "InceptionResNetV2": "tf",
    "InceptionV3": "tf",
    "MobileNet": "tf",
    "MobileNetV2": "tf",
    "MobileNetV3": "raw",
    "NASNet": "tf",
    "ResNet": "caffe",
    "ResNet50V2": "tf",
    "ResNet101V2": "tf",
    "ResNet152V2": "tf",
    "VGG": "caffe",
    "Xception": "tf",
}


def keras_mode(application: str) -> str | None:
    """The pre-processing name of a Keras application; None for one not known."""
    matches = [prefix for prefix in KERAS_MODES if application.startswith(prefix)]
    return KERAS_MODES[max(matches, key=len)] if matches else None


def declared(
    choice: str,
    *,
    height: int | None,
    width: int | None,
    resize_size: int | None,
    squeeze: bool = False,
) -> Preprocess:
    """The record for ``--preprocess CHOICE``: one of ``NAMED``, or a TOML file.

    ``squeeze``: without a ``resize_size`` the whole photo goes in, its aspect ratio
    changed, instead of its center; boxes and masks cover all of it then. Raises
    ``ConfigError``, with the list of names or the offending key.
    """
    if choice in NAMED:
        if height is None or width is None:
            raise ConfigError(f"--preprocess {choice} needs --input-size: pixels of the input")
        try:
            if squeeze and resize_size is None:
                color, normalization = NAMED[choice]
                return Preprocess(
                    resize=ResizeExact(height=height, width=width),
                    color=color,
                    normalization=normalization,
                )
            return named(choice, height, width, resize_shorter=resize_size)
        except ContractError as error:
            raise ConfigError(f"--preprocess {choice}: {error.detail}") from None
    path = Path(choice)
    if path.suffix != ".toml":
        raise ConfigError(
            f"--preprocess {choice!r} is no known name ({', '.join(NAMED)}) and no .toml file"
        )
    try:
        record = msgspec.toml.decode(path.read_bytes(), type=Preprocess)
        record.check()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {error}: see docs/preprocessing.md for the keys") from None
    except (msgspec.DecodeError, UnicodeDecodeError, ContractError) as error:
        raise ConfigError(f"{path}: {error}") from None
    if (height, width) != (None, None) and record.size != (height, width):
        raise ConfigError(f"{path} gives {record.size}, --input-size {height}x{width}")
    return record
