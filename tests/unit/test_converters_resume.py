"""``--resume``: a finished job is taken up again only if nothing that decides it changed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import msgspec
import pytest

from converters import job_keys
from converters.jobs import (
    Artifact,
    ConvertJob,
    JobResult,
    LayersJob,
    Prepared,
    PrepareJob,
    Rounded,
    RoundJob,
    RunJob,
    RunResult,
    Sensitivity,
    SensitivityJob,
    SourceRequest,
)
from converters.resume import JobCache
from edge_runtime.contract.errors import ConfigError
from edge_runtime.contract.manifest import MinOs
from edge_runtime.contract.preprocess import named
from edge_runtime.contract.tasks import ClassificationTask
from edge_runtime.contract.tensors import TensorSpec

IMAGE = TensorSpec(name="image", dtype="float32", shape=(1, 3, 8, 8), layout="NCHW")
LOGITS = TensorSpec(name="logits", dtype="float32", shape=(1, 4), layout="NC")
TASK = ClassificationTask(classes=4)
RECORD = named("unit", 8, 8)


class Project:
    """A user's files, and one run's folder for each ``run``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.runs = 0
        (root / "net").mkdir()
        (root / "net" / "nets.py").write_text("def make(): ...\n")
        (root / "net" / "blocks.py").write_text("WIDTH = 8\n")
        (root / "w.safetensors").write_bytes(b"weights")
        (root / "labels.txt").write_text("a\nb\nc\nd\n")

    @property
    def source(self) -> SourceRequest:
        return SourceRequest(
            source=f"{self.root}/net/nets.py:make",
            weights=str(self.root / "w.safetensors"),
            labels=str(self.root / "labels.txt"),
            preprocess="unit",
            input_height=8,
            input_width=8,
        )

    def convert(self, **changes: object) -> ConvertJob:
        """A new run's job: other folders, the same contents."""
        self.runs += 1
        run = self.root / f"run{self.runs}"
        (run / "out").mkdir(parents=True)
        (run / "calibration.npy").write_bytes(b"pixels")
        (run / "base.tflite").write_bytes(b"fp32")
        values: dict[str, object] = {
            "source": self.source,
            "format": "tflite",
            "precision": "int8",
            "out_dir": str(run / "out"),
            "inputs": (IMAGE,),
            "outputs": (LOGITS,),
            "calibration": str(run / "calibration.npy"),
            "base": str(run / "base.tflite"),
            "task": TASK,
            "preprocess": RECORD,
            "labels": ("/etc", "b", "c", "d"),
            **changes,
        }
        return ConvertJob(**values)  # type: ignore[arg-type]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


@pytest.fixture
def cache(tmp_path: Path) -> JobCache:
    return JobCache(tmp_path / "cache")


def written(job: ConvertJob, data: bytes = b"model") -> JobResult:
    """What the child leaves: a folder, as Core ML packages are."""
    package = Path(job.out_dir) / "model.mlpackage"
    (package / "Data").mkdir(parents=True)
    (package / "Manifest.json").write_bytes(b"{}")
    (package / "Data" / "weight.bin").write_bytes(data)
    (Path(job.out_dir) / "scratch.bin").write_bytes(b"not the artifact")
    answer = Artifact(
        path="model.mlpackage",
        inputs=(IMAGE,),
        outputs=(LOGITS,),
        min_os=MinOs(ios="16.0"),
        min_runtime="x",
        accelerators=("cpu",),
        rewrites=("one",),
        preprocess=RECORD,
        tools={"torch": "2"},
    )
    return JobResult(answer=answer, seconds=12.5, peak_rss_bytes=7)


def keep(cache: JobCache, job: ConvertJob, data: bytes = b"model") -> JobResult:
    assert cache.get(job) is None
    result = written(job, data)
    assert cache.put(job, result)
    return result


def files_of(folder: str) -> dict[str, bytes]:
    root = Path(folder)
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def entries(cache_root: Path) -> list[Path]:
    return sorted(path for path in (cache_root / "v1").iterdir() if path.is_dir())


# What comes back ---------------------------------------------------------------------------


def test_an_equal_job_gets_the_files_and_the_answer_in_its_own_folder(
    project: Project, cache: JobCache, tmp_path: Path
) -> None:
    result = keep(cache, project.convert())
    again = project.convert()
    assert JobCache(tmp_path / "cache").get(again) == result
    assert files_of(again.out_dir) == {
        "model.mlpackage/Manifest.json": b"{}",
        "model.mlpackage/Data/weight.bin": b"model",
    }


