"""The proof as one HTML page for people: no script, nothing loaded from anywhere.

A content security policy inside the page forbids everything but its own style sheet (by
digest) and embedded pictures, so that even a name that got past the escaping could neither
run nor load anything.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from converters.report.gallery import samples_section
from converters.report.markup import text
from converters.report.numbers import format_bytes
from converters.report.overview import charts_section
from converters.report.records import LayerRow, Sample
from converters.report.sections import (
    checks_section,
    layers_section,
    variants_section,
    verdict_section,
)
from converters.report.style import STYLE
from converters.report.table import describe_preprocess
from converters.verify.gates import Gates
from converters.verify.outcome import Report
from edge_runtime.bundle import Bundle
from edge_runtime.contract.errors import ConfigError
from edge_runtime.contract.manifest import Manifest, Variant

__all__ = ["render_html", "write_html"]


def write_html(
    report: Report,
    path: Path,
    *,
    bundle: Bundle,
    samples: Sequence[Sample] = (),
    layers: Mapping[str, Sequence[LayerRow]] | None = None,
    seconds: Mapping[str, float] | None = None,
    gates: Gates | None = None,
) -> None:
    """Write the page of ``report``, whole or not at all.

    Args:
        report: The proof.
        path: The file; its folder is made.
        bundle: What was proven.
        samples: Inputs with everyone's answers, worst first.
        layers: For each variant its layers, in the order of the net; without them, the
            report's own.
        seconds: How long each variant's conversion took.
        gates: The bounds, to be shown under the figures.

    Raises:
        ConfigError: ``path`` cannot be written.
    """
    page = render_html(
        report, bundle=bundle, samples=samples, layers=layers, seconds=seconds, gates=gates
    )
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(page.encode("utf-8", "replace"))
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise ConfigError(f"cannot write {path}: {error.strerror}: choose another file") from None


def render_html(
    report: Report,
    *,
    bundle: Bundle,
    samples: Sequence[Sample] = (),
    layers: Mapping[str, Sequence[LayerRow]] | None = None,
    seconds: Mapping[str, float] | None = None,
    gates: Gates | None = None,
) -> str:
    """The page of ``write_html`` as text."""
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode("ascii")
    policy = (
        f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )
    title = f"{report.bundle} {report.version}"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<link rel="icon" href="data:,">
<title>{text(title)}: {"passed" if report.passed else "failed"}</title>
<style>{STYLE}</style></head><body>
<header><p class="eyebrow">nearfar proof of conversion</p><h1>{text(title)}</h1></header>
<main>
{verdict_section(report)}
{_facts(report, bundle)}
{charts_section(report)}
{variants_section(report, seconds, gates)}
{checks_section(report)}
{layers_section(report, report.layers if layers is None else layers)}
{samples_section(report, samples)}
{_files(bundle.manifest)}
{_origin(bundle.manifest)}
{_definitions(report)}
</main></body></html>
"""


def _facts(report: Report, bundle: Bundle) -> str:
    task = report.task.replace("_", " ")
    inputs = "latents by seed" if report.task == "generation" else "images"
    facts = [("task", text(task), ""), ("judged on", f"{report.images}", inputs)]
    if report.reference_accuracy is not None:
        facts.append(("accuracy of the fp32 model", f"{report.reference_accuracy:.1%}", ""))
    passed = [entry for entry in report.variants if entry.passed]
    if passed:
        least = min(passed, key=lambda entry: entry.size_bytes)
        facts.append(("smallest that passed", format_bytes(least.size_bytes), text(least.id)))
    shipped = sum(entry.size_bytes for entry in bundle.manifest.files if entry.ship)
    facts.append(("all files to ship", format_bytes(shipped), ""))
    return (
        '<dl class="facts">'
        + "".join(
            f"<div><dt>{name}</dt><dd>{value}{f'<small>{more}</small>' if more else ''}</dd></div>"
            for name, value, more in facts
        )
        + "</dl>"
    )


