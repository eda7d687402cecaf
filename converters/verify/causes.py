"""Named mistakes behind a doubtful file, found by experiments with it and the reference.

In this order, and no further than the first that explains the file: a mistake built into
the reference (``mistakes``), another engine (``engine``), declared ranges (``ranges``).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.jobs import VariantRun
from converters.verify.diagnose import closer, explains
from converters.verify.engine import check_engine
from converters.verify.figures import Finding
from converters.verify.ranges import (
    Bounds,
    RangeRow,
    Spread,
    activation_floor,
    is_fixed,
    judge_ranges,
    match_values,
)
from converters.verify.run_files import Inputs, canonical_outputs
from converters.verify.values import Value
from edge_runtime.contract.manifest import ReferenceRecord
from edge_runtime.contract.preprocess import normalization_table
from edge_runtime.contract.tensors import pack_image
from edge_runtime.runtimes.base import find_runtime

__all__ = ["STATIC", "Ranges", "Reference", "find_causes", "noise"]

_ANSWERS = 8
"""Inputs on which answers are compared."""
_BATCH = 8
_NOISE_PIXELS = _BATCH * 224 * 224
_MAX_NOISE_IMAGES = 64
"""Extremes grow with the numbers drawn: small inputs need more of them."""
_SEED = 20
STATIC = ("int8", "a16w8")
"""Precisions whose activations have ranges in the file."""

Array = NDArray[np.float32]


class Reference:
    """The exported program with its record, run on a few inputs as often as needed."""

    def __init__(
        self, program: Any, record: ReferenceRecord, images: list[str], latents: int
    ) -> None:
        self.program = program
        self.record = record
        self.inputs = Inputs(images, latents)
        self._noise: dict[str, dict[str, Bounds]] = {}

    def batches(self, size: int = 1) -> Iterator[NDArray[Any]]:
        """The inputs as the reference takes them, ``size`` at a time."""
        fed = self.inputs.fed(self.record.preprocess, self.record.inputs[0])
        while several := list(itertools.islice(fed, size)):
            yield np.concatenate(several)

    @property
    def batch_size(self) -> int:
        """How many inputs to run at once: an interpreter's own cost is paid once for all."""
        return max(1, min(_BATCH, _NOISE_PIXELS // math.prod(self.record.inputs[0].shape[-2:])))

    def observe(
        self,
        batch: NDArray[Any],
        visit: Callable[[str, Array], None],
        names: Collection[str] | None = None,
    ) -> None:
        """Run once, and show ``visit`` the input and every floating-point value, in order.

        ``batch``: one input or several. ``names``: only these nodes. An array is valid during
        its visit: a later operator may work in place.
        """
        import torch
        from torch import fx

        class Observer(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                value = super().run_node(n)
                if n.op not in ("placeholder", "call_function"):
                    return value
                if names is None or n.name in names:
                    first = value[0] if isinstance(value, tuple) and value else value
                    if isinstance(first, torch.Tensor) and first.is_floating_point():
                        visit(n.name, first.detach().numpy().astype(np.float32, copy=False))
                return value

        with torch.no_grad():
            Observer(self.program).run(torch.from_numpy(batch))

    def values(self, batch: NDArray[Any]) -> dict[str, Array]:
        """The input, and what every node computes in floating point, in order."""
        kept: dict[str, Array] = {}

        def keep(name: str, value: Array) -> None:
            kept[name] = value.copy()

        self.observe(batch, keep)
        return kept

    def limits(self) -> Bounds | None:
        """Smallest and largest number that a pixel becomes; None for a generator."""
        if self.record.preprocess is None:
            return None
        table = normalization_table(self.record.preprocess.normalization)
        return float(np.min(table)), float(np.max(table))

    def noise_ranges(self, names: Collection[str]) -> dict[str, dict[str, Bounds]]:
        """By node, then by kind of noise: smallest and largest value. {} for a generator."""
        unknown = set(names) - set(self._noise)
        if unknown:
            for kind, batches in noise(self.record).items():
                size = self.batch_size
                for start in range(0, len(batches), size):
                    several = np.concatenate(batches[start : start + size])
                    self.observe(several, functools.partial(self._widen, kind), unknown)
        return self._noise

    def _widen(self, kind: str, name: str, value: Array) -> None:
        own = self._noise.setdefault(name, {})
        low, high = own.get(kind, (0.0, 0.0))
        own[kind] = min(low, float(value.min())), max(high, float(value.max()))


def noise(record: ReferenceRecord) -> dict[str, list[NDArray[Any]]]:
    """Inputs, batch 1, as those who have no images make them up; {} for a generator."""
    preprocess, spec = record.preprocess, record.inputs[0]
    if preprocess is None:
        return {}
    rng = np.random.default_rng(_SEED)
    table = normalization_table(preprocess.normalization)
    channels = len(table)

    def normalized(pixels: NDArray[Any]) -> NDArray[Any]:
        levels = np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
        return np.stack([table[c][levels[:, :, c]] for c in range(channels)], axis=2)

    size = (*spec.shape[-2:], channels)  # the reference takes NCHW
    count = min(_MAX_NOISE_IMAGES, -(-_NOISE_PIXELS // (size[0] * size[1])))
    kinds = {
        "uniform pixels": lambda: normalized(rng.integers(0, 256, size)),
        "normal pixels": lambda: normalized(rng.normal(128.0, 64.0, size)),
        "normal inputs": lambda: rng.normal(size=size),
        "uniform inputs, 0 to 1": lambda: rng.random(size),
        "uniform inputs, -1 to 1": lambda: rng.uniform(-1.0, 1.0, size),
    }
    return {
        kind: [pack_image(draw().astype(np.float32), spec) for _ in range(count)]
        for kind, draw in kinds.items()
    }


@dataclasses.dataclass(frozen=True)
class _Answers:
    """First outputs, ``[inputs, ...]``, canonical layout."""

    batches: list[NDArray[Any]]
    """What the file was fed with."""
    exact: list[NDArray[Any]]
    """What the reference was."""
    wanted: Array
    given: Array


def find_causes(
    item: VariantRun, reference: Reference, inputs: Inputs, values: Sequence[Value]
) -> list[Finding]:
    """What explains the file's answers, its ranges apart; [] when nothing does.

    ``values``: the file's inner values on the first input, where they can be read.
    """
    answers = _run(item, reference, inputs)
    if answers is None:
        return []
    found = _mistakes(reference, answers, values)
    if not found and item.variant.format == "torchscript":
        found = check_engine(Path(item.path), answers.batches, answers.wanted, answers.given)
    return found


def _run(item: VariantRun, reference: Reference, inputs: Inputs) -> _Answers | None:
    """Answers of both; None when the file answers in another form, or not in numbers."""
    import torch

    variant = item.variant
    fed = itertools.islice(inputs.fed(variant.preprocess, variant.inputs[0]), _ANSWERS)
    batches = list(fed)
    exact = list(itertools.islice(reference.batches(), _ANSWERS))
    model = find_runtime(variant.format).load(Path(item.path), variant)
    given = [np.asarray(canonical_outputs(model, model.run([one]))[0]) for one in batches]
    model.close()
    with torch.no_grad():
        wanted = [_first(reference.program(torch.from_numpy(one))) for one in exact]
    both = np.concatenate(wanted), np.concatenate(given).astype(np.float32)
    if both[0].shape != both[1].shape or not np.isfinite(both[1]).all():
        return None
    return _Answers(batches=batches, exact=exact, wanted=both[0], given=both[1])


def _first(answer: Any) -> Array:
    first = answer[0] if isinstance(answer, tuple | list) else answer
    return np.asarray(first.detach().numpy(), dtype=np.float32)


def _mistakes(reference: Reference, answers: _Answers, values: Sequence[Value]) -> list[Finding]:
    import torch

    from converters.verify.mistakes import Mistaken, mistakes

    for name, detail, mistake in mistakes(values):
        runner = Mistaken(reference.program, mistake)
        rows: list[Array] = []
        for batch in answers.exact:
            outputs = runner.answer(torch.from_numpy(batch))
            if outputs is None or outputs[0].shape[1:] != answers.wanted.shape[1:]:
                break
            rows.append(_first(outputs))
            if len(rows) == 1 and not closer(answers.wanted[:1], answers.given[:1], rows[0]):
                break  # it would have to be closer by far, on all of them
        if len(rows) != len(answers.exact):
            continue
        if explains(answers.wanted, answers.given, np.concatenate(rows)):
            return [Finding(name=name, detail=detail)]
    return []


class Ranges:
    """The ranges that several files declare, held against the reference in one go.

    The reference runs on every image, and on noise, once for all of them.
    """

    def __init__(self, reference: Reference, first: dict[str, Array]) -> None:
        """``first``: the reference's values on its first input."""
        self._reference = reference
        self._first = first
        self._input = next(iter(self._first))
        self._spreads: dict[str, list[dict[str, Spread]]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The files so far."""
        return tuple(self._spreads)

    def add(self, name: str, values: Sequence[Value]) -> None:
        """Take note of one file's ranges. ``values``: its inner values on the first input."""
        quantized: list[Value] = []
        for value in values:
            if value.low is None or value.high is None or is_fixed((value.low, value.high)):
                continue
            if (value.low, value.high) not in [(v.low, v.high) for v in quantized]:
                quantized.append(value)  # pooling and reshaping repeat a range
        matched = match_values(quantized, self._first) if quantized else []
        spreads: list[dict[str, Spread]] = []
        for value, nodes in zip(quantized, matched, strict=True):
            assert value.low is not None  # noqa: S101  # chosen so
            assert value.high is not None  # noqa: S101
            # An activation's range, which the node may lack; an input has none.
            declared = (value.low, value.high)
            floor = activation_floor(declared)
            spreads.append(
                {
                    node: Spread(declared, floor=None if node == self._input else floor)
                    for node in nodes
                }
            )
        self._spreads[name] = spreads

    def judge(self) -> dict[str, list[Finding]]:
        """Run the reference; what is wrong with each file's ranges, by name."""
        by_node: dict[str, list[Spread]] = {}
        for spreads in self._spreads.values():
            for nodes in spreads:
                for node, spread in nodes.items():
                    by_node.setdefault(node, []).append(spread)
        if not by_node:
            return {name: [] for name in self._spreads}

        def add(node: str, value: Array) -> None:
            for spread in by_node[node]:
                spread.add(value)

        for batch in self._reference.batches(self._reference.batch_size):
            self._reference.observe(batch, add, by_node)
        noises = self._reference.noise_ranges(by_node)
        return {
            name: judge_ranges([self._row(nodes, noises) for nodes in spreads if nodes])
            for name, spreads in self._spreads.items()
        }

    def _row(self, nodes: dict[str, Spread], noises: dict[str, dict[str, Bounds]]) -> RangeRow:
        """One range, beside the node that it suits best: with ReLU or without, say."""
        node, spread = max(nodes.items(), key=lambda pair: pair[1].clip_db)
        return RangeRow(
            name=node,
            declared=spread.declared,
            real=(spread.low, spread.high),
            clip_db=spread.clip_db,
            noise={
                kind: (low if spread.floor is None else max(low, spread.floor), high)
                for kind, (low, high) in noises.get(node, {}).items()
            },
            limits=self._reference.limits() if node == self._input else None,
        )
