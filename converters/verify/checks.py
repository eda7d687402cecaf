"""Checks of a whole bundle: its reference, golden vectors and declared pre-processing."""

from __future__ import annotations

from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from converters.verify.figures import Finding
from converters.verify.metrics import (
    Matrix,
    best_temperature,
    chance_probability,
    cross_entropy,
    sqnr_db,
)
from edge_runtime.bundle import Bundle
from edge_runtime.contract.errors import EvaluationError
from edge_runtime.contract.manifest import ReferenceRecord
from edge_runtime.contract.preprocess import NAMED, Preprocess
from edge_runtime.contract.tasks import DetectionTask, SegmentationTask
from edge_runtime.contract.tensors import canonical_shape

__all__ = [
    "Check",
    "candidates",
    "check_contract",
    "check_golden",
    "check_labels",
    "check_preprocess",
    "check_record",
    "probe_findings",
]

_GOLDEN_MIN_DB = 60.0
_P_VALUE = 0.01
_PROBE_MARGIN_DB = 3.0
_PROBE_LEAST_DB = 5.0
"""A file that is off by more than half of the signal answers like nothing."""
_SWAPPED = "red and blue swapped"


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One finding about the bundle as a whole."""

    name: Literal["reference-record", "io-contract", "golden-vectors", "preprocess", "labels"]
    passed: bool
    detail: str


def candidates(declared: Preprocess) -> list[tuple[str, Preprocess]]:
    """The declared pre-processing, every named one, and the declared with red and blue swapped.

    Size, crop and resize stay as declared; no record comes twice. Gray input has only the
    declared one.
    """
    found = [("as the bundle declares", declared)]
    if declared.color == "GRAY":
        return found
    for name, (color, normalization) in NAMED.items():
        record = msgspec.structs.replace(declared, color=color, normalization=normalization)
        if record == declared:
            found[0] = (name, declared)
        else:
            found.append((name, record))
    table = declared.normalization
    swapped = msgspec.structs.replace(
        declared,
        color="BGR" if declared.color == "RGB" else "RGB",
        normalization=msgspec.structs.replace(
            table, mean=tuple(reversed(table.mean)), std=tuple(reversed(table.std))
        ),
    )
    if swapped not in [record for _, record in found]:
        found.append((_SWAPPED, swapped))
    return found


def check_record(bundle: Bundle, record: ReferenceRecord | None) -> Check:
    """The manifest says of the reference what ``model.pt2`` itself says."""
    manifest = bundle.manifest
    if record is None:
        return Check(
            name="reference-record",
            passed=True,
            detail="another reference was given: the record inside model.pt2 was not read",
        )
    wrong = []
    if record.preprocess != manifest.preprocess:
        wrong.append("pre-processing")
    if record.task != manifest.task:
        wrong.append("task")
    reference = manifest.reference
    if reference is not None and (record.inputs, record.outputs) != (
        reference.inputs,
        reference.outputs,
    ):
        wrong.append("tensors")
    if wrong:
        return Check(
            name="reference-record",
            passed=False,
            detail=f"the manifest's {' and '.join(wrong)} differ from the record inside "
            "model.pt2: the manifest was changed after conversion; convert again",
        )
    return Check(name="reference-record", passed=True, detail="manifest and model.pt2 agree")


def check_contract(bundle: Bundle) -> Check:
    """Every variant takes and gives what the reference does, but for layout.

    A variant with post-processing in its graph gives that instead; 8-bit input is a choice.
    """
    manifest = bundle.manifest
    if manifest.reference is None:
        return Check(name="io-contract", passed=True, detail="no reference to compare with")
    wrong = []
    forms = [tuple((spec.name, canonical_shape(spec)) for spec in manifest.reference.outputs)]
    if isinstance(manifest.task, DetectionTask):
        count = min(manifest.task.candidates, manifest.task.anchors.count * manifest.task.classes)
        forms.append((("boxes", (1, count, 4)), ("scores", (1, count)), ("classes", (1, count))))
    if isinstance(manifest.task, SegmentationTask):
        height, width = manifest.reference.outputs[0].shape[2:]
        forms.append((("classes", (1, height, width)),))
    taken = tuple((spec.name, canonical_shape(spec)) for spec in manifest.reference.inputs)
    for variant in manifest.variants:
        inputs = tuple((spec.name, canonical_shape(spec)) for spec in variant.inputs)
        outputs = tuple((spec.name, canonical_shape(spec)) for spec in variant.outputs)
        if inputs != taken or outputs not in forms:
            wrong.append(f"{variant.id} takes {inputs} and gives {outputs}")
    if wrong:
        return Check(
            name="io-contract",
            passed=False,
            detail=f"the reference takes {taken} and gives {forms[0]}, but " + "; ".join(wrong),
        )
    return Check(
        name="io-contract",
        passed=True,
        detail=f"all {len(manifest.variants)} variants take and give the reference's tensors",
    )


def check_golden(bundle: Bundle, answers: list[Matrix]) -> Check:
    """The reference answers the golden inputs as it did when the bundle was made.

    ``answers``: one array an output, ``[golden, ...]``.
    """
    worst = 1e9
    for row, vector in enumerate(bundle.manifest.golden):
        for name, output in zip(vector.outputs, answers, strict=False):
            stored = np.frombuffer((bundle.root / name).read_bytes(), dtype="<f4")
            own = output[row].reshape(-1)[:: vector.stride]
            if stored.shape != own.shape:
                return Check(
                    name="golden-vectors",
                    passed=False,
                    detail=f"{name} has {stored.shape[0]} numbers, not {own.shape[0]}",
                )
            worst = min(worst, float(sqnr_db(stored[None], own[None])[0]))
    if worst < _GOLDEN_MIN_DB:
        return Check(
            name="golden-vectors",
            passed=False,
            detail=f"the reference answers the golden inputs otherwise than recorded "
            f"({worst:.1f} dB): its pre-processing or weights were changed; convert again",
        )
    return Check(
        name="golden-vectors",
        passed=True,
        detail=f"{len(bundle.manifest.golden)} golden answers reproduced, worst {worst:.0f} dB",
    )


def check_labels(logits: Matrix, classes: NDArray[np.int64]) -> Check:
    """Labels that the reference cannot predict at all belong to other images or classes.

    Raises ``EvaluationError`` for a class the model does not have.
    """
    count, outputs = logits.shape
    if int(classes.max()) >= outputs:
        raise EvaluationError(
            f"a label is {int(classes.max())}, the model has classes 0 to {outputs - 1}: "
            "use the class order that the model was trained with"
        )
    right = int((logits.argmax(axis=1) == classes).sum())
    probability = chance_probability(right, count, outputs)
    detail = f"the reference is right on {right} of {count} labeled images"
    if count >= 20 and probability > _P_VALUE:
        return Check(
            name="labels",
            passed=False,
            detail=f"{detail}, no better than chance: the labels are of another order, or the "
            "pre-processing is wrong",
        )
    return Check(name="labels", passed=True, detail=detail)


def check_preprocess(
    declared: Matrix,
    others: list[tuple[str, Matrix]],
    classes: NDArray[np.int64],
) -> Check:
    """No other candidate explains the labels better than the declared pre-processing.

    Cross-entropy of each image, each pre-processing at its own best temperature (an
    overconfident net would otherwise reward whatever blurs its answers), compared by a
    one-sided paired t test; p < 0.01 is an error.
    """
    from scipy import stats

    own = cross_entropy(declared, classes, best_temperature(declared, classes))
    better = []
    for name, logits in others:
        if not np.isfinite(logits).all():
            continue
        other = cross_entropy(logits, classes, best_temperature(logits, classes))
        if other.mean() >= own.mean():
            continue
        p_value = float(stats.ttest_rel(own, other, alternative="greater").pvalue)
        if p_value < _P_VALUE:
            better.append((float(other.mean()), name, p_value))
    if better:
        loss, name, p_value = min(better)
        return Check(
            name="preprocess",
            passed=False,
            detail=f"pre-processing {name!r} explains the labels better than the declared one: "
            f"cross-entropy {loss:.3f} against {own.mean():.3f} over {len(classes)} images "
            f"(p = {p_value:.1e}); convert again with the one the model was trained with",
        )
    return Check(
        name="preprocess",
        passed=True,
        detail=f"the declared pre-processing is not beaten (cross-entropy {own.mean():.3f})",
    )


def probe_findings(names: list[str], probe_db: list[float], own: int | None) -> list[Finding]:
    """Does one variant answer more like the reference under another pre-processing?

    That happens when the file was made, or its record written, for another one; unlike a
    fixed gate this holds however coarse the variant's quantization is. ``probe_db``: mean
    SQNR for each of ``names``, the first being the bundle's own; ``own``: the variant's.
    """
    base = probe_db[own] if own is not None else probe_db[0]
    best = max(range(len(names)), key=lambda number: probe_db[number])
    if best == own or probe_db[best] <= max(base + _PROBE_MARGIN_DB, _PROBE_LEAST_DB):
        return []
    swapped = names[best] == _SWAPPED
    return [
        Finding(
            name="channel-order" if swapped else "preprocess-record",
            detail=f"it answers like the reference when fed with pre-processing {names[best]!r} "
            f"({probe_db[best]:.1f} dB) instead of its own record ({base:.1f} dB): "
            "the record is wrong",
        )
    ]
