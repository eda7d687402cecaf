"""The constants of the simulated world, and where they come from.

Confidence, accuracy, image sizes, TCP and server figures are those of the offload study
that this simulator was built after. Where it leaves one open, the choice is the harder one:

* thermal: a slowdown of 1 to 1.8 that grows with the share of the last 30 s in which the
  local model ran, complete at 0.22: a small board (``pi``) that answers everything itself is
  late in a quarter of independent requests at 500 ms, as in that study;
* bursts: 3 to 8 shots 0.1 to 0.4 s apart, 12 s of pause on average: it is late in two thirds of
  them, as there;
* a connection idle for 15 s is closed, as HTTP clients and servers do by default;
* a keep-warm request does not keep TCP's window (RFC 2861: an application that does not
  use its window loses it);
* uploads of one device share its link in order of submission;
* 5G promotes like LTE, its anchor.

Radio power is in ``edge_runtime/estimators/energy.py``: the device predicts with the same
table that the world bills with.
"""

from __future__ import annotations

import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import msgspec

from edge_runtime.contract.errors import ConfigError

__all__ = ["Constants", "DeviceConstants", "load_constants"]

Positive = Annotated[float, msgspec.Meta(gt=0, le=1e9)]
NotNegative = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class RunConstants(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Length of a run."""

    duration_s: Annotated[float, msgspec.Meta(gt=0, le=86_400)]
    http_timeout_s: Positive


class AccuracyConstants(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The pair of models."""

    confidence_alpha: Positive
    confidence_beta: Positive
    cloud_right_if_local_right: Share
    cloud_right_if_local_wrong: Share


class ImageConstants(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sizes of the bodies."""

    median_bytes: Positive
    log_sigma: NotNegative
    min_bytes: Annotated[int, msgspec.Meta(ge=1)]
    max_bytes: Annotated[int, msgspec.Meta(ge=1)]


class PoissonConstants(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Independent requests."""

    rate_per_s: Positive


class BurstConstants(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Several shots, then a pause."""

    mean_pause_s: Positive
    min_shots: Annotated[int, msgspec.Meta(ge=1, le=1000)]
    max_shots: Annotated[int, msgspec.Meta(ge=1, le=1000)]
    min_gap_s: Positive
    max_gap_s: Positive


class ArrivalConstants(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The three patterns of requests."""

    poisson: PoissonConstants
    bursty: BurstConstants
    sparse: PoissonConstants


class TcpConstants(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Transport."""

    initial_window_bytes: Positive
    window_kept_s: NotNegative
    max_window_bytes: Positive
    handshake_round_trips: Annotated[int, msgspec.Meta(ge=0, le=10)]
    overhead: Annotated[float, msgspec.Meta(ge=1, le=10)]
    header_bytes: NotNegative
    ping_bytes: NotNegative
    handshake_bytes: NotNegative
    connection_kept_s: NotNegative
    unacknowledged_bytes: NotNegative


class ServerConstants(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The broker and what befalls it."""

    service_mean_ms: Positive
    service_shape: Positive
    queue_mean_ms: Positive
    overload_every_s: Positive
    overload_mean_s: Positive
    overload_queue_mean_ms: Positive
    outage_every_s: Positive
    outage_mean_s: Positive
    outage_refuses: Share


class RttConstants(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Synthetic round trips: base + Gamma(shape, scale), in milliseconds."""

    base_ms: NotNegative
    shape: Positive
    scale_ms: NotNegative


class DeviceConstants(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The local model on one class of device; the latency is log-normal."""

    local_median_ms: Positive
    local_log_sigma: NotNegative
    local_watts: NotNegative


class ThermalConstants(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Slowdown by recent duty."""

    max_slowdown: Annotated[float, msgspec.Meta(ge=1, le=100)]
    duty_tau_s: Positive
    full_duty: Annotated[float, msgspec.Meta(gt=0, le=1)]


class Constants(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole world."""

    run: RunConstants
    accuracy: AccuracyConstants
    images: ImageConstants
    arrivals: ArrivalConstants
    tcp: TcpConstants
    server: ServerConstants
    rtt: dict[str, RttConstants]
    devices: dict[str, DeviceConstants]
    thermal: ThermalConstants


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in changes.items():
        old = merged.get(name)
        both = isinstance(value, dict) and isinstance(old, dict)
        merged[name] = _merge(old or {}, value) if both else value
    return merged


def load_constants(overrides: Path | None = None) -> Constants:
    """The shipped constants, with those of a TOML file of the same shape laid over them.

    Raises ``ConfigError`` naming the entry that makes no sense.
    """
    text = files("edge_runtime.simulation").joinpath("defaults.toml").read_text("utf-8")
    data = tomllib.loads(text)
    if overrides is not None:
        try:
            data = _merge(data, tomllib.loads(overrides.read_text("utf-8")))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"cannot read constants from {overrides}: {error}") from None
    try:
        return msgspec.convert(data, Constants)
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"constants of the simulation: {error}; compare with simulation/defaults.toml"
        ) from None
