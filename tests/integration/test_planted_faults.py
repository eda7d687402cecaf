"""Mistakes of converters, planted in saved files: ``verify`` fails each one by its name.

One bundle of the zoo's trained net (with ReLU6 and one-sided padding) carries every fault of
a classifier as a variant of its own beside the sound files, so that one verification judges
them all. Masks and boxes have a bundle of a small random net each.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from converters.dataset import read_dataset
from converters.jobs import (
    ConvertJob,
    JobResult,
    LayersJob,
    LayersResult,
    SourceRequest,
    VariantRun,
)
from converters.supervisor import Supervisor
from converters.verify.gates import default_gates
from converters.verify.outcome import Options, Report, VariantReport
from converters.verify.verify import verify_bundle
from edge_runtime.bundle import Bundle
from edge_runtime.contract.manifest import Manifest, Variant, labels_digest
from edge_runtime.contract.preprocess import NAMED
from edge_runtime.contract.tasks import task_name
from edge_runtime.contract.tensors import TensorSpec
from tests.support import padded_digits, plant
from tests.support.digits import checked, nearfar, only, render
from tests.support.mend import mend, read

pytestmark = pytest.mark.slow

FORMATS = ("torchscript", "tflite", "coreml")
SOURCE = f"{Path(padded_digits.__file__)}:net"
NETS = Path(__file__).parents[2] / "benchmarks" / "nets.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def photos(folder: Path) -> Path:
    return render(folder / "test", "test", 48)


@pytest.fixture(scope="module")
def sound(folder: Path) -> Path:
    """fp32 and int8 in three formats, calibrated with photos."""
    weights = folder / "weights.safetensors"
    padded_digits.save_weights(weights)
    calibration = render(folder / "calib", "calib", 48)
    checked(
        "convert", SOURCE, "--weights", weights, "--preprocess", "torchvision",
        "--input-size", "32", "--calib", calibration, "--precision", "fp32,int8",
        "-o", folder / "sound", "--quiet",
    )  # fmt: skip
    return folder / "sound"


def _verify(bundle: Path, photos: Path) -> Report:
    opened = Bundle.open(bundle)
    gates = default_gates(task_name(opened.manifest.task))
    data = read_dataset(photos, labels=None, purpose="evaluation")
    return verify_bundle(opened, data, Options(gates=gates, jobs=2))


def _names(entry: VariantReport) -> set[str]:
    return {finding.name for finding in entry.findings}


# The faults of a classifier ----------------------------------------------------------------


def _trained(weights: Path) -> Any:
    """The reference's net as a module."""
    from safetensors.torch import load_file

    net = padded_digits.net()
    net.load_state_dict(load_file(str(weights)))
    return net


def _symmetric(net: Any) -> Any:
    """The same net with the strided convolution padded by one pixel on all sides."""
    from torch import nn

    for module in net.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, nn.ZeroPad2d):
                setattr(module, name, nn.ZeroPad2d(1))
    return net


def _optimized(net: Any, *, freeze: bool) -> Any:
    import torch
    from torch.utils.mobile_optimizer import optimize_for_mobile

    with torch.no_grad():
        traced = torch.jit.trace(net, torch.zeros(1, 3, 32, 32), check_trace=False)
        return optimize_for_mobile(torch.jit.freeze(traced) if freeze else traced)


def _pixels(photos: Path, count: int) -> np.ndarray:
    """Normalized photos, float32 ``[count, 3, 32, 32]``."""
    from edge_runtime.contract.imaging import decode_image
    from edge_runtime.contract.preprocess import apply, named

    record = named("torchvision", 32, 32)
    files = sorted(photos.glob("*.jpg"))[:count]
    arrays = [apply(record, decode_image(path.read_bytes())) for path in files]
    return np.stack(arrays).transpose(0, 3, 1, 2).astype(np.float32)


def _naive_int8(net: Any, pixels: np.ndarray) -> Any:
    """FX quantization as documented: ReLU6 stays a clamp of a quantized tensor."""
    import torch
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    torch.backends.quantized.engine = "qnnpack"
    batch = torch.from_numpy(pixels)
    prepared = prepare_fx(net, get_default_qconfig_mapping("qnnpack"), (batch[:1],))
    with torch.no_grad():
        prepared(batch)
        traced = torch.jit.trace(convert_fx(prepared), batch[:1], check_trace=False)
        return torch.jit.freeze(traced)


