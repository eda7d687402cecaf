"""Look into Keras's files from outside before Keras reads them."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

from edge_runtime.contract import limits
from edge_runtime.contract.archives import check_zip
from edge_runtime.contract.errors import SourceError

__all__ = ["check_hdf5", "check_keras_file"]

_MAX_CONFIG_BYTES = 64 * 2**20
_CODE_LAYERS = frozenset({"FlaxLayer", "JaxLayer", "Lambda", "TorchModuleWrapper"})
_FILE_LAYERS = frozenset({"IntegerLookup", "StringLookup", "TFSMLayer", "TextVectorization"})


def check_keras_file(path: Path) -> None:
    """Raise ``SourceError`` unless ``path`` is a ``.keras`` file of Keras's own layers.

    Code in it (a ``Lambda``, a wrapped torch module), classes of other packages, layers
    that read other files, and weights beyond ``limits.MAX_WEIGHTS_BYTES`` are refused.
    """
    members = {member.filename: member for member in check_zip(path, "a .keras file", SourceError)}
    config = members.get("config.json")
    if config is None:
        raise SourceError(
            f"{path.name} is no Keras model (it has no config.json): save it with "
            "model.save('NAME.keras')"
        )
    if config.file_size > _MAX_CONFIG_BYTES:
        raise SourceError(f"{path.name}: its config.json is too large")
    try:
        with zipfile.ZipFile(path) as archive:
            _check_config(path.name, json.loads(archive.read(config)))
            weights = members.get("model.weights.h5")
            if weights is not None:
                with io.BytesIO(archive.read(weights)) as stream:
                    check_hdf5(stream, path.name)
    except (ValueError, RecursionError, zipfile.BadZipFile, OSError) as error:
        raise SourceError(
            f"{path.name} is no readable Keras model ({error}): save it again"
        ) from None


def _check_config(name: str, document: Any) -> None:
    """Every class that the file names, wherever it stands."""
    stack = [document]
    while stack:
        value = stack.pop()
        if isinstance(value, list):
            stack.extend(value)
        elif isinstance(value, dict):
            stack.extend(value.values())
            kind, module = value.get("class_name"), value.get("module")
            if kind in _CODE_LAYERS or kind == "__lambda__":
                raise SourceError(
                    f"{name} holds Python code (a {kind} layer), which could do anything: "
                    "replace it by a layer or by keras.ops and save it again"
                )
            if kind in _FILE_LAYERS:
                raise SourceError(
                    f"{name} has a {kind} layer, which reads other files: leave it out"
                )
            registered = str(value.get("registered_name") or "")
            if kind is not None and (not _own(module) or ">" in registered):
                raise SourceError(
                    f"{name} has a layer of your own ({registered or kind}): pass "
                    "FILE.py:CALLABLE that builds the model instead"
                )


def _own(module: Any) -> bool:
    """Of Keras itself; None stands for what needs no import."""
    return module in (None, "builtins") or (
        isinstance(module, str) and (module == "keras" or module.startswith("keras."))
    )


def check_hdf5(file: BinaryIO | Path, name: str) -> None:
    """Raise ``SourceError`` unless the data sets are in the file and unpack within bounds."""
    import h5py  # type: ignore[import-untyped]

    total = 0

    def visit(path: str, value: Any) -> None:
        nonlocal total
        if not isinstance(value, h5py.Dataset):
            return
        if value.external or value.is_virtual:
            raise SourceError(f"{name} keeps {path} in another file: save it again in one")
        total += value.nbytes

    try:
        with h5py.File(file, "r") as opened:
            opened.visititems(visit)
            linked = _outside_link(opened)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise SourceError(f"{name} holds no readable weights ({error}): save it again") from None
    if linked is not None:
        raise SourceError(f"{name} has a link out of it ({linked}): save it again in one file")
    if total > limits.MAX_WEIGHTS_BYTES:
        raise SourceError(
            f"{name} unpacks to {total} bytes of weights, more than {limits.MAX_WEIGHTS_BYTES}"
        )


def _outside_link(group: Any) -> str | None:
    """The first link to another file at or below ``group``."""
    import h5py

    stack, seen = [group], set()
    while stack:
        current = stack.pop()
        address = h5py.h5o.get_info(current.id).addr
        if address in seen:  # a group may hold itself
            continue
        seen.add(address)
        for key in current:
            link = current.get(key, getlink=True)
            if isinstance(link, h5py.ExternalLink):
                return f"{current.name}/{key}"
            if isinstance(link, h5py.HardLink):
                value = current[key]
                if isinstance(value, h5py.Group):
                    stack.append(value)
    return None
