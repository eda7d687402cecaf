"""Keras 3 applications and ``.keras`` files, on Keras's torch backend.

The parent sets ``KERAS_BACKEND=torch`` for its child processes; Keras reads it once, when
it is imported. The model is exported from there and becomes ``nn`` layers.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from converters.jobs import SourceRequest
from converters.preprocessing import keras_mode
from converters.sources.keras_files import check_hdf5, check_keras_file
from converters.sources.random_weights import random_seed, set_seed
from converters.sources.torchvision_models import offline
from converters.sources.types import Built, Finished
from converters.weights import check_weights_file, file_digest
from edge_runtime.contract.errors import (
    BackendUnavailable,
    ConfigError,
    SourceError,
    WeightsMismatch,
)
from edge_runtime.contract.preprocess import named

__all__ = ["build_application", "build_keras_file"]


def build_application(name: str, request: SourceRequest, labels: tuple[str, ...] | None) -> Built:
    """``keras.applications.NAME``, channels first, without its softmax.

    Raises ``SourceError``, ``ConfigError``, ``WeightsMismatch``, ``WeightsUnavailable``.
    """
    if request.task != "classification":
        raise ConfigError(f"keras:{name} is for classification: leave --task out")
    keras = _keras()
    application = getattr(keras.applications, name, None)
    if not callable(application) or not name[:1].isupper():
        raise SourceError(f"keras.applications has no model {name!r}: names are as MobileNetV2")
    keras.config.set_image_data_format("channels_first")
    height, width = request.input_height, request.input_width
    size = (3, height, width) if height is not None else None
    choice = request.weights or ""
    options: dict[str, Any] = {"classifier_activation": None, "input_shape": size}
    if labels is not None and choice != "DEFAULT":
        options["classes"] = len(labels)
    set_seed(request.weights)  # Keras and what it imports drew random numbers
    try:
        model = application(weights="imagenet" if choice == "DEFAULT" else None, **options)
    except OSError as error:
        raise offline(f"keras:{name} weights", error) from None
    except Exception as error:  # keras wraps a failed download in a plain Exception
        if "URL fetch failure" in str(error):
            raise offline(f"keras:{name} weights", error) from None
        raise SourceError(f"keras.applications.{name}: {error}") from None
    _mend_average_pools(model)
    shape = model.input_shape
    if None in shape[1:]:
        raise ConfigError(f"keras:{name} takes any size: pass --input-size")
    mode = keras_mode(name)
    built = Built(
        module=_module(model, channels_last=False),
        preprocess=named(mode, shape[2], shape[3]) if mode is not None else None,
        finish=_finish,
    )
    if choice == "DEFAULT":
        built.weights = "keras imagenet"
    elif choice and random_seed(choice) is None:
        built.weights, built.weights_sha256 = _load_weights(model, Path(choice))
    return built


def build_keras_file(path: Path, request: SourceRequest) -> Built:
    """A model saved whole, in either layout; photos still come in channels first.

    Loaded in Keras's safe mode: a file with Python code in it (a ``Lambda`` layer) is
    refused. Raises ``SourceError``, and ``ConfigError`` for weights beside it.
    """
    if request.weights is not None:
        raise ConfigError(f"{path.name} holds its own weights: leave --weights out")
    check_keras_file(path)
    digest = file_digest(path)
    keras = _keras()
    try:
        model = keras.saving.load_model(str(path), compile=False, safe_mode=True)
    except Exception as error:  # keras, h5py and zipfile raise many types
        text = str(error).strip()
        if "safe_mode" in text or "Lambda" in text or "unsafe" in text.lower():
            raise SourceError(
                f"{path.name} holds Python code (a Lambda layer), which could do anything: "
                "replace it by a layer or by keras.ops and save it again"
            ) from None
        if "Could not locate" in text or "register_keras_serializable" in text:
            raise SourceError(
                f"{path.name} has a layer of your own ({_first(error)}): pass FILE.py:CALLABLE "
                "that builds the model instead"
            ) from None
        raise SourceError(
            f"{path.name} is no readable Keras model ({_first(error)}): save it with "
            "model.save('NAME.keras')"
        ) from None
    _mend_average_pools(model)
    if len(model.inputs) != 1:
        raise SourceError(f"{path.name} takes {len(model.inputs)} inputs: nearfar feeds one image")
    shape = tuple(model.inputs[0].shape)
    channels_last = _channels_last(model)
    size = None
    if len(shape) == 4:
        sides = shape[1:3] if channels_last else shape[2:4]
        size = (int(sides[0]), int(sides[1])) if None not in sides else None
    strip = request.task == "classification" and request.activation is None

    def finish(module: Any, input_shape: tuple[int, ...]) -> Finished:
        done = _finish(module, input_shape)
        if strip:
            from converters.sources.graphs.build import without_final_activation

            done.activation = without_final_activation(done.module)
        return done

    return Built(
        module=_module(model, channels_last=channels_last),
        finish=finish,
        size=size,
        weights=path.name,
        weights_sha256=digest,
        source_sha256=digest,
    )


def _keras() -> Any:
    import torchvision  # noqa: F401  # before anything that could load TensorFlow

    os.environ.setdefault("KERAS_BACKEND", "torch")
    import keras

    if keras.config.backend() != "torch":
        raise BackendUnavailable(
            f"Keras runs on {keras.config.backend()} here: set KERAS_BACKEND=torch"
        )
    return keras


def _first(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n", 1)[0][:300]


def _channels_last(model: Any) -> bool:
    """What the model's own layers say; without any, where its images have 1 or 3 channels."""
    formats = {
        layer.data_format
        for layer in model._flatten_layers(include_self=False)
        if isinstance(getattr(layer, "data_format", None), str)
    }
    if len(formats) == 1:
        return formats == {"channels_last"}
    images = [tuple(one.shape) for one in [*model.inputs, *model.outputs] if len(one.shape) == 4]
    return any(shape[3] in (1, 3) for shape in images)


