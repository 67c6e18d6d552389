"""Brains from heads: made of the template with skull, scalp, eyes and neck around it, and the real ones there are."""

import re
import shutil
import socket
from functools import lru_cache
from pathlib import Path

import nibabel
import numpy as np
import pytest
from scipy import ndimage
from skimage.io import imread

from lib import cohort, datasets, examination, extraction, intake, preparation, preprocessing, surfaces, volumes
from lib.errors import CourseError
from lib.volumes import Volume

REAL = Path(__file__).parents[2] / "shared" / "data"
real = pytest.mark.skipif(not REAL.is_dir(), reason="needs the real scans beside the repository")
EDGE = {"FLAIR": 1.3, "T1": 0.3, "T2": 1.5}  # a lesion's brightness; the brain's is about 1


@lru_cache
def head(modality="FLAIR", every=1):
    """A head of 2 mm, or of thicker slices: the scan, its brain, and a lesion of 20 mm at the brain's left edge."""
    from nilearn import datasets as bundled

    t1 = bundled.load_mni152_template(resolution=2)
    brain = bundled.load_mni152_brain_mask(resolution=2).get_fdata() > 0
    wide = [(12, 12), (12, 12), (40, 10)]
    brain, grey = np.pad(brain, wide), np.pad(t1.get_fdata(), wide)
    away = ndimage.distance_transform_edt(~brain, sampling=2)
    place = np.stack(np.indices(brain.shape), axis=-1) * 2.0
    middle = np.array([axis.mean() for axis in np.nonzero(brain)]) * 2
    tissue = {"FLAIR": 1.1 - 0.3 * grey, "T1": 0.4 + 0.7 * grey, "T2": 1.5 - 0.9 * grey}[modality]
    scan = np.where(brain, tissue, 0.0)
    scan[(away > 0) & (away <= 3)] = 1.4 if modality == "T2" else 0.25
    scan[(away > 8) & (away <= 15)] = 1.6
    neck = (np.hypot(*(place[..., :2] - middle[:2] + (0, 20)).transpose(3, 0, 1, 2)) < 55) & (place[..., 2] < 90)
    scan[neck & (away > 8)] = 0.7
    for side in (-32, 32):
        scan[np.linalg.norm(place - middle - (side, 78, -32), axis=-1) < 13] = 1.2
    lesion = brain & (np.linalg.norm(place - middle - (-62, 10, 20), axis=-1) < 20)
    scan[lesion] = EDGE[modality]
    noise = np.random.default_rng(0).normal(0, 0.03, (2, *scan.shape))
    scan = 300 * np.hypot(ndimage.gaussian_filter(scan, 0.5) + noise[0], noise[1])
    affine = np.diag([2.0, 2.0, 2.0 * every, 1.0])
    if every > 1:
        scan, brain, lesion = (
            ndimage.uniform_filter1d(one * 1.0, every, axis=2)[..., ::every] for one in (scan, brain, lesion)
        )
    return Volume(scan.astype(np.float32), affine), brain > 0.5, lesion > 0.5


def dice(one, other):
    return 2 * (one & other).sum() / (one.sum() + other.sum())


@pytest.mark.parametrize(("modality", "every"), [("FLAIR", 1), ("FLAIR", 3), ("T1", 3), ("T2", 3)])
def test_the_brain_is_found_and_the_lesion_at_its_edge_stays_in(modality, every):
    scan, brain, lesion = head(modality, every)
    assert extraction.shows_head(scan, modality)
    found = extraction.brain(scan, modality, extraction.SURFACE)
    assert dice(found, brain) > 0.88
    least = 0.9 if modality == "T1" else 0.97  # there it is as dark as the fluid outside
    assert (found & lesion).sum() >= least * lesion.sum()


def test_the_mask_lies_on_the_scan_s_own_grid_whichever_way_its_axes_point():
    scan, _, _ = head("FLAIR", 3)
    image = nibabel.Nifti1Image(scan.voxels, scan.affine).as_reoriented([[1, 1], [2, -1], [0, 1]])
    turned = Volume(np.asarray(image.dataobj), image.affine)
    found, straight = (extraction.brain(one, "FLAIR") for one in (turned, scan))
    assert found.shape == turned.voxels.shape
    back = preprocessing.canonical(Volume(found.astype(np.float32), turned.affine)).voxels > 0
    np.testing.assert_array_equal(back, straight)


def test_brightness_and_scale_of_intensities_do_not_matter():
    scan, _, _ = head("FLAIR", 3)
    brighter = Volume(scan.voxels * 7.5, scan.affine)
    assert dice(extraction.brain(scan, "FLAIR"), extraction.brain(brighter, "FLAIR")) > 0.99


