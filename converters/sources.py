"""Build the trained model that a SOURCE names. Runs in a child process only.

Every source becomes a ``torch.nn.Module`` in eval mode, float32 NCHW in; Keras models run
on Keras's torch backend in ``channels_first`` form, so that one path leads to all formats.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import random
import sys
from pathlib import Path
from typing import Any

from converters.jobs import SourceRequest
from converters.preprocessing import declared, keras_mode
from converters.weights import load_into
from edge_runtime.contract import limits
from edge_runtime.contract.errors import ConfigError, SourceError, WeightsUnavailable
from edge_runtime.contract.preprocess import CenterCrop, Normalization, Preprocess, named
from edge_runtime.contract.preprocess import ResizeShorterSide as ShorterSide
from edge_runtime.contract.tasks.classification import Activation

__all__ = ["Source", "load_source", "read_labels_file"]


@dataclasses.dataclass(kw_only=True)
class Source:
    """A built model and what is known about it."""

    module: Any
    preprocess: Preprocess
    labels: tuple[str, ...] | None
    activation: Activation
    temperature: float
    weights: str
    weights_sha256: str | None
    source_sha256: str | None


@dataclasses.dataclass(kw_only=True)
class _Built:
    """What a kind of source knows by itself."""

    module: Any
    preprocess: Preprocess | None = None
    labels: tuple[str, ...] | None = None
    activation: Activation = "softmax"
    temperature: float = 1.0
    weights: str | None = None
    weights_sha256: str | None = None
    source_sha256: str | None = None


def load_source(request: SourceRequest) -> Source:
    """Build the model and load its weights.

    Raises:
        ConfigError: the request lacks or contradicts something.
        SourceError: the model cannot be built.
        WeightsMismatch, WeightsUnavailable: see ``contract/errors.py``.
    """
    import torch

    labels = read_labels_file(Path(request.labels)) if request.labels else None
    kind, _, name = request.source.partition(":")
    seed = _random_seed(request.weights)
    # Every child process builds the model anew and must get the same one.
    torch.manual_seed(seed or 0)
    random.seed(seed or 0)
    if kind == "torchvision":
        built = _torchvision(name, request, labels)
    elif kind == "keras":
        built = _keras(name, request, labels)
    elif kind == "zoo":
        built = _zoo(name, request)
    elif request.source.rpartition(":")[0].endswith(".py"):
        built = _python_file(request)
    else:
        raise SourceError(
            f"source {request.source!r} is none of torchvision:NAME, keras:NAME, zoo:NAME, "
            "FILE.py:CALLABLE"
        )
    built.module.eval()
    for parameter in built.module.parameters():
        parameter.requires_grad_(False)
    if built.weights is None:
        built.weights, built.weights_sha256 = _load_weights(built.module, request, seed)
    return Source(
        module=built.module,
        preprocess=_preprocess(request, built.preprocess),
        labels=labels if labels is not None else built.labels,
        activation=request.activation or built.activation,
        temperature=request.temperature or built.temperature,
        weights=built.weights,
        weights_sha256=built.weights_sha256,
        source_sha256=built.source_sha256,
    )


def read_labels_file(path: Path) -> tuple[str, ...]:
    """One class name a line, UTF-8. Raises ``ConfigError``."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read labels file {path}: {error}") from None
    while lines and not lines[-1].strip():
        lines.pop()
    if not 2 <= len(lines) <= limits.MAX_LABELS:
        raise ConfigError(f"{path} has {len(lines)} labels; 2 to {limits.MAX_LABELS} are needed")
    for number, line in enumerate(lines, 1):
        if not line.strip() or len(line) > limits.MAX_LABEL_CHARS:
            raise ConfigError(f"{path}, line {number}: a label is empty or too long")
    return tuple(lines)


def _random_seed(weights: str | None) -> int | None:
    if weights is None or not weights.startswith("random:"):
        return None
    number = weights.removeprefix("random:")
    if not number.isdigit():
        raise ConfigError(f"--weights {weights}: write random:SEED with a whole number")
    return int(number)


def _preprocess(request: SourceRequest, own: Preprocess | None) -> Preprocess:
    height, width = request.input_height, request.input_width
    if request.preprocess is None:
        if own is None:
            raise ConfigError(
                "declare how photos become the model's input: --preprocess "
                "torchvision|tf|caffe|unit|raw|FILE.toml with --input-size"
            )
        if height is not None and own.size != (height, width):
            raise ConfigError(
                f"the source brings its own pre-processing for {own.size[0]}x{own.size[1]}: "
                "leave --input-size out, or declare --preprocess as well"
            )
        return own
    if height is None and own is not None:
        height, width = own.size
    return declared(request.preprocess, height=height, width=width, resize_size=request.resize_size)


def _load_weights(module: Any, request: SourceRequest, seed: int | None) -> tuple[str, str | None]:
    if request.weights is None:
        raise ConfigError(
            "no weights: pass --weights FILE, DEFAULT (download), or random:SEED to try things out"
        )
    if seed is not None:
        return request.weights, None
    if request.weights == "DEFAULT":
        raise ConfigError(f"{request.source} has no weights of its own: pass --weights FILE")
    path = Path(request.weights)
    return path.name, load_into(module, path)


def _offline(what: str, error: Exception) -> WeightsUnavailable:
    reason = str(error).strip().split("\n", 1)[0][:200]
    return WeightsUnavailable(
        f"{what} is not in the local cache and cannot be downloaded ({reason}): "
        "fetch it where there is a network and pass it as --weights FILE"
    )


