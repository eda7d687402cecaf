"""Which pre-processing makes a file answer like the reference? The silly ones are soon told."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converters.verify.metrics import sqnr_db

__all__ = ["probe"]

_LEAST_INPUTS = 3
_FAR_BEHIND_DB = 8.0
"""Of mean SQNR. A finding needs a record that is ahead by 3 dB over all inputs."""


def probe(
    feeds: Sequence[Iterator[NDArray[Any]]],
    run: Callable[[NDArray[Any]], NDArray[np.float32]],
    wanted: NDArray[np.floating],
) -> list[float]:
    """Mean SQNR in dB of the answers to each feed, against ``wanted`` ``[inputs, ...]``.

    ``feeds``: the same inputs, each prepared in another way; ``run``: one input's answer,
    ``[1, ...]``. A feed that is far behind the best after three inputs is given up, for it
    cannot come out ahead: its mean is then of the inputs so far.
    """
    ratios: list[list[float]] = [[] for _ in feeds]
    left = list(range(len(feeds)))
    for number in range(len(wanted)):
        for place in left:
            answer = run(next(feeds[place]))
            ratios[place].append(float(sqnr_db(wanted[number : number + 1], answer)[0]))
        if number + 1 >= _LEAST_INPUTS:
            best = max(float(np.mean(ratios[place])) for place in left)
            left = [p for p in left if float(np.mean(ratios[p])) >= best - _FAR_BEHIND_DB]
    return [float(np.mean(one)) for one in ratios]
