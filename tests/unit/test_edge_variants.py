"""Which variant runs, and why; what cannot run says what to install."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from edge_runtime import BackendUnavailable, ConfigError, EdgeRuntime
from edge_runtime.contract.errors import ModelLoadError
from edge_runtime.contract.files import file_entries
from edge_runtime.contract.manifest import (
    MANIFEST_NAME,
    Manifest,
    Variant,
    canonical_json,
    variant_digest,
)
from tests.support.bundles import photo, tiny_bundle


def changed(target: Path, change: Callable[[Variant], Variant]) -> Path:
    """A copy of the tiny bundle whose variants were changed, digests mended."""
    shutil.copytree(tiny_bundle(), target)
    return mend(target, change)


def mend(target: Path, change: Callable[[Variant], Variant] = lambda v: v) -> Path:
    manifest = msgspec.json.decode((target / MANIFEST_NAME).read_bytes(), type=Manifest)
    entries = file_entries(target, exclude=[MANIFEST_NAME])
    variants = []
    for variant in manifest.variants:
        own = [entry for entry in entries if entry.path == variant.path]
        variants.append(
            change(
                msgspec.structs.replace(
                    variant, sha256=variant_digest(own), size_bytes=own[0].size_bytes
                )
            )
        )
    manifest = msgspec.structs.replace(manifest, variants=tuple(variants), files=entries)
    (target / MANIFEST_NAME).write_bytes(canonical_json(manifest))
    return target


def test_an_unknown_variant_is_refused_and_the_known_are_named() -> None:
    with pytest.raises(ConfigError, match="tflite-fp32, tflite-fp16, tflite-int8-dyn"):
        EdgeRuntime(tiny_bundle(), variant="tflite-int4")


def test_a_variant_whose_backend_is_missing_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_runtime.runtimes.executorch.find_spec", lambda _: None)

    def to_executorch(variant: Variant) -> Variant:
        return msgspec.structs.replace(variant, format="executorch")

    bundle = changed(tmp_path / "b", to_executorch)
    with pytest.raises(BackendUnavailable, match="executorch"):
        EdgeRuntime(bundle, variant="executorch-fp32")
    with pytest.raises(BackendUnavailable, match="no variant of this bundle runs here"):
        EdgeRuntime(bundle)


def test_core_ml_is_not_picked_by_itself_on_this_system(tmp_path: Path) -> None:
    bundle = changed(tmp_path / "b", lambda v: msgspec.structs.replace(v, format="coreml"))
    with pytest.raises(BackendUnavailable, match="coreml: not run here by itself"):
        EdgeRuntime(bundle)


def test_a_variant_that_does_not_ship_is_used_only_when_asked_for(tmp_path: Path) -> None:
    def hold_back(variant: Variant) -> Variant:
        quality = msgspec.structs.replace(variant.quality, passed=False, reasons=("too far off",))
        return msgspec.structs.replace(variant, ship=False, quality=quality)

    bundle = changed(tmp_path / "b", hold_back)
    with pytest.raises(ConfigError, match="passed its gate"):
        EdgeRuntime(bundle)
    with EdgeRuntime(bundle, variant="tflite-fp16") as runtime:
        assert runtime.run(photo(0)).model == "tflite-fp16"


def test_a_file_that_does_not_load_is_skipped_and_named(tmp_path: Path) -> None:
    target = tmp_path / "b"
    shutil.copytree(tiny_bundle(), target)
    (target / "tflite" / "fp32.tflite").write_bytes(b"no model")
    mend(target)
    with pytest.raises(ModelLoadError):
        EdgeRuntime(target, variant="tflite-fp32")
    with EdgeRuntime(target) as runtime:
        chosen = runtime.status().variant
    assert chosen is not None
    assert chosen.variant == "tflite-fp16"
    assert chosen.measured[0].variant == "tflite-fp32"
    assert chosen.measured[0].error is not None


def test_auto_takes_the_most_precise_one_that_fits() -> None:
    with EdgeRuntime(tiny_bundle()) as runtime:
        chosen = runtime.status().variant
    assert chosen is not None
    assert (chosen.variant, chosen.format, chosen.precision) == ("tflite-fp32", "tflite", "fp32")
    assert "fits 500 ms" in chosen.reason
    assert [entry.variant for entry in chosen.measured] == ["tflite-fp32"]
    assert 0 < chosen.p50_ms <= chosen.p95_ms


def test_auto_passes_over_one_that_is_too_slow_and_says_so() -> None:
    with EdgeRuntime(tiny_bundle(slow_fp32_layers=6), deadline_ms=60) as runtime:
        chosen = runtime.status().variant
    assert chosen is not None
    assert chosen.variant != "tflite-fp32"
    slow = chosen.measured[0]
    assert slow.variant == "tflite-fp32"
    assert slow.p95_ms is not None
    assert slow.p95_ms > 30


def test_auto_takes_the_fastest_when_none_fits() -> None:
    with EdgeRuntime(tiny_bundle(slow_fp32_layers=6), deadline_ms=1) as runtime:
        chosen = runtime.status().variant
        result = runtime.run(photo(0), deadline_ms=500)
    assert chosen is not None
    assert "none fits" in chosen.reason
    assert "fastest" in chosen.reason
    assert [entry.variant for entry in chosen.measured] == [
        "tflite-fp32",
        "tflite-fp16",
        "tflite-int8-dyn",
    ]
    assert chosen.variant != "tflite-fp32"
    assert result.model == chosen.variant


@pytest.mark.parametrize("wanted", ["tflite-int8-dyn", "TFLITE-INT8-DYN"])
def test_a_named_variant_is_taken(wanted: str) -> None:
    with EdgeRuntime(tiny_bundle(), variant=wanted) as runtime:
        chosen = runtime.status().variant
        assert chosen is not None
        assert chosen.variant == "tflite-int8-dyn"
        assert wanted in chosen.reason
