"""Sources that cannot be used: each mistake ends in a typed error that says what to do."""

from __future__ import annotations

import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest

from converters.options import source_request
from converters.sources import load_source
from converters.weights import load_into, read_state_dict
from edge_runtime.contract import limits
from edge_runtime.contract.errors import (
    ConfigError,
    NearfarError,
    SourceError,
    WeightsMismatch,
    WeightsUnavailable,
)

NETS = '''
import torch
from torch import nn

class Small(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(4, 5))

class Sampling(nn.Module):
    """A VAE that draws its latent at inference too."""
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Conv2d(3, 4, 3, 1, 1), nn.Conv2d(4, 3, 3, 1, 1)
    def forward(self, image):
        mean = self.encoder(image)
        return torch.sigmoid(self.decoder(mean + torch.randn_like(mean))), mean

class Dropping(nn.Module):
    def forward(self, image):
        return nn.functional.dropout(image.mean((2, 3)), 0.5, training=True)

class OtherSize(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(7, 2)
    def forward(self, image):
        return self.head(image.flatten(1))

def failing(): raise ZeroDivisionError("one over none")
def leaving(): raise SystemExit(3)
def silent(): raise RuntimeError
def nothing(): return None
def asking(width): return Small()
number = 3
'''


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sources") / "small_nets.py"
    path.write_text(NETS)
    return path


@pytest.fixture(scope="module")
def state(nets: Path) -> dict[str, Any]:
    import torch

    torch.manual_seed(1)
    layers = torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, 5)
    return {
        f"{index}.{name}": value.detach()
        for index, layer in zip((0, 4), layers, strict=True)
        for name, value in layer.named_parameters()
    }


def load(nets: Path, name: str, **options: Any) -> Any:
    chosen = {"preprocess": "unit", "input_size": "16", "weights": "random:0"} | options
    return load_source(source_request(f"{nets}:{name}", **chosen))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("failing", r"failed \(ZeroDivisionError: one over none\): .* must return the model"),
        ("leaving", r"failed \(SystemExit: 3\)"),
        ("silent", r"failed \(RuntimeError\): "),
        ("asking", "missing 1 required positional argument.*called without arguments"),
        ("nothing", "returned a NoneType, no nn.Module: return the built model"),
        ("nn", "no callable 'nn': write FILE.py:CALLABLE"),
        ("Dropping", "no dropout with training=True"),
        ("OtherSize", r"does not take float32 \[1, 3, 16, 16\].*check --input-size"),
    ],
)
def test_a_factory_that_gives_no_usable_model_is_refused(nets: Path, name: str, says: str):
    with pytest.raises(SourceError, match=says):
        load(nets, name)