def test_rounded_weights_and_sensitivities_come_back(
    project: Project, cache: JobCache, tmp_path: Path
) -> None:
    calibration = tmp_path / "c.npy"
    calibration.write_bytes(b"pixels")
    first = RoundJob(
        source=project.source, calibration=str(calibration), out_file=str(tmp_path / "a" / "r.st")
    )
    assert cache.get(first) is None
    (tmp_path / "a").mkdir(exist_ok=True)
    Path(first.out_file).write_bytes(b"rounded")
    (tmp_path / "a" / "other.bin").write_bytes(b"somebody else's")
    assert cache.put(first, JobResult(answer=Rounded(folded=1, rounded=2)))
    second = RoundJob(
        source=project.source, calibration=str(calibration), out_file=str(tmp_path / "b" / "x.st")
    )
    found = cache.get(second)
    assert found is not None
    assert found.answer == Rounded(folded=1, rounded=2)
    assert files_of(str(tmp_path / "b")) == {"x.st": b"rounded"}
    order = SensitivityJob(source=project.source, calibration=str(calibration))
    assert cache.get(order) is None
    answer = JobResult(answer=Sensitivity(layers=[("a", 3.0)]))
    assert cache.put(order, answer)
    assert cache.get(order) == answer


def prepare_job(root: Path, source: SourceRequest, golden: list[Path]) -> PrepareJob:
    (root / "reference").mkdir(parents=True)
    return PrepareJob(
        source=source, out_dir=str(root / "reference"), golden=[str(path) for path in golden]
    )


def prepared() -> JobResult:
    return JobResult(
        answer=Prepared(
            task=TASK, preprocess=RECORD, labels=None, labels_given=False, inputs=(IMAGE,),
            outputs=(LOGITS,), source_sha256=None, weights="w", weights_sha256=None, tools={},
        )
    )  # fmt: skip


def test_a_generators_latents_are_results_and_come_back_too(
    project: Project, cache: JobCache, tmp_path: Path
) -> None:
    source = msgspec.structs.replace(project.source, task="generation", latent_shape=(4,))
    first = prepare_job(tmp_path / "a", source, [tmp_path / "a" / "golden" / "latent0.f32"])
    assert cache.get(first) is None
    (tmp_path / "a" / "golden").mkdir()
    Path(first.golden[0]).write_bytes(b"latent")
    (tmp_path / "a" / "reference" / "model.pt2").write_bytes(b"program")
    assert cache.put(first, prepared())
    second = prepare_job(tmp_path / "b", source, [tmp_path / "b" / "golden" / "latent0.f32"])
    assert cache.get(second) == prepared()
    assert files_of(str(tmp_path / "b")) == {
        "golden/latent0.f32": b"latent", "reference/model.pt2": b"program",
    }  # fmt: skip


def test_another_golden_or_calibration_image_is_another_reference(
    project: Project, cache: JobCache, tmp_path: Path
) -> None:
    image = tmp_path / "g.png"
    image.write_bytes(b"one")
    first = prepare_job(tmp_path / "a", project.source, [image])
    assert cache.get(first) is None
    assert cache.put(first, prepared())
    second = prepare_job(tmp_path / "b", project.source, [image])
    assert cache.get(second) is not None
    second.calibration = [str(image)]
    assert cache.get(second) is None
    image.write_bytes(b"two")
    assert cache.get(prepare_job(tmp_path / "c", project.source, [image])) is None


