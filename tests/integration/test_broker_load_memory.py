"""Loading and freeing a model again and again leaves nothing of it behind."""

from __future__ import annotations

import gc

import pytest

from broker.executors.program import TorchProgram
from broker.models.servable import open_servable
from tests.support.servables import shared_servable

pytestmark = pytest.mark.slow


def shape_environments() -> int:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    gc.collect()
    return sum(type(found) is ShapeEnv for found in gc.get_objects())


def test_a_freed_program_leaves_no_shapes_in_the_caches_of_torch():
    servable = open_servable(shared_servable())
    before = shape_environments()
    for _ in range(6):
        program = TorchProgram.load(servable, "cpu")
        program.free()
        del program
    assert shape_environments() <= before + 1