def _files(manifest: Manifest) -> str:
    """What an app developer needs to know of each file."""
    rows = []
    for variant in manifest.variants:
        tensor = variant.inputs[0]
        shape = "x".join(str(side) for side in tensor.shape)
        notes = [*variant.rewrites]
        if variant.kept:
            notes.append(f"in floating point: {', '.join(variant.kept)}")
        rows.append(
            f"<tr><td><b>{text(variant.id)}</b></td>"
            f"<td>{text(tensor.dtype)} {text(shape)} {text(tensor.layout)}</td>"
            f"<td>{text(_systems(variant))}</td><td>{text(variant.min_runtime)}</td>"
            f'<td class="text">{text("; ".join(notes)) or "&ndash;"}</td></tr>'
        )
    head = "".join(
        f"<th>{name}</th>" for name in ("file", "input", "runs on", "interpreter", "rewrites")
    )
    return (
        '<h2>The files</h2><div class="scroll"><table><thead><tr>'
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _systems(variant: Variant) -> str:
    parts = []
    if variant.min_os.android_api is not None:
        parts.append(f"Android API {variant.min_os.android_api}")
    if variant.min_os.ios is not None:
        parts.append(f"iOS {variant.min_os.ios}")
    return ", ".join(parts) or "-"


def _origin(manifest: Manifest) -> str:
    origin = manifest.provenance
    rows = [("source", origin.source), ("weights", origin.weights)]
    if origin.weights_sha256 is not None:
        rows.append(("weights, SHA-256", origin.weights_sha256))
    if manifest.preprocess is not None:
        rows.append(("pre-processing", describe_preprocess(manifest.preprocess)))
    if origin.calibration is not None:
        used = origin.calibration
        rows.append(("calibration", f"{used.images} {used.data}: {used.method}"))
    tools = ", ".join(f"{name} {version}" for name, version in sorted(origin.tools.items()))
    rows += [("nearfar", origin.nearfar), ("tools", tools)]
    body = "".join(
        f'<tr><td><b>{text(name)}</b></td><td class="text">{text(value)}</td></tr>'
        for name, value in rows
    )
    return (
        '<h2>Where it comes from</h2><div class="scroll"><table class="list"><tbody>'
        f"{body}</tbody></table></div>"
    )


_SQNR = (
    "SQNR",
    (
        "Signal to quantization noise: 10 log10(sum r&sup2; / sum (r &minus; a)&sup2;) of the "
        "fp32 answer r and the variant&rsquo;s answer a, per input; mean and worst over the "
        "inputs. 20 dB: the error is a tenth of the answer. 200 dB: no error."
    ),
)
_GATE = (
    "gate",
    (
        "The least that a variant of this precision must reach. One that does not is marked not "
        "to ship in the manifest, and no runtime picks it."
    ),
)
_COST = (
    "RAM, ms",
    (
        "Growth of resident memory over loading and one inference, and the median time of one, "
        "on the machine that made this page."
    ),
)
_PICTURES = (
    "PSNR, SSIM",
    (
        "Closeness of the 8-bit pictures: peak signal to noise, and structural similarity "
        "(1: equal)."
    ),
)
_TASK_WORDS = {
    "classification": (
        "agree",
        (
            "Share of images with the same first class as the fp32 model; &ldquo;where "
            "sure&rdquo;: of those to which it gives at least 50 %."
        ),
    ),
    "detection": (
        "boxes, mAP",
        (
            "Share of the fp32 model&rsquo;s boxes found again (same class, IoU of at least "
            "0.5), and average precision with its boxes as ground truth."
        ),
    ),
    "segmentation": (
        "pixels, mIoU",
        (
            "Share of pixels with the fp32 model&rsquo;s class, and the mean over classes of "
            "intersection over union with its areas."
        ),
    ),
}


def _definitions(report: Report) -> str:
    words = (_SQNR, _TASK_WORDS.get(report.task, _PICTURES), _GATE, _COST)
    body = "".join(f"<div><dt>{name}</dt><dd>{meaning}</dd></div>" for name, meaning in words)
    return f'<h2>What the figures mean</h2><dl class="defs">{body}</dl>'
