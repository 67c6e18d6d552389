"""Benchmarks: folds, figures on patients whose answer is known, and the viewer's moves that are timed."""

import io
import subprocess
import sys

import made_cohort
import numpy as np
import psutil
import pytest
import test_extraction
from PIL import Image

from benchmarks import detectors_on_brats, extraction, preparation, viewer
from lib import datasets, models, single_scan, volumes
from lib.errors import CourseError
from lib.intake import LESION_FREE
from lib.preprocessing import Recipe


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return made_cohort.write(
        tmp_path_factory.mktemp("cohort") / "c", healthy=(0, 0, 0), patients=6, training=LESION_FREE
    )


def test_every_patient_is_tested_once_by_detectors_that_never_saw_it(whole):
    tested = []
    for split in detectors_on_brats.folds(whole, 0):
        parts = {name: {s.id for s in split.split(name)} for name in ("train", "validation", "test")}
        assert all(parts.values())
        assert sum(map(len, parts.values())) == len(whole.subjects)
        tested += parts["test"]
    assert sorted(tested) == [s.id for s in whole.subjects]


def test_figures_are_those_of_each_patient_s_own_map(whole):
    found, seconds = detectors_on_brats.measured(whole, ["intensity", "atlas_z"], 0)
    plain = models.create("intensity", whole.modalities)
    assert found["intensity"] == {s.id: single_scan.precision(s, plain.maps(s)) for s in whole.subjects}
    assert found["atlas_z"].keys() == found["intensity"].keys()
    assert set(seconds) == set(found)


def test_the_viewer_s_benchmark_moves_a_viewer_of_the_size_and_plots_the_same_panels():
    looked = viewer.made_up(96)
    assert looked.case.brain.shape == (75, 96, 96)
    assert looked.promise.rate(looked["threshold"]) <= 0.01
    assert looked.figures["dice"] > 0.5
    ours, peer = (Image.open(io.BytesIO(png)) for png in (looked.picture.content, viewer.replotted(looked, 37)))
    assert peer.size == ours.size
    found = viewer.measured(96, 1)
    assert found.keys() >= {"slice", "threshold", "matplotlib"}
    assert all(ms > 0 for ms in found.values())


def test_the_two_ways_of_preparing_that_are_timed_give_the_same_image(brats, tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "SCAN_MM", 5.0)
    monkeypatch.setattr(preparation, "RECIPE", Recipe(pixel_mm=10.0, size=32))
    (subject, *_) = datasets.find_subjects(brats(patients=1)).subjects
    image, affine = preparation.by_ours(subject, tmp_path / "ours" / subject.id)
    theirs, there = preparation.by_monai(preparation.monai_steps(), subject, tmp_path / "monai")
    assert preparation.difference((image, affine), (theirs, there)) < preparation.LARGEST_DIFFERENCE
    darker = preparation.difference((image, affine), (theirs / 2, there))
    assert darker == pytest.approx(image[image > 0].mean() / 2, rel=0.1)
    there[0, 3] += 1
    assert preparation.difference((image, affine), (theirs, there)) is None
    assert {p.name for p in (tmp_path / "monai").iterdir()} == {"image.npy", "brain.npy", "lesion.npy"}


def test_the_memory_of_a_process_is_seen_with_its_children_s():
    child = "import time; held = bytearray(10**8); time.sleep(1)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        assert preparation._peak(psutil.Process(process.pid)) > 1e8


def test_extraction_is_measured_on_heads_against_the_whole_and_the_eroded_head(tmp_path):
    scan, brain, lesion = test_extraction.head("FLAIR", 3)
    volumes.write(tmp_path / "p0" / "p0_flair.nii.gz", scan.voxels.astype(np.int16), scan.affine)
    volumes.write(tmp_path / "p0" / "p0_seg.nii.gz", lesion.astype(np.uint8), scan.affine)
    table = extraction.measured(str(tmp_path), "FLAIR").set_index("way")
    assert table.kept["head"] == 100
    assert table.litres["head"] > table.litres["brain"] > 0.9 * brain.sum() * scan.millilitres / 1000
    assert table.ap["brain"] > table.ap["head"]
    assert table.kept["brain"] >= 97
    with pytest.raises(CourseError, match="No patient"):
        extraction.measured(str(tmp_path), "T2")
