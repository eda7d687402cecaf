"""Parts of the Open Inference Protocol: names, counts, codings, and what a batch may hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from broker.executors.base import BatchItem
from broker.models.servable import ModelKey
from broker.oip.answers import encode_infer, wanted_outputs
from broker.oip.compression import answer_coding, request_coding
from broker.oip.interface import Interface
from broker.oip.message import InferRequest, RequestedOutput, decode_control
from broker.oip.rows import read_infer
from broker.oip.statistics import Statistics, failure_reason
from broker.scheduling.batcher import form_batch
from broker.scheduling.latency import LatencyModel
from broker.scheduling.queue import EdfQueue
from broker.scheduling.ticket import Answer, Ticket
from edge_runtime.contract import limits
from edge_runtime.contract.errors import (
    BrokerFault,
    InferenceError,
    LimitExceeded,
    MediaTypeUnsupported,
    Overloaded,
    TensorError,
    WireError,
)
from edge_runtime.contract.tasks import Box
from edge_runtime.contract.tensors import TensorSpec
from edge_runtime.contract.wire import EncodedAnswer, Picture
from tests.support.oip import DATATYPES, DTYPES, body_of, input_of, opened, read_answer, renamed


def request(*names: str, binary: bool = False, **parameters: Any) -> InferRequest:
    outputs = tuple(RequestedOutput(name=name, parameters=parameters or None) for name in names)
    return InferRequest(id=None, inputs=(), outputs=outputs, binary_output=binary, timeout_us=None)


def test_a_models_own_names_win_over_ours():
    servable = opened("classification")
    spec = servable.manifest.model.outputs[0]
    taken = renamed(
        servable,
        model=type(servable.manifest.model)(
            path="model.pt2",
            inputs=servable.manifest.model.inputs,
            outputs=(
                type(spec)(name="answer_labels", dtype=spec.dtype, shape=spec.shape, layout="NC"),
            ),
        ),
    )
    interface = Interface(taken)
    assert [slot.name for slot in interface.outputs] == [
        "answer_labels", "answer_labels_", "answer_scores", "answer_indices",
    ]  # fmt: skip
    assert interface.output("answer_labels").place == 0
    assert interface.output("answer_labels_").field == "labels"


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_has_its_datatype(dtype: Any):
    outputs = (TensorSpec(name="o", dtype=dtype, shape=(1, 3), layout="NC"),)
    metadata: Any = Interface(opened("classification", outputs=outputs)).metadata(["1.0.0"])
    assert metadata["outputs"][0] == {"name": "o", "datatype": DATATYPES[dtype], "shape": [-1, 3]}


def test_boxes_of_several_images_are_padded():
    servable = opened("detection")
    interface = Interface(servable)

    def box(index: int) -> Box:
        corners = {"x_min": 1.0, "y_min": 2.0, "x_max": 3.0, "y_max": 4.0 + index}
        return Box(index=index, label=f"class {index}", score=0.5, **corners)

    rows = [(box(1), box(2)), (), (box(0),)]
    answers = [Answer(EncodedAnswer(boxes=row), 0.0, 0.0) for row in rows]
    names = [slot.name for slot in interface.outputs if slot.field]
    wanted = wanted_outputs(interface, request(*names), rows=3)
    body, length = encode_infer(servable, "7", wanted, answers)
    assert length is None
    message, _ = read_answer(body, None)
    found = {one["name"]: (one["shape"], one["data"]) for one in message["outputs"]}
    assert message["id"] == "7"
    assert found["answer_counts"] == ([3, 1], [2, 0, 1])
    assert found["answer_indices"] == ([3, 2], [1, 2, -1, -1, 0, -1])
    assert found["answer_labels"] == ([3, 2], ["class 1", "class 2", "", "", "class 0", ""])
    assert found["answer_scores"] == ([3, 2], [0.5, 0.5, 0, 0, 0.5, 0])
    assert found["answer_boxes"][0] == [3, 2, 4]
    assert found["answer_boxes"][1][4:12] == [1, 2, 3, 6, 0, 0, 0, 0]
    nothing = [Answer(EncodedAnswer(boxes=()), 0.0, 0.0)]
    message, _ = read_answer(encode_infer(servable, None, wanted, nothing)[0], None)
    assert [one["shape"] for one in message["outputs"]] == [
        [1, 0], [1, 0], [1, 0], [1, 0, 4], [1, 1],
    ]  # fmt: skip
    assert "id" not in message


def test_pictures_in_json_are_base64_and_in_binary_themselves():
    servable = opened("segmentation")
    picture = Picture(media_type="image/png", width=1, height=1, data=b"\x89PNG\xff")
    answers = [Answer(EncodedAnswer(mask=picture), 0.0, 0.0)]
    interface = Interface(servable)
    wanted = wanted_outputs(interface, request("answer_mask"), rows=1)
    message, _ = read_answer(encode_infer(servable, None, wanted, answers)[0], None)
    (output,) = message["outputs"]
    assert output["parameters"] == {"content_type": "base64"}
    assert output["data"] == ["iVBOR/8="]
    wanted = wanted_outputs(interface, request("answer_mask", binary=True), rows=1)
    body, length = encode_infer(servable, None, wanted, answers)
    _, tails = read_answer(body, str(length))
    assert tails == {"answer_mask": b"\x05\0\0\0\x89PNG\xff"}


def test_an_outputs_own_wish_wins_over_the_requests():
    interface = Interface(opened("classification"))
    for everyone, own, expected in ((True, None, True), (True, False, False), (False, True, True)):
        parameters = {} if own is None else {"binary_data": own}
        (wanted,) = wanted_outputs(
            interface, request("logits", binary=everyone, **parameters), rows=1
        )
        assert wanted.binary is expected


def test_an_answer_too_large_is_refused_before_it_is_made():
    interface = Interface(opened("image_to_image"))
    spec = interface.servable.manifest.model.outputs[0]
    rows = limits.MAX_INFER_JSON_NUMBERS // (spec.size_bytes // 4) + 1
    with pytest.raises(LimitExceeded, match="for JSON"):
        wanted_outputs(interface, request("image"), rows=rows)
    assert wanted_outputs(interface, request("image", binary=True), rows=rows)
    with pytest.raises(LimitExceeded, match="classification"):
        wanted_outputs(interface, request("image", binary=True, classification=1), rows=rows)
    rows = limits.MAX_INFER_ANSWER_BYTES // spec.size_bytes + 1
    with pytest.raises(LimitExceeded, match="ask for fewer outputs"):
        wanted_outputs(interface, request("image", binary=True), rows=rows)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_does_not_hide_numbers_that_it_cannot_say(value: float):
    from broker.executors.base import TensorAnswer

    servable = opened("classification")
    scores = np.array([0.0, value, 1.0], "<f4").tobytes()
    answers = [Answer(TensorAnswer(tensors=(scores,), answer=None), 0.0, 0.0)]
    interface = Interface(servable)
    with pytest.raises(InferenceError, match="binary data"):
        encode_infer(servable, None, wanted_outputs(interface, request("logits"), rows=1), answers)
    wanted = wanted_outputs(interface, request("logits", binary=True), rows=1)
    body, length = encode_infer(servable, None, wanted, answers)
    assert read_answer(body, str(length))[1]["logits"] == scores
    with pytest.raises(BrokerFault):
        _ = answers[0].encoded


def test_only_what_is_asked_for_leaves_the_worker():
    interface = Interface(opened("reconstruction"))
    spec = interface.servable.manifest.model.inputs[0]
    zeros = input_of("image", "FP32", [2, *spec.shape[1:]], size=2 * spec.size_bytes)

    def item(*names: str) -> BatchItem:
        listed = [{"name": name, "parameters": {"binary_data": True}} for name in names]
        body, headers = body_of([zeros], [bytes(2 * spec.size_bytes)], outputs=listed)
        asked = read_infer(interface, body, int(headers["Inference-Header-Content-Length"]))
        first, second = asked.items
        assert len(first.body) == len(second.body) == spec.size_bytes
        return first

    latent = item("latent")
    assert (latent.outputs, latent.output_bytes, latent.answered) == ((1,), 20, False)
    both = item("answer_image", "latent", "image")
    assert (both.outputs, both.answered) == ((1, 0), True)
    task = item("answer_image")
    assert (task.outputs, task.output_bytes, task.answered) == (None, 0, True)


def test_json_said_before_hides_neither_other_numbers_nor_a_wrong_length():
    interface = Interface(opened("reconstruction"))
    spec = interface.servable.manifest.model.inputs[0]
    one = input_of("image", "FP32", list(spec.shape), size=spec.size_bytes)
    listed = [{"name": "latent", "parameters": {"binary_data": True}}]

    def ask(row: bytes):
        body, headers = body_of([one], [row], outputs=listed, id="7")
        return read_infer(interface, body, int(headers["Inference-Header-Content-Length"]))

    first, second = bytes(spec.size_bytes), np.float32(1.5).tobytes() * (spec.size_bytes // 4)
    asked = ask(first)
    again = ask(second)  # its JSON is known by now
    assert (asked.items[0].body, again.items[0].body) == (first, second)
    assert (again.id, again.wanted) == (asked.id, asked.wanted)
    with pytest.raises(TensorError, match="finite"):
        ask(np.float32(np.nan).tobytes() + first[4:])
    for wrong in (first[:-4], first + b"\0"):
        with pytest.raises(TensorError):
            ask(wrong)


def test_a_batch_holds_no_more_output_bytes_than_a_frame_does():
    waiting: EdfQueue[Ticket] = EdfQueue()
    for size in (60, 30, 30):
        ticket = Ticket(model=ModelKey("m", "1"), deadline_s=10.0, upload_bytes=0)
        ticket.item = BatchItem(b"x", output_bytes=size)
        waiting.push(10.0, ticket)
    latency = LatencyModel()
    latency.observe(1, 1.0, 0.0)
    sizes = []
    while waiting:
        formed = form_batch(waiting, latency, now_s=0.0, max_batch=8, max_bytes=90)
        sizes.append([ticket.item.output_bytes for ticket in formed.tickets])
    assert sizes == [[60, 30], [30]]


def test_statistics_are_what_triton_would_count():
    statistics = Statistics(now_s=lambda: 12.5)
    tiny, other = ModelKey('ti"ny', "1"), ModelKey("other", "2")
    statistics.batch_ran(tiny, 3, 2.0)
    statistics.batch_ran(tiny, 1, 1.0)
    statistics.answered(tiny, 10.0, 4.0, 2.0)
    statistics.answered(tiny, 5.0, 1.0, 1.0)
    statistics.failed(tiny, "REJECTED", 0.5)
    document: Any = statistics.document([tiny])
    (found,) = document["model_stats"]
    assert (found["inference_count"], found["execution_count"]) == (4, 2)
    assert found["last_inference"] == 12_500
    stats = found["inference_stats"]
    assert stats["success"] == {"count": 2, "ns": 15_000_000}
    assert stats["queue"] == {"count": 2, "ns": 5_000_000}
    assert stats["fail"] == {"count": 1, "ns": 500_000}
    assert [one["batch_size"] for one in found["batch_stats"]] == [1, 3]
    lines = statistics.exposition([tiny, other], lambda model: len(model.name)).decode()
    labels = r'{model="ti\"ny",version="1"'
    for line in (
        f"nv_inference_request_success{labels}}} 2",
        f"nv_inference_count{labels}}} 4",
        f"nv_inference_exec_count{labels}}} 2",
        f"nv_inference_request_duration_us{labels}}} 15000",
        f"nv_inference_queue_duration_us{labels}}} 5000",
        f"nv_inference_compute_infer_duration_us{labels}}} 3000",
        f'nv_inference_request_failure{labels},reason="REJECTED"}} 1',
        'nv_inference_request_success{model="other",version="2"} 0',
        'nv_inference_pending_request_count{model="other",version="2"} 5',
        "# TYPE nv_inference_count counter",
    ):
        assert line in lines.splitlines()


def test_reasons_of_failures():
    assert failure_reason(None) == "CANCELED"
    assert failure_reason(Overloaded.code) == "REJECTED"
    assert failure_reason(InferenceError.code) == "BACKEND"
    assert failure_reason(WireError.code) == "OTHER"


def test_content_codings():
    assert request_coding(None) is request_coding("identity") is None
    assert request_coding(" GZIP ") == "gzip"
    for unknown in ("br", "gzip, gzip", "gzip, deflate", "x-gzip"):
        with pytest.raises(MediaTypeUnsupported):
            request_coding(unknown)
    assert answer_coding(None) is answer_coding("") is answer_coding("br, *;q=0.1") is None
    assert answer_coding("gzip, deflate") == "gzip"
    assert answer_coding("gzip;q=0.5, deflate") == "deflate"
    assert answer_coding("gzip;q=0") is None
    with pytest.raises(WireError):
        answer_coding("gzip;q=high")


def test_repository_requests():
    assert decode_control(b"") == (False, {})
    assert decode_control(b'{"ready": true}') == (True, {})
    assert decode_control(b'{"parameters": {"config": "{}"}}') == (False, {"config": "{}"})
    for broken in (b"{", b"[]", b'{"ready": 1}', b'{"parameters": {"a": {}}}', b"\xff"):
        with pytest.raises(WireError):
            decode_control(broken)