# What makes another job --------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda p: (p.root / "w.safetensors").write_bytes(b"WEIGHTS"),
        lambda p: (p.root / "labels.txt").write_text("a\nb\nc\ne\n"),
        lambda p: (p.root / "net" / "nets.py").write_text("def make(): pass\n"),
        lambda p: (p.root / "net" / "blocks.py").write_text("WIDTH = 9\n"),
        lambda p: (p.root / "net" / "new.yaml").write_text("width: 9\n"),
    ],
    ids=["weights", "labels", "source", "module beside the source", "settings beside it"],
)
def test_a_changed_file_is_another_job(project: Project, cache: JobCache, change: object) -> None:
    keep(cache, project.convert())
    assert callable(change)
    change(project)
    job = project.convert()
    assert cache.get(job) is None
    assert files_of(job.out_dir) == {}


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "fp16"},
        {"input_mode": "uint8"},
        {"labels": ("/usr", "b", "c", "d")},
        {"metadata": '{"name":"other"}'},
        {"keep": ("conv1",)},
        {"calibration": None},
        {"task": ClassificationTask(classes=4, temperature=2.0)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_changed_option_is_another_job(
    project: Project, cache: JobCache, changes: dict[str, object]
) -> None:
    keep(cache, project.convert())
    assert cache.get(project.convert(**changes)) is None
    assert cache.get(project.convert()) is not None


def test_changed_calibration_pixels_are_another_job(project: Project, cache: JobCache) -> None:
    keep(cache, project.convert())
    job = project.convert()
    Path(str(job.calibration)).write_bytes(b"PIXELS")
    assert cache.get(job) is None


def test_another_nearfar_or_tool_is_another_job(
    project: Project, cache: JobCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = job_keys._environment()
    assert any(line.startswith("converters/formats/tflite.py ") for line in environment)
    assert any(line.startswith("edge_runtime/contract/preprocess.py ") for line in environment)
    assert any(line.startswith("torch==") for line in environment)
    keep(cache, project.convert())
    changed = [line.replace("torch==", "torch==9.") for line in environment]
    monkeypatch.setattr(job_keys, "_environment", lambda: changed)
    assert cache.get(project.convert()) is None


def test_no_path_of_this_run_is_in_a_key(project: Project) -> None:
    """Else nothing would ever come back: each run works in fresh folders."""
    keys = job_keys.JobKeys()
    material = repr(keys._material(project.convert()))
    assert str(project.root) not in material
    assert "'/etc'" in material, "a label that looks like a path is a label"


# What is never kept ------------------------------------------------------------------------


def test_proofs_are_never_kept(cache: JobCache, tmp_path: Path) -> None:
    run = RunJob(task=TASK, out_dir=str(tmp_path))
    result = JobResult(answer=RunResult(errors={}, peak_ram_bytes={}, milliseconds={}))
    for job in (run, LayersJob(reference="r")):
        assert cache.get(job) is None
        assert not cache.put(job, result)
        assert cache.get(job) is None


def test_errors_are_never_kept(project: Project, cache: JobCache) -> None:
    job = project.convert()
    assert cache.get(job) is None
    assert not cache.put(job, JobResult(error_code="source", error_detail="no"))
    assert cache.get(project.convert()) is None


def test_a_result_whose_inputs_changed_meanwhile_is_not_kept(
    project: Project, cache: JobCache
) -> None:
    """The user saved nets.py while it was being converted: old file or new one, who knows."""
    job = project.convert()
    assert cache.get(job) is None
    result = written(job)
    (project.root / "net" / "nets.py").write_text("def make(): return 1\n")
    assert not cache.put(job, result)
    assert cache.get(project.convert()) is None


def test_a_source_folder_too_large_to_read_is_not_guessed_at(
    project: Project, cache: JobCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_keys, "_MAX_SOURCE_FILES", 1)
    job = project.convert()
    assert cache.get(job) is None
    assert not cache.put(job, written(job))


def test_a_virtual_environment_beside_the_source_is_not_read(project: Project) -> None:
    keys = job_keys.JobKeys()
    before = keys.key(project.convert())
    environment = project.root / "net" / "env"
    environment.mkdir()
    (environment / "pyvenv.cfg").touch()
    (environment / "huge.py").write_text("x = 1\n")
    assert keys.key(project.convert()) == before


# Damage ------------------------------------------------------------------------------------


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("name", ["entry.json", "0000", "0001"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove", "link", "grow"])
def test_a_damaged_entry_is_no_entry_and_is_made_anew(
    project: Project, tmp_path: Path, name: str, harm: str
) -> None:
    cache = JobCache(tmp_path / "cache")
    keep(cache, project.convert())
    (entry,) = entries(tmp_path / "cache")
    path = entry / name
    if harm == "flip":
        _flip(path)
    elif harm == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif harm == "grow":
        path.write_bytes(path.read_bytes() + b"x")
    else:
        copy = tmp_path / "copy"
        path.rename(copy)
        if harm == "link":
            path.symlink_to(copy)
    job = project.convert()
    assert cache.get(job) is None
    assert files_of(job.out_dir) == {}, "nothing of it reaches the run"
    assert entries(tmp_path / "cache") == []
    assert cache.put(job, written(job))
    assert cache.get(project.convert()) is not None


def test_an_entry_under_another_jobs_key_is_no_entry(
    project: Project, cache: JobCache, tmp_path: Path
) -> None:
    keep(cache, project.convert())
    (entry,) = entries(tmp_path / "cache")
    other = project.convert(precision="fp16")
    key = job_keys.JobKeys().key(other)
    assert key is not None
    entry.rename(entry.with_name(key))
    assert cache.get(other) is None


_WRITER = """
    import os, signal, sys, time
    from pathlib import Path
    import msgspec
    from converters import resume
    from converters.jobs import ConvertJob, JobResult

    folder, job_path, result_path, stop_at = sys.argv[1:]
    job = msgspec.json.decode(Path(job_path).read_bytes(), type=ConvertJob)
    result = msgspec.json.decode(Path(result_path).read_bytes(), type=JobResult)
    cache = resume.JobCache(Path(folder))
    assert cache.get(job) is None
    real, count = resume.copy_digest, 0

    def slow(source, target):
        global count
        count += 1
        if count > int(stop_at):
            target.write(b"half")
            target.flush()
            print("half", flush=True)
            time.sleep(60)
        return real(source, target)

    resume.copy_digest = slow
    cache.put(job, result)
"""


@pytest.mark.parametrize("stop_at", [0, 1])
def test_a_killed_writer_leaves_nothing_that_counts(
    project: Project, tmp_path: Path, stop_at: int
) -> None:
    job = project.convert()
    result = written(job)
    (tmp_path / "job.json").write_bytes(msgspec.json.encode(job))
    (tmp_path / "result.json").write_bytes(msgspec.json.encode(result))
    with subprocess.Popen(
        [
            sys.executable, "-c", textwrap.dedent(_WRITER), str(tmp_path / "cache"),
            str(tmp_path / "job.json"), str(tmp_path / "result.json"), str(stop_at),
        ],
        stdout=subprocess.PIPE,
    ) as child:  # fmt: skip
        assert child.stdout is not None
        assert child.stdout.readline() == b"half\n"
        assert len(entries(tmp_path / "cache")) == 1, "its draft"
        living = JobCache(tmp_path / "cache")
        assert len(entries(tmp_path / "cache")) == 1, "a living writer's draft stays"
        assert living.get(project.convert()) is None
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    cache = JobCache(tmp_path / "cache")
    assert list((tmp_path / "cache" / "v1").iterdir()) == [], "its draft is gone"
    keep(cache, project.convert())
    assert cache.get(project.convert()) is not None


def test_two_writers_of_one_job_leave_one_whole_entry(project: Project, tmp_path: Path) -> None:
    jobs = [project.convert() for _ in range(8)]
    caches = [JobCache(tmp_path / "cache") for _ in jobs]
    for cache, job in zip(caches, jobs, strict=True):
        assert cache.get(job) is None
    results = [written(job) for job in jobs]
    barrier = threading.Barrier(len(jobs))
    stored: list[bool] = []

    def write(number: int) -> None:
        barrier.wait()
        stored.append(caches[number].put(jobs[number], results[number]))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stored.count(True) == 1
    assert len(entries(tmp_path / "cache")) == 1
    assert JobCache(tmp_path / "cache").get(project.convert()) is not None


# Bounds ------------------------------------------------------------------------------------


def test_what_was_not_used_for_the_longest_time_goes_first(
    project: Project, tmp_path: Path
) -> None:
    cache = JobCache(tmp_path / "cache", max_bytes=17_000)
    for number, precision in enumerate(("fp32", "fp16", "int8")):
        keep(cache, project.convert(precision=precision), bytes(4000))
        for entry in entries(tmp_path / "cache"):
            record = entry / "entry.json"
            if record.stat().st_mtime > 1e9:
                os.utime(record, (1000 + number, 1000 + number))
    assert len(entries(tmp_path / "cache")) == 3
    assert cache.get(project.convert(precision="fp32")) is not None, "now used last"
    keep(cache, project.convert(precision="int8w"), bytes(4000))
    kept = {
        precision
        for precision in ("fp32", "fp16", "int8", "int8w")
        if cache.get(project.convert(precision=precision)) is not None
    }
    assert kept == {"fp32", "int8", "int8w"}


def test_what_alone_is_too_large_is_not_kept(project: Project, tmp_path: Path) -> None:
    cache = JobCache(tmp_path / "cache", max_bytes=1000)
    job = project.convert()
    assert cache.get(job) is None
    assert not cache.put(job, written(job, bytes(4000)))
    assert list((tmp_path / "cache" / "v1").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="choose another --resume folder"):
        JobCache(tmp_path / "file")


def test_the_folder_keeps_itself_out_of_git(cache: JobCache, tmp_path: Path) -> None:
    assert (tmp_path / "cache" / ".gitignore").read_text() == "*\n"
