"""``nearfar finetune``: a trained net for other classes, or for its own int8 form."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from converters.finetune.checkpoint import CHECKPOINT
from converters.finetune.progress import TrainingProgress, print_report
from converters.finetune.run import Request, Tuning
from converters.finetune.run import finetune as run_finetune
from converters.options import JSON, choose_console, source_options, source_request, write_json
from edge_runtime.contract.errors import ConfigError

__all__ = ["finetune"]

_INTERRUPTED = 130


def _epochs(text: str | None) -> tuple[int, ...]:
    if text is None:
        return ()
    parts = text.split(",")
    if not all(part.strip().isdigit() for part in parts):
        raise ConfigError(f"--unfreeze-at {text!r}: write epochs, for example 4 or 4,8")
    return tuple(int(part) for part in parts)


@click.command(
    epilog="\b\nExamples:\n"
    "  nearfar finetune torchvision:mobilenet_v2 --weights mnv2.safetensors \\\n"
    "      --preprocess torchvision --input-size 224 --data flowers/ -o flowers\n"
    "  nearfar finetune zoo:digits-small --data photos/ --data-labels labels.csv \\\n"
    "      --qat -o digits-qat\n"
    "  nearfar finetune nets.py:my_net --weights my.pth --preprocess tf \\\n"
    "      --input-size 224 --data photos/ --qat --distill -o my-qat\n"
)
@source_options
@click.option(
    "--data", type=click.Path(path_type=Path), required=True, metavar="DIR",
    help="train/CLASS/ and val/CLASS/, or CLASS/ (some are held out), or any images with "
    "--data-labels or --distill.",
)  # fmt: skip
@click.option(
    "--data-labels", "labels_csv", type=click.Path(path_type=Path), metavar="CSV",
    help="file,class_index[,split] instead of class folders; --labels names the classes.",
)  # fmt: skip
@click.option(
    "--splits", metavar="TRAIN,VAL",
    help="The CSV's splits to train on and to hold out  [default: train,val if it has them]",
)  # fmt: skip
@click.option(
    "--holdout", type=click.FloatRange(0.01, 0.9), default=0.2, show_default=True, metavar="S",
    help="Share of each class to hold out where no split is given.",
)  # fmt: skip
@click.option("--skip-unreadable", is_flag=True, help="Leave unreadable images out.")
@click.option(
    "--head", type=click.Choice(["auto", "keep", "replace"]), default="auto", show_default=True,
    help="The classifier layer; auto replaces it for other classes.",
)  # fmt: skip
@click.option(
    "--freeze", type=click.Choice(["none", "backbone"]), default="none", show_default=True,
    help="backbone: only the classifier layer trains.",
)  # fmt: skip
@click.option(
    "--unfreeze-at", metavar="E,E",
    help="Epochs at which the backbone's parts, from the head down, start to train.",
)  # fmt: skip
@click.option("--epochs", type=click.IntRange(1, 10_000), default=20, show_default=True)
@click.option("--batch", type=click.IntRange(2, 4096), default=32, show_default=True)
@click.option(
    "--optimizer", type=click.Choice(["adamw", "sgd"]), default="adamw", show_default=True
)
@click.option(
    "--lr", "learning_rate", type=click.FloatRange(0, 100, min_open=True), metavar="R",
    help="Peak learning rate  [default: 1e-3, with --qat 1e-4; sgd: ten times that]",
)  # fmt: skip
@click.option(
    "--backbone-lr", "backbone_scale", type=click.FloatRange(0, 1, min_open=True), metavar="S",
    help="The backbone's share of it  [default: 0.1 with a new head, else 1]",
)  # fmt: skip
@click.option(
    "--weight-decay", type=click.FloatRange(0, 10),
    help="[default: 0.05, sgd 1e-4, with --qat 0]",
)  # fmt: skip
@click.option(
    "--warmup", "warmup_epochs", type=click.FloatRange(0, 1000), default=1.0, show_default=True,
    metavar="E", help="Epochs until the peak; a cosine leads down from there.",
)  # fmt: skip
@click.option(
    "--label-smoothing", type=click.FloatRange(0, 1, max_open=True), default=0.1,
    show_default=True,
)  # fmt: skip
@click.option(
    "--ema", "ema_decay", type=click.FloatRange(0, 1, max_open=True), default=0.0,
    show_default=True, metavar="D", help="Keep a moving average of the weights, such as 0.99.",
)  # fmt: skip
@click.option(
    "--patience", type=click.IntRange(1, 10_000), default=6, show_default=True, metavar="E",
    help="Stop after so many epochs without a better held-out figure.",
)  # fmt: skip
@click.option(
    "--augment/--no-augment", default=True, show_default=True,
    help="Random crops, flips and colors; held-out images never get them.",
)  # fmt: skip
@click.option(
    "--crop-scale", type=click.FloatRange(0, 1, min_open=True), default=0.35, show_default=True,
    metavar="S", help="Least share of the area that a random crop keeps.",
)  # fmt: skip
@click.option("--flip/--no-flip", default=True, show_default=True, help="Not for text.")
@click.option(
    "--color-jitter", type=click.FloatRange(0, 1, max_open=True), default=0.2, show_default=True
)
@click.option(
    "--rand-augment", type=click.IntRange(0, 10), default=0, show_default=True, metavar="N",
    help="RandAugment operations a photo.",
)  # fmt: skip
@click.option(
    "--qat", is_flag=True, help="Train with the rounding of the int8 formats (needs its classes)."
)
@click.option(
    "--qat-bits", type=click.Choice(["8", "4"]), default="8", show_default=True,
    help="4: for int4w, which rounds weights only.",
)  # fmt: skip
@click.option(
    "--distill", is_flag=True,
    help="With --qat: learn the fp32 model's own answers; needs no labels.",
)  # fmt: skip
@click.option(
    "--distill-temperature", type=click.FloatRange(0, 100, min_open=True), default=4.0,
    show_default=True,
)  # fmt: skip
@click.option("--seed", type=click.IntRange(0, 2**31), default=0, show_default=True)
@click.option("--threads", type=click.IntRange(1, 1024), help="[default: all cores]")
@click.option(
    "--max-minutes", "minutes", type=click.FloatRange(0, 1e6, min_open=True), metavar="M",
    help="Stop in time and write the best so far; --resume goes on.",
)  # fmt: skip
@click.option("--resume", is_flag=True, help="Go on from the checkpoint in the output folder.")
@JSON
def finetune(
    source: str,
    output: Path,
    force: bool,
    quiet: bool,
    name: str | None,
    model_version: str,
    data: Path,
    labels_csv: Path | None,
    splits: str | None,
    holdout: float,
    skip_unreadable: bool,
    head: Any,
    unfreeze_at: str | None,
    qat: bool,
    qat_bits: str,
    minutes: float | None,
    resume: bool,
    json_path: Path | None,
    **options: Any,
) -> None:
    """Train SOURCE further: for the classes of a folder, or for its own int8 form.

    The best epoch on held-out images is kept; these go through the declared pre-processing,
    as served images do. The output folder gets model.safetensors, labels.txt,
    preprocess.toml, the splits and report.json, and the nearfar convert line to run next is
    printed. The same command on the same machine gives the same weights, resumed or not.
    Exit status: 0 better than before, 1 no epoch was, 2 bad input, 130 interrupted.
    """
    tuning = {key: options.pop(key) for key in Tuning.__dataclass_fields__ if key in options}
    if resume and force:
        raise ConfigError("--resume goes on and --force starts again: choose one")
    if qat_bits != "8" and not qat:
        raise ConfigError("--qat-bits belongs to --qat")
    more = [] if name is None else ["--name", name]
    more += [] if model_version == "1.0.0" else ["--version", model_version]
    request = Request(
        source=source_request(source, **options),
        data=data,
        output=output,
        tuning=Tuning(
            **tuning, unfreeze_at=_epochs(unfreeze_at), qat_bits=int(qat_bits) if qat else 0
        ),
        labels_csv=labels_csv,
        splits=_splits(splits),
        holdout=holdout,
        head=head,
        skip_unreadable=skip_unreadable,
        resume=resume,
        force=force,
        minutes=minutes,
        convert_options=tuple(more),
    )
    try:
        with TrainingProgress(quiet=quiet) as progress:
            report = run_finetune(request, progress)
    except KeyboardInterrupt:
        kept = (output / CHECKPOINT).is_file()
        hint = "the last whole epoch is kept: go on with --resume" if kept else "nothing was kept"
        click.echo(f"interrupted; {hint}", err=True)
        sys.exit(_INTERRUPTED)
    console = choose_console(json_path)
    print_report(report, console)
    write_json(json_path, report)
    if not report.improved:
        console.print(
            "no epoch was better than the start on the held-out images: no weights are written. "
            "Try another --lr, more images or --epochs",
            highlight=False,
        )
        sys.exit(1)
    console.print(f"wrote {output}; next:", highlight=False)
    click.echo(report.next_command, err=console.stderr)
    click.echo(report.verify_command, err=console.stderr)


def _splits(text: str | None) -> tuple[str, str] | None:
    if text is None:
        return None
    parts = tuple(part.strip() for part in text.split(","))
    if len(parts) != 2 or not all(parts) or parts[0] == parts[1]:
        raise ConfigError(f"--splits {text!r}: write two names, for example train,val")
    return parts[0], parts[1]
