"""A scan comes in as its file has it, and its map goes out on the same grid; what cannot be told is said."""

import json
import re
import shutil
import sys
from base64 import b64decode
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import nibabel
import numpy as np
import pytest
from conftest import simulate
from PIL import Image
from scipy import ndimage
from skimage.io import imsave

import lib
from lib import (
    cohort,
    detect,
    detection,
    dicom,
    evaluation,
    intake,
    pictures,
    preparation,
    preprocessing,
    scan_page,
    scoring,
    volumes,
)
from lib.components import bounding_box
from lib.errors import CourseError
from lib.preprocessing import OwnGrid, Recipe

REAL = Path(__file__).parents[2] / "shared" / "data"
RUN, METHOD = "study", "intensity"
ORIENTATIONS = ("RAS", "LPS", "PIR", "SAL")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A course folder of this module's own."""
    place = tmp_path_factory.mktemp("course")
    with pytest.MonkeyPatch.context() as patch:
        for name, module in list(sys.modules.items()):
            if name.split(".")[0] == "lib" and hasattr(module, "ROOT"):
                patch.setattr(module, "ROOT", place)
        yield place


@pytest.fixture(scope="module")
def make_run(root, tmp_path_factory, write_subject):
    """`make_run(name, modalities)` prepares a cohort of healthy subjects and 2 patients, and fits the detectors."""

    def make(name, modalities=("FLAIR",), healthy=4, incomplete=False, **steps):
        scans = tmp_path_factory.mktemp(name)
        for i in range(healthy):
            write_subject(scans / f"h{i}", 100 + i, modalities, 0)
        for i in range(2):
            write_subject(scans / f"p{i}", i, modalities[:1] if incomplete and i else modalities)
        wanted = ",".join(modalities)
        gathered = intake.gather(str(scans), modalities=wanted, size=48, pixel_mm=5.0, incomplete=incomplete)
        folder = preparation.prepare_cohort(gathered, Recipe(modalities, 5.0, 0.0, 48, **steps))
        cohort.announce(name, folder, gathered)
        for method in (METHOD, "blur"):
            scoring.run_detector(method, cohort.of_run(name), name)
        return lib.run_folder(name)

    return make


@pytest.fixture(scope="module")
def run(make_run):
    return make_run(RUN, healthy=9)


@pytest.fixture(scope="module")
def scan(tmp_path_factory, write_subject):
    """A patient that no cohort has; its lesion lies on the right."""
    return write_subject(tmp_path_factory.mktemp("new") / "new", 7, ("FLAIR",)) / "new_flair.nii.gz"


@pytest.fixture(scope="module")
def found(run, scan):
    return detection.detect({"FLAIR": scan}, run, METHOD)


def turned(path, towards):
    """A scan with its axes turned, and its truth."""
    image, lesion = nibabel.load(path), nibabel.load(path.with_name("new_seg.nii.gz"))
    turn = nibabel.orientations.ornt_transform(
        nibabel.io_orientation(image.affine), nibabel.orientations.axcodes2ornt(towards)
    )
    return image.as_reoriented(turn), lesion.as_reoriented(turn)


def dice(one, other):
    return 2 * (one & other).sum() / (one.sum() + other.sum())


@pytest.mark.parametrize("towards", ORIENTATIONS)
def test_a_lesion_comes_back_to_its_place_whichever_way_the_axes_point(towards, run, scan, tmp_path):
    image, lesion = turned(scan, towards)
    affine = nibabel.affines.from_matvec(rotation(0.2), (5, -9, 3)) @ image.affine
    path = tmp_path / "turned_flair.nii.gz"
    volumes.write(path, np.asarray(image.dataobj), affine)
    result = detection.detect({"FLAIR": path}, run, METHOD, threshold=0.8)
    truth = np.asarray(lesion.dataobj) > 0
    assert result.anomaly.shape == image.shape
    np.testing.assert_allclose(result.affine, affine, atol=1e-4)
    assert dice(result.mask(), truth) > 0.9
    assert dice(result.brain, np.asarray(image.dataobj) > 0) > 0.99
    (largest, *_) = result.components()
    centre = nibabel.affines.apply_affine(affine, np.argwhere(truth).mean(axis=0))
    np.testing.assert_allclose(largest["centre_mm"], centre, atol=2)
    assert largest["side"] == "right"


