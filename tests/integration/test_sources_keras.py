"""Keras applications, ``.keras`` files and SavedModels give Keras's own answers.

The originals answer through ``predict`` on TensorFlow, channels last, in a child process;
the sources are built on torch, channels first, in another one: no process loads both.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

FLOOR_DB = 80.0
ROOT = Path(__file__).parents[2]
APPLICATIONS = {"MobileNetV2": 96, "MobileNetV3Small": 96, "VGG16": 48, "ResNet50": 64,
                "InceptionV3": 96, "EfficientNetB0": 64}  # fmt: skip
CLASSIFIER = {"preprocess": "unit", "input_size": "32", "activation": "softmax"}
SEGMENTER = {"preprocess": "unit", "input_size": "32", "task": "segmentation"}
FILES: dict[str, dict[str, str]] = {
    "classifier": CLASSIFIER,
    "segmenter": SEGMENTER,
    "decoder": {"task": "generation", "latent": "32", "output_range": "0:1"},
}
REFUSED_KERAS = {
    "lambda.keras": "holds Python code (a Lambda layer), which could do anything: replace it by",
    "own.keras": "has a layer of your own (mine>Own): pass FILE.py:CALLABLE",
    "two_inputs.keras": "takes 2 inputs: nearfar feeds one image",
    "wrapped.keras": "holds Python code (a TorchModuleWrapper layer)",
    "vocabulary.keras": "has a StringLookup layer, which reads other files",
    "module.keras": "has a layer of your own (system): pass FILE.py:CALLABLE",
    "no_config.keras": "is no Keras model (it has no config.json): save it with",
    "outside.keras": "has a link out of it (//other): save it again in one file",
    "cut.keras": "holds no readable weights",
}
REFUSED_SAVED = {
    "python": "it runs code or touches files (EagerPyFunc): leave that out",
    "writing": "it runs code or touches files (WriteFile): leave that out",
    "printing": "it keeps state, draws random numbers or reads tables (PrintV2): save the part",
    "random": "it keeps state, draws random numbers or reads tables (RandomStandardNormal)",
    "counting": "it keeps state, draws random numbers or reads tables (AssignAddVariableOp)",
    "table": "it keeps state, draws random numbers or reads tables (HashTableV2",
    "custom": "it has custom operators (MyOwnOperator), which no phone has",
    "two_inputs": "its signature takes ['x', 'y']: one image is fed",
    "fourier": "which nearfar does not know: save the model as .keras instead",
    "junk": "saved_model.pb is broken",
}


def child(backend: str, task: str, folder: Path) -> None:
    """Run one of the functions below in a process of its own."""
    environment = os.environ | {
        "KERAS_BACKEND": backend,
        "KERAS_HOME": str(folder / "home"),
        "CUDA_VISIBLE_DEVICES": "",
        "https_proxy": "http://127.0.0.1:9",
    }
    command = [sys.executable, "-m", "tests.integration.test_sources_keras", task, str(folder)]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


# In the child on torch -----------------------------------------------------------------


def load(source: str, **options: Any) -> Any:
    from converters.options import source_request
    from converters.sources import load_source

    return load_source(source_request(source, **options))


def answer(module: Any, image: Any) -> Any:
    import torch

    with torch.no_grad():
        return module(image).numpy()


def put_back(source: Any, name: str, size: int) -> Any:
    """The Keras model that ``random:0`` began with, with the statistics measured since."""
    import random

    import keras
    import torch

    keras.utils.clear_session()  # unnamed layers are numbered from the first again
    torch.manual_seed(0)
    random.seed(0)
    build = getattr(keras.applications, name)
    model = build(weights=None, classifier_activation=None, input_shape=(3, size, size))
    norms = {
        key: layer
        for key, layer in source.module.named_modules()
        if isinstance(layer, torch.nn.BatchNorm2d)
    }
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            norm = norms[layer.name]
            # The same scale, written with Keras's own epsilon and its first gamma, which is 1.
            variance = (norm.running_var.double() + norm.eps) / norm.weight.double() ** 2
            layer.moving_mean.assign(norm.running_mean)
            layer.moving_variance.assign((variance - layer.epsilon).float())
    return model


def load_applications(folder: Path) -> None:
    """Each with random weights, its answer and its weights saved; one from its file too."""
    import keras
    import torchvision  # noqa: F401  # before Keras, as the sources do

    from converters.sources.random_weights import example_input

    seconds = {}
    for name, size in APPLICATIONS.items():
        keras.utils.clear_session()
        start = time.monotonic()
        source = load(f"keras:{name}", weights="random:0", input_size=str(size))
        seconds[name] = round(time.monotonic() - start, 1)
        image = example_input((3, size, size), source.preprocess, seed=99, count=2)
        np.save(folder / f"{name}.input.npy", image.permute(0, 2, 3, 1).contiguous().numpy())
        np.save(folder / f"{name}.source.npy", answer(source.module, image))
        weights = folder / f"{name}.weights.h5"
        put_back(source, name, size).save_weights(str(weights))
        if name == "MobileNetV2":
            again = load(f"keras:{name}", weights=str(weights), input_size=str(size))
            np.save(folder / f"{name}.file.npy", answer(again.module, image))
            assert again.weights == weights.name
    (folder / "seconds.json").write_text(json.dumps(seconds))


def load_files(folder: Path) -> None:
    """Small models from both kinds of file, and what is said of the refused ones."""
    import torch

    from edge_runtime.contract.errors import NearfarError

    for name, options in FILES.items():
        given = torch.from_numpy(np.load(folder / f"{name}.input.npy"))
        if given.dim() == 4:
            given = given.permute(0, 3, 1, 2).contiguous()
        for kind in (".keras", ""):
            out = answer(load(str(folder / f"{name}{kind}"), **options).module, given)
            out = out.transpose(0, 2, 3, 1) if out.ndim == 4 else out
            np.save(folder / f"{name}{kind}.source.npy", out)
    said: dict[str, str] = {}
    for name in [*REFUSED_KERAS, *(f"saved/{name}" for name in REFUSED_SAVED)]:
        try:
            load(str(folder / name), **CLASSIFIER)
            said[name] = "loaded"
        except NearfarError as error:
            said[name] = f"{error.code}: {error.detail}"
    other = folder / "decoder.weights.h5"
    bomb = folder / "bomb.weights.h5"
    for name, weights in (("unfit", other), ("bomb", bomb), ("junk", folder / "junk.h5")):
        try:
            load("keras:MobileNetV2", weights=str(weights), input_size="32")
            said[name] = "loaded"
        except NearfarError as error:
            said[name] = f"{error.code}: {error.detail}"
    try:
        load("keras:MobileNetV2", weights="DEFAULT")
    except NearfarError as error:
        said["DEFAULT"] = f"{error.code}: {error.detail}"
    (folder / "said.json").write_text(json.dumps(said))


# In the child on TensorFlow ------------------------------------------------------------


def predict_applications(folder: Path) -> None:
    """Keras's own answers for the weights and inputs of ``load_applications``."""
    import keras

    for name, size in APPLICATIONS.items():
        build = getattr(keras.applications, name)
        model = build(weights=None, classifier_activation=None, input_shape=(size, size, 3))
        model.load_weights(str(folder / f"{name}.weights.h5"))
        image = np.load(folder / f"{name}.input.npy")
        np.save(folder / f"{name}.keras.npy", model.predict(image, verbose=0))


