"""How to verify, and what came of it: records, no code that runs a file."""

from __future__ import annotations

import dataclasses

import msgspec

from converters.jobs import SourceRequest
from converters.report.records import LayerRow, Sample
from converters.supervisor import Listener
from converters.verify.checks import Check
from converters.verify.figures import Finding
from converters.verify.gates import Gates

__all__ = ["Options", "Report", "VariantReport"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How to verify."""

    gates: Gates
    reference: SourceRequest | None = None
    """Rebuild this source and compare with it, instead of the bundle's own reference."""
    jobs: int = 1
    latents: int = 32
    """Generation: how many images to compare."""
    layers: bool = False
    """Compare layer by layer too; a variant that fails is always bisected where it can be."""
    explain: bool = True
    """Look for the mistake behind what failed or is in doubt; costs as much as the rest."""
    samples: list[Sample] | None = None
    """Filled, when given, with the worst inputs and everyone's answers, for the HTML page."""
    listener: Listener | None = None


class VariantReport(msgspec.Struct, frozen=True, kw_only=True):
    """One variant's figures; ``None`` where it did not run or the task has no such figure."""

    id: str
    format: str
    precision: str
    passed: bool
    reasons: tuple[str, ...]
    findings: tuple[Finding, ...]
    """The reasons with their names."""
    images: int
    sqnr_db: float | None = None
    sqnr_db_min: float | None = None
    wanted_db: float | None = None
    """The gate's bound on the mean SQNR."""
    max_abs: float | None = None
    agreement: float | None = None
    disagreements: int | None = None
    confident_agreement: float | None = None
    metrics: dict[str, float] = {}
    size_ratio: float | None = None
    size_bytes: int = 0
    quantized_share: float | None = None
    accuracy: float | None = None
    milliseconds: float | None = None
    """Median of one inference on this machine, one thread: not a phone's."""
    peak_ram_bytes: int | None = None
    backend_missing: bool = False


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The whole proof."""

    bundle: str
    version: str
    task: str
    passed: bool
    images: int
    reference_accuracy: float | None
    variants: tuple[VariantReport, ...]
    checks: tuple[Check, ...]
    layers: dict[str, list[LayerRow]] = {}
    """By variant; of the formats whose inner values can be read (tflite, coreml)."""

    @property
    def exit_code(self) -> int:
        """0 all passed, 3 a backend is missing, 1 something failed."""
        if self.passed:
            return 0
        failed = [v for v in self.variants if not v.passed]
        if (
            all(check.passed for check in self.checks)
            and failed
            and all(v.backend_missing for v in failed)
        ):
            return 3
        return 1