def _around(kind: str) -> Callable[[Any], Any]:
    """A wrapper that makes the mistake in front of, or behind, a TorchScript file."""
    import torch
    from torch import nn

    class SwappedChannels(nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.inner(image.flip([1]))

    class UnitInput(nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner
            mean, std = NAMED["torchvision"][1].mean, NAMED["torchvision"][1].std
            self.register_buffer("mean", torch.tensor(mean).reshape(1, 3, 1, 1))
            self.register_buffer("std", torch.tensor(std).reshape(1, 3, 1, 1))

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.inner((image - self.mean) / self.std)

    class Softmax(nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return torch.softmax(self.inner(image), dim=-1)

    class Reversed(nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.inner(image).flip([-1])

    kinds: dict[str, Any] = {
        "channels": SwappedChannels,
        "unit": UnitInput,
        "softmax": Softmax,
        "classes": Reversed,
    }
    return kinds[kind]  # type: ignore[no-any-return]


def _converted(folder: Path, base: Path, format_name: str, calibration: np.ndarray) -> Path:
    """The file that the converter writes in int8 for these calibration inputs."""
    manifest = read(base)
    assert manifest.reference is not None
    out = folder / f"converted-{format_name}-{abs(hash(calibration.tobytes()))}"
    out.mkdir()
    np.save(out / "calibration.npy", calibration)
    fp32 = base / manifest.variant(f"{format_name}-fp32").path
    job = ConvertJob(
        source=SourceRequest(
            source=SOURCE,
            weights=str(folder / "weights.safetensors"),
            preprocess="torchvision",
            input_height=32,
            input_width=32,
        ),
        format=format_name,  # type: ignore[arg-type]
        precision="int8",
        out_dir=str(out),
        inputs=manifest.reference.inputs,
        outputs=manifest.reference.outputs,
        calibration=str(out / "calibration.npy"),
        base=str(fp32),
        metadata=plant.read_metadata(base / manifest.variant(f"{format_name}-int8").path) or "",
        task=manifest.task,
        preprocess=manifest.preprocess,
    )
    answer = Supervisor(out).run("convert", job).answer
    return out / answer.path  # type: ignore[union-attr]


def _replace(source: Path) -> Callable[[Path], None]:
    def write(target: Path) -> None:
        if target.is_dir():
            shutil.rmtree(target)
            shutil.copytree(source, target)
        else:
            shutil.copyfile(source, target)

    return write


def _other_record(variant: Variant) -> Variant:
    color, normalization = NAMED["tf"]
    record = msgspec.structs.replace(variant.preprocess, color=color, normalization=normalization)
    return msgspec.structs.replace(variant, preprocess=record)


@pytest.fixture(scope="module")
def classified(sound: Path, photos: Path, folder: Path) -> dict[str, VariantReport]:
    """Every fault as a variant, verified together; by variant id."""
    weights = folder / "weights.safetensors"
    root = folder / "faulty"
    shutil.copytree(sound, root)
    metadata = plant.read_metadata(root / read(root).variant("torchscript-fp32").path)

    def wrapped(kind: str) -> Callable[[Path], None]:
        return lambda path: plant.wrap_lite(path, _around(kind))

    def lite(module: Callable[[], Any]) -> Callable[[Path], None]:
        return lambda path: plant.save_lite(module(), path, metadata)

    pixels = _pixels(folder / "calib", 32)
    noise = np.random.default_rng(5).random(pixels.shape, np.float32)
    plant.add_variant(root, "torchscript-fp32", "channels", wrapped("channels"))
    plant.add_variant(root, "tflite-fp32", "channels", plant.swap_channels)
    plant.add_variant(root, "torchscript-fp32", "unit", wrapped("unit"))
    for name in FORMATS:
        plant.add_variant(root, f"{name}-fp32", "record", lambda _: None, _other_record)
        fp32 = root / read(root).variant(f"{name}-fp32").path
        plant.add_variant(root, f"{name}-int8", "float", _replace(fp32))
        made = _converted(folder, sound, name, noise)
        plant.add_variant(root, f"{name}-int8", "noise", _replace(made))
    plant.add_variant(
        root, "torchscript-fp32", "padding",
        lite(lambda: _optimized(_symmetric(_trained(weights)), freeze=True)),
    )  # fmt: skip
    plant.add_variant(root, "tflite-fp32", "padding", plant.mirror_padding)
    plant.add_variant(root, "coreml-fp32", "padding", plant.mirror_padding_coreml)
    plant.add_variant(root, "tflite-int8", "padding8", plant.mirror_padding)
    plant.add_variant(
        root,
        "torchscript-fp32",
        "unfrozen",
        lite(lambda: _optimized(_trained(weights), freeze=False)),
    )
    plant.add_variant(
        root, "torchscript-fp32", "training", lite(lambda: _traced_in_training(_trained(weights)))
    )
    plant.add_variant(
        root, "torchscript-int8", "relu6", lite(lambda: _naive_int8(_trained(weights), pixels))
    )
    pale = _converted(folder, sound, "torchscript", 0.25 * pixels)
    plant.add_variant(root, "torchscript-int8", "clipped", _replace(pale))
    plant.add_variant(root, "tflite-int8", "clipped", lambda p: plant.narrow_tflite(p, 0.25))
    plant.add_variant(root, "coreml-int8", "clipped", lambda p: plant.narrow_coreml(p, 0.25))
    plant.add_variant(root, "torchscript-fp32", "classes", wrapped("classes"))
    plant.add_variant(root, "tflite-fp32", "classes", plant.swap_classes)
    plant.add_variant(root, "torchscript-fp32", "softmax", wrapped("softmax"))
    plant.add_variant(root, "tflite-fp32", "softmax", plant.add_softmax)
    report = _verify(root, photos)
    assert report.exit_code == 1
    assert all(check.passed for check in report.checks)
    return {entry.id: entry for entry in report.variants}


def _traced_in_training(net: Any) -> Any:
    import torch

    with torch.no_grad():
        return torch.jit.trace(net.train(), torch.zeros(1, 3, 32, 32), check_trace=False)


FAULTS = {
    "channels-torchscript": "channel-order",
    "channels-tflite": "channel-order",
    "unit-torchscript": "preprocess-record",
    "record-torchscript": "preprocess-record",
    "record-tflite": "preprocess-record",
    "record-coreml": "preprocess-record",
    "padding-torchscript": "padding",
    "padding-tflite": "padding",
    "padding-coreml": "padding",
    "padding8-tflite": "padding",
    "unfrozen-torchscript": "unfrozen-batch-norm",
    "training-torchscript": "unfrozen-batch-norm",
    "relu6-torchscript": "engine-relu6",
    "clipped-torchscript": "clipped-calibration",
    "clipped-tflite": "clipped-calibration",
    "clipped-coreml": "clipped-calibration",
    "noise-torchscript": "noise-calibration",
    "noise-tflite": "noise-calibration",
    "noise-coreml": "noise-calibration",
    "float-torchscript": "not-quantized",
    "float-tflite": "not-quantized",
    "float-coreml": "not-quantized",
    "classes-torchscript": "class-order",
    "classes-tflite": "class-order",
    "softmax-torchscript": "softmax-twice",
    "softmax-tflite": "softmax-twice",
}


@pytest.mark.parametrize(("variant_id", "name"), FAULTS.items())
def test_a_planted_fault_fails_its_variant_by_name(
    classified: dict[str, VariantReport], variant_id: str, name: str
) -> None:
    entry = classified[variant_id]
    assert not entry.passed
    assert name in _names(entry), entry.findings
    others = set(FAULTS.values()) - {name}
    assert not _names(entry) & others, entry.findings


def test_sound_files_beside_the_faulty_ones_pass(classified: dict[str, VariantReport]) -> None:
    rest = {key: entry for key, entry in classified.items() if key not in FAULTS}
    assert set(rest) == {f"{name}-{kind}" for name in FORMATS for kind in ("fp32", "int8")}
    assert all(entry.passed and not entry.findings for entry in rest.values())


def test_no_cause_is_found_in_sound_files(sound: Path, photos: Path, tmp_path: Path) -> None:
    """Asked outright, as a doubtful file would be: all six are cleared."""
    bundle = Bundle.open(sound)
    assert bundle.manifest.reference is not None
    for name in FORMATS:
        job = LayersJob(
            reference=str(sound / bundle.manifest.reference.path),
            images=[str(path) for path in sorted(photos.glob("*.jpg"))],
            variants=[
                VariantRun(path=str(bundle.path(variant)), variant=variant)
                for variant in bundle.manifest.variants
                if variant.format == name
            ],
        )
        result = Supervisor(tmp_path / name).run(name, job)
        assert isinstance(result, JobResult)
        assert isinstance(result.answer, LayersResult)
        assert result.answer.errors == {}
        assert result.answer.causes == {f"{name}-fp32": [], f"{name}-int8": []}
        assert result.answer.findings == {}


def test_labels_swapped_in_the_bundle_are_not_those_inside_the_files(
    sound: Path, photos: Path, tmp_path: Path
) -> None:
    copy = only(sound, tmp_path / "b", "tflite-fp32", "torchscript-fp32", "coreml-fp32")
    path = copy / "labels.txt"
    labels = path.read_text().splitlines()
    labels[3], labels[7] = labels[7], labels[3]
    path.write_text("".join(label + "\n" for label in labels))

    def change(manifest: Manifest) -> Manifest:
        assert manifest.labels is not None
        own = msgspec.structs.replace(manifest.labels, sha256=labels_digest(labels))
        return msgspec.structs.replace(manifest, labels=own)

    mend(copy, change)
    done = nearfar("verify", copy, "--eval", photos, "--json", tmp_path / "v.json", "--quiet")
    assert done.returncode == 1, done.stdout + done.stderr
    report = msgspec.json.decode((tmp_path / "v.json").read_bytes())
    assert len(report["variants"]) == 3
    for entry in report["variants"]:
        assert entry["passed"] is False
        assert [finding["name"] for finding in entry["findings"]] == ["labels"]
        assert "2 of 10 differ" in entry["reasons"][0]


# Masks and boxes ---------------------------------------------------------------------------


def _small_bundle(target: Path, net: str, *options: str) -> Path:
    checked(
        "convert", f"{NETS}:{net}", "--weights", "random:3", "--preprocess", "unit",
        "--input-size", "64", "--to", "torchscript", "--precision", "fp32", "-o", target,
        "--quiet", *options,
    )  # fmt: skip
    return target


def _transposed(*, classes: bool) -> Callable[[Any], Any]:
    import torch
    from torch import nn

    class Transposed(nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.inner(image).transpose(-1, -2).contiguous()

    class TransposedClasses(nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            mask = self.inner(image).argmax(dim=1).to(torch.int32)
            return mask.transpose(-1, -2).contiguous()

    return TransposedClasses if classes else Transposed


def _answers_classes(variant: Variant) -> Variant:
    spec = TensorSpec(name="classes", dtype="int32", shape=(1, 64, 64), layout="OTHER")
    return msgspec.structs.replace(variant, outputs=(spec,))


def test_transposed_mask_is_named(photos: Path, tmp_path: Path) -> None:
    """As scores, and as classes chosen inside the file."""
    bundle = _small_bundle(tmp_path / "b", "tiny_segmenter", "--task", "segmentation")
    base = "torchscript-fp32"
    plant.add_variant(
        bundle, base, "scores", lambda path: plant.wrap_lite(path, _transposed(classes=False))
    )
    plant.add_variant(
        bundle, base, "classes",
        lambda path: plant.wrap_lite(path, _transposed(classes=True)), _answers_classes,
    )  # fmt: skip
    report = _verify(bundle, photos)
    assert report.exit_code == 1
    found = {entry.id: entry for entry in report.variants}
    assert found[base].passed
    for variant_id in ("scores-torchscript", "classes-torchscript"):
        assert not found[variant_id].passed
        assert "mask-geometry" in _names(found[variant_id])


def _detector(kind: str) -> Callable[[Any], Any]:
    import torch
    from torch import nn

    class NextClass(nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            boxes, scores, classes = self.inner(image)
            return boxes, scores, classes + 1.0

    class NextRow(nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            boxes, scores, classes = self.inner(image)
            return torch.roll(boxes, 1, 1), scores, classes

    kinds: dict[str, Any] = {"class": NextClass, "row": NextRow}
    return kinds[kind]  # type: ignore[no-any-return]


def _other_threshold(bundle: Path, threshold: float) -> Callable[[Path], None]:
    """The file that the converter writes for another overlap."""

    def write(path: Path) -> None:
        manifest = read(bundle)
        assert manifest.reference is not None
        out = path.parent.parent.parent / f"iou-{threshold:g}"
        out.mkdir()
        job = ConvertJob(
            source=SourceRequest(
                source=f"{NETS}:tiny_detector",
                task="detection",
                weights="random:3",
                preprocess="unit",
                input_height=64,
                input_width=64,
            ),
            format="torchscript",
            precision="fp32",
            out_dir=str(out),
            inputs=manifest.reference.inputs,
            outputs=manifest.reference.outputs,
            task=msgspec.structs.replace(manifest.task, iou_threshold=threshold),
            preprocess=manifest.preprocess,
            in_graph=("nms",),
        )
        answer = Supervisor(out).run("convert", job).answer
        shutil.copyfile(out / answer.path, path)  # type: ignore[union-attr]

    return write


def test_nms_off_by_one_is_named(photos: Path, tmp_path: Path) -> None:
    """A class, a row, and an overlap at which boxes are dropped: each its own variant."""
    bundle = _small_bundle(tmp_path / "b", "tiny_detector", "--task", "detection", "--nms")
    base = "torchscript-fp32"
    for kind in ("class", "row"):
        plant.add_variant(
            bundle, base, kind, lambda path, kind=kind: plant.wrap_lite(path, _detector(kind))
        )
    plant.add_variant(bundle, base, "loose", _other_threshold(bundle, 0.7))
    plant.add_variant(bundle, base, "tight", _other_threshold(bundle, 0.3))
    report = _verify(bundle, photos)
    assert report.exit_code == 1
    found = {entry.id: entry for entry in report.variants}
    assert found[base].passed
    assert not found[base].findings
    expected = {
        "class-torchscript": "class-offset",
        "row-torchscript": "nms",
        "loose-torchscript": "nms",
        "tight-torchscript": "nms",
    }
    for variant_id, name in expected.items():
        assert not found[variant_id].passed
        assert name in _names(found[variant_id]), found[variant_id].findings
    assert "class-offset" not in _names(found["row-torchscript"])
