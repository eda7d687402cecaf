"""Run the benchmarks, one after the other, each in its own process."""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent


def benchmarks() -> dict[str, str]:
    """Every module or package with a ``main``, by name, with the first line of its docstring."""
    found = {}
    paths = {path.stem: path for path in HERE.glob("*.py") if not path.stem.startswith("_")}
    paths |= {path.parent.name: path for path in HERE.glob("*/__main__.py")}
    for name, path in sorted(paths.items()):
        tree = ast.parse(path.read_text())
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            found[name] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def main() -> None:
    known = benchmarks()
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("names", nargs="*", metavar="NAME", help="these; default: all")
    parser.add_argument("--list", action="store_true", help="name them and end")
    parser.add_argument("--quick", action="store_true", help="the short form of each")
    parser.add_argument("--out", type=Path, default=Path("build/bench"), help="folder for JSON")
    arguments = parser.parse_args()
    if arguments.list:
        for name, line in known.items():
            print(f"{name:24} {line}")
        return
    for name in arguments.names:
        if name not in known:
            parser.error(f"there is no benchmark {name!r}; there are {', '.join(known)}")
    failed = []
    for name in arguments.names or known:
        command = [sys.executable, "-m", f"benchmarks.{name}"]
        command += ["--json", str(arguments.out / f"{name}.json")]
        print(f"== {name}: {known[name]}", flush=True)
        start = time.monotonic()
        status = subprocess.run([*command, *(["--quick"] if arguments.quick else [])]).returncode
        print(f"== {name}: {time.monotonic() - start:.0f} s, exit {status}", flush=True)
        if status:
            failed.append(name)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
