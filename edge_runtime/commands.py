"""``nearfar run``: answer images with a bundle, on the device or through a broker."""

from __future__ import annotations

import json
from pathlib import Path

import click
import msgspec

from edge_runtime.contract import limits
from edge_runtime.contract.errors import ConfigError, ContractError, NearfarError
from edge_runtime.contract.files import read_bounded
from edge_runtime.contract.wire import ModelRef
from edge_runtime.policies.base import InferenceMode
from edge_runtime.policies.reasons import sentence
from edge_runtime.results import Result
from edge_runtime.runtime import EdgeRuntime

__all__ = ["run"]

_MAX_KEY_FILE_BYTES = 4096


@click.command(
    epilog="""\b
Examples:
  nearfar run digits.bundle photo.jpg
  nearfar run digits.bundle *.jpg --broker http://127.0.0.1:8080 --deadline-ms 400
  nearfar run digits.bundle photo.jpg --broker https://broker.example \\
      --api-key-file key.txt --mode PREFER_IN_CLOUD --explain
  nearfar run digits.bundle photo.jpg --variant tflite-int8 --top-k 3 --json

\b
Exit status: 0 every image was answered; 1 some were not; 2 bad input: the bundle, an
option, or every image.
"""
)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...", type=click.Path())
@click.option("--broker", metavar="URL", help="Broker to offload to; without it all stays here.")
@click.option(
    "--mode",
    type=click.Choice([mode.value for mode in InferenceMode]),
    default=InferenceMode.ADAPTIVE.value,
    show_default=True,
    help="Where images may be answered.",
)
@click.option(
    "--deadline-ms",
    type=click.FloatRange(1, limits.MAX_DEADLINE_MS),
    default=limits.DEFAULT_DEADLINE_MS,
    show_default=True,
    help="Time for each answer, in milliseconds.",
)
@click.option(
    "--variant",
    default="auto",
    show_default=True,
    help="auto, a variant's id, or FORMAT-PRECISION (see: nearfar inspect BUNDLE).",
)
@click.option(
    "--cloud-model", metavar="NAME", help="The broker's model; default: the one that fits."
)
@click.option("--top-k", type=click.IntRange(1, limits.MAX_TOP_K), help="Show so many classes.")
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path),
    help="File with the broker's API key on its only line.",
)
@click.option(
    "--allow-plain-http", is_flag=True, help="Send the key over http:// to another machine."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line and image.")
@click.option("--explain", is_flag=True, help="Print why each image was answered where it was.")
def run(
    bundle: Path,
    images: tuple[str, ...],
    broker: str | None,
    mode: str,
    deadline_ms: float,
    variant: str,
    cloud_model: str | None,
    top_k: int | None,
    api_key_file: Path | None,
    allow_plain_http: bool,
    as_json: bool,
    explain: bool,
) -> None:
    """Answer images with a BUNDLE, on this device or through a broker.

    Each IMAGE is a JPEG, PNG or WebP file.
    """
    api_key = None if api_key_file is None else _read_key(api_key_file)
    failures: list[NearfarError] = []
    with EdgeRuntime(
        bundle,
        broker,
        mode,
        variant,
        cloud_model=cloud_model,
        api_key=api_key,
        deadline_ms=deadline_ms,
        allow_plain_http=allow_plain_http,
    ) as runtime:
        if broker is not None:
            runtime.prewarm(wait_ms=deadline_ms)
        if explain and not as_json:
            chosen = runtime.status().variant
            if chosen is not None:
                click.echo(f"variant {chosen.variant}: {chosen.reason}")
        for image in images:
            try:
                result = runtime.run(image, top_k=top_k)
            except NearfarError as error:
                failures.append(error)
                _print_failure(image, error, as_json)
                continue
            click.echo(_to_json(image, result) if as_json else _to_text(image, result))
            if explain and not as_json:
                click.echo(_explain(result))
    if len(failures) == len(images) and all(isinstance(e, ContractError) for e in failures):
        raise click.exceptions.Exit(2)
    if failures:
        raise click.exceptions.Exit(1)


def _read_key(path: Path) -> str:
    try:
        key = read_bounded(path, _MAX_KEY_FILE_BYTES).decode("ascii").strip()
    except UnicodeDecodeError:
        key = ""
    if not key or len(key.split()) != 1:
        raise ConfigError(f"{path} must hold one API key and nothing else")
    return key


def _model_name(result: Result) -> str:
    model = result.model
    return f"{model.name}@{model.version}" if isinstance(model, ModelRef) else model


def _to_text(image: str, result: Result) -> str:
    ranked = ", ".join(f"{p.label} {p.score:.3f}" for p in result.predictions)
    late = "" if result.deadline_met else "  LATE"
    return (
        f"{image}: {ranked}  [{result.inference_source.value} {_model_name(result)}, "
        f"{result.timings.total_ms:.0f} ms]{late}"
    )


def _to_json(image: str, result: Result) -> str:
    return json.dumps({"image": image, **msgspec.to_builtins(result)})


def _print_failure(image: str, error: NearfarError, as_json: bool) -> None:
    if as_json:
        failure = {"code": error.code, "detail": error.detail, "retryable": error.retryable}
        click.echo(json.dumps({"image": image, "failure": failure}))
    click.echo(f"{image}: error [{error.code}]: {error.detail}", err=True)


def _explain(result: Result) -> str:
    """The decision in a few indented lines."""
    decision, situation, timings = result.decision, result.situation, result.timings
    confidence = "not yet known" if situation.confidence is None else f"{situation.confidence:.3f}"
    inputs = (
        f"local confidence {confidence}, {situation.time_left_ms:.0f} ms left, "
        f"{situation.upload_bytes} bytes to upload"
    )
    lines = [
        f"    {decision.action.value} ({decision.reason}): {sentence(decision.reason)}",
        f"    given: {inputs}",
    ]
    if decision.predicted_cloud_ms is not None:
        lines.append(
            f"    cloud: {decision.predicted_cloud_ms:.0f} ms predicted "
            f"(upload {decision.predicted_upload_ms or 0:.0f} ms), in time with probability "
            f"{decision.p_cloud_in_deadline:.2f}; gain {decision.expected_gain:.4f} "
            f"against a price of {decision.price:.4f}"
        )
    measured = [
        f"{name} {value:.0f} ms"
        for name, value in (
            ("local", timings.local_ms),
            ("cloud", timings.cloud_ms),
            ("upload", timings.upload_ms),
            ("broker's queue", timings.server_queue_ms),
            ("broker's model", timings.server_inference_ms),
        )
        if value is not None
    ]
    failed = "" if result.error is None else f"; the other side failed: {result.error}"
    lines.append(f"    measured: {', '.join(measured)}{failed}")
    return "\n".join(lines)
