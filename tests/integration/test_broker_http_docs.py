"""What docs/ says about HTTP is what the broker does."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import re
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import yaml

from broker.app import build_application
from broker.http.accept import answer_types
from broker.http.errors import STATUS
from broker.server import RunningBroker
from edge_runtime.contract import errors as e
from edge_runtime.contract.imaging import sniff_media_type
from tests.support import broker_images as images
from tests.support.broker import broker_here, predict, request
from tests.support.servables import SIZE, shared_servable
from tests.support.tasks import TASKS, task_of, task_servable

pytestmark = pytest.mark.asyncio(loop_scope="module")

DOCS = Path(__file__).parents[2] / "docs"

# What a request to predict can be told, by the classes that raise it.
PREDICT_ERRORS = {
    e.WireError,
    e.LimitExceeded,
    e.Unauthorized,
    e.ModelNotFound,
    e.UploadStalled,
    e.ImageTooLarge,
    e.MediaTypeUnsupported,
    e.ImageUnreadable,
    e.ImageAnimated,
    e.ImageModeUnsupported,
    e.BrokerFault,
    e.InferenceError,
    e.Overloaded,
    e.RateLimited,
    e.RequestRejected,
    e.WorkerLost,
    e.DeadlineExceeded,
}


@functools.cache
def openapi() -> dict[str, Any]:
    return yaml.safe_load((DOCS / "openapi.yaml").read_text())


def resolve(node: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in node:
        target: Any = openapi()
        for part in node["$ref"].removeprefix("#/").split("/"):
            target = target[part]
        node = target
    return node


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """The part of JSON Schema that openapi.yaml uses."""
    schema = resolve(schema)
    if "oneOf" in schema and sum(fits(value, choice) for choice in schema["oneOf"]) != 1:
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    kinds = schema.get("type", [])
    names = {
        "object": dict, "array": list, "string": str, "integer": int, "number": (int, float),
        "boolean": bool, "null": type(None),
    }  # fmt: skip
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(isinstance(value, names[kind]) for kind in kinds):
        return False
    if isinstance(value, dict):
        known = schema.get("properties", {})
        if not set(schema.get("required", [])) <= set(value):
            return False
        if schema.get("additionalProperties") is False and not set(value) <= set(known):
            return False
        return all(fits(item, known[key]) for key, item in value.items() if key in known)
    if isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            return False
        return all(fits(item, schema.get("items", {})) for item in value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return schema.get("minimum", value) <= value <= schema.get("maximum", value)
    return True


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def broker(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningBroker]:
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(shared_servable(), folder / "tiny")
    for name in TASKS:
        shutil.copytree(task_servable(name), folder / name)
    async with broker_here(folder) as running:
        yield running


async def test_the_reading_of_schemas_here_refuses_what_they_refuse():
    schema = {"$ref": "#/components/schemas/PredictAnswer"}
    model = {"name": "m", "version": "1", "sha256": "0", "labels_sha256": None}
    box = dict.fromkeys(("x_min", "y_min", "x_max", "y_max"), 1.0)
    box |= {"index": 0, "label": "a", "score": 1}
    picture = {"media_type": "image/png", "width": 1, "height": 1, "region": None, "data": ""}
    assert fits({"model": model, "boxes": [box]}, schema)
    assert fits({"model": model, "mask": picture | {"region": [0, 0, 1, 1]}}, schema)
    for wrong in (
        {},
        {"boxes": [box], "image": picture},
        {"boxes": [box | {"more": 1}]},
        {"boxes": [box | {"x_min": -1}]},
        {"mask": picture | {"media_type": "image/gif"}},
        {"mask": picture | {"region": [0, 0, 1]}},
        {"mask": picture | {"width": 0}},
        {"scores": []},
    ):
        assert not fits({"model": model, **wrong}, schema), wrong
    assert not fits({"seed": 2**53}, {"$ref": "#/components/schemas/SeedRequest"})


async def test_every_route_is_documented_and_every_documented_route_is_there(
    broker: RunningBroker,
):
    routes = {
        (route.method.lower(), route.resource.canonical, route.name)
        for route in build_application(broker.services).router.routes()
        if route.method != "HEAD" and route.resource is not None
    }
    documented = {
        (method, path, operation["operationId"])
        for path, operations in openapi()["paths"].items()
        for method, operation in operations.items()
    }
    assert documented == routes


async def test_the_statuses_of_predict_are_those_its_errors_have():
    documented = set(openapi()["paths"]["/v1/models/{name}:predict"]["post"]["responses"])
    expected = {str(STATUS[error]) for error in PREDICT_ERRORS} | {"200", "417"}
    assert documented == expected


async def test_every_code_of_predict_is_explained_in_both_documents():
    yaml_text = (DOCS / "openapi.yaml").read_text()
    table = dict(
        re.findall(r"^\| (\d{3}) \| (.*?) \|", (DOCS / "http-api.md").read_text(), re.MULTILINE)
    )
    explained = {
        (status, code) for status, cell in table.items() for code in re.findall(r"`(\w+)`", cell)
    }
    assert explained == {(str(STATUS[error]), error.code) for error in PREDICT_ERRORS}
    assert all(f"`{error.code}`" in yaml_text for error in PREDICT_ERRORS)


async def exchanges(url: str) -> list[tuple[str, Any]]:
    """(operation, reply) pairs, good and bad."""
    found = [
        ("predict", await predict(url, images.png())),
        ("predict", await predict(url, images.png(), model="huge")),
        ("predict", await predict(url, images.png(), deadline_ms=0)),
        ("predict", await predict(url, images.png(), deadline_ms=1)),
        ("predict", await predict(url, b"junk")),
        ("predict", await predict(url, images.bomb_png())),
        ("predict", await predict(url, images.png(), content_type="text/plain")),
    ]
    for task in TASKS:
        name = f"large-{task.replace('_', '-')}"
        generates = task == "generation"
        body = b'{"seed": 7}' if generates else images.png(3)
        media_type = "application/json" if generates else "image/png"
        for accept in answer_types(task_of(task)):
            headers = {"Accept": accept}
            reply = await predict(url, body, model=name, content_type=media_type, headers=headers)
            assert reply.headers["Content-Type"].startswith(accept)
            found.append(("predict", reply))
            if accept != "application/json":
                described = openapi()["paths"]["/v1/models/{name}:predict"]["post"]["responses"]
                documented = described["200"]["headers"]
                sent = {header.lower() for header in reply.headers}
                ours = {header for header in sent if header.startswith("x-")}
                assert ours <= {header.lower() for header in documented}
        wrong = b"{}" if generates else b'{"seed": 7}'
        reply = await predict(url, wrong, model=name, content_type="application/json")
        found.append(("predict", reply))
        assert reply.status == (400 if generates else 415)
    for path, operation in [
        ("/v1/models", "models"),
        ("/v1/models/tiny", "model"),
        ("/v1/models/huge", "model"),
        ("/v1/models/tiny?version=1.0.0", "model"),
        ("/v1/models/tiny?versoin=1.0.0", "model"),
        ("/v1/models/tiny/routing", "routing"),
        ("/v1/models/huge/routing", "routing"),
        ("/v1/models/tiny/quote?bytes=30000", "quote"),
        ("/v1/models/tiny/quote", "quote"),
        ("/v1/models/tiny/quote?bytes=0", "quote"),
        ("/v1/models/tiny/quote?bytes=99000000", "quote"),
        ("/v1/load", "load"),
        ("/v2", "oip_server"),
        ("/v2/health/live", "oip_live"),
        ("/v2/health/ready", "oip_ready"),
        ("/v2/models/tiny", "oip_model"),
        ("/v2/models/huge", "oip_model"),
        ("/v2/models/tiny/ready", "oip_model_ready"),
        ("/v2/models/huge/ready", "oip_model_ready"),
        ("/v2/models/tiny/versions/1.0.0", "oip_version"),
        ("/v2/models/tiny/versions/2", "oip_version"),
        ("/v2/models/tiny/versions/1.0.0/ready", "oip_version_ready"),
        ("/v2/models/tiny/versions/2/ready", "oip_version_ready"),
        ("/v1/session", "session"),
        ("/metrics", "metrics"),
    ]:
        found.append((operation, await request("GET", url + path)))
    return found + await job_exchanges(url) + await protocol_exchanges(url)


async def job_exchanges(url: str) -> list[tuple[str, Any]]:
    """One job that ends well, one that fails, and what is no job."""
    found: list[tuple[str, Any]] = []
    headers = {"Content-Type": "image/png"}
    for body in (images.png(5), images.png()[:80], b"junk"):
        reply = await request("POST", f"{url}/v1/models/tiny/jobs", data=body, headers=headers)
        found.append(("job_submit", reply))
        if reply.status != 202:
            continue
        job = url + reply.headers["Location"]
        found.append(("job_result", await request("GET", f"{job}/result")))
        found.append(("job_events", await request("GET", f"{job}/events")))
        found.append(("job", await request("GET", job)))
        found.append(("job_result", await request("GET", f"{job}/result")))
        found.append(("job_cancel", await request("DELETE", job)))
    for path, operation in [("", "job"), ("/result", "job_result"), ("/events", "job_events")]:
        found.append((operation, await request("GET", f"{url}/v1/jobs/none{path}")))
    return found


async def protocol_exchanges(url: str) -> list[tuple[str, Any]]:
    """Those of the Open Inference Protocol that are not looked up by name alone."""
    found: list[tuple[str, Any]] = []
    for path, operation in [
        ("/v2/models/stats", "oip_all_stats"),
        ("/v2/models/tiny/config", "oip_model_config"),
        ("/v2/models/huge/config", "oip_model_config"),
        ("/v2/models/tiny/stats", "oip_model_stats"),
        ("/v2/models/tiny/versions/1.0.0/config", "oip_version_config"),
        ("/v2/models/tiny/versions/2/stats", "oip_version_stats"),
        ("/v2/logging", "oip_logging"),
        ("/v2/trace/setting", "oip_trace"),
        ("/v2/models/tiny/trace/setting", "oip_model_trace"),
        ("/v2/systemsharedmemory/status", "oip_system_memory"),
        ("/v2/cudasharedmemory/status", "oip_cuda_memory"),
    ]:
        found.append((operation, await request("GET", url + path)))
        if found[-1][1].status == 501:
            asked = await request("POST", url + path, data=b"{}")
            found.append((operation.replace("oip_", "oip_set_"), asked))
    raw = {"Inference-Header-Content-Length": "0"}
    pixels = [0.5] * (3 * SIZE * SIZE)
    tensor = {"name": "images", "shape": [1, 3, SIZE, SIZE], "datatype": "FP32", "data": pixels}
    for path, body, headers in [
        ("/v2/models/tiny/infer", json.dumps({"id": "a", "inputs": [tensor]}), {}),
        ("/v2/models/tiny/infer", images.png(), raw),
        ("/v2/models/tiny/infer", b"junk", {}),
        ("/v2/models/tiny/infer", images.png()[:80], raw),
        ("/v2/models/tiny/infer", images.png(), raw | {"X-Deadline-Ms": "1"}),
        ("/v2/models/huge/infer", b"{}", {}),
        ("/v2/models/tiny/versions/1.0.0/infer", images.png(), raw),
        ("/v2/models/tiny/versions/2/infer", images.png(), raw),
    ]:
        operation = "oip_version_infer" if "versions" in path else "oip_infer"
        found.append((operation, await request("POST", url + path, data=body, headers=headers)))
    for path, operation in [
        ("/v1/models/tiny/routing", "routing_change"),
        ("/v2/repository/index", "oip_index"),
        ("/v2/repository/models/tiny/load", "oip_load"),
        ("/v2/repository/models/tiny/unload", "oip_unload"),
    ]:
        found.append((operation, await request("POST", url + path)))
    return found


async def test_answers_have_the_documented_statuses_types_and_shapes(broker: RunningBroker):
    operations = {
        operation["operationId"]: operation
        for methods in openapi()["paths"].values()
        for operation in methods.values()
    }
    pairs = await exchanges(broker.url)
    for name, reply in pairs:
        documented = operations[name]["responses"]
        assert str(reply.status) in documented, (name, reply.status)
        described = resolve(documented[str(reply.status)])
        if "content" not in described:
            assert reply.body == b"", (name, reply.status)
            continue
        media_type = reply.headers["Content-Type"].partition(";")[0]
        assert media_type in described["content"], (name, reply.status, media_type)
        if media_type.endswith("json"):
            schema = described["content"][media_type]["schema"]
            assert fits(reply.json, schema), (name, reply.body)
    assert {name for name, _ in pairs} == set(operations)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
async def test_the_curl_examples_work(broker: RunningBroker, tmp_path: Path):
    (tmp_path / "photo.jpg").write_bytes(images.jpeg())
    blocks = re.findall(r"```sh\n(.*?)```", (DOCS / "http-api.md").read_text(), re.DOTALL)
    assert len(blocks) >= 8
    environment = os.environ | {
        "URL": broker.url,
        "MODEL": "tiny",
        "DETECTOR": "large-detection",
        "SEGMENTER": "large-segmentation",
        "STYLER": "large-image-to-image",
        "GENERATOR": "large-generation",
        "IMAGE": str(tmp_path / "photo.jpg"),
    }
    for block in blocks:
        done = await asyncio.to_thread(
            subprocess.run,
            ["bash", "-euc", block],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, block + done.stdout + done.stderr
        assert done.stdout
        if "X-Deadline-Ms: 0" in block:
            assert '"code":"wire"' in done.stdout
    for name, media_type in (
        ("mask.png", "image/png"),
        ("styled.jpg", "image/jpeg"),
        ("seed-7.png", "image/png"),
    ):
        assert sniff_media_type((tmp_path / name).read_bytes()) == media_type
