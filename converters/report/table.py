"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Callable

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from converters.verify.verify import Report, VariantReport
from edge_runtime.contract.manifest import Manifest
from edge_runtime.contract.preprocess import Preprocess, ResizeExact
from edge_runtime.contract.tasks import task_name

__all__ = ["describe_preprocess", "print_manifest", "print_report"]


def _bytes(count: int) -> str:
    if count >= 10 * 2**20:
        return f"{count / 2**20:.0f} MB"
    if count >= 2**20:
        return f"{count / 2**20:.2f} MB"
    return f"{count / 2**10:.0f} kB"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def print_report(report: Report, console: Console, seconds: dict[str, float] | None = None) -> None:
    """Each variant and check of a proof; reasons below the table."""
    wide = console.width >= 110
    inputs = "seeds" if report.task == "generation" else "images"
    title = f"{report.bundle} {report.version}: {report.images} {inputs}"
    table = Table(title=title, box=SIMPLE)
    table.add_column("variant", no_wrap=True)
    for name, _ in _columns(report, seconds, wide):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("gate", no_wrap=True)
    for entry in report.variants:
        cells = [render(entry) for _, render in _columns(report, seconds, wide)]
        gate = "[green]passed[/green]" if entry.passed else "[red]FAILED[/red]"
        table.add_row(entry.id, *cells, gate)
    console.print(table)
    for entry in report.variants:
        for reason in entry.reasons:
            console.print(f"[red]{entry.id}[/red]: {reason}", highlight=False)
    for check in report.checks:
        mark = "[green]ok[/green]" if check.passed else "[red]FAILED[/red]"
        console.print(f"{check.name}: {mark}: {check.detail}", highlight=False)
    if report.reference_accuracy is not None:
        console.print(f"accuracy of the fp32 reference: {report.reference_accuracy:.4f}")


# Which of the metrics get a column: title and form.
_METRICS = {
    "map": ("mAP", ".3f"),
    "miou": ("mIoU", ".3f"),
    "psnr_db": ("PSNR dB", ".1f"),
    "ssim": ("SSIM", ".3f"),
}


def _metric(key: str, form: str) -> Callable[[VariantReport], str]:
    return lambda entry: _number(entry.metrics.get(key), form)


def _columns(
    report: Report, seconds: dict[str, float] | None, wide: bool
) -> list[tuple[str, Callable[[VariantReport], str]]]:
    """Column titles and what each shows; a narrow terminal gets fewer."""
    columns: list[tuple[str, Callable[[VariantReport], str]]] = [
        ("size", lambda v: _bytes(v.size_bytes)),
        ("SQNR dB", lambda v: _number(v.sqnr_db, ".1f")),
    ]
    if report.task in ("classification", "detection", "segmentation"):
        title = {"detection": "boxes", "segmentation": "pixels"}.get(report.task, "agree")
        columns.append((title, lambda v: _number(v.agreement, ".1%")))
    columns += [
        (title, _metric(key, form))
        for key, (title, form) in _METRICS.items()
        if any(key in entry.metrics for entry in report.variants)
    ]
    if wide:
        columns[1:1] = [("ratio", lambda v: _number(v.size_ratio, ".2f"))]
        columns += [
            ("worst dB", lambda v: _number(v.sqnr_db_min, ".1f")),
            ("differ", lambda v: _number(v.disagreements, "d")),
            ("RAM", lambda v: "-" if v.peak_ram_bytes is None else _bytes(v.peak_ram_bytes)),
            ("ms here", lambda v: _number(v.milliseconds, ".1f")),
        ]
    if report.reference_accuracy is not None:
        columns.append(("accuracy", lambda v: _number(v.accuracy, ".4f")))
    if seconds is not None:
        columns.append(("made in", lambda v: _number(seconds.get(v.id), ".1f") + " s"))
    return columns


def describe_preprocess(record: Preprocess) -> str:
    """One line: ``shorter side 256, center 224x224, RGB, (x/255 - mean) / std``."""
    parts = []
    if isinstance(record.resize, ResizeExact):
        parts.append(f"resize to {record.resize.height}x{record.resize.width}")
    else:
        parts.append(f"shorter side to {record.resize.size}")
    parts[-1] += f" ({record.resize.algorithm})"
    if record.crop is not None:
        parts.append(f"center {record.crop.height}x{record.crop.width}")
    if record.flip_horizontal:
        parts.append("mirrored")
    table = record.normalization
    parts.append(record.color)
    parts.append(f"(x/{table.scale:g} - {list(table.mean)}) / {list(table.std)}")
    return ", ".join(parts)


def print_manifest(manifest: Manifest, console: Console) -> None:
    """What is in a bundle."""
    console.print(f"[bold]{manifest.name} {manifest.version}[/bold]", highlight=False)
    console.print(
        f"task: {task_name(manifest.task)}"
        + (f", {manifest.labels.count} labels" if manifest.labels else "")
    )
    if manifest.preprocess is not None:
        console.print(
            f"pre-processing: {describe_preprocess(manifest.preprocess)}", highlight=False
        )
    origin = manifest.provenance
    console.print(f"from {origin.source}, weights {origin.weights}, nearfar {origin.nearfar}")
    if origin.calibration is not None:
        console.print(
            f"calibrated on {origin.calibration.images} {origin.calibration.data}: "
            f"{origin.calibration.method}"
        )
    table = Table()
    for name in ("variant", "input", "runtime", "runs on"):
        table.add_column(name)
    for name in ("size", "RAM", "SQNR dB", "agree"):
        table.add_column(name, justify="right")
    table.add_column("judged on")
    table.add_column("ships")
    for variant in manifest.variants:
        tensor = variant.inputs[0]
        quality = variant.quality
        table.add_row(
            variant.id,
            f"{tensor.dtype} {'x'.join(map(str, tensor.shape))} {tensor.layout}",
            variant.min_runtime,
            _systems(variant.min_os.android_api, variant.min_os.ios),
            _bytes(variant.size_bytes),
            _bytes(variant.peak_ram_bytes),
            f"{quality.sqnr_db_mean:.1f}",
            _number(quality.agreement, ".2%"),
            f"{quality.images} {quality.data}",
            "[green]yes[/green]" if variant.ship else "[red]no[/red]",
        )
    console.print(table)
    for variant in manifest.variants:
        for reason in variant.quality.reasons:
            console.print(f"[red]{variant.id}[/red]: {reason}", highlight=False)
    shipped = sum(entry.size_bytes for entry in manifest.files if entry.ship)
    private = sum(entry.size_bytes for entry in manifest.files if not entry.ship)
    console.print(f"{_bytes(shipped)} to ship, {_bytes(private)} for verification only")


def _systems(android_api: int | None, ios: str | None) -> str:
    parts = []
    if android_api is not None:
        parts.append(f"Android API {android_api}")
    if ios is not None:
        parts.append(f"iOS {ios}")
    return ", ".join(parts) or "-"
