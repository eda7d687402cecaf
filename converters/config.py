"""``nearfar.toml``: the models of a project, each with the options of its conversion.

A table ``[[model]]`` for each model; its keys are the long options of ``nearfar convert``
(with ``_`` for ``-``), and those of ``nearfar verify`` for what is checked afterwards.
``[defaults]`` holds keys that every model has unless it says otherwise. Paths are relative
to the file. Nothing is substituted from the environment: one file, one meaning.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import msgspec

from converters.ranges import parse_ranges
from converters.recipes import FORMATS, OFFERED
from edge_runtime.contract import limits
from edge_runtime.contract.errors import ConfigError, LimitExceeded, MissingFile
from edge_runtime.contract.files import read_bounded
from edge_runtime.contract.manifest import Format, InputMode, Name, Precision, Version
from edge_runtime.contract.tasks import TaskName
from edge_runtime.contract.tasks.classification import Activation

__all__ = ["MAX_MODELS", "ModelConfig", "load_config", "to_arguments", "to_verify_arguments"]

MAX_MODELS = 256

_MAX_BYTES = 2**20
_KINDS = ("torchvision:", "keras:", "zoo:")

Text = Annotated[str, msgspec.Meta(min_length=1, max_length=limits.MAX_TEXT_CHARS)]
Pixels = Annotated[int, msgspec.Meta(ge=1, le=8192)]


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One ``[[model]]``; every path is absolute."""

    source: Text
    output: Text
    """The bundle to write."""
    weights: Text | None = None
    task: TaskName | None = None
    labels: Text | None = None
    preprocess: Text | None = None
    input_size: Pixels | Text | None = None
    """``224`` or ``"224x320"``."""
    resize_size: Pixels | None = None
    activation: Activation | None = None
    temperature: float | None = None
    latent: int | Text | None = None
    # No tuple here: msgspec 0.22 crashes on a union of a bounded str and a fixed-length one.
    output_range: str | list[float] | None = None
    """``"0:255"`` or ``[0, 255]``."""
    score_threshold: float | None = None
    name: Name | None = None
    version: Version | None = None
    to: Annotated[tuple[Format, ...], msgspec.Meta(min_length=1)] | Literal["all"] | None = None
    precision: (
        Annotated[tuple[Precision, ...], msgspec.Meta(min_length=1)] | Literal["all"] | None
    ) = None
    calib: Text | None = None
    calib_labels: Text | None = None
    calib_split: Text | None = None
    ranges: Text | None = None
    """As ``--ranges``."""
    allow_synthetic_calibration: bool = False
    input: InputMode | None = None
    nms: bool = False
    argmax: bool = False
    min_ios: int | Text | None = None
    min_android_api: int | None = None
    gates: Text | None = None
    auto: bool = False
    keep: Annotated[tuple[Text, ...], msgspec.Meta(min_length=1)] | None = None
    keep_going: bool = False
    eval: Text | None = None
    """Images on which the bundle is verified."""
    eval_labels: Text | None = None
    eval_split: Text | None = None

    @property
    def title(self) -> str:
        """How messages call it: its name, or else the name of its bundle."""
        return self.name or Path(self.output).name


_PATHS = (
    "labels", "calib", "calib_labels", "eval", "eval_labels", "gates",
)  # fmt: skip
_FOLDERS = ("calib", "eval")
# Each key on the left makes no sense without the one on the right.
_NEEDS = {
    "calib_labels": "calib",
    "calib_split": "calib_labels",
    "eval_labels": "eval",
    "eval_split": "eval_labels",
}
# What verify takes, and how that command calls it.
_VERIFY = {"eval": "eval", "eval_labels": "labels", "eval_split": "split", "gates": "gates"}
_VERIFY_ALONE = ("eval", "eval_labels", "eval_split")
_OWN = ("source", "output", "name")
"""Keys that no two models share, so that they cannot be defaults."""


def load_config(path: Path) -> list[ModelConfig]:
    """Read ``nearfar.toml``; every file that it names has been seen to exist.

    Raises ``ConfigError``: no such file, no TOML, an unknown key (with the key that may
    have been meant), a value of the wrong kind, a file that is not there, or two models
    with one output.
    """
    path = path.absolute()
    try:
        text = read_bounded(path, _MAX_BYTES).decode("utf-8")
        document = tomllib.loads(text)
    except (MissingFile, LimitExceeded) as error:
        raise ConfigError(error.detail) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
    _check_keys(document, ("model", "defaults"), str(path))
    defaults, tables = document.get("defaults", {}), document.get("model", [])
    if not isinstance(defaults, dict):
        raise ConfigError(f"{path}: write [defaults] as a table")
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ConfigError(f"{path}: write [[model]] with double brackets, one for each model")
    if not 1 <= len(tables) <= MAX_MODELS:
        raise ConfigError(
            f"{path} has {len(tables)} models: write a [[model]] table for each, "
            f"{MAX_MODELS} at most"
        )
    fields = [field.name for field in msgspec.structs.fields(ModelConfig)]
    _check_keys(defaults, [name for name in fields if name not in _OWN], f"{path}, [defaults]")
    models = [
        _model({**defaults, **table}, path, _where(path, number, table), fields)
        for number, table in enumerate(tables, 1)
    ]
    _check_outputs(models, path)
    return models


def _where(path: Path, number: int, table: Mapping[str, Any]) -> str:
    name = table.get("name", table.get("source"))
    return f"{path}, model {number}" + (f" ({name})" if isinstance(name, str) else "")