def small_models() -> dict[str, Any]:
    import keras
    from keras import layers

    keras.utils.set_random_seed(1)
    image = layers.Input((32, 32, 3))
    x = layers.Conv2D(8, 3, 2, padding="same", use_bias=False)(image)
    x = layers.ReLU(6.0)(layers.BatchNormalization()(x))
    x = layers.MaxPooling2D()(layers.DepthwiseConv2D(3, padding="same")(x))
    classifier = keras.Model(image, layers.Dense(5, activation="softmax")(layers.Flatten()(x)))
    x = layers.Conv2D(8, 3, 2, padding="same", activation="swish")(image)
    x = layers.UpSampling2D(2, interpolation="bilinear")(layers.Conv2D(3, 1)(x))
    segmenter = keras.Model(image, x)
    latent = layers.Input((32,))
    x = layers.Reshape((4, 4, 8))(layers.Dense(128, activation="relu")(latent))
    x = layers.Conv2DTranspose(8, 4, 2, padding="same", activation="relu")(x)
    x = layers.Conv2DTranspose(3, 4, 2, padding="same", activation="sigmoid")(x)
    return {
        "classifier": classifier,
        "segmenter": segmenter,
        "decoder": keras.Model(latent, x),
    }


def write_files(folder: Path) -> None:
    """The small models in both kinds of file, with their answers; and all that is refused."""
    generator = np.random.default_rng(0)
    for name, model in small_models().items():
        given = generator.normal(size=(2, *model.input_shape[1:])).astype(np.float32)
        np.save(folder / f"{name}.input.npy", given)
        np.save(folder / f"{name}.keras.npy", model.predict(given, verbose=0))
        model.save(folder / f"{name}.keras")
        model.export(str(folder / name), verbose=False)
        if name == "decoder":
            model.save_weights(str(folder / f"{name}.weights.h5"))
    write_refused_keras(folder)
    write_refused_saved(folder / "saved")


