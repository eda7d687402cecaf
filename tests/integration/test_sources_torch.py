"""torchvision's models, the benchmark nets and saved torch files give the original's answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import nets
from benchmarks.conversion_matrix import Model, models
from converters.options import source_request
from converters.sources import Source, load_source
from converters.sources.random_weights import example_input
from converters.tasks import describe_model
from edge_runtime.contract.errors import ConfigError, SourceError
from edge_runtime.contract.manifest import REFERENCE_RECORD_NAME
from edge_runtime.contract.program_screen import screen_program
from edge_runtime.contract.tasks.detection import decode_boxes

FLOOR_DB = 80.0
ROWS = {row.name: row for row in models() if not row.trained}
NETS = [name for name, row in ROWS.items() if row.source.endswith(f"nets.py:{name}")]
VISION = [name for name, row in ROWS.items() if row.source.startswith("torchvision:")]


def load(row: Model) -> Source:
    return load_source(source_request(row.source, **row.options))


def inputs(source: Source, count: int = 2) -> Any:
    """Smooth color noise, pre-processed; for a generator normal latents. None it was built on."""
    preprocess = source.preprocess
    shape = (
        (preprocess.channels, *preprocess.size) if preprocess is not None else source.latent_shape
    )
    assert shape is not None
    return example_input(shape, preprocess, seed=99, count=count)


def leaves(answer: Any) -> list[Any]:
    return list(answer) if isinstance(answer, tuple | list) else [answer]


def run(module: Any, image: Any) -> list[Any]:
    import torch

    with torch.no_grad():
        return leaves(module(image))


def check_same(answers: list[Any], expected: list[Any]) -> None:
    """Every tensor above the floor, and none blank: silence would agree with anything."""
    assert len(answers) == len(expected)
    for answer, wanted in zip(answers, expected, strict=True):
        assert answer.shape == wanted.shape
        assert float(wanted.std()) > 1e-4
        noise = float(((answer - wanted).double() ** 2).mean())
        signal = float((wanted.double() ** 2).mean())
        assert 10 * np.log10(signal / max(noise, 1e-30)) > FLOOR_DB


def with_weights_of(original: Any, source: Source, prefix: str = "") -> Any:
    """``original`` with the source's weights in: those must be all it has."""
    state = {name.removeprefix(prefix): value for name, value in source.module.state_dict().items()}
    original.load_state_dict(state, strict=True)
    return original.eval()


@pytest.mark.parametrize("name", NETS)
def test_a_benchmark_net_gives_its_own_answers(name: str):
    source = load(ROWS[name])
    original = getattr(nets, name)()
    original = getattr(original, "module", original)
    wrapped = "model." if name == "vae" else ""
    image = inputs(source)
    expected = run(with_weights_of(original, source, wrapped), image)
    check_same(run(source.module, image), expected[:2])


def test_a_vae_encoder_loads_as_what_gives_numbers_for_an_image(tmp_path: Path):
    path = tmp_path / "encoder_net.py"
    path.write_text(
        "from torch import nn\n"
        "def encoder():\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 4, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 4, 2, 1),\n"
        "                         nn.ReLU(), nn.Flatten(), nn.Linear(16 * 16 * 16, 32))\n"
    )
    request = source_request(
        f"{path}:encoder", weights="random:0", preprocess="unit", input_size="64",
        activation="none",
    )  # fmt: skip
    source = load_source(request)
    assert describe_model(source, request).outputs[0].shape == (1, 32)
    assert source.activation == "none"
    import torch

    torch.manual_seed(0)
    from torch import nn

    original = nn.Sequential(
        nn.Conv2d(3, 8, 4, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 4, 2, 1),
        nn.ReLU(), nn.Flatten(), nn.Linear(16 * 16 * 16, 32),
    ).eval()  # fmt: skip
    check_same(run(source.module, inputs(source)), run(original, inputs(source)))