def test_a_run_that_registers_and_learns_a_standard_maps_a_new_scan_on_its_own_grid(make_run, scan, tmp_path):
    pytest.importorskip("SimpleITK", reason="SimpleITK is not installed: pip install -r requirements-extra.txt")
    run = make_run("registered", healthy=3, register="affine", normalisation="nyul")
    image = nibabel.load(scan)
    askew = nibabel.affines.from_matvec(rotation(0.4), (12, -30, 9)) @ image.affine
    path = tmp_path / "askew_flair.nii.gz"
    volumes.write(path, np.asarray(image.dataobj), askew)
    result = detection.detect({"FLAIR": path}, run, METHOD, threshold=0.9)
    assert result.anomaly.shape == image.shape
    np.testing.assert_allclose(result.affine, askew, atol=1e-4)
    there = nibabel.affines.apply_affine(askew @ np.linalg.inv(image.affine), (25, 10, 5))
    assert np.linalg.norm(np.subtract(result.components()[0]["centre_mm"], there)) < 5
    assert result.brain.sum() == (np.asarray(image.dataobj) > 0).sum()


def rotation(angle):
    return np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])


def test_a_lesion_on_the_left_stays_on_the_left(run, scan, tmp_path):
    image, affine = nibabel.load(scan), nibabel.load(scan).affine
    path = tmp_path / "left_flair.nii.gz"
    volumes.write(path, np.asarray(image.dataobj)[::-1], affine)  # a symmetric box about x = 0
    result = detection.detect({"FLAIR": path}, run, METHOD, threshold=0.8)
    assert result.components()[0]["side"] == "left"
    assert result.components()[0]["centre_mm"][0] < -15


@pytest.mark.parametrize("voxel_mm", [(1.0, 1.0, 1.0), (0.9, 1.1, 3.0)])
def test_a_mask_makes_the_round_trip_through_a_coarser_grid(voxel_mm):
    shape = np.round(np.array([160, 180, 140]) / voxel_mm).astype(int)
    mm = np.moveaxis(np.indices(shape), 0, -1) * voxel_mm - np.array([80, 90, 70])
    brain = ((mm / (65, 80, 60)) ** 2).sum(axis=-1) <= 1
    lesion = ((mm - (-20, 15, 5)) ** 2).sum(axis=-1) <= 12**2
    affine = np.diag([-voxel_mm[0], -voxel_mm[1], voxel_mm[2], 1])
    scan, truth = (volumes.Volume(m.astype(np.float32), affine) for m in (brain, lesion))
    prepared = preprocessing.prepare({"FLAIR": scan}, truth, Recipe(pixel_mm=2.0, size=96))
    step, start = prepared.own.within(prepared.affine)
    back = preprocessing.resampled(prepared.lesion, prepared.brain, step, start, prepared.own.brain.shape)
    placed = prepared.own.placed(back, brain.shape, affine)
    assert dice(placed >= 0.5, lesion) > 0.9
    np.testing.assert_array_equal(prepared.own.placed(prepared.own.brain, brain.shape, affine), brain)


def test_values_are_put_back_where_they_were_cut_out():
    whole = np.random.default_rng(0).random((5, 6, 7))
    for codes in ORIENTATIONS:
        turn = nibabel.orientations.ornt_transform([[0, 1], [1, 1], [2, 1]], nibabel.orientations.axcodes2ornt(codes))
        affine = np.diag([2, 3, 4, 1]) @ nibabel.orientations.inv_ornt_aff(turn, (5, 6, 7))
        cut = OwnGrid(None, None, np.diag([2, 3, 4, 1]) @ nibabel.affines.from_matvec(np.eye(3), (1, 2, 3)))
        stored = nibabel.apply_orientation(whole, turn)
        placed = cut.placed(whole[1:3, 2:5, 3:7].transpose(2, 1, 0), stored.shape, affine)
        box = np.zeros_like(whole, bool)
        box[1:3, 2:5, 3:7] = True
        np.testing.assert_array_equal(placed, stored * nibabel.apply_orientation(box, turn))


