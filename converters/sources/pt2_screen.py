"""Read a ``.pt2`` archive from outside and refuse one that could run code when loaded.

``torch.export.load`` unpickles what the archive tells it to, evaluates its shape
expressions as Python and resolves its operator names anywhere below ``torch``. A program
saved by ``torch.export.save`` from tensors and ATen operators needs none of that; anything
beyond it is refused here, with zipfile and json alone, before torch sees the file.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

from converters.sources.archives import check_zip
from edge_runtime.contract.errors import SourceError

__all__ = ["screen_pt2"]

_MAX_JSON_BYTES = 256 * 2**20
_MAX_RECORD_BYTES = 2**20
_OPERATOR = re.compile(r"torch\.ops\.(?:aten|torchvision)\.[a-z0-9_]+(?:\.[A-Za-z0-9_]+)?")
_FILE_OPERATORS = ("from_file", "save", "load")
_SCALAR = re.compile(
    r"_operator\.(?:getitem|add|sub|mul|floordiv|truediv|mod|neg|eq|ne|lt|le|gt|ge|and_|or_|pow)"
    r"|math\.(?:ceil|floor|trunc|sqrt)|torch\.sym_[a-z]+"
    r"|torch\._sym_[a-z]+|torch\.ops\.higher_order\.wrap_with_set_grad_enabled"
)
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_EXPRESSION = re.compile(r"[A-Za-z0-9_ +\-*/%(),.<>=~&|']*")
_WORDS = frozenset(
    {"Symbol", "Integer", "Float", "Rational", "Max", "Min", "Mod", "PythonMod", "FloorDiv",
     "ModularIndexing", "CleanDiv", "CeilDiv", "CeilToInt", "FloorToInt", "TruncToInt",
     "TruncToFloat", "RoundToInt", "IntTrueDiv", "FloatTrueDiv", "PowByNatural", "ToFloat",
     "Identity", "Add", "Mul", "Pow", "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "And", "Or", "Not",
     "Equality", "Unequality", "StrictLessThan", "LessThan", "StrictGreaterThan", "GreaterThan",
     "Piecewise", "ExprCondPair", "Where", "positive", "integer", "nonnegative", "zero",
     "nonzero", "negative", "real", "True", "False", "true", "false", "oo", "int_oo", "IntInfinity",
     "NegativeIntInfinity", "evaluate"}
)  # fmt: skip
_NAME = re.compile(r"[suz]\d+|[ijk]\d*|zf\d+|u\d+")


def screen_pt2(path: Path, record_name: str) -> bytes | None:
    """Refuse ``path`` unless it is plain; returns its extra file ``record_name``, if any.

    Raises ``SourceError`` with what is wrong and how to write the file anew.
    """
    members = {member.filename: member for member in check_zip(path, "a torch.export program")}
    roots = {name.split("/", 1)[0] for name in members}
    models = [name for name in members if re.fullmatch(r"[^/]+/models/model\.json", name)]
    if len(roots) != 1 or len(models) != 1:
        raise SourceError(
            f"{path.name} is no program of this torch.export: save it again with "
            "torch.export.save of torch 2.9 or later"
        )
    root = roots.pop()
    with zipfile.ZipFile(path) as archive:
        for name in members:
            tail = name.removeprefix(f"{root}/")
            if tail.startswith(("data/weights/", "data/constants/")) and tail.endswith(".pt"):
                raise _refused(path, "its tensors are pickled")
            if tail.startswith("data/aotinductor"):
                raise _refused(path, "it holds compiled code")
        for kind in ("weights", "constants"):
            config = _json(archive, path, f"{root}/data/{kind}/model_{kind}_config.json")
            _check_payloads(path, config)
        _check_graph(path, _json(archive, path, models[0]))
        _check_samples(archive, path, f"{root}/data/sample_inputs/model.pt")
        extra = members.get(f"{root}/extra/{record_name}")
        if extra is None:
            return None
        if extra.file_size > _MAX_RECORD_BYTES:
            raise SourceError(f"{path.name}: its {record_name} is too large")
        return archive.read(extra)


def _refused(path: Path, reason: str) -> SourceError:
    return SourceError(
        f"{path.name} could run code when it is loaded ({reason}): save the model again with "
        "torch.export.save from tensors and ATen operators only"
    )


def _json(archive: zipfile.ZipFile, path: Path, name: str) -> Any:
    try:
        if archive.getinfo(name).file_size > _MAX_JSON_BYTES:
            raise SourceError(f"{path.name}: {name} is too large")
        return json.loads(archive.read(name))
    except (KeyError, ValueError, RecursionError, zipfile.BadZipFile) as error:
        raise SourceError(f"{path.name} is no readable torch.export program: {error}") from None


def _check_payloads(path: Path, config: Any) -> None:
    entries = config.get("config") if isinstance(config, dict) else None
    if not isinstance(entries, dict):
        raise SourceError(f"{path.name} is no readable torch.export program: no tensor table")
    for entry in entries.values():
        if not isinstance(entry, dict) or entry.get("use_pickle") is not False:
            raise _refused(path, "its tensors are pickled")
        name = str(entry.get("path_name"))
        if not re.fullmatch(r"(weight|tensor|constant)_\d+", name):
            raise _refused(path, f"it holds the object {name!r}")


def _check_graph(path: Path, document: Any) -> None:
    """Every operator name, and every shape expression, wherever they stand."""
    stack = [document]
    while stack:
        value = stack.pop()
        if isinstance(value, list):
            stack.extend(value)
        elif isinstance(value, dict):
            target = value.get("target")
            if isinstance(target, str) and "inputs" in value:
                _check_target(path, target)
            for key, inner in value.items():
                if key == "metadata":
                    continue
                if key in ("expr_str", "as_expr") and isinstance(inner, str):
                    _check_expression(path, inner)
                elif key == "range_constraints" and isinstance(inner, dict):
                    for expression in inner:
                        _check_expression(path, str(expression))
                stack.append(inner)


def _check_target(path: Path, target: str) -> None:
    if _SCALAR.fullmatch(target):
        return
    if _OPERATOR.fullmatch(target) and target.split(".")[3] not in _FILE_OPERATORS:
        return
    raise _refused(path, f"it calls {target[:80]!r}")


def _check_expression(path: Path, text: str) -> None:
    words = _WORD.findall(text)
    plain = _EXPRESSION.fullmatch(text) is not None
    quoted = re.findall(r"'([^']*)'", text)
    if (
        not plain
        or len(text) > 10_000
        or re.search(r"[A-Za-z_)']\s*\.|\.\s*[A-Za-z_(']", text)
        or any(word not in _WORDS and not _NAME.fullmatch(word) for word in words)
        or any(not _NAME.fullmatch(name) for name in quoted)
    ):
        raise _refused(path, f"its shape expression {text[:80]!r}")


def _check_samples(archive: zipfile.ZipFile, path: Path, name: str) -> None:
    """The example inputs are a pickle: torch falls back to trusting it, so it must be plain."""
    import torch

    try:
        data = archive.read(name)
        if data:
            torch.load(io.BytesIO(data), weights_only=True)
    except KeyError:
        raise SourceError(f"{path.name} is no readable torch.export program: {name}") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError):
        raise _refused(path, "its example inputs are more than tensors") from None