def test_dim_end_slices_are_brain_all_the_same():
    scan, brain, _ = head("FLAIR", 3)
    fall = np.ones(brain.shape[2], np.float32)
    last = np.flatnonzero(brain.any(axis=(0, 1))).max()
    fall[last - 5 :] = 0.4
    assert dice(extraction.brain(Volume(scan.voxels * fall, scan.affine), "FLAIR"), brain) > 0.9


def test_a_single_slice_has_its_brain_found():
    scan, brain, lesion = head()
    at = int(lesion.sum(axis=(0, 1)).argmax())
    alone = Volume(scan.voxels[:, :, at : at + 1], scan.affine)
    assert extraction.shows_head(alone, "FLAIR")
    found = extraction.brain(alone, "FLAIR")[..., 0]
    assert dice(found, brain[..., at]) > 0.9
    assert not extraction.shows_head(Volume(alone.voxels * brain[:, :, at : at + 1], scan.affine), "FLAIR")


def test_a_ct_head_has_its_brain_found_inside_the_bone():
    scan, brain, _ = head("FLAIR", 3)
    away = ndimage.distance_transform_edt(~brain, sampling=scan.voxel_mm)
    hounsfield = np.where(brain, 35, np.where(away <= 3, 8, np.where(away <= 9, 900, np.where(away <= 15, 40, -1000))))
    ct = Volume((hounsfield + np.random.default_rng(0).normal(0, 3, brain.shape)).astype(np.float32), scan.affine)
    assert extraction.shows_head(ct, "CT")
    assert dice(extraction.brain(ct, "CT"), brain) > 0.9


@pytest.mark.parametrize("kind", ["nothing", "noise", "a speck"])
def test_where_no_head_is_no_brain_is_found(kind):
    voxels = np.zeros((40, 40, 40), np.float32)
    if kind == "noise":
        voxels = np.random.default_rng(0).random(voxels.shape, np.float32)
    elif kind == "a speck":
        voxels[20, 20, 20] = 1
    for one in (voxels, voxels[:, :, 20:21]):
        found = extraction.brain(Volume(one, np.diag([4.0, 4.0, 4.0, 1.0])), "FLAIR")
        assert found.shape == one.shape
        assert kind == "noise" or not found.any()


def test_of_several_modalities_those_extracted_already_tell_the_brain():
    scan, brain, _ = head("FLAIR", 3)
    alone = Volume(np.where(brain, scan.voxels, 0), scan.affine)
    mask, modality, method = extraction.find({"FLAIR": scan, "T2": alone})
    assert (modality, method) == ("T2", extraction.BACKGROUND)
    assert dice(mask, brain) > 0.99
    assert extraction.find({"FLAIR": alone, "T2": alone}) is None


def test_what_is_0_inside_the_mask_stays_inside():
    scan, brain, lesion = head("FLAIR", 3)
    dark = Volume(np.where(lesion, 0, scan.voxels), scan.affine)
    out = preprocessing.extracted("FLAIR", dark, Volume(brain.astype(np.float32), scan.affine))
    np.testing.assert_array_equal(preprocessing.brain_mask([out.voxels]), brain)


def test_a_kept_brain_is_read_again(course_root):
    _, brain, _ = head("FLAIR", 3)
    extraction.keep("abc", Volume(brain, np.eye(4)))
    np.testing.assert_array_equal(extraction.kept("abc").voxels > 0, brain)
    assert extraction.kept("abd") is None


def test_heads_are_let_in_and_prepared_with_the_brain_that_examination_found(course_root, tmp_path, monkeypatch):
    scan, _, lesion = head("FLAIR", 3)
    for i in range(3):
        voxels = np.roll(scan.voxels, i, axis=0)
        volumes.write(tmp_path / f"p{i}" / f"p{i}_flair.nii.gz", voxels.astype(np.int16), scan.affine)
        mask = np.roll(lesion, i, axis=0) if i else np.roll(lesion, -4, axis=0)
        volumes.write(tmp_path / f"p{i}" / f"p{i}_seg.nii.gz", mask.astype(np.uint8), scan.affine)
    with pytest.raises(CourseError, match="litres are above 0"):
        intake.gather(str(tmp_path), extraction="never")
    gathered = intake.gather(str(tmp_path))
    said = "\n".join(gathered.notes)
    assert "3 subjects show the whole head; the brain was extracted from FLAIR by a growing surface" in said
    assert re.search(r"p0: \d+ % of its lesion lies outside the brain", said)
    assert "p1: " not in said
    monkeypatch.setattr(examination, "find", None)
    assert intake.gather(str(tmp_path)).facts == gathered.facts
    prepared = cohort.open_cohort(preparation.prepare_cohort(gathered, preprocessing.Recipe()))
    for subject in prepared.subjects:
        litres = subject.own_grid().brain.sum() * scan.millilitres / 1000
        assert litres == pytest.approx(gathered.facts[subject.id]["brain_litres"], rel=0.01)
        assert subject.facts["extracted"] == ["FLAIR", extraction.SURFACE]
        assert subject.facts["quality"]["parts"] == 1
    shutil.rmtree(course_root / "data" / "prepared" / "brains")
    with pytest.raises(CourseError, match="is gone"):
        preparation.read_brain(gathered.subjects[0], ("FLAIR",), gathered.facts["p0"])


