"""Which cloud model answers for a bundle: found once, held to its task and labels."""

from __future__ import annotations

from typing import Annotated

import msgspec

from edge_runtime.contract import limits
from edge_runtime.contract.errors import ConfigError, LabelsMismatch, ModelNotFound, WireError
from edge_runtime.contract.tasks import Task, task_name

__all__ = ["Expected", "ServedModel", "check_labels", "choose_model", "decode_models"]

_Name = Annotated[
    str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=limits.MAX_NAME_CHARS)
]
_Text = Annotated[str, msgspec.Meta(max_length=limits.MAX_NAME_CHARS)]


class Expected(msgspec.Struct, frozen=True, kw_only=True):
    """What a cloud model must share with the bundle for its answers to mean the same."""

    task: Task
    labels: tuple[str, ...] = ()
    labels_sha256: str | None = None
    """None: answers name no classes."""


class ServedModel(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of ``GET /v1/models``; keys of later versions are ignored."""

    name: _Name
    version: _Text
    sha256: _Text
    labels_sha256: _Text | None
    task: _Text
    classes: int | None = None


class _Models(msgspec.Struct, frozen=True, kw_only=True):
    models: Annotated[tuple[ServedModel, ...], msgspec.Meta(max_length=limits.MAX_MODELS)]


_decoder = msgspec.json.Decoder(_Models)


def decode_models(data: bytes) -> tuple[ServedModel, ...]:
    """Decode the body of ``GET /v1/models``. Raises ``WireError``."""
    try:
        return _decoder.decode(data).models
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise WireError(f"the broker's list of models makes no sense: {error}") from None


def check_labels(name: str, labels_sha256: str | None, expected: Expected) -> None:
    """Raise ``LabelsMismatch`` unless the cloud model has exactly the bundle's labels."""
    if expected.labels_sha256 is not None and labels_sha256 != expected.labels_sha256:
        raise LabelsMismatch(
            f"the cloud model {name!r} has other labels than the bundle "
            f"(digest {(labels_sha256 or 'none')[:12]}, not {expected.labels_sha256[:12]}): "
            "serve a model of the same classes, or use another bundle"
        )


def choose_model(
    served: tuple[ServedModel, ...], wanted: str | None, expected: Expected
) -> ServedModel:
    """The model ``wanted``, or without a name the only one that fits the bundle.

    Raises:
        ModelNotFound: no model of that name; without a name: none of the bundle's task.
        LabelsMismatch: the model has other labels; without a name: all have.
        ConfigError: the named model does another task; without a name, several fit.
    """
    names = ", ".join(sorted({model.name for model in served})) or "none"
    task = task_name(expected.task)
    if wanted is not None:
        for model in served:
            if model.name == wanted:
                if model.task != task:
                    raise ConfigError(
                        f"the cloud model {model.name!r} does {model.task}, the bundle {task}: "
                        "name another one with cloud_model="
                    )
                check_labels(model.name, model.labels_sha256, expected)
                return model
        raise ModelNotFound(f"the broker has no model {wanted!r}; it serves: {names}")
    if not served:
        raise ModelNotFound("the broker serves no model: start it with --models")
    alike = [model for model in served if model.task == task]
    if not alike:
        raise ModelNotFound(
            f"no model of the broker does {task} (it serves: {names}): serve one that does"
        )
    fitting = [model for model in alike if expected.labels_sha256 in (None, model.labels_sha256)]
    if not fitting:
        raise LabelsMismatch(
            f"no model of the broker has the bundle's labels (it serves: {names}): "
            "serve a model of the same classes"
        )
    if len({model.name for model in fitting}) > 1:
        fitting_names = ", ".join(sorted({model.name for model in fitting}))
        shared = "do the bundle's task" if expected.labels_sha256 is None else "fit the bundle"
        raise ConfigError(
            f"several models of the broker {shared} ({fitting_names}): choose one with cloud_model="
        )
    return fitting[0]
