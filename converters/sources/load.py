"""From a ``SourceRequest`` to a ``Source``: which kind it is, and the steps all kinds share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from converters.jobs import SourceRequest
from converters.preprocessing import declared
from converters.sources.checks import check_deterministic, fit_answer
from converters.sources.labels import read_labels_file
from converters.sources.random_weights import (
    draw_blank_layers,
    example_input,
    random_seed,
    set_seed,
    settle_batch_norms,
)
from converters.sources.types import Built, Finished, Source
from converters.weights import load_into
from edge_runtime.contract.errors import ConfigError, SourceError
from edge_runtime.contract.preprocess import Preprocess

__all__ = ["load_source"]

_KINDS = (
    "torchvision:NAME, keras:NAME, zoo:NAME, FILE.py:CALLABLE, or a saved model "
    "(.pt2, TorchScript .pt, .keras, a SavedModel folder)"
)


def load_source(request: SourceRequest) -> Source:
    """Build the model, load its weights and see that it answers.

    Raises:
        ConfigError: the request lacks or contradicts something.
        SourceError: the model cannot be built, or answers differently each time.
        WeightsMismatch, WeightsUnavailable: see ``contract/errors.py``.
    """
    labels = None
    if request.labels:
        minimum = 1 if request.task == "detection" else 2
        labels = read_labels_file(Path(request.labels), minimum=minimum)
    seed = random_seed(request.weights)
    # Every child process builds the model anew and must get the same one.
    set_seed(request.weights)
    built = _build(request, labels)
    _freeze(built.module)
    if seed is not None:
        draw_blank_layers(built.module, seed=seed)
    if built.weights is None:
        built.weights, built.weights_sha256 = _load_weights(built.module, request, seed)
    generated = request.task == "generation"
    preprocess = None if generated else _preprocess(request, built)
    shape = _input_shape(request, preprocess)
    done = Finished(module=built.module)
    if built.finish is not None:
        done = built.finish(built.module, shape)
        _freeze(done.module)
    image = example_input(shape, preprocess, seed=0)
    module = fit_answer(done.module, request.task, image)
    if seed is not None:
        settle_batch_norms(module, shape, preprocess, seed=seed)
    check_deterministic(module, image)
    default_scale, default_offset = (127.5, 127.5) if generated else (255.0, 0.0)
    scale, offset = request.output_scale, request.output_offset
    return Source(
        module=module,
        task=request.task,
        detection=done.detection,
        latent_shape=request.latent_shape,
        output_scale=default_scale if scale is None else scale,
        output_offset=default_offset if offset is None else offset,
        preprocess=preprocess,
        labels=built.labels if labels is None or built.labels_given else labels,
        activation=request.activation or done.activation or built.activation,
        temperature=request.temperature or built.temperature,
        weights=built.weights,
        weights_sha256=built.weights_sha256,
        source_sha256=built.source_sha256,
    )


def _build(request: SourceRequest, labels: tuple[str, ...] | None) -> Built:
    kind, _, name = request.source.partition(":")
    if kind == "torchvision":
        from converters.sources.torchvision_models import build_torchvision

        return build_torchvision(name, request, labels)
    if kind == "keras":
        from converters.sources.keras_models import build_application

        return build_application(name, request, labels)
    if kind == "zoo":
        from converters.sources.zoo import build_zoo

        return build_zoo(name, request)
    if request.source.rpartition(":")[0].endswith(".py"):
        from converters.sources.python_file import build_python_file

        return build_python_file(request)
    path = Path(request.source)
    if path.suffix == ".keras":
        from converters.sources.keras_models import build_keras_file

        return build_keras_file(path, request)
    if path.suffix in (".pt2", ".pt", ".pth", ".ptl", ".jit"):
        from converters.sources.saved_torch import build_saved_torch

        return build_saved_torch(path, request)
    if path.is_dir() or path.name == "saved_model.pb":
        from converters.sources.saved_tensorflow import build_saved_tensorflow

        return build_saved_tensorflow(path, request)
    raise SourceError(f"source {request.source!r} is none of {_KINDS}")


def _freeze(module: Any) -> None:
    module.eval()
    for parameter in module.parameters():
        parameter.requires_grad_(False)


def _preprocess(request: SourceRequest, built: Built) -> Preprocess:
    height, width = request.input_height, request.input_width
    own = built.preprocess
    if built.size is not None and height is not None and built.size != (height, width):
        raise ConfigError(
            f"the model takes {built.size[0]}x{built.size[1]} pixels and no other size: "
            "leave --input-size out"
        )
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
    if height is None:
        height, width = built.size or (own.size if own is not None else (None, None))
    return declared(
        request.preprocess,
        height=height,
        width=width,
        resize_size=request.resize_size,
        squeeze=request.task in ("detection", "segmentation"),
    )


def _input_shape(request: SourceRequest, preprocess: Preprocess | None) -> tuple[int, ...]:
    """Of one input, without batch."""
    if preprocess is not None:
        return (preprocess.channels, *preprocess.size)
    if request.latent_shape is None:
        raise ConfigError("a generator needs --latent: the shape of one input, for example 100")
    return request.latent_shape


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
