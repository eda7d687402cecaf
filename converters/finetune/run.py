"""From a request to a fine-tuned net in a folder."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from converters.finetune.checkpoint import (
    CHECKPOINT,
    Identity,
    load_checkpoint,
    save_checkpoint,
)
from converters.finetune.data import (
    Found,
    Split,
    check_split,
    digest_of,
    find_labeled,
    find_unlabeled,
    split_seeded,
)
from converters.finetune.model import HeadChoice, Trainable, fit_head, load_trainable
from converters.finetune.output import (
    choose_calibration,
    next_commands,
    open_folder,
    write_report,
    write_splits,
    write_weights,
)
from converters.finetune.settings import DataRecord, FinetuneReport, HeadRecord, Settings
from converters.jobs import SourceRequest
from converters.sources import read_labels_file
from edge_runtime.contract.errors import ConfigError
from edge_runtime.contract.manifest import canonical_json
from edge_runtime.runtimes.base import installed_version

__all__ = ["Request", "Tuning", "finetune"]

_TEMPERATURE_IMAGES = 50
_CHANCE_P = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """Hyperparameters as asked for; None leaves the choice to what the run is."""

    epochs: int = 20
    batch: int = 32
    optimizer: str = "adamw"
    learning_rate: float | None = None
    backbone_scale: float | None = None
    weight_decay: float | None = None
    warmup_epochs: float = 1.0
    label_smoothing: float = 0.1
    ema_decay: float = 0.0
    patience: int = 6
    freeze: str = "none"
    unfreeze_at: tuple[int, ...] = ()
    augment: bool = True
    crop_scale: float = 0.35
    flip: bool = True
    color_jitter: float = 0.2
    rand_augment: int = 0
    seed: int = 0
    threads: int | None = None
    distill: bool = False
    distill_temperature: float = 4.0
    qat_bits: int = 0

    def settle(self, *, delicate: bool) -> Settings:
        """All numbers filled in; ``delicate``: a new head on trained layers.

        Raises ``ConfigError``.
        """
        given = dataclasses.asdict(self)
        sgd = self.optimizer == "sgd"
        rate = (1e-2 if sgd else 1e-3) if not self.qat_bits else (1e-3 if sgd else 1e-4)
        decay = (1e-4 if sgd else 0.05) if not self.qat_bits else 0.0
        # A new head starts from noise: its large first steps would wash the rest out.
        scale = 0.1 if delicate else 1.0
        defaults = {"learning_rate": rate, "weight_decay": decay, "backbone_scale": scale}
        defaults["threads"] = len(os.sched_getaffinity(0))
        for name, value in defaults.items():
            if given[name] is None:
                given[name] = value
        given["objective"] = "teacher" if given.pop("distill") else "labels"
        try:
            settings = msgspec.convert(given, Settings)
        except msgspec.ValidationError as error:
            raise ConfigError(f"a setting makes no sense: {error}") from None
        settings.check()
        return settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """Everything that the command line asks for."""

    source: SourceRequest
    data: Path
    output: Path
    tuning: Tuning
    labels_csv: Path | None = None
    splits: tuple[str, str] | None = None
    holdout: float = 0.2
    head: HeadChoice = "auto"
    skip_unreadable: bool = False
    resume: bool = False
    force: bool = False
    minutes: float | None = None
    convert_options: tuple[str, ...] = ()
    """For the ``nearfar convert`` line that is printed: ``--name N``."""


def finetune(request: Request, listener: Any) -> FinetuneReport:
    """Train, and write the best weights with all that a conversion needs.

    ``listener``: a ``converters.finetune.train.Listener``. The folder gets a checkpoint
    after each epoch, which goes when the run has ended by itself; when no epoch was better
    than the start, it gets the report alone (``improved`` is false). Raises the typed
    errors of every stage; ``KeyboardInterrupt`` leaves the last checkpoint.
    """
    import torch

    from converters.finetune.images import DeclaredImages, TrainingImages
    from converters.finetune.train import Trainer

    deadline = time.monotonic() + request.minutes * 60.0 if request.minutes else None
    open_folder(request.output, force=request.force, resume=request.resume)
    request.tuning.settle(delicate=False)  # nonsense is refused before any work
    torch.set_num_threads(request.tuning.threads or len(os.sched_getaffinity(0)))
    torch.use_deterministic_algorithms(True, warn_only=True)
    listener.phase("building the model", 0, 1)
    trainable = load_trainable(request.source)
    found, names = _find(request, trainable)
    head, order = _head(request, trainable, names)
    settings = request.tuning.settle(
        delicate=head.replaced and not trainable.source.weights.startswith("random:")
    )
    split, record = _split(request, _reordered(found, names, order), order, head, listener.phase)
    identity = _identity(request, trainable, settings, record)
    checkpoint = request.output / CHECKPOINT
    state = load_checkpoint(checkpoint, identity) if request.resume else None
    calibration = choose_calibration(split.train)
    write_splits(request.output, Path(record.folder), split, calibration)
    preprocess = trainable.source.preprocess
    assert preprocess is not None  # noqa: S101  # load_trainable saw to it
    trainer = Trainer(
        trainable.module,
        head=trainable.head,
        settings=settings,
        training=TrainingImages(split.train, preprocess, settings, listener.phase),
        heldout=DeclaredImages(
            split.heldout, preprocess, listener.phase, "reading held-out images"
        ),
        calibration=DeclaredImages(
            calibration, preprocess, listener.phase, "reading calibration images"
        ),
        save=lambda state: save_checkpoint(checkpoint, identity, state),
        listener=listener,
    )
    if state is not None:
        trainer.resume(state)
    outcome = trainer.run(deadline=deadline)
    report = FinetuneReport(
        source=request.source.source,
        weights=trainable.source.weights,
        weights_sha256=trainable.source.weights_sha256,
        head=head,
        data=record,
        settings=settings,
        criterion=settings.criterion,
        epochs=outcome.history,
        best_epoch=outcome.best_epoch,
        improved=outcome.best_epoch > 0 and _beats_majority(outcome, trainer.heldout.labels),
        stopped=outcome.stopped,
        temperature=_temperature(outcome.logits, trainer.heldout.labels),
        seconds=round(outcome.seconds, 3),
        tools=identity.tools,
    )
    return _finish(request, trainable, report, order if names is not None else None)


def _find(request: Request, trainable: Trainable) -> tuple[Found, tuple[str, ...] | None]:
    """The images, and the class names in the data's order; None without labels."""
    given = None
    if request.source.labels:
        given = read_labels_file(Path(request.source.labels))
    own = trainable.source.labels
    if request.labels_csv is None and request.tuning.distill:
        return find_unlabeled(request.data), None
    if given is None and request.labels_csv is not None and own is not None:
        given = own
    if given is None and request.labels_csv is not None and request.tuning.distill:
        given = tuple(f"class {index}" for index in range(trainable.classes))
    found = find_labeled(
        request.data, labels_csv=request.labels_csv, splits=request.splits, names=given
    )
    return found, found.classes