def test_the_threshold_is_the_frozen_one_and_is_kept(make_run, scan, monkeypatch):
    run = make_run("kept")
    code = evaluation.frozen_threshold("kept", METHOD, cohort.of_run("kept"))
    first = detection.detect({"FLAIR": scan}, run, METHOD)
    assert first.threshold == evaluation.value_of(code)
    assert first.promised == 0.01
    shutil.rmtree(run / "maps")
    again = detection.detect({"FLAIR": scan}, run, METHOD)
    assert again.threshold == first.threshold
    model = run / "models" / f"{METHOD}.safetensors"
    detector = detection.models.load(model)
    detector.state = lambda: {"other": detection.models.detector.torch.zeros(1)}
    detector.save(model)
    with pytest.raises(CourseError, match="of another cohort or model"):
        detection.detect({"FLAIR": scan}, run, METHOD)
    own = detection.detect({"FLAIR": scan}, run, METHOD, threshold=0.5)
    assert (own.threshold, own.promised, own.summary()["threshold_from"]) == (0.5, None, "given")


def test_a_run_that_may_only_be_read_is_enough(run, scan, monkeypatch):
    kept = [run / "training.json", run / "models" / f"{METHOD}.threshold.json"]
    for path in kept:
        path.unlink(missing_ok=True)

    def refuse(path, content):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(detection.volumes, "write_bytes", refuse)
    assert np.isfinite(detection.detect({"FLAIR": scan}, run, METHOD).threshold)
    assert not any(path.exists() for path in kept)


def test_the_map_is_that_of_the_detector_and_0_outside_the_brain(found):
    detector = detection.models.load(found.run / "models" / f"{METHOD}.safetensors")
    np.testing.assert_allclose(found.prepared, detector.maps(found.subject), atol=1e-3)
    assert not found.anomaly[~found.brain].any()
    assert (found.anomaly.dtype, found.brain.dtype) == (np.float32, bool)
    assert set(found.seconds) >= {"model", "preparation", "map"}


def test_the_summary_counts_what_the_mask_shows(found):
    summary = found.summary(0.8)
    mask = found.mask(0.8)
    label, number = ndimage.label(mask, np.ones((3, 3, 3)))
    sizes = sorted(np.bincount(label.ravel())[1:] * 0.125, reverse=True)
    assert summary["found_ml"] == pytest.approx(mask.sum() * 0.125)
    assert summary["brain_ml"] == pytest.approx(found.brain.sum() * 0.125)
    assert [one["ml"] for one in summary["largest"]] == pytest.approx(sizes[:20])
    assert summary["components"] == number
    assert summary["largest"][0]["highest"] == found.anomaly.max()
    assert (summary["promised_fpr"], summary["threshold_from"]) == (None, "given")
    assert found.summary()["threshold_from"].startswith("1 %")
    assert found.summary(99)["largest"] == []
    assert "not for diagnosis" in summary["note"]


def test_what_is_written_lies_on_the_scan_s_grid_and_the_page_loads_nothing(found, scan, tmp_path):
    paths = detection.write(found, tmp_path / "deep" / "out")
    assert sorted(p.name for p in paths) == sorted(p.name for p in (tmp_path / "deep" / "out").iterdir())
    original = nibabel.load(scan)
    for name in ("anomaly", "mask"):
        image = nibabel.load(tmp_path / "deep" / "out" / f"{name}.nii.gz")
        assert image.shape == original.shape
        np.testing.assert_allclose(image.affine, original.affine, atol=1e-4)
    np.testing.assert_array_equal(np.asarray(image.dataobj) > 0, found.mask())
    summary = json.loads((tmp_path / "deep" / "out" / "summary.json").read_text())
    assert summary == json.loads(json.dumps(found.summary()))
    page = (tmp_path / "deep" / "out" / "report.html").read_text()
    assert "not for diagnosis" in page
    assert not any(f'{tag}="http' in page for tag in ("src", "href"))
    assert page.count("data:image/png") == 3


