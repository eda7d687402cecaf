"""``python -m edge_runtime`` is ``nearfar``, also where the script is not on PATH."""

from edge_runtime.cli import main

main()