def _head(
    request: Request, trainable: Trainable, names: tuple[str, ...] | None
) -> tuple[HeadRecord, tuple[str, ...]]:
    quantized = request.tuning.qat_bits > 0
    if names is None:
        names = trainable.source.labels or tuple(
            f"class {index}" for index in range(trainable.classes)
        )
    head, order = fit_head(trainable, names, request.head, seed=request.tuning.seed)
    if head.replaced and quantized:
        raise ConfigError(
            f"--qat starts from a trained head, and {head.name} has {head.classes_before} "
            f"classes for data with {head.classes}: fine-tune without --qat first, then run "
            "--qat on what that wrote"
        )
    return head, order


def _reordered(found: Found, names: tuple[str, ...] | None, order: tuple[str, ...]) -> Found:
    """Labels as indices into the model's own order of the same names."""
    if names is None or names == order:
        return found
    place = {name: index for index, name in enumerate(order)}
    samples = tuple(
        dataclasses.replace(sample, label=place[names[sample.label]])
        if sample.label is not None
        else sample
        for sample in found.samples
    )
    return dataclasses.replace(found, samples=samples, classes=order)


def _split(
    request: Request,
    found: Found,
    order: tuple[str, ...],
    head: HeadRecord,
    progress: Callable[[str, int, int], None],
) -> tuple[Split, DataRecord]:
    from converters.finetune.images import identify, refuse_unreadable

    good, bad = identify(found.samples, progress)
    if not request.skip_unreadable or not good:
        refuse_unreadable(bad)
    if found.source == "seeded":
        split = split_seeded(good, share=request.holdout, seed=request.tuning.seed)
    else:
        split = Split(
            train=tuple(sample for sample in good if sample.role == "train"),
            heldout=tuple(sample for sample in good if sample.role == "heldout"),
        )
    labeled = found.classes is not None
    duplicates = check_split(
        split, order if labeled and not request.tuning.distill else None, all_classes=head.replaced
    )
    return split, DataRecord(
        folder=str(request.data.absolute()),
        train=len(split.train),
        heldout=len(split.heldout),
        classes=head.classes,
        split=found.source,
        heldout_sha256=digest_of(split.heldout),
        train_sha256=digest_of(split.train),
        duplicates=duplicates,
        left_out=tuple(str(item.path) for item in bad),
    )


def _identity(
    request: Request, trainable: Trainable, settings: Settings, record: DataRecord
) -> Identity:
    source = trainable.source
    return Identity(
        source=request.source.source,
        source_sha256=source.source_sha256,
        weights=source.weights,
        weights_sha256=source.weights_sha256,
        preprocess=canonical_json(source.preprocess).decode(),
        settings=settings,
        data=record,
        tools={name: installed_version(name) for name in ("torch", "torchvision", "nearfar")},
    )


def _beats_majority(outcome: Any, labels: Any) -> bool:
    """Better than always answering the most frequent held-out class (binomial, p < 0.05)."""
    if labels is None:
        return True
    from scipy.stats import binom

    share = float(labels.bincount().max()) / len(labels)
    right = round((outcome.history[outcome.best_epoch].top1 or 0.0) * len(labels))
    return bool(binom.sf(right - 1, len(labels), share) < _CHANCE_P)


def _temperature(logits: Any, labels: Any) -> float | None:
    """Fitted on held-out images; one number, so few dozen images are enough."""
    if labels is None or len(labels) < _TEMPERATURE_IMAGES:
        return None
    from converters.verify.metrics import best_temperature

    return round(best_temperature(logits.double().numpy(), labels.numpy()), 4)


def _finish(
    request: Request,
    trainable: Trainable,
    report: FinetuneReport,
    labels: tuple[str, ...] | None,
) -> FinetuneReport:
    output = request.output
    if report.improved:
        known = labels if labels is not None else trainable.source.labels
        source = write_weights(output, trainable, report.source, report.head, known)
        convert, verify = next_commands(
            output, source, report, labels=known is not None, more=request.convert_options
        )
        report = msgspec.structs.replace(report, next_command=convert, verify_command=verify)
    write_report(output, report)
    if report.stopped != "minutes":
        (output / CHECKPOINT).unlink(missing_ok=True)
    return report