def _torchvision(name: str, request: SourceRequest, labels: tuple[str, ...] | None) -> _Built:
    import torchvision

    if name not in torchvision.models.list_models(torchvision.models):
        raise SourceError(
            f"torchvision has no classification model {name!r}: see "
            "torchvision.models.list_models(torchvision.models)"
        )
    enum = torchvision.models.get_model_weights(name)
    choice = request.weights or ""
    if choice == "DEFAULT" or choice in enum.__members__:
        entry = enum[choice]
        try:
            module = torchvision.models.get_model(name, weights=entry)
        except OSError as error:  # URLError is one
            raise _offline(f"torchvision:{name} weights {entry.name}", error) from None
        own = None if request.preprocess else _torchvision_preprocess(entry)
        return _Built(
            module=module,
            preprocess=own,
            labels=tuple(entry.meta["categories"]),
            weights=f"torchvision {entry.name}",
        )
    options: dict[str, Any] = {}
    if labels is not None:
        options["num_classes"] = len(labels)
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    return _Built(module=torchvision.models.get_model(name, weights=None, **options))


def _torchvision_preprocess(entry: Any) -> Preprocess:
    preset = entry.transforms()
    if preset.interpolation.value != "bilinear":
        raise ConfigError(
            f"{entry} was trained with {preset.interpolation.value} resizing, which nearfar "
            "does not have: declare --preprocess torchvision --input-size N to use bilinear"
        )
    record = Preprocess(
        resize=ShorterSide(size=int(preset.resize_size[0])),
        crop=CenterCrop(height=int(preset.crop_size[0]), width=int(preset.crop_size[0])),
        normalization=Normalization(scale=255.0, mean=tuple(preset.mean), std=tuple(preset.std)),
    )
    record.check()
    return record


def _keras(name: str, request: SourceRequest, labels: tuple[str, ...] | None) -> _Built:
    import keras

    application = getattr(keras.applications, name, None)
    if not callable(application) or not name[:1].isupper():
        raise SourceError(f"keras.applications has no model {name!r}: names are as MobileNetV2")
    keras.utils.set_random_seed(_random_seed(request.weights) or 0)
    keras.config.set_image_data_format("channels_first")
    height, width = request.input_height, request.input_width
    size = (3, height, width) if height is not None else None
    choice = request.weights or ""
    options: dict[str, Any] = {"classifier_activation": None, "input_shape": size}
    if labels is not None and choice != "DEFAULT":
        options["classes"] = len(labels)
    try:
        model = application(weights="imagenet" if choice == "DEFAULT" else None, **options)
    except OSError as error:
        raise _offline(f"keras:{name} weights", error) from None
    except Exception as error:  # keras wraps a failed download in a plain Exception
        if "URL fetch failure" in str(error):
            raise _offline(f"keras:{name} weights", error) from None
        raise SourceError(f"keras.applications.{name}: {error}") from None
    shape = model.input_shape
    if None in shape[1:]:
        raise ConfigError(f"keras:{name} takes any size: pass --input-size")
    mode = keras_mode(name)
    own = named(mode, shape[2], shape[3]) if mode is not None else None
    built = _Built(module=_as_torch(model), preprocess=own)
    if choice == "DEFAULT":
        built.weights = "keras imagenet"
    elif choice and _random_seed(choice) is None:
        built.weights, built.weights_sha256 = _load_keras_weights(model, Path(choice))
    return built


def _load_keras_weights(model: Any, path: Path) -> tuple[str, str]:
    from edge_runtime.contract.errors import WeightsMismatch

    if not path.is_file():
        raise SourceError(f"weights file {path} does not exist: check --weights")
    try:
        model.load_weights(str(path))
    except Exception as error:  # h5py and keras raise many types
        reason = str(error).strip().split("\n", 1)[0][:300]
        raise WeightsMismatch(
            f"{path.name} does not fit the Keras model: {reason}. Pass .weights.h5 of this model"
        ) from None
    return path.name, hashlib.sha256(path.read_bytes()).hexdigest()


def _as_torch(model: Any) -> Any:
    """A Keras model on the torch backend as a plain module, inference only."""
    import torch

    class KerasModel(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, image: Any) -> Any:
            return self.model(image, training=False)

    return KerasModel()


def _zoo(name: str, request: SourceRequest) -> _Built:
    from converters.worker import report_progress
    from converters.zoo import ZOO

    entry = ZOO.get(name)
    if entry is None:
        raise SourceError(f"the zoo has no model {name!r}; it has {', '.join(sorted(ZOO))}")
    module = entry.build()
    built = _Built(module=module, preprocess=entry.preprocess, labels=entry.labels)
    if request.weights in (None, "DEFAULT"):
        path = entry.weights_path(
            lambda message, done, total: report_progress(message, done, total)
        )
        built.weights = f"zoo:{name}"
        built.weights_sha256 = load_into(module, path)
        built.temperature = entry.temperature()
    return built


def _python_file(request: SourceRequest) -> _Built:
    import torch

    file_name, _, attribute = request.source.rpartition(":")
    path = Path(file_name)
    if not path.is_file():
        raise SourceError(f"source file {path} does not exist")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise SourceError(f"{path} is no Python file")
    loaded = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    sys.modules[path.stem] = loaded
    try:
        spec.loader.exec_module(loaded)
        factory = getattr(loaded, attribute, None)
        if not callable(factory):
            raise SourceError(f"{path.name} has no callable {attribute!r}")
        module = factory()
    except SourceError:
        raise
    except Exception as error:  # the user's own code
        raise SourceError(
            f"{path.name}:{attribute} failed: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(module, torch.nn.Module):
        raise SourceError(f"{path.name}:{attribute} returned {type(module).__name__}, no nn.Module")
    return _Built(
        module=module.float(), source_sha256=hashlib.sha256(path.read_bytes()).hexdigest()
    )
