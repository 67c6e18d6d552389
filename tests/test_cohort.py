"""Cohort: the same input is the same bytes under the same hash, whole or refused, and hands out healthy slices only."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest

from lib import cohort, intake, intensities, preparation, volumes
from lib.cohort import GUARD, open_cohort
from lib.errors import CourseError
from lib.intake import HEALTHY, LESION_FREE
from lib.preparation import prepare_cohort
from lib.preprocessing import Recipe

FITS = {"size": 48, "pixel_mm": 4.0}
RECIPE = Recipe(**FITS)


def gather(folder, **options):
    return intake.gather(str(folder), **FITS | options)


def contents(folder):
    """Every file but those of a preparation that was cut off."""
    files = {p.relative_to(folder): p for p in folder.rglob("*") if p.is_file()}
    return {str(name): p.read_bytes() for name, p in files.items() if not name.parts[0].startswith(".")}


@pytest.fixture
def prepared(brats, course_root):
    gathered = gather(brats())
    return gathered, prepare_cohort(gathered, RECIPE)


def test_a_prepared_cohort_opens_as_it_was_gathered(prepared):
    gathered, folder = prepared
    opened = open_cohort(folder)
    assert opened.hash == folder.name
    assert opened.modalities == ("FLAIR",)
    assert opened.size == 48
    assert opened.training == LESION_FREE
    assert {s.id: s.split for s in opened.subjects} == gathered.splits
    assert [s.id for name in ("train", "validation", "test") for s in opened.split(name)] == sorted(
        gathered.splits, key=lambda s: (("train", "validation", "test").index(gathered.splits[s]), s)
    )
    for subject in opened.subjects:
        assert subject.image.dtype == np.float16
        assert subject.image.shape == (1, *subject.brain.shape)
        assert subject.brain.dtype == subject.lesion.dtype == bool
        assert all(isinstance(a, np.memmap) for a in (subject.image, subject.brain, subject.lesion))
        assert nibabel.aff2axcodes(subject.affine) == ("R", "A", "S")
        np.testing.assert_allclose(subject.voxel_mm, (4, 4, 5))
        assert subject.facts["prepared_lesion_ml"] == pytest.approx(subject.facts["lesion_ml"], rel=0.25)


def test_the_same_input_is_the_same_cohort_wherever_it_lies(brats, course_root):
    one = prepare_cohort(gather(brats(name="one")), RECIPE)
    kept = contents(one)
    shutil.rmtree(one)
    two = prepare_cohort(gather(brats(name="two")), RECIPE)
    assert two == one
    assert contents(two) == kept


def test_a_broken_scan_does_not_bring_the_folder_into_the_hash(brats, course_root):
    hashes = set()
    for name in ("one", "two"):
        folder = brats(name=name)
        (folder / "p0" / "p0_flair.nii.gz").write_bytes(b"")
        hashes.add(prepare_cohort(gather(folder, skip_broken=True), RECIPE).name)
    assert len(hashes) == 1


def rewritten(path, change, move=(0, 0, 0)):
    volume = volumes.read(path)
    affine = volume.affine.copy()
    affine[:3, 3] += move
    volumes.write(path, change(volume.voxels), affine)


def brighter(folder):
    rewritten(folder / "p1" / "p1_flair.nii.gz", lambda v: v + 2 * (v > 0))


def smaller_lesion(folder):
    rewritten(folder / "p1" / "p1_seg.nii.gz", lambda v: v * (np.arange(v.shape[0]) % 2)[:, None, None])


def moved_lesion(folder):
    rewritten(folder / "p1" / "p1_seg.nii.gz", lambda v: np.roll(v, 1, axis=0))


def moved_scan(folder):
    for path in (folder / "p1").iterdir():
        rewritten(path, np.asarray, (3, 0, 0))


@pytest.mark.parametrize("change", [brighter, smaller_lesion, moved_lesion, moved_scan])
def test_other_voxels_masks_or_places_are_another_cohort(brats, course_root, change):
    folder = brats()
    before = prepare_cohort(gather(folder, seed=0), RECIPE)
    assert prepare_cohort(gather(folder), RECIPE) == before
    change(folder)
    given = gather(folder)
    assert prepare_cohort(given, RECIPE) != before


def test_another_recipe_or_split_is_another_cohort(prepared):
    gathered, folder = prepared
    swapped = {"train": "test", "test": "train", "validation": "validation"}
    others = [
        prepare_cohort(gathered, replace(RECIPE, clahe=True)),
        prepare_cohort(gathered, replace(RECIPE, slice_mm=6.0)),
        prepare_cohort(replace(gathered, splits={s: swapped[n] for s, n in gathered.splits.items()}), RECIPE),
    ]
    assert len({folder, *others}) == 4


def test_what_was_left_out_stands_in_the_manifest(brats, course_root):
    folder = brats(patients=5)
    (folder / "p4" / "p4_flair.nii.gz").write_bytes(b"")
    opened = open_cohort(prepare_cohort(gather(folder, skip_broken=True), RECIPE))
    assert [one["subject"] for one in opened.manifest["left_out"]] == ["p4"]
    assert "p4_flair.nii.gz is empty" in opened.manifest["left_out"][0]["why"]


def test_what_is_prepared_is_not_made_again(prepared, monkeypatch):
    gathered, folder = prepared
    monkeypatch.setattr(preparation, "prepare", lambda *_: pytest.fail("prepared again"))
    assert prepare_cohort(gathered, RECIPE) == folder


def lost_subject(folder):
    shutil.rmtree(folder / "p1")


def killed(folder):
    """What a kill leaves: some subjects, half of another under its temporary name, and no manifest."""
    (folder / "manifest.json").unlink()
    shutil.rmtree(folder / "p2")
    (folder / "p1").rename(folder / ".p1-0123")
    (folder / ".p1-0123" / "facts.json").unlink()


def half_subject(folder):
    (folder / "p1" / "facts.json").unlink()
    (folder / "p1" / "image.npy").unlink()


@pytest.mark.parametrize("damage", [killed, lost_subject, half_subject])
def test_an_interrupted_preparation_is_completed_byte_for_byte(prepared, damage):
    gathered, folder = prepared
    whole = contents(folder)
    damage(folder)
    with pytest.raises(CourseError):
        open_cohort(folder)
    assert prepare_cohort(gathered, RECIPE) == folder
    assert contents(folder) == whole


def test_a_preparation_that_is_killed_leaves_whole_subjects(brats, course_root, monkeypatch):
    gathered = gather(brats())
    really = preparation.prepare

    def dies_at_third(*arguments, count=[]):  # noqa: B006 (it counts its calls)
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt
        return really(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(preparation, "prepare", dies_at_third)
        with pytest.raises(KeyboardInterrupt):
            prepare_cohort(gathered, RECIPE)
    (folder,) = (p for p in (course_root / "data" / "prepared").iterdir() if p.is_dir())
    assert sorted(p.name for p in folder.iterdir()) == ["p0", "p1"]
    assert open_cohort(prepare_cohort(gathered, RECIPE)).hash == folder.name


def test_threads_that_prepare_at_once_do_not_clash(brats, course_root):
    gathered = gather(brats())
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: prepare_cohort(gathered, RECIPE), range(4)))
    (folder,) = folders
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", "p0", "p1", "p2", "p3"]
    assert len(open_cohort(folder).subjects) == 4


def test_processes_that_prepare_at_once_do_not_clash(brats, course_root, tmp_path):
    script = (
        "import sys; from pathlib import Path; import lib; from lib import intake, preparation\n"
        "from lib.preprocessing import Recipe\n"
        "lib.ROOT = Path(sys.argv[2])\n"
        "gathered = intake.gather(sys.argv[1], size=48, pixel_mm=4.0)\n"
        "print(preparation.prepare_cohort(gathered, Recipe(size=48, pixel_mm=4.0)))\n"
    )
    folder = brats()
    call = [sys.executable, "-c", script, str(folder), str(tmp_path / "shared")]
    started = [
        subprocess.Popen(call, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    said = {process.communicate()[0].splitlines()[-1] for process in started}
    assert [process.returncode for process in started] == [0, 0]
    (place,) = said
    assert contents(Path(place)) == contents(prepare_cohort(gather(folder), RECIPE))


def damage_with(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def shorten(name):
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - 100)


def other_shape(folder):
    np.save(folder / "p1" / "lesion.npy", np.zeros((3, 48, 48), bool))


def other_format(folder):
    manifest = json.loads((folder / "manifest.json").read_bytes())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 0}))


DAMAGES = {
    "no folder": shutil.rmtree,
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "empty manifest": damage_with("manifest.json", b""),
    "half a manifest": shorten("manifest.json"),
    "a manifest of something else": damage_with("manifest.json", b"[1]"),
    "an older format": other_format,
    "no subject": lost_subject,
    "no image": lambda folder: (folder / "p1" / "image.npy").unlink(),
    "empty image": damage_with("p1/image.npy", b""),
    "short image": shorten("p1/image.npy"),
    "rubbish": damage_with("p1/brain.npy", b"rubbish"),
    "another shape": other_shape,
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_cohort_is_refused(prepared, tmp_path, kind):
    _, folder = prepared
    copy = shutil.copytree(folder, tmp_path / "copy")
    DAMAGES[kind](copy)
    with pytest.raises(CourseError) as caught:
        open_cohort(copy)
    assert str(copy) in caught.value.what
    assert "01_preprocessing" in caught.value.cure


def test_a_run_finds_its_cohort(prepared):
    gathered, folder = prepared
    cohort.announce("mine", folder, gathered)
    assert cohort.of_run("mine").hash == folder.name
    with pytest.raises(CourseError, match="'yours'"):
        cohort.of_run("yours")


def test_slices_of_patients_keep_their_distance_from_lesions(prepared):
    _, folder = prepared
    opened = open_cohort(folder)
    for name in ("train", "validation"):
        for item in (slices := opened.slices(name)):
            subject = next(s for s in opened.subjects if s.id == item["subject"])
            assert subject.split == name
            with_lesion = np.flatnonzero(subject.lesion.any(axis=(1, 2)))
            assert abs(with_lesion - item["slice"]).min() > GUARD
        assert len(slices) > 0


def test_slices_use_all_that_is_healthy(prepared):
    _, folder = prepared
    subject = open_cohort(folder).subjects[0]
    with_lesion = np.flatnonzero(subject.lesion.any(axis=(1, 2)))
    far = [abs(with_lesion - i).min() > GUARD for i in range(len(subject.brain))]
    np.testing.assert_array_equal(subject.lesion_free, far & subject.brain.any(axis=(1, 2)))


def test_with_healthy_subjects_no_slice_is_of_a_patient(brats, course_root):
    opened = open_cohort(prepare_cohort(gather(brats(patients=3, healthy=5)), RECIPE))
    assert opened.training == HEALTHY
    for name in ("train", "validation"):
        items = list(opened.slices(name))
        assert {item["subject"] for item in items} == {s.id for s in opened.split(name)}
        assert all(item["subject"].startswith("h") and not item["lesion"].any() for item in items)


def test_patients_that_a_file_puts_into_training_stay_out_where_others_are_healthy(brats, course_root, tmp_path):
    path = tmp_path / "splits.csv"
    path.write_text("subject,split\nh0,train\np0,train\nh1,validation\np1,test\n")
    opened = open_cohort(prepare_cohort(gather(brats(patients=2, healthy=2), splits=str(path)), RECIPE))
    assert {item["subject"] for item in opened.slices("train")} == {"h0"}


def test_an_item_is_what_the_arrays_hold(prepared):
    _, folder = prepared
    opened = open_cohort(folder)
    item = opened.slices("train")[3]
    subject = next(s for s in opened.subjects if s.id == item["subject"])
    assert item["image"].dtype == np.float32
    np.testing.assert_array_equal(item["image"], subject.image[:, item["slice"]].astype(np.float32))
    np.testing.assert_array_equal(item["brain"], subject.brain[item["slice"]])


def test_slices_with_hardly_any_brain_are_left_out(prepared):
    _, folder = prepared
    opened = open_cohort(folder)
    assert all(item["brain"].mean() >= cohort.LEAST_BRAIN for item in opened.slices("train"))
    assert opened.subjects[0].brain[0].mean() < cohort.LEAST_BRAIN


def test_a_split_without_healthy_slices_is_refused(brats, write_subject, course_root):
    folder = brats(patients=0)
    for i in range(3):
        write_subject(folder / f"big{i}", seed=i, radius_mm=58)
    opened = open_cohort(prepare_cohort(gather(folder), RECIPE))
    with pytest.raises(CourseError, match="train has no healthy slice"):
        opened.slices("train")


def test_more_subjects_than_files_may_be_open(prepared, monkeypatch):
    _, folder = prepared
    resource = pytest.importorskip("resource")
    opened = open_cohort(folder)
    many = replace(opened, subjects=tuple(copies(opened.subjects[0], folder.parent / "many", 150)))
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/dev/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + cohort.OPEN_ARRAYS + 30, before[1]))
    try:
        assert len({item["subject"] for item in many.slices(many.subjects[0].split)}) == 150
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def copies(subject, place, count):
    for i in range(count):
        folder = place / f"{i}"
        shutil.copytree(subject.folder, folder)
        yield replace(subject, id=f"{i}", folder=folder)


def peak_bytes(gathered):
    tracemalloc.start()
    prepare_cohort(gathered, RECIPE)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_memory_does_not_grow_with_the_number_of_scans(brats, course_root, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    few, many = gather(brats(patients=3, name="few")), gather(brats(patients=9, name="many"))
    prepare_cohort(few, replace(RECIPE, clahe=True))  # what is loaded once is loaded now
    assert peak_bytes(many) < 1.2 * peak_bytes(few)


def test_workers_prepare_the_same_as_one_process(brats, course_root, monkeypatch):
    gathered = gather(brats(patients=8))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    folder = prepare_cohort(gathered, RECIPE)
    whole = contents(folder)
    shutil.rmtree(folder)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    assert contents(prepare_cohort(gathered, RECIPE)) == whole


def test_an_error_reaches_people_from_a_worker():
    error = pickle.loads(pickle.dumps(CourseError("What.", "Cure.")))
    assert (error.what, error.cure) == ("What.", "Cure.")


def test_a_lesion_lost_in_resampling_still_guards_its_slices(write_subject, tmp_path, course_root):
    folder = tmp_path / "tiny"
    for i in range(3):
        write_subject(folder / f"p{i}", seed=i, radius_mm=4.0)
    gathered = gather(str(folder))
    subject = open_cohort(prepare_cohort(gathered, Recipe(pixel_mm=8.0, size=32))).subjects[0]
    assert not subject.lesion.any()
    assert gathered.facts[subject.id]["lesion_ml"] > 0
    touched = subject.facts["lesion_slices"]
    assert touched
    assert not subject.lesion_free[min(touched) - GUARD : max(touched) + GUARD + 1].any()
    assert subject.lesion_free.any()


def standard_of(folder, way, **options):
    return open_cohort(prepare_cohort(gather(folder, **options), replace(RECIPE, normalisation=way))).manifest[
        "standard"
    ]


@pytest.mark.parametrize("way", intensities.STANDARDS)
def test_a_standard_is_learnt_from_the_training_split_alone_and_from_no_lesion(brats, course_root, tmp_path, way):
    folder = brats(patients=5)
    splits = tmp_path / "splits.csv"
    splits.write_text("subject,split\np0,train\np1,train\np2,validation\np3,test\np4,test\n")
    before = standard_of(folder, way, splits=str(splits))
    for name in ("p2", "p3"):
        rewritten(folder / name / f"{name}_flair.nii.gz", lambda v: np.where(v > 600, 2 * v, v))
    lesion = volumes.read(folder / "p0" / "p0_seg.nii.gz").voxels > 0
    rewritten(folder / "p0" / "p0_flair.nii.gz", lambda v: np.where(lesion, v + 500, v))
    again = standard_of(folder, way, splits=str(splits))
    assert again["FLAIR"] == pytest.approx(before["FLAIR"], abs=2e-6)
    assert len(before["FLAIR"]) == len(intensities.STANDARDS[way])
    rewritten(folder / "p1" / "p1_flair.nii.gz", lambda v: np.where(v > 600, 2 * v, v))
    after = standard_of(folder, way, splits=str(splits))
    assert np.abs(np.subtract(after["FLAIR"], before["FLAIR"])).max() > 0.01


@pytest.mark.parametrize("way", intensities.STANDARDS)
def test_a_new_scan_gets_the_cohort_s_standard(brats, course_root, way):
    folder = brats()
    recipe = replace(RECIPE, normalisation=way)
    opened = open_cohort(prepare_cohort(gather(folder), recipe))
    one = opened.subjects[0]
    scan = {"FLAIR": folder / one.id / f"{one.id}_flair.nii.gz"}
    alone = preparation.prepare_scan(scan, recipe, standard=opened.manifest["standard"])
    np.testing.assert_array_equal(alone.image, one.image)
    other = {"FLAIR": [v**2 for v in opened.manifest["standard"]["FLAIR"]]}
    assert (preparation.prepare_scan(scan, recipe, standard=other).image != one.image).any()
    with pytest.raises(CourseError, match="need a standard"):
        preparation.prepare_scan(scan, recipe)


def test_a_registered_cohort_keeps_its_transforms_and_names_the_doubtful(brats, course_root):
    pytest.importorskip("SimpleITK", reason="SimpleITK is not installed: pip install -r requirements-extra.txt")
    folder = brats(patients=3)
    gathered = gather(folder)
    recipe = replace(RECIPE, size=64, register="affine", slice_mm=4.0)
    opened = open_cohort(prepare_cohort(gathered, recipe))
    plain = open_cohort(prepare_cohort(gathered, RECIPE))
    assert opened.hash != plain.hash
    for subject, before in zip(opened.subjects, plain.subjects, strict=True):
        assert subject.facts["template_dice"] > 0.8
        scale = np.linalg.det(subject.to_template[:3, :3])
        assert subject.voxel_mm3 == pytest.approx(64 / scale)
        assert subject.facts["prepared_lesion_ml"] == pytest.approx(before.facts["lesion_ml"], rel=0.2)
        assert (subject.own_grid().lesion == before.own_grid().lesion).all()
        assert before.facts["template_dice"] is None
        assert (before.to_template == np.eye(4)).all()
    assert cohort.registration_notes(plain) == []
    facts = opened.subjects[0].facts | {"template_dice": 0.5}
    doubtful = replace(opened, subjects=(replace(opened.subjects[0], facts=facts), *opened.subjects[1:]))
    (note,) = cohort.registration_notes(doubtful)
    assert note.startswith(opened.subjects[0].id)
    cohort.announce("registered", opened.folder, gathered)
    assert cohort.of_run("registered").hash == opened.hash


def test_a_scan_prepared_alone_is_registered_alike(brats, course_root):
    pytest.importorskip("SimpleITK", reason="SimpleITK is not installed: pip install -r requirements-extra.txt")
    folder = brats(patients=3)
    recipe = replace(RECIPE, size=64, register="rigid", slice_mm=4.0)
    one = open_cohort(prepare_cohort(gather(folder), recipe)).subjects[0]
    alone = preparation.prepare_scan({"FLAIR": folder / one.id / f"{one.id}_flair.nii.gz"}, recipe)
    np.testing.assert_array_equal(alone.image, one.image)
    np.testing.assert_array_equal(alone.to_template, one.to_template)
