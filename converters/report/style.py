"""The style sheet of the HTML page: light and dark, phone and desktop, nothing from outside."""

from __future__ import annotations

__all__ = ["STYLE"]

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #16191f;
  --soft: #5b6472; --line: #e1e5ea; --good: #0b7a4b; --good-bg: #e6f5ee; --bad: #c0262f;
  --bad-bg: #fdebec; --warn: #8a5a00; --warn-bg: #fdf3dd; --accent: #2563c9; --track: #e9ecf1;
  --torchscript: #c2570c; --tflite: #2563c9; --coreml: #7a3fc4; --executorch: #0b7f77; }
@media (prefers-color-scheme: dark) { :root { --page: #101318; --card: #181c23; --ink: #e8ebf0;
  --soft: #9aa4b2; --line: #2a303a; --good: #4fd39a; --good-bg: #12291f; --bad: #ff8087;
  --bad-bg: #331a1d; --warn: #f0c069; --warn-bg: #2e2512; --accent: #7aa9ff; --track: #2a303a;
  --torchscript: #f59a55; --tflite: #7aa9ff; --coreml: #bd94ff; --executorch: #4fcfc5; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 2rem 1.25rem 4rem; color: var(--ink);
  background: var(--page); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif;
  overflow-wrap: anywhere; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: .1rem 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .3rem; } h3 { font-size: 1rem; margin: 0 0 .5rem; }
p { margin: .3rem 0 .8rem; } .soft { color: var(--soft); font-size: .92rem; }
.eyebrow { color: var(--soft); font-size: .8rem; letter-spacing: .08em;
  text-transform: uppercase; margin: 0; }
code { font: .9em ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: 1rem 1.1rem; margin: 0; }
.verdict { border-radius: 12px; padding: 1rem 1.15rem; margin: 1.1rem 0; }
.verdict p { margin: 0; } .verdict .big { font-size: 1.25rem; font-weight: 650; }
.verdict ul { margin: .5rem 0 0; padding-left: 1.15rem; color: var(--ink); }
.verdict li { margin: .2rem 0; }
.passed { background: var(--good-bg); } .passed .big { color: var(--good); }
.failed-box { background: var(--bad-bg); } .failed-box .big { color: var(--bad); }
.missing-box { background: var(--warn-bg); } .missing-box .big { color: var(--warn); }
.tag { display: inline-block; font: 600 .8rem/1.3 ui-monospace, Menlo, Consolas, monospace;
  padding: .05rem .4rem; border-radius: 5px; background: var(--bad-bg); color: var(--bad); }
.failed-box .tag { background: var(--card); }
.missing-box .tag { background: var(--card); color: var(--warn); }
.good { color: var(--good); font-weight: 600; } .bad { color: var(--bad); font-weight: 600; }
.warn { color: var(--warn); font-weight: 600; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .7rem;
  margin: 0; }
.facts div { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: .6rem .85rem; }
.facts dt { color: var(--soft); font-size: .82rem; }
.facts dd { margin: 0; font-size: 1.15rem; font-weight: 600; }
.facts dd small { display: block; font-size: .8rem; font-weight: 400; color: var(--soft); }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
  gap: .9rem; }
figure { margin: 0; } figcaption { color: var(--soft); font-size: .85rem; }
svg.chart, .card > svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif; }
svg text.label { fill: var(--ink); } svg text.value { fill: var(--ink); font-weight: 600;
  paint-order: stroke; stroke: var(--card); stroke-width: 3px; }
svg .grid { stroke: var(--line); }
svg .dot { fill-opacity: .8; stroke: var(--card); stroke-width: 1.5; }
svg .dot.failed { fill: var(--card); fill-opacity: 1; stroke-width: 3; }
svg .fill { fill-opacity: .85; }
svg .torchscript { fill: var(--torchscript); } svg .tflite { fill: var(--tflite); }
svg .coreml { fill: var(--coreml); } svg .executorch { fill: var(--executorch); }
svg .dot.failed.torchscript { stroke: var(--torchscript); }
svg .dot.failed.tflite { stroke: var(--tflite); }
svg .dot.failed.coreml { stroke: var(--coreml); }
svg .dot.failed.executorch { stroke: var(--executorch); }
svg .layer { fill: var(--accent); fill-opacity: .55; } svg .layer.bad { fill: var(--bad);
  fill-opacity: 1; }
