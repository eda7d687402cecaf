"""``nearfar.toml``: strict, relative to itself, and nothing else than the command line."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from converters import cli
from converters.config import ModelConfig, load_config, to_arguments, to_verify_arguments
from edge_runtime.contract.errors import ConfigError

MINIMAL = '[[model]]\nsource = "zoo:digits-small"\noutput = "digits.bundle"\n'
RUN_OPTIONS = {
    "force",
    "quiet",
    "jobs",
    "json",
    "config",
    "reports",
    "resume",
    "html",
    "junit",
    "help",
}
"""Of the command line alone: they say how to run, not what to make."""


def load(folder: Path, text: str) -> list[ModelConfig]:
    path = folder / "nearfar.toml"
    path.write_text(text, encoding="utf-8")
    return load_config(path)


def refusal(folder: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder, text)
    return caught.value.detail


def options_of(command: click.Command) -> set[str]:
    return {
        name.removeprefix("--").replace("-", "_")
        for parameter in command.params
        if isinstance(parameter, click.Option)
        for name in parameter.opts
        if name.startswith("--")
    }


# What is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('calibb = "x"', "unknown key 'calibb': did you mean 'calib'?"),
        ("input-size = 32", "unknown key 'input-size': did you mean 'input_size'?"),
        ('presicion = ["int8"]', "unknown key 'presicion': did you mean 'precision'?"),
        ('zzz = "x"', "unknown key 'zzz': choose from source, output, weights"),
        ('to = ["tflit"]', "'to[0]': 'tflit' is unknown: did you mean 'tflite'?"),
        ('to = "tflite"', "'to': 'tflite' is unknown"),
        ("to = []", "'to': expected `array` of length >= 1"),
        ('precision = ["fp33"]', "'precision[0]': 'fp33' is unknown: did you mean 'fp32'?"),
        ('task = "classify"', "'task': 'classify' is unknown: did you mean 'classification'?"),
        ("nms = 1", "'nms': expected `bool`, got `int`"),
        ('nms = "yes"', "'nms': expected `bool`, got `str`"),
        ("min_ios = 16.4", "'min_ios': expected `int | str | null`, got `float`"),
        ("input_size = 0", "'input_size': expected `int` >= 1"),
        ('name = "../escape"', "'name': expected `str` matching regex"),
        ('version = "one two"', "'version': expected `str` matching regex"),
        ("output_range = [0, 1, 2]", "'output_range' is two numbers"),
        ('calib_labels = "x.csv"', "'calib_labels' makes no sense without 'calib'"),
        ('eval_split = "test"', "'eval_split' makes no sense without 'eval_labels'"),
        ('calib = "nowhere"', "'calib' is {folder}/nowhere, and there is no such folder"),
        ('calib = "nearfar.toml"', "and there is no such folder"),
        ('weights = "net.pth"', "'weights' is {folder}/net.pth, and there is no such file"),
        ('preprocess = "own.toml"', "'preprocess' is {folder}/own.toml, and there is no such"),
        ('gates = "gates.toml"', "'gates' is {folder}/gates.toml, and there is no such file"),
        ('calib = "."\nallow_synthetic_calibration = true', "leave 'allow_synthetic_calibration'"),
    ],
)
def test_a_mistake_is_named_with_its_model_and_what_was_meant(
    tmp_path: Path, line: str, says: str
) -> None:
    detail = refusal(tmp_path, MINIMAL + line + "\n")
    assert says.replace("{folder}", str(tmp_path)) in detail
    assert "model 1 (" in detail


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has 0 models"),
        ("[[models]]\n", "unknown key 'models': did you mean 'model'?"),
        ('[model]\nsource = "zoo:x"\n', "write [[model]] with double brackets"),
        ("model = 3\n", "write [[model]] with double brackets"),
        ('[[model]]\noutput = "o"\n', "'source' is missing"),
        ('[[model]]\nsource = "zoo:x"\n', "'output' is missing"),
        ("[[model]\n", "is not TOML"),
        ("[[model]]\n" * 257, "has 257 models"),
        ("defaults = 3\n" + MINIMAL, "write [defaults] as a table"),
        ('[defaults]\nsource = "zoo:x"\n' + MINIMAL, "[defaults]: unknown key 'source'"),
        ('[defaults]\ninptu = "uint8"\n' + MINIMAL, "[defaults]: unknown key 'inptu': did you"),
        (MINIMAL.replace("zoo:", "zooo:"), "'source' is {folder}/zooo:digits-small"),
        (MINIMAL.replace("zoo:digits-small", "nets.py:net"), "'source' is {folder}/nets.py"),
        ("x = " + "[" * 100_000, "is not TOML"),
        ("#" * (2**20 + 1), "more than 1048576 bytes"),
    ],
)  # fmt: skip
def test_a_file_that_makes_no_sense_is_refused(tmp_path: Path, text: str, says: str) -> None:
    assert says.replace("{folder}", str(tmp_path)) in refusal(tmp_path, text)


def test_a_file_that_is_not_there_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "nearfar.toml")
    (tmp_path / "nearfar.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(tmp_path / "nearfar.toml")


@pytest.mark.parametrize(
    "second", ["digits.bundle", "./x/../digits.bundle", "digits.bundle/in", "."]
)
def test_no_bundle_replaces_another(tmp_path: Path, second: str) -> None:
    text = MINIMAL + MINIMAL.replace("digits.bundle", second)
    assert "both write to" in refusal(tmp_path, text)


# What it means -----------------------------------------------------------------------------


def test_paths_are_relative_to_the_file_wherever_the_command_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tmp_path / "project"
    (project / "photos").mkdir(parents=True)
    for name in ("nets.py", "net.safetensors", "labels.txt", "own.toml", "l.csv", "gates.toml"):
        (project / name).touch()
    monkeypatch.chdir(tmp_path)
    (model,) = load(
        project,
        '[[model]]\nsource = "nets.py:net"\nweights = "net.safetensors"\noutput = "build/n"\n'
        'labels = "labels.txt"\npreprocess = "own.toml"\ncalib = "photos"\n'
        'calib_labels = "l.csv"\neval = "photos"\neval_labels = "l.csv"\ngates = "gates.toml"\n',
    )
    assert model.source == f"{project}/nets.py:net"
    assert model.output == f"{project}/build/n"
    for key in ("weights", "labels", "preprocess", "calib", "calib_labels", "gates", "eval"):
        assert Path(getattr(model, key)).parent == project, key
    assert model.title == "n"


def test_names_that_are_no_paths_stay(tmp_path: Path) -> None:
    text = MINIMAL + 'weights = "{}"\npreprocess = "tf"\n'
    for weights in ("DEFAULT", "IMAGENET1K_V2", "random:7"):
        (model,) = load(tmp_path, text.replace("{}", weights))
        assert (model.weights, model.preprocess, model.source) == (
            weights, "tf", "zoo:digits-small",
        )  # fmt: skip
    (tmp_path / "DEFAULT").touch()
    (model,) = load(tmp_path, text.replace("{}", "DEFAULT"))
    assert model.weights == str(tmp_path / "DEFAULT")


def test_nothing_is_taken_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NAME", "secret")
    (model,) = load(tmp_path, MINIMAL + 'weights = "random:${NAME}"\n')
    assert model.weights == "random:${NAME}"


def test_defaults_hold_where_a_model_says_nothing(tmp_path: Path) -> None:
    text = (
        '[defaults]\nto = ["tflite"]\nnms = true\nmin_ios = 16\n' + MINIMAL
        + MINIMAL.replace("digits.bundle", "b") + 'to = ["coreml"]\nnms = false\n'
    )  # fmt: skip
    first, second = load(tmp_path, text)
    assert (first.to, first.nms, first.min_ios) == (("tflite",), True, 16)
    assert (second.to, second.nms, second.min_ios) == (("coreml",), False, 16)


# What the command line gets ----------------------------------------------------------------


def test_each_option_of_convert_has_its_key_and_none_is_without_one() -> None:
    keys = set(ModelConfig.__struct_fields__) - {"source", "eval", "eval_labels", "eval_split"}
    assert keys == options_of(cli.convert) - RUN_OPTIONS


def test_every_key_reaches_the_command_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for name in ("labels.txt", "l.csv", "gates.toml"):
        (tmp_path / name).touch()
    (model,) = load(
        tmp_path,
        '[[model]]\nsource = "zoo:digits-small"\noutput = "-o"\nweights = "random:1"\n'
        'task = "segmentation"\nlabels = "labels.txt"\npreprocess = "tf"\ninput_size = "24x32"\n'
        'resize_size = 40\nactivation = "sigmoid"\ntemperature = 1.5\nlatent = 100\n'
        'output_range = [-1, 0.5]\nscore_threshold = 0.4\nname = "net.1"\nversion = "2.0"\n'
        'to = ["tflite", "coreml"]\nprecision = "all"\ncalib = "photos"\ncalib_labels = "l.csv"\n'
        'calib_split = "calib"\ninput = "uint8"\nnms = true\nargmax = true\nmin_ios = "16.4"\n'
        'min_android_api = 30\nkeep_going = true\nauto = true\ngates = "gates.toml"\n'
        'keep = ["stem.0", "head"]\n',
    )
    context = cli.convert.make_context("convert", to_arguments(model))
    given = {
        name: value
        for name, value in context.params.items()
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    }
    assert given == {
        "source": "zoo:digits-small", "output": tmp_path / "-o", "weights": "random:1",
        "task": "segmentation", "labels_file": tmp_path / "labels.txt", "preprocess": "tf",
        "input_size": "24x32", "resize_size": 40, "activation": "sigmoid", "temperature": 1.5,
        "latent": "100", "output_range": "-1.0:0.5", "score_threshold": 0.4, "name": "net.1",
        "model_version": "2.0", "to_formats": "tflite,coreml", "precisions": "all",
        "calib": tmp_path / "photos", "calib_labels": tmp_path / "l.csv", "calib_split": "calib",
        "input_mode": "uint8", "nms": True, "argmax": True, "min_ios": "16.4",
        "min_android_api": 30, "keep_going": True, "auto": True, "gates": tmp_path / "gates.toml",
        "keep": "stem.0,head",
    }  # fmt: skip


def test_what_is_not_written_keeps_the_commands_default(tmp_path: Path) -> None:
    (model,) = load(tmp_path, MINIMAL)
    assert to_arguments(model) == [f"--output={tmp_path}/digits.bundle", "--", "zoo:digits-small"]
    assert to_verify_arguments(model) is None


def test_verify_gets_the_bundle_and_its_images(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "l.csv").touch()
    (tmp_path / "gates.toml").touch()
    (model,) = load(
        tmp_path,
        MINIMAL + 'eval = "photos"\neval_labels = "l.csv"\neval_split = "eval"\n'
        'gates = "gates.toml"\n',
    )
    arguments = to_verify_arguments(model)
    assert arguments is not None
    params = cli.verify.make_context("verify", arguments).params
    assert params["bundle"] == tmp_path / "digits.bundle"
    assert params["eval_dir"] == tmp_path / "photos"
    assert params["labels"] == tmp_path / "l.csv"
    assert params["split"] == "eval"
    assert params["gates"] == tmp_path / "gates.toml"
    (generator,) = load(tmp_path, MINIMAL + 'task = "generation"\nlatent = 8\n')
    assert to_verify_arguments(generator) == ["--", f"{tmp_path}/digits.bundle"]