def vision_original(name: str) -> Any:
    import torchvision

    options: dict[str, Any] = {}
    if ROWS[name].options.get("task") is not None:
        options["weights_backbone"] = None
    if name == "inception_v3":
        options |= {"aux_logits": False, "init_weights": False}
    return torchvision.models.get_model(name, weights=None, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in VISION if ROWS[name].options.get("task") != "detection"]
)
def test_a_torchvision_model_gives_torchvisions_answers(name: str):
    source = load(ROWS[name])
    segments = source.task == "segmentation"
    original = with_weights_of(vision_original(name), source, "model." if segments else "")
    image = inputs(source)

    def answer(batch: Any) -> Any:
        return original(batch)["out"] if segments else original(batch)

    check_same(run(source.module, image), run(answer, image))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ssdlite320_mobilenet_v3_large", "retinanet_resnet50_fpn"])
def test_a_torchvision_detector_gives_torchvisions_heads_anchors_and_boxes(name: str):
    import torch
    from torchvision.models.detection.image_list import ImageList

    source = load(ROWS[name])
    request = source_request(ROWS[name].source, **ROWS[name].options)
    original = with_weights_of(vision_original(name), source)
    image = inputs(source, count=1)
    with torch.no_grad():
        features = list(original.backbone(image).values())
        heads = original.head(features)
        anchors = original.anchor_generator(ImageList(image, [(320, 320)]), features)[0]
        answers = run(source.module, image)
    check_same(answers, [heads["bbox_regression"], heads["cls_logits"]])
    assert source.detection is not None
    assert np.array_equal(source.detection.anchors, anchors.numpy())
    coder = getattr(original, "box_coder", None) or original.head.regression_head.box_coder
    boxes = coder.decode_single(heads["bbox_regression"][0], anchors).numpy()
    task = describe_model(source, request).task
    decoded = decode_boxes(task, source.detection.anchors, answers[0][0].numpy())  # type: ignore[arg-type]
    assert np.abs(decoded - boxes).max() < 1e-3  # pixels
    retina = name.startswith("retinanet")
    assert source.detection.activation == ("sigmoid" if retina else "softmax")
    assert source.detection.classes == (91 if retina else 90)


@pytest.mark.slow
def test_heads_that_only_training_uses_are_dropped_with_their_weights(tmp_path: Path):
    import torch
    import torchvision

    torch.manual_seed(4)
    trained = torchvision.models.segmentation.deeplabv3_mobilenet_v3_large(
        weights=None, weights_backbone=None, aux_loss=True
    ).eval()
    torch.save(trained.state_dict(), tmp_path / "trained.pth")
    source = load_source(
        source_request(
            "torchvision:deeplabv3_mobilenet_v3_large", task="segmentation",
            weights=str(tmp_path / "trained.pth"), preprocess="torchvision", input_size="96",
        )
    )  # fmt: skip
    assert not any("aux" in name for name in source.module.state_dict())
    image = inputs(source)
    with torch.no_grad():
        expected = trained(image)["out"]
    check_same(run(source.module, image), [expected])


def as_program(module: Any, example: Any, path: Path) -> None:
    import torch

    batch = ({0: torch.export.Dim("batch", min=1, max=64)},)
    torch.export.save(torch.export.export(module, (example,), dynamic_shapes=batch), path)


def as_program_for_one(module: Any, example: Any, path: Path) -> None:
    import torch

    torch.export.save(torch.export.export(module, (example[:1],)), path)


def as_trace(module: Any, example: Any, path: Path) -> None:
    import torch

    torch.jit.trace(module, example[:1]).save(str(path))


def as_script(module: Any, example: Any, path: Path) -> None:
    import torch

    torch.jit.script(module).save(str(path))