svg.bar { display: block; width: 100%; height: 6px; border-radius: 3px; }
svg .track { fill: var(--track); } svg .share { fill: var(--accent); }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin: .6rem 0 0; }
.key svg { width: 12px; height: 12px; vertical-align: -1px; margin-right: .35em; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 12px;
  background: var(--card); }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: .92rem;
  font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { text-align: right; padding: .45rem .55rem; border-top: 1px solid var(--line);
  white-space: nowrap; vertical-align: top; }
thead th { border-top: 0; color: var(--soft); font-weight: 600; font-size: .85rem;
  vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0;
  background: var(--card); }
tbody th { font-weight: 600; } td.text { text-align: left; white-space: normal;
  min-width: 16rem; }
td small { display: block; color: var(--soft); font-size: .8rem; }
tr.why td { border-top: 0; padding-top: 0; text-align: left; white-space: normal;
  position: static; }
.why p { margin: 0 0 .35rem; position: sticky; left: .55rem;
  max-width: min(62rem, calc(100vw - 4rem)); }
td.missed { color: var(--bad); font-weight: 600; }
details { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  margin: 0 0 .6rem; } details > div { padding: 0 1.1rem 1rem; }
summary { cursor: pointer; padding: .7rem 1.1rem; font-weight: 600; }
summary span { font-weight: 400; color: var(--soft); }
.layers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr));
  gap: 1rem; align-items: start; }
.layers svg { width: 100%; height: auto; }
.layers ol { margin: 0; padding-left: 1.3rem; } .layers li { margin: 0 0 .35rem; }
.sample { margin: 0 0 1rem; } .sample h3 code { font-weight: 600; }
.answers { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.25rem, 1fr));
  gap: .9rem .8rem; }
.answers.wide { grid-template-columns: repeat(auto-fill, minmax(11.5rem, 1fr)); }
.answers figure { min-width: 0; } .answers h4 { margin: 0 0 .3rem; font-size: .88rem; }
.answers img { display: block; width: 100%; height: auto; border-radius: 7px;
  background: var(--track); }
.answers img.pixels { image-rendering: pixelated; }
.answers img + img { margin-top: .35rem; }
.answers figcaption { margin-top: .25rem; line-height: 1.35; }
.rank { margin: 0 0 .35rem; font-size: .88rem; line-height: 1.3; }
.rank b { float: right; font-weight: 600; margin-left: .4rem; font-variant-numeric: tabular-nums; }
.rank span { display: block; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.rank .bar { margin-top: .12rem; }
.defs { columns: 2 20rem; column-gap: 2rem; } .defs dt { font-weight: 600; }
.defs dd { margin: 0 0 .6rem; color: var(--soft); font-size: .92rem; }
.defs div { break-inside: avoid; }
@media (max-width: 34rem) { body { padding: 1.2rem .8rem 3rem; } h1 { font-size: 1.45rem; }
  .card { padding: .8rem; }
  .answers { grid-template-columns: repeat(auto-fill, minmax(7.5rem, 1fr)); }
  .answers.wide { grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); }
  details > div { padding: 0 .8rem .8rem; }
  .list tr { display: block; border-top: 1px solid var(--line); padding: .35rem 0; }
  .list tr:first-child { border-top: 0; }
  .list td { display: inline-block; border: 0; padding: .1rem .7rem; text-align: left; }
  .list td.text { display: block; min-width: 0; } }
@media print { body { background: #fff; } details > div { display: block; }
  .card, details, .scroll { break-inside: avoid; } }
"""
