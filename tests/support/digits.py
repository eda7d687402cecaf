"""The zoo's digits as photos, and the small net's bundle, made once a session."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import msgspec

from edge_runtime.contract.manifest import Manifest
from tests.support.mend import mend


def nearfar(*arguments: str | Path, timeout_s: float = 600.0) -> subprocess.CompletedProcess[str]:
    """Run the command line in a child process, as a user would."""
    return subprocess.run(
        [sys.executable, "-m", "edge_runtime", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def checked(*arguments: str | Path) -> str:
    done = nearfar(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def render(folder: Path, split: str, count: int) -> Path:
    """``count`` photos of a split with their ``labels.csv``."""
    checked("zoo", "render", "--split", split, "-o", folder, "--count", str(count))
    return folder


def convert_digits(folder: Path, calibration: Path) -> Path:
    """The whole bundle of the small net: three formats, every precision they have."""
    bundle = folder / "digits.bundle"
    checked(
        "convert", "zoo:digits-small", "--calib", calibration,
        "--calib-labels", calibration / "labels.csv", "-o", bundle, "--quiet",
    )  # fmt: skip
    return bundle


def only(source: Path, target: Path, *variant_ids: str) -> Path:
    """A copy of a bundle with some of its variants: faster to verify."""
    shutil.copytree(source, target)

    def keep(manifest: Manifest) -> Manifest:
        for variant in manifest.variants:
            if variant.id not in variant_ids:
                path = target / variant.path
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return msgspec.structs.replace(
            manifest, variants=tuple(v for v in manifest.variants if v.id in variant_ids)
        )

    mend(target, keep)
    return target
