"""The training loop: epochs, the held-out figure, the best weights, early stopping.

An epoch is a function of the state before it, the settings and its number: every random
draw comes from a generator seeded with the run's seed and the epoch. So a run that was
stopped and resumed ends with the same bits as one that was not.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import time
from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from torch import nn

from converters.finetune.average import MovingAverage, cloned
from converters.finetune.checkpoint import State
from converters.finetune.images import DeclaredImages, TrainingImages
from converters.finetune.objective import (
    Figures,
    answers,
    cross_entropy,
    distillation,
    evaluate,
)
from converters.finetune.settings import EpochReport, Settings
from converters.finetune.stages import Stages, learning_rate
from converters.restore.post_training import round_unfolded
from converters.restore.simulate import QuantizedModel, snap_weights
from converters.rewrites.rounding import sample_count
from edge_runtime.contract.errors import EvaluationError

__all__ = ["Listener", "Outcome", "Trainer", "epoch_seed"]

_BATCH = 32


class Listener(Protocol):
    """Who is told how training goes on."""

    def phase(self, message: str, done: int, total: int) -> None:
        """Something other than an epoch: ``done`` of ``total``."""

    def step(self, epoch: int, epochs: int, step: int, steps: int, loss: float) -> None:
        """One optimizer step."""

    def epoch(self, report: EpochReport, epochs: int) -> None:
        """One epoch is over and its checkpoint written."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended. The module holds the best weights, on the int8 grid after QAT."""

    history: list[EpochReport]
    best_epoch: int
    stopped: Literal["epochs", "patience", "minutes"]
    logits: torch.Tensor
    """Held out, ``[N, classes]``, of the float module as saved."""
    seconds: float


