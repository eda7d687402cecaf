"""A servable whose program could run code never reaches torch, in whichever process."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import msgspec
import pytest

from broker.executors.base import BatchItem, ExecutorOptions
from broker.executors.inline import InlineExecutor
from broker.executors.worker import WorkerExecutor
from broker.models.servable import ModelKey, open_servable
from edge_runtime.contract.errors import ModelLoadError, NearfarError
from edge_runtime.contract.files import file_entries
from edge_runtime.contract.manifest import SERVABLE_NAME, Servable, canonical_json
from tests.support import broker_images as images
from tests.support.broker import Events
from tests.support.servables import direct_scores, shared_servable, tiny_net

pytestmark = pytest.mark.slow

OPTIONS = ExecutorOptions(device="cpu", precision="fp32", threads=1)


def hostile_servable(folder: Path, canary: Path) -> Path:
    """A servable with a true manifest, whose program writes ``canary`` when torch loads it."""
    shutil.copytree(shared_servable(), folder)
    path = folder / "model.pt2"
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    program = json.loads(contents["model/models/model.json"])
    program["guards_code"] = [f"__import__('pathlib').Path({str(canary)!r}).touch() or True"]
    contents["model/models/model.json"] = json.dumps(program).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    manifest = msgspec.json.decode((folder / SERVABLE_NAME).read_bytes(), type=Servable)
    listed = file_entries(folder, exclude=[SERVABLE_NAME])
    changed = msgspec.structs.replace(manifest, files=listed)
    (folder / SERVABLE_NAME).write_bytes(canonical_json(changed))
    return folder


def test_torch_alone_would_run_what_the_file_brings(tmp_path: Path):
    import torch

    folder = hostile_servable(tmp_path / "tiny", tmp_path / "canary")
    program = torch.export.load(folder / "model.pt2").module()
    program(torch.zeros(2, 3, 32, 32))
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("executor", [WorkerExecutor, InlineExecutor])
async def test_the_broker_refuses_it_and_nothing_runs(tmp_path: Path, executor):
    folder = hostile_servable(tmp_path / "tiny", tmp_path / "canary")
    started = executor([open_servable(folder)], OPTIONS, Events())
    with pytest.raises(ModelLoadError, match="could run code when it is loaded") as caught:
        await started.start()
    assert "'tiny'" in caught.value.detail
    assert not (tmp_path / "canary").exists()


def test_verification_refuses_it_and_nothing_runs(tmp_path: Path):
    from converters.verify.run_files import load_reference

    folder = hostile_servable(tmp_path / "tiny", tmp_path / "canary")
    with pytest.raises(ModelLoadError, match="its guard"):
        load_reference(folder / "model.pt2")
    assert not (tmp_path / "canary").exists()


async def test_a_sound_servable_is_served():
    worker = WorkerExecutor([open_servable(shared_servable())], OPTIONS, Events())
    try:
        await worker.start()
        outcome = await worker.run(ModelKey("tiny", "1.0.0"), [BatchItem(images.png(1), 1)])
    finally:
        await worker.close()
    (answer,) = outcome.results
    assert not isinstance(answer, NearfarError)
    assert answer.predictions is not None
    expected = direct_scores(tiny_net(), images.png(1))
    assert answer.predictions[0].index == int(expected.argmax())
    assert answer.predictions[0].score == pytest.approx(float(expected.max()), abs=1e-5)
