"""A measured gain on disk: ``gain/<variant>-<cloud model>.json`` beside the bundle.

Both names are hex SHA-256: of the variant's bytes (``Variant.sha256``) and of the cloud
model's manifest (``ModelRef.sha256``). A gain belongs to exactly one such pair; for any
other the prior stands, and the reason says so. The folder lies beside the bundle and not in
it, because a bundle holds what its manifest lists and nothing else.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec

from edge_runtime.bundle import Bundle
from edge_runtime.contract import limits
from edge_runtime.contract.errors import ConfigError, ContractError, NearfarError
from edge_runtime.contract.files import read_bounded
from edge_runtime.contract.manifest import canonical_json
from edge_runtime.contract.tasks import TaskName
from edge_runtime.gain.curve import GainCurve
from edge_runtime.gain.model import MAX_KNOTS, NODES, GainFigures
from edge_runtime.gain.scores import Calibration
from edge_runtime.policies.adaptive import GainPrior

__all__ = [
    "GAIN_REASONS",
    "CloudModel",
    "Evidence",
    "GainLookup",
    "GainProvenance",
    "GainRecord",
    "gain_folder",
    "gain_path",
    "load_gain",
    "read_gain",
    "write_gain",
]

MAX_GAIN_BYTES: Final = 2**18
_DIGEST = re.compile(r"[0-9a-f]{64}\Z")
_FILE_NAME = "{variant}-{cloud}.json"
_MAX_KNOWN: Final = 64

Sha256 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$(?!\n)")]
Text = Annotated[str, msgspec.Meta(max_length=limits.MAX_TEXT_CHARS)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Gain = Annotated[float, msgspec.Meta(ge=-1, le=1)]
Count = Annotated[int, msgspec.Meta(ge=0, le=limits.MAX_DATASET_FILES)]

Evidence = Literal["labels", "agreement"]
"""``labels``: both sides were held to labels. ``agreement``: only how often both say the
same was measured; who is right where they differ is the prior's."""

GAIN_REASONS: Final = {
    "gain_measured": "the gain was measured against labels for these two models",
    "gain_from_agreement": "the gain is the measured disagreement of these two models, with a "
    "prior for who is right",
    "gain_prior_uncalibrated": "this variant was never calibrated: the gain is a prior",
    "gain_prior_other_cloud": "this variant was calibrated with another cloud model: the gain is "
    "a prior",
    "gain_prior_no_cloud": "the cloud model is not known yet: the gain is a prior",
    "gain_prior_unreadable": "the gain file of these two models is damaged: the gain is a prior",
}
"""Where a gain comes from: stable codes, each with a sentence."""


class CloudModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The cloud model that answered."""

    name: Text
    version: Text
    sha256: Sha256


class GainProvenance(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the figures were measured on. No path, no name of a file."""

    images: Count
    skipped: Count
    """Images that could not be read."""
    data_sha256: Sha256
    """Over ``"<sha256 of a file> <class or ->\\n"`` of each image, sorted."""
    split: Annotated[str, msgspec.Meta(max_length=128)] | None
    date: Annotated[str, msgspec.Meta(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$(?!\n)")]
    nearfar: Annotated[str, msgspec.Meta(max_length=64)]


class GainRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One pair's gain, and how it was found."""

    format: Literal["nearfar.gain"] = "nearfar.gain"
    schema_version: Literal[1] = 1
    bundle: Text
    variant: Text
    variant_sha256: Sha256
    cloud: CloudModel
    task: TaskName
    evidence: Evidence
    agreement_metric: Text
    """What ``agreement`` means for this task."""
    knots: Annotated[
        tuple[tuple[Share, Gain], ...], msgspec.Meta(min_length=1, max_length=MAX_KNOTS)
    ]
    own: Annotated[tuple[tuple[Share, Share], ...], msgspec.Meta(max_length=MAX_KNOTS)] = ()
    """P(local right | c); by the prior from the agreement without labels."""
    nodes: Annotated[tuple[Share, ...], msgspec.Meta(max_length=NODES)] = ()
    """See ``GainCurve.nodes``."""
    local_right: Share
    """Measured with labels; by the prior from the agreement without."""
    cloud_right: Share | None
    """None: without labels."""
    agreement: Share
    prior: GainPrior
    calibration: Calibration | None
    """None: without labels, or answers carry no score."""
    held_out: GainFigures | None
    """The curve on the halves it has not seen; None: without labels."""
    held_out_prior: GainFigures | None
    """The prior on the same images."""
    provenance: GainProvenance

    def check(self) -> None:
        """Raise ``ContractError`` where the curve is none."""
        numbers = [number for knot in (*self.knots, *self.own) for number in knot]
        if not all(math.isfinite(number) for number in numbers):
            raise ContractError("a knot of the gain is not finite: calibrate again")
        for (before, high), (after, low) in pairwise(self.knots):
            if after <= before or low > high:
                raise ContractError(
                    "the gain's knots do not rise in confidence and fall in gain: calibrate again"
                )
        for (before, low), (after, high) in pairwise(self.own):
            if after <= before or low > high:
                raise ContractError(
                    "the local model's knots do not rise in confidence and in its being right: "
                    "calibrate again"
                )

    @property
    def curve(self) -> GainCurve:
        """The gain itself."""
        return GainCurve(
            knots=self.knots, own=self.own, nodes=self.nodes, local_right=self.local_right
        )


def gain_folder(bundle: Bundle) -> Path:
    """Where gains of this bundle's variants lie."""
    return bundle.root.parent / "gain"


def gain_path(folder: Path, variant_sha256: str, cloud_sha256: str) -> Path:
    """The file of one pair. Raises ``ConfigError`` unless both are hex SHA-256."""
    for digest in (variant_sha256, cloud_sha256):
        if not _DIGEST.match(digest):
            raise ConfigError("a gain is stored by the hex SHA-256 of both models")
    return folder / _FILE_NAME.format(variant=variant_sha256, cloud=cloud_sha256)


def write_gain(folder: Path, record: GainRecord) -> Path:
    """Write ``record``, whole or not at all; the file's path. Raises ``ConfigError``."""
    record.check()
    path = gain_path(folder, record.variant_sha256, record.cloud.sha256)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(canonical_json(record))
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise ConfigError(
            f"cannot write {path}: {error.strerror}: choose another folder with -o"
        ) from None
    return path


def read_gain(path: Path) -> GainRecord:
    """Read and check one file.

    Raises ``MissingFile``, ``LimitExceeded``, or ``ContractError`` when it breaks its schema
    or is of another pair than its name says.
    """
    data = read_bounded(path, MAX_GAIN_BYTES)
    try:
        record = msgspec.json.decode(data, type=GainRecord)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ContractError(f"{path.name} is no gain: {error}: calibrate again") from None
    record.check()
    if path.name != gain_path(path.parent, record.variant_sha256, record.cloud.sha256).name:
        raise ContractError(f"{path.name} holds the gain of another pair: calibrate again")
    return record


def load_gain(
    bundle: Bundle,
    variant_sha256: str,
    cloud_sha256: str | None,
    *,
    folder: Path | None = None,
    prior: GainPrior | None = None,
) -> tuple[GainCurve | GainPrior, str]:
    """The gain of a pair, or the prior, and a code of ``GAIN_REASONS`` that says which.

    Args:
        bundle: an opened bundle.
        variant_sha256: ``Variant.sha256`` of the local variant.
        cloud_sha256: ``ModelRef.sha256`` of the cloud model; None: not known yet.
        folder: where gains lie; None: ``gain_folder(bundle)``.
        prior: what stands where there is no measured gain; None: the default one.

    Never raises for what it finds there: a broker chooses its digest, and a damaged file
    costs the measurement, not the answer.
    """
    stated = prior or GainPrior()
    if cloud_sha256 is None or not _DIGEST.match(cloud_sha256):
        return stated, "gain_prior_no_cloud"
    place = gain_folder(bundle) if folder is None else folder
    path = gain_path(place, variant_sha256, cloud_sha256)
    try:
        if not path.exists():
            known = any(place.glob(f"{variant_sha256}-*.json"))
            return stated, "gain_prior_other_cloud" if known else "gain_prior_uncalibrated"
        record = read_gain(path)
    except (NearfarError, OSError):
        return stated, "gain_prior_unreadable"
    measured = record.evidence == "labels"
    return record.curve, "gain_measured" if measured else "gain_from_agreement"


class GainLookup:
    """``load_gain`` for the requests of one runtime: each cloud model's file is read once.

    Safe in any thread: two that come at once read the same file, and keep the same gain.
    """

    def __init__(
        self,
        bundle: Bundle,
        variant_sha256: str,
        *,
        folder: Path | None = None,
        prior: GainPrior | None = None,
    ) -> None:
        self._bundle, self._variant = bundle, variant_sha256
        self._folder, self._prior = folder, prior
        self._known: dict[str | None, tuple[GainCurve | GainPrior, str]] = {}

    def of(self, cloud_sha256: str | None) -> tuple[GainCurve | GainPrior, str]:
        """The gain over this variant, and a code of ``GAIN_REASONS``; None: not known yet."""
        found = self._known.get(cloud_sha256)
        if found is None:
            found = load_gain(
                self._bundle,
                self._variant,
                cloud_sha256,
                folder=self._folder,
                prior=self._prior,
            )
            if len(self._known) >= _MAX_KNOWN:  # a broker that changes its mind for ever
                self._known.clear()
            self._known[cloud_sha256] = found
        return found
