"""Broken scans and folders: each is refused by name with its cure, or read right; good ones beside it come through."""

import ast
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tracemalloc
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image

from benchmarks import corruption, malformed, malformed_folders
from lib import cohort, datasets, dicom, examination, intake, nifti, pictures, preparation, refusals, volumes
from lib.errors import CourseError
from lib.preprocessing import Recipe

ROOT = Path(__file__).parents[1]
BROKEN = [name for name, case in malformed.CASES.items() if case.code]
GOOD = [name for name, case in malformed.CASES.items() if not case.code]
PATIENT = malformed_folders.GOOD
FOLDERS = malformed_folders.FOLDERS
SERIES = malformed_folders.SERIES
FITS = {"size": 48, "pixel_mm": 4.0}


def refused(code, call, *arguments, **options):
    """What a call is refused with, held against the table."""
    with pytest.raises(CourseError) as caught:
        call(*arguments, **options)
    assert caught.value.code == code, caught.value
    assert caught.value.cure == refusals.REFUSALS[code][1] or "{" in refusals.REFUSALS[code][1]
    return caught.value.what


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_by_name_with_its_cure(tmp_path, name):
    case = malformed.CASES[name]
    path = case.write(tmp_path)
    with case.around(path):
        assert str(path) in refused(case.code, volumes.read, path, constant_allowed=case.mask, channel=case.channel)


@pytest.mark.parametrize("name", GOOD)
def test_an_odd_but_good_file_is_the_good_scan(tmp_path, name):
    case = malformed.CASES[name]
    assert case.right(volumes.read(case.write(tmp_path), channel=case.channel))


def test_a_case_is_not_right_for_another_scan(tmp_path):
    case = malformed.CASES["good"]
    good = volumes.read(case.write(tmp_path))
    assert case.right(good)
    for voxels, affine in [
        (good.voxels + np.eye(*good.voxels.shape[1:]), good.affine),
        (good.voxels[::-1], good.affine),
        (good.voxels, good.affine @ np.diag([-1, 1, 1, 1])),
        (good.voxels[:-1], good.affine),
    ]:
        assert not case.right(volumes.Volume(voxels, affine))
    assert not malformed.CASES["two affines, two voxels apart"].right(good)


