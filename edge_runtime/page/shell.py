"""The frame of a page: style sheet, content security policy, tables; and writing it.

The policy forbids everything but the page's own style sheet (by digest), so that even a name
that got past the escaping could neither run nor load anything.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from edge_runtime.contract.errors import ConfigError
from edge_runtime.page.markup import text

__all__ = ["page", "table", "write_file"]

_STYLE: Final = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #16191f;
  --soft: #5b6472; --line: #e1e5ea; --bad: #c0262f; --good: #0b7a4b; --device: #b86407;
  --cloud: #2563c9; --adaptive: #0b7a4b; --faint: #c9d3df; }
@media (prefers-color-scheme: dark) { :root { --page: #101318; --card: #181c23; --ink: #e8ebf0;
  --soft: #9aa4b2; --line: #2a303a; --bad: #ff8087; --good: #4fd39a; --device: #f0a23c;
  --cloud: #7aa9ff; --adaptive: #4fd39a; --faint: #3a4656; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 64rem; padding: 2rem 1.25rem 4rem; color: var(--ink);
  background: var(--page); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif;
  overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .1rem 0 .3rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; } p { margin: .4rem 0 .7rem; }
.eyebrow { color: var(--soft); font-size: .8rem; letter-spacing: .08em;
  text-transform: uppercase; margin: 0; }
.soft { color: var(--soft); font-size: .92rem; } .good { color: var(--good); font-weight: 600; }
.bad { color: var(--bad); font-weight: 600; }
.big { font-size: 1.2rem; font-weight: 650; margin: .9rem 0 .2rem; }
figure { margin: 0; padding: .75rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 12px; }
figure.lane { max-width: 42rem; margin-top: .7rem; }
figcaption { color: var(--soft); font-size: .85rem; margin-top: .3rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr));
  gap: .9rem; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif; }
svg text.label { fill: var(--ink); } svg text.value { fill: var(--ink); font-weight: 600; }
svg .grid { stroke: var(--line); } svg .curve { fill: none; stroke-width: 2.2; }
svg .even { stroke: var(--soft); stroke-dasharray: 4 4; stroke-width: 1.2; }
svg .deadline { stroke: var(--bad); stroke-dasharray: 5 4; }
svg path.device { stroke: var(--device); } svg path.cloud { stroke: var(--cloud); }
svg path.adaptive { stroke: var(--adaptive); } svg path.faint { stroke: var(--faint); }
svg circle.device, svg rect.device { fill: var(--device); }
svg circle.cloud, svg rect.cloud { fill: var(--cloud); }
svg circle.adaptive, svg rect.adaptive { fill: var(--adaptive); }
svg rect.faint, svg circle.faint { fill: var(--faint); }
svg rect.pale { fill: var(--cloud); fill-opacity: .3; }
svg rect.wait { fill: var(--device); fill-opacity: .3; }
svg rect.bad { fill: var(--bad); }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 12px;
  background: var(--card); }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: .92rem;
  font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { text-align: right; padding: .4rem .6rem; border-top: 1px solid var(--line);
  white-space: nowrap; }
thead th { border-top: 0; color: var(--soft); font-weight: 600; font-size: .85rem;
  vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
td.words { text-align: left; white-space: normal; min-width: 12rem; }
details { margin: .6rem 0; } summary { cursor: pointer; color: var(--soft);
  font-size: .92rem; margin-bottom: .4rem; }
code { font: .9em ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
.key span { display: inline-block; width: .8em; height: .8em; border-radius: 50%;
  margin: 0 .35em 0 1em; vertical-align: -.05em; } .key span:first-child { margin-left: 0; }
.key .device { background: var(--device); } .key .cloud { background: var(--cloud); }
.key .adaptive { background: var(--adaptive); } .key .faint { background: var(--faint); }
@media (max-width: 34rem) { body { padding: 1.2rem .8rem 3rem; } }
@media print { body { background: #fff; } figure, .scroll { break-inside: avoid; } }
"""


def page(eyebrow: str, title: str, body: str) -> str:
    """A whole document; ``body`` is markup, the other two are text."""
    digest = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode("ascii")
    policy = (
        f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<link rel="icon" href="data:,">
<title>{text(title)}</title>
<style>{_STYLE}</style></head><body>
<header><p class="eyebrow">{text(eyebrow)}</p><h1>{text(title)}</h1></header>
<main>
{body}
</main></body></html>
"""


def table(header: Sequence[str], rows: Sequence[Sequence[object]], *, words: int = 0) -> str:
    """Cells are text; the last ``words`` columns wrap and stand left."""
    first = len(header) - words
    head = "".join(f"<th>{text(cell)}</th>" for cell in header)
    opening = ["<td>"] * first + ['<td class="words">'] * words
    body = "".join(
        f"<tr>{''.join(f'{tag}{text(cell)}</td>' for tag, cell in zip(opening, row, strict=True))}"
        "</tr>"
        for row in rows
    )
    return (
        '<div class="scroll"><table><thead><tr>'
        f"{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def write_file(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all; its folder is made. Raises ``ConfigError``."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise ConfigError(f"cannot write {path}: {error.strerror}: choose another file") from None
