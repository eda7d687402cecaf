"""ExecuTorch files are written, run and found equal to the net they come from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from converters.formats.executorch_census import census
from converters.formats.executorch_file import read_metadata, read_pte
from converters.jobs import ConvertJob, RoundJob, SourceRequest
from converters.supervisor import JobError, Supervisor
from edge_runtime.contract.errors import ConversionError
from edge_runtime.contract.preprocess import named
from edge_runtime.contract.tasks import ReconstructionTask
from edge_runtime.contract.tensors import TensorSpec

pytestmark = pytest.mark.slow

NET = '''
import torch
import torch.nn.functional as F
from torch import nn

class Net(nn.Module):
    """One of each operator that XNNPACK does not take as it is; two answers."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU6())
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, bias=False)
        self.thin = nn.Conv2d(8, 8, 1)
        self.norm = nn.InstanceNorm2d(8, affine=True)
        self.group = nn.GroupNorm(2, 8)
        self.pool = nn.AvgPool2d(3, 1, 1)
        self.squeeze = nn.AdaptiveAvgPool2d(1)
        self.gate = nn.Hardsigmoid()
        self.image = nn.Conv2d(8, 3, 3, padding=1)
        self.latent = nn.Linear(8, 5)
        self.near = nn.Conv2d(8, 4, 3, stride=4, padding=1)
        self.far = nn.Conv2d(8, 8, 3, stride=4, padding=1)
        self.scale = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x):
        x = F.relu6(self.thin(self.depthwise(F.pad(self.stem(x), (1, 1, 1, 1)))))
        x = self.pool(self.group(F.relu(self.norm(x))))
        x = x * self.gate(self.squeeze(x)) * self.scale[None, :, None, None] + 1
        heads = [head(x).permute(0, 2, 3, 1) for head in (self.near, self.far)]
        rows = torch.cat([head.reshape(x.shape[0], -1, 4) for head in heads], 1)
        center = x - x.mean((2, 3), keepdim=True)  # a norm written out
        x = center / torch.sqrt((center * center).mean((2, 3), keepdim=True) + 1e-3)
        latent = torch.cat([rows.flatten(1), self.latent(F.relu(x).mean((2, 3)))], 1)
        return torch.sigmoid(self.image(x)), latent

def net():
    torch.manual_seed(0)
    model = Net().train()
    with torch.no_grad():
        for _ in range(20):
            model(torch.randn(8, 3, 16, 16))
        model.thin.weight.mul_(0.01)  # XNNPACK's stock observer would spend 30 of 127 steps
    return model.eval()
