"""The peers, each in an environment of its own over the torch of the main one.

    python -m benchmarks.serving.peers [NAME ...]

makes ``build/peers/NAME``. Their own packages come first, the main environment's after them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Final

__all__ = ["CONFIGURATIONS", "FLOOR", "PEERS", "QUICK", "environment_of", "installed_versions"]

_FOLDER: Final = Path(__file__).parents[2] / "build" / "peers"

PEERS: Final[dict[str, tuple[str, ...]]] = {
    "bentoml": ("bentoml==1.4.39",),
    "fastapi": ("fastapi", "uvicorn[standard]"),
    "litserve": ("litserve==0.2.19", "python-multipart"),
    "mlserver": ("mlserver==1.7.1", "uvloop<0.22"),
    "pytriton": ("nvidia-pytriton==0.7.0",),
    "ray": ("ray[serve]==2.60.0",),
}
"""What to install. LitServe needs python-multipart and does not name it; MLServer's workers find
no event loop in a newer uvloop."""

CONFIGURATIONS: Final[dict[str, tuple[str, ...]]] = {
    "fastapi": ("fastapi",),
    "litserve": ("litserve", "litserve tuned"),
    "pytriton": ("pytriton", "pytriton tuned"),
    "bentoml": ("bentoml", "bentoml tuned"),
    "mlserver": ("mlserver",),
    "ray": ("ray", "ray tuned"),
}
"""How each is run: as it comes, and where it has settings for overload with those set."""

QUICK: Final = ("fastapi", "litserve", "pytriton")
"""Those that start within seconds: all that a quick run has time for."""

FLOOR: Final = "floor"
"""The broker's own HTTP library with nothing behind it: no peer, but what no server undercuts."""

_SHOWN: Final = {
    "bentoml": ("bentoml",),
    "mlserver": ("mlserver",),
    "ray": ("ray",),
    "fastapi": ("fastapi", "uvicorn"),
    "litserve": ("litserve",),
    "pytriton": ("nvidia-pytriton",),
}


def environment_of(server: str) -> Path | None:
    """The Python of a peer's environment; None where it was not made."""
    if server == FLOOR:
        return Path(sys.executable)
    python = _FOLDER / server / "bin" / "python"
    return python if python.exists() else None


def installed_versions(server: str) -> dict[str, str]:
    """Versions of what the peer is, as its environment has them."""
    script = (
        "import sys, json; from importlib.metadata import version; "
        "print(json.dumps({n: version(n) for n in sys.argv[1:]}))"
    )
    command = [str(environment_of(server)), "-c", script, *_SHOWN[server]]
    found: dict[str, str] = json.loads(subprocess.check_output(command, text=True))
    return found


_RECURSION_COUNT: Final = """

import threading as _threading
from multiprocessing import resource_tracker as _tracker

if not hasattr(_threading.RLock(), "_recursion_count"):
    _tracker._resource_tracker._lock = _threading._PyRLock()
"""
"""Triton's Python stub brings an interpreter that is older than the standard library it finds,
whose resource tracker asks its lock for a method that came later: it would never be ready."""


def _make(server: str) -> None:
    target = _FOLDER / server
    uv = [sys.executable, "-m", "uv"]
    subprocess.run([*uv, "venv", "-q", "--python", sys.executable, str(target)], check=True)
    python = target / "bin" / "python"
    packages = subprocess.check_output(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    ).strip()
    (Path(packages) / "main_environment.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run(
        [*uv, "pip", "install", "-q", "--python", str(python), *PEERS[server]], check=True
    )
    if server == "pytriton":
        with (Path(packages) / "pytriton" / "proxy" / "data.py").open("a") as file:
            file.write(_RECURSION_COUNT)


def main() -> None:
    for server in sys.argv[1:] or PEERS:
        if server not in PEERS:
            sys.exit(f"no peer {server!r}; there are: {', '.join(PEERS)}")
        if environment_of(server) is None:
            print(f"making {server} ...", flush=True)
            _make(server)


if __name__ == "__main__":
    main()
