"""What ExecuTorch is offered in, what it is refused in, and what its errors say."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from converters.formats.base import FormatBackend
from converters.formats.executorch import ExecuTorchBackend
from converters.recipes import OFFERED, find_recipe
from edge_runtime.contract.errors import PrecisionRefused
from edge_runtime.runtimes.base import Runtime
from edge_runtime.runtimes.executorch import ExecuTorchRuntime, _reason

REFUSED = set(OFFERED) - {"fp32", "int8"}


def test_systems_are_those_of_executorchs_own_build_files() -> None:
    for precision in ("fp32", "int8"):
        recipe = find_recipe("executorch", precision)
        assert (recipe.min_os.android_api, recipe.min_os.ios) == (23, "17.0")
        assert recipe.accelerators == ("cpu",)
    assert find_recipe("executorch", "int8").rounded


@pytest.mark.parametrize("precision", sorted(REFUSED))
def test_every_other_precision_is_refused_with_one_to_take(precision: str) -> None:
    with pytest.raises(PrecisionRefused, match=f"executorch .*{precision[:3]}.*: take "):
        find_recipe("executorch", precision)


def test_dynamic_quantization_names_the_open_issue() -> None:
    with pytest.raises(PrecisionRefused, match=r"github.com/pytorch/executorch/issues/11355"):
        find_recipe("executorch", "int8-dyn")


def test_both_ends_register_and_import_nothing_heavy() -> None:
    assert isinstance(ExecuTorchBackend(), FormatBackend)
    assert isinstance(ExecuTorchRuntime(), Runtime)
    code = (
        "import sys\n"
        "from converters.formats.base import find_backend\n"
        "from edge_runtime.runtimes.base import find_runtime\n"
        "find_backend('executorch'), find_runtime('executorch')\n"
        "print({'torch', 'executorch.exir', 'torchao'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("message", "meaning"),
    [
        ("Failed to load program, error: 0x:23", "damaged: copy or convert it again"),
        ("Failed to load method forward, error: 0x:14", "an operator that this ExecuTorch"),
        ("method->execute() failed with error 0x1", "outside of what XNNPACK takes"),
        ("something new\nwith a trace", "^something new$"),
        ("", "RuntimeError"),
    ],
)
def test_error_codes_are_put_into_words(message: str, meaning: str) -> None:
    assert re.search(meaning, _reason(RuntimeError(message)))