SAVERS: list[tuple[Callable[[Any, Any, Path], None], str]] = [
    (as_program, "model.pt2"),
    (as_program_for_one, "model.pt2"),
    (as_trace, "model.pt"),
    (as_script, "model.pth"),
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "saver"),
    [
        pytest.param(name, saver, id=f"{name}-{saver[0].__name__}")
        for name in NETS
        for saver in SAVERS
        # A detector's file needs its anchors; see below for the loop in an instance norm.
        if name != "tiny_detector" and (name, saver[0]) != ("style_transfer", as_script)
    ],
)
def test_a_net_saved_whole_gives_its_own_answers_for_any_batch(
    tmp_path: Path, name: str, saver: tuple[Callable[[Any, Any, Path], None], str]
):
    save, file_name = saver
    original = getattr(nets, name)()
    options = {key: value for key, value in ROWS[name].options.items() if key != "weights"}
    example = inputs(load(ROWS[name]), count=3)
    save(original, example, tmp_path / file_name)
    source = load_source(source_request(str(tmp_path / file_name), **options))
    assert source.weights == file_name
    check_same(run(source.module, example), run(original, example)[:2])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_script_with_a_loop_in_it_is_refused_with_the_way_out(tmp_path: Path):
    """An instance norm counts its axes in a loop, which a script keeps and a trace does not."""
    as_script(nets.style_transfer(), None, tmp_path / "model.pt")
    options = {"task": "image_to_image", "preprocess": "unit", "input_size": "32"}
    with pytest.raises(SourceError, match="pass the model's code as FILE"):
        load_source(source_request(str(tmp_path / "model.pt"), **options))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_torchscript_file_is_exported_by_a_child_process(tmp_path: Path):
    import torch

    from converters.export import Export, export_servable

    original = nets.small_cnn_224()
    as_trace(original, torch.zeros(1, 3, 64, 64), tmp_path / "model.pt")
    request = source_request(str(tmp_path / "model.pt"), preprocess="unit", input_size="64")
    servable = export_servable(Export(source=request, output=tmp_path / "servable"))
    assert servable.name == "model"
    again = load_source(source_request(str(tmp_path / "servable" / "model.pt2")))
    image = inputs(again)
    check_same(run(again.module, image), run(original, image))


@pytest.mark.slow
def test_a_detector_that_nearfar_exported_brings_its_anchors_and_says_when_they_are_gone(
    tmp_path: Path,
):
    from converters.export import Export, export_servable

    row = ROWS["tiny_detector"]
    first = load(row)
    request = source_request(row.source, **row.options)
    export_servable(Export(source=request, output=tmp_path / "servable"))
    path = str(tmp_path / "servable" / "model.pt2")
    again = load_source(source_request(path, task="detection"))
    assert again.detection is not None
    assert first.detection is not None
    assert np.array_equal(again.detection.anchors, first.detection.anchors)
    assert again.preprocess == first.preprocess
    check_same(run(again.module, inputs(first)), run(first.module, inputs(first)))
    with pytest.raises(ConfigError, match="is for detection: pass --task detection"):
        load_source(source_request(path))
    (tmp_path / "servable" / "anchors.f32").unlink()
    with pytest.raises(SourceError, match=r"needs its 64 anchors in anchors.f32 beside it"):
        load_source(source_request(path, task="detection"))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_program_with_every_odd_thing_that_is_plain_passes_the_screen(tmp_path: Path):
    """Constants, infinity, names that are no identifiers, dicts, lists, equations, no_grad."""
    import torch

    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.ones(1, 3, 1, 1), persistent=False)
            self.parts = torch.nn.ModuleDict({"a-b/c": torch.nn.Linear(3, 5)})

        def forward(self, image: Any) -> Any:
            scale = torch.tensor([1.0, 2.0, 3.0])
            pooled = (image - self.mean).mean((2, 3)) * scale
            scores = torch.einsum("bi,oi->bo", pooled, self.parts["a-b/c"].weight)
            with torch.no_grad():
                padded = torch.nn.functional.pad(scores, (1, 1), value=float("-inf"))
            return {"out": scores, "aux": [padded.clamp(min=-1e9).topk(2)[0]]}

    original, image = Odd().eval(), torch.randn(2, 3, 8, 8)
    path = tmp_path / "model.pt2"
    as_program(original, image, path)
    assert screen_program(path, REFERENCE_RECORD_NAME, SourceError) is None
    program = torch.export.load(path).module()
    check_same([program(image)["out"]], [original(image)["out"]])


def test_random_weights_wake_a_head_that_starts_as_zeros(tmp_path: Path):
    """As a vision transformer's does: its answers would all be 0."""
    path = tmp_path / "blank_net.py"
    path.write_text(
        "from torch import nn\n"
        "def net():\n"
        "    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 5))\n"
        "    nn.init.zeros_(model[1].weight)\n"
        "    nn.init.zeros_(model[1].bias)\n"
        "    return model\n"
    )
    request = source_request(f"{path}:net", weights="random:0", preprocess="unit", input_size="16")
    source = load_source(request)
    assert float(source.module[1].weight.std()) == pytest.approx((3 * 16 * 16) ** -0.5, rel=0.1)
    assert float(run(source.module, inputs(source))[0].std()) > 0.01