def _meant(word: str, known: Iterable[str]) -> str:
    """``: did you mean 'x'?``, or the whole list when nothing is close."""
    every = list(known)
    close = difflib.get_close_matches(word.replace("-", "_"), every, n=1, cutoff=0.6)
    return f": did you mean {close[0]!r}?" if close else f": choose from {', '.join(every)}"


def _check_keys(table: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    names = list(known)
    for key in table:
        if key not in names:
            raise ConfigError(f"{where}: unknown key {key!r}{_meant(key, names)}")


def _model(table: dict[str, Any], path: Path, where: str, fields: list[str]) -> ModelConfig:
    _check_keys(table, fields, where)
    for key in ("source", "output"):
        if key not in table:
            raise ConfigError(f"{where}: {key!r} is missing")
    try:
        model = msgspec.convert(table, ModelConfig, strict=True)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {_explain(str(error))}") from None
    for key, other in _NEEDS.items():
        if getattr(model, key) is not None and getattr(model, other) is None:
            raise ConfigError(f"{where}: {key!r} makes no sense without {other!r}")
    if model.calib is not None and model.allow_synthetic_calibration:
        raise ConfigError(
            f"{where}: there are images in 'calib': leave 'allow_synthetic_calibration' out"
        )
    if model.ranges is not None:
        try:
            parse_ranges(model.ranges)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error.detail}") from None
    if isinstance(model.output_range, list) and len(model.output_range) != 2:
        raise ConfigError(f"{where}: 'output_range' is two numbers, for example [0, 255]")
    return _with_paths(model, path.parent, where)


def _explain(message: str) -> str:
    """The sentence of msgspec with the key in front, and what may have been meant."""
    reason, _, place = message.partition(" - at `$.")
    key = place.rstrip("`")
    wrong = re.fullmatch(r"Invalid enum value '(.*)'", reason)
    choices = {
        "to": FORMATS,
        "precision": OFFERED,
        "task": get_args(TaskName),
        "input": get_args(InputMode),
        "activation": get_args(Activation),
    }.get(re.split(r"[\[.]", key)[0])
    if wrong and choices:
        return f"{key!r}: {wrong[1]!r} is unknown{_meant(wrong[1], choices)}"
    return f"{key!r}: {reason[:1].lower()}{reason[1:]}" if key else reason


def _with_paths(model: ModelConfig, folder: Path, where: str) -> ModelConfig:
    """Absolute paths; raises ``ConfigError`` for a file or folder that is not there."""
    changes: dict[str, str] = {"output": str((folder / model.output).resolve())}
    for key in _PATHS:
        value = getattr(model, key)
        if value is not None:
            changes[key] = _existing(folder / value, key, where)
    if model.preprocess is not None and model.preprocess.endswith(".toml"):
        changes["preprocess"] = _existing(folder / model.preprocess, "preprocess", where)
    if model.weights is not None and not _is_named(model.weights, folder):
        changes["weights"] = _existing(folder / model.weights, "weights", where)
    if not model.source.startswith(_KINDS):
        file, separator, attribute = model.source.rpartition(":")
        if file.endswith(".py"):
            changes["source"] = _existing(folder / file, "source", where) + separator + attribute
        else:
            changes["source"] = _existing(folder / model.source, "source", where)
    return msgspec.structs.replace(model, **changes)


def _is_named(weights: str, folder: Path) -> bool:
    """``DEFAULT``, another member of a library's list, or ``random:SEED``."""
    named = re.fullmatch(r"[A-Z][A-Z0-9_]*|random:.*", weights)
    return named is not None and not (folder / weights).is_file()


def _existing(path: Path, key: str, where: str) -> str:
    if key in _FOLDERS and not path.is_dir():
        raise ConfigError(f"{where}: {key!r} is {path}, and there is no such folder")
    if not path.exists():
        raise ConfigError(f"{where}: {key!r} is {path}, and there is no such file")
    return str(path.resolve())


def _check_outputs(models: Iterable[ModelConfig], path: Path) -> None:
    """A bundle replaces its folder: none may be or lie in another's."""
    seen: list[ModelConfig] = []
    for model in models:
        own = Path(model.output)
        for other in seen:
            place = Path(other.output)
            if own == place or place in own.parents or own in place.parents:
                raise ConfigError(
                    f"{path}: {other.title} and {model.title} both write to {other.output}: "
                    "give each an 'output' of its own"
                )
        seen.append(model)


def _option(key: str, value: object) -> list[str]:
    """``--key=value`` as the command line takes it."""
    name = "--" + key.replace("_", "-")
    if value is None or value is False:
        return []
    if value is True:
        return [name]
    if isinstance(value, list):  # the output range
        return [f"{name}={value[0]!r}:{value[1]!r}"]
    if isinstance(value, tuple):
        return [f"{name}={','.join(value)}"]
    return [f"{name}={value}"]


def to_arguments(model: ModelConfig) -> list[str]:
    """What to give to ``nearfar convert`` for this model: options, ``--``, SOURCE."""
    arguments = []
    for field in msgspec.structs.fields(ModelConfig):
        if field.name != "source" and field.name not in _VERIFY_ALONE:
            arguments += _option(field.name, getattr(model, field.name))
    return [*arguments, "--", model.source]


def to_verify_arguments(model: ModelConfig) -> list[str] | None:
    """What to give to ``nearfar verify`` for its bundle; None: the file names no ``eval``.

    A generator needs no images: ``task = "generation"`` is always verified.
    """
    if model.eval is None and model.task != "generation":
        return None
    arguments = []
    for key, option in _VERIFY.items():
        arguments += _option(option, getattr(model, key))
    return [*arguments, "--", model.output]
