"""Loading and freeing a model again and again leaves nothing of it behind."""

from __future__ import annotations

import gc

import pytest

from broker.executors.program import TorchProgram
from broker.models.servable import open_servable
from tests.support.servables import shared_servable

pytestmark = pytest.mark.slow


def test_a_freed_program_leaves_no_shapes_in_the_caches_of_torch():
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    servable = open_servable(shared_servable())
    for _ in range(5):
        program = TorchProgram.load(servable, "cpu")
        program.free()
        del program
    gc.collect()
    assert sum(type(found) is ShapeEnv for found in gc.get_objects()) <= 1
