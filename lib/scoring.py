"""Detector × cohort → anomaly maps on disk, each with the cohort and the model that it belongs to."""

import hashlib
import io
import json
import os
import resource
import time
import zipfile
import zlib
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import numpy as np

from lib import models, run_folder
from lib.cohort import Cohort, PreparedSubject
from lib.errors import CourseError, check_least
from lib.models.detector import Detector
from lib.progress import bar
from lib.training import History
from lib.volumes import write_bytes

SCORED = ("validation", "test")
DAMAGED = (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error)


def run_detector(
    name: str, cohort: Cohort, run: str, *, device: str = "auto", seed: int = 0, seeds: int = 1, **settings
) -> tuple[Detector, History]:
    """Create, fit, save and score a detector; what this run holds already, of the same settings, is not made again.

    With several `seeds` it is trained anew with each of seed + 1 …, under the names "ae@1" …; the first is returned.
    """
    check_least("seeds", seeds, 1)
    for further in range(seed + 1, seed + seeds):
        _run_training(f"{name}@{further}", cohort, run, device, further, settings)
    return _run_training(name, cohort, run, device, seed, settings)


def _run_training(
    name: str, cohort: Cohort, run: str, device: str, seed: int, settings: dict
) -> tuple[Detector, History]:
    detector = models.create(name, cohort.modalities, **settings)
    place = run_folder(run) / "models"
    with stage(run, name, "fit"):
        history = detector.fit(cohort, out=place, device=device, seed=seed)
    detector.save(place / f"{name}.safetensors")
    write_bytes(place / f"{name}.history.json", json.dumps(asdict(history), indent=1).encode())
    with stage(run, name, "maps"):
        write_maps(detector, cohort, run)
    return detector, history


def write_maps(detector: Detector, cohort: Cohort, run: str) -> None:
    """Write `maps/<method>/<subject>.npz` for validation and test: `map` float16 [slice, row, column], `slice_score`
    float32 [slice], `cohort` and `model` (checksums)."""
    model = model_checksum(run, detector.name)
    subjects = [s for split in SCORED for s in cohort.split(split)]
    for subject in bar(subjects, f"{detector.name} maps", unit="subject"):
        path = _path(run, detector.name, subject)
        if not _is_whole(path, (cohort.hash, model)):
            anomaly_map = detector.maps(subject)
            content = io.BytesIO()
            np.savez_compressed(
                content, map=anomaly_map.astype(np.float16), slice_score=detector.slice_scores(subject, anomaly_map),
                cohort=cohort.hash, model=model,
            )  # fmt: skip
            write_bytes(path, content.getvalue())


def read_map(run: str, method: str, subject: PreparedSubject, cohort: Cohort) -> tuple[np.ndarray, np.ndarray]:
    """The anomaly map, float16 [slice, row, column], and the slice scores, float32 [slice].

    Raises CourseError where the map is missing or damaged, or belongs to another cohort or model.
    """
    path = _path(run, method, subject)
    try:
        with np.load(path, allow_pickle=False) as file:
            if _marks(file) == (cohort.hash, model_checksum(run, method)):
                return file["map"], file["slice_score"]
    except DAMAGED:
        pass
    raise CourseError(
        f"{path} is missing, damaged, or of another cohort or model.",
        "Run the notebook of this method again, with --overwrite.",
    )


def has_map(run: str, method: str, subject: PreparedSubject) -> bool:
    """Whether there is a map of a subject, whole or not."""
    return _path(run, method, subject).exists()


def methods(run: str) -> list[str]:
    """Methods that have maps in this run, in the order of the table of detectors."""
    folder = run_folder(run) / "maps"
    return [name for name in models.DETECTORS if (folder / name).is_dir()]


def trainings(run: str, method: str) -> list[str]:
    """The names under which a method has maps in this run: its own, then those of its further seeds."""
    further = (run_folder(run) / "maps").glob(f"{method}@*")
    return [method, *sorted((path.name for path in further), key=lambda name: seed_of(name, 0))]


def method_of(trained: str) -> str:
    """The method of a training: "ae" of "ae@1"."""
    return trained.partition("@")[0]


def seed_of(trained: str, seed: int) -> int:
    """The seed of a training: that after the "@", or the run's own."""
    return int(trained.partition("@")[2] or seed)


def warnings(run: str, method: str) -> list[str]:
    """What went wrong in the training of a method, in words; nothing where it went well or needs no training."""
    try:
        return json.loads((run_folder(run) / "models" / f"{method}.history.json").read_bytes()).get("warnings", [])
    except (OSError, ValueError):
        return []


@contextmanager
def stage(run: str, method: str, name: str):
    """Note seconds and this process's peak memory so far for a stage of a method in the run's log of times."""
    started = time.perf_counter()
    yield
    row = {
        "method": method,
        "stage": name,
        "seconds": round(time.perf_counter() - started, 3),
        "peak_memory_gb": _peak_gb(),
    }
    path = run_folder(run) / "logs" / "timings.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write(json.dumps({"notebook": os.environ.get("COURSE_NOTEBOOK", ""), **row}) + "\n")


def _peak_gb() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)


def _path(run: str, method: str, subject: PreparedSubject) -> Path:
    return run_folder(run) / "maps" / method / f"{subject.id}.npz"


def _marks(file) -> tuple[str, str]:
    """The cohort and the model that an open map belongs to."""
    return str(file["cohort"]), str(file["model"])


def _is_whole(path: Path, marks: tuple[str, str]) -> bool:
    try:
        with np.load(path, allow_pickle=False) as file:
            return _marks(file) == marks
    except DAMAGED:
        return False


def model_checksum(run: str, method: str) -> str:
    """Of the file of a method's saved model; "" without one."""
    path = run_folder(run) / "models" / f"{method}.safetensors"
    try:
        about = path.stat()
        return _checksum(path, about.st_mtime_ns, about.st_size)
    except OSError:
        return ""


@lru_cache(maxsize=1)  # for the subjects of a method
def _checksum(path: Path, changed: int, size: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