@pytest.mark.parametrize("name", ["huge", "huge, in gzip", "a gzip bomb", "offset beyond the file"])
def test_what_is_huge_is_refused_before_memory_is_taken(tmp_path, name):
    path = malformed.CASES[name].write(tmp_path)
    tracemalloc.start()
    try:
        refused(malformed.CASES[name].code, volumes.read, path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("place", ["lib.nifti._unpacked", "lib.volumes.ArrayProxy"])
def test_a_scan_larger_than_memory_is_refused(tmp_path, monkeypatch, place):
    path = malformed.CASES["good, in gzip"].write(tmp_path)
    really = nifti._unpacked

    def unpacked(path, start, most, whole=True):
        if whole:
            raise MemoryError
        return really(path, start, most, whole)

    def proxy(*_):
        raise MemoryError

    monkeypatch.setattr(place, unpacked if "unpacked" in place else proxy)
    assert str(path) in refused("S20", volumes.read, path)


@pytest.fixture
def subjects(tmp_path):
    return malformed_folders.write_subjects(tmp_path / "scans", outside=-1024)


def left(root):
    """What lies in data/prepared but the memory of the examination."""
    return [path.name for path in (root / "data" / "prepared").glob("*") if path.name != "examined.json"]


def said_with(code, text):
    """Whether a sentence of the table, whatever its fields, stands in a text with its cure."""
    pattern = " ".join(re.sub(r"\\\{.*?\}", ".+?", re.escape(part)) for part in refusals.REFUSALS[code])
    return re.search(pattern, text)


@pytest.mark.parametrize("name", FOLDERS)
def test_of_a_folder_nothing_but_the_broken_subject_is_lost(subjects, course_root, name):
    case = FOLDERS[name]
    case.make(subjects)
    settings = FITS | dict(case.settings)
    if case.code or case.whole:
        with pytest.raises(CourseError) as caught:
            intake.gather(str(subjects), **settings)
        assert not case.code or said_with(case.code, caught.value.what)
        assert case.said in caught.value.what
        assert "p1" in caught.value.what
        assert not any(f"{good}_" in caught.value.what for good in PATIENT)
        assert left(course_root) == []
    if not case.whole:
        gathered = intake.gather(str(subjects), **settings, skip_broken=bool(case.code))
        assert set(PATIENT) <= {s.id for s in gathered.subjects}
        assert len(gathered.left_out) == bool(case.code)
        assert case.code or (len(gathered.subjects) == 5 and case.said in " ".join(gathered.notes))


def test_a_folder_that_may_not_be_listed_is_refused(subjects, monkeypatch):
    really = os.scandir

    def scandir(place):
        if Path(place).name == "p1":
            raise PermissionError(13, "Permission denied", str(place))
        return really(place)

    monkeypatch.setattr(os, "scandir", scandir)
    assert f"{subjects}/p1 cannot be opened: Permission denied" in refused("F01", datasets.find_subjects, subjects)


def test_a_name_that_cannot_be_written_is_refused(subjects, course_root):
    os.rename(subjects / "p1", os.fsencode(subjects) + b"/M\xfcller")
    assert f"{subjects}/M\\xfcller" in refused("F02", intake.gather, str(subjects), **FITS)


def test_a_picture_that_claims_to_be_huge_is_refused(tmp_path):
    Image.new("L", (9, 9), 1).save(tmp_path / "x.png")
    made = bytearray((tmp_path / "x.png").read_bytes())
    made[16:24] = (60000).to_bytes(4, "big") * 2
    made[29:33] = zlib.crc32(made[12:29]).to_bytes(4, "big")
    (tmp_path / "x.png").write_bytes(made)
    with pytest.raises(CourseError, match=r"x\.png is damaged"):
        pictures.read(tmp_path / "x.png")


@pytest.mark.filterwarnings("ignore:Invalid value for VR")
@pytest.mark.parametrize("name", SERIES)
def test_a_broken_series_is_refused_by_name_and_an_odd_one_is_read(tmp_path, name):
    code, change = SERIES[name]
    folder = malformed_folders.write_series(tmp_path / "series")
    change(folder)
    if code:
        assert str(folder) in refused(code, dicom.read, folder)
        return
    volume = dicom.read(folder)
    np.testing.assert_array_equal(volume.voxels, malformed_folders.PLANES.transpose(2, 1, 0))
    np.testing.assert_allclose(volume.affine[:3, 2], [0, 0, malformed_folders.GAP_MM])


def test_a_broken_slice_or_series_loses_no_other_series_of_a_folder(tmp_path):
    for name in ("a", "b", "c"):
        folder = malformed_folders.write_series(tmp_path / name / "scan")
        for path in folder.iterdir():
            header = pydicom.dcmread(path)
            header.RepetitionTime, header.EchoTime = 4000, 100
            header.save_as(path)
    first = tmp_path / "b" / "scan" / "000.dcm"
    first.write_bytes(b"rubbish")
    assert [s.id for s in datasets.find_subjects(tmp_path).subjects] == ["a", "b", "c"]
    assert str(first) in refused("D03", dicom.read, first.parent)
    for path in first.parent.iterdir():
        path.write_bytes(b"rubbish")
    found = datasets.find_subjects(tmp_path)
    assert [s.id for s in found.subjects] == ["a", "c"]
    assert "left alone: b/scan" in " ".join(found.notes)
    assert str(first) in refused("D03", dicom.facts, first.parent)


def test_no_damage_to_a_series_is_a_traceback(tmp_path):
    folder = malformed_folders.write_series(tmp_path / "series")
    path = folder / "002.dcm"
    good, random = path.read_bytes(), np.random.default_rng(0)
    header = np.arange(len(good) - malformed_folders.PLANES[2].nbytes)
    said = Counter()
    for _ in range(120):
        path.write_bytes(corruption.damaged(good, header, random, cut=True))
        try:
            dicom.read(folder)
            dicom.patient(folder)
            said["read"] += 1
        except CourseError as error:
            said[error.code if str(folder) in error.what else "nameless"] += 1
    assert said.keys() >= {"D03", "D04", "D06", "D10", "read"}
    assert "nameless" not in said


def test_of_damage_to_a_scan_nothing_that_can_be_seen_is_silent(tmp_path, monkeypatch, capsys):
    call = ["corruption", "--quick", "--seed", "7", "--json", str(tmp_path / "figures.json")]
    monkeypatch.setattr(corruption, "QUICK", 25)
    monkeypatch.setattr(sys, "argv", call)
    corruption.main()
    sums = json.loads((tmp_path / "figures.json").read_text())
    rows = sums.pop("rows")
    assert "a gzip file" in capsys.readouterr().out
    assert {sums["ours"][name] for name in ("silent", "lost", "traceback")} == {0}
    assert sums["ours"]["caught"] > len(BROKEN)
    assert sums["nibabel"]["silent"] > 10
    assert rows[corruption.UNSEEN]["ours"]["silent"] > 15
    assert sum(sums["ours"].values()) == len(malformed.CASES) + 2 * 25


def test_the_benchmark_sees_what_is_silent_and_what_is_a_traceback(tmp_path, monkeypatch):
    broken = malformed.CASES["a NaN voxel"]
    assert corruption.outcome(corruption.ours, broken) == "caught"
    monkeypatch.setattr(volumes, "check_voxels", lambda *_: None)
    assert corruption.outcome(corruption.ours, broken) == "silent"
    monkeypatch.setattr(volumes, "check_voxels", lambda *_: 1 / 0)
    assert corruption.outcome(corruption.ours, broken) == "traceback"
    monkeypatch.undo()
    assert corruption.outcome(corruption.ours, malformed.CASES["good"]) == "harmless"


@pytest.mark.parametrize(
    "change",
    [
        lambda path: volumes.write(path, volumes.read(path).voxels * 2, volumes.read(path).affine),
        lambda path: volumes.write(path, volumes.read(path).voxels, volumes.read(path).affine @ np.diag([-1, 1, 1, 1])),
        lambda path: path.write_bytes(path.read_bytes()[:500]),
        lambda path: path.unlink(),
    ],
    ids=["other voxels", "another affine", "truncated", "gone"],
)
def test_a_scan_that_changes_behind_its_examination_enters_no_cohort(subjects, course_root, change):
    gathered = intake.gather(str(subjects), **FITS)
    change(subjects / "p2" / "p2_flair.nii.gz")
    assert "p2" in refused("E15", preparation.prepare_cohort, gathered, Recipe(**FITS))
    assert list((course_root / "data" / "prepared").glob("*/manifest.json")) == []
    again = intake.gather(str(subjects), **FITS, skip_broken=True)
    ready = cohort.open_cohort(preparation.prepare_cohort(again, Recipe(**FITS)))
    assert {s.id for s in ready.subjects} >= {"p0", "p1", "p3", "p4"}


def test_of_several_modalities_one_may_be_prepared_alone_unless_it_changes(subjects, course_root):
    recipe = Recipe(("FLAIR",), **FITS)
    gathered = intake.gather(str(subjects), modalities="FLAIR,CT", **FITS)
    assert len(cohort.open_cohort(preparation.prepare_cohort(gathered, recipe)).subjects) == 5
    path = subjects / "p2" / "p2_flair.nii.gz"
    gathered = intake.gather(str(subjects), modalities="FLAIR,CT", **FITS, seed=1)
    volumes.write(path, volumes.read(path).voxels * 2, volumes.read(path).affine)
    shutil.rmtree(course_root / "data" / "prepared")
    assert "p2" in refused("E15", preparation.prepare_cohort, gathered, recipe)


def test_a_change_that_keeps_size_and_time_is_examined_again(subjects, course_root):
    path = subjects / "p2" / "p2_flair.nii.gz"
    times = path.stat()
    first = intake.gather(str(subjects), **FITS)
    made = path.read_bytes()
    path.write_bytes(malformed.flipped(made, 8 * len(made) - 40))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(CourseError, match="its checksum does not match"):
        intake.gather(str(subjects), **FITS)
    path.write_bytes(made)
    assert intake.gather(str(subjects), **FITS) == first


def test_a_head_in_which_no_brain_is_found_is_refused(subjects, course_root, monkeypatch):
    nothing = np.zeros(volumes.read(subjects / "p1" / "p1_flair.nii.gz").voxels.shape, bool)
    monkeypatch.setattr(examination, "find", lambda scans: (nothing, "FLAIR", "a growing surface"))
    monkeypatch.setattr("os.cpu_count", lambda: 1)  # or processes would not know of the line above
    with pytest.raises(CourseError) as caught:
        intake.gather(str(subjects), **FITS)
    assert said_with("E16", caught.value.what)
    assert left(course_root) in ([], ["brains"])


def test_pictures_on_grey_are_refused(tmp_path, course_root):
    rows, columns = np.mgrid[-32:32, -32:32]
    for name in ("yes", "no"):
        (tmp_path / name).mkdir()
        for number in range(3):
            disc = np.where(rows**2 + columns**2 < (20 + number) ** 2, 120 + rows + 20 * number, 60)
            Image.fromarray(disc.astype(np.uint8)).save(tmp_path / name / f"{name}{number}.png")
    with pytest.raises(CourseError) as caught:
        intake.gather(str(tmp_path), extraction="never")
    assert said_with("E07", caught.value.what)


def test_every_refusal_is_provoked_by_a_case():
    codes = {case.code for case in (*malformed.CASES.values(), *FOLDERS.values())} | {
        code for code, _ in SERIES.values()
    }
    elsewhere = {"S20", "F01", "F02", "E07", "E15", "E16"}  # above, for they need more than a file
    assert codes - {""} | elsewhere == refusals.REFUSALS.keys()


@pytest.mark.parametrize("name", ["nifti", "volumes", "dicom"])
def test_what_reads_scans_refuses_by_the_table_alone(name):
    tree = ast.parse((ROOT / "lib" / f"{name}.py").read_text())
    called = [node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    assert "CourseError" not in called
    assert "refusal" in called


def test_every_code_in_lib_stands_in_the_table_and_every_row_is_used():
    files = {path.name: path.read_text() for path in (ROOT / "lib").glob("*.py")}
    files["refusals.py"] = files["refusals.py"].partition("\ndef ")[2]
    text = "".join(files.values())
    assert set(re.findall(r'"([SDFE]\d\d)"', text)) == refusals.REFUSALS.keys()


def test_the_page_of_refusals_is_the_table():
    assert (ROOT / "docs" / "refusals.md").read_text() == refusals.page()


def test_a_refusal_keeps_its_code_between_processes():
    error = pickle.loads(pickle.dumps(refusals.refusal("S03", path="a {b}.nii")))
    assert (error.what, error.cure, error.code) == ("a {b}.nii is empty.", refusals.AGAIN, "S03")


@pytest.fixture
def home(tmp_path):
    """A copy of the course whose data and reports are its own."""
    for name in ("lib", "notebooks"):
        shutil.copytree(ROOT / name, tmp_path / "home" / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "home"


def command(home, module, *arguments):
    """How a command of the course ends, and what it says."""
    call = [sys.executable, "-m", module, *map(str, arguments)]
    ended = subprocess.run(
        call, cwd=home, capture_output=True, text=True, timeout=60, env=os.environ | {"PYTHONPATH": "."}
    )
    assert "Traceback" not in ended.stdout + ended.stderr
    return ended.returncode, ended.stderr


def test_the_course_lists_what_is_broken_and_begins_nothing(subjects, home):
    (subjects / "p1" / "p1_flair.nii.gz").write_bytes(malformed.packed()[:900])
    (subjects / "p2" / "p2_seg.nii.gz").write_bytes(malformed.packed(malformed.content(malformed.LESION * 0.5)))
    (subjects / "p3" / "p3_flair.nii.gz").write_bytes(malformed.packed(malformed.patched(scl_slope=np.inf)))
    status, said = command(home, "lib.course", "--data", subjects, "--only", "01", "--quiet")
    assert status == 2
    assert "3 of 5 subjects cannot be used" in said
    for code in ("S07", "E08", "S17"):
        assert said_with(code, said)
    assert left(home) == []
    assert list((home / "reports").glob("*")) == []


def test_the_course_refuses_a_folder_that_is_not_one_thing(subjects, home):
    case = FOLDERS["ids that differ in case"]
    case.make(subjects)
    status, said = command(home, "lib.course", "--data", subjects, "--only", "01", "--quiet")
    assert status == 2
    assert case.said in said
    assert left(home) == []


def test_detection_refuses_a_name_that_cannot_be_written(tmp_path):
    scan = os.fsencode(tmp_path) + b"/M\xfcller.nii"
    call = [sys.executable, "-m", "lib.detect", scan, "--run", "tests", "--method", "dae", "--out", tmp_path / "out"]
    ended = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "M\\xfcller.nii is not written in UTF-8" in ended.stderr


def test_detection_refuses_broken_scans_one_by_one_and_the_good_one_goes_through(finished, tmp_path):
    names = ["gzip cut at a quarter", "huge", "infinite slope", "two affines, left and right exchanged", "a NaN voxel"]
    scans = []
    for number, name in enumerate(names):
        (tmp_path / str(number)).mkdir()
        scans.append(malformed.CASES[name].write(tmp_path / str(number)))
    good = finished / "scans" / "p0" / "p0_flair.nii.gz"
    arguments = ("--run", "small", "--method", "intensity_median", "--modality", "FLAIR", "--out", tmp_path / "out")
    status, said = command(finished, "lib.detect", *scans, good, *arguments)
    assert status == 1
    for name, scan in zip(names, scans, strict=True):
        assert said_with(malformed.CASES[name].code, said.replace("\n", " "))
        assert str(scan.parent) in said
    assert [path.parent.name for path in (tmp_path / "out").glob("*/report.html")] == ["p0_flair"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"p0_flair"}