def _load_weights(model: Any, path: Path) -> tuple[str, str]:
    if check_weights_file(path) != "hdf5":
        raise SourceError(f"{path.name} holds no Keras weights: pass .weights.h5 of this model")
    check_hdf5(path, path.name)
    try:
        model.load_weights(str(path))
    except Exception as error:  # h5py and keras raise many types
        raise WeightsMismatch(
            f"{path.name} does not fit the Keras model: {_first(error)}. "
            "Pass .weights.h5 of this model"
        ) from None
    return path.name, file_digest(path)


def _module(model: Any, *, channels_last: bool) -> Any:
    """A Keras model as a plain module, inference only, channels first on both ends."""
    import torch

    def first(value: Any) -> Any:
        return value.permute(0, 3, 1, 2) if value.dim() == 4 else value

    class KerasModel(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, image: Any) -> Any:
            if not channels_last:
                return self.model(image, training=False)
            if image.dim() == 4:
                image = image.permute(0, 2, 3, 1)
            answer = self.model(image, training=False)
            if isinstance(answer, dict):
                return {key: first(value) for key, value in answer.items()}
            if isinstance(answer, tuple | list):
                return tuple(first(value) for value in answer)
            return first(answer)

    return KerasModel()


def _mend_average_pools(model: Any) -> None:
    """Let uneven "same" average pools leave their padding out.

    Keras's torch backend repeats the border there, its TensorFlow and JAX backends divide
    by the cells inside the image; a saved file means the same on each.
    """
    import keras
    import torch
    import torch.nn.functional as F

    def mended(layer: Any) -> Any:
        last = layer.data_format == "channels_last"
        kernel, strides = tuple(layer.pool_size), tuple(layer.strides)

        def call(inputs: Any) -> Any:
            image = inputs.permute(0, 3, 1, 2) if last else inputs
            pads: list[int] = []
            for axis in (1, 0):
                size = image.shape[2 + axis]
                out = -(-size // strides[axis])
                surplus = max((out - 1) * strides[axis] + kernel[axis] - size, 0)
                pads += [surplus // 2, surplus - surplus // 2]
            ones = torch.ones((1, 1, *image.shape[2:]))
            share = F.avg_pool2d(F.pad(ones, pads), kernel, strides)
            pooled = F.avg_pool2d(F.pad(image, pads), kernel, strides) * (1.0 / share)
            return pooled.permute(0, 2, 3, 1) if last else pooled

        return call

    for layer in model._flatten_layers(include_self=False):
        if isinstance(layer, keras.layers.AveragePooling2D) and layer.padding == "same":
            layer.call = mended(layer)


def _finish(module: Any, shape: tuple[int, ...]) -> Finished:
    import torch

    from converters.sources.checks import run_once
    from converters.sources.graphs.build import as_layers

    generator = torch.Generator().manual_seed(0)
    example = torch.randn((2, *shape), generator=generator)
    run_once(module, example)  # a wrong size gets its own sentence
    return Finished(module=as_layers(module, example))