def epoch_seed(seed: int, epoch: int) -> int:
    """63 bits that depend on both numbers."""
    digest = hashlib.sha256(f"{seed}:{epoch}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class Trainer:
    """One run. ``module`` is trained in place."""

    def __init__(
        self,
        module: nn.Module,
        *,
        head: str,
        settings: Settings,
        training: TrainingImages,
        heldout: DeclaredImages,
        calibration: DeclaredImages,
        save: Callable[[State], None],
        listener: Listener,
    ) -> None:
        """``calibration``: training images by which int8 ranges are set, as in a conversion."""
        self.module = module
        self.settings = settings
        self.training = training
        self.heldout = heldout
        self.calibration = calibration
        self.save = save
        self.listener = listener
        example = next(heldout.batches(2))
        for parameter in module.parameters():
            parameter.requires_grad_(True)
        self.stages = Stages(module, head, example, settings)
        self.teacher: nn.Module | None = None
        self.quantized: QuantizedModel | None = None
        self.taught: torch.Tensor | None = None
        if settings.qat_bits:
            self.teacher = copy.deepcopy(module).eval().requires_grad_(False)
            self.quantized = QuantizedModel(
                module, example, bits=settings.qat_bits, activations=settings.qat_bits == 8
            )
            self.taught = answers(self.teacher, heldout)
        self.optimizer = self._optimizer()
        self.average = MovingAverage(module, settings.ema_decay) if settings.ema_decay else None
        self.state = State(model={}, optimizer={})

    def _optimizer(self) -> Any:
        groups = self.stages.groups()
        rate = self.settings.learning_rate
        if self.settings.optimizer == "sgd":
            return torch.optim.SGD(groups, rate, momentum=0.9, nesterov=True)
        return torch.optim.AdamW(groups, rate)

    def resume(self, state: State) -> None:
        """Go on after ``state.epoch`` instead of starting."""
        self.module.load_state_dict(state.model)
        self.optimizer.load_state_dict(state.optimizer)
        if self.average is not None and state.average is not None:
            self.average.restore(state.average)
        self.state = state

    def run(self, *, deadline: float | None = None) -> Outcome:
        """Train to the end, or until ``deadline`` on the monotonic clock, in seconds.

        An epoch that the time does not suffice for is dropped. Raises ``EvaluationError``
        when the loss is no longer finite.
        """
        start = time.monotonic()
        before = self.state.seconds
        if not self.state.history:
            self._start()
        stopped: Literal["epochs", "patience", "minutes"] = "epochs"
        while self.state.epoch < self.settings.epochs:
            if self._is_stale():
                stopped = "patience"
                break
            if not self._epoch(self.state.epoch + 1, deadline):
                stopped = "minutes"
                break
            self.state.seconds = before + time.monotonic() - start
            self._checkpoint()
            self.listener.epoch(self.state.history[-1], self.settings.epochs)
        if self.state.best is not None:
            self.module.load_state_dict(self.state.best)
        self.module.eval()
        if self.quantized is not None:
            snap_weights(self.quantized)
        return Outcome(
            history=self.state.history,
            best_epoch=self.state.best_epoch,
            stopped=stopped,
            logits=answers(self.module, self.heldout),
            seconds=before + time.monotonic() - start,
        )

    def _start(self) -> None:
        """Epoch 0: what there is before training; for QAT, what conversion alone would give."""
        start = time.monotonic()
        self.module.eval()
        if self.quantized is not None and self.settings.qat_bits == 8:
            self.listener.phase("post-training quantization to start from", 0, 1)
            round_unfolded(self.module, self._samples())
        figures = self._measure()
        if self.average is not None:
            self.average = MovingAverage(self.module, self.settings.ema_decay)
        self._record(0, figures, start, rate=0.0, loss=None, layers=0, improved=False)
        self._checkpoint()
        self.listener.epoch(self.state.history[-1], self.settings.epochs)

    def _samples(self) -> torch.Tensor:
        """Calibration images for rounding, as many as ``convert`` takes."""
        pixels = torch.cat(list(self.calibration.batches(_BATCH)))
        count = sample_count(tuple(pixels.shape))
        return pixels[:: max(1, len(pixels) // count)][:count]

    def _measure(self) -> Figures:
        """Held-out figures of the weights that would be saved now."""
        self.module.eval()
        swap = self.average.applied() if self.average is not None else contextlib.nullcontext()
        model: Callable[[torch.Tensor], Any] = self.module
        with swap:
            if self.quantized is not None:
                self.quantized.measure(self.calibration.batches(_BATCH))
                model = self.quantized
            logits = answers(model, self.heldout)
        return evaluate(
            logits,
            objective=self.settings.objective,
            labels=self.heldout.labels,
            teacher=self.taught,
            temperature=self.settings.distill_temperature,
        )

    def _epoch(self, epoch: int, deadline: float | None) -> bool:
        """Train and measure one epoch; False when the time is over before its end."""
        start = time.monotonic()
        layers = self.stages.begin(epoch, statistics=self.quantized is None)
        if self.quantized is not None:
            # True ranges of the weights as they are now, as a conversion would find them.
            self.quantized.measure(self.calibration.batches(_BATCH))
        steps = self.training.steps
        total, rate = 0.0, 0.0
        batches = self.training.epoch(epoch_seed(self.settings.seed, epoch))
        for step, (batch, labels) in enumerate(batches):
            if deadline is not None and time.monotonic() > deadline:
                return False
            rate = self._set_rate((epoch - 1) * steps + step)
            loss = self._loss(batch, labels)
            value = float(loss.detach())
            if value != value or value in (float("inf"), float("-inf")):
                raise EvaluationError(
                    f"training diverged in epoch {epoch} (the loss is {value}): lower --lr"
                )
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            if self.average is not None:
                self.average.update()
            total += value
            self.listener.step(epoch, self.settings.epochs, step + 1, steps, value)
        figures = self._measure()
        improved = self._is_better(figures)
        if improved:
            self.state.best = self._candidate()
            self.state.best_epoch = epoch
        self._record(
            epoch, figures, start, rate=rate, loss=total / steps, layers=layers, improved=improved
        )
        return True

    def _candidate(self) -> dict[str, torch.Tensor]:
        if self.average is None:
            return cloned(self.module)
        return {name: value.clone() for name, value in self.average.values.items()}

    def _set_rate(self, step: int) -> float:
        settings = self.settings
        steps = self.training.steps
        rate = learning_rate(
            step,
            total=settings.epochs * steps,
            warmup=round(settings.warmup_epochs * steps),
            peak=settings.learning_rate,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        return rate

    def _loss(self, batch: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        model: Callable[[torch.Tensor], Any] = self.quantized or self.module
        logits = model(batch)
        if self.settings.objective == "teacher":
            assert self.teacher is not None  # noqa: S101  # QAT makes one
            with torch.no_grad():
                wanted = self.teacher(batch)
            return distillation(logits, wanted, self.settings.distill_temperature)
        assert labels is not None  # noqa: S101  # the objective needs them
        return cross_entropy(logits, labels, self.settings.label_smoothing)

    def _is_better(self, figures: Figures) -> bool:
        best = self.state.history[self.state.best_epoch]
        if self.settings.criterion == "loss":
            return figures.loss < best.loss
        return (figures.top1 or 0.0, -figures.loss) > (best.top1 or 0.0, -best.loss)

    def _is_stale(self) -> bool:
        """Nothing better for ``patience`` epochs since the best, or since the last thaw."""
        since = max(self.state.best_epoch, *(e - 1 for e in self.settings.unfreeze_at), 0)
        return self.state.epoch - since >= self.settings.patience

    def _record(
        self,
        epoch: int,
        figures: Figures,
        start: float,
        *,
        rate: float,
        loss: float | None,
        layers: int,
        improved: bool,
    ) -> None:
        self.state.epoch = epoch
        self.state.history.append(
            EpochReport(
                epoch=epoch,
                seconds=round(time.monotonic() - start, 3),
                learning_rate=rate,
                train_loss=loss,
                loss=figures.loss,
                top1=figures.top1,
                agreement=figures.agreement,
                trained_layers=layers,
                improved=improved,
            )
        )

    def _checkpoint(self) -> None:
        self.state.model = self.module.state_dict()
        self.state.optimizer = self.optimizer.state_dict()
        self.state.average = self.average.state() if self.average is not None else None
        self.save(self.state)