'''

CHECK = """
import json, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import msgspec, numpy as np, torch
from types import SimpleNamespace
from converters.formats.executorch import ExecuTorchBackend, check_engine
from converters.jobs import Artifact, ConvertJob, Job
from converters.ready import ready_module
from edge_runtime.contract.errors import NearfarError
from edge_runtime.runtimes.executorch import ExecuTorchRuntime

torch.set_num_threads(1)
folder = Path(sys.argv[1])
result, open_models = {}, []
for name in ("fp32", "int8", "kept"):
    job = msgspec.json.decode((folder / "jobs" / f"{name}.json").read_bytes(), type=Job)
    artifact = msgspec.json.decode((folder / f"{name}.artifact").read_bytes(), type=Artifact)
    path = Path(job.out_dir) / artifact.path
    variant = SimpleNamespace(id=name, inputs=artifact.inputs, outputs=artifact.outputs)
    ready = ready_module(msgspec.structs.replace(job, rounded=None))
    model = ExecuTorchRuntime().load(path, variant, threads=1 + len(open_models))
    open_models.append(model)
    generator = np.random.default_rng(9)
    signal, noise = np.zeros(2), np.zeros(2)
    for _ in range(8):
        if artifact.inputs[0].dtype == "uint8":
            pixels = generator.integers(0, 256, artifact.inputs[0].shape, dtype=np.uint8)
        else:
            pixels = generator.normal(size=artifact.inputs[0].shape).astype(np.float32)
        with torch.no_grad():
            wanted = [one.numpy() for one in ready.module(torch.from_numpy(pixels))]
        for index, (ours, theirs) in enumerate(zip(wanted, model.run([pixels]), strict=True)):
            signal[index] += (ours.astype(float) ** 2).sum()
            noise[index] += ((ours.astype(float) - theirs) ** 2).sum()
    result[name] = (10 * np.log10(signal / noise)).tolist()


def failure(function, *arguments):
    try:
        function(*arguments)
    except NearfarError as error:
        return [error.code, error.detail]
    return None


path = Path(json.loads((folder / "jobs" / "fp32.json").read_text())["out_dir"]) / "model.pte"
data = path.read_bytes()
spec = open_models[0].inputs[0]
wrong = SimpleNamespace(id="v", outputs=open_models[0].outputs,
                        inputs=(msgspec.structs.replace(spec, shape=(1, 3, 16, 8)),))
fewer = SimpleNamespace(id="v", inputs=(spec,), outputs=open_models[0].outputs[:1])
right = SimpleNamespace(id="v", inputs=(spec,), outputs=open_models[0].outputs)
(folder / "cut.pte").write_bytes(data[: len(data) // 2])
(folder / "text.pte").write_bytes(b"not a model at all " * 50)
load = ExecuTorchRuntime().load
result["failures"] = {
    "shape": failure(load, path, wrong),
    "count": failure(load, path, fewer),
    "cut": failure(load, folder / "cut.pte", right),
    "text": failure(load, folder / "text.pte", right),
    "missing": failure(load, folder / "missing.pte", right),
    "input": failure(open_models[0].run, [np.zeros((1, 3, 16, 16))]),
}
job = msgspec.json.decode((folder / "jobs" / "fp32.json").read_bytes(), type=Job)
ready = ready_module(job)
ready.module.gate = torch.nn.Identity()
result["failures"]["engine"] = failure(check_engine, path, ready.module, ready)
job = msgspec.json.decode((folder / "jobs" / "int8.json").read_bytes(), type=Job)
off_grid = msgspec.structs.replace(job, rounded=str(folder / "off_grid.safetensors"))
result["failures"]["grid"] = failure(ExecuTorchBackend().convert, off_grid)
unknown = msgspec.structs.replace(job, keep=("depthwide",))
result["failures"]["keep"] = failure(ExecuTorchBackend().convert, unknown)
Path(sys.argv[2]).write_text(json.dumps(result))
"""

INPUT = TensorSpec(name="image", dtype="float32", shape=(1, 3, 16, 16), layout="NCHW")
OUTPUTS = (
    TensorSpec(name="image", dtype="float32", shape=(1, 3, 16, 16), layout="NCHW"),
    TensorSpec(name="latent", dtype="float32", shape=(1, 197), layout="NC"),
)
METADATA = '{"task":"reconstruction","labels":["Ärger"]}'


def _job(folder: Path, name: str, **options: Any) -> ConvertJob:
    out = folder / "out" / name
    out.mkdir(parents=True)
    source = SourceRequest(
        source=f"{folder / 'nets.py'}:net", weights="random:0", task="reconstruction",
        preprocess="tf", input_height=16, input_width=16,
    )  # fmt: skip
    values: dict[str, Any] = {
        "source": source, "format": "executorch", "precision": "int8", "out_dir": str(out),
        "inputs": (INPUT,), "outputs": OUTPUTS, "metadata": METADATA,
        "task": ReconstructionTask(latent_size=197), "preprocess": named("tf", 16, 16),
        "calibration": str(folder / "calibration.npy"),
        "rounded": str(folder / "rounded.safetensors"),
    }  # fmt: skip
    return ConvertJob(**{**values, **options})


def _push_off_the_grid(source: Path, target: Path) -> None:
    """Move one weight by less than half a step, as an exporter's own choice would."""
    from safetensors.numpy import load_file, save_file

    state = load_file(source)
    channel = state["image.weight"][0].reshape(-1)
    step = np.abs(channel).max() / 127
    channel[np.abs(channel).argmin()] += 0.4 * step
    save_file(state, target)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four conversions, each in its own child."""
    folder = tmp_path_factory.mktemp("executorch")
    (folder / "nets.py").write_text(NET)
    generator = np.random.default_rng(0)
    np.save(folder / "calibration.npy", generator.normal(size=(16, 3, 16, 16)).astype(np.float32))
    supervisor = Supervisor(folder, jobs=2, timeout_s=300)
    rounding = RoundJob(
        source=_job(folder, "unused").source,
        calibration=str(folder / "calibration.npy"),
        out_file=str(folder / "rounded.safetensors"),
    )
    supervisor.run("round", rounding)
    _push_off_the_grid(folder / "rounded.safetensors", folder / "off_grid.safetensors")
    jobs = {
        "fp32": _job(folder, "fp32", precision="fp32", calibration=None, rounded=None),
        "int8": _job(folder, "int8"),
        "again": _job(folder, "another/place"),
        "kept": _job(folder, "kept", input_mode="uint8", keep=("depthwise", "latent")),
    }
    for (name, _), answer in zip(jobs.items(), supervisor.run_all(list(jobs.items())), strict=True):
        if isinstance(answer, JobError):
            (folder / f"{name}.error").write_text(f"{answer.cause.code}: {answer.cause.detail}")
        else:
            (folder / f"{name}.artifact").write_bytes(msgspec.json.encode(answer.answer))
    return folder


@pytest.fixture(scope="module")
def checked(folder: Path) -> dict[str, Any]:
    """What a child found that loads and runs the files, in dB and in errors."""
    (folder / "check.py").write_text(CHECK)
    report = folder / "report.json"
    subprocess.run(
        [sys.executable, str(folder / "check.py"), str(folder), str(report)],
        check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    result: dict[str, Any] = json.loads(report.read_text())
    return result


def _file(folder: Path, name: str) -> Path:
    return folder / "out" / name / "model.pte"


def test_saved_files_answer_as_the_net_does(checked: dict[str, Any]) -> None:
    image, latent = checked["fp32"]
    assert min(image, latent) > 90.0
    for name in ("int8", "kept"):  # random weights: a wiring mistake gives less than 10 dB
        image, latent = checked[name]
        assert image > 20.0
        assert latent > 20.0


def test_every_operator_of_the_net_runs_on_xnnpack(folder: Path) -> None:
    for name in ("fp32", "int8"):
        file = read_pte(_file(folder, name))
        assert file.kernels == {}
        assert set(file.delegates) == {"XnnpackBackend"}
    artifact = json.loads((folder / "int8.artifact").read_text())
    assert "xnnpack_share=1.000" in artifact["rewrites"]


def test_census_tells_int8_from_fp32(folder: Path) -> None:
    exact, small = (census(_file(folder, name)) for name in ("fp32", "int8"))
    assert exact.quantized_share == 0.0
    assert exact.quantized_ops == 0
    assert small.quantized_share > 0.9
    # Four layers and the arithmetic between them; the gates, means and norms stay float.
    assert small.quantized_ops >= 8
    assert small.weight_bytes["int8"] > 3 * small.weight_bytes["float32"] / 4


def test_one_model_gives_the_same_bytes_in_another_process_and_place(folder: Path) -> None:
    assert _file(folder, "int8").read_bytes() == _file(folder, "another/place").read_bytes()


def test_no_file_names_this_machine(folder: Path) -> None:
    for name in ("fp32", "int8", "kept"):
        data = _file(folder, name).read_bytes()
        for word in (str(folder).encode(), b"site-packages", b"nets.py"):
            assert word not in data


def test_metadata_are_read_from_the_file_alone(folder: Path) -> None:
    assert read_metadata(_file(folder, "fp32")) == METADATA
    assert read_metadata(_file(folder, "int8")) == METADATA


def test_kept_layers_stay_float_and_are_named(folder: Path) -> None:
    artifact = json.loads((folder / "kept.artifact").read_text())
    assert artifact["kept"] == ["depthwise", "latent"]
    kept, whole = (census(_file(folder, name)).weight_bytes for name in ("kept", "int8"))
    weights = 8 * 9 + 8 * 5
    assert whole["int8"] - kept["int8"] == weights
    assert kept["float32"] - whole["float32"] >= 4 * weights


def test_uint8_file_takes_pixels(folder: Path) -> None:
    artifact = json.loads((folder / "kept.artifact").read_text())
    assert artifact["inputs"][0]["dtype"] == "uint8"
    assert "bake_normalization" in artifact["rewrites"]


def test_weights_off_the_shared_grid_are_refused(checked: dict[str, Any]) -> None:
    code, detail = checked["failures"]["grid"]
    assert code == ConversionError.code
    assert "0.40 steps away from the integers chosen for all formats" in detail


def test_layer_to_keep_that_there_is_not_is_refused(checked: dict[str, Any]) -> None:
    code, detail = checked["failures"]["keep"]
    assert code == "config"
    assert "the model has no module of this name" in detail


def test_wrong_or_damaged_files_are_refused_in_words(checked: dict[str, Any]) -> None:
    failures = checked["failures"]
    for name in ("shape", "count", "cut", "text", "missing"):
        assert failures[name][0] == "model_load"
    assert (
        "float32[1, 3, 16, 16], the manifest records float32[1, 3, 16, 8]" in (failures["shape"][1])
    )
    assert "the file has 2 outputs, the manifest 1" in failures["count"][1]
    assert "copy or convert it again" in failures["cut"][1]
    assert failures["input"][0] == "tensor"


def test_engine_that_computes_something_else_is_an_error(checked: dict[str, Any]) -> None:
    code, detail = checked["failures"]["engine"]
    assert code == ConversionError.code
    assert "the engine differs from its own arithmetic" in detail
