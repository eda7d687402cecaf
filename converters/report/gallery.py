"""The HTML page's samples: inputs with everyone's answers side by side."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence

from converters.report.charts import share_bar
from converters.report.markup import text
from converters.report.records import Picture, Ranked, RenderedAnswer, Sample
from converters.verify.outcome import Report

__all__ = ["samples_section"]


def samples_section(report: Report, samples: Sequence[Sample]) -> str:
    """Inputs with the answers of the reference and of every variant, worst first."""
    if not samples:
        return ""
    inputs = "seeds" if report.task == "generation" else "images"
    words = {
        "detection": " Red and dashed: a box that only the fp32 model has; red: one that it "
        "does not have.",
        "segmentation": " Second picture: red where the class is another one.",
    }
    image = " Second picture: the difference, made brighter by the factor given."
    extra = words.get(report.task, "" if report.task == "classification" else image)
    cards = "".join(_sample(report, sample) for sample in samples)
    return (
        "<h2>Samples</h2>"
        f'<p class="soft">The {inputs} on which the variants are furthest from the fp32 model, '
        f"worst first.{extra}</p>{cards}"
    )


def _sample(report: Report, sample: Sample) -> str:
    answers = []
    wide = " wide" if sample.reference.picture is not None else ""
    if sample.input is not None:
        answers.append(f"<figure><h4>input</h4>{_image(sample.input, 'input')}</figure>")
    answers.append(_answer("fp32 reference", sample.reference))
    answers += [
        _answer(entry.id, sample.answers[entry.id])
        for entry in report.variants
        if entry.id in sample.answers
    ]
    return (
        f'<section class="card sample"><h3><code>{text(sample.title)}</code></h3>'
        f'<div class="answers{wide}">{"".join(answers)}</div></section>'
    )


def _answer(name: str, answer: RenderedAnswer) -> str:
    shown = ""
    if answer.picture is not None:
        shown += _image(answer.picture, f"answer of {name}")
    if answer.difference is not None:
        shown += _image(answer.difference, f"where {name} differs")
    shown += "".join(_rank(rank) for rank in answer.ranked)
    notes = []
    if answer.error:
        notes.append(f'<span class="bad">{text(answer.error)}</span>')
    if answer.note:
        kind = ' class="bad"' if answer.differs else ""
        notes.append(f"<span{kind}>{text(answer.note)}</span>")
    if answer.sqnr_db is not None:
        notes.append(f"{answer.sqnr_db:.1f} dB")
    caption = f"<figcaption>{'<br>'.join(notes)}</figcaption>" if notes else ""
    return f"<figure><h4>{text(name)}</h4>{shown}{caption}</figure>"


def _rank(rank: Ranked) -> str:
    color = rank.color if rank.color and re.fullmatch("#[0-9a-f]{6}", rank.color) else None
    share = f"{rank.share:.1%}" if 0.0 <= rank.share <= 1.0 else f"{rank.share:.3g}"
    return (
        f'<div class="rank"><b>{share}</b><span title="{text(rank.label)}">{text(rank.label)}'
        f"</span>{share_bar(rank.share, color)}</div>"
    )


def _image(picture: Picture, alt: str) -> str:
    data = base64.b64encode(picture.data).decode("ascii")
    small = ' class="pixels"' if max(picture.width, picture.height) <= 96 else ""
    return (
        f'<img{small} src="data:{picture.media_type};base64,{data}" width="{picture.width}" '
        f'height="{picture.height}" alt="{text(alt)}">'
    )
