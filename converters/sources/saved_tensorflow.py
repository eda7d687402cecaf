"""SavedModel folders: frozen by TensorFlow in its own process, rebuilt in torch here."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from converters.jobs import SourceRequest
from converters.sources.types import Built, Finished
from edge_runtime.contract import limits
from edge_runtime.contract.errors import ConfigError, SourceError

__all__ = ["build_saved_tensorflow"]

_SECONDS = 600
_MAX_FILES = 10_000


def build_saved_tensorflow(path: Path, request: SourceRequest) -> Built:
    """The ``serving_default`` signature (or the only one) of a SavedModel.

    ``path``: the folder, or its ``saved_model.pb``. Raises ``SourceError``, and
    ``ConfigError`` for weights beside it.
    """
    folder = path if path.is_dir() else path.parent
    if request.weights is not None:
        raise ConfigError(f"{folder.name} holds its own weights: leave --weights out")
    if not (folder / "saved_model.pb").is_file():
        raise SourceError(
            f"{folder} is no SavedModel (it has no saved_model.pb): pass the folder that "
            "model.export or tf.saved_model.save wrote"
        )
    digest = _digest(folder)
    flat, size = _frozen(folder, request)
    strip = request.task == "classification" and request.activation is None

    def finish(module: Any, shape: tuple[int, ...]) -> Finished:
        import torch

        from converters.sources.checks import run_once
        from converters.sources.graphs.build import (
            flat_as_layers,
            without_final_activation,
        )

        generator = torch.Generator().manual_seed(0)
        example = torch.randn((2, *shape), generator=generator)
        run_once(module, example)
        layers = flat_as_layers(flat, example, module)
        activation = without_final_activation(layers) if strip else None
        return Finished(module=layers, activation=activation)

    return Built(
        module=flat.module(),
        finish=finish,
        size=size,
        weights=folder.name,
        weights_sha256=digest,
        source_sha256=digest,
    )


def _digest(folder: Path) -> str:
    """SHA-256 over the folder's files, by name; bounds their number and size."""
    digest, total, count = hashlib.sha256(), 0, 0
    for file in sorted(folder.rglob("*")):
        if file.is_symlink():
            raise SourceError(f"{folder.name} has a link in it ({file.name}): copy the files")
        if not file.is_file():
            continue
        count += 1
        total += file.stat().st_size
        if count > _MAX_FILES or total > limits.MAX_BUNDLE_FILE_BYTES:
            raise SourceError(f"{folder.name} is too large for a SavedModel")
        digest.update(f"{file.relative_to(folder)}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _frozen(folder: Path, request: SourceRequest) -> tuple[Any, tuple[int, int] | None]:
    """The torch graph, and the input size it is for."""
    from converters.sources.tensorflow_graph import read_frozen

    sides = [str(request.input_height or 0), str(request.input_width or 0)]
    with tempfile.TemporaryDirectory(prefix="nearfar-savedmodel-") as scratch:
        out = Path(scratch)
        try:
            done = subprocess.run(
                [sys.executable, "-m", "converters.sources.tensorflow_freeze",
                 str(folder.resolve()), scratch, *sides],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                timeout=_SECONDS, check=False,
                # With Keras's torch backend TensorFlow would import torch, and crash.
                env={**os.environ, "KERAS_BACKEND": "tensorflow", "CUDA_VISIBLE_DEVICES": ""},
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise SourceError(f"{folder.name}: no answer after {_SECONDS} s of freezing") from None
        sys.stderr.write(done.stdout.decode("utf-8", "replace"))  # the job's log
        if (out / "error.txt").exists():
            reason = (out / "error.txt").read_text()[:500]
            raise SourceError(f"SavedModel {folder.name}: {reason}")
        if not (out / "graph.json").exists():
            raise SourceError(
                f"SavedModel {folder.name}: TensorFlow failed while freezing it (exit "
                f"{done.returncode}): save the model as .keras instead"
            )
        return read_frozen(out, request.task)
