"""What a training run is asked for, and what it reports."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from edge_runtime.contract.errors import ConfigError

__all__ = ["DataRecord", "EpochReport", "FinetuneReport", "HeadRecord", "Objective", "Settings"]

Objective = Literal["labels", "teacher"]
"""What the loss compares with: the labels, or the fp32 model's own answers."""

Count = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
Share = Annotated[float, msgspec.Meta(ge=0.0, lt=1.0)]


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Every number that training depends on; a run is a function of these and the data."""

    epochs: Count = 20
    batch: Count = 32
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: Annotated[float, msgspec.Meta(gt=0.0, le=100.0)]
    """Its peak, for the head."""
    backbone_scale: Annotated[float, msgspec.Meta(gt=0.0, le=1.0)]
    """Learning rate of everything but the head, over ``learning_rate``."""
    weight_decay: Annotated[float, msgspec.Meta(ge=0.0, le=10.0)]
    warmup_epochs: Annotated[float, msgspec.Meta(ge=0.0)] = 1.0
    label_smoothing: Share = 0.1
    ema_decay: Share = 0.0
    """Per step; 0: no moving average."""
    patience: Count = 6
    """Epochs without a better held-out figure before training stops."""
    freeze: Literal["none", "backbone"] = "none"
    unfreeze_at: tuple[int, ...] = ()
    """Epochs (from 1) at whose start the next part of the backbone, from the head down,
    begins to train; as many equal parts as there are numbers."""
    augment: bool = True
    crop_scale: Annotated[float, msgspec.Meta(gt=0.0, le=1.0)] = 0.35
    """Least share of the photo's area that a random crop keeps."""
    flip: bool = True
    color_jitter: Share = 0.2
    rand_augment: Annotated[int, msgspec.Meta(ge=0, le=10)] = 0
    """RandAugment operations a photo."""
    seed: int = 0
    threads: Count = 1
    """Part of the settings: another number adds floats in another order."""
    objective: Objective = "labels"
    distill_temperature: Annotated[float, msgspec.Meta(gt=0.0, le=100.0)] = 4.0
    qat_bits: Literal[0, 4, 8] = 0
    """Bits of a rounded weight; 8 rounds activations too, 4 does not; 0: float training."""

    @property
    def criterion(self) -> Literal["top1", "loss"]:
        """The held-out figure that decides which epoch is best.

        What rounding costs shows in the loss long before it flips one of a few images.
        """
        return "loss" if self.qat_bits else "top1"

    def check(self) -> None:
        """Raise ``ConfigError`` when two settings contradict each other."""
        if self.unfreeze_at and self.freeze != "backbone":
            raise ConfigError("--unfreeze-at needs --freeze backbone: nothing else is frozen")
        steps = self.unfreeze_at
        if list(steps) != sorted(set(steps)) or any(not 1 < e <= self.epochs for e in steps):
            raise ConfigError(
                f"--unfreeze-at {','.join(map(str, steps))}: write rising epochs from 2 to "
                f"{self.epochs}"
            )
        if self.objective == "teacher" and not self.qat_bits:
            raise ConfigError(
                "--distill needs --qat: without rounding the net already answers as its fp32 self"
            )


class EpochReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One epoch; epoch 0 is the model before training."""

    epoch: int
    seconds: float
    learning_rate: float
    """Of the head, at the epoch's last step."""
    train_loss: float | None
    loss: float
    """Held out: mean cross-entropy, or with ``teacher`` the distillation loss, in nats."""
    top1: float | None
    """Held out, against the labels; None without labels."""
    agreement: float | None = None
    """Held out: share on which the rounded model answers as the fp32 original; QAT only."""
    trained_layers: int
    improved: bool


class HeadRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The classifier layer."""

    name: str
    kind: str
    classes_before: int
    classes: int
    replaced: bool
    reason: str


class DataRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was trained and measured on."""

    folder: str
    train: int
    heldout: int
    classes: int
    split: str
    """``folders``, ``csv``, or ``seeded`` (drawn here)."""
    heldout_sha256: str
    """Of the sorted SHA-256 digests of the held-out files, one a line."""
    train_sha256: str
    duplicates: int
    """Training images whose pixels are those of another."""
    left_out: tuple[str, ...] = ()
    """Unreadable files, with ``--skip-unreadable``."""


class FinetuneReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``report.json``."""

    source: str
    weights: str
    weights_sha256: str | None
    head: HeadRecord
    data: DataRecord
    settings: Settings
    criterion: Literal["top1", "loss"]
    """By which the best epoch was chosen; ``top1``: at equal top-1 the lower loss."""
    epochs: list[EpochReport]
    best_epoch: int
    improved: bool
    """False: no epoch beat the start, and no weights were written."""
    stopped: Literal["epochs", "patience", "minutes"]
    temperature: float | None = None
    """Fitted on the held-out images; None where there are too few."""
    seconds: float
    tools: dict[str, str]
    next_command: str = ""
    verify_command: str = ""
