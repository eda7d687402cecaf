"""The net to train, from the same SOURCE that ``convert`` takes, with a head that fits."""

from __future__ import annotations

import dataclasses
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from converters.finetune.head import find_head, replace_head
from converters.finetune.settings import HeadRecord
from converters.jobs import SourceRequest
from converters.sources import Source, load_source
from converters.weights import read_state_dict
from edge_runtime.contract.errors import ConfigError, WeightsMismatch

__all__ = ["HeadChoice", "Trainable", "fit_head", "load_trainable"]

HeadChoice = Literal["auto", "keep", "replace"]


@dataclasses.dataclass(kw_only=True)
class Trainable:
    """A loaded source whose module can be trained and saved again."""

    source: Source
    module: Any
    """What the weights file fills: without the wrapper that ``load_source`` may put around."""
    kind: Literal["torchvision", "zoo", "python"]
    head: str
    classes: int


def load_trainable(request: SourceRequest) -> Trainable:
    """Build and load the source, on the CPU, in eval mode.

    Raises ``ConfigError`` for what cannot be trained here, and the errors of
    ``load_source`` and ``find_head``.
    """
    if request.task != "classification" or request.latent_shape or request.score_threshold:
        raise ConfigError("nearfar finetune trains classifiers: leave out what other tasks take")
    kind = _kind(request)
    source = _load(msgspec.structs.replace(request, labels=None))
    assert source.preprocess is not None  # noqa: S101  # only a generator has none
    if source.activation != "softmax":
        raise ConfigError(
            f"--activation {source.activation}: fine-tuning minimizes the cross-entropy of a "
            "softmax; give the model that answers logits"
        )
    import torch

    example = torch.zeros((2, source.preprocess.channels, *source.preprocess.size))
    head, classes = find_head(source.module, example)
    module, prefix = source.module, ""
    if type(module).__module__ == "converters.sources.wrappers":
        module, prefix = module.model, "model."
    return Trainable(
        source=source,
        module=module,
        kind=kind,
        head=head.removeprefix(prefix),
        classes=classes,
    )


def _kind(request: SourceRequest) -> Literal["torchvision", "zoo", "python"]:
    kind = request.source.partition(":")[0]
    if kind == "torchvision":
        return "torchvision"
    if kind == "zoo":
        return "zoo"
    if request.source.rpartition(":")[0].endswith(".py"):
        return "python"
    if kind == "keras" or request.source.endswith(".keras"):
        raise ConfigError(
            "fine-tune a Keras model with Keras (model.fit) and give convert its .weights.h5; "
            "here SOURCE is torchvision:NAME, zoo:NAME or FILE.py:CALLABLE"
        )
    raise ConfigError(
        f"{request.source} cannot be trained: a saved graph has lost its training form. SOURCE "
        "is torchvision:NAME, zoo:NAME or FILE.py:CALLABLE"
    )


def _load(request: SourceRequest) -> Source:
    """``load_source``; a torchvision net gets the class count that its weights file has."""
    try:
        return load_source(request)
    except WeightsMismatch:
        count = _classes_in_file(request)
        if count is None:
            raise
        with tempfile.TemporaryDirectory(prefix="nearfar-finetune-") as folder:
            labels = Path(folder) / "labels.txt"
            labels.write_text("".join(f"class {index}\n" for index in range(count)))
            source = load_source(msgspec.structs.replace(request, labels=str(labels)))
    source.labels = None
    return source


def _classes_in_file(request: SourceRequest) -> int | None:
    """The one first dimension in which a torchvision weights file differs from the net."""
    kind, _, name = request.source.partition(":")
    if kind != "torchvision" or request.weights is None or not Path(request.weights).is_file():
        return None
    import torch
    import torchvision

    state = read_state_dict(Path(request.weights))
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    with torch.device("meta"):
        own = torchvision.models.get_model(name, weights=None, **options).state_dict()
    counts = Counter(
        state[key].shape[0]
        for key, value in own.items()
        if key in state
        and state[key].shape != value.shape
        and state[key].shape[1:] == value.shape[1:]
    )
    return int(next(iter(counts))) if len(counts) == 1 else None


def fit_head(
    trainable: Trainable, names: Sequence[str], choice: HeadChoice, *, seed: int
) -> tuple[HeadRecord, tuple[str, ...]]:
    """Keep or replace the head for classes ``names``; returns what was done, and the order.

    ``auto`` keeps it when the model has as many classes and, where it names them, the same
    names: then the model's own order counts. A new head is drawn by ``seed``. Raises
    ``ConfigError`` when ``keep`` is impossible.
    """
    import torch

    own = trainable.source.labels
    fits = trainable.classes == len(names)
    same = own is None or set(own) == set(names)
    if choice == "keep" and not fits:
        raise ConfigError(
            f"--head keep: the model has {trainable.classes} classes, the data {len(names)}"
        )
    keep = choice == "keep" or (choice == "auto" and fits and same)
    kind = type(trainable.module.get_submodule(trainable.head)).__name__
    order = tuple(names)
    if keep:
        if own is not None and same:
            order = tuple(own)
        reason = "as many classes" + (", of the same names" if own is not None and same else "")
    else:
        torch.manual_seed(seed)
        replace_head(trainable.module, trainable.head, len(names))
        reason = "asked for" if choice == "replace" else "another number of classes"
        if choice == "auto" and fits:
            reason = "as many classes, of other names"
    return (
        HeadRecord(
            name=trainable.head,
            kind=kind,
            classes_before=trainable.classes,
            classes=len(names),
            replaced=not keep,
            reason=reason,
        ),
        order,
    )
