"""Maps on disk belong to one cohort and one model, and nothing finished is made again."""

import json

import made_cohort
import numpy as np
import pytest

import lib
from lib import models, scoring
from lib.errors import CourseError


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    monkeypatch.setattr(lib, "ROOT", tmp_path)
    return made_cohort.write(tmp_path / "cohort")


def map_path(subject, method="intensity"):
    return lib.run_folder("run") / "maps" / method / f"{subject.id}.npz"


def test_maps_are_written_for_validation_and_test_and_read_back(prepared):
    detector, _ = scoring.run_detector("intensity", prepared, "run")
    written = {path.stem for path in (lib.run_folder("run") / "maps" / "intensity").iterdir()}
    assert written == {s.id for s in prepared.subjects if s.split != "train"}
    subject = prepared.split("test")[0]
    anomaly_map, slice_scores = scoring.read_map("run", "intensity", subject, prepared)
    np.testing.assert_array_equal(anomaly_map, detector.maps(subject).astype(np.float16))
    assert slice_scores.shape == (len(anomaly_map),)
    assert scoring.methods("run") == ["intensity"]


def test_maps_of_another_cohort_are_refused(prepared, tmp_path):
    scoring.run_detector("intensity", prepared, "run")
    other = made_cohort.write(tmp_path / "other", seed=1)
    with pytest.raises(CourseError, match=r"s05\.npz"):
        scoring.read_map("run", "intensity", other.split("test")[0], other)


@pytest.mark.parametrize(
    "damage", [lambda p: p.unlink(), lambda p: p.write_bytes(p.read_bytes()[:200]), lambda p: p.write_bytes(b"")]
)
def test_missing_and_damaged_maps_are_named(prepared, damage):
    scoring.run_detector("intensity", prepared, "run")
    subject = prepared.split("test")[0]
    damage(map_path(subject))
    with pytest.raises(CourseError, match=subject.id):
        scoring.read_map("run", "intensity", subject, prepared)


def test_maps_of_an_altered_model_are_refused(prepared):
    scoring.run_detector("atlas_z", prepared, "run")
    path = lib.run_folder("run") / "models" / "atlas_z.safetensors"
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(CourseError, match="of another cohort or model"):
        scoring.read_map("run", "atlas_z", prepared.split("test")[0], prepared)


def test_finished_maps_are_not_made_again(prepared, monkeypatch):
    scoring.run_detector("intensity", prepared, "run")
    map_path(prepared.split("test")[1]).unlink()
    made = []
    kind = type(models.create("intensity", ("FLAIR",)))
    original = kind.maps
    monkeypatch.setattr(kind, "maps", lambda self, subject: made.append(subject.id) or original(self, subject))
    scoring.run_detector("intensity", prepared, "run")
    assert made == [prepared.split("test")[1].id]


def test_warnings_of_a_training_are_read_back_and_elsewhere_there_are_none(prepared):
    scoring.run_detector("intensity", prepared, "run")
    assert scoring.warnings("run", "intensity") == []
    assert scoring.warnings("run", "missing") == []
    path = lib.run_folder("run") / "models" / "intensity.history.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"warnings": ["the samples collapse"]}))
    assert scoring.warnings("run", "intensity") == ["the samples collapse"]


def test_times_are_noted_by_method_and_stage(prepared, monkeypatch):
    monkeypatch.setenv("COURSE_NOTEBOOK", "08_comparison")
    scoring.run_detector("intensity", prepared, "run")
    lines = (lib.run_folder("run") / "logs" / "timings.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [(r["notebook"], r["method"], r["stage"]) for r in rows] == [
        ("08_comparison", "intensity", "fit"), ("08_comparison", "intensity", "maps"),
    ]  # fmt: skip
    assert all(r["seconds"] >= 0 and r["peak_memory_gb"] > 0 for r in rows)