def write_refused_keras(folder: Path) -> None:
    import h5py
    import keras
    from keras import layers

    @keras.saving.register_keras_serializable(package="mine")
    class Own(layers.Layer):  # type: ignore[misc]
        def call(self, value: Any) -> Any:
            return value * 2

    image, second = layers.Input((32, 32, 3)), layers.Input((32, 32, 3))
    doubled = layers.Lambda(lambda value: value * 2)(image)
    keras.Model(image, doubled).save(folder / "lambda.keras")
    keras.Model(image, Own()(image)).save(folder / "own.keras")
    keras.Model([image, second], layers.Add()([image, second])).save(folder / "two_inputs.keras")
    with zipfile.ZipFile(folder / "classifier.keras") as archive:
        sound = {name: archive.read(name) for name in archive.namelist()}

    def write(name: str, contents: dict[str, bytes]) -> None:
        with zipfile.ZipFile(folder / name, "w") as archive:
            for member, data in contents.items():
                archive.writestr(member, data)

    for name, kind, module in (
        ("wrapped.keras", "TorchModuleWrapper", "keras.layers"),
        ("vocabulary.keras", "StringLookup", "keras.layers"),
        ("module.keras", "system", "os"),
    ):
        config = json.loads(sound["config.json"])
        config["config"]["layers"][1] |= {"class_name": kind, "module": module}
        write(name, {**sound, "config.json": json.dumps(config).encode()})
    write("no_config.keras", {"data.pkl": b"x"})
    write("cut.keras", {**sound, "model.weights.h5": sound["model.weights.h5"][:1000]})
    with h5py.File(folder / "linked.h5", "w") as file:
        file["other"] = h5py.ExternalLink("/etc/hostname", "/")
    write("outside.keras", {**sound, "model.weights.h5": (folder / "linked.h5").read_bytes()})
    with h5py.File(folder / "bomb.weights.h5", "w") as file:
        file.create_dataset("x", (2**31,), "f4", chunks=(2**20,), compression="gzip")
    (folder / "junk.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))


def write_refused_saved(folder: Path) -> None:
    import tensorflow as tf
    from tensorflow.core.protobuf import saved_model_pb2

    image = tf.TensorSpec((None, 32, 32, 3), tf.float32)

    class Base(tf.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.kernel = tf.Variable(tf.ones((3, 5)))
            self.seen = tf.Variable(0.0)
            keys, values = tf.constant([0, 1]), tf.constant([1.0, 2.0])
            self.pairs = (keys, values)

        def head(self, x: Any) -> Any:
            return tf.reduce_mean(x, (1, 2)) @ self.kernel

    def save(name: str, module: Any, function: Any, count: int = 1) -> None:
        traced = tf.function(function, input_signature=[image] * count)
        module.serve = traced
        tf.saved_model.save(module, str(folder / name), signatures=traced)

    def python(x: Any) -> Any:
        same = tf.py_function(lambda value: value, [x], tf.float32)
        return {"y": modules[0].head(tf.ensure_shape(same, (None, 32, 32, 3)))}

    def writing(x: Any) -> Any:
        tf.io.write_file(str(folder / "canary"), "x")
        return {"y": modules[1].head(x)}

    def printing(x: Any) -> Any:
        tf.print("x", output_stream=f"file://{folder}/canary")
        return {"y": modules[2].head(x)}

    def random(x: Any) -> Any:
        return {"y": modules[3].head(x + tf.random.normal(tf.shape(x)))}

    def counting(x: Any) -> Any:
        modules[4].seen.assign_add(1.0)
        return {"y": modules[4].head(x) + modules[4].seen}

    def table(x: Any) -> Any:
        return {"y": modules[5].head(x) + modules[5].table.lookup(tf.constant([1]))}

    def two_inputs(x: Any, y: Any) -> Any:
        return {"y": modules[6].head(x + y)}

    def fourier(x: Any) -> Any:
        return {"y": modules[7].head(tf.math.real(tf.signal.fft(tf.cast(x, tf.complex64))))}

    modules = [Base() for _ in range(8)]
    initializer = tf.lookup.KeyValueTensorInitializer(*modules[5].pairs)
    modules[5].table = tf.lookup.StaticHashTable(initializer, 0.0)
    functions = (python, writing, printing, random, counting, table)
    for module, function in zip(modules, functions, strict=False):
        save(function.__name__, module, function)
    save("two_inputs", modules[6], two_inputs, count=2)
    save("fourier", modules[7], fourier)
    document = saved_model_pb2.SavedModel()
    document.ParseFromString((folder / "fourier" / "saved_model.pb").read_bytes())
    for function in document.meta_graphs[0].graph_def.library.function:
        for node in function.node_def:
            if node.op == "FFT":
                node.op = "MyOwnOperator"
    (folder / "custom").mkdir()
    (folder / "custom" / "saved_model.pb").write_bytes(document.SerializeToString())
    (folder / "junk").mkdir()
    (folder / "junk" / "saved_model.pb").write_bytes(b"\xffjunk")


# The promises --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def applications(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("applications")
    child("torch", "load_applications", folder)
    child("tensorflow", "predict_applications", folder)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    child("tensorflow", "write_files", folder)
    child("torch", "load_files", folder)
    return folder


@pytest.fixture(scope="module")
def said(files: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((files / "said.json").read_text())
    return found


def closeness_db(folder: Path, one: str, two: str) -> float:
    """SQNR of the second against the first, which must not be blank."""
    wanted, given = (np.load(folder / f"{name}.npy").astype(np.float64) for name in (one, two))
    assert wanted.shape == given.shape
    assert wanted.std() > 1e-4
    return float(10 * np.log10((wanted**2).mean() / max(((given - wanted) ** 2).mean(), 1e-30)))


@pytest.mark.parametrize("name", APPLICATIONS)
def test_an_application_gives_the_answers_of_keras_itself(applications: Path, name: str):
    assert closeness_db(applications, f"{name}.keras", f"{name}.source") > FLOOR_DB


def test_an_application_loads_its_weights_from_a_file(applications: Path):
    assert closeness_db(applications, "MobileNetV2.keras", "MobileNetV2.file") > FLOOR_DB


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", [".keras", ""], ids=["keras file", "SavedModel"])
def test_a_saved_model_gives_the_answers_of_keras_itself(files: Path, name: str, kind: str):
    assert closeness_db(files, f"{name}.keras", f"{name}{kind}.source") > FLOOR_DB


@pytest.mark.parametrize("name", REFUSED_KERAS)
def test_a_keras_file_that_cannot_be_trusted_or_fed_is_refused(said: dict[str, str], name: str):
    assert said[name].startswith(f"source: {name} ")
    assert REFUSED_KERAS[name] in said[name]


@pytest.mark.parametrize("name", REFUSED_SAVED)
def test_a_saved_model_that_does_more_than_compute_is_refused(
    files: Path, said: dict[str, str], name: str
):
    assert said[f"saved/{name}"].startswith("source: ")
    assert REFUSED_SAVED[name] in said[f"saved/{name}"]
    assert not (files / "saved" / "canary").exists()


def test_keras_weights_that_do_not_fit_are_refused(said: dict[str, str]):
    assert said["unfit"].startswith(
        "weights_mismatch: decoder.weights.h5 does not fit the Keras model"
    )
    assert said["unfit"].endswith("Pass .weights.h5 of this model")


def test_keras_weights_that_would_not_fit_into_memory_are_refused(said: dict[str, str]):
    assert said["bomb"].startswith("source: bomb.weights.h5 unpacks to 8589934592 bytes")
    assert said["junk"].startswith("source: junk.h5 holds no readable weights")


def test_default_weights_of_keras_without_a_network_say_how_to_go_on(said: dict[str, str]):
    assert said["DEFAULT"].startswith("weights_unavailable: keras:MobileNetV2 weights")
    assert said["DEFAULT"].endswith("and pass it as --weights FILE")


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