def test_the_page_has_every_slice_without_and_with_what_is_found(found, tmp_path):
    page = detection.write(found, tmp_path / "out")[3].read_text()
    sprites = [
        np.asarray(Image.open(BytesIO(b64decode(code)))) for code in re.findall(r"image/jpeg;base64,([^)]+)", page)
    ]
    columns, rows = (int(re.search(rf"{name} = (\d+)", page)[1]) for name in ("columns", "rows"))
    box = bounding_box(np.asarray(found.subject.brain))
    image, marked = found.subject.image[0][box], (found.prepared >= found.threshold)[box] & found.subject.brain[box]
    tiles = [sprite.reshape(rows, sprite.shape[0] // rows, columns, -1, 3).swapaxes(1, 2) for sprite in sprites]
    scan, over = (tile.reshape(-1, *tile.shape[2:]) for tile in tiles)
    bright = scan[: len(image)].mean(axis=(1, 2, 3))
    assert np.corrcoef(bright, image.mean(axis=(1, 2)))[0, 1] > 0.99
    assert not scan[len(image) :].any()
    orange = (over.astype(int) @ (1, 0, -1) > 100).sum(axis=(1, 2))[: len(image)]
    assert (orange > 20).sum() >= 1
    assert marked[orange > 20].any(axis=(1, 2)).all()


def test_a_prepared_scan_is_kept_where_it_is_asked_for(run, scan, tmp_path):
    looked = detection.detect({"FLAIR": scan}, run, METHOD, keep=tmp_path / "visit")
    assert (tmp_path / "visit") in looked.subject.folder.parents


def test_a_threshold_that_nothing_reaches_is_none(found, tmp_path):
    paths = detection.write(replace(found, threshold=float("inf")), tmp_path / "out")
    summary = json.loads(paths[2].read_text())
    assert (summary["threshold"], summary["found_ml"], summary["largest"]) == (None, 0, [])
    assert not np.asarray(nibabel.load(paths[1]).dataobj).any()
    assert "none is high enough" in paths[3].read_text()


def test_nothing_is_written_over_and_nothing_stays_half(found, tmp_path, monkeypatch):
    out = tmp_path / "out"
    detection.write(found, out)
    with pytest.raises(CourseError, match="holds a result already"):
        detection.write(found, out)
    (out / "mask.nii.gz").write_bytes(b"old")
    detection.write(found, out, overwrite=True)
    assert nibabel.load(out / "mask.nii.gz").shape == found.brain.shape
    (out / "notes.txt").write_text("mine")
    with pytest.raises(CourseError, match=r"other files, such as notes\.txt"):
        detection.write(found, out, overwrite=True)
    with pytest.raises(CourseError, match="is a file"):
        detection.write(found, out / "notes.txt")

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(scan_page, "page", stop)
    with pytest.raises(KeyboardInterrupt):
        detection.write(found, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_methods_are_those_with_a_model(run, tmp_path):
    assert detection.methods(run) == [METHOD, "blur"]
    (run / "models" / "slice_index.safetensors").write_bytes(b"")
    assert detection.methods(run) == [METHOD, "blur"]
    assert detection.methods(tmp_path) == []
    with pytest.raises(CourseError, match="It has: intensity, blur"):
        detection.check_method(run, "dae")


def test_a_scan_like_those_of_training_is_not_warned_about(run, tmp_path, write_subject):
    path = write_subject(tmp_path / "well", 150, radius_mm=0) / "well_flair.nii.gz"
    assert detection.detect({"FLAIR": path}, run, METHOD).warnings == ()


def changed(kind, scan, tmp_path):
    image = nibabel.load(scan)
    voxels, affine = np.asarray(image.dataobj).astype(np.float32), image.affine
    if kind == "intensities":
        voxels = 1000 * (voxels / voxels.max()) ** 4 + (voxels > 0)
    elif kind == "litres":
        affine = np.diag([0.75, 0.75, 0.75, 1]) @ affine
    elif kind == "voxels are":
        voxels, affine = voxels[:, :, ::2], affine @ np.diag([1, 1, 2, 1])
    path = tmp_path / f"odd_{'t1' if kind == 'seems to be T1' else 'flair'}.nii.gz"
    volumes.write(path, voxels, affine)
    return path


@pytest.mark.parametrize("kind", ["intensities", "litres", "voxels are", "seems to be T1"])
def test_a_scan_unlike_those_of_training_is_warned_about(kind, run, scan, tmp_path):
    warnings = detection.detect({"": changed(kind, scan, tmp_path)}, run, METHOD).warnings
    assert any(kind in sentence for sentence in warnings)


def test_a_modality_that_nothing_tells_is_said_to_be_assumed(run, scan, tmp_path):
    shutil.copy(scan, tmp_path / "who.nii.gz")
    result = detection.detect({"": tmp_path / "who.nii.gz"}, run, METHOD)
    assert "Nothing says which modality" in result.warnings[0]
    assert detection.detect({"FLAIR": tmp_path / "who.nii.gz"}, run, METHOD).warnings == result.warnings[1:]
    assert "stands in for FLAIR" in detection.detect({"T2": tmp_path / "who.nii.gz"}, run, METHOD).warnings[0]


def test_few_scans_of_one_kind_are_called_unlike():
    random = np.random.default_rng(0)
    called = [detection.unlike(random.normal(size=(6, 5)), random.normal(size=5)).any() for _ in range(4000)]
    assert 0.004 < np.mean(called) < 0.016
    assert detection.unlike(random.normal(size=(6, 5)), np.full(5, 50.0)).all()
    assert not detection.unlike(np.zeros((3, 5)), np.full(5, 50.0)).any()


def test_a_mask_takes_the_skull_off_whichever_way_its_axes_point(run, scan, tmp_path):
    image = nibabel.load(scan)
    voxels = np.asarray(image.dataobj)
    brain = ndimage.binary_erosion(voxels > 0, iterations=2)
    head = tmp_path / "head_flair.nii.gz"
    volumes.write(head, np.pad(voxels + 30, 8, constant_values=30).astype(np.int16), moved(image.affine, -8))
    assert "shows the whole head: the brain was extracted" in detection.detect({"FLAIR": head}, run, METHOD).warnings[0]
    mask = nibabel.Nifti1Image(np.pad(brain, 8).astype(np.uint8), moved(image.affine, -8))
    mask = mask.as_reoriented([[1, -1], [0, 1], [2, -1]])
    volumes.write(tmp_path / "mask.nii.gz", np.asarray(mask.dataobj), mask.affine)
    result = detection.detect({"FLAIR": head}, run, METHOD, brain=tmp_path / "mask.nii.gz")
    np.testing.assert_array_equal(result.brain, np.pad(brain, 8))
    with pytest.raises(CourseError, match="another grid"):
        detection.detect({"FLAIR": scan}, run, METHOD, brain=tmp_path / "mask.nii.gz")
    volumes.write(tmp_path / "none.nii.gz", np.zeros(voxels.shape, np.uint8), image.affine)
    with pytest.raises(CourseError, match="is 0 everywhere"):
        detection.detect({"FLAIR": scan}, run, METHOD, brain=tmp_path / "none.nii.gz")


def moved(affine, voxels):
    return affine @ nibabel.affines.from_matvec(np.eye(3), [voxels] * 3)


@pytest.fixture(scope="module")
def two(make_run):
    return make_run("two", ("FLAIR", "T2"))


def test_a_run_of_several_modalities_asks_for_each(two, tmp_path, write_subject, capsys):
    person = write_subject(tmp_path / "n", 8, ("FLAIR", "T1", "T2"))
    flair, t2 = person / "n_flair.nii.gz", person / "n_t2.nii.gz"
    assert detection.scans_of(person, two) == {"FLAIR": flair, "T2": t2}
    call = ["--run", str(two), "--method", METHOD, "--out", str(tmp_path / "out")]
    assert detect.main([str(flair), *call]) == 1
    assert "there is no T2.\nGive it by --with T2=FILE" in capsys.readouterr().err
    assert detect.main([str(flair), "--with", f"t2={t2}", *call]) == 0
    folder = detection.detect(detection.scans_of(person, two), two, METHOD)
    written = nibabel.load(tmp_path / "out" / "anomaly.nii.gz")
    np.testing.assert_array_equal(np.asarray(written.dataobj, np.float32), folder.anomaly)
    with pytest.raises(CourseError, match="Two scans are FLAIR"):
        detection.detect({"": flair, "FLAIR": t2}, two, METHOD)
    shutil.copy(flair, person / "n_t2f.nii.gz")
    with pytest.raises(CourseError, match="both claim to be FLAIR"):
        detection.scans_of(person, two)


def test_a_modality_may_be_missing_where_the_cohort_lacked_some(make_run, scan):
    run = make_run("lacking", ("FLAIR", "T2"), incomplete=True)
    result = detection.detect({"FLAIR": scan}, run, METHOD)
    assert result.subject.facts["missing"] == ["T2"]
    assert any("There is no T2" in sentence for sentence in result.warnings)


def slice_of(scan):
    image = np.asarray(nibabel.load(scan).dataobj)
    middle = image[:, ::-1, image.shape[2] // 2].T.repeat(4, axis=0).repeat(4, axis=1)
    return np.pad((255 * (middle / middle.max())).astype(np.uint8), 10)


@pytest.mark.parametrize("name", ["grey.png", "colour.PNG", "clear.png"])
def test_a_picture_is_one_slice_without_a_size(name, run, scan, tmp_path):
    image = slice_of(scan)
    stacked = {"colour.PNG": [image] * 3, "clear.png": [image] * 3 + [255 * (image > 0).astype(np.uint8)]}
    imsave(tmp_path / name, np.stack(stacked[name], axis=-1) if name in stacked else image, check_contrast=False)
    result = detection.detect({"FLAIR": tmp_path / name}, run, METHOD, threshold=0.8)
    assert result.anomaly.shape == (*image.T.shape, 1)
    assert pictures.NO_SIZE in result.warnings
    assert dice(result.mask()[..., 0], image.T > 200) > 0.8
    summary = result.summary()
    assert (summary["found_ml"], summary["largest"][0]["ml"]) == (None, None)
    written = detection.write(result, tmp_path / "out")
    assert nibabel.load(written[0]).shape == result.anomaly.shape
    assert "NaN" not in written[-1].read_text()
    extent = np.ptp(np.nonzero(result.brain.any(axis=0))[0]) + 1
    assert extent * abs(result.affine[1, 1]) == pytest.approx(pictures.BRAIN_MM)


def test_pictures_that_cannot_be_used_are_named(tmp_path):
    imsave(tmp_path / "bright.png", np.arange(64, dtype=np.uint8).reshape(8, 8) + 1, check_contrast=False)
    (tmp_path / "torn.png").write_bytes((tmp_path / "bright.png").read_bytes()[:40])
    (tmp_path / "none.jpg").write_bytes(b"")
    for name, why in (
        ("torn", "damaged"),
        ("none", "damaged"),
        ("gone", "not"),
    ):
        path = next(tmp_path.glob(f"{name}.*"), tmp_path / "gone.png")
        with pytest.raises(CourseError, match=rf"{path.name}.*{why}"):
            pictures.read(path)
    with pytest.raises(CourseError, match="No brain was found in bright"):
        preparation.prepare_scan({"FLAIR": tmp_path / "bright.png"}, Recipe())


def test_several_scans_have_folders_of_their_own_and_a_broken_one_is_refused(run, scan, tmp_path, capsys):
    (tmp_path / "torn_flair.nii.gz").write_bytes(scan.read_bytes()[:3000])
    other = tmp_path / "b" / "new_flair.nii.gz"
    other.parent.mkdir()
    shutil.copy(scan, other)
    out = tmp_path / "out"
    call = ["--run", str(run), "--method", METHOD, "--out", str(out)]
    assert detect.main([str(scan), str(tmp_path / "torn_flair.nii.gz"), str(other), *call]) == 1
    said = capsys.readouterr()
    assert sorted(path.name for path in out.iterdir()) == ["new_flair", "new_flair-2"]
    assert "torn_flair.nii.gz is truncated" in said.err
    assert "Copy or download it again." in said.err
    assert "3/3" in said.out
    assert "preparation" in said.out
    assert "Traceback" not in said.err


def test_a_fault_of_the_program_leaves_no_message_behind(run, scan, tmp_path, capsys, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("^".join(["Doe", "Jane"]))

    monkeypatch.setattr(preparation, "prepare_scan", fail)
    assert detect.main([str(scan), "--run", str(run), "--method", METHOD, "--out", str(tmp_path / "out")]) == 1
    assert "failed, with RuntimeError" in (said := capsys.readouterr().err)
    log = lib.run_folder("error.log").read_text()
    assert "in fail" in log
    assert "Doe^Jane" not in said + log


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ((), "--method"), (("--method", "dae"), "no model of 'dae'"), (("--method", METHOD, "--run", "gone"), "no run"),
        (("--method", METHOD, "--threshold", "high"), "--threshold"), (("--method", METHOD, "--modality", "X"), "'X'"),
        (("--method", METHOD, "--with", "T2"), "names no file"), (("--method", METHOD, "--device", "abacus"), "device"),
        (("again.nii", "--method", METHOD, "--mask", "m.nii"), "one scan"),
    ],
)  # fmt: skip
def test_a_call_that_cannot_start_says_why_in_two_lines(arguments, why, run, scan, tmp_path, capsys):
    rest = arguments if "--run" in arguments else (*arguments, "--run", str(run))
    assert detect.main([str(scan), *rest, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert why in said
    assert len(said.strip().splitlines()) == 2
    assert not (tmp_path / "out").exists()


def test_a_run_without_a_cohort_is_refused(tmp_path, scan, root):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / f"{METHOD}.safetensors").write_bytes(b"")
    with pytest.raises(CourseError, match="no prepared cohort"):
        detection.detect({"FLAIR": scan}, tmp_path, METHOD)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real scans of ../shared/data are not here")
def test_a_real_series_comes_back_on_its_own_geometry_and_leaves_no_name(run, tmp_path, capsys):
    series = REAL / "dicom_sag_t1"
    volume = dicom.read(series)
    half = (np.indices(volume.voxels.shape).T / np.array(volume.voxels.shape) - (0.5, 0.45, 0.5)).T
    brain = (half**2).sum(axis=0) < 0.28**2
    volumes.write(tmp_path / "mask.nii.gz", brain.astype(np.uint8), volume.affine)
    named = tmp_path / "1.3.12.2.1107.5.2.19.45152"
    named.symlink_to(series)
    call = ["--run", str(run), "--method", METHOD, "--out", str(tmp_path / "out"), "--threshold", "0.9"]
    assert detect.main([str(named), "--mask", str(tmp_path / "mask.nii.gz"), *call]) == 0
    image = nibabel.load(tmp_path / "out" / "anomaly.nii.gz")
    assert image.shape == volume.voxels.shape
    np.testing.assert_allclose(image.affine, volume.affine, atol=1e-4)
    values = np.asarray(image.dataobj)
    assert not values[~brain].any()
    inside = ndimage.binary_erosion(brain & (volume.voxels > 0), iterations=3)
    assert np.corrcoef(values[inside], volume.voxels[inside])[0, 1] > 0.7
    said = capsys.readouterr().out + (tmp_path / "out" / "report.html").read_text()
    assert "The scan seems to be T1" in said
    assert named.name not in said
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["scan"] == "scan"


@pytest.mark.skipif(not REAL.is_dir(), reason="the real scans of ../shared/data are not here")
def test_a_real_head_has_its_brain_extracted_and_its_map_on_its_own_geometry(run, tmp_path, capsys):
    series = REAL / "dicom_axial_pd"
    call = ["--run", str(run), "--method", METHOD, "--out", str(tmp_path / "out"), "--threshold", "0.9"]
    assert detect.main([str(series), *call]) == 0
    volume, image = dicom.read(series), nibabel.load(tmp_path / "out" / "anomaly.nii.gz")
    assert image.shape == volume.voxels.shape
    np.testing.assert_allclose(image.affine, volume.affine, atol=1e-4)
    litres = (np.asarray(image.dataobj) != 0).sum() * volume.millilitres / 1000
    assert 1.0 < litres < 1.7
    assert "shows the whole head: the brain was extracted from PD by a growing surface" in capsys.readouterr().out


@pytest.mark.skipif(not REAL.is_dir(), reason="the real scans of ../shared/data are not here")
def test_a_folder_of_series_gives_no_one_s_name_to_its_results(tmp_path):
    number = max(dicom.patient(REAL / "dicom_axial_pd"), key=len)
    (tmp_path / number).mkdir()
    (tmp_path / number / "PD").symlink_to(REAL / "dicom_axial_pd")
    assert preparation.name_of(tmp_path / number) == "scan"
    assert preparation.name_of(tmp_path / number / "PD") == "PD"
    assert list(detect._names([tmp_path / number, tmp_path / number / "PD", tmp_path / number])) == [
        "scan", "PD", "scan-2",
    ]  # fmt: skip


@pytest.mark.skipif(not REAL.is_dir(), reason="the real scans of ../shared/data are not here")
def test_a_real_scan_keeps_left_and_right(run):
    person = REAL / "brats" / "BraTS2021_00006"
    result = detection.detect(detection.scans_of(person, run), run, METHOD)
    image = nibabel.load(person / "BraTS2021_00006_flair.nii.gz")
    assert result.anomaly.shape == image.shape
    np.testing.assert_allclose(result.affine, image.affine)
    voxels = np.asarray(image.dataobj, np.float32)
    inside = ndimage.binary_erosion(result.brain, iterations=4)
    smooth = ndimage.gaussian_filter(voxels, 2)
    assert np.corrcoef(result.anomaly[inside], smooth[inside])[0, 1] > 0.9
    assert np.corrcoef(result.anomaly[::-1][inside], smooth[inside])[0, 1] < 0.7


def test_the_conftest_s_lesion_lies_on_the_right():
    _, lesion, affine = simulate(7)
    assert nibabel.affines.apply_affine(affine, np.argwhere(lesion).mean(axis=0))[0] > 15