def test_a_vae_that_samples_at_inference_is_refused_with_the_way_out(nets: Path):
    with pytest.raises(SourceError, match="use the mean instead of sampling"):
        load(nets, "Sampling", task="reconstruction")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def f(:\n", "SyntaxError"),
        ("import not_there_at_all\n", "No module named 'not_there_at_all'"),
        ("", "no callable 'f'"),
    ],
)
def test_a_file_that_is_no_working_python_is_refused(tmp_path: Path, text: str, says: str):
    (tmp_path / "broken_net.py").write_text(text)
    with pytest.raises(SourceError, match=says):
        load(tmp_path / "broken_net.py", "f")


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.abort, ()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused_unread(tmp_path: Path, zipped: bool):
    import torch

    path = tmp_path / "evil.pth"
    torch.save({"w": Evil()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(SourceError, match="could run any code: save only"):
        read_state_dict(path)


def test_a_whole_pickled_model_is_refused_like_any_code(tmp_path: Path):
    import torch

    torch.save(torch.nn.Linear(2, 2), tmp_path / "whole.pth")
    with pytest.raises(SourceError, match="could run any code"):
        read_state_dict(tmp_path / "whole.pth")


def test_weights_larger_than_the_bound_are_refused_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert limits.MAX_WEIGHTS_BYTES == 4 * 2**30
    monkeypatch.setattr(limits, "MAX_WEIGHTS_BYTES", 1000)
    for name in ("large.safetensors", "large.pth"):
        (tmp_path / name).write_bytes(bytes(1001))
        with pytest.raises(SourceError, match="has 1001 bytes, more than 1000: save only"):
            read_state_dict(tmp_path / name)


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path: Path):
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", bytes(220 * 2**20))
    assert path.stat().st_size < 2**20
    with pytest.raises(SourceError, match="unpacks to 230686720 bytes: more than a weights file"):
        read_state_dict(path)


def test_weights_that_do_not_fit_are_named_each_way(
    tmp_path: Path, nets: Path, state: dict[str, Any]
):
    import torch
    from safetensors.torch import save_file

    changed = {**state, "4.weight": torch.zeros(7, 4), "extra": torch.zeros(1)}
    del changed["0.bias"]
    save_file(changed, tmp_path / "other.safetensors")
    with pytest.raises(WeightsMismatch) as caught:
        load(nets, "Small", weights=str(tmp_path / "other.safetensors"))
    assert caught.value.detail == (
        "other.safetensors does not fit the model: 1 missing (0.bias); 1 unexpected (extra); "
        "1 of another shape (4.weight: file [7, 4], model [5, 4]). Check that source and "
        "weights belong together (number of classes, width)"
    )


def test_weights_with_nan_are_refused_with_the_tensor_named(tmp_path: Path, state: dict[str, Any]):
    import torch
    from safetensors.torch import save_file

    save_file({**state, "0.bias": torch.full((4,), float("nan"))}, tmp_path / "nan.safetensors")
    with pytest.raises(SourceError, match=r"holds NaN \(0.bias\): take an earlier checkpoint"):
        read_state_dict(tmp_path / "nan.safetensors")


def write_weights(folder: Path, state: dict[str, Any]) -> None:
    """Each file under a name that says something else."""
    import torch
    from safetensors.torch import save_file

    save_file(state, folder / "safe.safetensors")
    shutil.copy(folder / "safe.safetensors", folder / "safe.pth")
    torch.save(state, folder / "torch.safetensors")
    torch.save([1, 2], folder / "list.pth")
    (folder / "zeros.safetensors").write_bytes(bytes(100))
    (folder / "text.pth").write_text("hello")
    (folder / "empty.pth").touch()
    (folder / "keras.pth").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    (folder / "folder.pth").mkdir()
    traced = torch.jit.trace(torch.nn.ReLU(), torch.zeros(1))
    torch.jit.save(traced, str(folder / "script.pth"))


def test_a_weights_file_that_is_not_what_its_name_says_is_refused(
    tmp_path: Path, state: dict[str, Any]
):
    write_weights(tmp_path, state)
    expected = {
        "safe.pth": "is a safetensors file: name it .safetensors",
        "torch.safetensors": "was written by torch.save: name it .pth",
        "list.pth": "holds no state dict: save model.state_dict()",
        "zeros.safetensors": "is no readable weights file (",
        "text.pth": "is no readable weights file (KeyError: 101): save or copy it again",
        "empty.pth": "is empty: save or copy it again",
        "keras.pth": "holds Keras weights: this source is a torch model",
        "folder.pth": "does not exist: check --weights",
        "script.pth": "is a whole saved model, not only weights: pass it as SOURCE",
        "gone.pth": "does not exist: check --weights",
    }
    for name, says in expected.items():
        with pytest.raises(SourceError) as caught:
            read_state_dict(tmp_path / name)
        assert says in caught.value.detail, name


def test_a_source_file_that_is_not_what_its_name_says_is_refused(
    tmp_path: Path, state: dict[str, Any]
):
    import torch

    write_weights(tmp_path, state)
    torch.save(state, tmp_path / "state.pt")
    for suffix in ("pt2", "pt", "keras"):
        (tmp_path / f"text.{suffix}").write_text("hello")
    shutil.copy(tmp_path / "script.pth", tmp_path / "script.pt2")
    (tmp_path / "bare").mkdir()
    expected = {
        "text.pt2": "is not a torch.export program (File is not a zip file): save",
        "text.pt": "is not a TorchScript archive (File is not a zip file): save",
        "text.keras": "is not a .keras file (File is not a zip file): save",
        "state.pt": "holds no model, perhaps only weights: pass FILE.py:CALLABLE with --weights",
        "script.pt2": "is no program of this torch.export: save it again",
        "bare": "is no SavedModel (it has no saved_model.pb): pass the folder",
        "gone.pt2": "there is no file",
        "gone": "is none of torchvision:NAME",
    }
    for name, says in expected.items():
        with pytest.raises(SourceError) as caught:
            load_source(source_request(str(tmp_path / name), preprocess="unit", input_size="16"))
        assert says in caught.value.detail, name


def test_a_torchscript_model_that_touches_files_is_refused_before_it_is_loaded(tmp_path: Path):
    import torch

    class Writing(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            torch.save(image, "/nowhere/at/all")
            return image.mean((2, 3))

    torch.jit.script(Writing()).save(str(tmp_path / "writing.pt"))
    request = source_request(str(tmp_path / "writing.pt"), preprocess="unit", input_size="16")
    with pytest.raises(SourceError, match=r"reads or writes files \(.*save\): models with side"):
        load_source(request)


def test_default_weights_without_a_network_say_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    request = source_request("torchvision:mobilenet_v3_small", weights="DEFAULT")
    with pytest.raises(WeightsUnavailable) as caught:
        load_source(request)
    assert "torchvision:mobilenet_v3_small weights IMAGENET1K_V1" in caught.value.detail
    assert "fetch it where there is a network and pass it as --weights FILE" in caught.value.detail


@pytest.mark.parametrize(
    ("source", "options", "expected", "says"),
    [
        ("small", {"weights": None}, ConfigError, "no weights: pass --weights FILE"),
        ("small", {"weights": "DEFAULT"}, ConfigError, "no weights of its own"),
        ("small", {"weights": "random:one"}, ConfigError, "write random:SEED"),
        ("small", {"preprocess": None, "input_size": None}, ConfigError, "--preprocess"),
        ("torchvision:resnet51", {}, SourceError, "no classification model 'resnet51'"),
        ("torchvision:resnet18", {"task": "detection"}, ConfigError, "is for classification"),
        ("torchvision:fasterrcnn_resnet50_fpn", {"task": "detection"}, SourceError, "RoIAlign"),
    ],
)
def test_a_request_that_lacks_or_contradicts_something_is_refused(
    nets: Path, source: str, options: dict[str, Any], expected: type[NearfarError], says: str
):
    name = f"{nets}:Small" if source == "small" else source
    chosen = {"preprocess": "unit", "input_size": "16", "weights": "random:0"} | options
    with pytest.raises(expected, match=says):
        load_source(source_request(name, **chosen))


def test_sound_weights_load_from_each_kind_of_file(
    tmp_path: Path, nets: Path, state: dict[str, Any]
):
    """safetensors, a zipped and an old pickle, a checkpoint of data-parallel training."""
    import torch
    from safetensors.torch import save_file

    save_file(state, tmp_path / "safe.safetensors")
    torch.save(state, tmp_path / "new.pth")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    parallel = {f"module.{name}": value for name, value in state.items()}
    torch.save({"epoch": 3, "state_dict": parallel}, tmp_path / "checkpoint.pt")
    for name in ("safe.safetensors", "new.pth", "old.pth", "checkpoint.pt"):
        source = load(nets, "Small", weights=str(tmp_path / name))
        assert source.weights == name
        loaded = source.module.state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in state.items())


def test_random_weights_are_the_same_every_time_and_differ_by_seed(nets: Path):
    import torch

    first, again = (load(nets, "Small", weights="random:7").module for _ in range(2))
    other = load(nets, "Small", weights="random:8").module
    assert torch.equal(first[4].weight, again[4].weight)
    assert not torch.equal(first[4].weight, other[4].weight)


def test_the_digest_of_weights_is_that_of_the_file(tmp_path: Path, state: dict[str, Any]):
    import hashlib

    import torch
    from safetensors.torch import save_file

    path = tmp_path / "layer.safetensors"
    save_file({"weight": state["4.weight"], "bias": state["4.bias"]}, path)
    layer = torch.nn.Linear(4, 5)
    assert load_into(layer, path) == hashlib.sha256(path.read_bytes()).hexdigest()