def test_an_unknown_way_of_extraction_is_refused(tmp_path):
    with pytest.raises(CourseError, match="extraction is 'always'"):
        intake.gather(str(tmp_path), extraction="always")


@pytest.mark.parametrize("axes", [2, 3])
def test_a_surface_grows_to_the_edge_of_a_ball(axes):
    shape, mm = (80,) * axes, np.full(axes, 2.0)
    centre = np.full(axes, 80.0)
    away = np.linalg.norm(np.stack(np.indices(shape), axis=-1) * 2.0 - centre, axis=-1)
    image = ndimage.gaussian_filter(np.where(away < 60, 100.0, 0.0), 0.5)
    start = surfaces.sphere(centre, 30.0, 3)
    np.testing.assert_allclose(((start.points - centre) / 30 * start.normals()).sum(axis=1), 1, atol=0.02)
    grown = surfaces.grown(start, image, mm, (0.0, 10.0, 100.0), 0.5, 250)
    assert dice(grown.filled(shape, mm), away < 60) > 0.95


@real
def test_real_heads_and_extracted_brains_are_told_apart():
    brains = [*sorted(REAL.glob("brats/*/*_flair.nii.gz"))[::4], *sorted(REAL.glob("mslub/*/*FLAIR*.nii.gz"))[:2]]
    brains += sorted(REAL.glob("healthy_t1_bids/sub-*/anat/*.nii.gz"))[:3]
    assert len(brains) > 5
    assert not any(extraction.shows_head(volumes.read(path), "FLAIR") for path in brains)
    for name in ("dicom_sag_t1", "dicom_axial_pd"):
        assert extraction.shows_head(datasets.read_scan(REAL / name), "PD")


def lgg(folder):
    """FLAIR and lesion of a stack of slices, in the order of their numbers."""
    slices = sorted(folder.glob("*_mask.tif"), key=lambda path: int(re.search(r"_(\d+)_mask", path.name)[1]))
    lesion = np.stack([imread(path) > 0 for path in slices], axis=-1)
    flair = np.stack([imread(str(path).replace("_mask", ""))[..., 1] for path in slices], axis=-1)
    thick = 140 / len(slices)
    affine = np.array([[0, -0.94, 0, 0], [-0.94, 0, 0, 0], [0, 0, thick, 0], [0, 0, 0, 1]])
    return Volume(flair.astype(np.float32), affine), lesion


@real
def test_real_lesions_stay_in_thick_slices_of_heads():
    kept = total = 0
    for folder in sorted(path for path in (REAL / "lgg_kaggle_3m").iterdir() if path.is_dir()):
        scan, lesion = lgg(folder)
        assert extraction.shows_head(scan, "FLAIR")
        found = extraction.brain(scan, "FLAIR")
        assert 0.9 < found.sum() * scan.millilitres / 1000 < 2.2
        kept, total = kept + (found & lesion).sum(), total + lesion.sum()
    assert kept >= 0.97 * total


@real
def test_deepbet_and_the_surface_agree_on_a_real_head_and_nothing_is_downloaded(monkeypatch):
    pytest.importorskip("deepbet")
    monkeypatch.setattr(socket, "socket", None)
    scan = datasets.read_scan(REAL / "dicom_sag_t1")
    assert extraction.source({"FLAIR": scan, "T1": scan}) == ("T1", extraction.DEEPBET)
    ours, theirs = (extraction.brain(scan, "T1", method) for method in (extraction.SURFACE, extraction.DEEPBET))
    assert 1.2 < theirs.sum() * scan.millilitres / 1000 < 1.7
    assert dice(ours, theirs) > 0.9
