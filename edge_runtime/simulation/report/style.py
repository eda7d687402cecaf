"""The style sheet of the page: light and dark, phone and desktop, nothing from outside."""

from __future__ import annotations

__all__ = ["STYLE"]

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5b6675; --line: #dfe4ea;
  --page: #ffffff; --card: #f6f8fa; --local: #c2700a; --cloud: #2463c9; --own: #0f8a5f;
  --own2: #7aa800; --own3: #b08d00; --c1: #8a3fc4; --c2: #b8336a; --c3: #0b7f97; --rest: #b3bcc8;
  --rate: #c9d3df; --bad: #c62f2f; --up: 15, 138, 95; --down: 198, 47, 47; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #9aa7b8; --line: #2d3643;
  --page: #12161c; --card: #1a2029; --local: #f0a23c; --cloud: #6ea8ff; --own: #3fd39a;
  --own2: #b5e04a; --own3: #e6c84a; --c1: #c79bff; --c2: #ff85b3; --c3: #4fcfe0; --rest: #505c6c;
  --rate: #34404f; --bad: #ff7b7b; --up: 63, 211, 154; --down: 255, 123, 123; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 2rem 1.25rem 4rem; color: var(--ink);
  background: var(--page); font: 16px/1.55 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; margin: 0 0 .25rem; } h2 { font-size: 1.25rem; margin: 2.6rem 0 .4rem; }
h3 { font-size: 1.02rem; margin: 1.8rem 0 .4rem; }
p { margin: .4rem 0; } .soft { color: var(--soft); font-size: .92rem; }
code { font: .9em ui-monospace, Menlo, Consolas, monospace; }
a { color: var(--cloud); }
figure { margin: 0; padding: .75rem; background: var(--card); border-radius: 10px;
  overflow-x: auto; }
svg { width: 100%; min-width: 34rem; height: auto; display: block; }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif; }
svg text.value, svg text.label { fill: var(--ink); } svg text.value { font-weight: 600;
  paint-order: stroke; stroke: var(--card); stroke-width: 3px; }
svg text.lane { font-size: 10px; }
svg .grid { stroke: var(--line); } svg .deadline { stroke: var(--bad); stroke-dasharray: 5 4; }
svg .rate { fill: var(--rate); } svg .curve { fill: none; stroke-width: 2.4;
  stroke-linejoin: round; } svg .thin { stroke-width: 1.2; }
svg .ideal { stroke: var(--soft); stroke-dasharray: 3 4; fill: none; }
svg .dot { fill-opacity: .78; stroke: var(--card); stroke-width: 1; }
svg path.local { stroke: var(--local); } svg circle.local { fill: var(--local); }
svg path.cloud { stroke: var(--cloud); } svg circle.cloud { fill: var(--cloud); }
svg path.own { stroke: var(--own); } svg circle.own { fill: var(--own); }
svg path.own2 { stroke: var(--own2); } svg circle.own2 { fill: var(--own2); }
svg path.own3 { stroke: var(--own3); } svg circle.own3 { fill: var(--own3); }
svg path.c1 { stroke: var(--c1); } svg circle.c1 { fill: var(--c1); }
svg path.c2 { stroke: var(--c2); } svg circle.c2 { fill: var(--c2); }
svg path.c3 { stroke: var(--c3); } svg circle.c3 { fill: var(--c3); }
svg path.rest { stroke: var(--rest); stroke-width: 1.4; } svg circle.rest { fill: var(--rest); }
svg path.bound { stroke: var(--ink); stroke-dasharray: 7 4; stroke-width: 1.8; }
svg circle.bound { fill: var(--ink); }
svg circle.device { fill: var(--local); }
svg circle.held { fill: var(--page); stroke: var(--local); stroke-width: 1.8; }
svg circle.wrong { stroke: var(--bad); stroke-width: 2; }
svg path.ping { stroke: var(--own); stroke-width: 1.6; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .9rem;
  font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .32rem .5rem; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
td.text { white-space: normal; min-width: 10rem; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
td:first-child { position: sticky; left: 0; background: var(--page); }
td small { color: var(--soft); display: block; line-height: 1.1; }
table.heat td { border-bottom: 2px solid var(--page); text-align: center; min-width: 4.2rem; }
table.heat td:first-child { text-align: left; } table.heat th { text-align: center; }
table.heat th:first-child { text-align: left; }
.swatch { display: inline-block; width: .75em; height: .75em; border-radius: 50%;
  margin-right: .45em; vertical-align: -.03em; background: var(--rest); }
.swatch.local, .swatch.device { background: var(--local); }
.swatch.cloud { background: var(--cloud); } .swatch.own3 { background: var(--own3); }
.swatch.own { background: var(--own); } .swatch.own2 { background: var(--own2); }
.swatch.c1 { background: var(--c1); } .swatch.c2 { background: var(--c2); }
.swatch.c3 { background: var(--c3); } .swatch.bound { background: var(--ink); }
.swatch.held { background: none; border: 2px solid var(--local); }
.swatch.wrong { background: none; border: 2px solid var(--bad); }
.key { display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; margin: .5rem 0; }
details { margin: .6rem 0; } summary { cursor: pointer; color: var(--soft); }
pre { overflow-x: auto; font: .85rem/1.45 ui-monospace, Menlo, Consolas, monospace; }
@media print { body { max-width: none; } figure { break-inside: avoid; } }
"""
