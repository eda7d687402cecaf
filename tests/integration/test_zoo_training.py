"""Training the zoo pair for real: deterministic, repaired when damaged, as good as promised."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path

import numpy as np
import pytest

from converters.zoo import ZOO
from converters.zoo.digits import indices, load_scans, photo_seed, render
from converters.zoo.weights import CACHE_VARIABLE, weights_file
from edge_runtime.contract import preprocess
from edge_runtime.contract.imaging import decode_image
from edge_runtime.contract.tasks.classification import probabilities
from tests.support.digits import checked, nearfar

pytestmark = pytest.mark.slow


def test_training_is_deterministic_and_repairs_a_damaged_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    model = ZOO["digits-small"]
    path = model.weights_path()
    sound = path.read_bytes()
    accuracy = model.record().test_accuracy
    path.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    told: list[str] = []
    # Two at once: one trains, the other waits for it.
    second = threading.Thread(target=model.weights_path)
    second.start()
    assert model.weights_path(lambda message, _done, _total: told.append(message)) == path
    second.join()
    assert told
    assert hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(sound).digest()
    assert model.record().test_accuracy == accuracy
    assert {file.suffix for file in path.parent.iterdir()} == {".safetensors", ".lock"}


def test_a_failing_child_is_one_line_and_leaves_no_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "torch.py").write_text("raise ImportError('no torch today')\n")
    monkeypatch.setenv("PYTHONPATH", str(broken))
    done = nearfar("zoo", "train", "digits-small")
    assert done.returncode == 2
    assert (
        "error [source]: training digits-small failed: ImportError: no torch today" in done.stderr
    )
    assert "Traceback" not in done.stderr
    assert not weights_file("digits-small").exists()


def test_the_pair_is_as_good_as_promised() -> None:
    models = json.loads(checked("zoo", "train", "--json"))["models"]
    accuracy = {model["name"]: model["test_accuracy"] for model in models}
    assert 0.85 <= accuracy["digits-small"] <= 0.93
    assert accuracy["digits-large"] >= 0.96
    assert accuracy["digits-large"] - accuracy["digits-small"] >= 0.05
    assert all(model["test_photos"] == len(indices("test")) for model in models)


@pytest.mark.parametrize("name", sorted(ZOO))
def test_recorded_accuracy_and_confidence_hold_on_the_photos(name: str) -> None:
    import torch
    from safetensors.torch import load_file

    model = ZOO[name]
    network = model.build()
    network.load_state_dict(load_file(model.weights_path()))
    assert sum(parameter.numel() for parameter in network.parameters()) == model.parameters
    torch.fx.symbolic_trace(network)
    scans, digits = load_scans()
    chosen = indices("test")
    pixels = [
        preprocess.apply(model.preprocess, decode_image(render(scans[i], photo_seed(i))))
        for i in chosen
    ]
    batch = torch.from_numpy(np.stack(pixels).transpose(0, 3, 1, 2).copy())
    with torch.inference_mode():
        scores = probabilities(model.task(), network(batch).numpy())
    right = scores.argmax(axis=1) == digits[chosen]
    assert right.mean() == pytest.approx(model.record().test_accuracy, abs=0.005)
    assert scores.max(axis=1).mean() == pytest.approx(right.mean(), abs=0.04), "calibrated"
