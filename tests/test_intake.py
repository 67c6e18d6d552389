"""Intake: every problem of every scan is found before anything is prepared, and told at once by name."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from lib import examination, intake, phantom, volumes
from lib.errors import CourseError
from lib.intake import HEALTHY, LESION_FREE

FITS = {"size": 48, "pixel_mm": 4.0}


def gather(folder, **options):
    return intake.gather(str(folder), **FITS | options)


def refused(folder, **options):
    with pytest.raises(CourseError) as caught:
        gather(folder, **options)
    assert caught.value.cure.strip()
    return caught.value.what


def prepared(root):
    """What lies in data/prepared."""
    return [p.name for p in (root / "data" / "prepared").glob("*")]


def changed(path, change, affine=None):
    """Write a file again with other voxels or another affine."""
    volume = volumes.read(path, constant_allowed=True)
    volumes.write(path, change(volume.voxels).astype(np.float32), volume.affine if affine is None else affine)


def scan(folder):
    return folder / f"{folder.name}_flair.nii.gz"


def mask(folder):
    return folder / f"{folder.name}_seg.nii.gz"


def shifted(path):
    affine = volumes.read(path).affine.copy()
    affine[0, 3] += 5
    return affine


def with_voxel(value):
    def change(voxels):
        voxels[tuple(np.array(voxels.shape) // 2)] = value
        return voxels

    return change


def z_scored(voxels):
    return (voxels - voxels[voxels > 0].mean()) / voxels.std() * (voxels > 0)


def cut(path):
    path.write_bytes(path.read_bytes()[:-200])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def participants(*rows):
    def write(folder):
        (folder.parent / "participants.tsv").write_text("\n".join(["participant_id\thealthy", *rows]))

    return write


BAD_SUBJECTS = {
    "truncated": lambda p: cut(scan(p)),
    "bit-flipped": lambda p: flip(scan(p)),
    "empty file": lambda p: scan(p).write_bytes(b""),
    "a web page": lambda p: scan(p).write_bytes(b"<html>"),
    "4-D": lambda p: changed(scan(p), lambda v: np.stack([v, v], axis=-1)),
    "NaN": lambda p: changed(scan(p), with_voxel(np.nan)),
    "infinity": lambda p: changed(scan(p), with_voxel(np.inf)),
    "all zero": lambda p: changed(scan(p), np.zeros_like),
    "z-scored": lambda p: changed(scan(p), z_scored),
    "a mask for a scan": lambda p: changed(scan(p), lambda v: v > 0),
    "a label map for a scan": lambda p: changed(scan(p), lambda v: v // 200),
    "a head, not a brain": lambda p: changed(scan(p), lambda v: np.pad(v + 20, 12, mode="reflect")),
    "hardly a brain": lambda p: changed(scan(p), lambda v: v * (np.arange(v.shape[0]) < 8)[:, None, None]),
    "twice the size": lambda p: changed(scan(p), np.asarray, np.diag([10, 10, 10, 1])),
    "a mask of another shape": lambda p: changed(mask(p), lambda v: v[:-1]),
    "a mask on another grid": lambda p: changed(mask(p), np.asarray, shifted(mask(p))),
    "a mask of fractions": lambda p: changed(mask(p), lambda v: v * 0.5),
    "a mask of everything": lambda p: changed(mask(p), np.ones_like),
    "a mask of the brain": lambda p: changed(mask(p), lambda v: volumes.read(scan(p)).voxels > 0),
    "a mask outside the brain": lambda p: changed(mask(p), lambda v: np.arange(v.size).reshape(v.shape) < 90),
    "a mask with NaN": lambda p: changed(mask(p), with_voxel(np.nan)),
    "a truncated mask": lambda p: cut(mask(p)),
    "a healthy subject with a lesion": participants("p1\t1"),
}


@pytest.mark.parametrize("kind", BAD_SUBJECTS)
def test_a_bad_subject_is_named_and_can_be_left_out(brats, course_root, kind):
    folder = brats()
    BAD_SUBJECTS[kind](folder / "p1")
    what = refused(folder)
    assert "1 of 4 subjects" in what
    assert "p1" in what
    assert not {"p0", "p2", "p3"} & {word.strip(":,.") for word in what.split()}
    assert prepared(course_root) == []

    rest = gather(folder, skip_broken=True)
    assert [s.id for s in rest.subjects] == ["p0", "p2", "p3"]
    assert [one["subject"] for one in rest.left_out] == ["p1"]
    assert any("Left out: p1." in note for note in rest.notes)


LINKS = {
    "a folder": lambda path: path.mkdir(),
    "a dangling link": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("kind", LINKS)
def test_what_is_no_file_is_named(brats, course_root, kind):
    folder = brats()
    scan(folder / "p1").unlink()
    LINKS[kind](scan(folder / "p1"))
    assert "p1_flair.nii.gz is not a file" in refused(folder)


def test_the_same_voxels_under_two_names(brats, write_subject, course_root):
    folder = brats()
    write_subject(folder / "p9", seed=1, radius_mm=14)
    assert "p9 FLAIR has the same voxels as p1 FLAIR" in refused(folder)
    assert [s.id for s in gather(folder, skip_broken=True).subjects] == ["p0", "p1", "p2", "p3"]


def test_the_same_voxels_for_two_modalities(brats, course_root):
    folder = brats(modalities=("FLAIR", "T1"))
    (folder / "p2" / "p2_t1.nii.gz").write_bytes(scan(folder / "p2").read_bytes())
    assert "p2 T1 has the same voxels as p2 FLAIR" in refused(folder, modalities="FLAIR,T1")


def test_modalities_on_different_grids(brats, course_root):
    folder = brats(modalities=("FLAIR", "T1"))
    path = folder / "p2" / "p2_t1.nii.gz"
    changed(path, np.asarray, shifted(path))
    assert "p2_t1.nii.gz lies on another grid than p2_flair.nii.gz" in refused(folder, modalities="FLAIR,T1")


def test_all_problems_are_told_at_once_and_nothing_is_prepared(brats, course_root):
    folder = brats(patients=6)
    cut(scan(folder / "p0"))
    cut(mask(folder / "p0"))
    changed(scan(folder / "p2"), np.zeros_like)
    changed(mask(folder / "p4"), lambda v: v[:-1])
    what = refused(folder)
    assert "3 of 6 subjects" in what
    for name in ("p0_flair.nii.gz", "p0_seg.nii.gz", "p2_flair.nii.gz", "p4_seg.nii.gz"):
        assert what.count(f"{name} ") == 1
    assert prepared(course_root) == []


def test_a_brain_too_large_for_the_square_is_named(brats, course_root):
    folder = brats()
    what = refused(folder, size=32)
    assert "p0" in what
    assert "128 mm" in what
    assert len(gather(folder).subjects) == 4


def test_a_subject_without_the_modality_is_listed_not_guessed(brats, write_subject, course_root):
    folder = brats()
    write_subject(folder / "t2only", seed=50, modalities=("T2",))
    gathered = gather(folder)
    assert gathered.left_out == ({"subject": "t2only", "why": "It has no FLAIR."},)
    assert "t2only" not in {s.id for s in gathered.subjects}
    assert "T1" in refused(folder, modalities="T1")


def test_a_subject_of_unknown_health_is_listed(brats, write_subject, course_root):
    folder = brats()
    write_subject(folder / "dark", seed=50, mask=False)
    assert "participants.tsv" in gather(folder).left_out[0]["why"]


def test_where_nothing_is_left_the_reasons_are_told(brats, course_root):
    folder = brats(patients=3, mask=False)
    what = refused(folder)
    assert all(f"p{i}: It has no lesion mask" in what for i in range(3))


def test_too_few_subjects_are_refused(brats, course_root):
    assert "split" in refused(brats(patients=2))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("patients", "healthy"), [(3, 0), (0, 3), (1, 4)])
def test_three_subjects_are_enough_for_any_seed(brats, course_root, patients, healthy, seed):
    gathered = gather(brats(patients=patients, healthy=healthy), seed=seed)
    assert set(gathered.splits.values()) == {"train", "validation", "test"}


def test_a_wrong_or_empty_folder_is_refused(tmp_path, course_root):
    assert "nowhere" in refused(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "empty" in refused(tmp_path / "empty")


def test_with_healthy_subjects_all_patients_are_for_the_test(brats, course_root):
    gathered = gather(brats(patients=3, healthy=5))
    assert gathered.training == HEALTHY
    assert {gathered.splits[f"p{i}"] for i in range(3)} == {"test"}
    assert {gathered.splits[f"h{i}"] for i in range(5)} == {"train", "validation", "test"}
    assert any(HEALTHY in note for note in gathered.notes)


def test_healthy_subjects_may_come_from_a_folder_of_their_own(brats, write_subject, course_root, tmp_path):
    for i in range(3):
        write_subject(tmp_path / "well" / f"h{i}", seed=60 + i, radius_mm=0, mask=False)
    gathered = gather(brats(patients=2), healthy_data=str(tmp_path / "well"))
    assert gathered.training == HEALTHY
    assert {s for s, split in gathered.splits.items() if split == "test"} >= {"p0", "p1"}
    assert "no patients" in refused("", healthy_data=str(tmp_path / "well"))


def test_declared_health_needs_no_mask(brats, write_subject, course_root):
    folder = brats(patients=1)
    for i in range(3):
        write_subject(folder / f"h{i}", seed=60 + i, radius_mm=0, mask=False)
    participants(*(f"h{i}\tyes" for i in range(3)))(folder / "p0")
    gathered = gather(folder)
    assert gathered.training == HEALTHY
    assert gathered.splits["p0"] == "test"


def test_patients_whose_lesions_are_not_outlined_are_tested_and_no_more(brats, course_root):
    folder = brats(patients=6, healthy=3)
    for bare in ("p1", "p4"):
        (folder / bare / f"{bare}_seg.nii.gz").unlink()
    participants("p1\t0", "p4\tn/a")(folder / "p0")
    gathered = gather(folder)
    assert gathered.splits["p1"] == "test"
    assert [one["subject"] for one in gathered.left_out] == ["p4"]
    assert any(note.startswith("1 of 5 patients have no lesion mask: ") for note in gathered.notes)


def test_without_healthy_subjects_the_outlined_patients_alone_are_divided(brats, course_root):
    folder = brats(patients=6)
    for bare in ("p1", "p4", "p5"):
        (folder / bare / f"{bare}_seg.nii.gz").unlink()
    participants(*(f"{bare}\t0" for bare in ("p1", "p4", "p5")))(folder / "p0")
    gathered = gather(folder)
    assert {gathered.splits[s] for s in ("p1", "p4", "p5")} == {"test"}
    assert sorted(gathered.splits[s] for s in ("p0", "p2", "p3")) == ["test", "train", "validation"]
    assert gathered.training == LESION_FREE
    for one in ("p0", "p2", "p3"):
        (folder / one / f"{one}_seg.nii.gz").unlink()
    participants(*(f"p{i}\t0" for i in range(6)))(folder / "p0")
    assert "No subject is left for the split train" in refused(folder)


def test_where_nobody_is_ill_the_notes_say_so(brats, course_root):
    gathered = gather(brats(patients=0, healthy=5))
    assert set(gathered.splits.values()) == {"train", "validation", "test"}
    assert any(note.startswith("Nobody is ill in this data") for note in gathered.notes)


def test_without_healthy_subjects_training_is_on_lesion_free_slices(brats, course_root):
    gathered = gather(brats(patients=5, healthy=1))
    assert gathered.training == LESION_FREE
    assert any(LESION_FREE in note for note in gathered.notes)
    assert any(note.startswith("Lesion labels found: 1;") for note in gathered.notes)


def stated(folder, **rows):
    path = folder.parent / "splits.csv"
    path.write_text("subject,split\n" + "".join(f"{s},{name}\n" for s, name in rows.items()))
    return {"splits": str(path)}


def test_splits_from_a_file(brats, course_root):
    folder = brats()
    given = stated(folder, p3="train", p1="validation", p0="test")
    gathered = gather(folder, **given)
    assert gathered.splits == {"p3": "train", "p1": "validation", "p0": "test"}
    assert gathered.left_out == ({"subject": "p2", "why": "It stands in no split."},)


def test_a_file_of_splits_may_name_subjects_that_are_left_out(brats, write_subject, course_root):
    folder = brats()
    write_subject(folder / "t2only", seed=50, modalities=("T2",))
    cut(scan(folder / "p2"))
    given = stated(folder, p0="train", p1="validation", p2="train", p3="test", t2only="train")
    assert gather(folder, **given, skip_broken=True).splits == {"p0": "train", "p1": "validation", "p3": "test"}


def test_bad_splits_are_refused(brats, course_root):
    folder = brats()
    assert "nobody" in refused(folder, **stated(folder, p0="train", p1="validation", nobody="test"))
    assert "split test" in refused(folder, **stated(folder, p0="train", p1="validation"))
    assert "nowhere.csv" in refused(folder, splits="nowhere.csv")


@pytest.fixture
def read(monkeypatch):
    """The names of the files that are read."""
    names, really = [], volumes.read

    def counted(path, **options):
        names.append(Path(path).name)
        return really(path, **options)

    monkeypatch.setattr(volumes, "read", counted)
    return names


def test_good_files_are_examined_once_and_changed_ones_again(brats, course_root, read):
    folder = brats()
    first = gather(folder)
    assert len(read) == 8
    read.clear()
    assert gather(folder) == first
    assert read == []

    os.utime(scan(folder / "p3"))
    assert gather(folder) == first
    assert set(read) == {"p3_flair.nii.gz", "p3_seg.nii.gz"}

    changed(scan(folder / "p1"), lambda v: v * 2)
    read.clear()
    assert gather(folder).facts["p1"]["checksums"] != first.facts["p1"]["checksums"]
    assert set(read) == {"p1_flair.nii.gz", "p1_seg.nii.gz"}


def test_a_broken_file_is_never_remembered_as_good(brats, course_root, read):
    folder = brats()
    cut(scan(folder / "p1"))
    assert refused(folder) == refused(folder)
    assert read.count("p1_flair.nii.gz") == 2
    assert read.count("p0_flair.nii.gz") == 1


def test_a_changed_declaration_is_examined_again(brats, course_root):
    folder = brats()
    gather(folder)
    participants("p1\t1")(folder / "p1")
    assert "declared healthy" in refused(folder)


@pytest.mark.parametrize("rubbish", [b"", b"{", b"[]", b"null", b"\xff\xfe"])
def test_a_broken_memory_is_forgotten(brats, course_root, rubbish, read):
    folder = brats()
    first = gather(folder)
    records = sorted((course_root / "data" / "examined").iterdir())
    assert len(records) == 4
    records[0].write_bytes(rubbish)
    read.clear()
    assert gather(folder) == first
    assert len(read) == 2


def test_facts_are_true(brats, course_root):
    facts = gather(brats()).facts["p3"]
    assert facts["brain_litres"] == pytest.approx(1.307, rel=0.02)
    assert facts["lesion_ml"] == pytest.approx(4 / 3 * np.pi * 2**3, rel=0.1)
    assert facts["lesion_outside_brain_ml"] == 0
    np.testing.assert_allclose(facts["extent_mm"], (130, 160, 120), atol=5)
    assert json.loads(json.dumps(facts)) == facts


def test_one_lesion_voxel_of_a_tenth_of_a_microlitre_is_a_lesion(tmp_path):
    voxels = np.zeros((4, 4, 4), np.float32)
    voxels[2, 2, 2] = 1
    record = {"problems": []}
    subject = intake.Subject("s", {}, tmp_path / "s_seg.nii", None)
    lesion = volumes.Volume(voxels, np.diag([0.4, 0.4, 0.4, 1]))
    examination._look_at_lesion(record, subject, lesion, np.ones((4, 4, 4), bool))
    assert not intake.is_healthy(subject, record)


def test_no_folder_means_the_embedded_cohort(brats, course_root, monkeypatch):
    folder = brats()
    monkeypatch.setattr(phantom, "write_cohort", lambda place, **settings: folder)
    gathered = intake.gather(**FITS)
    assert len(gathered.subjects) == 4
    assert "embedded cohort" in gathered.notes[0]


def test_a_negative_seed_is_named():
    with pytest.raises(CourseError, match="seed is -1"):
        intake.gather(seed=-1)


def hounsfield(folder, outside=-1024):
    """The subjects of a folder as CT, brain-extracted."""
    for path in sorted(folder.glob("*/*_flair.nii.gz")):
        volume = volumes.read(path)
        units = np.where(volume.voxels > 0, 35 + (volume.voxels - 500) / 50, outside).astype(np.float32)
        volumes.write(path.with_name(path.name.replace("flair", "ct")), units, volume.affine)
    return folder


@pytest.mark.parametrize("outside", [0, -1024])
def test_ct_below_zero_is_no_z_score(brats, course_root, outside):
    gathered = gather(hounsfield(brats(), outside), modalities="CT")
    assert len(gathered.subjects) == 4
    assert gathered.facts["p3"]["brain_litres"] == pytest.approx(1.307, rel=0.02)


BAD_CT = {
    "a skull": (lambda v: np.where(np.arange(v.shape[2]) % 9 == 0, np.where(v > -500, 900, v), v), "shows a skull: 1"),
    "not Hounsfield units": (lambda v: v + 1024, "has a median of 10"),
    "hardly a brain": (
        lambda v: np.where((np.arange(v.shape[0]) < 8)[:, None, None], v, -1024),
        "litres are not background",
    ),
    "a window": (lambda v: np.clip((v + 1024) / 5, 0, 255), "has a median of 2"),
    "air alone": (lambda v: np.where(v > -500, -1000, -1024), "fewer than 16 grey"),
}


@pytest.mark.parametrize("kind", BAD_CT)
def test_a_bad_ct_is_named(brats, course_root, kind):
    folder = hounsfield(brats())
    change, said = BAD_CT[kind]
    changed(folder / "p1" / "p1_ct.nii.gz", change)
    what = refused(folder, modalities="CT", extraction="never")
    assert "1 of 4 subjects" in what
    assert said in what


def test_a_mask_may_be_stored_with_its_axes_turned(brats, course_root):
    folder = brats()
    lesion = volumes.read(mask(folder / "p1"))
    flipped = lesion.affine @ np.diag([-1, 1, 1, 1])
    flipped[:3, 3] += lesion.affine[:3, 0] * (lesion.voxels.shape[0] - 1)
    volumes.write(mask(folder / "p1"), lesion.voxels[::-1], flipped)
    assert gather(folder).facts["p1"]["lesion_outside_brain_ml"] == 0
