"""Reports as one HTML page: no script, nothing loaded from anywhere."""

from edge_runtime.page.markup import clean, text
from edge_runtime.page.plot import Plot, linear_ticks
from edge_runtime.page.shell import page, table, write_file

__all__ = ["Plot", "clean", "linear_ticks", "page", "table", "text", "write_file"]
