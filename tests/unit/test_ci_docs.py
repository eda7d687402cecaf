"""``docs/ci.md`` and its examples: held to the commands and the schema that they show."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import click
import yaml

from converters import cli
from converters.config import ModelConfig, load_config, to_arguments, to_verify_arguments
from converters.verify.gates import default_gates, read_gates

DOCS = Path(__file__).parents[2] / "docs"
EXAMPLES = DOCS / "examples"
PAGE = (DOCS / "ci.md").read_text()
WORKFLOW: dict[Any, Any] = yaml.safe_load((EXAMPLES / "github-actions.yml").read_text())


def known_options(command: click.Command) -> set[str]:
    return {name for parameter in command.params for name in parameter.opts}


def nearfar_commands(text: str) -> list[list[str]]:
    lines = re.findall(r"(?:^|[$`]|- ) ?(nearfar (?:convert|verify) [^`#]*?)(?:`|$)", text, re.M)
    return [shlex.split(line) for line in lines]


def steps() -> list[dict[str, Any]]:
    return list(WORKFLOW["jobs"]["convert"]["steps"])


def project(folder: Path) -> Path:
    """The example with the files that it names, empty."""
    for name in ("nearfar.toml", "gates.toml"):
        shutil.copy(EXAMPLES / name, folder / name)
    for name in ("models/plants.py", "models/plants.safetensors", "models/plants.txt",
                 "models/plants-small.safetensors", "photos/labels.csv"):  # fmt: skip
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    return folder / "nearfar.toml"


def test_the_example_project_loads_and_its_commands_parse(tmp_path: Path) -> None:
    plants, small = load_config(project(tmp_path))
    assert (plants.title, small.title) == ("plants", "plants-small")
    assert (plants.precision, small.precision) == (("fp16", "int8"), ("int8",))
    for model in (plants, small):
        params = cli.convert.make_context("convert", to_arguments(model)).params
        assert params["to_formats"] == "tflite,coreml"
        arguments = to_verify_arguments(model)
        assert arguments is not None
        assert cli.verify.make_context("verify", arguments).params["split"] == "eval"


def test_the_example_gates_are_stricter_than_the_default() -> None:
    gates, default = (
        read_gates(EXAMPLES / "gates.toml", "classification"),
        default_gates("classification"),
    )
    assert gates["int8"].agreement == 0.95
    assert gates["fp16"].sqnr_db_mean > default["fp16"].sqnr_db_mean
    assert (gates["int8"].agreement or 0) > (default["int8"].agreement or 0)


def test_every_key_is_described_and_no_other() -> None:
    table = PAGE.split("| key | value |")[1].split("\n\n")[0]
    first_cells = re.findall(r"^\| ([^|]+) \|", table, re.M)
    described = [key for cell in first_cells for key in re.findall(r"`(\w+)`", cell)]
    assert sorted(described) == sorted(ModelConfig.__struct_fields__)


def test_the_commands_of_the_page_and_the_workflow_exist() -> None:
    runs = "\n".join(step["run"] for step in steps() if "run" in step)
    commands = [*nearfar_commands(PAGE), *nearfar_commands(runs)]
    assert len(commands) >= 4
    for _, name, *arguments in commands:
        known = known_options({"convert": cli.convert, "verify": cli.verify}[name])
        options = {argument.split("=")[0] for argument in arguments if argument.startswith("--")}
        assert options <= known, (name, options - known)


def test_the_workflow_keeps_the_proof_of_a_failure_and_only_good_bundles() -> None:
    names = [step.get("name", step.get("uses")) for step in steps()]
    assert names.index("Convert and prove") < names.index("Keep the proof")
    kept = {step["name"]: step for step in steps() if step.get("name", "").startswith("Keep")}
    assert kept["Keep the proof"]["if"] == "${{ !cancelled() }}"
    assert "if" not in kept["Keep the bundles"], "a status of 1 ends the job before it"
    run = next(step["run"] for step in steps() if step.get("name") == "Convert and prove")
    words = shlex.split(run)
    assert words[words.index("--reports") + 1] == kept["Keep the proof"]["with"]["path"]
    cache = next(step for step in steps() if step.get("uses", "").startswith("actions/cache@"))
    assert words[words.index("--resume") + 1] == cache["with"]["path"]
    outputs = re.findall(r'^output = "(.*)"$', (EXAMPLES / "nearfar.toml").read_text(), re.M)
    assert all(Path(output).match(kept["Keep the bundles"]["with"]["path"]) for output in outputs)


def test_the_workflow_asks_for_no_more_rights_than_it_needs() -> None:
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert WORKFLOW["jobs"]["convert"]["timeout-minutes"] <= 60
    for step in steps():
        if "uses" in step:
            assert re.fullmatch(r"actions/[a-z-]+@v[0-9]+", step["uses"]), "first party, a major"
    assert "secrets." not in (EXAMPLES / "github-actions.yml").read_text()


def test_the_gitlab_snippet_is_yaml_and_collects_the_reports() -> None:
    (snippet,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
    job = yaml.safe_load(snippet)["models"]
    assert job["artifacts"]["when"] == "always"
    assert job["artifacts"]["reports"]["junit"] == "build/proof/*.xml"


def test_exit_statuses_of_the_page_are_those_of_the_command() -> None:
    rows = re.findall(r"^\| ([0-3]) \| ([^|]+) \|", PAGE, re.M)
    assert [number for number, _ in rows] == ["0", "1", "2", "3"]
    text = " ".join((cli.convert.help or "").split())
    assert "0 all variants passed their gates, 1 one did not" in text
    assert "2 bad input, 3 a backend is missing" in text
